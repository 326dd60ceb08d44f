"""Trimming the vocabulary: the tokens that a task's text is made of, those they are merged from, and frequent ones."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from whet.compress.structure import family, twin
from whet.errors import MethodError
from whet.prompt import escape, render, specials_of
from whet.system import Demonstrations, System

if TYPE_CHECKING:
    from whet.engine.torch import TorchSession
    from whet.task import Learnable

STEP = 64  # rows of the embedding are a multiple of it, for kernels and groups of quantized weights
SHOWN = 256  # train rows that are rendered with all that the System shows beside them
MOST = 20_000_000  # characters of documents that are looked at


def said(system: System, data: Learnable, seed: int = 0) -> list[str]:
    """All that the task says beside its rows: labels, demonstrations, judgements, earlier tasks, text of documents."""
    found = [*data.labels, *system.decoding.words, data.instruction, *_earlier(system, data, seed)]
    found += [t for pair in system.demonstrations.pool for t in pair]
    found += [t for j in data.judged for t in (j.prompt, j.chosen, j.rejected) if t]
    room = MOST
    for text in _beside(data):
        if (room := room - len(text)) < 0:
            break
        found.append(text)
    return found


def texts(system: System, data: Learnable, session: TorchSession, said: Sequence[str]) -> list[str]:
    """That and all that train rows make the System show and say, as the tokenizer is given it."""
    plain = replace(system, sources=(), demonstrations=Demonstrations())
    chat = (("system", "a"), ("user", "a"), ("assistant", "a"), ("user", "a"))  # for the template's own text
    prompts = [*plain.prompts(data.train), *system.prompts(data.train[:SHOWN]), chat[not session.system :]]
    answers = [t for e in data.train for t in (e.completion, *e.answers, *e.choices, e.rejected or "")]
    tokenizer = session.tokenizer
    marks = specials_of(tokenizer)
    shown = [render(tokenizer, p, system=session.system) for p in prompts]
    raw = [e.text for e in data.train if e.text]
    return list(dict.fromkeys([*shown, *(escape(t, marks) for t in (*said, *answers)), *raw]))


def _earlier(system: System, data: Learnable, seed: int) -> Iterator[str]:
    """What the tasks that must not be lost say: their instructions, labels, and rows to learn from."""
    from whet.memory import carried
    from whet.task import load

    tasks = [load(folder, trust=data.trusted) for folder in data.earlier]
    parts = [(t.instruction, t.labels, t.split(seed).learnable.train) for t in tasks]
    parts += [(one.asked.instruction, one.asked.decoding.labels, one.rows) for one in carried(system)]
    for instruction, labels, rows in parts:
        yield from (instruction, *labels)
        yield from (t for e in rows for t in (e.prompt, e.text, e.completion, *e.answers, *e.choices) if t)


def _beside(data: Learnable) -> Iterator[str]:
    """Documents and knowledge that lie in files; what a database or a server has is not asked for."""
    if isinstance(data.documents, Path):
        from whet.documents import load

        yield from (t for d in load(data.documents, data.folder)[0] for t in (d.title, d.text))
    for source in (data.knowledge, data.glossary):
        if isinstance(source, Path) and source.is_file():
            yield source.read_text(encoding="utf-8", errors="replace")


def trimmable(tokenizer: Any) -> bool:
    """Whether there is a rule for trimming a tokenizer's vocabulary: it is a plain BPE."""
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return type(model).__name__ == "BPE" and not (model.continuing_subword_prefix or model.end_of_word_suffix)


def trimmed(tokenizer: Any, texts: Sequence[str], spare: int, ids: Iterable[int] = ()) -> Any:
    """A tokenizer that writes these texts in the same pieces as the given one, and any other text in some pieces.

    Kept are special and added tokens, `ids`, single bytes, the pieces of the texts, and both parts of every merge that
    leads to one of these; of the others the `spare` first, which are the most frequent, up to a multiple of 64 in all.
    Raises MethodError for a tokenizer that is no plain BPE.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        body = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"model": {"type": "no tokenizer"}}
        model = body["model"]
        if not trimmable(tokenizer):
            raise MethodError(
                "no rule for trimming this vocabulary", expected="a byte-pair tokenizer", found=model["type"],
                do="set vocabulary=false",
            )  # fmt: skip
        written = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        kept = _kept(body, {*ids, *tokenizer.all_special_ids, *(i for row in written for i in row)}, spare)
        file.write_text(json.dumps(_rewritten(body, kept), ensure_ascii=False), encoding="utf-8")
        for other in ("vocab.json", "merges.txt", "tokenizer.model"):
            (Path(folder) / other).unlink(missing_ok=True)
        small = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    index = ids_in(small, tokenizer)
    again = small(list(texts), add_special_tokens=False)["input_ids"]
    if [[index[i] for i in row] for row in again] != written:
        raise MethodError(
            "no rule for trimming this vocabulary", expected="the same pieces of text as before",
            found=type(tokenizer).__name__, do="set vocabulary=false",
        )  # fmt: skip
    return small


def _kept(body: dict[str, Any], used: set[int], spare: int) -> list[str]:
    """The tokens to keep, in the order of their ids."""
    vocabulary: dict[str, int] = body["model"]["vocab"]
    added = {t["content"]: t["id"] for t in body["added_tokens"]}
    order = sorted({**vocabulary, **added}.items(), key=lambda item: item[1])
    spelt = {i: t for t, i in order}
    parts: dict[str, list[str]] = defaultdict(list)
    for left, right in _merges(body["model"]):
        parts[left + right] += [left, right]
    # With bytes to fall back on, a character need not be kept; but decoders know this one as a space.
    bytes_ = {f"<0x{i:02X}>" for i in range(256)} if body["model"].get("byte_fallback") else set()
    single = {t for t in vocabulary if t in bytes_ or (len(t) == 1 and (not bytes_ or t.isascii() or t == "▁"))}
    kept, open_ = set[str](), [*added, *single, *(spelt[i] for i in used if i in spelt)]
    while open_:
        token = open_.pop()
        if token not in kept:
            kept.add(token)
            open_ += parts[token]
    wanted = len(kept) + spare
    for token, _ in order:
        if len(kept) >= wanted and len(kept) % STEP == 0:
            break
        if kept.issuperset(parts[token]):
            kept.add(token)
    return [t for t, _ in order if t in kept]


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs; older files have them as text with a space between."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(left, right) for left, right in pairs]


def _rewritten(body: dict[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """A tokenizer.json with these tokens only, numbered anew in their order."""
    number = {t: i for i, t in enumerate(kept)}
    old = {**body["model"]["vocab"], **{t["content"]: t["id"] for t in body["added_tokens"]}}
    moved = {old[t]: i for t, i in number.items()}
    merges = [m for m in _merges(body["model"]) if m[0] in number and m[1] in number and m[0] + m[1] in number]
    model = {**body["model"], "merges": merges, "vocab": {t: number[t] for t in body["model"]["vocab"] if t in number}}
    added = [{**t, "id": number[t["content"]]} for t in body["added_tokens"]]
    padding = body.get("padding") and {**body["padding"], "pad_id": moved[body["padding"]["pad_id"]]}
    return {**body, "model": model, "added_tokens": added, "padding": padding,
            "post_processor": _renumbered(body.get("post_processor"), moved)}  # fmt: skip


def _renumbered(part: Any, moved: dict[int, int]) -> Any:
    """A post-processor with new numbers: lists `ids` of templates, and pairs (token, id) of the older kinds."""
    if isinstance(part, dict):
        return {k: [moved[i] for i in v] if k == "ids" else _renumbered(v, moved) for k, v in part.items()}
    if isinstance(part, list):
        pair = len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int)
        return [part[0], moved[part[1]]] if pair else [_renumbered(p, moved) for p in part]
    return part


def ids_in(small: Any, large: Any) -> list[int]:
    """For each token of a trimmed tokenizer, its number in the one that it was trimmed from."""
    known = large.get_vocab()
    return [known[t] for t, _ in sorted(small.get_vocab().items(), key=lambda item: item[1])]


def cut(module: Any, index: Sequence[int]) -> Any:
    """The module with these rows of its embedding and its output only, in this order; tied ones stay tied.

    The rest is the very same tensors. Raises MethodError for a family with further tables by token.
    """
    made = twin(module)
    config: Any = made.config.get_text_config()
    table, output = made.get_input_embeddings(), made.get_output_embeddings()
    before, rows = table.num_embeddings, torch.tensor(index, device=table.weight.device)
    tables = [m for m in made.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == before]
    each: int = getattr(config, "hidden_size_per_layer_input", 0)  # Gemma 3n's other table has a size of its own
    if tables != [table] or each:
        raise MethodError(
            f"no rule for trimming the vocabulary of {family(module)}", expected="one table by token", found="several",
            do="set vocabulary=false",
        )  # fmt: skip
    tied = output.weight is table.weight
    table.weight = nn.Parameter(table.weight.detach()[rows], requires_grad=False)
    output.weight = table.weight if tied else nn.Parameter(output.weight.detach()[rows], requires_grad=False)
    if getattr(output, "bias", None) is not None:
        output.bias = nn.Parameter(output.bias.detach()[rows], requires_grad=False)
    table.num_embeddings = output.out_features = len(index)
    place = {old: new for new, old in enumerate(index)}
    for part in made.modules():
        if getattr(part, "vocab_size", None) == before:
            part.vocab_size = len(index)
        if isinstance(getattr(part, "padding_idx", None), int):
            part.padding_idx = place.get(part.padding_idx)
    config.vocab_size = len(index)
    for settings, name, ids in list(numbers(made)):
        moved = [place[i] for i in ids if i in place]
        setattr(settings, name, moved if isinstance(getattr(settings, name), list) else next(iter(moved), None))
    return made


def numbers(module: Any) -> Iterator[tuple[Any, str, list[int]]]:
    """(configuration, name, tokens) of every setting that names tokens by number."""
    both = {id(s): s for s in (module.config, module.config.get_text_config(), module.generation_config)}
    for settings in both.values():
        for name, value in vars(settings).items():
            if value is not None and name.endswith(("_token_id", "suppress_tokens")):
                yield settings, name, value if isinstance(value, list) else [value]
