"""Which train rows can be shown."""

from __future__ import annotations

from dataclasses import replace
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


def test_bootstrapped_rows_come_from_the_whole_file(base: System, tmp_path: Path) -> None:
    rows = tuple(Example(str(n), f"question {n}", f"question {n}") for n in range(1000))
    free = Learnable("free", "", "exact_match", train=rows)
    base = replace(base, instruction="", decoding=Decoding(max_tokens=20))
    made = run(base)
    made.sessions[base.model] = FakeSession("echo")

    def shown(draw: int, data: Learnable = free) -> set[str]:
        method = FewShot(k=8, selection="bootstrapped", draw=draw)
        return {question for question, _ in method.apply(base, data, made).demonstrations.pool}

    assert {int(q.split()[1]) > 127 for draw in range(3) for q in shown(draw)} == {False, True}
    assert shown(0) == shown(0) != shown(1)
    (tmp_path / "own.py").write_text("def odd(answer, example):\n    return 100 if answer[-1] in '13579' else 10\n")
    own = replace(free, metric="own.py:odd", folder=tmp_path, trusted=True)
    assert all(int(q[-1]) % 2 for q in shown(0, own))


def test_fixed_rows_are_grouped_on_request(base: System) -> None:
    method = FewShot(selection="fixed", order="grouped", ids=("1", "2", "3", "4"))
    shown = method.apply(base, data(SYSTEM), run(base)).demonstrations.pool
    assert [answer for _, answer in shown] == ["negative", "negative", "positive", "positive"]
