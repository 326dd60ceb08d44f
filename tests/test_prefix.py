"""The tree of shared beginnings, against the rows it was made of."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.engine.prefix import LEAST_SAVED, Batch, Forest, Row, Tokens, Unit, arrange, batches

# Few distinct tokens and a few fixed beginnings, so that rows share much, nest, repeat and extend one another.
BEGINNINGS = [(1,) * 4, (1,) * 30, (1,) * 30 + (2, 3) * 20, (2,) * 12, ()]
tail = st.lists(st.integers(1, 3), max_size=8).map(tuple)
continuation = st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple)
a_row = st.builds(
    lambda head, rest, continuations: Row(head + rest or (1,), tuple(continuations)),
    st.sampled_from(BEGINNINGS),
    tail,
    st.lists(continuation, max_size=4),
)
some_rows = st.lists(a_row, max_size=12)
least = st.sampled_from([1, 3, LEAST_SAVED])


def above(forest: Forest, unit: Unit) -> Tokens:
    """The tokens of all trunks above a unit, read off the forest itself."""
    parts: list[Tokens] = []
    trunk = unit.trunk
    while trunk >= 0:
        parts.insert(0, forest.trunks[trunk].tokens)
        trunk = forest.trunks[trunk].parent
    return sum(parts, ())


def path(unit: Unit, at: int) -> Tokens:
    """The unit's tokens from its root down to index `at`."""
    found: list[int] = []
    while at >= 0:
        found.insert(0, unit.tokens[at])
        at = unit.parents[at]
    return tuple(found)


@given(some_rows, least)
def test_every_row_is_reconstructed(rows: list[Row], least: int) -> None:
    forest = arrange(rows, least)
    assert sorted(u.row for u in forest.units) == list(range(len(rows)))
    for unit in forest.units:
        row, head = rows[unit.row], above(forest, unit)
        assert head + path(unit, unit.last) == row.prompt
        assert len(unit.targets) == len(row.continuations)
        for target, wanted in zip(unit.targets, row.continuations, strict=True):
            assert tuple(token for _, token in target) == wanted
            for n, (before, _) in enumerate(target):
                assert head + path(unit, before) == row.prompt + wanted[:n]


@given(some_rows, least)
def test_positions_and_parents(rows: list[Row], least: int) -> None:
    forest = arrange(rows, least)
    for n, trunk in enumerate(forest.trunks):
        assert trunk.parent < n
        parent = forest.trunks[trunk.parent] if trunk.parent >= 0 else None
        assert trunk.start == (parent.start + len(parent.tokens) if parent else 0)
        assert trunk.tokens
    for unit in forest.units:
        start = len(above(forest, unit))
        for i, (parent_at, position) in enumerate(zip(unit.parents, unit.positions, strict=True)):
            assert parent_at < i
            assert position == (unit.positions[parent_at] + 1 if parent_at >= 0 else start)
        assert unit.plain == all(p == i - 1 for i, p in enumerate(unit.parents))
        # No token of a unit is computed twice: siblings differ.
        assert len(set(zip(unit.parents, unit.tokens, strict=True))) == len(unit.tokens)


@given(some_rows, least)
def test_trunks_pay(rows: list[Row], least: int) -> None:
    forest = arrange(rows, least)
    for n, trunk in enumerate(forest.trunks):
        readers = sum(n in forest.chain(u.trunk) for u in forest.units)
        assert len(trunk.tokens) * (readers - 1) >= least


def test_no_trunk_is_missed() -> None:
    rows = [Row((*range(30), n), ()) for n in range(100, 103)]
    assert [t.tokens for t in arrange(rows, 60).trunks] == [tuple(range(30))]
    assert arrange(rows, 61).trunks == ()


def test_nested_trunks() -> None:
    rows = [Row((1,) * 30 + (n,) * 30 + (m,), ()) for n in (2, 3) for m in (5, 6)]
    forest = arrange(rows)
    assert [(t.parent, t.start, t.tokens) for t in forest.trunks] == [
        (-1, 0, (1,) * 30), (0, 30, (2,) * 30), (0, 30, (3,) * 30),
    ]  # fmt: skip
    assert forest.chain(2) == (0, 2)
    assert forest.chain(-1) == ()
    assert forest.unique_tokens == 30 + 30 + 30 + 4
    assert [len(u.tokens) for u in forest.units] == [1, 1, 1, 1]


def test_a_prompt_that_begins_another_keeps_its_last_token() -> None:
    short, long = Row((1,) * 40), Row((1,) * 40 + (2,) * 5)
    forest = arrange([short, long, short])
    assert [t.tokens for t in forest.trunks] == [(1,) * 39]
    assert sorted(u.tokens for u in forest.units) == [(1,), (1,), (1, 2, 2, 2, 2, 2)]


def test_continuations_share_their_beginning() -> None:
    [unit] = arrange([Row((7,), ((1, 2, 3), (1, 2, 4), (1, 5), (1,)))]).units
    assert unit.tokens == (7, 1, 2)  # what only ends a continuation is predicted, never read
    assert unit.targets == (((0, 1), (1, 2), (2, 3)), ((0, 1), (1, 2), (2, 4)), ((0, 1), (1, 5)), ((0, 1),))
    assert unit.plain


@pytest.mark.parametrize("rows", [[Row(())], [Row((1, 2)), Row((), ((1,),))]])
def test_an_empty_prompt_raises(rows: list[Row]) -> None:
    with pytest.raises(ValueError, match="at least one prompt token"):
        arrange(rows)


def test_nothing_is_arranged_into_nothing() -> None:
    assert arrange([]) == Forest((), ())
    assert list(batches(arrange([]))) == []


@given(some_rows, st.randoms(use_true_random=False), least)
def test_order_of_rows_does_not_matter(rows: list[Row], draw: random.Random, least: int) -> None:
    shuffled = draw.sample(rows, len(rows))

    def contents(some: list[Row]) -> Counter[object]:
        forest = arrange(some, least)
        return Counter((above(forest, u), u.tokens, u.parents, u.positions, u.targets) for u in forest.units)

    assert contents(rows) == contents(shuffled)
    assert arrange(rows, least).trunks == arrange(shuffled, least).trunks


def ranges(forest: Forest, batch: Batch) -> dict[tuple[str, int], range]:
    """Where every new trunk and every unit lies in a batch."""
    found = {("trunk", t): range(at, at + len(forest.trunks[t].tokens)) for t, at in batch.trunk_at.items()}
    units = zip(batch.units, batch.unit_at, strict=True)
    return found | {("unit", u.row): range(at, at + len(u.tokens)) for u, at in units}


def inside(inner: range, start: int, stop: int) -> bool:
    return start <= inner.start and inner.stop <= stop


@given(some_rows, st.sampled_from([1, 20, 60, 4096]), st.sampled_from([1, 7, 2048]), st.booleans(), least)
def test_batches(rows: list[Row], most_tokens: int, most_targets: int, keep: bool, least: int) -> None:
    forest = arrange(rows, least)
    made = list(batches(forest, most_tokens, most_targets=most_targets, keep=keep))
    assert [u for b in made for u in b.units] == list(forest.units)  # each once, in order
    known: set[int] = set()
    for batch in made:
        # What is computed fills the sequence without holes or overlaps.
        places = ranges(forest, batch)
        assert sorted(i for r in places.values() for i in r) == list(range(batch.length))
        assert set(batch.trunks) == set(batch.trunk_at)
        # The bounds hold, unless a single unit is larger.
        if len(batch.units) > 1:
            assert batch.length <= most_tokens
            assert sum(max(1, sum(map(len, u.targets))) for u in batch.units) <= most_targets
        # Every trunk that is read is either computed here or known; nothing known is computed again.
        assert set(batch.past) <= known
        assert not set(batch.past) & set(batch.trunks)
        needed = {t for u in batch.units for t in forest.chain(u.trunk)}
        assert needed == set(batch.past) | set(batch.trunks)
        # Spans: below a trunk lies exactly what hangs on it, trunks included.
        spans = {s.trunk: (s.start, s.stop) for s in batch.spans}
        assert len(spans) == len(batch.spans)
        for (kind, n), here in places.items():
            trunk = forest.trunks[n].parent if kind == "trunk" else next(u for u in batch.units if u.row == n).trunk
            chain = set(forest.chain(trunk))
            for t, (start, stop) in spans.items():
                assert inside(here, start, stop) == (t in chain)
                assert t in chain or here.stop <= start or stop <= here.start
            assert chain <= set(spans)
        known = {t for t in (known | set(batch.trunks)) if keep}
    if keep:
        assert sum(b.length for b in made) == forest.unique_tokens
    else:
        assert not any(b.past for b in made)


@given(some_rows, st.sampled_from([1, 20, 60]))
def test_a_trunk_stays_past_until_its_last_reader(rows: list[Row], most_tokens: int) -> None:
    """Whoever drops kept keys as soon as they are not `past` never misses one later."""
    forest = arrange(rows, 1)
    held: set[int] = set()
    for batch in batches(forest, most_tokens):
        held &= set(batch.past)
        assert held == set(batch.past)
        held |= set(batch.trunks)


def test_batches_are_as_full_as_the_bound_allows() -> None:
    rows = [Row((n,) * 10) for n in range(1, 8)]
    assert [b.length for b in batches(arrange(rows), 30)] == [30, 30, 10]
