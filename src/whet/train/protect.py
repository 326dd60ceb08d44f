"""What keeps earlier tasks while a new one is learnt: penalties on the weights, mixed steps, merged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from whet.compress.structure import hooked
from whet.engine.prefix import Row
from whet.engine.torch import using_tree
from whet.errors import MethodError
from whet.model import Transform, check_transform
from whet.train.batches import batched, shares, steps
from whet.train.lesson import even, weight
from whet.train.loop import Source, target_logits
from whet.train.losses import NextToken

Penalty = Callable[[], Tensor]
Weights = Mapping[str, Tensor]


def mixed(new: Source, earlier: Sequence[Sequence[Row]], many: int, seed: int, length: float) -> Source:
    """Steps of new rows with `many` earlier ones each; the earlier tasks take turns, whatever their sizes.

    Experience replay (Chaudhry et al. 2019). `length` is the mean weighted target length of the new rows: an earlier
    task's rows are weighted so that theirs are as long, since a loss over tokens would hardly see one of short answers.
    """
    streams = [steps(even(rows, length), 1, seed) for rows in earlier]

    def step(number: int) -> list[Row]:
        turns = range(number * many, (number + 1) * many)
        mine = [replace(row, facts=((weight(row),),)) for row in new(number)]
        return [*mine, *(row for t in turns for row in streams[t % len(streams)](t // len(streams)))]

    return step


def lora_layers(module: Any) -> Iterator[tuple[str, Any, Tensor, Tensor, float]]:
    """(name, layer, A [r, in], B [out, r], scale) of every layer that a fresh LoRA adapter stands on."""
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A") and layer.active_adapters:
            own = layer.active_adapters[0]
            yield name, layer, layer.lora_A[own].weight, layer.lora_B[own].weight, layer.scaling[own]


def fisher(module: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information of the adapted layers' weights, [out, in] each, in fp32.

    The mean over rows of the squared gradient of a row's log-likelihood (Kirkpatrick et al. 2017). The gradient of the
    weights, which are frozen, is put together from what goes into a layer and the gradient of what comes out. Raises
    MethodError for weights that no layer of their own multiplies, as those of fused experts.
    """
    from peft.tuners.lora.layer import ParamWrapper

    if fused := [name for name, layer, *_ in lora_layers(module) if isinstance(layer, ParamWrapper)]:
        raise MethodError("ewc weighs linear layers", expected="no fused experts", found=fused[0],
                          do="set strategy=replay")  # fmt: skip
    found = {name: torch.zeros(b.shape[0], a.shape[1], device=a.device) for name, _, a, b, _ in lora_layers(module)}

    def watch(name: str, _: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        inputs = given[0].detach().flatten(0, -2).float()

        def square(grad: Tensor) -> None:
            found[name].add_((grad.flatten(0, -2).float().T @ inputs).square_())

        out.register_hook(square)

    loss, shared = NextToken(), shares(module, rows)
    with hooked([layer.register_forward_hook(partial(watch, name)) for name, layer, *_ in lora_layers(module)]):
        for row in rows:
            # A row is one pass: its gradient is to be squared as a whole.
            row = replace(row, facts=())
            [pack] = batched(module, [row], shared)
            with using_tree(module, train=True, shared=shared):
                loss(target_logits(module, pack), pack).backward()
        module.zero_grad(set_to_none=True)
    return {name: total / len(rows) for name, total in found.items()}


class _Elastic(torch.autograd.Function):
    """½ Σ F (s·B·A)², its gradients made at once, so that no layer's product is kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, information: Tensor, scale: float) -> Tensor:
        delta = scale * (b.float() @ a.float())
        weighted = information * delta
        to_a, to_b = scale * b.float().T @ weighted, scale * weighted @ a.float().T
        ctx.save_for_backward(to_a.to(a.dtype), to_b.to(b.dtype))
        return 0.5 * (weighted * delta).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_a, to_b = ctx.saved_tensors
        return grads[0] * to_a, grads[0] * to_b, None, None


def elastic(module: Any, information: Weights, strength: float) -> Penalty:
    """Elastic weight consolidation, λ/2 Σ F (θ - θ*)² (Kirkpatrick et al. 2017), where θ - θ* is the adapter's s·B·A.

    The earlier weights θ* are those beneath the fresh adapter, which starts at a difference of 0.
    """
    parts = [(a, b, information[name], scale) for name, _, a, b, scale in lora_layers(module)]
    apply: Callable[..., Tensor] = _Elastic.apply
    return lambda: strength * torch.stack([apply(*part) for part in parts]).sum()


def orthogonal(module: Any, transforms: Sequence[Transform], strength: float) -> Penalty:
    """λ Σ |A_old Aᵀ| over all layers and all earlier adapters: new directions stay clear of the old ones.

    O-LoRA (Wang et al. 2023): the paper writes squares, the released code sums absolute values, as here. Raises
    MethodError where no earlier adapter is at hand.
    """
    old: dict[str, list[Tensor]] = {}
    for transform in (t for t in transforms if t.kind == "adapter"):
        for name, value in load_file(check_transform(transform) / "adapter_model.safetensors").items():
            if name.endswith(".lora_A.weight"):
                old.setdefault(name.removesuffix(".lora_A.weight"), []).append(value)
    pairs = [(torch.cat(old[name]).to(a), a) for name, _, a, _, _ in lora_layers(module) if name in old]
    if not pairs:
        raise MethodError(
            "nothing to be orthogonal to", expected="a System with LoRA adapters from earlier tasks", found="none",
            do="set strategy=replay",
        )  # fmt: skip
    return lambda: strength * torch.stack([(before @ a.T).abs().sum() for before, a in pairs]).sum()


def merged(
    base: Weights, tuned: Sequence[Weights], weights: Sequence[float], kind: str = "linear", density: float = 0.2
) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of every weight that differs: the base and a weighted sum of what each training changed.

    linear: task arithmetic (Ilharco et al. 2023). ties: only the largest `density` of each change, and where signs
    disagree only those of the majority (Yadav et al. 2023).
    """
    from peft.utils.merge_utils import task_arithmetic, ties

    for name, start in base.items():
        changes = [t[name].float() - start.float() for t in tuned]
        if any(bool(c.any()) for c in changes):
            of = torch.tensor(weights, device=start.device)
            change = task_arithmetic(changes, of) if kind == "linear" else ties(changes, of, density)
            yield name, (start.float() + change).to(start.dtype)
