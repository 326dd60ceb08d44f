"""GGUF, what llama.cpp and Ollama load: weights under its names, tokenizer and template as its metadata.

What is not known for certain is refused by name: a tokenizer that is cut differently answers differently, silently.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import ModelError

if TYPE_CHECKING:
    from whet.export import Left

TYPES = ("bf16", "f16", "f32", "q8_0", "q4_0")
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers of the same


@dataclass(frozen=True)
class Family:
    """How a family of transformers is called in GGUF, and what of its weights is written otherwise there."""

    name: str
    permuted: bool = False  # rows of queries and keys: pairs of rotated values lie side by side
    norm: float = 0.0  # added to the weights of norms
    act: str = "silu"
    biased: bool = False  # attention and MLP may have biases
    every: int = 0  # which layers are other than the rest: without positions (SmolLM3) or without a window (Gemma 3)


FAMILIES = {
    "llama": Family("llama", permuted=True, biased=True),
    "mistral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "smollm3": Family("smollm3", permuted=True, every=4),
    "gemma": Family("gemma", norm=1.0, act="gelu_pytorch_tanh"),
    "gemma3_text": Family("gemma3", norm=1.0, act="gelu_pytorch_tanh", every=6),
}

# How text is cut into words before merging: steps of the tokenizer, whether whole words of the vocabulary are taken
# without merging → llama.cpp's name for it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_WORDS.replace("DIGITS", r"\p{N}{1,3}"), "bytes"), True): "llama-bpe",
    ((_WORDS.replace("DIGITS", r"\p{N}{1,3}"), "bytes"), False): "smaug-bpe",
    ((_WORDS.replace("DIGITS", r"\p{N}"), "bytes"), False): "qwen2",
}


def _refuse(problem: str, expected: str, found: str) -> ModelError:
    return ModelError(
        problem, expected=expected, found=found,
        do="whet export --to hf, and convert that folder with llama.cpp's convert_hf_to_gguf.py",
    )  # fmt: skip


def _steps(node: dict[str, Any] | None) -> tuple[str, ...]:
    """The steps of a normalizer or pre-tokenizer; one that is not known stands as its JSON."""
    if node is None:
        return ()
    if node["type"] == "Sequence":
        inner = node.get("pretokenizers") or node.get("normalizers") or []
        return tuple(step for one in inner for step in _steps(one))
    if node["type"] == "ByteLevel" and not node["add_prefix_space"]:
        return ("words" if node["use_regex"] else "bytes",)
    if node["type"] == "Digits" and node["individual_digits"]:
        return ("digits",)
    if node["type"] == "Split" and node["behavior"] == "Isolated" and not node["invert"] and "Regex" in node["pattern"]:
        return (node["pattern"]["Regex"],)
    if node["type"] in ("NFC", "Prepend", "Replace"):
        return (":".join(str(v) for v in node.values()),)
    return (json.dumps(node, ensure_ascii=False),)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF tells it; `space` says whether a space is put in front of a text."""

    model: str  # "gpt2": bytes and merges; "llama": pieces with scores, as SentencePiece has them
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]  # 1 normal, 2 unknown, 3 control, 4 of the user, 5 unused, 6 a byte
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    space: bool = False
    left: tuple[Left, ...] = ()


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer for an embedding of `size` rows. Raises ModelError where llama.cpp has no such."""
    if not getattr(tokenizer, "is_fast", False):
        raise _refuse("the tokenizer cannot be read", "a tokenizer.json", type(tokenizer).__name__)
    body = json.loads(tokenizer.backend_tokenizer.to_str())
    model = body["model"]
    if model["type"] != "BPE":
        raise _refuse("GGUF export knows no such tokenizer", "byte-pair encoding", model["type"])
    named = {i: token for token, i in tokenizer.get_vocab().items()}
    added = {t["id"]: t for t in body["added_tokens"]}
    if max(named) >= size:
        raise _refuse("the tokenizer has more tokens than the model", f"at most {size}", str(max(named) + 1))
    tokens = tuple(named.get(i, f"[PAD{i}]") for i in range(size))
    pieces = bool(model["byte_fallback"])
    types = []
    for i, token in enumerate(tokens):
        if i not in named:
            types.append(5)
        elif pieces and token == model["unk_token"]:
            types.append(2)
        elif i in added:
            types.append(3 if added[i]["special"] else 4)
        else:
            types.append(6 if pieces and len(token) == 6 and token.startswith("<0x") else 1)
    merges = tuple((*m,) if not isinstance(m, str) else (*m.split(" "),) for m in model["merges"])
    cleaned = _steps(body["normalizer"])
    if pieces:
        space, left = _prefix(tokenizer, cleaned, body["pre_tokenizer"])
        return Vocabulary("llama", "default", tokens, tuple(types), scores=_scores(tokens, types, merges), space=space,
                          left=left)  # fmt: skip
    cut = (_steps(body["pre_tokenizer"]), bool(model.get("ignore_merges")))
    if cut not in PRE_TOKENIZERS or cleaned not in ((), ("NFC",)):
        known = ", ".join(PRE_TOKENIZERS.values())
        raise _refuse("llama.cpp's name for the way this tokenizer cuts words is not known", f"one like {known}",
                      " then ".join((*cleaned, *cut[0]))[:160])  # fmt: skip
    unclean = ("normalization", "llama.cpp does not bring text into NFC as the tokenizer does; send it in NFC")
    return Vocabulary("gpt2", PRE_TOKENIZERS[cut], tokens, tuple(types), tuple(" ".join(m) for m in merges),
                      left=(unclean,) if cleaned else ())  # fmt: skip


def _prefix(tokenizer: Any, cleaned: tuple[str, ...], before: dict[str, Any] | None) -> tuple[bool, tuple[Left, ...]]:
    """Whether pieces begin with a space of their own in front of a text, and what llama.cpp cannot do of it."""
    spaces = "Replace:{'String': ' '}:▁"
    if before is not None and before["type"] == "Split" and cleaned == (spaces,):
        return False, ()  # Gemma: cuts at spaces, of which none are left
    if before is None and cleaned in ((spaces,), ("Prepend:▁", spaces)):
        return len(cleaned) == 2, ()
    if before is not None and before["type"] == "Metaspace" and not cleaned and not before["split"]:
        if before["prepend_scheme"] != "first":
            return before["prepend_scheme"] == "always", ()
        chat = str(tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False))
        if any(chat.startswith(t) for t in tokenizer.all_special_tokens):
            return False, (("first space", "a text outside the chat template gets no space in front; put one"),)
    raise _refuse("llama.cpp cannot cut text like this tokenizer", "SentencePiece's pieces",
                  json.dumps([cleaned, before], ensure_ascii=False)[:160])  # fmt: skip


def _scores(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, ...]]
) -> tuple[float, ...]:  # fmt: skip
    """Scores that make llama.cpp join pieces in the order of the merges. Raises ModelError where none can.

    It joins whatever two pieces make a token, best score first; so every such pair must be a merge.
    """
    rank: dict[str, int] = {}
    for n, pair in enumerate(merges):
        rank.setdefault("".join(pair), n)
    known, pairs = set(tokens), set(merges)
    for token, kind in zip(tokens, types, strict=True):
        for cut in range(1, len(token)) if kind == 1 else ():
            pair = (token[:cut], token[cut:])
            if pair not in pairs and known.issuperset(pair):
                raise _refuse("llama.cpp would join other pieces than this tokenizer", "a merge for every such pair",
                              f"none for {' + '.join(pair)!r}")  # fmt: skip
    return tuple(-float(rank.get(token, len(rank) + 1)) for token in tokens)


def _shape(writer: Any, config: Any, family: Family) -> tuple[Left, ...]:
    """Write what the model is like: sizes, heads, norms and positions. Raises ModelError for what is not known."""
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope, near = rope.get("full_attention", rope), rope.get("sliding_attention")
    kind = rope.get("rope_type", "default")
    if not family.biased and (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)):
        raise _refuse(f"llama.cpp knows no {family.name} with biases", "attention_bias and mlp_bias false", "true")
    if act != family.act:
        raise _refuse("llama.cpp computes this family with another activation", family.act, str(act))
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refuse("GGUF export does not know these positions", "default, linear or llama3", str(rope)[:120])
    context = int(config.max_position_embeddings)
    left: tuple[Left, ...] = ()
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or (["sliding_attention"] if window else [])
    if family.every:
        odd = [t == "full_attention" for t in layers] if near else [not r for r in config.no_rope_layers]
        if odd != [(n + 1) % family.every == 0 for n in range(len(odd))]:
            raise _refuse("llama.cpp computes other layers of this family otherwise", f"every {family.every}th",
                          str([n + 1 for n, one in enumerate(odd) if one])[:120])  # fmt: skip
    if near:
        scale, caps = config.query_pre_attn_scalar, (config.attn_logit_softcapping, config.final_logit_softcapping)
        if (near.get("rope_type"), near.get("rope_theta"), scale, *caps) != ("default", 10_000.0, size, None, None):
            raise _refuse("llama.cpp has other attention for this family", f"windows of base 10000, scale {size}",
                          f"{near}, scale {scale}, caps {caps}"[:120])  # fmt: skip
        writer.add_sliding_window(int(config.sliding_window))
    elif window and "sliding_attention" in layers and window < context:
        context = int(window)
        left = (("sliding window", f"llama.cpp runs this family without: prompts of at most {window} tokens"),)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if kind == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    return left


def _stretch(config: Any, rope: dict[str, Any]) -> Any:
    """By how much Llama 3.1 slows each pair of rotated values, fp32 [head size / 2]."""
    import torch

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    speed = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    turns = rope["original_max_position_embeddings"] * speed / (2 * torch.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def permute(weight: Any, heads: int) -> Any:
    """Rows of queries or keys in llama.cpp's order: the halves of each head interleaved."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def blocks(parts: Mapping[str, Any]) -> tuple[Any, str] | None:
    """Whole numbers and their steps as llama.cpp's blocks of 32, uint8 [out, bytes], and their type; None: it has none.

    `parts` are those of a pack that stands for values · scale: 8 bits become Q8_0, 4 bits in groups of 32 Q4_0.
    """
    import numpy as np

    values, scale = parts["values"].cpu(), parts["scale"].float().cpu()
    few, count = parts["bits"] == 4, values.shape[1] // 32
    if parts["zero"] is not None or values.shape[1] % 32 or scale.shape[1] != (count if few else 1):
        return None
    each = values.unflatten(1, (-1, 32)).numpy()
    steps = scale.expand(-1, count).numpy().astype(np.float16)[..., None].view(np.uint8)
    if few:
        whole = (each + 8).astype(np.uint8)
        each = whole[..., :16] | (whole[..., 16:] << 4)
    return np.concatenate([steps, each.view(np.uint8)], -1).reshape(len(values), -1), "Q4_0" if few else "Q8_0"


def _tensors(
    writer: Any, module: Any, family: Family, kind: str, packs: Mapping[str, Any]
) -> tuple[Left, ...]:  # fmt: skip
    """Write the weights: matrices in the type that is asked for, all else in fp32. Returns which have another, or lose.

    `packs` are the parts of matrices that are whole numbers already; in a type of few bits they stay just these, where
    it has them so.
    """
    import gguf

    config = module.config
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kept, again = Counter[int](), 0
    for name, value in module.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise _refuse(f"{family.name} has no such weights in GGUF", "those of its family", name)
        data, owner = value.detach().float(), name.split(".")[-2]
        if family.permuted and owner in heads:
            data = permute(data, heads[owner])
        if owner.endswith("norm"):
            data = data + family.norm
        parts = packs.get(name.removesuffix(".weight")) if kind in ("q8_0", "q4_0") else None
        if parts and family.permuted and owner in heads:
            parts = {**parts, **{p: permute(parts[p], heads[owner]) for p in ("values", "scale")}}
        # An embedding is read row by row and is the output, too: 4 bits would cost more there than they save.
        packed = kind if kind != "q4_0" or new not in ("token_embd.weight", "output.weight") else "q8_0"
        if parts and (made := blocks(parts)):
            writer.add_tensor(new, made[0], raw_dtype=gguf.GGMLQuantizationType[made[1]])
            kept[parts["bits"]] += made[1].lower() not in (kind, packed)
            continue
        again += parts is not None
        as_type = gguf.GGMLQuantizationType[packed.upper() if data.dim() > 1 else "F32"]
        if data.dim() > 1 and data.shape[-1] % gguf.GGML_QUANT_SIZES[as_type][0]:
            raise ModelError(
                f"{name} cannot be packed as {packed}", expected="rows of a multiple of 32", found=str(data.shape[-1]),
                do="--type bf16",
            )  # fmt: skip
        writer.add_tensor(new, gguf.quants.quantize(data.numpy(), as_type), raw_dtype=as_type)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _stretch(config, rope).numpy())
    left = [("type", f"kept in {bits} bits: {n} layers, as quantize rounded them") for bits, n in kept.items() if n]
    why = f"{again} layers that quantize rounded are rounded again: {kind} has no zeros, and steps of 32 columns"
    return (*left, ("rounding", why)) if again else tuple(left)


def adds_start(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its beginning-of-text token in front of a text."""
    start = tokenizer.bos_token_id
    return start is not None and tokenizer("x")["input_ids"][:1] == [start]


def write(
    module: Any, tokenizer: Any, file: Path, kind: str, ends: Sequence[int], name: str,
    packs: Mapping[str, Any] | None = None,
) -> tuple[Left, ...]:  # fmt: skip
    """Write a dense module and its tokenizer as one GGUF file; returns what it cannot hold. `ends` end a turn.

    `packs`, by the name of a layer, are whole numbers and steps that its weights were made of.
    Raises ModelError for a family, a tokenizer or positions that are not known for certain.
    """
    import gguf

    config = module.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise _refuse("GGUF export does not know this family", ", ".join(FAMILIES), config.model_type)
    words = vocabulary(tokenizer, module.get_input_embeddings().weight.shape[0])
    writer = gguf.GGUFWriter(file, family.name, use_temp_file=True)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(2)
    left = _shape(writer, config, family)
    writer.add_vocab_size(len(words.tokens))
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.scores:
        writer.add_token_scores(words.scores)
    first = tokenizer.eos_token_id
    more = [i for i in sorted(ends) if i != first]
    if len(more) > 2:
        left += (("ends", f"GGUF names three tokens that end a turn; ask for a stop at {more[2:]}, too"),)
    for token, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id), (first, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id), (tokenizer.pad_token_id, writer.add_pad_token_id),
        *zip(more, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False),
    ):  # fmt: skip
        if token is not None:
            add(token)
    writer.add_add_bos_token(adds_start(tokenizer))
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(words.space)
    writer.add_chat_template(tokenizer.get_chat_template())
    left += _tensors(writer, module, family, kind, packs or {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return left + words.left
