"""Variants of a System on the same train rows: does anything move the score, which is best, and is it truly better?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from whet import stats
from whet.engine import Progress, Session
from whet.methods.calibrate import batch_prior
from whet.metrics import Metric, Outcome, get, score_all
from whet.scorecard import reads_scores
from whet.splits import TEMPLATE, shared_order
from whet.system import System
from whet.task import Example, Learnable

LEAST = 16  # rows of the first rung, where there are that many
ALPHA = 0.1  # two-sided: a variant that is kept is better by a one-sided test at 5 %


def unseen(system: System, rows: Sequence[Example]) -> tuple[list[Example], System]:
    """Rows that are not shown as demonstrations, and the System; nearest ones stay, and are hidden from themselves.

    A question that many rows ask of different texts shows none of them.
    """
    demos, templates = system.demonstrations, templated(rows)
    if demos.selection == "fixed":
        shown = {question for question, _ in demos.pool} - templates
        return [e for e in rows if e.prompt not in shown], system
    hidden = {e.prompt for e in rows} - templates
    pool = tuple(pair for pair in demos.pool if pair[0] not in hidden)
    return list(rows), replace(system, demonstrations=replace(demos, pool=pool))


def templated(rows: Sequence[Example], most: int = TEMPLATE) -> set[str]:
    """Prompts of more than `most` rows that only their history or their choices tell apart (see `splits`)."""
    others = defaultdict[str, set[tuple[Any, ...]]](set)
    for row in rows:
        others[row.prompt].add((row.history, *sorted(row.choices)))
    return {prompt for prompt, found in others.items() if len(found) > most}


def learnable(system: System, data: Learnable, seed: int) -> list[Example]:
    """Train rows with answers, in one order: classes in turn, so that each beginning is balanced."""
    rows = [e for e in data.train if e.answered and e.text is None]
    return shared_order(unseen(system, rows)[0], data.closed, seed)


@dataclass
class Contest:
    """What variants answer to the same rows, by the task's metric; nothing is run twice.

    With `calibrated`, answers are read off as batch calibration on these very rows would have them, which costs
    nothing: both are made of the same scores.
    """

    rows: Sequence[Example]
    metric: Metric
    session: Session
    calibrated: bool = False
    progress: Progress | None = None
    known: dict[str, dict[int, Any]] = field(default_factory=dict)

    @staticmethod
    def of(data: Learnable, rows: Sequence[Example], session: Session, **more: Any) -> Contest:
        """Over these rows, by the task's metric."""
        return Contest(rows, get(data.metric, data.folder, data.trusted), session, **more)

    def scores(self, system: System) -> bool:
        """Whether a variant's answers are read off scores of all labels, so that they can be calibrated, too."""
        closed = bool(system.decoding.labels) and system.decoding.closed and not any(e.choices for e in self.rows)
        return closed and (self.calibrated or reads_scores(system, self.rows, self.session))

    def outcomes(self, system: System, wanted: Sequence[int], calibrated: bool | None = None) -> tuple[Outcome, ...]:
        """How a variant does on the rows of these numbers; calibrated only where it has scores (see `scores`)."""
        calibrated = self.calibrated if calibrated is None else calibrated
        plain, examples = system.uncalibrated, [self.rows[i] for i in wanted]
        known = self.known.setdefault(plain.fingerprint, {})
        fresh = [i for i in wanted if i not in known]
        asked = [self.rows[i] for i in fresh]
        if not self.scores(plain):
            known.update(zip(fresh, plain.answers(asked, self.session, self.progress) if asked else [], strict=True))
            return score_all(self.metric, [known[i].text for i in wanted], examples)
        if asked:
            known.update(zip(fresh, plain.label_scores(asked, self.session, self.progress)[0], strict=True))
        prior = batch_prior(list(known.values())) if calibrated else ()
        reading = replace(plain, decoding=replace(plain.decoding, prior=prior))
        return score_all(self.metric, [reading.decide(known[i]).text for i in wanted], examples)

    def merit(self, system: System, wanted: Sequence[int]) -> float:
        """The metric's figure on these rows, greater is better."""
        figure = self.metric.aggregate(self.outcomes(system, wanted))
        return figure if self.metric.higher_is_better else -figure

    def best(self, systems: Sequence[System], most: int) -> tuple[System, list[dict[str, Any]]]:
        """The best by sequential halving (Karnin et al. 2013) on the first `most` rows, and what each rung saw.

        All are compared on the same rows; those of equal merit keep their order.
        """
        going, log = list(systems), list[dict[str, Any]]()
        count = min(most, max(LEAST, most // 2 ** max(0, math.ceil(math.log2(len(going))) - 1)))
        while len(going) > 1:
            merits = {s.fingerprint: self.merit(s, range(count)) for s in going}
            going.sort(key=lambda s: -merits[s.fingerprint])
            log.append({"rows": count, "variants": len(going), "best": max(merits.values()),
                        "median": sorted(merits.values())[len(merits) // 2]})  # fmt: skip
            going = going[: len(going) // 2 if count < most else 1]
            count = min(most, 2 * count)
        return going[0], log

    def better(self, given: System, new: System, since: int, seed: int) -> tuple[bool, stats.Paired]:
        """Whether one is better than the other: ahead on the rows from `since`, which no choice has seen, and by more
        than noise on all of them (paired, one-sided at 5 %). Returns the comparison on all rows, too.
        """
        everything, fresh = range(len(self.rows)), range(since, len(self.rows))
        pairs = stats.compare(self.outcomes(given, everything), self.outcomes(new, everything), self.metric, seed)
        ahead = self.merit(new, fresh) > self.merit(given, fresh) if fresh else pairs.difference > 0
        return bool(ahead and pairs.difference > 0 and pairs.p_value < ALPHA), pairs
