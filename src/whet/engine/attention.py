"""Attention over a packed tree: beginnings that rows share are read by all of them and stored once.

One function, registered with transformers' AttentionInterface, serves scoring, generation and training. Each query
attends to its own unit (causally, or under the mask of a tree of continuations) and to every trunk above it; the parts
are merged by their log-sum-exp. In the backward pass each part gets the *merged* output and log-sum-exp, which makes
its gradients exact without recomputing the merge (as in ring attention, Liu et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from whet.engine.prefix import Batch, Forest

NAME = "whet_tree"
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Bucket:
    """Units of like length, padded to one block: `index` [n, L] into the packed sequence, `keep` the real entries."""

    index: Tensor
    keep: Tensor | None  # flat positions of the real entries in [n * L]; None: no padding
    mask: Tensor | None  # additive [n, 1, L, L]; None: causal


@dataclass(frozen=True)
class Reads:
    """Queries [start, stop) read all keys of a trunk: a slice of this batch (`own`), or kept keys and values."""

    start: int
    stop: int
    trunk: int
    own: slice | None


@dataclass
class Plan:
    """How one packed forward pass attends; `kept` maps trunk → layer → keys and values from earlier batches."""

    buckets: tuple[Bucket, ...]
    reads: tuple[Reads, ...]
    kept: dict[int, dict[int, KeysValues]] = field(default_factory=dict)
    keep_trunks: tuple[tuple[int, slice], ...] = ()
    keep_all: dict[int, KeysValues] | None = None  # layer → keys and values of the whole pack, for generation


@dataclass
class Decode:
    """One step of generation: row i is query i; its own keys lie in `own` [n, heads, capacity, size] per layer."""

    own: dict[int, KeysValues]
    at: Tensor  # [n] where each row's new key is written
    mask: Tensor  # additive [n, 1, 1, capacity]
    reads: tuple[Reads, ...]
    kept: dict[int, dict[int, KeysValues]]


def _has_kernel(q: Tensor) -> bool:
    """Whether torch has a kernel that returns the log-sum-exp, for both directions, on this tensor's device."""
    return q.device.type == "cpu"


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float) -> KeysValues:
    """Output [n, heads, queries, size] and log-sum-exp [n, heads, queries]; keys may have fewer (grouped) heads."""
    if _has_kernel(q):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out, lse
    weights, lse, _ = _weights(q, k, causal, mask, scale)
    return (weights.to(v.dtype) @ _expand(v, q.shape[1])), lse


def _expand(kv: Tensor, heads: int) -> Tensor:
    """Grouped keys or values repeated to `heads` heads."""
    return kv if kv.shape[1] == heads else kv.repeat_interleave(heads // kv.shape[1], dim=1)


def _weights(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, scale: float, lse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention weights by plain matrix products, for devices without a kernel that returns the log-sum-exp."""
    scores = (q @ _expand(k, q.shape[1]).transpose(-1, -2)).float() * scale
    if causal:
        block = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(block, float("-inf"))
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, -1) if lse is None else lse
    return torch.exp(scores - lse[..., None]), lse, scores


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one part, given the merged output and log-sum-exp."""
    if _has_kernel(q):
        return cast(
            tuple[Tensor, Tensor, Tensor],
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
            ),
        )
    heads, groups = q.shape[1], k.shape[1]
    weights, _, _ = _weights(q, k, causal, mask, scale, lse)
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    by_weight = grad.float() @ _expand(v, heads).float().transpose(-1, -2)
    by_score = weights * (by_weight - delta) * scale

    def fold(x: Tensor) -> Tensor:
        return cast(Tensor, x.unflatten(1, (groups, heads // groups))).sum(2)

    to_k = fold(by_score.transpose(-1, -2) @ q.float())
    to_v = fold(weights.transpose(-1, -2) @ grad.float())
    return (by_score @ _expand(k, heads).float()).to(q.dtype), to_k.to(k.dtype), to_v.to(v.dtype)


def _take(x: Tensor, bucket: Bucket) -> Tensor:
    """Gather a bucket's block [n, heads, L, size] out of the packed [1, heads, T, size]."""
    n, length = bucket.index.shape
    flat = x[0].index_select(1, bucket.index.reshape(-1))
    return cast(Tensor, flat.unflatten(1, (n, length))).transpose(0, 1)


def _put(into: Tensor, block: Tensor, bucket: Bucket) -> None:
    """Write a block [n, heads, L, ...] back to its places in the packed [1, heads, T, ...], padding left out."""
    flat = block.transpose(0, 1).flatten(1, 2)
    index = bucket.index.reshape(-1)
    if bucket.keep is not None:
        flat, index = flat.index_select(1, bucket.keep), index.index_select(0, bucket.keep)
    into[0].index_copy_(1, index, flat)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a part into out [.., m, size] and lse [.., m], in place, by their shares of the softmax."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_(torch.exp(lse - total)[..., None]).add_(part * torch.exp(part_lse - total)[..., None])
    lse.copy_(total)


def _read_keys(reads: Reads, layer: int, k: Tensor, v: Tensor, kept: dict[int, dict[int, KeysValues]]) -> KeysValues:
    if reads.own is not None:
        return k[:, :, reads.own], v[:, :, reads.own]
    return kept[reads.trunk][layer]


class _TreeAttention(torch.autograd.Function):
    """Attention of a packed tree; q [1, heads, T, size], k and v [1, groups, T, size]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, layer: int, scale: float) -> Tensor:
        # Parts are merged in fp32: the weights of a merge span many orders of magnitude.
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
        for bucket in plan.buckets:
            some = [_take(x, bucket) for x in (q, k, v)]
            part, part_lse = _flash(some[0], some[1], some[2], bucket.mask is None, bucket.mask, scale)
            _put(out, part.float(), bucket)
            _put(lse[..., None], part_lse[..., None].float(), bucket)
        for reads in plan.reads:
            keys, values = _read_keys(reads, layer, k, v, plan.kept)
            here = slice(reads.start, reads.stop)
            part, part_lse = _flash(q[:, :, here], keys, values, False, None, scale)
            _merge(out[:, :, here], lse[:, :, here], part.float(), part_lse.float())
        result = out.to(q.dtype)
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(q, k, v, result, lse)
            ctx.plan, ctx.layer, ctx.scale = plan, layer, scale
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan: Plan = ctx.plan
        grad = grads[0].contiguous()
        to_q, to_k, to_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for bucket in plan.buckets:
            some = [_take(x, bucket) for x in (q, k, v, out)]
            block_lse = _take(lse[..., None], bucket)[..., 0].contiguous()
            block_grad = _take(grad, bucket)
            if bucket.keep is not None:  # padding repeats a real token: it must not be counted again
                n, length = bucket.index.shape
                real = torch.zeros(n * length, dtype=grad.dtype, device=grad.device)
                real[bucket.keep] = 1
                block_grad = block_grad * real.view(n, 1, length, 1)
            parts = _flash_backward(
                block_grad, some[0], some[1], some[2], some[3], block_lse, bucket.mask is None, bucket.mask, ctx.scale
            )
            for into, part in zip((to_q, to_k, to_v), parts, strict=True):
                into[0].index_add_(1, bucket.index.reshape(-1), part.transpose(0, 1).flatten(1, 2))
        for reads in plan.reads:
            keys, values = _read_keys(reads, ctx.layer, k, v, plan.kept)
            here = slice(reads.start, reads.stop)
            part_q, part_k, part_v = _flash_backward(
                grad[:, :, here], q[:, :, here], keys, values, out[:, :, here], lse[:, :, here].contiguous(),
                False, None, ctx.scale,
            )  # fmt: skip
            to_q[:, :, here] += part_q
            if reads.own is not None:
                to_k[:, :, reads.own] += part_k
                to_v[:, :, reads.own] += part_v
        return to_q, to_k, to_v, None, None, None


def _decode(q: Tensor, k: Tensor, v: Tensor, step: Decode, layer: int, scale: float) -> Tensor:
    """One new token per row: its key and value are written, then it reads its own past and the trunks above it."""
    keys, values = step.own[layer]
    rows = torch.arange(q.shape[2], device=q.device)
    keys[rows, :, step.at] = k[0].transpose(0, 1)
    values[rows, :, step.at] = v[0].transpose(0, 1)
    own, lse = _flash(q[0].transpose(0, 1)[:, :, None], keys, values, False, step.mask, scale)
    out = own[:, :, 0].transpose(0, 1)[None].float().contiguous()
    lse = lse[:, :, 0].transpose(0, 1)[None].float().contiguous()
    for reads in step.reads:
        kept_keys, kept_values = step.kept[reads.trunk][layer]
        here = slice(reads.start, reads.stop)
        part, part_lse = _flash(q[:, :, here], kept_keys, kept_values, False, None, scale)
        _merge(out[:, :, here], lse[:, :, here], part.float(), part_lse.float())
    return out.to(q.dtype)


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    whet_plan: Plan | Decode | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for packed trees; without a plan it is plain scaled-dot-product attention."""
    if whet_plan is None:
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return cast(
            tuple[Tensor, None], plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = cast(int, module.layer_idx)
    if isinstance(whet_plan, Decode):
        return _decode(query, key, value, whet_plan, layer, scale).transpose(1, 2).contiguous(), None
    out = cast(Tensor, _TreeAttention.apply(query, key, value, whet_plan, layer, scale))
    for trunk, here in whet_plan.keep_trunks:
        # Copies: a slice would hold on to the keys of the whole batch.
        whet_plan.kept.setdefault(trunk, {})[layer] = (key[:, :, here].clone(), value[:, :, here].clone())
    if whet_plan.keep_all is not None:
        whet_plan.keep_all[layer] = (key, value)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, tree_attention)


def _tree_mask(parents: Sequence[int], length: int) -> Tensor:
    """Boolean [length, length]: who reads whom in a unit whose continuations are a tree; padding reads itself."""
    sees = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        if i < len(parents) and parents[i] >= 0:
            sees[i] = sees[parents[i]]
        sees[i, i] = True
    return sees


def _bucket(batch: Batch, members: Sequence[int], dtype: torch.dtype, device: torch.device) -> Bucket:
    """One block out of units of like length."""
    units = [batch.units[i] for i in members]
    length = max(len(u.tokens) for u in units)
    index = torch.zeros(len(units), length, dtype=torch.long)
    real = torch.zeros(len(units), length, dtype=torch.bool)
    for n, (i, unit) in enumerate(zip(members, units, strict=True)):
        size = len(unit.tokens)
        index[n] = batch.unit_at[i]
        index[n, :size] += torch.arange(size)
        real[n, :size] = True
    mask = None
    if not all(u.plain for u in units):
        masks: dict[tuple[int, ...], Tensor] = {}
        for unit in units:
            if unit.parents not in masks:
                sees = _tree_mask(unit.parents, length)
                masks[unit.parents] = torch.zeros(length, length, dtype=dtype).masked_fill_(~sees, float("-inf"))
        mask = torch.stack([masks[u.parents] for u in units])[:, None].to(device)
    keep = None if bool(real.all()) else real.reshape(-1).nonzero()[:, 0].to(device)
    return Bucket(index.to(device), keep, mask)


def plan(
    forest: Forest,
    batch: Batch,
    dtype: torch.dtype,
    device: torch.device,
    kept: dict[int, dict[int, KeysValues]] | None = None,
    *,
    keep: bool = False,
) -> Plan:
    """The attention plan of a batch; with `keep` its trunks' keys and values are stored in `kept` for later batches."""
    order = sorted(range(len(batch.units)), key=lambda i: (not batch.units[i].plain, len(batch.units[i].tokens), i))
    groups: list[list[int]] = []
    for i in order:
        unit, size = batch.units[i], len(batch.units[i].tokens)
        first = batch.units[groups[-1][0]] if groups else None
        if first is not None and first.plain == unit.plain and size <= 1.3 * len(first.tokens) + 3:
            groups[-1].append(i)
        else:
            groups.append([i])
    buckets = [_bucket(batch, group, dtype, device) for group in groups]
    slices = {t: slice(at, at + len(forest.trunks[t].tokens)) for t, at in batch.trunk_at.items()}
    for here in slices.values():
        buckets.append(Bucket(torch.arange(here.start, here.stop, device=device)[None], None, None))
    reads = tuple(Reads(s.start, s.stop, s.trunk, slices.get(s.trunk)) for s in batch.spans)
    keep_trunks = tuple(slices.items()) if keep else ()
    return Plan(tuple(buckets), reads, {} if kept is None else kept, keep_trunks)


def packed(forest: Forest, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and positions of a batch, each [1, T]."""
    tokens, positions = [0] * batch.length, [0] * batch.length
    for t, at in batch.trunk_at.items():
        trunk = forest.trunks[t]
        tokens[at : at + len(trunk.tokens)] = trunk.tokens
        positions[at : at + len(trunk.tokens)] = range(trunk.start, trunk.start + len(trunk.tokens))
    for unit, at in zip(batch.units, batch.unit_at, strict=True):
        tokens[at : at + len(unit.tokens)] = unit.tokens
        positions[at : at + len(unit.tokens)] = unit.positions
    return torch.tensor([tokens], device=device), torch.tensor([positions], device=device)


def window(model: torch.nn.Module) -> int | None:
    """How long rows may be for tree attention: None without bound, 0 where the model's attention cannot be shared."""
    config = cast(Any, model).config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False) or getattr(model, "_is_stateful", False):
        return 0
    # What changes the softmax, lets tokens look ahead, or gives values a size of their own is not in `_flash`.
    odd = ("attn_logit_softcapping", "alibi", "use_bidirectional_attention", "v_head_dim")
    if any(getattr(config, name, None) for name in odd) or any(hasattr(m, "sinks") for m in model.modules()):
        return 0
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return 0
    sliding = getattr(config, "sliding_window", None)
    used = "sliding_attention" in kinds or (
        getattr(config, "layer_types", None) is None and getattr(config, "use_sliding_window", True)
    )
    return int(sliding) if sliding and used else None


def shares(model: torch.nn.Module, longest: int) -> bool:
    """Whether rows of at most `longest` tokens can run under tree attention."""
    bound = window(model)
    return bound is None or longest <= bound
