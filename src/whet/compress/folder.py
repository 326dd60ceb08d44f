"""A model folder that holds packed, tied and relaxed layers: transformers' own layout and one file beside it.

`compression.json` says which modules are of which kind, and which tensors are the same one: each is stored once, on
disk and in memory. A folder without it is an ordinary model folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from whet.compress import packed  # noqa: F401  (enters its kinds)
from whet.compress.layers import KINDS
from whet.errors import ModelError
from whet.model import ModelRef, Transform, as_dtype, aside, hash_files

if TYPE_CHECKING:
    from whet.methods import Run
    from whet.system import System

FILE = "compression.json"


def compressed(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The modules that stand in for ordinary layers, outer ones first: name → kind and settings."""
    found = {}
    for name, one in module.named_modules(remove_duplicate=False):
        kind = getattr(one, "kind", None)
        if isinstance(kind, str) and KINDS.get(kind) is type(one):
            found[name] = {"kind": kind, **one.settings}
    return found


def shared(module: Any) -> int:
    """How many layers hold weights that an earlier one holds already; the output that is the embedding is none."""
    stand, last = compressed(module), module.get_output_embeddings()
    own = [n for n, m in module.named_modules(remove_duplicate=False) if m is last]
    seen: set[int] = set()
    found = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.dim() > 1 and tensor.numel() and tensor.data_ptr() in seen:
            found.add(next((n for n in stand if name.startswith(f"{n}.")), name.rpartition(".")[0]))
        seen.add(tensor.data_ptr())
    return len(found.difference(own))


def plain(module: nn.Module) -> bool:
    """Whether every linear layer has whole weights of its own: only then can an adapter be merged into them."""
    held = [id(m._parameters.get("weight")) for m in module.modules() if isinstance(m, nn.Linear)]
    return not compressed(module) and len(set(held)) == len(held)


def save(module: Any, tokenizer: Any, folder: Path, made_of: Sequence[Transform] = ()) -> None:
    """Write a module as a model folder: parameters as bf16, buffers as they are; what several places share, once.

    Its configuration keeps what the model that was first made smaller was `made_of`, for who is to learn from that.
    """
    from safetensors.torch import save_file

    first: dict[tuple[Any, ...], str] = {}
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        narrow = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        kept[name] = tensor.detach().to("cpu", torch.bfloat16 if narrow else None).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(module.config)
    if not hasattr(config, "made_of"):
        config.made_of = [t.fingerprint for t in made_of]
    config.save_pretrained(folder)
    # As the base has it: `save_pretrained` refuses one that was changed if it sets how to draw and not that it draws.
    module.generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    body = {"modules": compressed(module), "aliases": aliases}
    (folder / FILE).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load(folder: Path, dtype: torch.dtype) -> Any:
    """The module of a folder that `save` wrote; its parameters are taken to `dtype`.

    Raises ModelError where the folder names kinds or tensors that do not fit.
    """
    from accelerate import init_empty_weights
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    body = json.loads((folder / FILE).read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if (folder / "generation_config.json").exists():
        module.generation_config = GenerationConfig.from_pretrained(folder)
    for name, settings in sorted(body["modules"].items(), key=lambda item: item[0].count(".")):
        kind = KINDS.get(settings["kind"])
        if kind is None:
            raise ModelError(
                f"{folder} holds a layer of an unknown kind", expected=", ".join(KINDS), found=str(settings["kind"]),
                do="update whet",
            )  # fmt: skip
        given = {k: v for k, v in settings.items() if k != "kind"}
        module.set_submodule(name, kind.blank(module.get_submodule(name), **given))
    tensors = load_file(folder / "model.safetensors")
    _fill(module, tensors, body["aliases"], dtype, folder)
    return module.eval()


def _fill(
    module: nn.Module, tensors: dict[str, Tensor], aliases: dict[str, str], dtype: torch.dtype, folder: Path
) -> None:
    """Put tensors into the places of a module's state; places that share one get the same object."""
    places = module.state_dict(keep_vars=True)
    lacking = [n for n in places if n not in tensors and aliases.get(n) not in tensors]
    if lacking or set(tensors) - set(places):
        odd = (lacking or sorted(set(tensors) - set(places)))[0]
        raise ModelError(
            f"the weights in {folder} do not fit its configuration", expected="a tensor for every place",
            found=f"{odd} {'without a tensor' if lacking else 'without a place'}", do="write it again",
        )  # fmt: skip
    made: dict[str, Tensor] = {}
    for name, place in places.items():
        source = aliases.get(name, name)
        if source not in made:
            value = tensors[source]
            if value.shape != place.shape:
                raise ModelError(
                    f"the weights in {folder} do not fit its configuration", do="write it again",
                    expected=f"{name} of shape {tuple(place.shape)}", found=str(tuple(value.shape)),
                )  # fmt: skip
            own = isinstance(place, nn.Parameter)
            made[source] = nn.Parameter(value.to(dtype), requires_grad=False) if own else value
        owner, _, leaf = name.rpartition(".")
        target = module.get_submodule(owner)
        into: dict[str, Any] = target._parameters if isinstance(place, nn.Parameter) else target._buffers
        into[leaf] = made[source]


def moved(module: Any, device: str) -> Any:
    """The module on a device; buffers that several places share stay one there, which `nn.Module.to` alone parts."""
    made: dict[int, Tensor] = {}
    for one in module.modules():
        for leaf, buffer in one._buffers.items():
            if buffer is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = buffer.to(device)
                one._buffers[leaf] = made[id(buffer)]
    return module.to(device)


def settle(system: System, run: Run, module: Any, tokenizer: Any, key: str, notes: dict[str, Any]) -> System:
    """The System with `module` as its whole model, written once under `key`; what came before no longer counts."""
    made = run.store.artifact(key)
    if not (made / "done.json").exists():
        with aside(made) as work:
            save(module, tokenizer, work / "weights", system.model.transforms)
            files = [p for p in (work / "weights").iterdir() if p.is_file()]
            body = {"kind": "model", "fingerprint": hash_files(files), "notes": notes, "spent": {}}
            (work / "done.json").write_text(json.dumps(body), encoding="utf-8")
    return settled(system, run, key)


def settled(system: System, run: Run, key: str) -> System:
    """The System with what `settle` kept under `key`; its notes go to the Run."""
    made = run.store.artifact(key)
    body = json.loads((made / "done.json").read_text(encoding="utf-8"))
    run.notes.update(body["notes"], artifact=key)
    transform = Transform("model", body["fingerprint"], made / "weights")
    return replace(system, model=system.model.add(transform))


def made_of(ref: ModelRef) -> list[str] | None:
    """The transforms, by their hashes, of what a smaller model was made of; None where it is no smaller model."""
    if ref.whole is None or ref.whole.folder is None:
        return None
    config: dict[str, Any] = json.loads((ref.whole.folder / "config.json").read_text(encoding="utf-8"))
    return config.get("made_of")


def finished(run: Run, key: str) -> bool:
    """Whether `settle` has written under this key."""
    return (run.store.artifact(key) / "done.json").exists()


def relax(module: nn.Module, names: Sequence[str], downs: Sequence[Tensor], ups: Sequence[Tensor]) -> None:
    """Put a low-rank term beside linear layers, by name; one that has a term already gets a wider one."""
    from whet.compress.layers import Relaxed

    for name, down, up in zip(names, downs, ups, strict=True):
        layer = module.get_submodule(name)
        if isinstance(layer, Relaxed):
            down, up = torch.cat([layer.down.data, down.to(layer.down)]), torch.cat([layer.up.data, up.to(layer.up)], 1)
            layer = layer.base
        module.set_submodule(name, Relaxed(layer, down, up))


def beside(module: Any, adapter: Path) -> None:
    """Put a LoRA adapter, as peft wrote it, beside the layers that it was trained on, merging nothing.

    Weights that several layers share, or that are packed, cannot take it in. Raises ModelError for one that is more
    than a low-rank term.
    """
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ModelError(
            "the adapter does not fit a model whose weights are shared or packed", expected="LoRA of one rank",
            found="DoRA" if config.get("use_dora") else "several ranks", do="train it with adapter=lora",
        )  # fmt: skip
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")]
    downs = [(tensors[f"{n}.lora_A.weight"].float() * scale).to(module.device, module.dtype) for n in names]
    ups = [tensors[f"{n}.lora_B.weight"].to(module.device, module.dtype) for n in names]
    # A term that stands there already is widened.
    relax(module, [n.removeprefix("base_model.model.").removesuffix(".base") for n in names], downs, ups)


def dense(module: Any, dtype: torch.dtype) -> Any:
    """The module in `dtype`, ordinary layers in all places: no stand-ins, and of what was shared a copy for each.

    Only output and input embedding stay tied where they are equal. The module itself is changed.
    """
    made: list[str] = []
    for name in compressed(module):
        if not any(name.startswith(f"{outer}.") for outer in made):
            module.set_submodule(name, module.get_submodule(name).dense())
            made.append(name)
    as_dtype(module, dtype)
    first, last = module.get_input_embeddings(), module.get_output_embeddings()
    tied = torch.equal(first.weight, last.weight)
    seen: set[int] = set()
    for one in module.modules():
        for leaf, value in list(one._parameters.items()):
            if value is None or (one is last and tied):
                continue
            if value.data_ptr() in seen:
                one._parameters[leaf] = nn.Parameter(value.detach().clone(), requires_grad=False)
            seen.add(value.data_ptr())
    if tied:
        last.weight = first.weight
    module.config.tie_word_embeddings = tied
    return module
