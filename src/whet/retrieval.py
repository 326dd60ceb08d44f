"""The index over passages: BM25 and sentence embeddings, on disk and memory-mapped, fused by reciprocal ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.documents import Passage
from whet.embed import PACKAGE, Embedder
from whet.errors import ArtifactError, MethodError
from whet.model import aside

if TYPE_CHECKING:
    import numpy as np

MIXES = ("both", "words", "meaning")
DEPTH = 100  # passages of each ranking that are fused
RANK_CONSTANT = 60  # of reciprocal rank fusion (Cormack et al. 2009)
BATCH = 64  # questions whose similarities are held at once


@dataclass(frozen=True)
class Found:
    """A passage that was found, with its cosine similarity to the question."""

    passage: Passage
    similarity: float


def identity(passages: Sequence[Passage]) -> str:
    """What an index is named by: its passages and the model that embeds them."""
    body = json.dumps([PACKAGE, [asdict(p) for p in passages]], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def build(passages: Sequence[Passage], folder: Path, embedder: Embedder) -> None:
    """Write an index over passages into a new folder, aside and then renamed."""
    import numpy as np

    with aside(folder) as work:
        work.mkdir(exist_ok=True)
        texts = [_shown(p) for p in passages]
        np.save(work / "dense.npy", embedder(texts), allow_pickle=False)
        words = _bm25s()
        ranker = words.BM25(method="lucene")
        ranker.index(words.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
        ranker.save(str(work / "words"))
        lines = [json.dumps(asdict(p), ensure_ascii=False) for p in passages]
        (work / "passages.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        body = {"embedder": PACKAGE, "passages": len(passages), "identity": identity(passages)}
        (work / "index.json").write_text(json.dumps(body), encoding="utf-8")


def _shown(passage: Passage) -> str:
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text


def _bm25s() -> Any:
    try:
        return import_module("bm25s")
    except ImportError as error:
        raise MethodError("retrieval needs bm25s", expected="the package", found="none", do="pip install 'whet[rag]'"
                          ) from error  # fmt: skip


def _refused(folder: Path, why: str, expected: str, found: str) -> ArtifactError:
    return ArtifactError(f"the index in {folder} {why}", expected=expected, found=found,
                         do="build it again with `whet apply rag`")  # fmt: skip


@lru_cache(maxsize=4)
def opened(folder: Path, home: Path) -> Index:
    """The index in a folder, opened once."""
    return Index(folder, Embedder(home))


class Index:
    """An index as `build` wrote it. Raises ArtifactError where it is incomplete or another model embedded it."""

    def __init__(self, folder: Path, embedder: Embedder) -> None:
        self.folder, self.embedder = folder, embedder
        try:
            body = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            lines = (folder / "passages.jsonl").read_text(encoding="utf-8").splitlines()
            self.passages = [Passage(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _refused(folder, "cannot be read", "what whet wrote", str(error)[:120]) from error
        if body["embedder"] != PACKAGE:
            raise _refused(folder, "was made by another embedding model", PACKAGE, body["embedder"])
        if (found := identity(self.passages)) != body["identity"]:
            raise _refused(folder, "was changed", body["identity"][:12], found[:12])

    @cached_property
    def _dense(self) -> np.ndarray[Any, Any]:
        import numpy as np

        return np.asarray(np.load(self.folder / "dense.npy", mmap_mode="r", allow_pickle=False))

    @cached_property
    def _words(self) -> Any:
        return _bm25s().BM25.load(str(self.folder / "words"), mmap=True)

    def search(self, questions: Sequence[str], k: int, mix: str = "both") -> list[list[Found]]:
        """The k best passages for each question, best first; equal ones in the order of the documents."""
        import numpy as np

        made: list[list[Found]] = []
        depth = min(max(DEPTH, k), len(self.passages))
        for at in range(0, len(questions), BATCH):
            some = list(questions[at : at + BATCH])
            near = self.embedder(some) @ self._dense.T
            rankings = []
            if mix != "words":
                rankings.append(np.argsort(-near, axis=1, kind="stable")[:, :depth])
            if mix != "meaning":
                rankings.append(self._by_words(some, depth))
            for n in range(len(some)):
                scores: dict[int, float] = {}
                for ranking in rankings:
                    for rank, passage in enumerate(ranking[n]):
                        if passage >= 0:
                            scores[int(passage)] = scores.get(int(passage), 0.0) + 1 / (RANK_CONSTANT + rank + 1)
                best = sorted(scores, key=lambda p: (-scores[p], p))[:k]
                made.append([Found(self.passages[p], float(near[n, p])) for p in best])
        return made

    def _by_words(self, questions: list[str], depth: int) -> np.ndarray[Any, Any]:
        """Passages by BM25 [questions, depth]; -1 where no word of the question occurs."""
        import numpy as np

        tokens = _bm25s().tokenize(questions, stopwords="en", show_progress=False)
        best, scores = self._words.retrieve(tokens, k=depth, show_progress=False, n_threads=0)
        return np.where(scores > 0, best, -1)


@dataclass(frozen=True)
class Source:
    """Documents that a question is looked up in when it is asked: an index by its identity, and how it is read.

    `k` passages at most, those below `threshold` of cosine similarity left out. `folder` says where the index lies.
    """

    fingerprint: str
    k: int = 3
    mix: str = "both"
    threshold: float = 0.0
    folder: Path | None = field(default=None, compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        """All that makes the source what it is, as plain data."""
        return {"fingerprint": self.fingerprint, "k": self.k, "mix": self.mix, "threshold": self.threshold}

    def find(self, questions: Sequence[str], home: Path, k: int | None = None) -> list[list[Found]]:
        """The passages that each question is shown, best first. Raises ArtifactError where the index is not at hand."""
        if self.folder is None or not self.folder.is_dir():
            raise ArtifactError(f"the index {self.fingerprint[:12]} is not at hand", expected="its folder",
                                found=str(self.folder), do="load the System from its own folder")  # fmt: skip
        found = opened(self.folder, home).search(questions, k or self.k, self.mix)
        return [[f for f in some if f.similarity >= self.threshold] for some in found]
