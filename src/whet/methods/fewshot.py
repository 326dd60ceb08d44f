"""Few-shot: worked examples before the question (Brown et al. 2020)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from whet.errors import MethodError
from whet.methods import Need, Run
from whet.system import Demonstrations, Pair, System
from whet.task import Example, Learnable

SELECTIONS = ("random", "nearest", "fixed")
ORDERS = ("mixed", "grouped")


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


@dataclass(frozen=True)
class FewShot:
    """k demonstrations: chosen at random (balanced over a closed set), by nearest neighbour, or given (`fixed`).

    `ids` names the rows of `fixed`. `order` of random ones: mixed by the seed, or grouped by answer. `draw` numbers
    the random draw: what sixteen examples do to a small model differs much from draw to draw, so several are raced.
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
        """The settings worth trying."""
        return {"k": (4, 8, 16), "selection": ("random", "nearest"), "draw": (0, 1, 2)}

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with demonstrations from train; its calibration, if any, is dropped."""
        usable = [e for e in data.train if e.completion and e.text is None and not e.history]
        if self.selection == "nearest":
            pool = tuple((e.prompt, e.completion) for e in usable)
            shown = Demonstrations(pool, self.k, "nearest")
        else:
            shown = Demonstrations(tuple(self._pick(usable, data, f"{run.seed}/{self.draw}")), 0, "fixed")
        decoding = replace(system.decoding, prior=())
        return replace(system, demonstrations=shown, decoding=decoding)

    def _pick(self, usable: Sequence[Example], data: Learnable, seed: str) -> list[Pair]:
        if self.selection == "fixed":
            by_id = {e.id: e for e in usable}
            missing = [i for i in self.ids if i not in by_id]
            if missing:
                raise MethodError("no such demonstrations", expected="ids of train rows", found=", ".join(missing[:5]))
            return [(by_id[i].prompt, by_id[i].completion) for i in self.ids]
        if data.labels:
            chosen = balanced(usable, self.k, seed)
        else:
            chosen = random.Random(seed).sample(list(usable), min(self.k, len(usable)))
        if self.order == "grouped":
            chosen.sort(key=lambda e: e.completion)
        return [(e.prompt, e.completion) for e in chosen]
