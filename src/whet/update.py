"""`whet update`: teach an existing System more, by rows or by judgements, and say what was gained and what was lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from whet import stats
from whet.errors import MethodError
from whet.feedback import load as load_feedback
from whet.feedback import paired, weighted
from whet.memory import Known, as_task, carried, known, remember
from whet.methods import Method, Run, make
from whet.methods.reward import metric_of
from whet.retention import ALLOWED, Lost, drift, forgetting, refused
from whet.scorecard import Scorecard, evaluate
from whet.search.recipe import Recipe
from whet.system import System
from whet.task import Splits, Task

LOOKED_AT = 64  # rows of the new task that drift is told from
LONGER, DRIFTED = 1.5, 0.5  # feedback may make answers so many times as long, and move them so many nats a token


@dataclass(frozen=True)
class Update:
    """A System that was taught more: what it gained on the task, and what the earlier ones lost.

    `paired` compares after with before on the task's held-out rows; `length` is words per answer, before and after;
    `drift` the KL divergence from before, in nats per token; None where no held-out row has an answer to take it from.
    `dropped` are rows and judgements that leak, as (id, why); `unused` the judgements that dpo finds no pair for.
    `refused` says why it should not be used; empty: it may.
    """

    system: System
    before: Scorecard
    after: Scorecard
    paired: stats.Paired
    lost: tuple[Lost, ...]
    unmeasured: tuple[str, ...]
    length: tuple[float, float]
    drift: float | None
    dropped: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]
    refused: str
    notes: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """As `whet update --json` prints it."""
        return {
            "fingerprint": self.system.fingerprint, "metric": self.before.metric,
            "before": self.before.score, "after": self.after.score, **asdict(self.paired),
            "earlier": [asdict(one) for one in self.lost], "unmeasured": list(self.unmeasured),
            "length": list(self.length), "drift": self.drift, "refused": self.refused,
            "dropped": [{"id": name, "why": why} for name, why in self.dropped], "unused": list(self.unused),
            "recipe": self.system.card["recipe"], "notes": dict(self.notes),
        }  # fmt: skip


def begin(system: System, task: Task, run: Run) -> System:
    """The System asked the task that it is to learn; its card then holds its own task, too, as one to keep."""
    name, asked = system.card.get("task"), (system.instruction, system.decoding.labels)
    if name == task.name or asked == (task.instruction, task.labels):
        return replace(system, decoding=replace(system.decoding, prior=()))
    kept = {one.name: one for one in carried(system)}
    own = Known(name or "what it knew", "accuracy" if system.decoding.closed else "token_f1", system)
    memory = [one.entry() for one in {own.name: own, **kept}.values()]
    new = kept[task.name].on(system) if task.name in kept else as_task(system, task, run.session(system.model))
    return replace(new, card={"task": name, "memory": memory})


def update(
    system: System, task: Task, run: Run, settings: Mapping[str, Any] | None = None, feedback: Path | None = None
) -> Update:
    """Teach a System a task's train rows (by `continual`) or the judgements of a file (by `dpo`; by `kto` where most
    are thumbs without a counterpart).

    Earlier tasks are kept by their `earlier:` folders, or by the rows that the System carries. After feedback, the
    task itself is one that must not lose, and answers must not grow or drift much. Raises MethodError or TaskError for
    what cannot be learnt or measured.
    """
    settings = dict(settings or {})
    if feedback is not None:
        # Before anything is set aside: an annotator who is left out is to judge nothing, either.
        weights = vars(make("kto", {"weights": settings.pop("weights", ())}))["weights"]
        judged = weighted(load_feedback(feedback.parent, feedback.name)[0], weights)
        task = replace(task, judged=judged)
        run.notes |= {"weights": list(weights)} if weights else {}
    splits, start = task.split(run.seed), begin(system, task, run)
    found, single = paired(splits.learnable.judged)
    by = "continual" if feedback is None else "dpo" if found and len(found) >= len(single) else "kto"
    method = make(by, settings)
    rows = splits.confirm or splits.select
    metric = metric_of(task, start, run)
    if not rows:
        raise MethodError("nothing to measure on", expected="test rows, or enough train rows", found="none")
    after = method.apply(start, splits.learnable, run)
    tasks = known(start, splits.learnable, run.session(start.model), split="test", seed=run.seed)
    itself = feedback is not None and metric.name != "win_rate"
    guarded = (*tasks, *([Known(task.name, task.metric, start, (), rows, task.folder)] if itself else ()))
    lost = forgetting(start, after, guarded, run, task.limits.forgetting, task.trusted)
    cards = [
        evaluate(one, rows, metric, session=run.session(one.model), split="test", seed=run.seed, store=run.store,
                 progress=run.progress("answering"))
        for one in (start, after)
    ]  # fmt: skip
    length = tuple(sum(len(o.answer.split()) for o in card.outcomes) / card.n for card in cards)
    moved = _drift(start, after, splits, run)
    why = [refused(lost)]
    if metric.name == "win_rate":
        margin = (ALLOWED if task.limits.forgetting is None else task.limits.forgetting) / 100
        if not stats.not_worse(cards[0].outcomes, cards[1].outcomes, metric, margin, run.seed).ok:
            why.append(f"the win rate fell from {100 * cards[0].score:.1f} to {100 * cards[1].score:.1f}")
    if feedback is not None and length[1] > LONGER * length[0]:
        why.append(f"answers grew from {length[0]:.0f} to {length[1]:.0f} words")
    if feedback is not None and moved is not None and moved > DRIFTED:
        why.append(f"answers drifted by {moved:.2f} nats a token; {DRIFTED:g} allowed")
    memory = remember(after, splits.learnable, tasks, splits.select or rows, seed=run.seed)
    card = _card(system, method, task, cards[1], memory)
    compared = stats.compare(cards[0].outcomes, cards[1].outcomes, metric, run.seed)
    return Update(
        replace(after, card=card), cards[0], cards[1], compared, lost, tuple(one.name for one in tasks if not one.held),
        (length[0], length[1]), moved, splits.dropped, tuple(r.id for r in single if by == "dpo"),
        "; ".join(filter(None, why)),
        {k: v for k, v in run.notes.items() if k != "curves"},
    )  # fmt: skip


def _drift(before: System, after: System, splits: Splits, run: Run) -> float | None:
    """KL between the two on answers to rows of the task that neither learnt from; None where there are none."""
    from whet.engine.torch import TorchSession
    from whet.train.lesson import render_rows

    rows = [e for e in (*splits.confirm, *splits.select) if e.completion][:LOOKED_AT]
    old, new = (run.session(one.model) for one in (before, after))
    if not rows or not isinstance(old, TorchSession) or not isinstance(new, TorchSession):
        return None
    return drift(old, new, render_rows(before, rows, old)[0])


def _card(old: System, method: Method, task: Task, card: Scorecard, memory: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the new System comes from, what it scored, and what it carries."""
    recipe = Recipe((method,)).name
    taught = [*old.card.get("taught", ()), {"task": task.name, "data": task.fingerprint, "recipe": recipe,
                                            "from": old.fingerprint}]  # fmt: skip
    return {"task": task.name, "recipe": recipe, "scorecard": card.record(), "taught": taught, "memory": memory}
