"""A reward model: the model itself with one number for an output, trained on pairs (Stiennon et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from whet.errors import MethodError, TaskError
from whet.feedback import Judged, Versus, agreement, digest, pairs, usable, weighted
from whet.methods import Need, Run
from whet.metrics import Metric, get
from whet.model import ModelRef
from whet.splits import cut
from whet.system import System
from whet.task import Example, Learnable, Splits, Task

if TYPE_CHECKING:
    from whet.engine.prefix import Row
    from whet.engine.torch import TorchSession
    from whet.train.lesson import Lesson

HELD, MOST_HELD = 0.2, 100  # pairs that accuracy and calibration are measured on: their share, and at most


def feedback_of(data: Learnable, weights: Sequence[str] = ()) -> tuple[Judged, ...]:
    """The judgements that a Method may learn from, weighted. Raises MethodError where there are none."""
    found = weighted(data.judged, weights, data.annotators)
    if not found:
        raise MethodError("no feedback to learn from", expected="judgements", found="none",
                          do="collect some: whet feedback SYSTEM PROMPTS")  # fmt: skip
    return found


def render_pairs(
    system: System, rows: Sequence[Judged], session: TorchSession, *, head: bool = False
) -> tuple[list[Row], int]:
    """Rows whose continuations are (chosen, rejected), end of turn included, behind prompts as the System renders them.

    With `head`, as a reward model reads them. Returns the rows and how many had to be shortened to fit the context
    window; answers leave the prompt half of it.
    """
    from whet.engine.prefix import Row
    from whet.train.head import for_head
    from whet.train.lesson import within

    def encode(text: str | None) -> tuple[int, ...]:
        if head:
            return for_head(session, text or "")
        return session.encode_answer(system.decoding.said(text or ""), end=True)

    sides = [tuple(encode(t) for t in (r.chosen, r.rejected) if t is not None) for r in rows]
    room = [min(max(map(len, s)), session.context // 2) for s in sides]
    prompts, shorter = system.fitting([r.example for r in rows], session, room, blind=True)
    last = 2 if head else 0  # what the head stands on
    made = [Row(p, tuple(within(a, session.context - len(p), last) for a in s))
            for p, s in zip(session.encode(prompts), sides, strict=True)]  # fmt: skip
    return made, sum(c or row.continuations != s for c, row, s in zip(shorter, made, sides, strict=True))


@dataclass(frozen=True)
class RewardModel:
    """Scores answers to examples; higher is better. Its System is the base whose last transform carries the head.

    Equal answers to equal prompts are read once: those of a base stand beside those of every System.
    """

    system: System
    known: dict[tuple[Any, ...], float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Which reward model this is."""
        return f"reward model {self.system.fingerprint[:12]}"

    @cached_property
    def session(self) -> TorchSession:
        """A session over the module with its head; opened when first needed."""
        from whet import model as models
        from whet.engine.torch import TorchSession
        from whet.train.head import load_head

        module, tokenizer = models.load(self.system.model, self.system.home)
        folder = self.system.model.transforms[-1].folder
        assert folder is not None  # opening the model has checked it
        load_head(module, folder)
        return TorchSession(module, tokenizer)

    def __call__(self, asked: Sequence[tuple[Example, str]]) -> list[float]:
        """One reward for each (example, answer)."""
        from whet.train.head import score_rows

        read = [(e.history, e.prompt, answer) for e, answer in asked]
        if new := [one for one in dict.fromkeys(read) if one not in self.known]:
            rows = [Judged("", prompt, answer, history=history) for history, prompt, answer in new]
            found = score_rows(self.session, render_pairs(self.system, rows, self.session, head=True)[0])
            self.known.update(zip(new, (value for [value] in found), strict=True))
        return [self.known[one] for one in read]


def fit(rows: Sequence[Judged], system: System, run: Run, settings: Reward) -> RewardModel:
    """A reward model trained on pairs; the same call again finds it in the store.

    It starts from the System's base, without what was trained or shown since: a reward must not move with what it
    judges. Raises MethodError without pairs.
    """
    from whet.train.adapters import Adapter
    from whet.train.lesson import key, teach

    found = pairs(rows)
    if not found:
        raise MethodError("a reward model learns from pairs", expected="chosen and rejected answers to one prompt",
                          found=f"{len(rows)} single judgements", do="use kto, which needs none")  # fmt: skip
    plain = System(ModelRef(system.model.base, system.model.content), system.instruction, home=system.home)
    name = key("reward", asdict(settings), plain.fingerprint, digest(found), run.seed, run.fidelity, run.trained_tokens)
    adapter = Adapter("lora", settings.rank, 2 * settings.rank, head=True)
    own = replace(run, previous=None)  # what an earlier rung kept is of the policy, not of its judge
    made = teach(plain, own, name, adapter, lambda live: _lesson(found, plain, own, settings, live))
    run.spent = own.spent
    return RewardModel(made)


def _lesson(rows: Sequence[Judged], system: System, run: Run, settings: Reward, live: TorchSession) -> Lesson:
    from whet.train import losses
    from whet.train.batches import per_epoch, step_count, steps, tokens_per_row
    from whet.train.lesson import Lesson
    from whet.train.loop import Schedule, Settings

    rendered, shorter = render_pairs(system, rows, live, head=True)
    made = [replace(row, facts=((r.weight,),) * 2) for row, r in zip(rendered, rows, strict=True)]
    wanted = settings.epochs * len(made)
    if run.trained_tokens is not None:
        wanted = min(wanted, run.trained_tokens / tokens_per_row(made, settings.batch, run.seed, module=live.module))
    count = step_count(run.fidelity * wanted, len(made), settings.batch)
    return Lesson(steps(made, settings.batch, run.seed), losses.Reward(),
                  Settings(Schedule(settings.learning_rate, count)),
                  notes={"pairs": len(made), "shortened": shorter,
                         "epochs": round(count / per_epoch(len(made), settings.batch), 2)})  # fmt: skip


def judged_by(splits: Splits, base: System, run: Run, settings: Reward | None = None) -> Versus:
    """win_rate as a metric: against the base, by a reward model of the judgements that no Method is shown.

    Raises TaskError where the task has none.
    """
    if not pairs(splits.judging):
        raise TaskError("win_rate needs a judge", expected="feedback with pairs", found="none",
                        do="add feedback.jsonl, or collect some: whet feedback SYSTEM PROMPTS "
                           "(on other prompts than those that are measured on)")  # fmt: skip
    return Versus(fit(splits.judging, base, run, settings or Reward()), base, run.session(base.model))


def metric_of(task: Task, base: System, run: Run, splits: Splits | None = None) -> Metric:
    """A task's metric; where it is win_rate, one against `base`, by a judge that is trained where none is kept.

    The judge learns from what `splits` sets aside for it; None: the task's, by the Run's seed.
    """
    if task.metric != "win_rate":
        return get(task.metric, task.folder, task.trusted)
    splits = splits or task.split(run.seed)
    usable(task.judged, splits)
    return judged_by(splits, base, run)


@dataclass(frozen=True)
class Reward:
    """A reward model of the feedback, kept in the store; accuracy and calibration on held-out pairs are reported.

    It changes nothing about the System that answers: `rl` and the win rate use it. Two epochs, since reward models
    overfit soon (Ouyang et al. 2022 take one).
    """

    name: ClassVar[str] = "reward"
    family: ClassVar[str] = "human feedback"
    needs: ClassVar[tuple[Need, ...]] = ("feedback", "weights")
    writes: ClassVar[tuple[str, ...]] = ()
    invalidates: ClassVar[tuple[str, ...]] = ()
    validated: ClassVar[bool] = False

    rank: int = 16
    learning_rate: float = 5e-4
    epochs: float = 2.0
    batch: int = 16
    weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or self.batch < 1 or self.learning_rate <= 0 or self.epochs <= 0:
            raise ValueError("rank, batch, learning_rate and epochs are positive")

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying."""
        return {"learning_rate": (2e-4, 5e-4, 1e-3), "epochs": (1.0, 2.0, 3.0), "rank": (8, 16)}

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The same System; the reward model stands in the notes and in the store."""
        self.model(system, data, run)
        return system

    def model(self, system: System, data: Learnable, run: Run) -> RewardModel:
        """The reward model itself; its figures go to the notes."""
        every = feedback_of(data, self.weights)
        rows = pairs(every) or every  # `fit` says what is wrong with rows that make no pairs
        size = min(MOST_HELD, round(HELD * len(rows)))
        fitted, held = ([rows[i] for i in s] for s in cut([r.example for r in rows], size, seed=run.seed, closed=False))
        model = fit(fitted, system, run, self)
        checked = asdict(agreement(model, held, run.seed)) if held else None
        run.notes["reward"] = {"model": model.name, "pairs": len(fitted), "held_out": checked}
        return model
