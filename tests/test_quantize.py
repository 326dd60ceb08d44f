"""Packed weights and the method that makes them, against closed formulas and plain products."""

from __future__ import annotations

import itertools
import json
import math
import platform
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf as ggml
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_model, make_tokenizer, save_model
from test_search import write_task
from torch import nn

from whet import scorecard
from whet.cli import main
from whet.compress import folder as folders
from whet.compress import harm, packed, rounding
from whet.compress import moments as calibrate
from whet.compress.folder import compressed
from whet.compress.structure import size
from whet.engine import Spent
from whet.engine.fake import FakeSession
from whet.engine.prefix import Row, arrange
from whet.engine.torch import TorchSession
from whet.errors import ArtifactError, MethodError
from whet.methods import Run, lacking, make
from whet.methods.finetune import FineTune
from whet.methods.quantize import Quantize, _swapping
from whet.metrics import Outcome, get
from whet.model import ModelRef, load, resolve
from whet.progress import Silent
from whet.report import view
from whet.search import _confirm, _fits_better, limits
from whet.search.budget import Rates
from whet.search.race import Race, Trial
from whet.search.recipe import Recipe, parse
from whet.store import Store
from whet.system import Decoding, Demonstrations, System
from whet.task import Example, Learnable, Limits

Q4_0 = ggml.GGMLQuantizationType.Q4_0
WORDS = ("movie", "great", "funny", "story", "people", "city", "bad", "question", "answer", "film", "was", "not")


def weights(out: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Random weights."""
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def examples(count: int = 24) -> tuple[Example, ...]:
    """Rows of a small task."""
    return tuple(
        Example(str(n), " ".join(WORDS[(n + i) % len(WORDS)] for i in range(8)), ("positive", "negative")[n % 2])
        for n in range(count)
    )


def task(**more: object) -> Learnable:
    """A small task."""
    return Learnable("t", "Say which.", "accuracy", ("negative", "positive"), train=examples(), **more)


def system(folder: Path, home: Path, family: str = "llama") -> System:
    """A System over a tiny model."""
    decoding = Decoding(("negative", "positive"), True)
    return System(resolve(save_model(folder, family)), "Say which.", decoding=decoding, home=home)


@given(st.integers(0, 1000), st.sampled_from([32, 64]))
@settings(max_examples=20, deadline=None)
def test_four_bits_are_within_half_a_step(seed: int, group: int) -> None:
    w = weights(64, 128, seed)
    pack = rounding.pack4(w, group, zero=True)
    step = pack.parts()["scale"].repeat_interleave(group, 1)
    assert ((pack.dense() - w).abs() <= 0.5 * step + 0.05 * step).all()  # steps and zeros are held in bf16
    values, scale, zero = (pack.parts()[k] for k in ("values", "scale", "zero"))
    each = (values.float().unflatten(1, (-1, group)) - zero[..., None]) * scale[..., None]
    assert torch.allclose(each.flatten(1), pack.dense(), atol=1e-5)


@given(st.integers(0, 1000), st.sampled_from([32, 64]))
@settings(max_examples=20, deadline=None)
def test_four_bits_around_zero_are_llama_cpps(seed: int, group: int) -> None:
    w = weights(64, 128, seed)
    w[3] = 0
    pack = rounding.pack4(w, group)
    values, scale, zero = (pack.parts()[k] for k in ("values", "scale", "zero"))
    assert zero is None and values.dtype == torch.int8 and pack.steps.shape == (128 // group, 64, 1)
    wide = scale.repeat_interleave(group, 1)
    assert torch.allclose(values * wide, pack.dense(), atol=1e-6)
    # The value farthest from 0 is -8 steps, so that only +8 steps, which there is not, may be a whole step off.
    assert ((pack.dense() - w).abs() <= 0.55 * wide.abs() + (w / wide >= 7.45) * 0.55 * wide.abs() + 1e-6).all()
    if group == 32:
        found = ggml.quants.dequantize(ggml.quants.quantize(w.numpy(), Q4_0), Q4_0)
        near = np.abs(found - pack.dense().numpy()) < 0.05 * wide.abs().numpy()
        assert near.mean() > 0.98  # steps are bf16 here, fp16 there: what lies halfway may go either way


def test_eight_bits_are_within_half_a_step() -> None:
    w = weights(48, 80)
    pack = rounding.pack8(w, True)
    assert torch.allclose(pack.scale, w.abs().amax(1) / 127)
    assert ((pack.dense() - w).abs() <= 0.5001 * pack.scale[:, None]).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 40, 200])
@pytest.mark.parametrize("make_pack", [
    lambda w: rounding.pack8(w, False), lambda w: rounding.pack8(w, True), lambda w: rounding.pack4(w, 64),
    lambda w: rounding.pack4(w, 32, zero=True),
])  # fmt: skip
def test_products_are_those_of_the_weights_stood_for(rows: int, make_pack: object) -> None:
    pack = make_pack(weights(128, 192))  # type: ignore[operator]
    x = weights(rows, 192, 1).bfloat16()
    dense = pack.dense()
    for assembled in (False, True):
        if assembled:
            pack.assemble()
            assert torch.equal(pack.dense(), dense)
        made, wanted = pack.times(x).float(), x.float() @ dense.T
        assert (made - wanted).norm() < 0.02 * wanted.norm()
        ids = torch.tensor([3, 77, 127, 3])
        assert torch.allclose(pack.rows(ids), dense[ids], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_integer_kernels_products_are_in_the_type_of_the_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, x, types, plain = rounding.pack8(weights(128, 192), True), weights(40, 192, 1), set(), packed.linear
    monkeypatch.setattr(packed, "linear", lambda a, b: (types.update((a.dtype, b.dtype)), plain(a, b))[1])
    values, step = packed.rounded(x.to(dtype))
    wanted = values.float() * step.float() @ pack.dense().T
    assert (pack.times(x.to(dtype)).float() - wanted).norm() < 0.003 * wanted.norm()
    assert types == {torch.bfloat16 if dtype == torch.bfloat16 else torch.float32}


@pytest.mark.parametrize("width", [192, 97, 100])
def test_seven_bits_of_rows_are_multiplied_exactly_and_part_by_part(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("torch multiplies whole numbers by kernels for x86")
    assert packed.whole_numbers() in (packed.EIGHT, packed.SHIFTED, packed.SEVEN)
    monkeypatch.setattr(packed, "whole_numbers", lambda: packed.SEVEN)
    pack = packed.Int8(torch.full((48, width), 127, dtype=torch.int8), torch.ones(48), activations=True)
    pack.assemble()
    assert pack.ready and (len(pack.ready) > 1) == (width != 97)
    greatest = torch.full((40, width), 63.0)  # two such products side by side leave 16 bits if they are signed
    assert torch.equal(pack.times(greatest), torch.full((40, 48), 63.0 * 127 * width))
    x, pack = weights(40, width, 1), rounding.pack8(weights(48, width), True)
    wanted = x @ pack.dense().T
    pack.assemble()
    assert (pack.times(x) - wanted).norm() < 0.02 * wanted.norm()


def test_whole_numbers_have_a_kernel_and_no_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AMX, oneDNN multiplies signed numbers by signed ones a thousand times slower than floats."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("torch multiplies whole numbers by kernels for x86")
    found = (packed.EIGHT,) if torch.cpu._is_amx_tile_supported() else (packed.SHIFTED, packed.SEVEN)
    assert packed.whole_numbers() in found
    pack = rounding.pack8(weights(48, 192), True)
    x, taken = weights(40, 192, 1), itertools.cycle((31.0, 1.0))
    monkeypatch.setattr(packed, "_seconds", lambda run: next(taken))  # what is right is slow
    packed.whole_numbers.cache_clear()
    assert packed.whole_numbers() is None
    pack.assemble()
    wanted = x @ pack.dense().T
    assert not pack.ready and (pack.times(x) - wanted).norm() < 0.02 * wanted.norm()
    packed.whole_numbers.cache_clear()


@pytest.mark.parametrize("kernels", ["own", "seven", "none"])
def test_what_rounding_leaves_is_multiplied_too(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "seven" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("torch multiplies whole numbers by kernels for x86")
    if kernels != "own":
        monkeypatch.setattr(packed, "whole_numbers", lambda: packed.SEVEN if kernels == "seven" else None)
    x, off = weights(40, 192, 1), {}
    for twice in (False, True):
        pack = rounding.pack8(weights(48, 192), True, twice=twice)
        wanted = x @ pack.dense().T
        pack.assemble()
        off[twice] = float((pack.times(x) - wanted).norm() / wanted.norm())
        assert packed.empty(48, 192, **packed.settings_of(pack)).twice is twice
        assert bool(pack.ready) is (kernels != "none" and packed.whole_numbers() is not None)
    assert off[True] < 0.02 * off[False] < 0.0004
    again = packed.Bundle([rounding.pack8(weights(n, 192), True, twice=True) for n in (48, 32)])
    assert again.joint.twice


@pytest.mark.parametrize("bits", [8, 4])
def test_what_the_output_reads_is_rounded_twice(bits: int, tmp_path: Path) -> None:
    base = system(tmp_path / "model", tmp_path / "home")
    run = Run(Store(tmp_path / "home"))
    made = Quantize(bits=bits, group=16 if bits == 4 else 0).apply(base, task(), run)
    session = run.local(made.model, "reading")
    packs = {n: m.pack for n, m in session.module.named_modules() if isinstance(m, packed.PackedLinear)}
    assert {n for n, p in packs.items() if p.twice} == {"lm_head"} < packs.keys()
    plain = Quantize(bits=bits, group=16 if bits == 4 else 0, activations=False).apply(base, task(), run)
    output: Any = run.local(plain.model, "reading").module.lm_head
    assert not output.pack.twice and not output.pack.activations


def test_siblings_are_multiplied_at_once_and_give_the_same() -> None:
    for kind in (lambda w: rounding.pack8(w, True), lambda w: rounding.pack4(w, 32),
                 lambda w: rounding.pack4(w, 32, zero=True)):  # fmt: skip
        packs = [kind(weights(n, 64, n)) for n in (64, 32, 32)]
        alone = [p.dense() for p in packs]
        x = weights(4, 64, 9).bfloat16()
        bundle = packed.Bundle(packs)
        for _ in range(2):
            for pack, dense in zip(packs, alone, strict=True):
                wanted = x.float() @ dense.T
                assert (pack.times(x).float() - wanted).norm() < 0.03 * wanted.norm()
                assert torch.equal(pack.dense(), dense)
            assert bundle.seen is None  # nothing is held on to
            x = weights(4, 64, 10).bfloat16()


def test_rounded_rows_never_leave_eight_bits() -> None:
    x = torch.linspace(-3, 3, 4096 * 8).view(64, -1).bfloat16() * torch.logspace(-6, 6, 64)[:, None].bfloat16()
    values, step = packed.rounded(x)
    assert (values.float().sign() * x.float().sign() >= 0).all()
    assert ((values.float() * step.float() - x.float()).abs() <= 1.3 * step.float()).all()


def test_gptq_is_the_nearest_where_inputs_are_independent_and_better_where_not() -> None:
    w = weights(32, 64)
    scale = w.abs().amax(1, keepdim=True) / 7
    zero = torch.zeros_like(scale)
    nearest = (w / scale).round().clamp(-8, 7)
    assert torch.equal(rounding.gptq(w, torch.eye(64), scale, zero, -8, 7), nearest)
    x = weights(500, 8, 1) @ weights(8, 64, 2) + 0.1 * weights(500, 64, 3)
    second = x.T @ x

    def lost(values: torch.Tensor) -> float:
        return float(((values * scale - w) @ x.T).norm())

    assert lost(rounding.gptq(w, second, scale, zero, -8, 7)) < 0.6 * lost(nearest)


def naive_gptq(w: np.ndarray, hessian: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Equations 2 and 3 of the paper (Frantar et al. 2022), one weight of one row at a time, without Cholesky."""
    values, order = np.zeros_like(w), np.argsort(-np.diag(hessian), kind="stable")
    for row in range(len(w)):
        left, inverse = w[row].copy(), np.linalg.inv(hessian)
        for q in order:
            values[row, q] = np.clip(np.round(left[q] / step[row, 0]), -8, 7)
            error = (left[q] - values[row, q] * step[row, 0]) / inverse[q, q]
            left -= error * inverse[q]
            inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return values


@pytest.mark.parametrize("tokens", [math.inf, 80])
def test_gptq_is_the_papers(tokens: float) -> None:
    mixed = (weights(160, 160, 2) / 8 + torch.eye(160)).double()
    w, x = weights(6, 160).double(), weights(300, 160, 1).double() @ mixed
    second, step = x.T @ x, w.abs().amax(1, keepdim=True) / 7
    raised = (0.01 + rounding.UNSEEN * 160 / tokens) * second.diagonal().mean() * torch.eye(160)
    wanted = naive_gptq(w.numpy(), (second + raised).numpy(), step.numpy())
    made = rounding.gptq(w.float(), second.float(), step.float(), torch.zeros(6, 1), -8, 7, tokens).numpy()
    assert (made == wanted).mean() > 0.99  # in fp32, what lies halfway may go either way
    assert (np.round((w / step).numpy()) == wanted).mean() < 0.9


def test_hqq_is_the_papers() -> None:
    """Half-quadratic splitting (Badri & Shaji 2023), by group: the prox of |e|^p, then the zero in closed form."""
    norm, first, growth, rounds = rounding.SHRINK
    each = weights(4, 96, 3).unflatten(1, (-1, 32))
    each[1, 2, 5] = 9.0
    scale, middle = rounding._between(each)
    found = rounding.hqq(each, scale, middle)[1].double().numpy()
    for row, group in np.ndindex(*scale.shape):
        step = float(scale[row, group])
        w, zero, beta = each[row, group].double().numpy() / step, 8 - float(middle[row, group]) / step, first
        least, best = np.inf, zero
        for _ in range(rounds):
            values = np.clip(np.round(w + zero), 0, 15)
            error = w - (values - zero)
            if (lost := (np.abs(error) ** norm).sum()) < least - 1e-9:
                least, best = lost, zero
            size = np.maximum(np.abs(error), 1e-8)
            sparse = np.sign(error) * np.maximum(size - size ** (norm - 1) / beta, 0)
            zero, beta = (values - (w - sparse)).mean(), beta * growth
        assert found[row, group] == pytest.approx((8 - best) * step, abs=0.02 * step)


@pytest.mark.parametrize("tokens", [6, 40])
def test_few_inputs_do_not_push_errors_where_others_lie(tokens: int) -> None:
    w, shape = weights(48, 64), weights(64, 64, 2) * torch.logspace(0, -0.7, 64)[:, None]
    seen, others = weights(tokens, 64, 3) @ shape, weights(2000, 64, 4) @ shape
    second, unseen = seen.T @ seen, others.T @ others
    nearest, better, bare = (
        rounding.output_error(w, rounding.pack4(w, 16, how, second, False, count), unseen)
        for how, count in (("nearest", tokens), ("gptq", tokens), ("gptq", math.inf))
    )  # fmt: skip
    assert better < nearest and better < bare
    moved = seen + 0.2 * seen @ weights(64, 64, 5) / 8  # off in one way, here and there
    off = others + 0.2 * others @ weights(64, 64, 5) / 8
    found = rounding.compensated(w, moved.T @ moved, (seen - moved).T @ moved, tokens)
    assert (off @ found.T - others @ w.T).norm() < (off @ w.T - others @ w.T).norm()


@pytest.mark.parametrize("zero", [True, False])
def test_hqq_leaves_a_smaller_error_in_its_own_norm(zero: bool) -> None:
    w = weights(16, 256)
    w[:, 5] *= 6  # outliers are what it is for
    each = w.unflatten(1, (-1, 64))

    def lost(how: str) -> float:
        found = rounding.pack4(w, 64, how, zero=zero).dense().unflatten(1, (-1, 64))
        return float((each - found).abs().pow(rounding.SHRINK[0]).sum())

    assert lost("hqq") < lost("nearest")


def test_gptq_in_four_bits_loses_less_of_the_outputs() -> None:
    w, x = weights(64, 128), weights(600, 16, 1) @ weights(16, 128, 2) + 0.3 * weights(600, 128, 3)
    second = x.T @ x
    for zero in (True, False):
        nearest, better = (rounding.pack4(w, 32, how, second, zero) for how in ("nearest", "gptq"))
        assert rounding.output_error(w, better, second) < 0.7 * rounding.output_error(w, nearest, second)


def test_gradient_passes_through_packed_weights() -> None:
    pack = rounding.pack8(weights(16, 32), False)
    layer = packed.PackedLinear(pack, (32, 16), None)
    x = weights(5, 32, 1).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, pack.dense().sum(0).expand(5, 32), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_smoothing_leaves_the_model_what_it_was(family: str) -> None:
    module = make_model(family)
    with torch.no_grad():
        for layer in module.model.layers:  # an outlier that makes it worth while
            layer.input_layernorm.weight[3] = 40.0
            layer.post_attention_layernorm.weight[5] = 40.0
    ids = torch.tensor([[5, 9, 40, 7, 120, 33]])
    before = module(input_ids=ids).logits
    rows = [Row(tuple(range(5 + n, 25 + n)), ((7, 8),)) for n in range(8)]

    with _swapping(module) as work:
        uses = work.uses()
        session = TorchSession(module, make_tokenizer())
        calibrate.walk(session, rows, lambda i, layer, moments: work.smooth(layer, moments, uses), None)
        assert work.smoothed >= 2
        assert torch.allclose(module(input_ids=ids).logits, before, atol=2e-3)
        assert not torch.equal(module.model.layers[0].self_attn.q_proj.weight, make_model(family).model.layers[0]
                               .self_attn.q_proj.weight)  # fmt: skip
    assert torch.equal(module(input_ids=ids).logits, before)


def test_smoothing_leaves_layers_alone_whose_weights_are_shared() -> None:
    module = make_model("llama")
    first, second = module.model.layers
    with torch.no_grad():
        for layer in (first, second):
            layer.input_layernorm.weight[3], layer.post_attention_layernorm.weight[5] = 40.0, 40.0
    for name, linear in [*first.named_modules()]:
        if isinstance(linear, torch.nn.Linear):
            second.get_submodule(name).weight = linear.weight
    ids = torch.tensor([[5, 9, 40, 7, 120, 33]])
    before = module(input_ids=ids).logits.log_softmax(-1)
    rows = [Row(tuple(range(5 + n, 25 + n)), ((7, 8),)) for n in range(8)]
    with torch.no_grad(), _swapping(module) as work:
        Quantize()._round(TorchSession(module, make_tokenizer()), rows, work, frozenset(), None)
        after = module(input_ids=ids).logits.log_softmax(-1)
    apart = (before.exp() * (before - after)).sum(-1).mean().item()
    assert apart < 0.01  # 0.4 where one layer of two was smoothed


@pytest.mark.parametrize("given_settings", [
    {}, {"bits": 4, "group": 16}, {"bits": 4, "zero": True}, {"activations": False, "rounding": "nearest"},
])
def test_quantize_gives_a_smaller_model_that_answers_alike(given_settings: dict[str, object], tmp_path: Path) -> None:
    base = system(tmp_path / "model", tmp_path / "home")
    run = Run(Store(tmp_path / "home"))
    method = make("quantize", given_settings)
    plain = run.session(base.model).score([(("user", "was it bad"),)], [["positive"]])[0][0].logprob
    made = method.apply(base, task(), run)
    assert run.session(base.model).score([(("user", "was it bad"),)], [["positive"]])[0][0].logprob == plain
    assert run.notes["quantized"]["bytes"] < 0.7 * run.notes["quantized"]["was"]
    module, _ = load(made.model, tmp_path / "home")
    kinds = {k["kind"] for k in compressed(module).values()}
    assert kinds == {"packed", "packed_embedding"}
    now = Run(Store(tmp_path / "home")).session(made.model).score([(("user", "was it bad"),)], [["positive"]])[0][0]
    assert now.logprob == pytest.approx(plain, rel=0.1)
    folder = made.save(tmp_path / "system")
    stored = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    assert stored == pytest.approx(run.notes["quantized"]["bytes"], rel=0.25)  # a tiny model: its header counts
    assert method.apply(base, task(), Run(Store(tmp_path / "home"))).fingerprint == made.fingerprint
    with pytest.raises(MethodError, match="quantized already"):
        Quantize(bits=4).apply(made, task(), run)


def test_without_rows_weights_are_rounded_by_themselves(tmp_path: Path) -> None:
    base, run = system(tmp_path / "model", tmp_path / "home"), Run(Store(tmp_path / "home"))
    none = replace(task(), train=())
    assert lacking(Quantize(), base, none) and lacking(Quantize(rounding="nearest"), base, none)  # that one is smoothed
    plain = {"activations": False, "rounding": "nearest"}
    for how in (plain, {"bits": 4, "rounding": "nearest"}, {"bits": 4, "rounding": "hqq", "group": 16}):
        method = make("quantize", how)
        made, wanted = (Recipe((method,)).run(base, data, run) for data in (none, task()))
        given, other = (load(one.model, tmp_path / "home")[0].state_dict() for one in (made, wanted))
        assert given.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in given.items())
    least = run.notes["quantized"]["bytes"]
    Recipe((method,)).run(base, replace(none, limits=Limits(size=least + 9000)), run)
    assert run.notes["quantized"]["met"] and run.notes["quantized"]["kept_in_8"] > 0


def test_limits_keep_the_worst_layers_in_eight_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = system(tmp_path / "model", tmp_path / "home")
    run = Run(Store(tmp_path / "home"))
    Quantize(bits=4, group=16).apply(base, task(), run)
    least = run.notes["quantized"]["bytes"]
    four = {r["layer"]: r["error"] for r in run.notes["quantized"]["layers"]}
    given: list[bool] = []
    plain = rounding.pack8
    monkeypatch.setattr(rounding, "pack8", lambda w, a, *by, **how: (given.append(bool(by and by[0] is not None)),
                                                                     plain(w, a, *by, **how))[1])  # fmt: skip
    made = Quantize(bits=4, group=16).apply(base, task(limits=Limits(size=least + 9000)), run)
    notes = run.notes["quantized"]
    assert notes["met"] and notes["kept_in_8"] > 0 and least < notes["bytes"] <= least + 9000
    assert sum(given) == notes["kept_in_8"]  # rounded by gptq, as the others are
    eight = {r["layer"] for r in notes["layers"] if r["bits"] == 8}
    assert 0 < len(eight) == notes["kept_in_8"] < len(four)
    assert all((r["error"] < 0.2 * four[r["layer"]]) is (r["layer"] in eight) for r in notes["layers"])
    module, _ = load(made.model, tmp_path / "home")
    for layer in module.model.layers:  # siblings stay together
        for parent, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.mlp, ("gate_proj", "up_proj"))):
            assert len({id(getattr(parent, n).pack.bundle[0]) for n in names}) == 1
    Quantize(bits=4, group=16).apply(base, task(limits=Limits(size=1000)), run)
    assert not run.notes["quantized"]["met"]
    written = scorecard.size_bytes(Quantize().apply(base, task(), run))
    assert written and written > run.notes["quantized"]["bytes"]
    for most in (run.notes["quantized"]["bytes"], written):  # the file's header counts, too
        Quantize().apply(base, task(limits=Limits(size=most)), run)
        assert run.notes["quantized"]["met"] is (most == written)


def test_a_limit_below_an_embedding_in_eight_bits_takes_four(tmp_path: Path) -> None:
    base, run = system(tmp_path / "model", tmp_path / "home"), Run(Store(tmp_path / "home"))
    took = []
    for embedding in (8, 4):
        made = Quantize(bits=4, group=16, embedding=embedding).apply(base, task(), run)
        took.append(scorecard.size_bytes(made) or 0)
    middle = sum(took) // 2
    assert took[1] + 1000 < middle < took[0] - 1000
    made = Quantize(bits=4, group=16).apply(base, task(limits=Limits(size=middle)), run)
    notes = run.notes["quantized"]
    assert notes["met"] and took[1] <= (scorecard.size_bytes(made) or 0) <= middle
    Quantize(bits=4, group=16, embedding=8).apply(base, task(limits=Limits(size=middle)), run)
    assert not run.notes["quantized"]["met"]  # 8 bits were asked for


def test_outliers_are_smoothed_where_the_model_is_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_model("llama")
    with torch.no_grad():
        for layer in module.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[3] = 40.0
    ids = torch.arange(5, 105)[None]  # many rows: what is multiplied is rounded, too
    rows = [Row(tuple(range(5 + n, 25 + n)), ((7, 8),)) for n in range(0, 160, 8)]
    monkeypatch.setattr("whet.compress.moments.rows_of", lambda *_: rows)
    session, run, one = TorchSession(module, make_tokenizer()), Run(Store(tmp_path)), System(ModelRef("x", "x"), "x")
    plain, smoothed, off = module(input_ids=ids).logits, list[int](), list[float]()
    for part in ("", "smooth"):
        with monkeypatch.context() as patch, _swapping(module) as work, torch.no_grad():
            if part:
                patch.setattr(type(work), part, lambda *_: None)
            smoothed.append(Quantize()._pack(one, task(), run, session, work)["smoothed"])
            off.append(float((module(input_ids=ids).logits - plain).norm() / plain.norm()))
    assert torch.equal(module(input_ids=ids).logits, plain)
    assert smoothed[0] >= 4 and smoothed[1] == 0 and off[0] < 0.8 * off[1]


def test_what_is_kept_in_eight_bits_lowers_the_error_most_for_its_bytes() -> None:
    module = make_model("llama")
    with torch.no_grad(), _swapping(module) as work:
        for layer in module.model.layers:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                linear = layer.get_submodule(name)
                work.pack(linear, rounding.pack4(linear.weight, 16), torch.eye(linear.in_features))
        bad = {key: 0.4 if "down_proj" in one["layer"] else 0.3 for key, one in work.report.items()}
        spared = work.spared(bad, 1100)  # down_proj has twice as many weights
        assert {work.report[key]["layer"] for key in spared} == {
            "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"}  # fmt: skip
        grown = size(module)["bytes"]
        for layer in module.model.layers:
            linear = layer.self_attn.o_proj
            layer.self_attn.o_proj = packed.PackedLinear(
                rounding.pack8(linear.weight, False), (linear.in_features, linear.out_features), None
            )
        assert 0 < size(module)["bytes"] - grown <= 1100


@pytest.mark.parametrize("shared", [True, False])
def test_harm_is_how_far_a_layer_in_few_bits_moves_what_the_model_says(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the divergence that is measured where one weight alone is rounded, by ratios and by their order."""
    module = make_model("llama")
    if not shared:
        monkeypatch.setattr(harm, "shares", lambda *_: False)
    layers = module.model.layers
    with torch.no_grad():
        layers[0].mlp.down_proj.weight.zero_()  # what is read by it bears on nothing
    rows = [Row(tuple(range(5 + n, 17 + n)), ((7 + n, 8, 9 + n % 5),)) for n in range(64)]
    names = [f"layers.{n}.{name}" for n in (0, 1) for name in ("self_attn.o_proj", "self_attn.v_proj", "mlp.up_proj")]
    linear = [module.model.get_submodule(name) for name in (*names, "layers.1.mlp.down_proj")]
    packs = {id(one.weight): rounding.pack4(one.weight.detach(), 16) for one in linear}
    session = TorchSession(module, make_tokenizer())
    found = harm.harms(session, rows, packs, seed=0)
    assert session.spent.prefilled_tokens and all(p.grad is None for p in module.parameters())

    def said() -> torch.Tensor:
        made = [module(input_ids=torch.tensor([[*r.prompt, *r.continuations[0][:-1]]])).logits[0, -3:] for r in rows]
        return torch.cat(made).detach().log_softmax(-1)

    true, before = [], said()
    for one in linear:
        plain = one.weight.data
        one.weight.data = packs[id(one.weight)].dense()
        true.append(float((before.exp() * (before - said())).sum(-1).mean()))
        one.weight.data = plain
    told = [found[id(one.weight)] for one in linear]
    assert told[2] == true[2] == 0 and rounding.output_error(layers[0].mlp.up_proj.weight.detach(), packs[
        id(layers[0].mlp.up_proj.weight)], torch.eye(layers[0].mlp.up_proj.in_features)) > 0.03  # fmt: skip
    ratios = [a / b for a, b in zip(told, true, strict=True) if b]
    assert len(ratios) == 6 and all(0.55 < ratio < 1.4 for ratio in ratios)


def test_rows_are_drawn_from_all_kinds_and_bounded_by_their_tokens(tmp_path: Path) -> None:
    base = system(tmp_path / "model", tmp_path / "home")
    session = Run(Store(tmp_path / "home")).session(base.model)
    assert isinstance(session, TorchSession)
    with_answers = [Example(f"a{i}", f"was it bad {i}", "positive") for i in range(40)]
    bare = [Example(f"b{i}", f"was it good {i}", "") for i in range(40)]
    whole = calibrate.rows_of(base, [*with_answers, *bare], session, 80, 0)
    some = calibrate.rows_of(base, [*with_answers, *bare], session, 80, 0, arrange(whole).unique_tokens // 3)
    assert len(whole) == 80 and len(some) == 20 and some == whole[:20]
    end = session.encode_answer("", end=True)
    assert 0 < sum(r.continuations == (end,) for r in some) < 20


def test_linear_layers_of_a_familys_own_kind_are_packed(tmp_path: Path) -> None:
    class Own(torch.nn.Linear):
        """As Falcon's: the same product, by another name."""

    module = make_model("llama")
    for layer in module.model.layers:
        layer.mlp.up_proj.__class__ = Own
    rows = [Row(tuple(range(5, 45)), ((7,),))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whet.compress.moments.rows_of", lambda *_: rows)
        with _swapping(module) as work, torch.no_grad():
            one = System(ModelRef("x", "x"), "x")
            Quantize()._pack(one, task(), Run(Store(tmp_path)), TorchSession(module, make_tokenizer()), work)
            assert all(isinstance(layer.mlp.up_proj, packed.PackedLinear) for layer in module.model.layers)


def test_layers_whose_width_no_group_divides_stay_in_eight_bits(tmp_path: Path) -> None:
    module = make_model("llama")
    for layer in module.model.layers:
        for name, sizes in (("gate_proj", (32, 37)), ("up_proj", (32, 37)), ("down_proj", (37, 32))):
            setattr(layer.mlp, name, nn.Linear(*sizes, bias=False))
    rows = [Row(tuple(range(5, 45)), ((7,),))]
    run, one, ids = Run(Store(tmp_path)), System(ModelRef("x", "x"), "x"), torch.tensor([[5, 9, 40, 7]])
    plain = module(input_ids=ids).logits
    session = TorchSession(module, make_tokenizer())
    odd = [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
    for most in (None, 60_000):
        with pytest.MonkeyPatch.context() as patch, _swapping(module) as work, torch.no_grad():
            patch.setattr("whet.compress.moments.rows_of", lambda *_: rows)
            notes = Quantize(bits=4)._pack(one, task(limits=Limits(size=most)), run, session, work)
            assert notes["odd_width"] == odd and notes["kept_in_8"] == (14 if most else 2)
            assert {r["layer"] for r in notes["layers"] if r["bits"] == 8} >= set(odd)
            assert (module(input_ids=ids).logits - plain).norm() < 0.2 * plain.norm()
    assert [Quantize(bits=4).columns(w) for w in (64, 33, 66)] == [32, 0, 0]
    with pytest.raises(ValueError, match="group even"):
        Quantize(bits=4, group=11)
    with pytest.MonkeyPatch.context() as patch:  # 8 bits need no group
        patch.setattr(Quantize, "columns", lambda *_: pytest.fail("asked for a group"))
        with _swapping(module) as work, torch.no_grad():
            work.embedding(Quantize(), 8)


def test_settings_that_would_do_nothing_are_refused() -> None:
    for idle in ({"rounding": "hqq"}, {"group": 32}, {"zero": True}):
        with pytest.raises(ValueError, match="4 bits"):
            Quantize(**idle)  # type: ignore[arg-type]
    Quantize(embedding=4, group=32, zero=True)
    assert Quantize(bits=4, rounding="hqq", group=32, zero=True)._eight.rounding == "nearest"


def test_families_without_a_rule_for_outliers_are_told(tmp_path: Path) -> None:
    for family, told in (("gemma2", True), ("llama", False)):
        base, run = system(tmp_path / family, tmp_path / "home", family), Run(Store(tmp_path / "home"))
        Quantize().apply(base, task(), run)
        assert ("not_smoothed" in run.notes["quantized"]) is told and "left_in_16" not in run.notes["quantized"]


def test_a_further_table_by_token_is_told(tmp_path: Path) -> None:
    base, run = system(tmp_path / "llama", tmp_path / "home"), Run(Store(tmp_path / "home"))
    module = run.session(base.model).module  # type: ignore[attr-defined]
    module.model.for_each_layer = torch.nn.Embedding(300, 64, dtype=torch.bfloat16)  # as Gemma 3n has one
    Quantize().apply(base, task(), run)
    assert run.notes["quantized"]["left_in_16"] == 300 * 64 * 2


def test_tied_layers_hold_one_pack() -> None:
    module = make_model("llama")
    first, second = (layer.mlp for layer in module.model.layers)
    second.up_proj.weight = first.up_proj.weight

    with _swapping(module) as work:
        uses = work.uses()
        seen: list[int] = []

        def visit(index: int, layer: nn.Module, moments: dict[str, calibrate.Moments]) -> None:
            for name, one in moments.items():
                linear = layer.get_submodule(name)
                uses[id(linear.weight)] -= 1
                if not uses[id(linear.weight)]:
                    seen.append(index)
                    work.pack(linear, rounding.pack8(linear.weight.data, True), one.second)

        calibrate.walk(TorchSession(module, make_tokenizer()), [Row(tuple(range(5, 25)), ((7,),))], visit, None)
        assert first.up_proj.pack is second.up_proj.pack
        assert size(module)["bytes"] < size(make_model("llama"))["bytes"]
    assert first.up_proj.weight is second.up_proj.weight


def test_siblings_of_tied_layers_count_each_input_once(tmp_path: Path) -> None:
    module = make_model("llama")
    first, second = (layer.self_attn for layer in module.model.layers)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(second, name).weight = getattr(first, name).weight
    rows = [Row(tuple(range(5 + n, 25 + n)), ((7, 8),)) for n in range(4)]
    given: dict[int, list[torch.Tensor]] = {}
    seen: dict[int, torch.Tensor] = {}
    counted: dict[int, int] = {}

    class Looking(Quantize):
        """Notes what each weight is rounded by."""

        def _packed(self, weight: torch.Tensor, second: torch.Tensor, tokens: int) -> packed.Pack:
            seen[weight.data_ptr()], counted[weight.data_ptr()] = second.clone(), tokens
            return rounding.pack8(weight, False)

    def look(index: int, layer: nn.Module, moments: dict[str, calibrate.Moments]) -> None:
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = layer.get_submodule(f"self_attn.{name}").weight
            given.setdefault(weight.data_ptr(), []).append(moments[f"self_attn.{name}"].second.clone())

    session, tokens = TorchSession(module, make_tokenizer()), arrange(rows).unique_tokens
    calibrate.walk(session, rows, look, None)
    assert 2 * tokens <= session.spent.prefilled_tokens <= 3 * tokens  # each layer is run before and after its visit
    one = System(ModelRef("x", "x"), "x")
    with _swapping(module) as work, pytest.MonkeyPatch.context() as patch:
        patch.setattr("whet.compress.moments.rows_of", lambda *_: rows)
        Looking(activations=False)._pack(one, task(), Run(Store(tmp_path)), session, work)
    for place, parts in given.items():
        assert torch.allclose(seen[place], parts[0] + parts[1], rtol=0.05, atol=0.05 * float(parts[0].abs().max()))
        assert counted[place] == 2 * tokens  # of both layers


def test_each_layer_is_walked_with_its_own_masks() -> None:
    module = make_model("gemma2")  # windows and whole attention take turns
    rows = [Row(tuple(range(5 + n, 45 + n)), ((7,),)) for n in range(2)]
    found, wanted = list[torch.Tensor](), list[torch.Tensor]()
    calibrate.walk(TorchSession(module, make_tokenizer()), rows,
                   lambda _, __, moments: found.append(moments["mlp.up_proj"].second), None)  # fmt: skip
    for layer in module.model.layers:
        layer.mlp.up_proj.register_forward_pre_hook(lambda _, given: wanted.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        module(input_ids=torch.tensor([row.prompt for row in rows]))
    for one, x in zip(found, wanted, strict=True):
        assert torch.allclose(one, x.T @ x, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_each_part_of_a_layer_sees_what_changed_parts_before_it_make(family: str) -> None:
    module, plain = make_model(family), make_model(family)
    rows = [Row(tuple(range(5 + n, 45 + n)), ((7,),)) for n in range(2)]
    parts: list[tuple[str, ...]] = []
    found: dict[str, calibrate.Moments] = {}

    def visit(index: int, layer: nn.Module, moments: dict[str, calibrate.Moments]) -> None:
        parts.append(tuple(moments))
        for name, one in moments.items():
            found[f"model.layers.{index}.{name}"] = one
            layer.get_submodule(name).weight.data.mul_(1.3)

    calibrate.follow(TorchSession(module, make_tokenizer()), rows, visit, None)
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert parts[:4] == [attention, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
    assert len(found) == 7 * len(module.model.layers)

    def inputs(of: nn.Module) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        for name in found:
            of.get_submodule(name).register_forward_pre_hook(
                lambda _, given, name=name: seen.__setitem__(name, given[0].flatten(0, -2)))  # fmt: skip
        with torch.no_grad():
            of(input_ids=torch.tensor([row.prompt for row in rows]))
        return seen

    now, before = inputs(module), inputs(plain)
    for name, one in found.items():
        x, drift = now[name], before[name] - now[name]
        assert torch.allclose(one.second, x.T @ x, rtol=1e-3, atol=1e-3 * float(one.second.abs().max()))
        assert one.drift is not None
        assert torch.allclose(one.drift, drift.T @ x, rtol=1e-2, atol=2e-3 * float((x.T @ x).abs().max()))
    assert float(found["model.layers.1.mlp.down_proj"].drift.abs().max()) > 0
    assert float(found["model.layers.0.self_attn.q_proj"].drift.abs().max()) == 0


def test_weights_make_good_for_half_of_what_their_inputs_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "DAMP", 1e-9)
    x = weights(400, 12, 1)
    off = x + 0.3 * x @ weights(12, 12, 2)
    weight = weights(5, 12, 3)
    made = rounding.compensated(weight, off.T @ off, (x - off).T @ off)
    best = torch.linalg.lstsq(off, x @ weight.T).solution.T  # the outputs of before from the inputs of now
    assert torch.allclose(made, (weight + best) / 2, atol=1e-3 * float(best.abs().max()))
    assert torch.equal(rounding.compensated(weight, torch.zeros(12, 12), torch.zeros(12, 12)), weight)


def test_a_whole_model_in_four_bits_is_nearer_where_layers_make_good_for_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    module, found = make_model("llama"), list[float]()
    rows = [Row(tuple(random.Random(n).choices(range(5, 200), k=40)), ((7,),)) for n in range(24)]
    ids = torch.tensor([r.prompt for r in rows])
    session, one = TorchSession(module, make_tokenizer()), System(ModelRef("x", "x"), "x")
    monkeypatch.setattr("whet.compress.moments.rows_of", lambda *_: rows)
    plain = module.model(input_ids=ids).last_hidden_state
    for share in (0.0, rounding.PROPAGATED):
        monkeypatch.setattr(rounding, "PROPAGATED", share)
        with _swapping(module) as work, torch.no_grad():
            Quantize(bits=4, group=16)._pack(one, task(), Run(Store(tmp_path)), session, work)
            found.append(float((module.model(input_ids=ids).last_hidden_state - plain).norm() / plain.norm()))
    assert found[1] < 0.9 * found[0]


@pytest.mark.parametrize("name", ["PROPAGATED", "UNSEEN"])
def test_what_was_rounded_by_another_rule_is_not_taken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    base, run = system(tmp_path / "model", tmp_path / "home"), Run(Store(tmp_path / "home"))
    method = Quantize(bits=4, group=16)
    first, again = (method.apply(base, task(), run).fingerprint for _ in range(2))
    monkeypatch.setattr(rounding, name, 0.3)
    assert first == again != method.apply(base, task(), run).fingerprint


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_an_embedding_that_is_scaled_is_packed(family: str, tmp_path: Path) -> None:
    module = make_model(family)
    module.get_output_embeddings().weight = module.get_input_embeddings().weight
    ids = torch.tensor([[5, 9, 40, 7, 120, 33]])
    with torch.no_grad(), _swapping(module) as work:
        plain = module.get_input_embeddings()(ids)
        work.embedding(Quantize(), 8)
        lookup = module.get_input_embeddings()
        assert isinstance(lookup, packed.PackedEmbedding) and module.get_output_embeddings().pack is lookup.pack
        assert (lookup(ids) - plain).norm() < 0.01 * plain.norm()
        assert torch.allclose(lookup.dense()(ids), lookup(ids))
        folders.save(module, make_tokenizer(), tmp_path / "m")
        again = folders.load(tmp_path / "m", torch.float32)
        assert torch.equal(again.get_input_embeddings()(ids), lookup(ids))
        assert (again(ids).logits - module(ids).logits).norm() < 0.05 * module(ids).logits.norm()


def test_what_is_only_looked_up_gets_no_layout_to_multiply_by() -> None:
    module = make_model("llama")  # its embeddings are not tied
    ids = torch.tensor([[5, 9, 40, 7, 120, 33]])
    with torch.no_grad(), _swapping(module) as work:
        work.embedding(Quantize(), 8)
        lookup, output = module.get_input_embeddings(), module.get_output_embeddings()
        assert lookup.pack is not output.pack
        before, asked = lookup(ids), list[object]()
        for layer in (lookup, output):
            layer.pack.assemble = lambda layer=layer: asked.append(layer)
        packed.assemble(module)
        assert asked == [output] and torch.equal(lookup(ids), before)


def test_without_rows_weights_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    empty = replace(task(), train=())
    for bits in (8, 4):
        made = {}
        for how in ("gptq", "nearest"):
            base, run = system(tmp_path / f"model{bits}{how}", tmp_path / "home"), Run(Store(tmp_path / "home"))
            found = Quantize(bits=bits, rounding=how).apply(base, empty, run)
            module = run.session(found.model).module  # type: ignore[attr-defined]
            made[how] = module.state_dict()
        for name, value in made["gptq"].items():
            assert torch.equal(value, made["nearest"][name]), name


def test_experts_are_refused_by_the_familys_name() -> None:
    with pytest.raises(MethodError, match="no rule for gpt_oss"):
        calibrate.linear_layers(make_model("gpt_oss"))


def test_moments_go_with_the_weight_that_was_packed(tmp_path: Path) -> None:
    base, run = system(tmp_path / "model", tmp_path / "home"), Run(Store(tmp_path / "home"))
    session = run.session(base.model)
    with _swapping(session.module) as work:
        Quantize(rounding="nearest")._pack(base, task(), run, session, work)
        assert len(work.report) == 14 and not work.seen


def test_clustered_weights_are_not_rounded(tmp_path: Path) -> None:
    base = system(tmp_path / "model", tmp_path / "home")
    run = Run(Store(tmp_path / "home"))
    small = make("share", {"groups": 0, "values": 4}).apply(base, task(), run)
    with pytest.raises(MethodError, match="share a few values"):
        Quantize().apply(small, task(), run)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="wrong settings"):
        make("quantize", {"bits": 3})
    base = system(tmp_path / "model", tmp_path / "home")
    with pytest.raises(MethodError, match="do not divide"):
        Quantize(bits=4, group=48).apply(base, task(), Run(Store(tmp_path / "home")))
    other = system(tmp_path / "gpt2", tmp_path / "home", "gpt2")
    with pytest.raises(MethodError, match="gpt2"):
        Quantize().apply(other, task(), Run(Store(tmp_path / "home")))


@pytest.mark.parametrize("size, named, met", [("60KB", "quantize", True), ("20KB", "quantize(bits=4)", False)])
def test_improve_makes_it_small_enough_or_names_the_nearest(
    size: str, named: str, met: bool, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("whet.embed.available", lambda: False)
    folder = write_task(tmp_path / "toy", train=60, test=20, limits={"size": size})
    model, out = str(save_model(tmp_path / "model")), tmp_path / "out"
    with pytest.raises(SystemExit, match="^0$"):
        main(["improve", str(folder), "--model", model, "--budget", "60s", "--methods", "quantize", "--out", str(out)])
    result = json.loads((out / "result.json").read_text())
    trials = {t["name"]: t for t in result["trials"]}
    assert result["chosen"]["name"] == named
    assert (trials[named]["status"] == "done") is met
    assert "KB on disk" in trials["base"]["why"]
    assert {"arm": "made small enough for limits", "minutes": 0.25, "most": True} in result["plan"]
    said = " ".join(result["notes"])
    assert ("the nearest is handed over" in said) is not met
    took, whole = (view.size(trials[name]["size_bytes"]) for name in (named, "base"))
    assert result["limits"] == {
        "allowed": {"size": 1000 * int(size[:-2])}, "used": {"size": trials[named]["size_bytes"]},
        "base": {"size": trials["base"]["size_bytes"]}, "met": met,
    }  # fmt: skip
    told = "Within the limits" if met else f"Nothing keeps within the limits; the nearest, {named}, is handed over"
    cost, printed = result["confirm"]["uncompressed"], capsys.readouterr().out.splitlines()
    assert cost["name"] == "base" and cost["score"] == result["confirm"]["base"]["score"]
    assert cost["cost"]["loss"] == -result["confirm"]["difference"]
    assert any(line.startswith("Compression costs") and "base scores" in line for line in printed)
    assert f"{told}: size {took} of {size[:-2]} kB ({whole} before)." in printed
    stored = sum(p.stat().st_size for p in (tmp_path / "out" / "system").rglob("*.safetensors"))
    assert (stored <= int(size[:-2]) * 1000) is met


def trial(name: str, size: int, merit: float = 0.5, content: str = "x") -> Trial:
    """A finished trial of which only the size and the score are known."""
    outcomes = tuple(Outcome(str(n), "a", float(n < 4 * merit), "a") for n in range(4))
    card = SimpleNamespace(size_bytes=size, memory_bytes=None, latency_ms=None, score=merit, outcomes=outcomes)
    system = SimpleNamespace(model=SimpleNamespace(content=content, remote=False))
    return Trial(parse(name) if name else Recipe(), system, 0, "done", "", 4, card, Spent(), 0.0, {}, None)  # type: ignore[arg-type]


def limited_job(
    monkeypatch: pytest.MonkeyPatch, forgets: str = "no such trial", made_of: int = 50, **sizes: float
) -> Any:
    """A job whose candidates are all of 50 bytes, of 100 allowed; trials with such a name cost an earlier task much.

    `sizes` are what students are expected to take, by their recipe.
    """
    run = SimpleNamespace(sessions={"base": FakeSession("hash")}, tidy=lambda: None,
                          session=lambda _: SimpleNamespace(tokenizer=make_tokenizer()))  # fmt: skip

    def enter(recipe: Recipe, *_: Any, **bounds: Any) -> Trial:
        job.bounds.append((bounds["tokens"], bounds["healing"]))
        race.left -= race.each
        run.sessions[recipe.name] = TorchSession(make_model("llama"), make_tokenizer())
        made = trial(recipe.name, made_of)
        job.race.trials.append(made)
        return made

    def mark(one: Trial, **changes: Any) -> Trial:
        changed = replace(one, **changes)
        job.race.trials[job.race.trials.index(one)] = changed
        job.race.base = changed if job.race.base is one else job.race.base
        return changed

    def keeping(_: Any, one: Trial) -> Trial:
        return mark(one, status="refused", why="forgets") if forgets in one.name else one

    base = trial("", 200)
    race = SimpleNamespace(base=base, trials=[base], seconds=0.0, aside=5.0, left=10.0, each=0.0, select=[0] * 4,
                           enter=enter, mark=mark, merit=lambda t: t.card.score,
                           speed=lambda _: SimpleNamespace(train=10_000.0))  # fmt: skip
    task = SimpleNamespace(limits=Limits(size=100), closed=True)
    job = SimpleNamespace(task=task, race=race, bases=[base.system], shrinking=0.0, run=run,
                          wish=SimpleNamespace(methods=(), seed=0), metric=get("accuracy"), notes=[],
                          skipped=[], tight=False, whole=None, bounds=[])  # fmt: skip
    monkeypatch.setattr("whet.search.limits._measured", lambda _, __, card: card)
    monkeypatch.setattr("whet.search.limits._expected", lambda _, __, cut, ___: sizes.get(Recipe(cut).name, 0.0))
    monkeypatch.setattr("whet.search._keeping", keeping)
    return job


def test_a_base_beyond_the_limits_is_known_where_the_finalist_keeps_within_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = limited_job(monkeypatch)
    small = trial("quantize", 50)
    assert limits.within(job, small) is small and job.tight
    assert (job.race.seconds, job.race.aside) == (5.0, 0.0)  # what was set aside for it


@pytest.mark.parametrize("name, status, tight, handed", [
    ("finetune", "done", True, True), ("finetune", "done", False, False), ("finetune", "refused", True, False),
    ("quantize", "refused", True, True), ("quantize", "done", False, False),
])  # fmt: skip
def test_what_keeps_within_the_limits_goes_before_a_base_that_does_not(
    name: str, status: str, tight: bool, handed: bool
) -> None:
    job: Any = SimpleNamespace(tight=tight)
    assert _fits_better(job, replace(trial(name, 50), status=status)) is handed


def test_a_vocabulary_that_cannot_be_trimmed_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    job = limited_job(monkeypatch)
    job.race.trials.append(trial("finetune", 200, 0.75))
    found = [recipe.name for *_, recipe in limits._candidates(job, job.race.trials[1], limits.SMALLER)]
    assert len(found) == len(limits.SMALLER) and not any("vocabulary" in name for name in found)
    job.run.session = lambda _: SimpleNamespace(tokenizer=SimpleNamespace(backend_tokenizer=SimpleNamespace(
        model=type("Unigram", (), {})())))  # fmt: skip
    found = [recipe.name for *_, recipe in limits._candidates(job, job.race.trials[1], limits.SMALLER)]
    assert len(found) == len(limits.SMALLER) - 1
    assert all("vocabulary=false" in name for name in found if "prune" in name) and "finetune+quantize" in found


def test_what_looking_ahead_costs_is_the_races(tmp_path: Path) -> None:
    base, store = system(tmp_path / "model", tmp_path / "home"), Store(tmp_path / "home")
    run = Run(store)
    race = Race("k", task(), [], get("accuracy"), store, {base.model.content: Rates(1_000, 500, 20)}, 0, 60.0,
                Silent(), run)  # fmt: skip
    job: Any = SimpleNamespace(task=SimpleNamespace(limits=Limits(size=100), closed=True), race=race)
    start: Any = SimpleNamespace(system=base)
    assert limits._expected(job, start, parse("prune(width=0.5,vocabulary=false)+distill").methods, 1.0) > 0
    assert race.beside.prefilled_tokens > 0 and race.left < 60.0 and not race.trials
    # A run that goes on after a kill finds what was made, and has as much left.
    again = replace(race, run=Run(store), trials=[], beside=Spent(), costs=0.0)
    job.race = again
    limits._expected(job, start, parse("prune(width=0.5,vocabulary=false)+distill").methods, 1.0)
    assert again.left == race.left and again.beside == race.beside


def test_a_model_that_was_trained_whole_is_counted_once(tmp_path: Path) -> None:
    base = system(tmp_path / "model", tmp_path / "home")
    made = FineTune(adapter="full", epochs=0.2, batch=4).apply(base, task(), Run(Store(tmp_path / "home")))
    own = sum(p.stat().st_size for p in made.model.transforms[-1].folder.glob("*.safetensors"))  # type: ignore[union-attr]
    assert scorecard.size_bytes(made) == own < (scorecard.size_bytes(base) or 0)
    lora = FineTune(epochs=0.2, batch=4).apply(made, task(), Run(Store(tmp_path / "home")))
    assert own < (scorecard.size_bytes(lora) or 0) < 2 * own


def test_what_is_made_smaller_keeps_the_earlier_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    job = limited_job(monkeypatch, forgets="layers")
    job.race.trials.append(trial("finetune", 200, 0.9))
    job.race.trials.append(trial("prune(layers=0.5)+finetune", 50, 0.8))
    found = limits.within(job, job.race.trials[1])
    assert found is not None and found.name == "finetune+quantize"  # not the other, which scored more
    job = limited_job(monkeypatch, forgets="quantize")
    assert limits.within(job, None) is None and "nothing that was tried" in job.notes[0]
    assert [t.status for t in job.race.trials[1:]] == ["refused"] * len(limits.SMALLER)
    assert list(job.run.sessions) == ["base"]  # what was tried in vain holds no memory


@pytest.mark.parametrize("text", ["finetune+quantize", "finetune+quantize(bits=4)", "finetune+prune(width=0.8)+distill",
                                  "share(values=16)+finetune", "fewshot+calibrate+distill", "quantize+distill",
                                  "fewshot+prune+distill(clear=context)"])  # fmt: skip
def test_what_was_made_smaller_already_is_made_smaller_still(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (*limits.CONTEXT, *limits.SMALLER):
        limits.smaller(parse(text), parse(step)).check()
    assert limits.smaller(parse("prune+distill"), parse("quantize")).name == "prune+distill+quantize"
    job = limited_job(monkeypatch)
    job.race.trials.append(trial(text, 200, 0.75))
    found = limits.within(job, job.race.trials[1])
    assert found is not None and found.name != text and found.status == "done"
    assert len({t.name for t in job.race.trials}) == len(job.race.trials)  # what it is already is not tried again
    assert f"against {text}, on select, {found.name} loses 25.0 points" in job.notes[-1]
    assert job.notes[-1].endswith("worse")


@pytest.mark.parametrize(
    ("text", "step", "wanted"),
    [   # the teacher was calibrated, and what it was shown does not come back
        ("fewshot(k=2)+calibrate+distill(batch=8)", "quantize", "fewshot(k=2)+calibrate+distill(batch=8)+quantize"),
        ("fewshot+calibrate+distill", "prune(vocabulary=true)+quantize(bits=4)",
         "fewshot+calibrate+distill+prune(vocabulary=true)+quantize(bits=4)"),
        ("fewshot+calibrate+distill", "prune+distill+quantize",
         "fewshot+prune+distill(clear=context)+quantize+calibrate"),
        ("rag+distill(clear=prompt)", "share+distill+quantize", "rag+share+distill(clear=prompt)+quantize"),
        ("fewshot+distill+calibrate", "quantize", "fewshot+distill+quantize+calibrate"),
        ("fewshot+prune+distill(clear=context)", "prune(vocabulary=true)+quantize",
         "fewshot+distill(clear=context)+prune(vocabulary=true)+quantize"),
        # What had only healed goes with what it healed.
        ("fewshot+prune+distill", "prune(width=0.6)+distill+quantize", "fewshot+prune(width=0.6)+distill+quantize"),
        ("prune+distill+calibrate", "prune(vocabulary=true)+quantize", "prune(vocabulary=true)+quantize+calibrate"),
        ("finetune+quantize+distill", "quantize(bits=4)", "finetune+quantize(bits=4)"),
    ],
)  # fmt: skip
def test_what_a_student_had_learnt_to_do_without_stays_away(text: str, step: str, wanted: str) -> None:
    assert limits.smaller(parse(text), parse(step)) == parse(wanted)


def test_what_compression_costs_is_measured_on_the_sealed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    job = limited_job(monkeypatch)
    job.race.trials.append(trial("finetune", 200, 0.75))
    small = limits.within(job, job.race.trials[1])
    assert small is not None and small.name == "finetune+quantize"
    sealed = {"base": (0, 0, 0, 1), "finetune": (1, 1, 1, 1), "finetune+quantize": (1, 1, 1, 0)}
    for one in job.race.trials:
        one.system.fingerprint = one.name
    asked = []

    def scored(system: Any, *_: Any, **__: Any) -> Any:
        asked.append(system.fingerprint)
        outcomes = tuple(Outcome(str(n), "a", float(s), "a") for n, s in enumerate(sealed[system.fingerprint]))
        score = sum(o.score for o in outcomes) / 4
        return SimpleNamespace(outcomes=outcomes, score=score, low=0.0, high=1.0, n=4, spent=Spent())

    monkeypatch.setattr("whet.search.evaluate", scored)
    job.splits, job.watch, job.store = SimpleNamespace(confirm=[0] * 4), Silent(), None
    job.run.session, job.race.key, job.bases = (lambda _: None), "", [job.race.base.system]
    body, cards, _ = _confirm(job, small)
    assert body is not None and body["uncompressed"]["name"] == "finetune" and body["uncompressed"]["score"] == 1.0
    cost = body["uncompressed"]["cost"]
    assert (cost["loss"], cost["low"], cost["high"]) == (0.25, 0.0, 0.75) and 0.25 < cost["bound"] <= 0.75
    assert asked == ["base", "finetune+quantize", "finetune"] and list(cards) == ["base", "chosen", "uncompressed"]
    job.whole, asked[:] = job.race.base, []
    body, cards, _ = _confirm(job, small)
    assert body is not None and body["uncompressed"]["name"] == "base" and list(cards) == ["base", "chosen"]
    assert body["uncompressed"]["cost"]["loss"] == -0.5 and asked == ["base", "finetune+quantize"]  # it is scored once


@pytest.mark.parametrize(
    ("text", "others", "wanted"),
    [
        ("finetune+quantize", ["finetune"], "finetune"),
        ("finetune+prune+distill+quantize+calibrate", ["finetune", "finetune+calibrate"], "finetune+calibrate"),
        ("distill+quantize", ["distill"], "distill"),
        ("quantize(bits=4)", [], "base"),
        ("finetune+quantize", [], None),  # it was not tried by itself
        ("fewshot+distill", ["fewshot"], None),  # nothing was made smaller
    ],
)
def test_what_a_compressed_system_was_made_of(
    text: str, others: list[str], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, made = limited_job(monkeypatch), trial(text, 50)
    job.race.trials += [*(trial(one, 200) for one in others), made]
    found = limits.uncompressed(job, made)
    assert (found and found.name) == wanted and limits.uncompressed(job, None) is None


def test_an_arm_within_the_limits_goes_before_one_beyond_them(monkeypatch: pytest.MonkeyPatch) -> None:
    job = limited_job(monkeypatch)
    job.wish.methods = ("fewshot",)  # nothing may be made smaller
    job.race.base = job.race.mark(job.race.base, card=SimpleNamespace(**{**vars(job.race.base.card), "size_bytes": 50}))
    job.race.trials += [trial("fewshot", 200, 0.9), trial("fewshot(k=8)", 50, 0.8), trial("fewshot(k=4)", 50, 0.6)]
    found = limits.within(job, job.race.trials[1])
    assert found is not None and found.name == "fewshot(k=8)" and not job.notes
    job.race.trials[2:] = []
    job.race.trials[1] = trial("fewshot", 200, 0.9)
    assert limits.within(job, job.race.trials[1]) is None  # the base keeps within them
    assert "the base does; the nearest was fewshot" in job.notes[0]


def test_students_that_would_be_too_large_are_not_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    students = [one for one in limits.SMALLER if "distill" in one]
    large = students[:-1]
    job = limited_job(monkeypatch, made_of=150, **dict.fromkeys(large, 120.0))
    assert limits.within(job, None) is not None and "nearest" in job.notes[0]
    assert [d["method"] for d in job.skipped] == [parse(one).name for one in large]
    assert job.skipped[0]["why"] == "it would take about 0.1 KB, 0.1 allowed"
    assert not any("prune(width" in t.name for t in job.race.trials) and "share+distill" in job.race.trials[-1].name
    # All of them: the smallest is taught all the same, and may be the nearest; the last is larger.
    sizes = dict.fromkeys(students, 190.0) | {students[1]: 120.0}
    job = limited_job(monkeypatch, made_of=150, **sizes)
    limits.within(job, None)
    assert [t.name for t in job.race.trials if "distill" in t.name] == [parse(students[1]).name]
    assert [d["method"] for d in job.skipped] == [parse(one).name for one in students if one != students[1]]
    job = limited_job(monkeypatch, made_of=80, **{"share+distill": 120.0})  # the estimate was too high
    job.wish.methods = ("share", "distill")
    found = limits.within(job, None)
    assert found is not None and (found.name, found.status, job.skipped) == ("share+distill", "done", [])


def test_what_cannot_be_measured_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*calls: int) -> Any:
        count = iter(range(9))

        def measured(_: Any, __: Any, card: Any) -> Any:
            if next(count) in calls:
                raise ArtifactError("cannot measure it", found="Killed")
            return card

        return measured

    job = limited_job(monkeypatch)
    monkeypatch.setattr("whet.search.limits._measured", failing(1))
    found = limits.within(job, None)
    assert found is not None and found.name == "quantize(bits=4)"
    assert job.race.trials[1].status == "refused" and "could not be measured: cannot" in job.race.trials[1].why
    job, small = limited_job(monkeypatch), trial("quantize", 50)
    monkeypatch.setattr("whet.search.limits._measured", failing(0))
    assert limits.within(job, small) is small and "quantize could not be measured" in job.notes[0]
    monkeypatch.setattr("whet.search.limits._measured", failing(1))  # the base, which is not known to keep within them
    assert limits.within(job, small) is small and job.tight and "base could not be measured" in job.notes[1]


def test_a_new_student_is_taught_for_as_long_as_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    job = limited_job(monkeypatch, made_of=150)
    job.race.trials.append(replace(trial("finetune", 200, 0.75), notes={"allowed": 50_000}))
    job.race.each = 2.5  # seconds that each takes, of 10
    assert limits.within(job, job.race.trials[1]) is not None
    # The training that is reused keeps its bound; students get 10,000 tokens a second, less what validation takes.
    assert job.bounds == [(50_000, None)] * 3 + [(50_000, 21_250)]
    assert len(job.skipped) == len(limits.SMALLER) - 4 and "only 0:00 of the budget" in job.skipped[0]["why"]
    job = limited_job(monkeypatch, made_of=150)
    job.race.trials.append(replace(trial("finetune", 200, 0.75), notes={"allowed": 50_000}))
    limits.within(job, job.race.trials[1])
    assert {healing for _, healing in job.bounds} == {None, 50_000} and not job.skipped


def test_without_rows_to_select_by_the_limits_are_only_told(monkeypatch: pytest.MonkeyPatch) -> None:
    job = limited_job(monkeypatch)
    job.race.select, job.race.base = [], None
    alone = replace(trial("rag", 200), card=None)
    assert limits.within(job, alone) is alone and "no rows to select by" in job.notes[0] and not job.bounds


def test_what_stands_around_a_slow_answer_goes_first() -> None:
    plain = System(resolve("fake:hash"), "say", decoding=Decoding(("a", "b"), True))
    shown = replace(plain, demonstrations=Demonstrations((("a", "b"),)))
    steps = limits._steps(Limits(latency=10.0), shown)
    assert steps[: len(limits.CONTEXT)] == limits.CONTEXT and len(steps) == len(limits.CONTEXT) + len(limits.SMALLER)
    assert [s for s in steps[4:] if "distill" in s] == [s for s in steps if "+distill(clear=context)+" in s] != []
    assert limits._steps(Limits(latency=10.0), plain) == limits._steps(Limits(size=10), shown) == limits.SMALLER
    taught = limits.smaller(parse("fewshot+calibrate"), parse("distill+quantize"))
    assert taught.name == "fewshot+calibrate+distill+quantize"  # the teacher is calibrated, the student need not be
    taught.check()


def test_a_limit_of_memory_is_met_by_weights_alone_in_8_bits_before_4(monkeypatch: pytest.MonkeyPatch) -> None:
    def heavy(name: str, memory: int) -> Trial:
        made = trial(name, 10, 0.75)
        return replace(made, card=SimpleNamespace(**{**vars(made.card), "memory_bytes": memory}))  # type: ignore[arg-type]

    job = limited_job(monkeypatch)
    job.task.limits = Limits(memory=100)
    job.race.trials[:] = [job.race.base, heavy("finetune", 200)]
    used = {"finetune+quantize": 190, "finetune+quantize(activations=false)": 90}
    monkeypatch.setattr("whet.search.limits._told", lambda _, one: heavy(one.name, used.get(one.name, 80)).card)
    found = limits.within(job, job.race.trials[1])
    assert found is not None and found.name == "finetune+quantize(activations=false)"
    assert [t.name for t in job.race.trials[2:]] == list(used)
    slow = System(resolve("fake:hash"), "say", demonstrations=Demonstrations((("a", "b"),)))
    steps = limits._steps(Limits(memory=10, latency=10.0), slow)
    assert steps[:4] == ("distill", "distill+quantize", "distill+quantize(activations=false)",
                         "distill+quantize(bits=4)")  # fmt: skip


def test_context_that_was_taught_away_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Demonstrations((("a", "b"),))
    for asked, cheap in (((), False), (("prune", "quantize"), True)):
        job = limited_job(monkeypatch, made_of=150)
        job.task.limits, job.wish.methods = Limits(size=100, latency=50.0), asked
        slow = trial("fewshot+calibrate", 200, 0.75)
        slow.system.demonstrations = shown  # type: ignore[misc]
        job.race.trials.append(slow)
        job.race.each = 0.5  # seconds of 10: less would be left for each student
        limits.within(job, job.race.trials[1])
        tried = [t.name for t in job.race.trials[2:]]
        assert ("fewshot+quantize+calibrate" in tried) is cheap
        assert all("clear=context" in name or "calibrate+distill" in name for name in tried) is not cheap
        first = {healing for (_, healing), name in zip(job.bounds, tried, strict=True) if "calibrate+distill" in name}
        assert len(first) == (not cheap)  # it is one training, found again
        assert any(d["why"] == "without its context it was beyond the limits, too" for d in job.skipped) is not cheap


def test_only_methods_that_were_asked_for_make_it_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    job = limited_job(monkeypatch)
    job.wish.methods = ("share", "distill")
    found = limits.within(job, None)
    assert found is not None and found.name == "share+distill"
