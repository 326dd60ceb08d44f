"""The race: which recipes are tried, on how many examples, and which of them goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from whet import stats
from whet.engine import Session, Spent
from whet.errors import DivergedError, StoreError, WhetError
from whet.methods import Run
from whet.metrics import Metric, comparable, in_points
from whet.progress import Standing, Watch
from whet.scorecard import Scorecard, alike, evaluate, join, reads_scores
from whet.search.budget import Rates
from whet.search.recipe import Recipe
from whet.store import Store
from whet.system import System, revive
from whet.task import Example, Learnable

RUNGS = (0.25, 0.5, 1.0)  # shares of select on which the cheap arms are compared
LEAST = 60  # examples of the first rung, where there are that many


def first_rung(count: int) -> float:
    """The share of `count` rows of select that the first rung looks at."""
    return min(1.0, max(LEAST, RUNGS[0] * count) / max(1, count))


@dataclass(frozen=True)
class Trial:
    """One recipe at its last rung: the System it made and what that scored on select."""

    recipe: Recipe
    system: System
    rung: int
    status: str  # done | dropped | failed | refused | truncated
    why: str
    examples: int
    card: Scorecard | None
    spent: Spent
    cost: float  # seconds at the calibrated rates: what it added, others having paid for what they share
    notes: dict[str, Any]
    against_base: stats.Paired | None
    label: str = ""
    forgetting: float | None = None  # points that the earlier task which lost most has lost
    making: float = 0.0  # seconds at the same rates, whoever paid: of its whole recipe,
    scoring: float = 0.0  # and of scoring what came of it

    @property
    def name(self) -> str:
        """What the trial is called: its recipe, and its model where several are raced."""
        return f"{self.recipe.name}{self.label}"

    @property
    def whole(self) -> float:
        """Seconds that the recipe takes by itself, where no other trial has paid for a part of it."""
        return self.making + self.scoring

    def standing(self, metric: Metric) -> Standing:
        """Its line of the leader board."""
        card = self.card
        score, low, high = (card.score, card.low, card.high) if card else (None, None, None)
        merit = (score or 0.0) if metric.higher_is_better else -(score or 0.0)
        return Standing(self.name, metric.name, self.status, score, low, high, self.examples, self.cost, merit)


@dataclass(frozen=True)
class Made:
    """What a recipe of so many methods made: the System, what they noted, and what they spent, whoever paid."""

    methods: int
    system: System
    notes: dict[str, Any]
    spent: Spent


@dataclass
class Race:
    """Everything the trials of one run share."""

    key: str
    data: Learnable
    select: list[Example]
    metric: Metric
    store: Store
    rates: Mapping[str, Rates]  # by the content of the model that a System started from
    seed: int
    seconds: float  # that the search may spend, confirm apart
    watch: Watch
    run: Run
    aside: float = 0.0  # seconds beside these, for making the finalist smaller: left until then
    deadline: float = float("inf")
    live: bool = False  # a source may have changed unseen: no trial is taken from the store
    trials: list[Trial] = field(default_factory=list)
    beside: Spent = field(default_factory=Spent)  # by no trial: on looking how large something would be
    costs: float = 0.0  # that, in seconds
    base: Trial | None = None
    made: dict[str, Made] = field(default_factory=dict)  # by recipe and start: what was made so far
    scored: dict[str, Scorecard] = field(default_factory=dict)  # by fingerprint: the beginning of select so far
    taken: dict[str, tuple[int, float]] = field(default_factory=dict)  # rows and seconds of scoring them

    @property
    def spent(self) -> float:
        """What all trials, and looking ahead, have cost so far, in seconds at the calibrated rates."""
        return sum(t.cost for t in self.trials) + self.costs

    @property
    def left(self) -> float:
        """What the search may still spend."""
        return self.seconds - self.spent

    @contextmanager
    def aside_of_trials(self, system: System, name: str) -> Iterator[Run]:
        """A Run of its own, whose cost is the race's without being a trial's.

        The cost is kept by `name`: a run that goes on finds what was made, and has as much left as the one before it.
        """
        run = replace(self.run, spent=Spent(), notes={})
        before, key = _opened(run), f"aside {name} {system.fingerprint}"
        kept = self.store.trial(self.key, key)
        try:
            yield run
            kept = kept or asdict(_since(run, before) + run.spent)
            self.store.keep_trial(self.key, key, kept)
        finally:
            spent = Spent(**kept) if kept else _since(run, before) + run.spent
            self.beside, self.costs = self.beside + spent, self.costs + self.speed(system).price(spent)

    def speed(self, system: System) -> Rates:
        """The rates of a System's model on this machine."""
        return self.rates[system.model.content]

    def record(self, trial: Trial) -> Trial:
        """Put a trial on the board in place of its earlier rung, whose cost it takes over."""
        old = next((t for t in self.trials if t.name == trial.name), None)
        if old is not None:
            self.trials.remove(old)
            trial = replace(trial, spent=old.spent + trial.spent, cost=old.cost + trial.cost,
                            making=old.making + trial.making, scoring=trial.scoring or old.scoring)  # fmt: skip
        self.trials.append(trial)
        self._show()
        return trial

    def enter(
        self, recipe: Recipe, start: System, *, rung: int = 0, examples: int | None = None, tokens: int | None = None,
        label: str = "", healing: int | None = None,
    ) -> Trial:  # fmt: skip
        """Run a recipe (or take its finished trial from the store) and score it on the first `examples` of select.

        `tokens` bounds its trainings, `healing` its distillation where that has a bound of its own.
        """
        rows = self.select[:examples] if examples else self.select
        files = recipe.files(self.data.folder)
        key = json.dumps([recipe.record, files, start.fingerprint, rung, len(rows), tokens, healing], sort_keys=True)
        self.watch.arm(f"{recipe.name}{label}", self.left + self.aside)
        kept = None if self.live else self._kept(key)
        if time.monotonic() > self.deadline and kept is None and recipe.methods:  # the base is always measured
            why = "the clock is far past the budget"
            old = next((t for t in self.trials if t.name == f"{recipe.name}{label}"), None)
            if old is not None:  # what it scored on fewer rows stands
                return self.mark(old, status="truncated", why=f"{why}: scored on {old.examples} examples")
            return self.record(Trial(recipe, start, rung, "truncated", why, 0, None, Spent(), 0.0, {}, None, label))
        run = replace(self.run, trained_tokens=tokens, spent=Spent(), notes={}, tell=self.watch.tell)
        run.session(start.model)
        before = _opened(run)
        made = _made(recipe, files, start, tokens, healing)
        begun = None if made in self.made else self.begun(recipe, start)
        try:
            if kept:
                system, spent, notes = self._revive(kept, start)
            else:
                system, spent, notes = self._apply(recipe, made, start, run, healing, begun)
            status, why = "done", ""
            self.made.setdefault(made, Made(len(recipe.methods), system, notes, spent))
            card = self._score(system, len(rows)) if rows else None
            if card and self.base and self.base.card:
                comparable(self.metric, self.base.card.outcomes, card.outcomes)
        except StoreError:
            raise  # a full disk is no property of the arm
        except WhetError as error:
            if not recipe.methods and self.base is None:  # nothing could be compared with it
                raise
            # What it has cost is spent; that it failed is not kept, since what was missing may be there next time.
            system, spent, card, begun = start, _since(run, before) + run.spent, None, None
            notes = {"trainings": run.notes.get("trainings", {})}  # which others may have paid for
            notes |= {"slower": error.slower} if isinstance(error, DivergedError) else {}
            status, why = "failed", str(error)
            self.watch.say(f"{recipe.name}{label} failed: {why}")
        if kept is None and status == "done":
            body = {"settings": system.settings, "folders": self._folders(system), "spent": asdict(spent),
                    "card": system.card, "notes": notes}  # fmt: skip
            self.store.keep_trial(self.key, key, body)
        before.clear()  # it holds the sessions that are to go
        self.let_go(start, system)
        total = spent - self._paid(spent, notes, begun) + (card.spent if card else Spent())
        paired = None
        if card and self.base and self.base.card:
            paired = stats.compare(self.base.card.outcomes[: len(rows)], card.outcomes, self.metric, self.seed)
        n, price = len(rows) if card else 0, self.speed(start).price
        return self.record(Trial(
            recipe, system, rung, status, why, n, card, total, price(total), notes, paired, label,
            making=price(spent), scoring=self._scoring(system, n),
        ))  # fmt: skip

    def let_go(self, *needed: System) -> None:
        """Close trained models but those of the bases, the best trial and these Systems: each holds all weights."""
        able = [t for t in self.trials if t.card and t.status != "refused"]
        most = max((t.examples for t in able), default=0)
        best = max((t for t in able if t.examples == most), key=self.merit, default=None)
        stay = [*needed, *(t.system for t in self.trials if t is best or not t.recipe.methods)]
        for ref in [r for r in self.run.sessions if r.transforms and all(r != s.model for s in stay)]:
            self.run.sessions.pop(ref)  # not closed: a session may be in use elsewhere
        self.run.tidy()

    def begun(self, recipe: Recipe, start: System) -> Made | None:
        """What was made of the longest beginning of a recipe that trains nothing, as a search of prompts."""
        for n in range(len(recipe.methods) - 1, 0, -1):
            part = Recipe(recipe.methods[:n])
            made = self.made.get(_made(part, part.files(self.data.folder), start, None, None))
            if made is not None:
                return made
        return None

    def _paid(self, spent: Spent, notes: dict[str, Any], begun: Made | None) -> Spent:
        """What other trials have paid for already: recipes with a common beginning share it."""
        before = {name for t in self.trials for name in t.notes.get("trainings", {})}
        mine = notes.get("trainings", {}) if spent.trained_tokens else {}
        shared = sum((Spent(**cost) for name, cost in mine.items() if name in before), Spent())
        return shared + begun.spent if begun and spent != Spent() else shared

    def _apply(
        self, recipe: Recipe, name: str, start: System, run: Run, healing: int | None, begun: Made | None
    ) -> tuple[System, Spent, dict[str, Any]]:
        made = self.made.get(name)
        if made is not None:  # a later rung scores the same System on more examples
            return made.system, Spent(), made.notes
        before, spent = _opened(run), Spent()
        recipe.possible(start, self.data)
        if begun is not None:
            start, recipe, spent = begun.system, Recipe(recipe.methods[begun.methods :]), begun.spent
            run.notes.update(begun.notes)
        system = recipe.run(start, self.data, run, healing)
        return system, spent + _since(run, before) + run.spent, run.notes

    def _kept(self, key: str) -> dict[str, Any] | None:
        """A finished trial of the store; None where the weights or indexes that it made are gone."""
        kept = self.store.trial(self.key, key)
        if kept and not all((self.store.home / place).exists() for place in kept["folders"].values()):
            return None
        return kept

    def _folders(self, system: System) -> dict[str, str]:
        """Where what a System needs lies, by fingerprint: within the home, which may be moved, or elsewhere."""
        home = self.store.home
        places = {t.fingerprint: Path(t.folder) for t in system.model.transforms if t.folder is not None}
        places |= {s.fingerprint: Path(s.folder) for s in system.sources if s.folder is not None}
        return {k: str(p.relative_to(home) if p.is_relative_to(home) else p) for k, p in places.items()}

    def _revive(self, kept: dict[str, Any], start: System) -> tuple[System, Spent, dict[str, Any]]:
        folders = {k: self.store.home / v for k, v in kept["folders"].items()}
        system = revive(kept["settings"], start.model.base, folders, kept["card"], self.store.home)
        return system, Spent(**kept["spent"]), kept["notes"]

    def _score(self, system: System, count: int) -> Scorecard:
        """Score a System on the first `count` of select; what was scored at an earlier rung is not run again."""
        before = self.scored.get(system.fingerprint)
        fresh = self.select[before.n if before else 0 : count]
        if before and not fresh:
            part = before.outcomes[:count]
            low, high = stats.bootstrap_interval(part, self.metric, self.seed)
            score = self.metric.aggregate(part)
            return replace(before, score=score, low=low, high=high, outcomes=part, spent=Spent(), seconds=0.0)
        session = self.run.session(system.model)
        card = evaluate(
            system, fresh, self.metric, session=session, split="select", seed=self.seed,
            store=self.store, within=self.key,
            progress=lambda done, of: self.watch.tell("scoring on select", done, of),
        )  # fmt: skip
        shared = system.uncalibrated if reads_scores(system, fresh, session) else system
        rows, took = self.taken.get(shared.fingerprint, (0, 0.0))
        self.taken[shared.fingerprint] = max(rows, count), took + self.speed(system).price(card.spent)
        if self.base and self.base.card:
            card = alike(card, self.base.card, self.metric, self.seed)
        self.scored[system.fingerprint] = join(before, card, self.metric, self.seed) if before else card
        return self.scored[system.fingerprint]

    def _scoring(self, system: System, count: int) -> float:
        """Seconds of scoring a System on so many rows, those included that another with the same scores has paid."""
        plain = self.taken.get(system.uncalibrated.fingerprint, (1, 0.0))
        rows, took = self.taken.get(system.fingerprint, plain)
        return took * count / rows

    def mark(self, trial: Trial, **changes: Any) -> Trial:
        """Put a changed trial in its own place on the board."""
        changed = replace(trial, **changes)
        self.trials[self.trials.index(trial)] = changed
        if self.base is trial:
            self.base = changed
        self._show()
        return changed

    def _show(self) -> None:
        self.watch.board([t.standing(self.metric) for t in self.trials])

    def halve(self, arms: Sequence[tuple[Recipe, System, str]], ahead: Trial | None = None) -> None:
        """Successive halving (Jamieson & Talwalkar 2016) on paired differences: the better half goes on, less those
        that the paired interval already shows to be behind the best of them, or of them and the one that is `ahead`,
        scored on all of select before.
        """
        going = list(arms)
        whole = len(self.select)
        counts = sorted({min(whole, max(LEAST, round(share * whole))) for share in RUNGS})
        for rung, count in enumerate(counts):
            trials = [self.enter(r, s, rung=rung, examples=count, label=label) for r, s, label in going]
            scored = [t for t in trials if t.card]
            # Where the clock has stopped some, they stand on fewer rows than others: there is nothing to compare.
            if not scored or count == whole or any(t.status == "truncated" for t in scored):
                return
            rival = [replace(ahead, card=self._score(ahead.system, count))] if ahead else []
            best = max([*scored, *rival], key=self.merit)
            keep = sorted(scored, key=self.merit, reverse=True)[: max(1, len(scored) // 2)]
            going = []
            for trial in scored:
                assert trial.card and best.card
                paired = stats.compare(best.card.outcomes, trial.card.outcomes, self.metric, self.seed)
                if trial in keep and paired.high >= 0:
                    origin = next(a for a in arms if f"{a[0].name}{a[2]}" == trial.name)
                    going.append(origin)
                else:
                    why = f"{self._behind(best, paired)} on {count} examples"
                    self.mark(trial, status="dropped", why=why)

    def _behind(self, best: Trial, paired: stats.Paired) -> str:
        """How far a trial is behind the best one, in words."""
        if not paired.difference:
            return f"no better than {best.name}"
        points, least = f"{100 * abs(paired.difference):.1f} points", f"{abs(paired.difference):.3g}"
        return f"behind {best.name} by {points if in_points(self.metric.name) else least}"

    def merit(self, trial: Trial) -> float:
        """Its score on select, greater is better; minus infinity where it has none."""
        if trial.card is None:
            return float("-inf")
        return trial.card.score if self.metric.higher_is_better else -trial.card.score


def _made(recipe: Recipe, files: Mapping[str, str], start: System, tokens: int | None, healing: int | None) -> str:
    """Under which the System that a recipe made is remembered within a race."""
    return json.dumps([recipe.record, files, start.fingerprint, tokens, healing], sort_keys=True)


def _opened(run: Run) -> list[tuple[Session, Spent]]:
    """The opened models, with what each has spent so far."""
    return [(session, session.spent) for session in run.sessions.values()]


def _since(run: Run, before: Sequence[tuple[Session, Spent]]) -> Spent:
    """What models opened then or now have spent since: a method may close the one that it began with."""
    new = [(s, Spent()) for s in run.sessions.values() if not any(s is old for old, _ in before)]
    return sum((session.spent - then for session, then in (*before, *new)), Spent())
