"""Clustering weights: each row keeps a few numbers, and each weight is one of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d

from whet.compress.layers import halved

ROUNDS = 20


def clustered(weight: Tensor, values: int, worth: Tensor) -> tuple[Tensor, nn.Parameter]:
    """A Codebook's codes and book for weights [out, in]: by k-means in one dimension, row by row (Lloyd 1982).

    Columns count by `worth` [in], the inputs' mean squares: so what is least is the error of the outputs. Starts with
    as many numbers in a place as the cube root of the density of weights there, the best for many of them (Panter &
    Dite 1951).
    """
    ordered = weight.float().sort(1).values
    gaps = (ordered[:, 1:] - ordered[:, :-1]).clamp_min(1e-12)
    near = max(1, weight.shape[1] // (8 * values))  # neighbours on either side by which the density is told
    gaps = avg_pool1d(gaps[:, None], 2 * near + 1, 1, near, count_include_pad=False)[:, 0]
    along = nn.functional.pad((gaps ** (2 / 3)).cumsum(1), (1, 0))
    wanted = along[:, -1:] * ((torch.arange(values, device=weight.device) + 0.5) / values)
    book = ordered.gather(1, torch.searchsorted(along, wanted).clamp_max(weight.shape[1] - 1))
    worth = worth.float().expand_as(ordered).contiguous()
    rows = weight.float().contiguous()
    for turn in range(ROUNDS + 1):
        codes = torch.searchsorted((book[:, 1:] + book[:, :-1]) / 2, rows)
        if turn == ROUNDS:
            break
        total = torch.zeros_like(book).scatter_add_(1, codes, worth)
        mean = torch.zeros_like(book).scatter_add_(1, codes, worth * rows) / total
        book = torch.where(total > 0, mean, book).sort(1).values
    held = nn.Parameter(book.to(weight.dtype), requires_grad=False)
    codes = codes.to(torch.uint8)
    if halved(values, weight.shape[1]):
        codes = codes[:, ::2] | (codes[:, 1::2] << 4)
    return codes.contiguous(), held
