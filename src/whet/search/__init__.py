"""`whet improve`: plan, race, combine, confirm, hand over."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from whet import baselines, embed, reading, stats
from whet import task as tasks
from whet.encoder import Encoder
from whet.engine import Session, Spent
from whet.errors import MethodError, StoreError, TaskError, WhetError
from whet.feedback import UNCHECKED, Judge, Versus, agreed, controlled, preference
from whet.general import ability
from whet.memory import Known, known
from whet.methods import Run, names, table
from whet.methods.reward import metric_of
from whet.metrics import Metric, Outcome, get, score_all, sound
from whet.model import DEFAULT, ModelRef, loaded_before, resolve
from whet.progress import Silent, Watch, clock
from whet.retention import forgetting, moved_by, refused
from whet.scorecard import Scorecard, alike, evaluate, measure, versions
from whet.search import limits, plan, training
from whet.search import out as output
from whet.search.arms import Arm, Dear
from whet.search.budget import ENCODED, Rates, estimate, seconds
from whet.search.budget import measure as measure_rates
from whet.search.race import Race, Trial
from whet.search.recipe import Recipe, parse, recipe
from whet.splits import few, shared_order
from whet.store import Store, code
from whet.system import Decoding, System
from whet.task import Example, Learnable, Splits, Task
from whet.train.trackers import check

ENCODER_SPEED = 2.5  # MiniLM has a tenth of the weights, all of them trained, in small padded batches: LOG.md
ELSEWHERE = 200.0  # trained tokens/s, about, where no model runs on this machine
MOST_HELD = 200  # rows of an earlier task that forgetting is measured on
ANSWER_TOKENS = (16, 256)  # how long a generated answer may be: at the least, and where no row says how long they are
REFINEMENTS = 2  # rounds of settings next to those of the best arm, where no training did better
UNTOLD = ("curves", "trainings", "steps_log", "seen", "held", "allowed", "artifact")  # told elsewhere, or too long
MOST_TOLD = 100  # items of a list that a method noted
READ, MOST_READ = 0.2, 100  # of the sealed rows: on how many it is told how passages are read, and at most
JUDGED = 0.2  # of the budget may go to training the judge of a win rate


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
    report_to: tuple[str, ...] = ()


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
    out: Path
    run: Run
    bases: list[System]
    reserve: float
    race: Race
    earlier: tuple[Known, ...] = ()  # tasks that must not get worse
    alone: Trial | None = None  # the only candidate, where there are no rows to select by
    shrinking: float = 0.0  # seconds set aside for making the finalist smaller
    dearest: float = 0.0  # seconds that scoring select takes with the dearest arm that the reserve allows for
    dear: list[Dear] = field(default_factory=list)  # arms that are left out until more time is known to be left
    judge: Spent = field(default_factory=Spent)  # what training the judge of a win rate took
    tight: bool = False  # the base itself goes beyond the limits
    whole: Trial | None = None  # what the finalist was made smaller of, for the limits' sake
    notes: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    plan: list[dict[str, Any]] = field(default_factory=list)


def base_system(ref: ModelRef, task: Task, data: Learnable, session: Session, home: Path) -> System:
    """The base: the model with the task's instruction as it stands, zero-shot.

    Answers come from the closed set where there is one (of the task or of the row), else greedily, with as many tokens
    as the task's `max_tokens` says: by default half as many again as all but 1 % of train's answers have (else dev's,
    else those judged good), at most half of the window.
    """
    least, unknown = ANSWER_TOKENS
    known = [e.completion for e in data.train or task.dev or [one.example for one in data.judged] if e.completion]
    answers = sorted(session.count(known[:: len(known) // 500 + 1]))
    longest = max(3 * answers[math.ceil(0.99 * (len(answers) - 1))] // 2, least) if answers else unknown
    longest = task.max_tokens or min(longest, max(session.context // 2, least))
    rows = (*data.train, *task.train, *task.dev, *task.test)
    closed = bool(task.labels) or any(e.choices for e in rows)
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
    report_to: Sequence[str] = (),
    watch: Watch | None = None,
    home: Path | None = None,
) -> Improvement:
    """Make a model better at a task: try what could help, combine what does, confirm it, hand over one System.

    `budget` is "90s", "10m", "2h" or seconds. Finished trials of the same call are taken from the store; `report_to`
    names trackers of trainings. Raises a WhetError for bad input before anything is spent.
    """
    watch, begun = watch or Silent(), time.monotonic()
    try:
        if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:  # each would race by its own clock
            raise MethodError("whet improve is one process", expected="a start without torchrun", found=f"{processes}",
                              do="train in several by torchrun … whet apply finetune")  # fmt: skip
        check(report_to)
        loaded = task if isinstance(task, Task) else tasks.load(task, trust=trust)
        models = (model,) if isinstance(model, str) else tuple(model)
        wished = (methods,) if isinstance(methods, str) else tuple(methods)
        wish = Wish(models, seconds(budget), wished, recipe, seed, strict, self_contained,
                    tuple(report_to))  # fmt: skip
        job = _prepare(loaded, wish, Path(out) if out else Path("runs") / loaded.name, watch, Store(home))
        _race(job)
        finalist = limits.within(job, _finalist(job))
        return _finish(job, finalist, begun)
    finally:
        watch.close()


def _prepare(task: Task, wish: Wish, folder: Path, watch: Watch, store: Store) -> _Job:
    """Check everything that can be checked before anything is spent; open the models and share out the budget."""
    _nameable(wish)
    files = parse(wish.recipe).files(task.folder) if wish.recipe else {}
    splits = task.split(wish.seed, wish.strict)
    metric = get(task.metric, task.folder, task.trusted)
    if not task.test and not splits.select:
        raise TaskError("nothing to measure on", expected="test.jsonl, dev.jsonl or 10 train rows", found="none")
    refs = [resolve(name) for name in wish.models]
    refs = [ref for n, ref in enumerate(refs) if all(ref.content != other.content for other in refs[:n])]
    if metric.name == "win_rate" and refs[0].remote:
        raise MethodError("the judge of a win rate is made of the first model's weights", expected="a local --model",
                          found=refs[0].base, do="name a local one first, or take another metric")  # fmt: skip
    run = Run(store, wish.seed, tell=watch.tell, report_to=wish.report_to)
    _readable(task, wish, splits.learnable, run)
    asked = {"task or rows": task.fingerprint, "model": [r.content for r in refs], "seed": wish.seed,
             "budget": wish.budget, "methods": list(wish.methods), "recipe": wish.recipe, "strict": wish.strict,
             "file": list(files.values())}  # fmt: skip
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    watch.say(f"whet improve {task.name}: {len(splits.learnable.train)} train, {len(splits.select)} select, "
              f"{len(splits.confirm)} confirm; metric {metric.name}")  # fmt: skip
    if said := few(splits.confirm):
        watch.say(said)
    bases = [_opened(ref, task, splits, run, watch) for ref in refs]
    if wish.recipe:
        parse(wish.recipe).possible(training.at_hand(bases), splits.learnable)
    _echoing(bases, splits, metric, run)
    # Not before: a command that could not run is corrected, not another one.
    output.claim(folder, key, task.name, task.folder, asked)
    rates = {b.model.content: measure_rates(b, run.session(b.model), store, watch.say) for b in bases}
    local = training.at_hand(bases)
    judge = Spent()
    if metric.name == "win_rate":
        metric, judge = _judge(task, wish, splits, bases[0], rates[bases[0].model.content], run, watch)

    def price(rows: Sequence[Example], asked: System, by: str = metric.name) -> float:
        return rates[asked.model.content].price(estimate(asked, rows, run.session(asked.model), metric=by))

    cut = list[str]()
    for _ in range(2):  # again at the speed at which these texts are read
        if not cut:
            splits, cut = plan.beginnings(splits, wish.budget, lambda rows: max(price(rows, b) for b in bases))
        if texts := [e.text for e in splits.select or splits.confirm if e.text]:
            rates |= {b.model.content: measure_rates(b, run.session(b.model), store, watch.say, texts) for b in bases}
    earlier = _earlier(local, splits.learnable, run)
    beside = 2 * sum(price(one.held, one.asked, one.metric) for one in earlier)
    limited = limits.limited(task.limits) and not local.model.remote
    shrinking = min(limits.SECONDS, 0.25 * wish.budget) if limited else 0.0
    passes = plan.CONFIRMING + limited + 3 * READ * (task.documents is not None)  # found, right and wrong passages
    parts = plan.apportion(splits, task.closed, wish, lambda rows: max(price(rows, b) for b in bases), beside,
                       shrinking + rates[bases[0].model.content].price(judge), passes)  # fmt: skip
    splits = replace(splits, confirm=parts.confirm)
    notes = [*task.notes, *cut, *parts.notes]
    if splits.dropped:
        notes.append(f"{len(splits.dropped)} rows dropped: they repeat or share a group with held-out rows")
    race = Race(f"{key} {code()}", splits.learnable, list(parts.select), metric, store, rates, wish.seed,
                parts.search, watch, run, live=_live(task), aside=shrinking)  # fmt: skip
    return _Job(task, wish, splits, metric, store, watch, folder, run, bases, parts.reserve, race, earlier,
                shrinking=shrinking, judge=judge, notes=notes)  # fmt: skip


def _nameable(wish: Wish) -> None:
    """Raise MethodError for methods that there are none of, and for methods beside a recipe."""
    if wish.recipe and wish.methods:
        raise MethodError("both a recipe and methods", expected="one of --recipe and --methods", found="both",
                          do="leave one out")  # fmt: skip
    if unknown := [m for m in wish.methods if m not in names()]:
        recipe(unknown[0])  # raises, with the nearest name


def _opened(ref: ModelRef, task: Task, splits: Splits, run: Run, watch: Watch) -> System:
    """The base System on a model."""
    first = "" if loaded_before(ref, run.home) else " (the first time, its weights are unpacked: half a minute)"
    watch.say(f"opening {ref.base}{first}")
    return base_system(ref, task, splits.learnable, run.session(ref), run.home)


def _judge(
    task: Task, wish: Wish, splits: Splits, base: System, rates: Rates, run: Run, watch: Watch
) -> tuple[Metric, Spent]:
    """The win rate over the base by a judge that is trained for it, and what that took."""
    watch.say(f"before the plan: the judge of the win rate is trained, for {clock(JUDGED * wish.budget)} of the "
              f"{clock(wish.budget)} at most, on {len(splits.judging)} judgements that no method sees")  # fmt: skip
    watch.arm("judge of the win rate", wish.budget)
    alone = replace(run, spent=Spent(), notes={}, trained_tokens=int(JUDGED * wish.budget * rates.train))
    return metric_of(task, base, alone), alone.spent


def _echoing(bases: Sequence[System], splits: Splits, metric: Metric, run: Run) -> None:
    """Raise MethodError where perplexity is asked of a server that gives no log-probabilities of whole texts."""
    for base in bases if metric.name == "perplexity" else ():
        how = run.session(base.model).protocol
        if any(how.get("scoring_raw", "echo") != "echo" for e in (*splits.select, *splits.confirm) if e.text):
            raise MethodError(
                "perplexity needs log-probabilities of whole texts", expected="a server that echoes texts",
                found=base.model.base, do="take a local model, or another metric",
            )  # fmt: skip


def _readable(task: Task, wish: Wish, data: Learnable, run: Run) -> None:
    """Read the files that methods will look things up in. Raises TaskError where a whole source cannot be read.

    What lies elsewhere (pages, a database, an endpoint) may only be down for now: its arms are left out, saying why.
    """
    asked = [m.name for m in parse(wish.recipe).methods] if wish.recipe else wish.methods or names()
    needs = {need for name in asked for need in table()[name].needs}

    def files(*sources: str | None) -> bool:
        found = [place for source in sources for place in tasks.places(task.folder, source)]
        return bool(found) and all(isinstance(place, Path) for place in found)

    with contextlib.suppress(MethodError):  # a package that is missing: the arms say so
        if "documents" in needs and files(task.documents):
            run.documents(data)
    with contextlib.suppress(MethodError):
        if "knowledge" in needs and files(task.knowledge, task.glossary):
            run.facts(data)


def _live(task: Task) -> bool:
    """Whether a source may change without the task's files changing: a database, a page, an endpoint."""
    named = [p for s in (task.documents, task.knowledge, task.glossary) for p in tasks.places(task.folder, s)]
    return any(not isinstance(place, Path) for place in named)


def _earlier(base: System, data: Learnable, run: Run) -> tuple[Known, ...]:
    """The earlier tasks with the rows that forgetting is measured on."""
    if not data.earlier or base.model.remote:  # a server's weights do not change
        return ()
    tasks = known(base, data, run.session(base.model), seed=run.seed)
    return tuple(
        replace(one, held=tuple(shared_order(one.held, one.asked.decoding.closed, run.seed)[:MOST_HELD]))
        for one in tasks
    )


def _race(job: _Job) -> None:
    """Bases first, then the cheap arms by successive halving, then training with what is left, then combinations.

    Then, or where nothing is trained, cheap arms that were left out for want of time, and settings next to the best's
    where that is one of them.
    """
    race, tries, local = job.race, plan.planned(job), training.at_hand(job.bases)
    plan.show(job)
    if not race.select:
        only = race.enter(tries.untried, local, tokens=tries.tokens) if tries.untried else None
        if only is not None and only.status == "done":
            job.alone = only
        elif only is not None:
            job.notes.append(f"{only.name} could not be tried: {only.why}")
        return
    for base, label in zip(job.bases, plan.labels(job), strict=True):
        trial = race.enter(Recipe(), base, label=label)
        race.base = race.base or trial
    if race.base and race.base.card:
        sound(job.metric, race.base.card.outcomes, race.select)

    def raced(best: Trial | None, arms: Sequence[Arm]) -> bool:
        if arms:
            race.halve([(a.recipe, a.base, a.label) for a in arms], best)
        return bool(arms)

    raced(None, tries.arms)
    if tries.wished is not None:
        if not any(t.recipe == tries.wished for t in race.trials):
            training.enter(job, tries.wished, training.best_model(job))
        return
    if tries.tuned is None or not training.race(job, tries.tuned):
        raced(*plan.instead(job))
    while raced(*plan.instead(job, searches=True)):  # as estimates are high, time may be left for more
        pass
    for _ in range(REFINEMENTS):
        raced(*plan.refined(job))


def _finalist(job: _Job) -> Trial | None:
    """The best arm on all of select that keeps the earlier tasks; None where nothing beats the base there.

    Without rows to select by it is the only candidate, if it keeps them.
    """
    race = job.race
    if job.alone is not None:
        only = _keeping(job, job.alone)
        return None if only.status == "refused" else only
    arms = [t for t in race.trials if t.card and t is not race.base and t.status != "refused"]
    most = max((t.examples for t in arms), default=0)  # all of select, unless the clock has stopped the race before
    for trial in sorted((t for t in arms if t.examples == most), key=race.merit, reverse=True):
        if trial.against_base is None or trial.against_base.difference <= 0:
            return None
        kept = _keeping(job, trial)
        if kept.status != "refused":
            return kept
        race.let_go()
    return None


def _keeping(job: _Job, trial: Trial) -> Trial:
    """The trial with what the earlier tasks lose by it; refused where that is more than is allowed."""
    base = _compared(job, trial)
    lost = forgetting(base, trial.system, job.earlier, job.run, job.task.limits.forgetting, job.task.trusted)
    if not lost:
        return trial
    why = refused(lost)
    job.notes += [f"{trial.name}: {one}" for one in lost]
    if not why and not (base.model.remote or trial.system.model.remote):
        job.watch.arm("what it did to all else")
        moved = moved_by(base, trial.system, job.race.select, job.run)  # between models of the same tokens
        job.notes += [] if moved is None else [f"{trial.name}: drift {moved:.3f} nats a token from the base"]
        job.notes.append(f"{trial.name}: {ability(base, trial.system, job.run)}")
    most = max(one.lost for one in lost)
    return job.race.mark(trial, forgetting=most, status="refused" if why else trial.status, why=why or trial.why)


def _compared(job: _Job, trial: Trial) -> System:
    """What a trial may lose against: the first model, the base of all gains; its own where some are served elsewhere,
    which earlier tasks may ask for what servers do not tell.
    """
    own = [b for b in job.bases if b.model.content == trial.system.model.content]
    return own[0] if own and any(b.model.remote for b in job.bases) else job.bases[0]


def _best_single(job: _Job, finalist: Trial) -> Trial | None:
    """The best arm of a single family, where the finalist combines several."""
    if len(finalist.recipe.families) < 2:
        return None
    single = [t for t in job.race.trials if t.card and len(t.recipe.families) == 1 and t.status != "refused"]
    single = [t for t in single if t.examples == len(job.race.select)]
    return max(single, key=job.race.merit, default=None)


def _confirm(job: _Job, finalist: Trial | None) -> tuple[dict[str, Any] | None, dict[str, Scorecard], Spent]:
    """Open the sealed split once: the base, the finalist, the best single-family arm, and what a compressed finalist
    was made of, compared in pairs.
    """
    rows = job.splits.confirm
    if not rows:
        return None, {}, Spent()
    base = job.race.base
    if finalist is None and isinstance(job.metric, Versus) and base and base.card:  # the base against itself
        return _confirmed(job, {"base": base.card}, None) | {"n": len(rows), "candidate": None}, {}, Spent()
    wanted: dict[str, System] = {"base": job.bases[0]}
    single = _best_single(job, finalist) if finalist else None
    if finalist:
        wanted["chosen"] = finalist.system
    if single:
        wanted["single"] = single.system
    whole = limits.uncompressed(job, finalist)
    if whole and all(s.fingerprint != whole.system.fingerprint for s in wanted.values()):
        wanted["uncompressed"] = whole.system
    cards = {}
    for name, system in wanted.items():
        job.watch.arm(f"confirm: {name}")
        cards[name] = evaluate(
            system, rows, job.metric, session=job.run.session(system.model), split="confirm", seed=job.wish.seed,
            store=job.store, within=job.race.key,
            progress=lambda done, of: job.watch.tell("scoring on sealed data", done, of),
        )  # fmt: skip
        cards[name] = alike(cards[name], cards["base"], job.metric, job.wish.seed)
    body = _confirmed(job, cards, single) | {"candidate": finalist.name if finalist else None}
    if whole:
        before = next(cards[n] for n, s in wanted.items() if s.fingerprint == whole.system.fingerprint)
        body["uncompressed"] = {"name": whole.name, **_figures(before), "cost": _cost(job, before, cards["chosen"])}
    if isinstance(job.metric, Versus) and finalist:
        body["feedback"] = _preferred(job, cards["chosen"], finalist.system, job.metric.judge)
    return body, cards, sum((c.spent for c in cards.values()), Spent())


def _figures(card: Scorecard) -> dict[str, float]:
    return {"score": card.score, "low": card.low, "high": card.high}


def _cost(job: _Job, whole: Scorecard, small: Scorecard) -> dict[str, float]:
    """What a compressed System loses on the sealed rows, in the metric's units, with its one-sided 95 % bound."""
    paired = stats.compare(small.outcomes, whole.outcomes, job.metric, job.wish.seed)
    bound = stats.not_worse(whole.outcomes, small.outcomes, job.metric, 0.0, job.wish.seed).bound
    return {"loss": paired.difference, "low": paired.low, "high": paired.high, "bound": bound}


def _confirmed(job: _Job, cards: dict[str, Scorecard], single: Trial | None) -> dict[str, Any]:
    base, chosen = cards["base"], cards.get("chosen", cards["base"])
    against = stats.compare(base.outcomes, chosen.outcomes, job.metric, job.wish.seed)
    tests = [against]
    if "single" in cards:
        tests.append(stats.compare(cards["single"].outcomes, chosen.outcomes, job.metric, job.wish.seed))
    adjusted = stats.holm([t.p_value for t in tests])
    improved = "chosen" in cards and against.low > 0 and adjusted[0] < 0.05
    body = {
        "n": base.n, "base": _figures(base), "chosen": _figures(chosen), "difference": against.difference,
        "low": against.low, "high": against.high, "p_value": against.p_value, "p_adjusted": adjusted[0],
        "test": against.test, "improved": improved,
        "smallest_detectable": against.smallest_detectable if "chosen" in cards else None,  # of two that differ
    }  # fmt: skip
    if "single" in cards and single:
        body["best_single"] = {
            "name": single.name, "difference": tests[1].difference, "low": tests[1].low, "high": tests[1].high,
            "p_value": tests[1].p_value, "p_adjusted": adjusted[1],
        }  # fmt: skip
    return body


def _preferred(job: _Job, card: Scorecard, system: System, judge: Judge) -> dict[str, Any]:
    """What stands beside a win rate: that at equal length, how often the System prefers the chosen side of pairs, and
    how often its judge does (`agreement`).

    Each figure has its 95 % interval; None where no sealed row is a pair.
    """
    even = controlled(card.outcomes, job.wish.seed)
    job.notes.append("win rate at equal length {:.1f} % [{:.1f}, {:.1f}]; a judge may like long answers for their "
                     "length".format(*(100 * one for one in even)))  # fmt: skip
    chosen = preference(system, job.splits.confirm, job.run.session(system.model), job.wish.seed)
    checked = agreed(judge, job.splits.confirm, job.wish.seed)
    job.notes.append(str(checked) if checked else UNCHECKED)
    return {"controlled": even, "prefers": chosen, "agreement": checked and checked.accuracy, "judge": judge.name}


def _run_baselines(job: _Job, handed: Scorecard | None) -> list[dict[str, Any]]:
    """The non-LLM baselines on select and confirm; there, compared in pairs with what is handed over."""
    train, select, confirm = job.splits.learnable.train, job.race.select, job.splits.confirm
    if handed is None and isinstance(job.metric, Versus):  # the base has not answered the sealed rows
        confirm = ()
    rows = [*select, *confirm]
    if job.metric.name == "perplexity" or not rows:
        return []
    job.watch.arm("non-LLM baselines")
    embedder = embed.Embedder(job.store.home) if embed.available() else None
    try:
        speeds = [job.race.speed(b).train for b in job.bases if not b.model.remote]
        tokens = ENCODED * job.wish.budget * ENCODER_SPEED * min(speeds, default=ELSEWHERE)
        encoder = Encoder(round(tokens), job.wish.seed)
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

    if embedder and job.task.labels and len(found) > 1 and found[-1].name != "encoder_finetuned":
        job.notes.append(f"no fine-tuned encoder among the baselines: {ENCODED:.0%} of the budget is too little")
    cut, rows_of = len(select), []
    for one in found:
        sealed, outcomes = scored(one.answers[cut:], confirm)
        body: dict[str, Any] = {"name": one.name, "select": scored(one.answers[:cut], select)[0], "confirm": sealed}
        if outcomes and handed:
            paired = stats.compare(handed.outcomes, outcomes, job.metric, job.wish.seed)
            body |= {"difference": paired.difference, "low": paired.low, "high": paired.high,
                     "p_value": paired.p_value}  # fmt: skip
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
    handed = finalist if finalist and (improved or _fits_better(job, finalist)) else None
    baselines_found = _run_baselines(job, cards.get("chosen" if handed else "base"))
    system = handed.system if handed else job.bases[0]
    card = cards.get("chosen" if handed else "base") or (handed.card if handed else None)
    card = card or (job.race.base.card if job.race.base else None)
    rows = job.splits.confirm or job.race.select
    measured: dict[str, Scorecard] = {}
    if card:
        job.watch.arm("measuring latency and memory")
        measured["chosen"] = _served(job, card, system, rows)
        base_card = cards.get("base") or (job.race.base.card if job.race.base else None)
        own = _served(job, base_card, job.bases[0], rows) if handed and base_card else measured["chosen"]
        measured["base"] = own
        record = measured["chosen"].record()
        system = replace(system, card={
            "task": job.task.name, "recipe": handed.recipe.name if handed else "base", "scorecard": record,
            **system.learnt,
        })  # fmt: skip
    system = system.split_by(job.task.name, job.wish.seed)
    read = _read(job, system)
    total = sum((t.spent for t in job.race.trials), job.judge) + job.race.beside + spent
    result = output.result(
        job, finalist=finalist, handed=handed, confirmed=confirmed, cards=cards, measured=measured,
        baselines=baselines_found, spent=total, wall=time.monotonic() - begun, versions=versions(), read=read,
    )  # fmt: skip
    details = output.details(job, cards, handed)
    output.write(job.out, system, result, details, self_contained=job.wish.self_contained)
    return Improvement(system, result, job.out)


def _fits_better(job: _Job, finalist: Trial) -> bool:
    """Whether the base is too large or too slow, and the finalist is not or was made the nearest to what is allowed."""
    made = any(m.family == "compression" for m in finalist.recipe.methods)
    return job.tight and (made or finalist.status != "refused")


def _served(job: _Job, card: Scorecard, system: System, rows: Sequence[Example]) -> Scorecard:
    """The card with size, latency and memory; without them, and a note, where they cannot be measured."""
    try:
        return measure(card, system, rows)
    except WhetError as error:  # all else is done and confirmed by now
        job.notes.append(f"latency and memory are not known: {error}")
        return card


def _read(job: _Job, system: System) -> dict[str, Any] | None:
    """How the System reads its documents, on a part of the sealed rows (see `reading.measure`); None where it has none.

    Where they cannot be read now, a note says so.
    """
    most = min(MOST_READ, math.ceil(READ * len(job.splits.confirm)))
    rows = shared_order(job.splits.confirm, job.task.closed, job.wish.seed)[:most]  # files are often sorted
    if not rows or "@" in job.metric.name or all(s.kind != "documents" for s in system.sources):
        return None
    job.watch.arm("how passages are read: found, right and wrong ones")
    try:
        return asdict(reading.measure(system, rows, job.metric, job.run.session(system.model)))
    except StoreError:
        raise
    except WhetError as error:  # all else is done and confirmed by now
        job.notes.append(f"how passages are read is not known: {error}")
        return None


def record_of(trial: Trial, seed: int) -> dict[str, Any]:
    """A trial as result.json lists it."""
    card, paired = trial.card, trial.against_base
    return {
        "name": trial.name, "recipe": trial.recipe.record, "rung": trial.rung, "seed": seed, "status": trial.status,
        "why": trial.why, "examples": trial.examples,
        "select": {"score": card.score, "low": card.low, "high": card.high} if card else None,
        "difference": asdict(paired) if paired else None, "spent": asdict(trial.spent), "cost_seconds": trial.cost,
        "recipe_seconds": trial.whole, "verdict": trial.notes.get("verdict"), "forgetting": trial.forgetting,
        "notes": _told(trial.notes), "latency_ms": card.latency_ms if card else None,
        "size_bytes": card.size_bytes if card else None, "memory_bytes": card.memory_bytes if card else None,
    }  # fmt: skip


def _told(notes: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial's methods noted, as far as a reader can use it: long lists by their beginning."""

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): cut(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [cut(one) for one in value[:MOST_TOLD]]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: cut(value) for key, value in notes.items() if key not in UNTOLD}

