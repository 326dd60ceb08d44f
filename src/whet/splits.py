"""Cutting rows into parts that share nothing: repeats, near repeats and groups are found, and stay on one side."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from whet.rows import short

if TYPE_CHECKING:
    from whet.task import Example

Leaks = tuple[tuple[str, str], ...]  # (id of the row, why)
Pairs = set[tuple[str, str]]  # neighbouring words

NEAR = 0.85  # Jaccard of character trigrams from which two prompts nearly repeat each other
SHORTEST = 5  # words: below, prompts of different meaning differ in a few letters, so that only the same is a repeat
PROBES = 6  # the rarest word pairs of a row that are looked up: two edits cost four of them
MOST_HOLDERS = 100  # a word pair that more rows hold belongs to a template
TEMPLATE, TEMPLATE_SHARE = 4, 0.05  # a prompt that stands before more rows, and before that share of them, is one
_PUNCTUATION = {ord(mark): " " for mark in ".,;:!?\"'`´()[]{}…‘’“”„«»‹›¿¡、。，！？：；「」『』（）"}
_NUMBER = re.compile(r"\d+")
_TOKEN = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")


def _key(example: Example) -> str:
    """What rows share that repeat each other: all that is said before the answer, without case, spaces, punctuation.

    Signs that mean something (+ - * / < = % …) stay: 3-5 does not repeat 3*5.
    """
    said = [content for role, content in example.history if role != "system"] + [example.prompt or example.text or ""]
    text = unicodedata.normalize("NFKC", "\n".join(said)).casefold()
    return " ".join(text.translate(_PUNCTUATION).split()) or " ".join(text.split())


def _keys(*parts: Sequence[Example]) -> list[list[str]]:
    """The keys of the rows of each part. Where one prompt stands before many rows, what else they show counts, too.

    "Which sentence is right?" does not repeat itself where the choices differ, nor a constant question where the
    system's turn does.
    """
    keys = [[_key(row) for row in part] for part in parts]
    times = Counter(key for part in keys for key in part)
    often = max(TEMPLATE, TEMPLATE_SHARE * sum(times.values()))

    def whole(key: str, row: Example) -> str:
        if times[key] <= often:
            return key
        more = [*sorted(row.choices), *(content for role, content in row.history if role == "system")]
        return "\n".join([key, *(" ".join(text.casefold().split()) for text in more)])

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
    near = dict(near_repeats([keys[i] for i in left], held_keys))
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


def near_repeats(
    keys: Sequence[str], others: Sequence[str] | None = None, threshold: float = NEAR
) -> list[tuple[int, int]]:
    """Pairs (i, j) where keys[i] nearly repeats others[j], one for each i; without `others`, all j < i within keys.

    Nearly: Jaccard of character trigrams ≥ threshold (Broder, 1997), the same numbers, and at least 5 words. Text that
    many rows share (a template, an instruction) hardly counts: word pairs are weighted by rarity. Candidates come from
    an inverted index of the rarest word pairs (the prefix filter of Chaudhuri et al., 2006): the cost is near linear.
    """
    rows = [_Prepared(key) for key in keys]
    pool = rows if others is None else [_Prepared(key) for key in others]
    postings: dict[tuple[str, str], list[int]] = defaultdict(list)
    for j, row in enumerate(pool):
        for pair in row.pairs:
            postings[pair].append(j)
    rare = math.log(len(pool) + 1)
    weight = {pair: rare - math.log(len(holders)) for pair, holders in postings.items()}
    found = []
    for i, row in enumerate(rows):
        known = sorted((len(postings[pair]), pair) for pair in row.pairs if pair in postings)
        if 2 * len(known) <= len(row.pairs):
            continue
        rarest = [postings[pair] for count, pair in known[:PROBES] if count <= MOST_HOLDERS]
        hits = Counter(j for holders in rarest for j in holders)
        for j in sorted(j for j, count in hits.items() if count >= min(2, len(rarest))):  # each edit costs two pairs
            if others is None and j >= i:
                break
            if _near(row, pool[j], threshold) and _alike(row.pairs, pool[j].pairs, weight, rare):
                found.append((i, j))
                if others is not None:
                    break
    return found


class _Prepared:
    """A key with what comparing it needs; the trigrams only once asked for, since few rows ever are."""

    def __init__(self, key: str) -> None:
        words = _TOKEN.findall(key)
        self.key = key
        self.pairs: Pairs = set(zip(words, words[1:], strict=False)) if len(words) >= SHORTEST else set()
        self.numbers = _NUMBER.findall(key)

    @cached_property
    def trigrams(self) -> frozenset[str]:
        return frozenset(self.key[n : n + 3] for n in range(len(self.key) - 2))


def _near(a: _Prepared, b: _Prepared, threshold: float) -> bool:
    if a.numbers != b.numbers:  # a sum with another number is another question
        return False
    if min(len(a.key), len(b.key)) < threshold * max(len(a.key), len(b.key)):
        return False
    shared = len(a.trigrams & b.trigrams)
    return shared >= threshold * (len(a.trigrams) + len(b.trigrams) - shared)


def _alike(a: Pairs, b: Pairs, weight: Mapping[tuple[str, str], float], rare: float) -> bool:
    shared = sum(weight[pair] for pair in a & b)
    apart = sum(weight.get(pair, rare) for pair in a ^ b)
    return shared > 0 and shared >= apart


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
        for i, j in near_repeats([keys[i] for i in distinct]):
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
