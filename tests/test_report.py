"""The report: what it says, that any part may be missing, that hostile text stays text, and that a browser draws it."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from whet import report
from whet.errors import StoreError
from whet.report import figures, view

CHROMIUM = shutil.which("chromium")
no_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

HOSTILE = ("</script><script>document.title='pwned'</script>", "<img src=x onerror=\"document.title='pwned'\">",
           "{{7*7}}{% raw %}", "<b>bold</b><a href=\"javascript:document.title='pwned'\">x</a>", "--accent",
           "\u2028%{x}$\\alpha$ &lt;i&gt;\x1b[31m\ud800")


def trial(name: str, recipe: list[dict[str, Any]], gain: float, seconds: float, **more: Any) -> dict[str, Any]:
    score = 0.71 + gain
    return {"name": name, "recipe": recipe, "rung": 2, "seed": 0, "status": "done", "why": "", "examples": 400,
            "select": {"score": score, "low": score - 0.03, "high": score + 0.03},
            "difference": {"difference": gain, "low": gain - 0.04, "high": gain + 0.035}, "cost_seconds": seconds,
            "spent": {"seconds": seconds, "trained_tokens": 52_000}, "latency_ms": 41.0, "size_bytes": 269_000_000,
            "memory_bytes": 520_000_000, "forgetting": None, "verdict": None, **more}


FINETUNE = {"method": "finetune", "adapter": "lora", "rank": 16, "learning_rate": 0.0002}
FEWSHOT = {"method": "fewshot", "k": 16, "selection": "random"}
CHOSEN = [FINETUNE, {"method": "calibrate", "kind": "batch"}]


def rich() -> dict[str, Any]:
    """A result with every field, as `improve` writes it."""
    return {
        "task": "sst2", "model": "smollm2-135m", "seed": 0, "budget_s": 1800,
        "metric": {"name": "accuracy", "higher_is_better": True},
        "spent": {"seconds": 1540.2, "training_seconds": 890.0, "trained_tokens": 412_000,
                  "prefilled_tokens": 1_930_000, "generated_tokens": 12_400},
        "diagnosis": [
            {"gap": "bias", "share": 0.62, "low": 0.55, "high": 0.69, "detected": True, "remedies": ["calibrate"]},
            {"gap": "skill", "share": 0.31, "low": 0.24, "high": 0.38, "detected": True,
             "remedies": ["finetune", "fewshot"]},
            {"gap": "format", "share": 0.01, "low": 0.0, "high": 0.03, "detected": False, "remedies": []}],
        "baselines": [{"name": "majority class", "select": 0.51, "confirm": 0.509},
                      {"name": "logistic regression on TF-IDF", "select": 0.79, "confirm": 0.785},
                      {"name": "logistic regression on embeddings", "select": 0.8125, "confirm": 0.81}],
        "trials": [
            trial("base", [], 0.0, 12.0, difference=None),
            trial("fewshot(k=16,random)", [FEWSHOT], -0.1, 44.0),
            trial("fewshot(k=16,random)+calibrate", [FEWSHOT, {"method": "calibrate"}], 0.1625, 51.0),
            trial("calibrate(kind=batch)", [{"method": "calibrate"}], 0.06, 13.0),
            trial("prompting(pool=12)", [{"method": "prompting"}], 0.035, 210.0),
            trial("finetune(rank=16)", [FINETUNE], 0.12, 130.0, rung=1, verdict="underfitting"),
            trial("finetune(rank=16)", [FINETUNE], 0.2075, 420.0, verdict="well fitted"),
            trial("finetune(rank=16)+calibrate(kind=batch)", CHOSEN, 0.2175, 433.0),
            trial("finetune(rank=16)+calibrate(kind=batch)+quantize(bits=8,group=64,symmetric)",
                  [*CHOSEN, {"method": "quantize", "bits": 8}], 0.205, 460.0, size_bytes=141_000_000),
            {"name": "dpo", "recipe": [{"method": "dpo"}], "rung": 0, "seed": 0, "status": "failed",
             "why": "loss is not finite", "examples": 0, "select": None, "difference": None, "spent": {},
             "latency_ms": None, "size_bytes": None, "memory_bytes": None, "forgetting": None, "cost_seconds": None}],
        "chosen": {"recipe": CHOSEN, "gain_by_step": [{"method": "finetune", "gain": 0.2075}, 0.01]},
        "confirm": {"n": 872, "base": {"score": 0.712, "low": 0.681, "high": 0.742},
                    "chosen": {"score": 0.924, "low": 0.905, "high": 0.941}, "difference": 0.212, "low": 0.18,
                    "high": 0.244, "p_value": 1e-30, "improved": True, "smallest_detectable": 0.031,
                    "best_single": {"name": "finetune(rank=16)", "difference": 0.006, "low": -0.002, "high": 0.014,
                                    "p_value": 0.21}},
        "selection": {"select": 0.9275, "confirm": 0.924, "shrinkage": 0.0035, "select_gain": 0.2175,
                      "confirm_gain": 0.212},
        "notes": ["The clock stopped one trial early; it is marked truncated."],
        "dropped": {"count": 3, "examples": [["train-17", "repeats test-4"], ["train-90", "nearly repeats dev-2"]]},
        "protocol": {"data": "sha256:6c1f09", "template": "chatml", "engine": "torch", "dtype": "bfloat16"},
        "versions": {"whet": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "plan": [{"arm": "fewshot", "minutes": 2.5}, {"arm": "finetune", "minutes": 11.0}],
        "left_out": [{"method": "rag", "why": "the task has no documents"}]}


def found(n: int = 872, labels: int = 2) -> dict[str, Any]:
    """Details with n examples over so many labels, and two training curves."""
    names = ["negative", "positive"] if labels == 2 else [f"intent number {i}" for i in range(labels)]
    dice = random.Random(0)

    def answer(reference: str, skill: float) -> str:
        return reference if dice.random() < skill else dice.choice([x for x in names if x != reference])

    rows = []
    for i in range(n):
        reference = dice.choice(names)
        base, chosen = answer(reference, 0.71), answer(reference, 0.92)
        rows.append({"id": f"test-{i}", "prompt": f"Review {i}: an utterly charming and often hilarious film that "
                     "runs a little long but never loses its warmth.", "reference": reference, "base": base,
                     "chosen": chosen, "base_score": float(base == reference),
                     "chosen_score": float(chosen == reference)})
    curves = [{"name": f"finetune(rank={rank})",
               "train": [[s, 0.9 * 0.98**s * rank / 16 + 0.1 + dice.random() / 15] for s in range(1, 130)],
               "validation": [[s, 0.8 * 0.97**s + 0.25 + rank * s / 10_000] for s in range(10, 131, 10)]}
              for rank in (16, 32)]
    return {"examples": rows, "curves": curves, "labels": names}


MINIMAL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"task": "t", "trials": None, "confirm": None, "chosen": None, "spent": None, "baselines": None},
     {"examples": None, "curves": None, "labels": None}),
    ({"task": "t", "metric": {"name": "accuracy", "higher_is_better": True},
      "trials": [trial("base", [], 0.0, 9.0, difference=None)], "chosen": {"recipe": []}, "confirm": None,
      "baselines": [], "diagnosis": []},
     {"examples": [{"id": "1", "prompt": "p", "reference": "r", "base": "r", "chosen": None, "base_score": 1,
                    "chosen_score": None}], "curves": [], "labels": []}),
    ({"task": "t", "trials": [{"name": None, "recipe": None, "select": None, "spent": None, "difference": None}],
      "dropped": {"count": None, "examples": [None]}, "notes": [None], "protocol": {"a": None},
      "confirm": {"n": None, "base": {"score": float("nan")}, "chosen": None, "difference": None}},
     {"examples": [{}], "curves": [{"name": None, "train": [[0, float("nan")]], "validation": None}],
      "labels": ["a"]}),
]


def page(tmp_path: Path, result: dict[str, Any], details: dict[str, Any]) -> str:
    path = tmp_path / "report.html"
    report.write(path, result, details)
    return path.read_text(encoding="utf-8")


def embedded(html: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert match
    return dict(json.loads(match[1]))


# -- the verdict -------------------------------------------------------------------------------------------------


def test_verdict_of_an_improvement() -> None:
    assert report.verdict(rich()) == (
        "Accuracy rose from 71.2 to 92.4 (+21.2 points, 95 % interval +18.0 to +24.4), confirmed on 872 sealed "
        "examples.")


def test_verdict_names_a_baseline_that_wins() -> None:
    result = rich()
    result["baselines"][2] |= {"confirm": 0.95, "low": -0.01}
    assert "scores as much or more (no difference shown) without a language model: 95.0" in report.verdict(result)
    result["baselines"][2]["low"] = 0.01
    assert report.verdict(result).endswith(
        "; yet the baseline logistic regression on embeddings does better without a language model: 95.0.")


def test_verdict_when_nothing_helps() -> None:
    result = rich()
    result["chosen"] = {"recipe": []}
    result["confirm"] |= {"improved": False, "difference": -0.008, "low": -0.02, "high": 0.004}
    result["baselines"] = []
    assert report.verdict(result) == (
        "Nothing was shown to beat the base model, which is handed over (accuracy 71.2): the best candidate differed "
        "by −0.8 points, 95 % interval −2.0 to +0.4 on 872 sealed examples.")


def test_verdict_when_nothing_was_tried() -> None:
    result = rich() | {"chosen": {"recipe": []}, "baselines": []}
    result["trials"] = [t for t in result["trials"] if not t["recipe"]]
    result["confirm"] |= {"improved": False, "difference": 0.0, "low": 0.0, "high": 0.0}
    assert report.verdict(result).startswith("Nothing was tried beside the base model, which is handed over")


def test_verdict_says_that_the_test_is_why_where_the_interval_is_above_zero(tmp_path: Path) -> None:
    result = rich() | {"chosen": {"recipe": []}, "baselines": []}
    result["confirm"] |= {"n": 16, "improved": False, "difference": 0.045, "low": 0.014, "high": 0.08,
                          "p_value": 0.03125, "p_adjusted": 0.0625}  # fmt: skip
    assert report.verdict(result) == (
        "Nothing was shown to beat the base model, which is handed over (accuracy 71.2): the best candidate differed "
        "by +4.5 points, 95 % interval +1.4 to +8.0 on 16 sealed examples, but p = 0.062 is not below 0.05.")
    html = page(tmp_path, result, found(40))
    assert html.count("<th>Best candidate</th>") == html.count("<h3>Best candidate</h3>") == 1
    assert "Base and best candidate answered" in html and "Chosen" not in re.sub("<script.*?</script>", "", html,
                                                                                flags=re.DOTALL)
    assert '<th class="n">Best candidate</th>' in page(tmp_path, result, found(40, 30))
    assert "<th>Chosen</th>" in page(tmp_path, rich(), found(40))


def test_verdict_when_another_model_is_handed_over_as_it_stands() -> None:
    result = rich()
    result["chosen"] = {"recipe": [], "handed": True, "model": "another"}
    assert report.verdict(result).startswith("Accuracy rose from 71.2 to 92.4")


def test_verdict_when_the_handed_over_system_is_not_better() -> None:
    result = rich()
    result["confirm"] |= {"improved": False, "chosen": {"score": 0.71}, "difference": -0.002, "low": -0.01, "high": 0.0}
    assert report.verdict(result).startswith(
        "The chosen system was not shown to be better than the base: accuracy 71.0 against 71.2 (−0.2 points")


def test_verdict_without_a_test_split() -> None:
    result = rich() | {"confirm": None}
    assert report.verdict(result) == ("Accuracy rose from 71.0 to 92.8 on the select split; without a test split this "
                                      "is not confirmed.")
    result["chosen"] = {"recipe": []}
    assert report.verdict(result) == ("Nothing beat the base model, which is handed over: accuracy 71.0 on the select "
                                      "split, not confirmed; yet the baseline logistic regression on embeddings scores "
                                      "as much or more (no difference shown) without a language model: 81.2.")
    result["baselines"] = [{"name": "b", "select": 0.0}]
    result["trials"] = [t | {"select": {"score": 0.0}} for t in result["trials"]]
    assert "baseline" not in report.verdict(result)  # 0 is nothing to do well by


def test_where_every_arm_failed_that_is_the_verdict() -> None:
    base = {"name": "base", "recipe": [], "status": "done", "select": {"score": 0.5}}
    arms = [{"name": "prompting", "recipe": [{"method": "prompting"}], "status": "failed", "why": "no prompt in x."}]
    result = {"task": "t", "metric": {"name": "accuracy", "higher_is_better": True}, "trials": [base, *arms],
              "chosen": {"recipe": [], "handed": False}, "confirm": None}  # fmt: skip
    said = "Nothing could be tried (prompting: no prompt in x); the base is handed over: accuracy 50.0 on"
    assert report.verdict(result) == f"{said} the select split."
    figures = {"score": 0.5, "low": 0.4, "high": 0.6}
    sealed = {"n": 20, "base": figures, "chosen": figures, "difference": 0.0, "candidate": None, "improved": False}
    assert report.verdict(result | {"confirm": sealed}) == f"{said} 20 sealed examples."
    done = arms[0] | {"status": "done", "select": {"score": 0.4}}
    assert "No candidate beat the base" in report.verdict(result | {"confirm": sealed, "trials": [base, *arms, done]})


def test_what_did_better_and_was_refused_is_the_verdict() -> None:
    base = {"name": "base", "recipe": [], "status": "done", "select": {"score": 0.5}}
    arm = {"name": "finetune", "recipe": [{"method": "finetune"}], "status": "refused", "select": {"score": 0.9},
           "why": "old loses 12.3 points, 1 allowed"}  # fmt: skip
    result = {"task": "t", "metric": {"name": "accuracy", "higher_is_better": True}, "trials": [base, arm],
              "chosen": {"recipe": [], "handed": False}, "confirm": None}  # fmt: skip
    said = ("What did better than the base was refused (finetune: old loses 12.3 points, 1 allowed); the base is "
            "handed over: accuracy 50.0 on")  # fmt: skip
    assert report.verdict(result) == f"{said} the select split."
    figures = {"score": 0.5, "low": 0.4, "high": 0.6}
    sealed = {"n": 20, "base": figures, "chosen": figures, "difference": 0.0, "candidate": None, "improved": False}
    assert report.verdict(result | {"confirm": sealed}) == f"{said} 20 sealed examples."
    worse = arm | {"select": {"score": 0.4}}
    assert "No candidate beat the base" in report.verdict(result | {"confirm": sealed, "trials": [base, worse]})
    equal = sealed | {"candidate": "rag"}  # confirmed without rows to select by, and no better
    said = report.verdict(result | {"confirm": equal, "trials": [base, arm | {"status": "done", "select": None}]})
    assert "Nothing was tried" not in said and "differed by" in said


def test_examples_are_called_sealed_only_where_they_are(tmp_path: Path) -> None:
    one = {"id": "1", "prompt": "p", "reference": "r", "base": "x", "chosen": "r", "base_score": 0, "chosen_score": 1}
    for more, lead in (({}, "The sealed examples with both answers"),
                       ({"confirm": None}, "that candidates were compared on (none is sealed) with both")):  # fmt: skip
        assert lead in page(tmp_path, rich() | more, {"examples": [one]})


def test_verdict_of_perplexity_where_lower_is_better() -> None:
    """A difference is signed so that plus is better, whatever the metric: perplexity fell by 7.94."""
    result = rich() | {"metric": {"name": "perplexity", "higher_is_better": False}, "baselines": []}
    result["trials"] = []
    result["confirm"] = {"n": 200, "base": {"score": 23.14}, "chosen": {"score": 15.2}, "difference": 7.94, "low": 6.5,
                         "high": 9.2, "p_value": 0.0001, "improved": True, "smallest_detectable": 2.0}
    assert report.verdict(result) == ("Perplexity fell from 23.14 to 15.20 (better by 7.94, 95 % interval +6.50 to "
                                      "+9.20), confirmed on 200 sealed examples.")


@pytest.mark.parametrize("case", range(len(MINIMAL)))
def test_verdict_is_one_printable_line(case: int) -> None:
    said = report.verdict(MINIMAL[case][0])
    assert said.endswith(".") and said.isprintable()


def test_what_selection_flattered_is_printed_below_the_verdict() -> None:
    said = report.summary(rich()).splitlines()
    assert said == [report.verdict(rich()),
                    "Select said 92.8 (+21.8 over the base) of finetune(rank=16)+calibrate(kind=batch), sealed data "
                    "says 92.4 (+21.2): a shrinkage of 0.4 points."]  # fmt: skip
    kept = {**rich(), "chosen": {"recipe": [], "handed": False}}
    assert "of the best candidate" in report.summary(kept)
    more = {**rich(), "selection": {"select": 0.9, "confirm": 0.924, "shrinkage": -0.024}}
    assert report.summary(more).endswith("(kind=batch), sealed data says 92.4: no shrinkage.")
    assert report.summary({}) == report.verdict({})


@pytest.mark.parametrize(
    ("used", "met", "status", "handed", "says"),
    [
        ({"size": 88e6}, True, "done", True, "Within the limits: size 88 MB of 100 MB (269 MB before)."),
        ({"size": 100.2e6}, False, "refused", True,
         "Nothing keeps within the limits; the nearest, finetune(rank=16)+calibrate(kind=batch), is handed over: size "
         "100,200,000 B of 100 MB (269 MB before)."),
        ({"latency": 41.4}, False, "done", False,
         "Beyond the limits; the base is handed over: latency 41 ms of 40 ms."),
        ({"memory": None}, None, "done", True,
         "Whether it keeps within the limits is not known: memory not known of 1 GB (1.2 GB before)."),
    ],
)  # fmt: skip
def test_limits_are_told_below_the_verdict(
    used: dict[str, Any], met: bool | None, status: str, handed: bool, says: str, tmp_path: Path
) -> None:
    allowed, base = {"size": 100_000_000, "memory": 1e9, "latency": 40.0}, {"size": 269e6, "memory": 1.2e9}
    result = rich()
    result["limits"] = {"allowed": {k: allowed[k] for k in used}, "used": used, "base": base, "met": met}
    result["trials"][7]["status"] = status
    if not handed:
        result["chosen"] = {"recipe": [], "name": "base", "handed": False}
    assert report.summary(result).splitlines()[1] == says
    shown = page(tmp_path, result, {}).replace("<wbr>", "")
    assert f'<p class="kept">{says}</p>' in shown


def test_how_passages_are_read_is_told_below_the_verdict(tmp_path: Path) -> None:
    read = {"n": 60, "recall": 91.7, "found": 70.5, "missed": None, "oracle": 74.2, "distracted": 3.0,
            "faithful": 61.0, "declined": 0.0}  # fmt: skip
    says = ("The passages hold the answer for 92 % of 60 sealed questions; accuracy 70.5 with it, 74.2 with the right "
            "passages alone, 3.0 with wrong ones only. 61 % of the answers stand in the passages, 0 % say that "
            "there is none.")  # fmt: skip
    result = rich() | {"reading": read}
    assert says in report.summary(result).splitlines()
    assert f'<p class="kept">{says}</p>' in page(tmp_path, result, {}).replace("<wbr>", "")
    assert "passages hold" not in report.summary(rich() | {"reading": None})


def test_what_compression_costs_is_told_below_the_verdict(tmp_path: Path) -> None:
    result = rich()
    result["confirm"]["uncompressed"] = {
        "name": "finetune", "score": 0.928, "low": 0.91, "high": 0.94,
        "cost": {"loss": 0.004, "low": -0.003, "high": 0.011, "bound": 0.009},
    }  # fmt: skip
    says = ("Compression costs 0.4 points [−0.3, 1.1] on the sealed rows (at most 0.9 by a one-sided bound); finetune "
            "scores 92.8 there.")  # fmt: skip
    assert report.summary(result).splitlines()[1] == says
    assert f'<p class="kept">{says}</p>' in page(tmp_path, result, {}).replace("<wbr>", "")
    result["confirm"]["uncompressed"]["cost"]["loss"] = -0.0001
    assert "costs 0.0 points" in report.summary(result)
    result["chosen"] = {"recipe": [], "handed": False}
    assert "Compression" not in report.summary(result)


def test_verdict_of_hostile_names_has_no_terminal_escapes() -> None:
    result = rich()
    result["baselines"] = [{"name": "\x1b[31mred\n", "select": 0.9, "confirm": 0.99}]
    assert report.verdict(result).isprintable()


def test_several_models_have_one_base_and_one_chosen(tmp_path: Path) -> None:
    result = rich() | {"model": ["모델", "other"]}
    for one in result["trials"]:
        one["name"] += " [모델]"
    result["trials"] += [trial("base [other]", [], 0.05, 9.0),
                         trial("finetune(rank=16)+calibrate(kind=batch) [other]", CHOSEN, 0.01, 9.0)]  # fmt: skip
    kinds = {a.name: a.kind for a in view.arms(result) if a.kind != "baseline"}
    assert [n for n, kind in kinds.items() if kind == "base"] == ["base [모델]"]
    result["chosen"] |= {"name": "finetune(rank=16)+calibrate(kind=batch) [모델]", "handed": True}
    assert [a.name for a in view.arms(result) if a.kind == "chosen"] == [result["chosen"]["name"]]
    assert report.verdict(result | {"confirm": None}).startswith("Accuracy rose from 71.0 to 92.8 on the select split")
    assert "모델, other" in page(tmp_path, result, found(20))
    result["chosen"] = {"recipe": [], "name": "base [other]", "handed": True}
    assert [a.name for a in view.arms(result) if a.kind == "chosen"] == ["base [other]"]
    assert report._headline(result, view.Scale.of(result))["tiles"][1][0] == "Chosen"


# -- numbers -----------------------------------------------------------------------------------------------------


def test_scale_writes_points_and_plain_figures() -> None:
    points, plain = view.Scale("accuracy", True, True), view.Scale("perplexity", False, False)
    assert (points.score(0.712), points.gain(0.1), points.gain(-0.1), points.gain(-0.0001)) == (
        "71.2", "+10.0", "−10.0", "0.0")
    assert (plain.score(23.139), plain.score(1234.5), plain.gain(7.9), plain.score(None)) == (
        "23.14", "1,234.5", "+7.90", "–")


def test_durations_and_sizes() -> None:
    assert [view.duration(s) for s in (45.2, 99.4, 100, 5399, 7200)] == ["45 s", "99 s", "1.7 min", "90.0 min", "2.0 h"]
    assert [view.size(b) for b in (12, 98_000_000, 1_240_000_000)] == ["12 B", "98 MB", "1.24 GB"]
    assert [view.size(b) for b in (999, 999_400, 999_499_999, 999_700_000)] == ["999 B", "999 kB", "999 MB", "1 GB"]
    assert view.size(2_500_000_000_000) == "2,500 GB"


def test_forgetting_has_one_decimal_and_the_pages_minus_sign() -> None:
    result = rich()
    for one, points in zip(result["trials"], (1.9230769230769231, -0.5128205, -0.01, None), strict=False):
        one["forgetting"] = points
    shown = [row[7] for row in report._trial_rows(result, view.Scale.of(result))]
    assert shown[:4] == ["1.9", "−0.5", "0.0", ""]


# -- what is shown -----------------------------------------------------------------------------------------------


def test_arms_are_sorted_and_taken_at_their_highest_rung() -> None:
    arms = view.arms(rich())
    gains = [a.gain for a in arms if a.gain is not None]
    assert gains == sorted(gains, reverse=True)
    assert arms[0].kind == "chosen" and arms[-1].name == "dpo" and arms[-1].why == "loss is not finite"
    assert [a.gain for a in arms if a.name == "finetune(rank=16)"] == [0.2075]
    assert {a.name: round(a.gain or 0, 4) for a in arms if a.kind == "baseline"} == {
        "logistic regression on embeddings": 0.1025, "logistic regression on TF-IDF": 0.08, "majority class": -0.2}


def test_gain_of_a_baseline_is_positive_when_better_also_where_lower_is_better() -> None:
    base = trial("base", [], 0.0, 1.0) | {"select": {"score": 30.0}}
    result = {"metric": {"name": "perplexity", "higher_is_better": False}, "trials": [base],
              "baselines": [{"name": "bigram", "select": 20.0, "confirm": None}]}
    assert [a.gain for a in view.arms(result)] == [10.0, 0.0]


def test_arms_scored_on_fewer_rows_are_not_cheaper() -> None:
    result = rich()
    result["trials"].append(trial("calibrate(kind=domain)", [{"method": "calibrate"}], 0.3, 2.0, examples=60))
    scale = view.Scale("accuracy", True, True)
    assert not [a for a in figures.frontier(view.arms(result), scale) if a.name == "calibrate(kind=domain)"]


def test_the_p_value_is_the_one_that_was_decided_on() -> None:
    result = rich()
    result["confirm"] |= {"p_value": 0.03, "p_adjusted": 0.06}
    assert report._headline(result, view.Scale.of(result))["p"] == "p = 0.06"


def test_where_no_candidate_was_tried_on_sealed_data_none_is_shown() -> None:
    result = rich()
    same = result["confirm"]["base"]
    result["chosen"] = {"recipe": [], "name": "base", "handed": False, "gain_by_step": []}
    result["confirm"] = {"n": 872, "base": same, "chosen": same, "difference": 0.0, "low": 0.0, "high": 0.0,
                         "p_value": 1.0, "improved": False, "smallest_detectable": 0.0, "candidate": None}
    assert report.verdict(result).startswith("No candidate beat the base model on the select split, so none was tried")
    shown = report._headline(result, view.Scale.of(result))
    assert [label for label, *_ in shown["tiles"]] == ["Base"] and not shown["p"]
    result["confirm"]["candidate"] = "fewshot"
    assert [label for label, *_ in report._headline(result, view.Scale.of(result))["tiles"]][1] == "Best candidate"


def test_a_small_gain_in_perplexity_keeps_its_figure() -> None:
    result = rich()
    result["metric"] = {"name": "perplexity", "higher_is_better": False}
    result["confirm"] |= {"base": {"score": 12.004}, "chosen": {"score": 12.0}, "difference": -0.004, "low": -0.005,
                          "high": -0.003}  # fmt: skip
    assert "better by 0.00" in report.verdict(result)


def test_a_correlation_is_shown_as_it_is() -> None:
    """Wherever its scores happen to lie: no figure of a result decides how the others are written."""
    result = rich() | {"metric": {"name": "pearson", "higher_is_better": True}, "trials": [], "baselines": []}
    for base in (0.0, -0.05):
        result["confirm"] |= {"base": {"score": base}, "chosen": {"score": 0.97}, "difference": 0.97 - base}
        assert f"Pearson rose from {base:.2f} to 0.97 (+{0.97 - base:.2f}, ".replace("-", "−") in report.verdict(result)
    assert view.Scale.of({"metric": {"name": "accuracy"}}).points and not view.Scale.of({}).points


def test_frontier_is_what_no_cheaper_arm_matches() -> None:
    scale = view.Scale("accuracy", True, True)
    names = [a.name for a in figures.frontier(view.arms(rich()), scale)]
    assert names == ["base", "calibrate(kind=batch)", "fewshot(k=16,random)+calibrate", "finetune(rank=16)",
                     "finetune(rank=16)+calibrate(kind=batch)"]
    result = rich()
    result["trials"] += [trial("worse", [{"method": "rag"}], -0.2, 3.0), trial("better", [{"method": "rl"}], 0.05, 4.0),
                         trial("tied", [{"method": "kto"}], 0.2175, 100.0)]  # fmt: skip
    names = [a.name for a in figures.frontier(view.arms(result), scale)]
    assert names == ["better", "calibrate(kind=batch)", "fewshot(k=16,random)+calibrate", "finetune(rank=16)",
                     "finetune(rank=16)+calibrate(kind=batch)"]  # fmt: skip


def test_cost_is_that_of_the_whole_recipe(tmp_path: Path) -> None:
    result = rich()
    calibrated = next(t for t in result["trials"] if t["recipe"] == CHOSEN)
    calibrated |= {"cost_seconds": 4.0, "recipe_seconds": 424.0}
    assert {a.name: a.seconds for a in view.arms(result)}[calibrated["name"]] == 424.0
    front = [a.name for a in figures.frontier(view.arms(result), view.Scale("accuracy", True, True))]
    assert front[-2:] == ["finetune(rank=16)", calibrated["name"]]
    assert ">7.1 min<" in page(tmp_path, result, found(5))


def test_examples_are_counted_by_what_changed() -> None:
    def one(base: float, chosen: float) -> dict[str, Any]:
        return {"id": "i", "prompt": "p", "base": "b", "chosen": "c", "base_score": base, "chosen_score": chosen}

    scale = view.Scale("accuracy", True, True)
    binary = view.examples({"examples": [one(0, 1)] * 3 + [one(1, 0)] * 2 + [one(0, 0), one(1, 1)]}, scale)
    assert [(k, n) for k, _, n in binary.filters] == [("all", 7), ("gained", 3), ("lost", 2), ("wrong", 1)]
    graded = view.examples({"examples": [one(0.2, 0.5), one(0.5, 0.2), one(0.3, 0.3)]}, scale)
    assert [(k, n) for k, _, n in graded.filters] == [("all", 3), ("better", 1), ("worse", 1), ("same", 1)]
    lower = view.examples({"examples": [one(2.0, 1.0)]}, view.Scale("perplexity", False, False))
    assert lower.rows[0][0] == "better"


def test_confusion_counts_and_puts_strange_answers_apart() -> None:
    rows = [("a", "a"), ("a", "B."), ("b", "b"), ("b", "what?"), ("b", "a")]
    details = {"labels": ["a", "b"], "examples": [{"reference": r, "chosen": c} for r, c in rows]}
    matrix = view.confusion(details, "chosen")
    assert matrix is not None
    assert matrix.counts == ((1, 1, 0), (1, 1, 1)) and matrix.columns == ("a", "b", "(other)")
    assert view.confusion(details, "base") is None
    assert view.most_confused(details) == [
        ("a", "b", None, 1), ("b", "a", None, 1), ("b", "(other)", None, 1)]


def test_figures_are_valid_plotly() -> None:
    """Plotly's own schema accepts every figure, once colour names are what the page makes of them."""
    import plotly.graph_objects as go

    result, details = rich(), found(labels=12)
    drawn, _ = report._figures(result, details, view.arms(result), view.Scale.of(result))
    assert set(drawn) == {"gains", "cost", "training", "confusion-base", "confusion-chosen"}
    # Else Plotly hides the last label where it is slanted: it goes beyond the plot.
    assert drawn["confusion-chosen"]["layout"]["xaxis"]["ticklabeloverflow"] == "allow"
    for figure in drawn.values():
        go.Figure(json.loads(re.sub(r'"--[a-z0-9]+"', '"#123456"', json.dumps(figure))))


@pytest.mark.parametrize(("labels", "drawn", "table"), [(2, 2, False), (20, 2, False), (30, 1, True), (77, 0, True)])
def test_many_labels_become_one_matrix_or_a_table(tmp_path: Path, labels: int, drawn: int, table: bool) -> None:
    html = page(tmp_path, rich(), found(300, labels))
    assert sum(name.startswith("confusion") for name in embedded(html)["figures"]) == drawn
    assert ('id="confused"' in html) == table


def test_page_holds_what_matters(tmp_path: Path) -> None:
    html = page(tmp_path, rich(), found())
    for text in ("Accuracy rose from 71.2 to 92.4", "71.2", "92.4", "+21.2", "68.1 to 74.2", "p &lt; 0.001",
                 "With 872 examples, a true difference under 3.1 points", "a shrinkage of 0.4 points",
                 "loss is not finite", "no documents", "bfloat16", "repeats test-4", "412,000", "25.7 min",
                 "well fitted", "Against the best single method, finetune(rank=16): +0.6 points",
                 "marked truncated", "wrong → right"):
        assert text in html, text
    assert len(embedded(html)["examples"]["rows"]) == 872


def test_first_screen_says_that_a_baseline_wins(tmp_path: Path) -> None:
    result = rich()
    assert "A baseline wins" not in page(tmp_path, result, found(5))
    result["baselines"][1] |= {"confirm": 0.93, "low": -0.01}
    html = page(tmp_path, result, found(5))
    assert "A baseline does as well" in html[: html.index('id="tried"')]
    result["baselines"][1]["low"] = 0.001
    html = page(tmp_path, result, found(5))
    assert "A baseline wins" in html[: html.index('id="tried"')]
    assert "of the cost" not in html[: html.index('id="tried"')]  # which nobody has measured
    result["baselines"][1]["p_value"] = 0.5  # of two examples, say, whose interval has no width
    assert "scores as much or more (no difference shown)" in report.verdict(result)
    result["baselines"][1]["confirm"] = result["confirm"]["chosen"]["score"]
    assert "scores as much or more (no difference shown)" in report.verdict(result)


@pytest.mark.parametrize("case", range(len(MINIMAL)))
def test_any_part_may_be_missing(tmp_path: Path, case: int) -> None:
    html = page(tmp_path, *MINIMAL[case])
    assert 'id="verdict"' in html and "None" not in re.sub(r"<script.*?</script>|<style.*?</style>", "", html,
                                                           flags=re.DOTALL)
    assert embedded(html)["figures"] == {} and 'id="plotly"' not in html


@pytest.mark.parametrize("key", sorted(rich()))
@pytest.mark.parametrize("value", [None, [], {}, "text", 3])
def test_any_one_field_may_be_anything(tmp_path: Path, key: str, value: Any) -> None:
    assert 'id="verdict"' in page(tmp_path, rich() | {key: value}, found(5))


def test_writing_is_repeatable_and_atomic(tmp_path: Path) -> None:
    first = page(tmp_path / "deep" / "a", rich(), found(20))
    assert first == page(tmp_path / "b", rich(), found(20))
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        report.write(tmp_path / "file" / "report.html", rich(), {})


# -- hostile text ------------------------------------------------------------------------------------------------


def poisoned(value: Any, text: str) -> Any:
    """The same structure with every string (and names of free keys) replaced, but for what steers the page."""
    if isinstance(value, dict):
        return {k: v if k in ("recipe", "method") else poisoned(v, text) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v, text) for v in value]
    return text + value if isinstance(value, str) else value


def hostile() -> tuple[dict[str, Any], dict[str, Any]]:
    result, details = rich(), found(120, 6)
    text = "".join(HOSTILE)
    result = poisoned(result, text)
    result["trials"][0]["name"] = "base"
    result["protocol"] = {text: text}
    result["chosen"] = copy.deepcopy(rich()["chosen"])
    return result, poisoned(details, text)


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    html = page(tmp_path, *hostile())
    assert html.count("<script") == 3 and html.count("</script") == 3
    assert "<img" not in html and "{{7*7}}" in html and "<a " not in html
    data = embedded(html)
    assert all(row[2].startswith(HOSTILE[0]) for row in data["examples"]["rows"])
    drawn = json.dumps(data["figures"])
    # Plotly reads a little HTML: a line break is the only tag that may be left.
    assert set(re.findall(r"<[^<>]*>", drawn)) <= {"<br>"} and "&lt;b&gt;" in drawn


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    html = page(tmp_path, rich(), found(20))
    assert not re.search(r"""(src|href|action)\s*=|url\(|@import|https?://""", html)
    assert "default-src 'none'" in html
    packed = re.search(r'id="plotly">([^<]+)<', html)
    assert packed and gzip.decompress(base64.b64decode(packed[1])).decode().startswith("/**\n* plotly.js")


# -- in a browser ------------------------------------------------------------------------------------------------


def chromium(tmp_path: Path, url: Path, *more: str) -> str:
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", *more, url.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def dump(tmp_path: Path, result: dict[str, Any], details: dict[str, Any]) -> str:
    """The page's DOM after drawing, as shown in a frame as wide as a small phone.

    A headless window may have a least width, so a page around the report holds it at 360 pixels. The report's DOM is
    written out as text, after each filter has been pressed and its first row's range read.
    """
    inner = page(tmp_path, result, details)
    probe = r"""
      const frame = document.querySelector("iframe"), packed = "%s";
      frame.srcdoc = new TextDecoder().decode(Uint8Array.from(atob(packed), (c) => c.charCodeAt(0)));
      const wait = setInterval(() => {
        const page = frame.contentDocument;
        if (page?.documentElement.dataset.ready !== "yes") return;
        clearInterval(wait);
        const ranges = [...page.querySelectorAll("button[data-kind]")].map((button) => {
          button.click();
          return [button.dataset.kind, page.querySelector("#range").textContent];
        });
        const wide = [...page.querySelectorAll("body *")].filter((e) => !e.closest(".scroll, svg, script, style") &&
          e.getBoundingClientRect().right > 360.5).map((e) => e.outerHTML.slice(0, 80));
        document.querySelector("#found").textContent = btoa(unescape(encodeURIComponent(JSON.stringify({
          title: page.title, overflow: page.documentElement.dataset.overflow, ranges, wide,
          images: page.images.length, links: page.links.length,
          waiting: page.querySelectorAll(".waiting").length,
          plots: [...page.querySelectorAll(".plot")].filter((p) => p.querySelector(".main-svg")).length,
          places: page.querySelectorAll(".plot").length, text: page.body.innerText,
          labels: [...page.querySelectorAll(".main-svg text")].map((t) => t.textContent),
          anchors: page.querySelectorAll("svg a").length }))));
      }, 50);"""
    around = tmp_path / "around.html"
    around.write_text(
        '<!doctype html><meta charset="utf-8"><iframe style="width:360px;height:840px;border:0"></iframe>'
        f'<p id="found"></p><script>{probe % base64.b64encode(inner.encode()).decode()}</script>', encoding="utf-8")
    match = re.search(r'id="found">([^<]+)<', chromium(tmp_path, around, "--dump-dom"))
    assert match, "the report did not become ready"
    return base64.b64decode(match[1]).decode()


@pytest.mark.browser
@no_browser
def test_browser_draws_every_plot_and_filters_examples(tmp_path: Path) -> None:
    details = found()
    seen = json.loads(dump(tmp_path, rich(), details))
    assert seen["title"] == "sst2 · whet report"
    assert (seen["plots"], seen["places"], seen["waiting"]) == (5, 5, 0)
    assert (seen["overflow"], seen["wide"]) == ("0", [])
    counts = {k: n for k, _, n in view.examples(details, view.Scale("accuracy", True, True)).filters}
    assert seen["ranges"] == [[k, f"1–{min(50, n)} of {n}"] for k, n in counts.items()]
    assert {"base 71.0", "finetune(rank=16)", "+21.8"} <= set(seen["labels"])


@pytest.mark.browser
@no_browser
def test_browser_shows_hostile_text_as_text(tmp_path: Path) -> None:
    seen = json.loads(dump(tmp_path, *hostile()))
    assert "whet report" in seen["title"] and seen["title"].startswith("</script><script>")
    assert (seen["images"], seen["links"], seen["anchors"]) == (0, 0, 0)
    assert seen["plots"] == seen["places"] == 5 and seen["overflow"] == "0" and seen["wide"] == []
    assert "{{7*7}}" in seen["text"] and "<b>bold</b>" in seen["text"]
    assert any("</script>" in label for label in seen["labels"])


@pytest.mark.browser
@no_browser
@pytest.mark.parametrize("case", range(len(MINIMAL)))
def test_browser_shows_minimal_pages(tmp_path: Path, case: int) -> None:
    seen = json.loads(dump(tmp_path, *MINIMAL[case]))
    assert seen["places"] == 0 and seen["overflow"] == "0" and "How it was measured" in seen["text"]


def test_what_methods_noted_is_told_in_words(tmp_path: Path) -> None:
    from whet.report.findings import findings, sentences

    notes = {
        "fit": {"verdict": "overfitting", "best": 0.25, "last": 0.5, "train_before": 0.3, "train_after": 0.1},
        "twice_the_data": {"rows": 60, "now": 0.62, "twice": 0.49, "low": 0.4, "high": 0.55},
        "row_tokens": {"median": 41, "p95": 60, "most": 1200}, "duplicates": 3, "shortened": 0,
        "suspects": [{"id": "r<1>", "label": "good", "rather": "bad", "chance": 0.97}],
        "quantized": {"was": 269_000_000, "bytes": 88_400_000, "kept_in_8": 2, "left_in_16": 5_000_000,
                      "layers": [{"layer": "q_proj", "error": 0.191}]},
        "phrasings": {"taught": {"seen": 97.0, "unseen": 90.5, "ms": 35.2},
                      "looked up": {"seen": 80.0, "unseen": 79.0, "ms": 1200.0}, "n": 24}, "seen": ["{}?"],
        "before": {"mixed": 0.66, "reward": 0.42}, "why": "no better beyond noise", "artifact": "abc",
    }  # fmt: skip
    assert sentences(notes) == [
        "overfitting: loss on validation rows 0.250 at best and 0.500 in the end, on the rows trained on 0.300, then "
        "0.100", "twice the rows would bring the loss from 0.620 to 0.490 [0.400, 0.550]",
        "rows of 41 tokens in the median, 1,200 at most", "duplicates: 3",
        "1 rows left out for a label that looks wrong, the surest: r<1> (good, rather bad)",
        "269 MB became 88.4 MB, 2 layers kept in 8 bits, tables of 5 MB left in 16; the largest errors of layers' "
        "outputs: q_proj 19.1 %",
        "24 facts, in phrasings that were trained on and in others, % right: taught 97.0 and 90.5 (35 ms an answer), "
        "looked up 80.0 and 79.0 (1,200 ms an answer)",
        "before: mixed 0.66, reward 0.42", "why: no better beyond noise",
    ]  # fmt: skip
    result = rich()
    result["trials"][-2]["notes"] = notes
    html = page(tmp_path, result, found(5))
    assert "r&lt;1&gt; (good, rather bad)" in html and "r<1>" not in html
    for key in notes:
        for odd in (None, [], {}, "text", 3, [[1]], {"layers": [3], "best": "x", "verdict": 2}):
            result["trials"][-2]["notes"] = notes | {key: odd}
            assert len(findings(result)) == 1
