"""Layers that stand where a linear layer stood; `KINDS` is what a folder may name.

Each has a `kind`, `settings` (plain data that `blank` takes back) and tensors only in its state, so that
`compress.folder` can write and rebuild it without knowing which it is.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Relaxed(nn.Module):
    """A linear layer and a low-rank term of its own: y = base(x) + up (down x).

    What relaxes a tie between layers (Bae et al. 2024), and an adapter over weights that cannot take it in.
    """

    kind: ClassVar[str] = "relaxed"

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Parameter(down, requires_grad=False), nn.Parameter(up, requires_grad=False)

    @property
    def settings(self) -> dict[str, Any]:
        """The rank of its own term."""
        return {"rank": self.down.shape[0]}

    @classmethod
    def blank(cls, layer: Any, *, rank: int) -> Relaxed:
        """Around a linear layer that is given."""
        down, up = ((rank, layer.in_features), (layer.out_features, rank))
        return cls(layer, torch.empty(down, device="meta"), torch.empty(up, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] → [.., out]."""
        made: Tensor = self.base(x)
        return made + linear(linear(x, self.down), self.up)

    def dense(self) -> nn.Linear:
        """One linear layer of base + up · down, added in fp32 and rounded once."""
        base: Any = self.base.dense() if hasattr(self.base, "dense") else self.base  # type: ignore[operator]
        made = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
        weight = base.weight.float() + self.up.float() @ self.down.float()
        made.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
        made.bias = base.bias
        return made


class Codebook(nn.Linear):
    """A linear layer whose weights are each one of `values` numbers of their row (Han et al. 2016, Deep Compression).

    `book` [out, values] are the numbers, and can be trained; `codes` say which, two to the byte where that goes. The
    weights are looked up anew for every product.
    """

    kind: ClassVar[str] = "codebook"
    codes: Tensor

    def __init__(self, codes: Tensor, book: nn.Parameter, bias: Tensor | None, size: int) -> None:
        nn.Module.__init__(self)
        self.book, self.bias = book, bias  # type: ignore[assignment]
        self.register_buffer("codes", codes)  # uint8 [out, in] or [out, in / 2]: the low half is the first column
        self.out_features, self.in_features = len(codes), size

    @property
    def settings(self) -> dict[str, Any]:
        """Numbers per row."""
        return {"values": self.book.shape[1]}

    @classmethod
    def blank(cls, layer: Any, *, values: int) -> Codebook:
        """In the place of a linear layer."""
        size, half = layer.in_features, halved(values, layer.in_features)
        codes = torch.empty(layer.out_features, size // 2 if half else size, dtype=torch.uint8, device="meta")
        book = nn.Parameter(torch.empty(layer.out_features, values, device="meta"), requires_grad=False)
        return cls(codes, book, layer.bias, size)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights [out, in] that the codes stand for."""
        codes = self.codes
        if codes.shape[1] < self.in_features:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        return self.book.gather(1, codes.long())

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] → [.., out]."""
        return linear(x, self.weight, self.bias)

    def dense(self) -> nn.Linear:
        """An ordinary layer with the same weights."""
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        made.weight, made.bias = nn.Parameter(self.weight.detach(), requires_grad=False), self.bias
        return made


def halved(values: int, size: int) -> bool:
    """Whether codes of rows of `size` stand two to the byte."""
    return values <= 16 and size % 2 == 0


KINDS: dict[str, Any] = {Relaxed.kind: Relaxed, Codebook.kind: Codebook}  # name → layer
