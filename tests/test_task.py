"""Loading, checking and splitting task folders."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whet import metrics
from whet.errors import TaskError
from whet.report.view import number
from whet.splits import cut, near_repeats
from whet.task import Example, Extra, Learnable, Limits, Task, inside, load, places, rows_hash

SHARED = Path(__file__).resolve().parents[2] / "shared" / "tasks"
ROW = {"prompt": "one plus one is what", "completion": "two"}


def folder(tmp: Path, header: object = "metric: exact_match", name: str = "task", **files: object) -> Path:
    """A task folder; each file is rows, text or bytes, and `train` stands for train.jsonl, `a__csv` for a.csv."""
    path = tmp / name
    path.mkdir(parents=True, exist_ok=True)
    if header is not None:
        (path / "task.yaml").write_text(header if isinstance(header, str) else json.dumps(header), "utf-8")
    for file, content in (files or {"train": [ROW]}).items():
        target = path / (file.replace("__", ".") if "__" in file else f"{file}.jsonl")
        if isinstance(content, bytes):
            target.write_bytes(content)
        elif isinstance(content, str):
            target.write_text(content, "utf-8")
        else:
            target.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
    return path


def refused(path: Path, *words: str, trust: bool = False) -> None:
    with pytest.raises(TaskError) as caught:
        load(path, trust=trust)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    for word in words:
        assert word in message, message


def example(n: int, label: str = "a", **more: object) -> Example:
    words = random.Random(n)
    prompt = " ".join("".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(8))
    return Example(f"r{n}", prompt, label, (label,), **more)  # type: ignore[arg-type]


def task(train: list[Example], labels: tuple[str, ...] = (), dev: tuple = (), test: tuple = ()) -> Task:
    return Task("t", Path("."), "", "accuracy", labels, tuple(train), tuple(dev), tuple(test))


# --------------------------------------------------------------------------------------------------- what loads


def test_a_whole_task_loads(tmp_path):
    folder(tmp_path, name="old")
    header = """
name: whole
instruction: Say yes or no.
metric: accuracy
labels: [yes, no]
documents: docs
knowledge: knowledge.tsv
earlier: [../old]
limits: {size: 100MB, memory: 1.5GB, latency: 0.2s, forgetting: 1}
"""
    rows = [{"prompt": "is it?", "completion": "yes", "evidence": ["d1", "d2"], "group": 3, "id": 7, "spare": 1}]
    path = folder(tmp_path, header, train=rows, test=[{"prompt": "why?", "completion": "no", "evidence": {"d1": 2}}])
    (path / "docs").mkdir()
    (path / "docs" / "a.md").write_text("text")
    (path / "knowledge.tsv").write_text("a\tb\tc\n")
    (path / "glossary.tsv").write_text("a\tb\n")
    loaded = load(path)
    assert (loaded.name, loaded.labels, loaded.closed) == ("whole", ("yes", "no"), True)
    row = Example("7", "is it?", "yes", ("yes",), group="3", evidence=(("d1", 1.0), ("d2", 1.0)),
                  extra=Extra('{"spare": 1}'))  # fmt: skip
    assert loaded.train == (row,)
    assert loaded.test[0].id == "test-1" and loaded.test[0].evidence == (("d1", 2.0),)
    assert loaded.limits == Limits(100_000_000, 1_500_000_000, 200.0, 1.0)
    assert loaded.earlier == ((tmp_path / "old").resolve(),)
    assert loaded.documents == "docs"
    assert any("spare" in note for note in loaded.notes) and any("glossary.tsv" in note for note in loaded.notes)
    learnable = loaded.split().learnable
    assert learnable.documents == path.resolve() / "docs" and learnable.glossary is None
    assert {field.name for field in fields(Learnable)}.isdisjoint({"select", "confirm", "dev", "test"})


def test_labels_keep_the_words_as_written(tmp_path):
    rows = [{"prompt": word, "completion": word} for word in ("no", "on", "010", "1.50", "true")]
    loaded = load(folder(tmp_path, "metric: accuracy\nlabels: [no, on, 010, 1.50, true]", train=rows))
    assert loaded.labels == ("no", "on", "010", "1.50", "true")


def test_numbers_and_booleans_become_text(tmp_path):
    rows = [{"prompt": "a", "completion": 3}, {"prompt": 4, "completion": True}, {"prompt": "c", "completion": 0.5}]
    loaded = load(folder(tmp_path, train=rows))
    assert [row.completion for row in loaded.train] == ["3", "true", "0.5"] and loaded.train[1].prompt == "4"


def test_bom_crlf_blank_lines_and_line_separators(tmp_path):
    lines = '{"prompt": "a\u2028b", "completion": "x"}\r\n\r\n{"prompt": "é", "completion": "y"}\r\n'
    loaded = load(folder(tmp_path, train=b"\xef\xbb\xbf" + lines.encode()))
    assert [(row.id, row.prompt) for row in loaded.train] == [("train-1", "a\u2028b"), ("train-3", "é")]


def test_answers_begin_with_the_completion(tmp_path):
    rows = [
        {"prompt": "a", "completion": "x", "answers": ["y", "x", "z"]},
        {"prompt": "b", "answers": ["p", "q", "p"]},
        {"prompt": "c", "answers": {"text": ["s"], "answer_start": [0]}},
    ]
    loaded = load(folder(tmp_path, train=rows))
    assert [row.answers for row in loaded.train] == [("x", "y", "z"), ("p", "q"), ("s",)]
    assert [row.completion for row in loaded.train] == ["x", "p", "s"]


def test_only_train_or_only_test(tmp_path):
    assert load(folder(tmp_path, name="a", train=[ROW])).test == ()
    loaded = load(folder(tmp_path, name="b", test=[ROW]))
    assert loaded.train == () and loaded.split().select == () and loaded.split().confirm == loaded.test


def test_valid_counts_as_dev(tmp_path):
    loaded = load(folder(tmp_path, train=[ROW], valid=[{"prompt": "other", "completion": "x"}]))
    assert [row.id for row in loaded.dev] == ["valid-1"] and loaded.split().select == loaded.dev


def test_retrieval_and_pairs_need_no_completion(tmp_path):
    rows = [{"prompt": "a", "completion": "", "evidence": ["d"]}, {"prompt": "b", "evidence": ["e"]}]
    loaded = load(folder(tmp_path, "metric: recall@5\ndocuments: d.jsonl", "r", test=rows, d=[{"id": "d"}]))
    assert loaded.test[0].answers == () and loaded.notes == ()
    pairs = [{"prompt": "a", "chosen": "good", "rejected": "bad"}, {"prompt": "only a prompt"}]
    first, second = load(folder(tmp_path, "metric: win_rate", "w", test=pairs)).test
    assert (first.completion, first.rejected) == ("good", "bad") and (second.completion, second.rejected) == ("", None)


def test_labels_that_no_answer_tells_apart_are_refused(tmp_path):
    rows = [{"prompt": "a", "completion": "Polish"}]
    with pytest.raises(TaskError, match="differ by case or signs alone.*Polish.*polish"):
        load(folder(tmp_path, "metric: accuracy\nlabels: [Polish, polish, other]", "alike", test=rows))


def test_perplexity_of_nothing_is_refused(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "only a prompt"}]
    loaded = load(folder(tmp_path, "metric: perplexity", "learnt", train=rows, test=rows[:1]))
    assert len(loaded.train) == 2
    with pytest.raises(TaskError, match="test.jsonl line 2: the completion is missing"):
        load(folder(tmp_path, "metric: perplexity", "scored", test=rows))


def test_plain_text_tasks(tmp_path):
    path = folder(tmp_path, "name: lm", train__txt="one\ntwo\n\nthree\n", test__txt="four")
    loaded = load(path)
    assert loaded.metric == "perplexity" and any("perplexity" in note for note in loaded.notes)
    assert [(row.id, row.prompt, row.text) for row in loaded.train] == [
        ("train-1", "", "one\ntwo\n\n"),
        ("train-4", "", "three\n"),
    ]
    assert [row.text for row in load(folder(tmp_path, name="t", train=[{"text": "a"}, ROW])).train] == ["a", None]


def test_sources_that_are_not_files(tmp_path):
    web = folder(tmp_path, {"metric": "accuracy", "documents": ["https://a.org/x", "http://b.org"]}, "w")
    assert load(web).documents == "https://a.org/x\nhttp://b.org"
    assert load(web).split().learnable.documents == "https://a.org/x\nhttp://b.org"
    assert places(web, load(web).documents) == ("https://a.org/x", "http://b.org")
    for query in ("sqlite:///a.db", "SELECT a FROM b", "postgresql://h/d", "sparql:https://q.org",
                  "mssql+pyodbc://h/d SELECT a FROM b", "mariadb://h/d with a as (select 1) select * from a"):
        path = folder(tmp_path, {"metric": "accuracy", "documents": query}, "q")
        refused(path, "documents", "--trust")
        assert load(path, trust=True).split().learnable.documents == query
    refused(folder(tmp_path, {"metric": "accuracy", "documents": "ftp://a.org"}, "f"), "documents", "ftp")


def test_metric_in_a_file_needs_trust(tmp_path):
    path = folder(tmp_path, "metric: score.py:mine", train=[ROW], score__py="def mine(a, b): return 1\n")
    refused(path, "score.py:mine", "--trust")
    assert load(path, trust=True).metric == "score.py:mine"
    refused(folder(tmp_path, "metric: gone.py:mine", "g"), "gone.py", "does not exist", trust=True)
    refused(folder(tmp_path, "metric: ../x.py:mine", "h"), "leads out", trust=True)


# ------------------------------------------------------------------------------------------------- what is refused


def test_missing_folder_and_files(tmp_path):
    refused(tmp_path / "none", "no task folder", "whet init")
    refused(folder(tmp_path, None, "a"), "no task.yaml")
    refused(folder(tmp_path, "metric: accuracy", "b", notes__md="x"), "neither train nor test")
    refused(folder(tmp_path, "metric: accuracy", "d", dev=[ROW]), "neither train nor test")
    refused(folder(tmp_path, "metric: accuracy", "c", train=[ROW], train__csv="prompt,completion\na,b\n"), "remove")
    file = tmp_path / "file"
    file.write_text("")
    refused(file, "a file")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("metric: accuracy\n  bad: [", ("task.yaml line 2",)),
        ("metric: accuracy\nmetric: bleu", ("task.yaml line", "twice")),
        ("metric: accuracy\nlabels: &a [x, y]\nname: *a", ("task.yaml line 3", "a reference", "quotes")),
        ("metric: accuracy\ncolumns: {<<: {prompt: a}}", ("'<<' is no field",)),
        ("- a", ("task.yaml is not a mapping",)),
        ("name: x", ("names no metric", "accuracy")),
        ("metrics: accuracy", ("unknown key 'metrics'", "'metric'")),
        ("metric: acuracy", ("unknown metric 'acuracy'", "'accuracy'")),
        ("metric: recall@k", ("unknown metric", "recall@5")),
        ("metric: recall@0", ("unknown metric",)),
        ("metric: [accuracy]", ("metric is not text",)),
        ("metric: !!python/object/apply:os.system [ls]", ("task.yaml line 1",)),
        ("metric: accuracy\nlabels: yes", ("labels is not a list",)),
        ("metric: accuracy\nlabels: [a, b, a]", ("label stands twice", "'a'")),
        ("metric: accuracy\nlabels: [a]", ("too few labels", "at least 2")),
        ("metric: accuracy\nlabels: [a, null]", ("label is empty", "null")),
        ("metric: accuracy\nlimits: {sise: 1MB}", ("'sise'", "'size'")),
        ("metric: accuracy\nlimits: {size: big}", ("limits.size", "100MB", "'big'")),
        ("metric: accuracy\nlimits: {latency: -2ms}", ("limits.latency",)),
        ("metric: accuracy\nlimits: {memory: 0}", ("limits.memory",)),
        ("metric: accuracy\nlimits: 100MB", ("limits is not a mapping",)),
        ("metric: accuracy\ncolumns: [a, b]", ("columns cannot be read", "{prompt: review")),
        ("metric: accuracy\ncolumns: {promt: a}", ("'promt' is no field of a row", "'prompt'")),
        ("metric: accuracy\nmax_tokens: many", ("max_tokens cannot be read", "512", "'many'")),
        ("metric: accuracy\nmax_tokens: 0", ("max_tokens cannot be read",)),
        ('metric: accuracy\ncolumns: {prompt: "<|im_end|>", completion: b}', ("column's name", "<|im_end|>")),
        ("metric: accuracy\ncolumns: {prompt: a, completion: }", ("column's name",)),
        ("metric: accuracy\nname: ../../evil", ("name",)),
        ("metric: accuracy\nname: ..", ("name",)),
        ("metric: accuracy\ndocuments: none.jsonl", ("documents", "none.jsonl", "does not exist")),
        ("metric: accuracy\ndocuments: /etc/passwd", ("documents", "leads out")),
        ("metric: accuracy\nfeedback: a/../../b", ("feedback", "leads out")),
        ("metric: accuracy\nknowledge: ..\\b", ("knowledge", "leads out")),
        ("metric: accuracy\nglossary: ~/b", ("glossary", "leads out")),
        ("metric: accuracy\ndocuments: {a: b}", ("documents is not a source",)),
        ("metric: accuracy\ndocuments: [a.md, sqlite:///x]", ("documents",)),
        ("metric: accuracy\ndocuments: .", ("documents", "held-out")),
        ("metric: accuracy\nearlier: [../../etc]", ("earlier", "leads out")),
        ("metric: accuracy\nearlier: [../gone]", ("earlier", "not a task")),
        ("metric: accuracy\nearlier: [../task]", ("earlier", "beside")),
        ("a: &a [*a]\nmetric: *a", ("task.yaml",)),
    ],
)
def test_bad_headers(tmp_path, header, words):
    refused(folder(tmp_path, header), *words)


def test_a_header_that_grows_is_refused_at_once(tmp_path):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for name, before in zip("bcdefghij", "abcdefghi", strict=True):
        bomb += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    start = time.monotonic()
    refused(folder(tmp_path, bomb.replace("a: &a", "metric: accuracy\ndocuments: &a") + "labels: *j\n"), "task.yaml")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("train.jsonl is empty",)),
        (b" \n\n", ("train.jsonl is empty",)),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "comp', ("train.jsonl line 2", "truncated")),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n', ("train.jsonl line 2", "byte offset 47", "0xff")),
        (b'{"prompt": "a", "completion": "b"}\nhello\n', ("train.jsonl line 2 is not JSON",)),
        (b'{"prompt": "a", "completion": "b"}\n[1, 2]\n', ("train.jsonl line 2 is not an object", "[1, 2]")),
        (b"[" * 100_000 + b"\n", ("train.jsonl line 1",)),
        (b'{"prompt": null, "completion": "b"}', ("line 1: the prompt is null",)),
        (b'{"prompt": " ", "completion": "b"}', ("line 1: the prompt is empty",)),
        (b'{"completion": "b"}', ("line 1: the prompt is missing", "fields completion", "whet init")),
        (b'{"review": "a", "label": "b"}', ("line 1: the prompt is missing", "review, label", "whet init")),
        (b'{"text": "a", "label": "b"}', ("line 1", "text, label", "whet init")),
        (b'{"prompt": "a", "completion": null}', ("line 1: the completion is null",)),
        (b'{"prompt": "a", "completion": NaN}', ("line 1: the completion is null",)),
        (b'{"prompt": "a"}', ("line 1: the completion is missing",)),
        (b'{"prompt": "a", "completion": "", "choices": ["b", "c"]}', ("line 1: the completion is empty",)),
        (b'{"prompt": "a", "completion": ["b"]}', ("line 1", "completion", "not an object")),
        (b'{"prompt": {"a": 1}, "completion": "b"}', ("line 1: prompt is not text",)),
        (b'{"prompt": "\\ud800", "completion": "b"}', ("line 1: prompt holds half a character",)),
        (b'{"prompt": "a", "completion": "b", "choices": ["c", "d"]}', ("line 1", "'b'", "choices", "'c'")),
        (b'{"prompt": "a", "completion": "b", "choices": ["b"]}', ("line 1", "choices")),
        (b'{"prompt": "a", "completion": "b", "choices": "b"}', ("line 1: choices is not a list",)),
        (b'{"prompt": "a", "completion": "b", "evidence": {"d": "x"}}', ("line 1: evidence",)),
        (b'{"prompt": "a", "completion": "b", "evidence": {"d": -1}}', ("line 1: evidence",)),
    ],
)
def test_bad_rows(tmp_path, content, words):
    refused(folder(tmp_path, train=content), *words)


def test_labels_outside_the_set(tmp_path):
    rows = [{"prompt": "a", "completion": "positive"}, {"prompt": "b", "completion": "postive"}]
    header = "metric: accuracy\nlabels: [negative, positive]"
    refused(folder(tmp_path, header, train=rows), "train.jsonl line 2", "'postive'", "did you mean 'positive'?")
    rows = [{"prompt": "a", "completion": "positive", "answers": ["positive", "good"]}]
    refused(folder(tmp_path, header, "b", train=rows), "line 1", "'good'", "there are: negative, positive")


def test_retrieval_rows_need_evidence(tmp_path):
    refused(folder(tmp_path, "metric: ndcg@10", test=[{"prompt": "a"}]), "test.jsonl line 1", "evidence")


def test_plain_text_where_answers_are_needed(tmp_path):
    refused(folder(tmp_path, test=[{"text": "a"}]), "test.jsonl line 1", "exact_match", "prompt and completion")


def test_links_that_lead_out(tmp_path):
    (tmp_path / "secret.jsonl").write_text(json.dumps(ROW))
    path = folder(tmp_path, "metric: exact_match\ndocuments: docs")
    (path / "docs").mkdir()
    (path / "docs" / "in.md").symlink_to(path / "train.jsonl")
    assert load(path).documents == "docs"
    (path / "docs" / "out.md").symlink_to(tmp_path / "secret.jsonl")
    refused(path, "documents", "out.md", "link out")
    shutil.rmtree(path / "docs")
    (path / "docs").symlink_to(tmp_path)
    refused(path, "documents", "link out")
    (path / "docs").unlink()
    (path / "docs").symlink_to("docs")
    refused(path, "documents")
    (path / "docs").unlink()
    (path / "docs").write_text("x")
    (path / "test.jsonl").symlink_to(tmp_path / "secret.jsonl")
    refused(path, "test.jsonl", "link out")
    (path / "test.jsonl").unlink()
    folder(tmp_path / "far", name="away")
    (tmp_path / "near").symlink_to(tmp_path / "far" / "away")
    (path / "task.yaml").write_text("metric: exact_match\nearlier: [../near]")
    refused(path, "earlier", "beside")


def test_a_task_reached_by_a_link_loads(tmp_path):
    (tmp_path / "link").symlink_to(folder(tmp_path))
    assert load(tmp_path / "link").train == load(tmp_path / "task").train


@given(st.text(max_size=30))
def test_no_path_leads_out(tmp_path_factory, written):
    root = tmp_path_factory.getbasetemp().resolve()
    try:
        found = inside(root, written, "x")
    except TaskError:
        return
    assert found.resolve().is_relative_to(root)


# ------------------------------------------------------------------------------------------------ rows as they come


def test_lists_in_cells_are_read_as_json_or_python_writes_them(tmp_path):
    cells = "prompt,answers,evidence\n" + "a,\"['Paris', 'paris']\",\"['d1', 'd2']\"\n" + 'b,"[""x""]",d3\n'
    first, second = load(folder(tmp_path, train__csv=cells)).train
    assert first.answers == ("Paris", "paris") and second.answers == ("x",)
    assert first.evidence == (("d1", 1.0), ("d2", 1.0)) and second.evidence == (("d3", 1.0),)
    for broken in ("['a' 'b']", "['a', 'b]"):
        path = folder(tmp_path, name="broken", train__csv=f'prompt,answers\na,"{broken}"\n')
        refused(path, "train.csv line 2: answers looks like a list", "JSON")


@pytest.mark.parametrize("name", ["test.ndjson", "test.jsonl.gz", "Test.jsonl", "TEST.NDJSON.GZ"])
def test_files_of_rows_are_found_by_other_names(tmp_path, name):
    path = folder(tmp_path)
    body = (json.dumps({"prompt": "other", "completion": "x"}) + "\n").encode()
    (path / name).write_bytes(gzip.compress(body) if name.lower().endswith("gz") else body)
    loaded = load(path)
    assert [row.prompt for row in loaded.test] == ["other"] and loaded.test[0].id.lower() == "test-1"
    folder(tmp_path, {"metric": "exact_match", "documents": name})
    refused(path, "held-out")
    (path / "test.csv").write_text("prompt,completion\na,b\n")
    (path / "task.yaml").write_text("metric: exact_match")
    refused(path, "remove the other")


def test_eval_is_dev_and_what_looks_like_a_split_is_named(tmp_path):
    path = folder(tmp_path, train=[ROW], eval=[{"prompt": "b", "completion": "x"}], test_data__csv="prompt\na\n")
    loaded = load(path)
    assert [row.prompt for row in loaded.dev] == ["b"]
    assert loaded.notes == ("test_data.csv is not read: test rows lie in test.csv",)
    folder(tmp_path, {"metric": "exact_match", "documents": "test_data.csv"}, train=[ROW])
    assert load(path).notes == ()


def test_broken_rows_of_train_are_left_out_and_named(tmp_path):
    rows = [f"p{n},c{n}" for n in range(96)]
    rows[9:9] = ["a,b,c", ",x", "y,"]
    loaded = load(folder(tmp_path, train__csv="\n".join(["prompt,completion", *rows])))
    assert len(loaded.train) == 96
    [note] = loaded.notes
    assert note.startswith("train.csv: 3 of 99 rows left out: line 11: wrong number of cells")
    assert "line 12: the prompt is null" in note and "line 13: the completion is null" in note
    many = folder(tmp_path, name="many", train__csv="\n".join(["prompt,completion", *rows[:40]]))
    refused(many, "train.csv: 3 of 40 rows cannot be used", "line 11", "line 13", "mend or remove them")
    lines = [json.dumps({"prompt": f"p{n}", "completion": "x"}) for n in range(99)] + ["{"]
    whole = folder(tmp_path, name="test", test__jsonl="\n".join([*lines, '{"prompt": "a"}']))
    refused(whole, "test.jsonl: 2 of 101 rows cannot be used", "line 100 is not JSON", "line 101: the completion")


def test_labels_are_told_as_accuracy_compares_them(tmp_path):
    rows = [{"prompt": "a", "completion": " Spam."}, {"prompt": "b", "completion": "ham"}]
    loaded = load(folder(tmp_path, "metric: accuracy\nlabels: [spam, ham]", train=rows))
    assert [row.completion for row in loaded.train] == ["spam", "ham"] and loaded.train[0].answers == ("spam",)
    floats = [{"prompt": "a", "completion": 1.0}, {"prompt": "b", "completion": 0.0}]
    loaded = load(folder(tmp_path, "metric: accuracy\nlabels: [0, 1]", "f", train=floats))
    assert [row.completion for row in loaded.train] == ["1", "0"]
    refused(folder(tmp_path, "metric: accuracy\nlabels: [spam, ham]", "n", train=[ROW]), "'two' is not one of the")
    own = [{"prompt": "a", "completion": "yes ", "choices": ["Yes", "No"]}]
    assert load(folder(tmp_path, "metric: accuracy", "own", train=own)).train[0].completion == "Yes"


def test_ids_that_repeat_are_told_apart(tmp_path):
    loaded = load(folder(tmp_path, train=[{**ROW, "id": name} for name in ("1", "1", "1~2", "1")]))
    assert [row.id for row in loaded.train] == ["1", "1~2", "1~2~2", "1~3"]
    assert loaded.notes == ("train.jsonl: 3 ids stand more than once ('1'); rows are told apart by ~2 …",)


def test_an_answer_may_be_to_say_nothing(tmp_path):
    rows = [{"prompt": "a", "completion": ""}, {"prompt": "b", "answers": []}, {"prompt": "c", "completion": "x"},
            {"prompt": "d", "answers": {"text": [], "answer_start": []}}]  # fmt: skip
    loaded = load(folder(tmp_path, "metric: token_f1", test=rows))
    assert [row.answers for row in loaded.test] == [("",), ("",), ("x",), ("",)]
    assert [row.answered for row in loaded.test] == [True] * 4 and "3 rows whose answer is empty" in loaded.notes[0]
    refused(folder(tmp_path, "metric: token_f1", "n", test=[{"prompt": "a", "completion": None}]), "completion is null")
    refused(folder(tmp_path, "metric: accuracy\nlabels: [a, b]", "l", test=rows[:1]), "completion is empty")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig", "cp1252"])
def test_tables_in_other_encodings_and_with_nameless_columns(tmp_path, encoding):
    text = "completion,prompt,,,\nspam,Gewinne £1000 für die Müllers,,,\nham,Grüße aus Köln,x,,\n"
    loaded = load(folder(tmp_path, train__csv=text.encode(encoding)))
    assert [row.prompt for row in loaded.train] == ["Gewinne £1000 für die Müllers", "Grüße aus Köln"]
    assert bool(loaded.notes) == (encoding != "utf-8-sig")


def test_what_would_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    line = json.dumps({"prompt": "a" * 1000, "completion": "b"}) + "\n"
    made = folder(tmp_path, train__jsonl__gz=gzip.compress(line.encode() * 50))
    assert len(load(made).train) == 50
    monkeypatch.setattr("whet.rows.MOST_UNPACKED", 10_000)
    refused(made, "train.jsonl.gz is too large", "unpacked")
    import pyarrow as arrow
    from pyarrow import parquet

    made = folder(tmp_path, "metric: accuracy", "p", test=[ROW])
    parquet.write_table(arrow.table({"prompt": ["a"] * 30, "completion": ["b"] * 30}), made / "train.parquet")
    assert load(made).train
    monkeypatch.setattr("whet.rows.MOST_ROWS", 29)
    refused(made, "train.parquet is too large", "29 rows", "found 30")


def test_a_grade_of_hundreds_of_digits_is_refused(tmp_path):
    row = '{"prompt": "a", "completion": "b", "evidence": {"d": ' + "9" * 400 + "}}\n"
    refused(folder(tmp_path, "metric: recall@5", test=row), "evidence cannot be read")
    assert number(10**400) is None and number(3) == 3.0


def test_further_fields_reach_a_metric_of_the_task(tmp_path):
    code = "def mine(answer, example): return float(answer == example.extra['tests'][0])\n"
    rows = [{"prompt": "a", "tests": ["one", "two"], "entry_point": "f", "none": None}]
    path = folder(tmp_path, "metric: score.py:mine", test=rows, score__py=code)
    loaded = load(path, trust=True)
    [row] = loaded.test
    assert dict(row.extra) == {"tests": ["one", "two"], "entry_point": "f"} and loaded.notes == ()
    assert row.answers == () and hash(row) == hash(load(path, trust=True).test[0])
    assert metrics.get(loaded.metric, path, True).score("one", row) == 1
    before = loaded.fingerprint
    (path / "test.jsonl").write_text(json.dumps({**rows[0], "tests": ["one"]}))
    assert load(path, trust=True).fingerprint != before
    assert rows_hash([Example("a", "b")]) == rows_hash([replace(row, id="a", prompt="b", extra=Extra())])


def test_columns_map_the_fields_of_rows(tmp_path):
    header = "metric: accuracy\ncolumns: {prompt: review, completion: sentiment}"
    test = [{"prompt": "p", "completion": "c"}]
    path = folder(tmp_path, header, train__csv="review,sentiment\nfine,good\n", test=test)
    loaded = load(path)
    assert [(row.prompt, row.completion) for row in (*loaded.train, *loaded.test)] == [("fine", "good"), ("p", "c")]
    assert loaded.columns == ("review", "sentiment") and loaded.notes == ()
    other = folder(tmp_path, "metric: accuracy\ncolumns: {completion: topic}", "o", train__csv="prompt,topic\na,b\n")
    assert load(other).train[0].completion == "b" and load(other).columns == ()
    gone = folder(tmp_path, header, "gone", train__csv="body,class\na,b\n")
    refused(gone, "fields body, class", "columns: {prompt:")


def test_choices_that_all_rows_share_are_labels(tmp_path):
    rows = [{"prompt": f"p{n}", "completion": "AB"[n % 2], "choices": ["A", "B"][:: 1 - 2 * (n % 2)]} for n in range(4)]
    loaded = load(folder(tmp_path, "metric: accuracy", train=rows, test=[{**rows[0], "prompt": "other"}]))
    assert loaded.labels == ("A", "B") and all(row.choices == () for row in (*loaded.train, *loaded.test))
    own = [*rows, {"prompt": "q", "completion": "C", "choices": ["A", "C"]}]
    loaded = load(folder(tmp_path, "metric: accuracy", "own", train=own))
    assert loaded.labels == () and all(row.choices for row in loaded.train)


def test_max_tokens_is_of_the_task(tmp_path):
    plain = load(folder(tmp_path))
    told = load(folder(tmp_path, "metric: exact_match\nmax_tokens: 512", "told"))
    assert (plain.max_tokens, told.max_tokens) == (None, 512)
    assert plain.fingerprint != told.fingerprint


def test_feedback_alone_is_a_task_of_win_rate(tmp_path):
    pairs = [{"prompt": example(n).prompt, "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)]
    header = {"metric": "win_rate", "feedback": "feedback.jsonl"}
    splits = load(folder(tmp_path, header, feedback=pairs)).split()
    assert splits.select and splits.learnable.train and not splits.confirm and splits.judging
    assert not {row.prompt for row in splits.select} & {row.prompt for row in splits.learnable.judged}
    refused(folder(tmp_path, {**header, "metric": "rouge_l"}, "other", feedback=pairs), "feedback alone", "win_rate")


# ------------------------------------------------------------------------------------------------------ fingerprints


def test_fingerprint_is_of_contents_not_of_paths(tmp_path):
    header = "metric: exact_match\ndocuments: docs.md\nearlier: [../old]"
    prints = []
    for place, doc, old in (("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")):
        folder(tmp_path / place, name="old", train=[{"prompt": "p", "completion": old}])
        prints.append(load(folder(tmp_path / place, header, place, train=[ROW], docs__md=doc)).fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3
    plain = load(folder(tmp_path, name="e")).fingerprint
    assert plain != load(folder(tmp_path, "metric: exact_match\ninstruction: x", "f")).fingerprint
    assert plain == load(folder(tmp_path, "metric: exact_match\nname: x", "g")).fingerprint


def test_rows_hash_sees_every_field_and_the_order():
    base = Example("a", "p", "c", ("c",))
    others = [
        Example("b", "p", "c", ("c",)),
        Example("a", "q", "c", ("c",)),
        Example("a", "p", "c", ("c", "d")),
        Example("a", "p", "c", ("c",), history=(("user", "x"),)),
        Example("a", "p", "c", ("c",), text="t"),
    ]
    assert len({rows_hash([row]) for row in (base, *others)}) == 6
    assert rows_hash([base, others[0]]) != rows_hash([others[0], base])


# ------------------------------------------------------------------------------------------------------------ splits


@st.composite
def many_rows(draw):
    """Rows with distinct prompts, some labels and some groups."""
    count = draw(st.integers(2, 120))
    labels = draw(st.integers(1, 5))
    grouped = draw(st.booleans())
    seed = draw(st.integers(0, 1000))
    chance = random.Random(seed)
    groups = [
        f"g{chance.randrange(count // 3 + 1)}" if grouped and chance.random() < 0.8 else None for _ in range(count)
    ]
    return [example(seed * 1000 + n, f"l{chance.randrange(labels)}", group=groups[n]) for n in range(count)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(many_rows(), st.integers(0, 3), st.integers(1, 60))
def test_cut_is_a_partition_with_groups_whole(rows, seed, size):
    kept, held = cut(rows, size, seed=seed, closed=True)
    assert sorted(kept + held) == list(range(len(rows)))
    groups = [{rows[i].group for i in part if rows[i].group} for part in (kept, held)]
    assert not groups[0] & groups[1]
    assert (kept, held) == cut(rows, size, seed=seed, closed=True)
    order = list(range(len(rows)))
    random.Random(1).shuffle(order)
    again = cut([rows[i] for i in order], size, seed=seed, closed=True)[1]
    assert sorted(rows[order[i]].id for i in again) == sorted(rows[i].id for i in held)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(many_rows(), st.integers(0, 3), st.integers(1, 60))
def test_cut_is_stratified_within_one(rows, seed, size):
    rows = [Example(row.id, row.prompt, row.completion) for row in rows]
    size = min(size, len(rows))
    held = cut(rows, size, seed=seed, closed=True)[1]
    assert len(held) == size
    counts, got = Counter(row.completion for row in rows), Counter(rows[i].completion for i in held)
    for label, count in counts.items():
        assert abs(got[label] - size * count / len(rows)) < 1


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(many_rows(), many_rows(), st.integers(0, 3), st.booleans())
def test_splits_share_nothing(train, test, seed, with_dev):
    chance = random.Random(seed)
    test = [replace(row, id=f"t{row.id}") for row in test]
    train = train + [Example(f"c{n}", chance.choice(test).prompt.upper() + "!", "l0") for n in range(5)]
    made = task(train, dev=tuple(test[::2]) if with_dev else (), test=tuple(test[1::2]))
    splits = made.split(seed)
    parts = (splits.learnable.train, splits.select, splits.confirm)
    for mark in (lambda row: row.id, lambda row: row.prompt.casefold().strip("!"), lambda row: row.group or row.id):
        marks = [{mark(row) for row in part} for part in parts]
        assert not (marks[0] & marks[1] or marks[0] & marks[2] or marks[1] & marks[2])
    assert splits.confirm == made.test and splits == made.split(seed)
    dropped = {row for row, _ in splits.dropped}
    everything = {row.id for row in (*train, *made.dev)}
    assert {row.id for row in (*parts[0], *parts[1])} | dropped == everything
    assert not dropped & {row.id for part in parts[:2] for row in part}


def test_select_is_a_fifth_and_at_most_400():
    rows = [example(n, "ab"[n % 2]) for n in range(3000)]
    assert len(task(rows[:100], ("a", "b")).split().select) == 20
    splits = task(rows, ("a", "b")).split()
    assert len(splits.select) == 400 and len(splits.learnable.train) == 2600
    assert Counter(row.completion for row in splits.select) == {"a": 200, "b": 200}
    other = task(rows, ("a", "b")).split(seed=1).select
    assert len(other) == 400 and other != splits.select
    assert len(task(rows[:2]).split().select) == 1 and task(rows[:1]).split().select == ()


def test_own_choices_do_not_hinder_the_count():
    rows = [example(n, f"answer {n}", choices=(f"answer {n}", "other")) for n in range(100)]
    rows += [Example(f"again{n}", rows[n].prompt, "other", choices=rows[n].choices) for n in range(20)]
    splits = task(rows).split()
    assert 23 <= len(splits.select) <= 25
    assert not {row.prompt for row in splits.select} & {row.prompt for row in splits.learnable.train}


def test_leaks_are_dropped_and_named():
    long = "the quick brown fox jumps over the lazy dog while the band plays on and on in the old town hall"
    test = (Example("t1", "What is it?", "x"), Example("t2", "other", "x", group="g"), Example("t3", long, "x"))
    train = [
        Example("a", "  what IS\nit ", "y", choices=("y", "z")),
        Example("b", "unlike", "x", group="g"),
        Example("c", long.replace("town", "towns"), "x"),
        Example("d", "kept", "x"),
        Example("e", "kept too", "x"),
    ]
    made = task(train, test=test)
    splits = made.split()
    assert splits.dropped == (("a", "repeats t1"), ("b", "shares group 'g' with t2"), ("c", "nearly repeats t3"))
    assert {row.id for row in (*splits.learnable.train, *splits.select)} == {"d", "e"}
    with pytest.raises(TaskError, match="3 learnable rows leak into held-out data; the first, a, repeats t1"):
        made.split(strict=True)
    assert task(train[3:], test=test).split(strict=True).dropped == ()


def test_select_rows_that_repeat_confirm_are_dropped():
    made = task(
        [example(1)], dev=(Example("d1", "same", "x"), Example("d2", "new", "x")), test=(Example("t", "Same.", "x"),)
    )
    splits = made.split()
    assert splits.dropped == (("d1", "repeats t"),) and [row.id for row in splits.select] == ["d2"]


def test_a_dev_that_is_all_of_test_leaves_train_to_select_from():
    rows = [example(n) for n in range(60)]
    splits = task(rows[:40], dev=tuple(rows[40:]), test=tuple(rows[40:])).split()
    assert len(splits.dropped) == 20 and len(splits.select) == 8 and len(splits.learnable.train) == 32


def test_rows_that_cannot_be_scored_are_learnt_from_and_not_selected_by():
    texts = [Example(f"t{n}", "", text=f"{n} plain words about the sea and ships") for n in range(50)]
    splits = task([*texts, *(example(n) for n in range(50))]).split()
    assert len(splits.select) == 10 and all(row.text is None for row in splits.select)
    assert len(splits.learnable.train) == 90 and set(texts) <= set(splits.learnable.train)
    seen = [example(n, "", evidence=(("d1", 1.0),) if n % 4 == 0 else ()) for n in range(80)]
    splits = replace(task(seen), metric="ndcg@10").split()
    assert len(splits.select) == 4 and all(row.evidence for row in splits.select)
    joined = Example("u", "", text="a word on them", group=splits.select[0].group or "g")
    grouped = [replace(row, group="g") if row is splits.select[0] else row for row in seen]
    again = replace(task([*grouped, joined]), metric="ndcg@10").split()
    assert not ({"g"} & {r.group for r in again.select} and {"g"} & {r.group for r in again.learnable.train})


def test_one_prompt_for_all_rows_is_told_apart_by_what_else_they_show():
    asked = "Which sentence is right?"
    sides = [(f"cats {n} sleep", f"cat {n} sleep") for n in range(60)]
    rows = [Example(f"r{n}", asked, side[0], choices=side) for n, side in enumerate(sides)]
    splits = task(rows[:40], test=tuple(rows[40:])).split()
    assert not splits.dropped and len(splits.select) == 8 and len(splits.learnable.train) == 32
    turned = replace(rows[50], id="x", choices=tuple(reversed(rows[50].choices)))
    assert task([*rows[:40], turned], test=tuple(rows[40:])).split().dropped == (("x", "repeats r50"),)
    told = [Example(f"s{n}", "Go on.", "x", history=(("system", f"story {n} of {n * n} ships"),)) for n in range(60)]
    assert not task(told[:40], test=tuple(told[40:])).split().dropped


def test_what_does_not_repeat():
    def kept(first: str, second: str) -> bool:
        return not task([Example("a", first, "x")], test=(Example("t", second, "x"),)).split().dropped

    assert kept("What is 3 - 5?", "What is 3 * 5?")
    assert kept("Please add the numbers 12345 and 54321 for me", "Please add the numbers 12345 and 54322 for me")
    assert kept("a good film", "a goof film")
    assert kept("...", "!?") and not kept("?!", "?!")
    one, two = (("user", "Name a fruit."),), (("user", "Name a town."),)
    made = task([Example("a", "Another.", "x", history=one)], test=(Example("t", "Another.", "x", history=two),))
    assert made.split().dropped == ()


def test_a_template_that_all_rows_share_is_not_a_repeat():
    template = "You are a careful reader. Read the review below and say whether its author liked the film or not. " * 3
    rows = [Example(f"r{n}", template + example(n).prompt[:20], "x") for n in range(60)]
    assert task(rows[:40], test=tuple(rows[40:])).split().dropped == ()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.booleans())
def test_near_repeats_finds_small_edits(seed, drop):
    chance = random.Random(seed)
    pool = [" ".join(example(seed + n).prompt.split() + example(seed + n + 500).prompt.split()) for n in range(40)]
    chosen = chance.randrange(40)
    words = pool[chosen].split()
    place = chance.randrange(len(words))
    words[place] = words[place][:-1] if drop else words[place][:2] + "q" + words[place][3:]
    assert near_repeats([" ".join(words)], pool) == [(0, chosen)]
    assert near_repeats([*pool, " ".join(words)]) == [(40, chosen)]


@pytest.mark.parametrize("seed", range(5))
def test_near_repeats_are_not_parted_between_train_and_select(seed):
    rows = [example(n, "ab"[n % 2]) for n in range(60)]
    rows = [replace(row, prompt=f"{row.prompt} {example(n + 500).prompt}") for n, row in enumerate(rows)]
    edited = [replace(row, id=f"{row.id}e", prompt=f"{row.prompt[:50]}{'z' if row.prompt[50] == 'q' else 'q'}"
                      f"{row.prompt[51:]}") for row in rows[:30]]  # fmt: skip
    splits = task([*rows, *edited], ("a", "b")).split(seed)
    train, select = ({row.id for row in part} for part in (splits.learnable.train, splits.select))
    assert len(train) + len(select) == 90 and not train & select and 16 <= len(select) <= 20
    assert any(row.id in select for row in edited)
    assert all((row.id in select) == (f"{row.id}e" in select) for row in rows[:30])


def test_near_repeats_is_fast():
    chance = random.Random(0)
    vocabulary = [f"w{n}x" for n in range(3000)]
    rows = [" ".join(chance.choices(vocabulary, k=25)) for _ in range(5400)]
    start = time.process_time()
    assert near_repeats(rows[:4000], rows[4000:]) == []
    assert time.process_time() - start < 4  # half of this is expected; the machine may be busy


def test_validation():
    rows = [example(n, "ab"[n % 2], group=f"g{n // 2}") for n in range(400)]
    learnable = task(rows, ("a", "b")).split().learnable
    fit, held = learnable.validation()
    assert len(held) == 32 and set(fit) | set(held) == set(learnable.train)
    assert not {row.group for row in fit} & {row.group for row in held}
    assert Counter(row.completion for row in held) == {"a": 16, "b": 16}
    assert learnable.validation() == (fit, held) != learnable.validation(seed=1)
    assert len(learnable.validation(share=0.5, most=20)[1]) == 20
    assert Learnable("n", "", "accuracy").validation() == ((), ())


# -------------------------------------------------------------------------------------------------- the shared tasks


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared task folder is absent")
@pytest.mark.parametrize("name", sorted(path.name for path in SHARED.glob("*") if path.is_dir()) or ["none"])
def test_shared_tasks_load_and_split(name):
    loaded = load(SHARED / name)
    assert loaded.name == name and (loaded.train or loaded.test) and loaded.notes == ()
    splits = loaded.split()
    learn, held = splits.learnable.train, (*splits.select, *splits.confirm)
    assert splits.confirm == loaded.test
    if not loaded.dev and loaded.train:
        assert len(learn) + len(splits.select) + len(splits.dropped) == len(loaded.train)
        assert len(splits.dropped) <= 0.15 * len(loaded.train)
        wanted = min(400, 0.2 * (len(learn) + len(splits.select)))
        assert abs(len(splits.select) - wanted) <= 5
    assert not {row.prompt for row in learn} & {row.prompt for row in held if row.prompt}
    assert not {row.group for row in learn if row.group} & {row.group for row in held if row.group}
    if splits.select and loaded.labels:
        share = len(splits.select) / (len(splits.select) + len(learn))
        counts = Counter(row.completion for row in (*learn, *splits.select))
        got = Counter(row.completion for row in splits.select)
        assert all(abs(got[label] - share * counts[label]) <= 3 for label in loaded.labels)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared task folder is absent")
def test_shared_text_is_kept_whole():
    loaded = load(SHARED / "wikitext2")
    assert len(loaded.test) == 60
    assert "".join(row.text or "" for row in loaded.test) == (SHARED / "wikitext2" / "test.txt").read_text("utf-8")


def test_ids_that_repeat_often_are_told_apart_in_one_pass(tmp_path: Path) -> None:
    rows = [{"id": f"user-{n % 2}", "prompt": f"question {n}", "completion": "yes"} for n in range(20_000)]
    (tmp_path / "task.yaml").write_text("metric: exact_match\n")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    ids = [e.id for e in load(tmp_path).train]
    assert len(set(ids)) == 20_000 and ids[:4] == ["user-0", "user-1", "user-0~2", "user-1~2"]
    assert ids[-1] == "user-1~10000"


def test_groups_are_the_same_with_and_without_a_point(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("metric: exact_match\n")
    rows = [{"prompt": f"question {n}", "completion": "yes", "group": float(n % 3)} for n in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "another", "completion": "no", "group": 1}) + "\n")
    splits = load(tmp_path).split()
    assert len(splits.dropped) == 4 and all(why.startswith("shares group") for _, why in splits.dropped)
