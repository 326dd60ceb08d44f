"""`whet update`: teach an existing System more, by rows or by judgements, and say what was gained and what was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from whet import stats
from whet.errors import MethodError, TaskError
from whet.feedback import UNCHECKED, Agreement, Versus, agreed, controlled, learner, paired, usable, weighted, words
from whet.feedback import load as load_feedback
from whet.general import Ability, ability
from whet.memory import Known, as_task, at_hand, carried, known, remember
from whet.methods import Method, Run, make
from whet.methods.continual import BY_ROWS, Continual
from whet.methods.reward import metric_of
from whet.metrics import Metric, get
from whet.progress import apart, figure
from whet.retention import ALLOWED, Lost, Stream, forgetting, loss, moved_by, refused, stream
from whet.scorecard import Scorecard, evaluate, split_seed
from whet.search.out import made_for
from whet.search.recipe import Recipe
from whet.search.training import calibration
from whet.splits import shared_order
from whet.system import System
from whet.task import Example, Splits, Task

LOOKED_AT = 64  # rows that tell whether to calibrate anew
WORDIER = 3.0  # words more that are no long-windedness yet, of answers that were short or empty
LONGER, DRIFTED = 1.5, 0.5  # feedback may make answers so many times as long, and move them so many nats a token


@dataclass(frozen=True)
class Update:
    """A System that was taught more: what it gained on the task, and what the earlier ones lost.

    `paired` compares after with before on the task's held-out rows; `length` is words per answer, before and after;
    `drift` the KL divergence from before, in nats per token, and `from_base` that from the model before all updates;
    None where no held-out row has an answer to take it from. `general`: what it did to all else; None where the
    weights are the same. `stream`: all updates of the System so far; `metrics`: by task, what it is scored by.
    `agreement`: how far the judge of a win rate agrees with the held-out pairs; None without any. `controlled`: the win
    rate after, at equal length, with its 95 % interval; None where another metric is measured.
    `dropped` are rows and judgements that leak, as (id, why); `unused` the judgements that dpo finds no pair for.
    `refused` says why it should not be used; empty: it may.
    """

    system: System
    before: Scorecard
    after: Scorecard
    paired: stats.Paired
    lost: tuple[Lost, ...]
    unmeasured: tuple[str, ...]
    length: tuple[float, float]
    drift: float | None
    from_base: float | None
    general: Ability | None
    stream: Stream
    metrics: Mapping[str, str]
    agreement: Agreement | None
    controlled: tuple[float, float, float] | None
    dropped: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]
    refused: str
    notes: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """As `whet update --json` prints it."""
        return {
            "fingerprint": self.system.fingerprint, "metric": self.before.metric,
            "before": self.before.score, "after": self.after.score, **asdict(self.paired),
            "earlier": [asdict(one) for one in self.lost], "unmeasured": list(self.unmeasured),
            "length": list(self.length), "drift": self.drift, "from_base": self.from_base,
            "general": self.general and asdict(self.general),
            "stream": asdict(self.stream), "agreement": self.agreement and list(self.agreement.accuracy),
            "controlled": self.controlled and list(self.controlled),
            "refused": self.refused,
            "dropped": [{"id": name, "why": why} for name, why in self.dropped], "unused": list(self.unused),
            "recipe": self.system.card["recipe"], "notes": dict(self.notes),
        }  # fmt: skip


def lines(made: Update, task: str) -> list[str]:
    """What an update came to, as `whet update` prints it."""
    paired, name = made.paired, made.before.metric
    before, after = figure(made.before.score, name), figure(made.after.score, name)
    said = [f"{task}: {before} to {after} ({name}, {paired.n} rows), "
            f"{apart(paired.difference, paired.low, paired.high, name)}", *map(str, made.lost)]  # fmt: skip
    said += [f"feedback {note}" for note in made.notes.get("feedback", ())]
    if made.dropped:
        said.append(f"dropped  {len(made.dropped)} rows that leak; the first, {', '.join(made.dropped[0])}")
    if made.unused:
        said.append(f"unused   {len(made.unused)} judgements without a counterpart; to learn from them: whet apply kto")
    if calibration := made.notes.get("calibration"):
        why = {"gone": "it scores more without", "no prompts": "there are no train prompts to tell it from"}
        said.append(f"calibrated {'anew' if calibration == 'anew' else f'no longer: {why[calibration]}'}")
    if unprotected := made.notes.get("unprotected"):
        said.append(f"nothing of {', '.join(unprotected)} was replayed: none of its rows is kept, or still true")
    return said + told(made)


def told(made: Update) -> list[str]:
    """Drift, general ability, a win rate at equal length, its judge, and the matrix of all updates, as lines."""
    lines = ["drift not measured: no answers"]
    if made.drift is not None:
        lines = [f"drift {made.drift:.3f} nats a token, {made.from_base:.3f} from the base"]
    lines += [str(made.general)] if made.general else []
    lines += [f"{name}: no rows to measure it on; name its folder in earlier: of task.yaml" for name in made.unmeasured]
    if made.controlled is not None:
        lines.append("win rate at equal length {:.1f} % [{:.1f}, {:.1f}]".format(*(100 * v for v in made.controlled)))
    if made.before.metric == "win_rate":
        lines.append(str(made.agreement or UNCHECKED))
    found, width = made.stream, max(9, *map(len, made.stream.tasks)) + 2
    if found.average is None or found.backward is None or found.forgetting is None:
        return lines
    lines.append("".join(f"{name:>{width}}" for name in ("scores", *found.tasks)))
    for n, row in enumerate(found.matrix):
        when = f"update {n}" if n else "start"
        cells = (figure(score, made.metrics.get(t, "")) for t, score in zip(found.tasks, row, strict=True))
        lines.append("".join(f"{cell:>{width}}" for cell in (when, *cells)))
    # Perplexities stand in no figure.
    counted = [n for n, t in enumerate(found.tasks) if made.metrics.get(t) != "perplexity"]
    shares = all(abs(row[n] or 0.0) <= 1 for row in found.matrix for n in counted)
    unit, points = (100.0, " points") if shares else (1.0, "")
    forward = "" if found.forward is None else f", forward {unit * found.forward:+.1f}"
    lost = f"{unit * found.forgetting:.1f}{points} lost"
    lines.append(f"average {unit * found.average:.1f}; of the earlier tasks, {lost} from their best, "
                 f"backward transfer {unit * found.backward:+.1f}{forward}")  # fmt: skip
    return lines


def asked(made: Update, out: Path) -> str:
    """As which task an updated System answers, and how the others that it knows are asked; empty where it knows one."""
    own = str(made.system.card["task"])
    others = [name for one in made.system.card["memory"] if (name := str(one["name"])) != own]
    return f"whet chat {out} answers as {own}; for {' or '.join(others)}: whet evaluate {out} TASK" if others else ""


def own(system: System, task: Task) -> bool:
    """Whether a task is the one that a System answers already, by its name or by how it is asked.

    Tasks without instruction and labels are all asked alike: only their names tell them apart.
    """
    asked = (system.instruction, system.decoding.labels)
    return system.card.get("task") == task.name or any(asked) and asked == (task.instruction, task.labels)


def check(method: Method, system: System, task: Task, splits: Splits | None = None) -> None:
    """Raise MethodError where a method would teach a System one task while it is asked as another.

    That goes for methods that write how a task is answered; what only adds sources or makes the model smaller may.
    TaskError where it learns from judgements, and all are about prompts that are held out.
    """
    if splits is not None and "feedback" in method.needs:
        usable(task.judged, splits)
    name, parts = system.card.get("task"), {"prompt", "demonstrations", "decoding"} & set(method.writes)
    if name and parts and not own(system, task) and task.name not in {one.name for one in carried(system)}:
        raise MethodError(
            f"the System is asked as {name}, not as {task.name}", expected="its own task, or a base model",
            found=f"another instruction and labels ({', '.join(system.decoding.labels)[:60] or 'none'})",
            do=f"teach it with whet update; where both are one task, write name: {name} in task.yaml",
        )  # fmt: skip


def with_made(task: Task, system: System, folder: Path) -> tuple[Task, str]:
    """The task with the one that the System in a folder was made for, and that one's earlier ones, as earlier ones; and
    a line that says so.

    As it is, and "", where it names earlier tasks itself, no such task lies there any more, or it is that task.
    """
    made = None if task.earlier else made_for(folder, task.trusted)
    here = task.folder.resolve()
    if made is None or made.name != system.card.get("task") or made.folder.resolve() == here:
        return task, ""
    before = tuple(folder for folder in made.earlier if folder.resolve() != here)
    said = f"{made.name} ({made.folder}), which the System was made for, is an earlier task of {task.name}"
    said += f"; so is what that kept: {', '.join(folder.name for folder in before)}" if before else ""
    return replace(task, earlier=(made.folder, *before)), f"{said}; to say otherwise: earlier: in task.yaml"


def begin(system: System, task: Task, run: Run) -> System:
    """The System asked the task that it is to learn; its card then holds its own task, too, as one to keep.

    Newer data may bring new labels: they stand behind those that it answers from. Raises MethodError for answers that
    it can never give.
    """
    if own(system, task):
        return _widened(system.uncalibrated, task)
    kept, name = {one.name: one for one in carried(system)}, system.card.get("task")
    known_by = Known(name or "what it knew", "accuracy" if system.decoding.closed else "token_f1", system)
    memory = [one.entry() for one in {known_by.name: known_by, **kept}.values()]
    new = _widened(kept[task.name].on(system), task) if task.name in kept else None
    new = new or as_task(system, task, run.session(system.model))
    return replace(new, card={"task": name, "memory": memory}, beside=at_hand(system))


def _widened(system: System, task: Task) -> System:
    """The System with the task's labels beside its own."""
    old = system.decoding
    new = tuple(label for label in task.labels if label not in old.labels)
    rows = [e for e in (*task.train, *task.dev, *task.test) if e.completion and not e.choices]
    other = next((e.completion for e in rows if e.completion not in (*old.labels, *new)), None)
    taken = next((label for label in new if label in old.words), None)
    if old.closed and old.labels and (other is not None or taken is not None):
        raise MethodError(
            f"the System answers {task.name} out of its labels alone", expected=", ".join(old.labels)[:120],
            found=f"{taken!r}, its word for another" if other is None else repr(other[:60]),
            do="name all labels in task.yaml, or give the task another name and instruction",
        )  # fmt: skip
    if not new or not old.labels:
        return system
    words = (*old.words, *new) if old.words else ()
    return replace(system, decoding=replace(old, labels=(*old.labels, *new), words=words, prior=()))


def update(
    system: System, task: Task, run: Run, settings: Mapping[str, Any] | None = None, feedback: Path | None = None
) -> Update:
    """Teach a System a task's train rows (by `continual`) or the judgements of a file (by `dpo`; by `kto` where most
    are thumbs without a counterpart).

    Earlier tasks are kept by their `earlier:` folders, or by the rows that the System carries. A task that it answers
    already must not lose against the System as it was given; after feedback, answers must not grow or drift much,
    either. Raises MethodError or TaskError for what cannot be learnt or measured.
    """
    settings, by = dict(settings or {}), split_seed(task, run.seed, system)
    if feedback is None:
        splits = task.split(by)
    else:
        task, splits = _told(task, feedback, settings, by, run)
    start = begin(system, task, run)
    given = system if own(system, task) else start
    rows = splits.confirm or splits.select
    if not rows:
        raise MethodError("nothing to measure on", expected="test rows, or enough train rows", found="none")
    tasks = known(start, splits.learnable, run.session(start.model), split="test", seed=run.seed)
    method, unused = _method(settings, splits, tasks, feedback is not None, run)
    metric = metric_of(task, given, run, splits)
    after = _calibrated(given, method.apply(start, splits.learnable, run), splits, metric, run)
    cards = _cards(given, after, rows, metric, run)
    itself = metric.name != "win_rate" and (feedback is not None or own(system, task))
    lost = _lost((start, given, after), task, tasks, (*cards, metric) if itself else None, run)
    length = _length(cards[0]), _length(cards[1])
    unseen = (*splits.confirm, *splits.select)
    moved = moved_by(start, after, unseen, run)
    general = None if after.model == start.model else ability(start, after, run)
    base = _beneath(start, run)
    from_base = moved if base is None or moved is None else moved_by(base, after, unseen, run)
    ahead = None if own(system, task) else _ahead(base, cards[0], rows, metric, run)
    memory = remember(after, splits.learnable, tasks, splits.select or rows, seed=run.seed)
    found = [one for one in lost if one.task in {task.name, *(t.name for t in tasks)}]
    scores = {e.task: e.before for e in found}, {e.task: e.after for e in found} | {task.name: cards[1].score}
    card = _history(system, method, task, cards[1], memory, scores, ahead, by)
    falling = {one.name for one in tasks if not get(one.metric, one.folder, task.trusted).higher_is_better}
    falling |= set() if metric.higher_is_better else {task.name}
    measured = [one for one in card["taught"] if "scores" in one]
    updates = stream([one["scores"] for one in measured], falling, [one.get("ahead") for one in measured])
    compared = stats.compare(cards[0].outcomes, cards[1].outcomes, metric, run.seed)
    named = {one.task for one in lost}
    why = _refused(cards, lost, metric, task, run)
    why += _overdone(length, moved) if feedback is not None else []
    return Update(
        replace(after, card=card), *cards, compared, lost,
        tuple(one.name for one in tasks if not one.held and one.name not in named), length, moved,
        from_base, general, updates, {one.name: one.metric for one in tasks} | {task.name: metric.name},
        agreed(metric.judge, rows, run.seed) if isinstance(metric, Versus) else None,
        controlled(cards[1].outcomes, run.seed) if isinstance(metric, Versus) else None,
        splits.dropped, unused, "; ".join(why),
        {k: v for k, v in run.notes.items() if k != "curves"},
    )  # fmt: skip


def _told(task: Task, feedback: Path, settings: dict[str, Any], seed: int, run: Run) -> tuple[Task, Splits]:
    """The task with the judgements of a file beside its own, and its parts: what is learnt from are those of the file.

    The judge may learn from the task's own, too: those of a file are few. `weights` is taken out of the settings, and
    before anything is set aside: an annotator who is left out is to judge nothing, either.
    """
    weights = vars(make("kto", {"weights": settings.pop("weights", ())}))["weights"]
    given, said = load_feedback(feedback.parent, feedback.name)
    mine = weighted(given, weights, [one.annotator for one in task.judged])
    known = {replace(one, id="") for one in given}
    own = [one for one in task.judged if replace(one, id="") not in known]
    task = replace(task, judged=(*weighted(own, weights, [one.annotator for one in given]), *mine))
    run.notes |= {"weights": list(weights)} if weights else {}
    run.notes |= {"feedback": list(said)} if said else {}
    splits, learnt = task.split(seed), set(mine)
    usable(mine, splits)
    told = tuple(one for one in splits.learnable.judged if one in learnt)
    if not told and learnt & {*splits.judging}:
        raise TaskError(
            f"all {len(mine)} judgements of {feedback.name} fall to the judge, which must not have seen what is learnt",
            expected="judgements on more prompts", found="none that is left to learn from",
            do="judge answers to other prompts too: about one prompt in three is the judge's",
        )  # fmt: skip
    return task, replace(splits, learnable=replace(splits.learnable, judged=told))


def _length(card: Scorecard) -> float:
    """Words per answer."""
    return sum(words(o.answer) for o in card.outcomes) / card.n


def _refused(
    cards: tuple[Scorecard, Scorecard], lost: Sequence[Lost], metric: Metric, task: Task, run: Run
) -> list[str]:
    """Why the new System should not be used, by what was lost."""
    why = [said] if (said := refused(lost)) else []
    if metric.name == "win_rate":
        margin = (ALLOWED if task.limits.forgetting is None else task.limits.forgetting) / 100
        if not stats.not_worse(cards[0].outcomes, cards[1].outcomes, metric, margin, run.seed).ok:
            why.append(f"the win rate fell from {100 * cards[0].score:.1f} to {100 * cards[1].score:.1f}")
    elif all(one.task != task.name for one in lost):  # what it is to be taught must not be lost by that
        paired = stats.compare(cards[0].outcomes, cards[1].outcomes, metric, run.seed)
        if paired.high < 0:
            verb = "fell" if metric.higher_is_better else "rose"
            why.append(f"{task.name} itself {verb} from {figure(cards[0].score, metric.name)} to "
                       f"{figure(cards[1].score, metric.name)}")  # fmt: skip
    return why


def _overdone(length: tuple[float, float], moved: float | None) -> list[str]:
    """Why a System should not be used that judgements made longer-winded, or moved too far."""
    why = []
    if length[1] > max(LONGER * length[0], length[0] + WORDIER):
        why.append(f"answers grew from {length[0]:.0f} to {length[1]:.0f} words")
    if moved is not None and moved > DRIFTED:
        why.append(f"answers drifted by {moved:.2f} nats a token; {DRIFTED:g} allowed")
    return why


def _method(
    settings: Mapping[str, Any], splits: Splits, tasks: Sequence[Known], judged: bool, run: Run
) -> tuple[Method, tuple[str, ...]]:
    """What teaches, and the judgements that it leaves unused.

    Newer data for a task that nothing else is known beside, and no rows are kept of, is trained on as it is.
    """
    by = learner(splits.learnable.judged) if judged else "continual"
    method = make(by, settings)
    if isinstance(method, Continual) and method.strategy in BY_ROWS and not tasks:
        run.notes["unprotected"] = [splits.learnable.name]
        method = replace(method, strategy="sequential")
    return method, tuple(r.id for r in paired(splits.learnable.judged)[1] if by == "dpo")


def _calibrated(given: System, taught: System, splits: Splits, metric: Metric, run: Run) -> System:
    """The System calibrated anew where it was before and does not score worse so; else as it is.

    That is told on rows to select by; where these are what is measured on, on those it learnt from.
    """
    if not given.decoding.prior:
        return taught
    data, gone = splits.learnable, "gone"
    every = (splits.select if splits.confirm else ()) or data.train
    rows = shared_order(every, bool(given.decoding.closed), run.seed)[:LOOKED_AT]  # files are often sorted by label
    try:
        made = make("calibrate", calibration(data)).apply(taught, data, run)
    except MethodError:  # no prompts to tell it from
        run.notes["calibration"] = "no prompts"
        return taught
    plain, anew = (card.score for card in _cards(taught, made, rows, metric, run))
    better = anew >= plain if metric.higher_is_better else anew <= plain
    run.notes["calibration"] = "anew" if better else gone
    return made if better else taught


def _card(one: System, rows: Sequence[Example], metric: Metric, run: Run) -> Scorecard:
    return evaluate(one, rows, metric, session=run.session(one.model), split="test", seed=run.seed,
                    store=run.store, progress=run.progress("answering"))  # fmt: skip


def _cards(
    first: System, second: System, rows: Sequence[Example], metric: Metric, run: Run
) -> tuple[Scorecard, Scorecard]:
    return _card(first, rows, metric, run), _card(second, rows, metric, run)


def _lost(
    systems: tuple[System, System, System], task: Task, tasks: Sequence[Known],
    itself: tuple[Scorecard, Scorecard, Metric] | None, run: Run,
) -> tuple[Lost, ...]:  # fmt: skip
    """What each earlier task lost by the systems (start, as given, after), and what the new one did, `itself`.

    The others are asked alike before and after. A task that the System answered already, its older rows too, is
    answered by the System as it was given and as it is now, calibration and all: these are what its user has.
    """
    (start, given, after), allowed = systems, task.limits.forgetting
    guarded = [one for one in tasks if itself is None or one.name != task.name]
    found = list(forgetting(start, after, guarded, run, allowed, task.trusted))
    if itself is None:
        return tuple(found)
    margin = ALLOWED if allowed is None else allowed
    for one in tasks:
        if one.name == task.name and one.held:
            metric = get(one.metric, one.folder, task.trusted)
            older = _cards(given, after, one.held, metric, run)
            found.append(loss(f"{one.name}, older rows,", *older, metric, margin, run.seed))
    return (*found, loss(task.name, *itself, margin, run.seed))


def _beneath(start: System, run: Run) -> System | None:
    """The System on the model before all that it was taught; None where that is the one that it has."""
    whole = tuple(t for t in start.model.standing if t.kind == "model")  # a smaller model is what there is
    base = replace(start, model=replace(start.model, transforms=whole))
    if base.model == start.model:
        return None
    run.sessions.pop(start.model)  # two models at a time are enough
    run.tidy()
    return base


def _ahead(base: System | None, before: Scorecard, rows: Sequence[Example], metric: Metric, run: Run) -> float | None:
    """Forward transfer: what the System scored on a task that it had not learnt, more than its base does."""
    if base is None or metric.name == "win_rate" or not metric.higher_is_better:
        return None
    return before.score - _card(base, rows, metric, run).score


def _history(
    old: System, method: Method, task: Task, card: Scorecard, memory: list[dict[str, Any]],
    scores: tuple[Mapping[str, float], Mapping[str, float]], ahead: float | None,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Where the new System comes from, what it and its tasks scored, before and after, and what it carries."""
    recipe = Recipe((method,)).name
    this = {"task": task.name, "data": task.fingerprint, "recipe": recipe, "from": old.fingerprint,
            "scores": list(scores), "ahead": ahead}  # fmt: skip
    taught = [*old.card.get("taught", ()), this]
    return {"task": task.name, "recipe": recipe, "scorecard": card.record(), "taught": taught, "memory": memory,
            **old.learnt, "splits": {**old.split_seeds, task.name: seed}}  # fmt: skip
