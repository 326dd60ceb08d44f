"""Metrics against hand-computed numbers, scikit-learn, sacrebleu and rouge-score."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet import metrics, stats
from whet.errors import TaskError
from whet.metrics import Mean, Outcome, comparable, get, plain, score_all, sound, squad
from whet.numeric import number
from whet.stats import compare
from whet.task import Example

PER_ANSWER = ("accuracy", "macro_f1", "exact_match", "token_f1", "contains", "rouge_l", "bleu", "chrf")
METRICS = {name: get(name) for name in PER_ANSWER}


def example(*answers: str, **more) -> Example:
    return Example(id=more.pop("id", "x"), prompt="?", completion=answers[0], answers=answers, **more)


def outcomes(metric, answers, references):
    rows = [example(*((r,) if isinstance(r, str) else r), id=str(i)) for i, r in enumerate(references)]
    return score_all(metric, answers, rows)


# -- finding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PER_ANSWER, "perplexity", "win_rate", "recall@5", "ndcg@10", "recall@100",
                                  "mrr@10", "pearson", "spearman"])  # fmt: skip
def test_every_documented_name_is_found_by_the_entry_points(name):
    metric = get(name)
    assert metric.name == name
    assert metric.higher_is_better == (name != "perplexity")
    assert metrics.in_points(name) == metric.points == (name not in ("perplexity", "pearson", "spearman"))


@pytest.mark.parametrize("name", ["metrics.py:accuracy", "accuracy.py:f", "gone", "", "score"])
def test_what_may_be_any_number_is_not_read_in_points(name):
    assert not metrics.in_points(name)


def test_a_plugin_says_whether_it_is_read_in_points(monkeypatch):
    def door(load):
        monkeypatch.setattr("importlib.metadata.entry_points", lambda **asked: [SimpleNamespace(load=load)])

    class Own(metrics.Share):
        name = "own"

    try:
        for n, (made, points) in enumerate(((Own, True), (metrics.Mean, False), (object, False))):
            door(lambda made=made: made)
            assert metrics.in_points(f"own{n}") is points
        door(lambda: 1 / 0)  # one that no longer loads
        assert not metrics.in_points("broken")
    finally:
        metrics.in_points.cache_clear()


@pytest.mark.parametrize("name, hint", [("acuracy", "'accuracy'"), ("recall@0", "recall@"), ("ndcg@k", "ndcg@"),
                                        ("accuracy@3", "accuracy@3"), ("", "accuracy")])
def test_an_unknown_name_says_what_there_is(name, hint):
    with pytest.raises(TaskError, match=hint):
        get(name)


def write(folder, text, name="metrics.py"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_user_code_runs_only_with_trust_and_inside_the_folder(tmp_path):
    inside = tmp_path / "task"
    inside.mkdir()
    write(inside, "def f(answer, example):\n    return len(answer) / 10\n")
    write(tmp_path, "def f(answer, example):\n    return 1\n")
    (inside / "link.py").symlink_to(tmp_path / "metrics.py")
    metric = get("metrics.py:f", inside, trusted=True)
    assert (metric.name, metric.score("abc", example("x"))) == ("metrics.py:f", 0.3)
    with pytest.raises(TaskError, match="--trust"):
        get("metrics.py:f", inside)
    for outside in ("../metrics.py:f", "link.py:f", f"{tmp_path}/metrics.py:f"):
        with pytest.raises(TaskError, match="outside"):
            get(outside, inside, trusted=True)


@pytest.mark.parametrize("code, match", [("x = (", "SyntaxError"), ("1 / 0", "ZeroDivisionError"),
                                         ("raise SystemExit(3)", "SystemExit"), ("def good(a, e): return 1", "good"),
                                         ("f = 3", "no function")])
def test_broken_user_code_is_one_line(tmp_path, code, match):
    with pytest.raises(TaskError, match=match) as caught:
        get("metrics.py:f", write(tmp_path, code), trusted=True)
    assert "\n" not in str(caught.value)


def test_user_code_that_is_missing_is_named(tmp_path):
    with pytest.raises(TaskError, match="missing"):
        get("nowhere.py:f", tmp_path, trusted=True)


def test_user_code_may_define_dataclasses(tmp_path):
    write(tmp_path, "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass P:\n"
                    "    x: float\n\ndef f(answer, example):\n    return P(0.5).x\n")
    assert get("metrics.py:f", tmp_path, trusted=True).score("", example("x")) == 0.5


def test_scores_of_edited_code_or_of_another_version_are_told_apart(tmp_path, monkeypatch):
    code = "def f(answer, example):\n    return {}\n"
    first, again, edited = (get("metrics.py:f", write(tmp_path, code.format(n)), trusted=True) for n in (1, 1, 0))
    assert first.rules == again.rules != edited.rules and edited.score("", example("x")) == 0
    assert get("accuracy").rules == {}

    class Brevity(metrics.Mean):
        name = "brevity"

    doors = [SimpleNamespace(dist=SimpleNamespace(name="brief", version="1.2"))]
    monkeypatch.setattr(metrics.importlib.metadata, "entry_points",
                        lambda **asked: doors if asked["value"].endswith("Brevity") else [])
    assert Brevity().rules == {"metric_of": "brief 1.2"}


def test_an_example_on_which_a_metric_fails_is_data(tmp_path):
    write(tmp_path, "def f(answer, example):\n    return float(answer) if 'n' in answer else 1 / len(answer)\n")
    rows = [example("r", id=str(i), group="g") for i in range(4)]
    scored = score_all(get("metrics.py:f", tmp_path, trusted=True), ["ab", "", "nan", "inf"], rows)
    assert [o.score for o in scored] == [0.5, 0, 0, 0]
    assert scored[0].error is None and "ZeroDivisionError" in scored[1].error
    assert "nan" in scored[2].error and "inf" in scored[3].error
    assert {o.group for o in scored} == {"g"} and [o.id for o in scored] == list("0123")


def test_a_metric_that_fails_on_right_answers_too_is_broken(tmp_path):
    """Where it only cannot read what was said, every answer may be a miss: a base that never says a number."""
    write(tmp_path, "def f(answer, example):\n    return float(answer) == float(example.completion)\n"
                    "def g(answer, example):\n    return answer.lowered()\n"
                    "def h(answer, example):\n    return {'two': 1}[answer]\n")
    rows = [example("2", id="a"), example("3", id="b")]
    numbers, broken = (get(f"metrics.py:{name}", tmp_path, trusted=True) for name in "fg")
    missed = score_all(numbers, ["two", "three"], rows)
    assert [o.score for o in missed] == [0, 0] and all(o.error for o in missed)
    sound(numbers, missed, rows)
    with pytest.raises(TaskError, match="every example, right answers included.*lowered"):
        sound(broken, score_all(broken, ["2", "3"], rows), rows)
    unknown = [example("", id="a")]  # nothing is known to be right: a test that runs the answer, say
    sound(broken, score_all(broken, ["2"], unknown), unknown)
    late = get("metrics.py:h", tmp_path, trusted=True)  # which knows the right answer of the last row alone
    sound(late, score_all(late, ["x"] * 20, rows * 10), rows * 9 + [example("two"), rows[0]])


def test_scoring_needs_one_answer_per_example():
    with pytest.raises(ValueError):
        score_all(get("accuracy"), ["a"], [])


@pytest.mark.parametrize("name", ["perplexity", "win_rate"])
def test_what_is_not_made_from_answers_refuses_them(name):
    with pytest.raises(TaskError):
        score_all(get(name), ["a"], [example("a")])


@pytest.mark.parametrize("name", [*PER_ANSWER, "perplexity"])
def test_no_outcomes_have_no_figure(name):
    with pytest.raises(ValueError):
        get(name).aggregate([])


# -- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, wanted, right", [
    ("Positive", "positive", 1), ("  positive.\n", "positive", 1), ("very  good", "very good", 1), ("긍정.", "긍정", 1),
    ("긍정", "부정", 0), ("C#", "C", 0), (":)", ":(", 0), ("?", "!", 0), ("", "positive", 0), ("STRASSE", "straße", 1),
    ("\uac00", "\u1100\u1161", 1),
])
def test_accuracy_forgives_form_and_nothing_else(answer, wanted, right):
    assert get("accuracy").score(answer, example(wanted)) == right


def test_accuracy_takes_any_accepted_answer_and_compares_choices_exactly():
    assert get("accuracy").score("b", example("a", "b")) == 1
    row = example("A.", choices=("A.", "A"))
    assert [get("accuracy").score(a, row) for a in ("A.", "A", "a")] == [1, 0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_equals_sklearn(seed):
    from sklearn.metrics import f1_score

    draw = random.Random(seed)
    wanted = [draw.choice("abcd") for _ in range(60)]
    answers = [draw.choice([w, w, "a", "e", "f"]) for w in wanted]
    metric = get("macro_f1")
    expected = f1_score(wanted, answers, average="macro")
    assert metric.aggregate(outcomes(metric, answers, wanted)) == pytest.approx(expected)


def test_macro_f1_counts_a_failed_example_as_a_miss_of_its_class_only():
    rows = [Outcome("1", "a", 1, "a"), Outcome("2", "", 0, "b", error="timeout"), Outcome("3", "b", 1, "b")]
    assert get("macro_f1").aggregate(rows) == pytest.approx((1 + 2 / 3) / 2)


def test_macro_f1_counts_another_accepted_answer_as_a_hit_of_the_first():
    accepted = [("a", "b"), ("b",), ("b", "a"), ("a",)]
    scored = outcomes(get("macro_f1"), ["B.", "b", "c", "b"], accepted)
    assert [o.score for o in scored] == [1, 1, 0, 0]
    # a is wanted twice and answered once, b wanted twice and answered twice, c answered once: F1 2/3, 2/4 and 0.
    assert get("macro_f1").aggregate(scored) == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


# -- answers in words ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, normal", [
    ("The  Cat, sat!", "cat sat"), ("An apple a day", "apple day"), ("1914–1918", "1914–1918"), ("$1,000.", "1000"),
    ("한국의 수도는 서울이다.", "한국의 수도는 서울이다"), ("A", "a"), ("!!!", "!!!"), ("", ""), ("theory", "theory"),
    ("A.", "a"), ("$1,000.50.", "1000.50"), ("-5", "-5"), ("(-$5)", "-5"), ("1/2 or .5", "1/2 or .5"),
    ("12-05", "12-05"), ("U.S. F-16", "us f16"), ("a 3-year-old", "3yearold"), ("No.5, and/or - 6.", "no5 andor 6"),
    ("1,5", "1,5"), ("1,234,567", "1234567"), ("at 10:30, then", "at 10:30 then"), ("\N{MINUS SIGN}5", "-5"),
])
def test_squad_normalisation(text, normal):
    assert squad(text) == normal


@pytest.mark.parametrize("answer, accepted, em, f1", [
    ("the Denver Broncos", ["Denver Broncos"], 1, 1),
    ("Broncos of Denver", ["Denver Broncos"], 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # P 2/3, R 1
    ("Denver Denver", ["Denver Broncos"], 0, 0.5),  # a repeated token counts once
    ("Paris", ["London", "Paris, France"], 0, 2 * 1 * 0.5 / 1.5),
    ("서울 특별시", ["서울"], 0, 2 / 3), ("", ["x"], 0, 0), ("", [""], 1, 1), ("B", ["A"], 0, 0), ("the", ["A"], 0, 0),
    ("A.", ["A"], 1, 1), ("It is (A)", ["A"], 0, 0.5), ("-5", ["5"], 0, 0), ("15", ["1.5"], 0, 0),
    ("12", ["1/2"], 0, 0), ("5.", ["5"], 1, 1), ("他出生在北京市", ["北京市"], 0, 0.6), ("ราคาบ้าน", ["บ้าน"], 0, 2 / 3),
    ("Tokyo東京", ["東京"], 0, 0.8),
])
def test_exact_match_and_token_f1_by_hand(answer, accepted, em, f1):
    assert get("exact_match").score(answer, example(*accepted)) == em
    assert get("token_f1").score(answer, example(*accepted)) == pytest.approx(f1)


@pytest.mark.parametrize("answer, accepted, inside", [
    ("It was the Denver Broncos.", "Denver Broncos", 1), ("I know", "no", 0), ("No, I do not", "no", 1),
    ("in 2010", "201", 0), ("2010년에", "2010", 1), ("서울은 수도다", "서울", 1), ("부산", "서울", 0),
    ("anything", "", 0), ("", "", 1), ("b", "+", 0), ("about", "The A", 0),
    ("The answer is (A).", "A", 1), ("It is -5", "5", 0), ("It is 1.5", "5", 0), ("It is 1.5", "1", 0), ("5.", "5", 1),
    ("интернет", "нет", 0), ("нет, нельзя", "нет", 1), ("पानी", "पान", 0), ("他出生在北京市", "北京", 1),
    ("ราคาบ้าน", "บ้าน", 1), ("무인도에", "인도", 0), ("Paris는", "Paris", 1),
])
def test_contains(answer, accepted, inside):
    assert get("contains").score(answer, example(accepted)) == inside


TEXTS = ["the cat sat on the mat", "a dog barked at 3 cats", "on the mat sat the cat", "cat", "the dog, the cat!"]


@pytest.mark.parametrize("answer", TEXTS)
def test_rouge_l_equals_rouge_score_on_ascii_and_the_best_reference_wins(answer):
    from rouge_score.rouge_scorer import RougeScorer

    rival = RougeScorer(["rougeL"])
    expected = [rival.score(r, answer)["rougeL"].fmeasure for r in TEXTS]
    assert [get("rouge_l").score(answer, example(r)) for r in TEXTS] == pytest.approx(expected)
    assert get("rouge_l").score(answer, example(*TEXTS[:3])) == pytest.approx(max(expected[:3]))


def test_rouge_l_reads_korean():
    score = get("rouge_l").score("서울은 한국의 수도이다.", example("서울은 수도이다"))
    assert score == pytest.approx(2 * (2 / 3) / (5 / 3))  # both words of the reference among three: precision 2/3


@pytest.mark.parametrize("answer, wanted, score", [
    ("पिना", "पानी", 0), ("पानी", "पानी", 1), ("他出生在北京", "他出生在北京市", 12 / 13), ("ราคา บ้าน", "ราคาบ้าน", 1),
])
def test_rouge_l_reads_vowel_signs_and_scripts_without_spaces(answer, wanted, score):
    assert get("rouge_l").score(answer, example(wanted)) == pytest.approx(score)


def test_bleu_of_scripts_without_spaces_is_sacrebleu_s_by_characters():
    import sacrebleu

    answers, accepted = ["他出生在北京。", "東京は晴れだ。"], ["他出生在北京市。", "東京は雨だ。"]
    scored = outcomes(get("bleu"), answers, accepted)
    corpus = sacrebleu.corpus_bleu(answers, [accepted], tokenize="char").score / 100
    assert get("bleu").aggregate(scored) == pytest.approx(corpus) and corpus > 0.4
    sentence = sacrebleu.sentence_bleu(answers[0], accepted[:1], tokenize="char").score / 100
    assert scored[0].score == pytest.approx(sentence)


@pytest.mark.parametrize("name, corpus", [("bleu", "corpus_bleu"), ("chrf", "corpus_chrf")])
def test_bleu_and_chrf_equal_sacrebleu_with_as_many_references_as_each_row_has(name, corpus):
    import sacrebleu

    answers = ["the cat sat on a mat", "a dog barked loudly at the cats", "", "서울은 한국의 수도이다"]
    accepted = [(TEXTS[0], TEXTS[2]), (TEXTS[1],), ("something long",), ("서울은 수도이다", "수도는 서울이다", "서울")]
    streams = [[r[i] if i < len(r) else None for r in accepted] for i in range(3)]
    metric = get(name)
    scored = outcomes(metric, answers, accepted)
    assert metric.aggregate(scored) == pytest.approx(getattr(sacrebleu, corpus)(answers, streams).score / 100)
    sentence = getattr(sacrebleu, corpus.replace("corpus", "sentence"))
    assert [o.score for o in scored] == pytest.approx(
        [sentence(a, list(r)).score / 100 for a, r in zip(answers, accepted, strict=True)])


def test_bleu_of_short_answers_follows_sacrebleu_s_effective_order_per_sentence():
    assert get("bleu").score("cat", example("cat")) == pytest.approx(1)
    assert get("bleu").aggregate(outcomes(get("bleu"), ["cat"], ["cat"])) == 0  # as corpus_bleu says of no 4-grams


@given(st.lists(st.text(max_size=12), min_size=1, max_size=3), st.text(max_size=12))
def test_scores_stay_within_0_and_1_and_a_reference_scores_1(accepted, answer):
    for name, metric in METRICS.items():
        assert -1e-9 <= metric.score(answer, example(*accepted)) <= 1 + 1e-9
        if name in ("accuracy", "macro_f1", "exact_match", "token_f1", "contains"):
            assert metric.score(accepted[0], example(*accepted)) == 1


@given(st.text())
def test_spaces_around_a_text_do_not_matter(text):
    assert squad(text) == squad(f"  {text} ") and plain(text) == plain(f"  {text} ")


# -- likelihoods, rankings, preferences ---------------------------------------------------------------------------


def test_perplexity_weighs_rows_by_their_tokens():
    rows = [Outcome("1", "", 2.0, "", weight=3), Outcome("2", "", 1.0, "", weight=1)]
    assert get("perplexity").aggregate(rows) == pytest.approx(math.exp(7 / 4))


def test_a_failed_row_makes_perplexity_worse():
    rows = [Outcome("1", "", 2.0, "", weight=3)]
    failed = Outcome("2", "", 0.0, "", weight=3, error="out of memory")
    assert get("perplexity").aggregate([*rows, failed]) > 100 * get("perplexity").aggregate(rows)


def evidence(**marks):
    return Example(id="q", prompt="?", completion="", evidence=tuple((k, float(v)) for k, v in marks.items()))


def test_recall_counts_each_document_once():
    row = evidence(a=1, b=1, c=0)
    assert get("recall@2").score("a\nz\nb", row) == 0.5
    assert get("recall@3").score("a\nz\nb", row) == 1
    assert get("recall@3").score("a\na\na", row) == 0.5
    odd = Example("2", "p", "", evidence=(("doc 1 ", 1.0), ("x\u2028y", 1.0)))
    assert get("recall@2").score("doc 1 \nx\u2028y", odd) == get("mrr").score("\n doc\ndoc 1 ", odd) * 2 == 1
    assert get("recall@3").score("c", row) == 0


def test_ndcg_by_hand():
    row = evidence(a=3, b=2, c=1)
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert get("ndcg@3").score("b\nz\na", row) == pytest.approx((2 + 3 / 2) / ideal)
    assert get("ndcg@1").score("b", row) == pytest.approx(2 / 3)
    assert get("ndcg@10").score("a\nb\nc", row) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 5, 10])
def test_ndcg_equals_sklearn(seed, k):
    from sklearn.metrics import ndcg_score

    draw = np.random.default_rng(seed)
    truth, scores = draw.integers(0, 4, 20), draw.permutation(20)
    ranking = "\n".join(f"d{i}" for i in np.argsort(-scores))
    row = evidence(**{f"d{i}": g for i, g in enumerate(truth)})
    assert get(f"ndcg@{k}").score(ranking, row) == pytest.approx(ndcg_score([truth], [scores], k=k))


def test_a_ranking_without_evidence_is_a_failed_example():
    (scored,) = score_all(get("recall@5"), ["a"], [evidence()])
    assert scored.score == 0 and "no evidence" in scored.error


def test_win_rate_is_the_mean():
    rows = [Outcome(str(i), "", s, "") for i, s in enumerate([1, 0.5, 0, 1])]
    assert get("win_rate").aggregate(rows) == pytest.approx(0.625)


@pytest.mark.parametrize("name", PER_ANSWER)
def test_the_figure_is_finish_of_the_summed_statistics(name):
    metric = get(name)
    scored = outcomes(metric, TEXTS, TEXTS[1:] + TEXTS[:1])
    table = metric.statistics(scored)
    figures = metric.finish(np.array([np.ones(5), np.full(5, 2.0), [0, 3, 0, 1, 0]]) @ table)
    draws = [scored, scored * 2, scored[1:2] * 3 + scored[3:4]]
    assert figures == pytest.approx([metric.aggregate(d) for d in draws])


# -- numbers, sets and ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, value", [
    ("She has 3 + 4 = 7 apples. #### 1,234", 1234), ("#### 12\n\nQuestion: 5 cats", 12), ("$1,234.50.", 1234.5),
    ("it is -5", -5), ("\u22125 degrees", -5), ("pages 3-5", 5), ("-$5", -5), ("3/4", 0.75), ("2e-3", 0.002),
    ("12,5 %", 12.5), ("1,2,3", 3), (".5", 0.5), ("1,234,567", 1234567), ("none", None), ("1/0", None),
    ("9" * 400, None), ("12 ####", 12), ("x1 and x2 are 4.", 4),
    ("1.234,56", 1234.56), ("-1.234.567,8 €", -1234567.8), ("€9.269,10", 9269.1), ("3.141", 3.141),
    ("1.234,567.8", 567.8), ("12 500", 12500), ("12\u00a0500 won", 12500), ("1 000 000", 1e6), ("0,125", 0.125),
    ("3,1415", 3.1415), ("1.234.567", 1234567), ("7 1/2", 7.5), ("85 100 92", 92), ("CO2 400 ppm", 400),
    ("Q3 450", 450), ("(1000,2000)", 2000), ("In 2019,2020", 2020), ("B2 1/2", 0.5), ("2020 1/2", 0.5),
    ("9" * 400 + " 1/2", 0.5), ("1 " + "9" * 400 + "/2", None),
    ("Rs.500", 500), ("Rs.1,200", 1200), ("No.7", 7), ("so ...18", 18), ("(.25)", 0.25), ("$.99", 0.99), ("=-.5", -0.5),
])  # fmt: skip
def test_the_number_a_text_ends_in(text, value):
    assert number(text) == (value if value is None else pytest.approx(value))


@pytest.mark.parametrize("answer, wanted, right", [
    ("So 2 * 6 = 12.0", "5 + 7 = 12\n#### 12", 1), ("12.1", "12", 0), ("no idea", "12", 0), ("1,000", "1000", 1),
    ("0.3333333", "1/3", 1), ("0.33", "1/3", 0), ("None.", "none", 1), ("3", "none", 0), ("0", "0", 1),
    ("0.01", "0", 0),
])  # fmt: skip
def test_number_compares_numbers(answer, wanted, right):
    assert get("number").score(answer, example(wanted)) == right


def test_set_f1_equals_sklearn_by_samples():
    from sklearn.metrics import f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    given = ["b, a", "a", "C; a\nb", "", "d", ""]
    wanted = ["a, b", "a|b", "c, b", "a", "d, d", ""]
    binary = MultiLabelBinarizer().fit([list("abcd")])
    sides = [binary.transform([[i for i in "abcd" if i in text.lower()] for text in side]) for side in (wanted, given)]
    metric = get("set_f1")
    figure = metric.aggregate(outcomes(metric, given, wanted))
    assert figure == pytest.approx(f1_score(*sides, average="samples", zero_division=1.0))


@pytest.mark.parametrize("scales", [(1e2, 1e-2), (1.0, 0.5)])  # far apart, and where ranks of both would mix
@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlations_equal_scipy_of_one_run_and_of_two(name, scales):
    from scipy.stats import pearsonr, spearmanr

    known = {"pearson": pearsonr, "spearman": spearmanr}[name]
    draw, metric = np.random.default_rng(0), get(name)
    truth = draw.normal(3, 1, 60).round(1)
    pairs = zip((0.5, 2.0), scales, strict=True)
    runs = [(truth + draw.normal(0, spread, 60)).round(1) * scale for spread, scale in pairs]
    references = [f"{t}" for t in truth]
    scored = [outcomes(metric, [f"it is {v:.9f}" for v in run], references) for run in runs]
    wanted = [known(truth, run).statistic for run in runs]
    assert [metric.aggregate(one) for one in scored] == pytest.approx(wanted)
    table = metric.statistics([*scored[0], *scored[1]])
    together = metric.finish(np.kron(np.eye(2), np.ones(60)) @ table)
    assert together == pytest.approx(wanted)
    silent = outcomes(metric, ["no number"] * 15 + [f"{v:.9f}" for v in runs[0][15:]], references)
    assert metric.aggregate(silent) == pytest.approx(0.75 * known(truth[15:], runs[0][15:]).statistic)
    assert metric.aggregate(outcomes(metric, ["4"] * 60, references)) == 0
    assert metric.aggregate(outcomes(metric, ["none"] * 60, references)) == 0
    assert outcomes(metric, ["4"], ["not a number"])[0].error


def test_mrr_equals_sklearn_with_one_relevant_document():
    from sklearn.metrics import label_ranking_average_precision_score

    ids, draw = [f"d{i}" for i in range(8)], random.Random(0)
    ranks = [draw.sample(ids, 8) for _ in range(20)]
    rows = [Example(str(n), "?", evidence=((draw.choice(ids), 1.0),)) for n in range(20)]
    metric = get("mrr@8")
    figure = metric.aggregate(score_all(metric, ["\n".join(one) for one in ranks], rows))
    truth = [[float(i == row.evidence[0][0]) for i in ids] for row in rows]
    known = label_ranking_average_precision_score(truth, [[-one.index(i) for i in ids] for one in ranks])
    assert figure == pytest.approx(known)
    beyond = get("mrr@2").score("x\ny\nd1", Example("a", "?", evidence=(("d1", 1.0),)))
    assert beyond == 0 and get("mrr@3").score("x\ny\nd1\nd1", Example("a", "?", evidence=(("d1", 1.0),))) == 1 / 3


@pytest.mark.parametrize("name", [*PER_ANSWER, "set_f1", "number"])
def test_to_say_nothing_is_right_where_nothing_is_wanted(name):
    metric = get(name)
    assert [metric.score(answer, example("")) for answer in ("", "something else")] == [1, 0]
    assert metric.score("", example("something else")) == 0
    if name not in ("bleu", "chrf"):  # figures of words, to which an empty row adds none
        assert metric.aggregate(outcomes(metric, ["", "a b"], ["", "a b"])) == pytest.approx(1)
    else:
        assert metric.aggregate(outcomes(metric, ["", "a b c d e"], ["", "a b c d e"])) == pytest.approx(1)


def test_items_of_json_lists_are_items():
    metric = get("set_f1")
    wanted = '[{"type":"PER","text":"sigma"},{"type":"ORG","text":"epsilon"}]'

    def score(answer, reference=wanted):
        return metric.score(answer, Example("1", "q", reference, (reference,)))

    assert score('[{"text": "epsilon", "type": "ORG"}, {"text": "Sigma", "type": "PER"}]') == 1
    assert score('[{"type": "PER", "text": "epsilon"}, {"type": "ORG", "text": "sigma"}]') == 0
    assert score('["a", "B"]', "b, a") == 1 and score("[a, b", "[a, b") == 1


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_one_stray_answer_proves_nothing(name):
    draw, metric = np.random.default_rng(1), get(name)
    truth = draw.integers(0, 6, 120)
    first, second = (np.clip(truth + draw.integers(-1, 2, 120), 0, 5) for _ in range(2))
    answers = [[f"{n}" for n in run] for run in (first, second)]
    answers[1][7] = "5" + "0" * 40
    runs = [outcomes(metric, run, [f"{t}" for t in truth]) for run in answers]
    assert compare(*runs, metric).p_value > 0.05
    again = [*runs[0], *runs[0][:30]]  # rows that stand twice in one run
    from scipy.stats import pearsonr, spearmanr

    known = [[float(o.answer) for o in again], [float(o.reference) for o in again]]
    wanted = {"pearson": pearsonr, "spearman": spearmanr}[name](*known).statistic
    assert metric.aggregate(again) == pytest.approx(wanted)


def test_a_failed_answer_is_never_compared_as_better_than_a_scored_one() -> None:
    class Near(Mean):
        name = "near"

        def score(self, answer: str, example: Example) -> float:
            return -abs(float(answer) - float(example.completion))

    class Off(Near):
        name, higher_is_better = "off", False

        def score(self, answer: str, example: Example) -> float:
            return -super().score(answer, example)

    rows = [Example(str(n), "", str(n)) for n in range(6)]
    near, none = [f"{n + 0.5}" for n in range(6)], ["I do not know"] * 6
    for metric in (Near(), Off()):
        made = [score_all(metric, answers, rows) for answers in (near, none)]
        with pytest.raises(TaskError, match="gives no number.*ValueError: could not .*'I do not know'; let it ret"):
            comparable(metric, made[0], made[1])
        comparable(metric, made[0])
        mixed = (*made[0][:5], made[1][5])
        with pytest.raises(TaskError, match="gives no number"):
            sound(metric, mixed, rows)
        far = score_all(metric, ["9.5", *near[1:]], rows)  # by 9.5, which is the worst
        assert stats.compare(far, made[1], metric).difference == pytest.approx(-9.5 + 2)
        assert stats.compare(made[0], made[1], metric).difference == 0
        assert stats.not_worse(far, made[1], metric, 1.0).loss == pytest.approx(9.5 - 2)
    share = [score_all(get("exact_match"), answers, rows) for answers in (near, none)]
    assert stats.compare(share[0], (replace(share[1][0], error="no answer"), *share[1][1:]), get("exact_match")).n == 6
