"""The quick step of decoding against the model's own."""

from __future__ import annotations

import pytest
import torch
from models import make_model, make_tokenizer

from whet.engine import Sampling, quick
from whet.engine.torch import TorchSession
from whet.train.adapters import Adapter, adapted

PROMPTS = [(("user", "the movie was great"),), (("user", "the movie was not bad at all, a funny story of people"),)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("count", [1, 2])
def test_answers_are_those_of_the_module(family: str, count: int) -> None:
    made = []
    for allowed in (None, False):
        session = TorchSession(make_model(family), make_tokenizer())
        session.quick = allowed
        made.append(session.generate(PROMPTS[:count], Sampling(12)))
        assert session.quick is (allowed is None)
    assert made[0] == made[1]


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_other_families_take_their_own_way(family: str) -> None:
    assert quick.step_of(make_model(family)) is None


def test_step_that_differs_is_not_taken() -> None:
    own = torch.randn(2, 50)
    assert quick.agrees(own + 1e-5, own)
    assert not quick.agrees(own + 0.1, own)
    session = TorchSession(make_model("llama"), make_tokenizer())
    for layer in session.module.model.layers:  # as in families that add one to it
        layer.input_layernorm.forward = lambda x, n=layer.input_layernorm: type(n).forward(n, x) + x
    session.generate(PROMPTS, Sampling(4))
    assert session.quick is False


def test_adapters_that_come_and_go_are_seen() -> None:
    session = TorchSession(make_model("llama"), make_tokenizer())
    before = session.generate(PROMPTS, Sampling(8))
    with adapted(session.module, Adapter(rank=4), 0) as tuned:
        with torch.no_grad():
            for name, value in tuned.named_parameters():
                if "lora_B" in name:
                    value.normal_(std=0.5)
        live = TorchSession(tuned, session.tokenizer)
        changed = live.generate(PROMPTS, Sampling(8))
        live.quick = False
        assert changed == live.generate(PROMPTS, Sampling(8)) != before
    assert session.generate(PROMPTS, Sampling(8)) == before
