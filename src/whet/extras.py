"""What is not always there: packages of the extras, and addresses of the public net."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from concurrent.futures import Future
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from whet.errors import MethodError, TaskError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
CARRYING = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "::/96")))  # an address of IPv4 is their last four bytes
LOCAL = ipaddress.IPv6Network("64:ff9b:1::/48")  # what a net translates for itself (RFC 8215), global by Python 3.11


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
        if not _global(one.partition("%")[0]):
            raise TaskError(f"{url} leads to a private address", expected="a public one", found=one,
                            do="save it as a file")  # fmt: skip
    return min(found, key=lambda one: ":" in one)  # IPv4 first: not every net has the other


def _global(address: str) -> bool:
    """Whether an address is one machine's of the public net; one of IPv6 that stands for one of IPv4 is as that is."""
    one = ipaddress.ip_address(address)
    if isinstance(one, ipaddress.IPv6Address):
        last = ipaddress.IPv4Address(int(one) & 0xFFFFFFFF)
        within = one.ipv4_mapped or one.sixtofour or next((last for net in CARRYING if one in net), None)
        if within or one.is_site_local or one in LOCAL:
            return within is not None and _global(str(within))
    return one.is_global and not one.is_multicast


def within(seconds: float, ask: Callable[[httpx.Client], T]) -> T:
    """What `ask` makes of a client, which is closed after so many seconds, whatever it waits for then.

    httpx's own limits hold for each piece that arrives, a header's among them. Raises what `ask` raises, TimeoutError
    else.
    """
    import httpx

    ended: Future[T] = Future()

    def run() -> None:
        try:
            ended.set_result(ask(client))
        except BaseException as error:
            ended.set_exception(error)

    with httpx.Client(follow_redirects=False) as client:
        Thread(target=run, daemon=True).start()
        return ended.result(seconds)


def pinned(url: str, address: str) -> dict[str, Any]:
    """What httpx is to be called with so that the address that was checked is the one that is asked.

    A name could lead elsewhere when it is looked up a second time. A proxy looks it up by itself, and is given the
    name: behind one, httpx would look for the address in the server's certificate.
    """
    import httpx

    named = httpx.URL(url)  # its host as the net has it: 한국.kr is xn--3e0b707e.kr
    proxies = getproxies()
    if (named.scheme in proxies or "all" in proxies) and not proxy_bypass(named.host):
        return {"url": named}
    more = {"sni_hostname": named.raw_host.decode("ascii")} if named.scheme == "https" else {}
    return {"url": named.copy_with(host=address), "headers": {"host": named.netloc.decode("ascii")}, "extensions": more}
