"""Which arms are worth trying for a task, and what is left out for want of what."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from whet import embed
from whet.errors import StoreError, WhetError
from whet.feedback import learner
from whet.methods import Method, Run, lacking, table
from whet.methods.calibrate import Calibrate
from whet.methods.fewshot import FewShot
from whet.methods.prompting import LEAST_ROWS, REASON_TOKENS, Prompting
from whet.progress import clock
from whet.scorecard import reads_scores
from whet.search.budget import Rates, estimate
from whet.search.limits import limited
from whet.search.race import LEAST, RUNGS, first_rung
from whet.search.recipe import BUILDING, Recipe, parse, recipe
from whet.search.training import MANY, calibration
from whet.system import System
from whet.task import Example, Learnable

if TYPE_CHECKING:
    from whet.search import Wish

THOUGHT = ("exact_match", "token_f1", "contains", "number")  # metrics of short answers, which reasons may lead to


@dataclass(frozen=True)
class Arm:
    """A recipe without training, the base it starts from, and what it takes."""

    recipe: Recipe
    base: System
    label: str  # of its model, where several are raced
    once: float  # seconds, before anything is scored
    scoring: float  # seconds to score all of select
    first: float  # seconds until its first rung is scored
    shared: bool = False  # it reads the scores of an arm before it

    @property
    def cost(self) -> float:
        """Seconds that it takes in all."""
        return self.once + (0.0 if self.shared else self.scoring)


@dataclass(frozen=True)
class Dear:
    """A recipe that the time does not reach for as yet: as it was wanted, what its arms are called, and why."""

    recipe: Recipe
    names: tuple[str, ...]
    why: str


def first_rungs(arms: Sequence[Arm]) -> float:
    """Seconds that the first rungs of some arms take."""
    return sum(a.first for a in arms)


def halving(arms: Sequence[Arm], count: int) -> float:
    """Seconds that racing some arms on `count` rows of select takes at most: of every rung the dearer half goes on."""
    spent, before = sum(a.once for a in arms), 0.0
    going = sorted((0.0 if a.shared else a.scoring for a in arms), reverse=True)
    for rung in sorted({min(1.0, max(LEAST, share * count) / max(1, count)) for share in RUNGS}):
        spent += (rung - before) * sum(going)
        going, before = going[: max(1, len(going) // 2)], rung
    return spent


def prompting_recipes(data: Learnable) -> list[Recipe]:
    """Recipes that leave the weights alone, for this kind of task."""
    nearest = embed.available()
    one, read = ("knowledge", {"k": 1}), ("rag", {"k": 1})
    if "@" in data.metric:  # what is ranked are the documents; no model is asked
        ranking = [recipe("rag"), *(recipe(("rag", {"mix": mix})) for mix in ("words", "meaning"))]
        ranking += [recipe(one), recipe("knowledge")] if data.documents is None else []
        return ranking if nearest else []
    facts = [recipe(one), recipe("knowledge"), recipe(one, ("fewshot", {"k": 4}))] if nearest else []
    reading = nearest and data.documents is not None
    if data.labels:
        # Many labels: a balanced sample cannot show them all, so the neighbours' labels matter more, and come first.
        many = len(data.labels) > MANY
        # Half of few rows at most: calibration asks about some that are not shown.
        k = max(1, min(8 if many else 16, len(data.train) // 2))
        alike = ("fewshot", {"k": 8, "selection": "nearest"})
        usual = calibration(data)
        first, other = ("calibrate", usual), ("calibrate", {} if usual else {"kind": "fitted"})
        near = [recipe(alike), recipe(alike, first)] if nearest else []
        found = [
            *(near if many else []),
            recipe(first),
            recipe(("fewshot", {"k": k})),
            recipe(("fewshot", {"k": k, "draw": 0}), first),
            *([] if many else near),
            *facts,
            *([recipe(read), recipe(read, first)] if reading else []),
            recipe("prompting"),  # searched as widely as what is left allows: behind what is known to be cheaper
            recipe(("prompting", {"calibrated": True}), "calibrate"),
            *(recipe(("fewshot", {"k": k, "draw": draw}), first) for draw in (1, 2)),
            # A bias for each of many labels would be fitted to a row or two.
            *([] if many else [recipe(other)]),
            *(recipe(("calibrate", {"kind": kind})) for kind in ("contextual", "domain")),
        ]
        kinds = (*(["diverse"] if nearest else []), "bootstrapped")
        return found + [recipe(("fewshot", {"k": k, "selection": kind}), first) for kind in kinds]
    found = [*facts, recipe(("fewshot", {"k": 4}))]
    if nearest:
        found.append(recipe(("fewshot", {"k": 4, "selection": "nearest"})))
    if reading:
        found += [recipe(read), recipe("rag"), recipe(read, ("fewshot", {"k": 4}))]
        found += [recipe(read, one)] if facts and data.knowledge is not None else []
    if data.metric not in ("perplexity", "win_rate"):
        found.append(recipe("prompting"))
    if data.metric in THOUGHT and not data.closed:
        found.append(recipe(("prompting", {"reason": True})))  # last: reasons take many tokens
    return found


def neighbours(one: Recipe) -> list[Recipe]:
    """The recipes that differ from this one in a single setting, by what its methods say is worth trying."""
    found = []
    for n, method in enumerate(one.methods):
        changes = [{key: value} for key, values in method.space().items() for value in values]
        for change in changes:
            with contextlib.suppress(ValueError):  # settings that do not go together
                made = replace(method, **change)  # type: ignore[type-var]
                found += [Recipe((*one.methods[:n], made, *one.methods[n + 1 :]))] if made != method else []
    return found


def combined(best: Recipe, others: Sequence[Recipe]) -> list[Recipe]:
    """The best recipe with a method of another one that it lacks, each kind once: of the first that has it."""
    found: dict[str, Recipe] = {}
    have = {m.name for m in best.methods}
    if have <= {*BUILDING}:
        for method in (m for one in others for m in one.methods):
            if method.name in BUILDING and method.name not in {*have, *found}:
                both = sorted((*best.methods, method), key=lambda m: BUILDING.index(m.name))
                found[method.name] = Recipe(tuple(both))
    return [*found.values()]


def cheap_arms(
    wish: Wish, bases: Sequence[System], labels: Sequence[str], data: Learnable, select: Sequence[Example],
    rates: Mapping[str, Rates], run: Run, most: float, among: Sequence[Recipe] = (),
    takes: Callable[[Sequence[Arm]], float] = first_rungs,
) -> tuple[list[Arm], list[Dear], list[dict[str, str]]]:  # fmt: skip
    """Arms without training that this task allows (or those `among` some), each with its cost on all of select.

    Where those before it and an arm itself would take more than `most` seconds, by `takes`, it is too dear as yet. Last
    comes what cannot be had, and why.
    """
    arms: list[Arm] = []
    dear: list[Dear] = []
    scored = {base.uncalibrated.fingerprint for base in bases}
    skipped: list[dict[str, str]] = []
    models = list(zip(bases, labels, strict=True))

    def tried(one: Recipe) -> tuple[list[tuple[Arm, str]], list[dict[str, str]]]:
        """The recipe on each model: its arm, and what it shows, as a fingerprint.

        And where it cannot be had: what is left out, and why.
        """
        found, failed = list[tuple[Arm, str]](), list[dict[str, str]]()
        for base, label in models:
            if one.lacks(base, data) or not select:
                continue
            try:
                plain, once, whole = _cost(one, base, data, select, rates[base.model.content], run)
            except StoreError:
                raise  # a full disk is no property of the arm
            except WhetError as error:  # a package that is missing, documents that cannot be had: other arms go on
                if wish.recipe:
                    raise
                failed.append({"method": f"{one.name}{label}", "why": str(error)})
                continue
            # Calibrated arms read the scores of the same arm uncalibrated.
            mark = plain.fingerprint if plain is not None else ""
            known = mark in scored and plain is not None and reads_scores(plain, select, run.session(base.model))
            first = once + (0.0 if known else first_rung(len(select)) * whole)
            found.append((Arm(one, base, label, once, whole, first, known), mark))
        return found, failed

    for wanted_one in _wanted(wish, data, among):
        one, taken = wanted_one, takes(arms)
        found, failed = tried(one)
        while not wish.recipe and sum(a.once for a, _ in found) > most - taken and (less := _smaller(one)):
            (found, failed), one = tried(less), less
        skipped += failed
        # An arm is tried on all models or on none, so that their order decides nothing.
        more = takes([*arms, *(a for a, _ in found)]) - taken
        if not wish.recipe and taken + more > most:
            what = "its first rung" if takes is first_rungs else "trying it"
            why = f"{what} would take {clock(more)}, and {clock(max(0.0, most - taken))} is left for such arms"
            dear.append(Dear(wanted_one, tuple(f"{one.name}{a.label}" for a, _ in found), why))
            continue
        arms += [a for a, _ in found]
        scored |= {mark for _, mark in found}
    return arms, dear, skipped


def _wanted(wish: Wish, data: Learnable, among: Sequence[Recipe]) -> list[Recipe]:
    """Recipes without training (of `among` some) that were asked for and have rows enough."""
    wanted = [parse(wish.recipe)] if wish.recipe else among or prompting_recipes(data)
    wanted = [r for r in wanted if not any("weights" in m.needs for m in r.methods)]
    if len(data.train) < LEAST_ROWS and not (wish.recipe or wish.methods):  # prompts are not compared on fewer
        wanted = [r for r in wanted if not any(isinstance(m, Prompting) for m in r.methods)]
    return [r for r in wanted if not wish.methods or all(m.name in wish.methods for m in r.methods)]


def _smaller(one: Recipe) -> Recipe | None:
    """The recipe with a prompt search half as large; None where it has none, or a smaller one would show nothing."""
    halved = [replace(m, pool=m.pool // 2, examples=m.examples // 2) if isinstance(m, Prompting) and m.pool >= 12 else m
              for m in one.methods]  # fmt: skip
    return Recipe(tuple(halved)) if tuple(halved) != one.methods else None


def asking(methods: Sequence[Method], data: Learnable) -> int:
    """How many prompts some methods ask the model once, before what they make is scored."""
    return sum(m.asks(len(data.train)) for m in methods if isinstance(m, (Calibrate, FewShot, Prompting)))


def _cost(
    one: Recipe, base: System, data: Learnable, select: Sequence[Example], rates: Rates, run: Run
) -> tuple[System | None, float, float]:
    """(what the arm shows, seconds that it takes once, seconds that scoring all of select takes).

    What it shows is known before the model runs, unless a search of prompts finds it (None); what calibration looks at
    is scored over all choices.
    """
    system = base
    for method in one.methods:
        if isinstance(method, FewShot) and method.prompts:  # what it will find is as long as random rows, about
            method = replace(method, selection="random", ids=(), order="mixed")
        if set(method.writes) <= {"demonstrations", "sources"}:
            system = method.apply(system, data, run)
    if any(isinstance(m, Prompting) and m.reason for m in one.methods):  # as many tokens as reasons may take
        most = system.decoding.max_tokens + REASON_TOKENS
        system = replace(system, decoding=replace(system.decoding, max_tokens=most))
    session = run.session(base.model)
    whole = rates.price(estimate(system, select, session, metric=data.metric))
    prompts = asking(one.methods, data)
    asked = (data.train or select)[:prompts]  # of few rows, what all share would count as often as they go into these
    once = prompts / len(asked) * rates.price(estimate(system, asked, session, every=True)) if prompts else 0.0
    found = any(getattr(m, "prompts", 0) and set(m.writes) & {"prompt", "demonstrations"} for m in one.methods)
    return None if found else system, once, whole


def left_out(wish: Wish, base: System, data: Learnable, asked: Recipe | None = None) -> list[dict[str, str]]:
    """Every registered method that cannot run here, and what it lacks; not those of the recipe that was asked for."""
    found = []
    for name, kind in table().items():
        if (wish.methods and name not in wish.methods) or (asked and name in {m.name for m in asked.methods}):
            continue
        try:
            why = lacking(kind, base, data)
        except WhetError as error:
            why = str(error)
        if why:
            found.append({"method": name, "why": f"needs {why}"})
        elif kind.family == "compression" and not limited(data.limits):
            found.append({"method": name, "why": "no limit of size, memory or latency in task.yaml asks for it"})
        elif name in ("dpo", "kto") and (by := learner(data.judged)) != name and by in (wish.methods or (by,)):
            found.append({"method": name, "why": f"{by} learns from these judgements: more of them "
                          f"{'make pairs' if by == 'dpo' else 'are of one answer alone'}"})  # fmt: skip
    return found
