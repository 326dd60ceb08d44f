"""What a model's linear layers are given by a task's own rows: their inputs' moments, layer by layer."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from whet.compress.layers import KINDS
from whet.compress.structure import family, hooked
from whet.compress.structure import layers as layers_of
from whet.engine import Spent
from whet.engine.prefix import Row, arrange
from whet.engine.torch import TorchSession, using_tree
from whet.errors import MethodError
from whet.train.batches import Pack, batched, shares

if TYPE_CHECKING:
    from whet.system import System
    from whet.task import Example

SAMPLE = 256  # inputs of each layer that are kept as they are
MOST_TOKENS = 65_536  # of the rows that are run through the layers: the states of all are held at once
WALKED, FOLLOWED = 2, 6  # times that a layer is run on each row, about: of `follow`, some runs end in the middle
OUTSIDE = 0.1  # of a decoder's weights may be other than those of linear layers (short convolutions)


@dataclass
class Moments:
    """Inputs of one layer: the sum of their products [in, in], the greatest of each column [in], and some of them.

    `drift` [in, in]: how far inputs were off what they would be if no layer had been changed, times the inputs, summed.
    `tokens`: how many inputs there were.
    """

    second: Tensor
    most: Tensor
    some: Tensor
    drift: Tensor | None = None
    tokens: int = 0

    @classmethod
    def of(cls, size: int) -> Moments:
        """Of no inputs yet."""
        return cls(torch.zeros(size, size), torch.zeros(size), torch.zeros(0, size))

    def add(self, x: Tensor, unchanged: Tensor | None = None) -> None:
        """Count inputs [.., in] in; `unchanged`: what they would be if no layer had been changed."""
        x = x.flatten(0, -2).float().cpu()
        self.tokens += len(x)
        self.second.addmm_(x.T, x)
        if unchanged is not None:
            self.drift = torch.zeros_like(self.second) if self.drift is None else self.drift
            self.drift.addmm_((unchanged.flatten(0, -2).float().cpu() - x).T, x)
        self.most = torch.maximum(self.most, x.abs().amax(0))
        self.some = torch.cat([self.some, x[: SAMPLE - len(self.some)]])


def rows_of(
    system: System, examples: Sequence[Example], session: TorchSession, most: int, seed: int,
    tokens: int | None = None,
) -> list[Row]:  # fmt: skip
    """Rows of up to `most` examples as the System renders them, with their completions where they have some.

    Drawn by seed, and no more than `tokens` hold in all (by default MOST_TOKENS), except for a first one.
    """
    from whet.train.lesson import render_rows

    some = random.Random(seed).sample(list(examples), min(most, len(examples)))
    rows, _ = render_rows(system, [e for e in some if e.answered or e.text], session)
    bare = [e for e in some if not e.answered and e.text is None]
    prompts, _ = system.fitting(bare, session, [1] * len(bare))
    rows = rows + [Row(p, (session.encode_answer("", end=True),)) for p in session.encode(prompts)]
    random.Random(seed).shuffle(rows)  # kinds of rows stand apart until here
    while len(rows) > 1 and arrange(rows).unique_tokens > (tokens or MOST_TOKENS):
        rows = rows[: len(rows) // 2]
    return rows


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


Visit = Callable[[int, nn.Module, dict[str, Moments]], None]


def walk(
    session: TorchSession, rows: Sequence[Row], visit: Visit, progress: Callable[[int, int], None] | None
) -> None:  # fmt: skip
    """Run rows through the layers one at a time; `visit(index, layer, moments by name)` may change what it is given.

    A layer is run again after its visit, so that the next one sees what the changed layer makes.
    """
    with _running(session, rows, WALKED) as (layers, states, given):
        for index, layer in enumerate(layers):
            with _watched(layer) as moments:
                _through(layer, states, given(index))
            visit(index, layer, moments)
            states = _through(layer, states, given(index))
            if progress:
                progress(index + 1, len(layers))


def bare(session: TorchSession, visit: Visit, progress: Callable[[int, int], None] | None) -> None:
    """Like `walk` without rows: of what layers are given nothing is known, and all inputs count alike."""
    layers = linear_layers(session.module)
    for index, layer in enumerate(layers):
        found = {n: one for n, one in layer.named_modules() if isinstance(one, nn.Linear)}
        moments = {n: Moments.of(one.in_features) for n, one in found.items()}
        for one in moments.values():
            one.second.fill_diagonal_(1.0)
        visit(index, layer, moments)
        if progress:
            progress(index + 1, len(layers))


def follow(
    session: TorchSession, rows: Sequence[Row], visit: Visit, progress: Callable[[int, int], None] | None
) -> None:  # fmt: skip
    """Like `walk`, but what reads the same input is visited together, in the order of the computation.

    So each part of a layer sees what the changed parts before it make; and its moments tell the drift, how far that is
    off what the unchanged model, which runs beside, gives to it.
    """
    with _running(session, rows, FOLLOWED) as (layers, states, given):
        unchanged = list(states)
        for index, layer in enumerate(layers):
            told, before = given(index), copy.deepcopy(layer)
            for names in _parts(layer, states[0], told[0]):
                moments: Moments | None = None
                for state, first, one in zip(states, unchanged, told, strict=True):
                    x = _input(layer, names[0], state, one)
                    moments = moments or Moments.of(x.shape[-1])
                    moments.add(x, _input(before, names[0], first, one))
                if moments:
                    visit(index, layer, dict.fromkeys(names, moments))
            states, unchanged = _through(layer, states, told), _through(before, unchanged, told)
            if progress:
                progress(index + 1, len(layers))


@contextmanager
def _running(
    session: TorchSession, rows: Sequence[Row], times: int
) -> Iterator[tuple[nn.ModuleList, list[Tensor], Callable[[int], list[Given]]]]:
    """The layers, the states that go into the first of them, pass by pass, and what each layer is called with beside.

    The session has then read the rows so many `times`.
    """
    module, layers = session.module, linear_layers(session.module)
    config = module.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [""] * len(layers)
    first = [kinds.index(kind) for kind in kinds]  # layers of a kind have masks and positions in common
    if getattr(config, "hidden_size_per_layer_input", 0):  # Gemma: each is given something of its own
        first = list(range(len(layers)))
    made = batched(module, rows, shares(module, rows))
    session.spent += Spent(prefilled_tokens=times * sum(pack.tokens for pack in made))
    with using_tree(module, shared=made[0].plan is not None), torch.no_grad():
        caught = [_caught(module, {n: layers[n] for n in set(first)}, pack) for pack in made]
        yield layers, [state for state, _ in caught], lambda index: [of[first[index]] for _, of in caught]


def _through(layer: nn.Module, states: Sequence[Tensor], given: Sequence[Given]) -> list[Tensor]:
    """What a layer makes of states."""
    return [_first(layer(state, *args, **known)) for state, (args, known) in zip(states, given, strict=True)]


def _parts(layer: nn.Module, state: Tensor, given: Given) -> list[tuple[str, ...]]:
    """The names of a layer's linear layers, those that read the same input together, in the order of their use."""
    with _watched(layer) as moments:
        layer(state, *given[0], **given[1])
    found: dict[int, list[str]] = {}
    for name, one in moments.items():
        found.setdefault(id(one), []).append(name)
    return [tuple(names) for names in found.values()]


def _input(layer: nn.Module, name: str, state: Tensor, given: Given) -> Tensor:
    """What one linear layer of a decoder layer is given; what comes behind it is not computed."""
    found: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _CaughtError

    with hooked([layer.get_submodule(name).register_forward_pre_hook(catch)]), suppress(_CaughtError):
        layer(state, *given[0], **given[1])
    return found[0]


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

    hooks = [layer.register_forward_pre_hook(catch(n), with_kwargs=True) for n, layer in layers.items()]
    plan = {} if pack.plan is None else {"whet_plan": pack.plan}
    with hooked(hooks), suppress(_CaughtError):
        module(input_ids=pack.ids, position_ids=pack.positions, use_cache=False, **plan)
    return states[0], found


def _first(out: Any) -> Tensor:
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


@contextmanager
def _watched(layer: nn.Module) -> Iterator[dict[str, Moments]]:
    """Within it, the inputs of a decoder layer's linear layers are counted; siblings share one count."""
    found: dict[str, Moments] = {}
    seen: dict[int, Moments] = {}
    held: list[Tensor] = []

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

    linear = {name: one for name, one in layer.named_modules() if isinstance(one, nn.Linear)}
    with hooked([one.register_forward_pre_hook(watch(name)) for name, one in linear.items()]):
        yield found
