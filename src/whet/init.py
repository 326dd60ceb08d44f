"""`whet init`: a task folder of one data file, and what was guessed about it."""

from __future__ import annotations

import json
import os
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.columns import (
    ASIDE,
    CLASSES,
    CODED,
    CODES,
    COMPLETIONS,
    CONTEXTS,
    KEPT,
    LABELS,
    MANY,
    NONE,
    NUMBER,
    PROMPTS,
    RUNNING,
    SYSTEM,
    TESTS,
    Columns,
    closed,
    coded,
    count_words,
    find,
    key_of,
    languages,
    listed,
    numbers_classes,
    parted,
    renamed,
    texts,
    unfolded,
)
from whet.convert import standard
from whet.documents import HANGUL
from whet.errors import TaskError, nearest
from whet.rows import COLUMN, Broken, Row, read, short, sift, stem_of

if TYPE_CHECKING:
    from whet.task import Example

SAID = ("completion", "response", "output", "reply")  # what somebody's judgement is about
JUDGED = ("label", "thumb", "thumbs", "feedback", "rating")
# kind: the fields that tell it, and those read beside them
SHAPES = {
    "pairs": ({"chosen", "rejected"}, {"prompt", "system"}),
    "messages": ({"messages"}, {"system"}),
    "ShareGPT": ({"conversations"}, {"system"}),
    "Alpaca": ({"instruction", "output"}, {"input", "system", "history"}),
    "prompt and completion": ({"prompt", "completion"}, {"answers", "choices"}),
}
FLAGS = {"0": False, "1": True, "false": False, "true": True}
# Whose rows should not be parted, and what a column called `split` may say.
OWNERS = re.compile(r"(?:.*_)?(?:(user|customer|author|patient)(?:_?(?:id|name))?|"
                    r"(session|conversation|thread|document)_?id)")  # fmt: skip
SIDES = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(("dev", "validation", "valid"), "dev")
# What whet init asks for, in English and in Korean.
ASKED = {
    "json": ("Answer with a JSON list.", "JSON 목록으로 답하세요."),
    "json labels": ("Name all labels that fit as a JSON list, out of {}.",
                    "다음 중 알맞은 라벨을 모두 JSON 목록으로 쓰세요: {}."),
    "labels": ("Name all labels that fit, with commas between.", "알맞은 라벨을 모두 쉼표로 구분해 쓰세요."),
    "named labels": ("Name all labels that fit, with commas between: {}.",
                     "다음 중 알맞은 라벨을 모두 쉼표로 구분해 쓰세요: {}."),
    "label": ("Name the label that fits.", "알맞은 라벨을 쓰세요."),
    "named label": ("Answer with one of: {}.", "다음 중 하나로 답하세요: {}."),
    "pairs": ("Follow the instruction.", "지시를 따르세요."),
    "summary": ("Summarize the text.", "글을 요약하세요."),
    "title": ("Write a title for the text.", "글의 제목을 쓰세요."),
    "question": ("Answer the question.", "질문에 답하세요."),
}  # fmt: skip
SUMMARIES, TITLES = ("summary", "highlights", "요약"), ("title", "headline", "제목")  # columns of answers
NAMED = 3  # prompts whose lines are named
CORPUS = 100  # words of a text from which on it is one of a corpus, whatever is numbered beside it
UNLABELLED, LEAST_CLASSES = ("-1", "-100"), 3  # numbers of rows that nobody has labelled, among so many classes
WORKED = re.compile(r"####\s*-?\$?[\d,.]+\s*\Z")  # GSM8K: the working, then the number


@dataclass(frozen=True)
class Guess:
    """What `whet init` made of a file: the form of its rows, the columns it took, the metric, and lines that say so."""

    kind: str  # "columns", "text", "thumbs" or one of SHAPES
    columns: Columns | None
    labels: tuple[str, ...]
    rows: int
    metric: str
    lines: tuple[str, ...]
    folder: Path


def init(
    data: Path, out: Path, *, name: str | None = None, prompt: Sequence[str] = (), completion: str | None = None,
    group: str | None = None,
) -> Guess:  # fmt: skip
    """Makes a task folder of one data file: guesses columns and metric, splits 80/20 (seeded, stratified).

    `prompt` and `completion` name columns instead of having them guessed, `group` one that says which rows stay
    together. Raises TaskError where the data cannot be read, a named column does not exist, or `out` already holds a
    task.
    """
    data, out = Path(data), Path(out)
    if not data.is_file():
        raise TaskError(
            f"{data} cannot be read",
            expected="a CSV, TSV, JSONL, JSON, Parquet or text file",
            found="a folder" if data.is_dir() else "nothing",
            do="check the path",
        )
    taken = [file for file in ("task.yaml", "train.jsonl", "test.jsonl", "feedback.jsonl") if (out / file).exists()]
    if taken:
        raise TaskError(f"{out} already holds {', '.join(taken)}", expected="a new folder", do="choose another --out")
    broken: Broken = []
    notes: list[str] = []
    read_ = read(data, broken, notes)
    if not read_:
        raise broken[0][1]
    found = _texts_apart(unfolded(data, read_), {*prompt, completion, group})
    if group:
        found = _grouped(data, found, group, (*prompt, completion))
        notes.append(f"column {group!r} read as the group")
    guess, rows = _guess(data, found, out, tuple(prompt), completion, broken)
    guess = replace(guess, lines=(*notes, *guess.lines))
    name = name or re.sub(r"[^\w.-]+", "-", stem_of(data.name)).strip("-.") or "task"
    instruction = _instruction(guess, rows)
    header: dict[str, Any] = {"name": name, "instruction": instruction, "metric": guess.metric}
    if guess.labels:
        header["labels"] = list(guess.labels)
    if telling := _telling(guess.columns):
        header["columns"] = telling
    told = {"train", "test"} <= {row.get("split") for row in rows}
    how = "as column 'split' says" if told else "rows with the same prompt stay together"
    kept, dev, test = _parts(rows, bool(guess.labels))
    files = {"feedback.jsonl" if guess.kind == "pairs" else "train.jsonl": kept, "test.jsonl": test}
    files |= {"dev.jsonl": dev} if dev else {}
    if guess.kind == "thumbs":
        files = {"feedback.jsonl": kept, "train.jsonl": _good(kept, rows), "test.jsonl": _good(test, rows)}
    if "feedback.jsonl" in files:
        header["feedback"] = "feedback.jsonl"
    said = ", ".join(f"{len(part)} rows to {file}" for file, part in files.items())
    hints = _hints(guess, instruction, files.get("test.jsonl", test))
    guess = replace(guess, lines=(*guess.lines, f"{said}; {how}", *hints))
    _write(out, header, files)
    return guess


def _texts_apart(rows: list[Row], asked: set[str | None]) -> list[Row]:
    """Rows whose `evidence` and `id`, where they are running text, are called by what they hold: names are none.

    Evidence is then a context of the question (in whet's rows it names documents), an `id` beside another language is
    Indonesian. What is `asked` for keeps its name.
    """
    table = _table(rows)
    named = {"evidence": "Evidence"} if "evidence" in table else {}
    if any(key.rsplit(".", 1)[-1].lower() in CODES.keys() - {"id"} for key in table):
        named |= {key: f"{key[:-2]}Indonesian" for key in table if key.lower() == "id" or key.lower().endswith(".id")}
    for key in list(named):
        said = texts(cell for cell in table[key] if not isinstance(cell, (list, dict)))
        if key in asked or not said or statistics.median(map(count_words, said)) < RUNNING:
            del named[key]
    if not named:
        return rows
    return [replace(row, values={named.get(key, key): cell for key, cell in row.values.items()}) for row in rows]


def _grouped(data: Path, rows: list[Row], group: str, taken: Sequence[str | None]) -> list[Row]:
    """Rows whose `group` is what a column says; it is read as nothing else, but as a prompt where it may be one."""
    keys = dict.fromkeys(key for row in rows for key in row.values)
    if group not in keys:
        raise TaskError(f"{data.name} has no column {short(group)}", do=nearest(group, keys))
    whole = group in taken or key_of(group) in (*PROMPTS, *CONTEXTS)
    return [
        replace(row, values={k: cell for k, cell in row.values.items() if whole or k != group}
                | {"group": row.values.get(group)})
        for row in rows
    ]  # fmt: skip


def _sided(rows: list[Row], taken: Sequence[str | None]) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """Rows without a column `split`, and by where they stand its part: train and test, and dev beside these."""
    keys = (key for row in rows[:1] for key in row.values if key not in taken)
    key = next((key for key in keys if key.strip().lower() == "split"), None)
    sides = [SIDES.get(str(row.values.get(key)).strip().lower(), "") for row in rows] if key else []
    if not {"train"} < set(sides) or "" in sides:
        return rows, {row.where: {} for row in rows}
    if "test" not in sides:  # a validation set alone is what is held out
        sides = [side.replace("dev", "test") for side in sides]
    bare = [replace(row, values={k: cell for k, cell in row.values.items() if k != key}) for row in rows]
    return bare, {row.where: {"split": side} for row, side in zip(rows, sides, strict=True)}


def _owner(table: Mapping[str, list[Any]], left: Iterable[str], lines: list[str]) -> None:
    """Points out a column of users, documents … that repeat and are about to be parted."""
    repeated = {key: len(set(cells)) for key in left if OWNERS.fullmatch(key_of(key)) and (cells := texts(table[key]))}
    repeated = {key: n for key, n in repeated.items() if 1 < n < len(texts(table[key]))}
    if repeated and "group" not in table:
        key = min(repeated, key=lambda key: (repeated[key], key))
        who = next(filter(None, OWNERS.fullmatch(key_of(key)).groups()))  # type: ignore[union-attr]
        lines.append(f"{key} repeats: rows of one {who} stand on both sides; use --group {key}")


def _good(part: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of a part that were judged good, without the judgement."""
    good = (row for row, fine in zip(part, _judged(part, rows), strict=True) if fine)
    return [{key: value for key, value in row.items() if key not in ("label", "rating")} for row in good]


def _judged(part: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether each answer of a part is good, as it was judged; of ratings: above the mean of all rows."""
    middle = statistics.fmean(row.get("rating", 0) for row in rows)
    return [bool(row.get("label", row.get("rating", 0) > middle)) for row in part]


def _guess(
    data: Path, rows: list[Row], out: Path, prompt: tuple[str, ...], completion: str | None, broken: Broken
) -> tuple[Guess, list[dict[str, Any]]]:
    lines: list[str] = []
    rows, more = _sided(rows, (*prompt, completion))
    rows, many = listed(rows, completion, lines) if completion else (_gathered(rows, prompt, lines), False)
    table = _table(rows)
    kind, left = ("columns", set()) if completion or (prompt and "chosen" not in table) else _shape(table)
    judging = "" if completion else _judging(kind, table)
    columns = None
    if kind == "columns" or (kind == "pairs" and (prompt or "prompt" not in standard(rows[0])[0])):
        beside = {judging, "rejected"} if kind == "pairs" else {judging}
        if judging:
            completion = next(key for name in SAID for key in table if key_of(key) == name)
        asked = {key: cells for key, cells in table.items() if key not in beside}
        columns = find(data, asked, prompt, "chosen" if kind == "pairs" else completion, lines)
        left = asked.keys() - {*columns.prompt, columns.completion, *columns.choices} - KEPT
        system = [key for key in left if key_of(key) in SYSTEM]
        lines += [f"column {key!r} read as the system's turn" for key in system]
        left = left.difference(system)
    if kind == "pairs" or judging:
        left = left | {"split"} if any(more.values()) else left
        more = {where: {} for where in more}
    elif not any(more.values()):
        _owner(table, left, lines)
    if tests := [key for key in left if columns and key_of(columns.completion) in CODED and key in TESTS]:
        lines.append(f"columns {', '.join(sorted(tests))} written beside: a metric of your own may run them")
        left = left.difference(tests)
        for row in rows:
            more[row.where] |= {key: row.values[key] for key in tests if row.values.get(key) is not None}
    if judging:
        kind = "thumbs"
        lines.append(f"column {judging!r} read as a judgement of the answers, of which the good ones alone are "
                     f"imitated; to predict it instead: --completion {judging}")  # fmt: skip
    if left := left - {judging}:
        lines.append(f"columns not used: {', '.join(sorted(left))}")
    if columns or (kind == "text" and left):
        lines.append("to say otherwise: --prompt COLUMN (again for each of several), --completion COLUMN")
    if kind not in ("text", "columns"):
        lines.insert(0, f"rows read as {kind}")
    plain, places = _plain_rows(data, rows, kind, columns, judging, more, broken, lines)
    fine = _judged(plain, plain) if kind == "thumbs" else [True] * len(plain)
    if not any(fine):
        raise TaskError(f"{data.name} holds no answer that was judged good", expected="some: they alone are imitated",
                        do=f"name another column: --completion {judging or 'label'}")  # fmt: skip
    good, bad = ([row for row, is_ in zip(plain, fine, strict=True) if is_ == side] for side in (True, False))
    metric, labels = _metric(kind, columns, many, good, bad, lines)
    _doubts(kind, labels, plain, places, lines)
    return Guess(kind, columns, labels, len(plain), metric, tuple(lines), out), plain


def _table(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Columns in the order in which they first occur, None where a row has no such field."""
    keys = dict.fromkeys(key for row in rows for key in row.values)
    return {key: [row.values.get(key) for row in rows] for key in keys}


def _gathered(rows: list[Row], prompt: Sequence[str], lines: list[str]) -> list[Row]:
    """Rows with three or more columns of 0 and 1 as one of labels, where no column is called an answer."""
    table = _table(rows)

    def flag(cell: Any) -> bool | None:
        return FLAGS.get(str(cell).strip().lower().removesuffix(".0"))

    def called(key: str) -> str:
        return key.strip().lower() if key in flags else key_of(key)

    flags = {
        key: " ".join(re.sub(r"[,;|、，；]", " ", key).split())  # which part labels
        for key, cells in table.items()
        if key not in (*prompt, *KEPT) and not ASIDE.fullmatch(key_of(key)) and None not in map(flag, cells)
    }
    rest = [k for k in table if k not in flags and k not in (*prompt, *KEPT) and not ASIDE.fullmatch(key_of(k))]
    answered = any(called(k) in COMPLETIONS for k in table) or any(closed(texts(table[k])) for k in rest)
    if len(flags) < 3 or answered or _shape(table)[0] != "columns":
        return rows
    lines.append(f"columns {', '.join(map(repr, flags))} hold 0 and 1 alone: read as one column of labels, which names "
                 f"those that are 1 ({NONE!r} where none is); to take one of them: --completion COLUMN")  # fmt: skip
    found = []
    for row in rows:
        said = ", ".join(name for key, name in flags.items() if flag(row.values.get(key)))
        beside = {key: cell for key, cell in row.values.items() if key not in flags}
        found.append(replace(row, values=beside | {MANY: said or NONE}))
    return found


def _shape(table: Mapping[str, list[Any]]) -> tuple[str, set[str]]:
    """The kind of a file by its fields, and the fields that are not read."""
    keys = set(table)
    for kind, (telling, beside) in SHAPES.items():
        if telling <= keys:
            return kind, keys - telling - beside - KEPT
    rest = keys - {"text", "title"} - KEPT
    classes = [key for key in rest if numbers_classes(key, texts(table[key]))] if "title" not in keys else []
    short_ = classes and statistics.median(map(count_words, texts(table.get("text", ())) or [""])) < CORPUS
    if "text" in keys and all(ASIDE.fullmatch(key_of(key)) for key in rest) and not short_:
        return "text", keys - {"text"} - KEPT
    return "columns", set()


def _judging(kind: str, table: Mapping[str, list[Any]]) -> str:
    """The column that says which answers are good (thumbs or ratings); "" where nothing is judged."""
    if kind in ("pairs", "text") or (kind == "columns" and not {key_of(key) for key in table} & set(SAID)):
        return ""
    return next((key for key in table if key_of(key) in JUDGED and _judgements(key, table[key])), "")


def _judgements(key: str, cells: Sequence[Any]) -> list[bool | float | None]:
    """Cells as thumbs (up is true), else as ratings, None where there is none; [] where they are neither."""
    from whet.feedback import DOWN, UP

    said = [next((cell.strip().lower().removesuffix(".0") for cell in texts([cell])), None) for cell in cells]
    if {*said, None} <= {*UP, *DOWN, None}:
        return [None if cell is None else cell in UP for cell in said]
    if key_of(key) != "rating" or any(cell and not re.fullmatch(r"-?\d+(\.\d+)?", cell) for cell in said):
        return []
    return [None if cell is None else float(cell) for cell in said]


def _plain_rows(
    data: Path, rows: Sequence[Row], kind: str, columns: Columns | None, judging: str,
    beside: Mapping[str, dict[str, Any]], broken: Broken, lines: list[str],
) -> tuple[list[dict[str, Any]], list[str]]:  # fmt: skip
    """Rows as they are written to files, and where each stands; those that lack a part are skipped and counted.

    `beside` has further fields by where a row stands. Raises TaskError where more than a few cannot be read.
    """

    def make(row: Row) -> tuple[str, dict[str, Any]]:
        return row.where, standard(replace(row, values=renamed(row, columns)) if columns else row)[0]

    wanted = {"text": ("text",), "pairs": ("prompt", "completion", "rejected")}.get(kind, ("prompt", "completion"))
    judged = _judgements(judging, [row.values.get(judging) for row in rows]) if judging else ()
    said = dict(zip((row.where for row in rows), judged, strict=False))
    plain: list[dict[str, Any]] = []
    places: list[str] = []
    refused: list[str] = []
    for where, values in sift(data.name, rows, make, broken, lines):
        if missing := [field for field in wanted if not (values.get(field) or "").strip()]:
            refused.append(f"{where} has no {missing[0].replace('completion', 'answer')}")
        elif kind == "pairs" and values["completion"].strip() == values["rejected"].strip():
            refused.append(f"both sides of {where} are equal")
        elif judging and said[where] is None:
            refused.append(f"{where} has no {judging}")
        else:
            plain.append(_written(values, kind) | beside[where])
            places.append(where.removeprefix(f"{data.name} "))
            if judging:
                plain[-1]["label" if isinstance(said[where], bool) else "rating"] = said[where]
    if len(plain) < 2:
        parts = (
            "texts, parted by blank lines or long enough to be cut"
            if kind == "text"
            else "rows with a prompt and an answer"
        )
        raise TaskError(
            f"{data.name} gives no task",
            expected=f"at least 2 {parts}",
            found=f"{len(plain)}" + (f" ({refused[0]})" if refused else ""),
            do="add more text" if kind == "text" else "fill them, or name columns: --prompt COLUMN --completion COLUMN",
        )
    if refused:
        lines.append(f"{len(refused)} of {len(rows)} rows skipped; the first: {refused[0]}")
    if columns and key_of(columns.completion) in (*LABELS, *CLASSES):
        found = Counter(row["completion"] for row in plain)
        none = {mark for mark in UNLABELLED if mark in found}
        if none and {*found} - none == {*map(str, range(max(LEAST_CLASSES, len(found) - len(none))))}:
            kept = [n for n, row in enumerate(plain) if row["completion"] not in none]
            lines.append(f"{len(plain) - len(kept)} rows without a label ({', '.join(sorted(none))}) left out")
            plain, places = [plain[n] for n in kept], [places[n] for n in kept]
    return plain, places


def _written(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """A standard row as it is written to a file: a row with earlier turns goes as TRL's conversational prompt."""
    if kind == "text":
        return {key: values[key] for key in ("text", "group") if key in values}
    row: dict[str, Any] = {"prompt": values["prompt"]}
    if "history" in values:
        chat = [*values["history"], ("user", values["prompt"])]
        row["prompt"] = [{"role": role, "content": content} for role, content in chat]
    if kind == "pairs":
        row |= {"chosen": values["completion"], "rejected": values["rejected"]}
    else:
        row["completion"] = values["completion"]
    return row | {key: values[key] for key in ("answers", "choices", "evidence", "group") if key in values}


def _metric(
    kind: str, columns: Columns | None, many: bool, rows: list[dict[str, Any]], bad: Sequence[dict[str, Any]],
    lines: list[str],
) -> tuple[str, tuple[str, ...]]:  # fmt: skip
    """The metric and the closed set; rows' labels that differ in case or spaces alone are spelt in one way.

    `many` says that answers are lists; `bad` rows, whose answers were judged so, are written as the others are.
    """
    if kind in ("text", "pairs"):
        metric = "perplexity" if kind == "text" else "win_rate"
        lines.append(
            f"metric {metric}: " + ("plain text" if kind == "text" else "rows with a chosen and a rejected answer")
        )
        return metric, ()
    if all("choices" in row for row in rows):
        told = f", and its answer is read as {columns.reading}" if columns and columns.reading else ""
        lines.append(f"metric accuracy: every row has its own choices{told}")
        return "accuracy", ()
    answers = [row["completion"] for row in rows]
    name = key_of(columns.completion) if columns else ""
    if pair := languages(columns):
        lines.append(f"metric chrf: translations from {pair[0]} to {pair[1]}")
        return "chrf", ()
    if many or (name == MANY and any(", " in answer or _listed(answer) is not None for answer in answers)):
        lines.append("metric set_f1: several labels a row")
        return "set_f1", ()
    mark, apart = parted(answers) if kind != "thumbs" and not any("answers" in row for row in rows) else ("", [])
    if mark:
        for row, answer in zip(rows, apart, strict=True):
            row["completion"] = answer
        lines.append(f"metric set_f1: several labels a row, parted by {mark!r}" + ", now by commas" * (mark != ","))
        return "set_f1", ()
    if labels := _labels(rows, bad, lines, name in (*LABELS, *CLASSES)):
        return "accuracy", labels
    if all(NUMBER.fullmatch(answer.strip()) or WORKED.search(answer) for answer in answers):
        comma = any(re.fullmatch(r"-?(\d+,\d{1,2}|0,\d+)", answer.strip()) for answer in answers)
        if comma and not any("." in answer for answer in answers):
            for row in (*rows, *bad):  # 3,125 beside 4,75 is no three thousand
                row |= {key: [_pointed(a) for a in row[key]] if key == "answers" else _pointed(row[key])
                        for key in ("completion", "answers") if key in row}  # fmt: skip
            lines.append("commas in numbers read as decimal points, and written so")
        if name in (*LABELS, *CLASSES):
            lines.append("metric pearson: each answer is a grade")
            return "pearson", ()
        lines.append("metric number: each answer is a number, or ends in one")
        return "number", ()
    if coded(columns, answers):
        lines.append("metric chrf: code, where each operator counts")
        return "chrf", ()
    words = statistics.median(map(count_words, answers))
    metric = "exact_match" if words <= 3 else "token_f1" if words <= 10 else "rouge_l"
    lines.append(f"metric {metric}: free text, half of the answers have {words:g} words or fewer")
    return metric, ()


def _pointed(answer: str) -> str:
    return answer.replace(",", ".") if NUMBER.fullmatch(answer.strip()) else answer


def _labels(
    rows: list[dict[str, Any]], bad: Sequence[dict[str, Any]], lines: list[str], named: bool
) -> tuple[str, ...]:
    """The closed set of rows' answers, () where they are none; rows' labels are then spelt in one way."""
    from whet.metrics import plain

    answers = [row["completion"] for row in rows]
    spelt = {plain(answer): answer.strip() for answer, _ in reversed(Counter(answers).most_common())}
    alike = [spelt[plain(answer)] for answer in answers]
    if not closed(alike, named):
        return ()
    strange = 0
    for row, answer in zip(rows, alike, strict=True):
        row["completion"] = answer
        given = row.pop("answers", [])
        others = [plain(str(other)) for other in (given if isinstance(given, list) else [given])]
        kept = dict.fromkeys((answer, *(spelt[other] for other in others if other in spelt)))
        strange += sum(other not in spelt for other in others)
        if len(kept) > 1:
            row["answers"] = list(kept)
    for row in bad:
        row["completion"] = spelt.get(plain(row["completion"]), row["completion"])
    if strange:
        lines.append(f"{strange} accepted answers left out: they are no label")
    labels = tuple(sorted(set(alike), key=lambda label: label.zfill(9) if label.isdigit() else label))
    said = f"{len(labels)} labels ({short(', '.join(labels), 80)[1:-1]}), each short and repeated"
    if len(labels) < len(set(answers)):
        said += f"; {len(set(answers))} spellings of them made one each"
    if all(label.isdigit() for label in labels):
        said += "; a model knows more of words: write names for these numbers where you can"
    lines.append(f"metric accuracy: {said}")
    return labels


def _doubts(
    kind: str, labels: tuple[str, ...], rows: list[dict[str, Any]], places: Sequence[str], lines: list[str]
) -> None:
    """Counts rows that repeat, prompts whose labels differ (and where), and a label that most rows have."""
    from whet.splits import mark

    unlike = [{key: cell for key, cell in row.items() if key != "split"} for row in rows]
    if twice := len(rows) - len({json.dumps(row, sort_keys=True, default=str) for row in unlike}):
        lines.append(f"{twice} rows repeat another row exactly")
    if labels:
        said: dict[str, dict[str, str]] = {}  # of each prompt its labels, and where each stands first
        for row, place, example in zip(rows, places, _examples(rows), strict=True):
            said.setdefault(mark(example), {}).setdefault(row["completion"], place)
        if torn := [found for found in said.values() if len(found) > 1]:
            some = "; ".join(" and ".join(found.values()) for found in torn[:NAMED])
            prompts = f"{len(torn)} prompts have" if len(torn) > 1 else "1 prompt has"
            lines.append(f"{prompts} different labels in different rows: {some}{'; …' * (len(torn) > NAMED)}")
    if kind in ("text", "pairs"):
        return
    [(answer, most)] = Counter(row["completion"] for row in rows).most_common(1)
    if most == len(rows):
        lines.append(f"all {most} answers are the same: {short(answer)}; there is nothing to tell apart")
    elif labels and most > 0.9 * len(rows):
        lines.append(f"{most} of {len(rows)} rows have the label {short(answer)}: accuracy rewards saying it always; "
                     "macro_f1 in task.yaml counts each label alike")  # fmt: skip


def _telling(columns: Columns | None) -> dict[str, str]:
    """The names of prompt and answer for task.yaml, where they say more than that: prompts may be written with them."""
    if columns is None or len(columns.prompt) > 1:
        return {}
    named = {"prompt": columns.prompt[0].strip(), "completion": columns.completion.strip()}
    said = {name.lower() for name in named.values()}
    usable = all(re.fullmatch(COLUMN, name) for name in named.values())
    return named if usable and not said <= {"prompt", "completion", "input", "output", "chosen"} else {}


def _instruction(guess: Guess, rows: list[dict[str, Any]]) -> str:
    """What is asked, as the answers and their column tell it: in Korean where most prompts are, labels as they are."""
    if guess.kind == "text":
        return ""
    if guess.metric == "chrf" and (pair := languages(guess.columns)):
        return f"Translate from {pair[0]} to {pair[1]}."
    prompts = [example.prompt for example in _examples(rows)]
    korean = 2 * sum(map(_in_hangul, prompts)) > len(prompts)
    what, names = _asked(guess, rows)
    return ASKED[what][korean].format(names)


def _listed(answer: str) -> list[Any] | None:
    """The items of an answer that is a JSON list; None of any other."""
    try:
        found = json.loads(answer) if answer[:1] == "[" else None
    except ValueError:
        return None
    return found if isinstance(found, list) else None


def _asked(guess: Guess, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Which of ASKED, and the labels that it names."""
    lists = [_listed(row["completion"]) for row in rows] if guess.metric == "set_f1" else [None]
    if None not in lists:
        items = [item for one in lists for item in one or ()]
        plain = all(isinstance(item, str) for item in items) and len(set(items)) <= 30
        return ("json labels", json.dumps(sorted(set(items)), ensure_ascii=False)) if plain else ("json", "")
    if guess.metric == "set_f1":
        names = sorted({name for row in rows for name in row["completion"].split(", ")})
        return ("named labels", ", ".join(names)) if len(names) <= 30 else ("labels", "")
    if guess.labels and len(guess.labels) <= 10:
        return "named label", ("; " if any("," in label for label in guess.labels) else ", ").join(guess.labels)
    if guess.labels or guess.kind == "pairs":
        return ("label" if guess.labels else "pairs"), ""
    name = key_of(guess.columns.completion) if guess.columns else ""
    return ("summary" if name in SUMMARIES else "title" if name in TITLES else "question"), ""


def _in_hangul(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    return 2 * len(re.findall(f"[{HANGUL}]", text)) > len(letters)


def _hints(guess: Guess, instruction: str, test: Sequence[dict[str, Any]]) -> list[str]:
    """What would help, where it may: documents for questions with free answers, and more sealed rows."""
    from whet.splits import few

    within = guess.columns is not None and any(key_of(key) in CONTEXTS for key in guess.columns.prompt)
    free = guess.metric in ("exact_match", "token_f1", "rouge_l") and instruction in ASKED["question"]
    hints = ["if the answers stand in documents: copy their folder in, and write documents: FOLDER in task.yaml"]
    sealed = few(_examples(list(test))) if test else "no row is sealed: no gain can be confirmed without a test.jsonl"
    return [*(hints if free and not within else ()), *filter(None, [sealed])]


def _parts(rows: list[dict[str, Any]], closed: bool) -> list[list[dict[str, Any]]]:
    """Train, dev and test rows: as they say themselves, else 80 and 20 %."""
    from whet.splits import cut  # it reads its rows through this module

    sides = [row.pop("split", "") for row in rows]
    if {"train", "test"} <= set(sides):
        return [[row for row, side in zip(rows, sides, strict=True) if side == part]
                for part in ("train", "dev", "test")]  # fmt: skip
    kept, held = cut(_examples(rows), max(1, round(0.2 * len(rows))), seed=0, closed=closed)
    return [[rows[i] for i in kept], [], [rows[i] for i in held]]


def _examples(rows: list[dict[str, Any]]) -> list[Example]:
    from whet.task import Example  # it reads its rows through this module

    examples = []
    for row in rows:
        prompt = row.get("prompt", "")
        chat = (
            tuple((turn["role"], turn["content"]) for turn in prompt)
            if isinstance(prompt, list)
            else (("user", prompt),)
        )
        examples.append(
            Example(
                "",
                chat[-1][1],
                row.get("completion", ""),
                group=row.get("group"),
                history=chat[:-1],
                text=row.get("text"),
            )
        )
    return examples


def _write(out: Path, header: Mapping[str, Any], files: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Writes aside, reads it back as a task, then renames; task.yaml last, so a half-written folder is never a task."""
    import yaml

    from whet.task import load

    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".init-") as aside:
            for file, rows in files.items():
                if text := "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows):
                    (Path(aside) / file).write_text(text, "utf-8")
            (Path(aside) / "task.yaml").write_text(
                yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True), "utf-8"
            )
            load(aside)
            for file in (*(name for name in files if (Path(aside) / name).exists()), "task.yaml"):
                os.replace(Path(aside) / file, out / file)
    except UnicodeEncodeError:
        raise TaskError("the data hold half a character", expected="whole Unicode characters") from None
    except OSError as error:
        raise TaskError(f"{out} cannot be written: {error.strerror or error}", do="choose another --out") from None
