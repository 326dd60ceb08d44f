"""Reinforcement: sampled answers are scored, and made likelier or less likely by it (RLOO, GRPO)."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from whet.engine import Spent
from whet.errors import DivergedError, MethodError
from whet.feedback import Judge, paired
from whet.methods import Need, Run
from whet.methods.reward import Reward, RewardModel, feedback_of
from whet.metrics import Metric, get, score_all
from whet.system import System
from whet.task import Example, Learnable, rows_hash

if TYPE_CHECKING:
    from whet.engine.prefix import Row
    from whet.engine.torch import TorchSession
    from whet.train.lesson import Lesson
    from whet.train.loop import Curves
    from whet.train.policy import Policy

PROBED, LEAST_MIXED = 32, 0.1  # prompts of the probe; the share of them whose samples must differ in reward
EVEN = 1e-9  # rewards that differ by less are the same
LOOKS = 16  # how often, over the training, KL and entropy are taken
READ, WRITTEN = 0.5, 3.0  # what tokens cost, in trained ones: as measured with 135M weights on two cores


@dataclass(frozen=True)
class ByMetric:
    """A metric (or a function of the user's) as the judge of single answers, against each example's references."""

    metric: Metric

    @property
    def name(self) -> str:
        """The metric's name."""
        return self.metric.name

    def __call__(self, asked: Sequence[tuple[Example, str]]) -> list[float]:
        """One score for each (example, answer); where the metric fails, none of the others is less."""
        found = score_all(self.metric, [answer for _, answer in asked], [example for example, _ in asked])
        sign = 1 if self.metric.higher_is_better else -1
        least = min((0.0, *(sign * o.score for o in found if not o.error)))
        return [least if o.error else sign * o.score for o in found]


def advantages(rewards: Sequence[float], algorithm: str) -> list[float]:
    """How much better each sample of a prompt is than the others.

    rloo: its reward less the mean of the others' (Kool et al. 2019, Ahmadian et al. 2024). grpo: less the mean of all,
    over their standard deviation (Shao et al. 2024).
    """
    n, total = len(rewards), sum(rewards)
    if algorithm == "rloo":
        return [r - (total - r) / (n - 1) for r in rewards]
    return [(r - total / n) / (statistics.stdev(rewards) + 1e-4) for r in rewards]


def spread(rewards: Sequence[Sequence[float]]) -> float:
    """How far samples of one prompt lie apart in reward: the root of the mean variance within a prompt."""
    return math.sqrt(statistics.fmean(map(statistics.variance, rewards)))


def _price(spent: Spent) -> float:
    """What was spent, in trained tokens."""
    return READ * spent.prefilled_tokens + WRITTEN * spent.generated_tokens + spent.trained_tokens


@dataclass(frozen=True)
class RL:
    """Reinforcement from a reward: RLOO or GRPO with a KL leash to the System as given.

    `reward`: "model" (trained on the feedback), "metric" (the task's, against its train rows), or a metric's name (a
    plugin, or a function as file.py:name); "auto" is the model where there are pairs, else the metric. Before it
    starts, a probe says whether it can work: where samples of a prompt all earn the same, nothing is learnt.
    """

    name: ClassVar[str] = "rl"
    family: ClassVar[str] = "human feedback"
    needs: ClassVar[tuple[Need, ...]] = ("weights",)
    writes: ClassVar[tuple[str, ...]] = ("model", "decoding")
    invalidates: ClassVar[tuple[str, ...]] = ("calibration",)
    validated: ClassVar[bool] = False

    algorithm: str = "rloo"
    reward: str = "auto"
    beta: float = 0.05
    learning_rate: float = 2e-4
    epochs: float = 1.0
    batch: int = 8
    samples: int = 4
    temperature: float = 1.0
    rank: int = 16
    weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.algorithm not in ("rloo", "grpo"):
            raise ValueError(f"algorithm is {self.algorithm!r}; rloo or grpo")
        if self.samples < 2 or self.beta < 0:
            raise ValueError("samples is at least 2, beta at least 0")
        if min(self.learning_rate, self.epochs, self.temperature) <= 0 or min(self.batch, self.rank) < 1:
            raise ValueError("learning_rate, epochs, temperature, batch and rank are positive")

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying."""
        return {"learning_rate": (1e-4, 2e-4, 5e-4), "beta": (0.01, 0.05, 0.2), "algorithm": ("rloo", "grpo")}

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with one more adapter. Raises MethodError where the probe finds nothing to learn from."""
        from whet.train.adapters import Adapter
        from whet.train.lesson import key, teach

        before = run.spent
        judge, prompts, own = self._judge(system, data, run)
        rest = run
        if run.trained_tokens is not None:
            rest = replace(run, trained_tokens=run.trained_tokens - (run.spent - before).trained_tokens)
        rules = dict(getattr(judge.metric, "rules", {})) if isinstance(judge, ByMetric) else {}
        name = key("rl", asdict(self), system.state, judge.name, rules, rows_hash(prompts), run.seed, run.fidelity,
                   run.trained_tokens, run.previous)  # fmt: skip
        adapter = Adapter("lora", self.rank, 2 * self.rank)
        taught = teach(system, run, name, adapter, lambda live: self._lesson(system, prompts, judge, own, rest, live))
        run.notes["rewarded_by"] = judge.name
        return replace(taught, decoding=replace(system.decoding, prior=(), normalise="sum"))

    def _judge(self, system: System, data: Learnable, run: Run) -> tuple[Judge, tuple[Example, ...], bool]:
        """What scores, the prompts to answer, and whether the scores have a scale of their own."""
        kind = self.reward if self.reward != "auto" else "model" if paired(data.judged)[0] else "metric"
        if kind == "model":
            judged = feedback_of(data, self.weights)
            within = replace(run, trained_tokens=None if run.trained_tokens is None else run.trained_tokens // 2)
            try:
                model = Reward(weights=self.weights).model(system, data, within)
            except DivergedError as error:  # the rate that it names is not one of rl's
                raise MethodError(f"the reward model was not trained: {error.problem}", found=error.found,
                                  do="see whet apply reward, or set reward=metric") from error  # fmt: skip
            run.spent = within.spent
            asked = {(e.prompt, e.history): e for e in (*data.train, *(r.example for r in judged)) if e.text is None}
            return model, tuple(asked.values()), True
        metric = get(data.metric if kind == "metric" else kind, data.folder, data.trusted)
        usable = tuple(e for e in data.train if e.answered)
        if not usable:
            raise MethodError(f"nothing to score answers against with {metric.name}", found="none",
                              expected="train rows with completions, or feedback and reward=model")  # fmt: skip
        return ByMetric(metric), usable, False

    def _lesson(
        self, system: System, prompts: Sequence[Example], judge: Judge, own: bool, run: Run, live: TorchSession
    ) -> Lesson:
        from whet.train import losses
        from whet.train.batches import per_epoch, step_count, steps, tokens_per_row
        from whet.train.lesson import Lesson
        from whet.train.loop import Schedule, Settings
        from whet.train.policy import Policy

        policy, order = Policy(live, system, self.temperature), steps(prompts, self.batch, run.seed)
        probed = random.Random(run.seed + 1).sample(prompts, min(PROBED, len(prompts)))
        before = live.spent
        rows, scores = self._sampled(policy, probed, judge, run.seed)
        asked = _price(live.spent - before)
        probe = self._probe(scores)
        # A reward model's scale is arbitrary, and what sets prompts apart in it means nothing: in units of its spread
        # among samples of one prompt, the leash means the same for all.
        unit = spread(scores) if own else 1.0
        wanted = self.epochs * len(prompts)
        if run.trained_tokens is not None:
            # Each prompt is answered, and the answers read under the reference and learnt; those of the probe twice.
            learnt = tokens_per_row(rows, min(self.batch, len(rows)), run.seed, module=live.module)
            wanted = min(wanted, (run.trained_tokens - 2 * asked) / (asked / len(rows) + (1 + READ) * learnt))
        count = step_count(run.fidelity * wanted, len(prompts), self.batch)
        log: list[dict[str, Any]] = []

        def source(number: int) -> list[Row]:
            made, earned = self._sampled(policy, order(number), judge, run.seed + 1 + number)
            log.append({"step": number, "reward": statistics.fmean(v for row in earned for v in row)})
            if number % max(1, count // LOOKS) == 0:
                log[-1] |= policy.drift(made)
            # Samples that all earn the same teach nothing: their prompt is left out (Yu et al. 2025, DAPO).
            mixed = [n for n, values in enumerate(earned) if max(values) - min(values) > EVEN] or [0]
            rows = [made[n] for n in mixed]
            better = [advantages([v / unit for v in earned[n]], self.algorithm) for n in mixed]
            return [
                replace(row, facts=tuple(zip(gains, before, strict=True)))
                for row, gains, before in zip(rows, better, policy.reference(rows), strict=True)
            ]

        def after(curves: Curves) -> dict[str, Any]:
            made, earned = self._sampled(policy, probed, judge, run.seed)
            seen = round(curves.steps / per_epoch(len(prompts), self.batch), 2)
            return {"epochs": seen, "steps_log": log, "after": {**self._figures(earned), **policy.drift(made)}}

        return Lesson(
            source, losses.PolicyGradient(self.beta, self.algorithm == "grpo", self.temperature),
            Settings(Schedule(self.learning_rate, count)), None, {"prompts": len(prompts), "before": probe}, after, log,
        )  # fmt: skip

    def _sampled(
        self, policy: Policy, examples: Sequence[Example], judge: Judge, seed: int
    ) -> tuple[list[Row], list[list[float]]]:
        """Samples of the policy as it is, and what each of them earns."""
        rows, texts = policy.sample(examples, self.samples, seed)
        reads = judge.session if isinstance(judge, RewardModel) else policy.live
        before = reads.spent
        found = iter(judge([(e, text) for e, made in zip(examples, texts, strict=True) for text in made]))
        policy.live.spent += reads.spent - before if reads is not policy.live else Spent()
        return rows, [[next(found) for _ in made] for made in texts]

    def _figures(self, scores: Sequence[Sequence[float]]) -> dict[str, float]:
        """Mean reward, that of the best of n samples, and the share of prompts whose samples differ in reward."""
        return {
            "reward": statistics.fmean(v for row in scores for v in row),
            "best_of_n": statistics.fmean(map(max, scores)), "n": self.samples,
            "mixed": statistics.fmean(max(row) - min(row) > EVEN for row in scores),
        }  # fmt: skip

    def _probe(self, scores: Sequence[Sequence[float]]) -> dict[str, float]:
        """What a first look says. Raises MethodError where too few prompts have samples that differ in reward."""
        found = self._figures(scores)
        if found["mixed"] < LEAST_MIXED:
            low = found["reward"] < 0.5
            raise MethodError(
                f"reinforcement would learn nothing: samples of one prompt earn the same (mean {found['reward']:.2f})",
                expected=f"{LEAST_MIXED:.0%} of prompts whose {self.samples} samples differ in reward",
                found=f"{found['mixed']:.0%} of {len(scores)}",
                do="fine-tune first, or raise samples or temperature" if low else "the model has learnt this already",
            )
        return found
