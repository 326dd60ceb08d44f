"""Calibration: the model's leaning towards some labels is measured and subtracted."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from whet.errors import MethodError
from whet.methods import Need, Run
from whet.splits import UNSPACED
from whet.system import System
from whet.task import Example, Learnable

KINDS = ("batch", "contextual", "domain", "fitted")
STEADY, LEAST_SCALE = 1.0, 0.05  # standard deviation of fitted biases before the data; scores are not quite ignored
FAR = -50.0  # nats: below that, no label is fitted
_CHARACTER = f"[{UNSPACED}\u3001-\u303f\uff01-\uff65]"  # of scripts without spaces and their punctuation: a word each
WORD = re.compile(rf"{_CHARACTER}|(?:(?!{_CHARACTER})\S)+")
_SPACED = re.compile(f"(?<={_CHARACTER}) | (?={_CHARACTER})")


def batch_prior(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Log of the mean softmax over rows of label scores: the prior that batch calibration subtracts.

    Rows are [n, labels] scores in nats. Source: Zhou et al. 2023, Batch Calibration.
    """
    from scipy.special import softmax

    means = softmax(rows, axis=1).mean(axis=0)
    return tuple(math.log(max(mean, 1e-12)) for mean in means.tolist())


def fitted_prior(rows: Sequence[Sequence[float]], right: Sequence[int]) -> tuple[float, ...]:
    """What is to be subtracted from label scores so that the likeliest label is the right one, by maximum likelihood.

    Rows are [n, labels] scores in nats, `right` the numbers of their labels. A scale for all scores and a bias for each
    label are fitted; only the biases, in the unit of the scores, change which label is best. Source: bias-corrected
    temperature scaling (Alexandari et al. 2020), here with a normal prior on the biases.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import log_softmax, softmax

    scores, answers = np.maximum(log_softmax(rows, axis=1), FAR), np.asarray(right)
    wanted = np.eye(scores.shape[1])[answers]

    def loss(x: Any) -> tuple[float, Any]:
        logits = x[0] * scores + x[1:]
        off = softmax(logits, axis=1) - wanted
        value = -(wanted * log_softmax(logits, axis=1)).sum() + (x[1:] ** 2).sum() / (2 * STEADY**2)
        return value, np.concatenate([[(off * scores).sum()], off.sum(axis=0) + x[1:] / STEADY**2])

    start = np.concatenate([[1.0], np.zeros(scores.shape[1])])
    bounds = [(LEAST_SCALE, None), *[(None, None)] * scores.shape[1]]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return tuple((-found[1:] / found[0]).tolist())


def free_inputs(kind: str, rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Prompts that say nothing of any label: without content, or random words of train prompts, as many as they have.

    In scripts without spaces a character is a word. Sources: Zhao et al. 2021 (contextual), Fei et al. 2023 (domain:
    20 of them).
    """
    if kind == "contextual":
        texts = ["N/A", "", "[MASK]"]
    else:
        draw, words = random.Random(seed), [word for row in rows for word in WORD.findall(row.prompt)]
        size = max(1, len(words) // len(rows))
        texts = [_SPACED.sub("", " ".join(draw.choices(words or ["N/A"], k=size))) for _ in range(count)]
    # Behind the system turns that rows bring with them: the prior is of the prompt that questions stand in.
    system = [tuple(turn for turn in row.history if turn[0] == "system") for row in rows] or [()]
    drawn = random.Random(seed).choices(system, k=len(texts))
    told = enumerate(zip(texts, drawn, strict=True))
    return [Example(f"free-{n}", text, history=before) for n, (text, before) in told]


@dataclass(frozen=True)
class Calibrate:
    """The model's leaning, measured and subtracted: over `prompts` unlabelled train prompts (`batch`), over inputs
    without content (`contextual`), or over random words of the domain (`domain`, 20 of them at most); or `fitted` to
    the labels of as many train rows, which also tells how frequent each label is.
    """

    name: ClassVar[str] = "calibrate"
    family: ClassVar[str] = "few-/zero-shot"
    needs: ClassVar[tuple[Need, ...]] = ("labels", "examples")
    writes: ClassVar[tuple[str, ...]] = ("decoding",)
    invalidates: ClassVar[tuple[str, ...]] = ()

    kind: str = "batch"
    prompts: int = 128

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is none of {', '.join(KINDS)}")
        if self.prompts < 2:
            raise ValueError(f"prompts is {self.prompts}; at least 2")

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying; more prompts only make the prior steadier."""
        return {"kind": KINDS}

    def asks(self, rows: int) -> int:
        """How many prompts the model is asked at most, where train has so many rows."""
        few = {"contextual": 3, "domain": min(self.prompts, 20)}
        return few.get(self.kind, min(self.prompts, rows))

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with a prior; only the prompts of train are looked at, and by `fitted` alone their labels."""
        from whet.variants import unseen

        # Prompts that are shown as demonstrations would see their own answer.
        labelled, labels = self.kind == "fitted", system.decoding.labels
        rows, _ = unseen(system, [e for e in data.train if not e.choices and e.text is None])
        rows = [e for e in rows if not labelled or e.completion in labels]
        sample = random.Random(run.seed).sample(rows, min(self.prompts, len(rows)))
        if not sample:
            raise MethodError(
                "nothing to calibrate on", expected="train prompts that are not shown as demonstrations", found="none",
                do="show fewer",
            )  # fmt: skip
        if self.kind in ("contextual", "domain"):
            sample = free_inputs(self.kind, rows, min(self.prompts, 20), run.seed)
        # Each is hidden from itself alone: without the others' nearest rows, another prompt would be calibrated.
        session, plain = run.session(system.model), system.uncalibrated
        scores, _ = plain.label_scores(sample, session, run.progress("calibrating"), blind=True)
        right = [labels.index(e.completion) for e in sample] if labelled else []
        prior = fitted_prior(scores, right) if labelled else batch_prior(scores)
        return replace(system, decoding=replace(system.decoding, prior=prior))
