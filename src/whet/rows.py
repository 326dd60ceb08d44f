"""Files to rows: JSON lines, JSON, CSV, Parquet and plain text, each row with the place it stands at."""

from __future__ import annotations

import csv
import io
import json
import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.errors import TaskError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
COLUMN = r"[\w .()/-]{1,60}"  # names of columns that prompts may be written with
FIELDS = frozenset(("id", "prompt", "completion", "answers", "choices", "group", "evidence", "messages", "text",
                    "chosen", "rejected", "instruction", "input", "output", "system", "conversations"))  # fmt: skip
HEADING = re.compile(r"(?m)(?<=\n)[ \t]*\n[ \t]*= [^=\n]+ =[ \t]*\n(?=[ \t]*(?:\n|\Z))")
BLANK = re.compile(r"\n(?:[ \t]*\n)+")
QUOTED = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True)
class Row:
    """One row as the file has it: where it stands (for messages), its line or item number, and its fields."""

    where: str
    number: int
    values: Mapping[str, Any]


def short(value: object, width: int = 60) -> str:
    """A value on one short line, for messages (however large or deep it is)."""
    text = repr(value[: width + 1]) if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"


# ---------------------------------------------------------------------------------------------------- files to rows


def read(path: Path) -> list[Row]:
    """The rows of a JSONL, JSON, CSV, TSV, Parquet or text file as they are; raises TaskError naming file and line."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise TaskError(f"{path.name} cannot be read", expected=f"one of {', '.join(SUFFIXES)}", found=short(suffix))
    if suffix == ".parquet":
        rows = _parquet(path)
    else:
        text = decode(path)
        if suffix == ".jsonl":
            rows = _jsonl(path.name, text)
        elif suffix == ".json":
            rows = _json(path.name, text)
        elif suffix == ".txt":
            rows = [Row(f"{path.name} line {n}", n, {"text": part}) for n, part in articles(text)]
        else:
            rows = _csv(path.name, text, "\t" if suffix == ".tsv" else None)
    if not rows:
        raise TaskError(f"{path.name} has no rows", expected="at least one", do="fill it or remove the file")
    return rows


def decode(path: Path) -> str:
    """The text of a UTF-8 file (BOM and CRLF accepted); raises TaskError naming the byte that is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TaskError(
            f"{path.name} cannot be read: {error.strerror or error}", do="check the path and its permissions"
        ) from None
    if not data.strip():
        raise TaskError(f"{path.name} is empty", expected="at least one row", do="fill it or remove the file")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        kind = "what looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte 0x{data[error.start]:02x}"
        raise TaskError(
            f"{path.name} line {line}: byte offset {error.start} is not UTF-8", found=kind, do="save the file as UTF-8"
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        raise TaskError(f"{path.name} is empty", expected="at least one row", do="fill it or remove the file")
    return text


def articles(text: str) -> list[tuple[int, str]]:
    """A plain text cut into documents, each with the line it begins on; joined, they are the whole text again.

    Cut at ` = Title = ` headings that stand alone (the WikiText form) where there are any, else at blank lines.
    """
    starts = [match.start() for match in HEADING.finditer("\n\n" + text)]
    cuts = [max(start - 2, 0) for start in starts] if starts else [match.end() for match in BLANK.finditer(text)]
    edges = sorted({0, *cuts, len(text)})
    parts: list[tuple[int, str]] = []
    line = 1
    for begin, end in zip(edges, edges[1:], strict=False):
        part = text[begin:end]
        if parts and (not part.strip() or not parts[-1][1].strip()):  # blank beginnings and ends belong to a neighbour
            parts[-1] = (parts[-1][0], parts[-1][1] + part)
        else:
            parts.append((line, part))
        line += part.count("\n")
    return parts


def _jsonl(name: str, text: str) -> list[Row]:
    lines = text.split("\n")  # never splitlines(): U+2028 may stand inside a JSON string
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = getattr(error, "msg", "nested too deeply" if isinstance(error, RecursionError) else str(error))
            if number == len(lines) and line.lstrip()[0] == "{" and not line.rstrip().endswith("}"):
                raise TaskError(
                    f"{where}, the last, is truncated",
                    expected="a whole JSON object",
                    found=f"{short(line[-30:])} at its end",
                    do="write the file again or delete that line",
                ) from None
            raise TaskError(
                f"{where} is not JSON ({what})", expected="one JSON object a line", found=short(line)
            ) from None
        rows.append(_object(value, where, number))
    return rows


def _json(name: str, text: str) -> list[Row]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise TaskError(f"{name} is not JSON (nested too deeply)", expected="a list of objects") from None
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        if line > 1 and text.lstrip().startswith("{"):  # JSON lines under the name .json are common
            return _jsonl(name, text)
        raise TaskError(
            f"{name} line {line} is not JSON ({getattr(error, 'msg', error)})", expected="a list of objects"
        ) from None
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = [value] if FIELDS & value.keys() else lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise TaskError(f"{name} holds no rows", expected="a list of objects", found=type(value).__name__)
    return [_object(item, f"{name} item {n}", n) for n, item in enumerate(value, 1)]


def _object(value: object, where: str, number: int) -> Row:
    if not isinstance(value, dict):
        raise TaskError(f"{where} is not an object", expected='{"prompt": …, "completion": …}', found=short(value))
    return Row(where, number, value)


def _csv(name: str, text: str, delimiter: str | None) -> list[Row]:
    if delimiter is None:  # a semicolon is what spreadsheets write in half of Europe
        head = text.lstrip("\n").split("\n", 1)[0]
        delimiter = max(",;\t|", key=lambda mark: len(next(csv.reader([head], delimiter=mark))))
    raw = delimiter == "\t" and _unquoted(text)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True,
        quoting=csv.QUOTE_NONE if raw else csv.QUOTE_MINIMAL,
    )  # fmt: skip
    rows: list[Row] = []
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            start, begun = reader.line_num + 1, start
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _header(name, begun, cells)
                continue
            if len(cells) != len(header):
                raise TaskError(
                    f"{name} line {begun}: wrong number of cells",
                    expected=f"{len(header)} ({', '.join(header)})",
                    found=str(len(cells)),
                    do="quote cells that hold the separator; is the line whole?",
                )
            named = {key: _cell(key, cell) for key, cell in zip(header, cells, strict=True) if key}
            rows.append(Row(f"{name} line {begun}", begun, named))
    except csv.Error as error:
        raise TaskError(
            f"{name} line {start} is not CSV ({error})", expected="quotes closed and cells below 128 KB"
        ) from None
    return rows


def _unquoted(text: str) -> bool:
    """Whether quotes are text: each line is a row as it is, and a cell begins with a quote that does not wrap it."""
    lines = [line.split("\t") for line in text.split("\n") if line.strip()]
    if len(set(map(len, lines))) > 1 or lines[0][0].startswith('"'):  # a header in quotes: one wrong cell is an error
        return False
    return any(cell.startswith('"') and not QUOTED.fullmatch(cell) for cells in lines for cell in cells)


def _header(name: str, line: int, cells: Sequence[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = [
        cell for cell, count in Counter(header).items() if count > 1
    ]  # one nameless column is an index; it is ignored
    if twice:
        raise TaskError(
            f"{name} line {line}: the columns need different names",
            found=f"{short(twice[0])} twice",
            do="write a header line",
        )
    return header


def _cell(key: str, cell: str) -> Any:
    """Cells of list fields hold JSON; an empty cell is an absent value."""
    if not cell:
        return None
    lists = ("answers", "choices", "evidence", "messages", "conversations")
    if key in (*lists, "prompt", "completion", "chosen", "rejected") and cell[0] in "[{":
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        chat = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
        return value if chat or key in lists else cell
    return cell


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TaskError(f"{path.name} needs pyarrow", do='pip install "whet[parquet]"') from None
    try:
        table = pyarrow.parquet.read_table(path)
        values = table.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        first = (str(error).splitlines() or ["unreadable"])[0]
        raise TaskError(
            f"{path.name} is not a Parquet file that can be read ({short(first, 120)})", do="write it again"
        ) from None
    return [Row(f"{path.name} row {n}", n, value) for n, value in enumerate(values, 1)]
