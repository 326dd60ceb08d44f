"""Tying adjacent layers: to one set of weights, with a low-rank term of its own beside each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from whet.compress.codebook import clustered
from whet.compress.folder import relax
from whet.compress.layers import Codebook
from whet.compress.structure import family, layers, twin
from whet.errors import MethodError

MORE = 8  # directions beyond those asked for, so that the first ones are found well (Halko et al. 2011)


def projections(module: Any) -> list[dict[str, nn.Linear]]:
    """Each decoder layer's linear layers, by their names in the module.

    Raises MethodError for a family without a rule for sharing: there is one where all matrices of a decoder layer are
    those of linear layers, and all decoder layers have the same ones in the same shapes.
    """
    path = next(name for name, m in module.named_modules() if m is layers(module))
    found, forms = [], set()
    for number, layer in enumerate(layers(module)):
        own = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        forms.add(tuple((n, m.weight.shape) for n, m in own.items()))
        matrices = {n for n, p in layer.named_parameters() if p.ndim > 1}
        if matrices != {f"{n}.weight" for n in own} or len(forms) > 1:
            raise MethodError(
                f"no rule for sharing in {family(module)}",
                expected="layers of equal shape made of linear layers (llama, mistral, qwen2, qwen3, gemma, smollm3 …)",
                found=family(module), do="use quantize or distill",
            )  # fmt: skip
        found.append({f"{path}.{number}.{n}": m for n, m in own.items()})
    return found


def runs(count: int, groups: int) -> list[range]:
    """`count` layers as `groups` runs of adjacent ones, as even as can be; the first and the last layer stay alone.

    Even, because nothing tells which adjacent layers are alike: in SmolLM2-135M the cosine between the weights of
    neighbours lies within 0.02 of 0. Outer layers alone: Reid et al. 2021, Subformer; neighbours: Liu et al. 2024,
    MobileLLM.
    """
    outer = 1 if groups >= 3 else 0
    inner, parts = count - 2 * outer, groups - 2 * outer
    cuts = [outer + round(n * inner / parts) for n in range(parts + 1)]
    edges = [0, *cuts, count] if outer else cuts
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def low_rank(matrix: Tensor, rank: int, norm: Tensor) -> tuple[Tensor, Tensor]:
    """(down [rank, in], up [out, rank]): the best approximation for inputs whose size by column is `norm` [in].

    Truncated SVD of the matrix with its columns scaled so (Yuan et al. 2023, ASVD); repeatable.
    """
    scale = norm.clamp_min(1e-3 * float(norm.max()))
    scaled = matrix.float() * scale
    if 2 * (rank + MORE) < min(matrix.shape):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(scaled, rank + MORE, niter=4)
    else:
        left, values, turned = torch.linalg.svd(scaled, full_matrices=False)
        right = turned.T
    return right[:, :rank].T / scale, left[:, :rank] * values[:rank]


def tie(
    module: Any, groups: int, norms: Mapping[str, Tensor], rank: int = 0, start: str = "svd", values: int = 0,
    seed: int = 0, progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, list[range]]:  # fmt: skip
    """The module with `groups` distinct decoder layers, and which layers are one; the rest is the very same tensors.

    The weights of linear layers are tied, to their mean; biases and norms stay each layer's own. Each tied layer gets a
    term of `rank` beside it: `svd`, what is nearest to the difference that the tie makes (Bae et al. 2024), for inputs
    with these `norms` by the layer's name; `mean`, one that adds nothing yet, as a fresh LoRA. With `values`, each row
    of the weights, tied or not, keeps so many numbers.
    """
    made = twin(module)
    found, parts = projections(made), runs(len(layers(made)), groups)
    draw = torch.Generator().manual_seed(seed)
    for done, run in enumerate(parts, 1):
        for same in zip(*(found[n].items() for n in run), strict=True) if values or len(run) > 1 else ():
            own = {name: layer.weight.detach() for name, layer in same}
            dtype = same[0][1].weight.dtype
            mean = torch.stack([w.float() for w in own.values()]).mean(0).to(dtype)
            shared = nn.Parameter(mean, requires_grad=False)
            packed = clustered(mean, values, sum(norms[n].square() for n in own)) if values else None  # type: ignore[arg-type]
            for name, layer in same:
                if packed:
                    made.set_submodule(name, layer := Codebook(*packed, layer.bias, layer.in_features))
                else:
                    layer.weight = shared
                if rank and len(run) > 1:
                    missing = own[name].float() - layer.weight.detach().float()
                    term = [t.to(dtype).contiguous() for t in _term(missing, rank, norms[name], start, draw)]
                    relax(made, [name], term[:1], term[1:])
        if progress:
            progress(done, len(parts))
    return made, parts


def _term(missing: Tensor, rank: int, norm: Tensor, start: str, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The term (down, up) that a tied layer starts with, where `missing` [out, in] is what it has lost."""
    out, size = missing.shape
    rank = min(rank, out, size)
    if start == "svd":
        return low_rank(missing, rank, norm.to(missing))
    return (torch.randn(rank, size, generator=draw) / size**0.5).to(missing), missing.new_zeros(out, rank)
