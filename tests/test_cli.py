"""The command line as a contract: exit codes, one-line errors, JSON on stdout and nothing else there."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from test_search import write_task

from whet.cli import main
from whet.engine import Spent
from whet.errors import printable
from whet.metrics import Outcome
from whet.progress import applied
from whet.scorecard import Scorecard, lines


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHET_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("whet.embed.available", lambda: False)  # loading it takes seconds
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def task(tmp_path: Path) -> str:
    return str(write_task(tmp_path / "toy", train=120, test=40))


def whet(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Run a command; returns exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def one_line(err: str) -> str:
    """The error: the one line that starts with whet:."""
    lines = [line for line in err.splitlines() if line.startswith("whet: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_improve_prints_json_and_nothing_else(capsys: pytest.CaptureFixture[str], task: str) -> None:
    code, out, err = whet(capsys, "improve", task, "--model", "fake:keyword", "--budget", "1m", "--json")
    assert code == 0 and json.loads(out)["confirm"]["n"] == 40
    assert "plan for 1:00" in err and (Path("runs/toy/result.json")).exists()
    code, out, _ = whet(capsys, "report", "runs/toy")
    assert code == 0 and "confirmed on 40" in out
    code, out, _ = whet(capsys, "evaluate", "runs/toy/system", task, "--json")
    card = json.loads(out)
    wanted = {"score", "low", "high", "n", "metric", "seconds", "latency_ms", "size_bytes", "memory_bytes", "protocol"}
    assert code == 0 and wanted <= set(card)
    code, _, err = whet(capsys, "evaluate", "runs/toy", task)
    assert code == 2 and one_line(err).endswith("take runs/toy/system")
    measured = json.loads(Path("runs/toy/result.json").read_text())["confirm"]
    assert card["score"] == max(measured["chosen"]["score"] if measured["improved"] else measured["base"]["score"], 0)
    code, out, _ = whet(capsys, "compare", "fake:keyword", "runs/toy/system", task, "--json")
    assert code == 0 and json.loads(out)["difference"] == pytest.approx(measured["difference"])


def test_what_few_sealed_rows_cannot_show_is_said_before_the_budget_is_spent(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(write_task(tmp_path / "few", train=40, test=12))
    code, _, err = whet(capsys, "improve", folder, "--model", "fake:keyword", "--budget", "20s", "--methods", "fewshot")
    said = "12 rows are sealed: a gain of less than about 40 points cannot be shown on so few"
    assert code == 0 and err.index(said) < err.index("plan for")


def test_apply_writes_a_system_that_answers(
    capsys: pytest.CaptureFixture[str], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = whet(capsys, "apply", "fewshot", task, "--system", "fake:keyword", "--set", "k=8",
                        "selection=random", "--out", "made", "--json")  # fmt: skip
    assert code == 0 and {"system", "spent"} <= set(json.loads(out))
    assert len(json.loads(Path("made/system.json").read_text())["demonstrations"]["pool"]) == 8
    with (Path(task) / "train.jsonl").open("a") as train:  # a row of test, learnt from, is dropped and named
        train.write("\n" + (Path(task) / "test.jsonl").read_text().splitlines()[0] + "\n")
    _, out, _ = whet(capsys, "apply", "fewshot", task, "--system", "fake:keyword", "--out", "other", "--json")
    assert len(json.loads(out)["notes"]["dropped"]) == 1 and "repeats" in json.loads(out)["notes"]["dropped"][0]["why"]
    _, out, _ = whet(capsys, "apply", "fewshot", task, "--system", "fake:keyword", "--out", "third")
    said = out.splitlines()
    assert said[0] == "made     fewshot on fake:keyword, for toy" and said[-2] == f"  whet evaluate third {task}"
    assert [line for line in said if "dropped" in line] == ["dropped  1 row of train: test0 repeats test0"], out
    monkeypatch.setattr("sys.stdin", io.StringIO("the film 3 was grim, poor\n\n"))
    code, out, _ = whet(capsys, "chat", "made")
    assert (code, out.strip()) == (0, "bad")


def test_what_a_method_did_is_told_without_its_internals() -> None:
    notes = {
        "rows": 41, "batch": 20, "steps": 2, "epochs": 1.0, "shortened": 0, "artifact": "476b", "twice_the_data": None,
        "verdict": "too short to tell", "fit": {"verdict": "too short to tell", "best": None},
        "trainings": {"476b": {"seconds": 1.474}}, "raced": [{"arm": "rank=4", "loss": 1.25, "why": ""}],
        "suspects": [{"id": "train-3", "label": "good", "rather": "bad"}],
        "dropped": [{"id": f"train-{n}", "why": "repeats test-1"} for n in range(4)],
    }  # fmt: skip
    assert applied(notes, Spent(training_seconds=10.7, trained_tokens=1840)) == [
        "trained  on 41 rows, 1,840 tokens in 11 s",
        "fit      too short to tell: fewer than three validations or four steps",
        "raced    validation losses: rank=4 1.250",
        "dropped  4 rows of train: train-0 repeats test-1, train-1 repeats test-1, train-2 repeats test-1, …",
        "note     1 rows left out for a label that looks wrong, the surest: train-3 (good, rather bad)",
    ]
    fit = {"verdict": "overfitting", "best": 1.0, "last": 1.5, "train_before": 0.5, "train_after": 0.25}
    [line] = applied({"verdict": "overfitting", "fit": fit}, Spent())
    assert line.startswith("fit      overfitting: loss on validation rows 1.000 at best and 1.500 in the end")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["imprve", "x"], "did you mean 'improve'"),
        (["improve", "nowhere"], "nowhere"),
        (["improve", "TASK", "--budget", "soon"], "budget"),
        (["improve", "TASK", "--methods", "finetun"], "did you mean 'finetune'"),
        (["improve", "TASK", "--model", "fake:nosuch"], "nosuch"),
        (["improve", "TASK", "--model", "no/such/model"], "cannot find the model"),
        (["apply", "fewshot", "TASK", "--system", "fake:hash", "--set", "kk=3", "--out", "o"], "did you mean 'k'"),
        (["apply", "fewshot", "TASK", "--system", "fake:hash", "--set", "k", "--out", "o"], "key=value"),
        (["apply", "finetune", "TASK", "--system", "fake:hash", "--set", "epochs=nan", "--out", "o"], "takes float"),
        (["apply", "dpo", "TASK", "--system", "fake:hash", "--set", "beta=inf", "--out", "o"], "takes float"),
        (["apply", "finetune", "TASK", "--system", "fake:hash", "--budget", "5s", "--trials=-2", "--out", "o"], "-2"),
        (["apply", "finetune", "TASK", "--system", "fake:hash", "--out", "o"], "weights"),
        (["apply", "finetune", "TASK", "--system", "fake:hash", "--budget", "1m", "--out", "o"], "weights"),
        (["apply", "fewshot", "TASK", "--system", "fake:hash", "--budget", "1m", "--out", "o"], "leave --budget out"),
        (["evaluate", "TASK", "TASK"], "no System"),
        (["evaluate", "fake:hash", "TASK", "--split", "nosuch"], "no split"),
        (["evaluate", "fake:hash", "TASK", "--split", "dev"], "is empty"),
        (["report", "nowhere"], "holds no result"),
        (["init", "nowhere.csv"], "nowhere.csv"),
        (["methods", "fewshots"], "did you mean 'fewshot'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], task: str, args: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = whet(capsys, *[task if a == "TASK" else a for a in args])
    assert code == 2 and out == "" and says in one_line(err)


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "cannot be read"), ("\udc80", "cannot be read"), ("[]", "no result"), ('{"task": "t"}', "no result")],
)
def test_a_result_that_is_none_is_named(capsys: pytest.CaptureFixture[str], text: str, says: str) -> None:
    Path("run").mkdir()
    Path("run/result.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    code, out, err = whet(capsys, "report", "run")
    assert code == 2 and out == "" and says in one_line(err)


def test_a_result_in_parts_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/result.json").write_text('{"trials": [{"recipe": [{"method": "rag"}], "select": null}, 3]}')
    code, out, _ = whet(capsys, "report", "run")
    assert code == 0 and "rag" in out


def test_texts_are_timed_where_nothing_is_answered(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: str
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "task.yaml").write_text("metric: perplexity\n")
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": f"some text {n}"}) + "\n" for n in range(12)))
    code, out, _ = whet(capsys, "evaluate", model_folder, str(folder), "--json")
    card = json.loads(out)
    assert code == 0 and card["latency_ms"] > 0 and card["memory_bytes"] > 0 and card["size_bytes"] is not None


def test_select_is_cut_by_the_seed_that_a_system_was_made_with(capsys: pytest.CaptureFixture[str], task: str) -> None:
    from whet.task import load

    held = {seed: {e.id for e in load(task).split(seed).select} for seed in (0, 1, 2)}
    whet(capsys, "apply", "fewshot", task, "--system", "fake:keyword", "--seed", "1", "--out", "one")
    whet(capsys, "apply", "fewshot", task, "--system", "fake:keyword", "--seed", "2", "--out", "two")
    whet(capsys, "improve", task, "--model", "fake:keyword", "--budget", "1m", "--seed", "1", "--out", "run")

    def asked(*args: str) -> set[str]:
        code, _, err = whet(capsys, "evaluate", *args, task, "--split", "select", "--answers", "a.jsonl")
        assert code == 0, err
        return {json.loads(line)["id"] for line in Path("a.jsonl").read_text().splitlines()}

    assert held[0] != held[1] != held[2]
    assert asked("one") == asked("run/system") == asked("one", "--seed", "2") == held[1] and asked("two") == held[2]
    assert asked("fake:hash") == held[0] and asked("fake:hash", "--seed", "2") == held[2]
    code, out, _ = whet(capsys, "compare", "fake:keyword", "one", task, "--split", "select", "--json")
    ours, theirs = json.loads(out)["first"], json.loads(out)["second"]
    assert code == 0 and ours["n"] == len(held[1]) and ours["protocol"]["data"] == theirs["protocol"]["data"]
    code, _, err = whet(capsys, "compare", "one", "two", task, "--split", "select")
    assert code == 2 and "seeds 1, 2" in one_line(err)
    assert whet(capsys, "compare", "one", "two", task)[0] == 0
    whet(capsys, "apply", "calibrate", task, "--system", "one", "--seed", "2", "--out", "three")
    assert asked("three") == held[1]  # it learnt from none of what it was selected by


def test_what_was_evaluated_is_not_run_again(
    capsys: pytest.CaptureFixture[str], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that after Ctrl-C the same command goes on, as it says; another row or model is another score."""
    from whet.engine.fake import FakeSession

    _, first, _ = whet(capsys, "evaluate", "fake:keyword", task, "--json")
    asked, score = list[FakeSession](), FakeSession.score

    def scored(self: FakeSession, *rows: Any, **settings: Any) -> Any:
        asked.append(self)
        return score(self, *rows, **settings)

    monkeypatch.setattr(FakeSession, "score", scored)
    _, again, _ = whet(capsys, "evaluate", "fake:keyword", task, "--json")
    assert json.loads(again) == json.loads(first) and not asked
    code, out, _ = whet(capsys, "compare", "fake:keyword", "fake:hash", task, "--json")
    assert code == 0 and json.loads(out)["first"]["score"] == json.loads(first)["score"] and len(set(asked)) == 1
    asked.clear()
    whet(capsys, "compare", "fake:keyword", "fake:hash", task)
    assert not asked
    with (Path(task) / "test.jsonl").open("a") as rows:
        rows.write("\n" + json.dumps({"prompt": "another film, great", "completion": "good"}) + "\n")
    whet(capsys, "evaluate", "fake:keyword", task)
    assert asked


def test_a_metric_that_is_code_needs_trust(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_task(tmp_path / "own", train=120, test=40, metric="mine.py:f")
    lines = ["def f(answer, example):", "    if example.id == 'test3':", "        raise KeyError('odd')",
             "    return float(answer == example.completion)"]  # fmt: skip
    (folder / "mine.py").write_text("\n".join(lines) + "\n")
    code, _, err = whet(capsys, "evaluate", "fake:keyword", str(folder))
    assert code == 2 and "--trust" in one_line(err)
    code, out, _ = whet(capsys, "evaluate", "fake:keyword", str(folder), "--trust", "--json", "--answers", "a.jsonl")
    assert code == 0 and json.loads(out)["failed"] == 1
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows if r["error"]] == ["test3"]


def test_a_place_for_answers_that_cannot_be_is_told_before_the_work(
    capsys: pytest.CaptureFixture[str], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = whet(capsys, "evaluate", "fake:keyword", task, "--answers", "no/such/a.jsonl")
    assert code == 2 and not out and "no folder" in one_line(err) and "answering" not in err and "--out" not in err
    code, _, err = whet(capsys, "evaluate", "fake:keyword", task, "--answers", ".")
    assert code == 2 and "is a folder" in one_line(err)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)  # the disk fills up on the way: the figures are told all the same
    code, out, err = whet(capsys, "evaluate", "fake:keyword", task, "--answers", "a.jsonl", "--json")
    assert code == 2 and json.loads(out)["n"] == 40 and "No space left" in one_line(err) and "--out" not in err


@pytest.mark.parametrize("command", [("apply", "fewshot", "TASK"), ("update", "made", "TASK")])
@pytest.mark.parametrize(("out", "says"), [("full", "holds something else"), ("full/file/new", "cannot write")])
def test_an_out_that_cannot_be_written_is_told_before_the_work(
    capsys: pytest.CaptureFixture[str], task: str, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], out: str,
    says: str,
) -> None:  # fmt: skip
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the task was read")

    Path("full").mkdir()
    Path("full/file").write_text("mine")
    monkeypatch.setattr("whet.task.load", work)
    code, _, err = whet(capsys, *[task if a == "TASK" else a for a in command], "--out", out)
    assert code == 2 and says in one_line(err) and Path("full/file").read_text() == "mine"


def test_strict_names_the_leak(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_task(tmp_path / "leaky", train=120, test=40)
    first = (folder / "test.jsonl").read_text().splitlines()[0]
    with (folder / "train.jsonl").open("a") as stream:
        stream.write(json.dumps({**json.loads(first), "id": "copied"}) + "\n")
    code, _, err = whet(capsys, "improve", str(folder), "--model", "fake:keyword", "--strict")
    assert code == 2 and "copied" in one_line(err)
    code, out, _ = whet(capsys, "improve", str(folder), "--model", "fake:keyword", "--budget", "1m", "--json")
    assert code == 0 and json.loads(out)["dropped"]["examples"][0][0] == "copied"


def test_long_prompts_are_counted_and_shortened(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_task(tmp_path / "long", train=0, test=10)
    with (folder / "test.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "great " * 3000, "completion": "good"}) + "\n")
    code, out, _ = whet(capsys, "evaluate", "fake:keyword", str(folder), "--json")
    assert code == 0 and json.loads(out)["truncated"] == 1


def test_init_then_improve(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = ["text,label"]
    said = (("great", "good"), ("poor", "bad"))
    lines += [f"the film number {n} was {said[n % 2][0]} indeed,{said[n % 2][1]}" for n in range(60)]
    (tmp_path / "reviews.csv").write_text("\n".join(lines) + "\n")
    code, out, _ = whet(capsys, "init", "reviews.csv")
    assert code == 0 and "text" in out and "label" in out
    code, out, _ = whet(capsys, "evaluate", "fake:keyword", "reviews", "--json")
    assert code == 0 and json.loads(out)["metric"] == "accuracy"


def test_help_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ["improve", "evaluate", "compare", "apply", "chat", "init", "methods", "doctor", "report"]
    for name in commands:
        code, out, _ = whet(capsys, name, "--help")
        assert code == 0 and "Examples" in out and f"whet {name}" in out
    code, out, _ = whet(capsys, "methods", "--json")
    assert {m["name"] for m in json.loads(out)} >= {"fewshot", "calibrate", "finetune"}
    for one in json.loads(out):  # choices are what the errors list
        assert all(one["settings"][key] in (*words, "", "auto") for key, words in one["choices"].items())
        assert set(one["choices"]) <= set(one["settings"]) and "\n" not in one["about"]
    assert {m["name"]: m["choices"] for m in json.loads(out)}["rl"] == {"algorithm": ["rloo", "grpo"]}
    _, out, _ = whet(capsys, "methods", "continual")  # of one: what its settings mean, those of finetune, too
    assert "`merging`" in out and "`absent`" in out and "    adapter='lora'  (lora, rslora, dora, full)\n" in out


def test_doctor_says_what_mends(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = whet(capsys, "doctor", "--json")
    body = json.loads(out)
    assert code == 0 and all(f["ok"] or f["mend"] for f in body["findings"])


def test_doctor_measures_the_disk_that_the_store_is_to_lie_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from whet import doctor

    asked = []
    usage = shutil.disk_usage

    def measured(place: Path) -> Any:
        asked.append(place)
        return usage(place)

    monkeypatch.setenv("WHET_HOME", str(tmp_path / "not" / "made"))
    monkeypatch.setattr("shutil.disk_usage", measured)
    doctor._machine()
    assert asked == [tmp_path]


def test_heavy_libraries_wait_until_they_are_needed() -> None:
    import subprocess
    import sys

    heavy = ("torch", "transformers", "sklearn", "plotly", "numpy")
    probe = f"import sys, whet, whet.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_full_disk_is_one_line(
    capsys: pytest.CaptureFixture[str], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("whet.task.load", full)
    code, _, err = whet(capsys, "evaluate", "fake:keyword", task)
    assert code == 2 and "No space left" in one_line(err)


def test_what_a_terminal_cannot_show_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "result.json").write_text('{"task": "caf\\u00e9 \\ud800", "trials": []}')
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path), "--json"])
    shown.seek(0)
    assert not ended.value.code and "caf? ?" in shown.read()


def test_escapes_in_data_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t")
    rows = (folder / "train.jsonl").read_text().splitlines()
    evil = "\x1b]0;owned\x07\x1b[2J"
    (folder / "train.jsonl").write_text("\n".join([json.dumps({**json.loads(rows[0]), evil: 1}), *rows[1:]]))
    code, out, err = whet(capsys, "evaluate", "fake:keyword", str(folder))
    assert code == 0 and "fields not used" in err and "\x1b" not in out + err
    (folder / "test.jsonl").write_text(json.dumps({evil: "x"}))
    code, out, err = whet(capsys, "evaluate", "fake:keyword", str(folder))
    assert code == 2 and "owned" in err and "\x1b" not in out + err
    assert printable("한 \x9b31m\tb\nc \u200dक\xa0") == "한  31m\tb\nc \u200dक\xa0"


def test_commands_to_type_next_are_quoted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_task(tmp_path / "a task; of mine")
    out = tmp_path / "made by hand"
    code, said, _ = whet(capsys, "apply", "fewshot", str(folder), "--system", "fake:keyword", "--out", str(out))
    assert code == 0 and f"  whet evaluate '{out}' '{folder}'\n" in said


def test_what_is_made_by_hand_has_a_card_of_its_own(capsys: pytest.CaptureFixture[str], task: str) -> None:
    """No score of what it was made of, the whole recipe, and nothing that improve handed over is taken by it."""
    base = ("--model", "fake:keyword")
    assert whet(capsys, "improve", task, *base, "--budget", "1m", "--methods", "fewshot", "--out", "run")[0] == 0
    handed = json.loads(Path("run/system/system.json").read_text())
    assert handed["card"]["scorecard"] and handed["card"]["recipe"]
    more = ("apply", "calibrate", task, "--system", "run/system", "--out")
    assert whet(capsys, *more, "made")[0] == 0
    made = json.loads(Path("made/system.json").read_text())["card"]
    before = handed["card"]["recipe"]
    assert "scorecard" not in made and made["recipe"] == ("calibrate" if before == "base" else f"{before}+calibrate")
    assert whet(capsys, "apply", "fewshot", task, "--system", "fake:keyword", "--set", "k=2", "--out", "shown")[0] == 0
    assert json.loads(Path("shown/system.json").read_text())["card"]["recipe"] == "fewshot(k=2)"
    assert "recipe: fewshot(k=2)" in Path("shown/README.md").read_text()
    code, _, err = whet(capsys, *more, "run/system")
    assert code == 2 and "what improve handed over" in one_line(err)
    assert json.loads(Path("run/system/system.json").read_text()) == handed
    # What a calibration held for is another System now, and that is said.
    asked = ("apply", "fewshot", task, "--set", "k=2", "--system")
    assert "calibration, which held for the System before" in whet(capsys, *asked, "made", "--out", "plain")[1]
    assert "calibration, which" not in whet(capsys, *asked, "shown", "--out", "again")[1]


def test_settings_that_cannot_be_meant(capsys: pytest.CaptureFixture[str], task: str, tmp_path: Path) -> None:
    asked = ("improve", task, "--model", "fake:keyword")
    twice = ("--recipe", "fewshot", "--methods", "calibrate")
    for given, said in ((("--budget", "90"), "90s, 10m or 1h"), (("--budget", "1m", *twice), "both")):
        code, _, err = whet(capsys, *asked, *given)
        assert code == 2 and said in one_line(err)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    code, _, err = whet(capsys, "feedback", "fake:echo", "prompts.txt", "--out", "f.jsonl", "--temperature", "-1")
    assert code == 2 and "-1" in err


def test_a_system_of_other_labels_is_told(capsys: pytest.CaptureFixture[str], task: str, tmp_path: Path) -> None:
    assert whet(capsys, "apply", "calibrate", task, "--system", "fake:keyword", "--out", "made")[0] == 0
    other = write_task(tmp_path / "other", train=20, test=10, labels=["left", "right"], name="other")
    for file in other.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        said = {"good": "left", "bad": "right"}
        file.write_text("".join(json.dumps({**row, "completion": said[row["completion"]]}) + "\n" for row in rows))
    code, _, err = whet(capsys, "evaluate", "made", str(other))
    assert code == 0 and "note: made answers 'good' and the like, never what other asks for" in err
    assert "never what" not in whet(capsys, "evaluate", "made", task)[2]


def test_a_metric_that_fails_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_task(tmp_path / "own", train=20, test=10, labels=None, metric="m.py:score")
    (folder / "m.py").write_text('def score(answer, example):\n    return "x" if answer != example.completion else 1\n')
    code, out, _ = whet(capsys, "evaluate", "fake:echo", str(folder), "--trust")
    assert code == 0 and "10 examples could not be scored: " in out and "x" in out.split("could not be scored: ")[1]
    (folder / "m.py").write_text('def score(answer, example):\n    return "x"\n')
    code, _, err = whet(capsys, "evaluate", "fake:echo", str(folder), "--trust")
    assert code == 2 and "fails on every example, right answers included" in err and "'x'" in err


def test_a_scorecard_is_told_in_lines() -> None:
    outcomes = [Outcome(str(n), "", 0.0, "", error=None if n > 1 else "no answer") for n in range(872)]
    card = Scorecard(0.712, 0.68, 0.74, "accuracy", tuple(outcomes), 3.21, 1, Spent(), {}, 41.4, 268_600_000,
                     1_234_500_000, 3)  # fmt: skip
    assert lines(card) == [
        "accuracy  71.2  [68.0, 74.0]  on 872 examples",
        "3.2 s of answering, 41 ms each, one at a time",
        "269 MB on disk, 1234 MB of memory at most",
        "1 prompts were shortened",
        "2 examples could not be scored: no answer",
        "3 answers were cut (max_tokens)",
    ]
    plain = Scorecard(0.712, 0.68, 0.74, "pearson", tuple(outcomes[2:]), 3.21, 0, Spent(), {})
    assert lines(plain) == ["pearson  0.71  [0.68, 0.74]  on 870 examples", "3.2 s of answering"]


def test_a_comparison_is_told_in_lines(capsys: pytest.CaptureFixture[str], task: str) -> None:
    asked = ("compare", "fake:keyword", "fake:echo", task)
    body = json.loads(whet(capsys, *asked, "--json")[1])
    code, out, _ = whet(capsys, *asked)
    first, second = (body[one]["score"] for one in ("first", "second"))
    gap, low, high = (100 * body[key] for key in ("difference", "low", "high"))
    assert gap == pytest.approx(100 * (second - first)) != 0 and low < gap < high
    assert code == 0 and out.splitlines() == [
        f"fake:keyword: {100 * first:.1f}   fake:echo: {100 * second:.1f}   (accuracy, 40 examples)",
        f"difference {gap:+.1f} points, 95 % [{low:+.1f}, {high:+.1f}], p = {body['p_value']:.2g} (mcnemar)",
        f"the smallest difference this many examples could have shown: {100 * body['smallest_detectable']:.1f} points",
    ]


def test_prompts_of_plain_text(tmp_path: Path) -> None:
    from whet.feedback import prompts_of

    for text, said in (("one\ntwo\n", ["one", "two"]), ("one\nstill one\n\ntwo\n", ["one\nstill one", "two"])):
        (tmp_path / "p.txt").write_text(text)
        assert [e.prompt for e in prompts_of(tmp_path / "p.txt")] == said
    (tmp_path / "p.jsonl").write_text('{"text": "one\\nstill one"}\n')
    assert [e.prompt for e in prompts_of(tmp_path / "p.jsonl")] == ["one\nstill one"]
