"""Tokens drawn from logits: what a row draws depends on seed, prompt, copy and step, never on what runs beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from whet.engine import Sampling
from whet.engine.prefix import Row, Tokens

DRAWN = 2**24  # chances that are drawn from at once


def copies_of(rows: Sequence[Row]) -> list[int]:
    """Of each row, how many before it have the same prompt: whatever runs together, no two copies draw alike."""
    seen: dict[Tokens, int] = {}
    numbers = []
    for row in rows:
        numbers.append(seen.get(row.prompt, 0))
        seen[row.prompt] = numbers[-1] + 1
    return numbers


def sampler(
    sampling: Sampling, rows: Sequence[tuple[Tokens, int, int]]
) -> Callable[[Tensor, list[int]], list[int]]:
    """A function (logits, rows) → tokens, called step by step; noise depends on seed, prompt and copy alone.

    `rows` are (prompt, which copy of it, number of the row).
    """
    if sampling.temperature <= 0:
        # The same as argmax, which takes five times as long on a CPU in bf16.
        return lambda logits, live: cast(list[int], logits.max(-1).indices.tolist())
    generators: dict[int, torch.Generator] = {}
    for prompt, copy, row in rows:
        seed = hash((sampling.seed, prompt, copy)) & 0x7FFF_FFFF_FFFF_FFFF
        generators[row] = torch.Generator().manual_seed(seed)

    def some(logits: Tensor, live: list[int]) -> list[int]:
        chances, index = torch.softmax(logits.float() / sampling.temperature, -1), None
        if sampling.top_p < 1:  # the nucleus: tokens before which less than top_p lies (Holtzman et al. 2020)
            chances, index = chances.sort(-1, descending=True)
            chances = chances.masked_fill(chances.cumsum(-1) - chances > sampling.top_p, 0)
        total = chances.cumsum(-1)
        point = torch.tensor([torch.rand(1, generator=generators[r]).item() for r in live], device=total.device)
        place = torch.searchsorted(total, (point * total[:, -1])[:, None], right=True).clamp(max=total.shape[1] - 1)
        return cast(list[int], (place if index is None else index.gather(1, place))[:, 0].tolist())

    def draw(logits: Tensor, live: list[int]) -> list[int]:
        each = max(1, DRAWN // logits.shape[-1])  # rows at once: several copies of their chances are held
        parts = range(0, len(live), each)
        return [token for at in parts for token in some(logits[at : at + each], live[at : at + each])]

    return draw
