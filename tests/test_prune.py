"""Pruning: layers, neurons and tokens that go, and what becomes of the rest."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CHATML, SHARED, SPECIALS, UNSHARED, make_model, make_tokenizer, reference_rows
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig

from whet import model as models
from whet.compress import depth, vocabulary, width
from whet.compress.calibration import Calibration, calibration, influence, norms
from whet.compress.structure import counted, layers, parameters, size, twin
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession
from whet.errors import MethodError
from whet.memory import Known
from whet.methods import Run
from whet.methods.finetune import FineTune
from whet.methods.prune import Prune
from whet.store import Store
from whet.system import Decoding, System, load
from whet.task import Example, Learnable

IDS = torch.tensor([[5, 9, 40, 7, 120, 33, 260]])
ROWS = (Row((1, 7, 9, 30), ((40, 41, 2),)), Row((1, 7, 9, 31), ((50, 2),)), Row((1, 7, 9, 32, 33), ((51, 52, 2),)))
LOOK = Calibration(tuple(Row(r.prompt[:3], ((*r.prompt[3:], *r.continuations[0]),)) for r in ROWS), (3, 2, 3))
LABELS = ("negative", "positive")


def deep(
    family: str = "llama", count: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A tiny random model with more layers than two."""
    config = copy.deepcopy(make_model(family).config)
    config.num_hidden_layers = count
    if hasattr(config, "layer_types"):
        config.layer_types = (config.layer_types * count)[:count]
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for value in module.parameters():
        if value.dim() == 1:
            value.add_(0.2 * torch.randn_like(value))
    return module


def logits(module: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=ids).logits


def session(module: Any) -> TorchSession:
    return TorchSession(module, make_tokenizer())


def examples(count: int, word: str = "movie") -> tuple[Example, ...]:
    words = {"positive": ["great", "funny"], "negative": ["bad", "dull"]}
    made = []
    for n in range(count):
        label = LABELS[n % 2]
        made.append(Example(f"{word}{n}", f"{word} {n} was {words[label][n // 2 % 2]}", label, (label,)))
    return tuple(made)


@pytest.fixture
def data() -> Learnable:
    return Learnable("films", "what is the review?", "accuracy", LABELS, examples(40))


def save(module: Any, tokenizer: Any, folder: Path) -> System:
    """A System over a module that is written as a folder."""
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    decoding = Decoding(LABELS, True, prior=(0.1, 0.2))
    return System(models.resolve(str(folder)), "what is the review?", decoding=decoding, home=folder.parent / "home")


# --- structure --------------------------------------------------------------------------------------------------------


def test_a_twin_shares_tensors_and_nothing_else() -> None:
    module = make_model("llama")
    other = twin(module)
    assert all(a is b for a, b in zip(module.parameters(), other.parameters(), strict=True))
    assert not {id(m) for m in module.modules()} & {id(m) for m in other.modules()}
    other.config.num_hidden_layers = 1
    assert module.config.num_hidden_layers == 2


def test_how_many_a_setting_means() -> None:
    assert [counted(x, 30, "layers") for x in (0, 1, 15, 30, 0.5, 0.01, 0.99)] == [30, 1, 15, 30, 15, 1, 30]
    with pytest.raises(MethodError, match="too many layers; expected at most 30, found 31"):
        counted(31, 30, "layers")


def test_parameters_count_each_number_once() -> None:
    module = make_model("llama")
    hidden, wide, keys = 32, 64, 16
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * wide + 2 * hidden
    untied = 0 if module.config.tie_word_embeddings else 300 * hidden
    assert parameters(module) == 2 * layer + 300 * hidden + untied + hidden
    before = parameters(module)
    module.model.layers[1].mlp.up_proj.weight = module.model.layers[0].mlp.up_proj.weight
    assert parameters(module) == before - hidden * wide
    assert size(module) == {"parameters": parameters(module), "bytes": 2 * parameters(module)}


# --- calibration ------------------------------------------------------------------------------------------------------


def test_losses_of_answers_and_questions_by_plain_forwards() -> None:
    module = make_model("llama")
    found = LOOK.losses(module, make_tokenizer())
    scores = [row[0] for row in reference_rows(module, LOOK.rows)]
    answers = [v for values, n in zip(scores, LOOK.sizes, strict=True) for v in values[-n:]]
    questions = [v for values, n in zip(scores, LOOK.sizes, strict=True) for v in values[:-n]]
    assert found["answers"] == pytest.approx(-sum(answers) / 8, abs=1e-4)
    assert found["questions"] == pytest.approx(-sum(questions) / 4, abs=1e-4)
    moved = LOOK.numbered({i: i + 100 for i in LOOK.tokens})
    assert moved.rows[0] == Row((101, 107, 109), ((130, 140, 141, 102),))


def test_calibration_rows_end_with_the_answer(data: Learnable, tmp_path: Path, fp32: None) -> None:
    system = save(make_model("llama"), make_tokenizer(), tmp_path / "m")
    run = Run(Store(tmp_path / "home"))
    live = run.session(system.model)
    assert isinstance(live, TorchSession)
    rows = replace(data, train=data.train[:6])
    found = calibration(system, rows, run, live)
    for example in rows.train:
        [prompt] = live.encode(system.prompts([example]))
        answer = live.encode_answer(example.completion, end=True)
        assert any((*r.prompt, *r.continuations[0]) == (*prompt, *answer) and n == len(answer)
                   for r, n in zip(found.rows, found.sizes, strict=True))  # fmt: skip
    assert len({r.prompt for r in found.rows}) == 1 and len(found.rows[0].prompt) > 10
    # Where rows have no completion, the System's own answers stand for them.
    bare = replace(rows, train=tuple(replace(e, completion="", answers=()) for e in rows.train))
    own = system.answer(list(bare.train), live)
    pairs = zip(bare.train, own, strict=True)
    told = replace(rows, train=tuple(replace(e, completion=a, answers=(a,)) for e, a in pairs))
    assert calibration(system, bare, run, live) == calibration(system, told, run, live)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_influence_and_norms_by_hidden_states(family: str) -> None:
    module = make_model(family)
    row = Row((1, 7, 9), ((30, 31, 2),))
    ids = torch.tensor([[1, 7, 9, 30, 31]])  # the last token is never read
    path = [n for n, m in module.named_modules() if m is layers(module)][0]
    seen: dict[str, Any] = {}
    first = module.get_submodule(f"{path}.0")
    first.register_forward_hook(lambda m, a, o: seen.update(x=a[0], y=o[0] if isinstance(o, tuple) else o))
    logits(module, ids)
    cosine = torch.cosine_similarity(seen["x"][0], seen["y"][0], -1)
    wanted_norm = seen["x"][0].norm(dim=0)
    found = influence(session(module), [row])
    assert found[0] == pytest.approx(float((1 - cosine).mean()), abs=1e-5)
    assert len(found) == 2
    [norm] = norms(session(module), [row], [first])
    assert torch.allclose(norm, wanted_norm, atol=1e-4)
    assert not [h for m in module.modules() if m is not first for h in m._forward_hooks]


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*SHARED, *UNSHARED])
def test_a_model_with_layers_dropped_is_one_built_with_fewer(family: str) -> None:
    module, kept = deep(family), [0, 2, 3]
    before, whole = module.config.to_dict(), logits(module)
    made = depth.keep(module, kept)
    path = [n for n, m in module.named_modules() if m is layers(module)][0]
    config = copy.deepcopy(module.config)
    config.num_hidden_layers = 3
    if hasattr(config, "layer_types"):
        config.layer_types = [config.layer_types[i] for i in kept]
        assert made.config.layer_types == config.layer_types
    hand = AutoModelForCausalLM.from_config(config).eval()
    state = module.state_dict()
    for name in hand.state_dict():
        if name.startswith(path):
            number, rest = name.removeprefix(f"{path}.").split(".", 1)
            hand.state_dict()[name].copy_(state[f"{path}.{kept[int(number)]}.{rest}"])
        else:
            hand.state_dict()[name].copy_(state[name])
    assert torch.equal(logits(made), logits(hand))
    asked = {"max_new_tokens": 6, "do_sample": False}  # with keys kept by the layers' numbers
    assert torch.equal(made.generate(IDS, **asked), hand.generate(IDS, **asked))
    for found, wanted in zip(session(made).score_rows(ROWS), reference_rows(hand, ROWS), strict=True):
        assert found[0] == pytest.approx(wanted[0], abs=1e-4)
    assert module.config.to_dict() == before and torch.equal(logits(module), whole)
    again = depth.keep(made, [1, 2])  # what was cut can be cut again
    assert torch.equal(logits(again), logits(depth.keep(module, [2, 3])))


def test_lists_of_layers_by_number_are_numbered_anew() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 2,
             "num_experts_per_tok": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
             "vocab_size": 300, "num_hidden_layers": 4}  # fmt: skip
    module = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, mlp_only_layers=[0, 3])).eval()
    made = depth.keep(module, [1, 2, 3])
    assert made.config.mlp_only_layers == [2]
    depth._check(made)
    every_second = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, decoder_sparse_step=2)).eval()
    with pytest.raises(MethodError, match="no rule for dropping layers of qwen3_moe"):
        depth._check(depth.keep(every_second, [1, 2, 3]))
    each = deep()
    each.config.hidden_size_per_layer_input = 8  # as Gemma 3n has it
    with pytest.raises(MethodError, match="no rule for dropping layers of llama.*inputs of its own"):
        depth.drop(TorchSession(each, make_tokenizer()), LOOK, 3)
    with pytest.raises(MethodError, match="no rule for trimming the vocabulary of llama"):
        vocabulary.cut(each, [0, 1, 2])


@pytest.mark.parametrize("by", ["loss", "influence"])
def test_a_layer_that_does_nothing_goes_first(by: str) -> None:
    module = deep(count=6)
    idle = module.model.layers[3]
    idle.self_attn.o_proj.weight.zero_()
    idle.mlp.down_proj.weight.zero_()
    # What it would say itself: whatever else is dropped, that becomes less likely.
    starts = [(1, 7, n) for n in range(30, 36)]
    own = [module.generate(torch.tensor([s]), max_new_tokens=8, do_sample=False)[0, 3:].tolist() for s in starts]
    look = Calibration(tuple(Row(s, (tuple(o),)) for s, o in zip(starts, own, strict=True)), tuple(map(len, own)))
    told: list[tuple[int, int]] = []
    made, gone = depth.drop(session(module), look, 4, by, lambda done, of: told.append((done, of)))
    assert gone[0].layer == 3 and gone[0].influence == pytest.approx(0, abs=1e-6)
    assert len(layers(made)) == 4 and len(gone) == 2 and gone[1].layer != 3
    assert told == [(1, 2), (2, 2)]
    if by == "loss":
        assert gone[0].loss == pytest.approx(look.loss(module, make_tokenizer()), abs=1e-5)
        assert gone[1].loss == pytest.approx(look.loss(made, make_tokenizer()), abs=1e-5)
    else:
        assert gone[0].loss is None


def test_by_loss_the_best_of_all_goes() -> None:
    module = deep(seed=3)
    _, gone = depth.drop(session(module), LOOK, 2)
    kept = [0, 1, 2, 3]
    for one in gone:  # four layers: all of them are looked at
        losses = {i: LOOK.loss(depth.keep(module, [k for k in kept if k != i]), make_tokenizer()) for i in kept}
        assert one.layer == min(losses, key=lambda i: losses[i])
        assert one.loss == pytest.approx(losses[one.layer], abs=1e-6)
        kept.remove(one.layer)


# --- width ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2"])
def test_neurons_that_add_nothing_go(family: str) -> None:
    module = deep(family, 2)
    for number, layer in enumerate(layers(module)):
        idle = torch.randperm(64, generator=torch.Generator().manual_seed(number))[:40]
        layer.mlp.down_proj.weight[:, idle] = 0
    whole, before = logits(module), module.config.to_dict()
    made = width.narrow(session(module), LOOK.rows, 0.4)  # 25.6 of 64: the nearest multiple of 8 is 24
    assert made.config.intermediate_size == 24
    assert [tuple(m.weight.shape) for m in (made.model.layers[0].mlp.up_proj, made.model.layers[1].mlp.down_proj)] == [
        (24, 32), (32, 24)]  # fmt: skip
    assert torch.allclose(logits(made), whole, atol=1e-5)
    assert module.config.to_dict() == before and torch.equal(logits(module), whole)


def test_neurons_that_stay_make_good_for_those_that_go() -> None:
    # Each neuron stands twice: half of them can go, if the others' weights become the sums.
    module = deep(count=2)
    for layer in layers(module):
        for name in ("gate_proj", "up_proj"):
            weight = getattr(layer.mlp, name).weight
            weight[32:] = weight[:32]
    rows = [Row((n, 7), (tuple(range(30 + n, 60 + n)),)) for n in range(1, 9)]
    whole = logits(module)
    plain = twin(module)
    for layer in layers(plain):
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight.clone())
        layer.mlp.down_proj.weight.data[:, 32:] = 0
    made = width.narrow(session(module), rows, 0.5)
    off = (logits(made) - whole).norm() / (logits(plain) - whole).norm()
    assert off < 0.1 and torch.equal(logits(module), whole)


def test_survivors_are_the_best_and_refitted() -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(200, 12) @ torch.randn(12, 12), torch.randn(5, 12)
    second = inputs.T @ inputs
    damped = second.double() + 0.01 * second.diagonal().diag()

    def refitted(kept: list[int]) -> tuple[torch.Tensor, float]:
        """The best weights for inputs that are kept, and what they cost."""
        full = torch.zeros(5, 12, dtype=torch.double)
        full[:, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.double().T).T
        off = full - weight
        return full[:, kept], float((off @ damped * off).sum())

    kept, found = width.survivors(weight, second, 11)
    each = [[i for i in range(12) if i != gone] for gone in range(12)]
    assert kept.tolist() == min(each, key=lambda some: refitted(some)[1])
    for many in (11, 6, 1):
        kept, found = width.survivors(weight, second, many)
        assert len(kept) == many and torch.allclose(found, refitted(kept.tolist())[0], atol=1e-8)
    kept, found = width.survivors(weight, torch.zeros(12, 12), 6)  # rows that never reach the layer
    assert len(kept) == 6 and torch.allclose(found, weight[:, kept].double())


def test_of_two_that_stand_in_for_each_other_one_stays() -> None:
    torch.manual_seed(0)
    half = torch.randn(400, 32)
    inputs, weight = torch.cat([half, half], 1) + 0.01 * torch.randn(400, 64), torch.randn(5, 64)
    inputs[:20, 7] = 1000.0  # and one that is loud does not drown them
    kept, found = width.survivors(weight, inputs.T @ inputs, 33)
    whole = inputs.double() @ weight.double().T
    off = inputs[:, kept].double() @ found.T - whole
    assert off[20:].norm() < 0.1 * whole[20:].norm()
    assert {int(i) % 32 for i in kept} == set(range(32))


@pytest.mark.parametrize(("whole", "share", "kept"), [(1024, 0.7, 704), (512, 0.6, 320), (110, 0.99, 110), (7, 0.5, 7)])
def test_widths_suit_groups_of_quantized_weights(whole: int, share: float, kept: int) -> None:
    made = width.narrow(session(deep(count=1, intermediate_size=whole)), LOOK.rows, share)
    assert made.config.intermediate_size == kept


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_width_of_a_family_without_a_rule_is_refused_by_name(family: str) -> None:
    with pytest.raises(MethodError, match=f"no rule for the width of {family}"):
        width.narrow(session(make_model(family)), LOOK.rows, 0.5)


# --- vocabulary -------------------------------------------------------------------------------------------------------

SAID = ["the movie was great", "what is the question? positive", "<|im_start|>user\nbad<|im_end|>\n"]


LICENSE = (Path(__file__).resolve().parents[1] / "LICENSE").read_text(encoding="utf-8")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """As the tiny one, with 700 tokens learnt from a text."""
    raw = make_tokenizer().backend_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=list(SPECIALS), initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    raw.train_from_iterator([LICENSE, *SAID[:2] * 9], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "__mask__"], chat_template=CHATML,
    )  # fmt: skip


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's and Gemma's: merges of characters, a mark for spaces, bytes for what is not in it, a beginning."""
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    learnt = Tokenizer(kinds.BPE(unk_token="<unk>"))
    learnt.normalizer = normalizers.Replace(" ", "▁")
    learnt.train_from_iterator([f" {w}" for line in (LICENSE, "영화가 좋았다", *SAID) for w in line.split()], trainer)
    body = json.loads(learnt.to_str())
    vocab = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    vocab += [t for t in body["model"]["vocab"] if t not in vocab]
    body["model"] |= {"vocab": {t: i for i, t in enumerate(vocab)}, "byte_fallback": True, "fuse_unk": True}
    body["model"]["merges"] = [" ".join(m) for m in body["model"]["merges"]]  # as older files have them
    raw = Tokenizer.from_str(json.dumps(body))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHATML
    )


TOKENIZERS = {"bytes": byte_tokenizer, "fallback": fallback_tokenizer}


def pieces(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.fixture(scope="module", params=TOKENIZERS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    large = TOKENIZERS[request.param]()
    return vocabulary.trimmed(large, SAID, 0), large


def test_texts_are_written_in_the_same_pieces(pair: tuple[Any, Any]) -> None:
    small, large = pair
    assert len(small) < len(large) - 100
    for text in SAID:
        assert pieces(small, text) == pieces(large, text)
    index = vocabulary.ids_in(small, large)
    assert [small.convert_ids_to_tokens(i) for i in range(len(small))] == large.convert_ids_to_tokens(index)
    assert index == sorted(index)  # frequent ones first, as before
    assert (small.bos_token, small.eos_token) == (large.bos_token, large.eos_token)
    assert small.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == large.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(pair: tuple[Any, Any], text: str) -> None:
    small, large = pair
    ids = small(text, add_special_tokens=False)["input_ids"]
    wanted = large.decode(large(text, add_special_tokens=False)["input_ids"])
    assert small.decode(ids) == wanted
    if not any(t in text for t in (*large.all_special_tokens, "▁")):  # what Llama's kind writes spaces as
        assert wanted == text


def test_every_kept_piece_can_still_be_merged(pair: tuple[Any, Any]) -> None:
    small, large = pair
    body, whole = (json.loads(t.backend_tokenizer.to_str())["model"] for t in pair)
    for left, right in vocabulary._merges(whole):
        kept = {left, right, left + right} & set(body["vocab"])
        assert (left + right not in kept) or len(kept) == len({left, right, left + right})
    order = [m for m in vocabulary._merges(whole) if m[0] + m[1] in body["vocab"]]
    assert vocabulary._merges(body) == order


def test_spare_tokens_are_the_most_frequent_and_fill_up_to_64() -> None:
    large = byte_tokenizer()
    sizes = {spare: len(vocabulary.trimmed(large, ["a"], spare)) for spare in (0, 60, 61, 380, 1000)}
    assert sizes == {0: 320, 60: 320, 61: 384, 380: 640, 1000: 700}  # 260 are special or single bytes
    small = vocabulary.trimmed(large, ["a"], 60)
    assert [*range(320)] == vocabulary.ids_in(small, large)  # by number: the earliest merges
    rare = large.convert_ids_to_tokens(699)
    kept = vocabulary.trimmed(large, ["a"], 0, [699])
    assert rare in kept.get_vocab() and len(kept) == 320 and 699 in vocabulary.ids_in(kept, large)


def test_odd_tokenizers_are_refused_by_kind() -> None:
    for model, kind in ((kinds.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "WordPiece"),
                        (kinds.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), "Unigram")):  # fmt: skip
        raw = Tokenizer(model)
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        other = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="a", unk_token=None)
        with pytest.raises(MethodError, match=f"byte-pair tokenizer, found {kind}; set vocabulary=false"):
            vocabulary.trimmed(other, ["a"], 0)


@pytest.mark.parametrize("family", [*SHARED, *UNSHARED])
def test_logits_of_kept_tokens_are_as_they_were(family: str) -> None:
    module = deep(family, 2)
    index = [0, 1, 2, 3, *range(40, 130), 250]
    before, whole = module.config.to_dict(), logits(module, IDS * 0 + torch.tensor([[0, 2, 45, 46, 129, 250, 60]]))
    made = vocabulary.cut(module, index)
    ids = torch.tensor([[index.index(i) for i in (0, 2, 45, 46, 129, 250, 60)]])
    assert torch.allclose(logits(made, ids), whole[..., index], atol=1e-6)
    assert made.config.vocab_size == len(index) == made.get_output_embeddings().out_features
    tied = made.get_output_embeddings().weight is made.get_input_embeddings().weight
    assert tied == module.config.tie_word_embeddings
    assert module.config.to_dict() == before
    fewer = (300 - len(index)) * 32 * (1 if tied else 2)
    assert parameters(module) - parameters(made) == fewer


def test_tokens_named_by_number_are_renumbered() -> None:
    module = deep(count=1)
    module.generation_config.eos_token_id = [2, 77]
    module.generation_config.suppress_tokens = [5, 90]
    made = vocabulary.cut(module, [1, 2, 77, 90])
    assert (made.config.eos_token_id, made.config.bos_token_id, made.config.pad_token_id) == (1, None, None)
    assert made.generation_config.eos_token_id == [1, 2]
    assert made.generation_config.suppress_tokens == [3]
    assert module.generation_config.eos_token_id == [2, 77]


# --- the method -------------------------------------------------------------------------------------------------------


def prune(system: System, data: Learnable, home: Path, **settings: Any) -> tuple[System, Run]:
    run = Run(Store(home))
    return Prune(**settings).apply(replace(system, home=home), data, run), run


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_pruned_system_is_one_folder_that_answers(
    family: str, data: Learnable, tmp_path: Path, fp32: None
) -> None:
    large = byte_tokenizer()
    module = deep(family, vocab_size=len(large))
    system = save(module, large, tmp_path / "m")
    made, run = prune(system, data, tmp_path / "a", layers=2, width=0.5, spare=0)
    notes = run.notes["prune"]
    assert made.model.whole is not None and made.model.original == system.model and made.decoding.prior == ()
    folder = made.model.whole.folder
    assert folder is not None
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 32)
    assert config["vocab_size"] == notes["vocabulary"] == len(AutoTokenizer.from_pretrained(folder)) <= 448
    live = run.session(made.model)
    assert isinstance(live, TorchSession)
    assert notes["after"]["parameters"] == parameters(live.module) < notes["before"]["parameters"] == parameters(module)
    written = (folder / "model.safetensors").stat().st_size
    assert 0 < written - notes["after"]["bytes"] < 10_000  # names and shapes
    assert len(notes["dropped"]) == 2 and notes["dropped"][0].keys() == {"layer", "influence", "loss"}
    for kind in ("answers", "questions"):
        assert notes["after"][kind] > 0 and notes["before"][kind] > 0
    rows = [Row(p, (live.encode_answer("positive", True),)) for p in live.encode(made.prompts(data.train[:3]))]
    for found, wanted in zip(live.score_rows(rows), reference_rows(live.module, rows), strict=True):
        assert found[0] == pytest.approx(wanted[0], abs=1e-4)
    made.save(tmp_path / "system")
    again = load(tmp_path / "system", home=tmp_path / "elsewhere")
    assert again.answer(list(data.train[:8])) == made.answer(list(data.train[:8]), live)


def test_with_the_vocabulary_alone_choices_are_scored_as_before(data: Learnable, tmp_path: Path, fp32: None) -> None:
    large = byte_tokenizer()
    system = save(deep(vocab_size=len(large)).bfloat16().float(), large, tmp_path / "m")
    made, run = prune(system, data, tmp_path / "a", spare=0)
    before, after = run.session(system.model), run.session(made.model)
    assert isinstance(before, TorchSession) and isinstance(after, TorchSession)
    rows = {
        name: [Row(p, tuple(s.encode_answer(c, True) for c in LABELS)) for p in s.encode(one.prompts(data.train[:4]))]
        for name, s, one in (("old", before, system), ("new", after, made))
    }
    index = torch.tensor(vocabulary.ids_in(after.tokenizer, before.tokenizer))
    assert len(index) <= 448
    for old, new in zip(rows["old"], rows["new"], strict=True):
        assert tuple(index[list(new.prompt)].tolist()) == old.prompt
        ids = torch.tensor([[*old.prompt, *old.continuations[0]]])
        small = torch.tensor([[*new.prompt, *new.continuations[0]]])
        assert torch.allclose(logits(after.module, small), logits(before.module, ids)[..., index], atol=1e-4)


def test_how_the_base_draws_is_kept_as_it_is(data: Learnable, tmp_path: Path, fp32: None) -> None:
    large = byte_tokenizer()
    system, file = save(deep(vocab_size=len(large)), large, tmp_path / "m"), tmp_path / "m" / "generation_config.json"
    told = {"temperature": 0.6, "top_p": 0.9, "pad_token_id": -1}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    made, run = prune(system, data, tmp_path / "a", spare=0)
    assert made.model.whole is not None and made.model.whole.folder is not None
    kept = json.loads((made.model.whole.folder / file.name).read_text())
    assert (kept["temperature"], kept["top_p"], kept.get("pad_token_id")) == (0.6, 0.9, None)
    assert made.answer(["was it good?"], run.session(made.model))[0] in LABELS


def test_what_documents_and_judgements_say_is_kept(data: Learnable, tmp_path: Path, fp32: None) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text(json.dumps({"id": "d", "title": "city", "text": "Licensed works, copyright"}) + "\n")
    large = byte_tokenizer()
    system = save(deep(vocab_size=len(large)), large, tmp_path / "m")
    data = replace(data, documents=file)
    live = Run(Store(tmp_path / "home")).session(system.model)
    assert isinstance(live, TorchSession)
    said = vocabulary.said(system, data)
    assert {"city", "Licensed works, copyright", *LABELS} <= set(said)
    shown = vocabulary.texts(system, data, live, said)
    assert "".join(t for t in shown if "movie 3 was" in t).count("<|im_start|>") == 3  # as the model is asked
    for known, same in ((shown, True), ([t for t in shown if "copyright" not in t], False)):
        small = vocabulary.trimmed(large, known, 0)
        assert (pieces(small, "Licensed works, copyright") == pieces(large, "Licensed works, copyright")) == same


def test_pruning_is_repeatable_and_not_repeated(
    data: Learnable, tmp_path: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = save(deep(), make_tokenizer(), tmp_path / "m")
    one, first = prune(system, data, tmp_path / "a", layers=0.5)
    two, _ = prune(system, data, tmp_path / "b", layers=0.5)
    assert one.fingerprint == two.fingerprint
    few = len(calibration(system, data, first, first.session(system.model)).tokens)  # type: ignore[arg-type]
    assert first.session(system.model).spent.prefilled_tokens > 10 * few  # two rounds of four losses, and two more
    monkeypatch.setattr("whet.compress.depth.drop", lambda *a: pytest.fail("pruned again"))
    other = replace(system, decoding=replace(system.decoding, prior=(5.0, -5.0)))  # it does not matter to what is cut
    for one_of in (system, other):
        three, again = prune(one_of, data, tmp_path / "a", layers=0.5)
        assert three.fingerprint == one.fingerprint and again.notes == first.notes


@pytest.mark.parametrize("adapter", ["lora", "dora", "full"])
def test_a_pruned_model_is_trained_like_any_other(adapter: str, data: Learnable, tmp_path: Path, fp32: None) -> None:
    system = save(deep(), make_tokenizer(), tmp_path / "m")
    made, run = prune(system, data, tmp_path / "a", layers=2, width=0.5)
    before = run.session(made.model)
    rate = 1e-3 if adapter == "full" else 1e-2
    tuned = FineTune(adapter, rank=4, epochs=6.0, batch=8, learning_rate=rate).apply(made, data, run)
    curve = [loss for _, loss in run.notes["curves"]["validation"]]
    assert run.notes["curves"]["best"] > 0 and min(curve) < 0.9 * curve[0]
    assert [t.kind for t in tuned.model.standing] == (["model"] if adapter == "full" else ["model", "adapter"])
    after = run.session(tuned.model)
    assert isinstance(after, TorchSession) and isinstance(before, TorchSession)
    assert parameters(after.module) == parameters(before.module)


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"layers": -1}, {"layers": 2.5}, {"by": "chance"}, {"width": 0.0}, {"width": 1.5}, {"spare": -1},
                  {"vocabulary": False}):  # fmt: skip
        with pytest.raises(ValueError):
            Prune(**wrong)  # type: ignore[arg-type]


def test_more_layers_than_there_are(data: Learnable, tmp_path: Path, fp32: None) -> None:
    system = save(make_model("llama"), make_tokenizer(), tmp_path / "m")
    with pytest.raises(MethodError, match="too many layers; expected at most 2, found 3"):
        prune(system, data, tmp_path / "a", layers=3)


def test_what_earlier_tasks_say_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "task.yaml").write_text("instruction: Name the hue.\nmetric: accuracy\nlabels: [mauve, teal]\n")
    rows = [{"prompt": f"a cloth numbered {n}", "completion": "mauve"} for n in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = Learnable("t", "Say which.", "accuracy", LABELS, earlier=(folder,))
    asked = System(models.ModelRef("x", "x"), "Name it.", decoding=Decoding(("umber",), True))
    known = Known("older", "accuracy", asked, (Example("1", "a wall", "umber"),))
    found = vocabulary.said(System(models.ModelRef("x", "x"), "", card={"memory": [known.entry()]}), data)
    assert {"Name the hue.", "teal", "mauve", "a wall", "umber"} < set(found)
    assert any(t.startswith("a cloth numbered") for t in found)
