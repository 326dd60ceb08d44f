"""The one visible training loop: it takes the packed batches and the loss as arguments, and any causal LM."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whet.engine import attention
from whet.engine.prefix import Row
from whet.engine.torch import using_tree
from whet.errors import MethodError
from whet.train.batches import packs, singles

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Schedule:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM): it can be continued, because only the end decays."""

    learning_rate: float
    steps: int
    warmup: float = 0.06  # share of the steps
    decay: float = 0.3

    def at(self, step: int) -> float:
        """Learning rate of a step (from 0)."""
        rise = max(1, round(self.warmup * self.steps))
        fall = max(1, round(self.decay * self.steps))
        share = min(1.0, (step + 1) / rise, (self.steps - step) / fall)
        return self.learning_rate * max(0.0, share)


@dataclass(frozen=True)
class Settings:
    """How a module is trained. `patience` validations without a new best end the training early."""

    schedule: Schedule
    clip: float = 1.0
    weight_decay: float = 0.0
    validations: int = 4
    patience: int = 3


@dataclass(frozen=True)
class Curves:
    """Both curves as (tokens trained, loss per target token in nats), and which validation was kept."""

    train: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...]
    best: int
    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Beat:
    """One step, as progress is told."""

    step: int
    steps: int
    loss: float
    tokens: int
    seconds: float


class Masters:
    """fp32 master copies of what is trained: bf16 weights would lose small updates (for fp32 weights no copy)."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.live = [p for p in module.parameters() if p.requires_grad]
        self.copies = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.live]

    def take_gradients(self) -> None:
        """Hand the live gradients to the copies."""
        for live, copy in zip(self.live, self.copies, strict=True):
            if copy is not live and live.grad is not None:
                copy.grad, live.grad = live.grad.float(), None

    def give_weights(self) -> None:
        """Round the copies into the live weights."""
        with torch.no_grad():
            for live, copy in zip(self.live, self.copies, strict=True):
                if copy is not live:
                    live.copy_(copy)

    def snapshot(self) -> list[Tensor]:
        """The weights as they are now."""
        return [p.detach().clone() for p in self.live]

    def restore(self, weights: Sequence[Tensor]) -> None:
        """Put a snapshot back."""
        with torch.no_grad():
            for live, saved in zip(self.live, weights, strict=True):
                live.copy_(saved)


def train(
    module: Any,
    source: Iterator[list[Row]],
    loss: Loss,
    settings: Settings,
    validate: Callable[[], float] | None = None,
    beat: Callable[[Beat], None] | None = None,
) -> Curves:
    """Train a module's trainable weights in place; the weights of the best validation are kept.

    `source` yields the rows of each step; `loss` maps logits [P, vocabulary] and targets [P] to a sum over targets.
    Raises MethodError when the loss is not finite; the module then holds the last good validated weights.
    """
    masters, schedule = Masters(module), settings.schedule
    optimizer = torch.optim.AdamW(
        masters.copies, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    train_curve: list[tuple[int, float]] = []
    checks: list[tuple[int, float]] = []
    best, best_at, tokens, begun = masters.snapshot(), 0, 0, time.monotonic()
    due = {math.ceil(schedule.steps * (i + 1) / settings.validations) for i in range(settings.validations)}
    if validate:
        checks.append((0, validate()))
    step = 0
    for step in range(1, schedule.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step - 1)
        value, used = _step(module, next(source), loss)
        if not math.isfinite(value):
            masters.restore(best)
            raise MethodError(
                f"the loss is not finite at step {step}",
                expected="a finite loss",
                found=str(value),
                do=f"set learning_rate={schedule.learning_rate / 4:.2g}",
            )
        masters.take_gradients()
        torch.nn.utils.clip_grad_norm_(masters.copies, settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        masters.give_weights()
        tokens += used
        train_curve.append((tokens, value))
        if beat:
            beat(Beat(step, schedule.steps, value, tokens, time.monotonic() - begun))
        if validate and step in due:
            checks.append((tokens, validate()))
            if checks[-1][1] <= min(c for _, c in checks):
                best, best_at = masters.snapshot(), len(checks) - 1
            elif len(checks) - 1 - best_at >= settings.patience:
                break
    if validate:
        masters.restore(best)
    return Curves(tuple(train_curve), tuple(checks), best_at, step, tokens, time.monotonic() - begun)


def _step(module: Any, rows: Sequence[Row], loss: Loss) -> tuple[float, int]:
    """Forward and backward over one step's rows; returns the mean loss per target token and the tokens computed."""
    total, tokens = 0.0, 0
    shared = attention.shares(module, max(len(r.prompt) + max(map(len, r.continuations)) for r in rows))
    made = packs(rows, module.dtype, module.device) if shared else singles(rows, module.device)
    targets = sum(len(pack.targets) for pack in made)
    with using_tree(module, train=True, shared=shared):
        for pack in made:
            plan = {"whet_plan": pack.plan} if shared else {}
            logits = module(
                input_ids=pack.ids,
                position_ids=pack.positions,
                use_cache=False,
                logits_to_keep=pack.places,
                **plan,
            ).logits[0]
            part = loss(logits, pack.targets) / targets
            part.backward()
            total += float(part.detach())
            tokens += pack.tokens
    return total, tokens
