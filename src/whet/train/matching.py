"""Hidden states that a student's layers are to have in common with a teacher's: what was cut away, told at every token.

A closed set's answers tell a student one choice a row; the teacher's states tell it all that the missing layers would
have made of every token (Romero et al. 2015, FitNets; Jiao et al. 2020, TinyBERT).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whet.compress.structure import hooked, layers
from whet.engine import Spent
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession, using_tree
from whet.train.batches import Pack
from whet.train.loop import target_logits
from whet.train.losses import Loss


def partners(student: Any, teacher: Any) -> list[int] | None:
    """For each of the student's layers, the teacher's whose output it is to have: the last before the next one kept.

    None where the student is not made of the teacher's layers (all of them, or those that `depth.keep` noted).
    """
    count, config, theirs = len(layers(teacher)), student.config.get_text_config(), teacher.config.get_text_config()
    numbers = list(getattr(theirs, "kept_layers", None) or range(count))
    kept = list(getattr(config, "kept_layers", None) or range(len(layers(student))))
    whole = len(kept) == count or hasattr(config, "kept_layers")
    alike = config.hidden_size == theirs.hidden_size and whole
    if not alike or len(kept) != len(layers(student)) or not {*kept} <= {*numbers}:
        return None
    places = [numbers.index(n) for n in kept]
    return [*(n - 1 for n in places[1:]), count - 1]


def _watch(module: Any, wanted: Iterable[int]) -> tuple[dict[int, Tensor], list[Any]]:
    """Where the outputs of these decoder layers stand after each pass, by their number; and the hooks that put them."""
    found: dict[int, Tensor] = {}

    def look(number: int, _: Any, __: Any, out: Any) -> None:
        found[number] = out[0] if isinstance(out, tuple) else out

    stack = layers(module)
    return found, [stack[n].register_forward_hook(partial(look, n)) for n in wanted]


class Match:
    """A loss to which the distance of hidden states is added, averaged over tokens and layers.

    It is scaled so that it weighs `weight` times as much as the loss itself, whatever the size of either (Muralidharan
    et al. 2024, Minitron). The distance is the squared error as a share of the teacher's squared length: layers and
    tokens whose states are large count no more than others. `ids` [V] are the teacher's of the student's tokens, where
    they differ. The student is watched from here on: it is to be a module of the training's own.
    """

    def __init__(
        self, inner: Loss, weight: float, live: TorchSession, teacher: TorchSession, pairs: Sequence[int],
        ids: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.inner, self.weight, self.live, self.teacher = inner, weight, live, teacher
        self.pairs, self.ids = pairs, ids
        self.seen, _ = _watch(live.module, range(len(pairs)))

    def count(self, rows: Sequence[Row]) -> float:
        """What the sum over these rows is divided by."""
        return self.inner.count(rows)

    def __call__(self, logits: Tensor, pack: Pack) -> Tensor:
        """A scalar, summed over the pack."""
        own, apart = self.inner(logits, pack), self.distance(pack)
        return own + self.weight * own.detach() / apart.detach().clamp_min(1e-6) * apart

    def distance(self, pack: Pack) -> Tensor:
        """Mean over tokens and layers of ‖student - teacher‖² / ‖teacher‖², for the pack the student has just read."""
        module = self.teacher.module
        read = pack if self.ids is None else replace(pack, ids=self.ids[pack.ids])
        theirs, hooks = _watch(module, set(self.pairs))
        with hooked(hooks), using_tree(module, shared=pack.plan is not None), torch.no_grad():
            target_logits(module, read)
        self.live.spent += Spent(prefilled_tokens=pack.tokens)
        total, real = torch.zeros((), device=pack.ids.device), _real(pack)
        for number, other in enumerate(self.pairs):
            wanted = theirs[other].float()
            off = (self.seen[number].float() - wanted).square().sum(-1)
            total = total + (off / wanted.square().sum(-1).clamp_min(1e-12))[real].mean()
        return total / len(self.pairs)


def _real(pack: Pack) -> Tensor:
    """[B, T] which places hold tokens and not what rows are padded with: up to the last one that a target follows."""
    if pack.plan is not None or pack.pick is None:
        return torch.ones_like(pack.ids, dtype=torch.bool)
    many = len(pack.places)
    last = torch.zeros(len(pack.ids), dtype=pack.pick.dtype, device=pack.ids.device)
    last = last.scatter_reduce(0, pack.pick // many, pack.places[pack.pick % many], "amax")
    return torch.arange(pack.ids.shape[1], device=pack.ids.device) <= last[:, None]

