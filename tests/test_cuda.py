"""The hot code on a GPU against itself on the processor; skipped where there is none."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer

from whet.engine import Sampling, attention
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession
from whet.train import batches, loop
from whet.train.adapters import Adapter, adapted
from whet.train.losses import NextToken

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CARD = torch.device("cuda")
HEAD = tuple(range(10, 60))
ROWS = [
    Row((*HEAD, 100 + n, *range(120, 120 + n)), ((200, 201 + n, 7), (200, 230), (231,))[: 1 + n % 3])
    for n in range(24)
]  # fmt: skip
CHATS = [(("user", f"what is {'the movie ' * n}about?"),) for n in range(1, 9)]


def flat(found: Any) -> torch.Tensor:
    return torch.tensor([value for row in found for continuation in row for value in continuation])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma2", "mistral"])
def test_scores_and_answers_are_the_processors(family: str) -> None:
    tokenizer, model = make_tokenizer(), make_model(family).float()
    here = TorchSession(model, tokenizer)
    wanted, answers = here.score_rows(ROWS), here.generate(CHATS, Sampling(max_tokens=12))
    choices = [tuple(f"{word} {n}" for n in range(40) for word in ("good", "bad"))] * len(CHATS)
    chosen = here.choose(CHATS, choices)
    there = TorchSession(model.to(CARD), tokenizer)
    assert torch.allclose(flat(there.score_rows(ROWS)), flat(wanted), atol=2e-3)
    assert there.generate(CHATS, Sampling(max_tokens=12)) == answers
    best = [max(range(len(row)), key=row.__getitem__) for row in there.choose(CHATS, choices)]
    assert best == [max(range(len(row)), key=row.__getitem__) for row in chosen]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 77), (50, 50), (300, 300), (129, 40)])
def test_the_flash_kernel_equals_the_blocks(
    causal: bool, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if causal and queries != keys:
        pytest.skip("causal parts read themselves")
    torch.manual_seed(0)
    q, grad = (torch.randn(3, 6, queries, 64, device=CARD, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(3, 2, keys, 64, device=CARD, dtype=torch.bfloat16) for _ in range(2))
    assert attention._flashes(q, None)

    def both(*xs: torch.Tensor) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        out, lse = attention._attend(xs[0], xs[1], xs[2], causal, None, 0.125, kept)
        # As where a part is merged with another, which takes half of the weight.
        merged = lse + 0.7
        back = attention._attend_backward(
            xs[3], xs[0], xs[1], xs[2], out, merged.contiguous(), lse, causal, None, 0.125, iter(kept)
        )
        return [out, lse, *back]

    found = both(q, k, v, grad)
    monkeypatch.setattr(attention, "_flashes", lambda q, mask: False)
    wanted = both(*(x.float() for x in (q, k, v, grad)))
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.float() - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_step_is_the_processors(family: str, dtype: torch.dtype) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = make_model(family).to(device, torch.float32 if device == "cpu" else dtype)
        value, _ = loop._step(model, model, ROWS, NextToken())
        grads = torch.cat([p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None])
        found.append((value, grads))
    (value, grads), (there, others) = found
    within = 1e-4 if dtype == torch.float32 else 0.1
    assert there == pytest.approx(value, rel=within)
    assert (others - grads).norm() <= within * grads.norm()


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_training_that_was_stopped_goes_on_bit_by_bit(kind: str, tmp_path: Path) -> None:
    def run(stop: int | None, keep: Path) -> list[torch.Tensor]:
        model = make_model("llama").to(CARD, torch.bfloat16)
        source = batches.steps(ROWS, 8, 0)

        def asked(step: int) -> list[Row]:
            if step == stop:
                raise KeyboardInterrupt
            return source(step)

        with adapted(model, Adapter(kind), 0) as tuned:
            settings = loop.Settings(loop.Schedule(1e-3, 8))
            try:
                loop.train(tuned, asked, NextToken(), settings, keep=keep)
            except KeyboardInterrupt:
                return []
            return [p.detach().clone() for p in tuned.parameters() if p.requires_grad]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "KEEP_EVERY", 0.0)
        patch.setattr(loop, "WRITING_SHARE", 1e9)
        whole = run(None, tmp_path / "a.safetensors")
        assert run(5, tmp_path / "b.safetensors") == []
        again = run(None, tmp_path / "b.safetensors")
    assert len(whole) == len(again) > 0
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_samples_repeat() -> None:
    session = TorchSession(make_model("llama").to(CARD, torch.bfloat16), make_tokenizer())
    sampling = Sampling(max_tokens=12, temperature=0.8, top_p=0.9, n=3, seed=5)
    once = session.generate(CHATS, sampling)
    assert session.generate(CHATS, sampling) == once
    assert session.generate(CHATS, replace(sampling, seed=6)) != once


def test_a_training_leaves_no_warning_and_torch_as_it_was() -> None:
    model = make_model("llama").to(CARD, torch.bfloat16)
    with adapted(model, Adapter(), 0) as tuned, warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.train(tuned, batches.steps(ROWS, 8, 0), NextToken(), loop.Settings(loop.Schedule(1e-3, 3)))
    assert not torch.are_deterministic_algorithms_enabled()
