"""Tiny random models of several families and a small real tokenizer, for the tests of the hot code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Gemma's and Mistral's: no system turn, and user and assistant must alternate.
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "__mask__")  # the last one can overlap with itself
TEXT = (
    "the movie was a great and funny story of the people in the city, and it was not bad at all. "
    "what is the question? the answer is positive or negative: a review of the film. "
) * 3

# Families whose attention is shared at any length, and those that run unshared at once or for long rows.
SHARED = ("llama", "qwen2", "qwen3", "gpt2", "gemma")
UNSHARED = ("gemma2", "gpt_oss", "mistral")
WINDOW = 12  # Mistral's sliding window


def make_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges: every text is encodable, and turns are marked by special tokens."""
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    raw.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "__mask__"], chat_template=template,
    )  # fmt: skip


def _config(family: str, context: int) -> Any:
    common = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": context,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.25,
    }  # fmt: skip
    if family == "llama":
        return LlamaConfig(**common)
    if family == "qwen2":
        return Qwen2Config(**common)
    if family == "qwen3":
        return Qwen3Config(**common, head_dim=8)
    if family == "gpt2":
        return GPT2Config(
            vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=context, initializer_range=0.25,
            bos_token_id=0, eos_token_id=2,
        )  # fmt: skip
    if family == "opt":
        return OPTConfig(
            vocab_size=300, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=context, bos_token_id=0, eos_token_id=2, pad_token_id=0,
            init_std=0.25,
        )  # fmt: skip
    if family == "gemma":
        return GemmaConfig(**common, head_dim=16)
    if family == "gemma2":
        return Gemma2Config(
            **common, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=8,
            tie_word_embeddings=False,  # tied random weights would only repeat the last token
        )  # fmt: skip
    if family == "gpt_oss":
        return GptOssConfig(
            **common, head_dim=8, num_local_experts=2, num_experts_per_tok=2, sliding_window=128,
            layer_types=["full_attention", "full_attention"],
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )  # fmt: skip
    assert family == "mistral"
    return MistralConfig(**common, head_dim=8, sliding_window=WINDOW)


def make_model(family: str, seed: int = 0, context: int = 512, dtype: torch.dtype = torch.float32) -> Any:
    """A random model on the CPU; weights are large enough that predictions differ from token to token."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = Auto.from_config(_config(family, context), dtype=dtype)
        with torch.no_grad():  # norms and biases start as constants, which would hide mistakes in them
            for value in model.parameters():
                if value.dim() == 1:
                    value.add_(0.2 * torch.randn_like(value))
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def save_model(
    folder: Path, family: str = "llama", *, template: str = CHATML, seed: int = 0, context: int = 512
) -> str:
    """Save a tiny model with its tokenizer as a folder that `model.resolve` takes; returns its path."""
    make_model(family, seed, context).save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return str(folder)


def reference(module: Any, prompt: tuple[int, ...], continuation: tuple[int, ...]) -> list[float]:
    """Log-probability of each token of a continuation, by one plain forward over prompt and continuation."""
    ids = torch.tensor([[*prompt, *continuation]])
    with torch.no_grad():
        logprobs = module(input_ids=ids).logits[0].float().log_softmax(-1)
    start = len(prompt) - 1
    return [float(logprobs[start + i, token]) for i, token in enumerate(continuation)]


def reference_rows(module: Any, rows: Any) -> list[list[list[float]]]:
    """`reference` of every continuation of every row, one at a time."""
    return [[reference(module, r.prompt, c) for c in r.continuations] for r in rows]
