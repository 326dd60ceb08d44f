"""Training: losses, packs, the merged product, the loop, and fine-tuning as a whole."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import SHARED, make_model, make_tokenizer, save_model
from peft import PeftModel
from test_cli import whet
from test_search import write_task
from transformers import AutoModelForCausalLM, Llama4TextConfig, MambaConfig, MixtralConfig

from whet import model as models
from whet.compress import folder as folders
from whet.engine import Spent, prefix
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession
from whet.errors import DivergedError, MethodError, ModelError
from whet.methods import Run
from whet.methods.continual import Continual
from whet.methods.distill import Distill
from whet.methods.finetune import FineTune
from whet.search import tune
from whet.search.budget import Rates
from whet.search.recipe import Recipe
from whet.store import Store
from whet.system import Decoding, Demonstrations, System
from whet.task import Example, Learnable
from whet.train import adapters, batches, lesson, loop, policy
from whet.train.adapters import Adapter, _AdaptedLinear, adapted, add_lora, frozen, quick_products
from whet.train.batches import Pack, computed, packs, padded, step_count, steps, tokens_per_row
from whet.train.fit import twice_the_data, verdict
from whet.train.lesson import mean_loss, render_rows
from whet.train.loop import Curves, Masters, Schedule, Settings, _step, operations, train
from whet.train.losses import NextToken
from whet.train.peak import training_rate
from whet.train.protect import fisher
from whet.train.team import Alone
from whet.train.trackers import check, trackers

HEAD = tuple(range(10, 45))
ROWS = [
    Row(HEAD + (5, 6), ((7, 8, 9),)),
    Row(HEAD + (5, 7), ((7, 4),)),
    Row(HEAD + (5, 7), ((7, 4),)),  # a row that stands twice counts twice
    Row(HEAD, ((5, 5, 5, 5), (5, 6))),
    Row((3, 4), ((1,),)),
]


def plain_loss(model: Any, rows: list[Row]) -> torch.Tensor:
    """transformers' own loss, one row at a time with the prompt masked, as a mean over all targets."""
    total, count = torch.zeros(()), 0
    for row in rows:
        for target in row.continuations:
            ids = torch.tensor([[*row.prompt, *target]])
            labels = ids.clone()
            labels[:, : len(row.prompt)] = -100
            total = total + model(input_ids=ids, labels=labels).loss * len(target)
            count += len(target)
    return total / count


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(module: Any, rows: list[Row], most: int = batches.PACK_TOKENS, **settings: Any) -> tuple[float, int]:
    return _step(module, module, rows, NextToken(), most, **settings)


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], within: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        scale = float(wanted[name].abs().max())
        assert torch.allclose(found[name], wanted[name], rtol=within, atol=within * max(scale, 1e-3)), name


# --- losses and packs -------------------------------------------------------------------------------------------------


def test_next_token_is_cross_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], dtype=torch.bfloat16)
    [pack] = padded([Row((3,), ((0, 0),))], torch.device("cpu"))
    found = NextToken()(logits.float(), pack)
    assert float(found) == pytest.approx(math.log(2) + math.log(4 / 3), abs=1e-3)
    assert NextToken()(logits, pack).dtype == torch.float32
    assert NextToken().count(ROWS) == 3 + 2 + 2 + 4 + 2 + 1


@pytest.mark.parametrize("family", [*SHARED, "opt", "gemma2", "mistral"])
def test_a_step_has_transformers_loss_and_gradients(family: str) -> None:
    model = make_model(family)
    wanted = plain_loss(model, ROWS)
    wanted.backward()
    theirs = gradients(model)
    model.zero_grad()
    chances = {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    value, tokens = step(model, ROWS)  # also of families that drop a tenth by default
    assert value == pytest.approx(float(wanted.detach()), abs=1e-4)
    equal(gradients(model), theirs)
    assert {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)} == chances
    shared = family in (*SHARED, "opt")
    apart = sum(p.tokens for p in padded(ROWS, torch.device("cpu"), batches.PACK_TOKENS))
    assert tokens == (prefix.arrange(ROWS).unique_tokens if shared else apart)
    assert not model.training


def test_short_rows_of_a_windowed_model_are_packed() -> None:
    model, rows = make_model("mistral"), [Row((1, 2, 3), ((4, 5), (4, 6))), Row((1, 2, 3, 4), ((9,),))]
    wanted = plain_loss(model, rows)
    wanted.backward()
    theirs = gradients(model)
    model.zero_grad()
    value, tokens = step(model, rows)
    assert value == pytest.approx(float(wanted.detach()), abs=1e-4)
    assert tokens == prefix.arrange(rows).unique_tokens
    equal(gradients(model), theirs)


@pytest.mark.parametrize(("most", "targets"), [(2048, 1024), (8, 1024), (2048, 3), (1, 1)])
def test_packs_cover_each_target_once(most: int, targets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PACK_TARGETS", targets)
    made = packs(ROWS, torch.float32, torch.device("cpu"), most)
    assert len(made) == 1 if most == 2048 and targets == 1024 else len(made) > 1
    found: Counter[tuple[int, int, int]] = Counter()
    for pack in made:
        assert pack.ids.shape == pack.positions.shape == (1, pack.tokens)
        assert len(pack.places) == len(pack.targets) == len(pack.sequences)
        rows = pack.owners[pack.sequences].tolist()
        for place, token, row in zip(pack.places.tolist(), pack.targets.tolist(), rows, strict=True):
            before = int(pack.ids[0, place])
            found[row, before, token] += 1
    wanted: Counter[tuple[int, int, int]] = Counter()
    for n, row in enumerate(ROWS):
        for target in row.continuations:
            wanted.update((n, before, token) for before, token in zip((row.prompt[-1], *target), target, strict=False))
    assert found == wanted


def test_padded_passes_hold_rows_of_like_length() -> None:
    rows = [Row(HEAD[:n], ((5,),)) for n in (20, 19, 20, 3, 18)]
    shapes = [tuple(p.ids.shape) for p in padded(rows, torch.device("cpu"), 64)]
    assert shapes == [(1, 3), (3, 20), (1, 20)]  # not padded to sixfold, and at most 64 tokens
    assert [tuple(p.ids.shape) for p in padded(rows, torch.device("cpu"))] == [(1, 3), (1, 18), (1, 19)] + [(1, 20)] * 2
    [pack] = padded(ROWS[:4:3], torch.device("cpu"), 1024)
    assert pack.owners.tolist() == [1, 1, 0]  # a row's continuations stay together
    many = padded([Row((1,), ((2,) * 400,))] * 4, torch.device("cpu"), 8192)
    assert [len(p.targets) for p in many] == [800, 800]  # the vocabulary at each place is what fills memory


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("most", [1, 8, 40, 80])
def test_cutting_a_step_into_passes_changes_nothing(family: str, most: int) -> None:
    model = make_model(family)
    whole, _ = step(model, ROWS)
    wanted = gradients(model)
    model.zero_grad()
    value, _ = step(model, ROWS, most)
    assert value == pytest.approx(whole, abs=1e-5)
    equal(gradients(model), wanted)


def test_steps() -> None:
    rows = [Row((n,), ((1,),)) for n in range(1, 11)]
    epochs = [steps(rows, 4, 7)(n) for n in range(9)]
    assert [len(s) for s in epochs] == [3, 3, 4] * 3  # no last step of two rows that weighs as much as one of four
    orders = [sum(epochs[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(o, key=lambda r: r.prompt) == rows for o in orders)
    assert orders[0] != orders[1] != orders[2]
    backwards = [steps(rows, 4, 7)(n) for n in reversed(range(9))]  # a step's rows depend on its number alone
    assert epochs == backwards[::-1]
    assert epochs != [steps(rows, 4, 8)(n) for n in range(9)]


def headed(head: int, rows: int = 32, own: int = 30) -> list[Row]:
    """Rows that share a beginning, of so many tokens each behind it."""
    draw = random.Random(head)
    start = tuple(draw.randrange(3, 250) for _ in range(head))
    return [Row((*start, *(draw.randrange(3, 250) for _ in range(own - 4))), ((7, 8, 9, 7, 8),)) for _ in range(rows)]


@pytest.mark.parametrize("head", [45, 600, 800, 1200])
def test_a_long_beginning_is_computed_once_for_many_rows(head: int) -> None:
    rows = headed(head)
    [pack] = packs(rows, torch.float32, torch.device("cpu"))
    assert pack.tokens == computed(rows) == prefix.arrange(rows).unique_tokens <= head + 32 * 30
    many = packs(headed(head, rows=96), torch.float32, torch.device("cpu"))
    assert len(many) <= 4 and all(p.tokens <= head + 1.1 * batches.PACK_TOKENS for p in many)  # memory is bounded
    apart = [row for n in range(600, 604) for row in headed(n, rows=8)]
    assert computed(apart) == prefix.arrange(apart).unique_tokens  # a beginning is not split to fill another's pack


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_beginning_longer_than_a_pack_has_the_same_loss_and_gradients(family: str) -> None:
    model, rows = make_model(family), headed(200, rows=8)
    wanted, tokens = step(model, rows, 1)  # row by row
    apart = gradients(model)
    model.zero_grad()
    value, used = step(model, rows, 128)
    assert value == pytest.approx(wanted, abs=1e-5) and used < 200 * 2 + 8 * 31 < tokens
    equal(gradients(model), apart)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_what_a_step_computes_is_known_before(family: str) -> None:
    model = make_model(family)
    for rows in (ROWS, headed(45), headed(300), [Row((1, 2, 3), ((4, 5), (4, 6))), Row((1, 2, 3, 4), ((9,),))]):
        assert computed(rows, model) == step(model, rows)[1]
    rows = headed(45)
    assert tokens_per_row(rows, 32, 0, module=model) * 32 == (1005 if family == "llama" else 32 * 75)


@pytest.mark.parametrize(("rows", "size", "epochs"), [(10, 32, 3), (40, 32, 3), (33, 32, 2), (64, 32, 1), (7, 8, 2)])
def test_epochs_wanted_are_epochs_trained(rows: int, size: int, epochs: int) -> None:
    source = steps(range(rows), size, 0)
    seen = Counter(row for n in range(step_count(epochs * rows, rows, size)) for row in source(n))
    assert seen == Counter(dict.fromkeys(range(rows), epochs))
    sizes = [len(source(n)) for n in range(8)]
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1


def test_tokens_per_row() -> None:
    apart = [Row((n,) * 10, ((1, 2, 3),)) for n in range(1, 9)]
    assert tokens_per_row(apart, 4, 0) == 12  # the last token of a target is never read
    shared = [Row(HEAD + (n,), ((1,),)) for n in range(1, 9)]
    assert tokens_per_row(shared, 8, 0) == (len(HEAD) + 8) / 8


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapted_linear_by_autograd() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (2, 6), (5, 2)))
    w, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for one in (None, bias):
        assert torch.autograd.gradcheck(lambda x, a, b, one=one: _AdaptedLinear.apply(x, w, one, a, b, 0.7), (x, a, b))


def lora(family: str, seed: int = 0, kind: str = "lora") -> Any:
    """A tiny model with an adapter whose B is not zero, as after some training."""
    model = make_model(family)
    model.requires_grad_(False)
    tuned = add_lora(model, Adapter(kind, 4, 8), seed)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1)
    return tuned.eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])  # without bias, with bias, with transposed weights
def test_quick_products_equal_peft(family: str) -> None:
    tuned = lora(family)
    value, _ = step(tuned, ROWS)
    wanted = gradients(tuned)
    assert wanted and all("lora_" in name for name in wanted)
    tuned.zero_grad()
    own = [m for m in tuned.modules() if "forward" in vars(m)]
    with quick_products(tuned):
        changed = [m for m in tuned.modules() if "forward" in vars(m)]
        assert len(changed) - len(own) == (0 if family == "gpt2" else 2 * 7)
        found, _ = step(tuned, ROWS)
        ids = torch.tensor([HEAD])
        merged = tuned(input_ids=ids).logits
    assert [m for m in tuned.modules() if "forward" in vars(m)] == own
    assert found == pytest.approx(value, abs=1e-5)
    equal(gradients(tuned), wanted, within=1e-5)
    assert torch.allclose(merged, tuned(input_ids=ids).logits, atol=1e-5)


def test_quick_products_nest_and_survive_exceptions() -> None:
    tuned = lora("llama")
    with quick_products(tuned):
        with quick_products(tuned):
            pass
        assert any("forward" in vars(m) for m in tuned.modules())  # the outer one still holds
        with pytest.raises(RuntimeError, match="halt"), quick_products(tuned):
            raise RuntimeError("halt")
    assert not any("forward" in vars(m) for m in tuned.modules())


def test_quick_products_in_bf16_differ_from_peft_by_rounding_only() -> None:
    tuned = add_lora(make_model("llama", dtype=torch.bfloat16).requires_grad_(False), Adapter("lora", 4, 8), 0)
    torch.manual_seed(1)
    for name, value in tuned.named_parameters():
        if "lora_B" in name:
            value.data.normal_(0, 0.1)
    value, _ = step(tuned, ROWS)
    wanted = gradients(tuned)
    tuned.zero_grad()
    with quick_products(tuned):
        found, _ = step(tuned, ROWS)
    assert found == pytest.approx(value, rel=0.01)
    for name, gradient in gradients(tuned).items():
        apart = (gradient.float() - wanted[name].float()).norm() / wanted[name].float().norm()
        assert apart < 0.1, name


def test_layers_that_add_in_place_take_the_adapted_product() -> None:
    x, w, a, b = torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(2, 4), torch.ones(5, 2, requires_grad=True)
    out = _AdaptedLinear.apply(x, w, None, a, b, 1.0)
    out.add_(1.0)
    out.sum().backward()
    assert b.grad is not None and torch.equal(b.grad, torch.full((5, 2), 24.0))


LEAST: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "pad_token_id": 0}
HEADS: dict[str, Any] = {**LEAST, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "without"),
    [
        (MambaConfig(**LEAST, state_size=8), "backbone.layers.0.mixer.out_proj"),
        (Llama4TextConfig(**HEADS, num_local_experts=2, intermediate_size_mlp=64, head_dim=8, moe_layers=[0]),
         "model.layers.0.feed_forward.router"),
    ],
)  # fmt: skip
def test_layers_that_no_lora_suits_are_left_out(config: Any, without: str, tmp_path: Path) -> None:
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    with adapted(module, Adapter(rank=4), 0) as tuned:
        left = tuned.get_base_model().get_submodule(without)
        assert isinstance(left, torch.nn.Linear) and not hasattr(left, "lora_A")
        value, _ = step(tuned, ROWS)
        assert math.isfinite(value) and gradients(tuned)


def test_a_training_rate_that_cannot_be_measured_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    session = TorchSession(make_model("llama").requires_grad_(False), make_tokenizer())
    assert training_rate(session, 1) > 0
    monkeypatch.setattr(loop, "_step", lambda *_: (_ for _ in ()).throw(AttributeError("no such cache")))
    assert training_rate(session, 1) == 0.0


def test_a_training_rate_does_not_count_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now, took = [0.0], iter([(100.0, 10), (2.0, 30), (3.0, 50)])

    def timed(*_: object) -> tuple[float, int]:
        seconds, tokens = next(took)
        now[0] += seconds
        return 0.0, tokens

    monkeypatch.setattr(loop, "_step", timed)
    monkeypatch.setattr("whet.train.peak.time", SimpleNamespace(perf_counter=lambda: now[0]))
    session = TorchSession(make_model("llama").requires_grad_(False), make_tokenizer())
    assert training_rate(session, 2) == (30 + 50) / (2.0 + 3.0)


def test_an_adapter_that_cannot_stand_leaves_nothing_behind() -> None:
    config = MixtralConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)  # fmt: skip
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    before = dict(module.named_modules())
    with pytest.raises(MethodError, match="dora does not go with"), adapted(module, Adapter("dora", 4, 8), 0):
        pass
    assert dict(module.named_modules()) == before
    with adapted(module, Adapter("lora", 4, 8), 0) as tuned, pytest.raises(MethodError, match="no fused experts"):
        fisher(tuned, ROWS)


@pytest.mark.parametrize(("bits", "kind"), [(8, "lora"), (4, "lora"), (4, "dora")])
def test_a_frozen_base_in_few_bits(bits: int, kind: str) -> None:
    model = make_model("llama").requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    layer = "model.layers.0.mlp.up_proj"
    with adapted(model, Adapter(kind, 4, 8, bits=bits), 0) as tuned:
        small = tuned.get_base_model().get_submodule(layer).get_base_layer()
        assert small.weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
        source, loss = steps(learnable(0), 12, 0), NextToken()
        found = train(tuned, source, loss, Settings(Schedule(2e-2, 12), validations=1))
        assert found.train[-1][1] < 0.8 * found.train[0][1]
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], p) for n, p in before.items())
    assert type(model.get_submodule(layer)) is torch.nn.Linear and not hasattr(model, f"is_loaded_in_{bits}bit")


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_in_few_bits_have_biases_of_their_own(bits: int) -> None:
    model, name = make_model("qwen2").requires_grad_(False), "model.layers.0.self_attn.q_proj"
    own = model.get_submodule(name).bias
    with frozen(model, bits):
        bias = model.get_submodule(name).bias
        assert torch.equal(bias, own) and bias.data_ptr() != own.data_ptr() and not bias.requires_grad
    assert model.get_submodule(name).bias is own


def test_a_model_is_whole_again_where_an_adapter_found_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes as bnb

    model = make_model("llama").requires_grad_(False)
    before, kinds = dict(model.named_parameters()), [type(m) for m in model.modules()]
    made = bnb.nn.Linear4bit

    class Full(made):  # type: ignore[misc, valid-type]
        count = 0

        def __init__(self, *sizes: Any, **more: Any) -> None:
            type(self).count += 1
            if self.count == 5:
                raise MemoryError
            super().__init__(*sizes, **more)

    with monkeypatch.context() as tight:
        tight.setattr(bnb.nn, "Linear4bit", Full)
        with pytest.raises(MemoryError), adapted(model, Adapter("lora", 4, 8, bits=4), 0):
            pass
    real = adapters.add_lora

    def half(*given: Any) -> Any:
        real(*given)
        raise MemoryError

    monkeypatch.setattr(adapters, "add_lora", half)
    with pytest.raises(MemoryError), adapted(model, Adapter("lora", 4, 8), 0):
        pass
    after = dict(model.named_parameters())
    assert [type(m) for m in model.modules()] == kinds
    assert after.keys() == before.keys() and all(after[n] is p for n, p in before.items())


def test_add_lora_is_repeatable_and_leaves_the_generator() -> None:
    state = torch.random.get_rng_state()
    one, two, other = (dict(lora("llama", seed).named_parameters()) for seed in (3, 3, 4))
    # `lora` draws B itself; A is what the seed decides.
    names = [n for n in one if "lora_A" in n]
    assert len(names) == 14
    assert all(torch.equal(one[n], two[n]) for n in names)
    assert not any(torch.equal(one[n], other[n]) for n in names)
    torch.random.set_rng_state(state)
    add_lora(make_model("llama"), Adapter("lora", 4, 8), 0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_fresh_lora_changes_nothing() -> None:
    ids = torch.tensor([HEAD])
    wanted = make_model("llama")(input_ids=ids).logits
    tuned = add_lora(make_model("llama").requires_grad_(False), Adapter("lora", 4, 8), 0)
    assert torch.equal(tuned(input_ids=ids).logits, wanted)
    assert {n.split(".")[-3] for n, p in tuned.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "lora"), ("gpt2", "lora"), ("llama", "dora"), ("llama", "rslora"), ("llama", "full")]
)
def test_a_module_is_as_it_was_after_an_adapter(family: str, kind: str) -> None:
    model = make_model(family).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    attributes = set(vars(model))
    rows = learnable(0)

    def training(seed: int) -> Curves:
        with adapted(model, Adapter(kind, 4, 8), seed) as tuned:
            return train(tuned, steps(rows, 6, 0), NextToken(), Settings(Schedule(1e-2, 3)))

    first = training(0)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == kinds
    assert set(vars(model)) == attributes
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert training(0).train == first.train  # nothing of the first is left in the second
    assert kind == "full" or training(1).train != first.train  # full training draws no fresh weights
    with pytest.raises(RuntimeError, match="halt"), adapted(model, Adapter(kind, 4, 8), 0):
        raise RuntimeError("halt")
    assert [type(m) for m in model.modules()] == kinds


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_schedule_closed_form() -> None:
    schedule = Schedule(1.0, 100, warmup=5)
    rates = [schedule.at(n) for n in range(101)]
    assert rates[:5] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0])
    assert rates[5:71] == [1.0] * 66
    assert schedule.decays == 70
    assert rates[71:] == pytest.approx([n / 30 for n in range(29, -1, -1)])  # 30 steps of decay
    assert Schedule(2e-3, 100).at(50) == 2e-3
    assert [Schedule(1.0, 1).at(n) for n in (0, 1)] == [1.0, 0.0]
    assert [Schedule(1.0, 8, warmup=4, decay=0.5).at(n) for n in (0, 1, 4, 7)] == [0.5, 1.0, 1.0, 0.25]
    # What is the beginning of a longer one warms up as that does, also where both are short.
    short, long = Schedule(1.0, 9, whole=60), Schedule(1.0, 60)
    assert [short.at(n) for n in range(6)] == [long.at(n) for n in range(6)] == [n / 8 for n in range(1, 7)]
    assert Schedule(1.0, 4, whole=24).at(0) == Schedule(1.0, 24).at(0) == 1 / 6
    # It can be continued: a longer run differs only once the shorter one decays.
    longer = Schedule(1.0, 200, warmup=5)
    assert [longer.at(n) for n in range(71)] == pytest.approx(rates[:71])


def learnable(seed: int) -> list[Row]:
    """Rows with something to learn: the answer depends on the prompt's last token."""
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 3, (24,), generator=draw).tolist()
    return [Row((*HEAD[:28], 100 + n, 200 + kind), ((50 + kind, 2),)) for n, kind in enumerate(kinds)]


def uneven(number: int) -> list[Row]:
    """Steps of which every second has one row, so that one of two processes has none."""
    rows = learnable(0)
    return rows[:1] if number % 2 else rows[1:]


def fit(seed: int, validate: bool = True, **settings: Any) -> tuple[Any, Curves]:
    model = make_model("llama")
    rows, held = learnable(0), learnable(1)[:8]
    schedule = Schedule(settings.pop("learning_rate", 1e-2), settings.pop("steps", 12))
    more = {name: settings.pop(name) for name in ("keep", "since", "continued", "beat") if name in settings}
    session = TorchSession(model, make_tokenizer())

    def check() -> float:
        found = [v for row in session.score_rows(held) for c in row for v in c]
        return -sum(found) / len(found)

    curves = train(
        model, steps(rows, 6, seed), NextToken(), Settings(schedule, **settings), validate=check if validate else None,
        **more,
    )
    return model, curves


def test_training_lowers_the_loss() -> None:
    _, curves = fit(0)
    assert curves.train[-1][1] < 0.5 * curves.train[0][1]
    assert curves.validation[-1][1] < 0.7 * curves.validation[0][1]
    assert len(curves.train) == curves.steps == 12
    assert len(curves.validation) == 5  # before the first step, and four times
    assert curves.tokens == curves.train[-1][0] == curves.validation[-1][0]
    assert [t for t, _ in curves.train] == sorted(t for t, _ in curves.train)
    assert curves.validation[0][0] == 0
    assert curves.seconds > 0


def test_training_is_repeatable() -> None:
    (one, first), (two, second), (three, third) = fit(0), fit(0), fit(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert (first.train, first.validation) == (second.train, second.validation)
    assert first.train != third.train
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), three.parameters(), strict=True))


def scripted(losses: list[float], patience: int, count: int = 8) -> tuple[list[list[torch.Tensor]], Any, Curves]:
    """Train with made-up validation losses; returns the weights at each validation, the module and the curves."""
    model, seen, told = make_model("llama"), [], iter(losses)

    def check() -> float:
        seen.append([p.detach().clone() for p in model.parameters()])
        return next(told)

    settings = Settings(Schedule(1e-2, count), validations=count, patience=patience)
    curves = train(model, steps(learnable(0), 6, 0), NextToken(), settings, validate=check)
    return seen, model, curves


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_best_validation_is_restored() -> None:
    seen, model, curves = scripted([5.0, 4.0, 3.0, 3.5, 3.4, 3.3, 3.2, 3.1, 3.05], patience=9)
    assert (curves.best, curves.steps) == (2, 8)
    assert same(model.parameters(), seen[2])
    assert not same(model.parameters(), seen[3])


def test_patience_ends_the_training() -> None:
    seen, model, curves = scripted([5.0, 4.0, 6.0, 6.0, 6.0, 6.0], patience=3)
    assert (curves.best, curves.steps) == (1, 4)
    assert same(model.parameters(), seen[1])
    assert len(curves.train) == 4


def test_training_that_never_helps_keeps_the_start() -> None:
    start = list(make_model("llama").parameters())
    _, model, curves = scripted([1.0, 2.0, 2.0, 2.0], patience=3)
    assert curves.best == 0
    assert same(model.parameters(), start)


def test_without_validation_the_last_weights_are_kept() -> None:
    model, curves = fit(0, validate=False)
    assert curves.validation == ()
    assert not same(model.parameters(), make_model("llama").parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(bad: float, dtype: torch.dtype) -> None:
    model, calls, good = make_model("llama", dtype=dtype), [0], []

    class Breaking(NextToken):
        def __call__(self, logits: torch.Tensor, pack: Pack) -> torch.Tensor:
            calls[0] += 1
            return super().__call__(logits, pack) * (bad if calls[0] == 6 else 1.0)

    def check() -> float:
        good.append([p.detach().clone() for p in model.parameters()])
        return 1.0 / len(good)

    settings = Settings(Schedule(4e-3, 10), validations=5)
    with pytest.raises(MethodError, match=r"not finite at step 6.*learning_rate=0\.001$"):
        train(model, steps(learnable(0), 6, 0), Breaking(), settings, validate=check)
    assert len(good) == 3  # before the first step, and after the second and the fourth
    assert same(model.parameters(), good[-1])


def test_without_validation_the_last_weights_that_gave_a_loss_are_kept() -> None:
    model, seen, rescued = make_model("llama"), [], []

    class Breaking(NextToken):
        def __call__(self, logits: torch.Tensor, pack: Pack) -> torch.Tensor:
            seen.append([p.detach().clone() for p in model.parameters()])
            return super().__call__(logits, pack) * (math.nan if len(seen) == 6 else 1.0)

    def rescue() -> Path:
        rescued.append([p.detach().clone() for p in model.parameters()])
        return Path("here")

    settings = Settings(Schedule(4e-3, 10), validations=5)
    with pytest.raises(MethodError, match="not finite at step 6.*so far are in here"):
        train(model, steps(learnable(0), 6, 0), Breaking(), settings, rescue=rescue)
    assert same(model.parameters(), seen[3]) and same(rescued[0], seen[3])  # those of the fourth step, a fifth ago


@pytest.mark.parametrize("step", [2, 6])
def test_weights_that_are_no_numbers_are_not_kept(step: int) -> None:
    model, seen = make_model("llama"), []

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            seen.append(1)
            return grads[0] * (math.nan if len(seen) == step else 1.0)

    class Breaking(NextToken):
        def __call__(self, logits: torch.Tensor, pack: Pack) -> torch.Tensor:
            return Spoilt.apply(super().__call__(logits, pack))  # type: ignore[no-any-return, no-untyped-call]

    with pytest.raises(DivergedError, match="not finite") as told:
        train(model, steps(learnable(0), 6, 0), Breaking(), Settings(Schedule(4e-3, 6), validations=3))
    assert told.value.slower == 1e-3 and all(p.isfinite().all() for p in model.parameters())


def test_gradients_are_clipped() -> None:
    model = make_model("llama")
    before = [p.detach().clone() for p in model.parameters()]
    train(model, steps(learnable(0), 6, 0), NextToken(), Settings(Schedule(1e-3, 1), clip=0.0))
    # With every gradient clipped to nothing, AdamW moves nothing.
    assert max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), before, strict=True)) < 1e-5


def test_beats_tell_every_step() -> None:
    told: list[Any] = []
    model = make_model("llama")
    curves = train(model, steps(learnable(0), 6, 0), NextToken(), Settings(Schedule(1e-3, 4)), beat=told.append)
    assert [(b.step, b.steps) for b in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(b.tokens, b.loss) for b in told] == list(curves.train)


def test_a_killed_training_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(loop, "WRITING_SHARE", float("inf"))
    whole, wanted = fit(0)
    for last in (1, 5, 7, 11):
        keep = tmp_path / f"at{last}"

        def halt(at: Any, last: int = last) -> None:
            if at.step == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(0, keep=keep, beat=halt)
        told: list[int] = []
        model, curves = fit(0, keep=keep, beat=lambda at, told=told: told.append(at.step))
        # The step that was told last was not kept any more: it is done again.
        assert told == list(range(last, 13)) if last > 1 else told == list(range(1, 13))
        assert same(model.parameters(), whole.parameters())
        assert (curves.train, curves.validation, curves.best) == (wanted.train, wanted.validation, wanted.best)
        assert [p.name for p in tmp_path.glob(f".at{last}*")] == []


def test_kill_9_of_apply_finetune_costs_no_step_that_was_kept(tmp_path: Path, model_folder: str) -> None:
    """The same command goes on where the killed one was, and ends with the weights of one that was never killed."""
    folder = write_task(tmp_path / "toy", train=160, test=20)
    counting = """if True:
        import math, os
        from whet.cli import main
        from whet.train import loop

        loop.KEEP_EVERY, loop.WRITING_SHARE, step = 0.0, math.inf, loop._update
        steps = open(os.environ["WHET_HOME"] + "/steps", "ab", buffering=0)
        loop._update = lambda *given: (steps.write(b"."), step(*given))
        main()
    """
    words = ["apply", "finetune", str(folder), "--system", model_folder, "--set", "epochs=8", "batch=8", "rank=4"]
    command = [sys.executable, "-c", counting, *words, "--json", "--out"]

    def begun(home: str) -> subprocess.Popen[str]:
        environment, out = {**os.environ, "WHET_HOME": str(tmp_path / home)}, str(tmp_path / f"{home}-out")
        (tmp_path / home).mkdir(exist_ok=True)
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, out], text=True, stdout=pipe, stderr=pipe, env=environment)

    first = begun("killed")
    deadline = time.monotonic() + 120
    while not (kept := [*(tmp_path / "killed" / "checkpoints").glob("[!.]*")]) and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL and kept and not (tmp_path / "killed-out").exists()
    ended = [json.loads(begun(home).communicate()[0]) for home in ("killed", "whole")]
    assert ended[0]["fingerprint"] == ended[1]["fingerprint"]
    one, other = (sorted((tmp_path / f"{home}-out").rglob("*.safetensors")) for home in ("killed", "whole"))
    assert one and [file.read_bytes() for file in one] == [file.read_bytes() for file in other]
    assert not [*(tmp_path / "killed" / "checkpoints").iterdir()]
    again, steps = ((tmp_path / home / "steps").stat().st_size for home in ("killed", "whole"))
    assert steps <= again <= steps + 1  # the one that was under way


def test_what_a_killed_training_had_spent_on_validations_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(loop, "WRITING_SHARE", float("inf"))

    def spent(keep: Path, last: int = 0) -> Spent:
        session = SimpleNamespace(spent=Spent(prefilled_tokens=100))  # before the first step

        def validate() -> float:
            session.spent += Spent(prefilled_tokens=7)
            return 1.0

        def halt(at: Any) -> None:
            if at.step == last:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            train(make_model("llama"), steps(learnable(0), 6, 0), NextToken(), Settings(Schedule(1e-3, 12)),
                  validate=validate, keep=keep, beat=halt, session=session)  # fmt: skip
        return session.spent

    for last in (1, 7, 11):
        spent(tmp_path / str(last), last)
        assert spent(tmp_path / str(last)) == spent(tmp_path / f"{last} whole") == Spent(prefilled_tokens=100 + 5 * 7)


def test_what_a_killed_process_was_writing_goes(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f".kept-{ended.pid}", f".kept.1-{ended.pid}", f".kept-{os.getpid()}", f".other-{ended.pid}"):
        (tmp_path / name).write_bytes(b"half of it")
    (tmp_path / ".kept.best-12").mkdir()
    fit(0, keep=tmp_path / "kept")
    left = {f".kept-{os.getpid()}", f".other-{ended.pid}", ".kept.best-12"}
    assert {p.name for p in tmp_path.iterdir()} == left
    (tmp_path / f".kept.stable-{ended.pid}").write_bytes(b"half of it")
    lesson._forget(tmp_path / "kept")
    assert {p.name for p in tmp_path.iterdir()} == left


def test_a_short_training_is_continued_as_if_it_had_been_long(tmp_path: Path) -> None:
    keep = tmp_path / "short"
    whole, wanted = fit(0, validate=False, steps=60)
    _, short = fit(0, validate=False, steps=40, keep=keep, continued=True)
    told: list[int] = []
    model, curves = fit(
        0, validate=False, steps=60, since=tmp_path / "short.stable", beat=lambda at: told.append(at.step)
    )
    assert told[0] == 29  # the short one decays from its 29th step on
    assert curves.train == wanted.train
    assert short.train[:28] == wanted.train[:28]
    assert same(model.parameters(), whole.parameters())


def test_what_a_training_went_on_from_is_not_charged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(loop, "WRITING_SHARE", float("inf"))
    told: list[loop.Beat] = []

    def halt(at: loop.Beat) -> None:
        if at.step == 25:
            raise KeyboardInterrupt

    _, short = fit(0, validate=False, steps=20, keep=tmp_path / "short", continued=True)
    since = tmp_path / "short.stable"  # the short one decays from its 15th step on
    with pytest.raises(KeyboardInterrupt):
        fit(0, validate=False, steps=30, keep=tmp_path / "long", since=since, beat=halt)
    _, long = fit(0, validate=False, steps=30, keep=tmp_path / "long", since=since, beat=told.append)  # all that it did
    before = short.train[13][0]
    assert short.tokens == short.train[-1][0] and long.tokens == long.train[-1][0] - before
    assert [at.step for at in told] == [*range(25, 31)] and {at.before[0] for at in told} == {before}
    assert 0 < long.seconds == pytest.approx(told[-1].seconds - told[-1].before[1])


def test_a_loss_that_explodes() -> None:
    class Exploding(NextToken):
        calls = 0

        def __call__(self, logits: torch.Tensor, pack: Pack) -> torch.Tensor:
            Exploding.calls += 1
            return super().__call__(logits, pack) * (1.0 if Exploding.calls < 9 else 50.0)

    model = make_model("llama")
    with pytest.raises(MethodError, match=r"explodes at step 11.*learning_rate=0\.00025$"):
        train(model, steps(learnable(0), 6, 0), Exploding(), Settings(Schedule(1e-3, 20)))


@pytest.mark.parametrize(
    ("losses", "explodes"),
    [
        ([6.4, 5.0, 3.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 10.8, 10.8, 10.8], True),  # chance is ln V, and no more
        ([6.4, 5.0, 3.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 10.8, 10.8, 0.6], False),  # twice may be two odd steps
        ([6.4, 5.0, 3.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 6.0, 6.0, 6.0], False),  # no worse than at the start
        ([2.0, 2.1, 1.9, 2.0, 2.0, 2.2, 2.3, 2.6, 2.7, 2.8, 2.9], False),
        ([-3.0, 2.0, -4.0, 1.0, -2.0, 4.5, 5.0, 6.0, 4.5, 7.0], False),  # of samples and their advantages
        ([-3.0, 2.0, -4.0, 1.0, -2.0, 44.5, 45.0, 46.0, 44.5, 47.0], True),
    ],
)
def test_when_a_loss_explodes(losses: list[float], explodes: bool) -> None:
    curve = [(n, value) for n, value in enumerate(losses)]
    assert any(loop._explodes(curve[:n], value) for n, (_, value) in enumerate(curve)) == explodes


@pytest.mark.parametrize(
    ("kind", "where"), [("full", "whet.train.loop.Masters.snapshot"), ("lora", "torch.optim.AdamW.step")]
)
def test_too_little_memory_outside_the_passes(
    system: System, data: Learnable, home: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: str
) -> None:
    def short(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(where, short)
    mend = "set adapter=lora" if kind == "full" else "recompute=true"
    with pytest.raises(MethodError, match=f"too little memory to train; .*Tried to allocate 2 GiB; .*{mend}"):
        FineTune(adapter=kind, epochs=1, batch=8, rank=4).apply(system, data, Run(Store(home)))


def test_several_processes_have_as_many_peaks() -> None:
    class Two(Alone):
        size = 2

        def sum(self, value: float) -> float:
            return value

    shares = []
    for team in (Alone(), Two()):
        told: list[Any] = []
        settings = Settings(Schedule(1e-3, 2), peak=1e6)
        train(make_model("llama"), steps(learnable(0), 6, 0), NextToken(), settings, beat=told.append, team=team)
        shares.append([b.share * b.seconds / b.tokens for b in told])
    assert shares[0] == pytest.approx([2 * s for s in shares[1]])


def test_short_memory_only_makes_packs_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, wanted = fit(0, validate=False)
    seen: list[int] = []

    def short(rows: Any, dtype: Any, device: Any, most: int) -> Any:
        seen.append(most)
        if most > 256:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return packs(rows, dtype, device, most)

    monkeypatch.setattr(batches, "packs", short)
    model, curves = fit(0, validate=False)
    assert seen == [1024, 512] + [256] * 12
    assert [v for _, v in curves.train] == pytest.approx([v for _, v in wanted.train], abs=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    monkeypatch.setattr(batches, "packs", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MethodError, match="too little memory to train"):
        fit(0, validate=False)


def test_what_does_not_fit_is_named() -> None:
    class Short(NextToken):
        def __call__(self, logits: torch.Tensor, pack: Pack) -> torch.Tensor:
            sizes.append(pack.tokens)
            raise torch.OutOfMemoryError("out of memory")

    sizes: list[int] = []
    rows = [Row(HEAD[:17], ((1, 2),) * 8)] * 2
    with pytest.raises(MethodError, match="one row's pass of 144 tokens.*no batch fits, not even --set batch=1"):
        train(make_model("gemma2"), lambda _: rows, Short(), Settings(Schedule(1e-3, 1)))
    assert sizes == [288, 288, 144, 144, 144]  # packs of 1024, 512, 256, 128 and 64


@pytest.mark.parametrize(
    ("length", "most", "processes", "batch"), [(8, 64, 1, 4), (99, 1024, 2, 8), (99, 256, 2, 2), (99, 128, 2, 0)]
)
def test_the_batch_that_would_fit_is_named(length: int, most: int, processes: int, batch: int) -> None:
    # Short rows in the smallest pack; shards in their first one, which may hold more rows than there are.
    rows = [Row(HEAD[:3], (tuple(range(length - 3)),))] * 16
    told = f"--set batch={batch} may fit" if batch else "no batch fits"
    assert told in str(loop._unfitting(rows, True, most, processes))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputing_changes_nothing(family: str) -> None:
    model = make_model(family)
    value, _ = step(model, ROWS)
    wanted = gradients(model)
    model.zero_grad()
    found, _ = step(model, ROWS, recompute=True)
    assert found == pytest.approx(value, abs=1e-6)
    equal(gradients(model), wanted)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_operations_per_token() -> None:
    model = make_model("llama")
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    head = model.lm_head.weight.numel() if model.config.tie_word_embeddings else 0
    assert operations(model) == 6 * (weights - head)
    assert operations(model.requires_grad_(False)) == 4 * (weights - head)


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true"}  # fmt: skip


def of_two_processes(sharded: bool, out: Path, *more: str) -> Any:
    """What the first of two processes writes of its training, over gloo."""
    script = Path(__file__).parent / "distributed.py"
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script),
         str(out), *more],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(FSDP if sharded else {})},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("way", ["ddp", "fsdp", "short"])
def test_two_processes_train_as_one(way: str, tmp_path: Path) -> None:
    """Over gloo: the same losses and weights as one process, also where a process has no row in a step.

    In shards, they are stopped halfway, too, and go on from what each has kept, whatever their clocks say. Where
    memory is short in one of them, both begin the step again.
    """
    sharded, more = way == "fsdp", {"ddp": [], "fsdp": [str(tmp_path)], "short": ["short"]}[way]
    body = of_two_processes(sharded, tmp_path / "out.json", *more)
    model = make_model("llama")
    alone = train(model, uneven, NextToken(), Settings(Schedule(1e-3, 6)))
    assert body["processes"] == 2 and body["sharded"] == sharded
    assert body["first"] == (4 if sharded else 1)  # the checkpoint of step 3 is the last one written before the stop
    assert body["train"] == [pytest.approx(v, abs=1e-4) for _, v in alone.train]
    assert body["sum"] == pytest.approx(float(sum(p.detach().double().sum() for p in model.parameters())), abs=1e-2)
    halves = train(make_model("llama").bfloat16(), uneven, NextToken(), Settings(Schedule(1e-3, 6)))
    assert body["half"] == [pytest.approx(v, rel=0.02) for _, v in halves.train]


def tuned_by_both(folder: str, home: Path) -> dict[str, tuple[System, dict[str, Any]]]:
    """A model fine-tuned by LoRA and in full, with notes; its last validation is made the worst one.

    `weight` is the sum over what was trained, as this process holds it; 0 where nothing was to be trained any more.
    """
    made = {}
    for kind, rate in (("lora", 1e-2), ("full", 1e-3)):
        notes: dict[str, Any] = {"weight": 0.0}
        looks: list[float] = []

        def looked(live: TorchSession, rows: list[Row], looks: list[float] = looks) -> float:
            looks.append(mean_loss(live, rows) + 9.0 * (len(looks) == 2))
            return looks[-1]

        def trained(module: Any, *given: Any, notes: dict[str, Any] = notes, **settings: Any) -> Curves:
            curves = train(module, *given, **settings)
            own = [p.detach().double().abs().sum() for p in module.parameters() if p.requires_grad]
            notes["weight"] = float(sum(own))
            return curves

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("whet.model.compute_dtype", lambda: torch.float32)
            patch.setattr(lesson, "mean_loss", looked)
            patch.setattr(lesson, "train", trained)
            run, labels = Run(Store(home)), ("positive", "negative")
            system = System(models.resolve(folder), "what is it?", decoding=Decoding(labels, True), home=home)
            method = FineTune(kind, rank=4, learning_rate=rate, epochs=1, batch=8)
            tuned = method.apply(system, Learnable("tiny", "what is it?", "accuracy", labels, task_rows()), run)
        made[kind] = tuned, {**notes, **run.notes["curves"]}
    return made


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_fine_tune_as_one(way: str, tmp_path: Path, model_folder: str, fp32: None) -> None:
    """Validated, an adapter and all weights: what they write is what one process writes, up to rounding."""
    body = of_two_processes(way == "fsdp", tmp_path / "out.json", "tune", model_folder, str(tmp_path / "two"))
    assert body["processes"] == 2 and body["sharded"] == (way == "fsdp")
    alone, opened = tuned_by_both(model_folder, tmp_path / "one"), tuned_by_both(model_folder, tmp_path / "two")
    base, _ = models.load(models.resolve(model_folder), tmp_path)
    for kind, (tuned, notes) in alone.items():
        found = body[kind]
        assert found["weights"][0] == found["weights"][1] == pytest.approx(notes["weight"], rel=1e-5)
        assert found["best"] == notes["best"] == 1  # before the end
        for curve in ("train", "validation"):
            assert [v for _, v in found[curve]] == [pytest.approx(v, abs=1e-4) for _, v in notes[curve]]
        again, kept = opened[kind]
        assert kept["weight"] == 0  # it was in the store
        # bf16, which either side of a half is rounded to, is what full training is kept in.
        module, other = (models.load(s.model, tmp_path)[0].state_dict() for s in (again, tuned))
        for name, value in module.items():
            torch.testing.assert_close(value, other[name], rtol=0.01, atol=1e-4)
        assert any(not torch.equal(value, base.state_dict()[name]) for name, value in module.items())


def test_two_processes_make_the_store_at_once(home: Path) -> None:
    home.mkdir()
    with contextlib.closing(sqlite3.connect(home / "whet.sqlite", check_same_thread=False)) as other:
        other.execute("begin immediate")  # as when it makes its tables
        threading.Timer(0.2, other.commit).start()
        Store(home)


@pytest.mark.parametrize(("kind", "whole", "told"), [("osf", False, "osf"), ("lora", True, "merged")])
def test_what_shards_cannot_do_is_said_before_training(
    system: System, home: Path, monkeypatch: pytest.MonkeyPatch, kind: str, whole: bool, told: str
) -> None:
    monkeypatch.setattr(lesson, "team", lambda: SimpleNamespace(sharded=True))
    with pytest.raises(MethodError, match=rf"{told}.*FSDP"):
        lesson.teach(system, Run(Store(home)), "one", Adapter(kind), lambda live: pytest.fail(), whole=whole)


def test_what_processes_kept_at_different_steps_is_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Alone):
        """Beside a process that holds step `theirs`."""

        theirs = 3

        def most(self, count: int) -> int:
            return max(count, self.theirs if count == abs(count) else -self.theirs)

    monkeypatch.setattr(loop, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(loop, "WRITING_SHARE", float("inf"))

    def halt(at: Any) -> None:
        if at.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(0, keep=tmp_path / "kept", beat=halt)
    assert loop._held(tmp_path / "kept", Alone()) and loop._held(tmp_path / "kept", Other())
    for theirs, told in ((2, "2 to 3"), (-1, "-1 to 3")):  # -1: it holds none
        Other.theirs = theirs
        with pytest.warns(UserWarning, match=told):
            assert not loop._held(tmp_path / "kept", Other())


def test_the_first_process_s_validation_decides_for_all() -> None:
    class Second(Alone):
        """Beside a first process whose validation loss is 7."""

        first = False

        def sum(self, value: float) -> float:
            return 7.0 + value

    assert loop._agreed(lambda: 3.0, Second()) == 7.0 and loop._agreed(lambda: 3.0, Alone()) == 3.0


def test_all_processes_train_by_the_rate_of_the_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, home: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(Alone):
        """Beside a first process that trains 777 tokens a second."""

        first = False

        def sum(self, value: float) -> float:
            return 777 + value

    def halt(_: Recipe, start: System, data: Learnable, run: Run) -> System:
        raise MethodError(f"{run.trained_tokens} tokens")

    monkeypatch.setattr("whet.train.team.team", Second)
    monkeypatch.setattr("whet.search.budget.measure", lambda *_: Rates(9.0, 9.0, 9.0))
    monkeypatch.setattr(Recipe, "run", halt)
    folder = str(write_task(tmp_path / "toy", train=120, test=40))
    _, _, err = whet(capsys, "apply", "finetune", folder, "--system", model_folder, "--set", "learning_rate=0.001",
                     "--budget", "10m", "--out", str(tmp_path / "out"))  # fmt: skip
    assert f"{600 * 777 * 85 // 100} tokens" in err  # the rest of the time goes to validations


def test_of_several_processes_the_first_writes_and_prints(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[bool] = []

    class Second(Alone):
        first = False

        def wait(self) -> None:
            waited.append((tmp_path / "out").exists())

    monkeypatch.setattr("whet.train.team.team", Second)
    folder = str(write_task(tmp_path / "toy", train=40, test=10))
    code, out, _ = whet(capsys, "apply", "fewshot", folder, "--system", "fake:keyword", "--set", "k=2",
                        "selection=random", "--out", str(tmp_path / "out"))  # fmt: skip
    assert (code, out, waited) == (0, "", [False]) and not (tmp_path / "out").exists()


def test_what_reads_whole_weights_is_refused_in_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharded(Alone):
        sharded = True

    penalised = Settings(Schedule(1e-3, 1), penalty=lambda: torch.zeros(()))
    with pytest.raises(MethodError, match="a penalty reads whole weights"):
        train(make_model("llama"), steps(learnable(0), 6, 0), NextToken(), penalised, team=Sharded())
    monkeypatch.setattr(policy, "team", Sharded)
    with pytest.raises(MethodError, match="needs whole weights"):
        policy.Policy(TorchSession(make_model("llama"), make_tokenizer()), None)  # type: ignore[arg-type]


# --- fp32 masters of bf16 weights -------------------------------------------------------------------------------------


def test_masters_keep_what_bf16_would_lose() -> None:
    module = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        module.weight.fill_(1.0)
    masters = Masters(module)
    for _ in range(16):
        with torch.no_grad():
            masters.copies[0].sub_(2**-10)  # a quarter of bf16's spacing below 1
        masters.give_weights()
    assert masters.copies[0].item() == 1 - 16 * 2**-10
    assert module.weight.item() == 1 - 2**-6
    with torch.no_grad():  # the same without masters: every step is rounded away
        lost = torch.ones(1, dtype=torch.bfloat16)
        for _ in range(16):
            lost.sub_(2**-10)
    assert lost.item() == 1.0


def test_masters_of_fp32_are_the_weights() -> None:
    module = torch.nn.Linear(2, 2)
    masters = Masters(module)
    assert all(live is copy for live, copy in zip(masters.live, masters.copies, strict=True))
    module.bias.requires_grad_(False)
    assert len(Masters(module).live) == 1


def test_bf16_trains_through_masters() -> None:
    """Steps far below bf16's spacing: together they must arrive where fp32 training arrives."""

    def end(dtype: torch.dtype) -> tuple[Any, Curves]:
        model = make_model("llama")
        model.to(torch.bfloat16).to(dtype)  # both start from the rounded weights
        schedule = Schedule(1e-4, 40, warmup=0, decay=0.0)
        return model, train(model, steps(learnable(0), 6, 0), NextToken(), Settings(schedule))

    start = make_model("llama").to(torch.bfloat16)
    (full, _), (half, curves) = end(torch.float32), end(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert curves.train[-1][1] < curves.train[0][1]

    def moved(model: Any) -> torch.Tensor:
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        return torch.cat([(a.float() - b.float()).flatten() for a, b in pairs]).detach()

    # Rounded weights cannot follow each small step, but their movement points the same way.
    assert torch.nn.functional.cosine_similarity(moved(full), moved(half), dim=0) > 0.6
    assert 0.7 < float(moved(half).norm() / moved(full).norm()) < 1.5


# --- verdicts ---------------------------------------------------------------------------------------------------------


def curves_of(training: list[float], checks: list[float]) -> Curves:
    train_curve = tuple((10 * (n + 1), loss) for n, loss in enumerate(training))
    every = len(training) // max(1, len(checks) - 1)
    validation = tuple((10 * every * n, loss) for n, loss in enumerate(checks))
    return Curves(train_curve, validation, min(range(len(checks)), key=checks.__getitem__), len(training), 0, 0.0)


@pytest.mark.parametrize(
    ("training", "checks", "wanted"),
    [
        ([2.0, 1.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.1], [2.0, 1.2, 1.0, 1.1, 1.3], "overfitting"),
        ([2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6], [2.0, 1.7, 1.4, 1.1, 0.8], "underfitting"),
        ([2.0, 1.5, 1.2, 1.0, 0.95, 0.94, 0.93, 0.93], [2.0, 1.3, 1.05, 1.0, 1.0], "well fitted"),
        ([2.0, 1.5, 1.2, 1.0, 0.9, 0.8, 0.7, 0.6], [2.0, 1.3, 1.02, 1.0, 1.04], "well fitted"),  # rose, but by 4 %
        ([2.0, 1.5, 1.2, 1.0, 0.9, 0.9, 1.2, 1.4], [2.0, 1.3, 1.0, 1.1, 1.3], "well fitted"),  # train rose, too
        ([6.4, 3.0, 1.0, 0.5, 10.8, 10.8, 10.8, 10.8], [6.4, 1.0, 10.8, 10.8, 10.8], "diverged"),
        ([2.0, 1.5, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2], [1.0, 0.9, 1.1, 1.3, 1.5], "overfitting"),  # train fell
        ([2.0, 0.5, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005], [2.0, 0.3, 0.1, 0.03, 0.01], "well fitted"),  # all but learnt
        ([2.0, 1.5, 1.2, 1.0], [2.0, 1.0], "too short to tell"),
        ([2.0, 1.0, 0.5], [2.0, 1.0, 0.5], "too short to tell"),
        ([2.0, 1.0, 0.5, 0.4], [], "too short to tell"),
    ],
)
def test_verdict(training: list[float], checks: list[float], wanted: str) -> None:
    found = verdict(curves_of(training, checks) if checks else curves_of(training, [1.0]))
    assert found.verdict == wanted
    if wanted != "too short to tell":
        assert (found.best, found.last) == (min(checks), checks[-1])
        assert found.train_after == pytest.approx(sum(training[-2:]) / 2)


def test_twice_the_data_follows_a_power_law() -> None:
    draw = random.Random(0)
    truth = [2.0 * (n + 0.5) ** -0.5 + 0.3 for n in range(400)]
    found = twice_the_data([v + draw.gauss(0, 0.02) for v in truth[:100]], 8)
    assert found is not None
    assert found.rows == 800
    assert found.now == pytest.approx(2.0 * 100**-0.5 + 0.3, abs=0.02)
    assert found.low <= 2.0 * 200**-0.5 + 0.3 <= found.high
    assert found.twice == pytest.approx(2.0 * 200**-0.5 + 0.3, abs=0.03)
    assert found.high - found.low < 0.1
    flat = twice_the_data([1.0 + draw.gauss(0, 0.01) for _ in range(60)], 8)
    assert flat is not None
    assert flat.twice == pytest.approx(1.0, abs=0.03)  # a curve that has ended promises nothing
    assert twice_the_data([1.0] * 10, 8) is None


# --- fine-tuning as a Method ------------------------------------------------------------------------------------------

WORDS = ["great", "funny", "good", "fine", "bad", "not good", "poor", "dull"]


def task_rows(count: int = 40) -> tuple[Example, ...]:
    draws = [(n, WORDS[n % 8]) for n in range(count)]
    return tuple(
        Example(str(n), f"movie {n} was {word}", "positive" if WORDS.index(word) < 4 else "negative")
        for n, word in draws
    )


@pytest.fixture
def data() -> Learnable:
    return Learnable("tiny", "what is the review?", "accuracy", ("positive", "negative"), task_rows())


@pytest.fixture
def system(model_folder: str, home: Path, fp32: None) -> System:
    decoding = Decoding(("positive", "negative"), True, prior=(0.1, 0.2))
    return System(models.resolve(model_folder), "what is the review?", decoding=decoding, home=home)


METHOD = FineTune(rank=4, learning_rate=1e-2, epochs=2, batch=8)


def test_finetune(system: System, data: Learnable, home: Path) -> None:
    run, before = Run(Store(home), seed=3), system.fingerprint
    tuned = METHOD.apply(system, data, run)
    # The given System is unchanged; the new one has one adapter, no prior, and scores whole answers.
    assert (system.fingerprint, system.decoding.prior) == (before, (0.1, 0.2))
    [transform] = tuned.model.transforms
    assert transform.kind == "adapter"
    assert (tuned.decoding.prior, tuned.decoding.normalise) == ((), "sum")
    assert tuned.model.content == system.model.content
    # What was written is whole, and nothing else lies about.
    made = transform.folder.parent
    assert made.parent == home / "artifacts"
    assert list(made.parent.iterdir()) == [made]
    assert sorted(p.name for p in made.iterdir()) == ["done.json", "weights"]
    assert list((home / "checkpoints").glob("*")) == []
    assert models.check_transform(transform) == transform.folder
    config = json.loads((transform.folder / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, None)
    assert config["target_modules"] == sorted(config["target_modules"])  # the same in every process
    # What it cost and how it went is told.
    assert run.spent.trained_tokens > 0
    assert run.spent.training_seconds > 0
    assert run.notes["steps"] == 2 * math.ceil(run.notes["rows"] / 8) and run.notes["epochs"] == 2
    assert run.notes["rows"] == len(data.validation(seed=3, most=128)[0]) == 36
    curve = [loss for _, loss in run.notes["curves"]["train"]]
    assert curve[-1] < 0.6 * curve[0]


def test_frequencies_of_positions_stay_in_fp32(system: System, data: Learnable, home: Path) -> None:
    tuned = METHOD.apply(system, data, Run(Store(home)))
    plain, under = (models.load(one.model, home, dtype=torch.bfloat16)[0] for one in (system, tuned))
    assert under.dtype == torch.bfloat16
    wanted = make_model("llama").model.rotary_emb.inv_freq
    for module in (plain, under, folders.dense(make_model("llama"), torch.bfloat16)):
        found = module.model.rotary_emb.inv_freq
        assert found.dtype == torch.float32 and torch.equal(found.cpu(), wanted)


def test_a_short_training_warms_up_as_the_whole_would(
    system: System, data: Learnable, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Schedule] = []
    monkeypatch.setattr("whet.train.lesson.train", lambda *a, **k: (seen.append(a[3].schedule), train(*a, **k))[1])
    for fidelity in (0.4, 1.0):
        METHOD.apply(system, data, Run(Store(home), fidelity=fidelity))
    short, whole = seen
    assert (short.steps, whole.steps) == (4, 10)
    assert short.at(0) == whole.at(0) == 0.5 * METHOD.learning_rate


def test_only_rows_that_are_trained_on_are_rendered(
    system: System, data: Learnable, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        lesson, "render_rows", lambda s, some, *rest: (asked.append(len(some)), render_rows(s, some, *rest))[1]
    )
    many = replace(data, train=task_rows(400))
    few, rest = Run(Store(home), seed=3, trained_tokens=400), Run(Store(home), seed=3)
    METHOD.apply(system, many, few)
    sampled, held, learnt = asked
    assert (sampled, few.notes["rows"] + held) == (256, 400) and 0 < learnt < 40
    # Rendered one by one or all at once, the rows and so the weights are the same; plain text is windows.
    asked.clear()
    METHOD.apply(system, replace(data, train=data.train[:20]), rest)
    assert asked[2] == rest.notes["rows"] == 18
    session = rest.session(system.model)
    every, cut = render_rows(system, data.train, session, (0.1, 3))
    rows = lesson.Rendered(system, data.train, session, (0.1, 3))
    assert rows([7, 3, 7]) == [every[7], every[3], every[7]] and rows(range(40)) == every and rows.cut == cut == 0
    texts = (*data.train[:3], Example("t", "", text="the movie was great " * 400))
    rows = lesson.Rendered(system, texts, session, (0.1, 3))
    assert rows(range(rows.count)) == render_rows(system, texts, session)[0] and rows.count > 5


def test_finetune_trains_nothing_twice(system: System, data: Learnable, home: Path, monkeypatch: Any) -> None:
    first, second = Run(Store(home), seed=3), Run(Store(home), seed=3)
    tuned = METHOD.apply(system, data, first)
    monkeypatch.setattr("whet.train.lesson.train", lambda *a, **k: pytest.fail("trained again"))
    again = METHOD.apply(system, data, second)
    assert again == tuned
    assert again.fingerprint == tuned.fingerprint
    assert second.spent == first.spent  # what it cost when it was made
    assert second.notes["curves"]["train"] == [list(point) for point in first.notes["curves"]["train"]]
    for other in (replace(METHOD, rank=2), replace(METHOD, epochs=1)):
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            other.apply(system, data, second)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        METHOD.apply(system, replace(data, train=data.train[1:]), second)


def test_finetune_is_repeatable_across_homes(system: System, data: Learnable, tmp_path: Path) -> None:
    prints = []
    for place, seed in (("a", 3), ("b", 3), ("c", 4)):
        tuned = METHOD.apply(system, data, Run(Store(tmp_path / place), seed=seed))
        prints.append(tuned.fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_changed_adapter_is_refused(system: System, data: Learnable, home: Path) -> None:
    tuned = METHOD.apply(system, data, Run(Store(home)))
    weights = tuned.model.transforms[0].folder / "adapter_model.safetensors"
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)
    with pytest.raises(ModelError, match="has changed since it was written"):
        models.load(tuned.model, home)


def test_merged_scores_equal_the_live_module(system: System, data: Learnable, home: Path) -> None:
    tuned = METHOD.apply(system, data, Run(Store(home)))
    merged, tokenizer = models.load(tuned.model, home, dtype=torch.float32, device="cpu")
    base, _ = models.load(system.model, home, dtype=torch.float32, device="cpu")
    plain = TorchSession(base, tokenizer)
    chats = tuned.prompts(data.train[:6])
    labels = [("positive", "negative")] * 6
    before = plain.score(chats, labels)
    live = TorchSession(PeftModel.from_pretrained(base, str(tuned.model.transforms[0].folder)), tokenizer)
    wanted, found = live.score(chats, labels), TorchSession(merged, tokenizer).score(chats, labels)
    with quick_products(live.module):
        quick = live.score(chats, labels)
    for a, b, c, d in zip(wanted, found, quick, before, strict=True):
        for one, two, three, old in zip(a, b, c, d, strict=True):
            assert two.logprob == pytest.approx(one.logprob, abs=1e-3)
            assert three.logprob == pytest.approx(one.logprob, abs=1e-3)
            assert abs(one.logprob - old.logprob) > 0.1  # training did something
    # And it learnt what answers look like.
    right = [labels[0].index(e.completion) for e in data.train[:6]]
    assert sum(row[i].logprob for row, i in zip(found, right, strict=True)) > 6 + sum(
        row[i].logprob for row, i in zip(before, right, strict=True)
    )


def test_two_adapters_stack(system: System, data: Learnable, home: Path) -> None:
    run = Run(Store(home))
    once = METHOD.apply(system, data, run)
    twice = METHOD.apply(once, data, run)
    assert twice.model.transforms[0] == once.model.transforms[0]
    assert len(twice.model.transforms) == 2
    one, two = (models.load(s.model, home)[0].get_parameter("model.layers.0.mlp.up_proj.weight") for s in (once, twice))
    assert not torch.equal(one, two)


def test_finetune_keeps_to_its_budget(system: System, data: Learnable, home: Path) -> None:
    run = Run(Store(home), trained_tokens=300)
    METHOD.apply(system, data, run)
    free = Run(Store(home))
    METHOD.apply(system, data, free)
    assert 100 < run.spent.trained_tokens <= 450 < free.spent.trained_tokens
    half = Run(Store(home), fidelity=0.5)
    METHOD.apply(system, data, half)
    assert half.notes["steps"] == round(free.notes["steps"] / 2)


def test_few_rows_are_seen_as_often_as_asked(system: System, data: Learnable, home: Path) -> None:
    run = Run(Store(home))
    FineTune(rank=4, epochs=3).apply(system, replace(data, train=data.train[:10]), run)  # 32 rows a step
    assert run.notes["rows"] == run.notes["batch"] < 10
    assert run.notes["steps"] == run.notes["epochs"] == 3


def test_a_crash_leaves_nothing_behind(system: System, data: Learnable, home: Path, monkeypatch: Any) -> None:
    def fails(*_: Any) -> str:
        raise RuntimeError("halt")

    monkeypatch.setattr("whet.train.lesson.hash_files", fails)
    with pytest.raises(RuntimeError, match="halt"):
        METHOD.apply(system, data, Run(Store(home)))
    assert list((home / "artifacts").iterdir()) == []


def test_finetune_without_completions(system: System, home: Path) -> None:
    bare = Learnable("bare", "", "accuracy", train=(Example("1", "a"), Example("2", "b")))
    with pytest.raises(MethodError, match="nothing to train on"):
        METHOD.apply(system, bare, Run(Store(home)))


@pytest.mark.parametrize("setting", [{"rank": 0}, {"batch": 0}, {"learning_rate": -1.0}, {"epochs": -1.0}])
def test_wrong_settings(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive"):
        FineTune(**setting)
    with pytest.raises(ValueError, match="one of lora"):
        FineTune(adapter="lorra")


def test_rows_are_rendered_as_the_system_renders_them(system: System, home: Path) -> None:
    model, tokenizer = models.load(system.model, home, device="cpu")
    session = TorchSession(model, tokenizer)
    rows, cut = render_rows(system, task_rows(3), session)
    assert cut == 0
    for row, example in zip(rows, task_rows(3), strict=True):
        assert row.prompt == session.encode(system.prompts([example]))[0]
        assert row.continuations == ((*tokenizer(example.completion)["input_ids"], tokenizer.eos_token_id),)
    long = Example("x", "movie " * 400, "positive")
    [row, raw], cut = render_rows(system, [long, Example("y", "no completion"), Example("z", "", text="raw")], session)
    assert cut == 1
    # Plain text stands outside the template, behind the token that begins a text; no turn ends behind it.
    assert replace(raw, facts=()) == Row(session.encode([""])[0], (session.encode_answer("raw", end=False, raw=True),))
    assert len(row.prompt) + len(row.continuations[0]) <= session.context
    # An answer that is longer than the window loses its end, so that the prompt keeps half of it.
    wordy = Example("w", "movie " * 400, "film " * 400)
    [row], cut = render_rows(system, [wordy], session)
    [answer] = row.continuations
    assert cut == 1 and len(row.prompt) + len(answer) == session.context
    assert session.context // 2 - 40 < len(row.prompt) <= session.context // 2
    assert answer == session.encode_answer(wordy.completion, end=True)[: len(answer)]


@pytest.mark.parametrize("selection", ["fixed", "nearest"])
def test_no_row_is_trained_with_its_own_answer_in_sight(system: System, home: Path, selection: str) -> None:
    class Stub:
        def __call__(self, texts: Any) -> Any:
            return torch.nn.functional.one_hot(torch.tensor([ord(t[6]) % 8 for t in texts]), 8).float().numpy()

    examples = task_rows(4)
    demos = Demonstrations(tuple((e.prompt, e.completion) for e in examples), 2, selection)
    shown = replace(system, demonstrations=demos)
    shown.__dict__["embedder"] = Stub()
    model, tokenizer = models.load(system.model, home, device="cpu")
    rows, _ = render_rows(shown, examples, TorchSession(model, tokenizer))
    for row, example in zip(rows, examples, strict=True):
        text = tokenizer.decode(row.prompt)
        assert text.count(example.prompt) == 1
        assert text.count("<|im_start|>assistant") == 1 + (3 if selection == "fixed" else 2)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen3"])
def test_finetune_other_families(family: str, data: Learnable, tmp_path: Path, home: Path, fp32: None) -> None:
    folder = save_model(tmp_path / family, family)
    system = System(models.resolve(folder), "review?", decoding=Decoding(data.labels, True), home=home)
    run = Run(Store(home))
    tuned = replace(METHOD, epochs=1).apply(system, data, run)
    curve = [loss for _, loss in run.notes["curves"]["train"]]
    assert curve[-1] < curve[0]
    merged, tokenizer = models.load(tuned.model, home, device="cpu")
    checks, _ = render_rows(tuned, data.validation(most=128)[1], TorchSession(merged, tokenizer))
    found = [v for row in TorchSession(merged, tokenizer).score_rows(checks) for c in row for v in c]
    best = min(loss for _, loss in run.notes["curves"]["validation"])
    assert -sum(found) / len(found) == pytest.approx(best, abs=2e-3)  # merged, it is what was validated


def test_bf16_finetune(model_folder: str, data: Learnable, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.model.compute_dtype", lambda: torch.bfloat16)
    system = System(models.resolve(model_folder), "review?", decoding=Decoding(data.labels, True), home=home)
    run = Run(Store(home))
    tuned = replace(METHOD, epochs=1).apply(system, data, run)
    curve = [loss for _, loss in run.notes["curves"]["train"]]
    assert curve[-1] < curve[0]
    assert models.load(tuned.model, home)[0].dtype == torch.bfloat16


def test_progress_is_told(system: System, data: Learnable, home: Path) -> None:
    told: list[tuple[str, int, int]] = []
    METHOD.apply(system, data, Run(Store(home), tell=lambda *what: told.append(what)))
    assert [done for _, done, _ in told] == list(range(1, told[-1][2] + 1))
    assert all(what.startswith("loss ") for what, _, _ in told)


class Few(FineTune):
    """Fine-tuning with a small space."""

    def space(self) -> dict[str, Any]:
        return {"learning_rate": (1e-3, 1e-2), "rank": (2, 4)}


def test_every_kind_of_adapter_gets_as_many_learning_rates() -> None:
    def rates(method: Any) -> list[float]:
        return [arm.learning_rate for arm in tune.candidates(method)]  # type: ignore[attr-defined]

    assert rates(FineTune()) == rates(FineTune(adapter="dora")) == [1e-3, 3e-4, 2e-3]
    assert rates(FineTune(adapter="full")) == pytest.approx([1e-4, 3e-5, 2e-4])
    assert rates(FineTune(adapter="full", learning_rate=5e-5)) == pytest.approx([5e-5, 3e-5, 1e-4, 2e-4])
    assert rates(Continual(adapter="full")) == pytest.approx([1e-4, 3e-5])
    assert FineTune().rate == FineTune(adapter="full", learning_rate=1e-3).rate == 1e-3
    assert FineTune(adapter="full").rate == 1e-4
    assert [arm.share for arm in tune.candidates(Continual(), "share")] == [0.0, 0.125, 1 / 3]  # type: ignore[attr-defined]
    assert rates(Distill()) == [0.0, 1e-4, 6e-4]  # 0 leaves it to the model's size


def test_learning_rates_are_raced(system: System, data: Learnable, home: Path) -> None:
    arms = tune.candidates(replace(METHOD, epochs=8))
    assert [a.learning_rate for a in arms] == [1e-2, 3e-4, 1e-3, 2e-3]
    run, alone = Run(Store(home), seed=1), Run(Store(home), seed=1)
    won, ended = tune.race(arms, system, data, run)
    # All start, half of them go on, one is trained to its end; it goes on where its last rung was stable.
    assert [arm.fidelity for arm in ended] == [1.0, 0.4, 0.15, 0.15]
    assert ended[0].loss == min(arm.loss for arm in ended)
    assert ended[1].why == f"behind finetune(learning_rate={ended[0].method.learning_rate:g})"
    ended[0].method.apply(system, data, alone)
    assert len(won.model.transforms) == 1
    assert run.spent.trained_tokens < 2.1 * alone.spent.trained_tokens  # what rungs go on from counts once
    assert not list((home / "checkpoints").glob("*.stable"))  # nothing goes on from them any more
    again, _ = tune.race(arms, system, data, Run(Store(home), seed=1))
    assert again.fingerprint == won.fingerprint
    bad = [replace(METHOD, learning_rate=1e30)]
    with pytest.raises(MethodError, match="every setting failed"):
        tune.race(bad, system, data, Run(Store(home)))


def test_other_numbers_are_raced_in_what_is_left(system: System, data: Learnable, home: Path) -> None:
    own, run = Few(learning_rate=1e-2, epochs=2.0, batch=12, rank=4), Run(Store(home), seed=1)
    _, ended = tune.search(own, system, data, run, 1e9, lambda s: float(s.trained_tokens))
    tried = {(arm.method.learning_rate, arm.method.rank) for arm in ended}
    assert {rate for rate, _ in tried} == {1e-3, 1e-2} and {rank for _, rank in tried} == {2, 4}
    assert len(tried) == len(ended) == 3  # one after the other, around the better rate
    assert ended[0].fidelity == 1 and ended[0].loss == min(arm.loss for arm in ended if arm.fidelity == 1)
    alone = Run(Store(home / "b"), seed=1)
    assert ended[0].loss == pytest.approx(min(v for _, v in run.notes["curves"]["validation"][1:]))
    _, first = tune.search(own, system, data, alone, 1.0, lambda s: float(s.trained_tokens))
    assert {arm.method.rank for arm in first} == {4} and len(first) == 2
    _, one = tune.search(own, system, data, Run(Store(home)), 1e9, lambda _: 0.0, {"learning_rate", "rank"})
    assert [arm.method for arm in one] == [own]


def test_without_rows_to_validate_on_nothing_is_raced(system: System, data: Learnable, home: Path) -> None:
    few, said, run = replace(data, train=data.train[:5]), [], Run(Store(home))
    arms = tune.candidates(Few(learning_rate=1e-2, epochs=2.0, batch=12, rank=4))
    _, ended = tune.race(arms, system, few, run, said.append)
    assert [(arm.method.learning_rate, arm.fidelity) for arm in ended] == [(1e-2, 1.0), (1e-3, 0.0)]
    assert tune.UNRACED in ended[1].why and tune.UNRACED in said[0]
    assert json.loads(json.dumps(tune.named(ended), allow_nan=False))[0]["loss"] is None


def test_where_the_best_one_fails_in_the_end_the_next_takes_its_place(
    system: System, data: Learnable, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tune._trained

    def failing(method: Any, fidelity: float, *rest: Any) -> Any:
        if fidelity == 1 and method.learning_rate == 1e-2:
            raise MethodError("it explodes")
        return own(method, fidelity, *rest)

    arms = tune.candidates(replace(METHOD, epochs=8))
    monkeypatch.setattr(tune, "_trained", failing)
    won, ended = tune.race(arms, system, data, Run(Store(home), seed=1))
    assert [(arm.method.learning_rate, arm.fidelity, arm.why) for arm in ended[:2]] == [
        (2e-3, 1.0, ""), (1e-2, 1.0, "it explodes"),
    ]  # fmt: skip
    assert [arm.fidelity for arm in ended[2:]] == [0.15, 0.15] and len(won.model.transforms) == 1


def test_what_was_learnt_before_a_loss_exploded_is_kept(
    system: System, data: Learnable, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def explode(self: NextToken, logits: torch.Tensor, pack: Pack) -> torch.Tensor:
        calls.append(1)
        return own(self, logits, pack) * (1.0 if len(calls) < 12 else math.nan)

    own = NextToken.__call__
    monkeypatch.setattr(NextToken, "__call__", explode)
    monkeypatch.setattr(loop, "KEEP_EVERY", 0.0)  # a checkpoint behind every step
    with pytest.raises(MethodError, match="so far are in") as told:
        replace(METHOD, epochs=4).apply(system, data, Run(Store(home), seed=3))
    folder = Path(str(told.value).rsplit(" in ", 1)[1])
    assert [p.name for p in (home / "checkpoints").iterdir()] == [folder.parent.name]  # it is not gone on from there
    monkeypatch.undo()
    base, tokenizer = models.load(system.model, home, dtype=torch.float32, device="cpu")
    live = TorchSession(PeftModel.from_pretrained(base, str(folder)), tokenizer)
    checks, _ = render_rows(system, data.validation(seed=3)[1], live)
    with live.module.disable_adapter():
        before = mean_loss(live, checks)
    assert mean_loss(live, checks) < before


def test_settings_that_do_not_go_together_are_not_drawn() -> None:
    last = SimpleNamespace(suggest_int=lambda name, low, high: high)
    assert tune._drawn(FineTune(), last).adapter == "full"  # type: ignore[attr-defined]
    assert tune._drawn(FineTune(bits=8), last).adapter == "dora"  # type: ignore[attr-defined]
    with pytest.raises(MethodError, match="go together"):
        tune._drawn(Clashing(), last)


class Clashing(FineTune):
    def space(self) -> Any:
        return {"rank": (16, 0)}


def test_settings_are_drawn_by_a_sampler(system: System, data: Learnable, home: Path) -> None:
    said: list[str] = []
    small = Few(learning_rate=1e-2, epochs=2.0, batch=12, rank=4)
    best, ended = tune.sample(small, 4, system, data, Run(Store(home), seed=1), said.append)
    assert len(ended) == 4 and small in [arm.method for arm in ended]  # its own settings are the first trial
    assert len({(arm.method.learning_rate, arm.method.rank) for arm in ended}) > 1
    whole = [arm for arm in ended if arm.fidelity == 1]
    assert ended[0].loss == min(arm.loss for arm in whole) and len(said) == len(whole)
    assert all(arm.why == "behind the median" for arm in ended if arm.fidelity < 1)
    again, order = tune.sample(small, 4, system, data, Run(Store(home), seed=1))
    assert again.fingerprint == best.fingerprint and order == ended
    with pytest.raises(MethodError, match="every setting failed"):
        tune.sample(replace(small, learning_rate=1e30), 1, system, data, Run(Store(home)))


def test_every_adapter_is_kept_and_opened_again(system: System, data: Learnable, home: Path) -> None:
    for kind, rate in (("lora", 1e-2), ("rslora", 1e-2), ("dora", 1e-2), ("full", 2e-3)):
        run = Run(Store(home))
        tuned = replace(METHOD, adapter=kind, learning_rate=rate, epochs=4).apply(system, data, run)
        [transform] = tuned.model.transforms
        assert transform.kind == ("weights" if kind == "full" else "adapter")
        curve = [loss for _, loss in run.notes["curves"]["train"]]
        assert curve[-1] < 0.6 * curve[0], kind
        merged, tokenizer = models.load(tuned.model, home, device="cpu")
        checks, _ = render_rows(tuned, data.validation(most=24)[1], TorchSession(merged, tokenizer))
        found = [v for row in TorchSession(merged, tokenizer).score_rows(checks) for c in row for v in c]
        best = min(loss for _, loss in run.notes["curves"]["validation"])
        # Full weights are kept in bf16, as the base's are.
        assert -sum(found) / len(found) == pytest.approx(best, abs=2e-3 if kind != "full" else 5e-2)


def test_plain_text_is_learnt_beside_instructions(system: System, home: Path) -> None:
    said = "the film was great and then the film was dull "
    texts = tuple(Example(f"t{n}", "", text=f"film {n}: {said}" * 3) for n in range(8))
    data = Learnable("mixed", "review?", "accuracy", ("positive", "negative"), (*task_rows(16), *texts))
    run = Run(Store(home))
    replace(METHOD, epochs=6).apply(system, data, run)
    curve = [loss for _, loss in run.notes["curves"]["train"]]
    assert curve[-1] < 0.8 * curve[0]
    alone = Run(Store(home))
    only = Learnable("texts", "", "perplexity", (), texts)
    replace(METHOD, epochs=6).apply(replace(system, decoding=Decoding()), only, alone)
    assert alone.notes["curves"]["train"][-1][1] < 0.8 * alone.notes["curves"]["train"][0][1]


def test_a_long_text_does_not_drown_the_answers(system: System, home: Path) -> None:
    session = TorchSession(*models.load(system.model, home, dtype=torch.float32, device="cpu"))
    text = Example("t", "", text="the film was great and funny. " * 8)
    rows, _ = render_rows(system, [*task_rows(16), text], session)
    answers, windows = rows[:16], rows[16:]
    lengths = [sum(len(r.continuations[0]) for r in part) for part in (answers, windows)]
    assert lengths[1] > lengths[0]  # of tokens, the text has most
    loss, counts = NextToken(), [NextToken().count(part) for part in (answers, windows)]
    assert counts == pytest.approx([16, len(windows)])  # of what is minimised, each row its share
    alone = [mean_loss(session, part) for part in (answers, windows)]
    assert mean_loss(session, rows) == pytest.approx((16 * alone[0] + len(windows) * alone[1]) / len(rows), rel=1e-5)
    value, _ = step(session.module.requires_grad_(True), rows)
    assert value == pytest.approx(mean_loss(session, rows), rel=1e-4) and loss.count(rows) == pytest.approx(len(rows))
    assert all(not r.facts for some in (task_rows(4), [text]) for r in render_rows(system, some, session)[0])


def test_a_long_text_is_as_many_rows_as_it_has_windows(system: System, home: Path) -> None:
    texts = tuple(Example(f"t{n}", "", text=f"film {n}: " + "the film was great and funny. " * 400) for n in range(3))
    run = Run(Store(home))
    only = Learnable("texts", "", "perplexity", (), texts)
    replace(METHOD, epochs=1).apply(replace(system, decoding=Decoding()), only, run)
    assert run.notes["rows"] > 24
    assert run.notes["steps"] == math.ceil(run.notes["rows"] / METHOD.batch)


def test_steps_are_reported_to_tensorboard(system: System, data: Learnable, home: Path) -> None:
    METHOD.apply(system, data, Run(Store(home), report_to=("tensorboard",)))
    assert list((home / "logs").rglob("events.out.tfevents.*"))
    with pytest.raises(MethodError, match="no tracker 'tensorbord'"):
        METHOD.apply(system, data, Run(Store(home), seed=9, report_to=("tensorbord",)))


def test_steps_never_end() -> None:
    source = steps([Row((1,), ((2,),))], 5, 0)
    assert [len(source(n)) for n in range(5)] == [1] * 5


def test_a_tracker_that_fails_costs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[int]()

    class Down:
        name = "tensorboard"

        def log(self, values: Any, step: int) -> None:
            told.append(step)
            raise OSError("no server")

        def finish(self) -> None:
            told.append(0)

    monkeypatch.setattr("whet.train.trackers._open", lambda *_: Down())
    beat = loop.Beat(1, 2, 1.0, 1e-3, 100, 1.0, 0.3)
    down = pytest.warns(UserWarning, match="tensorboard is told no more: no server")
    with down, trackers(["tensorboard"], tmp_path) as track:
        track(beat), track(replace(beat, step=2))
    assert told == [1]

    def refuses(*_: Any) -> Any:
        raise RuntimeError("no account\nmore")

    monkeypatch.setattr("whet.train.trackers._open", refuses)
    said = pytest.raises(MethodError, match="tensorboard cannot be told; found no account; leave it out")
    with said, trackers(["tensorboard"], tmp_path):
        pass


def test_wandb_without_an_account_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(MethodError, match="knows no account.*WANDB_MODE=offline"):
        check(["wandb"])
    wandb.teardown()  # it remembers how it was first asked
    monkeypatch.setenv("WANDB_MODE", "offline")
    check(["wandb"])


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_other_trackers_write_into_the_runs_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "logs" / "0123456789abcdef0123"
    with trackers([name], folder) as track:
        for step in (1, 2):
            track(loop.Beat(step, 2, 1.0 / step, 1e-3, 100 * step, 1.0 * step, 0.3))
    assert {p.name for p in tmp_path.iterdir()} == {"logs"}  # nothing beside it
    assert capsys.readouterr().out == ""  # stdout is for results
    if name == "wandb":
        [written] = folder.rglob("*.wandb")
        assert written.stat().st_size > 0
        return
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/logs/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("whet").experiment_id])
    assert [m.value for m in client.get_metric_history(run.info.run_id, "loss")] == [1.0, 0.5]
