"""Rows of every form (chats, Alpaca, ShareGPT, pairs) to standard fields; and `whet init`, which guesses a task."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whet.errors import TaskError
from whet.rows import COLUMN, Row, read, short

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}


def as_text(value: object, where: str, field: str) -> str | None:
    """A scalar as text (booleans as JSON writes them); None for null and NaN; raises TaskError for anything else."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict, tuple, set, bytes)):
        raise TaskError(f"{where}: {field} is not text", expected="text", found=short(value))
    text = str(value)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise TaskError(
                f"{where}: {field} holds half a character",
                expected="whole Unicode characters",
                found=short(text),
                do="write the file again as UTF-8",
            ) from None
    return text


def turns(value: object, where: str, field: str) -> list[tuple[str, str]]:
    """A chat as (role, content) pairs: TRL and OpenAI messages (role, content) and ShareGPT turns (from, value)."""
    if not isinstance(value, list) or not value:
        raise TaskError(
            f"{where}: {field} is not a chat", expected="a list of turns with role and content", found=short(value)
        )
    chat = []
    for turn in value:
        if not isinstance(turn, dict):
            raise TaskError(
                f"{where}: a turn of {field} is not an object", expected="role and content", found=short(turn)
            )
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise TaskError(
                f"{where}: a turn of {field} has an unknown role",
                expected="system, user, assistant or tool",
                found=short(role),
            )
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            content = "".join(_part(part, where, field) for part in content)
        text = as_text(content, where, f"the content of a turn of {field}")
        if text is None:
            raise TaskError(f"{where}: a turn of {field} has no content", expected="text", found="null")
        chat.append((ROLES[role.lower()], text))
    return chat


def _part(part: object, where: str, field: str) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise TaskError(f"{where}: a part of {field} is not text", expected="text parts only", found=short(part))


def standard(row: Row) -> tuple[dict[str, Any], str]:
    """A row in standard fields (prompt, completion, history, rejected, text …) and the form it came in ("" = as is).

    Scalars become str, null stays None, absent fields stay absent. Raises TaskError naming the row.
    """
    values, where = dict(row.values), row.where
    form = ""
    if "prompt" not in values:
        values, form = _other_form(values, where)
    out: dict[str, Any] = {
        key: values[key] for key in ("answers", "choices", "evidence") if values.get(key) is not None
    }
    history = list(values["history"]) if form else []
    for field in ("prompt", "completion", "chosen", "rejected"):
        value = values.get(field)
        if isinstance(value, list):
            chat = turns(value, where, field)
            form = form or "conversational"
            if field == "prompt":
                history, value = _last_user(chat, where)
            else:
                value = _only_answer(chat, where, field)
        if field in values:
            out[field] = as_text(value, where, field)
    for field in ("id", "group", "text"):
        value = as_text(values.get(field), where, field)
        if value:
            out[field] = value
    if history:
        out["history"] = tuple(history)
    if "chosen" in out:
        chosen = out.pop("chosen")
        if out.get("completion") is None:  # a table has a cell for either in every row
            out["completion"] = chosen
    return out, form


def _other_form(values: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    for field, form in (("messages", "messages"), ("conversations", "ShareGPT")):
        if field in values:
            chat = turns(values[field], where, field)
            answer = chat.pop()[1] if chat[-1][0] == "assistant" else None
            history, prompt = _last_user(chat, where)
            if isinstance(values.get("system"), str) and values["system"].strip():
                history.insert(0, ("system", values["system"]))
            chatted = {**values, "prompt": prompt, "history": history}
            return ({**chatted, "completion": answer} if answer is not None else chatted), form
    if "instruction" in values and "output" in values:
        parts = [as_text(values.get(field), where, field) or "" for field in ("instruction", "input")]
        prompt = "\n\n".join(part for part in parts if part.strip())
        system = as_text(values.get("system"), where, "system") or ""
        history = [("system", system)] if system.strip() else []
        return {**values, "prompt": prompt, "completion": values["output"], "history": history}, "Alpaca"
    if isinstance(values.get("chosen"), list):  # TRL's implicit prompt: both sides begin with it
        chat = turns(values["chosen"], where, "chosen")
        history, prompt = _last_user(chat[:-1], where)
        rejected = values.get("rejected")
        last = turns(rejected, where, "rejected")[-1][1] if isinstance(rejected, list) else rejected
        found = {"prompt": prompt, "history": history, "chosen": chat[-1][1], "rejected": last}
        return {**values, **found}, "conversational"
    return values, ""


def _last_user(chat: list[tuple[str, str]], where: str) -> tuple[list[tuple[str, str]], str]:
    if not chat or chat[-1][0] != "user":
        raise TaskError(
            f"{where}: the chat has no question to answer",
            expected="a user turn before the last answer",
            found=f"{chat[-1][0]} turn" if chat else "none",
        )
    return chat[:-1], chat[-1][1]


def _only_answer(chat: list[tuple[str, str]], where: str, field: str) -> str:
    if chat[-1][0] != "assistant":
        raise TaskError(
            f"{where}: {field} does not end with an answer", expected="an assistant turn", found=f"{chat[-1][0]} turn"
        )
    return chat[-1][1]


# ------------------------------------------------------------------------------------------------------- whet init

PROMPTS = ("prompt", "question", "query", "review", "sentence", "utterance", "text", "input", "message", "article",
           "document", "source", "title")  # fmt: skip
COMPLETIONS = ("completion", "answer", "answers", "label", "label_text", "sentiment", "category", "intent", "class",
               "topic", "target", "output", "response", "summary", "translation", "result", "reply")  # fmt: skip
CONTEXTS = ("context", "passage")


@dataclass(frozen=True)
class Guess:
    """What `whet init` made of a file: the form of its rows, the columns it took, the metric, and lines that say so."""

    kind: str  # "columns", "prompt and completion", "Alpaca", "ShareGPT", "messages", "pairs", "text" …
    columns: Mapping[str, str]  # "prompt", "completion" (and "context") → the column's name
    labels: tuple[str, ...]
    rows: int
    metric: str
    lines: tuple[str, ...]
    folder: Path


def init(data: Path, out: Path, *, name: str | None = None) -> Guess:
    """Makes a task folder of one data file: guesses columns and metric, splits 80/20 (seeded, stratified).

    Raises TaskError where the data cannot be read or `out` already holds a task.
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
    guess, rows = _guess(data, read(data), out)
    name = name or re.sub(r"[^\w.-]+", "-", data.stem).strip("-.") or "task"
    header: dict[str, Any] = {"name": name, "instruction": _instruction(guess), "metric": guess.metric}
    if guess.labels:
        header["labels"] = list(guess.labels)
    if telling := _telling(guess.columns):
        header["columns"] = telling
    train, test = _halves(rows, bool(guess.labels))
    learn = "feedback.jsonl" if guess.kind == "pairs" else "train.jsonl"
    if guess.kind == "pairs":
        header["feedback"] = learn
    said = f"{len(train)} rows to {learn}, {len(test)} to test.jsonl; rows with the same prompt stay together"
    guess = replace(guess, lines=(*guess.lines, said))
    _write(out, header, {learn: train, "test.jsonl": test})
    return guess


def _guess(data: Path, rows: list[Row], out: Path) -> tuple[Guess, list[dict[str, Any]]]:
    keys = set().union(*(row.values for row in rows))
    lines: list[str] = []
    columns: dict[str, str] = {}
    if "chosen" in keys and "rejected" in keys:
        kind = "pairs"
    elif keys & {"messages", "conversations"} or {"instruction", "output"} <= keys or {"prompt", "completion"} <= keys:
        kind = ""
    elif keys <= {"text", "id", "group"}:
        kind = "text"
    else:
        kind = "columns"
        columns = _columns(data, rows, lines)
        rows = [Row(row.where, row.number, _renamed(row.values, columns)) for row in rows]
    plain = []
    forms: Counter[str] = Counter()
    for row in rows:
        values, form = standard(row)
        wanted = ("text",) if kind == "text" else ("prompt", "completion")
        if all((values.get(field) or "").strip() for field in wanted):
            plain.append(_written(values, pairs=kind == "pairs"))
            forms[form or "prompt and completion"] += 1
    kind = kind or (forms.most_common(1)[0][0] if forms else "prompt and completion")
    if len(plain) < 2:
        raise TaskError(
            f"{data.name} gives no task",
            expected="at least 2 rows with a prompt and an answer",
            found=str(len(plain)),
            do="name the columns prompt and completion",
        )
    if len(plain) < len(rows):
        lines.append(f"{len(rows) - len(plain)} of {len(rows)} rows skipped: no prompt or no answer")
    if kind not in ("columns", "text"):
        lines.insert(0, f"rows read as {kind}")
    metric, labels = _metric(kind, plain, lines)
    return Guess(kind, columns, labels, len(plain), metric, tuple(lines), out), plain


def _columns(data: Path, rows: list[Row], lines: list[str]) -> dict[str, str]:
    """Which column is the prompt and which the answer: by name, else the longest text and the most repeated values."""
    cells: dict[str, list[str]] = {}
    for row in rows:
        for key, value in row.values.items():
            if isinstance(value, (str, int, float)):
                cells.setdefault(key, []).append(str(value))
    if data.suffix.lower() in (".csv", ".tsv"):
        for key, column in cells.items():
            if column.count(key) >= 2:
                raise TaskError(
                    f"{data.name} line 1 looks like data",
                    expected="column names",
                    found=f"{short(key)}, also a value below",
                    do="add a header line such as prompt,completion",
                )
    usable = {
        key: column
        for key, column in cells.items()
        if key.lower() not in ("id", "index", "group", "idx") and len(column) * 2 >= len(rows)
    }
    if len(usable) < 2:
        raise TaskError(
            f"{data.name} gives no task",
            expected="a column of prompts and one of answers",
            found=f"columns {', '.join(sorted(cells)) or 'none'}",
            do="name the columns prompt and completion",
        )
    named = {key.lower(): key for key in usable}
    answer = next((named[key] for key in COMPLETIONS if key in named), None)
    prompt = next((named[key] for key in PROMPTS if key in named and named[key] != answer), None)
    why = {"prompt": "by its name", "completion": "by its name"}
    if prompt is None:
        why["prompt"] = "longest text"
        prompt = max((key for key in usable if key != answer), key=lambda key: statistics.mean(map(len, usable[key])))
    if answer is None:
        rest = [key for key in usable if key != prompt]
        closed = [key for key in rest if _closed(usable[key])]
        why["completion"] = "few different values" if closed else "the last column that is left"
        answer = min(closed, key=lambda key: len(set(usable[key]))) if closed else rest[-1]
    columns = {"prompt": prompt, "completion": answer}
    lines.append(f"column {prompt!r} read as the prompt ({why['prompt']})")
    lines.append(f"column {answer!r} read as the answer ({why['completion']})")
    context = next((named[key] for key in CONTEXTS if key in named and named[key] not in columns.values()), None)
    if context is not None:
        columns["context"] = context
        lines.append(f"column {context!r} put before the prompt")
    left = sorted(set(cells) - set(columns.values()) - {"id", "group", "choices", "evidence"})
    if left:
        lines.append(f"columns not used: {', '.join(left)}")
    return columns


def _renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    kept = {
        key: values[key]
        for key in ("group", "choices", "evidence")
        if values.get(key) is not None and key not in columns.values()
    }
    parts = [values.get(columns[key]) for key in ("context", "prompt") if key in columns]
    prompt = "\n".join(str(part) for part in parts if part is not None)
    return {**kept, "prompt": prompt, "completion": values.get(columns["completion"])}


def _written(values: dict[str, Any], *, pairs: bool) -> dict[str, Any]:
    """A standard row as it is written to a file: a row with earlier turns goes as TRL's conversational prompt."""
    row: dict[str, Any] = {key: values[key] for key in ("text", "prompt") if values.get(key)}
    if "prompt" in row and "history" in values:
        chat = [*values["history"], ("user", values["prompt"])]
        row["prompt"] = [{"role": role, "content": content} for role, content in chat]
    if pairs:
        row |= {"chosen": values["completion"], "rejected": values.get("rejected")}
    elif "completion" in values:
        row["completion"] = values["completion"]
    return row | {key: values[key] for key in ("answers", "choices", "evidence", "group") if key in values}


def _closed(answers: Sequence[str]) -> bool:
    distinct = set(answers)
    return (
        2 <= len(distinct) <= 100
        and len(answers) >= 5 * len(distinct)
        and all(len(answer.split()) <= 6 for answer in distinct)
    )


def _metric(kind: str, rows: list[dict[str, Any]], lines: list[str]) -> tuple[str, tuple[str, ...]]:
    if kind in ("text", "pairs"):
        metric = "perplexity" if kind == "text" else "win_rate"
        lines.append(
            f"metric {metric}: " + ("plain text" if kind == "text" else "rows with a chosen and a rejected answer")
        )
        return metric, ()
    if all("choices" in row for row in rows):
        lines.append("metric accuracy: every row has its own choices")
        return "accuracy", ()
    answers = [row["completion"] for row in rows]
    if _closed(answers):
        labels = tuple(sorted(set(answers)))
        lines.append(
            f"metric accuracy: {len(labels)} labels ({short(', '.join(labels), 80)[1:-1]}), each short and repeated"
        )
        return "accuracy", labels
    words = statistics.median(len(answer.split()) for answer in answers)
    metric = "exact_match" if words <= 3 else "token_f1" if words <= 10 else "rouge_l"
    lines.append(f"metric {metric}: free text, half of the answers have {words:g} words or fewer")
    return metric, ()


def _telling(columns: Mapping[str, str]) -> dict[str, str]:
    """The names of prompt and answer for task.yaml, where they say more than that: prompts may be written with them."""
    named = {key: columns.get(key, "").strip() for key in ("prompt", "completion")}
    said = {name.lower() for name in named.values()}
    usable = "context" not in columns and all(re.fullmatch(COLUMN, name) for name in named.values())
    return named if usable and not said <= {"prompt", "completion", "input", "output"} else {}


def _instruction(guess: Guess) -> str:
    if guess.kind == "text":
        return ""
    if guess.labels and len(guess.labels) <= 10:
        return f"Answer with one of: {', '.join(guess.labels)}."
    return (
        "Name the label that fits."
        if guess.labels
        else "Follow the instruction."
        if guess.kind == "pairs"
        else "Answer the question."
    )


def _halves(rows: list[dict[str, Any]], closed: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from whet.splits import cut  # both read their files through this module
    from whet.task import Example

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
    kept, held = cut(examples, max(1, round(0.2 * len(rows))), seed=0, closed=closed)
    return [rows[i] for i in kept], [rows[i] for i in held]


def _write(out: Path, header: Mapping[str, Any], files: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Writes aside, reads it back as a task, then renames; task.yaml last, so a half-written folder is never a task."""
    import yaml

    from whet.task import load

    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".init-") as aside:
            for file, rows in files.items():
                _write_rows(Path(aside) / file, rows)
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


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    if text:
        path.write_text(text, "utf-8")
