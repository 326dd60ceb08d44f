"""Suspects: rows whose label a cross-validated classifier disputes (confident learning, Northcutt et al. 2021)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from whet.baselines import Embed
    from whet.task import Example

# (rows to learn from, rows to judge) -> scores of the labels [rows to judge, labels], as log-probabilities
Judge = Callable[[Sequence["Example"], Sequence["Example"]], Sequence[Sequence[float]]]
PARTS, FOLDS = 2, 5  # parts of the rows, by turns judged by what was trained on the others: with a judge, and without
LEAST_ROWS = 50
SURE = 0.85  # how likely a label must be wrong for its row to be named
CONFIDENT = 0.1  # share of rows, those the classifier is surest about, that tell how much noise there is
# Of labels that can be wrong, and of what guessing gets wrong: where more seem to be, it is the classifier that is.
MOST_NOISE, NEAR_CHANCE = 0.45, 0.7


@dataclass(frozen=True)
class Suspect:
    """A row by its id, the label it has, the label it should rather have, and how likely its own is wrong."""

    id: str
    label: str
    rather: str
    chance: float


def find(
    rows: Sequence[Example], embed: Embed, seed: int = 0, judge: Judge | None = None, order_of: Sequence[str] = ()
) -> tuple[Suspect, ...]:
    """Rows of a closed set whose label is probably wrong, the surest first, among those `examined`.

    Each is judged by `judge`, trained on one half of the rows, which gives scores of the labels, in the order of
    `order_of`, for the other; without it by logistic regressions on embeddings and words that have not seen the row.
    """
    rows = examined(rows, PARTS if judge else FOLDS)
    if not rows:
        return ()
    labels = sorted({r.completion for r in rows})
    given = np.array([labels.index(r.completion) for r in rows])
    if judge is None:
        wrong, rather = wrong_chances(_unseen(rows, given, embed, seed), given)
    else:  # classifiers beside it only blur what it is sure of: measured in LOG.md
        chances = _judged(rows, given, judge, [order_of.index(x) for x in labels], seed)
        # Trained on few rows it is surer than it is right, and by that alone labels would seem wrong.
        fitted = np.sort(_tempered(np.log(np.clip(chances, 1e-12, 1.0)), given).max(axis=1))
        wrong, rather = wrong_chances(chances, given, float(1 - fitted[-_surest(len(rows)) :].mean()))
    order = np.argsort(-wrong, kind="stable")
    named = [i for i in order if wrong[i] >= SURE]
    return tuple(Suspect(rows[i].id, labels[given[i]], labels[rather[i]], round(float(wrong[i]), 3)) for i in named)


def labelled(rows: Sequence[Example], labels: Sequence[str]) -> list[Example]:
    """Rows that are answered out of the labels, without choices: not plain text, nor those with others of their own."""
    known = [e for e in rows if e.answered and e.text is None and (not e.choices or set(e.choices) == set(labels))]
    return [replace(e, choices=()) for e in known]


def examined(rows: Sequence[Example], parts: int = PARTS) -> list[Example]:
    """Rows whose label is there for each of so many parts: others are neither judged nor learnt from.

    None where they are too few, or all of one label.
    """
    counts = Counter(r.completion for r in rows)
    found = [r for r in rows if counts[r.completion] >= parts]
    return found if len(found) >= LEAST_ROWS and len({r.completion for r in found}) > 1 else []


def _judged(
    rows: Sequence[Example], given: NDArray[Any], judge: Judge, columns: Sequence[int], seed: int
) -> NDArray[np.float64]:
    """Probabilities [rows, labels], each row's by what was trained on the parts that it is not in."""
    from scipy.special import softmax
    from sklearn.model_selection import StratifiedKFold

    made = np.empty((len(rows), len(columns)))
    for fit, held in StratifiedKFold(PARTS, shuffle=True, random_state=seed).split(given, given):
        made[held] = np.array(judge([rows[i] for i in fit], [rows[i] for i in held]))[:, columns]
    return np.asarray(softmax(made, axis=1), dtype=np.float64)


def _unseen(rows: Sequence[Example], given: NDArray[Any], embed: Embed, seed: int) -> NDArray[np.float64]:
    """Probabilities [rows, labels] by embeddings and words, each row's from classifiers that were fitted without it."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    from whet.baselines import tfidf

    texts = [r.prompt for r in rows]
    words, _ = tfidf(texts, texts[:1])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    # Regularised more than a baseline: noise must not be learnt by heart.
    parts = [np.asarray(embed(texts), dtype=float), hstack([csr_matrix(words)]).tocsr()]
    found = [
        cross_val_predict(LogisticRegression(C=c, max_iter=300), x, given, cv=folds, method="predict_proba")
        for x, c in zip(parts, (3.0, 1.0), strict=True)
    ]
    return _tempered(np.mean(np.log(np.clip(found, 1e-9, 1.0)), axis=0), given)


def _tempered(logs: NDArray[Any], given: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities [n, K] by the power that makes the given labels likeliest (temperature scaling, Guo et al. 2017).

    Classifiers that are regularised to learn no noise are less sure than they are right: measured in LOG.md.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def surprise(power: float) -> float:
        return -float(log_softmax(np.exp(power) * logs, axis=1)[np.arange(len(given)), given].mean())

    power = np.exp(minimize_scalar(surprise, bounds=(-4.0, 2.0), method="bounded").x)
    return np.asarray(np.exp(log_softmax(power * logs, axis=1)), dtype=np.float64)


def _surest(count: int) -> int:
    """Of so many rows, how many the classifier is surest about."""
    return max(20, round(CONFIDENT * count))


def wrong_chances(
    chances: NDArray[np.float64], given: NDArray[Any], most: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """(chance [n] that each given label is wrong, the likeliest other label [n]), from unseen probabilities [n, K].

    The classifier is nearly always right where it is surest: how often it disagrees there is the share e of wrong
    labels, and no more than `most`. Its probabilities are those of noisy labels, c·(1 - e) + (1 - c)·e/(K - 1) for a
    true label's c; turned round, they tell by Bayes' rule how likely the given label is wrong. Zeros where e is so
    large that the classifier itself must be at fault, as on labels that people dispute.
    """
    n, kinds = chances.shape
    top = chances.argmax(axis=1)
    surest = np.argsort(-chances.max(axis=1), kind="stable")[: _surest(n)]
    noise = float((top[surest] != given[surest]).mean())
    if noise == 0.0 or noise > min(MOST_NOISE, NEAR_CHANCE * (kinds - 1) / kinds):
        return np.zeros(n), top
    noise = min(noise, most)
    spread = noise / (kinds - 1)
    true = np.clip((chances - spread) / (1 - noise - spread), 1e-6, None)
    true /= true.sum(axis=1, keepdims=True)
    here = np.arange(n)
    own = true[here, given] * (1 - noise)
    others = (1 - true[here, given]) * spread
    rest = true.copy()
    rest[here, given] = -1
    return others / (own + others), rest.argmax(axis=1)
