"""How weights become whole numbers: to the nearest, by HQQ, by GPTQ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from whet.compress.packed import Int4, Int8, Pack, bytes_of

PROPAGATED = 0.5  # of the drift of what goes in is made good for: all of it is learnt by heart (Arai & Ichikawa 2025)
DAMP = 0.01  # of the mean of the Hessian's diagonal is added to it (Frantar et al. 2022)
UNSEEN = 0.25  # times columns per input is added, too: in directions that few inputs leave unseen, errors would be free
COLUMNS = 128  # of which GPTQ corrects the rest at once
NARROWED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # shares of a step that are tried
SHRINK = (0.7, 10.0, 1.01, 20)  # HQQ: norm, beta, its growth, rounds (Badri & Shaji 2023)


def pack8(
    weight: Tensor, activations: bool, hessian: Tensor | None = None, tokens: float = math.inf, twice: bool = False
) -> Int8:
    """Weights [out, in] in 8 bits, one step per row; with the second moments [in, in] of `tokens` inputs, by GPTQ.

    `activations` and `twice` say how what they multiply is rounded, see Int8.
    """
    weight = weight.float()
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    if hessian is None:
        values = (weight / scale[:, None]).round()
    else:
        values = gptq(weight, hessian, scale[:, None], torch.zeros_like(scale)[:, None], -127, 127, tokens)
    return Int8(values.to(torch.int8), scale, activations, twice)


def pack4(
    weight: Tensor, group: int, how: str = "nearest", hessian: Tensor | None = None, zero: bool = False,
    tokens: float = math.inf,
) -> Int4:  # fmt: skip
    """Weights [out, in] in 4 bits, each `group` columns with a step and, with `zero`, a zero of their own.

    `how` is nearest, hqq or gptq, which needs the second moments [in, in] of `tokens` inputs. Without a zero the weight
    that is farthest from 0 is -8 steps, as in llama.cpp's Q4_0.
    """
    each = weight.float().unflatten(1, (-1, group))
    scale, middle = _between(each) if zero else _around(each)
    if how == "hqq":
        scale, middle = hqq(each, scale, middle, zero)
    elif how == "gptq" and hessian is not None and not zero:
        scale = _narrowed(each, scale, hessian.diagonal().float().view(1, -1, group))
    scale, middle = scale.bfloat16().float(), middle.bfloat16().float()  # as they will be held
    if how == "gptq" and hessian is not None:
        wide = scale.repeat_interleave(group, 1), middle.repeat_interleave(group, 1)
        values = gptq(weight.float(), hessian, wide[0], wide[1], -8, 7, tokens) + 8
    else:
        values = whole(each, scale, middle).flatten(1)
    steps = torch.stack([scale, middle][: 1 + zero], -1).transpose(0, 1).contiguous().bfloat16()
    return Int4(bytes_of(values), steps)


def _between(each: Tensor) -> tuple[Tensor, Tensor]:
    """Steps and middles [out, groups] that reach from the least to the greatest of each group."""
    low, high = each.amin(-1), each.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-12)
    return scale, low + 8 * scale


def _around(each: Tensor) -> tuple[Tensor, Tensor]:
    """Steps [out, groups], of either sign, by which what is farthest from 0 is -8; and middles of 0."""
    farthest = each.gather(-1, each.abs().argmax(-1, keepdim=True))[..., 0]
    scale = farthest / -8
    return torch.where(scale.abs() < 1e-12, torch.full_like(scale, 1e-12), scale), torch.zeros_like(scale)


def _narrowed(each: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    """Of steps somewhat shorter than these, those that leave the least error, each column counted by its inputs' size.

    What lies beyond is cut off: a few far weights cost less than a coarse step for all.
    """
    best, least, middle = scale, torch.full_like(scale, float("inf")), torch.zeros_like(scale)
    for share in NARROWED:
        tried = scale * share
        error = ((whole(each, tried, middle) - 8) * tried[..., None] - each).square_().mul_(weights).sum(-1)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def whole(each: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    """Groups [out, groups, columns] as the nearest numbers from 0 to 15."""
    return ((each - middle[..., None]) / scale[..., None] + 8).round_().clamp_(0, 15)


def hqq(each: Tensor, scale: Tensor, middle: Tensor, zero: bool = True) -> tuple[Tensor, Tensor]:
    """Steps and middles [out, groups] that leave the sparsest error: half-quadratic quantization (Badri & Shaji 2023).

    The middles are sought, as they propose; without a `zero`, the steps are, in the same way.
    """
    norm, beta, growth, rounds = SHRINK
    best, least = (scale, middle), torch.full_like(middle, float("inf"))
    for _ in range(rounds):
        values = whole(each, scale, middle) - 8
        stood = values * scale[..., None]
        error = (each - stood - middle[..., None]) / scale[..., None]
        size = error.abs()
        found = (size * scale.abs()[..., None]).pow(norm).sum(-1)
        better = found < least
        best = torch.where(better, scale, best[0]), torch.where(better, middle, best[1])
        least = torch.minimum(found, least)
        outliers = error.sign() * (size - size.clamp_min(1e-8).pow(norm - 1) / beta).relu_() * scale[..., None]
        if zero:
            middle = (each - outliers - stood).mean(-1)
        else:
            scale = (values * (each - outliers)).sum(-1) / values.square().sum(-1).clamp_min(1.0)
            scale = torch.where(scale.abs() < 1e-12, torch.full_like(scale, 1e-12), scale)
        beta *= growth
    return best


def damped(second: Tensor, tokens: float) -> Tensor:
    """The second moments [in, in] of `tokens` inputs in fp64, their diagonal raised, the more the fewer inputs.

    A sum over fewer inputs than columns is singular; shrinking it towards a multiple of the identity (Ledoit & Wolf
    2004) keeps errors out of the directions that happened not to be seen.
    """
    made = second.double().clone()
    diagonal = made.diagonal()
    diagonal += ((DAMP + UNSEEN * len(made) / tokens) * diagonal.mean()).clamp_min(1e-12)
    return made


def gptq(
    weight: Tensor, hessian: Tensor, scale: Tensor, middle: Tensor, low: int, high: int, tokens: float = math.inf
) -> Tensor:  # fmt: skip
    """Whole numbers [out, in] from `low` to `high`, each column's error made good by those not yet rounded.

    GPTQ (Frantar et al. 2022), columns in the order of their inputs' size; w = value · scale + middle, where scale and
    middle are [out, in] or [out, 1] and fixed beforehand. Columns whose input is always 0 are rounded to the nearest.
    """
    rows, size = weight.shape
    scale, middle = scale.expand(rows, size), middle.expand(rows, size)
    hessian = damped(hessian, tokens)
    order = torch.argsort(hessian.diagonal(), descending=True)
    weight, scale, middle = weight[:, order].clone(), scale[:, order], middle[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    values = torch.empty_like(weight)
    for first in range(0, size, COLUMNS):
        last = min(first + COLUMNS, size)
        some, errors = weight[:, first:last], torch.empty(rows, last - first)
        block = upper[first:last, first:last]
        for n in range(last - first):
            step, zero = scale[:, first + n], middle[:, first + n]
            value = ((some[:, n] - zero) / step).round_().clamp_(low, high)
            values[:, first + n] = value
            error = (some[:, n] - value * step - zero) / block[n, n]
            some[:, n + 1 :] -= torch.outer(error, block[n, n + 1 :])
            errors[:, n] = error
        weight[:, last:] -= errors @ upper[first:last, last:]
    return values[:, torch.argsort(order)]


def compensated(weight: Tensor, second: Tensor, drift: Tensor, tokens: float = math.inf) -> Tensor:
    """Weights [out, in] that give, on inputs off by `drift`, more of what these weights gave before.

    Quantization error propagation (QEP, Arai & Ichikawa 2025): `second` [in, in] are the products of `tokens` inputs as
    they are, `drift` [in, in] those of how far they are off with them.
    """
    lower = torch.linalg.cholesky(damped(second, tokens))
    solved = torch.cholesky_solve((weight.double() @ drift.double()).T, lower).T
    return weight.float() + PROPAGATED * solved.float()


def output_error(weight: Tensor, pack: Pack, hessian: Tensor) -> float:
    """How far the outputs of packed weights are off, as a share of the outputs' size, on inputs of these moments."""
    weight = weight.float()
    off = weight - pack.dense()
    return float(((off @ hessian * off).sum() / (weight @ hessian * weight).sum().clamp_min(1e-30)).clamp_min(0).sqrt())
