"""Recipes: tuples of Methods, the grammar of their allowed orders, and running them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from whet.errors import MethodError
from whet.methods import Method, Run, lacking, make
from whet.model import resolve
from whet.system import System
from whet.task import Learnable, contents

# What a part written by one method is called when another says that it invalidates it.
BUILDING = ("prompting", "rag", "knowledge", "fewshot", "calibrate")  # each is chosen with those before it in place
PART_OF = {"calibrate": "calibration", "distill": "healing", "quantize": "packing", "share": "sharing"}

Sort = Callable[[Any], bool]
# Settings that do not go together in this order: the earlier method, the later one, and what to do.
CLASHES: tuple[tuple[Sort, Sort, str], ...] = (
    (lambda a: a.name == "share" and a.values > 0, lambda b: b.name == "quantize", "leave share(values=…) out"),
    (lambda a: a.name == "quantize", lambda b: getattr(b, "adapter", "") == "full",
     "put quantize last, or set adapter=lora"),
    (lambda a: a.name in ("quantize", "share"), lambda b: getattr(b, "adapter", "") == "dora",
     "set adapter=lora, or train before it"),
    (lambda a: a.name in ("quantize", "share"), lambda b: getattr(b, "strategy", "") == "osf",
     "set strategy=replay, or train before it"),
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Methods in the order they are applied. The empty recipe is the base as it is."""

    methods: tuple[Method, ...] = ()

    @property
    def name(self) -> str:
        """A short label: names joined by +, with the settings that differ from their defaults."""
        return "+".join(_label(m) for m in self.methods) or "base"

    @property
    def families(self) -> frozenset[str]:
        """The families of methods that take part."""
        return frozenset(m.family for m in self.methods)

    @property
    def record(self) -> list[dict[str, Any]]:
        """The recipe as plain data: each method's name and all its settings."""
        return [{"method": m.name, **asdict(m)} for m in self.methods]  # type: ignore[call-overload]

    def files(self, folder: Path) -> dict[str, str]:
        """What stands in the files, models and Systems that settings name, by its hash: with others it is another
        recipe. Code (`file.py:function`) lies in the task's folder.
        """
        said = {v for m in self.methods for v in asdict(m).values() if v and isinstance(v, str)}  # type: ignore[call-overload]
        found = {}
        for name in sorted(said):
            path = folder / code[0] if (code := name.split(":"))[0].endswith(".py") else Path(name)
            if path.is_file() or (path / "system.json").is_file():
                found[name] = contents(path)
            elif (path / "config.json").is_file():
                found[name] = resolve(name).content
        return found

    def check(self) -> None:
        """Raise MethodError for an order that makes no sense: a method twice, undone by a later one, or in its way."""
        for i, method in enumerate(self.methods):
            for n, earlier in enumerate(self.methods[:i]):
                if earlier.name == method.name:
                    raise MethodError(f"{method.name} stands twice in {self.name}", do="name it once")
                # What a teacher's calibration did, its student has learnt.
                learnt = earlier.name == "calibrate" and any(m.name == "distill" for m in self.methods[n:i])
                # A distillation is undone where it made good for something: else it is a training like others.
                healed = earlier.name != "distill" or any(m.family == "compression" for m in self.methods[:n])
                if PART_OF.get(earlier.name) in method.invalidates and healed and not learnt:
                    raise MethodError(
                        f"{method.name} undoes {earlier.name} in {self.name}",
                        expected=f"{earlier.name} after {method.name}", found="the reverse", do="swap them",
                    )  # fmt: skip

                for sort, other, do in CLASHES:
                    if sort(earlier) and other(method):
                        raise MethodError(f"{_label(method)} cannot stand behind {_label(earlier)}", do=do)

    def lacks(self, system: System, data: Learnable) -> str:
        """What the recipe needs and the task or model lacks; empty where nothing is missing."""
        return "; ".join(found for m in self.methods if (found := lacking(m, system, data)))

    def possible(self, system: System, data: Learnable) -> None:
        """Raise MethodError where the order is wrong or something is lacking."""
        self.check()
        if missing := self.lacks(system, data):
            do = "take a local --model" if "weights" in missing else "add it to the task"
            raise MethodError(f"{self.name} cannot run", expected=missing, found="none", do=do)

    def run(self, system: System, data: Learnable, run: Run, healing: int | None = None) -> System:
        """Apply the methods in order; `healing` bounds a distillation, where it is not to have the others' bound.

        Raises MethodError as `possible` does.
        """
        self.possible(system, data)
        most = run.trained_tokens
        try:
            for method in self.methods:
                run.trained_tokens = most if healing is None or method.name != "distill" else healing
                system = method.apply(system, data, run)
        finally:
            run.trained_tokens = most
        return system


def _label(method: Method) -> str:
    """A method's name with its settings that are not the defaults."""
    changed = []
    for f in fields(method):  # type: ignore[arg-type]
        value = getattr(method, f.name)
        if f.default is not MISSING and value != f.default:
            said = f"{value:g}" if isinstance(value, float) else value
            said = said if not isinstance(value, bool) else str(value).lower()
            said = said if not isinstance(value, tuple) else ",".join(map(str, value))
            changed.append(f"{f.name}={said}")
    return method.name + (f"({','.join(changed)})" if changed else "")


def recipe(*parts: str | tuple[str, Mapping[str, Any]]) -> Recipe:
    """A Recipe from method names, or pairs of name and settings."""
    return Recipe(tuple(make(p) if isinstance(p, str) else make(p[0], p[1]) for p in parts))


def parse(text: str) -> Recipe:
    """A Recipe as written on the command line: "fewshot(k=4)+calibrate". Raises MethodError where it cannot be read."""
    made: list[Method] = []
    for part in _split(text):
        name, _, rest = part.strip().partition("(")
        settings, key = dict[str, str](), ""
        if rest and not rest.endswith(")"):
            raise MethodError(f"cannot read {part!r}", expected="name or name(key=value,key=value)", do="close it")
        for pair in filter(None, rest.removesuffix(")").split(",")):
            before, sign, value = pair.partition("=")
            if not sign and not key:
                raise MethodError(f"cannot read {pair!r} in {part!r}", expected="key=value", do="correct it")
            if sign:
                key, settings[before.strip()] = before.strip(), value.strip()
            else:  # one more of several: ids=a,b
                settings[key] += f",{pair.strip()}"
        made.append(make(name.strip(), settings))
    result = Recipe(tuple(made))
    result.check()
    return result


def _split(text: str) -> Sequence[str]:
    """Parts between plus signs that stand outside parentheses."""
    parts, depth, start = [], 0, 0
    for i, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if sign == "+" and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]
