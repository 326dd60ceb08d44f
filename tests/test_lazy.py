"""Choosing best first, against scoring every choice."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import make_model, reference

from whet.engine import lazy
from whet.engine.lazy import AHEAD, _Search, tree, worth
from whet.engine.prefix import Tokens
from whet.engine.torch import TorchSession

some_choices = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), min_size=1, max_size=20)


# --- the tree ---------------------------------------------------------------------------------------------------------


@given(some_choices)
def test_tree(choices: list[Tokens]) -> None:
    nodes = tree(choices)
    paths: list[Tokens] = []
    for n, node in enumerate(nodes):
        paths.append(() if n == 0 else (*paths[node.parent], node.token))
        assert node.depth == len(paths[n])
        assert node.below == [c for c, tokens in enumerate(choices) if tokens[: node.depth] == paths[n]]
        assert node.ends == [c for c, tokens in enumerate(choices) if tokens == paths[n]]
        assert all(nodes[child].parent == n and nodes[child].token == t for t, child in node.children.items())
    beginnings = {tokens[:size] for tokens in choices for size in range(len(tokens) + 1)}
    assert sorted(paths) == sorted(beginnings)  # every beginning once


def test_small_sets_are_not_worth_it() -> None:
    assert not worth([])
    assert not worth([[(n, 1, 2) for n in range(10)]])
    assert worth([[(n, 1, 2) for n in range(20)]])
    # A few long choices are read at once; a search would lose patience within one of them.
    assert not worth([[(n,) * 40 for n in range(4)]])
    # Leaves are predicted, never read: what counts is the tokens inside.
    assert not worth([[(n,) for n in range(500)]])


# --- one search, with made-up log-probabilities -----------------------------------------------------------------------


def chance(path: Tokens) -> float:
    """A log-probability for the last token of a path; any fixed negative numbers do."""
    return -random.Random(repr(path)).expovariate(1.0)


def true_scores(choices: Sequence[Tokens], lengths: Sequence[int], offsets: Sequence[float]) -> list[float]:
    sums = [sum(chance(c[: n + 1]) for n in range(len(c))) for c in choices]
    return [s / size - o for s, size, o in zip(sums, lengths, offsets, strict=True)]


def run_search(choices: Sequence[Tokens], lengths: Sequence[int], offsets: Sequence[float]) -> tuple[Any, int]:
    """Drive a search as the session does; returns its result and how many nodes it expanded."""
    nodes = tree(choices)
    paths: list[Tokens] = [()]
    for node in nodes[1:]:
        paths.append((*paths[node.parent], node.token))
    search, at, expanded = _Search(nodes, lengths, offsets), 0, 0
    while True:
        search.expand(at, [chance((*paths[at], token)) for token in nodes[at].children])
        at = search.next()
        if at < 0:
            return search.result(), expanded
        assert all(slot < expanded for slot in search.path(at))  # its ancestors' keys are at hand
        assert len(search.path(at)) == nodes[at].depth - 1
        search.slots[at] = expanded
        expanded += 1


@given(some_choices, st.booleans(), st.lists(st.floats(-3, 3), min_size=20, max_size=20))
def test_a_search_that_ends_by_itself_is_exact(choices: list[Tokens], whole: bool, shifts: list[float]) -> None:
    lengths = [1] * len(choices) if whole else [len(c) for c in choices]
    offsets = shifts[: len(choices)]
    wanted = true_scores(choices, lengths, offsets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "PATIENCE", 10_000)
        found, _ = run_search(choices, lengths, offsets)
    best = max(found)
    assert best == pytest.approx(max(wanted))
    for score, true in zip(found, wanted, strict=True):
        assert score >= true - 1e-9  # exact, or a bound from above, unless that would pass the best
        assert score < best or true == pytest.approx(best)


@given(some_choices, st.integers(0, 6), st.booleans())
def test_out_of_patience_the_best_complete_choice_wins(choices: list[Tokens], patience: int, whole: bool) -> None:
    lengths = [1] * len(choices) if whole else [len(c) for c in choices]
    offsets = [0.0] * len(choices)
    wanted = true_scores(choices, lengths, offsets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "PATIENCE", patience)
        found, expanded = run_search(choices, lengths, offsets)
        assert run_search(choices, lengths, offsets) == (found, expanded)
    assert expanded <= patience + max(map(len, choices))
    best = max(range(len(choices)), key=lambda i: found[i])
    assert found[best] == pytest.approx(wanted[best])
    assert max(wanted) >= found[best] - 1e-9


@given(some_choices)
def test_without_patience_the_likeliest_branch_is_followed(choices: list[Tokens]) -> None:
    path: Tokens = ()
    while path not in choices:  # a choice that is complete is never worse than what goes on from it
        following = {c[: len(path) + 1] for c in choices if c[: len(path)] == path}
        path = max(following, key=chance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "PATIENCE", 0)
        found, _ = run_search(choices, [1] * len(choices), [0.0] * len(choices))
    # What ended on the way at a sibling may be better still, and ends the search.
    assert max(found) >= true_scores([path], [1], [0.0])[0] - 1e-9


@given(some_choices, st.integers(0, 6), st.booleans(), st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_reading_ahead_changes_no_choice(
    choices: list[Tokens], patience: int, whole: bool, widths: list[int]
) -> None:
    """Whatever is read along with what is asked for, and however much of it, the search ends in the same place."""
    lengths = [1] * len(choices) if whole else [len(c) for c in choices]
    offsets = [0.0] * len(choices)
    nodes = tree(choices)
    paths: list[Tokens] = [()]
    for node in nodes[1:]:
        paths.append((*paths[node.parent], node.token))

    def below(node: int) -> list[float]:
        return [chance((*paths[node], token)) for token in nodes[node].children]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "PATIENCE", patience)
        plain, _ = run_search(choices, lengths, offsets)
        search, waves = _Search(nodes, lengths, offsets), 0
        search.read[0] = below(0)
        while search.unread() >= 0:
            wave = search.wave(widths[waves % len(widths)])
            waves += 1
            assert len(wave) == len(set(wave)) <= max(1, widths[(waves - 1) % len(widths)])
            assert wave[0] == search.at and all(nodes[n].children for n in wave)
            for node in wave:
                assert len(search.path(node)) == nodes[node].depth - 1  # its ancestors' keys are at hand
                search.read[node] = below(node)
        places = sorted(search.slots.values())
        assert places == list(range(len(places)))
        assert len(places) <= patience + max(map(len, choices)) + AHEAD
    assert search.result() == plain


# --- in a session -----------------------------------------------------------------------------------------------------

WORDS = ["card", "cash", "lost", "fee", "top_up", "transfer", "exchange", "pin", "refund", "limit"]
LABELS = sorted({f"{a}_{b}" for a in WORDS for b in WORDS[:4]} | {"card", "car", "cash_lost_twice"})
QUESTIONS = ["where is it", "the movie was great", "how do i top up? " * 4, "안녕", "where is it"]
PROMPTS = [(("system", "name the intent. " * 5), ("user", q)) for q in QUESTIONS]


def scores_of(
    session: TorchSession, prompts: Any, sets: Any, whole: bool, offsets: Sequence[float]
) -> list[list[float]]:
    """Every choice's score, by one plain forward each."""
    found = []
    for prompt, choices in zip(session.encode(prompts), sets, strict=True):
        answers = [session.encode_answer(c, whole) for c in choices]
        sums = [sum(reference(session.module, prompt, a)) for a in answers]
        row = [s if whole else s / len(a) for s, a in zip(sums, answers, strict=True)]
        found.append([s - o for s, o in zip(row, offsets or [0.0] * len(row), strict=True)])
    return found


def best(row: Sequence[float]) -> int:
    return max(range(len(row)), key=lambda i: row[i])


@pytest.fixture(scope="module")
def session(tokenizer: Any) -> TorchSession:
    return TorchSession(make_model("llama"), tokenizer)


@pytest.mark.parametrize("offsets", [(), tuple(random.Random(1).gauss(0, 3) for _ in LABELS)], ids=["plain", "offsets"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_choose_equals_full_scoring(
    tokenizer: Any, family: str, whole: bool, offsets: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy, "PATIENCE", 300)
    session = TorchSession(make_model(family, seed=3), tokenizer)
    sets = [LABELS] * len(PROMPTS)
    found = session.choose(PROMPTS, sets, whole=whole, offsets=offsets)
    spent = session.spent.prefilled_tokens
    for mine, wanted in zip(found, scores_of(session, PROMPTS, sets, whole, offsets), strict=True):
        assert best(mine) == best(wanted)
        assert max(mine) == pytest.approx(max(wanted), abs=1e-4)
        assert all(m >= w - 1e-4 for m, w in zip(mine, wanted, strict=True))
    session.score(PROMPTS, sets, end=whole)
    assert spent < session.spent.prefilled_tokens - spent  # it searched, and it paid


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_unshared_models_score_everything(tokenizer: Any, family: str) -> None:
    session = TorchSession(make_model(family), tokenizer)
    found = session.choose(PROMPTS[:2], [LABELS[:30]] * 2)
    for mine, wanted in zip(found, scores_of(session, PROMPTS[:2], [LABELS[:30]] * 2, False, ()), strict=True):
        assert list(mine) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_a_few_long_choices_are_scored_exactly(session: TorchSession, whole: bool) -> None:
    sets = [["the movie was " * 6 + end for end in ("great", "bad")] + ["negative", "x y z"]] * len(PROMPTS)
    found = session.choose(PROMPTS, sets, whole=whole)
    for mine, wanted in zip(found, scores_of(session, PROMPTS, sets, whole, ()), strict=True):
        assert list(mine) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("patience", [0, 1, 2, 5])
@pytest.mark.parametrize("whole", [False, True])
def test_small_patience(session: TorchSession, whole: bool, patience: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "PATIENCE", patience)
    sets = [LABELS] * len(PROMPTS)
    found = session.choose(PROMPTS, sets, whole=whole)
    assert found == session.choose(PROMPTS, sets, whole=whole)
    for mine, wanted in zip(found, scores_of(session, PROMPTS, sets, whole, ()), strict=True):
        assert max(mine) == pytest.approx(wanted[best(mine)], abs=1e-4)  # complete, and its score is exact


def test_company_does_not_change_a_choice(session: TorchSession) -> None:
    together = session.choose(PROMPTS, [LABELS] * len(PROMPTS))
    for prompt, mine in zip(PROMPTS, together, strict=True):
        [alone] = session.choose([prompt], [LABELS])
        assert best(alone) == best(mine)
        assert max(alone) == pytest.approx(max(mine), abs=1e-4)


def test_few_prompts_are_read_in_wider_waves(session: TorchSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt alone takes fewer waves than one token at a time would, and is answered alike, score for score."""
    steps: list[int] = []
    plain = TorchSession.advance

    def counted(self: Any, tokens: Any, *rest: Any) -> Any:
        steps.append(len(tokens))
        return plain(self, tokens, *rest)

    monkeypatch.setattr(TorchSession, "advance", counted)
    [wide] = session.choose(PROMPTS[:1], [LABELS])
    taken = steps.copy()
    monkeypatch.setattr(lazy, "WIDE", 1)
    [narrow] = session.choose(PROMPTS[:1], [LABELS])
    assert set(steps[len(taken) :]) == {1} and max(taken) > 1
    assert 2 * len(taken) < len(steps) - len(taken)
    assert list(wide) == pytest.approx(narrow, abs=1e-4)


def test_small_groups(session: TorchSession, monkeypatch: pytest.MonkeyPatch) -> None:
    together = session.choose(PROMPTS, [LABELS] * len(PROMPTS))
    monkeypatch.setattr(TorchSession, "key_tokens", 100)
    told: list[tuple[int, int]] = []
    apart = session.choose(PROMPTS, [LABELS] * len(PROMPTS), progress=lambda done, of: told.append((done, of)))
    assert len(told) > 1
    assert told[-1] == (len(PROMPTS), len(PROMPTS))
    assert [best(row) for row in apart] == [best(row) for row in together]


def test_sets_of_their_own(session: TorchSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "PATIENCE", 300)
    sets = [LABELS, LABELS[::-1], LABELS[:25], ["yes", "no"], LABELS[5:]]
    found = session.choose(PROMPTS, sets)
    for mine, wanted in zip(found, scores_of(session, PROMPTS, sets, False, ()), strict=True):
        assert len(mine) == len(wanted)
        assert best(mine) == best(wanted)


def test_the_same_label_twice(session: TorchSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "PATIENCE", 300)
    [once] = session.choose(PROMPTS[:1], [LABELS])
    top = LABELS[best(once)]
    [twice] = session.choose(PROMPTS[:1], [[*LABELS, top]])
    assert twice[-1] == twice[best(once)] == max(twice)
