"""What a model's linear layers are given by a task's own rows: their inputs' moments, layer by layer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from whet.compress.layers import KINDS
from whet.compress.structure import family
from whet.compress.structure import layers as layers_of
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession, using_tree
from whet.errors import MethodError
from whet.train.batches import Pack, packs, padded

if TYPE_CHECKING:
    from whet.system import System
    from whet.task import Example

SAMPLE = 256  # inputs of each layer that are kept as they are
OUTSIDE = 0.1  # of a decoder's weights may be other than those of linear layers (short convolutions)


@dataclass
class Moments:
    """Inputs of one layer: the sum of their products [in, in], the greatest of each column [in], and some of them."""

    second: Tensor
    most: Tensor
    some: Tensor

    @classmethod
    def of(cls, size: int) -> Moments:
        """Of no inputs yet."""
        return cls(torch.zeros(size, size), torch.zeros(size), torch.zeros(0, size))

    def add(self, x: Tensor) -> None:
        """Count inputs [.., in] in."""
        x = x.flatten(0, -2).float().cpu()
        self.second.addmm_(x.T, x)
        self.most = torch.maximum(self.most, x.abs().amax(0))
        self.some = torch.cat([self.some, x[: SAMPLE - len(self.some)]])


def rows_of(system: System, examples: Sequence[Example], session: TorchSession, most: int, seed: int) -> list[Row]:
    """Up to `most` rows as the System renders them, with their completions where they have some."""
    from whet.train.lesson import render_rows

    some = random.Random(seed).sample(list(examples), min(most, len(examples)))
    rows, _ = render_rows(system, [e for e in some if e.completion or e.text], session)
    bare = [e for e in some if not e.completion and e.text is None]
    prompts, _ = system.fitting(bare, session, [1] * len(bare))
    return rows + [Row(p, (session.encode_answer("", end=True),)) for p in session.encode(prompts)]


def linear_layers(module: Any) -> nn.ModuleList:
    """The decoder's layers. Raises MethodError for a family whose weights are not those of linear layers (experts)."""
    found = layers_of(module)
    sizes = {True: 0, False: 0}
    for one in found.modules():
        known = isinstance(one, (nn.Linear, *KINDS.values()))
        sizes[known] += sum(p.numel() for p in one.parameters(recurse=False) if p.ndim > 1)
    if sizes[False] > OUTSIDE * sum(sizes.values()):
        raise MethodError(
            f"no rule for {family(module)}", expected="decoder layers of linear layers", found="others",
            do="take llama, mistral, qwen or gemma",
        )  # fmt: skip
    return found


Given = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is called with beside the states


class _CaughtError(Exception):
    """What the layers are called with is at hand; the rest need not run."""


def walk(
    session: TorchSession, rows: Sequence[Row], visit: Callable[[int, nn.Module, dict[str, Moments]], None],
    progress: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    """Run rows through the layers one at a time; `visit(index, layer, moments by name)` may change what it is given.

    A layer is run again after its visit, so that the next one sees what the changed layer makes.
    """
    module, layers = session.module, linear_layers(session.module)
    kinds = getattr(module.config.get_text_config(), "layer_types", None) or [""] * len(layers)
    first = [kinds.index(kind) for kind in kinds]  # layers of a kind have masks and positions in common
    made = packs(rows, module.dtype, module.device) if _shared(session, rows) else padded(rows, module.device)
    with using_tree(module, shared=made[0].plan is not None), torch.no_grad():
        caught = [_caught(module, {n: layers[n] for n in set(first)}, pack) for pack in made]
        states = [state for state, _ in caught]
        for index, layer in enumerate(layers):
            given = [of[first[index]] for _, of in caught]
            with _watched(layer) as moments:
                for state, (args, known) in zip(states, given, strict=True):
                    layer(state, *args, **known)
            visit(index, layer, moments)
            states = [_first(layer(state, *args, **known))
                      for state, (args, known) in zip(states, given, strict=True)]  # fmt: skip
            if progress:
                progress(index + 1, len(layers))


def _shared(session: TorchSession, rows: Sequence[Row]) -> bool:
    from whet.engine import attention

    return attention.shares(session.module, max(len(r.prompt) + max(map(len, r.continuations)) for r in rows))


def _caught(module: Any, layers: Mapping[int, nn.Module], pack: Pack) -> tuple[Tensor, dict[int, Given]]:
    """The states that go into the first of some layers, and what each of these is called with beside them."""
    states: list[Tensor] = []
    found: dict[int, Given] = {}

    def catch(number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def seen(_: nn.Module, args: tuple[Any, ...], known: dict[str, Any]) -> None:
            states.append(args[0])
            found[number] = args[1:], known
            if len(found) == len(layers):
                raise _CaughtError

        return seen

    handles = [layer.register_forward_pre_hook(catch(n), with_kwargs=True) for n, layer in layers.items()]
    plan = {} if pack.plan is None else {"whet_plan": pack.plan}
    try:
        module(input_ids=pack.ids, position_ids=pack.positions, use_cache=False, **plan)
    except _CaughtError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return states[0], found


def _first(out: Any) -> Tensor:
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


@contextmanager
def _watched(layer: nn.Module) -> Iterator[dict[str, Moments]]:
    """Within it, the inputs of a decoder layer's linear layers are counted; siblings share one count."""
    found: dict[str, Moments] = {}
    seen: dict[int, Moments] = {}
    held: list[Tensor] = []
    handles = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if held and held[-1] is x:
                found.setdefault(name, seen[id(x)])
                return
            held[:] = [x]
            if name not in found:
                found[name] = Moments.of(x.shape[-1])
            seen.clear()
            seen[id(x)] = found[name]
            found[name].add(x)

        return count

    for name, one in layer.named_modules():
        if isinstance(one, nn.Linear):
            handles.append(one.register_forward_pre_hook(watch(name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
