"""Tables as people write them: quotes that wrap a cell, and quotes that are text."""

from __future__ import annotations

from pathlib import Path

import pytest

from whet.errors import TaskError
from whet.rows import read


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
