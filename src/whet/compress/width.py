"""Cutting the width of gated MLPs: the neurons that add least go, and the others make good for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from whet.compress.moments import Moments, walk
from whet.compress.rounding import DAMP
from whet.compress.structure import family, layers, twin
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession
from whet.errors import MethodError

NAMES = ("gate_proj", "up_proj", "down_proj")
STEPS = ((1024, 64), (128, 32), (0, 8))  # MLPs of so many neurons keep a multiple of, as groups of weights are
AT_ONCE = 16  # neurons that go, or a 64th of them, before the cost of all others is looked at anew


def gated(module: Any) -> list[nn.Module]:
    """The MLP of each layer. Raises MethodError for a family whose MLPs are not three linear layers of one width."""
    found = [next((m for m in layer.modules() if all(hasattr(m, n) for n in NAMES)), None) for layer in layers(module)]
    width = module.config.get_text_config().intermediate_size if all(found) else None
    for mlp in found:
        three = [getattr(mlp, n, None) for n in NAMES]
        shapes = [(m.out_features, m.in_features) if isinstance(m, nn.Linear) else (0, 0) for m in three]
        if width is None or [shapes[0][0], shapes[1][0], shapes[2][1]] != [width] * 3:
            raise MethodError(
                f"no rule for the width of {family(module)}", expected=f"MLPs of linear layers {', '.join(NAMES)}",
                found=family(module), do="leave width at 1",
            )  # fmt: skip
    return [m for m in found if m is not None]


def narrow(
    session: TorchSession, rows: Sequence[Row], share: float, progress: Callable[[int, int], None] | None = None
) -> Any:
    """The session's module with about this share of the neurons of each MLP: a new one over new tensors.

    Layer by layer, each on what the narrowed ones before it make of the rows: the neurons go without which the layer's
    output changes least, and those that stay make good for them (structured optimal brain surgeon, Kurtic et al. 2023).
    """
    module = twin(session.module)
    mlps, config = gated(module), module.config.get_text_config()
    whole = config.intermediate_size
    step = next(step for least, step in STEPS if whole >= least)
    width = min(whole, max(step, round(share * whole / step) * step))

    def visit(index: int, layer: nn.Module, moments: dict[str, Moments]) -> None:
        mlp = mlps[index]
        gate, up, down = (mlp.get_submodule(n) for n in NAMES)
        name = next(n for n, m in layer.named_modules() if m is down)
        before = cast(Tensor, down.weight)
        kept, weight = survivors(before.detach(), moments[name].second, width)
        for one in (gate, up):
            _select(one, kept)
        down.weight = nn.Parameter(weight.to(before), requires_grad=False)
        down.in_features = width
        if hasattr(mlp, "intermediate_size"):
            mlp.intermediate_size = width

    narrowed = TorchSession(module, session.tokenizer)
    walk(narrowed, rows, visit, progress)
    session.spent += narrowed.spent
    config.intermediate_size = width
    return module


def survivors(weight: Tensor, second: Tensor, many: int) -> tuple[Tensor, Tensor]:
    """The `many` inputs of a linear layer that are kept, in order, and their weights [out, many] in fp64.

    `second` are the inputs' products [in, in], summed over tokens. Those go first that cost the output least if the
    others make good for them: the square of a column's norm by its place in the inverse's diagonal (Hassibi & Stork
    1993, for columns). Each input is damped by its own size, so that a few loud ones do not drown the others.
    """
    second = second.to(weight.device, torch.float64)
    size = second.diagonal().sqrt()
    size = size.clamp_min(1e-6 * float(size.max()) or 1.0)
    second = second / torch.outer(size, size)
    second.diagonal().add_(DAMP)
    inverse, weight = torch.cholesky_inverse(torch.linalg.cholesky(second)), weight.double() * size
    alive = torch.ones(len(size), dtype=torch.bool, device=weight.device)
    while (spare := int(alive.sum()) - many) > 0:
        gone = _cheapest(weight, inverse, alive, min(spare, max(AT_ONCE, len(size) // 64)))
        solved = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weight = weight.addmm(weight[:, gone], solved, alpha=-1)
        inverse.addmm_(inverse[:, gone], solved, alpha=-1)
        alive[gone] = False
    kept = alive.nonzero().flatten()
    return kept, weight[:, kept] / size[kept]


def _cheapest(weight: Tensor, inverse: Tensor, alive: Tensor, many: int) -> Tensor:
    """The next inputs to go: one after the other among those that now cost least, as each makes others dearer."""
    cost = (weight.square().sum(0) / inverse.diagonal()).masked_fill(~alive, torch.inf)
    near = cost.topk(min(4 * many, int(alive.sum())), largest=False).indices
    some, block = weight[:, near], inverse[near][:, near]
    left, gone = torch.zeros(len(near), dtype=some.dtype, device=some.device), list[int]()
    for _ in range(many):
        gone.append(n := int((some.square().sum(0) / block.diagonal() + left).argmin()))
        left[n] = torch.inf
        step = block[n] / block[n, n]
        some, block = some - torch.outer(some[:, n], step), block - torch.outer(block[:, n], step)
        block[n, n] = 1.0
    return near[gone]


def _select(layer: Any, kept: Tensor) -> None:
    """Keep these outputs of a linear layer."""
    kept = kept.to(layer.weight.device)
    layer.weight = nn.Parameter(layer.weight.detach()[kept], requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[kept], requires_grad=False)
    layer.out_features = len(kept)
