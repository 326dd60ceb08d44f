"""What is kept and what is lost: the matrix of tasks and times, points lost per earlier task, and drift."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from whet import stats
from whet.errors import TaskError
from whet.memory import Known
from whet.methods import Run
from whet.metrics import Metric, get, in_points
from whet.progress import figure
from whet.scorecard import Scorecard, alike, evaluate
from whet.splits import shared_order
from whet.system import System
from whet.task import Example

if TYPE_CHECKING:
    from whet.engine.prefix import Row
    from whet.engine.torch import TorchSession

DRIFT_ROWS = 64  # rows of a task that drift is told from
ALLOWED = 1.0  # points that an earlier task may lose where `limits.forgetting` says nothing


@dataclass(frozen=True)
class Retention:
    """A stream in figures, each in the units of its scores.

    `average`: of all tasks at the end. `forgetting`: mean drop of the earlier tasks from their best (Chaudhry et al.
    2018). `backward` and `forward` transfer: what learning others did to a task after it was learnt, and before,
    against the start (Lopez-Paz & Ranzato 2017). `newest`: mean score of each task when it was just learnt.
    """

    average: float
    forgetting: float
    backward: float
    forward: float
    newest: float


def retention(matrix: Sequence[Sequence[float]]) -> Retention:
    """The figures of a stream of T tasks from its matrix [T + 1, T]: the scores at the start, and after each task.

    Raises TaskError for a stream of one task, which can forget nothing, and for a matrix of another shape.
    """
    count = len(matrix) - 1
    if count < 2 or any(len(row) != count for row in matrix):
        shape = f"{len(matrix)} by {', '.join(str(n) for n in sorted({len(row) for row in matrix}))}"
        raise TaskError("no stream of tasks", expected="T + 1 rows of T scores, of two tasks or more", found=shape)
    start, *after = matrix
    end, earlier = after[-1], range(count - 1)
    return Retention(
        fmean(end),
        fmean(max(row[k] for row in after[k:]) - end[k] for k in earlier),
        fmean(end[k] - after[k][k] for k in earlier),
        fmean(after[k - 1][k] - start[k] for k in range(1, count)),
        fmean(after[k][k] for k in range(count)),
    )


@dataclass(frozen=True)
class Stream:
    """A System's updates in figures: [updates + 1, tasks] scores, at the start and after each; None: not measured then.

    `average`: of all tasks at the end, None where all are perplexities. Over those that were there before the last
    update, None where none was: `forgetting`, the mean drop from their best, and `backward` transfer, the mean gain
    since they were first measured. `forward` transfer: what tasks scored before they were learnt, more than the base.
    """

    tasks: tuple[str, ...]
    matrix: tuple[tuple[float | None, ...], ...]
    average: float | None
    forgetting: float | None
    backward: float | None
    forward: float | None


def stream(
    scores: Sequence[tuple[Mapping[str, float], Mapping[str, float]]], lower: Collection[str] = (),
    ahead: Sequence[float | None] = (),
) -> Stream:  # fmt: skip
    """The figures of one or more updates, oldest first, each as scores of its tasks before and after, by name.

    What a task scored after one update is, on the rows that it is measured by later, what it scored before the next.
    Of the tasks in `lower` less is better (perplexities): they stand in the matrix, and in no figure. `ahead`: of each
    update, what its task scored before it, more than the base model; None where that was not measured.
    """
    (start, _), *_ = scores
    rows = [start, *(after for _, after in scores)]
    rows = [{**row, **before} for row, before in zip(rows, [*(b for b, _ in scores), {}], strict=True)]
    tasks = tuple(dict.fromkeys(name for row in rows for name in row))
    last = {t: score for t, score in rows[-1].items() if t not in lower}
    ended = [(end, seen) for t, end in last.items() if (seen := [r[t] for r in rows[:-1] if t in r])]
    return Stream(
        tasks, tuple(tuple(row.get(t) for t in tasks) for row in rows), fmean(last.values()) if last else None,
        fmean(max(*seen, end) - end for end, seen in ended) if ended else None,
        fmean(end - seen[0] for end, seen in ended) if ended else None,
        fmean(early) if (early := [a for a in ahead if a is not None]) else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Lost:
    """What one earlier task lost, in `unit`: points (hundredths), of a metric that is no share percent; < 0: it gained.

    `low`..`high` is the paired 95 % interval. `ok` by `stats.not_worse`: the loss is within `allowed`, and its
    one-sided 95 % `bound` within `most`: that plus what so many rows can show.
    """

    task: str
    n: int
    before: float
    after: float
    lost: float
    low: float
    high: float
    allowed: float
    bound: float
    most: float
    ok: bool
    metric: str = ""
    unit: str = "points"

    def __str__(self) -> str:
        verb, sign = ("gains", -1) if self.lost < 0 else ("loses", 1)
        low, high = sorted((sign * self.low, sign * self.high))
        sure = f"gains at least {-self.bound:.1f}" if self.bound < 0 else f"loses at most {self.bound:z.1f}"
        return (f"{self.task} {verb} {sign * self.lost:z.1f} {self.unit} [{low:z.1f}, {high:z.1f}] on {self.n} rows "
                f"({figure(self.before, self.metric)} to {figure(self.after, self.metric)}); with 95 % confidence "
                f"it {sure} ({self.allowed:g} may be lost; on so many rows a bound of {self.most:.1f} passes)"
                )  # fmt: skip


def loss(name: str, before: Scorecard, after: Scorecard, metric: Metric, allowed: float, seed: int = 0) -> Lost:
    """What a task lost between two scorecards on the same rows; `allowed` is in points."""
    # Points, where scores are shares; of perplexity, and of what a task's own metric gives, percent of what there was.
    shares = metric.higher_is_better and (in_points(metric.name) or abs(before.score) <= 1)
    unit, after = 100.0 if shares else 100.0 / (abs(before.score) or 1.0), alike(after, before, metric, seed)
    paired = stats.compare(before.outcomes, after.outcomes, metric, seed)
    kept = stats.not_worse(before.outcomes, after.outcomes, metric, allowed / unit, seed)
    return Lost(name, paired.n, before.score, after.score, -unit * paired.difference, -unit * paired.high,
                -unit * paired.low, allowed, unit * kept.bound, unit * kept.allowed, kept.ok, metric.name,
                "points" if shares else "percent")  # fmt: skip


def forgetting(
    before: System, after: System, tasks: Sequence[Known], run: Run, allowed: float | None = None, trust: bool = False
) -> tuple[Lost, ...]:
    """What each earlier task lost from one System to another, on the rows held for measuring; both asked the same way.

    `allowed` is `limits.forgetting`, in points. Empty where the weights are the same: nothing is forgotten then. Tasks
    without held rows are left out. Scores are kept in the Run's store. Raises TaskError for a metric that is code and
    not trusted.
    """
    if before.model == after.model:
        return ()
    margin = ALLOWED if allowed is None else allowed
    found = []
    for one in tasks:
        if not one.held:
            continue
        metric = get(one.metric, one.folder, trust)
        cards = [
            evaluate(one.on(system), one.held, metric, session=run.session(system.model), split=f"earlier {one.name}",
                     seed=run.seed, store=run.store, progress=run.progress(f"scoring {one.name}"))
            for system in (before, after)
        ]  # fmt: skip
        found.append(loss(one.name, cards[0], cards[1], metric, margin, run.seed))
    return tuple(found)


def refused(lost: Sequence[Lost]) -> str:
    """Why a candidate is refused; empty where no earlier task lost more than is allowed."""
    return "; ".join(str(one) for one in lost if not one.ok)


def moved_by(before: System, after: System, examples: Sequence[Example], run: Run) -> float | None:
    """The drift of a System's model on answers to rows that it did not learn from; None where none can be taken, as
    between models of different tokens.
    """
    from whet.engine.torch import TorchSession
    from whet.train.lesson import render_rows

    rows = shared_order([e for e in examples if e.completion], bool(before.decoding.closed), run.seed)[:DRIFT_ROWS]
    old, new = (run.session(one.model) for one in (before, after))
    if not rows or not isinstance(old, TorchSession) or not isinstance(new, TorchSession):
        return None
    if before.model.content != after.model.content or old.tokenizer.get_vocab() != new.tokenizer.get_vocab():
        return None
    return drift(old, new, render_rows(before, rows, old)[0])


def drift(before: TorchSession, after: TorchSession, rows: Sequence[Row]) -> float:
    """Mean KL divergence, in nats per target token, of the model after from the model before, over all the vocabulary.

    KL(before || after) on rows of the new task: a cheap forecast of forgetting, which needs no earlier task (Shenfeld
    et al. 2025).
    """
    from whet.train.policy import passes

    total, count = 0.0, 0
    for (old, pack), (new, _) in zip(passes(before, rows), passes(after, rows), strict=True):
        p, q = old.float().log_softmax(-1), new.float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        count += len(pack.targets)
    return total / count
