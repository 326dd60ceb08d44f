"""What the columns of a table are: prompt, answer and choices, told by their names and by what stands in them."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from whet.convert import as_text
from whet.errors import TaskError, nearest
from whet.metrics import TOKEN
from whet.rows import Row, literal, short, suffix_of

# What columns are called in public data, as `_name` writes it. The first name that a file has is taken: a label before
# an answer (where both stand there, the answer is what is labelled), an answer before a mere class of the question.
RUNNING = 4  # words from which on a cell is text, and names nothing
MANY = "labels"  # several a row, where its cells are lists
NONE = "none"  # the answer of a row that has no label
LABELS = ("gold_label", "label", "label_text", MANY, "라벨", "레이블")
ANSWERS = ("completion", "answer", "answers", "answerkey", "answer_key", "correct_answer", "best_answer",
           "correct_option", "correct", "cop", "gold", "target", "output", "response", "summary", "highlights",
           "translation", "canonical_solution", "solution", "code", "result", "reply", "정답", "답변", "답", "응답",
           "요약", "antwort", "respuesta", "réponse", "reponse")  # fmt: skip
OBJECTS = {*ANSWERS} - {"answers", "translation"}  # an object under these names is an answer in JSON
ALTERNATIVES = re.compile(r"(.*_)?(answers|aliases|references)")  # lists under these names hold accepted answers
CLASSES = ("sentiment", "emotion", "polarity", "intent", "class", "category", "topic", "stars", "rating",
           "score", "감정", "의도", "분류")  # fmt: skip
COMPLETIONS = (*LABELS, *ANSWERS, *CLASSES)
CONTEXTS = ("context", "passage", "paragraph", "support", "evidence", "지문", "본문", "문맥")
PROMPTS = ("prompt", "question", "question_stem", "query", "instruction", "review", "sentence", "utterance", "text",
           "input", "message", "article", "document", "dialogue", "premise", "hypothesis", "problem", "goal", "aspect",
           "질문", "문제", "문장", "리뷰", "전제", "가설", "frage", "pregunta")  # fmt: skip
# Never part of a prompt unless asked for: what names the row, and what gives its answer away.
ASIDE = re.compile(r"(.*_)?(id|ids|idx|index|ind|uuid|url|link|date|time|timestamp|user|author|license|parse|tests?|"
                   r"explanation|rationale|reasoning|reasons?|justification|exp|cot|cot_content|번호|날짜|작성자|"
                   r"근거|해설|풀이)|_*index_level_\d+_*|unnamed.*")  # fmt: skip
# What is numbered, or has an id, is a class: an answer where nothing else is called one.
NUMBERED = re.compile(r"(?:gold_|true_)?(?:class|label|category|intent|target|topic|sentiment|emotion)_?"
                      r"(?:id|ids|idx|index|ind|num|no)")  # fmt: skip
OUTER = ("id", "ids", "idx", "index")  # of whose parts none is part of a prompt
NAMING = re.compile(r"(.*_)?(id|ids|idx|index|ind|uuid|번호)|_*index_level_\d+_*|unnamed.*")  # what names a row alone
OPTIONS = ("choices", "options", "endings", "candidates", "distractors", "incorrect_answers")
OPTION = re.compile(r"(|choice|option|opt?|ending|sol|solution|answer|candidate|distractor|incorrect_answer|보기|"
                    r"선택지)_?([a-j]|\d)")  # fmt: skip
WRONG = ("distractor", "incorrect_answer")  # options that the right answer is not among
SYSTEM = ("system", "system_prompt")
KEPT = frozenset(("id", "group", "evidence"))
READINGS: Mapping[str, Callable[[str, int, str, str], bool]] = {  # how (answer, place, label, text) of an option agree
    "its text": lambda answer, place, label, text: answer.strip() == text.strip(),
    "its letter": lambda answer, place, label, text: answer.strip(" ().").casefold() == label.casefold(),
    "its place, from 0": lambda answer, place, label, text: answer.removesuffix(".0") == str(place),
    "its place, from 1": lambda answer, place, label, text: answer.removesuffix(".0") == str(place + 1),
}
# Columns that hold code, where its cells show it; and what is kept beside it for a metric that runs it.
CODED = ("sql", "query", "code", "canonical_solution", "solution")
TESTS = ("test", "tests", "test_list", "entry_point")
CODE = re.compile(r"(?m)\w[(\[]|[<>=]|[;{}]\s*$|"
                  r"^\s*(return|def|class|import|select|with|SELECT|INSERT|UPDATE|DELETE|WITH)\b")  # fmt: skip
FORMULA = re.compile(r"\$|\\[a-z(\[]")  # TeX, in worked solutions
CODES = dict(re.findall(
    r"(\w+):(\w+)",
    "ar:Arabic bg:Bulgarian bn:Bengali ca:Catalan cs:Czech da:Danish de:German el:Greek en:English es:Spanish "
    "et:Estonian eu:Basque fa:Persian fi:Finnish fr:French ga:Irish gl:Galician gu:Gujarati he:Hebrew hi:Hindi "
    "hr:Croatian hu:Hungarian id:Indonesian is:Icelandic it:Italian ja:Japanese kk:Kazakh ko:Korean lt:Lithuanian "
    "lv:Latvian mk:Macedonian mr:Marathi ms:Malay nb:Norwegian nl:Dutch no:Norwegian pl:Polish pt:Portuguese "
    "ro:Romanian ru:Russian sk:Slovak sl:Slovenian sq:Albanian sr:Serbian sv:Swedish sw:Swahili ta:Tamil te:Telugu "
    "th:Thai tr:Turkish uk:Ukrainian ur:Urdu uz:Uzbek vi:Vietnamese zh:Chinese",
))  # fmt: skip
LANGUAGES = CODES | {name.lower(): name for name in CODES.values()}
NUMBER = re.compile(r"-?\$?(\d[\d,]*(\.\d+)?|\d{1,3}(\.\d{3})+,\d+)%?")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are what; "" and () where there is none."""

    prompt: tuple[str, ...]
    completion: str
    choices: tuple[str, ...] = ()
    reading: str = ""  # of READINGS: how the completion names one of the choices; "" adds it to them


# ------------------------------------------------------------------------------------------------- nested cells


def unfolded(data: Path, rows: list[Row]) -> list[Row]:
    """Rows with nested cells spread: SQuAD's files, objects as columns `outer.inner`, lists that a CSV cell holds."""
    names = _class_names(data)
    many = [cell for row in rows for key, cell in row.values.items() if key_of(key) == MANY and isinstance(cell, list)]
    apart = any("," in str(item) for cell in many for item in cell)  # commas part labels: lists stay lists, as JSON
    found = []
    for row in rows:
        parts = [row.values]
        texts = row.values.get("paragraphs")
        if isinstance(texts, list) and all(isinstance(p, dict) and isinstance(p.get("qas"), list) for p in texts):
            parts = [{"context": part.get("context"), **asked} for part in texts for asked in part["qas"]]
        for values in parts:
            flat = _flat(values)
            for key, cell in flat.items():
                if isinstance(cell, list) and (key in names or key_of(key) == MANY):
                    named = [_named(names.get(key), item) for item in cell]
                    joined = json.dumps(named, ensure_ascii=False) if apart else ", ".join(map(str, named)) or NONE
                    flat[key] = joined if key_of(key) == MANY else named
                elif key in names:
                    flat[key] = _named(names[key], cell)
            found.append(Row(row.where, row.number, flat))
    return found


def listed(rows: list[Row], key: str | None, lines: list[str]) -> tuple[list[Row], bool]:
    """Rows with each list of a column as one text, and whether there were lists of several.

    Items are joined by ", " (`NONE` for none); objects, and labels with commas in them, are written as JSON. Lists of
    accepted answers stay as they are.
    """
    cells = [row.values.get(key or "") for row in rows]
    read = [literal(cell) if isinstance(cell, str) and cell[:1] == "[" else None for cell in cells]
    cells = [cell if found is None else found for cell, found in zip(cells, read, strict=True)]
    items = [item for cell in cells if isinstance(cell, (list, tuple)) for item in cell]
    if not key or not items or key_of(key) in ANSWERS or ALTERNATIVES.fullmatch(_plain_name(key)):
        return rows, False
    nested = any(isinstance(item, (list, dict)) or "," in str(item) for item in items)  # commas part labels
    many = nested or any(isinstance(cell, (list, tuple)) and len(cell) > 1 for cell in cells)
    if many:
        said = "JSON" if nested else "several labels a row, with commas between"
        lines.append(f"column {key!r} holds lists: written as {said}")

    def text(cell: Any) -> Any:
        if not isinstance(cell, (list, tuple)):
            return cell
        if nested:
            return json.dumps(cell, ensure_ascii=False, separators=(",", ":"), default=str)
        return ", ".join(str(item) for item in cell) or NONE

    return [replace(row, values={**row.values, key: text(cell)}) for row, cell in zip(rows, cells, strict=True)], many


def _named(names: Sequence[str] | None, cell: Any) -> Any:
    """A numbered label by its name; None for a number without one, such as the -1 of a test file."""
    if names is None or not isinstance(cell, int):
        return cell
    return names[cell] if 0 <= cell < len(names) else None


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, str) and value[:1] in ("[", "{") and key_of(key) in (*OPTIONS, "answers"):
            value = value if (found := literal(value)) is None else found
        if isinstance(value, dict) and key_of(key) in OBJECTS and not {"text", "aliases", "value"} & value.keys():
            flat[key] = json.dumps(value, ensure_ascii=False, default=str)
        elif isinstance(value, dict) and value.keys() == {"choices", "labels"} and _marked(**value):
            if value["labels"].count(1) == 1 and "choices" not in {*values, *flat}:
                flat |= {"choices": value["choices"], "answer": value["choices"][value["labels"].index(1)]}
        elif isinstance(value, dict) and key not in KEPT and not {"text", "aliases"} & value.keys():
            flat |= {f"{key}.{inner}": cell for inner, cell in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _marked(choices: Any, labels: Any) -> bool:
    """Whether choices are marked by 0 and 1, as TruthfulQA's are."""
    both = isinstance(choices, list) and isinstance(labels, list) and len(choices) == len(labels)
    return both and {*map(str, labels)} <= {"0", "1"}


def _class_names(data: Path) -> dict[str, list[str]]:
    """The names of numbered labels that `datasets` writes into the head of a Parquet file."""
    if suffix_of(data.name) != ".parquet":
        return {}
    from pyarrow import parquet  # there, since the rows have been read

    try:
        head = json.loads((parquet.read_schema(data).metadata or {}).get(b"huggingface", b"{}"))
        features = head.get("info", {}).get("features", {})
        kinds = {key: kind.get("feature", kind) for key, kind in features.items()}  # of a list, that of its items
        return {key: list(kind["names"]) for key, kind in kinds.items() if kind.get("_type") == "ClassLabel"}
    except (ValueError, AttributeError, KeyError, TypeError):
        return {}


def key_of(column: str) -> str:
    """A column's name for looking it up: `Sentence 1` and `data.sentence1` are sentence."""
    return re.sub(r"_?\d+$", "", _plain_name(column)) or column


def _plain_name(column: str) -> str:
    return re.sub(r"[\s_-]+", "_", column.rsplit(".", 1)[-1].strip().lower())


# ------------------------------------------------------------------------------------------------------ the guess


def find(
    data: Path, table: Mapping[str, list[Any]], prompt: tuple[str, ...], completion: str | None, lines: list[str]
) -> Columns:
    """What each column is: by its name, else by what stands in it; `prompt` and `completion` are taken as given."""
    for key in (*prompt, *((completion,) if completion else ())):
        if key not in table:
            raise TaskError(f"{data.name} has no column {short(key)}", do=nearest(key, table))
    table_like = suffix_of(data.name) in (".csv", ".tsv")
    for key, cells in table.items() if table_like else ():
        if cells.count(key) >= 2:
            raise TaskError(
                f"{data.name} line 1 looks like data",
                expected="column names",
                found=f"{short(key)}, also a value below",
                do="add a header line such as prompt,completion",
            )
    if completion in prompt:
        raise TaskError(f"{data.name}: {short(completion)} cannot be prompt and answer", do="name two columns")
    named = {*prompt, completion}
    usable = {key: found for key in table if (found := _usable(key, table[key], key in named))}
    choices = _options_of(table)
    free = [key for key in usable if key not in choices and key_of(key) not in SYSTEM]
    answer, why = (completion, "as you say") if completion else _answer_of(free, usable)
    reading = _reading(table, answer, choices) if answer and choices else None
    if reading is None:
        free, choices = [key for key in usable if key_of(key) not in SYSTEM], ()
    inputs = prompt or _inputs([key for key in free if key != answer], usable, answer)
    if not answer or not inputs:
        raise TaskError(
            f"{data.name} gives no task",
            expected="a column of prompts and one of answers",
            found=f"columns {', '.join(sorted(table)) or 'none'}",
            do="name them: --prompt COLUMN --completion COLUMN",
        )
    known = {*PROMPTS, *CONTEXTS}
    how = "as you say" if prompt else "by its name" if {key_of(key) for key in inputs} <= known else "text"
    if len(inputs) > 1:
        said = ", ".join(map(repr, inputs))
        lines.append(f"columns {said} read as the prompt, one a line behind its name ({how.replace('its', 'their')})")
    else:
        lines.append(f"column {inputs[0]!r} read as the prompt ({how})")
    lines.append(f"column {answer!r} read as the answer ({why})")
    if choices:
        how = f"the answer is {reading}" if reading else "the answer is added to them"
        lines.append(f"column{'s' * (len(choices) > 1)} {', '.join(choices)} read as the row's choices; {how}")
    if table_like and not {key_of(key) for key in table} & {*known, *COMPLETIONS}:
        lines.append(f"no column has a name that is known: is line 1 of {data.name} a header?")
    return Columns(tuple(inputs), answer, choices, reading or "")


def _usable(key: str, cells: Sequence[Any], named: bool) -> list[str]:
    """The texts of a column that may be prompt or answer, else []: half filled or known by name; lists for answers."""
    name = key_of(key)
    if not named and (key in KEPT or (name not in ANSWERS and any(isinstance(cell, (list, dict)) for cell in cells))):
        return []
    found = texts(cells)
    return found if named or 2 * len(found) >= len(cells) or name in (*PROMPTS, *CONTEXTS) else []


def texts(cells: Iterable[Any]) -> list[str]:
    """What stands in a column, as texts: scalars, and the first of several accepted answers."""
    return [found[0] for cell in cells if (found := _accepted(cell))]


def _accepted(cell: Any) -> tuple[str, ...]:
    """The answers that a cell accepts: of a scalar, of a list, of SQuAD's {text: […]}, TriviaQA's {value, aliases}."""
    if isinstance(cell, dict):
        cell = cell.get("text") or [cell.get("value"), *(cell.get("aliases") or [])]
    listed = cell if isinstance(cell, (list, tuple)) else [cell]
    listed = [item.get("text") if isinstance(item, dict) else item for item in listed]  # SQuAD's own file
    plain = (item for item in listed if isinstance(item, (str, int, float)) and item == item)  # NaN does not
    found = (json.dumps(item) if isinstance(item, bool) else str(item) for item in plain)
    return tuple(dict.fromkeys(text for text in found if text.strip()))


def _answer_of(free: Sequence[str], usable: Mapping[str, list[str]]) -> tuple[str, str]:
    """The column of answers ("" for none), and why: by name, else few different values, else the last that is left."""
    named: dict[str, str] = {}
    outside = [key for key in free if not set(map(_plain_name, key.split(".")[:-1])) & {*CONTEXTS}]
    for key in sorted(outside, key=lambda key: "." in key):
        named.setdefault(_plain_name(key), key)
    for key in sorted(outside, key=lambda key: "." in key):
        named.setdefault(key_of(key), key)
    if answer := next((named[name] for name in COMPLETIONS if name in named), None):
        twin = _spoken(answer, free, usable)
        return (twin, f"the names of {answer}") if twin else (answer, "by its name")
    known = {*PROMPTS, *CONTEXTS}
    rest = [key for key in outside if key_of(key) not in known and not _aside(key) and len(set(usable[key])) > 1]
    labels = [key for key in rest if closed(usable[key])]
    if labels and len(free) > 1:
        return min(labels, key=lambda key: len(set(usable[key]))), "few different values"
    # Beside texts of no known name, which are none of them an answer, as far as one can tell.
    texts_ = all(statistics.median(map(count_words, usable[key])) >= RUNNING for key in rest)
    alone = not rest or (texts_ and all(key_of(key) not in known for key in free))
    if alone and (numbered := next((key for key in outside if numbers_classes(key, usable[key])), "")):
        return numbered, "few different values"
    return next(reversed(rest), ""), "the last column that is left"


def numbers_classes(key: str, answers: Sequence[str]) -> bool:
    """Whether a column that names or numbers something is one of classes."""
    return bool(NUMBERED.fullmatch(_plain_name(key))) and closed(answers)


def _aside(key: str) -> bool:
    """Whether a column is never part of a prompt unless asked for, or it is all that there is."""
    return bool(ASIDE.fullmatch(key_of(key))) or _within_id(key)


def naming(key: str) -> bool:
    """Whether a column only says which row it is: never a prompt unless asked for."""
    return bool(NAMING.fullmatch(key_of(key))) or _within_id(key)


def _within_id(key: str) -> bool:
    return any(_plain_name(part) in OUTER for part in key.split(".")[:-1])


def _spoken(answer: str, free: Sequence[str], usable: Mapping[str, list[str]]) -> str | None:
    """The column that gives numbered labels their names, one each."""
    numbers = usable[answer]
    known = {*PROMPTS, *CONTEXTS}
    for key in (key for key in free if key_of(key) not in known) if all(cell.isdigit() for cell in numbers) else ():
        names = usable[key]
        if len(names) != len(numbers) or not closed(names) or any(cell.isdigit() for cell in names):
            continue
        if len(set(zip(numbers, names, strict=True))) == len(set(names)) == len(set(numbers)):
            return key
    return None


def _inputs(free: Sequence[str], usable: Mapping[str, list[str]], answer: str) -> list[str]:
    """The columns that make the prompt: those of a known name and those of running text, contexts first."""
    ruled = LABELS if key_of(answer) in LABELS else COMPLETIONS  # what is labelled may itself be an answer
    found = [
        key
        for key in free
        if (key_of(key) in (*PROMPTS, *CONTEXTS) or statistics.median(map(count_words, usable[key])) >= 3)
        and key_of(key) not in ruled
        and not _aside(key)
    ]

    if any(key_of(key) in (*PROMPTS, *CONTEXTS) for key in found):  # what stands behind the answer may explain it
        places = {key: n for n, key in enumerate(usable)}
        found = [k for k in found if key_of(k) in (*PROMPTS, *CONTEXTS) or places[k] < places.get(answer, len(places))]

    def within(part: str, whole: str) -> bool:
        pairs = list(zip(usable[part], usable[whole], strict=False))
        return len(usable[part]) == len(usable[whole]) and all(a in b for a, b in pairs)

    # The row written out once more (Alpaca's `text`), then what stands in a longer column (HellaSwag's `ctx_a`).
    found = [key for key in found if not (any(within(o, key) for o in found if o != key) and within(answer, key))]
    found = [
        key
        for n, key in enumerate(found)
        if not any(within(key, o) and (m < n or not within(o, key)) for m, o in enumerate(found) if m != n)
    ]
    rest = [key for key in free if not _aside(key)] or [key for key in free if not naming(key)]
    if not found and rest:
        found = [max(rest, key=lambda key: statistics.mean(map(len, usable[key])))]
    return sorted(found, key=lambda key: key_of(key) not in CONTEXTS)


def count_words(text: str) -> int:
    """How many words a text has; in scripts without spaces, how many characters."""
    return len(TOKEN.findall(text))


# -- choices


def _options_of(table: Mapping[str, list[Any]]) -> tuple[str, ...]:
    """The columns that hold each row's choices: one of lists, or a family such as A, B, C, D."""
    for key, cells in table.items():
        if _plain_name(key) in OPTIONS and any(isinstance(cell, (list, dict)) for cell in cells):
            return (key,)
    families: dict[str, dict[str, str]] = {}
    for key in table:
        if found := OPTION.fullmatch(_plain_name(key)):
            families.setdefault(found[1], {})[found[2]] = key
    for family in families.values():
        marks = sorted(family)
        if len(marks) >= 2 and marks[0] in "a01" and ord(marks[-1]) - ord(marks[0]) == len(marks) - 1:
            return tuple(family[mark] for mark in marks)
    return ()


def _options(values: Mapping[str, Any], columns: Sequence[str]) -> list[tuple[str, str]]:
    """(label, text) of a row's choices; where they have no labels of their own, letters."""
    cell = values.get(columns[0]) if len(columns) == 1 else [values.get(column) for column in columns]
    if isinstance(cell, dict):  # ARC's {text: […], label: […]}
        cell = [
            {"text": text, "label": label}
            for text, label in zip(cell.get("text") or (), cell.get("label") or (), strict=False)
        ]
    found = []
    letters = chain(ascii_uppercase, map(str, count(27)))
    for letter, item in zip(letters, cell if isinstance(cell, list) else (), strict=False):
        label, text = (item.get("label", letter), item.get("text")) if isinstance(item, dict) else (letter, item)
        found += [(str(label), accepted) for accepted in _accepted(text)[:1]]
    return found


def _right(answer: str, options: Sequence[tuple[str, str]], reading: str) -> str | None:
    agree = READINGS[reading]
    return next((text for place, (label, text) in enumerate(options) if agree(answer, place, label, text)), None)


def _reading(table: Mapping[str, list[Any]], answer: str, columns: tuple[str, ...]) -> str | None:
    """How most answers name one of their row's choices; "" where it is added to them, None where no way fits."""
    if key_of(re.sub(r"s$", "", key_of(columns[0]))) in WRONG:
        return ""
    rows = [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]
    asked = [(said[0], _options(row, columns)) for row in rows if (said := _accepted(row.get(answer)))]
    fits = {reading: sum(_right(said, options, reading) is not None for said, options in asked) for reading in READINGS}
    best = max(fits, key=lambda reading: fits[reading], default="")
    return best if asked and fits[best] >= 0.9 * len(asked) else None


def renamed(row: Row, columns: Columns) -> dict[str, Any]:
    """A row of a table in standard fields; several columns of a prompt stand one a line, each behind its name."""
    values = row.values
    kept: dict[str, Any] = {
        key: values[key] for key in ("group", "evidence", "rejected") if values.get(key) is not None
    }
    read = ((key, as_text(_joined(key, values.get(key)), row.where, key) or "") for key in columns.prompt)
    parts = [(key, text) for key, text in read if text.strip()]
    prompt = (
        "\n".join(f"{_title(key)}: {text}" for key, text in parts)
        if len(columns.prompt) > 1
        else "".join(t for _, t in parts)
    )
    answers = _accepted(values.get(columns.completion))
    system = next((values[key] for key in values if key_of(key) in SYSTEM and key not in columns.prompt), None)
    if prompt and isinstance(system, str) and system.strip():
        turns = (("system", system), ("user", prompt))
        kept["prompt"] = [{"role": role, "content": content} for role, content in turns]
    found = {"prompt": prompt} | kept | {"completion": answers[0] if answers else None}
    if columns.choices and answers:
        options = _options(values, columns.choices)
        right = _right(answers[0], options, columns.reading) if columns.reading else answers[0]
        texts = dict.fromkeys(text for _, text in options)
        # In the order of the alphabet: an answer that always stands last gives itself away.
        listed = list(texts) if columns.reading else sorted({*texts, answers[0]})
        return found | ({"completion": right, "choices": listed} if right and len(listed) > 1 else {"completion": None})
    return found | ({"answers": list(answers)} if len(answers) > 1 else {})


def _joined(key: str, cell: Any) -> Any:
    """A list of texts as one: tokens with spaces between, others with commas."""
    if not isinstance(cell, (list, tuple)) or not all(isinstance(item, str) for item in cell):
        return cell
    return (" " if key_of(key) in ("token", "tokens", "word", "words") else ", ").join(cell)


def _title(column: str) -> str:
    said = re.sub(r"[\s_]+", " ", column.rsplit(".", 1)[-1]).strip()
    return said[:1].upper() + said[1:]


def languages(columns: Columns | None) -> tuple[str, str] | None:
    """The languages that prompt and answer are named by, such as ("English", "Korean"); None where they are not."""
    if columns is None or len(columns.prompt) > 1:
        return None
    names = [LANGUAGES.get(_plain_name(key)) for key in (columns.prompt[0], columns.completion)]
    return (names[0], names[1]) if names[0] and names[1] and names[0] != names[1] else None


def coded(columns: Columns | None, answers: Sequence[str]) -> bool:
    """Whether answers are code: their column's name says so, and four of five show it."""
    named = columns is not None and key_of(columns.completion) in CODED
    shown = sum(bool(CODE.search(answer)) and not FORMULA.search(answer) for answer in answers) if named else 0
    return named and shown >= 0.8 * len(answers)


def closed(answers: Sequence[str], named: bool = False) -> bool:
    """Whether answers are labels: short, so few that each returns; of many numbers, those that count through.

    Where their column is `named` as labels are and holds no numbers, two rows a label do, however long each is.
    """
    counts = Counter(answers)
    once = sum(number == 1 for number in counts.values())
    named = named and not any(NUMBER.fullmatch(answer) for answer in counts)
    if not (2 <= len(counts) <= len(answers) / (2 if named else 5) and 4 * once <= len(counts)):
        return False
    if named:
        return True
    if len(counts) > 20 and all(NUMBER.fullmatch(answer) for answer in counts):
        return all(answer.isdigit() for answer in counts) and int(max(counts, key=int)) < len(counts) + 1
    return all(count_words(answer) <= 6 for answer in counts)


def parted(answers: Sequence[str]) -> tuple[str, list[str]]:
    """The mark (| ; or ,) that parts answers into labels, and answers with commas instead; "" and [] where none does.

    Labels are a closed set of which more than half stand alone in one row and in company in another: in "Portland, OR"
    and "Portland, ME" none does.
    """
    for mark in "|;,":
        rows = [list(dict.fromkeys(item.strip() for item in answer.split(mark) if item.strip())) for answer in answers]
        labels = [[item.casefold() for item in row] for row in rows]
        alone = {row[0] for row in labels if len(row) == 1}
        company = {item for row in labels if len(row) > 1 for item in row}
        decimal = mark == "," and any(re.search(r"\d,\d", answer) for answer in answers)
        free = 2 * len(alone & company) > len(alone | company)
        if free and all(rows) and not decimal and closed([*chain(*labels)]):
            return mark, [", ".join(row) for row in rows]
    return "", []
