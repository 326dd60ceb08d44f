"""Files to rows: JSON lines, JSON, CSV, Parquet and plain text, each row with the place it stands at."""

from __future__ import annotations

import ast
import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from whet.errors import TaskError

MOST_CELL = 50_000_000  # bytes of a CSV's cell
MOST_UNPACKED, MOST_ROWS = 2_000_000_000, 10_000_000  # bytes of a packed file, rows of a Parquet file: few hold more
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")  # all but Parquet may end in .gz
COLUMN = r"[\w .()/-]{1,60}"  # names of columns that prompts may be written with
FIELDS = frozenset(("id", "prompt", "completion", "answers", "choices", "group", "evidence", "messages", "text",
                    "chosen", "rejected", "instruction", "input", "output", "system", "conversations"))  # fmt: skip
HEADING = re.compile(r"(?m)(?<=\n)[ \t]*\n[ \t]*= [^=\n]+ =[ \t]*\n(?=[ \t]*(?:\n|\Z))")
BLANK = re.compile(r"\n(?:[ \t]*\n)+")
QUOTED = re.compile(r'"(?:[^"]|"")*"')
LISTS = ("answers", "choices", "evidence", "messages", "conversations")  # fields whose cells hold lists
BROKEN = 0.05  # the share of a file's rows that may be left out
WORDS = 500  # a plain text without headings is cut into rows of about so many words
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
# What is written under these names is in truth (WHATWG's Encoding Standard).
WIDER = {"euc_kr": "cp949", "shift_jis": "cp932", "gb2312": "gb18030", "iso8859-1": "cp1252"}
# Encodings of text that names none: characters that show one, and the least share of these in all beyond ASCII.
GUESSES = (("cp932", "[ぁ-ヶ]", 0.3), ("euc_jp", "[ぁ-ヶ]", 0.3), ("cp949", "[\uac00-\ud7a3]", 0.8),
           ("gb2312", "[一-龥]", 0.8),
           ("cp1252", "(?<=[A-Za-z])[¡-ÿ‘-…]|[¡-ÿ‘-…](?=[A-Za-z])|[£¥](?=\\d)", 0.5))  # fmt: skip
Broken = list[tuple[int, TaskError]]  # line or item numbers of rows that cannot be read, and why
Made = TypeVar("Made")


@dataclass(frozen=True)
class Row:
    """One row as the file has it: where it stands (for messages), its line or item number, and its fields."""

    where: str
    number: int
    values: Mapping[str, Any]


def short_line(text: str, width: int) -> str:
    """A text cut to so many characters, the cut marked by an ellipsis."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def short(value: object, width: int = 60) -> str:
    """A value on one short line, for messages (however large or deep it is)."""
    return short_line(repr(value[: width + 1]) if isinstance(value, str) else reprlib.repr(value), width)


# ---------------------------------------------------------------------------------------------------- files to rows


def suffix_of(name: str) -> str:
    """The ending that says how a file is read, in lower case and without .gz; "" for none."""
    return Path(name.lower().removesuffix(".gz")).suffix


def stem_of(name: str) -> str:
    """A file's name without its ending, nor .gz."""
    return Path(re.sub(r"(?i)\.gz$", "", name)).stem


def read(path: Path, broken: Broken | None = None, notes: list[str] | None = None) -> list[Row]:
    """The rows of a JSONL, JSON, CSV, TSV, Parquet or text file as they are; raises TaskError naming file and line.

    With `broken`, single rows that cannot be read go there instead. `notes` are told of a guessed encoding.
    """
    suffix = suffix_of(path.name)
    if suffix not in SUFFIXES:
        sheet = "save the sheet as CSV" if suffix in (".xlsx", ".xls", ".ods", ".numbers") else ""
        raise TaskError(f"{path.name} cannot be read", expected=f"one of {', '.join(SUFFIXES)}", found=short(suffix),
                        do=sheet)  # fmt: skip
    lost: Broken = []
    if suffix == ".parquet":
        rows = _parquet(path)
    else:
        text = decode(path, notes)
        if suffix in (".jsonl", ".ndjson"):
            rows = _jsonl(path.name, text, lost)
        elif suffix == ".json":
            rows = _json(path.name, text, lost)
        elif suffix == ".txt" and _tabled(text):
            rows = _csv(path.name, text, "\t", lost)
        elif suffix == ".txt":
            rows = [Row(f"{path.name} line {n}", n, {"text": part}) for n, part in articles(text)]
        else:
            rows = _csv(path.name, text, "\t" if suffix == ".tsv" else None, lost)
    if lost and broken is None:
        raise lost[0][1]
    if broken is not None:
        broken += lost
    if not rows and not lost:
        raise TaskError(f"{path.name} has no rows", expected="at least one", do="fill it or remove the file")
    return rows


def sift(
    name: str, rows: Iterable[Row], make: Callable[[Row], Made], broken: Broken, notes: list[str], whole: bool = False
) -> list[Made]:
    """What `make` makes of each row. The rows on which it raises TaskError, and `broken` ones, are left out and noted.

    Raises one TaskError that names the first of them where they are more than `BROKEN` of all, or where the rows are
    to be `whole`.
    """
    made, broken = [], list(broken)
    for row in rows:
        try:
            made.append(make(row))
        except TaskError as error:
            broken.append((row.number, error))
    broken.sort(key=lambda one: one[0])
    every = len(made) + len(broken)
    if len(broken) == 1 and (whole or BROKEN * every < 1):
        raise broken[0][1]
    said = "; ".join(short_line(str(error).removeprefix(f"{name} "), 110 if n else 300)
                     for n, (_, error) in enumerate(broken[:4]))  # fmt: skip
    said += "; …" if len(broken) > 4 else ""
    if broken and (whole or len(broken) > BROKEN * every):
        raise TaskError(
            f"{name}: {len(broken)} of {every} rows cannot be used",
            expected="none in rows that are measured on" if whole else f"at most {BROKEN:.0%}",
            found=said,
            do="mend or remove them",
        )
    if broken:
        notes.append(f"{name}: {len(broken)} of {every} rows left out: {said}")
    return made


def decode(path: Path, notes: list[str] | None = None) -> str:
    """The text of a file (also gzipped; BOM and CRLF accepted); raises TaskError naming a byte that cannot be read."""
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as stream:
                data = stream.read(MOST_UNPACKED + 1)
            if len(data) > MOST_UNPACKED:
                raise TaskError(f"{path.name} is too large", expected=f"at most {MOST_UNPACKED / 1e9:g} GB unpacked",
                                found="more", do="take a part of it")  # fmt: skip
        else:
            data = path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(
            f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}",
            do="check the path and its permissions",
        ) from None
    if not data.strip():
        raise TaskError(f"{path.name} is empty", expected="at least one row", do="fill it or remove the file")
    try:
        text, encoding = decoded(data, "", path.name)
    except TaskError:
        at = _first_broken(data)
        line = data.count(b"\n", 0, at) + 1
        raise TaskError(
            f"{path.name} line {line}: byte offset {at} is not UTF-8",
            found=f"byte 0x{data[at]:02x}",
            do="save the file as UTF-8",
        ) from None
    if notes is not None and encoding not in ("utf-8", "utf-8-sig"):
        notes.append(f"{path.name}: read as {encoding}")
    if notes is not None and (lost := text.count("\ufffd")):
        notes.append(f"{path.name}: {lost} characters stand as \ufffd: their bytes are not {encoding}")
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    text = text if "\n" in text else text.replace("\r", "\n")  # lines as Macintosh once ended them
    if not text.strip():
        raise TaskError(f"{path.name} is empty", expected="at least one row", do="fill it or remove the file")
    return text


def _first_broken(data: bytes) -> int:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def decoded(data: bytes, declared: str, name: str) -> tuple[str, str]:
    """Text and its encoding: by a byte order mark, as declared, as UTF-8, or by a guess; else TaskError."""
    for mark, encoding in BOMS:
        if data.startswith(mark):
            return data.decode(encoding, "replace"), encoding
    try:
        encoding = codecs.lookup(declared or "utf-8").name
        return data.decode(WIDER.get(encoding, encoding)), WIDER.get(encoding, encoding)
    except (LookupError, ValueError):
        pass
    if (text := _nearly(data, "utf-8")) is not None:
        return text, "utf-8"
    if declared:
        with contextlib.suppress(LookupError):
            encoding = codecs.lookup(declared).name
            encoding = WIDER.get(encoding, encoding)
            if (text := _nearly(data, encoding)) is not None:
                return text, encoding
    for read in (_whole, _nearly):
        for encoding, own, least in GUESSES:
            text = read(data, encoding)
            if text is not None and len(re.findall(own, text)) >= least * sum(c > "\x7f" for c in text):
                return text, encoding
    raise TaskError(f"{name} is in no encoding that is known", expected="UTF-8", do="save it as UTF-8")


def _whole(data: bytes, encoding: str) -> str | None:
    """The text in an encoding; None where a byte is broken."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _nearly(data: bytes, encoding: str) -> str | None:
    """The text in an encoding of which a few bytes are broken; None where there are more."""
    text = data.decode(encoding, "replace")
    return text if 10 * text.count("\ufffd") <= sum(c > "\x7f" for c in text) else None


def articles(text: str) -> list[tuple[int, str]]:
    """A plain text cut into documents, each with the line it begins on; joined, they are the whole text again.

    Cut at ` = Title = ` headings that stand alone (the WikiText form) where there are any, else at blank lines, and
    what then has more than `WORDS` words once more: at the end of a line or, within a long one, of a word.
    """
    starts = [match.start() for match in HEADING.finditer("\n\n" + text)]
    cuts = [max(start - 2, 0) for start in starts] if starts else [match.end() for match in BLANK.finditer(text)]
    edges = sorted({0, *cuts, len(text)})
    if not starts:
        edges = sorted({*edges, *(at for span in zip(edges, edges[1:], strict=False) for at in _pieces(text, *span))})
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


def _pieces(text: str, begin: int, end: int) -> list[int]:
    """Where to cut a long part of a text: after `WORDS` words at the end of a line, or a quarter later of a word."""
    cuts, count = [], 0
    for word in re.finditer(r"\S+\s*", text[begin:end]):
        count += 1
        if count >= WORDS and ("\n" in word[0] or count >= 1.25 * WORDS):
            cuts.append(begin + word.end())
            count = 0
    return cuts


def _jsonl(name: str, text: str, lost: Broken) -> list[Row]:
    lines = text.split("\n")  # never splitlines(): U+2028 may stand inside a JSON string
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = getattr(error, "msg", "nested too deeply" if isinstance(error, RecursionError) else str(error))
            if number == len(lines) and line.lstrip()[0] == "{" and not line.rstrip().endswith("}"):
                problem = TaskError(
                    f"{where}, the last, is truncated",
                    expected="a whole JSON object",
                    found=f"{short(line[-30:])} at its end",
                    do="write the file again or delete that line",
                )
            else:
                wanted = "one JSON object a line"
                problem = TaskError(f"{where} is not JSON ({what})", expected=wanted, found=short(line))
            lost.append((number, problem))
            continue
        _object(value, where, number, rows, lost)
    return rows


def _json(name: str, text: str, lost: Broken) -> list[Row]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise TaskError(f"{name} is not JSON (nested too deeply)", expected="a list of objects") from None
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        if line > 1 and text.lstrip().startswith("{"):  # JSON lines under the name .json are common
            return _jsonl(name, text, lost)
        raise TaskError(
            f"{name} line {line} is not JSON ({getattr(error, 'msg', error)})", expected="a list of objects"
        ) from None
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = [value] if FIELDS & value.keys() else lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise TaskError(f"{name} holds no rows", expected="a list of objects", found=type(value).__name__)
    rows: list[Row] = []
    for n, item in enumerate(value, 1):
        _object(item, f"{name} item {n}", n, rows, lost)
    return rows


def _object(value: object, where: str, number: int, rows: list[Row], lost: Broken) -> None:
    if isinstance(value, dict):
        rows.append(Row(where, number, value))
    else:
        wanted = '{"prompt": …, "completion": …}'
        lost.append((number, TaskError(f"{where} is not an object", expected=wanted, found=short(value))))


def _csv(name: str, text: str, delimiter: str | None, lost: Broken) -> list[Row]:
    csv.field_size_limit(MOST_CELL)  # Python's own is 128 KB: less than a long document
    if told := re.match(r"sep=(.)\r?\n", text):  # what Excel reads the separator from
        delimiter, text = told[1], text[told.end() :]
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
            where = f"{name} line {begun}"
            if not any(cells[len(header) :]):  # separators at the end of a line
                cells = cells[: len(header)]
            if len(cells) != len(header):
                problem = TaskError(
                    f"{where}: wrong number of cells",
                    expected=f"{len(header)} ({', '.join(header)})",
                    found=str(len(cells)),
                    do="quote cells that hold the separator; is the line whole?",
                )
                lost.append((begun, problem))
                continue
            try:
                named = {key: _cell(key, cell, where) for key, cell in zip(header, cells, strict=True) if key}
            except TaskError as error:
                lost.append((begun, error))
            else:
                rows.append(Row(where, begun, named))
    except csv.Error as error:
        whole = f"quotes closed and cells below {MOST_CELL // 10**6} MB"
        raise TaskError(f"{name} line {start} is not CSV ({error})", expected=whole) from None
    return rows


def _tabled(text: str) -> bool:
    """Whether a text is a table between tabs: as many in each line, and short names that differ in the first."""
    lines = [line.split("\t") for line in text.split("\n") if line.strip()]
    head = [cell.strip() for cell in lines[0]] if lines else []
    named = len({*head}) == len(head) > 1 and all(0 < len(cell) <= 40 and not cell.isdigit() for cell in head)
    return named and len(lines) >= 3 and len({*map(len, lines)}) == 1


def _unquoted(text: str) -> bool:
    """Whether quotes are text: each line is a row as it is, and a cell begins with a quote that does not wrap it."""
    lines = [line.split("\t") for line in text.split("\n") if line.strip()]
    if len(set(map(len, lines))) > 1 or lines[0][0].startswith('"'):  # a header in quotes: one wrong cell is an error
        return False
    return any(cell.startswith('"') and not QUOTED.fullmatch(cell) for cells in lines for cell in cells)


def _header(name: str, line: int, cells: Sequence[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = [cell for cell, count in Counter(header).items() if cell and count > 1]  # nameless ones are not read
    if twice:
        raise TaskError(
            f"{name} line {line}: the columns need different names",
            found=f"{short(twice[0])} twice",
            do="write a header line",
        )
    return header


def _cell(key: str, cell: str, where: str) -> Any:
    """Cells of list fields hold JSON or a list as Python writes it (pandas does); an empty cell is an absent value."""
    if not cell:
        return None
    wraps = cell.strip()[:1] + cell.strip()[-1:] in ("[]", "{}")
    if key in LISTS and wraps:
        found = literal(cell)
        if found is None:
            raise TaskError(f"{where}: {key} looks like a list and cannot be read", expected='such as ["a", "b"]',
                            found=short(cell), do="write lists as JSON")  # fmt: skip
        return found
    if key in ("prompt", "completion", "chosen", "rejected") and wraps:
        chat = literal(cell)
        if isinstance(chat, list) and chat and all(isinstance(turn, dict) for turn in chat):
            return chat
    return cell


def literal(text: str) -> list[Any] | dict[str, Any] | None:
    """A list or an object as JSON or Python writes it; None for all else, such as NumPy's ['a' 'b']."""
    for parse in (json.loads, ast.literal_eval):
        if parse is ast.literal_eval and re.search(r"""['"]\s+['"]""", text):  # Python would read 'a' 'b' as one text
            return None
        try:
            found = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, (list, dict)):
            return found
    return None


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TaskError(f"{path.name} needs pyarrow", do='pip install "whet[parquet]"') from None
    try:
        if (count := pyarrow.parquet.read_metadata(path).num_rows) > MOST_ROWS:
            raise TaskError(f"{path.name} is too large", expected=f"at most {MOST_ROWS:,} rows", found=f"{count:,}",
                            do="take a part of it")  # fmt: skip
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        first = (str(error).splitlines() or ["unreadable"])[0]
        raise TaskError(
            f"{path.name} is not a Parquet file that can be read ({short(first, 120)})", do="write it again"
        ) from None
    return [Row(f"{path.name} row {n}", n, value) for n, value in enumerate(values, 1)]
