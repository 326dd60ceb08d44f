"""What the methods of a run noted about their work, in words: how trainings fared, which rows were left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from whet.report import view
from whet.report.view import Record, line, number, record, records, sequence
from whet.rows import short_line

WORST = 3  # layers, rows or items that are named
LONGEST = 160  # characters of a word that a note holds


def findings(result: Record) -> list[tuple[str, list[str]]]:
    """(recipe, sentences) of every trial of its furthest rung that noted anything."""
    found = [(view.name_of(trial), sentences(record(trial.get("notes")))) for trial in view.furthest(result)]
    return [(name, said) for name, said in found if said]


def sentences(notes: Record) -> list[str]:
    """A trial's notes, each as a sentence; those without words of their own as "name: figures"."""
    said = []
    for key, value in notes.items():
        if key in SILENT:
            continue
        text = WORDS[key](value) if key in WORDS else _plain(key, value)
        said += [text] if text else []
    return said


def _fit(value: Any) -> str:
    body = record(value)
    best, last, before, after = (_loss(body.get(key)) for key in ("best", "last", "train_before", "train_after"))
    if not line(body.get("verdict")) or best == "–":
        return ""
    return (f"{line(body['verdict'])}: loss on validation rows {best} at best and {last} in the end, on the rows "
            f"trained on {before}, then {after}")


def _twice(value: Any) -> str:
    body = record(value)
    now, twice, low, high = (_loss(body.get(key)) for key in ("now", "twice", "low", "high"))
    return f"twice the rows would bring the loss from {now} to {twice} [{low}, {high}]" if now != "–" else ""


def _row_tokens(value: Any) -> str:
    median, most = (view.count(number(record(value).get(key))) for key in ("median", "most"))
    return f"rows of {median} tokens in the median, {most} at most" if most != "–" else ""


def _suspects(value: Any) -> str:
    named = records(value)
    some = ", ".join(f"{line(s.get('id'))} ({line(s.get('label'))}, rather {line(s.get('rather'))})"
                     for s in named[:WORST])  # fmt: skip
    return f"{len(named)} rows left out for a label that looks wrong, the surest: {some}" if named else ""


def _phrasings(value: Any) -> str:
    body, said = record(value), []
    for name in ("taught", "looked up"):
        seen, unseen, took = (number(record(body.get(name)).get(key)) for key in ("seen", "unseen", "ms"))
        if seen is not None and unseen is not None and took is not None:
            said.append(f"{name} {seen:.1f} and {unseen:.1f} ({view.count(round(took))} ms an answer)")
    asked = f"{view.count(number(body.get('n')))} facts, in phrasings that were trained on and in others, % right"
    return f"{asked}: {', '.join(said)}" if said else ""


def _quantized(value: Any) -> str:
    body = record(value)
    was, now = (view.size(number(body.get(key))) for key in ("was", "bytes"))
    layers = [(line(x.get("layer")), number(x.get("error"))) for x in records(body.get("layers"))[:WORST]]
    worst = ", ".join(f"{name} {100 * error:.1f} %" for name, error in layers if error is not None)
    kept, left = number(body.get("kept_in_8")), view.size(number(body.get("left_in_16")))
    return (f"{was} became {now}" + (f", {kept:.0f} layers kept in 8 bits" if kept else "")
            + (f", tables of {left} left in 16" if number(body.get("left_in_16")) else "")
            + (f"; the largest errors of layers' outputs: {worst}" if worst else ""))  # fmt: skip


def _loss(value: Any) -> str:
    found = number(value)
    return "–" if found is None else f"{found:.3f}"


def _plain(key: str, value: Any) -> str:
    """Any other note: a word, a figure, or figures by their names."""
    name = key.replace("_", " ")
    if isinstance(value, dict):
        parts = [f"{line(str(k)).replace('_', ' ')} {text}" for k, v in value.items() if (text := _short(v))]
        return f"{name}: {', '.join(parts)}" if parts else ""
    text = _short(value)
    return f"{name}: {text}" if text else ""


def _short(value: Any) -> str:
    """A figure, a word, or a few of them; empty for what is none of these, for nothing and for no."""
    if isinstance(value, str):
        return short_line(value, LONGEST)
    if isinstance(value, bool):
        return "yes" if value else ""
    found = number(value)
    if found is not None:
        return f"{found:,.4g}" if found else ""
    items = [text for item in sequence(value)[:WORST] if not isinstance(item, (list, dict)) and (text := _short(item))]
    return ", ".join(items)


WORDS: dict[str, Callable[[Any], str]] = {
    "fit": _fit, "twice_the_data": _twice, "row_tokens": _row_tokens, "suspects": _suspects, "quantized": _quantized,
    "phrasings": _phrasings, "general": line,
}  # fmt: skip
SILENT = {"verdict", "artifact", "teacher_artifact", "seen", "held"}  # told elsewhere, names of files, phrasings
