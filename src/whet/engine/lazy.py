"""Choosing from a large closed set without scoring all of it: best first over the tree of the choices.

Log-probabilities only fall along a branch, so a node's score so far bounds every choice below it. The most promising
node of each prompt is expanded, one wave over all prompts at a time, until the best entry is a complete choice: no
other can be better. Where `PATIENCE` expansions have not settled it (a model that hardly knows the labels), the best
branch is followed to its end and the best complete choice is taken. With 77 intents this reads some ten tokens a
prompt where the whole tree has 380.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from whet.engine import Progress, attention, prefix
from whet.engine.prefix import Row, Tokens

if TYPE_CHECKING:
    from whet.engine.torch import TorchSession

SMALL = 24  # tokens of a tree of choices up to which it is scored whole: that takes one pass, a search several
FEW = 16  # choices up to which all are scored: few but long ones are soon read, and outlast a search's patience
PATIENCE = 16  # expansions per prompt before the search only follows the best branch to its end
EXPECTED = 14  # expansions per prompt, for estimates


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
        self.slots: dict[int, int] = {}  # node → where its key lies
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
        if len(self.slots) < PATIENCE:
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
    room = PATIENCE + max(node.depth for nodes in trees.values() for node in nodes)
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
    from whet.engine.torch import additive, decode_reads

    ready = session.prefill(forest, units, room)
    device, own, tokens = session.module.device, ready.own, ready.tokens
    live, at = list(units), [0] * len(units)
    seen = torch.zeros(len(units), ready.capacity, dtype=torch.bool)  # written place by place: not on a GPU
    for n, unit in enumerate(units):
        seen[n, : len(unit.tokens)] = True
    logits = ready.logits
    while True:
        _expand(logits, [searches[u.row] for u in live], at)
        wanted = [searches[u.row].next() for u in live]
        going = [i for i, node in enumerate(wanted) if node >= 0]
        if not going:
            return tokens
        if len(going) < len(live):
            index = torch.tensor(going, device=device)
            own = {n: (k.index_select(0, index), v.index_select(0, index)) for n, (k, v) in own.items()}
            live, wanted, seen = [live[i] for i in going], [wanted[i] for i in going], seen[going]
        mask, slots = seen.clone(), []
        for n, (unit, node) in enumerate(zip(live, wanted, strict=True)):
            search = searches[unit.row]
            slot = len(unit.tokens) + len(search.slots)
            search.slots[node] = slot
            slots.append(slot)
            mask[n, [*search.path(node), slot]] = True
        at = wanted
        nodes = [searches[u.row].nodes[node] for u, node in zip(live, at, strict=True)]
        plan = attention.Decode(
            own, torch.tensor(slots, device=device), additive(mask.to(device), session.module.dtype),
            decode_reads(ready.forest, live), ready.kept,
        )  # fmt: skip
        places = [len(rows[u.row].prompt) + node.depth - 1 for u, node in zip(live, nodes, strict=True)]
        logits = session.advance([node.token for node in nodes], places, plan)
        tokens += len(live)


def _expand(logits: torch.Tensor, searches: Sequence[_Search], at: Sequence[int]) -> None:
    """Expand one node of every search, given logits [searches, vocabulary] behind it."""
    tried = enumerate(zip(searches, at, strict=True))
    wanted = [(i, token) for i, (search, node) in tried for token in search.nodes[node].children]
    values = logits.float()
    total = torch.logsumexp(values, -1)
    index = torch.tensor([i for i, _ in wanted], device=values.device)
    tokens = torch.tensor([t for _, t in wanted], device=values.device)
    found = iter((values[index, tokens] - total[index]).tolist())
    for search, node in zip(searches, at, strict=True):
        search.expand(node, [next(found) for _ in search.nodes[node].children])
