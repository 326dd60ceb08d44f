"""Cutting rows into parts that share nothing: repeats, near repeats and groups are found, and stay on one side."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from whet.documents import MARKS
from whet.rows import short

if TYPE_CHECKING:
    from whet.task import Example

Leaks = tuple[tuple[str, str], ...]  # (id of the row, why)
Pairs = NDArray[np.uint64]  # hashes of neighbouring words, sorted, each once

NEAR = 0.85  # Jaccard of character trigrams from which two prompts nearly repeat each other
APART = 3  # words in one place, none of them the other's: another question on the same passage
SHORTEST = 5  # words: below, prompts of different meaning differ in a few letters, so that only the same is a repeat
FEW = 0.25  # a difference that many a method does not make
PROBES = 6  # the rarest word pairs of a row that are looked up: two edits cost four of them
MOST_HOLDERS = 100  # a word pair that more rows hold belongs to a template
TEMPLATE, TEMPLATE_SHARE = 4, 0.05  # a prompt that stands before more rows, and before that share of them, is one
# Scripts without spaces between words (inside a character set): Thai, Lao, Burmese, Khmer, kana, Han.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30fa\u30fc-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
_QUOTES = {ord(mark): " " for mark in "\"'`´‘’“”„«»‹›¿¡、。「」『』"}
_APART = {ord(mark): f" {mark} " for mark in "()[]{}"}  # ":)" is not ":(", however it is spaced
_STOP = re.compile(r"[.,;:!?…](?![a-z0-9_=<>+*/&|-])")  # before these signs it is code or a number: x != 1, 1.5
_LAST = re.compile(rf"(?<=[\w{MARKS}])[.,;:!?…。、]+$")
_NUMBER = re.compile(r"\d+")
_BRACKET = re.compile(r"[()\[\]{}]")
_TOKEN = re.compile(rf"[{UNSPACED}][{MARKS}]*|(?:[^\W{UNSPACED}][{MARKS}]*)+|[^\w\s]")


def _text(example: Example) -> str:
    """All that is said before the answer, without case and further spaces."""
    said = [content for role, content in example.history if role != "system"] + [example.prompt or example.text or ""]
    return " ".join(unicodedata.normalize("NFKC", "\n".join(said)).casefold().split())


def _key(example: Example) -> str:
    """What rows share that repeat each other: all that is said before the answer, without case, spaces, punctuation.

    Signs that mean something (+ - * / < = % …) and brackets stay: 3-5 does not repeat 3*5.
    """
    text = _text(example)
    return " ".join(_STOP.sub(" ", text.translate(_QUOTES | _APART)).split()) or text


def _keys(*parts: Sequence[Example]) -> list[list[str]]:
    """The keys of the rows of each part. Where one prompt stands before many rows, what else they show counts, too.

    "Which sentence is right?" does not repeat itself where the choices differ, nor a constant question where the
    system's turn does. There, all punctuation counts but that of the last word.
    """
    keys = [[_key(row) for row in part] for part in parts]
    times = Counter(key for part in keys for key in part)
    often = max(TEMPLATE, TEMPLATE_SHARE * sum(times.values()))

    def whole(key: str, row: Example) -> str:
        if times[key] <= often:
            return key
        more = [*sorted(row.choices), *(content for role, content in row.history if role == "system")]
        return "\n".join([_LAST.sub("", _text(row)), *(" ".join(text.casefold().split()) for text in more)])

    return [[whole(k, row) for k, row in zip(ks, part, strict=True)] for ks, part in zip(keys, parts, strict=True)]


def mark(example: Example) -> str:
    """The hash of what rows share that repeat each other; it tells a row again without telling the row."""
    return hashlib.sha256(_key(example).encode()).hexdigest()


def without(rows: tuple[Example, ...], held: tuple[Example, ...]) -> tuple[tuple[Example, ...], Leaks]:
    """Rows that neither repeat (or nearly so) nor share a group with held-out rows; and the others, as (id, why)."""
    if not rows or not held:
        return rows, ()
    keys, held_keys = _keys(rows, held)
    same = dict(zip(reversed(held_keys), reversed(held), strict=True))
    groups = {row.group: row for row in reversed(held) if row.group is not None}
    left = [i for i, row in enumerate(rows) if keys[i] not in same and row.group not in groups]
    answers, theirs = [_said(rows[i]) for i in left], [_said(row) for row in held]
    near = dict(near_repeats([keys[i] for i in left], held_keys, answers=(answers, theirs)))
    close = {i: near[n] for n, i in enumerate(left) if n in near}
    kept, dropped = [], []
    for i, row in enumerate(rows):
        if keys[i] in same:
            dropped.append((row.id, f"repeats {same[keys[i]].id}"))
        elif row.group in groups:
            dropped.append((row.id, f"shares group {short(row.group)} with {groups[row.group].id}"))
        elif i in close:
            dropped.append((row.id, f"nearly repeats {held[close[i]].id}"))
        else:
            kept.append(row)
    return tuple(kept), tuple(dropped)


@dataclass(frozen=True)
class Sealed:
    """Held-out rows that a Method does not see: it can only ask which of other rows repeat them."""

    _rows: tuple[Example, ...] = field(default=(), repr=False)

    def __contains__(self, row: Example) -> bool:
        """Whether a row repeats a held-out one, but for case, spaces and punctuation."""
        return mark(row) in self._marks

    @cached_property
    def _marks(self) -> frozenset[str]:
        return frozenset(map(mark, self._rows))

    def without(self, rows: tuple[Example, ...]) -> tuple[tuple[Example, ...], Leaks]:
        """`without` these held-out rows."""
        return without(rows, self._rows)


def _said(row: Example) -> str:
    """The answer of a row without case, further spaces and punctuation at its end."""
    return _LAST.sub("", " ".join(row.completion.casefold().split()))


def near_repeats(
    keys: Sequence[str],
    others: Sequence[str] | None = None,
    threshold: float = NEAR,
    answers: tuple[Sequence[str], Sequence[str]] | None = None,
) -> list[tuple[int, int]]:
    """Pairs (i, j) where keys[i] nearly repeats others[j], one for each i; without `others`, all j < i within keys.

    Nearly: Jaccard of character trigrams ≥ threshold (Broder, 1997), the same numbers, the same brackets left open (or
    none on one side), and at least 5 words. Text that many rows share (a template, an instruction) hardly counts: word
    pairs are weighted by rarity. Another question on the same passage is none, nor are texts whose `answers` (those of
    keys and of others), where both are known, have little in common: they give nothing away.
    Candidates come from an inverted index of the rarest word pairs (the prefix filter of Chaudhuri et al., 2006): the
    cost is near linear.
    """
    pool = keys if others is None else others
    held = _Postings([_pairs(key) for key in pool])
    found = []
    for i, key in enumerate(keys):
        pairs = held.of(i) if others is None else _pairs(key)
        known = held.places(pairs)
        known = known[known >= 0]
        if 2 * len(known) <= len(pairs):
            continue
        rarest = known[np.argsort(held.counts[known], kind="stable")][:PROBES]
        rarest = rarest[held.counts[rarest] <= MOST_HOLDERS]
        hits = Counter(j for place in rarest for j in held.holders(place))
        for j in sorted(j for j, count in hits.items() if count >= min(2, len(rarest))):  # each edit costs two pairs
            if others is None and j >= i:
                break
            if answers and _differ(answers[0][i], answers[1][j]):
                continue
            if _near(key, pool[j], threshold) and held.alike(pairs, held.of(j)) and not _asks_other(key, pool[j]):
                found.append((i, j))
                if others is not None:
                    break
    return found


def _pairs(key: str) -> Pairs:
    words = _TOKEN.findall(key)
    if sum(word[0].isalnum() for word in words) < SHORTEST:
        return np.empty(0, np.uint64)
    codes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], np.uint64)
    return np.unique(codes[:-1] << np.uint64(32) | codes[1:])


class _Postings:
    """Which rows hold a word pair, and what it weighs: the rarer, the more. Arrays, since rows may be many."""

    def __init__(self, rows: Sequence[Pairs]) -> None:
        sizes = [len(pairs) for pairs in rows]
        self._all = np.concatenate([np.empty(0, np.uint64), *rows])
        self._ends = np.cumsum([0, *sizes])
        order = np.argsort(self._all, kind="stable")
        self._holders = np.repeat(np.arange(len(rows), dtype=np.uint32), sizes)[order]
        self._pairs, self._starts, self.counts = np.unique(self._all[order], return_index=True, return_counts=True)
        self._rare = math.log(len(rows) + 1)

    def of(self, row: int) -> Pairs:
        """The pairs of one row."""
        return self._all[self._ends[row] : self._ends[row + 1]]

    def places(self, pairs: Pairs) -> NDArray[np.intp]:
        """The place of each pair; -1 where no row holds it."""
        if not len(self._pairs):
            return np.full(len(pairs), -1)
        found = np.searchsorted(self._pairs, pairs)
        return np.where(self._pairs[np.minimum(found, len(self._pairs) - 1)] == pairs, found, -1)

    def holders(self, place: int) -> list[int]:
        """The rows that hold the pair of a place."""
        start = self._starts[place]
        found: list[int] = self._holders[start : start + self.counts[place]].tolist()
        return found

    def alike(self, a: Pairs, b: Pairs) -> bool:
        """Whether what two rows share weighs at least as much as what they do not."""
        shared = self._weight(np.intersect1d(a, b, assume_unique=True))
        return shared > 0 and shared >= self._weight(np.setxor1d(a, b, assume_unique=True))

    def _weight(self, pairs: Pairs) -> float:
        places = self.places(pairs)
        return len(pairs) * self._rare - float(np.log(self.counts[places[places >= 0]]).sum())


@lru_cache(1024)
def _signs(key: str) -> tuple[list[str], list[str]]:
    """The numbers of a key, and the brackets that prose would close: an emoticon's, or those of a task of brackets."""
    left: list[str] = []
    for bracket in _BRACKET.findall(key):
        if left and left[-1] + bracket in ("()", "[]", "{}"):
            left.pop()
        else:
            left.append(bracket)
    return _NUMBER.findall(key), left


@lru_cache(1024)  # few rows are ever compared, and some of them often
def _trigrams(key: str) -> frozenset[str]:
    return frozenset(key[n : n + 3] for n in range(len(key) - 2))


def _near(a: str, b: str, threshold: float) -> bool:
    if min(len(a), len(b)) < threshold * max(len(a), len(b)):
        return False
    (numbers, left), (others, open_) = _signs(a), _signs(b)
    if numbers != others or (left and open_ and left != open_):  # a sum with another number is another question
        return False
    first, second = _trigrams(a), _trigrams(b)
    shared = len(first & second)
    return shared >= threshold * (len(first) + len(second) - shared)


def _differ(a: str, b: str) -> bool:
    """Whether two answers are known and have little in common."""
    if not a or not b or a in b or b in a:
        return False
    first, second = _trigrams(a), _trigrams(b)
    shared = len(first & second)
    return 2 * shared < len(first) + len(second) - shared


def _asks_other(a: str, b: str) -> bool:
    """Whether texts differ in one stretch alone, and there in most words: the question on a passage that they share."""
    first, second = _TOKEN.findall(a), _TOKEN.findall(b)
    begin = next((n for n, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), None)
    if begin is None:
        return False
    first, second = first[begin:][::-1], second[begin:][::-1]
    end = next((n for n, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), 0)
    one, other = Counter(first[end:]), Counter(second[end:])
    apart = min((one - other).total(), (other - one).total())
    return apart >= APART and 2 * apart >= max(one.total(), other.total())


def _clusters(rows: Sequence[Example], near: bool) -> list[list[int]]:
    """Rows that must not be parted: of one group, with one prompt, or (near) with nearly the same."""
    [keys] = _keys(rows)
    first: dict[tuple[str, str], int] = {}
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, row in enumerate(rows):
        for mark in (("key", keys[i]), *([("group", row.group)] if row.group is not None else [])):
            parent[root(i)] = root(first.setdefault(mark, i))
    if near:
        distinct = sorted({first[("key", key)] for key in keys}, key=lambda i: keys[i])
        answers = [_said(rows[i]) for i in distinct]
        for i, j in near_repeats([keys[i] for i in distinct], answers=(answers, answers)):
            parent[root(distinct[i])] = root(distinct[j])
    clusters: dict[int, list[int]] = defaultdict(list)
    for i in range(len(rows)):
        clusters[root(i)].append(i)
    return list(clusters.values())


def cut(
    rows: Sequence[Example], size: int, *, seed: int, closed: bool, near: bool = False
) -> tuple[list[int], list[int]]:
    """Indices (kept, held), about `size` held: stratified by completion where closed, groups and repeats whole.

    Which rows are held depends on contents and seed alone, not on ids or the order of the rows. Where no two rows
    belong together, each label's count is within 1 of its share. Of a single cluster nothing is held, else something.
    """
    size = min(size, len(rows))
    seen = Counter(row.completion for row in rows)
    strata = [row.completion if closed and (not row.choices or seen[row.completion] >= 5) else "" for row in rows]
    marks = [
        hashlib.sha256(json.dumps([seed, _key(row), row.completion, row.choices]).encode()).hexdigest() for row in rows
    ]
    clusters = sorted(_clusters(rows, near), key=lambda cluster: min(marks[i] for i in cluster))
    if size < 1 or len(clusters) < 2:
        return list(range(len(rows))), []
    share = {label: size * count / len(rows) for label, count in Counter(strata).items()}
    lack = {label: math.floor(part) for label, part in share.items()}
    order = sorted(
        share, key=lambda label: (lack[label] - share[label], hashlib.sha256(f"{seed} {label}".encode()).digest())
    )
    for label in order[: size - sum(lack.values())]:
        lack[label] += 1
    held: list[int] = []
    for cluster in clusters:
        taken = Counter(strata[i] for i in cluster)
        if sum(abs(lack[label] - n) for label, n in taken.items()) < sum(abs(lack[label]) for label in taken):
            held += cluster
            for label, n in taken.items():
                lack[label] -= n
    if not held:
        held = min(clusters, key=len)
    chosen = set(held)
    return [i for i in range(len(rows)) if i not in chosen], sorted(chosen)


def shared_order(rows: Sequence[Example], closed: bool, seed: int) -> list[Example]:
    """One order of rows that all are compared in: classes in turn, so that each beginning is balanced."""
    draw = random.Random(seed)
    piles: dict[str, list[Example]] = defaultdict(list)
    for row in rows:
        piles[row.completion if closed and not row.choices else ""].append(row)
    for name in sorted(piles):
        draw.shuffle(piles[name])
    placed = [
        ((i + 0.5) / len(pile), draw.random(), row) for _, pile in sorted(piles.items()) for i, row in enumerate(pile)
    ]
    return [row for _, _, row in sorted(placed, key=lambda item: item[:2])]


def few(sealed: Sequence[Example]) -> str:
    """That so few sealed rows show no small difference, in words; empty where they may show one under FEW.

    It is `stats.Paired.smallest_detectable`, of scores of 0 and 1, where all rows that differ do so to one side: then
    d = POWER * sqrt(d * (1 - d) / n). Texts are scored otherwise.
    """
    from whet.stats import POWER

    n = len({("group", e.group) if e.group is not None else ("row", i) for i, e in enumerate(sealed)})
    if not n or any(e.text is not None for e in sealed):
        return ""
    least = max(POWER**2 / (POWER**2 + n), min(1.0, 3 / n))
    what = f"{n} rows are" if n == len(sealed) else f"rows of {n} groups are"
    return "" if least < FEW else (f"{what} sealed: a gain of less than about {100 * least:.0f} points cannot be shown "
                                   "on so few; more in test.jsonl show less")  # fmt: skip
