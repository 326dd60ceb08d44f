"""Suspects: wrong labels are named, right ones are left alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whet import suspects
from whet.engine.torch import TorchSession
from whet.errors import DivergedError, MethodError
from whet.methods import Run
from whet.methods.finetune import FineTune
from whet.model import resolve
from whet.search import tune
from whet.store import Store
from whet.system import Decoding, Demonstrations, System
from whet.task import Example, Learnable

TOPICS = {
    "sport": ["match", "goal", "coach", "league", "referee", "stadium", "striker", "season"],
    "cooking": ["oven", "butter", "recipe", "dough", "simmer", "pepper", "kitchen", "sauce"],
    "travel": ["flight", "hotel", "passport", "beach", "luggage", "museum", "train", "visa"],
}
FILLER = ["the", "a", "we", "saw", "then", "really", "today", "after", "some", "more", "before", "they"]


def rows(count: int, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)
    made = []
    for n in range(count):
        label = draw.choice(list(TOPICS))
        words = draw.choices(TOPICS[label], k=3) + draw.choices(FILLER, k=6)
        draw.shuffle(words)
        made.append(Example(str(n), " ".join(words), label))
    return made


def flipped(clean: list[Example], share: float, seed: int = 0) -> tuple[list[Example], set[str]]:
    draw = random.Random(seed)
    wrong = {e.id for e in draw.sample(clean, round(share * len(clean)))}
    return [
        replace(e, completion=draw.choice([k for k in TOPICS if k != e.completion])) if e.id in wrong else e
        for e in clean
    ], wrong


def embed(texts: Any) -> Any:
    """Counts of the words of each topic with noise: a crude embedder."""
    draw = np.random.default_rng(len(texts))
    found = [[sum(w in words for w in t.split()) for words in TOPICS.values()] for t in texts]
    return np.array(found, dtype=float) + draw.normal(0, 0.3, (len(texts), len(TOPICS)))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_flipped_labels_are_named(share: float) -> None:
    noisy, wrong = flipped(rows(400), share)
    found = suspects.find(noisy, embed)
    named = {s.id for s in found}
    assert len(named & wrong) / len(named) >= 0.8
    assert len(named & wrong) / len(wrong) >= (0.5 if share > 0.1 else 0.1)  # among few, few are sure
    truth = {e.id: e.completion for e in rows(400)}
    right = [s.rather == truth[s.id] for s in found if s.id in wrong]
    assert sum(right) / len(right) >= 0.9
    assert [s.chance for s in found] == sorted((s.chance for s in found), reverse=True)
    assert found == suspects.find(noisy, embed)


@pytest.mark.parametrize("kinds", [2, 3, 5])
def test_a_classifier_that_only_guesses_names_nothing(kinds: int) -> None:
    draw, named = np.random.default_rng(0), 0
    for _ in range(20):
        chances = draw.dirichlet([0.1] * kinds, 400)
        named += (suspects.wrong_chances(chances, draw.integers(0, kinds, 400))[0] >= suspects.SURE).any()
    assert named <= 2


def test_the_judges_labels_stand_in_its_own_order(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[tuple[str, ...]]()
    monkeypatch.setattr(suspects, "find", lambda rows, embed, seed, judge, order: seen.append(order) or ())
    data = Learnable("t", "Say which.", "accuracy", tuple(TOPICS), tuple(rows(60)))
    answers = tuple(reversed(TOPICS))
    base = System(resolve(model_folder), decoding=Decoding(labels=answers, closed=True), home=tmp_path)
    FineTune().suspects(base, data, Run(Store(tmp_path)))
    assert seen == [answers]


def test_clean_labels_are_left_alone() -> None:
    assert len(suspects.find(rows(400), embed)) <= 2
    assert suspects.find(rows(20), embed) == ()
    assert suspects.find([replace(e, completion="one") for e in rows(100)], embed) == ()


def test_chances_by_hand() -> None:
    # 40 sure rows of which 8 disagree: e = 0.2. A row with p = (0.2, 0.8) then has the true chances (0, 1).
    chances = np.array([[0.2, 0.8]] * 40 + [[0.5, 0.5]] * 360)
    given = np.array([0] * 8 + [1] * 32 + [0, 1] * 180)
    wrong, rather = suspects.wrong_chances(chances, given)
    assert wrong[:8] == pytest.approx(np.ones(8), abs=1e-4)
    assert rather[:8].tolist() == [1] * 8
    assert wrong[8:40] == pytest.approx(np.zeros(32), abs=1e-4)
    assert wrong[40:] == pytest.approx(np.full(360, 0.2), abs=1e-9)  # nothing known: the share of wrong labels


def test_no_more_labels_are_wrong_than_fitted_probabilities_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a judge that is surer than it is right, the surest rows would say more by chance."""
    chances, given = np.array([[0.2, 0.8]] * 40 + [[0.5, 0.5]] * 360), np.array([0] * 8 + [1] * 32 + [0, 1] * 180)
    wrong, _ = suspects.wrong_chances(chances, given, 0.1)  # the true chance of label 0: (0.2 - 0.1) / 0.8
    assert wrong[:8] == pytest.approx(np.full(8, 0.875 * 0.1 / (0.875 * 0.1 + 0.125 * 0.9)))
    seen: list[tuple[float, ...]] = []
    own = suspects.wrong_chances
    monkeypatch.setattr(suspects, "wrong_chances", lambda c, g, *most: seen.append(most) or own(c, g, *most))
    noisy, _ = flipped(rows(400), 0.2)
    truth = {e.id: e.completion for e in rows(400)}

    def judge(_: Any, held: Any) -> Any:  # right in 19 of 20 rows, and sure of itself in all
        return [[9.0 * (label == (truth[e.id] if int(e.id) % 20 else "sport")) for label in TOPICS] for e in held]

    suspects.find(noisy, embed, 0, judge, list(TOPICS))
    suspects.find(noisy, embed)
    [[most], none] = seen
    assert not none and 0.2 < most < 0.27


def test_labels_that_a_classifier_cannot_tell_are_left_alone() -> None:
    draw = random.Random(3)
    disputed = [replace(e, completion=draw.choice(list(TOPICS))) for e in rows(400)]  # by chance: two thirds "wrong"
    assert suspects.find(disputed, embed) == ()


def test_a_judge_sees_only_the_other_half() -> None:
    noisy, wrong = flipped(rows(300), 0.2)
    truth, order = {e.id: e.completion for e in rows(300)}, sorted(TOPICS, reverse=True)
    seen: list[tuple[set[str], set[str]]] = []

    def judge(fit: Any, held: Any) -> Any:
        seen.append(({e.id for e in fit}, {e.id for e in held}))
        return [[0.0 if label == truth[e.id] else -4.0 for label in order] for e in held]

    found = suspects.find(noisy, embed, 0, judge, order)
    assert len(seen) == 2 and all(not fit & held for fit, held in seen) and seen[0][1] | seen[1][1] == set(truth)
    assert {s.id for s in found} == wrong and all(s.rather == truth[s.id] for s in found)


def test_rare_labels_are_left_alone_and_the_others_judged() -> None:
    noisy, wrong = flipped(rows(400), 0.2)
    rare = Example("rare", "a word of its own", "law")
    for parts, more in ((2, [rare]), (5, [replace(rare, id=f"rare{n}") for n in range(4)])):
        assert suspects.examined([*noisy, *more], parts) == noisy
    assert suspects.find([*noisy, rare], embed) == suspects.find(noisy, embed) != ()
    assert suspects.examined(noisy[:49]) == [] and len(suspects.examined(noisy[:50])) == 50
    seen: list[str] = []

    def judge(fit: Any, held: Any) -> Any:
        seen.extend(e.id for e in (*fit, *held))
        return [[0.0] * 4 for _ in held]

    suspects.find([*noisy, rare], embed, 0, judge, [*TOPICS, "law"])
    assert "rare" not in seen and len(set(seen)) == 400


def test_the_search_for_suspects_keeps_to_the_budget_and_shows_no_row_its_own_label(
    model_folder: str, tmp_path: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(rows: list[Example], _: Any, __: int, judge: Any, ___: Any) -> tuple[suspects.Suspect, ...]:
        for mine, others in ((rows[::2], rows[1::2]), (rows[1::2], rows[::2])):
            judge(mine, others)
        return ()

    seen: list[Any] = []
    own = TorchSession.score

    def score(self: TorchSession, prompts: Any, *rest: Any, **more: Any) -> Any:
        seen.extend(prompts)
        return own(self, prompts, *rest, **more)

    monkeypatch.setattr(suspects, "find", find)
    monkeypatch.setattr(TorchSession, "score", score)
    made = [replace(e, prompt=f"{e.prompt} no {e.id}x") for e in rows(60)]
    shown = Demonstrations(tuple((e.prompt, e.completion) for e in made[:3]), 3)
    data = Learnable("topics", "Name it.", "accuracy", tuple(TOPICS), tuple(made))
    system = System(resolve(model_folder), "Name it.", decoding=Decoding(tuple(TOPICS), True), demonstrations=shown,
                    home=tmp_path)  # fmt: skip
    method = FineTune(clean=True, rank=2, batch=8, learning_rate=1e-3)
    spent = []
    for _ in range(2):  # found in the store, they cost as much: a run that goes on has as much left
        run = Run(Store(tmp_path), trained_tokens=6000)
        method.apply(system, data, run)
        spent.append(run.spent.trained_tokens)
        method = replace(method, learning_rate=2e-3)
    assert 3000 < spent[0] <= 6600 and spent[1] == spent[0]
    assert len(seen) == 60 and all(sum(f"no {e.id}x" in str(chat) for chat in seen) > 30 for e in made[:3])  # shown
    assert all(str(chat).count(f"no {e.id}x") < 2 for chat in seen for e in made)


def test_trainings_that_are_raced_leave_out_the_same_rows(
    model_folder: str, tmp_path: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []
    found = (suspects.Suspect("3", "sport", "travel", 0.9),)

    def find(rows: list[Example], _: Any, __: int, judge: Any, ___: Any) -> Any:
        searched.append(len(rows))
        judge(rows[::2], rows[1::2])
        return found

    monkeypatch.setattr(suspects, "find", find)
    data = Learnable("topics", "Name it.", "accuracy", tuple(TOPICS), (*rows(60), Example("rare", "rare", "law")))
    run = Run(Store(tmp_path))
    method = FineTune(clean=True, rank=2, batch=8, epochs=1.0)
    system = System(resolve(model_folder), "Name it.", decoding=Decoding(tuple(TOPICS), True), home=run.home)
    _, ended = tune.race(tune.candidates(method), system, data, run)
    assert len({arm.fidelity for arm in ended}) > 1 and searched == [61]
    assert run.notes["suspects"] == [vars(found[0])] and run.notes["unexamined"] == 1
    trained = run.notes["trainings"]  # what was spent on suspects is paid for once
    assert len(trained) > len(ended) and run.spent.trained_tokens == sum(c["trained_tokens"] for c in trained.values())


def test_a_search_for_suspects_that_diverges_names_what_helps(
    model_folder: str, tmp_path: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_: Any) -> None:
        raise DivergedError("the training diverged", found="loss nan", do="set learning_rate=1e-4")

    data = Learnable("topics", "Name it.", "accuracy", tuple(TOPICS), tuple(rows(60)))
    system, run = System(resolve(model_folder), "Name it.", home=tmp_path), Run(Store(tmp_path))
    monkeypatch.setattr(suspects, "find", lambda rows, _, __, judge, ___: judge(rows[::2], rows[1::2]))
    monkeypatch.setattr("whet.train.lesson.teach", diverged)
    with pytest.raises(MethodError, match="the training diverged; found loss nan; leave clean out") as caught:
        FineTune(clean=True).apply(system, data, run)
    assert not isinstance(caught.value, DivergedError)  # no rate of this training helps


def test_choices_that_are_the_labels_are_judged_in_their_order_and_others_not_at_all(
    model_folder: str, tmp_path: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Example] = []
    monkeypatch.setattr(suspects, "find", lambda rows, *_: seen.extend(rows) or ())
    made, turned = rows(60), tuple(TOPICS)[::-1]
    made[:40] = [replace(e, choices=turned if n < 30 else (e.completion, "law")) for n, e in enumerate(made[:40])]
    data = Learnable("topics", "Name it.", "accuracy", tuple(TOPICS), tuple(made))
    run = Run(Store(tmp_path))
    system = System(resolve(model_folder), "Name it.", decoding=Decoding(tuple(TOPICS), True), home=run.home)
    FineTune(clean=True, rank=2, batch=8, epochs=0.2).apply(system, data, run)
    assert len(seen) == 50 and not any(e.choices for e in seen) and run.notes["unexamined"] == 10
