"""General ability: plain text and common questions that a System is asked before and after it was taught."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

import yaml

from whet import stats
from whet.memory import as_task
from whet.methods import Run
from whet.metrics import get
from whet.scorecard import Scorecard, alike, evaluate
from whet.system import System
from whet.task import Example, Task

INSTRUCTION = "Answer the question."


@dataclass(frozen=True)
class Ability:
    """What teaching did to all else: perplexity of plain text, and accuracy on `n` common questions, before and after.

    `low`..`high` is the paired 95 % interval of the difference in accuracy. Nothing is refused for it: so few questions
    show only a model that was broken.
    """

    perplexity: tuple[float, float]
    accuracy: tuple[float, float]
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        (text, then), (right, now) = self.perplexity, self.accuracy
        return (f"general ability: perplexity of plain text {text:.1f} to {then:.1f}, {self.n} common questions "
                f"{100 * right:.1f} to {100 * now:.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]")  # fmt: skip


@cache
def tasks() -> tuple[Task, Task]:
    """The plain text, and the questions, as tasks."""
    body = yaml.safe_load(files("whet").joinpath("general.yaml").read_text(encoding="utf-8"))
    text = tuple(Example(f"text-{n}", "", text=one) for n, one in enumerate(body["text"]))
    asked = tuple(Example(f"question-{n}", q, right, (right,), choices=(right, *wrong))
                  for n, (q, right, *wrong) in enumerate(body["questions"]))  # fmt: skip
    return (Task("plain text", Path(), "", "perplexity", test=text),
            Task("common questions", Path(), INSTRUCTION, "accuracy", test=asked))  # fmt: skip


def ability(before: System, after: System, run: Run) -> Ability:
    """What a model lost or gained beside its tasks, from one System to another; scores are kept in the Run's store."""

    def card(system: System, task: Task) -> Scorecard:
        session = run.session(system.model)
        asked, watch = as_task(system, task, session), run.progress(f"scoring {task.name}")
        # Both are read in one way: training says how choices of different lengths are compared.
        asked = replace(asked, decoding=replace(asked.decoding, normalise=after.decoding.normalise))
        return evaluate(asked, task.test, get(task.metric), session=session, split=f"general {task.name}",
                        seed=run.seed, store=run.store, progress=watch)  # fmt: skip

    text, questions = tasks()
    (old, right), (new, now) = ([card(s, t) for t in (text, questions)] for s in (before, after))
    new = alike(new, old, get("perplexity"), run.seed)
    paired = stats.compare(right.outcomes, now.outcomes, get("accuracy"), run.seed)
    return Ability((old.score, new.score), (right.score, now.score), paired.low, paired.high, paired.n)
