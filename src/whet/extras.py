"""What is not always there: packages of the extras, and addresses of the public net."""

from __future__ import annotations

import ipaddress
import socket
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from whet.errors import MethodError, TaskError


def package(name: str, extra: str) -> Any:
    """A package of an extra. Raises MethodError where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MethodError(f"this needs the package {name}", expected="it installed", found="none",
                          do=f"pip install 'whet[{extra}]'") from error  # fmt: skip


def public(url: str) -> str:
    """An address of a URL's host. Raises TaskError where one of them is this machine's or a private network's."""
    import httpx

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TaskError(f"{url[:80]} is no address", expected="http:// or https://", found=parts.scheme or "neither",
                        do="correct it")  # fmt: skip
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = httpx.URL(url).raw_host.decode("ascii")
        found = sorted({str(i[4][0]) for i in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except (OSError, ValueError, httpx.InvalidURL) as error:
        raise TaskError(f"{url} cannot be found", found=str(error), do="correct it, or save it as a file") from error
    for one in found:
        if not ipaddress.ip_address(one.partition("%")[0]).is_global:
            raise TaskError(f"{url} leads to a private address", expected="a public one", found=one,
                            do="save it as a file")  # fmt: skip
    return min(found, key=lambda one: ":" in one)  # IPv4 first: not every net has the other


def pinned(url: str, address: str) -> dict[str, Any]:
    """What httpx is to be called with so that the address that was checked is the one that is asked.

    A name could lead elsewhere when it is looked up a second time.
    """
    import httpx

    named = httpx.URL(url)  # its host as the net has it: 한국.kr is xn--3e0b707e.kr
    return {"url": named.copy_with(host=address), "headers": {"host": named.netloc.decode("ascii")},
            "extensions": {"sni_hostname": named.raw_host.decode("ascii")} if named.scheme == "https" else {}}  # fmt: skip
