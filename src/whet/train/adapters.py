"""Adapters: made and saved with peft, trained with products of whet's own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from whet.compress.folder import plain
from whet.compress.packed import PackedLinear
from whet.errors import MethodError
from whet.extras import package
from whet.model import as_dtype
from whet.train.head import headed

PRESERVED = 0.5  # of a layer's singular directions that osf keeps gradients out of: peft's default


@dataclass(frozen=True)
class Adapter:
    """What is trained: LoRA on every linear layer that it suits but the output, one of its kin, or all weights.

    lora: Hu et al. 2021. rslora: the same scaled by alpha/√rank (Kalajdzievski 2023). dora: magnitude and direction
    apart (Liu et al. 2024). full: every weight. osf: of every linear layer but the output the half of its singular
    directions that weigh least, gradients being kept out of the others (Nayak et al. 2025; as peft does). `head`: a
    reward model, whose output is one trained number per place. `bits`: the frozen weights are held in 8 or 4 bits
    (QLoRA, Dettmers et al. 2023), which saves memory, not time.
    """

    kind: str = "lora"
    rank: int = 16
    alpha: int = 32
    head: bool = False
    bits: int = 16

    @property
    def apart(self) -> bool:
        """Whether what is trained becomes weights of its own, not an adapter beside the given ones."""
        return self.kind in ("full", "osf")


def add_lora(module: Any, adapter: Adapter, seed: int) -> Any:
    """A peft model with a fresh adapter; repeatable by seed."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0,
        use_dora=adapter.kind == "dora", use_rslora=adapter.kind == "rslora", exclude_modules=_unsuited(module) or None,
    )  # fmt: skip
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():  # peft uses a name that transformers has deprecated
            warnings.simplefilter("ignore", FutureWarning)
            dtype = module.dtype
            tuned = get_peft_model(module, config, autocast_adapter_dtype=False)
            for value in tuned.parameters():  # over packed weights, peft takes the type that they are unpacked in
                if value.requires_grad:
                    value.data = value.data.to(dtype)
            return tuned
    finally:
        torch.random.set_rng_state(state)


def add_osf(module: Any) -> Any:
    """A peft model that trains half of the singular directions of each linear layer, the lesser ones.

    Raises MethodError for a model without layers that peft's version goes with.
    """
    from peft import OSFConfig, get_peft_model

    beside = {*_unsuited(module)}
    suited = [n for n, m in module.named_modules() if type(m) is torch.nn.Linear and n not in beside
              and min(m.weight.shape) > 1 and m is not module.get_output_embeddings()]  # fmt: skip
    if not suited:
        raise MethodError("osf takes linear layers apart", expected="a model that has some",
                          found=type(module).__name__, do="set strategy=replay")  # fmt: skip
    config = OSFConfig(effective_rank=PRESERVED, target_modules=suited)
    return get_peft_model(module, config, autocast_adapter_dtype=False)


def _unsuited(module: Any) -> list[str]:
    """Linear layers that no LoRA can stand on: routers that give more than a product, and the outputs of state-space
    mixers (Gu & Dao 2023), whose kernels read the weight itself.
    """
    named = dict(module.named_modules())
    routers = [n for n, m in named.items() if isinstance(m, torch.nn.Linear) and "Router" in type(m).__name__]
    return routers + [f"{n}.out_proj" for n, m in named.items() if hasattr(m, "D") and hasattr(m, "out_proj")]


@contextmanager
def adapted(module: Any, adapter: Adapter, seed: int) -> Iterator[Any]:
    """A trainable module for the length of the block; afterwards the given one is as it was.

    An adapter is put on the module itself, so that no second copy of the weights is held; for full training, and for
    osf, a copy is.
    """
    instead = "strategy=replay" if adapter.kind == "osf" else "adapter=lora"
    if adapter.apart and any(isinstance(m, PackedLinear) for m in module.modules()):
        raise MethodError(
            "packed weights cannot be trained", expected="an adapter, which stands beside them", found=adapter.kind,
            do=f"set {instead}, or train before quantize",
        )  # fmt: skip
    if adapter.kind in ("dora", "osf") and not plain(module):
        raise MethodError(
            f"{'DoRA' if adapter.kind == 'dora' else 'osf'} rescales the weights beneath it, which other layers share "
            "or which are packed",
            expected="an adapter that stands beside them", found=adapter.kind, do=f"set {instead}",
        )  # fmt: skip
    if adapter.apart:
        own = copy.deepcopy(module)
        yield own.requires_grad_(True) if adapter.kind == "full" else add_osf(own)
        return
    training = module.training
    with headed(module, seed) if adapter.head else nullcontext(), frozen(module, adapter.bits):
        try:
            tuned = add_lora(module, adapter, seed)
        except ValueError as error:  # of a kind of weights that this kind of adapter does not go with
            _unload(module)
            raise MethodError(
                f"{adapter.kind} does not go with this model", expected="another adapter", found=str(error),
                do=f"set adapter={'full' if adapter.kind == 'lora' else 'lora'}",
            ) from error  # fmt: skip
        except BaseException:  # too little memory: what runs next has the module as it was
            _unload(module)
            raise
        if adapter.head:
            module.get_output_embeddings().requires_grad_(True)  # peft has frozen all but the adapter
        try:
            with quick_products(tuned):
                yield tuned
        finally:
            tuned.unload().train(training)
            for leftover in {"peft_config", "_hf_peft_config_loaded"} & set(vars(module)):
                delattr(module, leftover)


def _unload(module: Any) -> None:
    """Take off what peft has put on before it gave up."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer) and ".base_layer" not in name:
            module.set_submodule(name, layer.get_base_layer())


def merged(tuned: Any, adapter: Adapter) -> Any:
    """The module with its adapter in its weights, as a copy; summed in fp32, so that rounding once loses least."""
    if adapter.kind == "full":
        return tuned
    wide = as_dtype(copy.deepcopy(tuned), torch.float32)
    for name, value in wide.named_buffers():
        if "_osf_" in name:  # what osf began with, which it takes off again
            value.data = value.data.float()
    return as_dtype(wide.merge_and_unload(), tuned.dtype)


@contextmanager
def frozen(module: Any, bits: int) -> Iterator[None]:
    """Within it, the linear layers but the output hold their weights in 8 or 4 bits (NF4), by bitsandbytes.

    The layers themselves wait in the machine's memory, also where the module lives on a GPU. Raises MethodError where
    bitsandbytes is absent.
    """
    if bits == 16:
        yield
        return
    bnb = package("bitsandbytes", "qlora")
    flag, device, output = f"is_loaded_in_{bits}bit", module.device, module.get_output_embeddings()
    waiting = {n: m for n, m in module.named_modules() if type(m) is torch.nn.Linear and m is not output}
    try:
        for name, layer in waiting.items():
            sizes = (layer.in_features, layer.out_features, layer.bias is not None)
            if bits == 4:
                small = bnb.nn.Linear4bit(*sizes, compute_dtype=module.dtype, quant_type="nf4")
                small.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
            else:
                small = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
                small.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
            if layer.bias is not None:  # one of its own: that of the layer waits with it
                small.bias = torch.nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
            module.set_submodule(name, small.to(device))
            layer.to("cpu")
        setattr(module, flag, True)  # by which peft chooses its layers
        yield
    finally:
        vars(module).pop(flag, None)
        for name, layer in waiting.items():
            module.set_submodule(name, layer.to(device))


class _AdaptedLinear(torch.autograd.Function):
    """y = x Wᵀ + s·(x Aᵀ) Bᵀ + bias, with gradients for x, A and B only.

    What the adapter adds is accumulated by the matrix product itself, so that nothing passes over the outputs again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inputs = x.flatten(0, -2)
        narrow = (inputs @ a.T) * scale
        ctx.save_for_backward(x, weight, a, b, narrow)
        ctx.scale = scale
        out = torch.nn.functional.linear(x, weight, bias)  # itself, not a view of it: some layers add to it in place
        out.view(-1, out.shape[-1]).addmm_(narrow, b.T)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, narrow = ctx.saved_tensors
        grad, inputs = grads[0].flatten(0, -2), x.flatten(0, -2)
        to_narrow = (grad @ b) * ctx.scale
        to_x = (grad @ weight).addmm_(to_narrow, a).view_as(x) if ctx.needs_input_grad[0] else None
        return to_x, None, None, to_narrow.T @ inputs, (narrow.T @ grad).T, None


def _plain_lora(layer: Any) -> bool:
    """Whether a peft layer is one LoRA adapter, without dropout or kin, over an ordinary linear layer."""
    from peft.tuners.lora import Linear

    if not isinstance(layer, Linear) or len(layer.active_adapters) != 1 or layer.merged:
        return False
    name = layer.active_adapters[0]
    plain = not layer.use_dora.get(name) and isinstance(layer.lora_dropout[name], torch.nn.Identity)
    base = layer.get_base_layer()
    return plain and type(base) is torch.nn.Linear and base.weight.dtype == layer.lora_A[name].weight.dtype


@contextmanager
def quick_products(module: Any) -> Iterator[None]:
    """Within it, every plain LoRA layer runs with as few passes as can be; outputs and gradients are the same."""
    changed = []
    for layer in module.modules():
        if hasattr(layer, "lora_A") and "forward" not in vars(layer) and _plain_lora(layer):
            name = layer.active_adapters[0]
            base, a, b = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name]

            def forward(x: Tensor, *_: Any, base: Any = base, a: Any = a, b: Any = b, s: float = layer.scaling[name],
                        **__: Any) -> Tensor:  # fmt: skip
                return cast(Tensor, _AdaptedLinear.apply(x, base.weight, base.bias, a.weight, b.weight, s))

            layer.forward = forward
            changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward
