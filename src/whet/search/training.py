"""The part of the race that trains: the first training, what goes on from it, and others while money is left."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from whet import embed, reading, suspects
from whet.engine import Spent
from whet.errors import StoreError, WhetError
from whet.feedback import learner, paired
from whet.methods import Method, make
from whet.methods.continual import Continual
from whet.methods.finetune import FineTune, each_once
from whet.methods.prompting import Prompting
from whet.methods.rag import Rag
from whet.progress import clock
from whet.scorecard import reads_scores
from whet.search.budget import estimate
from whet.search.recipe import BUILDING, Recipe, recipe
from whet.system import System
from whet.task import Learnable

if TYPE_CHECKING:
    from whet.search import _Job
    from whet.search.race import Trial

LEAST_TOKENS = 6_000  # a fine-tuning on fewer tokens (some eight steps of short rows) is not worth starting
VALIDATED = 0.15  # of a fine-tuning's time, about, goes to its validations
CALIBRATED_ROWS = 128
SAID = 200  # completions of train, at most, that tell how much a trained model writes
LOOKED_AT = 600  # train rows, at most, that are looked over for wrong labels
SEVERAL = 0.2  # of the questions rest on several documents: from there on, trainings read several passages
ASKED = 200  # train rows, at most, by which it is told how often the passages hold what is asked for
MISSED = 0.1  # of those rows: where more passages show it for as many more, another training reads more
NAMED = 5  # of them in a note
LEAST_WRONG = 0.01  # of labels: fewer are named where all are right
UNTAUGHT = ("prune", "share", "quantize")  # methods that change weights without training them
OTHERS: tuple[dict[str, Any], ...] = (  # settings of further trainings, while the budget lasts: each kind at its own
    # rate, then each at three tenths of it, so that none wins by having been tried more often
    {"adapter": "dora"}, {"adapter": "full"},
    {"learning_rate": 3e-4}, {"adapter": "dora", "learning_rate": 3e-4}, {"adapter": "full", "learning_rate": 3e-5},
    {"rank": 32}, {"batch": 16},
)  # fmt: skip
MANY = 16  # labels: above, near demonstrations come first, and the first training shares its time with one on them
UNEVEN = 1.2  # times the even share: a label that is more frequent has a prior of its own
MOST_EPOCHS = 12.0  # from there on, trainings that still learn are not made longer
STRATEGIES = ("merge", "sequential")  # beside replay: the cheapest rival, and what protecting nothing brings
SAMPLED = 4.0  # trainings that reinforcement's sampling takes, about; if it was asked for by name, one will do


def at_hand(bases: Sequence[System]) -> System:
    """The first base whose weights can be changed; the first where all are served elsewhere."""
    return next((b for b in bases if not b.model.remote), bases[0])


def calibration(data: Learnable) -> dict[str, Any]:
    """The settings by which labels are calibrated first: a prior that is fitted to them where one is much more frequent
    than others and accuracy counts, which batch calibration, that takes all for equally frequent, would lower.
    """
    found = Counter(e.completion for e in data.train if e.completion in data.labels)
    most = max(found.values(), default=0) * len(data.labels) / max(1, found.total())
    return {"kind": "fitted"} if data.metric == "accuracy" and len(data.labels) <= MANY and most > UNEVEN else {}


def trains(one: Recipe) -> bool:
    """Whether a recipe trains weights (a reward model's are its own), which takes as many tokens as it is given."""
    return any(("model" in m.writes and m.name not in UNTAUGHT) or m.name == "reward" for m in one.methods)


def scoring(job: _Job, one: Recipe, start: System) -> float:
    """Seconds that scoring all of select takes behind a recipe, with the documents, facts and rows that it shows."""
    shown = Recipe(tuple(m for m in one.methods if set(m.writes) <= {"sources", "demonstrations"}
                         and not getattr(m, "prompts", 0)))  # fmt: skip
    session, speed = job.run.session(start.model), job.race.speed(start)
    try:
        start = shown.run(start, job.race.data, replace(job.run, spent=Spent(), notes={}))
    except StoreError:
        raise
    except WhetError:
        pass  # what it would read cannot be had: the arm says why
    # A trained model writes as train does, and not as much as it may.
    told = [e.completion for e in job.race.data.train if e.completion] if trains(one) else []
    told = told[:: len(told) // SAID + 1]
    written = 1 + sum(session.count(told)) / len(told) if told else 0.0
    return speed.price(estimate(start, job.race.select, session, metric=job.metric.name, written=written))


def first(job: _Job) -> Recipe | None:
    """The recipe that trains, where training was asked for and can be had."""
    if job.wish.recipe or "@" in job.metric.name:  # rankings ask no model
        return None
    reading = [recipe(("rag", {"k": _passages(job)}), "finetune")] if not job.task.closed else []
    taught = []
    if embed.available():
        reading.append(recipe(("knowledge", {"k": 1}), "finetune"))
        taught.append(recipe(("knowledge", {"mode": "train"})))  # where there are facts, and no rows to train on
    wanted = [recipe("continual"), *reading, recipe("finetune"), *taught]
    if job.wish.methods:  # asked for alone, they need no start
        wanted += [recipe(name) for name in behind(job)]
    return next((one for one in wanted if _wished(job, one)), None)  # the first that has what it needs


def _passages(job: _Job, held: Mapping[int, float] | None = None) -> int:
    """How many passages a training reads: one, but where many questions rest on several documents, three.

    Of two-hop questions (beerqa's train rows), both documents are among the first two for 60 %, the first three for 83.
    Once it is `held` of what share of the rows the first k passages show what is asked for: the fewest that miss hardly
    more than the most do.
    """
    if held:
        return min(k for k, share in held.items() if max(held.values()) - share < MISSED)
    asked = [e for e in job.splits.learnable.train if e.evidence]
    return 3 if sum(len(e.evidence) > 1 for e in asked) > SEVERAL * len(asked) else 1


def _wished(job: _Job, one: Recipe) -> bool:
    """Whether a recipe's methods were asked for, and have what they need."""
    asked = not job.wish.methods or all(m.name in job.wish.methods for m in one.methods)
    return asked and not one.lacks(at_hand(job.bases), job.splits.learnable)


def part(job: _Job, tuned: Recipe) -> float:
    """The share of the tokens that the first training gets: judgements are learnt from with the rest."""
    return 0.5 if [m for m in behind(job, tuned) if m != "rl"] else 1.0


def race(job: _Job, tuned: Recipe) -> bool:
    """Train the best model with what the budget allows, go on from there, and train otherwise while money is left.

    False where nothing could be trained.
    """
    start, tuned = best_model(job), _sourced(job, tuned)
    judged = [m for m in behind(job, tuned) if m != "rl"]
    # Of many labels a short training learns few, which near demonstrations show: both ways get half.
    told = _told(job, tuned.methods[:-1]) if len(job.task.labels) > MANY else ()
    if told and 0.5 * _allowed(job, tuned, start) < LEAST_TOKENS:  # too little for either
        told = ()
    share = min(part(job, tuned), 0.5 if told else 1.0)
    one = enter(job, tuned, start, share)
    if one is not None and "slower" in one.notes:  # it diverged: once more, as the error says
        tuned = _slower(tuned, one)
        one = enter(job, tuned, start, share)
    if one is not None and one.status == "failed" and len(tuned.methods) > 1:  # what it reads cannot be had
        tuned = Recipe(tuned.methods[-1:])
        one = enter(job, tuned, start, share)
    if one is None or one.card is None:
        return False
    more, usual = [Recipe((*tuned.methods, make(name))) for name in judged], calibration(job.splits.learnable)
    more += [Recipe((*tuned.methods, make("calibrate", usual)))] if _calibrates(job) else []
    allowed = one.notes["allowed"]
    for other in more:  # with the same bound, which is part of what a training is known by
        trial = job.race.enter(other, start, tokens=allowed)
        if "slower" in trial.notes:
            trial = job.race.enter(_slower(other, trial), start, tokens=allowed)
        trial.notes["allowed"] = allowed
    if told:
        enter(job, Recipe((*told, tuned.methods[-1])), start)
    rewarded = "rl" in behind(job, tuned)
    if rewarded and (job.wish.methods or 2 * SAMPLED * one.cost < job.race.left):  # and there is time for others, too
        rewarded = not _rewarded(job, tuned, one, start)
    for rival, tokens, cost in _rivals(job, tuned, one, judged):
        if cost < 0.8 * job.race.left:
            job.race.enter(rival, start, tokens=tokens).notes["allowed"] = tokens
    others = _others(job, tuned, _held(job, one))
    while one.cost < 0.8 * job.race.left and (varied := next(others, None)):
        if all(t.recipe != varied for t in job.race.trials):
            enter(job, varied, start)
    if _calibrates(job):
        _calibrate_best(job, start)
    if (taught := _taught(job)) and all(t.recipe != taught for t in job.race.trials):
        job.skipped.append({"method": taught.name, "why": f"{clock(max(0.0, job.race.left))} is left, and a training "
                            f"takes some {clock(one.cost)}"})  # fmt: skip
    if rewarded:
        _rewarded(job, tuned, one, start)
    return True


def _slower(one: Recipe, trial: Trial) -> Recipe:
    """The recipe of a training that diverged, at the learning rate that its error names."""
    last: Any = one.methods[-1]
    return Recipe((*one.methods[:-1], replace(last, learning_rate=trial.notes["slower"])))


def _calibrate_best(job: _Job, start: System) -> None:
    """Calibrate the best training, too, if that is another than the first and there is time."""
    best = max((t for t in job.race.trials if t.card and trains(t.recipe)), key=job.race.merit)
    calibrated = Recipe((*best.recipe.methods, make("calibrate", calibration(job.splits.learnable))))
    plain = best.recipe.methods[-1].name != "calibrate" and all(t.recipe != calibrated for t in job.race.trials)
    if plain and job.race.left > 0:
        job.race.enter(calibrated, start, tokens=best.notes["allowed"]).notes["allowed"] = best.notes["allowed"]


def _rivals(
    job: _Job, tuned: Recipe, one: Trial, judged: Sequence[str]
) -> Iterator[tuple[Recipe, int, float]]:  # fmt: skip
    """What learning from judgements stands beside: more of the training before it, for as many tokens as both took;
    then other rates of its own. Each with its bound of tokens, and the seconds that it takes.
    """
    last = tuned.methods[-1]
    for name in judged:
        done = next((t for t in job.race.trials if t.card and t.recipe.methods[:-1] == tuned.methods
                     and t.recipe.methods[-1].name == name), None)  # fmt: skip
        if done is None or not isinstance(last, FineTune):
            continue
        first, both = (sum(cost["trained_tokens"] for cost in t.notes["trainings"].values()) for t in (one, done))
        longer = replace(last, epochs=round(last.epochs * both / max(1, first), 1))
        yield Recipe((*tuned.methods[:-1], longer)), both, one.cost + done.cost
        rates = make(name).space()["learning_rate"]
        others = [make(name, {"learning_rate": rate}) for rate in rates]
        made = done.recipe.methods[-1]
        yield from ((Recipe((*tuned.methods, m)), one.notes["allowed"], done.cost) for m in others if m != made)


def _taught(job: _Job) -> Recipe | None:
    """The training on facts themselves, where the task has any and it was not ruled out."""
    taught = recipe(("knowledge", {"mode": "train"}))
    return taught if embed.available() and _wished(job, taught) else None


def _rewarded(job: _Job, tuned: Recipe, one: Trial, start: System) -> bool:
    """Whether there was time to go on from a training by reinforcement; what is left out is named once."""
    other, times = Recipe((*tuned.methods, make("rl"))), 1.0 if job.wish.methods else SAMPLED
    job.skipped[:] = [s for s in job.skipped if s["method"] != other.name]
    if times * one.cost < job.race.left:
        job.race.enter(other, start, tokens=one.notes["allowed"]).notes["allowed"] = one.notes["allowed"]
        return True
    job.skipped.append({"method": other.name, "why": f"{clock(max(0.0, job.race.left))} is left, and sampling takes "
                        f"some {times:g} times the training's {clock(one.cost)}"})  # fmt: skip
    return False


def _sourced(job: _Job, tuned: Recipe) -> Recipe:
    """The training on what the best arm showed, where that reads documents or facts and the training does not yet."""
    whole = [t for t in job.race.trials if t.card and t.examples == len(job.race.select)]
    best = max(whole, key=job.race.merit, default=None)
    shown = tuple(m for m in best.recipe.methods if set(m.writes) <= {"sources"}) if best else ()
    if not shown or len(tuned.methods) > 1 or tuned.families & {"human feedback"}:
        return tuned
    return Recipe((*shown, *tuned.methods))


def _held(job: _Job, one: Trial) -> dict[int, float]:
    """Of what share of train's rows the first k passages show what is asked for, from the k that was trained with on.

    A note of the trial says so. Empty where nothing is read, or where it is known of no row.
    """
    read = next((m for m in one.recipe.methods if isinstance(m, Rag)), None)
    # A label's word says nothing about a passage.
    rows = [e for e in job.race.data.train if e.evidence or (e.completion and not job.task.closed)]
    if read is None or not rows:
        return {}
    rows = random.Random(job.wish.seed).sample(rows, min(ASKED, len(rows)))
    try:
        known, hits = reading.held(one.system, rows, [read.k, *(k for k in read.space()["k"] if k > read.k)])
    except StoreError:
        raise
    except WhetError:  # a database that is down by now
        return {}
    if not known:
        return {}
    more = _passages(job, held := {k: count / len(rows) for k, count in hits.items()})
    said = f"stands in the passages of {100 * hits[read.k] / known:.1f} % of the questions"
    one.notes["evidence"] = said + (f", {100 * hits[more] / known:.1f} % with k={more}" if more > read.k else "")
    return held


def _others(job: _Job, tuned: Recipe, held: Mapping[int, float] | None = None) -> Iterator[Recipe]:
    """Further trainings, the most telling first: facts themselves, longer ones where the last was too short by its own
    curves, on more passages where the first one's often lack what is asked for, by what is `held` (of both the better
    goes on), on what the best arm without training tells the model, without what it reads, other ways to keep what was
    known, without rows whose label looks wrong, other settings.
    """
    *reads, last = tuned.methods
    if not isinstance(last, FineTune):
        return
    if taught := _taught(job):
        yield taught
    while (longer := _longer(job, Recipe((*reads, last)))) is not None:
        yield (more := Recipe((*reads, longer)))
        if not _better(job, more, Recipe((*reads, last))):
            break
        last = longer
    k = _passages(job, held) if held else 0
    wider = [replace(m, k=max(k, m.k)) if isinstance(m, Rag) else m for m in reads]
    if wider != reads:
        yield (more := Recipe((*wider, last)))
        if _better(job, more, Recipe((*reads, last))):
            reads = wider
    if told := _told(job, reads):
        yield Recipe((*told, last))
    if reads:
        yield Recipe((last,))
    if isinstance(last, Continual):
        yield from (Recipe((*reads, replace(last, strategy=strategy))) for strategy in STRATEGIES)
    if _disputed(job):
        yield Recipe((*reads, replace(last, clean=True)))
    for changed in OTHERS:
        yield Recipe((*reads, replace(last, **changed)))


def _longer(job: _Job, done: Recipe) -> FineTune | None:
    """The last step of a training twice as long, where it went through all its epochs and still learnt; else None."""
    trial, last = next((t for t in job.race.trials if t.recipe == done and t.card), None), done.methods[-1]
    if trial is None or not isinstance(last, FineTune) or last.epochs >= MOST_EPOCHS:
        return None
    through = trial.notes.get("epochs", 0.0) >= 0.95 * last.epochs
    return replace(last, epochs=2 * last.epochs) if through and trial.notes.get("verdict") == "underfitting" else None


def _better(job: _Job, one: Recipe, other: Recipe) -> bool:
    """Whether the first of two recipes did better, where both have been tried."""
    done = {t.recipe: job.race.merit(t) for t in job.race.trials if t.card}
    return done.get(one, float("-inf")) > done.get(other, float("-inf"))


def _told(job: _Job, reads: Sequence[Method]) -> tuple[Method, ...]:
    """What the best arm without training tells the model, its calibration apart, where that does better than the base;
    and what the training `reads` beside.

    Training on such prompts can bring more than either (Soylu et al. 2024). Empty where it reads all of this already.
    """
    whole = [t for t in job.race.trials if t.card and t.examples == len(job.race.select) and not trains(t.recipe)]
    best = max(whole, key=job.race.merit, default=None)
    if best is None or best.against_base is None or best.against_base.low <= 0:
        return ()
    told = {m.name: m for m in best.recipe.methods if m.name != "calibrate"}
    reasons = any(isinstance(m, Prompting) and m.reason for m in told.values())  # rows hold answers, none to learn
    both = {m.name: m for m in reads} | told
    if reasons or {*told.values()} <= {*reads} or not {*both} <= {*BUILDING}:
        return ()
    return tuple(both[name] for name in BUILDING if name in both)


def _disputed(job: _Job) -> bool:
    """Whether labels of train look wrong to plain classifiers, which a note says: else `clean` is not worth a try."""
    labels, data = job.task.labels, job.race.data
    if not labels or not embed.available():
        return False
    rows = suspects.labelled(each_once(data.train)[0], labels)
    rows = random.Random(job.wish.seed).sample(rows, min(LOOKED_AT, len(rows)))
    job.watch.say(f"looking for wrong labels among {len(rows)} train rows")
    found = suspects.find(rows, embed.Embedder(job.store.home), job.wish.seed)
    if len(found) < max(1.0, LEAST_WRONG * len(rows)):
        return False
    some = ", ".join(f"{one.id} ({one.label}, rather {one.rather})" for one in found[:NAMED])
    job.notes.append(f"{len(found)} of {len(rows)} train rows have a label that looks wrong, the surest: {some}; "
                     "`finetune(clean=true)` leaves such rows out")  # fmt: skip
    return True


def behind(job: _Job, tuned: Recipe | None = None) -> list[str]:
    """The methods that go on from a training with what people prefer, or with a reward, where the task has any.

    Which of dpo and kto, says `learner`, unless only the other one was asked for.
    """
    data = job.splits.learnable
    if tuned is not None and tuned.families & {"human feedback"}:
        return []
    by, asked = learner(data.judged), [n for n in ("dpo", "kto") if n in job.wish.methods]
    names = [by if by in asked or not asked else asked[0]] if data.judged else []
    if paired(data.judged)[0] or job.metric.name not in ("perplexity", "win_rate"):
        names.append("rl")
    names = [n for n in names if not job.wish.methods or n in job.wish.methods]
    return [n for n in names if not recipe(n).lacks(at_hand(job.bases), data)]


def _calibrates(job: _Job) -> bool:
    """Whether what is trained is to be calibrated, too."""
    return bool(job.task.labels) and (not job.wish.methods or "calibrate" in job.wish.methods)


def enter(job: _Job, wanted: Recipe, start: System, share: float = 1.0) -> Trial | None:
    """Run a recipe that trains, with a share of the tokens that are left once scoring what comes of it is set aside."""
    race, trained = job.race, trains(wanted)
    allowed = _allowed(job, wanted, start, share)
    if trained and allowed < LEAST_TOKENS:
        why = f"only {clock(max(0.0, race.left))} of the budget would be left for it"
        job.skipped.append({"method": wanted.name, "why": why})
        return None
    trial = race.enter(wanted, start, tokens=allowed if trained else None)
    trial.notes["allowed"] = allowed
    return trial


def _allowed(job: _Job, wanted: Recipe, start: System, share: float = 1.0) -> int:
    """The tokens that a training may take, with this share of what is left."""
    left = job.race.left - after(job, wanted, start)
    return int(share * left * (1 - VALIDATED) * job.race.speed(start).train)


def after(job: _Job, wanted: Recipe, start: System) -> float:
    """Seconds that scoring on select what a training makes takes, and calibrating it.

    Calibrated answers are read off the same scores where all are had.
    """
    each, select = scoring(job, wanted, start), job.race.select
    if not _calibrates(job):
        return each
    again = 0.0 if reads_scores(start, select, job.run.session(start.model)) else each
    return each + again + CALIBRATED_ROWS * each / max(1, len(select))


def best_model(job: _Job) -> System:
    """The base whose arms did best on all of select, of those whose weights are at hand; of no scores the first."""
    local = [b for b in job.bases if not b.model.remote] or job.bases
    models = {b.model.content: b for b in local}
    scored = [t for t in job.race.trials if t.card and t.examples == len(job.race.select)]
    scored = [t for t in scored if t.system.model.content in models]
    best = max(scored, key=job.race.merit, default=None)
    return models[best.system.model.content] if best else local[0]
