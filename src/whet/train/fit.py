"""What the curves of a training say: how well it fitted, and what twice the data would bring."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from whet.train.loop import Curves

LEAST_POINTS = 12  # steps of the first epoch without which no curve is fitted
RESAMPLED = 40
LEARNT = 0.05  # nats per target, below which there is nothing left to learn


@dataclass(frozen=True)
class Fit:
    """A verdict and the figures it rests on, in nats per target."""

    verdict: str  # diverged | overfitting | underfitting | well fitted | too short to tell
    best: float | None = None
    last: float | None = None
    train_before: float | None = None  # mean over the last but one quarter of the steps
    train_after: float | None = None  # mean over the last quarter


def verdict(curves: Curves) -> Fit:
    """How a training fitted, drawn from the two curves.

    Diverged: both ended above where they began, validation by at least 5 %. Overfitting: validation rose at least 5 %
    above its best while training still fell. Underfitting: over the last quarter of the tokens both curves still fell,
    validation by at least 5 %, and the last validation is the best, and above `LEARNT`.
    """
    checks, train = curves.validation, curves.train
    if len(checks) < 3 or len(train) < 4:
        return Fit("too short to tell")
    best, last = min(loss for _, loss in checks), checks[-1][1]
    quarter = max(1, len(train) // 4)
    before = sum(loss for _, loss in train[-2 * quarter : -quarter]) / quarter
    after = sum(loss for _, loss in train[-quarter:]) / quarter
    start = sum(loss for _, loss in train[:quarter]) / quarter
    found = "well fitted"
    if last > 1.05 * checks[0][1] and after > start:
        found = "diverged"
    elif last > 1.05 * best and after < before:
        found = "overfitting"
    elif last == best > LEARNT and last < 0.95 * checks[-2][1] and after < 0.95 * before:
        found = "underfitting"
    return Fit(found, best, last, before, after)


@dataclass(frozen=True)
class Doubling:
    """The loss per target at the rows seen, and what twice as many would bring, with a 95 % interval."""

    rows: int
    now: float
    twice: float
    low: float
    high: float


def twice_the_data(losses: list[float], batch: int, seed: int = 0) -> Doubling | None:
    """Extrapolate the losses of the first epoch's steps: rows are new then, so that each loss is one on unseen data.

    A power law a·n^-b + c is fitted to them (Hestness et al. 2017; prequential evaluation, Dawid 1984), the interval
    by the bootstrap over its residuals. None where there are too few steps or no such curve fits.
    """
    import numpy as np
    from scipy.optimize import OptimizeWarning, curve_fit

    skipped = max(2, len(losses) // 8)  # the first steps learn what answers look like
    values = np.array(losses[skipped:])
    if len(values) < LEAST_POINTS:
        return None
    rows = batch * (np.arange(skipped, len(losses)) + 0.5)

    def law(n: object, a: float, b: float, c: float) -> object:
        return a * np.power(np.asarray(n) / batch, -b) + c

    def fitted(y: object) -> tuple[float, float, object]:
        start = (max(float(np.ptp(values)), 1e-3), 0.5, max(float(values.min()), 1e-3))
        found, _ = curve_fit(law, rows, y, p0=start, bounds=((0, 0.05, 0), (np.inf, 2.0, np.inf)), maxfev=2000)
        seen = batch * len(losses)
        return float(law(seen, *found)), float(law(2 * seen, *found)), law(rows, *found)  # type: ignore[arg-type]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)
            now, twice, line = fitted(values)
            draw = np.random.default_rng(seed)
            again = [fitted(line + draw.choice(values - line, len(values)))[1] for _ in range(RESAMPLED)]
    except (RuntimeError, ValueError):
        return None
    low, high = np.quantile(again, [0.025, 0.975])
    return Doubling(batch * len(losses), now, twice, float(low), float(high))
