"""Models: found by name, refused in one line, never unpickled; and the embedded one, for real."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import save_model

from whet.engine import Sampling
from whet.engine.torch import TorchSession
from whet.errors import ModelError, StoreError
from whet.metrics import Outcome
from whet.model import (
    DEFAULT,
    ModelRef,
    aside,
    compute_dtype,
    hash_files,
    load,
    loaded_before,
    own_device,
    resolve,
    shards,
)  # fmt: skip
from whet.probe import probe
from whet.prompt import messages, render
from whet.store import Store, anew, write_text
from whet.system import System
from whet.task import Example


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_model(tmp_path / "tiny"))


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device() == "cpu" and not taken
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device() == "cuda" and taken == [3]
    monkeypatch.delenv("LOCAL_RANK")
    assert own_device() == "cuda" and taken == [3]


@pytest.mark.parametrize(
    ("lose", "says"),
    [
        ("config.json", "expected a config.json"),
        ("*.safetensors", "expected model.safetensors"),
        ("tokenizer.json", "has no tokenizer"),
        ("chat_template.jinja", "has no chat template"),
    ],
)
def test_a_folder_that_lacks_something(folder: Path, tmp_path: Path, lose: str, says: str) -> None:
    for file in folder.glob(lose):
        file.unlink()
    with pytest.raises(ModelError, match=says) as raised:
        load(resolve(str(folder)), tmp_path / "home")
    assert "\n" not in str(raised.value)


def test_pickles_are_never_loaded(folder: Path) -> None:
    next(folder.glob("*.safetensors")).rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights"):
        resolve(str(folder))


def test_code_of_a_model_is_never_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *asked: "y")  # as if someone would agree to it, being asked
    marker = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(ModelError, match="cannot load"):
        load(resolve(str(folder)), tmp_path / "home")
    assert not marker.exists()


def test_weights_that_were_quantized_elsewhere_say_what_they_need(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot load .*ImportError.*take the model in 16 bits"):
        load(resolve(str(folder)), tmp_path / "home")


def test_names_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="cannot find the model 'no/such-model'"):
        resolve("no/such-model")
    with pytest.raises(ModelError, match="GGUF file"):
        resolve("missing.gguf")


def test_identity_is_of_contents_not_of_paths(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    assert resolve(str(folder)).identity == resolve(str(copy)).identity
    with next(copy.glob("*.safetensors")).open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    assert resolve(str(folder)).identity != resolve(str(copy)).identity
    ends = tmp_path / "ends"
    shutil.copytree(folder, ends)
    (ends / "generation_config.json").write_text('{"eos_token_id": [1, 2, 3]}')
    assert resolve(str(folder)).identity != resolve(str(ends)).identity
    assert resolve("openai:m@http://127.0.0.1:1/v1") == ModelRef("openai:m@http://127.0.0.1:1/v1", "openai:m@http://127.0.0.1:1/v1")


def test_weights_that_are_there_twice_count_once(folder: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice"
    shutil.copytree(folder, twice)
    whole = twice / "model.safetensors"
    for name in ("model-1-of-2.safetensors", "model-2-of-2.safetensors", "consolidated.safetensors"):
        shutil.copy(whole, twice / name)
    assert shards(twice) == [whole]
    whole.unlink()
    listed = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (twice / "model.safetensors.index.json").write_text(json.dumps(listed))
    named = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    assert [p.name for p in shards(twice)] == named
    (twice / "model.safetensors.index.json").write_text("{")
    assert len(shards(twice)) == 3


def test_an_adapter_beside_a_model_is_refused(folder: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    (mixed / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter beside the model"):
        resolve(str(mixed))


def test_the_process_that_measures_runs_no_code_of_the_working_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("statistics.py", "whet.py", "torch.py"):
        (tmp_path / name).write_text("raise SystemExit('taken in')\n")
    monkeypatch.chdir(tmp_path)
    made = System(resolve(str(folder)), "Say.", home=tmp_path / "home").save(tmp_path / "system")
    latency, memory = probe(made, tmp_path / "home", [Example("1", "hello")])
    assert latency > 0 and memory > 0


def test_a_folder_written_aside_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), aside(tmp_path / "made") as work:
        (work / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):  # what is there already is kept
        with aside(tmp_path / "made") as work:
            (work / "file").write_text(text)
    assert (tmp_path / "made" / "file").read_text() == "first"
    seen = hash_files([*(tmp_path / "made").iterdir()])
    (tmp_path / "made" / ".DS_Store").write_text("where windows lie")
    assert hash_files([*(tmp_path / "made").iterdir()]) == seen


def test_of_two_processes_that_write_a_folder_at_once_the_first_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def late(source: Path, target: Path) -> None:
        target.mkdir()  # between the look and the renaming
        (target / "file").write_text("first")
        rename(source, target)

    monkeypatch.setattr(os, "replace", late)
    with aside(tmp_path / "made") as work:
        (work / "file").write_text("second")
    assert (tmp_path / "made" / "file").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["made"]
    monkeypatch.setattr(os, "replace", lambda *_: rename(tmp_path / "none", tmp_path / "other"))
    with pytest.raises(FileNotFoundError), aside(tmp_path / "other"):
        pass


def test_folders_are_open_to_whom_new_ones_are(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with aside(tmp_path / "kept"):
        pass
    with anew(tmp_path / "written", "mark"):
        pass
    assert len({(tmp_path / n).stat().st_mode for n in ("plain", "kept", "written")}) == 1


def test_an_older_folder_is_put_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with anew(tmp_path / "out", "mark") as work:
        (work / "mark").write_text("old")
    rename = os.replace

    def full(source: Path, target: Path) -> None:
        if source.name == "new":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StoreError, match="No space left"), anew(tmp_path / "out", "mark") as work:
        (work / "mark").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "mark").read_text() == "old"


def test_where_one_stands_cannot_be_renamed_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", str(tmp_path / "here")):
        with pytest.raises(StoreError, match="cannot be put in place whole"), anew(Path(name), "mark"):
            pass
    with anew(Path("within"), "mark") as work:
        (work / "mark").write_text("x")
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["within"]


def test_half_a_surrogate_pair_can_be_kept(tmp_path: Path) -> None:
    store, outcomes = Store(tmp_path), (Outcome("1", "\ud83d", 0.0, "안녕"),)
    store.keep_outcomes("key", outcomes, {})
    store.keep_trial("run", "trial", {"why": "\ud83d"})
    assert store.outcomes("key") == (outcomes, {}) and store.trial("run", "trial") == {"why": "\ud83d"}
    write_text(tmp_path / "answers", "\ud83d 안녕")
    assert (tmp_path / "answers").read_text(encoding="utf-8") == "? 안녕"


def test_what_is_kept_is_never_replaced(tmp_path: Path) -> None:
    store, first, other = Store(tmp_path), (Outcome("1", "a", 1.0, "a"),), (Outcome("1", "b", 0.0, "a"),)
    store.keep_outcomes("key", first, {"seconds": 1.0}, ("scores", {"row": (0.5, 0.25)}))
    store.keep_outcomes("key", other, {"seconds": 2.0}, ("scores", {"row": (0.0, 0.0), "new": (1.0, 2.0)}))
    assert Store(tmp_path).outcomes("key") == (first, {"seconds": 1.0})
    assert store.scores("scores") == {"row": (0.5, 0.25), "new": (1.0, 2.0)}


def test_a_file_that_is_no_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "whet.sqlite").write_bytes(b"no database " * 99)
    with pytest.raises(StoreError, match="cannot use the store .* found file is not a database; set WHET_HOME"):
        Store(tmp_path)
    assert (tmp_path / "whet.sqlite").read_bytes() == b"no database " * 99
    store = Store(tmp_path / "other")
    with sqlite3.connect(store.file) as base:
        base.execute("drop table trials")
    with pytest.raises(StoreError, match="cannot read .* no such table: trials; move it away"):
        store.trial("run", "trial")


def test_nothing_that_only_unix_has_is_needed_to_start() -> None:
    hidden = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None"
    subprocess.run([sys.executable, "-c", f"{hidden}; import whet.cli, whet.probe, whet.retrieval"], check=True)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TorchSession]:
    """The real embedded model, unpacked once, computing in fp32."""
    home = tmp_path_factory.mktemp("home")
    ref = resolve(DEFAULT)
    assert not loaded_before(ref, home)
    module, tokenizer = load(ref, home, dtype=torch.float32)
    return home, TorchSession(module, tokenizer)


def test_the_embedded_model_is_unpacked_once_to_bf16(embedded: tuple[Path, TorchSession]) -> None:
    from safetensors import safe_open

    home, session = embedded
    ref = resolve(DEFAULT)
    assert loaded_before(ref, home)
    with safe_open(home / "models" / ref.content / "model.safetensors", "pt") as file:
        kinds = {str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}
    again, _ = load(ref, home, dtype=torch.float32)
    weights = dict(session.module.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in again.named_parameters())
    assert compute_dtype() in (torch.bfloat16, torch.float32)


def test_the_embedded_model_scores_as_transformers_does(embedded: tuple[Path, TorchSession]) -> None:
    _, session = embedded
    shown = [("a joyless mess", "negative"), ("warm and funny", "positive")]
    texts = ["a fine film", "dull , dull , dull", "it has its moments , few as they are"]
    prompts = [messages("Say whether the review is positive or negative.", shown, t) for t in texts]
    found = session.score(prompts, [["negative", "very positive"]] * 3, end=True)
    for prompt, row in zip(prompts, found, strict=True):
        start = session.tokenizer(render(session.tokenizer, prompt), add_special_tokens=False)["input_ids"]
        for text, score in zip(["negative", "very positive"], row, strict=True):
            answer = [*session.tokenizer(text)["input_ids"], session.tokenizer.eos_token_id]
            with torch.inference_mode():
                logits = session.module(torch.tensor([[*start, *answer]])).logits[0].log_softmax(-1)
            wanted = sum(float(logits[len(start) - 1 + i, token]) for i, token in enumerate(answer))
            assert score.logprob == pytest.approx(wanted, abs=1e-3)


def test_the_embedded_model_answers(embedded: tuple[Path, TorchSession]) -> None:
    _, session = embedded
    made = session.generate([messages("", [], "What is the capital of France?")], Sampling(max_tokens=12))
    assert "Paris" in made[0][0].text
