"""Training batches: rows packed into trees, so that no token is computed twice or for nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whet.engine import attention, prefix
from whet.engine.prefix import Row

PACK_TOKENS = 1024  # packed tokens per backward pass: activations take 1.7 MB a token on a 135M model
PACK_TARGETS = 1024  # tokens with logits per backward pass: the vocabulary is what fills memory


@dataclass(frozen=True)
class Pack:
    """One packed forward pass: ids and positions [1, T], the places whose logits are needed, and what follows them.

    Without a plan it is one plain sequence, for models whose attention cannot be shared.
    """

    ids: Tensor
    positions: Tensor
    plan: attention.Plan | None
    places: Tensor  # [P] indices into the packed sequence
    targets: Tensor  # [P] the token that follows each place
    rows: Tensor  # [P] the row of the step that each target belongs to
    tokens: int  # tokens computed


def packs(rows: Sequence[Row], dtype: torch.dtype, device: torch.device) -> list[Pack]:
    """Pack the rows of one optimizer step into as few forward passes as the bounds allow."""
    forest = prefix.arrange(rows)
    made = []
    # Packs of like size: a small last one would compute the shared beginnings for a few rows only.
    wanted = math.ceil(forest.unique_tokens / PACK_TOKENS)
    most = math.ceil(1.1 * forest.unique_tokens / wanted) if wanted > 1 else PACK_TOKENS
    for batch in prefix.batches(forest, most, most_targets=PACK_TARGETS, keep=False):
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


def singles(rows: Sequence[Row], device: torch.device) -> list[Pack]:
    """One pass for every continuation of every row, nothing shared."""
    made = []
    for n, row in enumerate(rows):
        for target in row.continuations:
            ids = torch.tensor([(*row.prompt, *target[:-1])], device=device)
            size = ids.shape[1]
            places = torch.arange(len(row.prompt) - 1, size, device=device)
            positions, owners = torch.arange(size, device=device)[None], torch.full_like(places, n)
            made.append(Pack(ids, positions, None, places, torch.tensor(target, device=device), owners, size))
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
