"""The main job on the fake engine: the whole route, its result, its resumption and what it refuses."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet import documents, embed, improve, probe, search
from whet.baselines import Baseline
from whet.engine import Spent
from whet.errors import ArtifactError, EngineError, MethodError, StoreError, TaskError, WhetError
from whet.feedback import Judged
from whet.methods import Run, make
from whet.methods.fewshot import FewShot
from whet.methods.finetune import FineTune
from whet.methods.prompting import Prompting
from whet.metrics import Outcome, get
from whet.model import ModelRef, Transform, resolve
from whet.progress import Plain, Silent, Standing, apart, figure
from whet.report import verdict
from whet.report.findings import sentences
from whet.retention import Lost
from whet.scorecard import Scorecard, alike
from whet.search import Wish, base_system, limits, plan, race, training
from whet.search.arms import Arm, cheap_arms, combined, halving, left_out, neighbours, prompting_recipes
from whet.search.budget import Rates, affordable, estimate, measure, seconds
from whet.search.out import _gains, _selection, _trained, details
from whet.search.plan import apportion
from whet.search.race import Race, Trial
from whet.search.recipe import Recipe, parse, recipe
from whet.splits import shared_order
from whet.store import Store, code
from whet.system import Decoding, System, load
from whet.task import Example, Learnable, Limits, Splits
from whet.task import load as load_task

WORDS = {"good": ["fine", "great", "lovely", "bright"], "bad": ["awful", "poor", "dull", "grim"]}
THINGS = ["film", "book", "play", "song", "meal", "hotel", "train", "game", "car", "house"]
TIMES = ("seconds", "cost_seconds", "recipe_seconds", "training_seconds", "wall_seconds", "latency_ms", "memory_bytes",
         "rates", "plan")  # fmt: skip


def write_task(folder: Path, train: int = 240, test: int = 80, **header: object) -> Path:
    """A small sentiment task whose labels follow from the words that stand in the prompts."""
    draw = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"name": "toy", "instruction": "Say whether it is good or bad.", "metric": "accuracy",
                "labels": ["good", "bad"], **header}  # fmt: skip
    (folder / "task.yaml").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    for name, count, start in (("train", train, 0), ("test", test, 5000)):
        rows = []
        for i in range(count):
            label = draw.choice(sorted(WORDS))
            text = f"the {draw.choice(THINGS)} {start + i} was {draw.choice(WORDS[label])}, {draw.choice(WORDS[label])}"
            rows.append(json.dumps({"id": f"{name}{i}", "prompt": text, "completion": label}))
        if rows:
            (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(autouse=True)
def without_embedder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the sentence embedder takes seconds: only the tests that ask for it have it."""
    if "embedder" not in request.keywords:
        monkeypatch.setattr("whet.embed.available", lambda: False)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path / "toy")


def timeless(body: object) -> object:
    """A result without what the clock says."""
    if isinstance(body, dict):
        return {k: timeless(v) for k, v in body.items() if k not in TIMES}
    clocked = "embedding, indexing and estimating the arms took"  # a note of slow machines
    return [timeless(v) for v in body if not str(v).startswith(clocked)] if isinstance(body, list) else body


@pytest.mark.embedder
def test_the_whole_route(task: Path, tmp_path: Path) -> None:
    made = improve(task, model="fake:keyword", budget="2m", out=tmp_path / "out", home=tmp_path / "home")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result == json.loads(json.dumps(made.result))
    named = {"task", "model", "seed", "budget_s", "spent", "diagnosis", "baselines", "trials", "chosen", "confirm"}
    assert named <= set(result)
    assert {t["name"] for t in result["trials"]} >= {"base", "calibrate", "fewshot", "fewshot+calibrate"}
    assert result["confirm"]["improved"] and result["confirm"]["low"] > 0 and result["confirm"]["n"] == 80
    assert result["confirm"]["chosen"]["score"] > result["confirm"]["base"]["score"]
    assert {b["name"] for b in result["baselines"]} >= {"majority", "tfidf_logistic"}
    assert [t for t in result["left_out"] if t["method"] == "finetune"]  # a fake model has no weights to tune
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    again = load(tmp_path / "out" / "system", tmp_path / "other")
    assert again.fingerprint == made.system.fingerprint
    assert again.answer("the film 9 was great, lovely") == "good"


@pytest.mark.parametrize(("higher", "shrinkage"), [(True, 0.125), (False, -0.125)])
def test_what_select_promised_stands_beside_what_sealed_rows_say(higher: bool, shrinkage: float) -> None:
    job: Any = SimpleNamespace(metric=SimpleNamespace(higher_is_better=higher))
    cards: Any = {"base": SimpleNamespace(score=0.25), "chosen": SimpleNamespace(score=0.75)}
    best: Any = SimpleNamespace(card=SimpleNamespace(score=0.875), against_base=SimpleNamespace(difference=0.625))
    assert _selection(job, best, {"difference": 0.5}, cards) == {
        "select": 0.875, "confirm": 0.75, "shrinkage": shrinkage, "select_gain": 0.625, "confirm_gain": 0.5,
    }  # fmt: skip
    assert _selection(job, best, None, {}) is _selection(job, None, {"difference": 0.0}, cards) is None


def test_one_seed_gives_one_result(task: Path, tmp_path: Path) -> None:
    first, second = (
        improve(task, model="fake:keyword", budget="2m", out=tmp_path / n, home=tmp_path / f"home-{n}") for n in "ab"
    )
    assert timeless(first.result) == timeless(second.result)


def test_finished_trials_are_not_run_again(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model": "fake:keyword", "budget": "2m", "out": tmp_path / "out", "home": tmp_path / "home"}
    first = improve(task, **settings)  # type: ignore[arg-type]

    from whet.system import System

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("answered again")

    (tmp_path / "out" / "result.json").unlink()
    monkeypatch.setattr(System, "answers", refuse)
    second = improve(task, **settings)  # type: ignore[arg-type]
    assert timeless(first.result) == timeless(second.result)


def test_settings_next_to_the_best_arms_are_tried_where_nothing_is_trained(task: Path, tmp_path: Path) -> None:
    settings = {"model": "fake:keyword", "budget": "2m", "home": tmp_path / "home"}
    made = improve(task, methods=("fewshot", "calibrate"), out=tmp_path / "a", **settings)  # type: ignore[arg-type]
    names = [t["name"] for t in made.result["trials"]]
    first = {r.name for r in prompting_recipes(load_task(task).split().learnable)}
    whole = [t for t in made.result["trials"] if t["name"] in first and t["examples"] == 48 and t["select"]]
    best = max(whole, key=lambda t: t["select"]["score"])
    near = {r.name for r in neighbours(parse(best["name"]))} - first
    assert near and near & set(names) and len(names) == len(set(names))
    assert any(p["arm"].startswith("settings next to") and p.get("most") for p in made.result["plan"])
    alone = improve(task, recipe="calibrate", out=tmp_path / "b", **settings)  # type: ignore[arg-type]
    assert [t["name"] for t in alone.result["trials"]] == ["base", "calibrate"]  # what was asked for by name alone


def test_neighbours_differ_in_one_setting_and_go_together() -> None:
    found = [r.name for r in neighbours(parse("fewshot(k=4,draw=1)+calibrate"))]
    assert {"fewshot(k=8,draw=1)+calibrate", "fewshot(k=4)+calibrate", "fewshot(k=4,order=raced,draw=1)+calibrate",
            "fewshot(k=4,draw=1)+calibrate(kind=domain)"} <= set(found)  # fmt: skip
    assert len(set(found)) == len(found) == 2 + 4 + 1 + 2 + 3
    assert [r.name for r in neighbours(parse("rag(threshold=0.3)"))][:2] == ["rag(k=1,threshold=0.3)",
                                                                            "rag(k=5,threshold=0.3)"]  # fmt: skip
    near = [r.name for r in neighbours(parse("fewshot(selection=nearest)"))]  # no draw changes these
    assert near and not any("draw" in name or "order" in name for name in near) and neighbours(Recipe()) == []


def test_other_code_runs_its_trials_anew(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model": "fake:keyword", "budget": "2m", "out": tmp_path / "out", "home": tmp_path / "home"}
    improve(task, **settings)  # type: ignore[arg-type]
    answered = []
    for module in ("whet.search", "whet.scorecard"):
        monkeypatch.setattr(f"{module}.code", lambda: "other")
    monkeypatch.setattr(System, "answers", lambda *a, plain=System.answers, **k: answered.append(a) or plain(*a, **k))
    improve(task, **settings)  # type: ignore[arg-type]  # the same folder is taken: what was asked is the same
    assert answered and code() == code()


@pytest.mark.embedder
@pytest.mark.parametrize("moment", [0, 5])
def test_a_killed_run_goes_on_and_ends_the_same(task: Path, tmp_path: Path, moment: int) -> None:
    whole = improve(task, model="fake:keyword", budget="2m", out=tmp_path / "whole", home=tmp_path / "h1")
    command = [sys.executable, "-m", "whet", "improve", str(task), "--model", "fake:keyword", "--budget", "2m", "--out",
               str(tmp_path / "out"), "--json"]  # fmt: skip
    environment = {**os.environ, "WHET_HOME": str(tmp_path / "h2")}
    begun = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert begun.stderr is not None
    seen = 0
    for line in begun.stderr:  # killed after so many arms have started
        seen += line.startswith(">")
        if seen > moment:
            break
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    begun.stderr.close()
    assert not (tmp_path / "out" / "result.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert timeless(json.loads(done.stdout)) == timeless(json.loads(json.dumps(whole.result)))


def test_several_models_are_raced(task: Path, tmp_path: Path) -> None:
    made = improve(task, model=["fake:hash", "fake:keyword"], budget="2m", out=tmp_path / "o", home=tmp_path / "h")
    assert made.system.model.base == "fake:keyword"
    assert {"base [fake:hash]", "base [fake:keyword]"} <= {t["name"] for t in made.result["trials"]}


def test_the_order_of_models_decides_nothing(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.search.measure_rates", lambda *_: Rates(435, 60, 180))
    made = [improve(task, model=["fake:hash", "fake:keyword"][::way], budget="3m", out=tmp_path / f"o{way}",
                    home=tmp_path / "h") for way in (1, -1)]  # fmt: skip
    tried = [{t["name"]: t["examples"] for t in one.result["trials"]} for one in made]
    assert tried[0] == tried[1]
    one, other = ({n.partition(" [")[0] for n in tried[0] if model in n} for model in ("fake:hash", "fake:keyword"))
    first = {r.name for r in prompting_recipes(load_task(task).split().learnable)}  # what comes next is of the best one
    assert one & first == other & first and len(one & first) > 3
    assert made[0].result["chosen"]["name"] == made[1].result["chosen"]["name"]


def test_the_model_whose_weights_are_at_hand_is_trained(
    task: Path, tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whet.search.measure_rates", lambda *_: Rates(20_000, 2_000, 5_000))
    made = improve(task, model=["fake:keyword", model_folder], budget="1m", methods=["finetune"], out=tmp_path / "o",
                   home=tmp_path / "h")  # fmt: skip
    trial = next(t for t in made.result["trials"] if t["name"] == "finetune")
    assert trial["status"] == "done" and trial["spent"]["trained_tokens"] > 0


def test_a_model_that_is_slower_is_priced_at_its_own_rates(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"fake:keyword": 4000.0, "fake:hash": 400.0}
    monkeypatch.setattr("whet.search.measure_rates", lambda base, *_: Rates(*[speeds[base.model.base]] * 3))
    made = improve(task, model=[*speeds], budget="3m", methods=["fewshot"], out=tmp_path / "o", home=tmp_path / "h")
    costs = {t["name"]: t["cost_seconds"] for t in made.result["trials"]}
    assert costs["base [fake:hash]"] == pytest.approx(10 * costs["base [fake:keyword]"])


def test_where_no_training_comes_about_arms_that_were_left_out_for_it_are_tried(
    task: Path, tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whet.search.measure_rates", lambda *_: Rates(200, 200, 2_000))
    monkeypatch.setattr(training, "enter", lambda *_: None)
    made = improve(task, model=model_folder, budget="4m", methods=["finetune", "fewshot", "calibrate"],
                   out=tmp_path / "o", home=tmp_path / "h")  # fmt: skip
    planned = {p["arm"] for p in made.result["plan"]}
    tried = {t["name"] for t in made.result["trials"]}
    assert "finetune" in planned and tried - planned  # more than the tenth that the plan had left to them
    assert not tried & {d["method"] for d in made.result["left_out"]}


def test_arms_left_out_by_estimate_are_tried_while_measured_time_is_left(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    plain = plan.planned
    monkeypatch.setattr("whet.search.measure_rates", lambda *_: Rates(450, 450, 450))
    monkeypatch.setattr(plan, "planned", lambda job: (made.append(job), plain(job))[1])
    said = Lines()
    result = improve(task, model="fake:keyword", budget="4m", watch=said, out=tmp_path / "o",
                     home=tmp_path / "h").result  # fmt: skip
    planned, tried = {p["arm"] for p in result["plan"]}, {t["name"] for t in result["trials"]}
    wanted = {r.name for r in prompting_recipes(load_task(task).split().learnable) if "prompting" not in r.name}
    later = (tried - planned) & wanted
    assert later  # nothing is trained here, and no training was planned
    assert all(any(f"left out for now: {name}:" in line for line in said.said) for name in later)
    assert not tried & {d["method"] for d in result["left_out"]}
    (job,) = made
    assert job.race.left >= 0 and job.race.seconds + job.reserve == pytest.approx(240)  # and confirming keeps its part
    still = [d["why"] for d in result["left_out"] if "would take" in d["why"]]
    assert still and all("trying it would take" in why for why in still)  # more than what is left in the end


def test_demonstrations_that_lie_near_are_planned_before_prompts_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.embed.available", lambda: True)
    rows = tuple(Example(str(n), f"p{n}", ("x", "y")[n % 2]) for n in range(40))
    for labels in (("x", "y"), ()):
        data = Learnable("t", "say", "exact_match", labels, rows, documents="d.jsonl")
        names = [r.name for r in prompting_recipes(data)]
        near = next(n for n, name in enumerate(names) if "selection=nearest" in name)
        assert near < names.index("rag(k=1)") < names.index("prompting")


def test_halving_takes_at_most_what_its_dearer_half_does() -> None:
    arms = [Arm(Recipe(), None, "", 1.0, seconds, 1.0 + seconds / 4) for seconds in (4.0, 8.0)]  # type: ignore[arg-type]
    assert halving(arms, 400) == pytest.approx(2 + 12 / 4 + 8 / 4 + 8 / 2)
    assert halving(arms[:1], 400) == arms[0].cost and halving(arms, 19) == 14  # few rows are one rung


def test_a_training_is_planned_with_what_its_own_prompts_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: str
) -> None:
    base = System(resolve(model_folder), "Say it.", decoding=Decoding(("good", "bad"), True), home=tmp_path)
    data = Learnable("toy", "Say it.", "accuracy", ("good", "bad"))
    long = "the film was fine and great and lovely " * 20
    race = SimpleNamespace(speed=lambda _: Rates(100, 100, 100), data=data,
                           select=[Example(f"r{i}", f"film {i}", "good") for i in range(20)])  # fmt: skip
    job = SimpleNamespace(run=Run(Store(tmp_path)), race=race, metric=SimpleNamespace(name="accuracy"))
    plain = training.scoring(job, Recipe(), base)  # type: ignore[arg-type]
    assert training.scoring(job, recipe("finetune"), base) == plain > 0  # type: ignore[arg-type]

    def reads(self: object, system: System, *_: object) -> System:
        return replace(system, instruction=long)

    rag = recipe("rag").methods[0]
    monkeypatch.setattr(type(rag), "apply", reads)
    monkeypatch.setattr(Recipe, "lacks", lambda *_: "")
    assert training.scoring(job, Recipe((rag, *recipe("finetune").methods)), base) > plain + 0.5  # type: ignore[arg-type]


def test_what_a_training_writes_is_priced_by_the_answers_of_train(tmp_path: Path) -> None:
    base = System(resolve("fake:echo"), decoding=Decoding(max_tokens=100), home=tmp_path)
    rows = tuple(Example(str(n), f"row {n}", "one two three" if n < 500 else "word " * 9) for n in range(1000))
    race = SimpleNamespace(speed=lambda _: Rates(1e9, 1, 1), data=Learnable("toy", "", "rouge_l", train=rows),
                           select=list(rows[:10]))  # fmt: skip
    job: Any = SimpleNamespace(run=Run(Store(tmp_path)), race=race, metric=SimpleNamespace(name="rouge_l"))
    each = job.run.session(base.model).count(["one two three", "word " * 9])  # half of train has either, in that order
    assert training.scoring(job, Recipe(), base) == pytest.approx(10 * 50)
    assert training.scoring(job, recipe("finetune"), base) == pytest.approx(10 * (1 + sum(each) / 2), abs=0.5)


@pytest.mark.parametrize("price", [0.5, 3.0])
def test_the_budget_that_is_said_to_take_all_sealed_rows_takes_them(price: float) -> None:
    rows = tuple(Example(str(n), f"row {n}", "x") for n in range(600))
    splits = Splits(Learnable("t", "", "accuracy"), rows[:50], rows)

    def parts(minutes: int, each: float = price) -> Any:
        return apportion(splits, False, Wish(budget=60.0 * minutes), lambda some: each * len(some), 5.0, 0.0)

    said = re.search(r"--budget (\d+)m takes them all", " ".join(parts(1).notes))
    assert said and len(parts(1).confirm) == 200 and len(parts(int(said[1])).confirm) == 600
    assert len(parts(int(said[1]) - 1).confirm) < 600
    assert len(parts(1, 0.001).confirm) == 600  # however little is left beside what is fixed


def test_a_metric_that_is_broken_ends_the_search_at_its_base(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "toy", train=60, test=20, labels=None, metric="m.py:f")
    (folder / "m.py").write_text("def f(answer, example):\n    return answer.lowered()\n")
    settings: Any = {"model": "fake:echo", "budget": "1m", "home": tmp_path / "home", "trust": True}
    with pytest.raises(TaskError, match="fails on every example, right answers included.*lowered"):
        improve(folder, out=tmp_path / "out", **settings)
    (folder / "m.py").write_text("def f(answer, example):\n    return 1 / (answer == example.completion)\n")
    found = improve(folder, out=tmp_path / "again", methods=("fewshot",), **settings)  # only wrong answers fail
    assert found.result["confirm"]["base"]["score"] == 0


def test_a_recipe_by_name_and_a_choice_of_methods(task: Path, tmp_path: Path) -> None:
    by_recipe = improve(task, model="fake:keyword", budget="2m", recipe="fewshot(k=4)+calibrate", out=tmp_path / "a",
                        home=tmp_path / "h")  # fmt: skip
    assert {t["name"] for t in by_recipe.result["trials"]} == {"base", "fewshot(k=4)+calibrate"}
    by_method = improve(task, model="fake:keyword", budget="2m", methods=["calibrate"], out=tmp_path / "b",
                        home=tmp_path / "h")  # fmt: skip
    tried = {t["name"] for t in by_method.result["trials"]}
    kinds = ("contextual", "domain", "fitted")
    assert tried == {"base", "calibrate", *(f"calibrate(kind={kind})" for kind in kinds)}


def test_nothing_that_helps_hands_over_the_base(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t")
    made = improve(folder, model="fake:hash", budget="2m", methods=["calibrate"], out=tmp_path / "o",
                   home=tmp_path / "h")  # fmt: skip
    assert made.result["confirm"]["improved"] is False and made.result["chosen"]["recipe"] == []
    assert made.system.decoding.prior == ()
    assert made.result["confirm"]["candidate"] is made.result["confirm"]["smallest_detectable"] is None
    assert "No candidate beat the base model on the select split" in verdict(made.result)


def test_a_setting_of_several_values_is_read_as_it_is_named() -> None:
    found = parse("fewshot(selection=fixed,ids=a, b,order=grouped)+calibrate")
    assert found.methods[0].ids == ("a", "b")  # type: ignore[attr-defined]
    assert parse(found.name) == found
    with pytest.raises(MethodError, match="cannot read 'a'"):
        parse("fewshot(a,k=2)")


@pytest.mark.parametrize("asked, trained", [("finetune", True), ("quantize", False)])
def test_a_recipe_that_changes_weights_is_planned_and_bounded(
    asked: str, trained: bool, task: Path, tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whet.search.measure_rates", lambda *_: Rates(5_000, 2_000, 400 if trained else 1))
    made = improve(task, model=model_folder, budget="1m", recipe=asked, out=tmp_path / "o", home=tmp_path / "h")
    trial = next(t for t in made.result["trials"] if t["name"] == asked)
    assert trial["status"] == "done" and (0 < trial["spent"]["trained_tokens"] < 24_000) is trained
    planned = next(p for p in made.result["plan"] if p["arm"] == asked)
    assert planned["minutes"] > 0 and ("most" in planned) is trained
    assert not any(d["method"] == asked for d in made.result["left_out"])


def test_without_rows_to_select_by_a_training_is_bounded_or_named(
    tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whet.search.measure_rates", lambda *_: Rates(5_000, 2_000, 200))
    folder = write_task(tmp_path / "t", train=0, test=12, labels=None, metric="token_f1")
    rows = [{"text": f"the film {n} was great and long and told of many people in the city"} for n in range(900)]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = {"model": model_folder, "budget": "1m", "home": tmp_path / "h"}
    made = improve(folder, recipe="finetune", out=tmp_path / "a", **settings)  # type: ignore[arg-type]
    assert 0 < made.result["trials"][0]["spent"]["trained_tokens"] < 12_000
    made = improve(folder, out=tmp_path / "b", **settings)  # type: ignore[arg-type]
    assert any(d["method"] == "finetune" and "no rows to select by" in d["why"] for d in made.result["left_out"])
    # The only candidate must keep the earlier tasks, too.
    lost = Lost("older", 40, 0.9, 0.5, 40.0, 30.0, 50.0, 1.0, 48.0, 9.0, False)
    monkeypatch.setattr("whet.search.forgetting", lambda *_: (lost,))
    made = improve(folder, recipe="finetune", out=tmp_path / "c", **settings)  # type: ignore[arg-type]
    [trial] = made.result["trials"]
    assert (trial["status"], trial["forgetting"], made.result["chosen"]["name"]) == ("refused", 40.0, "base")
    assert "older" in trial["why"] and made.result["confirm"]["candidate"] is None


def test_tasks_with_parts_missing(tmp_path: Path) -> None:
    only_test = write_task(tmp_path / "a", train=0)
    made = improve(only_test, model="fake:keyword", budget="2m", out=tmp_path / "oa", home=tmp_path / "h")
    assert made.result["trials"] == [] and made.result["confirm"]["n"] == 80
    only_train = write_task(tmp_path / "b", test=0)
    made = improve(only_train, model="fake:keyword", budget="2m", out=tmp_path / "ob", home=tmp_path / "h")
    assert made.result["confirm"] is None and made.result["chosen"]["recipe"]


@pytest.mark.skipif(not embed.available(), reason="the embedding model is not installed")
def test_a_task_without_train_rows_is_looked_up(tmp_path: Path) -> None:
    folder = tmp_path / "lookup"
    folder.mkdir()
    (folder / "task.yaml").write_text("metric: ndcg@10\ndocuments: documents.jsonl\n")
    names = [f"thing{n}" for n in range(24)]
    rows = [{"id": n, "text": f"The {n} is kept in the {n} box."} for n in names]
    (folder / "documents.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    test = [{"prompt": f"Where is the {n}?", "evidence": [n]} for n in names]
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in test))
    made = improve(folder, model="fake:hash", budget="60s", out=tmp_path / "out")
    assert made.result["chosen"]["name"] == "rag" and made.result["confirm"]["improved"]
    assert made.result["confirm"]["chosen"]["score"] > 0.9 and made.result["confirm"]["base"]["score"] == 0
    assert any("no rows to select by" in note for note in made.result["notes"])
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.embedder
@pytest.mark.skipif(not embed.available(), reason="the embedding model is not installed")
def test_how_passages_are_read_is_told_of_sealed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "looked"
    folder.mkdir()
    (folder / "task.yaml").write_text("metric: exact_match\ndocuments: documents.jsonl\n")
    names = [f"thing{n}" for n in range(20)]
    documents_ = [{"id": n, "text": f"The {n} is kept in the {n} box."} for n in names]
    (folder / "documents.jsonl").write_text("".join(json.dumps(r) + "\n" for r in documents_))
    test = [{"prompt": f"Where is the {n}?", "completion": f"{n} box", "evidence": [n]} for n in names]
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in test))
    # No rows to select by: the one recipe that was asked for is confirmed, and not better than the base.
    made = improve(folder, model="fake:hash", budget="60s", recipe="rag(k=1)", out=tmp_path / "out")
    assert made.result["reading"] is None  # of the base, which is handed over
    monkeypatch.setattr(search, "_confirmed", lambda *_: {"improved": True, "difference": 0.0})
    made = improve(folder, model="fake:hash", budget="60s", recipe="rag(k=1)", out=tmp_path / "again")
    read = made.result["reading"]
    assert read["n"] == 4 and read["recall"] > 50 and read["oracle"] is not None  # a fifth of the sealed rows


@pytest.mark.embedder
@pytest.mark.skipif(not embed.available(), reason="the embedding model is not installed")
def test_rankings_are_raced_without_a_model_or_training(tmp_path: Path, model_folder: str) -> None:
    folder = tmp_path / "ranked"
    folder.mkdir()
    (folder / "task.yaml").write_text("metric: recall@5\ndocuments: documents.jsonl\n")
    names = [f"thing{n}" for n in range(60)]
    rows = [{"id": n, "text": f"The {n} is kept in the {n} box."} for n in names]
    (folder / "documents.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = [{"prompt": f"Where is the {n}?", "completion": f"box {n}", "evidence": [n]} for n in names]
    for name, some in (("train", asked[:40]), ("test", asked[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    made = improve(folder, model=model_folder, budget="20s", out=tmp_path / "out", home=tmp_path / "h")
    trials = {t["name"]: t for t in made.result["trials"]}
    assert {"base", "rag", "rag(mix=words)"} <= set(trials)
    assert made.result["spent"]["trained_tokens"] == made.result["spent"]["prefilled_tokens"] == 0
    assert made.result["confirm"]["improved"] and made.result["confirm"]["chosen"]["score"] == 1
    assert [b["name"] for b in made.result["baselines"]] == ["bm25"] and made.result["baselines"][0]["confirm"] == 1


def test_what_failed_is_tried_again_and_what_it_cost_is_spent(
    task: Path, tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": model_folder, "budget": "2m", "methods": ["finetune"], "home": tmp_path / "h"}
    import whet.train.lesson as lesson

    trained = lesson.train

    def fails(*args: object, **more: object) -> None:
        trained(*args, **more)  # type: ignore[arg-type]
        raise MethodError("the loss explodes at step 3")

    with monkeypatch.context() as patch:
        patch.setattr(lesson, "train", fails)
        made = improve(task, out=tmp_path / "a", **settings)  # type: ignore[arg-type]
    tried = {t["name"]: t for t in made.result["trials"]}["finetune"]
    assert tried["status"] == "failed" and "explodes" in tried["why"] and tried["spent"]["trained_tokens"] > 0
    assert tried["cost_seconds"] > 0
    again = improve(task, out=tmp_path / "b", **settings)  # type: ignore[arg-type]
    assert {t["name"]: t["status"] for t in again.result["trials"]}["finetune"] == "done"


@pytest.mark.embedder
@pytest.mark.skipif(not embed.available(), reason="the embedding model is not installed")
def test_an_arm_without_its_package_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: str
) -> None:
    folder = tmp_path / "facts"
    folder.mkdir()
    (folder / "task.yaml").write_text("metric: exact_match\ndocuments: documents.jsonl\n")
    (folder / "documents.jsonl").write_text('{"id": "a", "text": "The lamp is red."}\n')
    for name, count in (("train", 40), ("test", 20)):
        rows = [{"prompt": f"{name} question {n}", "completion": f"answer {n % 4}"} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setitem(sys.modules, "bm25s", None)  # as if it were not installed
    methods = ("rag", "fewshot", "finetune")
    watch = Lines()
    made = improve(folder, model=model_folder, budget="2m", out=tmp_path / "out", methods=methods, home=tmp_path / "h",
                   watch=watch)  # fmt: skip
    assert any(s.startswith("rag(k=1)+finetune failed: ") and "bm25s" in s for s in watch.said)
    left = [one["why"] for one in made.result["left_out"] if one["method"].startswith("rag")]
    assert left and all("needs the package bm25s" in why for why in left)
    trials = {t["name"]: t["status"] for t in made.result["trials"]}
    assert trials["rag(k=1)+finetune"] == "failed" and trials["finetune"] == "done"


@pytest.mark.embedder
def test_documents_that_cannot_be_had_leave_the_other_arms(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "toy", documents="http://127.0.0.1:9/page")
    made = improve(folder, model="fake:keyword", budget="2m", out=tmp_path / "out", home=tmp_path / "home")
    assert any(one["method"].startswith("rag") for one in made.result["left_out"])
    assert made.result["confirm"]["improved"]


@pytest.mark.parametrize(
    ("part", "name", "text", "says"),
    [("documents", "all.pdf", "no pdf", "all.pdf cannot be read"), ("documents", "d.jsonl", "{", "d.jsonl"),
     ("knowledge", "k.ttl", "<a> <b", "k.ttl"), ("glossary", "g.tsv", "one cell\n", "g.tsv line 1")],
)  # fmt: skip
def test_a_source_that_cannot_be_read_is_named_before_anything_is_spent(
    tmp_path: Path, part: str, name: str, text: str, says: str
) -> None:
    folder = write_task(tmp_path / "toy", **{part: name})
    (folder / name).write_text(text)
    settings = {"model": "fake:keyword", "budget": "2m", "out": tmp_path / "out", "home": tmp_path / "home"}
    with pytest.raises(TaskError, match=says):
        improve(folder, **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    improve(folder, methods=["calibrate"], **settings)  # type: ignore[arg-type]  # nothing looks into it


class Lines(Silent):
    """What was said, arms among it."""

    def __init__(self) -> None:
        self.said = list[str]()
        self.left = list[tuple[str, float | None]]()

    def say(self, text: str) -> None:
        self.said.append(text)

    def arm(self, name: str, left: float | None = None) -> None:
        self.said.append(f"> {name}")
        self.left.append((name, left))


@pytest.mark.embedder
@pytest.mark.skipif(not embed.available(), reason="the embedding model is not installed")
def test_sources_that_change_unseen_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(shelf: str) -> None:
        with sqlite3.connect(folder / "s.db") as base:
            base.execute("drop table if exists things")
            base.execute("create table things (id text, text text)")
            base.executemany("insert into things values (?, ?)", [(str(n), f"Item {n} {shelf}.") for n in range(30)])

    folder = write_task(tmp_path / "toy", documents="sqlite:///s.db SELECT id, text FROM things")
    seen, asked = [], []
    monkeypatch.setattr("whet.documents._query", lambda *a, once=documents._query: asked.append(a) or once(*a))
    for shelf in ("old", "new"):
        fill(shelf)
        made = improve(folder, model="fake:keyword", budget="2m", out=tmp_path / shelf, home=tmp_path / "home",
                       recipe="rag", trust=True)  # fmt: skip
        rag = next(t for t in made.result["trials"] if t["name"] == "rag")
        seen.append(rag["status"])
    corpora = {p.parent.name for p in (tmp_path / "home" / "artifacts").glob("*/current")}
    assert seen == ["done", "done"] and len(corpora) == 2
    assert len(asked) == 2  # once a run, however many look into it


def test_the_base_is_measured_however_late_it_is(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.search.race.time", SimpleNamespace(monotonic=lambda: time.monotonic() + 1e6))
    made = improve(task, model="fake:keyword", budget="2m", out=tmp_path / "out", home=tmp_path / "home")
    status = {t["name"]: t["status"] for t in made.result["trials"]}
    assert status.pop("base") == "done" and set(status.values()) == {"truncated"}


@pytest.mark.parametrize(("after", "test"), [(0, 80), (1, 80), (1, 0)])  # arms of the second rung, sealed rows
def test_what_was_scored_before_the_clock_stopped_stands(
    after: int, test: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Race.enter

    def enter(self: Race, *args: Any, **known: Any) -> Trial:
        later.append(known.get("rung", 0) > 0)
        if sum(later) > after:
            self.deadline = 0.0
        return plain(self, *args, **known)

    later: list[bool] = []
    monkeypatch.setattr(Race, "enter", enter)
    made = improve(write_task(tmp_path / "wide", train=900, test=test), model="fake:keyword", budget="2m",
                   out=tmp_path / "out", home=tmp_path / "home")  # fmt: skip
    seen = {t["name"]: t for t in made.result["trials"] if t["status"] == "truncated"}
    assert seen and all(t["examples"] == 60 and t["select"] for t in seen.values())
    most = max(t["examples"] for t in made.result["trials"] if t["name"] != "base")
    chosen = next(t for t in made.result["trials"] if t["name"] == made.result["chosen"]["name"])
    assert chosen["examples"] == most == (90 if after else 60)
    assert made.result["confirm"]["improved"] if test else made.result["confirm"] is None


def test_a_base_that_cannot_answer_ends_the_run(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise EngineError("the server is gone")

    monkeypatch.setattr("whet.search.race.evaluate", gone)
    with pytest.raises(EngineError, match="gone"):
        improve(task, model="fake:keyword", budget="2m", out=tmp_path / "out", home=tmp_path / "home")


def test_a_run_whose_latency_cannot_be_measured_is_handed_over(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise ArtifactError("cannot measure it")

    monkeypatch.setattr("whet.search.measure", killed)
    made = improve(task, model="fake:keyword", budget="2m", out=tmp_path / "out", home=tmp_path / "home")
    assert made.result["confirm"]["improved"] and load(tmp_path / "out" / "system", made.system.home)
    assert any("latency and memory are not known" in note for note in made.result["notes"])


@pytest.mark.embedder
def test_texts_are_learnt_and_confirmed(tmp_path: Path, model_folder: str) -> None:
    folder, draw = tmp_path / "texts", random.Random(0)
    folder.mkdir()
    (folder / "task.yaml").write_text("metric: perplexity\n")
    for name, count in (("train", 300), ("test", 60)):
        rows = [{"text": " ".join(draw.choice(THINGS) for _ in range(20)) + f" {name} {n}"} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    made = improve(folder, model=model_folder, budget="40s", out=tmp_path / "out", home=tmp_path / "h")
    confirm = made.result["confirm"]
    assert confirm["improved"] and confirm["chosen"]["score"] < confirm["base"]["score"]
    assert "finetune" in made.result["chosen"]["name"] and confirm["difference"] > 0


def test_finished_trials_are_found_where_their_home_was_moved_and_made_anew_where_they_are_gone(
    task: Path, tmp_path: Path, model_folder: str
) -> None:
    settings = {"model": model_folder, "budget": "2m", "recipe": "finetune"}
    made = improve(task, out=tmp_path / "a", home=tmp_path / "h", **settings)  # type: ignore[arg-type]
    (tmp_path / "h").rename(tmp_path / "moved")
    again = improve(task, out=tmp_path / "b", home=tmp_path / "moved", **settings)  # type: ignore[arg-type]
    assert timeless(again.result["trials"]) == timeless(made.result["trials"])
    shutil.rmtree(tmp_path / "moved" / "artifacts")
    anew = improve(task, out=tmp_path / "c", home=tmp_path / "moved", **settings)  # type: ignore[arg-type]
    assert {t["name"]: t["status"] for t in anew.result["trials"]} == {"base": "done", "finetune": "done"}


def test_a_recipe_that_cannot_run_is_refused_before_anything_is_spent(task: Path, tmp_path: Path) -> None:
    class Closed(Silent):
        times = 0

        def close(self) -> None:
            self.times += 1

    watch = Closed()
    with pytest.raises(MethodError, match="rag cannot run"):
        improve(task, model="fake:keyword", recipe="rag", out=tmp_path / "out", home=tmp_path / "h", watch=watch)
    with pytest.raises(TaskError):
        improve(tmp_path / "typo", out=tmp_path / "out", home=tmp_path / "h", watch=watch)
    assert watch.times == 2


def test_the_latency_of_rankings_is_that_of_looking_up(
    tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    System(resolve(model_folder), home=tmp_path).save(tmp_path / "s")
    monkeypatch.setattr(System, "answers", None)  # no model is asked
    row = {"id": "a", "prompt": "Where?", "completion": "", "choices": [], "history": [], "text": None}
    monkeypatch.setattr(sys, "argv", ["probe", str(tmp_path / "s"), "recall@5"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([row])))
    probe.main()
    assert set(json.loads(capsys.readouterr().out)) == {"latency_ms", "memory_bytes"}


def test_a_distillation_may_have_a_bound_of_its_own(tmp_path: Path) -> None:
    seen: list[object] = []

    def method(name: str) -> Any:
        def apply(system: System, _: object, run: Run) -> System:
            seen.append((name, run.trained_tokens))
            return system

        return SimpleNamespace(name=name, needs=(), invalidates=(), apply=apply)

    both, run = Recipe((method("finetune"), method("distill"))), Run(Store(tmp_path), trained_tokens=50)
    base, data = System(resolve("fake:hash")), Learnable("t", "Say.", "accuracy", ())
    both.run(base, data, run, 20)
    both.run(base, data, run)
    assert seen == [("finetune", 50), ("distill", 20), ("finetune", 50), ("distill", 50)] and run.trained_tokens == 50


def test_what_other_arms_helped_with_is_added_to_the_best() -> None:
    others = [parse(t) for t in ("prompting(pool=6)", "fewshot(k=4)+calibrate", "fewshot(k=8)", "finetune")]
    assert [r.name for r in combined(parse("rag"), others)] == ["prompting(pool=6)+rag", "rag+fewshot(k=4)",
                                                               "rag+calibrate"]  # fmt: skip
    assert [r.name for r in combined(parse("fewshot+calibrate"), others)] == ["prompting(pool=6)+fewshot+calibrate"]
    assert combined(parse("finetune"), others) == [] and combined(parse("rag"), [parse("rag(k=1)")]) == []


def test_what_a_recipe_begins_with_is_made_and_paid_for_once(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, searched = load_task(task).split(), list[str]()
    apply = Prompting.apply

    def counted(self: Prompting, system: System, data: Learnable, run: Run) -> System:
        searched.append(self.name)
        return apply(self, system, data, run)

    monkeypatch.setattr(Prompting, "apply", counted)

    def raced(*names: str) -> list[Trial]:
        base = System(resolve("fake:keyword"), "Good or bad?", decoding=Decoding(("good", "bad"), True))
        run = Run(Store(tmp_path / "home"))
        rates = {base.model.content: Rates(1000.0, 100.0, 100.0)}
        one = Race("k", made.learnable, list(made.select), get("accuracy"), run.store, rates, 0, 600.0, Silent(), run)
        return [one.enter(parse(name) if name else Recipe(), base) for name in ("", *names)]

    search_of, alone, both = "prompting(pool=4,examples=16)", "calibrate", "prompting(pool=4,examples=16)+calibrate"
    _, first, second = raced(search_of, both)
    assert searched == ["prompting"] and second.notes["prompting"] == first.notes["prompting"]
    assert second.system.instruction == first.system.instruction and second.system.decoding.prior
    assert second.making == pytest.approx(first.making + second.cost) and second.cost > 0  # it pays for its calibration
    again = raced(search_of, both)
    assert searched == ["prompting"] and [t.cost for t in again[1:]] == [first.cost, second.cost]  # from the store
    assert raced(alone)[1].status == "done"


def test_limits_are_measured_on_rows_to_select_by(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("whet.search.limits.measure", lambda card, system, rows: seen.append(rows))
    job: Any = SimpleNamespace(
        task=SimpleNamespace(limits=Limits(latency=50.0)), watch=Silent(), splits=SimpleNamespace(confirm=["sealed"]),
        race=SimpleNamespace(left=1.0, aside=0.0, select=["select"]),
    )  # fmt: skip
    limits._measured(job, None, None)  # type: ignore[arg-type]
    assert seen == [["select"]]


def test_what_a_closed_model_and_a_new_one_have_spent_is_charged(tmp_path: Path) -> None:
    first, second = (SimpleNamespace(spent=Spent(prefilled_tokens=n)) for n in (100, 0))
    run = Run(Store(tmp_path), sessions={"start": first})  # type: ignore[dict-item]
    before = race._opened(run)
    first.spent, second.spent = Spent(prefilled_tokens=130), Spent(prefilled_tokens=7)
    run.sessions.pop("start")  # type: ignore[call-overload]
    run.sessions["tuned"] = second  # type: ignore[index,assignment]
    assert race._since(run, before).prefilled_tokens == 37


def test_no_more_models_are_held_than_the_race_needs(tmp_path: Path) -> None:
    base = resolve("fake:constant")
    trained = [base.add(Transform("adapter", str(n) * 64)) for n in range(4)]
    run = Run(Store(tmp_path))
    run.sessions.update({ref: object() for ref in (base, *trained)})  # type: ignore[misc]
    one = Race("", None, [], get("accuracy"), run.store, {}, 0, 60.0, Silent(), run)  # type: ignore[arg-type]

    def trial(ref: ModelRef, method: str, score: float) -> Trial:
        card = Scorecard(score, score, score, "accuracy", (), 0.0, 0, Spent(), {})
        return Trial(parse(method) if method else Recipe(), System(ref), 0, "done", "", 1, card, Spent(), 0.0, {}, None)

    one.trials += [trial(base, "", 0.1), trial(trained[0], "finetune", 0.9), trial(trained[1], "finetune(rank=8)", 0.5)]
    one.let_go(System(base), System(trained[2]))
    assert set(run.sessions) == {base, trained[0], trained[2]}


def test_curves_are_told_once_a_training_the_handed_over_recipes_first() -> None:
    def trial(name: str, loss: float | None) -> Trial:
        notes = {} if loss is None else {"curves": {"train": [[1, loss]], "validation": []}}
        return Trial(parse(name), System(resolve("fake:constant")), 0, "done", "", 1, None, Spent(), 0.0, notes, None)

    finetune, both, reads, more = "finetune", "finetune+calibrate", "rag(k=1)+finetune", "finetune+dpo"
    trials = [trial("fewshot", None), trial(finetune, 1.0), trial(both, 1.0), trial(more, 2.0), trial(reads, 3.0)]
    for handed, told in ((None, [finetune, more, reads]), (4, [reads, finetune, more]), (2, [finetune, more, reads]),
                         (3, [more, finetune, reads]), (0, [finetune, more, reads])):  # fmt: skip
        assert [t.name for t in _trained(trials, None if handed is None else trials[handed])] == told
    assert [t.name for t in _trained([trials[2]], trials[2])] == [both]  # tried with what stands behind it only


def test_perplexities_are_compared_per_token_of_the_first_model() -> None:
    def card(*tokens: float) -> Scorecard:
        found = tuple(Outcome(str(n), "", 12 / t, "", weight=t) for n, t in enumerate(tokens))
        return Scorecard(get("perplexity").aggregate(found), 0, 0, "perplexity", found, 0, 0, Spent(), {})

    few, many = card(4, 6), card(8, 12)  # both find the texts as likely, one in more tokens
    assert many.score < few.score == pytest.approx(alike(many, few, get("perplexity")).score)
    assert alike(few, few, get("perplexity")) is few


def test_rows_of_the_same_id_are_told_apart_in_perplexities() -> None:
    """As where a System carries rows of two files, both numbered from 1."""
    found = tuple(Outcome(f"test-{n % 2}", "", 2.0, "", weight=w) for n, w in enumerate((500, 400, 50, 60)))
    card = Scorecard(get("perplexity").aggregate(found), 0, 0, "perplexity", found, 0, 0, Spent(), {})
    assert alike(card, card, get("perplexity")) is card


def test_costs_are_estimated_from_rows_of_the_whole_file(tmp_path: Path) -> None:
    rows = [Example(id=str(n), prompt="word " * (12 if n < 100 else 600), completion="x") for n in range(500)]
    run = Run(Store(tmp_path))
    base = System(resolve("fake:keyword"), home=tmp_path)
    true = estimate(base, rows, run.session(base.model), sample=500).prefilled_tokens
    assert estimate(base, rows, run.session(base.model)).prefilled_tokens == pytest.approx(true, rel=0.25)


def test_a_prompt_that_stands_several_times_is_answered_and_priced_once_unless_drawn(tmp_path: Path) -> None:
    rows = [Example(str(n), f"name the {('lamp', 'chair', 'lamp', 'lamp')[n % 4]}", "x y") for n in range(40)]
    base = System(resolve("fake:echo"), decoding=Decoding(max_tokens=8), home=tmp_path)
    drawn = replace(base, decoding=replace(base.decoding, temperature=1.0))
    session = Run(Store(tmp_path)).session(base.model)
    assert estimate(base, rows, session).generated_tokens == 2 * 4
    assert estimate(base, rows, session, written=3.0).generated_tokens == 2 * 3
    assert estimate(base, rows, session, written=99.0).generated_tokens == 2 * 8
    assert estimate(drawn, rows, session).generated_tokens == 40 * 4
    told, judged = estimate(base, rows, session), estimate(base, rows, session, metric="win_rate")
    assert judged.generated_tokens == told.generated_tokens
    assert 2 * 4 < judged.prefilled_tokens - told.prefilled_tokens < told.prefilled_tokens + 2 * 4
    asked: list[int] = []
    plain = session.generate
    session.generate = lambda prompts, *more: asked.append(len(prompts)) or plain(prompts, *more)  # type: ignore
    said = [a.text for a in base.answers(rows, session)]
    assert asked == [2] and said[0] == said[2] != said[1]
    assert [a.text for a in base.answers(rows[:3], session)] == said[:3]
    drawn.answers(rows, session)
    assert asked == [2, 2, 40]


def test_no_arm_is_dropped_twice_by_the_same_rows(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[tuple[str, int | None]] = []
    plain = Race.enter
    monkeypatch.setattr(Race, "enter", lambda self, one, *a, **k: entered.append((one.name, k.get("examples")))
                        or plain(self, one, *a, **k))  # fmt: skip
    folder = write_task(tmp_path / "narrow", train=450)  # 90 rows of select: half of them are fewer than LEAST
    improve(folder, model="fake:keyword", budget="2m", out=tmp_path / "out", home=tmp_path / "home")
    assert len(set(entered)) == len(entered) and {n for _, n in entered} == {None, 60, 90}


def test_a_search_of_prompts_is_no_dearer_to_confirm(tmp_path: Path) -> None:
    base = System(resolve("fake:keyword"), "Say whether it is good or bad.", decoding=Decoding(("good", "bad"), True),
                  home=tmp_path)  # fmt: skip
    rows = [Example(f"r{i}", f"the film {i} was great", "good") for i in range(100)]
    data = Learnable("toy", "Say whether it is good or bad.", "accuracy", ("good", "bad"), tuple(rows))
    run, rates = Run(Store(tmp_path)), {base.model.content: Rates(1e3, 1e3, 1e3)}
    wish = Wish(methods=("prompting", "fewshot"))
    arms, *_ = cheap_arms(wish, [base], [""], data, rows, rates, run, 1e6)
    plain, shown = (estimate(base, rows, run.session(base.model)).prefilled_tokens / 1e3,
                    next(a for a in arms if a.recipe.name == "fewshot"))  # fmt: skip
    search = next(a for a in arms if a.recipe.name == "prompting")
    assert search.scoring == pytest.approx(plain) and search.once > 2 * plain and not search.shared
    assert search.cost == search.once + search.scoring and shown.once == 0 and shown.scoring > plain


def test_the_judge_of_a_win_rate_takes_a_fifth_of_the_budget_at_most(
    tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whet.search.measure_rates", lambda *_: Rates(2_000, 500, 200))
    folder = write_task(tmp_path / "t", train=0, test=0, labels=None, metric="win_rate", feedback="feedback.jsonl")
    pairs = [{"prompt": f"What of {n}?", "chosen": f"{n} is fine and good " * 3, "rejected": f"no {n} " * 6}
             for n in range(120)]  # fmt: skip
    (folder / "feedback.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    (folder / "test.jsonl").write_text("".join(json.dumps({"prompt": f"What of x{n}?"}) + "\n" for n in range(12)))
    watch = Lines()
    made = improve(folder, model=model_folder, budget="1m", out=tmp_path / "o", home=tmp_path / "h", watch=watch)
    [before] = [n for n, s in enumerate(watch.said) if s.startswith("before the plan: the judge")]
    assert watch.said[before + 1] == "> judge of the win rate" and any("plan for" in s for s in watch.said[before:])
    with pytest.raises(MethodError, match="judge of a win rate .* found fake:hash; name a local one first"):
        improve(folder, model=["fake:hash", model_folder], budget="1m", out=tmp_path / "p", home=tmp_path / "h")
    judge = next(p for p in made.result["plan"] if "judge" in p["arm"])
    assert 0 < judge["minutes"] <= 0.3 and made.result["spent"]["trained_tokens"] > 0
    left = [one for _, one in watch.left if one is not None]
    assert left == sorted(left, reverse=True) and left[0] == 60 and len(left) > 2
    assert ("measuring latency and memory", None) in watch.left
    # Nothing beat the base: that it wins half of the time against itself is known without an answer.
    assert ("confirm: base", None) not in watch.left and made.result["confirm"]["candidate"] is None
    assert made.result["confirm"]["base"] == {"score": 0.5, "low": 0.5, "high": 0.5}
    assert "so none was tried on 12 sealed examples" in verdict(made.result)


def test_the_budget_is_told_only_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    told = Plain()
    told.arm("finetune", 65.0)
    told.arm("confirm: base")
    assert capsys.readouterr().err == "> finetune  (budget left 1:05)\n> confirm: base\n"


@pytest.mark.parametrize("metric, shown, between", [
    ("pearson", ["-0.05", "0.40", "1.70", "–"], "+0.97, 95 % [-0.1, +1.1]"),
    ("mine.py:f", ["-0.05", "0.40", "1.70", "–"], "+0.97, 95 % [-0.1, +1.1]"),
    ("accuracy", ["-5.0", "40.0", "170.0", "–"], "+97.0 points, 95 % [-10.0, +110.0]"),
])  # fmt: skip
def test_a_metric_has_one_scale(metric: str, shown: list[str], between: str) -> None:
    """Not one a figure: whether it lies in 0..1 says nothing about its neighbours in the same line."""
    assert [figure(value, metric) for value in (-0.05, 0.4, 1.7, None)] == shown
    assert apart(0.97, -0.1, 1.1, metric) == between


def test_a_board_has_one_scale(capsys: pytest.CaptureFixture[str]) -> None:
    for metric in ("pearson", "accuracy"):
        Plain().board([Standing(metric, metric, "done", 0.4, -0.05, 0.9, 60, 1.0)])
    assert capsys.readouterr().err == ("  pearson: 0.40 [-0.05, 0.90] on 60 examples, done\n"
                                       "  accuracy: 40.0 [-5.0, 90.0] on 60 examples, done\n")  # fmt: skip
    best, paired = SimpleNamespace(name="base"), SimpleNamespace(difference=0.25)
    behind = [Race._behind(SimpleNamespace(metric=get(m)), best, paired) for m in ("pearson", "accuracy")]  # type: ignore[arg-type]
    assert behind == ["behind base by 0.25", "behind base by 25.0 points"]


def test_free_text_and_own_choices(tmp_path: Path) -> None:
    free = write_task(tmp_path / "free", labels=None, metric="token_f1")
    made = improve(free, model="fake:keyword", budget="2m", out=tmp_path / "of", home=tmp_path / "h")
    assert {t["name"] for t in made.result["trials"]} >= {"base", "fewshot(k=4)"}
    folder = tmp_path / "choices"
    folder.mkdir()
    (folder / "task.yaml").write_text("metric: accuracy\ninstruction: Answer.\n")
    pairs = [("red", ("blue", "brown", "green")[n % 3]) for n in range(40)]  # else they would be the task's labels
    lines = [json.dumps({"prompt": f"red or what {n} {n * n}", "completion": two[n % 4 == 0], "choices": two})
             for n, two in enumerate(pairs)]  # fmt: skip
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    made = improve(folder, model="fake:keyword", budget="2m", out=tmp_path / "oc", home=tmp_path / "h")
    assert made.result["confirm"]["n"] == 40
    # The model takes the choice that stands in the question, the baseline the longest one.
    assert made.result["confirm"]["base"]["score"] == 0.75
    [longest] = made.result["baselines"]
    assert (longest["name"], longest["select"], longest["confirm"]) == ("longest_choice", None, 0.25)
    assert longest["difference"] == -0.5


def test_the_out_folder_of_another_run_is_refused(task: Path, tmp_path: Path) -> None:
    improve(task, model="fake:keyword", budget="2m", out=tmp_path / "o", home=tmp_path / "h", methods=["calibrate"])
    before = (tmp_path / "o" / "result.json").read_text()
    with pytest.raises(StoreError, match="holds another run.*a run of toy by another budget, methods"):
        improve(task, model="fake:keyword", budget="3m", out=tmp_path / "o", home=tmp_path / "h")
    assert (tmp_path / "o" / "result.json").read_text() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="is not empty"):
        improve(task, model="fake:keyword", budget="2m", out=tmp_path / "full", home=tmp_path / "h")


def test_an_out_folder_that_cannot_be_written(task: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        improve(task, model="fake:keyword", budget="2m", out=tmp_path / "file" / "out", home=tmp_path / "h")


def test_a_full_disk_keeps_what_is_finished(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model": "fake:keyword", "budget": "2m", "out": tmp_path / "o", "home": tmp_path / "h"}
    import whet.search.out as out

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(out.report, "write", full)
        with pytest.raises(StoreError, match="No space"):
            improve(task, **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "o" / "result.json").exists()
    made = improve(task, **settings)  # type: ignore[arg-type]
    assert made.result["confirm"]["improved"]


@pytest.mark.parametrize(
    ("text", "says"),
    [("fewshot+nosuch", "no method 'nosuch'"), ("fewshot(kk=3)", "did you mean 'k'"), ("fewshot(k=x)", "k takes int"),
     ("fewshot(k=2", "cannot read"), ("calibrate+fewshot", "undoes calibrate"), ("fewshot+fewshot", "stands twice"),
     ("fewshot(selection=rnd)", "is none of"), ("share+prune", "prune undoes share"),
     ("prune+distill+share", "share undoes distill"),
     ("share(values=16)+distill+quantize", "leave share"),
     ("quantize+finetune(adapter=full)", "put quantize last"),
     ("share+continual(strategy=osf)", "strategy=replay"), ("quantize+distill(adapter=full)", "put quantize last"),
     ("share+finetune(adapter=dora)", "train before it")],
)  # fmt: skip
def test_recipes_that_make_no_sense(text: str, says: str) -> None:
    with pytest.raises(MethodError, match=says.replace("(", r"\(")):
        parse(text)


def test_recipes_read_and_shown() -> None:
    for text in ("prune+share+finetune+quantize", "share(values=16)+finetune(adapter=full)", "quantize+finetune",
                 "finetune(adapter=dora)+share"):  # fmt: skip
        parse(text)
    made = parse("fewshot(k=4, selection=nearest) + calibrate")
    assert made.name == "fewshot(k=4,selection=nearest)+calibrate"
    assert parse(made.name) == made
    assert made.families == {"few-/zero-shot"} and Recipe().name == "base"
    assert recipe("fewshot", "calibrate").record[0]["method"] == "fewshot"


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("10m", 600), ("2h", 7200), (3, 3), (" 1.5 m ", 90)])
def test_budgets(text: str | float, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "ten", "-5m", "0m", "5d", "3"])
def test_budgets_that_cannot_be_read(text: str) -> None:
    with pytest.raises(WhetError, match="budget"):
        seconds(text)


def test_work_is_priced_by_kind() -> None:
    rates = Rates(prefill=100, generate=10, train=50)
    assert rates.price(Spent(prefilled_tokens=200, generated_tokens=20, trained_tokens=100)) == 2 + 2 + 2


@given(st.integers(0, 3000), st.floats(0, 1e5), st.floats(0.1, 1e4), st.integers(1, 300))
def test_what_is_affordable(rows: int, cost: float, most: float, least: int) -> None:
    count = affordable(rows, cost, most, least)
    assert min(rows, least) <= count <= rows
    assert count == rows if cost <= most else count <= max(least, rows * most / cost)


def test_where_scoring_all_takes_too_long_a_balanced_sample_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_task(tmp_path / "toy", train=900, test=600)
    made = {}
    for name, speed in {"slow": 50.0, "fast": 1e6}.items():  # slow: all the sealed rows would take six minutes
        monkeypatch.setattr("whet.search.measure_rates", lambda *_, at=speed: Rates(at, at, at))
        settings = {"model": "fake:keyword", "budget": "1m", "out": tmp_path / name, "home": tmp_path / "home"}
        made[name] = improve(task, **settings).result  # type: ignore[arg-type]
    assert made["fast"]["confirm"]["n"] == 600
    assert max(t["examples"] for t in made["fast"]["trials"]) == 180
    assert not any("of the 600 sealed rows" in note for note in made["fast"]["notes"])
    assert made["slow"]["confirm"]["n"] == 200
    assert max(t["examples"] for t in made["slow"]["trials"]) == 100
    said = " ".join(made["slow"]["notes"])
    assert "confirmed on 200 of the 600 sealed rows" in said and "compared on 100 of the 180 select rows" in said


def test_of_long_texts_few_are_scored_where_all_take_too_long() -> None:
    rows = tuple(Example(str(i), "", text=f"text {i}") for i in range(500))
    splits = Splits(Learnable("texts", "", "perplexity"), rows, rows)
    made = apportion(splits, False, Wish(budget=300.0), lambda some: 10.0 * len(some), 0.0, 0.0)
    assert len(made.select) == len(made.confirm) == 20
    assert "confirmed on 20 of the 500 sealed rows" in made.notes[0]


@pytest.mark.parametrize(("budget", "cut"), [("1m", True), ("3h", False)])
def test_of_texts_too_long_for_the_budget_the_beginnings_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str, cut: bool
) -> None:
    monkeypatch.setattr("whet.search.measure_rates", lambda *_: Rates(50, 50, 50))  # a text takes 20 s
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "task.yaml").write_text("metric: perplexity\n")
    for name in ("dev", "test"):
        rows = [{"text": f"{name} {n} " + "a longer word " * 333} for n in range(30)]
        (tmp_path / "texts" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = improve(tmp_path / "texts", model="fake:echo", budget=budget, out=tmp_path / "o", home=tmp_path / "h").result
    assert made["confirm"]["n"] == made["trials"][0]["examples"] == (20 if cut else 30)
    assert made["spent"]["prefilled_tokens"] == pytest.approx(2 * 20 * 643 if cut else 2 * 30 * 1001, abs=80)
    said = " ".join(made["notes"])
    assert ("up to their 3,000th character" in said) == ("confirmed on 20 of the 30 sealed rows" in said) == cut


def test_long_texts_are_priced_at_the_speed_that_they_are_read_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run, now = System(resolve("fake:echo"), "", home=tmp_path), Run(Store(tmp_path)), [0.0]
    session = run.session(base.model)

    def score(prompts: Sequence[object], answers: Sequence[Sequence[str]], **_: object) -> None:
        sizes = [len(f"{p} {' '.join(a)}".split()) for p, a in zip(prompts, answers, strict=True)]
        now[0] += sum(n / 100 * (1 + n / 500) for n in sizes)
        session.spent += Spent(prefilled_tokens=sum(sizes))

    monkeypatch.setattr(session, "score", score)
    monkeypatch.setattr("whet.search.budget.time", SimpleNamespace(monotonic=lambda: now[0]))
    texts = ["a word " * n for n in (5, 250, 250, 250, 750)]
    chats, long = measure(base, session, run.store), measure(base, session, run.store, None, texts)
    assert 90 < chats.prefill < 100 and long.prefill == pytest.approx(100 / (1 + 500 / 500), rel=0.01)
    before = now[0]
    assert measure(base, session, run.store, None, texts) == long and now[0] == before


@pytest.mark.parametrize("remote, written, trained", [(False, 20.0, 50.0), (True, 384 / (2.4 + 19.2), 100.0)])
def test_reading_is_no_part_of_the_rate_of_writing(
    remote: bool, written: float, trained: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 tokens are read a second and 20 written; a server's answers are timed as a whole."""
    now, warm = [0.0], set[str]()
    session: Any = SimpleNamespace(protocol={}, spent=Spent())

    def work(kind: str, read: int, wrote: int = 0) -> None:
        now[0] += read / 100 + wrote / 20 + (0 if kind in warm else 1000)  # the first calls warm up
        warm.add(kind)
        session.spent += Spent(prefilled_tokens=read, generated_tokens=wrote)

    session.score = lambda prompts, _: work("score", 10 * len(prompts))
    session.generate = lambda prompts, how: work("generate", 10 * len(prompts), how.max_tokens * len(prompts))
    monkeypatch.setattr("whet.search.budget.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("whet.search.budget._trained", lambda _: 50.0)
    system: Any = SimpleNamespace(model=SimpleNamespace(identity="m", remote=remote))
    found = measure(system, session, Store(tmp_path))
    assert (found.prefill, found.generate, found.train) == pytest.approx((100.0, written, trained))


def test_what_other_runs_have_scored_makes_no_arm_cheaper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = write_task(tmp_path / "toy", train=900, test=20)
    settings = {"model": "fake:keyword", "recipe": "calibrate"}
    monkeypatch.setattr("whet.search.measure_rates", lambda *_: Rates(50, 50, 50))
    monkeypatch.setattr("whet.search._run_baselines", lambda *_: [])
    monkeypatch.setattr("whet.search._served", lambda _, card, *__: card)
    improve(task, budget="1m", out=tmp_path / "short", home=tmp_path / "used", **settings)  # type: ignore[arg-type]
    made = [improve(task, budget="20m", out=tmp_path / f"{home}-out", home=tmp_path / home, **settings).result["trials"]  # type: ignore[arg-type]
            for home in ("used", "new")]  # fmt: skip
    assert timeless([t["spent"] for t in made[0]]) == timeless([t["spent"] for t in made[1]])


def test_every_beginning_of_the_shared_order_is_balanced() -> None:
    rows = [Example(str(i), f"p{i}", "a" if i % 4 else "b") for i in range(80)]
    order = shared_order(rows, True, 0)
    assert sorted(e.id for e in order) == sorted(e.id for e in rows)
    for cut in (8, 20, 40):
        assert abs(sum(e.completion == "b" for e in order[:cut]) - cut / 4) <= 1
    assert order == shared_order(rows, True, 0) != shared_order(rows, True, 1)


def test_bad_input_is_refused_before_anything_is_spent(task: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(MethodError, match="did you mean 'fewshot'"):
        improve(task, model="fake:keyword", methods=["fewshots"], out=tmp_path / "o", home=tmp_path / "h")
    with pytest.raises(TaskError):
        improve(tmp_path / "nowhere", model="fake:keyword", out=tmp_path / "o", home=tmp_path / "h")
    with pytest.raises(WhetError, match="budget"):
        improve(task, model="fake:keyword", budget="soon", out=tmp_path / "o", home=tmp_path / "h")
    assert not (tmp_path / "o").exists() and time.monotonic() - begun < 20


def test_improve_is_one_process_and_its_trackers_are_checked_first(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"model": "fake:keyword", "budget": "60s", "out": tmp_path / "out"}
    with pytest.raises(MethodError, match="no tracker 'tensorbord'"):
        improve(task, report_to=["tensorbord"], **asked)  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MethodError, match="one process.*torchrun"):
        improve(task, **asked)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_silence_is_silent(capfd: pytest.CaptureFixture[str], task: Path, tmp_path: Path) -> None:
    improve(task, model="fake:keyword", budget="2m", methods=["calibrate"], out=tmp_path / "o", home=tmp_path / "h",
            watch=Silent())  # fmt: skip
    assert capfd.readouterr() == ("", "")


def asked(folder: str, data: Learnable, *methods: str, trials: Sequence[Any] = (), home: Path = Path()) -> Any:
    """A job of a local model, as far as the choice of trainings looks at it."""
    base = System(resolve(folder), "say", decoding=Decoding(data.labels, bool(data.labels)))
    merits = {id(t): n for n, t in enumerate(trials)}
    return SimpleNamespace(bases=[base], splits=SimpleNamespace(learnable=data), wish=Wish(methods=methods),
                           metric=get(data.metric), task=SimpleNamespace(labels=data.labels, closed=data.closed),
                           race=SimpleNamespace(trials=list(trials), select=[0] * 4, merit=lambda t: merits[id(t)],
                                                data=data),
                           store=SimpleNamespace(home=home), watch=Silent(), notes=[])  # fmt: skip


@pytest.mark.embedder
def test_the_first_training_reads_as_many_passages_as_questions_rest_on(model_folder: str) -> None:
    def reads(*documents: str) -> str:
        rows = tuple(Example(str(n), f"p{n}", "a b", evidence=tuple((d, 1.0) for d in documents)) for n in range(20))
        data = Learnable("t", "say", "token_f1", train=rows, documents="d.jsonl")
        found = training.first(asked(model_folder, data))
        assert found is not None
        return found.name

    assert (reads("d0"), reads("d0", "d1")) == ("rag(k=1)+finetune", "rag+finetune")  # three by default
    facts = Learnable("t", "say", "token_f1", knowledge="k.tsv")
    only = training.first(asked(model_folder, facts))
    assert only is not None and only.name == "knowledge(mode=train)"


def test_judgements_and_rewards_go_on_from_a_training(model_folder: str) -> None:
    rows = tuple(Example(str(n), f"p{n}", "a b") for n in range(20))
    data = Learnable("t", "say", "token_f1", train=rows)
    pair = (Judged("1", "p", "good", "bad"),)
    thumbs = tuple(Judged(f"t{n}", f"q{n}", "fine", None) for n in range(5))
    tuned = recipe("finetune")
    assert training.behind(asked(model_folder, data), tuned) == ["rl"]  # a metric is a reward, too
    assert training.behind(asked(model_folder, replace(data, judged=pair)), tuned) == ["dpo", "rl"]
    assert training.behind(asked(model_folder, replace(data, judged=pair + thumbs)), tuned) == ["kto", "rl"]
    for judged, out, why in ((pair, "kto", "dpo .* make pairs"), (pair + thumbs, "dpo", "kto .* one answer alone")):
        base = asked(model_folder, data).bases[0]
        [left] = [d for d in left_out(Wish(), base, replace(data, judged=judged)) if d["method"] in ("dpo", "kto")]
        assert left["method"] == out and re.match(why, left["why"])
    assert not [d for d in left_out(Wish(methods=("kto",)), base, replace(data, judged=pair)) if d["method"] == "kto"]
    assert training.behind(asked(model_folder, replace(data, judged=pair), "finetune", "dpo"), tuned) == ["dpo"]
    assert training.behind(asked(model_folder, replace(data, judged=pair)), recipe("dpo")) == []
    assert training.behind(asked(model_folder, replace(data, metric="perplexity")), tuned) == []
    # A reward model learns from pairs: thumbs alone leave the metric, and none where that scores no answers.
    assert training.behind(asked(model_folder, replace(data, judged=thumbs)), tuned) == ["kto", "rl"]
    assert training.behind(asked(model_folder, replace(data, judged=thumbs, metric="perplexity")), tuned) == ["kto"]
    assert training.behind(asked(model_folder, replace(data, judged=pair), "finetune", "kto"), tuned) == ["kto"]
    only = training.first(asked(model_folder, data, "rl"))
    assert only is not None and only.name == "rl"


def test_what_goes_on_from_a_training_is_not_starved_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each training takes a minute, reinforcement four: who gets how much of what is left."""
    costs = {"rl": 240.0}

    def raced(left: float, *methods: str) -> tuple[list[str], list[str]]:
        trials: list[Any] = []

        class Clocked:
            select, data, merit, enter = [0] * 4, None, staticmethod(lambda _: 0), None

            @property
            def left(self) -> float:
                return left - sum(t.cost for t in trials)

        def enter(one: Recipe, *_: Any, tokens: int = 1) -> Any:
            trials.append(SimpleNamespace(recipe=one, cost=costs.get(one.methods[-1].name, 60.0), card=True, notes={},
                                          status="done"))  # fmt: skip
            trials[-1].notes["allowed"] = tokens
            return trials[-1]

        race: Any = Clocked()
        race.trials, race.enter = trials, enter
        job: Any = SimpleNamespace(race=race, wish=Wish(methods=methods), skipped=[], bases=[],
                                   task=SimpleNamespace(labels=()), splits=SimpleNamespace(
                                       learnable=Learnable("t", "", "accuracy")))  # fmt: skip
        for name, stand in (("best_model", None), ("_held", {}), ("_calibrates", False), ("_disputed", False),
                            ("_wished", False), ("_told", ())):  # fmt: skip
            monkeypatch.setattr(training, name, lambda *_, stand=stand: stand)
        monkeypatch.setattr(training, "_sourced", lambda _, tuned: tuned)
        monkeypatch.setattr(training, "behind", lambda *_: ["rl"])
        monkeypatch.setattr(training, "enter", lambda _, one, *__: enter(one))
        assert training.race(job, recipe("finetune"))
        return [t.recipe.name for t in trials], [d["why"] for d in job.skipped]

    assert raced(180, "finetune", "rl")[0] == ["finetune", "finetune+rl"]  # asked for by name, it comes first
    found, why = raced(480)
    assert "finetune+rl" not in found and "4 times the training's" in why[0] and len(why) == 1
    assert raced(720)[0][:3] == ["finetune", "finetune+rl", "finetune(adapter=dora)"]
    assert raced(90, "finetune", "rl")[1] == ["0:30 is left, and sampling takes some 1 times the training's 1:00"]


def test_of_many_labels_half_of_the_time_goes_to_training_on_demonstrations(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = list[tuple[str, float]]()

    def enter(_: Any, one: Recipe, __: Any, share: float = 1.0) -> Any:
        entered.append((one.name, share))
        race.trials.append(SimpleNamespace(recipe=one, cost=60.0, card=True, status="done", notes={"allowed": 1}))
        return race.trials[-1]

    race: Any = SimpleNamespace(trials=[], left=200.0)
    for name, stand in (("best_model", None), ("_held", {}), ("_calibrates", False), ("_rivals", ()),
                        ("_taught", None), ("behind", []), ("_told", (make("fewshot", {"k": "4"}),))):  # fmt: skip
        monkeypatch.setattr(training, name, lambda *_, stand=stand: stand)
    later = [parse("fewshot(k=4)+finetune"), parse("finetune(rank=8)")]  # what was entered before is not entered again
    monkeypatch.setattr(training, "_others", lambda *_: iter(later))
    monkeypatch.setattr(training, "_sourced", lambda _, tuned: tuned)
    monkeypatch.setattr(training, "enter", enter)
    told = ("fewshot(k=4)+finetune", 1.0)
    for labels, tokens, first in ((16, 20_000, 1.0), (17, 20_000, 0.5), (17, 10_000, 1.0)):  # half is too little there
        entered.clear(), race.trials.clear()
        monkeypatch.setattr(training, "_allowed", lambda *_, tokens=tokens: tokens)
        job: Any = SimpleNamespace(race=race, wish=Wish(), task=SimpleNamespace(labels=range(labels)),
                                   splits=SimpleNamespace(learnable=Learnable("t", "", "accuracy")))  # fmt: skip
        assert training.race(job, recipe("finetune"))
        assert entered == [("finetune", first), told, ("finetune(rank=8)", 1.0)]


def test_a_training_that_was_too_short_is_made_longer_while_that_helps(model_folder: str) -> None:
    def trial(name: str, verdict: str, epochs: float) -> Any:
        return SimpleNamespace(recipe=parse(name), card=True, examples=4, notes={"verdict": verdict, "epochs": epochs},
                               against_base=SimpleNamespace(low=0.1))  # fmt: skip

    data, tuned = Learnable("t", "say", "accuracy", ("x", "y"), ()), parse("rag(k=1)+finetune")

    def after(*trials: Any) -> list[str]:
        """What is tried next, by trials of rising merit."""
        job = asked(model_folder, data, trials=trials)
        return [r.name for r in islice(training._others(job, tuned), 2)]

    short = trial("rag(k=1)+finetune", "underfitting", 3.0)
    longer = trial("rag(k=1)+finetune(epochs=6)", "underfitting", 6.0)
    assert after(short, longer)[:2] == ["rag(k=1)+finetune(epochs=6)", "rag(k=1)+finetune(epochs=12)"]
    assert after(longer, short) == ["rag(k=1)+finetune(epochs=6)", "finetune"]  # which was no better
    assert after(trial("rag(k=1)+finetune", "well fitted", 3.0))[0] == "finetune"
    assert after(trial("rag(k=1)+finetune", "underfitting", 1.4))[0] == "finetune"  # the budget ended it
    last = trial("rag(k=1)+finetune(epochs=12)", "underfitting", 12.0)
    assert after(short, longer, last)[1:] == ["rag(k=1)+finetune(epochs=12)"]


def test_learning_from_judgements_has_a_rival_of_as_many_tokens(model_folder: str) -> None:
    def trial(name: str, cost: float, **tokens: int) -> Any:
        notes = {"trainings": {key: {"trained_tokens": n} for key, n in tokens.items()}, "allowed": 500}
        return SimpleNamespace(recipe=parse(name), card=True, examples=4, notes=notes, cost=cost)

    one, both = trial("finetune", 30.0, first=400), trial("finetune+dpo", 20.0, first=400, second=200)
    job = asked(model_folder, Learnable("t", "say", "win_rate", (), ()), trials=[one, both])
    found = [(r.name, tokens, cost) for r, tokens, cost in training._rivals(job, one.recipe, one, ["dpo"])]
    assert found == [("finetune(epochs=4.5)", 600, 50.0), ("finetune+dpo(learning_rate=0.0001)", 500, 20.0),
                     ("finetune+dpo(learning_rate=0.0005)", 500, 20.0)]  # fmt: skip
    both.card = None  # it failed
    assert list(training._rivals(job, one.recipe, one, ["dpo"])) == []


def test_a_training_that_diverges_is_begun_again_at_the_rate_that_its_error_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered = list[str]()

    def enter(_: Any, one: Recipe, *__: Any) -> Any:
        entered.append(one.name)
        failed = len(entered) == 1
        told: Any = {"card": None, "status": "failed"} if failed else {"card": True, "status": "done"}
        notes = {"allowed": 1} | ({"slower": 2.5e-4} if failed else {})
        return SimpleNamespace(recipe=one, cost=60.0, notes=notes, **told)

    job: Any = SimpleNamespace(race=SimpleNamespace(trials=[], left=0.0), wish=Wish(), skipped=[], bases=[],
                               task=SimpleNamespace(labels=()), splits=SimpleNamespace(
                                   learnable=Learnable("t", "", "accuracy")))  # fmt: skip
    for name, stand in (("best_model", None), ("_held", {}), ("_calibrates", False), ("behind", []), ("_taught", None),
                        ("_rivals", ())):  # fmt: skip
        monkeypatch.setattr(training, name, lambda *_, stand=stand: stand)
    monkeypatch.setattr(training, "_others", lambda *_: iter(()))
    monkeypatch.setattr(training, "_sourced", lambda _, tuned: tuned)
    monkeypatch.setattr(training, "enter", enter)
    assert training.race(job, parse("rag(k=1)+finetune"))
    assert entered == ["rag(k=1)+finetune", "rag(k=1)+finetune(learning_rate=0.00025)"]

    # So is what goes on from it.
    monkeypatch.setattr(training, "behind", lambda *_: ["dpo"])
    entered.clear()
    fails = iter((False, True, False))

    def sometimes(_: Any, one: Recipe, *__: Any) -> Any:
        entered.append(one.name)
        notes: Any = {"allowed": 1} | ({"slower": 5e-5} if next(fails) else {})
        return SimpleNamespace(recipe=one, cost=60.0, notes=notes, card=True, status="done")

    monkeypatch.setattr(training, "enter", sometimes)
    job.race.enter = lambda one, *_, **__: sometimes(None, one)
    assert training.race(job, parse("finetune"))
    assert entered == ["finetune", "finetune+dpo", "finetune+dpo(learning_rate=5e-05)"]


def test_labels_that_are_not_alike_frequent_are_calibrated_by_their_prior() -> None:
    def data(counts: tuple[int, ...], metric: str = "accuracy") -> Learnable:
        labels = tuple(f"l{n}" for n in range(len(counts)))
        rows = tuple(Example(f"{n}-{i}", f"{n} {i}", labels[n]) for n, many in enumerate(counts) for i in range(many))
        return Learnable("t", "say", metric, labels, rows)

    assert training.calibration(data((10, 10))) == training.calibration(data((11, 10))) == {}
    uneven = data((13, 7))
    assert training.calibration(uneven) == {"kind": "fitted"} and training.calibration(data((13, 7), "macro_f1")) == {}
    assert training.calibration(data((40, *[1] * 20))) == {}  # too many for a prior of each
    names = [r.name for r in prompting_recipes(uneven)]
    assert "calibrate(kind=fitted)" in names and "calibrate" in names
    assert names.index("calibrate(kind=fitted)") < names.index("calibrate")
    assert any(name.startswith("fewshot") and name.endswith("+calibrate(kind=fitted)") for name in names)


def test_searches_of_few_rows_are_planned_as_short_as_they_are() -> None:
    wide, many = Prompting(), 10_000
    assert wide.asks(many) == wide.prompts and wide.asks(16) < wide.prompts / 4
    tried = FewShot(selection="bootstrapped")
    assert tried.asks(many) == tried.prompts and tried.asks(16) == 16 and FewShot().asks(16) == 0


def test_prompts_longer_than_the_window_are_planned_as_they_are_sent(home: Path) -> None:
    run = Run(Store(home))
    system = System(ModelRef("fake:hash", "fake:hash"), "say", decoding=Decoding(("x", "y"), True), home=home)
    session = run.session(system.model)
    rows = [Example(str(n), f"{n} " + "word " * session.context * 4) for n in range(4)]
    assert estimate(system, rows, session).prefilled_tokens <= 1.1 * 4 * session.context


def test_reasons_are_tried_for_numbers_and_not_for_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.embed.available", lambda: True)
    rows = tuple(Example(str(n), f"{n} and {n}?", str(2 * n)) for n in range(40))
    names = [r.name for r in prompting_recipes(Learnable("t", "say", "number", train=rows))]
    assert any("reason" in name for name in names)
    own = tuple(replace(e, choices=(e.completion, "other")) for e in rows)
    names = [r.name for r in prompting_recipes(Learnable("t", "say", "exact_match", train=own))]
    assert not any("reason" in name for name in names)
    facts = [r.name for r in prompting_recipes(Learnable("t", "say", "recall@5", train=rows, knowledge=Path("k.tsv")))]
    assert "knowledge(k=1)" in facts


def test_facts_that_are_not_taught_for_want_of_time_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    one = SimpleNamespace(recipe=recipe("finetune"), cost=60.0, card=True, notes={"allowed": 1}, status="done")
    race = SimpleNamespace(trials=[one], left=30.0)
    job: Any = SimpleNamespace(race=race, wish=Wish(), skipped=[], bases=[], task=SimpleNamespace(labels=()),
                               splits=SimpleNamespace(learnable=Learnable("t", "", "accuracy")))  # fmt: skip
    taught = recipe(("knowledge", {"mode": "train"}))
    for name, stand in (("best_model", None), ("_held", {}), ("_calibrates", False), ("behind", []),
                        ("_taught", taught), ("enter", one), ("_sourced", recipe("finetune"))):  # fmt: skip
        monkeypatch.setattr(training, name, lambda *_, stand=stand, **__: stand)
    assert training.race(job, recipe("finetune"))
    [left_out] = job.skipped
    assert left_out == {"method": taught.name, "why": "0:30 is left, and a training takes some 1:00"}


def test_weights_that_people_and_earlier_tasks_judge(
    tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three families that train in one run: `earlier:`, judgements, a reward."""
    monkeypatch.setattr("whet.search.measure_rates", lambda *_: Rates(5_000, 2_000, 10))
    monkeypatch.setattr(training, "SAMPLED", 0.1)
    monkeypatch.setattr(training, "LEAST_TOKENS", 50)
    write_task(tmp_path / "older", train=24, test=12, name="older")
    folder = write_task(tmp_path / "t", train=60, test=12, labels=None, metric="token_f1", earlier=["../older"],
                        feedback="feedback.jsonl")  # fmt: skip
    pairs = [{"prompt": f"the box {n} was what?", "chosen": "good", "rejected": "bad"} for n in range(24)]
    (folder / "feedback.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    made = improve(folder, model=model_folder, budget="3m", methods=["continual", "dpo", "rl"], out=tmp_path / "o",
                   home=tmp_path / "h")  # fmt: skip
    status = {t["name"]: t["status"] for t in made.result["trials"]}
    ours = ("continual", "continual+dpo", "continual+rl")
    assert {status.get(name) for name in ours} <= {"done", "refused"}, status
    assert all(t["spent"]["trained_tokens"] for t in made.result["trials"] if t["name"] in ours)
    kept = [t for t in made.result["trials"] if t["forgetting"] is not None and t["status"] != "refused"]
    for said in ("nats a token from the base", "general ability: perplexity of plain text"):
        assert any(said in note for note in made.result["notes"]) == bool(kept), made.result["notes"]


def test_a_recipe_that_trains_is_run_on_the_model_that_did_best(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[tuple[str, Any]] = []
    bases: Any = [SimpleNamespace(name=name, model=SimpleNamespace(remote=False)) for name in "ab"]
    tries: Any = SimpleNamespace(arms=(), wished=parse("finetune"))
    for name, stand in (("planned", tries), ("show", None), ("labels", ("a", "b"))):
        monkeypatch.setattr(search.plan, name, lambda _, stand=stand: stand)
    monkeypatch.setattr(training, "best_model", lambda _: bases[1])
    monkeypatch.setattr(training, "enter", lambda _, one, start: entered.append((one.name, start)))
    none = SimpleNamespace(card=None, recipe=Recipe())
    race = SimpleNamespace(select=(1,), base=None, trials=[], enter=lambda *_, **__: none)
    search._race(SimpleNamespace(race=race, bases=bases))  # type: ignore[arg-type]
    assert entered == [("finetune", bases[1])]
    assert training.trains(parse("reward")) and not training.trains(parse("fewshot+calibrate"))


def test_what_is_lost_is_lost_against_the_first_model(monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = (SimpleNamespace(model=SimpleNamespace(remote=False, content=name)) for name in "ab")
    compared: list[tuple[Any, Any]] = []
    lost = Lost("older", 40, 0.9, 0.8, 10.0, 5.0, 15.0, 1.0, 12.0, 9.0, False)
    monkeypatch.setattr(search, "forgetting", lambda before, after, *_: compared.append((before, after)) or (lost,))
    job: Any = SimpleNamespace(
        bases=[first, other], earlier=(), run=None, notes=[], task=SimpleNamespace(limits=SimpleNamespace(forgetting=1),
        trusted=False), race=SimpleNamespace(mark=lambda t, **told: SimpleNamespace(**told)))  # fmt: skip
    trial: Any = SimpleNamespace(system=other, status="done", why="", name="base")
    made = search._keeping(job, trial)
    assert compared == [(first, other)] and made.status == "refused" and made.forgetting == 10
    first.model.remote = True
    search._keeping(job, trial)
    assert compared[-1] == (other, other)


def test_the_next_best_arm_stands_in_for_one_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(name: str, difference: float, status: str = "done") -> Any:
        return SimpleNamespace(recipe=parse(name), card=True, examples=4, status=status, against_base=SimpleNamespace(
            difference=difference), merit=difference, name=name)  # fmt: skip

    best, next_best, worse = trial("finetune", 0.3), trial("continual", 0.2), trial("calibrate", -0.1)
    let_go = list[str]()
    race = SimpleNamespace(trials=[worse, best, next_best], base=None, merit=lambda t: t.merit,
                           let_go=lambda: let_go.append("again"))  # fmt: skip
    job: Any = SimpleNamespace(race=race, alone=None)
    forgetful = {best.name}
    monkeypatch.setattr(search, "_keeping", lambda _, t: trial(t.name, 0.3, "refused") if t.name in forgetful else t)
    assert search._finalist(job) is next_best and let_go == ["again"]
    forgetful.add(next_best.name)
    assert search._finalist(job) is None  # the third is no better than the base


def test_trainings_read_what_the_best_arm_reads_and_vary(model_folder: str) -> None:
    rows = tuple(Example(str(n), f"p{n}", ("x", "y")[n % 2]) for n in range(20))
    data = Learnable("t", "say", "accuracy", ("x", "y"), rows)

    def trial(name: str) -> Any:
        ahead = SimpleNamespace(low=0.02 if name else 0.0)
        return SimpleNamespace(recipe=parse(name) if name else Recipe(), card=True, examples=4, against_base=ahead)

    tuned = recipe("finetune")
    for best, found in (("rag(k=1)+calibrate", "rag(k=1)+finetune"), ("fewshot", "finetune"), ("", "finetune")):
        job = asked(model_folder, data, trials=[trial(""), trial("calibrate"), trial(best)])
        assert training._sourced(job, tuned).name == found
    reads = parse("rag(k=1)+finetune")
    shown = {"rag(k=1)+fewshot+calibrate": "rag(k=1)+fewshot+", "prompting": "prompting+rag(k=1)+", "rag": "rag+",
             "fewshot": "rag(k=1)+fewshot+", "prompting(reason=true)": "", "rag(k=1)": "", "calibrate": "",
             "": ""}  # fmt: skip
    for best, told in shown.items():
        others = training._others(asked(model_folder, data, trials=[trial(""), trial(best)]), reads)
        assert next(others).name == f"{told}finetune"
    named = [r.name for r in training._others(asked(model_folder, data), parse("rag(k=1)+finetune"))]
    assert named[0] == "finetune" and "rag(k=1)+finetune(learning_rate=0.0003)" in named
    plain: list[Any] = [r.methods[-1] for r in training._others(asked(model_folder, data), parse("finetune"))]
    rates = {kind: [m.rate for m in plain if (m.adapter, m.rank, m.batch) == (kind, 16, 32)]
             for kind in ("lora", "dora", "full")}  # fmt: skip
    assert rates == {"lora": [3e-4], "dora": [1e-3, 3e-4], "full": [1e-4, 3e-5]}  # LoRA's first came before
    assert list(training._others(asked(model_folder, data), recipe("dpo"))) == []
    kept = [r.name for r in training._others(asked(model_folder, data), recipe("continual"))]
    assert kept[:2] == ["continual(strategy=merge)", "continual(strategy=sequential)"]
    tried = [m for m in plain if not m.clean]
    assert all(getattr(m, key) in m.space()[key] for m in tried for key in ("rank", "batch", "adapter"))
    assert all(m.rate in m.space()["learning_rate"] for m in tried)  # the search tries what the method offers


def test_settings_next_to_an_arm_are_tried_only_where_no_training_did_better(monkeypatch: pytest.MonkeyPatch) -> None:
    merits = {"fewshot": 0.6, "finetune": 0.9}
    ahead = SimpleNamespace(low=0.1)
    trials = [SimpleNamespace(recipe=parse(name), name=name, label="", card=True, examples=4, merit=merit,
                              against_base=ahead) for name, merit in merits.items()]  # fmt: skip
    asked_for = list[Sequence[Recipe]]()
    race = SimpleNamespace(trials=trials, select=[0] * 4, merit=lambda t: t.merit, data=None, rates={}, left=60.0,
                           deadline=math.inf, metric=SimpleNamespace(name="accuracy"))  # fmt: skip
    base = SimpleNamespace(model=SimpleNamespace(base="m"))
    job: Any = SimpleNamespace(race=race, bases=[base], wish=Wish(), run=None)
    monkeypatch.setattr(plan, "cheap_arms", lambda *args: (asked_for.append(args[-1]), ([], [], []))[1])
    monkeypatch.setattr(plan, "_set_aside", lambda *_: None)
    assert plan.refined(job) == (None, []) and not asked_for
    trials[1].merit = 0.5
    assert plan.refined(job) == (trials[0], []) and len(asked_for[0]) > 3
    choosing = ("bootstrapped", "raced")  # by scores of single answers, which a win rate does not give
    assert {word for word in choosing for r in asked_for[0] if word in r.name} == {*choosing}
    race.metric.name = "win_rate"
    plan.refined(job)
    assert asked_for[-1] and not any(word in r.name for word in choosing for r in asked_for[-1])


@pytest.mark.embedder
@pytest.mark.skipif(not embed.available(), reason="the embedding model is not installed")
def test_more_passages_are_read_where_the_first_often_lack_what_is_asked_for(model_folder: str, tmp_path: Path) -> None:
    """Of every thing one passage says the price and one the colour, in words that questions do not tell apart."""
    names = ["aero", "brix", "coda", "dune", "echo", "flux", "gale", "halo", "iris", "juno"]
    texts = [{"id": f"{name}-{part}", "text": f"Of the {name}: {part} {said}{n}."} for n, name in enumerate(names)
             for part, said in (("a", "q1"), ("b", "q2"), ("c", "q3"))]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, texts)))
    tuned = parse("rag(k=1)+finetune")

    def held(asks: Sequence[str], labels: tuple[str, ...] = ()) -> tuple[dict[int, float], dict[str, Any], list[str]]:
        rows = tuple(Example(f"{name}{s}", f"Of the {name}?", f"{s}{n}") for n, name in enumerate(names) for s in asks)
        data = Learnable("t", "say", "exact_match", labels, rows, documents="d.jsonl", folder=tmp_path)
        job = asked(model_folder, data)
        base = replace(job.bases[0], home=tmp_path / "h")
        system = recipe(("rag", {"k": 1})).run(base, data, Run(Store(tmp_path / "h")))
        one = SimpleNamespace(recipe=tuned, system=system, notes={}, card=True)
        return (found := training._held(job, one)), one.notes, [r.name for r in training._others(job, tuned, found)]  # type: ignore[arg-type]

    found, notes, others = held(("q1", "q2", "q3"))
    assert found[1] == pytest.approx(1 / 3) and found[3] == 1.0  # one of the three stands in the first passage
    assert notes["evidence"] == "stands in the passages of 33.3 % of the questions, 100.0 % with k=3"
    assert others[:2] == ["rag+finetune", "finetune"]  # before other rates and adapters
    assert sentences(notes) == [f"evidence: {notes['evidence']}"]
    found, notes, others = held(("nowhere",))
    assert found == {} == notes and others[0] == "finetune"
    found, notes, others = held(("q1", "q2"), ("q1", "q2"))  # a label's word says nothing about a passage
    assert found == {} == notes and others[0] == "finetune"


def test_what_follows_reads_as_many_passages_as_did_better(model_folder: str) -> None:
    data = Learnable("t", "say", "token_f1", documents="d.jsonl")
    first, more = parse("rag(k=1)+finetune"), parse("rag(k=5)+finetune")
    for order, reads in (((first, more), "rag(k=5)"), ((more, first), "rag(k=1)")):
        trials = [SimpleNamespace(recipe=r, card=True, notes={}, examples=4, against_base=None) for r in order]
        others = training._others(asked(model_folder, data, trials=trials), first, {1: 0.5, 3: 0.8, 5: 0.95})
        names = [r.name for r in others]
        assert names[:2] == ["rag(k=5)+finetune", "finetune"] and f"{reads}+finetune(adapter=dora)" in names
    enough = training._others(asked(model_folder, data), first, {1: 0.92, 3: 1.0, 5: 1.0})
    assert next(enough).name == "finetune"


def test_few_rows_are_not_all_shown(task: Path) -> None:
    for count, shown in ((8, {4}), (240, {8, 16})):
        rows = tuple(Example(str(n), f"p{n}", ("good", "bad")[n % 2]) for n in range(count))
        arms = prompting_recipes(Learnable("t", "say", "accuracy", ("good", "bad"), rows))
        assert {m.k for r in arms for m in r.methods if m.name == "fewshot" and m.selection != "nearest"} <= shown


@pytest.mark.embedder
@pytest.mark.parametrize("wrong", [0.0, 0.2])
def test_wrong_labels_are_named_and_trained_without(model_folder: str, tmp_path: Path, wrong: float) -> None:
    draw, rows = random.Random(1), []
    topics = {"sport": "match goal coach league referee stadium", "food": "oven butter recipe dough pepper sauce",
              "travel": "flight hotel passport beach luggage visa"}  # fmt: skip
    for n in range(400):
        label = draw.choice(list(topics))
        said = " ".join(draw.choices(topics[label].split(), k=4) + draw.choices(THINGS, k=3))
        given = draw.choice([other for other in topics if other != label]) if draw.random() < wrong else label
        rows.append(Example(f"r{n}", said, given))
    data = Learnable("t", "say", "accuracy", tuple(topics), tuple(rows))
    job = asked(model_folder, data, home=tmp_path)
    others = [r.name for r in training._others(job, parse("rag(k=1)+finetune"))]
    assert ("rag(k=1)+finetune(clean=true)" in others) == bool(wrong) == bool(job.notes)
    assert all("train rows have a label that looks wrong" in note and ", rather " in note for note in job.notes)


def test_another_file_is_another_recipe(tmp_path: Path) -> None:
    file = tmp_path / "P.txt"
    file.write_text("Say it.\n---\n{question}\n")
    one = parse(f"prompting(file={file})")
    before = one.files(Path())
    file.write_text("Judge it.\n---\n{question}\n")
    assert list(before) == [str(file)] and before != one.files(Path())
    assert parse("finetune(adapter=full)").files(Path()) == {}


def test_other_code_of_a_reward_or_another_teacher_is_another_recipe(tmp_path: Path, model_folder: str) -> None:
    (tmp_path / "mine.py").write_text("def f(a, e): return 1.0\n")
    taught = recipe(("rl", {"reward": "mine.py:f"}), ("distill", {"teacher": model_folder}))
    before = taught.files(tmp_path)
    (tmp_path / "mine.py").write_text("def f(a, e): return 0.0\n")
    after = taught.files(tmp_path)
    assert before["mine.py:f"] != after["mine.py:f"] and before[model_folder] == after[model_folder]


def test_training_takes_part_and_is_paid_for_once(task: Path, tmp_path: Path, model_folder: str) -> None:
    settings = {"model": model_folder, "budget": "2m", "methods": ["finetune", "calibrate"], "home": tmp_path / "h"}
    made = improve(task, out=tmp_path / "o", **settings)  # type: ignore[arg-type]
    trials = {t["name"]: t for t in made.result["trials"]}
    assert trials["finetune"]["status"] == "done" and trials["finetune"]["spent"]["trained_tokens"] > 0
    assert trials["finetune+calibrate"]["status"] == "done"
    assert trials["finetune+calibrate"]["spent"]["trained_tokens"] == 0
    whole = trials["finetune"]["recipe_seconds"]
    assert whole == pytest.approx(trials["finetune"]["cost_seconds"])
    added = trials["finetune+calibrate"]["cost_seconds"]
    assert 0 < added < whole < trials["finetune+calibrate"]["recipe_seconds"] <= whole + added + 1e-9
    total = sum(t["spent"]["trained_tokens"] for t in trials.values())
    assert made.result["spent"]["trained_tokens"] == total
    again = improve(task, out=tmp_path / "again", **settings)  # type: ignore[arg-type]
    assert timeless(again.result["trials"]) == timeless(made.result["trials"])


@pytest.mark.parametrize("most", [None, 20000])
def test_settings_are_compared_on_the_same_rows(
    most: int | None, tmp_path: Path, model_folder: str, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[Example, ...]] = []
    own = Learnable.validation
    monkeypatch.setattr(Learnable, "validation", lambda *a, **k: held.append((found := own(*a, **k))[1]) or found)
    rows = tuple(Example(str(i), f"film {i * 7919} was {i % 2}", ["no", "yes"][i % 2]) for i in range(600))
    data = Learnable("toy", "Good?", "accuracy", ("no", "yes"), rows)
    run = Run(Store(tmp_path), fidelity=0.01, trained_tokens=most)
    system = System(resolve(model_folder), "Good?", home=run.home)
    for epochs, batch in ((1.0, 8), (3.0, 32)):
        FineTune(rank=2, epochs=epochs, batch=batch).apply(system, data, run)
    assert held[0] == held[1] and len(held[0]) >= 24


@pytest.mark.parametrize("name", ["dpo", "kto", "continual"])
def test_what_a_validation_loss_cannot_compare_is_not_drawn(name: str) -> None:
    space = make(name).space()
    assert "learning_rate" in space and not {"beta", "strategy"} & set(space)


def test_answers_are_as_long_as_the_task_s_own(tmp_path: Path) -> None:
    """The cap follows train's answers beyond 256 tokens, up to half of the window; `max_tokens` of the task rules."""
    ref, run = resolve("fake:echo"), Run(Store(tmp_path / "home"))
    session = run.session(ref)

    def cap(folder: str, words: int, **header: object) -> int:
        path = write_task(tmp_path / folder, 4, 2, labels=None, metric="rouge_l", **header)
        rows = [{"prompt": f"tell story {n}", "completion": " ".join(["word"] * words)} for n in range(40)]
        (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) if words else "")
        if not words:
            (path / "train.jsonl").unlink()
        task = load_task(path)
        return base_system(ref, task, task.split().learnable, session, run.home).decoding.max_tokens

    assert [cap("short", 4), cap("some", 200), cap("long", 900), cap("none", 0)] == [16, 300, 512, 256]
    assert [cap("told", 4, max_tokens=700), cap("told-none", 0, max_tokens=8)] == [700, 8]
    task = load_task(tmp_path / "none")
    judged = tuple(Judged(str(n), f"ask {n}", " ".join(["word"] * 100), "no") for n in range(40))
    learnable = replace(task.split().learnable, train=(), judged=judged)
    assert base_system(ref, task, learnable, session, run.home).decoding.max_tokens == 150


def test_rows_with_choices_are_chosen_among_beside_free_ones(tmp_path: Path) -> None:
    path = write_task(tmp_path / "mixed", 20, 0, labels=None, metric="exact_match")
    rows = [{"prompt": "which?", "completion": "red", "choices": ["red", "blue"]}, {"prompt": "say", "completion": "x"}]
    (path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, ref, run = load_task(path), resolve("fake:echo"), Run(Store(tmp_path / "home"))
    base = base_system(ref, task, task.split().learnable, run.session(ref), run.home)
    chosen, free = base.answers(task.test, run.session(ref))
    assert chosen.text in ("red", "blue") and len(chosen.scores) == 2 and free.scores == ()


def test_what_a_server_answered_other_runs_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_task(tmp_path / "t", train=24, test=12, labels=None, metric="contains")
    settings: dict[str, Any] = {"model": "fake:keyword", "home": tmp_path / "h", "methods": ["fewshot"]}
    before = improve(folder, budget="1m", out=tmp_path / "a", **settings).result["confirm"]["base"]["score"]
    monkeypatch.setattr("whet.system.System.servers", property(lambda self: ["openai:x"]))
    own = System.answers

    def better(self: System, prompts: Any, *more: Any, **settings: Any) -> Any:
        rows = list(prompts)
        return [replace(a, text=e.completion) for a, e in zip(own(self, rows, *more, **settings), rows, strict=True)]

    monkeypatch.setattr(System, "answers", better)
    found = improve(folder, budget="2m", out=tmp_path / "b", **settings).result
    assert before < 1 and found["confirm"]["base"]["score"] == 1.0


def test_a_model_that_is_named_twice_is_one(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t", train=24, test=12)
    made = improve(folder, model=["fake:keyword", "fake:keyword"], budget="1m", out=tmp_path / "o", home=tmp_path / "h",
                   methods=["fewshot"])  # fmt: skip
    assert [t["name"] for t in made.result["trials"]][0] == "base" and made.result["model"] == "fake:keyword"


@pytest.mark.parametrize("budget", [0, -5.0, math.nan, math.inf])
def test_a_budget_is_above_nothing(budget: float) -> None:
    with pytest.raises(WhetError, match="cannot read the budget"):
        seconds(budget)


def test_what_the_report_needs_is_checked_within_the_watch(tmp_path: Path) -> None:
    closed = list[int]()

    class Watching(Silent):
        def close(self) -> None:
            closed.append(1)

    with pytest.raises(MethodError, match="no tracker"):
        improve(write_task(tmp_path / "t"), report_to=["nope"], watch=Watching(), home=tmp_path / "h")
    assert closed == [1]


def scored(*scores: float, **more: Any) -> Scorecard:
    """A scorecard of rows 0, 1, … with such scores, and their mean."""
    rows = tuple(Outcome(str(n), f"a{n}", score, "") for n, score in enumerate(scores))
    return Scorecard(sum(scores) / len(scores), 0.0, 1.0, "accuracy", rows, 0.0, 0, Spent(), {}, **more)


def tried(name: str, *scores: float, **more: Any) -> Trial:
    """A finished trial with such scores."""
    made = Trial(parse(name) if name else Recipe(), System(resolve("fake:constant")), 0, "done", "", len(scores),
                 scored(*scores), Spent(), 0.0, {}, None)  # fmt: skip
    return replace(made, **more)


def test_the_verdict_holds_by_holm_over_two() -> None:
    cards = {"base": scored(*[0] * 6, *[1] * 10), "chosen": scored(*[1] * 16)}
    job: Any = SimpleNamespace(metric=get("accuracy"), wish=Wish())
    alone = search._confirmed(job, cards, None)
    assert alone["p_value"] == alone["p_adjusted"] == pytest.approx(2 / 2**6)
    assert alone["improved"] and alone["low"] > 0 and "best_single" not in alone
    single = tried("finetune", *[1] * 15, 0)
    both = search._confirmed(job, {**cards, "single": scored(*[1] * 15, 0)}, single)
    assert (both["p_value"], both["p_adjusted"]) == pytest.approx((2 / 2**6, 4 / 2**6))
    assert not both["improved"] and both["low"] == alone["low"]
    told = both["best_single"]
    assert (told["name"], told["difference"], told["p_value"], told["p_adjusted"]) == ("finetune", 1 / 16, 1, 1)


def test_beside_a_combination_stands_the_best_of_a_single_family() -> None:
    both, one = tried("fewshot+finetune", 1, 1, 1, 1), tried("fewshot+calibrate", 1, 1, 0, 0)
    best = tried("finetune", 1, 1, 1, 0)
    trials = [tried("", 1, 1, 1, 0), one, replace(one, card=None), best, tried("rag", 1, 1, 1, 1, status="refused"),
              tried("prompting", 1, 1), both]  # fmt: skip
    job: Any = SimpleNamespace(race=SimpleNamespace(trials=trials, select=[0] * 4, merit=lambda t: t.card.score))
    assert search._best_single(job, both) is best and search._best_single(job, one) is None
    job.race.trials = [both]
    assert search._best_single(job, both) is None


def halved(
    home: Path, wrong: dict[str, Callable[[int], bool]], ahead: Trial | None = None, stopped: str = ""
) -> tuple[list[tuple[str, int, int]], dict[str, tuple[int, str, str]]]:
    """Arms that are wrong on such of 240 rows, halved: which were entered at what rung, and where each ended."""
    run, rows = Run(Store(home)), [Example(str(n), f"p{n}", "x") for n in range(240)]
    one = Race("k", Learnable("t", "say", "accuracy"), rows, get("accuracy"), run.store, {}, 0, 60.0, Silent(), run)
    entered: list[tuple[str, int, int]] = []

    def enter(recipe: Recipe, _: System, *, rung: int, examples: int, label: str) -> Trial:
        name = f"{recipe.name}{label}"
        entered.append((name, rung, examples))
        right = [float(not wrong[name](n)) for n in range(examples)]
        return one.record(tried(recipe.name, *right, label=label, status="truncated" if name == stopped else "done"))

    one.enter = enter  # type: ignore[assignment,method-assign]
    if ahead and ahead.card:
        one.scored[ahead.system.fingerprint] = ahead.card
    cut = [name.partition(" ") for name in wrong]
    one.halve([(parse(name), System(resolve("fake:constant")), f"{gap}{rest}") for name, gap, rest in cut], ahead)
    return entered, {t.name: (t.examples, t.status, t.why) for t in one.trials}


FOUR: dict[str, Callable[[int], bool]] = {
    "fewshot": lambda n: n % 15 == 14, "calibrate": lambda n: n == 7, "rag": lambda n: n % 2 == 1,
    "prompting": lambda n: n % 5 > 0,
}  # fmt: skip


def test_the_better_half_goes_on_less_what_is_known_to_be_behind(tmp_path: Path) -> None:
    wrong: dict[str, Callable[[int], bool]] = {
        "fewshot": lambda n: n % 10 == 9, "fewshot [m]": lambda n: n % 10 == 0,  # as good, by other rows
        "calibrate": lambda n: n % 10 > 7,  # of the better half, and behind
        "rag": lambda n: n % 2 == 1, "prompting": lambda n: n % 5 > 0, "finetune": lambda n: n % 3 > 0,
    }  # fmt: skip
    entered, ended = halved(tmp_path, wrong)
    later = [("fewshot", 1, 120), ("fewshot [m]", 1, 120), ("fewshot", 2, 240)]
    assert entered == [*((name, 0, 60) for name in wrong), *later]
    assert ended == {
        "fewshot": (240, "done", ""), "fewshot [m]": (120, "dropped", "no better than fewshot on 120 examples"),
        "calibrate": (60, "dropped", "behind fewshot by 10.0 points on 60 examples"),
        "rag": (60, "dropped", "behind fewshot by 40.0 points on 60 examples"),
        "prompting": (60, "dropped", "behind fewshot by 70.0 points on 60 examples"),
        "finetune": (60, "dropped", "behind fewshot by 56.7 points on 60 examples"),
    }  # fmt: skip


def test_arms_are_halved_against_the_one_that_is_ahead_of_them(tmp_path: Path) -> None:
    entered, ended = halved(tmp_path / "alone", FOUR)
    later = [("fewshot", 1, 120), ("calibrate", 1, 120), ("calibrate", 2, 240)]
    assert entered == [*((name, 0, 60) for name in FOUR), *later]
    assert ended["fewshot"] == (120, "dropped", "behind calibrate by 5.8 points on 120 examples")
    assert ended["rag"] == (60, "dropped", "behind calibrate by 48.3 points on 60 examples")
    entered, ended = halved(tmp_path / "ahead", FOUR, tried("finetune", *[1.0] * 240))
    assert entered == [*((name, 0, 60) for name in FOUR), *later[1:]]
    assert ended["fewshot"] == (60, "dropped", "behind finetune by 6.7 points on 60 examples")
    assert ended["rag"] == (60, "dropped", "behind finetune by 50.0 points on 60 examples")
    assert ended["calibrate"] == (240, "done", "")


def test_where_the_clock_has_stopped_an_arm_none_is_dropped(tmp_path: Path) -> None:
    entered, ended = halved(tmp_path, FOUR, stopped="rag")
    assert entered == [(name, 0, 60) for name in FOUR]
    assert ended == {name: (60, "truncated" if name == "rag" else "done", "") for name in FOUR}


def test_what_goes_beyond_the_limits_is_told_in_their_unit() -> None:
    card = scored(1, size_bytes=80_400_000, memory_bytes=1_234_000, latency_ms=61.6)
    said = {Limits(size=50_000_000): "80.4 MB on disk, 50.0 allowed",
            Limits(memory=900_000): "1234.0 KB of memory, 900.0 allowed",
            Limits(latency=50.4): "62 ms an answer, 50 allowed"}  # fmt: skip
    assert {limit: limits.beyond(limit, card) for limit in said} == said
    assert limits.beyond(Limits(50_000_000, 900_000, 50.4), card) == ", ".join(said.values())
    assert limits.beyond(Limits(80_400_000, 1_234_000, 61.6), card) == ""  # no more than is allowed
    assert limits._excess(Limits(size=50_000_000), card) == limits._excess(Limits(50_000_000, 900_000, 50.4), card)
    assert limits._excess(Limits(size=50_000_000), card) == pytest.approx(80.4 / 50)
    assert limits._excess(Limits(50_000_000, 900_000, 30.8), card) == pytest.approx(2)
    unknown = scored(1)
    assert limits.beyond(Limits(1, 1, 1.0), unknown) == "" and limits._excess(Limits(1, 1, 1.0), unknown) == 0


def test_whether_limits_are_met_is_not_known_where_what_is_used_is_not() -> None:
    small, large = (scored(1, size_bytes=n * 10**6, latency_ms=n / 2) for n in (40, 60))
    allowed = Limits(size=50_000_000, latency=25.0)
    found = {"allowed": {"size": 50_000_000, "latency": 25.0}, "used": {"size": 40_000_000, "latency": 20.0},
             "base": {"size": 60_000_000, "latency": 30.0}, "met": True}  # fmt: skip
    assert limits.kept(allowed, small, large) == found
    untimed = replace(small, latency_ms=None)
    unknown: Any = {"used": {"size": 40_000_000, "latency": None}, "met": None}
    assert limits.kept(allowed, untimed, large) == found | unknown
    told = [limits.kept(one, card, large) for one, card in (
        (allowed, replace(large, latency_ms=None)), (Limits(size=50_000_000), untimed), (Limits(forgetting=1.0), small)
    )]  # fmt: skip
    assert [one and one["met"] for one in told] == [False, True, None] and told[2] is None


def test_the_budget_is_cut_into_a_reserve_of_half_at_most_and_the_search() -> None:
    select, confirm = (tuple(Example(f"{part}{n}", f"{part} {n}", "x") for n in range(count))
                       for part, count in (("s", 50), ("c", 100)))  # fmt: skip
    splits = Splits(Learnable("t", "", "accuracy"), select, confirm)

    def parts(budget: float, aside: float = 36.0, **more: float) -> tuple[float, float, tuple[str, ...]]:
        made = apportion(splits, False, Wish(budget=budget), lambda rows: 0.1 * len(rows), 8.0, aside, **more)
        assert made.confirm == confirm and set(made.select) == set(select)
        return made.reserve, made.search, made.notes

    needed = 2.2 * 10 + 8 + 30 + 0.04 * 600  # the sealed rows, the earlier tasks, what is fixed, an encoder
    assert parts(600.0) == (pytest.approx(needed), pytest.approx(600 - needed - 36), ())
    assert parts(600.0, passes=3.2)[:2] == pytest.approx((needed + 10, 600 - needed - 10 - 36))
    assert parts(100.0) == (50, 14, ("confirming takes about 1:04, of which the budget holds 0:50: it will take longer "
                                     "than the budget says",))  # fmt: skip
    assert parts(100.0, aside=60.0)[:2] == (50, 0)


@pytest.mark.parametrize("metric, sign", [("accuracy", 1), ("perplexity", -1)])
def test_gains_and_shrinkage_have_the_sign_of_the_metric(metric: str, sign: int) -> None:
    finalist, chosen = tried("finetune", 0.75, against_base=SimpleNamespace(difference=0.5)), {"chosen": scored(0.5)}
    base, first, second = tried("", 20, 20), tried("fewshot", 16, 16), tried("fewshot+finetune", 15, 15)
    handed = tried("fewshot+finetune+calibrate", 11, 11)
    race = SimpleNamespace(base=base, trials=[base, first, second, handed])
    job: Any = SimpleNamespace(metric=get(metric), race=race)
    assert _selection(job, finalist, {"difference": 0.25}, chosen) == {
        "select": 0.75, "confirm": 0.5, "shrinkage": sign * 0.25, "select_gain": 0.5, "confirm_gain": 0.25,
    }  # fmt: skip
    assert _selection(job, finalist, {}, {}) is _selection(job, None, {"difference": 0.25}, chosen) is None
    last = {"method": "calibrate", "gain": sign * -4}
    assert _gains(job, handed) == [{"method": "fewshot", "gain": sign * -4}, {"method": "finetune", "gain": sign * -1},
                                   last]  # fmt: skip
    # Fewer rows or another model say nothing of a step: it counts together with the next.
    job.race.trials[1:2] = [tried("fewshot", 16), replace(first, label=" [m]")]
    assert _gains(job, handed) == [{"method": "fewshot+finetune", "gain": sign * -5}, last]
    assert _gains(job, None) == []


def test_the_report_shows_what_base_and_chosen_answered_to_each_row() -> None:
    def told(name: str, **scores: float) -> Scorecard:
        return replace(scored(1), outcomes=tuple(Outcome(n, f"{name} {n}", s, "") for n, s in scores.items()))

    def row(name: str, asked: str, *chosen: Any) -> dict[str, Any]:
        return {"id": name, "prompt": asked, "reference": "x" if asked.endswith("?") else "", "base": f"base {name}",
                "chosen": chosen[0], "base_score": 0.25, "chosen_score": chosen[1]}  # fmt: skip

    rows = [Example("a", "first?", "x"), Example("b", "second?", "x"), Example("c", "", text="word " * 500),
            Example("d", "not scored?", "x")]  # fmt: skip
    base, handed = (replace(tried(made, 1), card=told(name, b=s)) for made, name, s in (
        ("", "base", 0.25), ("rag", "handed", 1.0)
    ))  # fmt: skip
    job: Any = SimpleNamespace(splits=SimpleNamespace(confirm=rows), task=SimpleNamespace(labels=("x", "y")),
                               race=SimpleNamespace(select=[Example("b", "of select?", "x")], base=base,
                                                    trials=[base, handed]))  # fmt: skip
    sealed = {"base": told("base", c=0.25, b=0.25, a=0.25), "chosen": told("chosen", b=0.5, a=0.75)}
    found = {"curves": [], "labels": ["x", "y"], "curve_unit": "trained tokens"}
    assert details(job, sealed, handed) == found | {"examples": [
        row("a", "first?", "chosen a", 0.75), row("b", "second?", "chosen b", 0.5),
    ]}  # fmt: skip
    sealed.pop("chosen")
    assert details(job, sealed, None)["examples"] == [
        row("a", "first?", None, None), row("b", "second?", None, None), row("c", "word " * 400, None, None),
    ]  # fmt: skip
    assert details(job, {}, handed)["examples"] == [row("b", "of select?", "handed b", 1.0)]


def test_baselines_are_scored_on_both_parts_and_compared_where_rows_are_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, select = (Example("t", "p", "a"),), [Example("s0", "p", "a"), Example("s1", "p", "b")]
    confirm, seen = tuple(Example(str(n), "p", said) for n, said in enumerate("aaab")), list[Any]()
    job: Any = SimpleNamespace(
        splits=SimpleNamespace(learnable=Learnable("t", "say", "accuracy", ("a", "b"), train), confirm=confirm),
        race=SimpleNamespace(select=select), metric=get("accuracy"), watch=Silent(), store=Store(tmp_path), bases=[],
        wish=Wish(), task=SimpleNamespace(labels=("a", "b")), notes=[],
    )  # fmt: skip

    def run(*args: object, **_: object) -> tuple[Baseline, ...]:
        seen.append(args)
        return (Baseline("nearest", tuple("abaaaa")),)

    monkeypatch.setattr("whet.search.baselines.run", run)
    [found] = search._run_baselines(job, scored(1, 0, 0, 0))
    assert seen == [(train, [*select, *confirm], ("a", "b"))]
    assert found.pop("low") < 0.5 < found.pop("high")
    assert found == {"name": "nearest", "select": 1.0, "confirm": 0.75, "difference": 0.5, "p_value": 0.5}
    assert search._run_baselines(job, None) == [{"name": "nearest", "select": 1.0, "confirm": 0.75}]

    def fails(*_: object, **__: object) -> None:
        raise ValueError("one class only")

    monkeypatch.setattr("whet.search.baselines.run", fails)
    assert search._run_baselines(job, None) == [] and not seen[2:]
    assert job.notes == ["baselines could not be fitted: one class only"]
