"""Training: losses, packs, the merged product, the loop, and fine-tuning as a whole."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SHARED, make_model, make_tokenizer, save_model
from peft import PeftModel

from whet import model as models
from whet.engine import prefix
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession
from whet.errors import MethodError, ModelError
from whet.methods import Run
from whet.methods.finetune import FineTune, render_rows, verdict
from whet.store import Store
from whet.system import Decoding, Demonstrations, System
from whet.task import Example, Learnable
from whet.train import batches
from whet.train.adapters import _MergedLinear, adapted, add_lora, merged_products
from whet.train.batches import packs, singles, steps, tokens_per_row
from whet.train.loop import Curves, Masters, Schedule, Settings, _step, train
from whet.train.losses import next_token

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


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], within: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        scale = float(wanted[name].abs().max())
        assert torch.allclose(found[name], wanted[name], rtol=within, atol=within * max(scale, 1e-3)), name


# --- losses and packs -------------------------------------------------------------------------------------------------


def test_next_token_is_cross_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], dtype=torch.bfloat16)
    found = next_token(logits.float(), torch.tensor([0, 0]))
    assert float(found) == pytest.approx(math.log(2) + math.log(4 / 3), abs=1e-3)
    assert next_token(logits, torch.tensor([0, 0])).dtype == torch.float32


@pytest.mark.parametrize("family", [*SHARED, "gemma2", "mistral"])
def test_a_step_has_transformers_loss_and_gradients(family: str) -> None:
    model = make_model(family)
    wanted = plain_loss(model, ROWS)
    wanted.backward()
    theirs = gradients(model)
    model.zero_grad()
    value, tokens = _step(model, ROWS, next_token)
    assert value == pytest.approx(float(wanted.detach()), abs=1e-4)
    equal(gradients(model), theirs)
    shared = family in SHARED
    assert tokens == (prefix.arrange(ROWS).unique_tokens if shared else sum(p.tokens for p in singles(ROWS, "cpu")))
    assert not model.training


def test_short_rows_of_a_windowed_model_are_packed() -> None:
    model, rows = make_model("mistral"), [Row((1, 2, 3), ((4, 5), (4, 6))), Row((1, 2, 3, 4), ((9,),))]
    wanted = plain_loss(model, rows)
    wanted.backward()
    theirs = gradients(model)
    model.zero_grad()
    value, tokens = _step(model, rows, next_token)
    assert value == pytest.approx(float(wanted.detach()), abs=1e-4)
    assert tokens == prefix.arrange(rows).unique_tokens
    equal(gradients(model), theirs)


@pytest.mark.parametrize(("most", "targets"), [(2048, 1024), (40, 1024), (2048, 3), (1, 1)])
def test_packs_cover_each_target_once(most: int, targets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PACK_TOKENS", most)
    monkeypatch.setattr(batches, "PACK_TARGETS", targets)
    made = packs(ROWS, torch.float32, torch.device("cpu"))
    assert len(made) == 1 if most == 2048 and targets == 1024 else len(made) > 1
    found: Counter[tuple[int, int, int]] = Counter()
    for pack in made:
        assert pack.ids.shape == pack.positions.shape == (1, pack.tokens)
        assert len(pack.places) == len(pack.targets) == len(pack.rows)
        for place, token, row in zip(pack.places.tolist(), pack.targets.tolist(), pack.rows.tolist(), strict=True):
            before = int(pack.ids[0, place])
            found[row, before, token] += 1
    wanted: Counter[tuple[int, int, int]] = Counter()
    for n, row in enumerate(ROWS):
        for target in row.continuations:
            wanted.update((n, before, token) for before, token in zip((row.prompt[-1], *target), target, strict=False))
    assert found == wanted


@pytest.mark.parametrize("most", [1, 40])
def test_cutting_a_step_into_passes_changes_nothing(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    whole, _ = _step(model, ROWS, next_token)
    wanted = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(batches, "PACK_TOKENS", most)
    value, _ = _step(model, ROWS, next_token)
    assert value == pytest.approx(whole, abs=1e-5)
    equal(gradients(model), wanted)


def test_steps() -> None:
    rows = [Row((n,), ((1,),)) for n in range(1, 11)]
    epochs = list(islice(steps(rows, 4, 7), 9))
    assert [len(s) for s in epochs] == [4, 4, 2] * 3
    orders = [sum(epochs[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(o, key=lambda r: r.prompt) == rows for o in orders)
    assert orders[0] != orders[1] != orders[2]
    assert epochs == list(islice(steps(rows, 4, 7), 9))
    assert epochs != list(islice(steps(rows, 4, 8), 9))


def test_tokens_per_row() -> None:
    apart = [Row((n,) * 10, ((1, 2, 3),)) for n in range(1, 9)]
    assert tokens_per_row(apart, 4, 0) == 12  # the last token of a target is never read
    shared = [Row(HEAD + (n,), ((1,),)) for n in range(1, 9)]
    assert tokens_per_row(shared, 8, 0) == (len(HEAD) + 8) / 8


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_merged_linear_by_autograd() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (2, 6), (5, 2)))
    w, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for one in (None, bias):
        assert torch.autograd.gradcheck(lambda x, a, b, one=one: _MergedLinear.apply(x, w, one, a, b, 0.7), (x, a, b))


def lora(family: str, seed: int = 0) -> Any:
    """A tiny model with an adapter whose B is not zero, as after some training."""
    model = make_model(family)
    model.requires_grad_(False)
    tuned = add_lora(model, 4, 8, seed)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1)
    return tuned


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])  # without bias, with bias, with transposed weights
def test_merged_products_equal_peft(family: str) -> None:
    tuned = lora(family)
    value, _ = _step(tuned, ROWS, next_token)
    wanted = gradients(tuned)
    assert wanted and all("lora_" in name for name in wanted)
    tuned.zero_grad()
    own = [m for m in tuned.modules() if "forward" in vars(m)]
    with merged_products(tuned):
        changed = [m for m in tuned.modules() if "forward" in vars(m)]
        assert len(changed) - len(own) == (0 if family == "gpt2" else 2 * 7)
        found, _ = _step(tuned, ROWS, next_token)
        ids = torch.tensor([HEAD])
        merged = tuned(input_ids=ids).logits
    assert [m for m in tuned.modules() if "forward" in vars(m)] == own
    assert found == pytest.approx(value, abs=1e-5)
    equal(gradients(tuned), wanted, within=1e-5)
    assert torch.allclose(merged, tuned(input_ids=ids).logits, atol=1e-5)


def test_merged_products_nest_and_survive_exceptions() -> None:
    tuned = lora("llama")
    with merged_products(tuned):
        with merged_products(tuned):
            pass
        assert any("forward" in vars(m) for m in tuned.modules())  # the outer one still holds
        with pytest.raises(RuntimeError, match="halt"), merged_products(tuned):
            raise RuntimeError("halt")
    assert not any("forward" in vars(m) for m in tuned.modules())


def test_bf16_layers_are_left_to_peft() -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    tuned = add_lora(model.requires_grad_(False), 4, 8, 0)
    with merged_products(tuned):
        assert not any("forward" in vars(m) for m in tuned.modules())


def test_add_lora_is_repeatable_and_leaves_the_generator() -> None:
    state = torch.random.get_rng_state()
    one, two, other = (dict(lora("llama", seed).named_parameters()) for seed in (3, 3, 4))
    # `lora` draws B itself; A is what the seed decides.
    names = [n for n in one if "lora_A" in n]
    assert len(names) == 14
    assert all(torch.equal(one[n], two[n]) for n in names)
    assert not any(torch.equal(one[n], other[n]) for n in names)
    torch.random.set_rng_state(state)
    add_lora(make_model("llama"), 4, 8, 0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_fresh_lora_changes_nothing() -> None:
    ids = torch.tensor([HEAD])
    wanted = make_model("llama")(input_ids=ids).logits
    tuned = add_lora(make_model("llama").requires_grad_(False), 4, 8, 0)
    assert torch.equal(tuned(input_ids=ids).logits, wanted)
    assert {n.split(".")[-3] for n, p in tuned.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_module_is_as_it_was_after_an_adapter(family: str) -> None:
    model = make_model(family).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    attributes = set(vars(model))
    rows = learnable(0)

    def training(seed: int) -> Curves:
        with adapted(model, 4, 8, seed) as tuned, merged_products(tuned):
            return train(tuned, steps(rows, 6, 0), next_token, Settings(Schedule(1e-2, 3)))

    first = training(0)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == kinds
    assert set(vars(model)) == attributes
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert training(0).train == first.train  # nothing of the first is left in the second
    assert training(1).train != first.train
    with pytest.raises(RuntimeError, match="halt"), adapted(model, 4, 8, 0):
        raise RuntimeError("halt")
    assert [type(m) for m in model.modules()] == kinds


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_schedule_closed_form() -> None:
    schedule = Schedule(1.0, 100)
    rates = [schedule.at(n) for n in range(101)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])  # 6 steps of warm-up
    assert rates[6:71] == [1.0] * 65
    assert rates[71:] == pytest.approx([n / 30 for n in range(29, -1, -1)])  # 30 steps of decay
    assert Schedule(2e-3, 100).at(50) == 2e-3
    assert [Schedule(1.0, 1).at(n) for n in (0, 1)] == [1.0, 0.0]
    assert [Schedule(1.0, 4, warmup=0.5, decay=0.5).at(n) for n in range(4)] == [0.5, 1.0, 1.0, 0.5]
    # It can be continued: a longer run differs only once the shorter one decays.
    longer = Schedule(1.0, 200, warmup=0.03, decay=0.15)
    assert [longer.at(n) for n in range(71)] == pytest.approx(rates[:71])


def learnable(seed: int) -> list[Row]:
    """Rows with something to learn: the answer depends on the prompt's last token."""
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 3, (24,), generator=draw).tolist()
    return [Row((*HEAD[:28], 100 + n, 200 + kind), ((50 + kind, 2),)) for n, kind in enumerate(kinds)]


def fit(seed: int, validate: bool = True, **settings: Any) -> tuple[Any, Curves]:
    model = make_model("llama")
    rows, held = learnable(0), learnable(1)[:8]
    schedule = Schedule(settings.pop("learning_rate", 1e-2), settings.pop("steps", 12))
    session = TorchSession(model, make_tokenizer())

    def check() -> float:
        found = [v for row in session.score_rows(held) for c in row for v in c]
        return -sum(found) / len(found)

    curves = train(
        model, steps(rows, 6, seed), next_token, Settings(schedule, **settings), check if validate else None
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
    curves = train(model, steps(learnable(0), 6, 0), next_token, settings, check)
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

    def breaking(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return next_token(logits, targets) * (bad if calls[0] == 6 else 1.0)

    def check() -> float:
        good.append([p.detach().clone() for p in model.parameters()])
        return 1.0 / len(good)

    settings = Settings(Schedule(4e-3, 10), validations=5)
    with pytest.raises(MethodError, match=r"not finite at step 6.*learning_rate=0\.001$"):
        train(model, steps(learnable(0), 6, 0), breaking, settings, check)
    assert len(good) == 3  # before the first step, and after the second and the fourth
    assert same(model.parameters(), good[-1])


def test_gradients_are_clipped() -> None:
    model = make_model("llama")
    before = [p.detach().clone() for p in model.parameters()]
    train(model, steps(learnable(0), 6, 0), next_token, Settings(Schedule(1e-3, 1), clip=0.0))
    # With every gradient clipped to nothing, AdamW moves nothing.
    assert max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), before, strict=True)) < 1e-5


def test_beats_tell_every_step() -> None:
    told: list[Any] = []
    model = make_model("llama")
    curves = train(model, steps(learnable(0), 6, 0), next_token, Settings(Schedule(1e-3, 4)), beat=told.append)
    assert [(b.step, b.steps) for b in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(b.tokens, b.loss) for b in told] == list(curves.train)


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
        schedule = Schedule(1e-4, 40, warmup=0.0, decay=0.0)
        return model, train(model, steps(learnable(0), 6, 0), next_token, Settings(schedule))

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
        ([2.0, 1.5, 1.2, 1.0], [2.0, 1.0], "too short to tell"),
        ([2.0, 1.0, 0.5], [2.0, 1.0, 0.5], "too short to tell"),
        ([2.0, 1.0, 0.5, 0.4], [], "too short to tell"),
    ],
)
def test_verdict(training: list[float], checks: list[float], wanted: str) -> None:
    assert verdict(curves_of(training, checks) if checks else curves_of(training, [1.0])) == wanted


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
    assert sorted(p.name for p in made.iterdir()) == ["adapter", "done.json"]
    assert models.check_transform(transform) == transform.folder
    config = json.loads((transform.folder / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, None)
    # What it cost and how it went is told.
    assert run.spent.trained_tokens > 0
    assert run.spent.training_seconds > 0
    assert run.notes["steps"] == round(2 * run.notes["rows"] / 8)
    assert run.notes["rows"] == len(data.validation(seed=3, most=128)[0]) == 36
    curve = [loss for _, loss in run.notes["curves"]["train"]]
    assert curve[-1] < 0.5 * curve[0]


def test_finetune_trains_nothing_twice(system: System, data: Learnable, home: Path, monkeypatch: Any) -> None:
    first, second = Run(Store(home), seed=3), Run(Store(home), seed=3)
    tuned = METHOD.apply(system, data, first)
    monkeypatch.setattr("whet.train.loop.train", lambda *a, **k: pytest.fail("trained again"))
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
    with merged_products(live.module):
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


def test_a_crash_leaves_nothing_behind(system: System, data: Learnable, home: Path, monkeypatch: Any) -> None:
    def fails(*_: Any) -> str:
        raise RuntimeError("halt")

    monkeypatch.setattr("whet.methods.finetune.hash_files", fails)
    with pytest.raises(RuntimeError, match="halt"):
        METHOD.apply(system, data, Run(Store(home)))
    assert list((home / "artifacts").iterdir()) == []


def test_finetune_without_completions(system: System, home: Path) -> None:
    bare = Learnable("bare", "", "accuracy", train=(Example("1", "a"), Example("2", "b")))
    with pytest.raises(MethodError, match="nothing to train on"):
        METHOD.apply(system, bare, Run(Store(home)))


@pytest.mark.parametrize("setting", [{"rank": 0}, {"batch": 0}, {"learning_rate": 0.0}, {"epochs": -1.0}])
def test_wrong_settings(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive"):
        FineTune(**setting)


def test_rows_are_rendered_as_the_system_renders_them(system: System, home: Path) -> None:
    model, tokenizer = models.load(system.model, home, device="cpu")
    session = TorchSession(model, tokenizer)
    rows, cut = render_rows(system, task_rows(3), session)
    assert cut == 0
    for row, example in zip(rows, task_rows(3), strict=True):
        assert row.prompt == session.encode(system.prompts([example]))[0]
        assert row.continuations == ((*tokenizer(example.completion)["input_ids"], tokenizer.eos_token_id),)
    long = Example("x", "movie " * 400, "positive")
    [row], cut = render_rows(system, [long, Example("y", "no completion"), Example("z", "", text="raw")], session)
    assert cut == 1
    assert len(row.prompt) + len(row.continuations[0]) <= session.context


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


def test_steps_never_end() -> None:
    source: Iterator[list[Row]] = steps([Row((1,), ((2,),))], 5, 0)
    assert [len(s) for s in islice(source, 5)] == [1] * 5
