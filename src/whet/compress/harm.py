"""Which layers' rounding changes what a model says most: their outputs' errors, weighed by the answers' gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from whet.compress.packed import Pack
from whet.compress.structure import hooked
from whet.engine import Spent
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession, using_tree
from whet.train.batches import batched, shares
from whet.train.loop import target_logits

PASSES = 3  # a row forward, its gradients backward, and each layer's error on it


def harms(
    session: TorchSession, rows: Sequence[Row], packs: Mapping[int, Pack], seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, float]:  # fmt: skip
    """What packing each weight (id) by itself adds to the KL divergence of the rows' next tokens, about, in nats each.

    To the second order that is half of the error's square in the Fisher information of the outputs, here its diagonal
    (HAWQ, Dong et al. 2019; SqueezeLLM, Kim et al. 2023), by gradients of logits along one random direction a token
    whose covariance is that of its softmax. An error of the same size weighs a thousand times more in one layer than in
    another, and of one layer in a few tokens: errors relative to a layer's outputs do not see that.
    """
    module: Any = session.module
    total, targets = dict.fromkeys(packs, 0.0), 0
    passes = batched(module, rows, shares(module, rows))
    dice = torch.Generator(module.device).manual_seed(seed)
    known = [m for m in module.modules() if isinstance(m, nn.Linear) and id(m.weight) in packs]

    def watch(linear: nn.Linear, given: tuple[Tensor, ...], out: Tensor) -> None:
        key, x = id(linear.weight), given[0].detach()

        def back(gradient: Tensor) -> None:
            off = linear.weight.detach().float() - packs[key].dense()
            total[key] += float((x @ off.to(x.dtype).T).float().mul_(gradient).square_().sum())

        if out.requires_grad:  # what does not read the tokens is given no gradient
            out.register_hook(back)

    first: list[Tensor] = []  # what the embedding makes: gradients are followed to there, weights get none

    def start(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        first[:] = [out.requires_grad_()]
        return out

    hooks = [linear.register_forward_hook(watch) for linear in known]
    hooks.append(module.get_input_embeddings().register_forward_hook(start))
    with hooked(hooks), using_tree(module, shared=passes[0].plan is not None), torch.enable_grad():
        for n, pack in enumerate(passes):
            logits = target_logits(module, pack).float()
            chance = logits.detach().softmax(-1)
            drawn = torch.randn(chance.shape, generator=dice, device=chance.device).mul_(chance.sqrt())
            along = (logits * (drawn - chance * drawn.sum(-1, keepdim=True))).sum()
            torch.autograd.grad(along, first, allow_unused=True)
            targets += len(logits)
            if progress:
                progress(n + 1, len(passes))
    session.spent += Spent(prefilled_tokens=PASSES * sum(pack.tokens for pack in passes))
    return {key: value / (2 * max(1, targets)) for key, value in total.items()}
