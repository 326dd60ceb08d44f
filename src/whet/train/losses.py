"""Losses over the logits at target places; each is a function a loop can take."""

from __future__ import annotations

import torch
from torch import Tensor


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log-likelihood, in nats, of `targets` [P] under `logits` [P, vocabulary]; computed in fp32.

    Divided by the number of targets of the whole step it is the mean that TRL's SFTTrainer minimises.
    """
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
