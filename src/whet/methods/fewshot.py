"""Few-shot: worked examples before the question (Brown et al. 2020)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from whet.errors import MethodError
from whet.methods import Need, Run
from whet.system import Demonstrations, Pair, System
from whet.task import Example, Learnable

if TYPE_CHECKING:
    import numpy as np

SELECTIONS = ("random", "nearest", "fixed", "diverse", "coverage", "bootstrapped")
ORDERS = ("mixed", "grouped", "raced")
# Train rows that the model answers to bootstrap; the score, as a share of the best, from which its answer is kept.
ASKED, RIGHT = 128, 0.5
RACED_ORDERS, RACED_ROWS = 6, 64
MOST_COMPARED = 1000  # rows among which diverse ones are looked for
MEASURED = 64  # prompts that say whether the context window holds the demonstrations


def balanced(rows: Sequence[Example], k: int, seed: int | str) -> list[Example]:
    """k rows, as many of each completion as can be, chosen and ordered by the seed."""
    draw = random.Random(seed)
    by_answer: dict[str, list[Example]] = defaultdict(list)
    for row in rows:
        by_answer[row.completion].append(row)
    piles = [draw.sample(by_answer[answer], len(by_answer[answer])) for answer in sorted(by_answer)]
    draw.shuffle(piles)  # where k is no multiple of the classes, the seed says who gets one more
    chosen: list[Example] = []
    while len(chosen) < k and any(piles):
        for pile in piles:
            if pile and len(chosen) < k:
                chosen.append(pile.pop())
    draw.shuffle(chosen)
    return chosen


def spread(vectors: np.ndarray[Any, Any], answers: Sequence[str], k: int, cover: bool) -> list[int]:
    """k rows by their unit vectors, answers in turn: each the farthest from all before it (Gonzalez 1985), or with
    `cover` the one that brings all rows nearest to some chosen one (facility location, as in Lin & Bilmes 2011).
    """
    import numpy as np

    near = vectors @ vectors.T
    best = np.full(len(near), -1.0)  # of each row: its similarity to the nearest one chosen
    piles = {answer: [i for i, a in enumerate(answers) if a == answer] for answer in sorted(set(answers))}
    chosen: list[int] = []
    while len(chosen) < min(k, len(near)):
        for pile in piles.values():
            if pile and len(chosen) < k:
                gain = np.maximum(near[pile], best).sum(axis=1) if cover or not chosen else -best[pile]
                chosen.append(pile.pop(int(gain.argmax())))
                best = np.maximum(best, near[chosen[-1]])
    return chosen


def showable(rows: Sequence[Example], closed: bool) -> tuple[list[Example], list[str]]:
    """Rows that their prompt alone tells, since a demonstration shows no more; and of the others how many, and why.

    In free text, several answers to the very same are no contradiction.
    """
    from whet.variants import templated

    alone = [e for e in rows if all(role == "system" for role, _ in e.history)]
    one = len({e.history for e in alone}) == 1  # a system turn that all rows share says nothing of one
    plain = [e for e in alone if one or not e.history]
    answers = defaultdict[str, set[str]](set)
    for row in rows:
        answers[row.prompt].add(row.completion)
    unclear = {prompt for prompt, found in answers.items() if len(found) > 1}
    unclear = unclear if closed else unclear & templated(rows, 1)
    usable = [e for e in plain if e.prompt not in unclear]
    left = ((len(rows) - len(alone), "with earlier turns"),
            (len(alone) - len(plain), "with a system turn of their own, which differs from row to row"),
            (len(plain) - len(usable), "with a prompt that has other answers elsewhere"))  # fmt: skip
    return usable, [f"{count} {why}" for count, why in left if count]


@dataclass(frozen=True)
class FewShot:
    """k demonstrations, balanced over a closed set; fewer where the context window would not hold them.

    `random`; `nearest` to each question; `fixed`, named by `ids`; `diverse` and `coverage` by sentence embeddings;
    `bootstrapped`: rows that the model itself answers right, with what it said (Khattab et al. 2024). `order`: mixed by
    the seed, grouped by answer, or the best of a few that are raced. `draw` numbers the random draw: what sixteen
    examples do to a small model differs much from draw to draw, so several are raced.
    """

    name: ClassVar[str] = "fewshot"
    family: ClassVar[str] = "few-/zero-shot"
    needs: ClassVar[tuple[Need, ...]] = ("examples",)
    writes: ClassVar[tuple[str, ...]] = ("demonstrations",)
    invalidates: ClassVar[tuple[str, ...]] = ("calibration",)

    k: int = 16
    selection: str = "random"
    order: str = "mixed"
    ids: tuple[str, ...] = ()
    draw: int = 0

    def __post_init__(self) -> None:
        for value, known in ((self.selection, SELECTIONS), (self.order, ORDERS)):
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}")
        if self.k < 1:
            raise ValueError(f"k is {self.k}; at least 1")
        if (self.selection == "fixed") != bool(self.ids):
            raise ValueError("selection=fixed goes with ids, and ids with selection=fixed")

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying; the nearest are the same whatever is drawn, and stand in their own order."""
        selections = ("random", "nearest", "diverse", "coverage", "bootstrapped")
        drawn = {"order": ("mixed", "raced"), "draw": (0, 1, 2)} if self.selection != "nearest" else {}
        return {"k": (4, 8, 16), "selection": selections, **drawn}

    @property
    def prompts(self) -> int:
        """How many prompts the model is asked, about."""
        return ASKED * (self.selection == "bootstrapped") + 3 * RACED_ROWS * (self.order == "raced")

    def asks(self, rows: int) -> int:
        """How many prompts the model is asked at most, where train has so many rows."""
        tried = min(ASKED, rows) if self.selection == "bootstrapped" else 0
        return tried + (3 * min(RACED_ROWS, rows) if self.order == "raced" else 0)

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with demonstrations from train; its calibration, if any, is dropped."""
        asked = [e for e in data.train if e.answered and e.text is None]
        usable, left = showable(asked, data.closed)
        why = ": " + ", ".join(left) if left else ""
        if not usable:
            raise MethodError(
                "nothing to show", found=f"0 of {len(data.train)}{why}", do="use a method that trains",
                expected="train rows whose prompt says all, with a completion and without earlier turns",
            )  # fmt: skip
        if left:
            run.leave_out(f"{len(asked) - len(usable)} of {len(asked)} train rows are not shown{why}")
        start = replace(system.uncalibrated, demonstrations=Demonstrations())
        rows = self._bootstrapped(usable, start, data, run) if self.selection == "bootstrapped" else usable
        k = most = len(self.ids) or self.k
        new = self._shown(rows, start, data, run, k)
        if not (fits := self._fits(new, asked, run)) and most > 1:
            k, high = 1, most - 1  # the most that fit, by halves
            while k < high:
                middle = (k + high + 1) // 2
                if self._fits(self._shown(rows, start, data, run, middle), asked, run):
                    k = middle
                else:
                    high = middle - 1
            new = self._shown(rows, start, data, run, k)
            fits = self._fits(new, asked, run)
        if k < most or not fits:
            holds = "no more" if fits else "not even that"
            run.notes["shown"] = f"{k} of {most}: the context window holds {holds}"
        return self._raced(new, data, run) if self.order == "raced" else new

    def _shown(self, rows: Sequence[Example], start: System, data: Learnable, run: Run, k: int) -> System:
        if self.selection == "nearest":
            return replace(start, demonstrations=Demonstrations(tuple((e.prompt, e.completion) for e in rows), k,
                                                                "nearest"))  # fmt: skip
        pairs = self._pick(rows, data, f"{run.seed}/{self.draw}", k, run)
        return replace(start, demonstrations=Demonstrations(tuple(pairs), 0, "fixed"))

    def _fits(self, system: System, asked: Sequence[Example], run: Run) -> bool:
        """Whether nearly all prompts of train fit the context window with what is shown; nearest ones by a sample."""
        demos, session = system.demonstrations, run.session(system.model)
        some = random.Random(0).sample(list(asked), min(MEASURED, len(asked)))
        if demos.selection == "nearest":
            system = replace(system, demonstrations=Demonstrations(demos.pool[: demos.k]))
        sizes = sorted(session.count(system.prompts(some)))
        room = max((system.room(e, session) for e in some), default=0)
        return not sizes or sizes[int(0.95 * (len(sizes) - 1))] + room <= session.context

    def _bootstrapped(self, usable: Sequence[Example], start: System, data: Learnable, run: Run) -> list[Example]:
        """Rows that the model answers right by itself; where it generates, with its own words, reasons included."""
        from whet.metrics import score_all
        from whet.variants import Contest

        seed, most = f"{run.seed}/{self.draw}", min(ASKED, len(usable))
        asked = balanced(usable, most, seed) if data.labels else random.Random(seed).sample(list(usable), most)
        closed = start.decoding.closed
        # A leaning towards one label would keep rows of that label alone.
        contest = Contest.of(data, asked, run.session(start.model), calibrated=bool(data.labels))
        raw = replace(start, decoding=replace(start.decoding, after=""))
        said = [o.answer for o in contest.outcomes(raw, range(len(asked)))]
        found = score_all(contest.metric, said if closed else [start.decoding.read(s) for s in said], asked)
        if contest.metric.higher_is_better:
            least = RIGHT * max(1.0, *(o.score for o in found))  # a task's own metric may count up to a hundred
            right = [o.score >= least for o in found]
        else:  # faults are counted, and none is right
            right = [o.score <= 0 and not o.error for o in found]
        kept = [e if closed else replace(e, completion=s) for e, s, ok in zip(asked, said, right, strict=True) if ok]
        run.notes["bootstrapped"] = f"{len(kept)} of {len(asked)} answered right"
        if not kept:
            raise MethodError("nothing to show: the model answers no train row right", expected="some right answers",
                              found=f"0 of {len(asked)}", do="use selection=random")  # fmt: skip
        return kept

    def _raced(self, system: System, data: Learnable, run: Run) -> System:
        """The best of a few orders on train rows that are not shown (Lu et al. 2022); the first of equals."""
        from whet.variants import Contest, learnable

        rows, pool = learnable(system, data, run.seed)[:RACED_ROWS], system.demonstrations.pool
        draw = random.Random(run.seed)
        orders = [pool, *(tuple(draw.sample(pool, len(pool))) for _ in range(RACED_ORDERS - 1))]
        made = [replace(system, demonstrations=Demonstrations(one)) for one in dict.fromkeys(orders)]
        if not rows or self.selection == "nearest":
            return system
        contest = Contest.of(data, rows, run.session(system.model), calibrated=bool(data.labels))
        best, run.notes["orders"] = contest.best(made, len(rows))
        return best

    def _pick(self, usable: Sequence[Example], data: Learnable, seed: str, k: int, run: Run) -> list[Pair]:
        if self.selection == "fixed":
            by_id = {e.id: e for e in usable}
            missing = [i for i in self.ids if i not in by_id]
            if missing:
                raise MethodError("no such demonstrations", expected="ids of train rows whose prompt says all",
                                  found=", ".join(missing[:5]), do="name others")  # fmt: skip
            chosen = [by_id[i] for i in self.ids[:k]]
        elif self.selection in ("diverse", "coverage"):
            from whet.embed import Embedder

            some = random.Random(seed).sample(list(usable), min(MOST_COMPARED, len(usable)))
            answers = [e.completion if data.labels else "" for e in some]
            vectors = Embedder(run.home)([e.prompt for e in some])
            chosen = [some[i] for i in spread(vectors, answers, k, self.selection == "coverage")]
            random.Random(seed).shuffle(chosen)
        elif data.labels:
            chosen = balanced(usable, k, seed)
        else:
            chosen = random.Random(seed).sample(list(usable), min(k, len(usable)))
        if self.order == "grouped":
            chosen.sort(key=lambda e: e.completion)
        return [(e.prompt, e.completion) for e in chosen]
