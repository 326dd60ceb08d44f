"""vLLM: the command that serves a folder, and layers of few bits in the format it reads (compressed-tensors)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.export import UNCUT

if TYPE_CHECKING:
    from whet.export import Left
    from whet.system import System

Kind = tuple[int, int, bool, bool]  # bits, columns to a step (0: the row), symmetric, inputs rounded to 8 bits, too

GROUPS = (0, 32, 64, 128)  # that vLLM's kernels know
WHOLE = 0.02  # how far a zero may lie from a whole number, in steps: what bf16 makes of one


def serve(system: System, context: int) -> str:
    """The command that serves a folder like the System answers."""
    settings = {"temperature": system.decoding.temperature, "max_new_tokens": system.decoding.max_tokens, **UNCUT}
    return f"vllm serve . --max-model-len {context} --override-generation-config '{json.dumps(settings)}'"


@dataclass(frozen=True)
class Packs:
    """Layers that go into a folder packed: by name what stands there in place of `weight`, and what kind they are."""

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    kinds: dict[Kind, list[str]] = field(default_factory=dict)
    left: tuple[Left, ...] = ()
    whole: tuple[str, ...] = ()  # other linear layers: vLLM wants each named

    @property
    def rounded(self) -> tuple[str, ...]:
        """The layers whose inputs are rounded, too."""
        return tuple(name for (*_, rounded), names in self.kinds.items() if rounded for name in names)

    def write(self, folder: Path) -> None:
        """Put the packed layers in place of the dense ones in a model folder, and tell so in its config.json."""
        if not self.layers:
            return
        from compressed_tensors.quantization import QuantizationConfig
        from safetensors.torch import load_file, save_file

        kept = load_file(folder / "model.safetensors")
        for name, tensors in self.layers.items():
            del kept[f"{name}.weight"]
            kept |= {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        schemes = {f"group_{n}": _scheme(kind, names) for n, (kind, names) in enumerate(self.kinds.items())}
        formats = {scheme.format for scheme in schemes.values()}
        told = QuantizationConfig(
            config_groups=schemes, format=formats.pop() if len(formats) == 1 else "mixed-precision",
            quantization_status="compressed", ignore=["lm_head", *self.whole],
        )  # fmt: skip
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = told.model_dump(mode="json")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _scheme(kind: Kind, names: list[str]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    bits, group, symmetric, rounded = kind
    by = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    inputs = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True) if rounded else None
    return QuantizationScheme(
        targets=names, weights=QuantizationArgs(num_bits=bits, symmetric=symmetric, **by), input_activations=inputs,
        format="int-quantized" if rounded else "pack-quantized",
    )  # fmt: skip


def packs(module: Any) -> Packs:
    """The packed linear layers of a module as compressed-tensors has them; what cannot be packed so is named."""
    from torch import nn

    from whet.compress.folder import compressed
    from whet.compress.packed import SIBLINGS

    stand = compressed(module)
    found: list[tuple[str, Any]] = [  # not those within another, whose sum with a term of their own is written in full
        (n, m) for n, m in module.named_modules()
        if isinstance(m, nn.Linear) and hasattr(m, "pack") and not any(n.startswith(f"{outer}.") for outer in stand)
    ]  # fmt: skip
    if found and find_spec("compressed_tensors") is None:
        return Packs(left=(("packing", "packed layers are written in full: pip install 'whet[vllm]' packs them"),))
    kinds: dict[str, Kind] = {}
    for name, layer in found:
        pack, zero = layer.pack, layer.pack.parts()["zero"]
        exact = zero is None or bool(((zero - zero.round()).abs() <= WHOLE).all())
        if layer is not module.get_output_embeddings() and pack.group in GROUPS and exact:
            kinds[name] = (pack.bits, pack.group, zero is None, pack.activations)
    for name in list(kinds):  # vLLM multiplies siblings at once: they are packed alike, or not at all
        owner, _, leaf = name.rpartition(".")
        together = next((s for s in SIBLINGS if leaf in s), (leaf,))
        if len({kinds.get(f"{owner}.{one}") for one in together}) > 1:
            del kinds[name]
    made = Packs()
    for name, layer in found:
        if name in kinds:
            made.layers[name] = _packed(kinds[name], layer.pack.parts(), module.dtype)
            made.kinds.setdefault(kinds[name], []).append(name)
    odd = len(found) - len(kinds)
    why = f"{odd} packed layers are written in full: vLLM reads linear ones with whole zeros, in groups of {GROUPS[1:]}"
    output = module.get_output_embeddings()
    linear = [n for n, m in module.named_modules() if m is not output and not isinstance(m, nn.Embedding)
              and (isinstance(m, nn.Linear) or n in stand)]  # fmt: skip
    whole = tuple(n for n in linear if n not in kinds and not any(n.startswith(f"{outer}.") for outer in stand))
    return Packs(made.layers, made.kinds, (("packing", why),) if odd else (), whole)


def _packed(kind: Kind, parts: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """What compressed-tensors keeps of a layer: whole numbers around 0, scales, and what stands for 0."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits, _, symmetric, rounded = kind
    values, zero = parts["values"], parts["zero"]
    shift = 1 << (bits - 1) if values.dtype == torch.uint8 else 0
    whole = (values.to(torch.int32) - shift).to(torch.int8)
    scale = {"weight_scale": parts["scale"].to(dtype).contiguous()}
    if rounded:
        return {"weight": whole.contiguous(), **scale}
    made = {"weight_packed": pack_to_int32(whole, bits), "weight_shape": torch.tensor(values.shape), **scale}
    if not symmetric:
        centre = (zero.round().to(torch.int32) - shift).to(torch.int8)
        made["weight_zero_point"] = pack_to_int32(centre, bits, packed_dim=0)
    return made
