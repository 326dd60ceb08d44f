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


@pytest.mark.parametrize("selection", ["random", "nearest", "bootstrapped"])
def test_what_a_demonstration_cannot_show_is_left_out(base: System, selection: str) -> None:
    """One question of a text in the system turn or of choices, and one prompt with both answers."""
    method, spam = FewShot(k=4, selection=selection), "Is this spam?"
    mails = tuple(Example(str(n), spam, LABELS[n % 2], history=(("system", f"Mail {n}"),)) for n in range(40))
    chosen = tuple(Example(f"c{n}", spam, f"text {n}", choices=(f"text {n}", f"words {n}")) for n in range(40))
    films = data(()).train
    for rows, why in ((mails, "with a system turn of their own"), (chosen, "with a prompt that has other answers")):
        given = replace(data(()), train=rows, labels=() if rows is chosen else LABELS)
        with pytest.raises(MethodError, match=f"nothing to show; .*found 0 of 40: 40 {why}"):
            method.apply(base, given, run(base))
    made = run(base)
    made.notes["left_out"] = ["a document"]  # of a method before it
    noisy = (Example("x", films[0].prompt, "positive"), *mails, *films)
    shown = method.apply(base, replace(data(()), train=noisy), made).demonstrations.pool
    assert shown and {q for q, _ in shown} <= {e.prompt for e in films[1:]}
    FewShot(k=2).apply(base, replace(data(()), train=noisy), made)  # what was said is not said again
    assert made.notes["left_out"] == [
        "a document",
        "42 of 81 train rows are not shown: 40 with a system turn of their own, which differs from row to row, "
        "2 with a prompt that has other answers elsewhere",
    ]
    with pytest.raises(MethodError, match="no such demonstrations; expected .* whose prompt says all, found 0"):
        FewShot(selection="fixed", ids=("0", "1")).apply(base, replace(data(()), train=(noisy[0], *films)), run(base))


def test_several_free_answers_to_the_same_prompt_are_shown(base: System) -> None:
    rows = tuple(Example(str(n), "Tell a joke.", f"joke {n}") for n in range(8))
    free = Learnable("jokes", "", "rouge_l", train=rows)
    start = replace(base, decoding=Decoding(max_tokens=8))
    assert len(FewShot(k=4).apply(start, free, run(base)).demonstrations.pool) == 4
    told = replace(free, train=tuple(replace(e, history=TURNS if n else ()) for n, e in enumerate(rows)))
    with pytest.raises(MethodError, match="found 0 of 8: 7 with earlier turns, 1 with a prompt"):
        FewShot(k=4).apply(start, told, run(base))


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
