"""The head of a task: the keys of task.yaml, each read and checked, and the files that they point to."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from whet.convert import as_text
from whet.errors import TaskError, nearest
from whet.rows import COLUMN, FIELDS, SUFFIXES, decode, short, stem_of, suffix_of

KEYS = ("name", "instruction", "metric", "labels", "documents", "knowledge", "glossary", "feedback", "earlier",
        "limits", "columns", "max_tokens")  # fmt: skip
METRICS = ("accuracy", "macro_f1", "exact_match", "token_f1", "contains", "rouge_l", "bleu", "chrf", "perplexity",
           "win_rate", "number", "set_f1", "pearson", "spearman")  # fmt: skip
SPLIT_FILES = {"train": ("train",), "dev": ("dev", "valid", "validation", "val", "eval"), "test": ("test",)}


@dataclass(frozen=True)
class Limits:
    """What the result must keep within: size, memory in bytes, latency in ms, forgetting in points; None = no limit."""

    size: int | None = None
    memory: int | None = None
    latency: float | None = None
    forgetting: float | None = None


SOURCES = ("documents", "knowledge", "glossary", "feedback")
CODE = re.compile(r"([\w./-]+\.py):([A-Za-z_]\w*)")
RANKED = re.compile(r"(recall|ndcg|mrr)@[1-9]\d{0,3}")
URL = re.compile(r"https?://\S+", re.IGNORECASE)
_QUERY = re.compile(r"\s*(?:(?:sqlite|postgres|postgresql|mysql)(?:\+\w+)?:|sparql:|select\s|with\s|"
                    r"(?!https?:)\w+(?:\+\w+)?://\S+\s+(?:select|with)\s)", re.IGNORECASE)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What task.yaml says, checked: sources as written, limits as numbers, `metric` "" where none is named."""

    name: str
    instruction: str = ""
    metric: str = ""
    labels: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    earlier: tuple[Path, ...] = ()
    limits: Limits = field(default_factory=Limits)
    max_tokens: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def named(self) -> tuple[str, ...]:
        """What prompt and completion are called where the rows come from, or ()."""
        wanted = ("prompt", "completion")
        return tuple(self.columns[key] for key in wanted) if self.columns.keys() >= set(wanted) else ()


def split_of(name: str) -> str:
    """The split whose rows a file of this name holds, or ""; case does not matter."""
    stem = stem_of(name).lower() if suffix_of(name) in SUFFIXES else ""
    return next((split for split, stems in SPLIT_FILES.items() if stem in stems), "")


def read_header(folder: Path, trust: bool) -> Header:
    """The checked keys of a folder's task.yaml; raises TaskError, one line, for whatever is wrong with them."""
    header = _keys(folder)
    sources = {key: _source(header.get(key), key, folder, trust) for key in SOURCES}
    return Header(
        name=_name(header, folder),
        instruction=_text(header, "instruction"),
        metric=_metric(_text(header, "metric").strip(), folder, trust),
        labels=_labels(header.get("labels")),
        columns=_columns(header.get("columns")),
        earlier=_earlier(header.get("earlier"), folder),
        limits=_limits(header.get("limits")),
        max_tokens=_max_tokens(header.get("max_tokens")),
        sources={key: source for key, source in sources.items() if source is not None},
    )


class _Yaml(yaml.SafeLoader):
    """yaml.SafeLoader that leaves words and numbers as written (no, 010, 1.50).

    It refuses a key written twice and references (*), a few of which can stand for more than memory holds.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "a reference (text that begins with * wants quotes)", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _keys(folder: Path) -> dict[str, Any]:
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


def _columns(value: object) -> dict[str, str]:
    """What a row's fields are called where the rows come from."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not value:
        raise TaskError("task.yaml: columns cannot be read", expected="{prompt: review, completion: sentiment}",
                        found=short(value))  # fmt: skip
    names: dict[str, str] = {}
    for key, column in value.items():
        if key not in FIELDS:
            raise TaskError(f"task.yaml: columns: {short(key)} is no field of a row", do=nearest(str(key), FIELDS))
        names[key] = (as_text(column, "task.yaml", f"columns.{key}") or "").strip()
        if not re.fullmatch(COLUMN, names[key]):
            raise TaskError("task.yaml: a column's name cannot be read", expected="letters, digits, - and _",
                            found=short(names[key]))  # fmt: skip
    return names


def _max_tokens(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(r"[1-9]\d{0,6}", value):
        raise TaskError("task.yaml: max_tokens cannot be read", expected="the tokens an answer may have, such as 512",
                        found=short(value))  # fmt: skip
    return int(value)


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


def _metric(metric: str, folder: Path, trust: bool) -> str:
    code = CODE.fullmatch(metric)
    if code:
        if not inside(folder, code[1], "metric").is_file():
            raise TaskError(f"task.yaml: the metric's file {code[1]} does not exist", expected=f"it in {folder.name}/")
        if not trust:
            raise TaskError(
                f"task.yaml: the metric {metric} is code", expected="a task you trust", do="read it, then add --trust"
            )
        return metric
    if metric and metric not in METRICS and not RANKED.fullmatch(metric):
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
        for entry in path.rglob("*") if path.is_dir() and key in SOURCES else ():
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
    return tuple(line if URL.match(line) else folder / line for line in source.split("\n"))


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
        elif URL.fullmatch(item):
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
        elif path.resolve() == folder or (path.parent == folder and split_of(path.name) in ("dev", "test")):
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
    """sha256 of a file, or of the names and files in a folder; "" where it is gone."""
    if path.is_dir():
        files = [file for file in path.glob("**/*" if deep else "*") if file.is_file()]
        inner = sorted(f"{file.relative_to(path).as_posix()} {contents(file)}" for file in files)
        return hashlib.sha256("\n".join(inner).encode()).hexdigest()
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
