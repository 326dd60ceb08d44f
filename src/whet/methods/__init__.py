"""Methods: each turns a System into another System. This file holds the contract and the table; one file per name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib.metadata import entry_points
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast, runtime_checkable

from whet.engine import Session, Spent, open_session
from whet.errors import MethodError, nearest
from whet.model import ModelRef
from whet.store import Store
from whet.system import System
from whet.task import Learnable

if TYPE_CHECKING:
    from whet.documents import Document
    from whet.engine.torch import TorchSession
    from whet.triples import Facts

GROUP = "whet.methods"
Need = Literal[
    "weights", "rows", "examples", "documents", "knowledge", "feedback", "earlier", "limits", "closed set", "labels"
]
Tell = Callable[[str, int, int], None]  # (what is going on, done, of)


@dataclass
class Run:
    """What a Method is given to work with: sessions, seed, fidelity, budget, store and progress.

    `fidelity` is the share of data and steps to use, `previous` names the training of a lower fidelity to go on from;
    `trained_tokens` bounds training; `report_to` names trackers (tensorboard, wandb, mlflow). What the method spends
    and what it wants to be reported (`notes`: curves, verdicts) is collected here; nothing else in it changes.
    """

    store: Store
    seed: int = 0
    fidelity: float = 1.0
    previous: str | None = None
    trained_tokens: int | None = None
    report_to: tuple[str, ...] = ()
    tell: Tell | None = None
    spent: Spent = field(default_factory=Spent)
    notes: dict[str, Any] = field(default_factory=dict)
    sessions: dict[ModelRef, Session] = field(default_factory=dict)
    corpora: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        """The store's folder."""
        return self.store.home

    def session(self, ref: ModelRef) -> Session:
        """An open session for a model; opened once and shared by all who work with this Run."""
        if ref not in self.sessions:
            self.sessions[ref] = open_session(ref, self.home)
        return self.sessions[ref]

    def local(self, ref: ModelRef, what: str) -> TorchSession:
        """The session of a model whose weights are within reach. Raises MethodError, naming what needs them, else."""
        if ref.remote:
            raise MethodError(f"{what} needs the weights", expected="a local model", found=ref.base)
        return cast("TorchSession", self.session(ref))

    def leave_out(self, *said: str) -> None:
        """Note what was left out, and why, beside what other methods of a recipe have left out."""
        self.notes["left_out"] = list(dict.fromkeys([*self.notes.get("left_out", ()), *said]))

    def documents(self, data: Learnable) -> tuple[list[Document], tuple[str, ...]]:
        """The task's documents, and notes on what was left out; read once, so that all see the same pages and rows.

        Raises MethodError where the task has none, and what `documents.load` raises.
        """
        from whet.documents import load

        if data.documents is None:
            raise MethodError("rag needs documents", expected="documents in task.yaml", found="none")
        key = (data.documents, data.folder, data.trusted)
        if key not in self.corpora:
            self.corpora[key] = load(data.documents, data.folder, data.trusted)
        found: tuple[list[Document], tuple[str, ...]] = self.corpora[key]
        return found

    def facts(self, data: Learnable) -> tuple[Facts, list[str]]:
        """The task's facts, and notes; read once, so that all see the same, also where an endpoint changes meanwhile.

        Raises what `triples.load` raises.
        """
        from whet.task import rows_hash
        from whet.triples import load

        key = (data.knowledge, data.glossary, data.folder, data.trusted, rows_hash(data.train))
        if key not in self.corpora:
            self.corpora[key] = load(data, self.home)
        found: tuple[Facts, list[str]] = self.corpora[key]
        return found

    def tidy(self) -> None:
        """Give memory that is no longer used back to the system, where models run in this process."""
        if any(not ref.remote for ref in self.sessions):
            from whet.engine.torch import give_back_memory

            give_back_memory()

    def progress(self, what: str) -> Callable[[int, int], None] | None:
        """A progress callback that says what is going on."""
        tell = self.tell
        return None if tell is None else lambda done, of: tell(what, done, of)


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of settings that turns a System into another System.

    `apply` changes neither its System nor the data, is repeatable by `run.seed`, keeps to `run.trained_tokens`, and
    never sees select or confirm: the type of its data has neither. `needs` names what must be at hand, `writes` which
    parts of the System change, `invalidates` which parts of a given System no longer hold afterwards.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]
    writes: ClassVar[tuple[str, ...]]
    invalidates: ClassVar[tuple[str, ...]]

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """A new System; the given one is unchanged."""

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying, by name."""


def table() -> dict[str, type[Method]]:
    """All registered Methods by name; the built-in ones enter by the same entry-point group as plugins."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    return {name: cast(type[Method], found[name].load()) for name in sorted(found)}


def names() -> tuple[str, ...]:
    """The names of all registered Methods, without loading them."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def make(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """A Method by name with settings; text values are read as the type of the default.

    Raises MethodError for an unknown name or setting (the nearest is suggested) or a value of the wrong kind.
    """
    point = next((p for p in entry_points(group=GROUP) if p.name == name), None)
    if point is None:
        raise MethodError(f"no method {name!r}", found=name, do=nearest(name, names()))
    kind = point.load()
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in (settings or {}).items():
        if key not in known:
            raise MethodError(f"{name} has no setting {key!r}", do=nearest(key, known))
        values[key] = _read(name, key, value, known[key].default)
    try:
        return cast(Method, kind(**values))
    except (TypeError, ValueError) as error:
        raise MethodError(f"wrong settings for {name}", found=str(error), do=f"see `whet methods {name}`") from error


def about(kind: type[Method], whole: bool = True) -> str:
    """What a Method is and its settings mean, by the docstrings of its class and of those it takes settings from.

    Else the first paragraph alone, as one line.
    """
    said = [getdoc(one) or "" for one in kind.__mro__ if is_dataclass(one) and "__doc__" in vars(one)]
    written = [text for text in said if not re.match(r"\w+\(", text)]  # what dataclass writes where there is none
    return "\n\n".join(written) if whole else " ".join("".join(written[:1]).split("\n\n")[0].split())


def choices(kind: type[Method], setting: str) -> tuple[str, ...]:
    """The words that a setting of text may be, as the error for another one lists them; none where any may stand."""
    try:
        kind(**{setting: "?"})
    except ValueError as error:
        listed = re.split(r"; (?:one of )?| is none of ", str(error), maxsplit=1)[1:]
        return tuple(word for text in listed for word in re.split(r", | or ", text))
    return ()


def _read(name: str, key: str, value: Any, default: Any) -> Any:
    """A setting's value as the type of its default; text comes from the command line, lists from JSON."""
    kind = type(default)
    try:
        if kind is float and not math.isfinite(float(value)):
            raise ValueError("a number that is none")
        if default is MISSING or default is None or (isinstance(value, kind) and not isinstance(value, bool)):
            return value
        if kind is bool:
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            return words[str(value).lower()]
        if kind is tuple and isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        if kind is tuple:
            return tuple(tuple(v) if isinstance(v, list) else v for v in value)
        return kind(value)
    except (KeyError, ValueError, TypeError) as error:
        raise MethodError(
            f"{name}: {key} takes {kind.__name__}", expected=f"something like {default!r}", found=repr(value),
            do="correct it",
        ) from error  # fmt: skip


def lacking(method: Method | type[Method], system: System, data: Learnable) -> str:
    """What a Method needs and the task or the model lacks, in words; empty where nothing is missing."""
    have: dict[str, bool] = {
        "weights": not system.model.remote,
        "rows": bool(data.train),
        "examples": any(e.completion for e in data.train),
        "documents": data.documents is not None,
        "knowledge": data.knowledge is not None or data.glossary is not None,
        "feedback": bool(data.judged),
        "earlier": bool(data.earlier or system.card.get("memory")),
        "limits": any(v is not None for v in vars(data.limits).values()),
        "closed set": data.closed,
        "labels": bool(data.labels) and data.closed,
    }
    words = {
        "weights": "the model's weights (a server keeps them)",
        "rows": "train rows",
        "examples": "train rows with completions",
        "closed set": "a closed set of answers",
        "labels": "labels in task.yaml",
    }
    missing = [words.get(need, f"{need} in the task") for need in method.needs if not have[need]]
    return " and ".join(missing)
