"""Statistics of a comparison: intervals, paired tests, and what a number of examples can show at all.

All of it rests on `Metric.statistics` and `finish`: rows per example are added up within groups (rows of one group
are not independent), and resampling is a product of a matrix of counts with these sums. Every result is a pure
function of the outcomes and the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.metrics import Mean, Metric, Outcome, floored

Array = NDArray[np.float64]

POWER = 1.96 + 0.84  # two-sided 5 % and a power of 80 %, in standard errors
EXACT = 12  # up to so many clusters that differ, all 2^12 sign flips are enumerated
CELLS = 4_000_000  # numbers held at a time while resampling (32 MB)


@dataclass(frozen=True)
class Paired:
    """B against A on the same `n` examples: positive means that B is better, whatever the metric's direction.

    `low`..`high` is the 95 % interval of the difference, `test` is "mcnemar" or "permutation", and
    `smallest_detectable` the smallest true difference that these examples show with 80 % power at 5 %, two-sided.
    """

    n: int
    difference: float
    low: float
    high: float
    p_value: float
    test: str
    smallest_detectable: float


@dataclass(frozen=True)
class NotWorse:
    """Is B not worse than A? `loss` is A minus B (positive: worse), `bound` its one-sided 95 % upper bound.

    `ok` if loss <= margin and bound <= allowed, where allowed is margin plus the smallest detectable difference.
    """

    loss: float
    bound: float
    allowed: float
    ok: bool
    margin: float


def bootstrap_interval(
    outcomes: Sequence[Outcome], metric: Metric, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """95 % percentile interval of the metric's figure (Efron, 1979), drawing whole groups where there are groups.

    Where all scores are 0 or all are 1 the bootstrap sees no spread: a mean then gets Wilson's interval over the
    groups. A single group says nothing of others: see `_extent`. Raises ValueError for no outcomes.
    """
    if not outcomes:
        raise ValueError("no outcomes to draw from")
    of = _clusters(outcomes)
    clusters = int(of.max()) + 1
    scores = {o.score for o in outcomes}
    if isinstance(metric, Mean) and scores in ({0.0}, {1.0}):
        return wilson(clusters * int(scores.pop()), clusters)
    table = metric.statistics(outcomes)
    if clusters == 1:
        return _extent(metric.finish(_dense(table)))
    sums = _sums(table, of)
    values = _resampled(clusters, draws, seed, lambda counts: metric.finish(counts @ sums), sums.shape[1])
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def compare(
    a: Sequence[Outcome], b: Sequence[Outcome], metric: Metric, seed: int = 0, draws: int = 10_000
) -> Paired:
    """Paired comparison of two runs over the same examples in the same order: B minus A, signed so that + is better.

    Interval: paired percentile bootstrap over groups; of a single one, all that the difference may be (see `_extent`);
    where all differences are the same, and not 0, see `_unvaried`.
    Test: exact McNemar for scores of 0 and 1 without groups, else a permutation that swaps A and B within groups, on
    the metric's own figure. What could not be scored is no better than the worst. Raises ValueError if the ids differ.
    """
    a, b = floored(metric, a, b)
    pair = _Pair.of(a, b, metric)
    difference = pair.difference()
    low, high = _unvaried(a, b, metric, pair.clusters) or pair.percentiles(seed, draws, 2.5, 97.5)
    if isinstance(metric, Mean) and pair.clusters == len(a) and all(o.score in (0, 1) for o in (*a, *b)):
        test, p_value = "mcnemar", _mcnemar(a, b)
    else:
        test, p_value = "permutation", pair.permutation(seed, draws)
    return Paired(len(a), difference, low, high, p_value, test, pair.smallest_detectable())


def not_worse(
    a: Sequence[Outcome], b: Sequence[Outcome], metric: Metric, margin: float, seed: int = 0, draws: int = 10_000
) -> NotWorse:
    """Test that B loses no more than `margin` (in the metric's units) against A; see NotWorse for the rule.

    Raises ValueError if the ids differ or the margin is negative.
    """
    if margin < 0:
        raise ValueError(f"a margin is at least 0, not {margin}")
    a, b = floored(metric, a, b)
    pair = _Pair.of(a, b, metric)
    loss = -pair.difference()
    bound = -pair.percentiles(seed, draws, 5)[0]
    allowed = margin + pair.smallest_detectable()
    slack = 1e-12  # a loss of exactly the margin is within it, whatever the rounding
    return NotWorse(loss, bound, allowed, loss <= margin + slack and bound <= allowed + slack, margin)


def alike(
    runs: Sequence[Sequence[Outcome]], metric: Metric, seed: int = 0, draws: int = 2000
) -> float:
    """P-value of several runs over the same examples scoring alike: the variance of their figures when they change
    places within examples (or groups), on the metric's own figure, with +1 correction.

    For scores of 0 and 1 it is Cochran's Q test (1950) by permutation. Raises ValueError if the ids differ.
    """
    count, first = len(runs[0]), [o.id for o in runs[0]]
    if any([o.id for o in run] != first for run in runs):
        raise ValueError("runs are compared on the same examples in the same order; their ids differ")
    table, of = metric.statistics([o for run in runs for o in run]), _clusters(runs[0])
    sums = [_dense(_sums(table[n * count : (n + 1) * count], of)) for n in range(len(runs))]
    cells = np.stack(sums, axis=1)  # (clusters, runs, s)
    random, rows = np.random.default_rng([seed, 2]), np.arange(len(cells))[:, None]
    places = np.tile(np.arange(len(runs)), (len(cells), 1))
    observed, beyond = float(np.var(metric.finish(cells.sum(axis=0)))), 0
    for _ in range(draws):
        moved = cells[rows, random.permuted(places, axis=1)]
        beyond += bool(np.var(metric.finish(moved.sum(axis=0))) >= observed - 1e-12)
    return (beyond + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P-values adjusted for their number, in the order given (Holm, 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return tuple(adjusted.tolist())


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927); (0, 1) for n = 0. Raises ValueError unless 0 <= successes <= n."""
    from scipy.stats import binomtest

    if successes == n == 0:
        return 0.0, 1.0
    low, high = binomtest(successes, n).proportion_ci(method="wilson")
    return float(low), float(high)


# -- resampling --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """Two runs as sums per cluster, shape (clusters, s) each, with the figure made of them.

    `extent` is all that the difference may be, from and to, where there is a single cluster; else it is empty.
    """

    a: Any
    b: Any
    finish: Callable[[Any], Any]
    sign: int
    extent: tuple[float, ...]

    @staticmethod
    def of(a: Sequence[Outcome], b: Sequence[Outcome], metric: Metric) -> _Pair:
        if not a:
            raise ValueError("no outcomes to compare")
        if [o.id for o in a] != [o.id for o in b]:
            raise ValueError("a paired comparison takes the same examples in the same order; their ids differ")
        table = metric.statistics([*a, *b])  # one call, so that both runs have the same columns
        of, sign = _clusters(a), 1 if metric.higher_is_better else -1
        parts, extent = (table[: len(a)], table[len(a) :]), tuple[float, ...]()
        if not of.any():
            (least_a, most_a), (least_b, most_b) = (_extent(metric.finish(_dense(part))) for part in parts)
            extent = tuple(sorted((sign * (least_b - most_a), sign * (most_b - least_a))))
        return _Pair(_sums(parts[0], of), _sums(parts[1], of), metric.finish, sign, extent)

    @property
    def clusters(self) -> int:
        return int(self.a.shape[0])

    def value(self, counts: Array) -> Array:
        """The difference when cluster i counts counts[..., i] times."""
        return np.asarray(self.sign * (self.finish(counts @ self.b) - self.finish(counts @ self.a)))

    def difference(self) -> float:
        return float(self.value(np.ones(self.clusters)))

    def percentiles(self, seed: int, draws: int, *at: float) -> list[float]:
        """Percentiles of the difference under the bootstrap; of a single cluster the ends of what it may be."""
        if self.extent:
            return [self.extent[percent > 50] for percent in at]
        drawn = _resampled(self.clusters, draws, seed, self.value, self.a.shape[1])
        return [float(value) for value in np.percentile(drawn, at)]

    def permutation(self, seed: int, draws: int) -> float:
        """Two-sided p-value of swapping A and B cluster by cluster, with +1 correction (Phipson & Smyth, 2010)."""
        gap = self.b - self.a
        gap = gap[np.flatnonzero(np.asarray(abs(gap).sum(axis=1)).ravel() > 0)]
        differing = int(gap.shape[0])
        exact = differing <= EXACT
        every = np.ones(self.clusters)
        total_a, total_b = every @ self.a, every @ self.b
        observed = abs(self.difference())
        extreme = seen = 0
        for swaps in _all_swaps(differing) if exact else _random_swaps(differing, self.a.shape[1], seed, draws):
            moved = swaps @ gap
            values = np.abs(self.finish(total_b - moved) - self.finish(total_a + moved))
            extreme += int((values >= observed - 1e-12 * max(1.0, observed)).sum())
            seen += len(values)
        return extreme / seen if exact else (extreme + 1) / (seen + 1)

    def smallest_detectable(self) -> float:
        """2.8 standard errors of the difference, and never below 3 in n (the rule of three), for none differing.

        The standard error is the jackknife's over clusters (Tukey, 1958): for a mean without groups it is
        sd(d)/sqrt(n) exactly, and it holds for grouped examples and for other figures too.
        """
        c = self.clusters
        floor = min(1.0, 3 / c)
        if self.extent:
            return max(floor, *map(abs, self.extent))
        every = np.ones(c)
        total_a, total_b = every @ self.a, every @ self.b
        values = np.concatenate([
            self.finish(total_b - _dense(self.b[rows])) - self.finish(total_a - _dense(self.a[rows]))
            for rows in _chunks(c, self.a.shape[1])])
        error = math.sqrt((c - 1) / c * float(((values - values.mean()) ** 2).sum()))
        return max(POWER * error, floor)


def _extent(figures: Array) -> tuple[float, float]:
    """All that a figure may be of which a single cluster is known, by the figures of its rows.

    That is 0 to 1 where these are within it. Other figures know no bounds: there it is as far as the rows' own go.
    """
    low, high = float(figures.min()), float(figures.max())
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def _unvaried(a: Sequence[Outcome], b: Sequence[Outcome], metric: Metric, clusters: int) -> tuple[float, float] | None:
    """95 % interval of a mean's difference where all scores lie in 0..1 and all rows differ by the same, not by 0: the
    bootstrap would see no spread. None elsewhere, and of a single cluster.

    Rows that differ otherwise, by -1 or 1 at most, may be as many as none of so many clusters allows (Clopper &
    Pearson, 1934).
    """
    sign = 1 if metric.higher_is_better else -1
    gaps = [sign * (y.score - x.score) for x, y in zip(a, b, strict=True)]
    gap, spread = gaps[0], max(gaps) - min(gaps)
    if not isinstance(metric, Mean) or clusters == 1 or spread > 1e-12 or abs(gap) <= 1e-12:
        return None
    if any(not 0 <= o.score <= 1 for o in (*a, *b)):
        return None
    share = 1 - 0.025 ** (1 / clusters)
    return max(-1.0, gap - share * (gap + 1)), min(1.0, gap + share * (1 - gap))


def _clusters(outcomes: Sequence[Outcome]) -> NDArray[np.int64]:
    """The number of each outcome's cluster: its group, or itself where it has none."""
    seen: dict[tuple[bool, str | int], int] = {}
    keys = ((True, o.group) if o.group is not None else (False, i) for i, o in enumerate(outcomes))
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def _sums(table: Any, of: NDArray[np.int64]) -> Any:
    """Rows of a table (dense or sparse) added up by cluster."""
    from scipy.sparse import csr_array

    clusters, n = int(of.max()) + 1, len(of)
    return table if clusters == n else csr_array((np.ones(n), (of, np.arange(n))), shape=(clusters, n)) @ table


def _dense(rows: Any) -> Any:
    return rows if isinstance(rows, np.ndarray) else rows.toarray()


def _chunks(total: int, width: int) -> Iterator[slice]:
    """Slices of range(total), such that a slice of that width holds at most CELLS numbers."""
    step = max(1, CELLS // max(width, 1))
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def _resampled(clusters: int, draws: int, seed: int, value: Callable[[Array], Any], columns: int) -> Array:
    """The value under `draws` bootstrap draws of the clusters, as an array of that length."""
    random = np.random.default_rng([seed, 0])
    parts = []
    for part in _chunks(draws, max(clusters, columns)):
        rows = part.stop - part.start
        drawn = random.integers(0, clusters, (rows, clusters)) + np.arange(rows)[:, None] * clusters
        counts = np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters)
        parts.append(np.asarray(value(counts.astype(float)), dtype=float))
    return np.concatenate(parts)


def _all_swaps(differing: int) -> Iterator[Array]:
    """All 2^differing choices of clusters to swap, as one matrix of 0 and 1."""
    yield ((np.arange(2**differing)[:, None] >> np.arange(differing)) & 1).astype(float)


def _random_swaps(differing: int, columns: int, seed: int, draws: int) -> Iterator[Array]:
    random = np.random.default_rng([seed, 1])
    for part in _chunks(draws, max(differing, columns)):
        yield random.integers(0, 2, (part.stop - part.start, differing)).astype(float)


def _mcnemar(a: Sequence[Outcome], b: Sequence[Outcome]) -> float:
    """Exact McNemar test (1947): a binomial test of the pairs in which one run alone is right."""
    from scipy.stats import binomtest

    lost = sum(x.score > y.score for x, y in zip(a, b, strict=True))
    won = sum(x.score < y.score for x, y in zip(a, b, strict=True))
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
