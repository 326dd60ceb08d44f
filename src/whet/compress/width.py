"""Cutting the width of gated MLPs: the neurons that add least go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from whet.compress.calibration import norms
from whet.compress.structure import family, layers, twin
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession
from whet.errors import MethodError

NAMES = ("gate_proj", "up_proj", "down_proj")
STEP, SMALL = 64, 8  # widths are multiples of 64, as groups of quantized weights are; below 1024 of 8


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


def narrow(session: TorchSession, rows: Sequence[Row], share: float) -> Any:
    """The session's module with about this share of the neurons of each MLP: a new one over new tensors.

    A neuron counts as much as what it adds to the layer's output over the rows: the norm of its activations times
    that of its column of down_proj (structured, as in Muralidharan et al. 2024, by the product of Sun et al. 2023).
    """
    module = twin(session.module)
    mlps, config = gated(module), module.config.get_text_config()
    step = STEP if config.intermediate_size >= 1024 else SMALL
    width = max(step, round(share * config.intermediate_size / step) * step)
    active = norms(session, rows, [m.get_submodule("down_proj") for m in gated(session.module)])
    for mlp, norm in zip(mlps, active, strict=True):
        gate, up, down = (mlp.get_submodule(n) for n in NAMES)
        worth = norm * down.weight.float().norm(dim=0)  # type: ignore[operator]
        kept = worth.topk(width).indices.sort().values
        for layer, dim in ((gate, 0), (up, 0), (down, 1)):
            _select(layer, kept, dim)
        if hasattr(mlp, "intermediate_size"):
            mlp.intermediate_size = width
    config.intermediate_size = width
    return module


def _select(layer: Any, kept: Tensor, dim: int) -> None:
    """Keep these outputs (dim 0) or inputs (dim 1) of a linear layer."""
    layer.weight = nn.Parameter(layer.weight.detach().index_select(dim, kept), requires_grad=False)
    if dim == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[kept], requires_grad=False)
    layer.out_features, layer.in_features = layer.weight.shape


