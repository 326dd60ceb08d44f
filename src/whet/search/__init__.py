"""`whet improve`: plan, race, combine, confirm, hand over."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from whet import __version__, baselines, embed, stats
from whet import task as tasks
from whet.encoder import Encoder
from whet.engine import Session, Spent
from whet.errors import TaskError, WhetError
from whet.feedback import Versus, controlled, preference
from whet.memory import Known, known
from whet.methods import Run, names, table
from whet.methods.reward import metric_of
from whet.metrics import Metric, Outcome, get, score_all
from whet.model import DEFAULT, ModelRef, loaded_before, resolve
from whet.progress import Silent, Watch, clock
from whet.retention import forgetting, refused
from whet.scorecard import Scorecard, evaluate, measure, versions
from whet.search import limits, training
from whet.search import out as output
from whet.search.arms import cheap_arms, left_out
from whet.search.budget import Rates, affordable, estimate, seconds
from whet.search.budget import measure as measure_rates
from whet.search.race import Race, Trial
from whet.search.recipe import Recipe, parse, recipe
from whet.splits import shared_order
from whet.store import Store
from whet.system import Decoding, System
from whet.task import Example, Learnable, Splits, Task

CONFIRMING = 2.2  # passes over the sealed rows: the base, the finalist, at times the best single-family arm
FIXED = 30.0  # seconds for loading, baselines and measuring latency, which no token count tells
ENCODED = 0.04  # of the budget may go to fine-tuning an encoder, as a baseline
ENCODER_SPEED = 2.5  # MiniLM has a tenth of the weights, all of them trained, in small padded batches: LOG.md
MOST_HELD = 200  # rows of an earlier task that forgetting is measured on
ANSWER_TOKENS = (16, 256)  # bounds of how long a generated answer may be
INDEXED = 0.1  # of the budget: what indexing takes beyond it is told
LEAST_SELECTED, SELECTED = 100, 0.1  # rows of select; of the search's time, what scoring them once may take
LEAST_CONFIRMED, CONFIRMED = 200, 1.0  # sealed rows; of the budget, what confirming may take: half of it is set aside


@dataclass(frozen=True)
class Wish:
    """What the user asked for, beside the task."""

    models: tuple[str, ...] = (DEFAULT,)
    budget: float = 600.0
    methods: tuple[str, ...] = ()
    recipe: str | None = None
    seed: int = 0
    strict: bool = False
    self_contained: bool = False


@dataclass(frozen=True)
class Improvement:
    """What `improve` hands over: the System, the result as in result.json, and the folder they were written to."""

    system: System
    result: dict[str, Any]
    folder: Path


@dataclass
class _Job:
    """One run of improve, as its stages share it."""

    task: Task
    wish: Wish
    splits: Splits
    metric: Metric
    store: Store
    watch: Watch
    key: str
    out: Path
    run: Run
    bases: list[System]
    rates: Rates
    reserve: float
    race: Race
    earlier: tuple[Known, ...] = ()  # tasks that must not get worse
    alone: Trial | None = None  # the only candidate, where there are no rows to select by
    shrinking: float = 0.0  # seconds set aside for making the finalist smaller
    tight: bool = False  # the base itself goes beyond the limits
    notes: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    plan: list[dict[str, Any]] = field(default_factory=list)


def base_system(ref: ModelRef, task: Task, data: Learnable, session: Session, home: Path) -> System:
    """The base: the model with the task's instruction as it stands, zero-shot.

    Answers come from the closed set where there is one, else greedily, at most twice as long as train's long answers.
    """
    longest = 64
    answers = sorted(session.count([e.completion for e in data.train if e.completion][:500]))
    if answers:
        longest = min(max(2 * answers[int(0.95 * (len(answers) - 1))], ANSWER_TOKENS[0]), ANSWER_TOKENS[1])
    closed = task.closed or data.closed
    decoding = Decoding(labels=task.labels, closed=closed, max_tokens=longest)
    return System(ref, task.instruction, decoding=decoding, card={"task": task.name}, home=home)


def improve(
    task: str | Path | Task,
    *,
    model: str | Sequence[str] = DEFAULT,
    budget: str | float = "10m",
    methods: Sequence[str] = (),
    recipe: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    strict: bool = False,
    trust: bool = False,
    self_contained: bool = False,
    watch: Watch | None = None,
    home: Path | None = None,
) -> Improvement:
    """Make a model better at a task: try what could help, combine what does, confirm it, hand over one System.

    `budget` is "90s", "10m", "2h" or seconds. Finished trials of the same call are taken from the store. Raises a
    WhetError for bad input before anything is spent.
    """
    loaded = task if isinstance(task, Task) else tasks.load(task, trust=trust)
    models = (model,) if isinstance(model, str) else tuple(model)
    wish = Wish(models, seconds(budget), tuple(methods), recipe, seed, strict, self_contained)
    job = _prepare(loaded, wish, Path(out) if out else Path("runs") / loaded.name, watch or Silent(), Store(home))
    try:
        begun = time.monotonic()
        _race(job)
        finalist = limits.within(job, job.alone or _finalist(job))
        return _finish(job, finalist, begun)
    finally:
        job.watch.close()


def _prepare(task: Task, wish: Wish, folder: Path, watch: Watch, store: Store) -> _Job:
    """Check everything that can be checked before anything is spent; open the models; make and print the plan."""
    unknown = [m for m in wish.methods if m not in names()]
    if unknown:
        recipe(unknown[0])  # raises, with the nearest name
    files = parse(wish.recipe).files if wish.recipe else {}
    splits = task.split(wish.seed, wish.strict)
    metric = get(task.metric, task.folder, task.trusted)
    if not task.test and not splits.select:
        raise TaskError("nothing to measure on", expected="test.jsonl, dev.jsonl or 10 train rows", found="none")
    refs = [resolve(name) for name in wish.models]
    asked = [task.fingerprint, [r.content for r in refs], wish.seed, wish.budget, wish.methods, wish.recipe]
    key = hashlib.sha256(json.dumps([*asked, wish.strict, __version__, *files.values()]).encode()).hexdigest()
    output.claim(folder, key, task.name)
    run = Run(store, wish.seed)
    watch.say(f"whet improve {task.name}: {len(splits.learnable.train)} train, {len(splits.select)} select, "
              f"{len(splits.confirm)} confirm; metric {metric.name}")  # fmt: skip
    bases = []
    for ref in refs:
        first = "" if loaded_before(ref, store.home) else " (the first time, its weights are unpacked: half a minute)"
        watch.say(f"opening {ref.base}{first}")
        bases.append(base_system(ref, task, splits.learnable, run.session(ref), store.home))
    rates = measure_rates(bases[0], run.session(refs[0]), store, lambda: watch.say("measuring this machine's speed"))
    judging = 0.0
    if metric.name == "win_rate":
        watch.say("training the judge of the win rate, on judgements that no method sees")
        training = replace(run, tell=watch.tell, spent=Spent(), notes={})
        metric = metric_of(task, bases[0], training)
        judging = rates.price(training.spent)

    def price(rows: Sequence[Example], asked: System = bases[0], by: str = metric.name) -> float:
        return rates.price(estimate(asked, rows, run.session(refs[0]), metric=by))

    earlier = _earlier(bases[0], splits.learnable, run, refs[0])
    beside = 2 * sum(price(one.held, one.asked, one.metric) for one in earlier)
    shrinking = min(limits.SECONDS, 0.25 * wish.budget) if limits.limited(task.limits) and not refs[0].remote else 0.0
    parts = _apportion(splits, task.closed, wish, price, beside, shrinking + judging)
    splits = replace(splits, confirm=parts.confirm)
    notes = [*task.notes, *parts.notes]
    if splits.dropped:
        notes.append(f"{len(splits.dropped)} rows dropped: they repeat or share a group with held-out rows")
    race = Race(key, splits.learnable, list(parts.select), metric, store, rates, wish.seed, parts.search, watch, run,
                live=_live(task))  # fmt: skip
    return _Job(task, wish, splits, metric, store, watch, key, folder, run, bases, rates, parts.reserve, race, earlier,
                shrinking=shrinking, notes=notes)  # fmt: skip


@dataclass(frozen=True)
class _Parts:
    """What the budget goes to: the rows that are looked at, and seconds for searching and for confirming."""

    select: tuple[Example, ...]
    confirm: tuple[Example, ...]
    search: float
    reserve: float
    notes: tuple[str, ...]


def _apportion(
    splits: Splits, closed: bool, wish: Wish, price: Callable[[Sequence[Example]], float], beside: float,
    aside: float,
) -> _Parts:  # fmt: skip
    """The parts of the budget. Where scoring all rows would take most of it, a sample is scored, balanced and by seed.

    `beside` are seconds that confirming earlier tasks takes, `aside` what judges and making the finalist smaller do.
    """
    notes = []
    confirm, select = splits.confirm, tuple(shared_order(splits.select, closed, wish.seed))
    whole = CONFIRMING * price(confirm)
    sealed = affordable(len(confirm), whole, CONFIRMED * wish.budget, LEAST_CONFIRMED)
    if sealed < len(confirm):
        notes.append(f"confirmed on {sealed} of the {len(confirm)} sealed rows, drawn by seed: all of them would take "
                     f"{clock(whole)}; --budget {math.ceil(whole / 60)}m takes them all")  # fmt: skip
        confirm = tuple(shared_order(confirm, closed, wish.seed)[:sealed])
    # Base and finalist, and a share of the best single-family arm; but the search always gets half.
    needed = CONFIRMING * price(confirm) + beside + FIXED + ENCODED * wish.budget
    reserve = min(needed, 0.5 * wish.budget)
    if needed > reserve:
        notes.append(f"confirming takes about {clock(needed)}, of which the budget holds {clock(reserve)}: "
                     "it will take longer than the budget says")  # fmt: skip
    search, once = wish.budget - reserve - aside, price(select)
    compared = affordable(len(select), once, SELECTED * search, LEAST_SELECTED)
    if compared < len(select):
        notes.append(f"arms are compared on {compared} of the {len(select)} select rows: scoring all of them once "
                     f"would take {clock(once)} of the search's {clock(search)}")  # fmt: skip
    return _Parts(select[:compared], confirm, search, reserve, tuple(notes))


def _live(task: Task) -> bool:
    """Whether a source may change without the task's files changing: a database, a page, an endpoint."""
    named = [p for s in (task.documents, task.knowledge, task.glossary) for p in tasks.places(task.folder, s)]
    return any(not isinstance(place, Path) for place in named)


def _earlier(base: System, data: Learnable, run: Run, ref: ModelRef) -> tuple[Known, ...]:
    """The earlier tasks with the rows that forgetting is measured on."""
    if not data.earlier or ref.remote:  # a server's weights do not change
        return ()
    tasks = known(base, data, run.session(ref), seed=run.seed)
    return tuple(
        replace(one, held=tuple(shared_order(one.held, one.asked.decoding.closed, run.seed)[:MOST_HELD]))
        for one in tasks
    )


def _race(job: _Job) -> None:
    """Bases first, then the cheap arms by successive halving, then training with what is left, then combinations."""
    race, data, session = job.race, job.splits.learnable, job.run.session(job.bases[0].model)
    several = len(job.bases) > 1
    labels = [f" [{b.model.base}]" if several else "" for b in job.bases]
    each = job.rates.price(estimate(job.bases[0], race.select, session, metric=job.metric.name))
    tuned = training.first(job)
    if tuned is not None and race.select and (race.seconds - 2 * each) * job.rates.train < training.LEAST_TOKENS:
        why = f"scoring takes {clock(2 * each)} of the search's {clock(race.seconds)}: too little is left to train in"
        job.skipped.append({"method": tuned.name, "why": why})
        tuned = None
    job.watch.say("estimating what each arm takes")
    # Where training is possible it needs most of the budget; without it the cheap arms may have it.
    most = (0.1 if tuned else 0.5) * race.seconds
    begun = time.monotonic()
    arms, too_dear = cheap_arms(job.wish, job.bases, labels, data, race.select, job.rates, job.run, most)
    # Indexes are kept: what making them takes is paid once, and not out of the budget.
    if (indexing := time.monotonic() - begun) > INDEXED * job.wish.budget:
        job.notes.append(f"embedding, indexing and estimating the arms took {clock(indexing)}, on top of the budget")
    job.notes += [f"left out: {one}" for one in job.run.notes.pop("left_out", ())]
    race.deadline = time.monotonic() + 3 * job.wish.budget
    if race.select:  # an arm that is dearer than the base is dearer to confirm, too
        dearest = max((whole for *_, whole in arms), default=0.0) - each
        more = min(max(0.0, dearest) * len(job.splits.confirm) / len(race.select), 0.25 * race.seconds)
        job.reserve, race.seconds = job.reserve + more, race.seconds - more
    job.skipped += left_out(job.wish, job.bases[0], data) + too_dear
    job.skipped += _unused(job, [r for r, *_ in arms] + ([tuned] if tuned else []))
    job.plan.append({"arm": "base", "minutes": len(job.bases) * each / 60})
    job.plan += [{"arm": f"{r.name}{label}", "minutes": cost / 60} for r, _, label, cost in arms]
    if tuned is not None and race.select:
        spent = sum(p["minutes"] for p in job.plan) * 60
        job.plan.append({"arm": tuned.name, "minutes": max(0.0, race.seconds - spent) / 60, "most": True})
    job.plan.append({"arm": "confirm on sealed data", "minutes": job.reserve / 60})
    untried = None if race.select else _untried(job)
    if untried:
        why = "there are no rows to select by, so it is confirmed with its defaults, as the only candidate"
        job.plan.insert(-1, {"arm": untried.name, "minutes": 0.0})
        job.notes.append(f"{untried.name}: {why}")
    _print_plan(job)
    if not race.select:
        only = race.enter(untried, job.bases[0]) if untried else None
        if only is not None and only.status == "done":
            job.alone = only
        elif only is not None:
            job.notes.append(f"{only.name} could not be tried: {only.why}")
        return
    for base, label in zip(job.bases, labels, strict=True):
        trial = race.enter(Recipe(), base, label=label)
        race.base = race.base or trial
    if arms:
        race.halve([(r, s, label) for r, s, label, _ in arms])
    if job.wish.recipe:
        chosen = parse(job.wish.recipe)
        if not any(t.recipe == chosen for t in race.trials):
            training.enter(job, chosen, job.bases[0], each)
    elif tuned is not None:
        training.race(job, tuned, each)


def _untried(job: _Job) -> Recipe | None:
    """The one recipe that is worth confirming where nothing can be learnt from or selected by: looking things up."""
    asked = [parse(job.wish.recipe)] if job.wish.recipe else [recipe("rag"), recipe(("knowledge", {"k": 1}))]
    wished = [r for r in asked if not job.wish.methods or all(m.name in job.wish.methods for m in r.methods)]
    return next((r for r in wished if not r.lacks(job.bases[0], job.splits.learnable)), None)


def _unused(job: _Job, used: Sequence[Recipe]) -> list[dict[str, str]]:
    """Methods that were asked for by name, have what they need, and stand in no recipe that is tried."""
    if job.wish.recipe or not job.race.select:
        return []
    data = job.splits.learnable
    tried = {m.name for r in used for m in r.methods} | {d["method"] for d in job.skipped}
    if any("weights" in m.needs for r in used for m in r.methods):
        tried |= {"calibrate", *training.behind(job, None)}
    tried |= {name for name in names() if limits.limited(data.limits) and table()[name].family == "compression"}
    missed = [n for n in job.wish.methods if n not in tried and not any(d.startswith(f"{n}(") for d in tried)]
    return [{"method": n, "why": f'no recipe of its own is raced here: name one, like --recipe "{n}"'} for n in missed]


def _finalist(job: _Job) -> Trial | None:
    """The best arm on all of select that keeps the earlier tasks; None where nothing beats the base there."""
    race = job.race
    whole = [t for t in race.trials if t.card and t.examples == len(race.select) and t is not race.base]
    for trial in sorted(whole, key=race.merit, reverse=True):
        if race.base is None or race.merit(trial) <= race.merit(race.base):
            return None
        kept = _keeping(job, trial)
        if kept.status != "refused":
            return kept
    return None


def _keeping(job: _Job, trial: Trial) -> Trial:
    """The trial with what the earlier tasks lose by it; refused where that is more than is allowed."""
    lost = forgetting(_base_of(job, trial), trial.system, job.earlier, job.run, job.task.limits.forgetting,
                      job.task.trusted)  # fmt: skip
    if not lost:
        return trial
    why = refused(lost)
    job.notes += [str(one) for one in lost]
    most = max(one.lost for one in lost)
    return job.race.mark(trial, forgetting=most, status="refused" if why else trial.status, why=why or trial.why)


def _base_of(job: _Job, trial: Trial) -> System:
    """The base that a trial started from."""
    return next((b for b in job.bases if b.model.content == trial.system.model.content), job.bases[0])


def _best_single(job: _Job, finalist: Trial) -> Trial | None:
    """The best arm of a single family, where the finalist combines several."""
    if len(finalist.recipe.families) < 2:
        return None
    single = [t for t in job.race.trials if t.card and len(t.recipe.families) == 1]
    single = [t for t in single if t.examples == len(job.race.select)]
    return max(single, key=job.race.merit, default=None)


def _confirm(job: _Job, finalist: Trial | None) -> tuple[dict[str, Any] | None, dict[str, Scorecard], Spent]:
    """Open the sealed split once: the base, the finalist, and the best single-family arm, compared in pairs."""
    rows = job.splits.confirm
    if not rows:
        return None, {}, Spent()
    wanted: dict[str, System] = {"base": job.bases[0]}
    single = _best_single(job, finalist) if finalist else None
    if finalist:
        wanted["chosen"] = finalist.system
    if single:
        wanted["single"] = single.system
    cards = {}
    for name, system in wanted.items():
        job.watch.arm(f"confirm: {name}", job.reserve)
        cards[name] = evaluate(
            system, rows, job.metric, session=job.run.session(system.model), split="confirm", seed=job.wish.seed,
            store=job.store, progress=lambda done, of: job.watch.tell("scoring on sealed data", done, of),
        )  # fmt: skip
    body = _confirmed(job, cards, single)
    if isinstance(job.metric, Versus) and finalist:
        body["feedback"] = _preferred(job, cards["chosen"], finalist.system, job.metric.judge.name)
    return body, cards, sum((c.spent for c in cards.values()), Spent())


def _confirmed(job: _Job, cards: dict[str, Scorecard], single: Trial | None) -> dict[str, Any]:
    def figures(card: Scorecard) -> dict[str, float]:
        return {"score": card.score, "low": card.low, "high": card.high}

    base, chosen = cards["base"], cards.get("chosen", cards["base"])
    against = stats.compare(base.outcomes, chosen.outcomes, job.metric, job.wish.seed)
    tests = [against]
    if "single" in cards:
        tests.append(stats.compare(cards["single"].outcomes, chosen.outcomes, job.metric, job.wish.seed))
    adjusted = stats.holm([t.p_value for t in tests])
    improved = "chosen" in cards and against.low > 0 and adjusted[0] < 0.05
    body = {
        "n": base.n, "base": figures(base), "chosen": figures(chosen), "difference": against.difference,
        "low": against.low, "high": against.high, "p_value": against.p_value, "p_adjusted": adjusted[0],
        "test": against.test, "improved": improved, "smallest_detectable": against.smallest_detectable,
    }  # fmt: skip
    if "single" in cards and single:
        body["best_single"] = {
            "name": single.name, "difference": tests[1].difference, "low": tests[1].low, "high": tests[1].high,
            "p_value": tests[1].p_value, "p_adjusted": adjusted[1],
        }  # fmt: skip
    return body


def _preferred(job: _Job, card: Scorecard, system: System, judge: str) -> dict[str, Any]:
    """What stands beside a win rate: that at equal length, and how often the System prefers the chosen side of pairs.

    Each figure has its 95 % interval; None where no sealed row is a pair.
    """
    even = controlled(card.outcomes, job.wish.seed)
    job.notes.append("win rate at equal length {:.1f} % [{:.1f}, {:.1f}]; a judge may like long answers for their "
                     "length".format(*(100 * one for one in even)))  # fmt: skip
    chosen = preference(system, job.splits.confirm, job.run.session(system.model), job.wish.seed)
    return {"controlled": even, "prefers": chosen, "judge": judge}


def _run_baselines(job: _Job, handed: Scorecard | None) -> list[dict[str, Any]]:
    """The non-LLM baselines on select and confirm; there, compared in pairs with what is handed over."""
    train, select, confirm = job.splits.learnable.train, job.race.select, job.splits.confirm
    rows = [*select, *confirm]
    if job.metric.name == "perplexity" or not rows:
        return []
    job.watch.arm("non-LLM baselines", job.reserve)
    embedder = embed.Embedder(job.store.home) if embed.available() else None
    try:
        encoder = Encoder(round(ENCODED * job.wish.budget * ENCODER_SPEED * job.rates.train), job.wish.seed)
        found = baselines.run(
            train, rows, job.task.labels, embed=embedder, seed=job.wish.seed, encoder=encoder if embedder else None,
            documents=_texts(job), ranked="@" in job.metric.name,
        )  # fmt: skip
    except ValueError as error:  # sklearn, on data that no classifier can be fitted to
        job.notes.append(f"baselines could not be fitted: {error}")
        return []

    def scored(answers: Sequence[str], examples: Sequence[Example]) -> tuple[float | None, tuple[Outcome, ...]]:
        outcomes = score_all(job.metric, answers, examples)
        return (job.metric.aggregate(outcomes) if examples else None), outcomes

    cut, rows_of = len(select), []
    for one in found:
        sealed, outcomes = scored(one.answers[cut:], confirm)
        body: dict[str, Any] = {"name": one.name, "select": scored(one.answers[:cut], select)[0], "confirm": sealed}
        if outcomes and handed:
            paired = stats.compare(handed.outcomes, outcomes, job.metric, job.wish.seed)
            body |= {"difference": paired.difference, "low": paired.low, "high": paired.high}
        rows_of.append(body)
    return rows_of


def _texts(job: _Job) -> dict[str, str] | None:
    """The task's documents, for baselines; None where there are none, or where they cannot be read."""
    data = job.splits.learnable
    if data.documents is None:
        return None
    try:
        return {d.id: d.text for d in job.run.documents(data)[0]}
    except WhetError as error:
        job.notes.append(f"no baseline by BM25: {error}")
        return None


def _finish(job: _Job, finalist: Trial | None, begun: float) -> Improvement:
    """Confirm, measure, write everything down and say what to do next."""
    confirmed, cards, spent = _confirm(job, finalist)
    improved = bool(confirmed and confirmed["improved"]) or (confirmed is None and finalist is not None)
    # Where the base itself is too large or too slow, being within the limits is what was asked for.
    smaller = finalist is not None and any(m.family == "compression" for m in finalist.recipe.methods)
    handed = finalist if finalist and (improved or (smaller and job.tight)) else None
    baselines_found = _run_baselines(job, cards.get("chosen" if handed else "base"))
    system = handed.system if handed else job.bases[0]
    card = cards.get("chosen" if handed else "base") or (handed.card if handed else None)
    card = card or (job.race.base.card if job.race.base else None)
    rows = job.splits.confirm or job.race.select
    measured: dict[str, Scorecard] = {}
    if card:
        job.watch.arm("measuring latency and memory", 0.0)
        measured["chosen"] = measure(card, system, rows)
        if over := limits.beyond(job.task.limits, measured["chosen"]):
            job.notes.append(f"what is handed over goes beyond the limits: {over}")
        base_card = cards.get("base") or (job.race.base.card if job.race.base else None)
        measured["base"] = measure(base_card, job.bases[0], rows) if handed and base_card else measured["chosen"]
        record = measured["chosen"].record()
        system = replace(system, card={
            "task": job.task.name, "recipe": handed.recipe.name if handed else "base", "scorecard": record,
        })  # fmt: skip
    total = sum((t.spent for t in job.race.trials), Spent()) + spent
    result = output.result(
        job, finalist=finalist, handed=handed, confirmed=confirmed, cards=cards, measured=measured,
        baselines=baselines_found, spent=total, wall=time.monotonic() - begun, versions=versions(),
    )  # fmt: skip
    details = output.details(job, confirmed, cards, handed)
    output.write(job.out, system, result, details, self_contained=job.wish.self_contained)
    return Improvement(system, result, job.out)


def _print_plan(job: _Job) -> None:
    """The plan, before anything is spent."""
    job.watch.say(f"plan for {clock(job.wish.budget)} (at {job.rates.prefill:.0f} tokens/s read, "
                  f"{job.rates.train:.0f} trained):")  # fmt: skip
    for item in job.plan:
        most = "up to " if item.get("most") else ""
        job.watch.say(f"  {item['arm']:<44} {most}{item['minutes']:.1f} min")
    for item in job.skipped:
        job.watch.say(f"  left out: {item['method']}: {item['why']}")
    for note in job.notes:
        job.watch.say(f"  note: {note}")


def record_of(trial: Trial, seed: int) -> dict[str, Any]:
    """A trial as result.json lists it."""
    card, paired = trial.card, trial.against_base
    return {
        "name": trial.name, "recipe": trial.recipe.record, "rung": trial.rung, "seed": seed, "status": trial.status,
        "why": trial.why, "examples": trial.examples,
        "select": {"score": card.score, "low": card.low, "high": card.high} if card else None,
        "difference": asdict(paired) if paired else None, "spent": asdict(trial.spent), "cost_seconds": trial.cost,
        "verdict": trial.notes.get("verdict"), "latency_ms": None, "size_bytes": None, "memory_bytes": None,
        "forgetting": trial.forgetting,
    }  # fmt: skip


__all__ = ["Improvement", "improve"]
