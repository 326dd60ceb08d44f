"""Files to rows, and rows of every form to standard fields."""

from __future__ import annotations

import csv
import io
import json
import sys

import pytest
from files import refused, write
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.convert import standard
from whet.rows import Row, articles, read, short
from whet.task import load


def row(**values: object) -> Row:
    return Row("x line 1", 1, values)


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


def test_calls_of_tools():
    calls = [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    chat = [
        {"role": "user", "content": "Rain in Köln?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "sunny", "tool_call_id": "a"},
        {"role": "assistant", "content": "No, sun."},
    ]
    history = (("user", "Rain in Köln?"), ("assistant", json.dumps(calls)))
    assert standard(row(messages=chat))[0] == {"prompt": "sunny", "completion": "No, sun.", "history": history}
    assert standard(row(messages=chat[:2]))[0] == {"prompt": "Rain in Köln?", "completion": json.dumps(calls)}
    more = [*chat, {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Bye"}]
    assert standard(row(messages=more))[0]["history"] == (*history, ("tool", "sunny"), ("assistant", "No, sun."))
    refused(lambda: standard(row(messages=chat[2:])), "no question")


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
    import pyarrow
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
