"""Weights in 8 or 4 bits, and the layers that multiply by them without unpacking all of them.

Products are torch's own: oneDNN's int8 kernels (weights and activations), and the weight-only kernels of 8 and 4 bits
for few rows; many rows are multiplied by weights unpacked for the moment. A pack is a module of its own, so that tied
layers, or an embedding and the output it is tied to, hold the same one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from whet.compress.layers import KINDS

FEW = 8  # rows up to which the weight-only kernel of 8 bits is faster than unpacking
FEW_ROUNDED = 3  # ... than rounding the rows and multiplying whole numbers
# Bits of rounded rows: the greatest number, and what stands for 0.
EIGHT, SHIFTED, SEVEN = (126, 0), (126, 128), (63, 64)
SLOW = 30  # times a product of floats: no kernel, but a plain loop (some 1,000 times)
PARTS = (3, 4, 2, 1)  # of columns that get a step of their own where rows have 7 bits: halves the error
SOME = 128  # the same for 4 bits, whose unpacking is dearer
WHOLE = 16  # bytes that the kernel of 8 bits reads at once, from such addresses only
GROUPS = (32, 64, 128, 256)  # columns that share a step, in the order of preference: what torch's kernel takes
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that read the same input


class Pack(nn.Module):
    """Weights [out, in] in few bits: w = (values - zero) · scale, by row and group of columns."""

    bits: int
    group: int  # columns that share a step; 0: all of a row
    zero = False
    activations = twice = False
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bundle: tuple[Bundle, slice] | None = None  # where it is multiplied together with its siblings

    def parts(self) -> dict[str, Any]:
        """`values` [out, in] as whole numbers, `scale` [out, groups], and `zero` [out, groups] or None."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The weights that the packed ones stand for, [out, in] in fp32."""
        raise NotImplementedError

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weights [n, in] in fp32."""
        raise NotImplementedError

    def held(self) -> Tensor:
        """The whole numbers [out, in] of this pack alone."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x [rows, in] → [rows, out], by this pack alone."""
        raise NotImplementedError

    def assemble(self) -> None:
        """Bring the weights into the layout that the kernels read, once, for a module that is only run."""

    def plain(self) -> Tensor:
        """The whole numbers [out, in]."""
        return self.bundle[0].joint.held()[self.bundle[1]] if self.bundle else self.held()

    def times(self, x: Tensor) -> Tensor:
        """x [rows, in] → [rows, out]."""
        return self.bundle[0].times(x, self.bundle[1]) if self.bundle else self.product(x)


class Int8(Pack):
    """One step per row, symmetric. With `activations`, what is multiplied is rounded row by row, too: to 8 bits, or 7.

    `twice` rounds what that leaves, too, and multiplies both: 16 bits, at twice the time. A few rows are multiplied as
    they are: reading the weights is what takes the time then.
    """

    bits, group = 8, 0
    scale: Tensor

    def __init__(self, values: Tensor, scale: Tensor, activations: bool, twice: bool = False) -> None:
        super().__init__()
        self.activations, self.twice = activations, twice
        self.register_buffer("values", values)  # int8 [out, in]
        self.register_buffer("scale", scale)  # fp32 [out]
        self.few = FEW_ROUNDED if activations else FEW
        self.ready: list[Tensor] = []  # in the layout of the kernel for many rows, by parts of the columns
        self.narrow: Tensor | None = None  # the scale as the kernel for few rows reads it

    @classmethod
    def blank(cls, out: int, size: int, activations: bool, twice: bool) -> Int8:
        """Empty weights, to be read."""
        values = torch.empty(out, size, dtype=torch.int8, device="meta")
        return cls(values, torch.empty(out, device="meta"), activations, twice)

    @classmethod
    def joined(cls, packs: Sequence[Any]) -> Int8:
        """The rows of several in one, which from here on hold views of it."""
        values, scale = torch.cat([p.values for p in packs]), torch.cat([p.scale for p in packs])
        made = cls(values, scale, packs[0].activations, packs[0].twice)
        for pack, values in zip(packs, made.values.split([len(p.scale) for p in packs]), strict=True):
            pack.values = values
        return made

    def parts(self) -> dict[str, Any]:
        """See Pack."""
        return {"values": self.plain(), "scale": self.scale[:, None], "zero": None}

    def dense(self) -> Tensor:
        """See Pack."""
        return self.plain().float() * self.scale[:, None]

    def rows(self, ids: Tensor) -> Tensor:
        """See Pack."""
        return self.values[ids].float() * self.scale[ids, None]

    def held(self) -> Tensor:
        """See Pack."""
        return self.values

    def assemble(self) -> None:
        """Add oneDNN's layout, which many rows are multiplied by; few are by the plain one."""
        if self.values.data_ptr() % WHOLE:  # as files have them
            self.values = self.values.clone()
        if self.activations and not self.ready and whole_numbers() and self.values.device.type == "cpu":
            parts = 1 if whole_numbers() != SEVEN else next(n for n in PARTS if self.values.shape[1] % n == 0)
            self.ready = [torch.ops.onednn.qlinear_prepack(p.contiguous(), None) for p in self.values.chunk(parts, 1)]

    def product(self, x: Tensor) -> Tensor:
        """See Pack."""
        if len(x) <= self.few and self.values.data_ptr() % WHOLE == x.shape[1] % WHOLE == 0 and x.device.type == "cpu":
            if self.narrow is None or self.narrow.device != x.device:
                self.narrow = self.scale.to(x.device, torch.bfloat16)
            return torch._weight_int8pack_mm(x.bfloat16().contiguous(), self.values, self.narrow).to(x.dtype)
        if not self.activations:
            return linear(x, self.values.to(x.dtype)).mul_(self.scale.to(x.dtype))
        if self.ready:
            most, zero = whole_numbers() or EIGHT
            values, step = rounded(x.unflatten(1, (len(self.ready), -1)), most)
            left = (x.float() - (values.float() * step.float()).flatten(1)).to(x.dtype) if self.twice else None
            made = self._whole(values, step, zero, x.dtype)
            if left is not None:
                made += self._whole(*rounded(left.unflatten(1, (len(self.ready), -1)), most), zero, x.dtype)
            return made
        values, step = (x, torch.ones_like(x[:, :1])) if self.twice else rounded(x)
        # Whole numbers up to 127 are exact in bf16, too; in fp16 their sums would be out of range.
        wide = x.dtype if x.dtype == torch.bfloat16 else torch.float32
        made = linear(values.to(wide), self.values.to(wide))
        return (made.float() * step * self.scale).to(x.dtype)

    def _whole(self, values: Tensor, step: Tensor, zero: int, dtype: torch.dtype) -> Tensor:
        """The product of whole numbers [rows, parts, columns], part by part; takes their place."""
        whole = values.add_(zero).to(torch.uint8) if zero else values.to(torch.int8)
        made = _int8_product(whole[:, 0], zero, self.ready[0], self.scale, dtype).mul_(step[:, 0])
        for n, part in enumerate(self.ready[1:], 1):
            made.addcmul_(_int8_product(whole[:, n], zero, part, self.scale, dtype), step[:, n])
        return made


class Int4(Pack):
    """A step of its own, and where there is a `zero` that, too, for each `group` columns; two values to the byte."""

    bits = 4
    steps: Tensor

    def __init__(self, values: Tensor, steps: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)  # uint8 [out, in / 2]: low half the first of two columns
        self.register_buffer("steps", steps)  # bf16 [groups, out, 1 or 2]: scale, and what 8 stands for if not 0
        self.group, self.zero = 2 * values.shape[1] // len(steps), steps.shape[-1] == 2
        self.ready: Tensor | None = None  # in the layout that the kernel reads
        self.both: Tensor | None = None  # scales and zeros as the kernel reads them

    @classmethod
    def blank(cls, out: int, size: int, group: int, zero: bool) -> Int4:
        """Empty weights, to be read."""
        values = torch.empty(out, size // 2, dtype=torch.uint8, device="meta")
        return cls(values, torch.empty(size // group, out, 1 + zero, dtype=torch.bfloat16, device="meta"))

    @classmethod
    def joined(cls, packs: Sequence[Any]) -> Int4:
        """The rows of several in one, which is the only one to hold them from here on."""
        made = cls(torch.cat([p.values for p in packs]), torch.cat([p.steps for p in packs], 1).contiguous())
        for pack in packs:
            pack.values = pack.values.new_empty(0)
        return made

    def parts(self) -> dict[str, Any]:
        """See Pack."""
        scale, *middle = self.steps.float().unbind(-1)
        if not middle:
            return {"values": self.plain().to(torch.int8) - 8, "scale": scale.T, "zero": None}
        return {"values": self.plain(), "scale": scale.T, "zero": (8 - middle[0] / scale).T}

    def dense(self) -> Tensor:
        """See Pack."""
        return self._unpacked(self.plain(), self.steps)

    def rows(self, ids: Tensor) -> Tensor:
        """See Pack."""
        if self.ready is None:
            return self._unpacked(halves(self.values[ids]), self.steps[:, ids])
        half = block_of_4() // 2
        each, at = self.ready.reshape(-1, self.group * len(self.steps), half), ids % (2 * half)
        found = each[ids // (2 * half), :, at % half]
        return self._unpacked(torch.where((at < half)[:, None], found & 15, found >> 4), self.steps[:, ids])

    def _unpacked(self, values: Tensor, steps: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Whole numbers [rows, in] by their steps [groups, rows, 1 or 2]."""
        scale, *middle = steps.to(dtype).transpose(0, 1)[:, :, None].unbind(-1)
        made: Tensor = (values.to(dtype).unflatten(1, (len(self.steps), -1)) - 8) * scale
        return (made + middle[0] if middle else made).flatten(1)

    def held(self) -> Tensor:
        """See Pack."""
        if self.ready is None:
            return halves(self.values)
        each = self.ready.reshape(-1, self.group * len(self.steps), block_of_4() // 2)
        whole: Tensor = torch.cat([each & 15, each >> 4], -1)
        return whole.transpose(1, 2).flatten(0, 1)

    def assemble(self) -> None:
        """Take the kernel's layout, in place of the plain one."""
        block = block_of_4() if self.values.device.type == "cpu" else 0
        if self.ready is None and block and self.steps.shape[1] % block == 0 and self.group in GROUPS:
            self.ready = torch.ops.aten._convert_weight_to_int4pack_for_cpu(halves(self.values).int(), 1)
            self.values = self.values.new_empty(0)
            self.both = self.steps if self.zero else torch.cat([self.steps, torch.zeros_like(self.steps)], -1)

    def product(self, x: Tensor) -> Tensor:
        """See Pack."""
        if self.ready is not None and len(x) <= SOME:
            few = x.bfloat16().contiguous()
            made = torch.ops.aten._weight_int4pack_mm_for_cpu(few, self.ready, self.group, self.both)
            return cast(Tensor, made.to(x.dtype))
        return linear(x, self._unpacked(self.held(), self.steps, x.dtype))


def halves(packed: Tensor) -> Tensor:
    """Bytes [.., n] as the two numbers of 4 bits in each, [.., 2n]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def bytes_of(values: Tensor) -> Tensor:
    """Numbers from 0 to 15 [.., 2n] as bytes [.., n]."""
    pairs = values.to(torch.uint8).unflatten(-1, (-1, 2))
    made: Tensor = pairs[..., 0] | (pairs[..., 1] << 4)
    return made


def rounded(x: Tensor, most: int = 126) -> tuple[Tensor, Tensor]:
    """x [rows, in] as whole numbers up to `most`, in the type of x, and the step [rows, 1] of each row.

    By default not 127: rounded up in bf16, the greatest would be out of range.
    """
    if x.dtype == torch.bfloat16:  # without the sign, bits of floats are ordered like the floats
        greatest = (x.contiguous().view(torch.int16) & 0x7FFF).amax(-1, keepdim=True).view(torch.bfloat16)
    else:
        greatest = x.abs().amax(-1, keepdim=True)
    inverse = most / greatest.clamp_min(1e-30)
    return (x * inverse).round_(), 1 / inverse


def _int8_product(values: Tensor, zero: int, ready: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return cast(Tensor, torch.ops.onednn.qlinear_pointwise(
        values, 1.0, zero, ready, scale, _zeros(len(scale)), None, 1.0, 0, dtype, "none", [], "",
    ))  # fmt: skip


@cache
def _zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int64)


@cache
def whole_numbers() -> tuple[int, int] | None:
    """The greatest whole number that kernels multiply right on this processor, and what stands for 0.

    None where there are no such kernels, or where what is right is a plain loop. AMX multiplies 8 bits by 8 with their
    signs. VNNI has no sign on one side (oneDNN has a loop for both). AVX2 adds two products in 16 bits, which 7 bits
    from 0 on times 8 never leave.
    """
    w = (37 * torch.arange(512 * 256).view(512, 256) % 255 - 127).to(torch.int8)
    w[0] = 127
    signed = (EIGHT,) if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)() else ()
    for most, zero in (*signed, SHIFTED, SEVEN):
        x = 91 * torch.arange(32 * 256).view(32, 256) % (2 * most + 1) - most
        x[0] = most
        whole, ones, wanted = (x + zero).to(torch.uint8 if zero else torch.int8), torch.ones(512), x.float()
        try:
            ready = torch.ops.onednn.qlinear_prepack(w, None)
            run = partial(_int8_product, whole, zero, ready, ones, torch.float32)
            right = torch.equal(run(), wanted @ w.float().T)
        except (RuntimeError, AttributeError, NotImplementedError):
            return None
        if right and _seconds(run) < SLOW * _seconds(partial(torch.mm, wanted, w.float().T)):
            return most, zero
    return None


def _seconds(run: Callable[[], object]) -> float:
    """The least of three times."""
    found = []
    for _ in range(3):
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    return min(found)


@cache
def block_of_4() -> int:
    """Rows that torch's 4-bit kernel keeps together on this processor; 0 where its layout is not one that is known."""
    w = (7 * torch.arange(128 * 64).view(128, 64) // 5 % 16).int()
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(w, 1).reshape(-1)
    except (RuntimeError, AttributeError, NotImplementedError):
        return 0
    for block in (64, 32):
        each = packed.view(128 // block, 64, block // 2)
        if torch.equal(torch.cat([each & 15, each >> 4], -1).transpose(1, 2).reshape(128, 64).int(), w):
            return block
    return 0


class _Times(torch.autograd.Function):
    """A product by packed weights, with the gradient for what is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pack: Pack) -> Tensor:
        ctx.pack = pack
        return pack.times(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ ctx.pack.dense().to(grads[0].dtype), None


class Bundle:
    """Packed layers that read the same input, multiplied at once: the first that is asked computes for all."""

    def __init__(self, packs: Sequence[Pack]) -> None:
        sizes = [p.plain().shape[0] for p in packs]
        self.joint: Pack = cast(Any, type(packs[0])).joined(packs)
        self.joint.assemble()
        self.seen: Tensor | None = None  # held, so that its place in memory is not another's
        self.made, self.left, self.count = torch.empty(0), 0, len(packs)
        for n, pack in enumerate(packs):
            pack.bundle = (self, slice(sum(sizes[:n]), sum(sizes[: n + 1])))

    def times(self, x: Tensor, here: slice) -> Tensor:
        """What the layer with the rows `here` makes of x [rows, in]; kept for the others until each has had its own."""
        if self.seen is None or self.seen.data_ptr() != x.data_ptr() or self.seen.shape != x.shape:
            self.seen, self.left, self.made = x, self.count, self.joint.product(x)
        made = self.made[:, here]
        self.left -= 1
        if not self.left:
            self.seen, self.made = None, x.new_empty(0)
        return made


class PackedLinear(nn.Linear):
    """A linear layer over packed weights."""

    kind: ClassVar[str] = "packed"

    def __init__(self, pack: Pack, sizes: tuple[int, int], bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = sizes
        self.pack = pack
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]

    @property
    def settings(self) -> dict[str, Any]:
        """What `blank` takes."""
        return settings_of(self.pack)

    @classmethod
    def blank(cls, layer: nn.Linear, **settings: Any) -> PackedLinear:
        """Empty, in the place of a linear layer."""
        bias = None if layer.bias is None else layer.bias.data
        sizes = (layer.in_features, layer.out_features)
        return cls(empty(*reversed(sizes), **settings), sizes, bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights that the packed ones stand for."""
        return self.pack.dense().bfloat16()

    def dense(self) -> nn.Linear:
        """An ordinary layer with the same weights, in fp32."""
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        made.weight = nn.Parameter(self.pack.dense(), requires_grad=False)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.data.float(), requires_grad=False)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] → [.., out]."""
        rows = x.flatten(0, -2)
        learns = x.requires_grad and torch.is_grad_enabled()
        made = cast(Tensor, _Times.apply(rows, self.pack)) if learns else self.pack.times(rows)
        made = made.view(*x.shape[:-1], self.out_features)
        return made if self.bias is None else made + self.bias


def scale_of(layer: nn.Module) -> float | None:
    """What an embedding multiplies the rows of its table by (gemma's by a constant); None where it does more."""
    if type(layer) is nn.Embedding:
        return 1.0
    scale: Any = getattr(layer, "embed_scale", None)
    return None if scale is None else float(scale)


class ScaledEmbedding(nn.Embedding):
    """An ordinary embedding whose rows are multiplied by a constant."""

    scale = 1.0

    def forward(self, ids: Tensor) -> Tensor:
        """ids [..] → [.., size]."""
        return super().forward(ids) * self.weight.new_tensor(self.scale)


class PackedEmbedding(nn.Embedding):
    """An embedding over packed weights, `scale` times; only the rows that are asked for are unpacked."""

    kind: ClassVar[str] = "packed_embedding"

    def __init__(self, pack: Pack, sizes: tuple[int, int], dtype: torch.dtype, scale: float = 1.0) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = sizes
        self.padding_idx = None
        self.pack, self.dtype, self.scale = pack, dtype, scale

    @property
    def settings(self) -> dict[str, Any]:
        """What `blank` takes."""
        return settings_of(self.pack)

    @classmethod
    def blank(cls, layer: nn.Embedding, **settings: Any) -> PackedEmbedding:
        """Empty, in the place of an embedding. Raises ValueError for one that does more than look up and scale."""
        scale = scale_of(layer)
        if scale is None:
            raise ValueError(f"{type(layer).__name__} is no plain embedding")
        sizes = (layer.num_embeddings, layer.embedding_dim)
        return cls(empty(*sizes, **settings), sizes, layer.weight.dtype, scale)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights that the packed ones stand for."""
        return self.pack.dense().to(self.dtype)

    def dense(self) -> nn.Embedding:
        """An ordinary embedding with the same weights, in fp32."""
        made = ScaledEmbedding(self.num_embeddings, self.embedding_dim, device="meta")
        made.scale = self.scale
        made.weight = nn.Parameter(self.pack.dense(), requires_grad=False)
        return made

    def forward(self, ids: Tensor) -> Tensor:
        """ids [..] → [.., size]."""
        rows = self.pack.rows(ids.flatten()).to(self.dtype)
        return (rows * rows.new_tensor(self.scale)).view(*ids.shape, self.embedding_dim)


def settings_of(pack: Pack) -> dict[str, Any]:
    """A pack's kind as plain data, which `empty` takes back."""
    twice = {"twice": True} if pack.twice else {}
    return {"bits": pack.bits, "group": pack.group, "zero": pack.zero, "activations": pack.activations, **twice}


def empty(out: int, size: int, *, bits: int, group: int, zero: bool, activations: bool, twice: bool = False) -> Pack:
    """An empty pack of that kind. Raises ValueError for one that there is not."""
    if bits == 8 and not group and not zero:
        return Int8.blank(out, size, activations, twice)
    if bits == 4 and group > 0 and size % group == 0 and not activations and not twice:
        return Int4.blank(out, size, group, zero)
    raise ValueError(f"no weights of {bits} bits in groups of {group}")


def assemble(module: nn.Module) -> None:
    """Make a module that is only run fast: tied packs are one, siblings multiplied at once, layouts the kernels'."""
    same: dict[int, Pack] = {}
    layers = [m for m in module.modules() if isinstance(m, (PackedLinear, PackedEmbedding))]
    for layer in layers:
        layer.pack = same.setdefault(layer.pack.values.data_ptr(), layer.pack)
    for parent in module.modules():
        for names in SIBLINGS:
            found = [getattr(parent, n, None) for n in names]
            packs = [f.pack for f in found if isinstance(f, PackedLinear)]
            like = {(type(p), p.group, p.zero, p.activations, p.twice) for p in packs}
            if len(packs) == len(names) and len(like) == 1 and not any(p.bundle for p in packs):
                Bundle(packs)
    # What is only looked up in, as embeddings that are not tied, is multiplied by nothing.
    multiplied = {id(layer.pack) for layer in layers if isinstance(layer, PackedLinear)}
    for pack in same.values():
        if not pack.bundle and id(pack) in multiplied:
            pack.assemble()


KINDS |= {PackedLinear.kind: PackedLinear, PackedEmbedding.kind: PackedEmbedding}
