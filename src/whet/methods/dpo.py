"""Direct preference optimisation (Rafailov et al. 2023): learning from pairs without a reward model."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from whet.errors import MethodError
from whet.feedback import Judged, digest, pairs
from whet.methods import Need, Run
from whet.methods.reward import feedback_of, render_pairs
from whet.splits import cut
from whet.system import System
from whet.task import Learnable

if TYPE_CHECKING:
    from whet.engine.prefix import Row
    from whet.engine.torch import TorchSession
    from whet.train.lesson import Lesson
    from whet.train.loop import Curves, Source
    from whet.train.losses import Loss
    from whet.train.policy import Policy

CHECKED, MOST_CHECKED = 0.1, 64  # judgements to validate on: their share, and at most
WATCHED = 16  # prompts whose samples tell length, entropy and KL


@dataclass(frozen=True)
class Preference(ABC):
    """What learning from judgements has in common, whether they are pairs or thumbs.

    The reference is the System as given; its log-probabilities are computed once, before the first step. The weights of
    the best validation are kept. `weights` are annotators', as "name=weight"; 0 leaves one out.
    """

    family: ClassVar[str] = "human feedback"
    needs: ClassVar[tuple[Need, ...]] = ("feedback", "weights")
    writes: ClassVar[tuple[str, ...]] = ("model", "decoding")
    invalidates: ClassVar[tuple[str, ...]] = ("calibration",)
    name: ClassVar[str] = ""

    beta: float = 0.1
    learning_rate: float = 2e-4
    epochs: float = 2.0
    batch: int = 16
    rank: int = 16
    weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.beta, self.learning_rate, self.epochs) <= 0 or min(self.batch, self.rank) < 1:
            raise ValueError("beta, learning_rate, epochs, batch and rank are positive")

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying; not beta: the validation loss is in its unit, and a greater one looks better."""
        return {"learning_rate": (1e-4, 2e-4, 5e-4), "epochs": (1.0, 2.0)}

    @abstractmethod
    def usable(self, rows: Sequence[Judged]) -> tuple[Judged, ...]:
        """The judgements in the form that is learnt from."""

    @abstractmethod
    def loss(self) -> Loss:
        """What is minimised; facts[c][0] is the reference's log-probability of continuation c."""

    @abstractmethod
    def facts(self, rows: Sequence[Judged], made: Sequence[Row], policy: Policy) -> list[Row]:
        """Rows with the facts that the loss needs."""

    def source(self, rows: Sequence[Row], policy: Policy, run: Run) -> Source:
        """The rows of each step."""
        from whet.train.batches import steps

        return steps(rows, self.batch, run.seed)

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with one more adapter."""
        from whet.train.adapters import Adapter
        from whet.train.lesson import key, teach

        rows = self.usable(feedback_of(data, self.weights))
        if not rows:
            raise MethodError(f"{self.name} finds nothing to learn from", expected="pairs of answers to one prompt",
                              found="single judgements", do="use kto, which needs no pairs")  # fmt: skip
        name = key(self.name, asdict(self), system.state, digest(rows), run.seed, run.fidelity,
                   run.trained_tokens, run.previous)  # fmt: skip
        adapter = Adapter("lora", self.rank, 2 * self.rank)
        taught = teach(system, run, name, adapter, lambda live: self._lesson(system, rows, run, live))
        return replace(taught, decoding=replace(system.decoding, prior=()))

    def _lesson(self, system: System, rows: Sequence[Judged], run: Run, live: TorchSession) -> Lesson:
        from whet.train.batches import tokens_per_row
        from whet.train.lesson import Lesson
        from whet.train.loop import Schedule, Settings, validations
        from whet.train.policy import Policy, mean_of

        policy, examples = Policy(live, system), [r.example for r in rows]
        sides = cut(examples, min(MOST_CHECKED, round(CHECKED * len(rows))), seed=run.seed, closed=False)
        fit, checks = ([rows[i] for i in side] for side in sides)
        (learnt, shorter), (held, _) = (self._rendered(system, r, policy) for r in (fit, checks))
        wanted = self.epochs * len(learnt)
        if run.trained_tokens is not None:
            wanted = min(wanted, run.trained_tokens / tokens_per_row(learnt, self.batch, run.seed))
        count = max(1, round(run.fidelity * wanted / self.batch))
        watched = [examples[i] for i in sides[1][:WATCHED]]

        def after(_: Curves) -> dict[str, Any]:
            moved = policy.drift(policy.sample(watched, 1, seed=run.seed)[0]) if watched else {}
            return {"held_out": held_out(held, checks, policy), "moved": moved} if held else {}

        return Lesson(
            self.source(learnt, policy, run), self.loss(),
            Settings(Schedule(self.learning_rate, count), validations=validations(count)),
            (lambda: mean_of(live, held, self.loss())) if held else None,
            {"judgements": len(learnt), "shortened": shorter}, after,
        )  # fmt: skip

    def _rendered(self, system: System, rows: Sequence[Judged], policy: Policy) -> tuple[list[Row], int]:
        """Judgements as rows with their facts, and how many of them were shortened."""
        made, shorter = render_pairs(system, rows, policy.live) if rows else ([], 0)
        return self.facts(rows, made, policy) if rows else [], shorter


def held_out(rows: Sequence[Row], judged: Sequence[Judged], policy: Policy) -> dict[str, Any]:
    """What judgements that were not trained on say: how often the implicit reward is right, and log-probabilities.

    The latter are per token, before and after: the chosen answers' may fall although the loss does, too.
    """
    right, sides = [], {"chosen": list[tuple[float, float]](), "rejected": list[tuple[float, float]]()}
    for row, one, now in zip(rows, judged, policy.logprobs(rows), strict=True):
        named = [side for side in sides if getattr(one, side) is not None]
        ratios = [value - fact[0] for value, fact in zip(now, row.facts, strict=True)]
        right.append(sum(r if side == "chosen" else -r for side, r in zip(named, ratios, strict=True)) > 0)
        for side, tokens, value, fact in zip(named, row.continuations, now, row.facts, strict=True):
            sides[side].append((fact[0] / len(tokens), value / len(tokens)))
    means = {side: [statistics.fmean(v) for v in zip(*found, strict=True)] for side, found in sides.items() if found}
    return {"accuracy": statistics.fmean(right), "logprob_per_token": means, "n": len(right)}


@dataclass(frozen=True)
class DPO(Preference):
    """Direct preference optimisation on pairs, with the given System as the reference.

    Defaults: beta 0.1 (Rafailov et al. 2023). `normalise` compares log-ratios per token, so that long answers gain
    nothing by their length (Lambert et al. 2024 use beta 5 with it). `sft` adds the likelihood of the chosen answers,
    for Systems that were not fine-tuned on them (Pang et al. 2024).
    """

    name: ClassVar[str] = "dpo"

    normalise: bool = False
    sft: float = 0.0

    def usable(self, rows: Sequence[Judged]) -> tuple[Judged, ...]:
        """Pairs."""
        return pairs(rows)

    def loss(self) -> Loss:
        """DPO's."""
        from whet.train import losses

        return losses.DPO(self.beta, self.normalise, self.sft)

    def facts(self, rows: Sequence[Judged], made: Sequence[Row], policy: Policy) -> list[Row]:
        """(log-probability under the reference, weight)."""
        return [
            replace(row, facts=tuple((value, one.weight) for value in values))
            for row, one, values in zip(made, rows, policy.logprobs(made), strict=True)
        ]
