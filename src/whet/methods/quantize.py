"""Quantization: weights in 8 or 4 bits, multiplied as they are; the layers that hurt most stay at 8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from whet.errors import MethodError
from whet.methods import Need, Run
from whet.system import System
from whet.task import Learnable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from whet.compress.moments import Moments
    from whet.compress.packed import Pack

NORMED = {  # what a norm's output is read by, in families whose norm multiplies by its weight
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
PLAIN_NORM = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
STRENGTH = 0.5  # SmoothQuant's alpha (Xiao et al. 2023)
HEADER = 128  # bytes of a file that tell of a tensor
RULES = 3  # of what is rounded how; raised where the same settings come to other weights than before
WORTH = 0.9  # of the error may be left after smoothing, or it is not done
LEAST_LEFT = 0.02  # of the bytes before, in tables that stay as they are: where more, it is told


@dataclass(frozen=True)
class Quantize:
    """Weights in few bits, judged on rows of the task (without, by themselves), the embedding included.

    8 bits: one step a row; with `activations`, what is multiplied is rounded, too, so that long prompts run on integer
    kernels (dynamic, by token), and outliers are moved into the weights where that helps (SmoothQuant). 4 bits: a step
    for every `group` columns (0: the first of 32, 64, 128 that divides the width), and a `zero` if wanted, by
    `rounding`: nearest, hqq (Badri & Shaji 2023) or gptq (Frantar et al. 2022, on `rows` train rows; each layer makes
    good for half of what those before it got wrong: QEP, Arai & Ichikawa 2025). `embedding` bits, 0: 8. A layer whose
    width no group divides stays in 8 bits; where the task's `limits.size` allows, so do those that change what the
    model says most for their bytes, those that read the same input together.
    """

    name: ClassVar[str] = "quantize"
    family: ClassVar[str] = "compression"
    needs: ClassVar[tuple[Need, ...]] = ("rows", "weights")
    writes: ClassVar[tuple[str, ...]] = ("model",)
    invalidates: ClassVar[tuple[str, ...]] = ("calibration",)

    bits: int = 8
    rounding: str = "gptq"
    group: int = 0
    zero: bool = False
    activations: bool = True
    embedding: int = 0
    rows: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.embedding not in (0, 4, 8):
            raise ValueError(f"bits is {self.bits}, embedding {self.embedding}; 8 or 4")
        if self.rounding not in ("nearest", "hqq", "gptq"):
            raise ValueError(f"rounding is {self.rounding!r}; one of nearest, hqq, gptq")
        if self.rows < 1 or self.group < 0 or self.group % 2:
            raise ValueError("rows is at least 1, group even and at least 0: two values make a byte")
        if self.bits == 8 and self.rounding == "hqq":
            raise ValueError("hqq rounds to 4 bits; set bits=4, or rounding=nearest or gptq")
        if 4 not in (self.bits, self.embedding) and (self.group or self.zero):
            raise ValueError("group and zero are for 4 bits; set bits=4 or embedding=4, or leave them out")
        if self.rounding != "gptq" and not (self.bits == 8 and self.activations):
            object.__setattr__(self, "needs", ("weights",))

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying at these bits: what rounds in groups is for 4, activations are for 8."""
        own: dict[str, Sequence[Any]] = {"activations": (True, False)}
        if self.bits == 4:
            own = {"rounding": ("gptq", "hqq"), "group": (32, 64), "zero": (False, True)}
        return {"bits": (8, 4), **own}

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with packed weights as its whole model.

        Raises MethodError for a model that is quantized already, whose layers are of an unknown kind, or out of reach.
        """
        from whet.compress import moments
        from whet.compress.folder import compressed, finished, settle, settled
        from whet.compress.layers import Codebook
        from whet.compress.packed import GROUPS, PackedLinear
        from whet.compress.rounding import DAMP, PROPAGATED, UNSEEN
        from whet.task import rows_hash
        from whet.train.lesson import key

        system = system.uncalibrated
        name = key("quantize", RULES, asdict(self), GROUPS, [PROPAGATED, DAMP, UNSEEN], moments.MOST_TOKENS,
                   system.state, rows_hash(data.train), run.seed, data.limits.size)  # fmt: skip
        if finished(run, name):
            return _within(settled(system, run, name), data, run)
        session = run.local(system.model, "quantizing")
        if any(s["kind"] == PackedLinear.kind for s in compressed(session.module).values()):
            raise MethodError(
                "the model is quantized already", expected="a model in 16 bits", found="packed layers",
                do="quantize the System it was made from",
            )  # fmt: skip
        odd = next((n for n, m in session.module.named_modules() if isinstance(m, Codebook)), None)
        if odd:
            raise MethodError(
                "the model's weights share a few values, which rounding would part", expected="share without values",
                found=odd, do="leave share(values=…) out, or quantize without it",
            )  # fmt: skip
        with _swapping(session.module) as work:
            notes = self._pack(system, data, run, session, work)
            made = settle(system, run, session.module, session.tokenizer, name, {"quantized": notes})
        return _within(made, data, run)

    def _pack(self, system: System, data: Learnable, run: Run, session: Any, work: _Work) -> dict[str, Any]:
        from torch import nn

        from whet.compress.moments import rows_of
        from whet.compress.packed import PackedEmbedding
        from whet.compress.structure import size

        was, most = size(session.module)["bytes"], data.limits.size
        rows = rows_of(system, data.train, session, self.rows, run.seed) if data.train else []
        wide, embedding = frozenset[int](), self.embedding or 8
        if most is not None and self.bits == 4:
            wide, embedding = self._spared(session, rows, most, run)
        self._round(session, rows, work, wide, run.progress("quantizing"))
        work.embedding(self, embedding)
        now = size(session.module)["bytes"]
        notes: dict[str, Any] = {"bytes": now, "was": was, "rows": len(rows), "smoothed": work.smoothed,
                 "layers": sorted(work.report.values(), key=lambda r: -r["error"])}  # fmt: skip
        if self.bits == 4:
            kept = {r["layer"] for r in work.report.values() if r["bits"] == 8}
            odd = {n for n in kept if not self.columns(session.module.get_submodule(n).in_features)}
            notes |= {"kept_in_8": len(kept), "odd_width": sorted(odd)}
        elif self.activations and (kind := session.module.config.model_type) not in PLAIN_NORM:
            notes["not_smoothed"] = f"no rule for {kind}'s norms: outliers stay in what is rounded"
        tables = (m for m in session.module.modules() if isinstance(m, nn.Embedding))
        left = [m.weight for m in tables if not isinstance(m, PackedEmbedding)]
        # Such as Gemma's table for its layers.
        if (whole := sum(w.numel() * w.element_size() for w in left)) > LEAST_LEFT * was:
            notes["left_in_16"] = whole
        return notes | ({"limit": most} if most is not None else {})

    def _spared(self, session: Any, rows: Any, most: int, run: Run) -> tuple[frozenset[int], int]:
        """The weights (ids) that stay in 8 bits within `most` bytes, and the bits of the embedding.

        Told by weights rounded to the nearest; without rows, by how far these are off for their size.
        """
        from whet.compress.harm import harms
        from whet.compress.structure import size

        quick, bits = replace(self, rounding="nearest"), self.embedding or 8
        with _swapping(session.module) as work:
            quick._round(session, [], work, frozenset(), None)
            work.embedding(quick, bits)
            if not self.embedding and size(session.module)["bytes"] > most:
                bits = 4
                work.embedding(quick, bits)
            names = sum(1 for _ in session.module.state_dict())
            room = most - size(session.module)["bytes"] - HEADER * names
        harm = {key: entry["error"] for key, entry in work.report.items()}
        if rows:
            harm = harms(session, rows, work.packs, run.seed, run.progress("finding the layers that suffer most"))
        return work.spared(harm, room), bits

    def _round(self, session: Any, rows: Any, work: _Work, wide: frozenset[int], progress: Any) -> None:
        """Every linear layer packed, those over weights `wide` in 8 bits."""
        from whet.compress.moments import bare, follow, walk
        from whet.compress.rounding import compensated

        uses, whole = work.uses(), self._eight
        shared = dict(uses)  # of the other, what is done is taken away

        def visit(index: int, layer: nn.Module, moments: dict[str, Moments]) -> None:
            if self.bits == 8 and self.activations and session.module.config.model_type in PLAIN_NORM:
                work.smooth(layer, moments, shared)
            for name, one in moments.items():
                linear: Any = layer.get_submodule(name)
                # Siblings share what is known of their inputs: each counts once for a weight, and stays as it is.
                seen = work.seen.setdefault(id(linear.weight), {})
                seen[id(one)] = one
                uses[id(linear.weight)] -= 1
                if uses[id(linear.weight)]:
                    continue  # a tied weight is rounded once all its inputs are known
                parts = list(seen.values())
                del work.seen[id(linear.weight)]  # a layer's moments are larger than its weights
                second = sum((m.second for m in parts[1:]), parts[0].second)
                tokens = sum(m.tokens for m in parts)
                weight = linear.weight.data.cpu()
                drifts = [m.drift for m in parts if m.drift is not None]
                if drifts:
                    weight = compensated(weight, second, sum(drifts[1:], drifts[0]), tokens)
                how = whole if id(linear.weight) in wide else self
                work.pack(linear, how._packed(weight, second, tokens), second, weight)

        if not rows:
            return bare(session, visit, progress)
        # In 8 bits there is next to nothing to make good for, and what is smoothed lies in two parts of a layer.
        (follow if self.bits == 4 and self.rounding == "gptq" else walk)(session, rows, visit, progress)

    def _packed(self, weight: Tensor, second: Tensor, tokens: int) -> Pack:
        from whet.compress.rounding import pack4, pack8

        given = second if self.rounding == "gptq" and tokens else None
        if self.bits == 8:
            return pack8(weight, self.activations, given, tokens)
        if columns := self.columns(weight.shape[1]):
            return pack4(weight, columns, self.rounding, given, self.zero, tokens)
        return self._eight._packed(weight, second, tokens)

    @property
    def _eight(self) -> Quantize:
        """How layers that stay in 8 bits are rounded."""
        rounding = "gptq" if self.rounding == "gptq" else "nearest"
        return replace(self, bits=8, activations=False, rounding=rounding, group=0, zero=False, embedding=0)

    def columns(self, size: int) -> int:
        """How many columns share a step, in a layer of that width; 0: no group divides it.

        Raises MethodError where the group that was asked for does not, and another does.
        """
        from whet.compress.packed import GROUPS

        wanted = (self.group,) if self.group else GROUPS
        found = next((g for g in wanted if size % g == 0 and size % 2 == 0), 0)
        others = [g for g in (128, 96, 64, 48, 32, 16, 8) if size % g == 0]
        if self.group and others and not found:
            raise MethodError(
                f"groups of {self.group} do not divide a layer of width {size}", expected="a divisor",
                found=str(self.group), do=f"set group to one of {others}",
            )  # fmt: skip
        return found


def _within(made: System, data: Learnable, run: Run) -> System:
    """The System, having noted whether its files keep within `limits.size`."""
    from whet.scorecard import size_bytes

    if data.limits.size is not None:
        run.notes["quantized"]["met"] = (size_bytes(made) or 0) <= data.limits.size
    return made


@dataclass
class _Work:
    """A module whose layers make way for packed ones, until it is put back as it was."""

    module: Any
    before: list[tuple[Any, str, Any]] = field(default_factory=list)  # (owner, attribute, what stood there)
    scaled: list[tuple[Any, Tensor]] = field(default_factory=list)  # (parameter, its values)
    seen: dict[int, dict[int, Moments]] = field(default_factory=dict)  # weight → its inputs, each once
    report: dict[int, dict[str, Any]] = field(default_factory=dict)  # weight → what became of it
    packs: dict[int, Pack] = field(default_factory=dict)  # weight → what it was packed into
    smoothed: int = 0

    def uses(self) -> dict[int, int]:
        """How many layers read each weight."""
        from torch import nn

        from whet.compress.structure import layers

        found: dict[int, int] = {}
        for layer in layers(self.module):
            for one in layer.modules():
                if isinstance(one, nn.Linear):  # families have kinds of their own: Falcon
                    found[id(one.weight)] = found.get(id(one.weight), 0) + 1
        return found

    def put(self, name: str, layer: Any) -> None:
        """Put a layer into the place of another, by name."""
        owner, _, leaf = name.rpartition(".")
        parent = self.module.get_submodule(owner)
        self.before.append((parent, leaf, getattr(parent, leaf)))
        setattr(parent, leaf, layer)

    def pack(self, linear: Any, pack: Pack, second: Tensor, plain: Tensor | None = None) -> None:
        """Every layer over this weight becomes one over the pack; its error is that against `plain`."""
        from whet.compress.packed import PackedLinear
        from whet.compress.rounding import output_error

        weight = linear.weight
        # `_parameters`, not `weight`: packed layers would be unpacked to answer.
        places = [n for n, m in self.module.named_modules() if m._parameters.get("weight") is weight]
        plain = weight.data.cpu() if plain is None else plain
        self.report[id(weight)] = {"layer": places[0], "bits": pack.bits, "error": output_error(plain, pack, second)}
        pack.to(weight.device)
        self.packs[id(weight)] = pack
        for name in places:
            one = self.module.get_submodule(name)
            self.put(name, PackedLinear(pack, (one.in_features, one.out_features), one.bias))

    def smooth(self, layer: Any, moments: Mapping[str, Moments], uses: Mapping[int, int]) -> None:
        """Move outliers of what linear layers read into their weights, where that lowers the error."""
        for norm, names in NORMED.items():
            readers = [layer.get_submodule(n) for n in names]
            if all(n in moments and uses.get(id(r.weight)) == 1 for n, r in zip(names, readers, strict=True)):
                self._smooth(layer.get_submodule(norm).weight, readers, [moments[n] for n in names])
        down, up = layer.mlp.down_proj, layer.mlp.up_proj
        if "mlp.down_proj" in moments and uses.get(id(down.weight)) == uses.get(id(up.weight)) == 1 and up.bias is None:
            self._smooth(up.weight, [down], [moments["mlp.down_proj"]])

    def _smooth(self, source: Any, readers: Sequence[Any], moments: Sequence[Moments]) -> None:
        import torch

        from whet.compress.packed import rounded
        from whet.compress.rounding import pack8

        one = moments[0]
        weights = torch.cat([r.weight.data.float().cpu() for r in readers])
        factor = one.most.clamp_min(1e-5) ** STRENGTH / weights.abs().amax(0).clamp_min(1e-5) ** (1 - STRENGTH)
        factor = factor / factor.log().mean().exp()

        def error(scale: Tensor) -> float:
            values, step = rounded((one.some / scale).bfloat16())
            made = (values.float() * step.float()) @ pack8(weights * scale, True).dense().T
            return float((made - one.some @ weights.T).norm())

        if error(factor) > WORTH * error(torch.ones_like(factor)):
            return
        self.smoothed += 1
        for parameter in (source, *(r.weight for r in readers)):
            self.scaled.append((parameter, parameter.data))
        down = 1 / factor.to(source.device)
        shaped = down if source.dim() == 1 else down[:, None]
        source.data = (source.data.float() * shaped).to(source.dtype)
        for reader in readers:
            scaled = reader.weight.data.float() * factor.to(reader.weight.device)
            reader.weight.data = scaled.to(reader.weight.dtype)
        for each in {id(m): m for m in moments}.values():
            each.second /= torch.outer(factor, factor)
            each.most, each.some = each.most / factor, each.some / factor

    def embedding(self, method: Quantize, bits: int) -> None:
        """The embedding and the output in `bits`; where they are tied, they stay so."""
        from torch import nn

        from whet.compress.packed import PackedEmbedding, PackedLinear, scale_of
        from whet.compress.rounding import pack4, pack8

        lookup, head = self._original(self.module.get_input_embeddings()), self._original(
            self.module.get_output_embeddings()
        )
        names = {id(m): n for n, m in self.module.named_modules()}
        packs: dict[int, Pack] = {}
        scale = scale_of(lookup)
        if scale is None and getattr(head, "weight", None) is lookup.weight:
            return  # an embedding that does more than look up stays as it is, and so does what is tied to it
        for layer in (lookup, head):
            weight = layer.weight
            if scale is None if layer is lookup else type(layer) is not nn.Linear:
                continue
            if id(weight) not in packs:
                how, columns = "nearest" if method.rounding == "nearest" else "hqq", 0
                if bits == 4:
                    columns = method.columns(weight.shape[1])
                plain = weight.data.cpu()
                packs[id(weight)] = (pack4(plain, columns, how, None, method.zero) if columns
                                     else pack8(plain, method.activations, twice=method.activations))  # fmt: skip
                packs[id(weight)].to(weight.device)
            pack, sizes = packs[id(weight)], (weight.shape[1], weight.shape[0])
            current = self.module.get_input_embeddings() if layer is lookup else self.module.get_output_embeddings()
            packed = (PackedEmbedding(pack, (sizes[1], sizes[0]), weight.dtype, scale) if scale and layer is lookup
                      else PackedLinear(pack, sizes, layer.bias))  # fmt: skip
            self.put(names[id(current)], packed)

    def _original(self, layer: Any) -> Any:
        """What stood where a layer stands now."""
        for parent, leaf, stood in self.before:
            if getattr(parent, leaf) is layer:
                return stood
        return layer

    def spared(self, harm: Mapping[int, float], room: int) -> frozenset[int]:
        """The weights that do most harm in 4 bits for their bytes, as far as there is room for 8.

        What harm is left in 8 bits does not count: their steps are a sixteenth, and errors are squared. Siblings go
        together: parted, they are no longer multiplied at once, here and in vLLM.
        """
        from whet.compress.packed import SIBLINGS

        groups: dict[tuple[str, ...], list[int]] = {}
        for key, entry in self.report.items():
            if entry["bits"] == 8:
                continue  # no group divides its width
            owner, _, leaf = entry["layer"].rpartition(".")
            groups.setdefault((owner, *next((s for s in SIBLINGS if leaf in s), (leaf,))), []).append(key)

        def cost(keys: list[int]) -> int:
            return sum(self.packs[k].values.numel() for k in keys)  # two to a byte, then one

        def gain(keys: list[int]) -> float:
            return sum(harm[k] for k in keys) / cost(keys)

        found: list[int] = []
        for keys in sorted(groups.values(), key=gain, reverse=True):
            if cost(keys) <= room:
                room, found = room - cost(keys), [*found, *keys]
        return frozenset(found)


@contextmanager
def _swapping(module: Any) -> Iterator[_Work]:
    """Within it, layers may be replaced and scaled; afterwards the module is as it was."""
    work = _Work(module)
    try:
        yield work
    finally:
        for parent, leaf, stood in reversed(work.before):
            setattr(parent, leaf, stood)
        for parameter, values in reversed(work.scaled):
            parameter.data = values
