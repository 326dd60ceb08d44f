"""What a decoder is made of: its layers, its parameters, and a twin whose make-up can be changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from whet.errors import MethodError


def twin(module: Any) -> Any:
    """A module of its own over the very same tensors: layers may be dropped, replaced and tied in it, for nothing.

    Its tensors must not be changed in place, only replaced.
    """
    return copy.deepcopy(module, {id(t): t for t in chain(module.parameters(), module.buffers())})


def family(module: Any) -> str:
    """What transformers calls the model's family."""
    return str(module.config.get_text_config().model_type)


def layers(module: Any) -> nn.ModuleList:
    """The decoder's layers. Raises MethodError for a family that keeps them otherwise."""
    count = module.config.get_text_config().num_hidden_layers
    found = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise MethodError(
            f"no rule for {family(module)}", expected=f"its {count} layers in one list", found="none",
            do="use quantize or distill",
        )  # fmt: skip
    return found[0]  # outer ones come first


@contextmanager
def hooked(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """Hooks that have been put into modules stand within it, and are taken off again behind it."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def counted(setting: float, whole: int, what: str) -> int:
    """How many of `whole` a setting means: a number, a share below 1, or 0 for all. Raises MethodError for too many."""
    if setting > whole:
        raise MethodError(f"too many {what}", expected=f"at most {whole}", found=f"{setting:g}", do="set fewer")
    return max(1, round(setting * whole)) if 0 < setting < 1 else int(setting) or whole


def parameters(module: nn.Module) -> int:
    """Numbers that a module holds, each counted once wherever it is used; the embedding included."""
    return sum(p.numel() for p in module.parameters())


def size(module: nn.Module) -> dict[str, int]:
    """Its `parameters`, and the `bytes` of its weights in a folder: parameters as bf16, buffers as they are, each once.
    """
    kept = {t.data_ptr(): t for t in module.state_dict(keep_vars=True).values()}
    each = [t.numel() * (2 if isinstance(t, nn.Parameter) else t.itemsize) for t in kept.values()]
    return {"parameters": parameters(module), "bytes": sum(each)}
