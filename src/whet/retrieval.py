"""The index over passages: BM25 and sentence embeddings, on disk and memory-mapped, merged into one ranking.

A corpus is a folder of generations, each an index that never changes; `current` names the one that answers. A change
writes the next generation beside it and then renames `current`: the next question sees it, and a crash leaves the old.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
import shutil
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from whet.documents import HANGUL, MARKS, PARTICLE, PIECE, Document, Passage, passages
from whet.embed import PACKAGE, Embedder, mark
from whet.errors import ArtifactError, MethodError, rebuilding, rebuilt
from whet.extras import package
from whet.model import aside
from whet.rows import short
from whet.splits import UNSPACED
from whet.store import write_text
from whet.task import Query

if TYPE_CHECKING:
    import numpy as np

    from whet.databases import Database

    Vectors = np.ndarray[Any, Any]

RUN = re.compile(f"[{UNSPACED}{HANGUL}]{{2,}}")
WORD = rf"[\w{MARKS}]{{2,}}"
MIXES = ("both", "ranks", "words", "meaning")
# A character within a word that spaces set off, and what may follow such a word: a Korean one may have two particles.
INSIDE = re.compile(rf"[^\W{UNSPACED}]|[{MARKS}]")
BEHIND = re.compile(f"{PARTICLE}{{0,2}}(?!{INSIDE.pattern})")
Key = TypeVar("Key", int, str)
DEPTH = 100  # passages of each ranking that are merged
K1, B = 0.9, 0.4  # of BM25: Anserini's defaults (Yang et al. 2017)
RANK_CONSTANT = 60  # of reciprocal rank fusion (Cormack et al. 2009)
MEANING = 0.6  # of the score where words and meaning are mixed: chosen on train questions of three tasks (docs/rag.md)
BATCH = 64  # questions whose similarities are held at once
EXACT = 50_000  # passages up to which vectors are compared one by one; beyond, through FAISS's inverted lists
COMPARED = 8  # questions that are compared with all of so many passages at once: 12 bytes for each pair
NEAR_ENOUGH = 0.98  # share of the true ten nearest that the lists must give on a sample
NAMING, HOP = 2, 0.2  # best passages whose text may name other documents; the share of their score that those gain
SHORTEST, CARRIERS = 4, 3  # characters of a title that names, at least; documents that carry it, at most
SUFFIX = re.compile(r"\s*\([^()]*\)$")  # what tells titles apart that are the same: (film), (1954)
RERANKED = 20  # passages that a cross-encoder reads for each question, at least


@dataclass(frozen=True)
class Found:
    """A passage that was found, with its cosine similarity to the question; equal where the passages are."""

    passage: Passage
    similarity: float = field(compare=False)


def identity(pieces: Sequence[Passage]) -> str:
    """What a generation is named by: its passages, and how words and meanings are told from them."""
    how = f"snowball, bigrams, marks, k1 {K1}, b {B}, names"
    body = json.dumps([mark(), how, [vars(p) for p in pieces]], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def shown(passage: Passage) -> str:
    """A passage as it is indexed and read: title, then text."""
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text


# --- writing ----------------------------------------------------------------------------------------------------------


def build(
    pieces: Sequence[Passage], folder: Path, embedder: Embedder, known: Vectors | None = None,
    places: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """Give a corpus a generation over these passages and make it current; returns its name.

    The vector of a text that has a place in those `known` is taken from there; only the others are embedded.
    """
    import numpy as np

    name = identity(pieces)
    with aside(folder / name) as work:
        texts = [shown(p) for p in pieces]
        vectors = _vectors(texts, embedder, known, places)
        if len(pieces) > EXACT:
            _into_lists(vectors, work / "near.faiss")
            vectors = vectors.astype(np.float16)
        np.save(work / "dense.npy", vectors, allow_pickle=False)
        stems = _stems(texts)
        if any(stems.ids):
            ranker = package("bm25s", "rag").BM25(method="lucene", k1=K1, b=B)
            ranker.index(stems, show_progress=False)
            ranker.save(str(work / "words"))
        lines = [json.dumps(vars(p), ensure_ascii=False).encode() + b"\n" for p in pieces]
        (work / "passages.jsonl").write_bytes(b"".join(lines))
        np.save(work / "named.npy", np.array(_nameable(pieces), bool), allow_pickle=False)
        np.save(work / "lines.npy", np.cumsum([0, *map(len, lines)], dtype=np.int64), allow_pickle=False)
        files = {str(p.relative_to(work)): _hash(p) for p in sorted(work.rglob("*")) if p.is_file()}
        body = {"embedder": mark(), "passages": len(pieces), "files": files}
        (work / "index.json").write_text(json.dumps(body, indent=1), encoding="utf-8")
    write_text(folder / "current", name)
    return name


def _vectors(texts: Sequence[str], embedder: Embedder, known: Vectors | None, places: Mapping[str, int]) -> Vectors:
    import numpy as np

    new = [t for t in dict.fromkeys(texts) if t not in places]
    made = np.asarray(embedder(new), np.float32)
    at = {text: n for n, text in enumerate(new)}
    result = np.empty((len(texts), made.shape[1]), np.float32)
    for n, text in enumerate(texts):
        result[n] = made[at[text]] if known is None or text not in places else known[places[text]]
    return result


def _stems(texts: Sequence[str]) -> Any:
    """The words of texts as BM25 counts them: without English stop words, as Snowball's stems."""
    stemmer = package("Stemmer", "rag").Stemmer("english")
    every = [paired(text) for text in texts]
    return package("bm25s", "rag").tokenize(every, token_pattern=WORD, stopwords="en", stemmer=stemmer,
                                            show_progress=False)  # fmt: skip


def paired(text: str) -> str:
    """A text in NFC and, behind it, each pair of neighbouring characters where words are not told apart by spaces."""
    text = unicodedata.normalize("NFC", text)
    return " ".join([text, *(run[n : n + 2] for run in RUN.findall(text) for n in range(len(run) - 1))])


def called(passage: Passage) -> str:
    """What a passage's document is called in the text of others: its title without a suffix in brackets."""
    return SUFFIX.sub("", passage.name)


def names(text: str, name: str) -> bool:
    """Whether a name stands in a text word for word, its case as it is; a Korean one may have particles."""
    if name not in text:
        return False
    found = (f.span() for f in re.finditer(re.escape(name), text))
    return any(BEHIND.match(text, end) and not (begin and INSIDE.match(text, begin - 1)) for begin, end in found)


def _nameable(pieces: Sequence[Passage]) -> list[bool]:
    """Of each passage whether its document's name says which document is meant."""
    known = {p.document: called(p) for p in pieces}
    carriers = Counter(known.values())
    return [len(n := known[p.document]) >= SHORTEST and carriers[n] <= CARRIERS for p in pieces]


def _into_lists(vectors: Vectors, file: Path) -> None:
    """Inverted lists over many vectors (FAISS, half precision); how many a search reads is found by measuring.

    The sample's questions lie as far from their passages as questions do (a cosine of 0.7), which few lists miss.
    """
    import numpy as np

    faiss, draw = package("faiss", "rag"), np.random.default_rng(0)
    lists = int(4 * math.sqrt(len(vectors)))
    near = faiss.index_factory(vectors.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    near.train(vectors[draw.choice(len(vectors), min(len(vectors), 50 * lists), replace=False)])
    near.add(vectors)
    asked = vectors[draw.choice(len(vectors), 200, replace=False)]
    noise = draw.standard_normal(asked.shape, np.float32)
    asked = asked + noise / np.linalg.norm(noise, axis=1, keepdims=True)
    exact = np.concatenate([_ten_nearest(asked[n : n + COMPARED], vectors) for n in range(0, len(asked), COMPARED)])
    near.parallel_mode = 0  # threads share the questions

    def enough(probes: int) -> bool:
        near.nprobe = probes
        _, got = near.search(asked, 10)
        return bool(np.mean([len({*a} & {*b}) / 10 for a, b in zip(exact, got, strict=True)]) >= NEAR_ENOUGH)

    most = 8
    while most < lists and not enough(most):
        most = min(lists, 2 * most)
    steps = range(most // 2, most, max(1, most // 16)) if most > 8 else ()
    near.nprobe = next((n for n in steps[1:] if enough(n)), most)
    faiss.write_index(near, str(file))


def _ten_nearest(asked: Vectors, vectors: Vectors) -> Vectors:
    """The ten nearest of all vectors to each of a few [few, 10], in no order; copied, so that no whole row stays."""
    import numpy as np

    return np.argpartition(asked @ vectors.T, -10, axis=1)[:, -10:].copy()


def change(
    folder: Path, home: Path, put: Iterable[Document] = (), drop: Iterable[str] = (), words: int = 200
) -> tuple[str, int]:
    """Put documents into a corpus (one whose id is there is replaced) and drop others by id.

    Returns the new generation's name and how many passages had to be embedded. Raises ArtifactError for an id to drop
    that is not there.
    """
    with _alone(folder):
        before = opened(folder, current(folder), home)
        held = list(before)  # read once
        new, gone = list(put), set(drop)
        if unknown := sorted(gone - {p.document for p in held}):
            raise ArtifactError("no such document", expected="ids of documents", found=", ".join(unknown[:5]),
                                do="see `whet documents SYSTEM`")  # fmt: skip
        gone |= {d.id for d in new}
        pieces = [p for p in held if p.document not in gone]
        pieces += [p for d in new for p in passages(d, words)]
        places = {shown(p): n for n, p in enumerate(held)}
        name = build(pieces, folder, Embedder(home), before.dense, places)
        for old in folder.iterdir():  # one generation back stays: who reads it still may
            if old.is_dir() and old.name not in (name, before.name):
                shutil.rmtree(old, ignore_errors=True)
        return name, len({shown(p) for p in pieces} - places.keys())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One change at a time. Raises MethodError on a system without file locks."""
    try:
        import fcntl
    except ModuleNotFoundError as error:
        raise MethodError(
            "passages cannot be changed on this system", expected="file locks as on Linux and macOS", found="none",
            do="index them anew, or change them under WSL",
        ) from error  # fmt: skip
    with (folder / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------------


def _refused(folder: Path, why: str, expected: str, found: str) -> ArtifactError:
    return ArtifactError(f"the index in {folder} {why}", expected=expected, found=found,
                         do=rebuilt("rag"))  # fmt: skip


def current(folder: Path) -> str:
    """The generation of a corpus that answers now. Raises ArtifactError where there is none."""
    try:
        name = (folder / "current").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _refused(folder, "cannot be read", "what whet wrote", str(error)) from error
    if not name.isalnum():  # it is the name of a folder beside it, never a path
        raise _refused(folder, "cannot be read", "the name of a generation", short(name))
    return name


@lru_cache(maxsize=4)
def opened(folder: Path, name: str, home: Path) -> Index:
    """A generation of a corpus, opened and checked once."""
    return Index(folder / name, Embedder(home))


def usable(folder: Path, name: str, home: Path) -> bool:
    """Whether a corpus is there as `build` left it; one that was spoilt since is taken away, to be built anew."""
    if not (folder / "current").exists():  # another process may be about to write it
        return False
    try:
        return opened(folder, current(folder), home) is not None
    except ArtifactError:
        shutil.rmtree(folder)
        return False


class Corpus(ABC, Generic[Key]):
    """Passages by their keys, and the search over them, wherever they lie."""

    @abstractmethod
    def __getitem__(self, key: Key) -> Passage:
        """The passage of a key that `candidates` gave."""

    @abstractmethod
    def ids(self) -> list[str]:
        """The ids of all documents."""

    @abstractmethod
    def of(self, documents: Collection[str]) -> dict[str, list[Passage]]:
        """The passages of these documents, in their order; without the documents that are not there."""

    @abstractmethod
    def candidates(self, questions: Sequence[str], depth: int) -> Iterator[tuple[dict[Key, float], dict[Key, float]]]:
        """For each question the scores by words, where above zero, and the cosine similarity of all candidates.

        Candidates are the `depth` best of each. Equal ones stand in the order of the documents.
        """

    def nameable(self, key: Key) -> bool:
        """Whether a passage's document can be told by its name in the text of others; never, where no store knows."""
        return False

    def search(self, questions: Sequence[str], k: int, mix: str = "both", reranker: str = "") -> list[list[Found]]:
        """The k best passages for each question, best first; equal ones in the order of the documents.

        Those of documents that the best two name stand higher (see `hopped`).
        """
        made: list[list[Found]] = []
        wanted = max(k, RERANKED) if reranker else k
        for question, (words, near) in zip(questions, self.candidates(questions, max(DEPTH, wanted)), strict=True):
            order = _ordered(self.hopped(scored(words, near, mix)))
            found = [Found(self[p], near[p]) for p in order[:wanted]]
            made.append(reranked(question, found, reranker)[:k] if reranker else found)
        return made

    def hopped(self, scores: Mapping[Key, float]) -> dict[Key, float]:
        """Scores of candidates with a second hop: what a passage names, a question may ask about through it.

        The best candidate of each other document that one of the two best passages names by its title gains a fifth of
        that passage's score. Others are not fetched: with no score of their own they would stay behind.
        """
        made, order, seen = dict(scores), _ordered(scores), set[str]()
        best = [(self[key], scores[key]) for key in order[:NAMING]]
        for key in filter(self.nameable, order):
            passage = self[key]
            if passage.document in seen:
                continue
            seen.add(passage.document)
            gains = [score for one, score in best if one.document != passage.document
                     and names(one.text, called(passage))]  # fmt: skip
            made[key] += HOP * max(gains, default=0.0)
        return made

    def rank(self, questions: Sequence[str], most: int, mix: str = "both") -> list[list[str]]:
        """The ids of the best documents for each question, best first; each counts by the best of its passages.

        Where one long document fills the candidates, more are looked at, until `most` documents are among them.
        """
        made: dict[int, list[str]] = {}
        depth, left = max(DEPTH, most), list(range(len(questions)))
        while left:
            short = []
            for n, (words, near) in zip(left, self.candidates([questions[n] for n in left], depth), strict=True):
                name = {p: self[p].document for p in near}
                best: list[dict[str, float]] = [{}, {}]
                for scores, of in zip((words, near), best, strict=True):
                    for passage in scores:
                        of[name[passage]] = max(scores[passage], of.get(name[passage], -1.0))
                made[n] = merged(best[0], best[1], mix)[:most]
                if len(made[n]) < most and len(words if mix == "words" else near) >= depth:  # else these were all
                    short.append(n)
            left, depth = short, 4 * depth
        return [made[n] for n in range(len(questions))]


class Index(Corpus[int]):
    """A generation as `build` wrote it: passages by number, and the search over them.

    Raises ArtifactError where a file was changed or is missing, or where another model embedded it.
    """

    def __init__(self, folder: Path, embedder: Embedder) -> None:
        self.folder, self.name, self.embedder = folder, folder.name, embedder
        try:
            body = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            if body["embedder"] != mark():
                raise _refused(folder, "was made by another embedding model", mark(), body["embedder"])
            for file, digest in body["files"].items():
                if Path(file).is_absolute() or ".." in Path(file).parts:
                    raise ValueError(f"{file!r} leads out of it")
                if (found := _hash(folder / file)) != digest:
                    raise _refused(folder, f"was changed: {file}", digest[:12], found[:12])
            self.size = int(body["passages"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise _refused(folder, "cannot be read", "what whet wrote", str(error)[:120]) from error

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Passage]:
        return (self[n] for n in range(self.size))

    def __getitem__(self, number: int) -> Passage:
        begin, end = self._lines[number : number + 2]
        return Passage(**json.loads(self._text[begin:end]))

    def nameable(self, number: int) -> bool:
        """Whether at most three documents carry the title, and it is long enough; not told by an older index."""
        return self._named is not None and bool(self._named[number])

    def ids(self) -> list[str]:
        """The ids of all documents, in their order."""
        return list(self._numbers)

    def of(self, documents: Collection[str]) -> dict[str, list[Passage]]:
        """The passages of these documents, where they are there."""
        return {name: [self[n] for n in self._numbers[name]] for name in documents if name in self._numbers}

    @cached_property
    def _numbers(self) -> dict[str, list[int]]:
        """The numbers of each document's passages."""
        made: dict[str, list[int]] = {}
        for number, passage in enumerate(self):
            made.setdefault(passage.document, []).append(number)
        return made

    @cached_property
    def _text(self) -> Any:
        with (self.folder / "passages.jsonl").open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    @cached_property
    def _lines(self) -> Vectors:
        return self._array("lines")

    @cached_property
    def _named(self) -> Vectors | None:
        return self._array("named") if (self.folder / "named.npy").exists() else None

    @cached_property
    def dense(self) -> Vectors:
        """Vectors of all passages [n, 384], memory-mapped."""
        return self._array("dense")

    def _array(self, name: str) -> Vectors:
        import numpy as np

        return np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))

    @cached_property
    def _lists(self) -> Any:
        faiss, file = package("faiss", "rag"), self.folder / "near.faiss"
        if not file.exists():
            return None
        near = faiss.read_index(str(file), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        near.parallel_mode = 1  # threads share the lists of one question, not the questions
        return near

    @cached_property
    def _words(self) -> Any:
        """BM25's index; None where no passage has a word that it counts."""
        file = self.folder / "words"
        return package("bm25s", "rag").BM25.load(str(file), mmap=True) if file.exists() else None

    def candidates(self, questions: Sequence[str], depth: int) -> Iterator[tuple[dict[int, float], dict[int, float]]]:
        """BM25 scores, and cosine similarities by all vectors or, of many passages, through the inverted lists."""
        depth = min(depth, self.size)
        for at in range(0, len(questions), BATCH):
            some = list(questions[at : at + BATCH])
            if not self.size:
                yield from (({}, {}) for _ in some)
                continue
            asked = self.embedder(some)
            nearest = self._by_meaning(asked, depth)
            for n, words in enumerate(self._by_words(some, depth)):
                both = sorted({*words, *(int(p) for p in nearest[n] if p >= 0)})
                yield words, dict(zip(both, (self.dense[both] @ asked[n]).tolist(), strict=True))

    def _by_words(self, questions: Sequence[str], depth: int) -> Iterator[dict[int, float]]:
        """The `depth` best passages by BM25 of each question, where above zero; the first of equal ones."""
        import numpy as np

        stems = _stems(questions)
        names = {number: stem for stem, number in stems.vocab.items()}
        for ids in stems.ids:
            known = [] if self._words is None else self._words.get_tokens_ids([names[i] for i in ids])
            if not known:
                yield {}
                continue
            # Only those above zero are ordered: a selection among a million equal zeros takes ten times as long.
            scores = self._words.get_scores_from_ids(known)
            above = np.flatnonzero(scores > 0)
            if len(above) > depth:
                last = np.partition(scores[above], -depth)[-depth]
                sure, equal = above[scores[above] > last], above[scores[above] == last]
                above = np.sort(np.concatenate([sure, equal[: depth - len(sure)]]))
            yield dict(zip(above.tolist(), scores[above].tolist(), strict=True))

    def _by_meaning(self, asked: Vectors, depth: int) -> Vectors:
        """Passages by cosine similarity [questions, depth]; -1 where the lists gave fewer."""
        import numpy as np

        if self.size > EXACT and self._lists is not None:
            return np.asarray(self._lists.search(asked, depth)[1])
        return np.argsort(-(asked @ self.dense.T), axis=1, kind="stable")[:, :depth]


def scored(words: Mapping[Key, float], near: Mapping[Key, float], mix: str) -> Mapping[Key, float]:
    """Candidates by words and by meaning with one score each.

    `both`: the weighted mean of the two scores, each from 0 on and in standard deviations over the candidates (Bruch et
    al. 2023, who find such a mean above reciprocal ranks). `ranks`: the sum of 1 / (60 + rank) (Cormack et al. 2009).
    `words`, `meaning`: one alone.
    """
    if mix in ("words", "meaning"):
        return words if mix == "words" else near
    if mix == "ranks":
        orders = [{key: n for n, key in enumerate(_ordered(one), 1)} for one in (words, near)]
        return {key: sum(1 / (RANK_CONSTANT + o[key]) for o in orders if key in o) for key in near}
    said, meant = _spread([words.get(key, 0.0) for key in near]), _spread(list(near.values()))
    return {k: (1 - MEANING) * w + MEANING * m for k, w, m in zip(near, said, meant, strict=True)}


def _spread(scores: list[float]) -> list[float]:
    """Scores from 0 on, in their standard deviations; zeros where all are equal."""
    import numpy as np

    if not scores:
        return []
    values = np.asarray(scores) - min(scores)
    return [float(v) for v in values / (values.std() or 1.0)]


def merged(words: Mapping[Key, float], near: Mapping[Key, float], mix: str) -> list[Key]:
    """Candidates by words and by meaning as one ranking (see `scored`), best first; equal ones in order."""
    return _ordered(scored(words, near, mix))


def _ordered(scores: Mapping[Key, float]) -> list[Key]:
    return sorted(scores, key=lambda key: -scores[key])


@lru_cache(maxsize=1)
def _cross_encoder(name: str) -> Callable[[list[tuple[str, str]]], Any]:
    from sentence_transformers import CrossEncoder

    from whet.model import quiet

    try:
        model = quiet(CrossEncoder, name, model_kwargs={"use_safetensors": True})
    except Exception as error:  # the hub and its files fail in many ways
        raise MethodError(f"the reranker {name!r} cannot be opened", expected="a cross-encoder's folder or Hub id",
                          found=str(error)[:120], do="name another, or none") from error  # fmt: skip
    if (scores := model.model.config.num_labels) != 1:  # of entailment, say: none of its scores is relevance
        raise MethodError(f"the reranker {name!r} ranks nothing", expected="a cross-encoder with one score",
                          found=f"{scores} scores", do="name another, or none")  # fmt: skip
    return lambda rows: model.predict(rows, show_progress_bar=False)


def reranked(question: str, found: Sequence[Found], reranker: str) -> list[Found]:
    """What was found in the order of a cross-encoder that reads question and passage together."""
    scores = _cross_encoder(reranker)([(question, shown(f.passage)) for f in found]) if found else []
    return [f for _, _, f in sorted((-float(s), n, f) for (n, f), s in zip(enumerate(found), scores, strict=True))]


def within(found: Sequence[Found], tokens: int) -> list[Found]:
    """The first passages that hold about `tokens` tokens at most together; one, where that is longer by itself."""
    sizes = accumulate(len(PIECE.findall(shown(f.passage))) for f in found)
    return [f for n, (f, size) in enumerate(zip(found, sizes, strict=True)) if size <= tokens or not n]


# --- as part of a System ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Documents that a question is looked up in when it is asked: how they are read, and where their corpus lies.

    `k` passages at most, those below `threshold` of cosine similarity left out, and of `tokens` together, if not 0, by
    an estimate; the best stays, however long. `chunk` is the words of a passage. `store` is the URL of the database
    that holds the corpus; empty: it is `folder`. The identity is of the settings alone, so that documents can change
    beneath a System; `made` names the generation that it was made with, `version` the one that answers now.
    """

    kind: ClassVar[str] = "documents"
    brief: ClassVar[bool] = False

    k: int = 3
    mix: str = "both"
    threshold: float = 0.0
    chunk: int = 200
    reranker: str = ""
    store: str = ""
    tokens: int = 0
    made: str = field(default="", compare=False)
    folder: Path | None = field(default=None, compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes the source what it is, as plain data."""
        names = ("k", "mix", "threshold", "chunk", "reranker", "store", "made")
        # What came later is left out at its default, so that older Systems keep their names.
        later = {"tokens": self.tokens} if self.tokens else {}
        return {"kind": self.kind, **{name: getattr(self, name) for name in names}, **later}

    @property
    def fingerprint(self) -> str:
        """sha256 of the settings and the embedding model: never of the documents."""
        body = {k: v for k, v in self.settings.items() if k != "made"}
        return hashlib.sha256(json.dumps([PACKAGE, body], sort_keys=True).encode()).hexdigest()

    @property
    def version(self) -> str:
        """The generation that answers now. Raises ArtifactError where the corpus is not at hand."""
        with self._rebuilding():
            return self._database(Path()).version if self.store else current(self._place())

    def _filled(self, home: Path) -> Database:
        """The database's corpus. Raises ArtifactError where it is gone, or another model embedded it."""
        base = self._database(home)
        if not base.version:
            raise ArtifactError(f"{self.store} holds no corpus {self.made[:12]}", expected="what whet wrote there",
                                found="none", do=rebuilt("rag"))  # fmt: skip
        return base

    def _rebuilding(self) -> AbstractContextManager[None]:
        """Within it, an index that cannot be used names the command that makes one with these settings."""
        given = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.compare}
        return rebuilding("rag", {name: value for name, (value, usual) in given.items() if value != usual})

    def _database(self, home: Path) -> Database:
        from whet.databases import opened as connected

        return connected(self.store, self.made, home)

    def corpus(self, home: Path) -> Corpus[Any]:
        """The passages as they are now, opened."""
        with self._rebuilding():
            return self._filled(home) if self.store else opened(self._place(), self.version, home)

    def _place(self) -> Path:
        if self.folder is None or not self.folder.is_dir():
            raise ArtifactError(f"the documents {self.made[:12]} are not at hand", expected="their folder",
                                found=str(self.folder), do="load the System from its own folder")  # fmt: skip
        return self.folder

    def find(self, questions: Sequence[Query], home: Path, k: int | None = None) -> list[list[Found]]:
        """The passages that each question is shown, best first; ArtifactError where the index is not at hand."""
        found = self.corpus(home).search([q.text for q in questions], k or self.k, self.mix, self.reranker)
        near = [[f for f in some if f.similarity >= self.threshold or not self.threshold] for some in found]
        return [within(some, self.tokens) for some in near] if self.tokens and k is None else near

    def rank(self, questions: Sequence[Query], home: Path, most: int) -> list[list[str]]:
        """The ids of the best documents for each question, best first."""
        made = self.corpus(home).rank([q.text for q in questions], most, self.mix)
        if self.reranker:  # what it did not read keeps its order, behind
            found = self.find(questions, home, 3 * most)
            read = [[f.passage.document for f in some] for some in found]
            made = [[*dict.fromkeys([*first, *rest])][:most] for first, rest in zip(read, made, strict=True)]
        return made

    def change(self, home: Path, put: Iterable[Document] = (), drop: Iterable[str] = ()) -> tuple[str, int]:
        """Put documents in and drop others, for the next question to see; as `retrieval.change`.

        Raises ArtifactError for a System that was not saved: others made of the same documents share its corpus.
        """
        if self.store:
            with self._rebuilding():
                return self._filled(home).change(put, drop, self.chunk)
        if self._place().parent == home / "artifacts":
            raise ArtifactError("the System's documents are shared with others", expected="a saved System",
                                do="save it and load it from its folder")  # fmt: skip
        with self._rebuilding():
            return change(self._place(), home, put, drop, self.chunk)
