"""Which train rows can be shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from whet.engine.fake import FakeSession
from whet.errors import MethodError
from whet.methods import Run
from whet.methods.fewshot import FewShot
from whet.model import resolve
from whet.store import Store
from whet.system import Decoding, System
from whet.task import Example, Learnable

LABELS = ("negative", "positive")
SYSTEM, TURNS = (("system", "Be brief."),), (("user", "Hello."), ("assistant", "Hello."))


def data(history: tuple[tuple[str, str], ...]) -> Learnable:
    rows = [Example(str(n), f"film {n}", LABELS[n % 2], history=history) for n in range(40)]
    return Learnable("films", "Judge.", "accuracy", LABELS, tuple(rows))


@pytest.fixture
def base(home: Path) -> System:
    return System(resolve("fake:hash"), "Judge.", decoding=Decoding(LABELS, closed=True), home=home)


def run(base: System) -> Run:
    made = Run(Store(base.home), 0)
    made.sessions[base.model] = FakeSession("hash")
    return made


@pytest.mark.parametrize("selection", ["random", "nearest", "bootstrapped"])
def test_rows_with_a_system_turn_are_shown_and_those_with_earlier_turns_are_not(base: System, selection: str) -> None:
    method = FewShot(k=4, selection=selection)
    shown = method.apply(base, data(SYSTEM), run(base)).demonstrations.pool
    assert len(shown) == (40 if selection == "nearest" else 4) and shown[0][0].startswith("film ")
    with pytest.raises(MethodError, match="nothing to show; .*without earlier turns, found 0 of 40"):
        method.apply(base, data(SYSTEM + TURNS), run(base))
