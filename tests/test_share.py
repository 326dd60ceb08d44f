"""Sharing: tied layers, the terms beside them, clustered weights, and adapters that cannot be merged into them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer, reference_rows
from sklearn.cluster import KMeans
from test_prune import LABELS, LOOK, ROWS, data, deep, logits, save, session
from torch import nn

from whet import model as models
from whet.compress import folder as folders
from whet.compress.calibration import norms
from whet.compress.codebook import clustered
from whet.compress.layers import Codebook, Relaxed
from whet.compress.structure import layers, parameters, size
from whet.compress.tying import low_rank, projections, runs, tie
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession
from whet.errors import MethodError, ModelError
from whet.methods import Run
from whet.methods.finetune import FineTune
from whet.methods.prune import Prune
from whet.methods.share import Share
from whet.model import ModelRef, Transform, hash_files
from whet.store import Store
from whet.system import System, load
from whet.task import Learnable
from whet.train.adapters import Adapter, adapted
from whet.train.batches import steps
from whet.train.lesson import keep
from whet.train.loop import Schedule, Settings, operations, train
from whet.train.losses import NextToken

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2")
__all__ = ["data"]  # the fixture


def inputs(module: Any) -> dict[str, torch.Tensor]:
    """The norms of what goes into each linear layer, by its name."""
    named = {n: m for layer in projections(module) for n, m in layer.items()}
    return dict(zip(named, norms(session(module), LOOK.rows, list(named.values())), strict=True))


def tied(module: Any, groups: int, **changes: Any) -> Any:
    return tie(module, groups, inputs(module), **changes)[0]


# --- which layers are tied --------------------------------------------------------------------------------------------


def test_runs_are_even_and_leave_the_outer_layers_alone() -> None:
    def found(count: int, groups: int) -> list[list[int]]:
        return [list(r) for r in runs(count, groups)]

    assert found(6, 6) == [[0], [1], [2], [3], [4], [5]]
    assert found(6, 4) == [[0], [1, 2], [3, 4], [5]]
    assert found(6, 3) == [[0], [1, 2, 3, 4], [5]]
    assert found(6, 2) == [[0, 1, 2], [3, 4, 5]] and found(6, 1) == [[0, 1, 2, 3, 4, 5]]
    for count in range(1, 33):
        for groups in range(1, count + 1):
            parts = found(count, groups)
            inner = [len(p) for p in (parts[1:-1] if groups > 2 else parts)]
            assert sum(parts, []) == list(range(count)) and len(parts) == groups
            assert not inner or max(inner) - min(inner) <= 1
            assert groups < 3 or len(parts[0]) == len(parts[-1]) == 1


# --- ties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights_are_one_parameter_at_the_mean(family: str) -> None:
    module = deep(family, 6)
    before = logits(module)
    made, parts = tie(module, 4, inputs(module))
    assert [list(p) for p in parts] == [[0], [1, 2], [3, 4], [5]]
    old, new = projections(module), projections(made)
    for number, layer in enumerate(new):
        for name, one in layer.items():
            own = old[number][name]
            if number in (0, 5):
                assert one.weight is own.weight
                continue
            first = number if number % 2 else number - 1
            short = name.replace(f"layers.{number}.", f"layers.{first}.")
            other = short.replace(f"layers.{first}.", f"layers.{first + 1}.")
            assert one.weight is new[first][short].weight
            mean = (old[first][short].weight + old[first + 1][other].weight) / 2
            assert torch.allclose(one.weight, mean, atol=1e-7)
            assert one.bias is own.bias  # of its own, as the norms
    norm = [m for m in made.modules() if type(m).__name__.endswith("RMSNorm")]
    assert len({id(m.weight) for m in norm}) == len(norm)
    one_layer = sum(m.weight.numel() for m in old[0].values())
    assert parameters(module) - parameters(made) == 2 * one_layer
    assert torch.equal(logits(module), before) and folders.plain(module) and not folders.plain(made)
    for found, wanted in zip(session(made).score_rows(ROWS), reference_rows(made, ROWS), strict=True):
        assert found[0] == pytest.approx(wanted[0], abs=1e-4)


def test_a_term_of_full_rank_gives_everything_back() -> None:
    module = deep(count=6)
    made = tied(module, 3, rank=32)
    assert torch.allclose(logits(made), logits(module), atol=2e-4)
    narrow = deep(count=6, dtype=torch.bfloat16)
    apart = (logits(tied(narrow, 3, rank=32)) - logits(narrow)).float().abs().max()
    assert float(apart) < 0.05 * float(logits(narrow).float().abs().max())
    fresh = tied(module, 3, rank=32, start="mean")  # a term that adds nothing yet
    assert torch.equal(logits(fresh), logits(tied(module, 3)))
    again = tied(module, 3, rank=32, start="mean", seed=1)
    name = "model.layers.2.mlp.up_proj"
    assert not torch.equal(fresh.get_submodule(name).down, again.get_submodule(name).down)


def test_a_term_leaves_the_least_error() -> None:
    torch.manual_seed(0)
    matrix, norm = torch.randn(12, 20), torch.rand(20) + 0.1
    for rank in (1, 4, 12):
        down, up = low_rank(matrix, rank, norm)
        values = torch.linalg.svdvals(matrix * norm)
        error = float(((matrix - up @ down) * norm).norm())
        assert error == pytest.approx(float(values[rank:].norm()), abs=1e-4)  # Eckart & Young 1936
    # A large one goes another way: as good, and repeatable.
    large = torch.randn(200, 20) @ torch.randn(20, 300) + 0.1 * torch.randn(200, 300)
    ones, state = torch.ones(300), torch.random.get_rng_state()
    down, up = low_rank(large, 8, ones)
    best = float(torch.linalg.svdvals(large)[8:].norm())
    assert float((large - up @ down).norm()) == pytest.approx(best, rel=1e-3)
    assert torch.equal(low_rank(large, 8, ones)[1], up) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_a_family_without_a_rule_is_refused_by_name(family: str) -> None:
    with pytest.raises(MethodError, match=rf"no rule for sharing in {family}.*llama, mistral.*use quantize or distill"):
        projections(make_model(family))


def test_layers_of_unequal_shape_are_refused() -> None:
    module = make_model("llama")
    module.model.layers[1].mlp.up_proj = nn.Linear(32, 48, bias=False)
    with pytest.raises(MethodError, match="no rule for sharing in llama"):
        projections(module)


# --- codebooks --------------------------------------------------------------------------------------------------------


def test_clusters_are_as_good_as_those_of_scikit_learn() -> None:
    torch.manual_seed(0)
    weight, worth = torch.randn(6, 500), torch.rand(500) + 0.05
    for values in (4, 16, 20):
        codes, book = clustered(weight, values, worth)
        layer = Codebook(codes, book, None, 500)
        assert codes.shape == (6, 250 if values <= 16 else 500) and book.shape == (6, values)
        ours = theirs = 0.0
        for row, found in zip(weight, layer.weight, strict=True):
            assert len(set(found.tolist())) <= values
            rival = KMeans(values, n_init=10, random_state=0).fit(row[:, None], sample_weight=worth)
            ours, theirs = ours + float((worth * (row - found) ** 2).sum()), theirs + rival.inertia_
        assert ours <= 1.1 * theirs  # the best of ten starts


def test_few_values_are_kept_as_they_are() -> None:
    torch.manual_seed(0)
    numbers = torch.randn(5, 3)
    weight = numbers.gather(1, torch.randint(0, 3, (5, 33)))  # an odd number of columns: a byte each
    codes, book = clustered(weight, 8, torch.ones(33))
    layer = Codebook(codes, book, nn.Parameter(torch.randn(5)), 33)
    assert torch.allclose(layer.weight, weight, atol=1e-6) and codes.shape == (5, 33)
    x = torch.randn(4, 33, requires_grad=True)
    made = layer(x)
    assert torch.allclose(made, nn.functional.linear(x, weight, layer.bias), atol=1e-5)
    layer.book.requires_grad_(True)
    layer(x).square().sum().backward()
    plain = weight.clone().requires_grad_(True)
    nn.functional.linear(x.detach(), plain, layer.bias.detach()).square().sum().backward()
    wanted = torch.zeros_like(book).scatter_add_(1, codes.long(), plain.grad)
    assert torch.allclose(layer.book.grad, wanted, atol=1e-3)  # a number's gradient: that of all weights that are it
    assert torch.allclose(x.grad, 2 * made.detach() @ weight, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tied_codebooks_and_terms_go_to_disk_once(family: str, tmp_path: Path) -> None:
    module = deep(family, 4, dtype=torch.bfloat16)
    made = tied(module, 3, rank=2, values=16)
    first, second = (made.get_submodule(f"model.layers.{n}.mlp.up_proj") for n in (1, 2))
    assert isinstance(first, Relaxed) and isinstance(first.base, Codebook)
    assert first.base.book is second.base.book and first.base.codes is second.base.codes
    alone = made.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(alone, Codebook)
    folders.save(made, make_tokenizer(), tmp_path / "m")
    again = folders.load(tmp_path / "m", torch.bfloat16)
    assert torch.equal(logits(again), logits(made))
    one, two = (again.get_submodule(f"model.layers.{n}.mlp.up_proj").base for n in (1, 2))
    assert one.book is two.book and one.codes is two.codes
    assert size(again) == size(made)
    written = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert 0 < written - size(made)["bytes"] < 20_000
    rows, columns = 64, 32
    assert first.base.codes.numel() == rows * columns // 2 and first.base.book.numel() == 16 * rows
    norm = [m.down.shape for m in made.modules() if isinstance(m, Relaxed)]
    assert len(norm) == 2 * 7 and norm[0] == (2, 32)


def test_values_are_clustered_as_the_rows_use_them() -> None:
    module = deep(count=2)
    made, seen = tied(module, 2, values=4), inputs(module)
    name = "model.layers.1.mlp.down_proj"
    codes, book = clustered(module.get_submodule(name).weight, 4, seen[name].square())
    assert torch.equal(made.get_submodule(name).codes, codes) and torch.equal(made.get_submodule(name).book, book)


# --- adapters over shared weights -------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {"tied": {}, "relaxed": {"rank": 4}, "codebook": {"rank": 2, "values": 16}}


def lessons() -> list[Row]:
    """Rows whose answer depends on the prompt's last token."""
    return [Row((*range(10, 30), 100 + n, 200 + n % 3), ((50 + n % 3, 2),)) for n in range(24)]


@pytest.fixture
def ref(tmp_path: Path, request: pytest.FixtureRequest, fp32: None) -> ModelRef:
    """A tiny shared model of the kind asked for, as a ModelRef."""
    base = deep(count=4)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    folder = tmp_path / "shared"
    folders.save(tied(base, 3, **SHAPES[request.param]), make_tokenizer(), folder)
    return models.resolve(str(tmp_path / "base")).add(Transform("model", hash_files([*folder.iterdir()]), folder))


def taught(ref: ModelRef, adapter: Adapter, home: Path, name: str) -> tuple[ModelRef, list[Any], list[float]]:
    """The model with what a short training taught; how the live module scored at its end, and the losses."""
    module, tokenizer = models.load(ref, home)
    with adapted(module, adapter, 0) as tuned:
        rate = 1e-3 if adapter.kind == "full" else 1e-2
        curves = train(tuned, steps(lessons(), 12, 0), NextToken(), Settings(Schedule(rate, 12)))
        keep(tuned, adapter, home / name, {"notes": {}, "spent": {}})
        if adapter.kind == "full":
            tuned.to(torch.bfloat16).to(torch.float32)  # as what is kept is rounded
        live = TorchSession(tuned, tokenizer).score_rows(ROWS)
    body = json.loads((home / name / "done.json").read_text())
    made = ref.add(Transform(body["kind"], body["fingerprint"], home / name / "weights"))
    return made, live, [v for _, v in curves.train]


def close(found: list[Any], wanted: list[Any], within: float) -> bool:
    return all(abs(a - b) < within for r, s in zip(found, wanted, strict=True)
               for c, d in zip(r, s, strict=True) for a, b in zip(c, d, strict=True))  # fmt: skip


@pytest.mark.parametrize("ref", SHAPES, indirect=True)
@pytest.mark.parametrize("kind", ["lora", "rslora", "full"])
def test_what_was_trained_on_a_shared_model_is_what_is_loaded(ref: ModelRef, kind: str, tmp_path: Path) -> None:
    made, live, losses = taught(ref, Adapter(kind, 4, 8), tmp_path, "one")
    assert losses[-1] < 0.8 * losses[0]
    module, tokenizer = models.load(made, tmp_path)
    before, _ = models.load(ref, tmp_path)
    start = TorchSession(before, tokenizer).score_rows(ROWS)
    found = TorchSession(module, tokenizer).score_rows(ROWS)
    assert close(found, live, 2e-3) and not close(found, start, 0.1)
    one, two = (module.model.layers[n].mlp.up_proj for n in (1, 2))
    one, two = (m.base if isinstance(m, Relaxed) else m for m in (one, two))
    assert one.book is two.book if isinstance(one, Codebook) else one.weight is two.weight
    if kind == "full":
        assert size(module) == size(before)
        return
    assert all(isinstance(m, Relaxed) for m in (module.model.layers[n].mlp.up_proj for n in range(4)))
    # A second adapter widens the terms of the first.
    more, live, _ = taught(made, Adapter(kind, 2, 4), tmp_path, "two")
    again, _ = models.load(more, tmp_path)
    assert close(TorchSession(again, tokenizer).score_rows(ROWS), live, 2e-3)
    width = again.model.layers[1].mlp.up_proj.down.shape[0]
    assert width == module.model.layers[1].mlp.up_proj.down.shape[0] + 2


@pytest.mark.parametrize("ref", ["tied"], indirect=True)
def test_full_training_moves_a_tied_weight_once(ref: ModelRef, tmp_path: Path) -> None:
    module, _ = models.load(ref, tmp_path)
    with adapted(module, Adapter("full"), 0) as tuned:
        weight = tuned.model.layers[1].mlp.up_proj.weight
        assert tuned.model.layers[2].mlp.up_proj.weight is weight and weight.requires_grad
        assert sum(p is weight for p in tuned.parameters()) == 1
        # Both layers multiply by it.
        untied = sum(m.weight.numel() for layer in projections(tuned) for m in layer.values())
        assert operations(tuned) == 6 * untied + (0 if tuned.config.tie_word_embeddings else 6 * 300 * 32)
        NextToken()  # one step by hand: its gradient is the sum over both places
        ids = torch.tensor([[5, 9, 40]])
        tuned(input_ids=ids).logits.square().sum().backward()
        together = weight.grad.clone()
        apart = copy.deepcopy(tuned).requires_grad_(True)
        for number in (1, 2):
            layer = apart.model.layers[number].mlp.up_proj
            layer.weight = nn.Parameter(weight.detach().clone())
        apart.zero_grad()
        apart(input_ids=ids).logits.square().sum().backward()
        parts = [apart.model.layers[n].mlp.up_proj.weight.grad for n in (1, 2)]
        assert torch.allclose(together, parts[0] + parts[1], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("ref", SHAPES, indirect=True)
def test_dora_is_refused_with_the_reason(ref: ModelRef, tmp_path: Path) -> None:
    module, _ = models.load(ref, tmp_path)
    with (
        pytest.raises(MethodError, match="DoRA rescales the weights beneath it.*set adapter=lora"),
        adapted(module, Adapter("dora", 4, 8), 0),
    ):
        pass


@pytest.mark.parametrize("ref", ["tied"], indirect=True)
def test_a_dora_adapter_from_elsewhere_is_refused(ref: ModelRef, tmp_path: Path) -> None:
    made, _, _ = taught(ref, Adapter("lora", 4, 8), tmp_path, "one")
    folder = made.transforms[-1].folder
    assert folder is not None
    file = folder / "adapter_config.json"
    for change, found in (({"use_dora": True}, "DoRA"), ({"rank_pattern": {"up_proj": 8}}, "several ranks")):
        file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": False, "rank_pattern": {}, **change}))
        odd = ref.add(Transform("adapter", hash_files([*folder.iterdir()]), folder))
        with pytest.raises(ModelError, match=f"shared or packed; expected LoRA of one rank, found {found}"):
            models.load(odd, tmp_path)


def test_an_ordinary_model_is_merged_as_before(tmp_path: Path, fp32: None) -> None:
    deep().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    made, live, _ = taught(models.resolve(str(tmp_path / "base")), Adapter("lora", 4, 8), tmp_path, "one")
    module, tokenizer = models.load(made, tmp_path)
    assert not any(isinstance(m, Relaxed) for m in module.modules())
    assert close(TorchSession(module, tokenizer).score_rows(ROWS), live, 2e-3)


# --- the method -------------------------------------------------------------------------------------------------------


def share(system: System, data: Learnable, home: Path, **settings: Any) -> tuple[System, Run]:
    run = Run(Store(home))
    return Share(**settings).apply(replace(system, home=home), data, run), run


@pytest.mark.parametrize("settings", [{"rank": 0}, {"rank": 4}, {"rank": 2, "values": 16}, {"groups": 0, "values": 16}])
def test_a_shared_system_is_one_folder_that_answers(
    settings: dict[str, Any], data: Learnable, tmp_path: Path, fp32: None
) -> None:
    module = deep(count=6)
    system = save(module, make_tokenizer(), tmp_path / "m")
    made, run = share(system, data, tmp_path / "a", **settings)
    notes = run.notes["share"]
    groups = 6 if settings.get("groups") == 0 else 3
    assert notes["tied"] == ([] if groups == 6 else [[1, 4]])
    assert made.decoding.prior == () and made.model.original == system.model
    # In the closed form: bf16 weights, or half a byte each and 16 numbers a row; and the terms.
    shapes = [(m.weight.shape[0], m.weight.shape[1]) for m in projections(module)[0].values()]
    rest = parameters(module) - 6 * sum(o * i for o, i in shapes)
    rank = settings.get("rank", 16) if groups == 3 else 0
    terms = 4 * rank * sum(o + i for o, i in shapes)
    each = sum(o * i // 2 + 2 * 16 * o if settings.get("values") else 2 * o * i for o, i in shapes)
    assert notes["after"]["bytes"] == 2 * rest + groups * each + 2 * terms
    assert notes["before"]["bytes"] == 2 * parameters(module)
    whole = made.model.whole
    assert whole is not None and whole.folder is not None
    assert 0 < (whole.folder / "model.safetensors").stat().st_size - notes["after"]["bytes"] < 30_000
    live = run.session(made.model)
    assert isinstance(live, TorchSession) and size(live.module)["bytes"] == notes["after"]["bytes"]
    rows = [Row(p, (live.encode_answer("positive", True),)) for p in live.encode(made.prompts(data.train[:3]))]
    for found, wanted in zip(live.score_rows(rows), reference_rows(live.module, rows), strict=True):
        assert found[0] == pytest.approx(wanted[0], abs=1e-4)
    made.save(tmp_path / "system")
    again = load(tmp_path / "system", home=tmp_path / "elsewhere")
    assert again.answer(list(data.train[:8])) == made.answer(list(data.train[:8]), live)


def test_terms_bring_it_nearer(data: Learnable, tmp_path: Path, fp32: None) -> None:
    module = deep(count=6)
    seen = inputs(module)

    def error(rank: int) -> float:
        made = tie(module, 3, seen, rank)[0]
        named = [(n, m) for layer in projections(module) for n, m in layer.items()]
        total = 0.0
        for name, layer in named:
            one = made.get_submodule(name)
            weight = one.base.weight + one.up @ one.down if isinstance(one, Relaxed) else one.weight
            total += float(((layer.weight - weight) * seen[name]).square().sum())
        return total

    errors = [error(rank) for rank in (0, 2, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_sharing_is_repeatable_and_not_repeated(
    data: Learnable, tmp_path: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = save(deep(), make_tokenizer(), tmp_path / "m")
    one, first = share(system, data, tmp_path / "a", groups=3, values=16)
    two, _ = share(system, data, tmp_path / "b", groups=3, values=16)
    assert one.fingerprint == two.fingerprint
    monkeypatch.setattr("whet.compress.tying.tie", lambda *a: pytest.fail("tied again"))
    other = replace(system, decoding=replace(system.decoding, prior=(5.0, -5.0)))  # it does not matter to what is tied
    for one_of in (system, other):
        three, again = share(one_of, data, tmp_path / "a", groups=3, values=16)
        assert three.fingerprint == one.fingerprint and again.notes == first.notes


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_shared_system_is_fine_tuned(adapter: str, data: Learnable, tmp_path: Path, fp32: None) -> None:
    system = save(deep(), make_tokenizer(), tmp_path / "m")
    made, run = share(system, data, tmp_path / "a", groups=3, rank=2)
    rate = 1e-3 if adapter == "full" else 1e-2
    tuned = FineTune(adapter, rank=4, epochs=6.0, batch=8, learning_rate=rate).apply(made, data, run)
    curve = [loss for _, loss in run.notes["curves"]["validation"]]
    assert run.notes["curves"]["best"] > 0 and min(curve) < 0.9 * curve[0]
    tuned.save(tmp_path / "system")
    again = load(tmp_path / "system", home=tmp_path / "elsewhere")
    assert again.fingerprint == tuned.fingerprint
    asked = list(data.train[:8])
    assert again.answer(asked) == tuned.answer(asked, run.session(tuned.model))
    with pytest.raises(MethodError, match="DoRA"):
        FineTune("dora", rank=4).apply(made, data, run)


def test_what_is_shared_is_neither_pruned_nor_shared_again(data: Learnable, tmp_path: Path, fp32: None) -> None:
    system = save(deep(), make_tokenizer(), tmp_path / "m")
    made, run = share(system, data, tmp_path / "a", groups=3, rank=0)
    for method in (Prune(layers=2), Share(groups=2)):
        with pytest.raises(MethodError, match=f"neither shared nor quantized.*put {method.name} before that"):
            method.apply(made, data, run)
    first, run = Prune(layers=3, vocabulary=False).apply(replace(system, home=tmp_path / "a"), data, run), run
    both = Share(groups=2, rank=2).apply(first, data, run)
    assert [t.kind for t in both.model.transforms] == ["model", "model"] and len(both.model.standing) == 1
    live = run.session(both.model)
    assert isinstance(live, TorchSession) and len(layers(live.module)) == 3
    assert set(both.answer(list(data.train[:8]), live)) <= set(LABELS)


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"groups": -1}, {"groups": 2.5}, {"start": "best"}, {"rank": -1}, {"values": 1}, {"values": 257},
                  {"groups": 0}):  # fmt: skip
        with pytest.raises(ValueError):
            Share(**wrong)  # type: ignore[arg-type]


def test_more_groups_than_layers(data: Learnable, tmp_path: Path, fp32: None) -> None:
    system = save(make_model("llama"), make_tokenizer(), tmp_path / "m")
    with pytest.raises(MethodError, match="too many groups; expected at most 2, found 3"):
        share(system, data, tmp_path / "a", groups=3)
