"""What a System looks questions up in: the contract of a source, and a source from its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from whet.retrieval import Found
from whet.retrieval import Source as Documents


class Source(Protocol):
    """A frozen dataclass that finds passages for questions in a folder named by its fingerprint.

    `settings` are plain data that `revive_source` takes back; those of another kind than documents name it (`kind`).
    A source with `brief` true is shown in front of demonstrations as well, so that they show how it is read.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def k(self) -> int: ...
    @property
    def folder(self) -> Path | None: ...
    @property
    def settings(self) -> dict[str, Any]: ...

    def find(self, questions: Sequence[str], home: Path, k: int | None = None) -> list[list[Found]]:
        """At most k (or its own k) passages for each question, best first; never fewer lists than questions."""
        ...


def revive_source(settings: Mapping[str, Any], folder: Path | None) -> Source:
    """A source from its settings; raises KeyError, TypeError or ValueError where they are none of a source."""
    from whet.linking import GraphSource

    rest = {key: value for key, value in settings.items() if key != "kind"}
    kinds: dict[str, Any] = {"passages": Documents, "facts": GraphSource}
    source: Source = kinds[settings.get("kind", "passages")](**rest, folder=folder)
    return source
