"""Clustering weights: each row keeps a few numbers, and each weight is one of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whet.compress.layers import halved

ROUNDS = 20


def clustered(weight: Tensor, values: int, worth: Tensor) -> tuple[Tensor, nn.Parameter]:
    """A Codebook's codes and book for weights [out, in]: by k-means in one dimension, row by row (Lloyd 1982).

    Columns count by `worth` [in], the inputs' mean squares: so what is least is the error of the outputs. Starts at
    even quantiles.
    """
    ordered = weight.float().sort(1).values
    places = torch.linspace(0, ordered.shape[1] - 1, 2 * values + 1)[1::2].round().long()
    book, worth = ordered[:, places], worth.float().expand_as(ordered).contiguous()
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
