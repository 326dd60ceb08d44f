"""How weights become whole numbers: to the nearest, by HQQ, by GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor

from whet.compress.packed import Int4, Int8, Pack, bytes_of

HOW = ("nearest", "hqq", "gptq")
DAMP = 0.01  # of the mean of the Hessian's diagonal is added to it (Frantar et al. 2022)
COLUMNS = 128  # of which GPTQ corrects the rest at once
SHRINK = (0.7, 10.0, 1.01, 20)  # HQQ: norm, beta, its growth, rounds (Badri & Shaji 2023)


def pack8(weight: Tensor, activations: bool, hessian: Tensor | None = None) -> Int8:
    """Weights [out, in] in 8 bits with one step per row; with the inputs' second moments [in, in], by GPTQ."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    if hessian is None:
        values = (weight / scale[:, None]).round()
    else:
        values = gptq(weight, hessian, scale[:, None], torch.zeros_like(scale)[:, None], -127, 127)
    return Int8(values.to(torch.int8), scale, activations)


def pack4(weight: Tensor, group: int, how: str = "nearest", hessian: Tensor | None = None) -> Int4:
    """Weights [out, in] in 4 bits, each `group` columns with a step and a zero of their own.

    `how` is one of HOW; gptq needs the inputs' second moments [in, in].
    """
    each = weight.float().unflatten(1, (-1, group))
    low, high = each.amin(-1), each.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-12)
    middle = low + 8 * scale
    if how == "hqq":
        middle = hqq(each, scale, middle)
    scale, middle = scale.bfloat16().float(), middle.bfloat16().float()  # as they will be held
    if how == "gptq" and hessian is not None:
        wide = scale.repeat_interleave(group, 1), middle.repeat_interleave(group, 1)
        values = gptq(weight.float(), hessian, wide[0], wide[1], -8, 7) + 8
    else:
        values = whole(each, scale, middle).flatten(1)
    steps = torch.stack([scale, middle], -1).transpose(0, 1).contiguous().bfloat16()
    return Int4(bytes_of(values), steps)


def whole(each: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    """Groups [out, groups, columns] as the nearest numbers from 0 to 15."""
    return ((each - middle[..., None]) / scale[..., None] + 8).round_().clamp_(0, 15)


def hqq(each: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    """The middles [out, groups] that leave the sparsest error: half-quadratic quantization (Badri & Shaji 2023)."""
    norm, beta, growth, rounds = SHRINK
    best, least = middle, torch.full_like(middle, float("inf"))
    for _ in range(rounds):
        stood = (whole(each, scale, middle) - 8) * scale[..., None]
        error = (each - stood - middle[..., None]) / scale[..., None]
        size = error.abs()
        found = size.pow(norm).sum(-1)
        best, least = torch.where(found < least, middle, best), torch.minimum(found, least)
        outliers = error.sign() * (size - size.clamp_min(1e-8).pow(norm - 1) / beta).relu_() * scale[..., None]
        middle = (each - outliers - stood).mean(-1)
        beta *= growth
    return best


def gptq(weight: Tensor, hessian: Tensor, scale: Tensor, middle: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers [out, in] from `low` to `high`, each column's error made good by those not yet rounded.

    GPTQ (Frantar et al. 2022), columns in the order of their inputs' size; w = value · scale + middle, where scale and
    middle are [out, in] or [out, 1] and fixed beforehand. Columns whose input is always 0 are rounded to the nearest.
    """
    rows, size = weight.shape
    scale, middle = scale.expand(rows, size), middle.expand(rows, size)
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMP * diagonal.mean()
    order = torch.argsort(diagonal, descending=True)
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


def output_error(weight: Tensor, pack: Pack, hessian: Tensor) -> float:
    """How far the outputs of packed weights are off, as a share of the outputs' size, on inputs of these moments."""
    weight = weight.float()
    off = weight - pack.dense()
    return float(((off @ hessian * off).sum() / (weight @ hessian * weight).sum().clamp_min(1e-30)).clamp_min(0).sqrt())
