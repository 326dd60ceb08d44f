"""Statistics against closed formulas, scipy, brute force and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from whet.metrics import Outcome, get
from whet.stats import alike, bootstrap_interval, compare, holm, not_worse, wilson

ACCURACY, F1, BLEU, PPL = get("accuracy"), get("token_f1"), get("bleu"), get("perplexity")


def scored(values, groups=None, weights=None):
    groups, weights = groups or [None] * len(values), weights or [1.0] * len(values)
    return [Outcome(str(i), "", float(v), "", group=g, weight=w)
            for i, (v, g, w) in enumerate(zip(values, groups, weights, strict=True))]


def labelled(answers, references):
    return [Outcome(str(i), a, float(a == r), r) for i, (a, r) in enumerate(zip(answers, references, strict=True))]


# -- shares and several tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, n, low, high", [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718),
    (20, 20, 0.8389, 1),
])  # fmt: skip
def test_wilson_by_newcombe_1998(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_its_edges():
    assert wilson(0, 0) == (0, 1)
    for k, n in [(3, 2), (1, 0), (-1, 2)]:
        with pytest.raises(ValueError):
            wilson(k, n)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([]) == () and holm([0.9, 0.8]) == (1, 1)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_only_raises(p):
    adjusted = holm(p)
    assert all(raw <= new <= 1 for raw, new in zip(p, adjusted, strict=True))
    ranked = [adjusted[i] for i in sorted(range(len(p)), key=lambda i: p[i])]
    assert ranked == sorted(ranked)


# -- intervals ----------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_agrees_with_scipy():
    values = np.random.default_rng(1).beta(2, 1, 200)
    rival = scipy_stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, random_state=0)
    ours = bootstrap_interval(scored(values), F1, draws=10_000)
    assert ours == pytest.approx(tuple(rival.confidence_interval), abs=4e-3)


@pytest.mark.parametrize("metric", [get("macro_f1"), BLEU, get("chrf"), PPL], ids=lambda m: m.name)
def test_other_figures_are_recomputed_on_every_draw(metric):
    draw, n, draws = np.random.default_rng(3), 25, 60
    words = ["red fox ran over the hill", "a red fox", "blue whale ran over the moon today"]
    rows = [Outcome(str(i), words[a], float(v), words[r], weight=float(w)) for i, (a, r, v, w) in enumerate(zip(
        draw.integers(0, 3, n), draw.integers(0, 3, n), draw.random(n), draw.integers(1, 9, n), strict=True))]
    drawn = np.random.default_rng([7, 0]).integers(0, n, (draws, n))
    expected = np.percentile([metric.aggregate([rows[i] for i in d]) for d in drawn], [2.5, 97.5])
    assert bootstrap_interval(rows, metric, seed=7, draws=draws) == pytest.approx(tuple(expected))


def test_the_interval_covers_as_often_as_it_says():
    draw = np.random.default_rng(11)
    hits = [low <= 0.7 <= high for low, high in (
        bootstrap_interval(scored(draw.random(120) < 0.7), ACCURACY, seed=i, draws=800) for i in range(500))]
    assert 0.92 <= np.mean(hits) <= 0.98


def test_rows_of_a_group_are_drawn_together():
    draw = np.random.default_rng(5)
    groups = [f"g{i // 6}" for i in range(240)]
    hits, naive = [], []
    for i in range(300):
        values = np.repeat(draw.random(40) < 0.6, 6)
        low, high = bootstrap_interval(scored(values, groups), ACCURACY, seed=i, draws=600)
        hits.append(low <= 0.6 <= high)
        low, high = bootstrap_interval(scored(values), ACCURACY, seed=i, draws=600)
        naive.append(low <= 0.6 <= high)
    assert 0.90 <= np.mean(hits) <= 0.98 and np.mean(naive) < 0.75


def test_an_interval_is_never_a_point_for_want_of_spread():
    assert bootstrap_interval(scored([1] * 20), ACCURACY) == pytest.approx(wilson(20, 20))
    assert bootstrap_interval(scored([0] * 20, ["a", "b"] * 10), ACCURACY) == pytest.approx(wilson(0, 2))


def test_a_single_group_says_nothing_of_others():
    group = ["g"] * 4
    a, b = scored([1, 0, 0, 1], group), scored([1, 1, 0, 1], group)
    assert bootstrap_interval(a, ACCURACY) == bootstrap_interval(scored([0.3]), F1) == (0, 1)
    result, kept = compare(a, b, ACCURACY), not_worse(a, b, ACCURACY, 0.0)
    assert (result.low, result.difference, result.high) == (-1, 0.25, 1)
    assert result.p_value == result.smallest_detectable == kept.bound == 1 and kept.ok
    assert not not_worse(b, a, ACCURACY, 0.0).ok
    # What knows no bounds goes as far as its rows.
    a, b = scored([1.0, 2.0], group[:2]), scored([1.0, 3.0], group[:2])
    assert bootstrap_interval(a, PPL) == pytest.approx((math.exp(1), math.exp(2)))
    result = compare(a, b, PPL)
    assert (result.low, result.high) == pytest.approx((math.exp(1) - math.exp(3), math.exp(2) - math.exp(1)))
    assert result.smallest_detectable == -result.low and not_worse(b, a, PPL, 0.0).ok


def test_a_difference_that_all_rows_share_has_an_interval():
    """With p = 1 - 0.025^(1/n) of the rows at -1 or at 1: 0.26465 for n = 12, 0.84189 for n = 2."""
    result = compare(scored([0] * 12), scored([1] * 12), ACCURACY)
    assert (result.low, result.difference, result.high) == pytest.approx((1 - 2 * 0.264649, 1, 1), abs=1e-5)
    result = compare(scored([0.5] * 12), scored([0.25] * 12), F1)
    assert (result.low, result.high) == pytest.approx((-0.25 - 0.264649 * 0.75, -0.25 + 0.264649 * 1.25), abs=1e-5)
    result = compare(scored([0] * 4, [*"aabb"]), scored([1] * 4, [*"aabb"]), ACCURACY)
    assert (result.low, result.high) == pytest.approx((1 - 2 * 0.841886, 1), abs=1e-5)
    same = compare(scored([1, 0] * 6), scored([1, 0] * 6), ACCURACY)
    assert (same.low, same.high) == (0, 0)
    beyond = compare(scored([2] * 12), scored([3] * 12), F1)  # of what knows no bounds nothing can be said
    assert (beyond.low, beyond.high) == (1, 1)


def test_an_interval_needs_outcomes():
    with pytest.raises(ValueError):
        bootstrap_interval([], ACCURACY)


SCORES = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=12)


@given(SCORES, st.integers(0, 9))
@settings(max_examples=50)
def test_an_interval_is_ordered_within_0_and_1_and_repeatable(values, seed):
    low, high = bootstrap_interval(scored(values), F1, seed=seed, draws=100)
    assert 0 <= low <= high <= 1
    assert (low, high) == bootstrap_interval(scored(values), F1, seed=seed, draws=100)


# -- paired comparisons -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost, won", [(0, 0), (0, 5), (2, 9), (7, 7), (10, 30)])
def test_mcnemar_is_the_exact_binomial_test(lost, won):
    a, b = [1] * lost + [0] * won + [1] * 20, [0] * lost + [1] * won + [1] * 20
    result = compare(scored(a), scored(b), ACCURACY)
    expected = scipy_stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert result.test == "mcnemar" and result.p_value == pytest.approx(expected)
    assert result.difference == pytest.approx((won - lost) / len(a)) and result.n == len(a)


def rival_permutation(a, b, statistic):
    return scipy_stats.permutation_test((a, b), statistic, permutation_type="samples", n_resamples=np.inf).pvalue


def mean_difference(x, y, axis):
    return (y - x).mean(axis=axis)


def test_few_differences_are_enumerated_as_scipy_does():
    draw = np.random.default_rng(2)
    a = draw.random(10)
    b = a + draw.normal(0.1, 0.2, 10)
    result = compare(scored(a), scored(b), F1)
    assert result.test == "permutation"
    assert result.p_value == pytest.approx(rival_permutation(a, b, mean_difference), abs=1e-9)


def test_many_differences_are_drawn():
    draw = np.random.default_rng(4)
    a = draw.random(60)
    b = a + draw.normal(0.03, 0.1, 60)
    expected = scipy_stats.permutation_test((a, b), mean_difference, permutation_type="samples", n_resamples=50_000,
                                            random_state=0).pvalue
    assert compare(scored(a), scored(b), F1).p_value == pytest.approx(expected, abs=0.01)


def test_groups_are_swapped_whole():
    groups = [f"g{i // 4}" for i in range(24)]
    a, b = np.zeros(24), np.repeat([1, 1, 1, 1, 1, 0], 4)
    result = compare(scored(a, groups), scored(b, groups), ACCURACY)
    assert result.test == "permutation" and result.p_value == pytest.approx(2 / 2**5)
    assert compare(scored(a), scored(b), ACCURACY).p_value < 1e-4
    assert result.high - result.low > compare(scored(a), scored(b), ACCURACY).high - 0.7


def test_figures_that_are_no_means_are_permuted_by_swapping_answers():
    from itertools import product

    metric, wanted = get("macro_f1"), list("aabbccab")
    a, b = labelled("abbbcaac", wanted), labelled("aabbccbb", wanted)
    differ = [i for i in range(8) if a[i].answer != b[i].answer]
    observed = metric.aggregate(b) - metric.aggregate(a)
    values = []
    for swaps in product([0, 1], repeat=len(differ)):
        x, y = list(a), list(b)
        for i in (i for i, s in zip(differ, swaps, strict=True) if s):
            x[i], y[i] = y[i], x[i]
        values.append(metric.aggregate(y) - metric.aggregate(x))
    result = compare(a, b, metric)
    assert result.difference == pytest.approx(observed)
    assert result.p_value == pytest.approx(np.mean([abs(v) >= abs(observed) - 1e-9 for v in values]))


def test_several_runs_alike_is_cochrans_q():
    """The permutation's p-value against the closed form of Cochran's Q (1950), for large n."""
    table = (np.random.default_rng(0).random((200, 3)) < [0.5, 0.55, 0.62]).astype(float)
    k, columns, rows = 3, table.sum(axis=0), table.sum(axis=1)
    q = (k - 1) * (k * (columns**2).sum() - columns.sum() ** 2) / (k * rows.sum() - (rows**2).sum())
    found = alike([scored(column) for column in table.T], ACCURACY)
    assert found == pytest.approx(scipy_stats.chi2.sf(q, k - 1), abs=0.02)
    whole = alike([scored(np.repeat(column, 3), groups=[f"g{n // 3}" for n in range(600)]) for column in table.T], F1)
    assert whole == pytest.approx(found, abs=0.02)  # a group of copies tells no more than one of them
    with pytest.raises(ValueError, match="ids differ"):
        alike([scored([1, 0]), scored([1])], ACCURACY)


def test_several_runs_are_told_apart_by_the_metrics_own_figure():
    """Of imbalanced labels two runs may be right equally often, and one of them never on the rare label."""
    wanted = ["rare" if n % 8 == 0 else "often" for n in range(64)]
    never = ["often"] * 64
    balanced = ["rare" if n % 8 == 0 or n % 8 == 1 else "often" for n in range(64)]
    runs = [labelled(said, wanted) for said in (never, balanced)]
    assert sum(o.score for o in runs[0]) == sum(o.score for o in runs[1]) == 56
    assert alike(runs, ACCURACY) == 1 and alike(runs, get("macro_f1")) < 0.05


def test_bleu_is_compared_as_a_corpus():
    wanted = ["the red fox ran over the hill", "a blue whale swam in the sea", "one two three four five six"] * 6
    a = [Outcome(str(i), w.replace("the", "a"), 0, w) for i, w in enumerate(wanted)]
    b = [Outcome(str(i), w, 1, w) for i, w in enumerate(wanted)]
    result = compare(a, b, BLEU, draws=500)
    assert result.difference == pytest.approx(1 - BLEU.aggregate(a)) and result.p_value < 0.01
    assert 0 < result.low <= result.difference <= result.high


def test_positive_means_better_where_lower_is_better():
    draw = np.random.default_rng(0)
    worse, tokens = draw.normal(3, 0.3, 50), draw.integers(5, 50, 50).tolist()
    a, b = scored(worse, weights=tokens), scored(worse - 0.2, weights=tokens)
    result = compare(a, b, PPL)
    assert result.difference == pytest.approx(PPL.aggregate(a) - PPL.aggregate(b)) and result.low > 0
    assert result.p_value < 0.001


def test_the_interval_of_a_difference_agrees_with_scipy():
    draw = np.random.default_rng(6)
    a, b = draw.random(150), draw.random(150)
    rival = scipy_stats.bootstrap((b - a,), np.mean, method="percentile", n_resamples=9999, random_state=0)
    result = compare(scored(a), scored(b), F1)
    assert (result.low, result.high) == pytest.approx(tuple(rival.confidence_interval), abs=6e-3)


@pytest.mark.parametrize("metric, discrete", [(ACCURACY, True), (F1, False)], ids=["mcnemar", "permutation"])
def test_under_the_null_one_in_twenty_is_significant(metric, discrete):
    draw = np.random.default_rng(9)
    rejected = []
    for i in range(400):
        a, b = draw.random(50), draw.random(50)
        if discrete:
            a, b = a < 0.5, b < 0.5
        rejected.append(compare(scored(a), scored(b), metric, seed=i, draws=400).p_value < 0.05)
    assert (0.0 if discrete else 0.025) <= np.mean(rejected) <= (0.055 if discrete else 0.08)


def test_a_real_difference_of_the_detectable_size_is_found_about_four_times_in_five():
    draw = np.random.default_rng(10)
    noise = scipy_stats.zscore(draw.normal(size=100), ddof=1) * 0.2
    size = compare(scored(np.zeros(100)), scored(noise), F1, draws=50).smallest_detectable
    assert size == pytest.approx(2.8 * 0.2 / 10)
    found = []
    for i in range(200):
        b = draw.normal(size, 0.2, 100)
        found.append(compare(scored(np.zeros(100)), scored(b), F1, seed=i, draws=400).p_value < 0.05)
    assert 0.7 <= np.mean(found) <= 0.9


def test_the_smallest_detectable_difference_by_its_formula():
    draw = np.random.default_rng(8)
    a, b = draw.random(80), draw.random(80)
    expected = 2.8 * (b - a).std(ddof=1) / math.sqrt(80)
    assert compare(scored(a), scored(b), F1, draws=50).smallest_detectable == pytest.approx(expected)
    doubled = [np.repeat(x, 2) for x in (a, b)]
    grouped = [scored(x, [str(i // 2) for i in range(160)]) for x in doubled]
    assert compare(*grouped, F1, draws=50).smallest_detectable == pytest.approx(expected)  # copies add nothing
    assert compare(scored(a), scored(a), F1, draws=50).smallest_detectable == pytest.approx(3 / 80)  # rule of three
    assert compare(scored([1]), scored([0]), F1, draws=50).smallest_detectable == 1


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2, st.sampled_from(["a", "b", None])), min_size=1,
                max_size=15))
@settings(max_examples=60, deadline=None)
def test_swapping_the_two_runs_flips_the_comparison(rows):
    x, y, groups = map(list, zip(*rows, strict=True))
    a, b = scored(x, groups), scored(y, groups)
    there, back = compare(a, b, F1, draws=100), compare(b, a, F1, draws=100)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.p_value == pytest.approx(back.p_value) and 0 < there.p_value <= 1
    assert -1 <= there.low <= there.high <= 1
    assert there.smallest_detectable == pytest.approx(back.smallest_detectable) and there.smallest_detectable > 0
    assert there == compare(a, b, F1, draws=100)


@pytest.mark.parametrize("other", [["1", "0"], ["0"], ["0", "2"]])
def test_only_the_same_examples_are_compared(other):
    a = scored([1, 0])
    b = [Outcome(i, "", 1.0, "") for i in other]
    with pytest.raises(ValueError, match="same examples"):
        compare(a, b, ACCURACY)
    with pytest.raises(ValueError):
        compare([], [], ACCURACY)


def test_memory_is_bounded_by_drawing_in_parts(monkeypatch):
    draw = np.random.default_rng(0)
    a, b = scored(draw.random(30)), scored(draw.random(30))
    whole = compare(a, b, F1, draws=500)
    monkeypatch.setattr("whet.stats.CELLS", 1000)
    parts = compare(a, b, F1, draws=500)
    assert parts.difference == whole.difference
    assert parts.smallest_detectable == pytest.approx(whole.smallest_detectable)
    assert (parts.low, parts.high, parts.p_value) == pytest.approx((whole.low, whole.high, whole.p_value))


# -- not worse ----------------------------------------------------------------------------------------------------


def test_not_worse_needs_both_the_loss_and_its_bound():
    a = [1] * 500
    same = not_worse(scored(a), scored(a), ACCURACY, 0.01)
    assert same.ok and same.loss == 0 and same.allowed == pytest.approx(0.01 + 3 / 500)
    little = not_worse(scored(a), scored([1] * 496 + [0] * 4), ACCURACY, 0.01)
    assert little.ok and little.loss == pytest.approx(0.008) and little.loss <= little.bound <= little.allowed
    much = not_worse(scored(a), scored([1] * 490 + [0] * 10), ACCURACY, 0.01)
    assert not much.ok and much.loss == pytest.approx(0.02) and much.margin == 0.01


def test_a_loss_of_exactly_the_margin_is_within_it():
    assert not_worse(scored([1] * 100), scored([1] * 99 + [0]), ACCURACY, 0.01).ok


def test_not_worse_bound_is_one_sided():
    draw = np.random.default_rng(12)
    a, b = draw.random(300), draw.random(300)
    d = a - b
    expected = d.mean() + 1.645 * d.std(ddof=1) / math.sqrt(300)
    assert not_worse(scored(a), scored(b), F1, 0.02).bound == pytest.approx(expected, abs=4e-3)


def test_not_worse_knows_the_direction():
    better = not_worse(scored([2.0, 2.1, 1.9]), scored([1.0, 1.1, 0.9]), PPL, 0.0)
    assert better.ok and better.loss < 0
    assert not not_worse(scored([1.0, 1.1, 0.9]), scored([2.0, 2.1, 1.9]), PPL, 0.0).ok
    with pytest.raises(ValueError):
        not_worse(scored([1]), scored([1]), ACCURACY, -0.1)
