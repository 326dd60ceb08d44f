"""What a System looks questions up in: the contract of a source, and a source from its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from whet.retrieval import Found
from whet.retrieval import Source as Documents
from whet.task import Query


class Source(Protocol):
    """A frozen dataclass that finds passages for questions, in a folder named by its fingerprint or in a `store`.

    `settings` are plain data that `revive_source` takes back, its `kind` among them; `version` says which state of what
    it looks into answers now. A source with `brief` true is shown in front of demonstrations as well, so that they
    show how it is read.
    """

    @property
    def kind(self) -> str: ...
    @property
    def brief(self) -> bool: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def k(self) -> int: ...
    @property
    def folder(self) -> Path | None: ...
    @property
    def store(self) -> str: ...
    @property
    def settings(self) -> dict[str, Any]: ...

    def find(self, questions: Sequence[Query], home: Path, k: int | None = None) -> list[list[Found]]:
        """At most k (or its own k) passages for each question, best first; never fewer lists than questions."""

    def rank(self, questions: Sequence[Query], home: Path, most: int) -> list[list[str]]:
        """The ids of the best documents for each question, best first."""


def revive_source(settings: Mapping[str, Any], folders: Mapping[str, Path]) -> Source:
    """A source from its settings; `folders` says by fingerprint where each lies.

    Raises KeyError, TypeError or ValueError where they are none of a source.
    """
    from whet.linking import GraphSource

    rest = {key: value for key, value in settings.items() if key != "kind"}
    kinds: dict[str, Any] = {kind.kind: kind for kind in (Documents, GraphSource)}
    made = kinds[settings["kind"]](**rest)
    source: Source = replace(made, folder=folders.get(made.fingerprint))
    return source
