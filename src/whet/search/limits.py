"""Limits: where the task states some, the finalist is made smaller until it keeps within them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from whet.errors import MethodError, WhetError
from whet.methods import Method
from whet.methods.prune import Prune
from whet.methods.rl import READ
from whet.progress import clock
from whet.retention import ALLOWED, loss
from whet.scorecard import Scorecard, measure, size_bytes
from whet.search import training
from whet.search.recipe import Recipe, parse
from whet.system import System
from whet.task import Limits

if TYPE_CHECKING:
    from whet.search import _Job
    from whet.search.race import Trial

LOOKED_AT = 2  # other arms that are measured against the limits
SECONDS = 120.0  # set aside for making it smaller, or a quarter of the budget where that is less
SMALLER = (  # what is tried, the least loss first
    "quantize",
    "quantize(bits=4)",
    "prune(vocabulary=true)+quantize(bits=4)",
    "prune(width=0.6)+distill+quantize(bits=4)",
    "prune(width=0.4)+distill+quantize(bits=4)",
    "prune(layers=0.75)+distill+quantize(bits=4)",  # where there is no rule for the width
    "prune(layers=0.5,width=0.5)+distill+quantize(bits=4)",
    "share+distill+quantize(bits=4)",
)

LIGHT = "(activations=false)"  # rounding what is multiplied keeps a second layout of the weights: no memory is saved
USED = {"size": "size_bytes", "memory": "memory_bytes", "latency": "latency_ms"}  # limits, and what is measured
PACKED = "quantize(bits=4)"  # of the sizes it leaves, those of others are told before they are taught
CONTEXT = (  # first, where much is read or written before each answer
    "distill",
    "distill+quantize",
    "distill+quantize(bits=4)",
    "distill+prune(vocabulary=true)+quantize(bits=4)",
)


def limited(limits: Limits) -> bool:
    """Whether a System may be too large or too slow."""
    return any(v is not None for v in (limits.size, limits.memory, limits.latency))


def beyond(limits: Limits, card: Scorecard) -> str:
    """In what a measured System goes beyond the limits, in words; empty where it keeps within them."""
    found = []
    if limits.size is not None and card.size_bytes is not None and card.size_bytes > limits.size:
        found.append(_bytes(card.size_bytes, limits.size, " on disk"))
    if limits.memory is not None and card.memory_bytes is not None and card.memory_bytes > limits.memory:
        found.append(_bytes(card.memory_bytes, limits.memory, " of memory"))
    if limits.latency is not None and card.latency_ms is not None and card.latency_ms > limits.latency:
        found.append(f"{card.latency_ms:.0f} ms an answer, {limits.latency:.0f} allowed")
    return ", ".join(found)


def kept(limits: Limits, card: Scorecard, base: Scorecard) -> dict[str, Any] | None:
    """What the task allows, what is handed over uses and what the base does: bytes and ms; None without limits.

    `met` is None where something is not known and nothing is known to be beyond.
    """
    limited = {name: most for name in USED if (most := getattr(limits, name)) is not None}
    used, before = ({name: getattr(one, USED[name]) for name in limited} for one in (card, base))
    met = False if beyond(limits, card) else None if None in used.values() else True
    return {"allowed": limited, "used": used, "base": before, "met": met} if limited else None


def _bytes(used: float, allowed: float, where: str = "") -> str:
    """What is used and what is allowed, in the unit that suits the latter."""
    unit, size = ("MB", 1e6) if allowed >= 1e6 else ("KB", 1e3)
    return f"{used / size:.1f} {unit}{where}, {allowed / size:.1f} allowed"


def _excess(limits: Limits, card: Scorecard) -> float:
    """How many times the worst limit is used."""
    pairs = ((card.size_bytes, limits.size), (card.memory_bytes, limits.memory), (card.latency_ms, limits.latency))
    return max((have / most for have, most in pairs if have is not None and most), default=0.0)


def _steps(limits: Limits, system: System) -> tuple[str, ...]:
    """What is tried. Answers that take long for what stands around them are first taught to do without it."""
    steps: tuple[str, ...] = SMALLER
    if limits.latency is not None and (
        system.demonstrations.pool or system.sources or system.decoding.after or system.decoding.votes > 1
    ):
        # A student of another model keeps its context unless it is told not to.
        steps = (*CONTEXT, *(one.replace("+distill+", "+distill(clear=context)+") for one in SMALLER))
    if limits.memory is None:
        return steps
    return tuple(text for one in steps for text in ((one, one + LIGHT) if one.endswith("quantize") else (one,)))


def smaller(recipe: Recipe, step: Recipe) -> Recipe:
    """A recipe with the methods that make it smaller behind those that train, and calibration last; but a student
    learns from a teacher that is calibrated.

    What had made it smaller makes way where it cannot stand before the step. So does a distillation before another,
    which then clears as much, and one that healed what makes way.
    """
    gone = [m for m in recipe.methods if m.family == "compression" and not _before(m, step)]
    at = next((n for n, m in enumerate(recipe.methods) if m.name == "distill"), 0)
    taught: Any = next((m for m in recipe.methods if m.name == "distill"), None)
    methods, first, learnt = step.methods, step.methods[0].name == "distill", recipe.methods[:at]
    if taught is not None:
        heals = any(m.family == "compression" for m in learnt)
        cleared = taught.clear or ("none" if heals or taught.teacher else "context")
        if heals and cleared == "none" and not taught.teacher and any(m in gone for m in learnt):
            gone.append(taught)
        if taught in gone:
            methods = tuple(_clearing(m, cleared) if n else m for n, m in enumerate(methods))
            learnt = ()
    if first:
        learnt = recipe.methods
    last = tuple(m for m in recipe.methods if m.name == "calibrate" and m not in learnt)
    return Recipe((*(m for m in recipe.methods if m not in (*gone, *last)), *methods, *last))


def _clearing(method: Any, cleared: str) -> Method:
    """A method, where it is a distillation of whose clearing nothing is said, with `cleared`."""
    told = method.name == "distill" and not method.clear and cleared != "none"
    return cast("Method", replace(method, clear=cleared) if told else method)


def _before(method: Method, step: Recipe) -> bool:
    """Whether a method can stand before those of a step."""
    try:
        Recipe((method, *step.methods)).check()
    except MethodError:
        return False
    return True


def within(job: _Job, finalist: Trial | None) -> Trial | None:
    """The finalist, or what it becomes when made small enough; the nearest, where nothing keeps within the limits.

    Trials beyond the limits, or that cost an earlier task too much, are marked as refused, with the reason.
    """
    limits, race = job.task.limits, job.race
    start = finalist or race.base
    if limited(limits) and not race.select:
        job.notes.append("nothing is made smaller for the limits: there are no rows to select by")
    if not limited(limits) or start is None or start.card is None or start.system.model.remote:
        return finalist
    race.seconds, race.aside = race.seconds + race.aside, 0.0
    try:
        used = _measured(job, start.system, start.card)
    except WhetError as error:
        job.notes.append(f"nothing is made smaller for the limits: {start.name} could not be measured: {error}")
        return finalist
    over = beyond(limits, used)
    job.tight = bool(over) if start is race.base else _too_much(job, race.base)
    if not over:
        return finalist
    start = race.mark(start, status="refused" if finalist else start.status, why=over, card=used)
    # The bound of a training is part of what it is known by: with another one it would be trained anew.
    tokens = start.notes.get("allowed") or int(max(0.0, race.left) * race.speed(start.system).train)
    ladder = _Ladder(job, start, tokens, start, _excess(limits, used))
    small = next(filter(None, map(ladder.climb, _candidates(job, start, _steps(limits, start.system)))), None)
    small = small or ladder.smallest()
    if small is not None:
        return _better(job, small, finalist)
    return _other(job, finalist) or _nearest(job, finalist, start, ladder.nearest)


_Step = tuple[str, tuple[Method, ...], Recipe]  # as it is written, its methods, and the recipe that it makes


@dataclass
class _Ladder:
    """The steps that make a trial smaller, and what has come of them so far."""

    job: _Job
    start: Trial
    tokens: int  # that its trainings may take
    nearest: Trial
    least: float  # how many times the nearest uses its worst limit
    packed: float = 1.0  # of the bytes, what 4 bits leave
    taught: int = 0  # the bound of the student without context, who is trained once
    vain: bool = False  # that student did not suffice
    tried: bool = False
    healed: bool = False  # a student with less than all weights was taught
    large: list[tuple[float, _Step, dict[str, str]]] = field(default_factory=list)  # bytes expected; as left out

    def climb(self, step: _Step, *, even: bool = False) -> Trial | None:
        """Try a step, `even` one that is expected to be too large: its trial where that keeps within the limits."""
        job, (text, wished, recipe) = self.job, step
        race, opened, first = job.race, set(job.run.sessions), wished[0].name == "distill"
        most = _healing(job, wished, self.start, self.tokens)
        most = self.taught or most if first else most
        why, size = self._hindered(wished, most, even)
        if why:
            job.skipped.append({"method": recipe.name, "why": why})
            self.large += [(size, step, job.skipped[-1])] if size else []
            return None
        self.taught, self.tried = most or 0 if first else self.taught, True
        self.healed = self.healed or (most is not None and not first)
        origin = next((b for b in job.bases if b.model.content == self.start.system.model.content), job.bases[0])
        trial = race.enter(recipe, origin, tokens=self.tokens, label=self.start.label, healing=most)
        if (found := _told(job, trial)) is not None and (kept := self._kept(text, trial, found, first)) is not None:
            return kept
        for model in set(job.run.sessions) - opened:  # what was tried in vain holds no memory
            job.run.sessions.pop(model).close()
        job.run.tidy()
        return None

    def smallest(self) -> Trial | None:
        """Try the smallest student where all were expected to be too large: the size is an estimate, and it may be the
        nearest.
        """
        if not self.large or self.healed:
            return None
        _, step, told = min(self.large, key=lambda one: one[0])
        self.job.skipped.remove(told)
        return self.climb(step, even=True)

    def _hindered(self, wished: tuple[Method, ...], most: int | None, even: bool) -> tuple[str, float]:
        """Why a step is not tried, empty where it is; and the bytes of a student that would be too large, else 0."""
        job, allowed = self.job, self.job.task.limits.size or 0
        if self.vain and most is None:
            return "without its context it was beyond the limits, too", 0.0
        if (self.tried and job.race.left <= 0) or (most is not None and most < training.LEAST_TOKENS):
            return f"only {clock(max(0.0, job.race.left))} of the budget would be left for it", 0.0
        if not even and allowed and (size := _expected(job, self.start, wished, self.packed)) > allowed:
            return f"it would take about {_bytes(size, allowed)}", size
        return "", 0.0

    def _kept(self, text: str, trial: Trial, found: Scorecard, first: bool) -> Trial | None:
        """A trial, measured, where it keeps within the limits and the earlier tasks; else it is marked as refused."""
        from whet.search import _keeping

        job, start = self.job, self.start.card
        trial = job.race.mark(trial, card=found)
        if text.removeprefix("distill+") == PACKED and found.size_bytes and start and start.size_bytes:
            self.packed = found.size_bytes / start.size_bytes
        over, excess = beyond(job.task.limits, found), _excess(job.task.limits, found)
        self.vain = bool(over) if first else self.vain
        if not over or excess < self.least:  # else it is not handed over, whatever it forgets
            trial = _keeping(job, trial)
        keeps = trial.status != "refused"
        if keeps and not over:
            return trial
        trial = job.race.mark(trial, status="refused", why=over or trial.why)
        if keeps and excess < self.least:
            self.nearest, self.least = trial, excess
        return None


def _candidates(job: _Job, start: Trial, steps: Sequence[str]) -> Iterator[_Step]:
    """The steps that may be tried: each with those of its methods that were asked for, and the recipe they make."""
    from whet.compress.vocabulary import trimmable

    trims = trimmable(getattr(job.run.session(start.system.model), "tokenizer", None))
    for text in steps:
        if not trims and "(vocabulary=true)" in text:  # it does nothing else
            continue
        whole = parse(text).methods if trims else tuple(map(_untrimmed, parse(text).methods))
        wished = tuple(m for m in whole if not job.wish.methods or m.name in job.wish.methods)
        if wished[:1] == whole[:1] and (recipe := smaller(start.recipe, Recipe(wished))) != start.recipe:
            yield text, wished, recipe


def _untrimmed(method: Method) -> Method:
    """A method that prunes without trimming a vocabulary, where it prunes anything else."""
    more = isinstance(method, Prune) and (method.layers or method.width < 1)
    return replace(cast(Prune, method), vocabulary=False) if more else method


def _nearest(job: _Job, finalist: Trial | None, start: Trial, nearest: Trial) -> Trial | None:
    """What is handed over where no arm keeps within the limits: the base if it does, else what comes nearest."""
    if not job.tight:
        job.notes.append(f"no candidate keeps within the limits, and the base does; the nearest was {nearest.name} "
                         f"({nearest.why})")  # fmt: skip
        return None
    job.notes.append(f"nothing that was tried keeps within the limits; the nearest is handed over: {nearest.name} "
                     f"({nearest.why})")  # fmt: skip
    if nearest is not start:
        job.whole = start
        job.notes.append(_cost(job, nearest, start))
    return nearest if nearest is not job.race.base else finalist


def _expected(job: _Job, start: Trial, wished: tuple[Method, ...], packed: float) -> float:
    """Bytes that a student will take, about: those of its untaught model times what packing leaves; else 0."""
    cut = tuple(m for m in wished if m.name in ("prune", "share"))
    if job.task.limits.size is None or len(cut) == len(wished) or not any(m.name == "distill" for m in wished):
        return 0.0
    try:  # the cut is kept, so that the arm finds it done
        with job.race.aside_of_trials(start.system, Recipe(cut).name) as run:
            made = Recipe(cut).run(start.system, job.race.data, run)
    except WhetError:
        return 0.0  # the arm says why
    return (size_bytes(made) or 0) * (packed if any(m.name == "quantize" for m in wished) else 1.0)


def _healing(job: _Job, wished: tuple[Method, ...], start: Trial, most: int) -> int | None:
    """The bound of a distillation that is new: `most` tokens, and no more than there is time for; None without one.

    Trainings before it keep the bound that they are known by.
    """
    if not any(m.name == "distill" for m in wished):
        return None
    left = max(0.0, job.race.left) * (1 - training.VALIDATED)
    # Beside its own steps: the teacher's states are read where layers go or are shared, and samples of free text.
    matched = any(m.name == "share" or getattr(m, "layers", 0) for m in wished)
    beside = 1 + READ * (matched + (not job.task.closed))
    return min(most, int(left / beside * job.race.speed(start.system).train))


def _told(job: _Job, trial: Trial) -> Scorecard | None:
    """A trial's card with what the limits are about; None, and the trial refused, where that cannot be measured."""
    if trial.card is None:
        return None
    try:
        return _measured(job, trial.system, trial.card)
    except WhetError as error:  # a process that was killed for its memory, say
        job.race.mark(trial, status="refused", why=f"could not be measured: {error}")
        return None


def _too_much(job: _Job, trial: Trial | None) -> bool:
    """Whether a trial's System goes beyond the limits, or cannot be measured against them."""
    if trial is None or trial.card is None:
        return False
    try:
        return bool(beyond(job.task.limits, _measured(job, trial.system, trial.card)))
    except WhetError as error:
        job.notes.append(f"{trial.name} could not be measured against the limits: {error}")
        return True


def _better(job: _Job, small: Trial, finalist: Trial | None) -> Trial:
    """The one that was made small enough, or another arm that scored more and keeps within the limits as it is."""
    if (other := _other(job, finalist, job.race.merit(small))) is not None:
        return other
    whole = finalist or job.race.base
    if whole is not None:
        job.whole = whole
        job.notes.append(_cost(job, small, whole))
    return small


def uncompressed(job: _Job, finalist: Trial | None) -> Trial | None:
    """The trial without compression that a compressed finalist was made of; None where there is none."""
    start = job.whole or finalist
    methods = start.recipe.methods if start else ()
    cut = [n for n, m in enumerate(methods) if m.family == "compression" and m.name != "distill"]
    if start is None or not cut:  # a distillation alone makes nothing smaller
        return job.whole
    # One that stands behind what was cut has healed it; one before has taught a student that could be whole.
    kept = tuple(m for n, m in enumerate(methods) if n < cut[0] or m.family != "compression")
    return next((t for t in job.race.trials if t.card and (t.recipe.methods, t.label) == (kept, start.label)), None)


def _cost(job: _Job, small: Trial, whole: Trial) -> str:
    """What being smaller costs on select, against the trial that it was made of, by `stats.not_worse`."""
    if small.card is None or whole.card is None or small.examples != whole.examples:
        return f"what {small.name} costs against {whole.name} was not measured on the same rows"
    found = loss(small.name, whole.card, small.card, job.metric, ALLOWED, job.wish.seed)
    return f"against {whole.name}, on select, {found}: {'not worse' if found.ok else 'worse'}"


def _other(job: _Job, finalist: Trial | None, than: float | None = None) -> Trial | None:
    """The best arm that keeps within the limits as it is, and has a greater merit than this, or than the base."""
    from whet.search import _keeping

    race = job.race
    if than is None:
        than = race.merit(race.base) if race.base else float("-inf")
    whole = [t for t in race.trials if t.card and t.status == "done" and t.examples == len(race.select)]
    ahead = [t for t in whole if t is not race.base and race.merit(t) > than]
    for other in sorted(ahead, key=race.merit, reverse=True)[:LOOKED_AT]:
        if other is not finalist and not _too_much(job, other) and (kept := _keeping(job, other)).status != "refused":
            return kept
    return None


def _measured(job: _Job, system: System, card: Scorecard) -> Scorecard:
    """The card with what the limits are about; a process of its own is started only where they ask for one."""
    limits = job.task.limits
    job.watch.arm("measuring against the limits", job.race.left + job.race.aside)
    if limits.memory is None and limits.latency is None:
        return replace(card, size_bytes=size_bytes(system))
    return measure(card, system, job.race.select or job.splits.confirm)
