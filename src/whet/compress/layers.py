"""Layers that stand where a linear layer stood; `KINDS` is what a folder may name.

Each has a `kind`, `settings` (plain data that `blank` takes back) and tensors only in its state, so that
`compress.folder` can write and rebuild it without knowing which it is.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Layer(Protocol):
    """What stands in for a linear layer or an embedding."""

    kind: ClassVar[str]

    @property
    def settings(self) -> dict[str, Any]:
        """What `blank` needs beside the layer that is replaced, as plain data."""
        ...

    @classmethod
    def blank(cls, layer: Any, **settings: Any) -> Any:
        """An empty layer in the place of `layer`, whose tensors are read afterwards."""
        ...


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


KINDS: dict[str, Any] = {Relaxed.kind: Relaxed}  # name → Layer
