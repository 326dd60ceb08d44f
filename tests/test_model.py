"""Models: found by name, refused in one line, never unpickled; and the embedded one, for real."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import save_model

from whet.engine import Sampling
from whet.engine.torch import TorchSession
from whet.errors import ModelError
from whet.model import DEFAULT, ModelRef, aside, compute_dtype, hash_files, load, loaded_before, resolve
from whet.prompt import messages, render


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_model(tmp_path / "tiny"))


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


def test_code_of_a_model_is_never_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(ModelError, match="cannot load"):
        load(resolve(str(folder)), tmp_path / "home")
    assert not marker.exists()


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
    assert resolve("openai:m@http://127.0.0.1:1/v1") == ModelRef("openai:m@http://127.0.0.1:1/v1", "openai:m@http://127.0.0.1:1/v1")


def test_a_folder_written_aside_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), aside(tmp_path / "made") as work:
        (work / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):  # what is there already is kept
        with aside(tmp_path / "made") as work:
            (work / "file").write_text(text)
    assert (tmp_path / "made" / "file").read_text() == "first"
    assert hash_files([tmp_path / "made" / "file"]) == hash_files([tmp_path / "made" / "file"])


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
