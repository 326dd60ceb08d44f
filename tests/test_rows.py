"""Tables as people write them: quotes that wrap a cell, and quotes that are text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from whet.errors import TaskError
from whet.rows import literal, read


def cells(path: Path, text: str) -> list[tuple[str, ...]]:
    path.write_text(text, "utf-8")
    return [tuple(row.values.values()) for row in read(path)]


@pytest.mark.parametrize("rows", [
    [('"Good" he said', "a"), ("plain", "b"), ('so "so" it is', "c")],
    [('"not closed', "a"), ("plain", "b"), ('not begun"', "a")],
    [('"a" and "b"', "a"), ('"wrapped"', "b")],
])  # fmt: skip
def test_quotes_in_an_unquoted_tsv_are_text(tmp_path, rows):
    lines = ["prompt\tcompletion", *map("\t".join, rows)]
    assert cells(tmp_path / "train.tsv", "\n".join(lines) + "\n\n") == rows


def test_a_wrong_cell_in_a_quoted_tsv_is_an_error(tmp_path):
    with pytest.raises(TaskError, match="train.tsv line 2 is not CSV"):
        cells(tmp_path / "train.tsv", '"prompt"\t"completion"\n"a "b" c"\t"x"\n')


@pytest.mark.parametrize("text, rows", [
    ('"a ""b"" c"\tx\nplain\t"y"\n', [('a "b" c', "x"), ("plain", "y")]),
    ('"two\nlines"\tx\n', [("two\nlines", "x")]), ('"a\ttab"\tx\n"b"\ty\n', [("a\ttab", "x"), ("b", "y")]),
])  # fmt: skip
def test_a_quoted_tsv_is_read_as_quoted(tmp_path, text, rows):
    assert cells(tmp_path / "train.tsv", "prompt\tcompletion\n" + text) == rows
    assert cells(tmp_path / "train.csv", ("prompt\tcompletion\n" + text).replace("\t", ",")) == [
        tuple(cell.replace("\t", ",") for cell in row) for row in rows
    ]


def test_long_text_without_blank_lines_is_cut_into_rows(tmp_path):
    lines = [" ".join(f"w{n}" for n in range(line, line + 30)) + "\n" for line in range(100)]
    path = tmp_path / "train.txt"
    path.write_text("".join(lines), "utf-8")
    parts = [row.values["text"] for row in read(path)]
    assert "".join(parts) == "".join(lines) and all(part.endswith("\n") for part in parts)
    assert [len(part.split()) for part in parts] == [510, 510, 510, 510, 510, 450]
    assert [row.number for row in read(path)][:3] == [1, 18, 35]
    path.write_text(" ".join(["word"] * 1300), "utf-8")
    assert [len(row.values["text"].split()) for row in read(path)] == [625, 625, 50]


def test_broken_rows_are_told_apart_where_asked(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a"}\nhello\n[1]\n{"prompt": "b"}\n', "utf-8")
    broken: list = []
    assert [row.number for row in read(path, broken)] == [1, 4] and [n for n, _ in broken] == [2, 3]
    with pytest.raises(TaskError, match="line 2 is not JSON"):
        read(path)


def test_json_in_a_cell_may_hold_code(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "what does x.split(' ') do?"}, {"role": "assistant", "content": "it parts x"}]
    cell = json.dumps(chat).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'prompt,completion\n"{cell}",yes\n')
    assert read(tmp_path / "a.csv")[0].values["prompt"] == chat
    assert literal("['a' 'b']") is None and literal("['a', 'b']") == ["a", "b"]
