"""Direct preference optimisation (Rafailov et al. 2023): learning from pairs without a reward model."""

from __future__ import annotations

import math
import random
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from whet.errors import MethodError
from whet.feedback import Judged, digest, pairs
from whet.methods import Need, Run
from whet.methods.finetune import SAMPLED
from whet.methods.reward import feedback_of, render_pairs
from whet.methods.rl import READ, WRITTEN
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

T = TypeVar("T")
# Judgements to validate on: their share, at most, and at least as many where a budget makes them fewer.
CHECKED, MOST_CHECKED, LEAST_CHECKED = 0.1, 64, 4
LOOKS = 7  # how often they are read: under the reference, before the first step, up to four times after, at the end
WATCHED, WATCHING = 16, 0.1  # prompts whose samples tell length, entropy and KL; the share of a budget they may take
AHEAD = 8  # steps that the reference is asked for at a time: rows of all of them share their beginnings


def ahead(
    order: Callable[[int], Sequence[int]], count: int, make: Callable[[Sequence[int]], Sequence[T]]
) -> Callable[[int], list[T]]:
    """The steps of `order`, `count` in all, with what `make` makes of the rows of these numbers: when needed, once.

    Rows are made together in the same blocks wherever a training goes on from: in others they would come out rounded
    otherwise.
    """
    known: dict[int, T] = {}
    blocks: list[list[int]] = []  # of `AHEAD` steps each: the rows that are in none before
    block: dict[int, int] = {}

    def step(number: int) -> list[T]:
        while number >= AHEAD * len(blocks):
            begin = AHEAD * len(blocks)
            soon = dict.fromkeys(i for n in range(begin, min(begin + AHEAD, count)) for i in order(n))
            blocks.append([i for i in soon if i not in block])
            block.update(dict.fromkeys(blocks[-1], len(blocks) - 1))
        for n in sorted({block[i] for i in order(number) if i not in known}):
            known.update(zip(blocks[n], make(blocks[n]), strict=True))
        return [known[i] for i in order(number)]

    return step


@dataclass(frozen=True)
class Preference(ABC):
    """What learning from judgements has in common, whether they are pairs or thumbs.

    The reference is the System as given; its log-probabilities are computed once, of the rows that are trained on. What
    is read and sampled beside counts in a budget. The weights of the best validation are kept. `weights` are
    annotators', as "name=weight"; 0 leaves one out.
    """

    family: ClassVar[str] = "human feedback"
    needs: ClassVar[tuple[Need, ...]] = ("feedback", "weights")
    writes: ClassVar[tuple[str, ...]] = ("model", "decoding")
    invalidates: ClassVar[tuple[str, ...]] = ("calibration",)
    name: ClassVar[str] = ""
    reads: ClassVar[tuple[int, int]] = (1, 0)  # how often a row is read beside: when first seen, and in every step

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

    def source(
        self, system: System, rows: Sequence[Judged], made: Mapping[int, Row], order: Callable[[int], list[int]],
        count: int, policy: Policy,
    ) -> Source:  # fmt: skip
        """The rows of so many steps, from their numbers in `order`; `made` holds them rendered, without facts."""
        return ahead(order, count, lambda some: self.facts([rows[i] for i in some], [made[i] for i in some], policy))

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
        return taught.uncalibrated

    def _lesson(self, system: System, rows: Sequence[Judged], run: Run, live: TorchSession) -> Lesson:
        from whet.train.batches import per_epoch, step_count, steps, tokens_per_row
        from whet.train.lesson import Lesson
        from whet.train.loop import Schedule, Settings, validations
        from whet.train.policy import Policy, looked_at

        policy, examples = Policy(live, system), [r.example for r in rows]
        some, _ = render_pairs(system, random.Random(run.seed).sample(rows, min(SAMPLED, len(rows))), live)
        tokens = tokens_per_row(some, self.batch, run.seed, module=live.module)
        checked, watching, allowed = min(MOST_CHECKED, round(CHECKED * len(rows))), WATCHED, math.inf
        if run.trained_tokens is not None:
            # What the defaults would want decides what is held out, so that all settings are compared on the same rows.
            usual = min(Preference.epochs * len(rows), self._affordable(len(rows), tokens, run.trained_tokens))
            checked = min(checked, max(LEAST_CHECKED, round(CHECKED * usual)))
            asked, written = statistics.fmean(len(row.prompt) for row in some), system.decoding.max_tokens
            sampling = READ * asked + WRITTEN * written + 2 * READ * (asked + written)  # read by both, then
            watching = min(WATCHED, checked, int(WATCHING * run.trained_tokens / sampling))
            allowed = run.trained_tokens - READ * LOOKS * tokens * checked - sampling * watching
        sides = cut(examples, checked, seed=run.seed, closed=False)
        fit, checks = ([rows[i] for i in side] for side in sides)
        wanted = min(self.epochs * len(fit), self._affordable(len(fit), tokens, allowed))
        count = step_count(run.fidelity * wanted, len(fit), self.batch)
        order = steps(range(len(fit)), self.batch, run.seed)
        used = sorted({i for n in range(count) for i in order(n)})
        learnt, shorter = render_pairs(system, [fit[i] for i in used], live)
        held = self.facts(checks, render_pairs(system, checks, live)[0], policy) if checks else []
        # A shorter beginning of this training is not told by its samples: nobody reads that.
        watched = [examples[i] for i in sides[1][:watching]] if run.fidelity == 1 else []

        log: list[dict[str, Any]] = []
        by_token = bool(getattr(self, "normalise", False))

        def look() -> float:
            value, now, entropy = looked_at(live, held, self.loss())
            log.append({"loss": value, "entropy": entropy, **held_out(held, checks, now, by_token)})
            return value

        def after(curves: Curves) -> dict[str, Any]:
            seen = {"epochs": round(curves.steps / per_epoch(len(fit), self.batch), 2)}
            if not held:
                return seen
            moved = policy.drift(policy.sample(watched, 1, seed=run.seed)[0]) if watched else {}
            return seen | {"held_out": held_out(held, checks, policy.logprobs(held), by_token), "moved": moved,
                           "looks": log}  # fmt: skip

        return Lesson(
            self.source(system, fit, dict(zip(used, learnt, strict=True)), order, count, policy), self.loss(),
            Settings(Schedule(self.learning_rate, count), validations=validations(count)),
            look if held else None, {"judgements": len(fit), "seen": len(used), "shortened": shorter}, after, log,
        )  # fmt: skip

    def _affordable(self, rows: int, tokens: float, allowed: float) -> float:
        """Rows to train on in all, again and again, that so many trained tokens pay for, each read as `reads` says."""
        once, always = self.reads
        first, again = tokens * (1 + READ * (once + always)), tokens * (1 + READ * always)
        seen = allowed / first
        return seen if seen <= rows else rows + (allowed - rows * first) / again


def held_out(
    rows: Sequence[Row], judged: Sequence[Judged], logprobs: Sequence[tuple[float, ...]], by_token: bool = False
) -> dict[str, Any]:  # fmt: skip
    """What judgements that were not trained on say: how often the implicit reward is right, and log-probabilities.

    The reward is of an answer, or `by_token` of each of its tokens. Log-probabilities are per token, under the
    reference and now (`logprobs`, of each row's answers): the chosen answers' may fall although the loss does, too.
    """
    right, sides = [], {"chosen": list[tuple[float, float]](), "rejected": list[tuple[float, float]]()}
    for row, one, now in zip(rows, judged, logprobs, strict=True):
        named = [side for side in sides if getattr(one, side) is not None]
        lengths = [len(tokens) if by_token else 1 for tokens in row.continuations]
        ratios = [(value - fact[0]) / n for value, fact, n in zip(now, row.facts, lengths, strict=True)]
        right.append(sum(r if side == "chosen" else -r for side, r in zip(named, ratios, strict=True)) > 0)
        for side, tokens, value, fact in zip(named, row.continuations, now, row.facts, strict=True):
            sides[side].append((fact[0] / len(tokens), value / len(tokens)))
    means = {side: [statistics.fmean(v) for v in zip(*found, strict=True)] for side, found in sides.items() if found}
    return {"accuracy": statistics.fmean(right), "logprob_per_token": means, "n": len(right)}


@dataclass(frozen=True)
class DPO(Preference):
    """Direct preference optimisation on pairs, with the given System as the reference.

    Defaults: beta is half of Rafailov et al.'s (2023), as `sft` holds the chosen answers, too. `normalise` compares
    log-ratios per token, so that long answers gain nothing by their length (Lambert et al. 2024 use beta 5 with it).
    `sft` adds the likelihood of the chosen answers, which else falls with that of the rejected ones (Pang et al. 2024,
    whose weight it is).
    """

    name: ClassVar[str] = "dpo"

    beta: float = 0.05
    normalise: bool = False
    sft: float = 1.0

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
            for row, one, values in zip(made, rows, policy.reference(made), strict=True)
        ]
