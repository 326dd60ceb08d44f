"""Files to rows, rows of every form to standard fields, and `whet init`."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.convert import init, standard
from whet.errors import TaskError
from whet.rows import Row, articles, read, short
from whet.task import load

REVIEWS = [(f"film number {n} was {'good' if n % 2 else 'bad'} to look at", ("neg", "pos")[n % 2]) for n in range(60)]


def row(**values: object) -> Row:
    return Row("x line 1", 1, values)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(call, *words: str) -> None:
    with pytest.raises(TaskError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


# ---------------------------------------------------------------------------------------------------- forms of rows


def test_messages():
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": [{"type": "text", "text": "name "}, {"type": "text", "text": "one"}]},
        {"role": "assistant", "content": "Ada"},
    ]
    history = (("system", "be brief"), ("user", "hi"), ("assistant", "hello"))
    expected = {"prompt": "name one", "completion": "Ada", "history": history}
    assert standard(row(messages=chat)) == (expected, "messages")
    open_end, _ = standard(row(messages=chat[:-1]))
    assert "completion" not in open_end and open_end["prompt"] == "name one"
    assert standard(row(prompt=chat[:-1], completion=chat[-1:])) == (expected, "conversational")
    assert standard(row(prompt=chat[:-1], completion="Ada")) == (expected, "conversational")


def test_sharegpt():
    chat = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    assert standard(row(conversations=chat)) == ({"prompt": "hi", "completion": "hello"}, "ShareGPT")
    with_system, _ = standard(row(conversations=chat, system="be brief"))
    assert with_system["history"] == (("system", "be brief"),)


def test_alpaca():
    assert standard(row(instruction="add", input="1 2", output="3")) == (
        {"prompt": "add\n\n1 2", "completion": "3"},
        "Alpaca",
    )
    assert standard(row(instruction="add", input="", output=3))[0] == {"prompt": "add", "completion": "3"}


def test_pairs():
    user, good, bad = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "good"},
        {"role": "assistant", "content": "bad"},
    )
    expected = {"prompt": "q", "completion": "good", "rejected": "bad"}
    assert standard(row(prompt="q", chosen="good", rejected="bad")) == (expected, "")
    assert standard(row(prompt=[user], chosen=[good], rejected=[bad])) == (expected, "conversational")
    assert standard(row(chosen=[user, good], rejected=[user, bad])) == (expected, "conversational")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"messages": []}, ("messages is not a chat",)),
        ({"messages": "hi"}, ("messages is not a chat",)),
        ({"messages": ["hi"]}, ("turn", "not an object")),
        ({"messages": [{"role": "wizard", "content": "a"}]}, ("unknown role", "'wizard'")),
        ({"messages": [{"role": "user", "content": None}]}, ("no content",)),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, ("not text",)),
        ({"messages": [{"role": "assistant", "content": "a"}]}, ("no question",)),
        ({"prompt": "a", "completion": [{"role": "user", "content": "b"}]}, ("does not end with an answer",)),
    ],
)
def test_bad_chats(values, words):
    refused(lambda: standard(row(**values)), "x line 1", *words)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(texts, texts, st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), texts), max_size=4))
def test_every_chat_form_reads_the_same(prompt, completion, history):
    turns = [*history, ("user", prompt), ("assistant", completion)]
    chat = [{"role": role, "content": content} for role, content in turns]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    other = [{"from": names[role], "value": content} for role, content in turns]
    expected = {"prompt": prompt, "completion": completion} | ({"history": tuple(history)} if history else {})
    assert standard(row(messages=chat))[0] == expected
    assert standard(row(conversations=other))[0] == expected
    assert standard(row(prompt=chat[:-1], completion=chat[-1:]))[0] == expected


# -------------------------------------------------------------------------------------------------------- files


values = st.fixed_dictionaries({"prompt": texts, "completion": texts, "group": st.none() | st.integers() | texts})


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=8))
def test_rows_survive_jsonl_and_json(tmp_path_factory, rows):
    place = tmp_path_factory.mktemp("rows")
    lines = write(place / "a.jsonl", "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in rows))
    assert [dict(found.values) for found in read(lines)] == rows
    assert [found.number for found in read(lines)] == list(range(1, len(rows) + 1))
    assert [dict(found.values) for found in read(write(place / "a.json", json.dumps(rows)))] == rows
    assert [dict(found.values) for found in read(write(place / "b.json", json.dumps({"data": rows})))] == rows


plain = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(lambda t: t.strip())


@settings(deadline=None)
@given(st.lists(st.tuples(plain, plain), min_size=1, max_size=8), st.sampled_from(",;\t|"))
def test_rows_survive_csv(tmp_path_factory, rows, delimiter):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([("prompt", "review"), *rows])
    path = write(tmp_path_factory.mktemp("rows") / "a.csv", text.getvalue())
    assert [(found.values["prompt"], found.values["review"]) for found in read(path)] == rows


def test_csv_cells(tmp_path):
    text = ',prompt,completion,choices,answers\n0,"a\nb",x,"[""x"", ""y""]",\n\n1,[Music] plays,y,"[""x"", ""y""]",z\n'
    first, second = read(write(tmp_path / "a.csv", text))
    assert dict(first.values) == {"prompt": "a\nb", "completion": "x", "choices": ["x", "y"], "answers": None}
    assert (first.where, second.where) == ("a.csv line 2", "a.csv line 5")
    assert second.values["prompt"] == "[Music] plays" and second.values["answers"] == "z"
    write(tmp_path / "task.yaml", "metric: accuracy")
    path = tmp_path / "train.csv"
    (tmp_path / "a.csv").rename(path)
    loaded = load(tmp_path)
    assert loaded.closed and [example.id for example in loaded.train] == ["train-2", "train-5"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": "a", "completion": True, "answers": ["b"]}, {"prompt": "c", "completion": None, "answers": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [dict(found.values) for found in read(tmp_path / "a.parquet")] == rows
    assert read(tmp_path / "a.parquet")[1].where == "a.parquet row 2"
    refused(lambda: read(write(tmp_path / "b.parquet", "hello")), "b.parquet", "not a Parquet file")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(lambda: read(write(tmp_path / "a.parquet", "x")), "a.parquet", 'pip install "whet[parquet]"')


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "prompt,completion\na\n", ("a.csv line 2", "expected 2", "found 1")),
        ("a.csv", "prompt,completion\na,b\nc,d,e\n", ("a.csv line 3", "found 3")),
        ("a.csv", 'prompt,completion\na,b\n"c,d\n', ("a.csv line 3", "not CSV")),
        ("a.csv", "prompt,prompt\na,b\n", ("a.csv line 1", "'prompt' twice")),
        ("a.csv", "prompt,completion\n", ("a.csv has no rows",)),
        ("a.json", "[]", ("a.json has no rows",)),
        ("a.json", "{", ("a.json line 1 is not JSON",)),
        ("a.json", '{"a": 1}', ("a.json holds no rows",)),
        ("a.json", '[{"a": 1}, 2]', ("a.json item 2 is not an object",)),
        ("a.json", "[" * 100_000, ("a.json",)),
        ("a.xlsx", "x", ("a.xlsx", ".parquet")),
    ],
)
def test_bad_files(tmp_path, name, text, words):
    refused(lambda: read(write(tmp_path / name, text)), *words)


def test_json_lines_under_the_name_json(tmp_path):
    path = write(tmp_path / "a.json", '{"prompt": "a"}\n{"prompt": "b"}\n')
    assert [found.values["prompt"] for found in read(path)] == ["a", "b"]
    assert read(write(path, '{"prompt": "a", "answers": ["b"]}'))[0].values["answers"] == ["b"]


def test_articles():
    text = " \n = One = \n \n a \n = x = y \n \n = = Part = = \n \n b \n \n = Two = \n \n c \n"
    found = articles(text)
    assert [line for line, _ in found] == [1, 10] and "".join(part for _, part in found) == text
    assert found[1][1].split() == ["=", "Two", "=", "c"]
    assert articles("= One =\n\na\n")[0] == (1, "= One =\n\na\n")
    assert articles("\n\na\nb\n\n\nc") == [(1, "\n\na\nb\n\n\n"), (7, "c")]


@given(st.text(st.sampled_from("ab= \n\t"), min_size=1, max_size=80))
def test_articles_lose_nothing(text):
    found = articles(text)
    assert "".join(part for _, part in found) == text
    assert not text.strip() or all(part.strip() for _, part in found)
    assert all(line == text[: sum(len(p) for _, p in found[:n])].count("\n") + 1 for n, (line, _) in enumerate(found))


def test_short():
    deep: list = []
    deep.append(deep)
    assert len(short(deep)) < 80 and len(short("x" * 10**6)) <= 60 and short("a") == "'a'"


# ---------------------------------------------------------------------------------------------------------- init


def make_csv(path: Path, header: str, rows) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([header.split(","), *rows])
    return write(path, text.getvalue())


def test_init_of_a_table(tmp_path):
    data = make_csv(
        tmp_path / "my reviews.csv", "when,opinion,verdict", [(n, *cells) for n, cells in enumerate(REVIEWS)]
    )
    guess = init(data, tmp_path / "task")
    assert guess.columns == {"prompt": "opinion", "completion": "verdict"} and guess.labels == ("neg", "pos")
    assert (guess.kind, guess.rows, guess.metric) == ("columns", 60, "accuracy")
    assert "column 'opinion' read as the prompt (longest text)" in guess.lines
    assert any("'verdict'" in line and "few different values" in line for line in guess.lines)
    assert "columns not used: when" in guess.lines
    loaded = load(tmp_path / "task")
    assert (loaded.name, loaded.metric, loaded.labels) == ("my-reviews", "accuracy", ("neg", "pos"))
    assert loaded.columns == loaded.split().learnable.columns == ("opinion", "verdict")
    assert (len(loaded.train), len(loaded.test)) == (48, 12)
    assert sum(example.completion == "pos" for example in loaded.test) == 6
    assert {(example.prompt, example.completion) for example in (*loaded.train, *loaded.test)} == set(REVIEWS)
    assert sorted(path.name for path in (tmp_path / "task").iterdir()) == ["task.yaml", "test.jsonl", "train.jsonl"]
    refused(lambda: init(data, tmp_path / "task"), "already holds task.yaml", "--out")
    init(data, tmp_path / "again", name="other")
    assert load(tmp_path / "again").name == "other"
    assert (tmp_path / "again" / "test.jsonl").read_text() == (tmp_path / "task" / "test.jsonl").read_text()


def test_init_by_names_and_context(tmp_path):
    rows = [{"context": f"c{n}", "question": f"why {n}?", "answer": f"because of it {n}", "id": n} for n in range(10)]
    guess = init(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))), tmp_path / "t")
    assert guess.columns == {"prompt": "question", "completion": "answer", "context": "context"}
    assert guess.metric == "token_f1" and guess.labels == ()
    assert load(tmp_path / "t").columns == ()  # a prompt of two columns has no name
    assert "c3\nwhy 3?" in {example.prompt for example in (*load(tmp_path / "t").train, *load(tmp_path / "t").test)}


def test_init_takes_labels_that_yaml_would_change(tmp_path):
    rows = [(f"question number {n}", ("yes", "no")[n % 2]) for n in range(20)]
    assert init(make_csv(tmp_path / "a.csv", "text,label", rows), tmp_path / "t").labels == ("no", "yes")
    assert load(tmp_path / "t").labels == ("no", "yes")


def test_init_of_known_forms(tmp_path):
    chat = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a {n}"}] for n in range(10)]
    two = [[*turns, {"role": "user", "content": "more"}, {"role": "assistant", "content": "ok"}] for turns in chat]
    share = [[{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "word " * 30}] for n in range(10)]
    forms = {
        "messages": [{"messages": turns} for turns in two],
        "ShareGPT": [{"conversations": turns} for turns in share],
        "Alpaca": [{"instruction": f"q{n}", "input": "", "output": f"a{n}"} for n in range(10)],
        "prompt and completion": [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(10)],
        "text": [{"text": f"text {n}"} for n in range(10)],
        "pairs": [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(10)],
    }
    metrics = {"ShareGPT": "rouge_l", "text": "perplexity", "pairs": "win_rate"}
    for kind, rows in forms.items():
        out = tmp_path / kind
        guess = init(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))), out)
        assert (guess.kind, guess.rows) == (kind, 10)
        assert guess.metric == metrics.get(kind, "exact_match")
        assert len(load(out).test) == 2
    assert load(tmp_path / "messages").test[0].history[-1][0] == "assistant"
    assert load(tmp_path / "pairs").feedback == "feedback.jsonl" and load(tmp_path / "pairs").test[0].rejected == "b"


def test_init_of_choices(tmp_path):
    rows = [{"prompt": f"q{n}", "completion": f"a{n}", "choices": [f"a{n}", "b"]} for n in range(10)]
    guess = init(write(tmp_path / "a.json", json.dumps(rows)), tmp_path / "t")
    assert (guess.metric, guess.labels) == ("accuracy", ()) and load(tmp_path / "t").closed


def test_init_skips_rows_without_an_answer(tmp_path):
    rows = [*REVIEWS, ("no verdict here", ""), ("", "pos")]
    guess = init(make_csv(tmp_path / "a.csv", "review,sentiment", rows), tmp_path / "t")
    assert guess.rows == 60 and any(line.startswith("2 of 62 rows skipped") for line in guess.lines)


def test_init_refuses_what_it_cannot_read(tmp_path):
    out = tmp_path / "t"
    refused(lambda: init(tmp_path / "none.csv", out), "none.csv", "nothing")
    refused(lambda: init(tmp_path, out), "a folder")
    refused(
        lambda: init(make_csv(tmp_path / "a.csv", "a good film,pos", REVIEWS), out), "line 1 looks like data", "header"
    )
    refused(lambda: init(make_csv(tmp_path / "b.csv", "only", [("x",), ("y",)]), out), "b.csv", "columns only")
    refused(lambda: init(make_csv(tmp_path / "c.csv", "prompt,completion", [("a", "b")]), out), "at least 2 rows")
    refused(lambda: init(write(tmp_path / "d.csv", b"a,b\n\xff,x\n"), out), "d.csv line 2", "byte offset 4")
    assert not out.exists()
