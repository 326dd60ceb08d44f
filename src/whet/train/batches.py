"""Training batches: rows packed into trees, so that no token is computed twice or for nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from whet.engine import attention, prefix
from whet.engine.prefix import Batch, Forest, Row

T = TypeVar("T")
# Tokens per backward pass, beside the longest shared beginning: activations take 1.7 MB a token on a 135M model.
PACK_TOKENS = 1024
DEVICE_PACKS = 8  # times as many on a GPU, which smaller passes leave idle; where they do not fit, they are halved
PACK_TARGETS = 1024  # tokens with logits per backward pass: the vocabulary is what fills memory
LEAST_STEPS = 64  # where a budget allows fewer steps of the rows wanted, a step takes fewer rows
LEAST_BATCH = 8
PADDING = 0.125  # of the tokens of a padded pass may be padding, at most: beyond, two passes are quicker than one
WORTH = 0.125  # of the tokens that read a shared beginning it must save: measured, the merging costs about as much


@dataclass(frozen=True)
class Pack:
    """One forward pass: ids and positions [B, T], the places whose logits are needed, and what follows them.

    With a plan, B is 1 and the rows are packed; without, continuations stand padded beneath each other, each behind its
    prompt, for models whose attention cannot be shared. A sequence is one continuation of one row; those of a row stand
    together.
    """

    ids: Tensor
    positions: Tensor
    plan: attention.Plan | None
    places: Tensor  # [K] columns whose logits are computed
    pick: Tensor | None  # [P] which of the B·K logits are wanted; None: all of them
    targets: Tensor  # [P] the token that follows each place
    sequences: Tensor  # [P] which of the S sequences each target belongs to
    owners: Tensor  # [S] the row of the step that each sequence belongs to
    facts: Tensor  # [S, F] what the loss knows about each sequence
    tokens: int  # tokens computed


def pack_tokens(device: torch.device) -> int:
    """Tokens of a pass on this device."""
    return PACK_TOKENS * (DEVICE_PACKS if device.type == "cuda" else 1)


def pack_targets(most: int, device: torch.device) -> int:
    """Targets of a pass of `most` tokens on this device."""
    return PACK_TARGETS * max(1, min(most, pack_tokens(device)) // PACK_TOKENS)


def packs(rows: Sequence[Row], dtype: torch.dtype, device: torch.device, most: int = PACK_TOKENS) -> list[Pack]:
    """Pack the rows of one optimizer step into forward passes, as `_cut` says."""
    forest, cut = _cut(rows, most, device)
    made = []
    for batch in cut:
        ids, positions = attention.packed(forest, batch, device)
        places = [
            at + before
            for unit, at in zip(batch.units, batch.unit_at, strict=True)
            for target in unit.targets
            for before, _ in target
        ]
        made.append(
            Pack(
                ids, positions, attention.plan(forest, batch, dtype, device), torch.tensor(places, device=device), None,
                *_wanted(rows, [unit.row for unit in batch.units], device), batch.length,
            )
        )  # fmt: skip
    return made


def _cut(rows: Sequence[Row], most: int, device: torch.device) -> tuple[Forest, list[Batch]]:
    """Rows as a tree, cut into packs of about `most` tokens, or so many behind the longest shared beginning.

    The latter has the beginning computed once for many rows, by activations of no more than `most` tokens above those
    that a single row behind it takes; of both ways the one that computes fewer tokens.
    """
    forest = prefix.arrange(rows, worth=WORTH)
    longest = max((trunk.start + len(trunk.tokens) for trunk in forest.trunks), default=0)
    ways = []
    for aside in sorted({0, longest}):
        # Packs of like size: a small last one would compute the shared beginnings for a few rows only.
        behind = forest.unique_tokens - aside
        wanted = math.ceil(behind / most)
        size = aside + (math.ceil(1.1 * behind / wanted) if wanted > 1 else most)
        ways.append(list(prefix.batches(forest, size, most_targets=pack_targets(most, device), keep=False)))
    return forest, min(ways, key=_length)


def _length(cut: Sequence[Batch]) -> int:
    return sum(batch.length for batch in cut)


def computed(rows: Sequence[Row], module: Any = None) -> int:
    """Tokens that the passes of one step compute; without a module, one that can share beginnings is meant."""
    device = torch.device("cpu") if module is None else module.device
    most = pack_tokens(device)
    if module is None or shares(module, rows):
        return _length(_cut(rows, most, device)[1])
    return sum(_area(rows, batch) for batch in _alike(rows, most, device))


def shares(module: Any, rows: Sequence[Row]) -> bool:
    """Whether a module's attention can share the beginnings of such rows."""
    return attention.shares(module, max(len(r.prompt) + max(map(len, r.continuations)) for r in rows))


def batched(module: Any, rows: Sequence[Row], shared: bool, most: int | None = None) -> list[Pack]:
    """Forward passes of rows, about `most` tokens each: packs where beginnings are shared, else padded rows.

    By default packs have `PACK_TOKENS`, and what is not shared runs row by row, so that nothing is padded.
    """
    if shared:
        return packs(rows, module.dtype, module.device, most or PACK_TOKENS)
    return padded(rows, module.device, most or 1)


def row_tokens(row: Row, shared: bool) -> int:
    """Tokens of the smallest pass that a row fits into: its prompt is computed once, or once per continuation."""
    if shared:
        return len(row.prompt) + sum(map(len, row.continuations))
    return len(row.continuations) * _width(row)


def _width(row: Row) -> int:
    return len(row.prompt) + max(map(len, row.continuations)) - 1


def padded(rows: Sequence[Row], device: torch.device, most: int = 1) -> list[Pack]:
    """Passes of rows of like length, of at most `most` tokens unless one row has more; nothing is shared.

    By default each row is a pass of its own. Padding stands behind what a causal model reads, so that it needs no mask.
    """
    return [_padded(rows, batch, device) for batch in _alike(rows, most, device)]


def _alike(rows: Sequence[Row], most: int, device: torch.device) -> list[list[int]]:
    """Rows, by their numbers, in passes of like length, the longest last."""
    made: list[list[int]] = []
    real = 0
    for n in sorted(range(len(rows)), key=lambda n: (_width(rows[n]), len(rows[n].prompt))):
        batch = [*(made[-1] if made else ()), n]
        tokens, real = _area(rows, batch), real + row_tokens(rows[n], shared=False)
        places = _width(rows[n]) + 1 - min(len(rows[i].prompt) for i in batch)
        count = sum(len(rows[i].continuations) for i in batch)
        fits = tokens <= most and count * places <= pack_targets(most, device)
        if made and fits and tokens - real <= PADDING * tokens:
            made[-1] = batch
        else:
            made.append([n])
            real = row_tokens(rows[n], shared=False)
    return made


def _area(rows: Sequence[Row], batch: Sequence[int]) -> int:
    """Tokens of a padded pass, padding included."""
    return sum(len(rows[n].continuations) for n in batch) * _width(rows[batch[-1]])


def _padded(rows: Sequence[Row], some: Sequence[int], device: torch.device) -> Pack:
    """One pass over the chosen rows, the longest last."""
    width, first = _width(rows[some[-1]]), min(len(rows[n].prompt) for n in some) - 1
    sequences = [(rows[n].prompt, c) for n in some for c in rows[n].continuations]
    ids = torch.tensor([(*p, *c[:-1], *[0] * (width + 1 - len(p) - len(c))) for p, c in sequences], device=device)
    pick = [b * (width - first) + len(p) - 1 - first + i for b, (p, c) in enumerate(sequences) for i in range(len(c))]
    return Pack(
        ids, torch.arange(width, device=device).expand_as(ids), None, torch.arange(first, width, device=device),
        torch.tensor(pick, device=device), *_wanted(rows, some, device), ids.numel(),
    )  # fmt: skip


def _wanted(rows: Sequence[Row], some: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets, their sequences, owners and facts of the chosen rows."""
    sequences = [(n, c, target) for n in some for c, target in enumerate(rows[n].continuations)]
    targets = [token for _, _, target in sequences for token in target]
    of = [s for s, (_, _, target) in enumerate(sequences) for _ in target]
    facts = [rows[n].facts[c] if rows[n].facts else () for n, c, _ in sequences]
    return (
        torch.tensor(targets, device=device),
        torch.tensor(of, device=device),
        torch.tensor([n for n, _, _ in sequences], device=device),
        torch.tensor(facts, dtype=torch.float32, device=device).reshape(len(sequences), -1),
    )


def per_epoch(rows: int, size: int) -> int:
    """Steps of at most `size` rows that see each of so many rows once."""
    return math.ceil(rows / size)


def step_count(wanted: float, rows: int, size: int) -> int:
    """Steps that see `wanted` rows in all, out of so many, in steps of at most `size`; one at least."""
    return max(1, round(wanted / rows * per_epoch(rows, size)))


def steps(rows: Sequence[T], size: int, seed: int) -> Callable[[int], list[T]]:
    """The rows of each step (from 0): every row once per epoch, in an order that depends on seed and epoch only.

    An epoch's steps differ by one row at most: a last one of few rows would weigh as much as a full one.
    """
    each = per_epoch(len(rows), size)

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        drawn = list(range(len(rows)))
        random.Random(f"{seed}/{epoch}").shuffle(drawn)
        return drawn

    def step(number: int) -> list[T]:
        epoch, at = divmod(number, each)
        return [rows[i] for i in order(epoch)[at * len(rows) // each : (at + 1) * len(rows) // each]]

    return step


def tokens_per_row(rows: Sequence[Row], size: int, seed: int, looked_at: int = 8, module: Any = None) -> float:
    """Tokens that training a module (`computed`) takes per row; from a few sample steps."""
    source = steps(rows, size, seed)
    sampled = [source(n) for n in range(looked_at)]
    return sum(computed(s, module) for s in sampled) / max(1, sum(map(len, sampled)))


def affordable(
    some: Sequence[Row], wanted: float, size: int, allowed: int | None, seed: int, module: Any = None
) -> tuple[float, int]:
    """(rows to train on in all, rows a step) out of `wanted` rows in steps of `size`, where `allowed` tokens bound it.

    `some` are rows that show what one costs. A short training takes smaller steps, so that there are enough of them.
    """
    if allowed is None:
        return wanted, size
    wanted = min(wanted, allowed / tokens_per_row(some, size, seed, module=module))
    size = max(min(LEAST_BATCH, size), min(size, round(wanted / LEAST_STEPS)))
    return min(wanted, allowed / tokens_per_row(some, size, seed, module=module)), size
