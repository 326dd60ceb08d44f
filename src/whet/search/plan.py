"""The plan of a run: what the budget goes to, what is tried for how long, and what is left out for want of what."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from whet.methods import names, table
from whet.methods.prompting import Prompting
from whet.progress import clock
from whet.search import limits, training
from whet.search.arms import Arm, Dear, asking, cheap_arms, combined, halving, left_out, neighbours
from whet.search.budget import ENCODED, affordable
from whet.search.recipe import Recipe, parse, recipe
from whet.splits import shared_order
from whet.task import Example, Splits

if TYPE_CHECKING:
    from whet.search import Wish, _Job
    from whet.search.race import Trial

CONFIRMING = 2.2  # passes over the sealed rows: the base, the finalist, at times the best single-family arm
FIXED = 30.0  # seconds for loading, baselines and measuring latency, which no token count tells
LEAST_SELECTED, SELECTED = 100, 0.1  # rows of select; of the search's time, what scoring them once may take
LEAST_CONFIRMED, CONFIRMED = 200, 0.5  # sealed rows; of the budget, what confirming and baselines may take
LEAST_TEXTS = 20  # of either, where rows are plain texts: each tells of hundreds of words
BEGINNING = 3_000  # characters, some 500 words, that are read of each text where so many whole ones take too long
# Of the search's time: what the first rungs of arms without training may take where there is training; of the budget,
# what confirming takes at no one's expense.
CHEAP = 0.1
REFINED = 0.5  # of what is left: what a round of settings next to those of the best arm may take
INDEXED = 0.1  # of the budget: what indexing takes beyond it is told


@dataclass(frozen=True)
class Parts:
    """What the budget goes to: the rows that are looked at, and seconds for searching and for confirming."""

    select: tuple[Example, ...]
    confirm: tuple[Example, ...]
    search: float
    reserve: float
    notes: tuple[str, ...]


def apportion(
    splits: Splits, closed: bool, wish: Wish, price: Callable[[Sequence[Example]], float], beside: float,
    aside: float, passes: float = CONFIRMING,
) -> Parts:  # fmt: skip
    """The parts of the budget. Where scoring all rows would take most of it, a sample is scored, balanced and by seed.

    `beside` are seconds that confirming earlier tasks takes, `aside` what judges and making the finalist smaller do,
    `passes` how often the sealed rows are answered.
    """
    notes = []
    confirm, select = splits.confirm, tuple(shared_order(splits.select, closed, wish.seed))
    texts = any(e.text is not None for e in confirm or select)
    whole = passes * price(confirm)
    most = max(CHEAP * wish.budget, (CONFIRMED - ENCODED) * wish.budget - beside - FIXED)
    sealed = affordable(len(confirm), whole, most, LEAST_TEXTS if texts else LEAST_CONFIRMED)
    if sealed < len(confirm):
        enough = math.ceil(min(whole / CHEAP, (whole + beside + FIXED) / (CONFIRMED - ENCODED)) / 60)
        notes.append(f"confirmed on {sealed} of the {len(confirm)} sealed rows, drawn by seed: all of them would take "
                     f"{clock(whole)}; --budget {enough}m takes them all")  # fmt: skip
        confirm = tuple(shared_order(confirm, closed, wish.seed)[:sealed])
    # Base and finalist, and a share of the best single-family arm; but the search always gets half.
    needed = passes * price(confirm) + beside + FIXED + ENCODED * wish.budget
    reserve = min(needed, CONFIRMED * wish.budget)
    if needed > reserve:
        notes.append(f"confirming takes about {clock(needed)}, of which the budget holds {clock(reserve)}: "
                     "it will take longer than the budget says")  # fmt: skip
    search, once = max(0.0, wish.budget - reserve - aside), price(select)
    compared = affordable(len(select), once, SELECTED * search, LEAST_TEXTS if texts else LEAST_SELECTED)
    if compared < len(select):
        notes.append(f"arms are compared on {compared} of the {len(select)} select rows: scoring all of them once "
                     f"would take {clock(once)} of the search's {clock(search)}")  # fmt: skip
    return Parts(select[:compared], confirm, search, reserve, tuple(notes))


def beginnings(splits: Splits, budget: float, price: Callable[[Sequence[Example]], float]) -> tuple[Splits, list[str]]:
    """The splits with long texts cut, where confirming on the fewest whole ones takes more than half of the budget.

    And a note that says so.
    """
    rows = splits.confirm or splits.select
    long = any(len(e.text or "") > BEGINNING for e in rows)
    least = CONFIRMING * price(rows) * min(1.0, LEAST_TEXTS / max(1, len(rows))) if long else 0.0
    if least <= 0.5 * budget:
        return splits, []
    select, confirm = (tuple(e if e.text is None else replace(e, text=e.text[:BEGINNING]) for e in some)
                       for some in (splits.select, splits.confirm))  # fmt: skip
    count = min(LEAST_TEXTS, len(rows))
    note = (f"texts are read up to their {BEGINNING:,}th character: confirming on {count} whole ones would "
            f"take {clock(least)}, more than half of the budget")  # fmt: skip
    return replace(splits, select=select, confirm=confirm), [note]


@dataclass(frozen=True)
class Tries:
    """What is raced: the arms without training, then either the recipe that was asked for or trainings."""

    arms: Sequence[Arm] = ()
    wished: Recipe | None = None
    tuned: Recipe | None = None
    untried: Recipe | None = None  # without rows to select by: the only candidate
    tokens: int | None = None  # that training it may take


def labels(job: _Job) -> list[str]:
    """What tells arms of several models apart."""
    return [f" [{b.model.base}]" if len(job.bases) > 1 else "" for b in job.bases]


def planned(job: _Job) -> Tries:
    """What will be tried, for how long, and what is left out: the job's plan, before anything is spent."""
    race, data, local = job.race, job.splits.learnable, training.at_hand(job.bases)
    looked = " (documents and facts are indexed for it, once)" if data.documents or data.knowledge else ""
    job.watch.say(f"before the plan: estimating what each arm takes{looked}")
    job.watch.arm("the plan", job.wish.budget)
    begun = time.monotonic()
    alone = [training.scoring(job, Recipe(), base) for base in job.bases]  # seconds that each base takes on select
    tuned = training.first(job)
    if tuned is not None and race.select:
        needed = sum(alone) + training.after(job, tuned, local)
        left = race.seconds - _dearer(job, training.scoring(job, tuned, local), max(alone))
        # The first rungs of arms without training take their part before it.
        tokens = ((1 - CHEAP) * left - needed) * (1 - training.VALIDATED) * race.speed(local).train
        if training.part(job, tuned) * tokens < training.LEAST_TOKENS:
            why = f"scoring takes {clock(needed)} of the search's {clock(left)}: too little is left to train in"
            job.skipped.append({"method": tuned.name, "why": why})
            job.skipped += [{"method": name, "why": f"it would go on from {tuned.name}, which is left out"}
                            for name in training.behind(job, tuned)]  # fmt: skip
            tuned = None
    # Where training is possible it needs most of the budget; without it the cheap arms may have it.
    most = (CHEAP if tuned else 0.5) * race.seconds
    arms, job.dear, missed = cheap_arms(job.wish, job.bases, labels(job), data, race.select, race.rates, job.run, most)
    # Indexes are kept: what making them takes is paid once, and not out of the budget.
    if (indexing := time.monotonic() - begun) > INDEXED * job.wish.budget:
        job.notes.append(f"embedding, indexing and estimating the arms took {clock(indexing)}, on top of the budget")
    job.notes += [f"left out: {one}" for one in job.run.notes.pop("left_out", ())]
    race.deadline = time.monotonic() + 3 * job.wish.budget
    wished = parse(job.wish.recipe) if job.wish.recipe else None
    last = tuned or (wished if wished and all(wished != a.recipe for a in arms) else None)
    behind = training.scoring(job, last, local) if last and race.select else 0.0
    if race.select:  # an arm that is dearer than the base is dearer to confirm, too
        job.dearest = max([behind, *alone, *(a.scoring for a in arms)])
        more = _dearer(job, job.dearest, max(alone))
        job.reserve, race.seconds = job.reserve + more, race.seconds - more
    job.skipped += left_out(job.wish, local, data, wished) + missed + _named(job.dear)
    job.skipped += _unused(job, [a.recipe for a in arms] + ([tuned] if tuned else []))
    costs = {"base": sum(alone)} | {f"{a.recipe.name}{a.label}": a.cost for a in arms}
    if job.judge.trained_tokens:
        costs = {"judge of the win rate, trained": race.speed(job.bases[0]).price(job.judge)} | costs
    job.plan += [{"arm": name, "minutes": cost / 60} for name, cost in costs.items()]
    if last is not None and race.select:
        trained = training.trains(last)
        cost = race.seconds - sum(alone) - sum(a.cost for a in arms) if trained else behind
        job.plan.append({"arm": last.name, "minutes": max(0.0, cost) / 60} | ({"most": True} if trained else {}))
    elif arms and not wished:
        rest = max(0.0, race.seconds - sum(costs.values()))
        after = " and arms left out" if job.dear else ""
        job.plan.append({"arm": f"settings next to the best arm's{after}", "minutes": rest / 60, "most": True})
    if job.shrinking and race.select:
        job.plan.append({"arm": "made small enough for limits", "minutes": job.shrinking / 60, "most": True})
    tries = Tries(arms, wished, tuned) if race.select else _unselected(job, tuned)
    job.plan.append({"arm": "confirm on sealed data", "minutes": job.reserve / 60})
    return tries


def instead(job: _Job, *, searches: bool = False) -> tuple[Trial | None, list[Arm]]:
    """The best arm so far, and arms that were left out for want of time: those that what is left by now allows.

    Searches of prompts, which take as much as they are let, only where asked for.

    Estimates are high, since beginnings are shared, and what was planned may not come about: more is left than the plan
    could know. The list of what is left out is corrected.
    """
    race = job.race
    looked = [d for d in job.dear if searches or not any(isinstance(m, Prompting) for m in d.recipe.methods)]
    if not looked or time.monotonic() > race.deadline:
        return None, []
    found, still, missed = cheap_arms(
        job.wish, job.bases, labels(job), race.data, race.select, race.rates, job.run, race.left,
        [d.recipe for d in looked], lambda arms: halving(arms, len(race.select)) + _beyond(job, arms),
    )  # fmt: skip
    before = {name for d in looked for name in d.names}
    job.skipped[:] = [d for d in job.skipped if d["method"] not in before] + missed + _named(still)
    job.dear = [d for d in job.dear if d not in looked] + still
    _set_aside(job, found)
    tried = {t.name for t in race.trials}  # as a setting next to another's, or a search as large as this
    return _best(job, trained=True), [a for a in found if f"{a.recipe.name}{a.label}" not in tried]


def _named(dear: Sequence[Dear]) -> list[dict[str, str]]:
    """What is left out for want of time, as the result names it."""
    return [{"method": name, "why": d.why} for d in dear for name in d.names]


def _best(job: _Job, *, trained: bool) -> Trial | None:
    """The best arm on all of select, the base apart; those that train only where asked for."""
    race = job.race
    whole = [t for t in race.trials if t.card and t.recipe.methods and t.examples == len(race.select)]
    return max((t for t in whole if trained or not training.trains(t.recipe)), key=race.merit, default=None)


def refined(job: _Job) -> tuple[Trial | None, list[Arm]]:
    """The best arm without training, and what is next to it, for half of what is left: with what another arm did better
    than the base by, then a single setting apart, the cheapest first.

    None where a training did better: what is next to an arm is not far from it.
    """
    race, best = job.race, _best(job, trained=False)
    if best is None or best is not _best(job, trained=True) or time.monotonic() > race.deadline:
        return None, []
    tried = {t.name for t in race.trials}
    helped = sorted((t for t in race.trials if t.against_base and t.against_base.low > 0), key=race.merit, reverse=True)
    both = combined(best.recipe, [t.recipe for t in helped])
    among = [r for r in [*both, *neighbours(best.recipe)] if f"{r.name}{best.label}" not in tried]
    if race.metric.name in ("win_rate", "perplexity"):  # single answers have no score by which a method could choose
        among = [r for r in among if not any(getattr(m, "prompts", 0) for m in r.methods)]
    base = next(b for b, label in zip(job.bases, labels(job), strict=True) if label == best.label)
    found = cheap_arms(job.wish, [base], [best.label], race.data, race.select, race.rates, job.run, math.inf,
                       among)[0] if among else []  # fmt: skip
    for n, arm in enumerate(found):
        if begun := race.begun(arm.recipe, base):  # what another arm has paid for
            rest = asking(arm.recipe.methods[begun.methods :], race.data)
            found[n] = replace(arm, once=arm.once * rest / max(1, asking(arm.recipe.methods, race.data)))
    arms, most = list[Arm](), REFINED * race.left
    for arm in sorted(found, key=lambda a: (a.recipe not in both, a.cost)):
        if sum(a.cost for a in (*arms, arm)) + _beyond(job, [*arms, arm]) <= most:
            arms.append(arm)
    _set_aside(job, arms)
    return best, arms


def _dearer(job: _Job, dearest: float, base: float) -> float:
    """Seconds that confirming takes beyond what the base would, where scoring select takes so many, and the base so."""
    more = max(0.0, dearest - base) * len(job.splits.confirm) / max(1, len(job.race.select))
    return min(more, 0.25 * job.race.seconds)


def _beyond(job: _Job, arms: Sequence[Arm]) -> float:
    """Seconds that confirming the dearest of some arms takes beyond what the reserve holds, by `_dearer`."""
    return _dearer(job, max((a.scoring for a in arms), default=0.0), job.dearest)


def _set_aside(job: _Job, arms: Sequence[Arm]) -> None:
    """Take what confirming the dearest of some arms needs out of what is left to the search."""
    more = _beyond(job, arms)
    job.reserve, job.race.seconds = job.reserve + more, job.race.seconds - more
    job.dearest = max([job.dearest, *(a.scoring for a in arms)])


def _unselected(job: _Job, tuned: Recipe | None) -> Tries:
    """What is tried where there are no rows to select by: one recipe, with its defaults."""
    untried = _untried(job)
    if untried is None:
        if tuned is not None:
            why = f'there are no rows to select by; --recipe "{tuned.name}" is confirmed as the only candidate'
            job.skipped.append({"method": tuned.name, "why": why})
        return Tries()
    tokens, speed = None, job.race.speed(training.at_hand(job.bases))
    if training.trains(untried):
        tokens = int(job.race.left * (1 - training.VALIDATED) * speed.train)
    most = {"minutes": job.race.left / 60, "most": True} if tokens else {"minutes": 0.0}
    job.plan.append({"arm": untried.name} | most)
    why = "there are no rows to select by, so it is confirmed as it stands, as the only candidate"
    job.notes.append(f"{untried.name}: {why}")
    return Tries(untried=untried, tokens=tokens)


def _untried(job: _Job) -> Recipe | None:
    """The one recipe that is worth confirming where nothing can be learnt from or selected by: looking things up."""
    asked = [parse(job.wish.recipe)] if job.wish.recipe else [recipe("rag"), recipe(("knowledge", {"k": 1}))]
    wished = [r for r in asked if not job.wish.methods or all(m.name in job.wish.methods for m in r.methods)]
    return next((r for r in wished if not r.lacks(training.at_hand(job.bases), job.splits.learnable)), None)


def _unused(job: _Job, used: Sequence[Recipe]) -> list[dict[str, str]]:
    """Methods that were asked for by name, have what they need, and stand in no recipe that is tried."""
    if job.wish.recipe or not job.race.select:
        return []
    data = job.splits.learnable
    tried = {m.name for r in used for m in r.methods} | {d["method"] for d in job.skipped}
    if any("weights" in m.needs for r in used for m in r.methods):
        tried |= {"calibrate", *training.behind(job)}
    tried |= {name for name in names() if limits.limited(data.limits) and table()[name].family == "compression"}
    missed = [n for n in job.wish.methods if n not in tried and not any(d.startswith(f"{n}(") for d in tried)]
    return [{"method": n, "why": f'no recipe of its own is raced here: name one, like --recipe "{n}"'} for n in missed]


def show(job: _Job) -> None:
    """The plan, before anything is spent."""
    rates = job.race.speed(job.bases[0])
    job.watch.say(f"plan for {clock(job.wish.budget)} (at {rates.prefill:.0f} tokens/s read, "
                  f"{rates.train:.0f} trained):")  # fmt: skip
    for item in job.plan:
        most = "up to " if item.get("most") else ""
        job.watch.say(f"  {item['arm']:<44} {most}{item['minutes']:.1f} min")
    dear = {name for d in job.dear for name in d.names}
    for item in job.skipped:
        for_now = " for now" if item["method"] in dear else ""
        job.watch.say(f"  left out{for_now}: {item['method']}: {item['why']}")
    for note in job.notes:
        job.watch.say(f"  note: {note}")
