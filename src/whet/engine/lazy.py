"""Choosing from a large closed set without scoring all of it: best first over the tree of the choices.

Log-probabilities only fall along a branch, so a node's score so far bounds every choice below it. The most promising
node of each prompt is expanded, one wave over all prompts at a time, until the best entry is a complete choice: no
other can be better. Where `PATIENCE` expansions have not settled it (a model that hardly knows the labels), the best
branch is followed to its end and the best complete choice is taken. With 77 intents this reads some ten tokens a
prompt where the whole tree has 380. A wave over few prompts costs hardly more with further tokens in it: nodes that
are likely to be asked for next are read along, which saves waves and changes no choice.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from whet.engine import Progress, attention, prefix
from whet.engine.prefix import Row, Tokens

if TYPE_CHECKING:
    from whet.engine.torch import Prefilled, TorchSession

SMALL = 24  # tokens of a tree of choices up to which it is scored whole: that takes one pass, a search several
FEW = 16  # choices up to which all are scored: few but long ones are soon read, and outlast a search's patience
PATIENCE = 16  # expansions per prompt before the search only follows the best branch to its end
EXPECTED = 14  # expansions per prompt, for estimates
WIDE = 16  # tokens of a wave up to which one more costs little
AHEAD = 64  # nodes per prompt that may be read before they are asked for


@dataclass
class Node:
    """A node of the tree of choices: `below` lists the choices under it, `ends` those that end here."""

    token: int
    parent: int
    depth: int
    below: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    children: dict[int, int] = field(default_factory=dict)


def tree(choices: Sequence[Tokens]) -> list[Node]:
    """The tree of choices; node 0 is the root, before any token."""
    nodes = [Node(-1, -1, 0)]
    for n, tokens in enumerate(choices):
        at = 0
        nodes[0].below.append(n)
        for token in tokens:
            if token not in nodes[at].children:
                nodes[at].children[token] = len(nodes)
                nodes.append(Node(token, at, nodes[at].depth + 1))
            at = nodes[at].children[token]
            nodes[at].below.append(n)
        nodes[at].ends.append(n)
    return nodes


def worth(sets: Sequence[Sequence[Tokens]]) -> bool:
    """Whether searching beats scoring whole trees, judged by the largest of the first few sets."""
    return any(len(s) > FEW and len(tree(s)) - 1 - len(s) > SMALL for s in sets[:4])


class _Search:
    """The search for one prompt: a frontier of (bound, node), best first."""

    def __init__(self, nodes: list[Node], lengths: Sequence[int], offsets: Sequence[float]) -> None:
        self.nodes, self.lengths, self.offsets = nodes, lengths, offsets
        self.frontier: list[tuple[float, int, int]] = []  # (-bound, node, choice that ends here or -1)
        self.sums = {0: 0.0}
        self.slots: dict[int, int] = {}  # node → its place among the nodes whose keys are at hand
        self.at, self.taken = 0, 0  # the node asked for, and how many were before it
        self.read: dict[int, Sequence[float]] = {}  # node not yet expanded → log-probabilities of its children
        self.guesses = AHEAD  # how many more may be read ahead
        self.following = False  # whether patience has run out
        self.last: frozenset[int] = frozenset()  # children of the node expanded last

    def _bound(self, node: int, choices: Sequence[int]) -> float:
        return max(self.sums[node] / self.lengths[c] - self.offsets[c] for c in choices)

    def expand(self, node: int, logprobs: Sequence[float]) -> None:
        """Put the children of a node on the frontier, given the log-probability of each child's token."""
        self.last = frozenset(self.nodes[node].children.values())
        for child, logprob in zip(self.nodes[node].children.values(), logprobs, strict=True):
            self.sums[child] = self.sums[node] + logprob
            here = self.nodes[child]
            for choice in here.ends:
                heapq.heappush(self.frontier, (-self._bound(child, [choice]), child, choice))
            rest = [c for c in here.below if c not in here.ends]
            if rest:
                heapq.heappush(self.frontier, (-self._bound(child, rest), child, -1))

    def next(self) -> int:
        """Take the node to expand next off the frontier; -1 when the search has ended."""
        if self.frontier[0][2] >= 0 or (self.following and not self.last):
            return -1
        self.taken += 1
        if self.taken <= PATIENCE:
            return heapq.heappop(self.frontier)[1]
        # Out of patience: from here on only the best branch below the last expanded node is followed.
        below = [e for e in self.frontier if not self.following or e[1] in self.last]
        best = min(below)
        self.following = True
        if best[2] >= 0:
            return -1
        self.frontier.remove(best)
        heapq.heapify(self.frontier)
        return best[1]

    def unread(self) -> int:
        """Expand what is asked for as long as it was read; the first node that was not, or -1 when the search ended."""
        while self.at in self.read:
            self.expand(self.at, self.read.pop(self.at))
            self.at = self.next()
        return self.at

    def wave(self, most: int) -> list[int]:
        """What to read next: the node asked for and, up to `most` together, others likely to be; each gets a place."""
        ahead = self._likely(min(most - 1, self.guesses))
        self.guesses -= len(ahead)
        for node in (self.at, *ahead):
            self.slots[node] = len(self.slots)
        return [self.at, *ahead]

    def _likely(self, most: int) -> list[int]:
        """At most `most` nodes, parents first: what promises most, each with what lies behind it up to a fork."""
        found: list[int] = []
        others = sorted(self.frontier) if most > 0 and not self.following else []
        for head in (self.at, *(node for _, node, choice in others if choice < 0)):
            inner = [head]
            while len(inner) == 1 and len(found) < most:
                found += [node for node in inner if node != self.at and node not in self.slots]
                inner = [c for c in self.nodes[inner[0]].children.values() if self.nodes[c].children]
            if head == self.at:  # the next one asked for may be behind the fork
                found += inner
        return found[: max(0, most)]

    def path(self, node: int) -> list[int]:
        """Slots of a node's ancestors that hold keys."""
        found = []
        while (node := self.nodes[node].parent) > 0:
            found.append(self.slots[node])
        return found

    def result(self) -> tuple[float, ...]:
        """Every choice's score, the best complete one greatest; others may be bounds, cut below it."""
        scores = [0.0] * len(self.lengths)
        complete = max((-bound for bound, _, choice in self.frontier if choice >= 0), default=0.0)
        for bound, node, choice in self.frontier:
            for c in [choice] if choice >= 0 else self.nodes[node].below:
                if choice >= 0:
                    scores[c] = -bound
                elif c not in self.nodes[node].ends:
                    scores[c] = min(-bound, math.nextafter(complete, -math.inf))
        return tuple(scores)


def choose(
    session: TorchSession,
    rows: Sequence[Row],
    sets: Sequence[Sequence[Tokens]],
    whole: bool,
    offsets: Sequence[float],
    progress: Progress | None,
) -> tuple[list[tuple[float, ...]], int]:
    """Scores of each row's choices, the greatest exact, and the tokens computed."""
    from whet.engine.torch import groups, no_gradients, using_tree

    trees: dict[tuple[Tokens, ...], list[Node]] = {}
    searches = []
    for choices in sets:
        key = tuple(choices)
        nodes = trees[key] if key in trees else trees.setdefault(key, tree(key))
        lengths = [1] * len(key) if whole else [len(c) for c in key]
        searches.append(_Search(nodes, lengths, offsets or [0.0] * len(key)))
    results: list[tuple[float, ...]] = [()] * len(rows)
    forest, tokens, done = prefix.arrange(rows), 0, 0
    room = PATIENCE + max(node.depth for nodes in trees.values() for node in nodes) + AHEAD + 1
    for group in groups(forest, room, session.key_tokens):
        with using_tree(session.module), no_gradients(session.module):
            tokens += _search_group(session, forest, group, rows, searches, room)
        for unit in group:
            results[unit.row] = searches[unit.row].result()
        done += len(group)
        if progress:
            progress(done, len(rows))
    return results, tokens


def _search_group(
    session: TorchSession,
    forest: prefix.Forest,
    units: Sequence[prefix.Unit],
    rows: Sequence[Row],
    searches: Sequence[_Search],
    room: int,
) -> int:
    """Waves of expansions for units that fit into memory together; returns the tokens computed."""
    ready = session.prefill(forest, units, room)
    own, tokens = ready.own, ready.tokens
    live = [(unit, searches[unit.row]) for unit in units]
    seen = torch.zeros(len(units), ready.capacity, dtype=torch.bool)  # written place by place: not on a GPU
    for n, unit in enumerate(units):
        seen[n, : len(unit.tokens)] = True
    logits, asked = ready.logits, [(n, search, 0) for n, (_, search) in enumerate(live)]
    while True:
        for (_, search, node), values in zip(asked, _below(logits, asked), strict=True):
            search.read[node] = values
        going = [i for i, (_, search) in enumerate(live) if search.unread() >= 0]
        if not going:
            return tokens
        if len(going) < len(live):
            index = torch.tensor(going, device=session.module.device)
            own = {n: (k.index_select(0, index), v.index_select(0, index)) for n, (k, v) in own.items()}
            live, seen = [live[i] for i in going], seen[going]
        waves = [search.wave(WIDE // len(live)) for _, search in live]
        width = max(map(len, waves))
        ids, depths, plan = _packed(live, waves, seen, replace(ready, own=own), session.module.dtype)
        places = [len(rows[unit.row].prompt) - 1 for unit, _ in live for _ in range(width)]
        logits = session.advance(ids, [at + depth for at, depth in zip(places, depths, strict=True)], plan)
        asked = [
            (n * width + i, search, node)
            for n, ((_, search), wave) in enumerate(zip(live, waves, strict=True)) for i, node in enumerate(wave)
        ]  # fmt: skip
        tokens += len(asked)


def _packed(
    live: Sequence[tuple[prefix.Unit, _Search]],
    waves: Sequence[Sequence[int]],
    seen: torch.Tensor,
    ready: Prefilled,
    dtype: torch.dtype,
) -> tuple[list[int], list[int], attention.Decode]:
    """A wave as a step: its tokens and their depths, row by row, and how they attend.

    A row with fewer nodes than another is filled up: what is written at the last place is read by nobody.
    """
    from whet.engine.torch import additive, decode_reads

    width, device = max(map(len, waves)), ready.logits.device
    ids, depths = ([0] * (len(live) * width) for _ in range(2))
    at = torch.full((len(live), width), ready.capacity - 1)
    mask = seen[:, None].repeat(1, width, 1)
    for n, ((unit, search), wave) in enumerate(zip(live, waves, strict=True)):
        for i, node in enumerate(wave):
            ids[n * width + i], depths[n * width + i] = search.nodes[node].token, search.nodes[node].depth
            slots = [len(unit.tokens) + slot for slot in (*search.path(node), search.slots[node])]
            mask[n, i, slots], at[n, i] = True, slots[-1]
    reads = decode_reads(ready.forest, [unit for unit, _ in live])
    return ids, depths, attention.Decode(ready.own, at.flatten().to(device), additive(mask.to(device), dtype), reads,
                                         ready.kept, width)  # fmt: skip


def _below(logits: torch.Tensor, asked: Sequence[tuple[int, _Search, int]]) -> list[list[float]]:
    """Log-probabilities of the children of nodes, each given by its row of the logits [rows, vocabulary]."""
    wanted = [(row, token) for row, search, node in asked for token in search.nodes[node].children]
    values = logits.float()
    total = torch.logsumexp(values, -1)
    rows, tokens = torch.tensor(wanted, device=values.device).T
    found = iter((values[rows, tokens] - total[rows]).tolist())
    return [[next(found) for _ in search.nodes[node].children] for _, search, node in asked]
