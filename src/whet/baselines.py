"""Baselines without a language model, which always run: if one of them wins, the task needs no language model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from whet.task import Example

Embed = Callable[[Sequence[str]], NDArray[Any]]
Classify = Callable[[Sequence[str], Sequence[str], Sequence[str]], tuple[str, ...]]

RANKED = 100  # documents named by a ranking
CELLS = 2**24  # scores of questions and documents that are held at once


@dataclass(frozen=True)
class Baseline:
    """A baseline's answers to the examples, in their order; to be scored like a System's answers."""

    name: str
    answers: tuple[str, ...]


def run(
    train: Sequence[Example],
    examples: Sequence[Example],
    labels: tuple[str, ...],
    *,
    embed: Embed | None,
    seed: int = 0,
    documents: Mapping[str, str] | None = None,
    encoder: Classify | None = None,
    ranked: bool = False,
) -> tuple[Baseline, ...]:
    """The baselines that fit the examples, each with one answer per example.

    A closed set: majority class, logistic regression on TF-IDF and on embeddings, nearest neighbour, and `encoder`
    (texts, labels, wanted texts → labels). Rows with their
    own choices: the longest choice, the choice nearest to the prompt. Free text: the nearest train row's completion
    and, with `documents` (id → text) and evidence, the best sentence of the best document by BM25. Where documents are
    to be `ranked`: BM25's ranking. What needs train or `embed` (texts → vectors, shape (n, d)) and has none is left
    out, and so is everything for rows without prompts.
    """
    if not examples or not all(e.prompt for e in examples):
        return ()
    if labels:
        known = [e for e in train if e.completion in labels]
        found = _closed(known, examples, embed, seed)
        if encoder is None or len(found) < 2:  # a single class needs no classifier
            return found
        answers = encoder([e.prompt for e in known], [e.completion for e in known], [e.prompt for e in examples])
        return (*found, Baseline("encoder_finetuned", answers)) if answers else found
    if all(e.choices for e in examples):
        return _choices(examples, embed)
    if ranked:
        return (Baseline("bm25", _rankings(examples, documents)),) if documents else ()
    found = _neighbour([e for e in train if e.answered], examples, embed)
    if documents and any(e.evidence for e in examples):
        found += (Baseline("bm25_span", _spans(examples, documents)),)
    return found


def _closed(
    train: Sequence[Example], examples: Sequence[Example], embed: Embed | None, seed: int
) -> tuple[Baseline, ...]:
    if not train:
        return ()
    truth = np.array([e.completion for e in train])
    names, counts = np.unique(truth, return_counts=True)
    majority = Baseline("majority", (str(names[counts.argmax()]),) * len(examples))
    if len(names) == 1:
        return (majority,)
    rows, asked = tfidf([e.prompt for e in train], [e.prompt for e in examples])
    words = Baseline("tfidf_logistic", _logistic(rows, truth, asked, seed))
    if embed is None:
        return majority, words
    near, wanted = _vectors(embed, [e.prompt for e in train]), _vectors(embed, [e.prompt for e in examples])
    return (majority, words, Baseline("embedding_logistic", _logistic(near, truth, wanted, seed)),
            Baseline("embedding_neighbour", tuple(map(str, truth[_nearest(near, wanted)]))))


def _choices(examples: Sequence[Example], embed: Embed | None) -> tuple[Baseline, ...]:
    longest = Baseline("longest_choice", tuple(max(e.choices, key=len) for e in examples))
    if embed is None:
        return (longest,)
    prompts = _vectors(embed, [e.prompt for e in examples])
    offered = _vectors(embed, [c for e in examples for c in e.choices])
    ends = np.cumsum([len(e.choices) for e in examples])
    answers = tuple(e.choices[int((offered[end - len(e.choices) : end] @ prompt).argmax())]
                    for e, end, prompt in zip(examples, ends, prompts, strict=True))
    return longest, Baseline("nearest_choice", answers)


def _neighbour(train: Sequence[Example], examples: Sequence[Example], embed: Embed | None) -> tuple[Baseline, ...]:
    if not train:
        return ()
    known, asked = [e.prompt for e in train], [e.prompt for e in examples]
    rows, wanted = tfidf(known, asked) if embed is None else (_vectors(embed, known), _vectors(embed, asked))
    name = "tfidf_neighbour" if embed is None else "embedding_neighbour"
    return (Baseline(name, tuple(train[i].completion for i in _nearest(rows, wanted))),)


def _rankings(examples: Sequence[Example], documents: Mapping[str, str]) -> tuple[str, ...]:
    ids = list(documents)
    blocks = _bm25([documents[i] for i in ids], [e.prompt for e in examples])
    best = (row for block in blocks for row in np.argsort(-block, axis=1, kind="stable")[:, :RANKED])
    return tuple("\n".join(ids[i] for i in row) for row in best)


def _spans(examples: Sequence[Example], documents: Mapping[str, str]) -> tuple[str, ...]:
    texts = list(documents.values())
    answers = []
    every = (n for block in _bm25(texts, [e.prompt for e in examples]) for n in block.argmax(axis=1))
    for example, best in zip(examples, every, strict=True):
        sentences = _sentences(texts[best])
        answers.append(sentences[int(bm25(sentences, [example.prompt])[0].argmax())])
    return tuple(answers)


def _sentences(text: str) -> list[str]:
    parts = (s.strip() for s in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", text))
    return [s for s in parts if s] or [text]


def bm25(documents: Sequence[str], queries: Sequence[str], k1: float = 1.2, b: float = 0.75) -> NDArray[np.float64]:
    """BM25 scores, shape (queries, documents): Lucene's variant (Kamphuis et al., 2020).

    A query's term adds ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * length / mean length)) each
    time the query has it. Terms are runs of letters and digits, in lower case.
    """
    return np.concatenate([*_bm25(documents, queries, k1, b), np.zeros((0, len(documents)))])


def _bm25(
    documents: Sequence[str], queries: Sequence[str], k1: float = 1.2, b: float = 0.75
) -> Iterator[NDArray[np.float64]]:
    """The same, so many queries at a time that a block holds about CELLS scores."""
    from sklearn.feature_extraction.text import CountVectorizer

    size = max(1, CELLS // max(1, len(documents)))
    blocks = [queries[at : at + size] for at in range(0, len(queries), size)]
    if not any(re.search(r"\w", d) for d in documents):
        yield from (np.zeros((len(some), len(documents))) for some in blocks)
        return
    counter = CountVectorizer(token_pattern=r"(?u)\w+", dtype=np.float64)
    weights = counter.fit_transform(documents).tocoo()
    length = np.asarray(weights.sum(axis=1)).ravel()
    df = np.bincount(weights.col, minlength=weights.shape[1])
    idf = np.log1p((len(documents) - df + 0.5) / (df + 0.5))
    norm = k1 * (1 - b + b * length / length.mean())
    weights.data = idf[weights.col] * weights.data / (weights.data + norm[weights.row])
    across = weights.T.tocsc()
    yield from ((counter.transform(some) @ across).toarray() for some in blocks)


def tfidf(train: Sequence[str], examples: Sequence[str]) -> tuple[Any, Any]:
    """Sparse rows of words and pairs of words, and of pieces of words, which carry languages without spaces."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]+")
    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    both = make_union(words, pieces)
    rows = both.fit_transform(train)
    return rows, both.transform(examples)


def _vectors(embed: Embed, texts: Sequence[str]) -> NDArray[np.float64]:
    """Embeddings of length 1, shape (n, d)."""
    vectors = np.asarray(embed(texts), dtype=float)
    unit: NDArray[np.float64] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _nearest(rows: Any, wanted: Any) -> NDArray[np.int64]:
    """The row most similar to each wanted row (dot product), so many at a time that memory is bounded."""
    size = max(1, CELLS // max(1, rows.shape[0]))
    blocks = (wanted[start : start + size] @ rows.T for start in range(0, wanted.shape[0], size))
    dense = (b if isinstance(b, np.ndarray) else b.toarray() for b in blocks)
    return np.concatenate([b.argmax(axis=1).astype(np.int64) for b in dense])


def _logistic(rows: Any, truth: NDArray[Any], wanted: Any, seed: int) -> tuple[str, ...]:
    """Logistic regression: for sparse rows one per class by liblinear, several times faster there than lbfgs."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    model = (LogisticRegression(C=10.0, max_iter=300) if isinstance(rows, np.ndarray) else
             OneVsRestClassifier(LogisticRegression(solver="liblinear", C=10.0, tol=1e-2, random_state=seed)))
    return tuple(map(str, model.fit(rows, truth).predict(wanted)))
