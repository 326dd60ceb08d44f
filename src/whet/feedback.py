"""Human judgements: reading them, weighing annotators, judges made of them, and the win rate by such a judge."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from whet import stats
from whet.convert import as_text, standard
from whet.engine import Sampling, Session
from whet.errors import MethodError, TaskError, nearest, printable
from whet.metrics import Outcome, Share, WinRate
from whet.rows import Broken, Row, read, short, sift, suffix_of
from whet.splits import Leaks, mark, without
from whet.task import Example, places

if TYPE_CHECKING:
    from whet.embed import Embedder
    from whet.system import System
    from whet.task import Splits

UP, DOWN = ("true", "1", "up", "yes", "good"), ("false", "0", "down", "no", "bad")
JUDGING = 1 / 3  # of the pairs are set aside for the judge that reports the win rate
TRUSTED = 0.7  # accuracy below which a win rate by a judge says little
UNCHECKED = "how often the judge is right is not known: no held-out row is a pair"


@dataclass(frozen=True)
class Judged:
    """One judgement: a pair where both sides are given, a thumb up (`chosen` alone) or down (`rejected` alone)."""

    id: str
    prompt: str
    chosen: str | None = None
    rejected: str | None = None
    annotator: str = ""
    time: str = ""
    group: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    weight: float = 1.0

    @property
    def example(self) -> Example:
        """The judgement as a row of a task: the wanted answer is its completion."""
        good = self.chosen or ""
        return Example(self.id, self.prompt, good, (good,) if good else (), (), self.group, history=self.history,
                       rejected=self.rejected)  # fmt: skip


# --- reading ----------------------------------------------------------------------------------------------------------


def load(folder: Path, source: str) -> tuple[tuple[Judged, ...], tuple[str, ...]]:
    """The judgements of a task's feedback, and notes on what was converted or left out.

    Judgements that cannot be read, and pairs of equal sides, are left out and noted; TaskError where they are many.
    """
    rows: list[Judged] = []
    notes: list[str] = []
    for place in places(folder, source):
        if not isinstance(place, Path) or place.is_dir():
            raise TaskError(f"feedback: {short(str(place))} cannot be read", expected="a file such as feedback.jsonl")
        broken: Broken = []
        found = sift(place.name, read(place, broken, notes), partial(_judged, file=place.stem), broken, notes)
        rows += [one for one in found if not isinstance(one, tuple)]
        rated = [one for one in found if isinstance(one, tuple)]
        made = _of_ratings(rated)
        rows += made
        if rated:
            sides = sum(bool(m.chosen and m.rejected) for m in made)
            notes.append(f"{place.name}: {len(rated)} ratings made into {sides} pairs and {len(made) - sides} thumbs")
    return tuple(rows), tuple(notes)


def _judged(row: Row, file: str) -> Judged | tuple[Judged, float]:
    """A row as a judgement, or as an answer with its rating."""
    where = row.where
    # A table has a cell for every column: what is null there (in a column of numbers, NaN) is not said at all.
    raw = {k: v for k, v in row.values.items() if v is not None and not (isinstance(v, float) and math.isnan(v))}
    values, _ = standard(replace(row, values=raw))

    def refuse(what: str, expected: str, found: object = sorted(raw), do: str = "") -> TaskError:
        return TaskError(f"{where}: {what}", expected=expected, found=short(found), do=do)

    if not (values.get("prompt") or "").strip():
        raise refuse("a judgement without a prompt", "prompt")
    common: dict[str, Any] = {
        "id": values.get("id", f"{file}-{row.number}"), "prompt": values["prompt"], "group": values.get("group"),
        "annotator": as_text(raw.get("annotator"), where, "annotator") or "",
        "time": as_text(raw.get("time"), where, "time") or "", "history": values.get("history", ()),
    }  # fmt: skip
    answer, worse = values.get("completion"), values.get("rejected")
    if "rejected" in raw or "chosen" in raw:
        if answer is None or worse is None:
            raise refuse("half a pair", "chosen and rejected")
        if answer.strip() == worse.strip():
            raise refuse("both sides of the pair are equal", "two answers", answer, "remove the row")
        return Judged(**common, chosen=answer, rejected=worse)
    if answer is None:
        raise refuse("nothing is judged", "chosen and rejected, or completion and label or rating")
    if raw.get("label") is not None:
        said = str(raw["label"]).strip().lower().removesuffix(".0")
        if said not in (*UP, *DOWN):
            raise refuse("the label is no judgement", "true or false", raw["label"])
        return Judged(**common, **{"chosen" if said in UP else "rejected": answer})
    try:
        rating = float(raw["rating"])
        if not math.isfinite(rating):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        wanted = "label (true or false) or rating (a number)"
        raise refuse("an answer without a judgement", wanted, raw.get("rating", sorted(raw))) from None
    return Judged(**common, chosen=answer), rating


def _of_ratings(rated: Sequence[tuple[Judged, float]]) -> list[Judged]:
    """Ratings as pairs, where an annotator rated answers to one prompt differently, else as thumbs.

    The better answers of a prompt, about half of them, are paired with the others as thumbs up are with thumbs down. A
    thumb is up above the annotator's own mean and down below it, since people use scales differently; what lies on the
    mean says nothing and is left out.
    """
    by_prompt: dict[tuple[Any, ...], list[tuple[Judged, float]]] = defaultdict(list)
    scales: dict[str, list[float]] = defaultdict(list)
    for row, rating in rated:
        by_prompt[row.annotator, row.prompt, row.history].append((row, rating))
        scales[row.annotator].append(rating)
    middles = {annotator: statistics.fmean(ratings) for annotator, ratings in scales.items()}
    made = []
    for group in by_prompt.values():
        ranked = sorted(group, key=lambda one: -one[1])
        falls = [n for n in range(1, len(ranked)) if ranked[n - 1][1] > ranked[n][1]]
        half = min(falls, key=lambda n: abs(2 * n - len(ranked)), default=0)
        found = _opposed([row for row, _ in ranked[:half]], [_down(row) for row, _ in ranked[half:]])
        made += found
        for row, rating in group if not found else ():
            middle = middles[row.annotator]
            if not math.isclose(rating, middle, abs_tol=1e-12):  # the mean of equal ratings may be off by a bit
                made.append(row if rating > middle else _down(row))
    return made


def _down(row: Judged) -> Judged:
    return replace(row, chosen=None, rejected=row.chosen)


def _opposed(ups: Sequence[Judged], downs: Sequence[Judged]) -> list[Judged]:
    """Pairs of thumbs up and down on one prompt: each of the more frequent kind is in one, the others take turns."""
    count = max(len(ups), len(downs)) if ups and downs else 0
    turns = [(ups[n % len(ups)], downs[n % len(downs)]) for n in range(count)]
    return [replace(up, rejected=down.rejected, id=f"{up.id}>{down.id}", weight=min(up.weight, down.weight))
            for up, down in turns if (up.chosen or "").strip() != (down.rejected or "").strip()]  # fmt: skip


def without_held(rows: Sequence[Judged], held: Sequence[Example]) -> tuple[tuple[Judged, ...], Leaks]:
    """Judgements whose prompts neither repeat (or nearly so) nor share a group with held-out rows; and the others."""
    kept, dropped = without(tuple(replace(r.example, id=str(n)) for n, r in enumerate(rows)), tuple(held))
    return tuple(rows[int(e.id)] for e in kept), tuple((rows[int(n)].id, why) for n, why in dropped)


# --- choosing ---------------------------------------------------------------------------------------------------------


def pairs(rows: Sequence[Judged]) -> tuple[Judged, ...]:
    """Pairs, and those that thumbs up and down on different answers to the same prompt make; equal ones are one.

    Each thumb of the more frequent kind goes into one pair, those of the other take turns: there are never more pairs
    than judgements. A pair that stands several times weighs as much as all of them.
    """
    found = [r for r in rows if r.chosen is not None and r.rejected is not None]
    single: dict[tuple[Any, ...], tuple[list[Judged], list[Judged]]] = defaultdict(lambda: ([], []))
    for row in rows:
        if row.chosen is None or row.rejected is None:
            single[row.prompt, row.history][row.chosen is None].append(row)
    for ups, downs in single.values():
        found += _opposed(ups, downs)
    made: dict[tuple[Any, ...], Judged] = {}
    for one in found:
        name = one.prompt, one.history, one.chosen, one.rejected
        made[name] = replace(made[name], weight=made[name].weight + one.weight) if name in made else one
    return tuple(made.values())


def thumbs(rows: Sequence[Judged]) -> tuple[Judged, ...]:
    """Single judged answers: thumbs as they are, and both sides of each pair."""
    found: list[Judged] = []
    for row in rows:
        if row.chosen is None or row.rejected is None:
            found.append(row)
        else:
            found += [replace(row, rejected=None, id=f"{row.id}+"), replace(row, chosen=None, id=f"{row.id}-")]
    return tuple(found)


def weighted(rows: Sequence[Judged], weights: Sequence[str], annotators: Iterable[str] = ()) -> tuple[Judged, ...]:
    """Judgements under weights of annotators, written "name=weight"; weight 0 leaves an annotator out.

    Raises MethodError for an annotator that neither a judgement nor `annotators` name (those whose judgements were set
    aside), or a weight that is no number from 0 up.
    """
    known = {*annotators, *(r.annotator for r in rows)}
    factor: dict[str, float] = {}
    for entry in weights:
        name, sign, number = entry.rpartition("=")
        try:
            value = float(number) if sign else math.nan
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise MethodError(f"cannot read the weight {entry!r}", expected="annotator=number", do="like kit=0.5")
        if name not in known:
            raise MethodError(f"no judgement is by {name!r}", do=nearest(name, known))
        factor[name] = value
    found = (replace(r, weight=r.weight * factor.get(r.annotator, 1.0)) for r in rows)
    return tuple(r for r in found if r.weight > 0)


def divide(rows: Sequence[Judged], share: float = JUDGING) -> tuple[tuple[Judged, ...], tuple[Judged, ...]]:
    """(for learning, for the judge): the judge gets prompts and groups of its own, about `share` of them.

    Which ones, their hashes alone say: no seed, no count and no annotator. So the judge of one run, or of one round of
    a growing file, never learns from what a method learnt from in another. Of a single prompt nothing is set aside, of
    several something; as long as all lie on one side by their hashes, the outermost one is on the other.
    """
    # Two annotators' judgements of one answer stay together: either tells the judge what the other tells the learner.
    places = [_place(r) for r in rows]
    edges = sorted(set(places))
    if len(edges) < 2:
        return tuple(rows), ()
    edge = min(max(share, (edges[0] + edges[1]) / 2), edges[-1])
    judging = tuple(r for r, at in zip(rows, places, strict=True) if at < edge)
    asked, groups = {mark(r.example) for r in judging}, {r.group for r in judging if r.group is not None}
    rest = (r for r, at in zip(rows, places, strict=True) if at >= edge)
    # A prompt in two groups may lie on both sides: the judge keeps it.
    return tuple(r for r in rest if mark(r.example) not in asked and r.group not in groups), judging


def usable(judged: Sequence[Judged], splits: Splits) -> None:
    """Raise TaskError where there are judgements, and all of them are about prompts that are held out."""
    if judged and not {*splits.learnable.judged, *splits.judging} & {*judged}:
        ids = {one.id for one in judged}
        name, why = next(((name, why) for name, why in splits.dropped if name in ids), (judged[0].id, "is held out"))
        raise TaskError(f"all {len(judged)} judgements are about prompts that the System is measured on",
                        expected="other prompts than those of test", found=f"{name}, which {why}",
                        do="judge answers to others")  # fmt: skip


def _place(row: Judged) -> float:
    """Where the hash of a judgement's group, or of its prompt where it has none, lies between 0 and 1."""
    name = mark(row.example) if row.group is None else hashlib.sha256(f"group {row.group}".encode()).hexdigest()
    return int(name[:12], 16) / 16**12


def digest(rows: Sequence[Judged]) -> str:
    """sha256 of judgements, in their order."""
    return hashlib.sha256(json.dumps([list(asdict(r).values()) for r in rows]).encode()).hexdigest()


# --- judges -----------------------------------------------------------------------------------------------------------


class Judge(Protocol):
    """Scores answers to examples, higher is better; only differences on one example mean anything."""

    @property
    def name(self) -> str:
        """Which judge this is, for the protocol: equal names score equally."""

    def __call__(self, asked: Sequence[tuple[Example, str]]) -> list[float]:
        """One finite number for each (example, answer), in their order."""


class EmbeddingJudge:
    """The rival baseline: logistic regression on the difference of MiniLM embeddings of two answers.

    Its strength of regularisation is chosen by cross-validation on the pairs it learns from.
    """

    def __init__(self, rows: Sequence[Judged], embedder: Embedder) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV

        self.embedder, self.name = embedder, f"embedding regression {digest(rows)[:12]}"
        found = pairs(rows)
        gap = embedder([r.chosen or "" for r in found]) - embedder([r.rejected or "" for r in found])
        signs = np.where(np.arange(len(found)) % 2, 1, -1)  # without an intercept, either order teaches the same
        plain = LogisticRegression(C=10.0, fit_intercept=False, max_iter=2000)
        model = GridSearchCV(plain, {"C": [0.1, 1.0, 10.0, 100.0]}, cv=5) if len(found) >= 20 else plain
        model.fit(gap * signs[:, None], signs, sample_weight=[r.weight for r in found])
        self.weights = getattr(model, "best_estimator_", model).coef_[0]

    def __call__(self, asked: Sequence[tuple[Example, str]]) -> list[float]:
        """Log-odds against an answer of score 0."""
        return [float(v) for v in self.embedder([answer for _, answer in asked]) @ self.weights]


@dataclass(frozen=True)
class Agreement:
    """How far a judge agrees with pairs that people judged, each figure with its 95 % interval.

    `accuracy`: how often it prefers the chosen side. `brier`: mean squared error of its probability of that, 0.25 for a
    coin. `ece`: expected calibration error (Guo et al. 2017), in five bins of confidence from one half up.
    """

    n: int
    accuracy: tuple[float, float, float]
    brier: tuple[float, float, float]
    ece: float
    judge: str

    def __str__(self) -> str:
        """The accuracy in words, with a warning where it is too low."""
        said = "the judge is right on {:.1f} % [{:.1f}, {:.1f}] of {} pairs that people judged".format(
            *(100 * one for one in self.accuracy), self.n
        )
        return said if self.accuracy[0] >= TRUSTED else f"{said}: a win rate by it says little"


def paired(rows: Sequence[Judged]) -> tuple[tuple[Judged, ...], tuple[Judged, ...]]:
    """The pairs that judgements make, and the judgements that go into none."""
    found = pairs(rows)
    asked = {(r.prompt, r.history, side) for r in found for side in (r.chosen, r.rejected)}
    return found, tuple(
        r for r in rows if None in (r.chosen, r.rejected) and (r.prompt, r.history, r.chosen or r.rejected) not in asked
    )


def learner(rows: Sequence[Judged]) -> str:
    """The method that learns from judgements: kto where more are of one answer alone than make pairs, else dpo."""
    found, single = paired(rows)
    return "dpo" if found and len(found) >= len(single) else "kto"


def agreement(judge: Judge, rows: Sequence[Judged], seed: int = 0) -> Agreement:
    """Accuracy and calibration of a judge on pairs that it did not learn from. Raises MethodError without pairs."""
    found = pairs(rows)
    if not found:
        raise MethodError("no pairs to check the judge on", expected="some held out", found="none", do="judge more")
    asked = [(r.example, side or "") for r in found for side in (r.chosen, r.rejected)]
    scores = np.asarray(judge(asked)).reshape(-1, 2)
    gap = scores[:, 0] - scores[:, 1]
    right = np.where(gap == 0, 0.5, gap > 0)
    chance = 1 / (1 + np.exp(-np.clip(gap, -60, 60)))
    sure = np.maximum(chance, 1 - chance)
    bins = np.minimum(((sure - 0.5) * 10).astype(int), 4)
    ece = sum(abs(float((right - sure)[bins == b].sum())) for b in range(5)) / len(found)
    groups = [r.group or r.prompt for r in found]
    return Agreement(len(found), _mean(right, groups, seed), _mean((1 - chance) ** 2, groups, seed), ece, judge.name)


def agreed(judge: Judge, rows: Sequence[Example], seed: int = 0) -> Agreement | None:
    """How far a judge agrees with those of a task's rows that are pairs; None where none is."""
    found = [Judged(e.id, e.prompt, e.completion, e.rejected, group=e.group, history=e.history) for e in rows
             if e.completion and e.rejected is not None]  # fmt: skip
    return agreement(judge, found, seed) if found else None


def _mean(values: Iterable[float], groups: Sequence[str | None], seed: int) -> tuple[float, float, float]:
    """A mean and its 95 % interval, groups drawn whole."""
    outcomes = [Outcome(str(n), "", float(v), "", g) for n, (v, g) in enumerate(zip(values, groups, strict=True))]
    return (WinRate().aggregate(outcomes), *stats.bootstrap_interval(outcomes, WinRate(), seed))


# --- win rate ---------------------------------------------------------------------------------------------------------


def words(text: str) -> int:
    """How long an answer is, in words; of scripts without spaces each character is one."""
    from whet.methods.calibrate import WORD

    return len(WORD.findall(text))


@dataclass(frozen=True)
class Versus(Share):
    """win_rate as a metric: answers against those of a base, by a judge; equal answers tie, and a tie counts half.

    The base answers each example once. `rules` name judge and base for the protocol of every score.
    """

    name: ClassVar[str] = "win_rate"
    judge: Judge
    base: System
    session: Session
    known: dict[Example, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rules(self) -> dict[str, str]:
        """What scores depend on beside the answers."""
        return {"judge": self.judge.name, "against": self.base.fingerprint[:16]}

    def against(self, examples: Sequence[Example]) -> list[str]:
        """The base's answers."""
        new = [e for e in dict.fromkeys(examples) if e not in self.known]
        if new:
            self.known.update(zip(new, [a.text for a in self.base.answers(new, self.session)], strict=True))
        return [self.known[e] for e in examples]

    def hear(self, system: System, examples: Sequence[Example], answers: Sequence[str]) -> None:
        """Take what the base has just answered, where it is the base: it is not asked again."""
        if system.fingerprint == self.base.fingerprint:
            self.known.update(zip(examples, answers, strict=True))

    def score(self, answer: str, example: Example) -> float:
        """1 for a win, 0.5 for a tie, 0 for a loss."""
        return self.outcomes([answer], [example])[0].score

    def outcomes(self, answers: Sequence[str], examples: Sequence[Example]) -> tuple[Outcome, ...]:
        """All at once; `Outcome.weight` holds how much longer the answer is than the base's, in words."""
        sides = list(zip(examples, answers, self.against(examples), strict=True))
        asked = [(e, text) for e, a, b in sides if a.strip() != b.strip() for text in (a, b)]
        scores = iter(self.judge(asked) if asked else ())
        made = []
        for example, mine, other in sides:
            gap = next(scores) - next(scores) if mine.strip() != other.strip() else 0.0
            longer = float(words(mine) - words(other))
            made.append(Outcome(example.id, mine, 0.5 if gap == 0 else float(gap > 0), example.completion or other,
                                example.group, weight=longer))  # fmt: skip
        return tuple(made)


@dataclass(frozen=True)
class Controlled(WinRate):
    """Win rate at equal length: the intercept of a regression of wins on tanh(difference in words / its spread).

    After Dubois et al. 2024 (AlpacaEval 2), but linear, so that it is a function of sums and resampled exactly.
    """

    name: ClassVar[str] = "length-controlled win rate"
    spread: float = 1.0

    def statistics(self, outcomes: Sequence[Outcome]) -> Any:
        """Rows of (1, x, x², y, x·y)."""
        x = np.tanh(np.array([o.weight for o in outcomes]) / self.spread)
        y = np.array([o.score for o in outcomes])
        return np.stack([np.ones(len(x)), x, x * x, y, x * y], axis=1)

    def finish(self, totals: Any) -> Any:
        """The intercept, within 0 and 1; the plain mean where all lengths differ alike."""
        n, x, xx, y, xy = np.moveaxis(np.asarray(totals, dtype=float), -1, 0)
        within = n * xx - x * x
        flat = within < 1e-9 * np.maximum(n * n, 1)
        return np.clip(np.where(flat, y / np.maximum(n, 1), (y * xx - x * xy) / np.where(flat, 1, within)), 0, 1)


def controlled(outcomes: Sequence[Outcome], seed: int = 0) -> tuple[float, float, float]:
    """The win rate at equal length with its 95 % interval, of outcomes that a Versus made."""
    even = Controlled(max(1.0, float(np.std([o.weight for o in outcomes]))))
    return (even.aggregate(outcomes), *stats.bootstrap_interval(outcomes, even, seed))


@dataclass(frozen=True)
class Wins:
    """A System against its base: each figure with its 95 % interval. Lengths are mean words; `judge` is its name.

    `prefers`: how often the System itself prefers the chosen side of the rows that are pairs, by log-probability per
    token; None where no row is one.
    """

    n: int
    rate: tuple[float, float, float]
    controlled: tuple[float, float, float]
    prefers: tuple[float, float, float] | None
    length: float
    base_length: float
    judge: str
    outcomes: tuple[Outcome, ...] = field(repr=False)


def win_rate(
    system: System, base: System, judge: Judge, rows: Sequence[Example], session: Session | None = None,
    base_session: Session | None = None, seed: int = 0,
) -> Wins:  # fmt: skip
    """Win rate of a System's answers over its base's on the same rows, by a judge that neither learnt from."""
    session = session or system.session
    answers = [a.text for a in system.answers(rows, session)]
    return wins(answers, Versus(judge, base, base_session or base.session), rows, prefers(system, rows, session), seed)


def wins(
    answers: Sequence[str], metric: Versus, rows: Sequence[Example], sides: Sequence[float] = (), seed: int = 0
) -> Wins:
    """The figures of answers that are at hand."""
    outcomes = metric.outcomes(answers, rows)
    groups = [e.group for e in rows if e.rejected is not None]
    length = statistics.fmean(map(words, answers))
    return Wins(
        len(rows),
        (metric.aggregate(outcomes), *stats.bootstrap_interval(outcomes, metric, seed)),
        controlled(outcomes, seed),
        _mean(sides, groups, seed) if sides else None,
        length,
        length - statistics.fmean(o.weight for o in outcomes),
        metric.judge.name,
        outcomes,
    )


def prefers(system: System, rows: Sequence[Example], session: Session) -> list[float]:
    """1 for each row whose chosen side is likelier per token (its end included) than the rejected one, else 0.

    What does not fit the context window is shortened as in training, where the model is at hand.
    """
    from whet.engine.torch import TorchSession
    from whet.methods.reward import render_pairs

    found = [e for e in rows if e.rejected is not None]
    if isinstance(session, TorchSession):
        judged = [Judged(e.id, e.prompt, e.completion, e.rejected, history=e.history) for e in found]
        scored = session.score_rows(render_pairs(system, judged, session)[0])
        means = [tuple(map(statistics.fmean, sides)) for sides in scored]
    else:
        said = [tuple(map(system.decoding.said, (e.completion, e.rejected or ""))) for e in found]
        means = [tuple(s.mean for s in sides) for sides in session.score(system.prompts(found), said, end=True)]
    return [0.5 if a == b else float(a > b) for a, b in means]


# --- collecting -------------------------------------------------------------------------------------------------------


def collect(
    system: System, examples: Sequence[Example], out: Path, ask: Callable[[Example, tuple[str, str]], str], *,
    annotator: str = "", temperature: float = 0.8, seed: int = 0,
) -> dict[str, int]:  # fmt: skip
    """Show two sampled answers to each prompt, ask which is better, and append each judgement to a JSONL file at once.

    `ask` is given the prompt and both answers in the order they are shown, and says "1", "2", "s" (skip) or "q" (quit).
    That order is the seed's, and it is kept with the judgement, as are System, time and seed. Prompts that this
    annotator judged in the file before are not asked again. Returns counts: judged, skipped, same, before. Raises
    TaskError for a file of another kind, before anything is asked.
    """
    if out.suffix.lower() != ".jsonl":
        raise TaskError(f"judgements cannot be appended to {out.name}", expected="a .jsonl file",
                        found=out.suffix or "no suffix", do="say --out feedback.jsonl")  # fmt: skip
    judged = read(out) if out.exists() and out.stat().st_size else ()
    kept = [(standard(r)[0], r.values.get("annotator") or "") for r in judged]
    before = {(values.get("prompt"), values.get("history", ()), who) for values, who in kept}
    counts = Counter[str](judged=0, skipped=0, same=0, before=0)
    for example, shown in _sampled(system, examples, before, annotator, counts, temperature, seed):
        said = ask(example, shown)
        if said == "q":
            break
        if said not in ("1", "2"):
            counts["skipped"] += 1
            continue
        chosen, rejected = shown if said == "1" else shown[::-1]
        row = {
            "prompt": _asked(example), "chosen": chosen, "rejected": rejected, "annotator": annotator,
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "shown_first": chosen == shown[0],
            "system": system.fingerprint[:16], "seed": seed, "temperature": temperature,
        }  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        _append(out, json.dumps(row, ensure_ascii=False))  # only now: an empty file is no feedback
        counts["judged"] += 1
    return dict(counts)


def _append(file: Path, line: str) -> None:
    """Put a line at the end of a file for good, a last line that was left open being closed first."""
    with file.open("ab+") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - 1))
        opening = "" if opened.read(1) in (b"", b"\n") else "\n"
        opened.write(f"{opening}{line}\n".encode())
        opened.flush()
        os.fsync(opened.fileno())


def _sampled(
    system: System, examples: Sequence[Example], before: set[tuple[Any, ...]], annotator: str, counts: Counter[str],
    temperature: float, seed: int,
) -> Iterator[tuple[Example, tuple[str, str]]]:  # fmt: skip
    """Each prompt not judged before with two different answers, in the order that the seed decides."""
    for example in examples:
        if (example.prompt, example.history, annotator) in before:
            counts["before"] += 1
            continue
        prompts, _ = system.fitting([example], system.session, [system.decoding.max_tokens])
        drawn = Sampling(system.decoding.max_tokens, temperature, n=2, stop=system.decoding.stop, seed=seed)
        first, second = (g.text.strip() for g in system.session.generate(prompts, drawn)[0])
        if first == second:
            counts["same"] += 1
            continue
        swap = random.Random(f"{seed}/{example.prompt}").random() < 0.5
        yield example, (second, first) if swap else (first, second)


def _asked(example: Example) -> str | list[dict[str, str]]:
    """What was asked, as a row of feedback has it: the whole conversation where there is one."""
    if not example.history:
        return example.prompt
    return [{"role": role, "content": said} for role, said in (*example.history, ("user", example.prompt))]


def ask(example: Example, shown: tuple[str, str]) -> str:
    """Ask on the terminal which of two answers is better: "1", "2", "s" or "q" (also at the end of input)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    asked = printable("\n".join([*(f"{role}: {said}" for role, said in example.history), example.prompt]))
    screen, table = Console(stderr=True), Table("1", "2", title=Text(asked), show_lines=True, expand=True)
    table.add_row(*(Text(printable(one)) for one in shown))  # as text: brackets in an answer are no markup
    screen.print(table)
    while True:
        screen.print("better: 1 or 2; s skips, q ends: ", end="", markup=False)
        line = sys.stdin.readline()
        if not sys.stdin.isatty():
            screen.print()  # on a terminal it is the person who ends the line
        if not line or line.strip().lower() in ("1", "2", "s", "q"):
            return line.strip().lower() or "q"


def prompts_of(path: Path) -> list[Example]:
    """The prompts of a file of rows (any form that whet reads), or of plain text: paragraphs, else lines."""
    rows = [(row, standard(row)[0]) for row in read(path)]
    if len(rows) == 1 and suffix_of(path.name) == ".txt":
        rows = [(rows[0][0], {"text": line}) for line in rows[0][1]["text"].splitlines()]
    texts = [(row, values, (values.get("prompt") or values.get("text") or "").strip()) for row, values in rows]
    found = {(text, v.get("history", ())): Example(str(row.number), text, history=v.get("history", ()))
             for row, v, text in texts if text}  # fmt: skip
    if not found:
        raise TaskError(f"{path.name} holds no prompts", expected="rows with a prompt", found="none")
    return list(found.values())


def preference(
    system: System, rows: Sequence[Example], session: Session, seed: int = 0
) -> tuple[float, float, float] | None:
    """How often a System prefers the chosen side, with the 95 % interval; None where no row is a pair."""
    sides = prefers(system, rows, session)
    return _mean(sides, [e.group for e in rows if e.rejected is not None], seed) if sides else None
