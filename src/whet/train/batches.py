"""Training batches: rows packed into trees, so that no token is computed twice or for nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whet.engine import attention, prefix
from whet.engine.prefix import Row

PACK_TOKENS = 2048  # packed tokens per backward pass: more needs memory and is no faster
PACK_TARGETS = 1024  # tokens with logits per backward pass: the vocabulary is what fills memory


@dataclass(frozen=True)
class Pack:
    """One packed forward pass: ids and positions [1, T], the places whose logits are needed, and what follows them."""

    ids: Tensor
    positions: Tensor
    plan: attention.Plan
    places: Tensor  # [P] indices into the packed sequence
    targets: Tensor  # [P] the token that follows each place
    rows: Tensor  # [P] the row of the step that each target belongs to
    tokens: int  # tokens computed


def packs(rows: Sequence[Row], dtype: torch.dtype, device: torch.device) -> list[Pack]:
    """Pack the rows of one optimizer step into as few forward passes as the bounds allow."""
    forest = prefix.arrange(rows)
    made = []
    for batch in prefix.batches(forest, PACK_TOKENS, most_targets=PACK_TARGETS, keep=False):
        ids, positions = attention.packed(forest, batch, device)
        found = [
            (at + before, token, unit.row)
            for unit, at in zip(batch.units, batch.unit_at, strict=True)
            for target in unit.targets
            for before, token in target
        ]
        places, targets, owners = (torch.tensor(column, device=device) for column in zip(*found, strict=True))
        made.append(
            Pack(ids, positions, attention.plan(forest, batch, dtype, device), places, targets, owners, batch.length)
        )
    return made


def steps(rows: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Endless steps of `size` rows: every row once per epoch, in an order that depends on seed and epoch only."""
    epoch = 0
    while True:
        order = list(range(len(rows)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for at in range(0, len(order), size):
            yield [rows[i] for i in order[at : at + size]]
        epoch += 1


def tokens_per_row(rows: Sequence[Row], size: int, seed: int, looked_at: int = 8) -> float:
    """Tokens that training computes per row, shared beginnings counted once per step; from a few sample steps."""
    source = steps(rows, size, seed)
    sampled = [next(source) for _ in range(looked_at)]
    return sum(prefix.arrange(s).unique_tokens for s in sampled) / max(1, sum(map(len, sampled)))
