"""The tree of shared beginnings: which tokens are computed once, and what goes into which batch.

Rows (a prompt and the continuations to be scored behind it) are arranged into *trunks*, beginnings that several rows
share, and *units*, what a row has for itself: the rest of its prompt and the tree of its continuations. A batch is one
packed sequence, depth first, so that everything below a trunk is one contiguous span. Scoring, generation and training
all use this arrangement. Everything here is a pure function of the rows; no tensor appears.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

Tokens = tuple[int, ...]

LEAST_SAVED = 24  # tokens a trunk must save: below it, the extra kernel calls of a trunk cost more than it saves


@dataclass(frozen=True)
class Row:
    """A prompt and the continuations to be scored behind it, as token ids.

    `facts[c]` are numbers about continuation c that a training loss needs; arranging pays no heed to them.
    """

    prompt: Tokens
    continuations: tuple[Tokens, ...] = ()
    facts: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Trunk:
    """A beginning that rows share: `tokens` stand from position `start` on, behind those of `parent` (-1: none)."""

    parent: int
    start: int
    tokens: Tokens


@dataclass(frozen=True)
class Unit:
    """What one row has for itself behind its trunk.

    `tokens[i]` follows `tokens[parents[i]]` (-1: the trunk's last token) at `positions[i]`; `plain` says that the unit
    is one chain. `last` is the index of the prompt's last token; `targets[c]` lists, for continuation c, pairs of
    (index of the token before, the token itself).
    """

    row: int
    trunk: int
    tokens: Tokens
    parents: Tokens
    positions: Tokens
    plain: bool
    last: int
    targets: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Forest:
    """All rows, arranged: trunks in depth-first order, units in the order of the trunk they hang on."""

    trunks: tuple[Trunk, ...]
    units: tuple[Unit, ...]

    def chain(self, trunk: int) -> tuple[int, ...]:
        """The trunk and its ancestors, outermost first; empty for -1."""
        found: list[int] = []
        while trunk >= 0:
            found.append(trunk)
            trunk = self.trunks[trunk].parent
        return tuple(reversed(found))

    @property
    def unique_tokens(self) -> int:
        """Tokens that are computed when every trunk is computed once."""
        return sum(len(t.tokens) for t in self.trunks) + sum(len(u.tokens) for u in self.units)


def _common(a: Tokens, b: Tokens, start: int) -> int:
    """Length of the common beginning of a and b, known to agree before `start`."""
    end = min(len(a), len(b))
    while start < end and a[start] == b[start]:
        start += 1
    return start


def _unit(index: int, row: Row, trunk: int, start: int) -> Unit:
    """The unit of a row whose first `start` prompt tokens lie in trunks: prompt rest, then the continuations' trie."""
    tokens = list(row.prompt[start:])
    parents = list(range(-1, len(tokens) - 1))
    positions = list(range(start, start + len(tokens)))
    last = len(tokens) - 1
    children: dict[tuple[int, int], int] = {}
    targets = []
    for continuation in row.continuations:
        at, pairs = last, []
        for n, token in enumerate(continuation):
            pairs.append((at, token))
            if n + 1 == len(continuation):
                break  # nothing follows the last token: it is predicted, never read
            child = children.get((at, token))
            if child is None:
                child = children[at, token] = len(tokens)
                tokens.append(token)
                parents.append(at)
                positions.append(positions[at] + 1)
            at = child
        targets.append(tuple(pairs))
    plain = all(p == i - 1 for i, p in enumerate(parents))
    return Unit(index, trunk, tuple(tokens), tuple(parents), tuple(positions), plain, last, tuple(targets))


def arrange(rows: Sequence[Row], least: int = LEAST_SAVED, worth: float = 0.0) -> Forest:
    """Arrange rows into trunks and units; a trunk is made where it saves at least `least` tokens.

    It must also save `worth` of the tokens that read it, since reading is not free.
    Raises ValueError on an empty prompt. Rows keep their index in `Unit.row`.
    """
    if any(not row.prompt for row in rows):
        raise ValueError("a row needs at least one prompt token")
    order = sorted(range(len(rows)), key=lambda i: (rows[i].prompt, i))
    shared = [rows[i].prompt[:-1] for i in order]  # every unit keeps its prompt's last token
    before = [0, *accumulate(map(len, shared))]
    trunks: list[Trunk] = []
    homes: list[tuple[int, int, int]] = []  # (trunk, start, row)
    # Depth first with an explicit stack: (low, high, depth all agree on, trunk, depth that trunks cover).
    stack = [(0, len(order), 0, -1, 0)] if order else []
    while stack:
        low, high, depth, trunk, covered = stack.pop()
        if high - low == 1:
            homes.append((trunk, covered, order[low]))
            continue
        depth = _common(shared[low], shared[high - 1], depth)
        below = before[high] - before[low] - depth * (high - low)
        if (depth - covered) * (high - low - 1) >= max(least, worth * below):
            trunks.append(Trunk(trunk, covered, shared[low][covered:depth]))
            trunk, covered = len(trunks) - 1, depth
        split, parts = low, []
        for i in range(low, high):
            token = shared[i][depth] if len(shared[i]) > depth else None
            follows = shared[i + 1][depth] if i + 1 < high and len(shared[i + 1]) > depth else None
            if token is None:
                homes.append((trunk, covered, order[i]))
                split = i + 1
            elif i + 1 == high or follows != token:
                parts.append((split, i + 1, depth + 1, trunk, covered))
                split = i + 1
        stack.extend(reversed(parts))
    units = [_unit(row, rows[row], trunk, start) for trunk, start, row in homes]
    units.sort(key=lambda u: (u.trunk, len(u.tokens), u.row))
    return Forest(tuple(trunks), tuple(units))


@dataclass(frozen=True)
class Span:
    """Queries [start, stop) of the packed batch read all keys of trunk `trunk`."""

    trunk: int
    start: int
    stop: int


@dataclass(frozen=True)
class Batch:
    """One packed sequence: where each new trunk and unit starts in it, and which span reads which trunk.

    `trunks` are computed in this batch, `past` must be at hand from an earlier one (outermost first).
    """

    trunks: tuple[int, ...]
    past: tuple[int, ...]
    units: tuple[Unit, ...]
    trunk_at: dict[int, int] = field(repr=False)
    unit_at: tuple[int, ...] = field(repr=False)
    spans: tuple[Span, ...] = field(repr=False)
    length: int


def _lay_out(forest: Forest, units: Sequence[Unit], known: frozenset[int]) -> Batch:
    """Lay units (in order of their trunks) and the trunks they need out as one packed sequence."""
    needed: list[int] = []
    for unit in units:
        needed += [t for t in forest.chain(unit.trunk) if t not in needed]
    new = [t for t in sorted(needed) if t not in known]
    by_trunk: dict[int, list[int]] = {}
    for i, unit in enumerate(units):
        by_trunk.setdefault(unit.trunk, []).append(i)
    at, trunk_at, unit_at = 0, {}, [0] * len(units)
    first: dict[int, int] = {}  # trunk -> where the span of its readers starts
    last: dict[int, int] = {}
    # Trunk numbers are depth first, so walking them in order keeps each subtree contiguous.
    for trunk in [-1] * (-1 in by_trunk) + sorted(needed):
        if trunk >= 0:
            if trunk in new:
                trunk_at[trunk] = at
                at += len(forest.trunks[trunk].tokens)
                for above in forest.chain(trunk)[:-1]:
                    first.setdefault(above, at - len(forest.trunks[trunk].tokens))
                    last[above] = at
            first.setdefault(trunk, at)
        for i in by_trunk.get(trunk, ()):
            unit_at[i] = at
            at += len(units[i].tokens)
            for above in forest.chain(trunk):
                first.setdefault(above, unit_at[i])
                last[above] = at
    spans = tuple(Span(t, first[t], last[t]) for t in sorted(needed) if t in last and last[t] > first[t])
    past = tuple(t for t in sorted(needed) if t in known)
    return Batch(tuple(new), past, tuple(units), trunk_at, tuple(unit_at), spans, at)


def batches(
    forest: Forest,
    most_tokens: int = 4096,
    *,
    most_targets: int = 2048,
    keep: bool = True,
) -> Iterator[Batch]:
    """Cut a forest into packed batches of at most `most_tokens` tokens (one unit at least) and `most_targets` targets.

    With `keep`, trunks computed in one batch are `past` in the next; else each batch computes all it needs.
    """
    known: set[int] = set()
    pending: list[Unit] = []
    size = targets = 0
    here: set[int] = set()

    def cost(unit: Unit) -> int:
        fresh = [t for t in forest.chain(unit.trunk) if t not in here and not (keep and t in known)]
        return len(unit.tokens) + sum(len(forest.trunks[t].tokens) for t in fresh)

    for unit in forest.units:
        wanted = max(1, sum(len(t) for t in unit.targets))
        if pending and (size + cost(unit) > most_tokens or targets + wanted > most_targets):
            batch = _lay_out(forest, pending, frozenset(known if keep else ()))
            yield batch
            known = set(forest.chain(unit.trunk)) & (known | set(batch.trunks))
            pending, size, targets, here = [], 0, 0, set()
        size += cost(unit)
        targets += wanted
        here |= set(forest.chain(unit.trunk))
        pending.append(unit)
    if pending:
        yield _lay_out(forest, pending, frozenset(known if keep else ()))
