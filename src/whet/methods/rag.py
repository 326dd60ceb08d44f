"""Retrieval (Lewis et al. 2020): passages of the task's documents in front of the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from whet.methods import Need, Run
from whet.retrieval import MIXES
from whet.system import System
from whet.task import Learnable


@dataclass(frozen=True)
class Rag:
    """The k best passages by BM25 and sentence embeddings, merged into one ranking, in front of each question.

    `chunk` is the words of a passage at most. `mix`: both (their scaled scores), ranks (their reciprocal ranks), words
    (BM25) or meaning (embeddings). Passages whose cosine similarity lies below `threshold` are left out, and the last
    of those that hold more than about `tokens` tokens together (0: as many as the context window holds). `reranker`
    names a cross-encoder (a folder or Hub id) that reads the best twenty again. `store` puts the passages into a
    database (postgresql://… or qdrant://…). Defaults: three passages, what a small model can still read.
    """

    name: ClassVar[str] = "rag"
    family: ClassVar[str] = "retrieval"
    needs: ClassVar[tuple[Need, ...]] = ("documents",)
    writes: ClassVar[tuple[str, ...]] = ("sources",)
    invalidates: ClassVar[tuple[str, ...]] = ("calibration",)

    k: int = 3
    chunk: int = 200
    mix: str = "both"
    threshold: float = 0.0
    reranker: str = ""
    store: str = ""
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.k < 1 or not 20 <= self.chunk <= 1000 or not 0 <= self.threshold < 1 or self.tokens < 0:
            raise ValueError("k is at least 1, chunk 20 to 1000 words, threshold from 0 to below 1, tokens at least 0")
        if self.mix not in MIXES:
            raise ValueError(f"mix is {self.mix!r}; one of {', '.join(MIXES)}")

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying."""
        return {"k": (1, 3, 5), "mix": MIXES, "threshold": (0.0, 0.3), "tokens": (0, 500)}

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with the task's documents as its source; an index that was built before is found again."""
        from whet import documents
        from whet.databases import filled
        from whet.embed import Embedder
        from whet.retrieval import Source, build, identity, usable

        texts, notes = run.documents(data)
        pieces = [p for text in texts for p in documents.passages(text, self.chunk)]
        name = identity(pieces)
        if run.tell is not None:
            run.tell(f"indexing {len(pieces)} passages", 0, 1)
        folder = None if self.store else run.store.artifact(name)
        if folder is not None and not usable(folder, name, run.home):
            build(pieces, folder, Embedder(run.home))
        place = filled(self.store, name, pieces, run.home) if self.store else name
        named = dict.fromkeys(name for e in data.train for name, grade in e.evidence if grade > 0)
        if gone := [*(named.keys() - {text.id for text in texts})]:
            notes = (*notes, f"evidence of train names {len(gone)} documents that are not there (of {len(named)}): "
                             f"{', '.join(sorted(gone)[:3])}")  # fmt: skip
        run.notes.update(documents=len(texts), passages=len(pieces))
        run.leave_out(*notes)
        source = Source(self.k, self.mix, self.threshold, self.chunk, self.reranker, self.store, self.tokens, place,
                        folder)  # fmt: skip
        others = tuple(s for s in system.sources if s.kind != source.kind)
        return replace(system.uncalibrated, sources=(*others, source))
