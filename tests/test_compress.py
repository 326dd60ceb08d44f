"""Compression: the folder that holds packed and tied layers, and what makes them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import SHARED, make_model, make_tokenizer

from whet.compress import folder as folders
from whet.compress.layers import Codebook, Relaxed
from whet.errors import ModelError
from whet.model import ModelRef, Transform, hash_files, load, resolve
from whet.probe import ASKED, FEWEST, PROMPTS, main, peak_memory
from whet.system import System
from whet.task import Example

IDS = torch.tensor([[5, 9, 40, 7, 120, 33]])


def logits(module: torch.nn.Module) -> torch.Tensor:
    """Logits of a few tokens."""
    with torch.no_grad():
        return module(input_ids=IDS).logits


@pytest.mark.parametrize("family", SHARED)
def test_folder_gives_back_what_was_saved(family: str, tmp_path: Path) -> None:
    module = make_model(family, dtype=torch.bfloat16)
    folders.save(module, make_tokenizer(), tmp_path / "m")
    again = folders.load(tmp_path / "m", torch.bfloat16)
    assert torch.equal(logits(module), logits(again))
    if module.config.tie_word_embeddings:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_ties_and_terms_of_rank_two_are_kept_once(tmp_path: Path) -> None:
    module = make_model("llama", dtype=torch.bfloat16)
    first, second = (layer.mlp for layer in module.model.layers)
    second.up_proj.weight = first.up_proj.weight
    name = "model.layers.1.mlp.up_proj"
    folders.relax(module, [name], [torch.randn(2, 32).bfloat16()], [torch.randn(64, 2).bfloat16()])
    folders.save(module, make_tokenizer(), tmp_path / "m")
    body = json.loads((tmp_path / "m" / folders.FILE).read_text())
    assert body["modules"] == {name: {"kind": "relaxed", "rank": 2}}
    assert body["aliases"][f"{name}.base.weight"] == "model.layers.0.mlp.up_proj.weight"
    again = folders.load(tmp_path / "m", torch.bfloat16)
    layer = again.get_submodule(name)
    assert isinstance(layer, Relaxed) and layer.base.weight is again.model.layers[0].mlp.up_proj.weight
    assert torch.equal(logits(module), logits(again))


def test_what_is_shared_stays_one_on_another_device(tmp_path: Path) -> None:
    module = make_model("llama", dtype=torch.bfloat16)
    first, second = (layer.mlp for layer in module.model.layers)
    codes, book = torch.randint(0, 4, (64, 16), dtype=torch.uint8), torch.nn.Parameter(torch.randn(64, 4))
    first.up_proj, second.up_proj = Codebook(codes, book, None, 32), Codebook(codes, book, None, 32)
    folders.save(module, make_tokenizer(), tmp_path / "m")
    made = Transform("model", hash_files([*(tmp_path / "m").iterdir()]), tmp_path / "m")
    again, _ = load(ModelRef("x", "x").add(made), tmp_path, device="meta")
    first, second = (layer.mlp.up_proj for layer in again.model.layers)
    assert first.codes.is_meta and first.codes is second.codes  # parameters are kept one by torch itself


def test_memory_is_the_gpus_where_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    host = peak_memory()
    assert 10e6 < host < 1e12
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 10**13)
    assert peak_memory() < 1e12  # none is in use
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert peak_memory() == 10**13
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 10**6)
    assert peak_memory() == 10**6  # what its libraries take of the host says nothing of the model


def probed(ref: ModelRef, home: Path, monkeypatch: pytest.MonkeyPatch, answers: Callable[..., object]) -> None:
    """Run the probe in this process, on a System of a model and PROMPTS rows; `answers` stands for answering."""
    saved = System(ref, home=home).save(home / "system")
    rows = [{key: getattr(Example(str(n), f"what {n}?"), key) for key in ASKED} for n in range(PROMPTS)]
    monkeypatch.setattr(sys, "argv", ["probe", str(saved), "exact_match"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(rows)))
    monkeypatch.setenv("WHET_HOME", str(home))
    monkeypatch.setattr(System, "answers", answers)
    main()


@pytest.mark.parametrize("seconds, asked", [(1e9, 1 + PROMPTS), (0.0, 1 + FEWEST)])
def test_of_long_answers_fewer_are_timed(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    seconds: float, asked: int,
) -> None:  # fmt: skip
    ref, done, answers = resolve(model_folder), list[str](), System.answers
    monkeypatch.setattr("whet.probe.SECONDS", seconds)
    probed(ref, tmp_path, monkeypatch, lambda self, some: done.extend(e.id for e in some) or answers(self, some))
    assert done == ["0", *(str(n) for n in range(asked - 1))]
    assert json.loads(capsys.readouterr().out)["latency_ms"] > 0


def test_latency_is_the_median_of_the_answers_behind_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, took = [0.0], iter([5.0, 0.007, 0.001, 0.003, 0.002, 0.009, 0.004, 0.03, 0.02])
    monkeypatch.setattr("whet.probe.time", SimpleNamespace(perf_counter=lambda: now[0]))
    probed(resolve("fake:hash"), tmp_path, monkeypatch, lambda *_: now.append(now.pop() + next(took)))
    assert json.loads(capsys.readouterr().out)["latency_ms"] == pytest.approx((4 + 7) / 2)


def test_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folders.save(make_model("llama"), make_tokenizer(), tmp_path / "m")
    file = tmp_path / "m" / folders.FILE
    body = json.loads(file.read_text())
    file.write_text(json.dumps({**body, "modules": {"model.layers.0.mlp.up_proj": {"kind": "magic"}}}))
    with pytest.raises(ModelError, match="unknown kind"):
        folders.load(tmp_path / "m", torch.float32)
    file.write_text(json.dumps({**body, "modules": {"model.layers.0.mlp.up_proj": {"kind": "relaxed", "rank": 2}}}))
    with pytest.raises(ModelError, match="do not fit"):
        folders.load(tmp_path / "m", torch.float32)
