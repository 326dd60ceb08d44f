"""The task folder: load, validate, split, and the checks that nothing leaks between the splits."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from whet.convert import as_text, standard
from whet.errors import TaskError, nearest
from whet.rows import COLUMN, FIELDS, SUFFIXES, Row, decode, read, short
from whet.splits import cut, mark, without

if TYPE_CHECKING:
    from whet.feedback import Judged

KEYS = ("name", "instruction", "metric", "labels", "documents", "knowledge", "glossary", "feedback", "earlier",
        "limits", "columns")  # fmt: skip
METRICS = ("accuracy", "macro_f1", "exact_match", "token_f1", "contains", "rouge_l", "bleu", "chrf", "perplexity",
           "win_rate")  # fmt: skip
SPLIT_FILES = {"train": ("train",), "dev": ("dev", "valid", "validation"), "test": ("test",)}
SELECT_MOST, SELECT_SHARE = 400, 0.2


@dataclass(frozen=True)
class Example:
    """One prompt and its reference answer(s); or, for plain text rows, one text."""

    id: str
    prompt: str
    completion: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    group: str | None = None
    evidence: tuple[tuple[str, float], ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    rejected: str | None = None
    text: str | None = None

    @property
    def query(self) -> str:
        """What documents and facts are looked up by: the prompt, and what the user said last before it."""
        return "\n".join([self.prompt, *[said for role, said in self.history if role == "user"][-1:]])


@dataclass(frozen=True)
class Limits:
    """What the result must keep within: size, memory in bytes, latency in ms, forgetting in points; None = no limit."""

    size: int | None = None
    memory: int | None = None
    latency: float | None = None
    forgetting: float | None = None


@dataclass(frozen=True)
class Learnable:
    """What a Method receives: everything it may learn from, and neither select nor confirm.

    Sources are absolute paths, or text where they are URLs, queries or lists (one a line). `sealed` are the marks
    (`splits.mark`) of the held-out prompts: what a Method reads from elsewhere must not be among them. `columns` is
    what prompt and completion were called where the rows came from, or nothing.
    """

    name: str
    instruction: str
    metric: str
    labels: tuple[str, ...] = ()
    train: tuple[Example, ...] = ()
    documents: Path | str | None = None
    knowledge: Path | str | None = None
    glossary: Path | str | None = None
    feedback: Path | str | None = None
    earlier: tuple[Path, ...] = ()
    limits: Limits = field(default_factory=Limits)
    folder: Path = Path()
    judged: tuple[Judged, ...] = ()
    trusted: bool = False
    sealed: frozenset[str] = frozenset()
    columns: tuple[str, ...] = ()

    @property
    def closed(self) -> bool:
        """Whether the answer comes from a known set: the task's labels, or every row's own choices."""
        return _closed(self.labels, self.train)

    def validation(
        self, share: float = 0.1, seed: int = 0, most: int = 200
    ) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """(fit, validation): a stratified cut of train with groups whole; the same for the same contents and seed."""
        fit, held = cut(self.train, min(most, round(share * len(self.train))), seed=seed, closed=self.closed)
        return tuple(self.train[i] for i in fit), tuple(self.train[i] for i in held)


@dataclass(frozen=True)
class Splits:
    """The three parts of a task that measurement keeps apart, and the rows dropped for leaking as (id, why).

    `judging` are the judgements set aside for the judge of a win rate: no Method learns from them.
    """

    learnable: Learnable
    select: tuple[Example, ...]
    confirm: tuple[Example, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    judging: tuple[Judged, ...] = ()


@dataclass(frozen=True)
class Task:
    """A loaded task folder. Sources are as written; `notes` say what was converted, ignored or worth a look."""

    name: str
    folder: Path
    instruction: str
    metric: str
    labels: tuple[str, ...] = ()
    train: tuple[Example, ...] = ()
    dev: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    documents: str | None = None
    knowledge: str | None = None
    glossary: str | None = None
    feedback: str | None = None
    earlier: tuple[Path, ...] = ()
    limits: Limits = field(default_factory=Limits)
    trusted: bool = False
    notes: tuple[str, ...] = ()
    judged: tuple[Judged, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def closed(self) -> bool:
        """Whether the answer comes from a known set: the task's labels, or every row's own choices."""
        return _closed(self.labels, (*self.train, *self.dev, *self.test))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything the task says, files it points to included: of contents, never of paths."""
        code = _CODE.fullmatch(self.metric)
        metric = [code[2], contents(self.folder / code[1])] if code else self.metric
        parts: list[Any] = [self.instruction, metric, self.labels, asdict(self.limits)]
        parts += [rows_hash(rows) for rows in (self.train, self.dev, self.test)]
        for source in (self.documents, self.knowledge, self.glossary, self.feedback):
            parts.append(
                [contents(place) if isinstance(place, Path) else place for place in places(self.folder, source)]
            )
        parts.append([contents(folder, deep=False) for folder in self.earlier])
        parts += [self.columns] if self.columns else []
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def split(self, seed: int = 0, strict: bool = False) -> Splits:
        """Train, select and confirm, disjoint by prompt (nearly the same counts) and by group.

        select is dev, else min(400, 20 %) of train, stratified by answer where the set is closed; confirm is test.
        Rows of train, dev or feedback that leak are dropped and named; `strict` raises TaskError instead. A task of
        feedback alone learns from the chosen answers.
        """
        from whet.feedback import divide, pairs, without_held

        select, leaks = without(self.dev, (*self.test,))
        judged, spoilt = without_held(self.judged, (*self.test, *select))
        judging: tuple[Judged, ...] = ()
        if self.metric == "win_rate":
            judged, judging = divide(judged)
        alone = self.metric == "win_rate" and not self.train
        train, more = without(self.train or tuple(r.example for r in pairs(judged) if alone), (*self.test, *select))
        leaks += spoilt
        if leaks and strict or more and strict:
            row, why = (leaks + more)[0]
            raise TaskError(
                f"{len(leaks) + len(more)} learnable rows leak into held-out data; the first, {row}, {why}",
                expected="none",
                do="remove them, or go on without --strict to have them dropped",
            )
        if not select and train:
            # Rows that the metric cannot score are learnt from, and not selected by.
            can = [i for i, row in enumerate(train) if _scorable(row, self.metric)]
            wanted = min(SELECT_MOST, max(1, round(SELECT_SHARE * len(can))))
            _, held = cut([train[i] for i in can], wanted, seed=seed, closed=self.closed, near=True)
            select, gone = tuple(train[can[i]] for i in held), {can[i] for i in held}
            scorable = set(can)
            leaking = without(tuple(row for i, row in enumerate(train) if i not in scorable), select)[1]
            more, spoiled = more + leaking, {name for name, _ in leaking}
            train = tuple(row for i, row in enumerate(train) if i not in gone and row.id not in spoiled)
            judged, spoilt = without_held(judged, select)
            leaks += () if alone else spoilt
        learnable = Learnable(
            name=self.name,
            instruction=self.instruction,
            metric=self.metric,
            labels=self.labels,
            train=train,
            documents=locate(self.folder, self.documents),
            knowledge=locate(self.folder, self.knowledge),
            glossary=locate(self.folder, self.glossary),
            feedback=locate(self.folder, self.feedback),
            earlier=self.earlier,
            limits=self.limits,
            folder=self.folder,
            judged=judged,
            trusted=self.trusted,
            sealed=frozenset(mark(row) for row in (*self.test, *select)),
            columns=self.columns,
        )
        return Splits(learnable, select, self.test, leaks + more, judging)


_HELD_OUT = (*SPLIT_FILES["dev"], *SPLIT_FILES["test"])
_SOURCES = ("documents", "knowledge", "glossary", "feedback")
_CODE = re.compile(r"([\w./-]+\.py):([A-Za-z_]\w*)")
_RANKED = re.compile(r"(recall|ndcg)@[1-9]\d{0,3}")
_URL = re.compile(r"https?://\S+", re.IGNORECASE)
_QUERY = re.compile(r"\s*(?:(?:sqlite|postgres|postgresql|mysql)(?:\+\w+)?:|sparql:|select\s|with\s)", re.IGNORECASE)


def _scorable(row: Example, metric: str) -> bool:
    """Whether a row says what an answer to it is scored by."""
    if metric == "perplexity":
        return bool(row.text or row.completion)
    if _RANKED.fullmatch(metric):
        return bool(row.evidence)
    if metric == "win_rate":
        return row.text is None
    return row.text is None and bool(row.completion or row.answers)


def _closed(labels: Sequence[str], rows: Sequence[Example]) -> bool:
    return bool(labels) or (bool(rows) and all(row.choices for row in rows))


# ----------------------------------------------------------------------------------------------------------- load


def load(folder: str | Path, *, trust: bool = False) -> Task:
    """Reads and checks a task folder; raises TaskError, one line naming file and line, for whatever is wrong with it.

    `trust` allows what runs code: a metric in a Python file, an SQL or SPARQL source.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TaskError(
            f"there is no task folder {folder}",
            expected="a folder with task.yaml",
            found="a file" if folder.exists() else "nothing",
            do="check the path, or make one from a data file: whet init DATA --out DIR",
        )
    folder = folder.resolve()
    header = _header(folder)
    notes: list[str] = []
    raw = {split: _rows(folder, stems) for split, stems in SPLIT_FILES.items()}
    if not raw["train"] and not raw["test"]:
        raise TaskError(
            f"{folder.name} has neither train nor test rows",
            expected="train.jsonl, test.jsonl or both",
            found="none",
            do="add one (csv, parquet, json and txt are read, too)",
        )
    metric = _metric(header, folder, trust, raw, notes)
    labels = _labels(header.get("labels"))
    splits = {split: _examples(split, path, rows, metric, labels, notes) for split, (path, rows) in _present(raw)}
    sources = {key: _source(header.get(key), key, folder, trust) for key in _SOURCES}
    for key in _SOURCES:
        for file in sorted(folder.glob(f"{key}.*")) if sources[key] is None else ():
            notes.append(f"{file.name} lies in the folder, but task.yaml does not name it ({key}: {file.name})")
    judged: tuple[Judged, ...] = ()
    if sources["feedback"] is not None:
        from whet import feedback

        judged, said = feedback.load(folder, sources["feedback"])
        notes += said
    if _RANKED.fullmatch(metric) and sources["documents"] is None:
        notes.append(f"{metric} scores a retriever, and the task names no documents")
    return Task(
        name=_name(header, folder),
        folder=folder,
        instruction=_text(header, "instruction"),
        metric=metric,
        labels=labels,
        columns=_columns(header.get("columns")),
        earlier=_earlier(header.get("earlier"), folder),
        limits=_limits(header.get("limits")),
        trusted=trust,
        notes=tuple(notes),
        judged=judged,
        train=splits.get("train", ()),
        dev=splits.get("dev", ()),
        test=splits.get("test", ()),
        documents=sources["documents"],
        knowledge=sources["knowledge"],
        glossary=sources["glossary"],
        feedback=sources["feedback"],
    )


class _Yaml(yaml.SafeLoader):
    """yaml.SafeLoader that leaves words and numbers as written (no, 010, 1.50) and refuses a key written twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if sum(other.value == key.value for other in keys) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _header(folder: Path) -> dict[str, Any]:
    path = inside(folder, "task.yaml", "task.yaml")
    if not path.is_file():
        raise TaskError(
            f"{folder.name} has no task.yaml",
            expected="one with at least `metric: …`",
            found="none",
            do="write it, or make a task from a data file: whet init DATA --out DIR",
        )
    try:
        header = yaml.load(decode(path), Loader=_Yaml)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise TaskError(
            f"task.yaml line {line} is not YAML", expected="lines of the form `key: value`", found=str(error.problem)
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TaskError(
            "task.yaml is not YAML", expected="lines of the form `key: value`", found=short(str(error), 120)
        ) from None
    if not isinstance(header, dict):
        raise TaskError(
            "task.yaml is not a mapping", expected="lines of the form `key: value`", found=type(header).__name__
        )
    for key in header:
        if key not in KEYS:
            raise TaskError(f"task.yaml has an unknown key {short(key)}", do=nearest(str(key), KEYS))
    return header


def _text(header: Mapping[str, Any], key: str) -> str:
    value = header.get(key)
    if isinstance(value, (list, dict)):
        raise TaskError(
            f"task.yaml: {key} is not text", expected="text", found="a list" if isinstance(value, list) else "a mapping"
        )
    return as_text(value, "task.yaml", key) or ""


def _name(header: Mapping[str, Any], folder: Path) -> str:
    name = _text(header, "name") or folder.name or "task"
    if len(name) > 100 or name.startswith(".") or re.search(r"[/\\\x00-\x1f]", name):  # runs are kept under runs/NAME
        raise TaskError(
            "task.yaml: the name cannot be a folder's name", expected="letters, digits, - and _", found=short(name)
        )
    return name


def _labels(value: object) -> tuple[str, ...]:
    from whet.metrics import plain

    if value is None:
        return ()
    if not isinstance(value, list):
        raise TaskError("task.yaml: labels is not a list", expected="[negative, positive]", found=type(value).__name__)
    labels = [as_text(label, "task.yaml", "a label") or "" for label in value]
    for label, count in Counter(labels).items():
        if not label.strip():
            raise TaskError("task.yaml: a label is empty", expected="text", do="quote it if it is the word null")
        if count > 1:
            raise TaskError("task.yaml: a label stands twice", expected="labels that differ", found=short(label))
    alike: dict[str, str] = {}
    for label in labels:
        if (other := alike.setdefault(plain(label), label)) != label:
            raise TaskError("task.yaml: two labels differ by case or signs alone, and answers are read without them",
                            expected="labels that differ in words", found=short([other, label]))  # fmt: skip
    if len(labels) < 2:
        raise TaskError(
            "task.yaml: too few labels",
            expected="at least 2",
            found=str(len(labels)),
            do="leave labels out for free text",
        )
    return tuple(labels)


def _columns(value: object) -> tuple[str, ...]:
    """What prompt and completion are called, in this order."""
    if value is None:
        return ()
    if not isinstance(value, dict) or set(value) != {"prompt", "completion"}:
        raise TaskError("task.yaml: columns cannot be read", expected="{prompt: review, completion: sentiment}",
                        found=short(value))  # fmt: skip
    wanted = ("prompt", "completion")
    names = tuple((as_text(value[key], "task.yaml", f"columns.{key}") or "").strip() for key in wanted)
    for name in names:
        if not re.fullmatch(COLUMN, name):
            raise TaskError("task.yaml: a column's name cannot be read", expected="letters, digits, - and _",
                            found=short(name))  # fmt: skip
    return names


_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_LIMITS: dict[str, tuple[str, dict[str, int]]] = {
    "size": ("100MB", _BYTES),
    "memory": ("1GB", _BYTES),
    "latency": ("200ms", {"": 1, "ms": 1, "s": 1000}),
    "forgetting": ("1", {"": 1, "%": 1, "point": 1, "points": 1}),
}


def _limits(value: object) -> Limits:
    if value is None:
        return Limits()
    if not isinstance(value, dict):
        raise TaskError(
            "task.yaml: limits is not a mapping", expected="{size: 100MB, latency: 200ms}", found=type(value).__name__
        )
    parsed: dict[str, float] = {}
    for key, written in value.items():
        if key not in _LIMITS:
            raise TaskError(f"task.yaml: unknown limit {short(key)}", do=nearest(str(key), _LIMITS))
        example, units = _LIMITS[key]
        match = re.fullmatch(
            r"(\d{1,15}(?:\.\d{1,9})?) ?([a-z%]*)", written.lower() if isinstance(written, str) else ""
        )
        number = float(match[1]) * units[match[2]] if match and match[2] in units else -1.0
        if number < 0 or (number == 0 and key != "forgetting"):
            raise TaskError(
                f"task.yaml: limits.{key} cannot be read", expected=f"such as {example}", found=short(written)
            )
        parsed[key] = number
    whole = {key: int(parsed[key]) for key in ("size", "memory") if key in parsed}
    return Limits(**whole, latency=parsed.get("latency"), forgetting=parsed.get("forgetting"))


def _metric(header: Mapping[str, Any], folder: Path, trust: bool, raw: Mapping[str, Any], notes: list[str]) -> str:
    metric = _text(header, "metric").strip()
    if not metric:
        if all("text" in row.values and "prompt" not in row.values for _, (_, rows) in _present(raw) for row in rows):
            notes.append("metric: perplexity, since the rows are plain text")
            return "perplexity"
        raise TaskError(
            "task.yaml names no metric",
            expected=f"metric: one of {', '.join(METRICS)}, recall@5, ndcg@10 or file.py:function",
        )
    code = _CODE.fullmatch(metric)
    if code:
        if not inside(folder, code[1], "metric").is_file():
            raise TaskError(f"task.yaml: the metric's file {code[1]} does not exist", expected=f"it in {folder.name}/")
        if not trust:
            raise TaskError(
                f"task.yaml: the metric {metric} is code", expected="a task you trust", do="read it, then add --trust"
            )
        return metric
    if metric not in METRICS and not _RANKED.fullmatch(metric):
        from importlib.metadata import entry_points

        plugins = [point.name for point in entry_points(group="whet.metrics")]
        if metric not in plugins:
            raise TaskError(
                f"task.yaml: unknown metric {short(metric)}",
                do=nearest(metric, {*METRICS, *plugins, "recall@5", "ndcg@10"}),
            )
    return metric


# ---------------------------------------------------------------------------------------------------------- paths


def inside(folder: Path, written: str, key: str) -> Path:
    """The absolute path of something in the task folder; raises TaskError where it, or a link in it, leads out."""
    parts = re.split(r"[/\\]", written)
    if "\0" in written or written.startswith(("/", "\\", "~")) or ".." in parts or re.match(r"[A-Za-z]:", written):
        raise TaskError(
            f"{key}: {short(written)} leads out of the task folder",
            expected="a path inside it",
            do="copy the file into the folder",
        )
    root, path = folder.resolve(), folder / written
    try:
        if not path.resolve().is_relative_to(root):
            raise TaskError(
                f"{key}: {short(written)} is a link out of the task folder",
                expected="a file inside it",
                do="copy the file into the folder",
            )
        for entry in path.rglob("*") if path.is_dir() and key in _SOURCES else ():
            if entry.is_symlink() and not entry.resolve().is_relative_to(root):
                raise TaskError(
                    f"{key}: {short(str(entry.relative_to(folder)))} is a link out of the task folder",
                    expected="a file inside it",
                    do="copy the file into the folder",
                )
    except (OSError, RuntimeError) as error:
        raise TaskError(
            f"{key}: {short(written)} cannot be followed ({error})", expected="a file inside the task folder"
        ) from None
    return root / written


def places(folder: Path, source: str | None) -> tuple[Path | str, ...]:
    """The parts of a source: an absolute path for each file or folder, text for each URL, one text for a query."""
    if source is None or _QUERY.match(source):
        return () if source is None else (source,)
    return tuple(line if _URL.match(line) else folder / line for line in source.split("\n"))


def locate(folder: Path, source: str | None) -> Path | str | None:
    """A source as a Method takes it: the absolute path where it is one file or folder, else the text as it is."""
    found = places(folder, source)
    return found[0] if len(found) == 1 else source


def _source(value: object, key: str, folder: Path, trust: bool) -> str | None:
    if value is None:
        return None
    written = value if isinstance(value, list) else [value]
    listed = [item.strip() for item in written if isinstance(item, str) and item.strip()]
    if not listed or len(listed) < len(written):
        raise TaskError(
            f"task.yaml: {key} is not a source", expected="a file, a folder, URLs or a query", found=short(value)
        )
    for item in listed:
        if _QUERY.match(item):
            if len(listed) > 1:
                raise TaskError(
                    f"task.yaml: {key} mixes a query with others", expected="one query alone", found=short(item)
                )
            if not trust:
                raise TaskError(
                    f"task.yaml: {key} is a query ({short(item)})",
                    expected="a task you trust",
                    do="read it, then add --trust",
                )
        elif _URL.fullmatch(item):
            continue
        elif "://" in item:
            raise TaskError(
                f"task.yaml: {key} cannot be fetched",
                expected="http://, https://, a path, an SQL or a sparql: source",
                found=short(item),
            )
        elif not (path := inside(folder, item, key)).exists():
            raise TaskError(
                f"task.yaml: {key} names {short(item)}, which does not exist", expected=f"it in {folder.name}/"
            )
        elif path.resolve() == folder or (path.parent == folder and path.stem in _HELD_OUT and path.suffix in SUFFIXES):
            raise TaskError(
                f"task.yaml: {key} names {short(item)}, which holds the held-out answers",
                expected="a source without them",
            )
    return "\n".join(listed)


def _earlier(value: object, folder: Path) -> tuple[Path, ...]:
    if value is None:
        return ()
    listed = value if isinstance(value, list) else [value]
    found = []
    for item in listed:
        if not isinstance(item, str) or not item.strip():
            raise TaskError("task.yaml: earlier is not a list of folders", expected="[../old-task]", found=short(item))
        sibling = re.fullmatch(r"\.\./([^/\\\0]+)/?", item.strip())
        if sibling and sibling[1] not in (".", ".."):
            path = folder.parent / sibling[1]
            if path.resolve() == folder or path.resolve().parent != folder.parent:
                raise TaskError(
                    f"earlier: {short(item)} is not another task beside this one",
                    expected="../old-task",
                    found=short(str(path.resolve())),
                )
        else:
            path = inside(folder, item.strip(), "earlier")
        if not (path / "task.yaml").is_file():
            raise TaskError(
                f"earlier: {short(item)} is not a task", expected="a folder with task.yaml", found="nothing there"
            )
        found.append(path)
    return tuple(found)


def contents(path: Path, deep: bool = True) -> str:
    """sha256 of a file, or of the files in a folder whatever their names; "" where it is gone."""
    if path.is_dir():
        inner = sorted(contents(file) for file in path.glob("**/*" if deep else "*") if file.is_file())
        return hashlib.sha256("".join(inner).encode()).hexdigest()
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


# ----------------------------------------------------------------------------------------------------------- rows


def _rows(folder: Path, stems: Sequence[str]) -> tuple[Path, list[Row]] | None:
    files = [
        folder / f"{stem}{suffix}"
        for stem in stems
        for suffix in SUFFIXES
        if (folder / f"{stem}{suffix}").exists() or (folder / f"{stem}{suffix}").is_symlink()
    ]
    if len(files) > 1:
        raise TaskError(
            f"{folder.name} has {files[0].name} and {files[1].name}", expected="one of them", do="remove the other"
        )
    if not files:
        return None
    inside(folder, files[0].name, files[0].name)
    return files[0], read(files[0])


def _present(raw: Mapping[str, tuple[Path, list[Row]] | None]) -> list[tuple[str, tuple[Path, list[Row]]]]:
    return [(split, found) for split, found in raw.items() if found is not None]


def _examples(
    split: str, path: Path, rows: list[Row], metric: str, labels: tuple[str, ...], notes: list[str]
) -> tuple[Example, ...]:
    examples: list[Example] = []
    seen: dict[str, str] = {}
    forms: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    for row in rows:
        ignored.update(key for key in row.values if key not in FIELDS)
        values, form = standard(row)
        forms[form] += 1
        example = _example(row, values, split, metric, labels, f"{path.stem}-{row.number}")
        if example.id in seen:
            raise TaskError(
                f"{row.where}: the id {short(example.id)} is taken",
                expected="ids that differ",
                found=f"it at {seen[example.id]}",
            )
        seen[example.id] = row.where
        examples.append(example)
    notes += [f"{path.name}: {count} rows converted from {form}" for form, count in forms.items() if form]
    if ignored:
        notes.append(f"{path.name}: fields not used: {', '.join(sorted(map(str, ignored)))}")
    return tuple(examples)


def _example(row: Row, values: dict[str, Any], split: str, metric: str, labels: tuple[str, ...], name: str) -> Example:
    where, found = row.where, f"fields {', '.join(map(str, row.values)) or 'none'}"
    if "prompt" not in values and "text" in values:
        if "label" in row.values or (split != "train" and metric != "perplexity"):
            raise TaskError(
                f"{where}: plain text where {metric} needs answers",
                expected="prompt and completion",
                found=found,
                do="rename the fields, or: whet init DATA --out DIR",
            )
        return Example(values.get("id", name), "", text=values["text"], group=values.get("group"))
    if not (values.get("prompt") or "").strip():
        what = "empty" if values.get("prompt") is not None else "null" if "prompt" in values else "missing"
        raise TaskError(
            f"{where}: the prompt is {what}",
            expected="prompt and completion",
            found=found,
            do="" if "prompt" in values else "rename the fields, or: whet init DATA --out DIR",
        )
    answers = _answers(values.get("answers"), where)
    completion = values.get("completion")
    if not completion and answers:
        completion = answers[0]
    open_ended = _RANKED.fullmatch(metric) or metric == "win_rate" or (metric == "perplexity" and split == "train")
    if not completion and not open_ended:
        what = "empty" if completion is not None else "null" if "completion" in values else "missing"
        raise TaskError(f"{where}: the completion is {what}", expected="prompt and completion", found=found)
    completion = completion or ""
    answers = tuple(dict.fromkeys((completion, *answers))) if completion else ()
    choices = _texts(values.get("choices"), where, "choices")
    evidence = _evidence(values.get("evidence"), where)
    if labels and not choices:
        for answer in answers:
            if answer not in labels:
                raise TaskError(f"{where}: {short(answer)} is not one of the labels", do=nearest(answer, labels))
    if choices and (len(choices) < 2 or (completion and completion not in choices)):
        raise TaskError(
            f"{where}: the completion is not one of the row's choices",
            expected=f"one of {short(list(choices), 120)}",
            found=short(completion),
        )
    if split != "train" and _RANKED.fullmatch(metric) and not evidence:
        raise TaskError(
            f"{where}: no evidence to score {metric} by",
            expected="evidence: ids of the documents that answer",
            found=found,
        )
    return Example(
        values.get("id", name),
        values["prompt"],
        completion,
        answers,
        choices,
        values.get("group"),
        evidence,
        values.get("history", ()),
        values.get("rejected"),
    )


def _answers(value: object, where: str) -> tuple[str, ...]:
    if isinstance(value, dict) and "text" in value:  # SQuAD's {"text": [...], "answer_start": [...]}
        value = value["text"]
    return _texts([value] if isinstance(value, (str, int, float)) else value, where, "answers")


def _texts(value: object, where: str, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise TaskError(f"{where}: {name} is not a list", expected="a list of texts", found=short(value))
    texts = [as_text(item, where, name) for item in value]
    if any(not text for text in texts):
        raise TaskError(f"{where}: {name} holds an empty one", expected="a list of texts", found=short(value))
    return tuple(str(text) for text in texts)


def _evidence(value: object, where: str) -> tuple[tuple[str, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        value = dict.fromkeys(
            [as_text(item, where, "evidence") for item in (value if isinstance(value, list) else [value])], 1
        )
    graded: dict[str, float] = {}
    for name, grade in value.items():
        if grade is None:  # Parquet fills the ids that a row does not have with nulls
            continue
        text = as_text(name, where, "evidence")
        if not text or type(grade) not in (int, float) or not 0 <= grade < math.inf:
            raise TaskError(
                f"{where}: evidence cannot be read", expected='["doc-id"] or {"doc-id": grade ≥ 0}', found=short(value)
            )
        graded.setdefault(text, float(grade))
    return tuple(graded.items())


def rows_hash(examples: Iterable[Example]) -> str:
    """sha256 of the contents of rows, in their order."""
    rows = [[*(getattr(example, name) for name in Example.__dataclass_fields__)] for example in examples]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
