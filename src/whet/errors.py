"""Errors, one class per boundary; each is one line that says what was expected, what was found and what to do."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

CONTROLS = {n: " " for n in (*range(0x20), *range(0x7F, 0xA0)) if chr(n) not in "\n\t"}  # C0, DEL and C1


def printable(text: str) -> str:
    """A text that a terminal shows as it is: escapes and other control characters in data become spaces."""
    return text.translate(CONTROLS)


class WhetError(Exception):
    """An error the user can mend: printed as one line, exit code 2, no traceback."""

    def __init__(self, problem: str, *, expected: str = "", found: str = "", do: str = "") -> None:
        self.problem, self.expected, self.found, self.do = problem, expected, found, do
        parts = [problem]
        if expected:
            parts.append(f"expected {expected}")
        if found:
            parts.append(f"found {found}")
        text = ("; " if expected or found else "").join([parts[0], ", ".join(parts[1:])])
        super().__init__(" ".join(printable(f"{text}{'; ' + do if do else ''}").split()))


class TaskError(WhetError):
    """Something in the task folder or its data."""


class ModelError(WhetError):
    """A model that cannot be found, loaded or used."""


class ArtifactError(WhetError):
    """A saved System that is broken, incomplete or changed since it was written."""


class MethodError(WhetError):
    """An unknown method, a wrong setting, or a method that lacks what it needs."""


class DivergedError(MethodError):
    """A training whose loss explodes or is no number; `slower` is the learning rate to try."""

    slower = 0.0


class EngineError(WhetError):
    """A request that an engine cannot serve."""


class RemoteError(EngineError):
    """A server that does not answer, refuses, or answers garbage."""


class StoreError(WhetError):
    """What is kept on disk: a full disk, a read-only folder, a folder that holds something else."""


def rebuilt(method: str, settings: Mapping[str, Any] = MappingProxyType({})) -> str:
    """What to do about an index that cannot be used: the command that builds it again, with these settings."""
    pairs = "".join(" " + shlex.quote(f"{name}={value}") for name, value in settings.items())
    return f"build it again: whet apply {method} TASK --system SYSTEM{' --set' if pairs else ''}{pairs} --out NEW"


@contextmanager
def rebuilding(method: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Within it, an index that cannot be used names the command that builds it again with just these settings."""
    try:
        yield
    except ArtifactError as error:
        if error.do != rebuilt(method):
            raise
        do = rebuilt(method, settings)
        raise ArtifactError(error.problem, expected=error.expected, found=error.found, do=do) from error


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint ", did you mean X?" for a mistyped name, with all that exist when none is near."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
