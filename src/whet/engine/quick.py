"""One token further without transformers' layers around it: the same products with a third of the calls.

A step of one row through a small model spends as much time between the products as in them. What is written here is
the decoder layer that Llama and its kin share; a session compares it with the model's own before it relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm

from whet.compress.packed import PackedLinear
from whet.engine import attention

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # of the logits' size may be between the two ways
Step = Callable[[Tensor, Tensor, attention.Decode], Tensor]  # (ids [n], positions [n], plan) → logits [n, vocabulary]


def step_of(module: Any) -> Step | None:
    """The step of a module; None where its family is built otherwise or its layers gather shards before they run."""
    core = getattr(getattr(module, "get_base_model", lambda: module)(), "model", None)
    if module.config.model_type not in FAMILIES or not isinstance(getattr(core, "layers", None), nn.ModuleList):
        return None
    if any(hasattr(weight, "device_mesh") for weight in module.parameters()):
        return None
    return partial(_step, core, [_parts(layer) for layer in cast(Any, core).layers], module.get_output_embeddings())


def agrees(quick: Tensor, own: Tensor) -> bool:
    """Whether logits by the step are those of the model itself, up to rounding."""
    close = CLOSE.get(own.dtype, 0.0)
    return bool((quick - own).float().norm() <= close * own.float().norm())


def _call(layer: Any) -> Callable[[Tensor], Tensor]:
    """A linear layer as a function, without the calls around its product where there is nothing else to it."""
    if "forward" not in vars(layer) and type(layer) is nn.Linear:
        return partial(linear, weight=layer.weight, bias=layer.bias)
    if type(layer) is PackedLinear and layer.bias is None:
        return layer.pack.times
    return cast(Callable[[Tensor], Tensor], layer)


def _together(layers: Sequence[Any]) -> Callable[[Tensor], Sequence[Tensor]]:
    """Layers that read the same input as one function to all their outputs."""
    bundles = {id(m.pack.bundle[0]) if type(m) is PackedLinear and m.pack.bundle else id(m) for m in layers}
    if len(bundles) == 1 and all(m.bias is None for m in layers):
        joint, sizes = layers[0].pack.bundle[0].joint, [m.out_features for m in layers]
        return lambda x: joint.product(x).split(sizes, -1)
    each = [_call(m) for m in layers]
    return lambda x: [one(x) for one in each]


def _norm(layer: Any) -> Callable[[Tensor], Tensor]:
    size, epsilon = tuple(layer.weight.shape), layer.variance_epsilon
    return partial(rms_norm, normalized_shape=size, weight=layer.weight, eps=epsilon)


def _parts(layer: Any) -> tuple[Any, ...]:
    own, mlp = layer.self_attn, layer.mlp
    heads = [_norm(getattr(own, n)) if hasattr(own, n) else None for n in ("q_norm", "k_norm")]
    read, gated = _together((own.q_proj, own.k_proj, own.v_proj)), _together((mlp.gate_proj, mlp.up_proj))
    norms = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
    rest = _call(own.o_proj), _call(mlp.down_proj), mlp.act_fn
    return (*norms, read, gated, *rest, *heads, own.head_dim, own.scaling, own.layer_idx)


def _step(
    core: Any, layers: list[tuple[Any, ...]], head: Any, ids: Tensor, places: Tensor, plan: attention.Decode
) -> Tensor:
    x = core.embed_tokens(ids)
    cos, sin = (part[0][:, None] for part in core.rotary_emb(x[None], places[None]))
    half = cos.shape[-1] // 2
    for before, after, read, gated, out, down, act, q_norm, k_norm, size, scale, index in layers:
        q, k, v = (part.unflatten(-1, (-1, size)) for part in read(before(x)))
        if q_norm is not None:
            q, k = q_norm(q), k_norm(k)
        both = torch.cat((q, k), 1)  # turned together
        both = both * cos + torch.cat((-both[..., half:], both[..., :half]), -1) * sin
        q, k = both.split((q.shape[1], k.shape[1]), 1)
        x = x + out(attention.decode(q, k, v, plan, index, scale).flatten(1))
        gate, up = gated(after(x))
        x = x + down(act(gate) * up)
    return cast(Tensor, head(_norm(core.norm)(x)))
