"""Calibration: the model's leaning towards some labels is measured and subtracted."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from whet.errors import MethodError
from whet.methods import Need, Run
from whet.system import System
from whet.task import Learnable


def batch_prior(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Log of the mean softmax over rows of label scores: the prior that batch calibration subtracts.

    Rows are [n, labels] scores in nats. Source: Zhou et al. 2023, Batch Calibration.
    """
    sums = [0.0] * len(rows[0])
    for row in rows:
        top = max(row)
        weights = [math.exp(s - top) for s in row]
        total = sum(weights)
        for i, weight in enumerate(weights):
            sums[i] += weight / total
    return tuple(math.log(max(s / len(rows), 1e-12)) for s in sums)


@dataclass(frozen=True)
class Calibrate:
    """Batch calibration: the prior comes from unlabelled train prompts only, `prompts` of them."""

    name: ClassVar[str] = "calibrate"
    family: ClassVar[str] = "few-/zero-shot"
    needs: ClassVar[tuple[Need, ...]] = ("labels", "examples")
    writes: ClassVar[tuple[str, ...]] = ("decoding",)
    invalidates: ClassVar[tuple[str, ...]] = ()

    kind: str = "batch"
    prompts: int = 128

    def __post_init__(self) -> None:
        if self.kind != "batch":
            raise ValueError(f"{self.kind!r} is not batch")
        if self.prompts < 2:
            raise ValueError(f"prompts is {self.prompts}; at least 2")

    def space(self) -> Mapping[str, Sequence[Any]]:
        """Nothing worth racing: more prompts only make the prior steadier."""
        return {}

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with a prior; only the prompts of train are looked at, never their labels."""
        rows = [e for e in data.train if not e.choices and e.text is None]
        # Prompts that are shown as demonstrations would see their own answer.
        shown = {question for question, _ in system.demonstrations.pool}
        if system.demonstrations.selection == "fixed":
            rows = [e for e in rows if e.prompt not in shown]
        sample = random.Random(run.seed).sample(rows, min(self.prompts, len(rows)))
        if not sample:
            raise MethodError(
                "nothing to calibrate on", expected="train prompts that are not shown as demonstrations", found="none",
                do="show fewer",
            )  # fmt: skip
        plain = replace(system, decoding=replace(system.decoding, prior=()))
        if system.demonstrations.selection == "nearest":
            plain = replace(plain, demonstrations=_without(system, [e.prompt for e in sample]))
        session = run.session(system.model)
        scores, _ = plain.label_scores(sample, session, run.progress("calibrating"))
        return replace(system, decoding=replace(system.decoding, prior=batch_prior(scores)))


def _without(system: System, prompts: Sequence[str]) -> Any:
    """The System's demonstrations without the given questions, so that no prompt finds itself as its neighbour."""
    hidden = set(prompts)
    pool = tuple(pair for pair in system.demonstrations.pool if pair[0] not in hidden)
    return replace(system.demonstrations, pool=pool)
