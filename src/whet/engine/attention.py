"""Attention over a packed tree: beginnings that rows share are read by all of them and stored once.

One function, registered with transformers' AttentionInterface, serves scoring, generation and training. Each query
attends to its own unit (causally, or under the mask of a tree of continuations) and to every trunk above it; the parts
are merged by their log-sum-exp, but for short trunks, which stand before their units where a processor trains. In the
backward pass each part gets the *merged* output and log-sum-exp, which makes its gradients exact without recomputing
the merge (as in ring attention, Liu et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from whet.engine.prefix import Batch, Forest

NAME = "whet_tree"
KeysValues = tuple[Tensor, Tensor]
BLOCK_QUERIES = 128  # queries of one block on a processor
BLOCK_CELLS = 2**20  # weights of one block there, to stay in its cache
FEW_KEYS = 128  # up to which a processor trains bf16 by its kernel for fp32
LONG_UNIT = 128  # tokens from which on a unit is not padded to the length of another
KEPT_CELLS = 2**20  # rows x queries x keys of a part up to which softmax is not computed again in the backward pass
DEVICE_CELLS = 2**27  # weights of one block elsewhere, to fit in memory


@dataclass(frozen=True)
class Bucket:
    """Units of like length, padded to one block: `index` [n, L] into the packed sequence, `keep` the real entries."""

    index: Tensor
    keep: Tensor | None  # flat positions of the real entries in [n * L]; None: no padding
    mask: Tensor | None  # additive [n, 1, L, keys]; None: causal
    start: int | None = None  # the entries stand one behind the other from here on; None: they do not
    above: slice | None = None  # a trunk of this batch whose keys stand before the units' own

    @property
    def here(self) -> slice:
        """Where the entries stand, if they stand one behind the other."""
        assert self.start is not None
        return slice(self.start, self.start + self.index.numel())


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
    """One step of n rows, `width` new tokens each, row by row; own keys lie in `own` [n, heads, capacity, size]."""

    own: dict[int, KeysValues]  # per layer
    at: Tensor  # [n · width] where each new token's key is written
    mask: Tensor  # additive [n, 1, width, capacity]
    reads: tuple[Reads, ...]  # by rows
    kept: dict[int, dict[int, KeysValues]]
    width: int = 1

    @cached_property
    def rows(self) -> Tensor:
        """The row of each new token."""
        return torch.arange(len(self.at), device=self.at.device) // self.width

    @cached_property
    def place(self) -> int:
        """Where the key of a single row is written."""
        return int(self.at[0])


def _has_kernel(q: Tensor, k: Tensor, train: bool) -> bool:
    """Whether torch has a kernel that returns the log-sum-exp on this device and is the faster way.

    Its backward pass in bf16 takes 2 to 7 times what matrix products by blocks take; in fp32, where keys are few, less.
    """
    return q.device.type == "cpu" and (k.shape[2] <= FEW_KEYS or not (train and q.dtype == torch.bfloat16))


def _for_kernel(train: bool, *given: Tensor | None) -> list[Any]:
    """What the kernel is given; where it trains, in fp32, which is faster there than bf16."""
    return [x.float() if x is not None and train and x.dtype == torch.bfloat16 else x for x in given]


def _flashes(q: Tensor, mask: Tensor | None) -> bool:
    """Whether a GPU's flash kernel does this: in bf16, without mask, at a head size that it knows on all cards."""
    size = q.shape[-1]
    known = size % 8 == 0 and (size <= 192 or size == 256)
    return q.is_cuda and mask is None and q.dtype == torch.bfloat16 and known and _has_flash(q.device)


@lru_cache
def _has_flash(device: torch.device) -> bool:
    built = torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    kept: list[Tensor] | None = None,
    alone: bool = False,
) -> KeysValues:
    """Output [n, heads, queries, size] and log-sum-exp [n, heads, queries]; keys may have fewer (grouped) heads.

    `kept`: it is trained, and this gets what the backward pass reads again. `alone`: nothing is to be merged with it,
    and its log-sum-exp may be left out.
    """
    train = kept is not None
    if _has_kernel(q, k, train):
        *some, wide = _for_kernel(train, q, k, v, mask)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *some, 0.0, causal, attn_mask=wide, scale=scale
        )
        return out, lse
    if _flashes(q, mask):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    out, lse = torch.empty_like(q), torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)
    for block, scores, weights in _weights(q * scale, k, causal, mask):
        if kept is not None and _keeps(q, k):
            kept.append(weights)
        out[block.rows, :, block.queries] = _by_group(weights @ block.keyed(v), block)
        if not alone:
            lse[block.rows, :, block.queries] = _by_group(_log_sum(scores, weights), block)[..., 0]
    return out, lse


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    own: Tensor | None,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    kept: Iterator[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one part, given the merged output and log-sum-exp, its `own` where it was merged, and what `_attend`
    has kept.
    """
    if _has_kernel(q, k, train=True):
        *some, wide = _for_kernel(True, grad, q, k, v, out, mask)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *some, lse, 0.0, causal, attn_mask=wide, scale=scale
        )
        to_q, to_k, to_v = (part.to(q.dtype) for part in parts)
        return to_q, to_k, to_v
    if _flashes(q, mask):
        none = torch.zeros(2, dtype=torch.uint64, device=q.device)  # where its dropout would begin
        return cast(
            tuple[Tensor, Tensor, Tensor],
            torch.ops.aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, none, none, scale=scale
            ),
        )
    to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    if own is not None:  # the part's share of the merged softmax is multiplied in where there is least to multiply
        share = torch.exp(own - lse)[..., None]
        grad, delta = grad * share.to(grad.dtype), delta * share
    delta = delta.to(q.dtype)
    q, scaled = q * scale, k * scale
    again = ((b, w) for b, _, w in _weights(q, k, causal, mask))
    for block, weights in ((b, next(kept)) for b in _blocks(q, k, causal)) if _keeps(q, k) else again:
        here, asked, keys, values = block.asked(grad), block.asked(q), block.keyed(scaled), block.keyed(v)
        to_scores = (here @ values.transpose(1, 2)).sub_(block.asked(delta)).mul_(weights)
        to_q[block.rows, :, block.queries] = _by_group(to_scores @ keys, block)
        to_k[block.rows, :, : block.keys] += (to_scores.transpose(1, 2) @ asked).unflatten(0, (-1, k.shape[1]))
        to_v[block.rows, :, : block.keys] += (weights.transpose(1, 2) @ here).unflatten(0, (-1, v.shape[1]))
    return to_q, to_k, to_v


@dataclass(frozen=True)
class _Block:
    """Some rows, some of their queries, and the keys [0, keys) that those may read; `groups` of heads share keys."""

    rows: slice
    queries: slice
    keys: int
    groups: int

    def asked(self, x: Tensor) -> Tensor:
        """Of x [n, heads, L, size], what belongs to the queries: [rows · groups, heads a group · queries, size]."""
        some = x[self.rows, :, self.queries].unflatten(1, (self.groups, -1))
        return cast(Tensor, some.flatten(2, 3).flatten(0, 1))

    def keyed(self, x: Tensor) -> Tensor:
        """Of x [n, groups, L, size], what belongs to the keys: [rows · groups, keys, size]."""
        return x[self.rows, :, : self.keys].flatten(0, 1)


def _by_group(x: Tensor, block: _Block) -> Tensor:
    """The reverse of `asked`: [rows, heads, queries, size]."""
    size = block.queries.stop - block.queries.start
    return cast(Tensor, x.unflatten(0, (-1, block.groups)).unflatten(2, (-1, size)).flatten(1, 2))


def _blocks(q: Tensor, k: Tensor, causal: bool) -> Iterator[_Block]:
    """Cut into blocks whose weights stay in a processor's cache; causal queries leave out the keys behind them."""
    length, heads, on_cpu = q.shape[2], q.shape[1], q.device.type == "cpu"
    cells = BLOCK_CELLS if on_cpu else DEVICE_CELLS
    least = BLOCK_QUERIES if on_cpu else 1
    step = min(length, least if on_cpu and causal else max(least, cells // (heads * k.shape[2])))
    rows = max(1, cells // (heads * step * k.shape[2]))
    for row in range(0, q.shape[0], rows):
        for first in range(0, length, step):
            last = min(first + step, length)
            yield _Block(slice(row, row + rows), slice(first, last), last if causal else k.shape[2], k.shape[1])


def _weights(
    scaled: Tensor, k: Tensor, causal: bool, mask: Tensor | None
) -> Iterator[tuple[_Block, Tensor, Tensor]]:
    """Blocks, their scores and the softmax of these, each [rows · groups, heads a group · queries, keys]."""
    behind = scaled.new_empty(0, 0)
    for block in _blocks(scaled, k, causal):
        scores = block.asked(scaled) @ block.keyed(k).transpose(1, 2)
        size = block.queries.stop - block.queries.start
        each = scores.unflatten(1, (-1, size))  # [rows · groups, heads a group, queries, keys]
        if causal:
            if len(behind) < size:  # the first block is the largest
                behind = scaled.new_full((size, size), float("-inf")).triu_(1)
            diagonal = each[..., block.queries]
            diagonal += behind[:size, :size]
        if mask is not None:
            each += mask[block.rows, :, block.queries].repeat_interleave(block.groups, dim=0)
        yield block, scores, torch.softmax(scores, -1)


def _keeps(q: Tensor, k: Tensor) -> bool:
    """Whether a part is so small that its weights wait for the backward pass rather than being computed again."""
    return q.shape[0] * q.shape[2] * k.shape[2] <= KEPT_CELLS


def _log_sum(scores: Tensor, weights: Tensor) -> Tensor:
    """Log-sum-exp [.., 1] of the scores out of their largest weight, which saves two passes over all of them."""
    return scores.amax(-1, keepdim=True).float() - weights.amax(-1, keepdim=True).float().log()


def _take(x: Tensor, bucket: Bucket) -> Tensor:
    """Gather a bucket's block [n, heads, L, size] out of the packed [1, heads, T, size]."""
    n, length = bucket.index.shape
    flat = x[0].index_select(1, bucket.index.reshape(-1)) if bucket.start is None else x[0, :, bucket.here]
    return cast(Tensor, flat.unflatten(1, (n, length))).transpose(0, 1)


def _take_keys(x: Tensor, bucket: Bucket) -> Tensor:
    """Keys or values [n, groups, above and own, size] that a bucket's entries read."""
    own = _take(x, bucket)
    if bucket.above is None:
        return own
    return torch.cat([x[:, :, bucket.above].expand(len(own), -1, -1, -1), own], dim=2)


def _add(into: Tensor, block: Tensor, bucket: Bucket) -> None:
    """Add gradients of a bucket's block [n, heads, L, size] to their places in the packed [1, heads, T, size]."""
    flat = block.transpose(0, 1).flatten(1, 2)
    if bucket.start is None:
        into[0].index_add_(1, bucket.index.reshape(-1), flat)
    else:
        into[0, :, bucket.here] += flat


def _add_keys(into: Tensor, block: Tensor, bucket: Bucket) -> None:
    """As `_add`, of keys or values: what the trunk above gets is summed over its readers."""
    if bucket.above is not None:
        size = bucket.above.stop - bucket.above.start
        into[0, :, bucket.above] += block[:, :, :size].sum(0)
        block = block[:, :, size:]
    _add(into, block, bucket)


def _put(into: Tensor, block: Tensor, bucket: Bucket) -> None:
    """Write a block [n, heads, L, ...] back to its places in the packed [1, heads, T, ...], padding left out."""
    flat = block.transpose(0, 1).flatten(1, 2)
    if bucket.start is not None:
        into[0, :, bucket.here] = flat
        return
    index = bucket.index.reshape(-1)
    if bucket.keep is not None:
        flat, index = flat.index_select(1, bucket.keep), index.index_select(0, bucket.keep)
    into[0].index_copy_(1, index, flat.to(into.dtype))


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
        train = any(ctx.needs_input_grad[:3])
        ctx.plan, ctx.layer, ctx.scale = plan, layer, scale
        alone = not plan.reads
        # Parts are merged in fp32: the weights of a merge span many orders of magnitude.
        out = torch.empty_like(q, dtype=q.dtype if alone else torch.float32)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        own, kept = [], list[Tensor]() if train else None  # the log-sum-exp of each part by itself, and its weights
        for bucket in plan.buckets:
            asked, keys, values = _take(q, bucket), _take_keys(k, bucket), _take_keys(v, bucket)
            causal = bucket.mask is None
            part, part_lse = _attend(asked, keys, values, causal, bucket.mask, scale, kept, alone)
            _put(out, part, bucket)
            _put(lse[..., None], part_lse[..., None], bucket)
            own += [] if alone else [part_lse]
        for reads in plan.reads:
            keys, values = _read_keys(reads, layer, k, v, plan.kept)
            here = slice(reads.start, reads.stop)
            part, part_lse = _attend(q[:, :, here], keys, values, False, None, scale, kept)
            _merge(out[:, :, here], lse[:, :, here], part, part_lse)
            own.append(part_lse)
        result = out.to(q.dtype)
        if kept is not None:
            ctx.parts = len(own)
            ctx.save_for_backward(q, k, v, result, lse, *own, *kept)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        own, kept = rest[: ctx.parts], iter(rest[ctx.parts :])
        plan: Plan = ctx.plan
        grad = grads[0].contiguous()
        to_q, to_k, to_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for n, bucket in enumerate(plan.buckets):
            asked, keys, values = _take(q, bucket), _take_keys(k, bucket), _take_keys(v, bucket)
            block_lse = _take(lse[..., None], bucket)[..., 0].contiguous()
            block_grad = _take(grad, bucket)
            if bucket.keep is not None:  # padding repeats a real token: it must not be counted again
                rows, length = bucket.index.shape
                real = torch.zeros(rows * length, dtype=grad.dtype, device=grad.device)
                real[bucket.keep] = 1
                block_grad = block_grad * real.view(rows, 1, length, 1)
                # Nor is it weighed by what it repeats: e to the difference may be more than a number can be.
                block_lse = block_lse.masked_fill(real.view(rows, 1, length) == 0, math.inf)
            causal, part_lse = bucket.mask is None, own[n] if own else None
            part_q, part_k, part_v = _attend_backward(
                block_grad, asked, keys, values, _take(out, bucket), block_lse, part_lse, causal, bucket.mask,
                ctx.scale, kept,
            )  # fmt: skip
            _add(to_q, part_q, bucket)
            _add_keys(to_k, part_k, bucket)
            _add_keys(to_v, part_v, bucket)
        for reads, part_lse in zip(plan.reads, own[len(plan.buckets) :], strict=True):
            keys, values = _read_keys(reads, ctx.layer, k, v, plan.kept)
            here = slice(reads.start, reads.stop)
            part_q, part_k, part_v = _attend_backward(
                grad[:, :, here], q[:, :, here], keys, values, out[:, :, here], lse[:, :, here].contiguous(), part_lse,
                False, None, ctx.scale, kept,
            )  # fmt: skip
            to_q[:, :, here] += part_q
            if reads.own is not None:
                to_k[:, :, reads.own] += part_k
                to_v[:, :, reads.own] += part_v
        return to_q, to_k, to_v, None, None, None


def decode(q: Tensor, k: Tensor, v: Tensor, step: Decode, layer: int, scale: float) -> Tensor:
    """New tokens of rows: keys and values are written, then each reads its row's past and the trunks above it.

    q [n · width, heads, size], k and v [n · width, groups, size] → [n · width, heads, size].
    """
    keys, values = step.own[layer]
    if len(q) == 1:
        at = step.place
        keys[0, :, at], values[0, :, at] = k[0], v[0]
    else:
        keys[step.rows, :, step.at], values[step.rows, :, step.at] = k, v
    by_row = q.unflatten(0, (-1, step.width)).transpose(1, 2)
    own, own_lse = _attend(by_row, keys, values, False, step.mask, scale, alone=not step.reads)
    if not step.reads:
        return own.transpose(1, 2).flatten(0, 1)
    asked = q.transpose(0, 1)[None]
    out = own.transpose(0, 1).flatten(1, 2)[None].float().contiguous()
    lse = own_lse.transpose(0, 1).flatten(1, 2)[None].float().contiguous()
    for reads in step.reads:
        kept_keys, kept_values = step.kept[reads.trunk][layer]
        here = slice(reads.start * step.width, reads.stop * step.width)
        part, part_lse = _attend(asked[:, :, here], kept_keys, kept_values, False, None, scale)
        _merge(out[:, :, here], lse[:, :, here], part.float(), part_lse.float())
    return out[0].transpose(0, 1).to(q.dtype)


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
        return cast(tuple[Tensor, None], plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = cast(int, module.layer_idx)
    if isinstance(whet_plan, Decode):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return decode(q, k, v, whet_plan, layer, scale)[None].contiguous(), None
    out = cast(Tensor, _TreeAttention.apply(query, key, value, whet_plan, layer, scale))
    for trunk, here in whet_plan.keep_trunks:
        # Copies: a slice would hold on to the keys of the whole batch.
        whet_plan.kept.setdefault(trunk, {})[layer] = (key[:, :, here].clone(), value[:, :, here].clone())
    if whet_plan.keep_all is not None and attention_mask is None:  # a family with masks of its own is not shared
        # Where a layer attends twice, keys of one place would be another's: told by a layer too many.
        whet_plan.keep_all[layer if layer not in whet_plan.keep_all else -1 - layer] = (key, value)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, tree_attention)


def _tree_mask(parents: Sequence[int], length: int) -> Tensor:
    """Boolean [length, length]: who reads whom in a unit whose continuations are a tree; padding reads itself."""
    chain = next((i for i, p in enumerate(parents) if p != i - 1), len(parents))
    sees = torch.zeros(length, length, dtype=torch.bool).fill_diagonal_(True)
    sees[:chain, :chain] = torch.ones(chain, chain, dtype=torch.bool).tril()
    for i in range(chain, len(parents)):
        if parents[i] >= 0:
            sees[i] |= sees[parents[i]]
    return sees


def _bucket(
    batch: Batch, members: Sequence[int], dtype: torch.dtype, device: torch.device, above: slice | None = None
) -> Bucket:
    """One block out of units of like length, which read the trunk `above` along with their own."""
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
    if above or not all(u.plain for u in units):
        masks: dict[tuple[int, ...], Tensor] = {}
        for unit in units:
            if unit.parents not in masks:
                sees = _tree_mask(unit.parents, length)
                own = torch.zeros(length, length, dtype=dtype).masked_fill_(~sees, float("-inf"))
                before = above.stop - above.start if above else 0
                masks[unit.parents] = torch.nn.functional.pad(own, (before, 0))
        mask = torch.stack([masks[u.parents] for u in units])[:, None].to(device)
    keep = None if bool(real.all()) else real.reshape(-1).nonzero()[:, 0].to(device)
    start = int(index[0, 0])
    row = keep is None and bool((index.reshape(-1) == torch.arange(start, start + index.numel())).all())
    return Bucket(index.to(device), keep, mask, start if row else None, above)


def _most_beside(size: int, device: torch.device) -> float:
    """Length of the longest unit that is padded together with one of this size: long ones cost more than a call.

    On a GPU a call costs more than the padding of anything but the longest.
    """
    if device.type == "cuda":
        return 2 * size + 32
    return 1.3 * size + 3 if size < LONG_UNIT else size


def _near(forest: Forest, batch: Batch) -> set[int]:
    """Trunks of a batch that are short enough to stand before each of their units: cheaper than merging two parts.

    Longer than their units on average they are not: to copy them for each costs more.
    """
    readers: dict[int, list[int]] = {}
    chains = {u.trunk: forest.chain(u.trunk) for u in batch.units}
    for unit in batch.units:
        for trunk in chains[unit.trunk]:
            readers.setdefault(trunk, []).append(len(unit.tokens) if len(chains[unit.trunk]) == 1 else FEW_KEYS)
    lengths = {t: len(forest.trunks[t].tokens) for t in readers if t in batch.trunk_at}
    return {t for t, size in lengths.items() if size + max(readers[t]) <= FEW_KEYS
            and size * len(readers[t]) <= sum(readers[t])}  # fmt: skip


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
    slices = {t: slice(at, at + len(forest.trunks[t].tokens)) for t, at in batch.trunk_at.items()}
    near = set() if keep or device.type != "cpu" else _near(forest, batch)
    kinds = [(u.trunk if u.trunk in near else -1, u.plain) for u in batch.units]
    order = sorted(range(len(batch.units)), key=lambda i: (not kinds[i][1], kinds[i][0], len(batch.units[i].tokens), i))
    groups: list[list[int]] = []
    for i in order:
        first, size = groups[-1][0] if groups else i, len(batch.units[i].tokens)
        if groups and kinds[first] == kinds[i] and size <= _most_beside(len(batch.units[first].tokens), device):
            groups[-1].append(i)
        else:
            groups.append([i])
    buckets = [_bucket(batch, group, dtype, device, slices[t] if (t := kinds[group[0]][0]) in near else None)
               for group in groups]  # fmt: skip
    for here in slices.values():
        buckets.append(Bucket(torch.arange(here.start, here.stop, device=device)[None], None, None, here.start))
    reads = tuple(Reads(s.start, s.stop, s.trunk, slices.get(s.trunk)) for s in batch.spans if s.trunk not in near)
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


_arrive: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def _plans_arrive(model: torch.nn.Module) -> bool:
    """Whether every layer gives its attention the plan, and no mask or sinks of its own: else rows would read one
    another.

    Seen once per module, in a pass over one token.
    """
    whole: Any = getattr(model, "get_base_model", lambda: model)()
    if whole not in _arrive:
        before, ids = whole.config._attn_implementation, torch.zeros(1, 1, dtype=torch.long, device=whole.device)
        seen = Plan((Bucket(ids, None, None, 0),), (), keep_all={})
        whole.set_attn_implementation(NAME)
        try:
            with torch.no_grad():
                whole(input_ids=ids, position_ids=ids, use_cache=False, whet_plan=seen)
        finally:
            whole.set_attn_implementation(before)
        all_layers = len(seen.keep_all or ()) == whole.config.get_text_config().num_hidden_layers
        _arrive[whole] = all_layers and not any(hasattr(m, "sinks") for m in whole.modules())
    return _arrive[whole]


def window(model: torch.nn.Module) -> int | None:
    """How long rows may be for tree attention: None without bound, 0 where the model's attention cannot be shared."""
    config = cast(Any, model).config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False) or getattr(model, "_is_stateful", False):
        return 0
    # What changes the softmax, lets tokens look ahead, or gives values a size of their own is not in `_attend`.
    odd = ("attn_logit_softcapping", "alibi", "use_bidirectional_attention", "v_head_dim")
    if any(getattr(config, name, None) for name in odd):
        return 0
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return 0
    if not _plans_arrive(model):
        return 0
    sliding = getattr(config, "sliding_window", None)
    used = "sliding_attention" in kinds or (
        getattr(config, "layer_types", None) is None and getattr(config, "use_sliding_window", True)
    )
    bound = min(turn(model), sliding if sliding and used else math.inf)
    return int(bound) if bound < math.inf else None


def turn(model: torch.nn.Module) -> float:
    """Length of a sequence beyond which all its positions are turned otherwise (LongRoPE); infinite without one."""
    rope = getattr(cast(Any, model).config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # for all layers, or by their types
    found = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return float(min(found, default=math.inf))


def shares(model: torch.nn.Module, longest: int) -> bool:
    """Whether rows of at most `longest` tokens can run under tree attention."""
    bound = window(model)
    return bound is None or longest <= bound
