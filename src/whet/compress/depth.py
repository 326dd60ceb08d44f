"""Dropping decoder layers: which ones are missed least, and the model without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from whet.compress.calibration import Calibration, influence
from whet.compress.structure import family, layers, twin
from whet.engine.torch import TorchSession
from whet.errors import MethodError

CANDIDATES = 4  # layers of least influence of which the loss decides
NUMBERED = ("mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs")  # lists of layers by number


@dataclass(frozen=True)
class Dropped:
    """A layer by its number in the given model; `loss` is that without it and those dropped before."""

    layer: int
    influence: float
    loss: float | None


def keep(module: Any, kept: Sequence[int]) -> Any:
    """The module with only these of its layers, in this order, over the same tensors; the given one is unchanged."""
    made = twin(module)
    before, config = layers(made), made.config.get_text_config()
    # A layer knows its number: keys and values are kept under it, and configurations list kinds by it.
    parts: list[tuple[int, Any]] = [(n, m) for n, i in enumerate(kept) for m in before[i].modules()]
    for number, part in parts:
        if hasattr(part, "layer_idx"):
            part.layer_idx = number
    if not hasattr(config, "kept_layers"):  # by their numbers in the whole model, for who is to learn from that
        config.kept_layers = list(range(len(before)))
    for name, value in vars(config).items():
        if name in NUMBERED and value:
            setattr(config, name, [kept.index(i) for i in value if i in kept])
        elif "layer" in name and isinstance(value, list) and len(value) == len(before):
            setattr(config, name, [value[i] for i in kept])
    path = next(name for name, m in made.named_modules() if m is before)
    made.set_submodule(path, nn.ModuleList(before[i] for i in kept))
    config.num_hidden_layers = len(kept)
    return made


def _check(module: Any) -> None:
    """Raise MethodError where the module's configuration is not that of its layers: such a folder could not be read."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        told = AutoModelForCausalLM.from_config(module.config, trust_remote_code=False)
    shapes = [{n: t.shape for n, t in layers(m).state_dict().items()} for m in (module, told)]
    if shapes[0] != shapes[1]:
        raise _no_rule(module, "a pattern of layers")


def _no_rule(module: Any, found: str) -> MethodError:
    return MethodError(
        f"no rule for dropping layers of {family(module)}", expected="layers that its configuration can tell apart",
        found=found, do="set layers=0",
    )  # fmt: skip


def drop(
    session: TorchSession, look: Calibration, many: int, by: str = "loss",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, list[Dropped]]:  # fmt: skip
    """The session's module with `many` layers, and what was dropped, in that order.

    Greedy: the one goes whose input and output are most alike (Men et al. 2024) or, by loss, that of the four most
    alike without which the rows' loss is least; then the rest is looked at anew. Raises MethodError for a family whose
    configuration cannot say which layers were kept.
    """
    if getattr(session.module.config.get_text_config(), "hidden_size_per_layer_input", 0):  # Gemma 3n
        raise _no_rule(session.module, "inputs of its own for each layer")
    kept, gone = list(range(len(layers(session.module)))), list[Dropped]()
    module, whole, tokenizer = session.module, len(kept), session.tokenizer
    while len(kept) > many:
        current = TorchSession(module, tokenizer)
        felt = influence(current, look.rows)
        session.spent += current.spent
        order = sorted(range(len(kept)), key=lambda i: felt[i])
        found = {
            i: look.loss(keep(session.module, [*kept[:i], *kept[i + 1 :]]), tokenizer)
            for i in (order[:CANDIDATES] if by == "loss" else ())
        }
        place = min(found, key=lambda i: found[i]) if found else order[0]
        gone.append(Dropped(kept[place], felt[place], found.get(place)))
        del kept[place]
        module = keep(session.module, kept)
        if progress:
            progress(len(gone), whole - many)
    _check(module)
    return module, gone
