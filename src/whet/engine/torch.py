"""The torch engine: prompts run in this process, shared beginnings computed once."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from whet import model as models
from whet.engine import (
    ByScores,
    Generation,
    Progress,
    Prompt,
    Sampling,
    Score,
    Session,
    Spent,
    attention,
    lazy,
    prefix,
    quick,
    until_stop,
)
from whet.engine.prefix import Row, Tokens
from whet.engine.sampling import copies_of, sampler
from whet.errors import EngineError
from whet.prompt import asides_of, end_of_turn, ends_of, escape, render, specials_of, takes_system, unescape

BATCH_TOKENS = 2048  # packed tokens per forward pass: larger ones fall out of the caches and gain nothing
DEVICE_TOKENS = 16_384  # on a GPU, which smaller passes leave idle between kernels
KEY_BYTES = 512 * 2**20  # keys and values of prompts held at once while generating; joining them needs as much again
KEY_SHARE = 1 / 16  # of a GPU's memory, for the same
SHARED_TEXT = 200  # characters from which on a common beginning is worth a second call of the tokenizer
LOGIT_CELLS = 2**28  # logits of one pass: half a gigabyte in half precision
LOGIT_ROWS = 1024  # places whose logits are in fp32 at once
CACHES = ("past_key_values", "cache_params", "state")  # what families call the cache that they give back


def open_torch(ref: models.ModelRef, home: Path) -> Session:
    """Load a model in this process (see `model.load` for what it raises) and open a session over it."""
    return TorchSession(*models.load(ref, home))


@dataclass
class _Live:
    """A row while it is being generated."""

    row: int
    tokens: list[int]
    length: int  # tokens of the prompt
    unit: prefix.Unit


@dataclass(frozen=True)
class Prefilled:
    """Prompts whose keys and values are at hand: per layer each unit's own, and those of the trunks."""

    forest: prefix.Forest
    own: dict[int, attention.KeysValues]
    kept: dict[int, dict[int, attention.KeysValues]]
    logits: Tensor  # [units, vocabulary] behind each prompt
    tokens: int

    @property
    def capacity(self) -> int:
        """Places for keys per unit."""
        return next(iter(self.own.values()))[0].shape[2]


def layer_configs(config: Any) -> list[Any]:
    """The configuration of each layer: in some families heads differ in size from layer to layer."""
    own = getattr(config, "per_layer_config", None)
    return list(own) if own else [config] * config.num_hidden_layers


def _key_size(config: Any) -> int:
    """Numbers that a layer's keys take for each token."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads))


class TorchSession(ByScores):
    """A session over a module and its tokenizer; also over a live module that is being trained."""

    def __init__(self, module: Any, tokenizer: Any, *, batch_tokens: int | None = None) -> None:
        self.module, self.tokenizer = module, tokenizer
        on_gpu = module.device.type == "cuda"
        self.batch_tokens = batch_tokens or (DEVICE_TOKENS if on_gpu else BATCH_TOKENS)
        self.spent = Spent()
        self.quick: bool | None = None  # whether the quick step gives what the module gives; None: not yet known
        self._step: quick.Step | None = None  # for the length of a call: adapters come and go
        config = module.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self.context = int(longest or 2048)
        self.system = takes_system(tokenizer)
        self.specials = specials_of(tokenizer)
        self.broken = (*self.specials, *asides_of(tokenizer))  # what a prompt never shows whole
        self.end_id = end_of_turn(tokenizer)
        self.stop_ids = ends_of(module, tokenizer)
        self.encode_text = lru_cache(maxsize=65_536)(self._encode_text)
        self.protocol = {
            "engine": "torch",
            "dtype": str(module.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(module.device) if on_gpu else str(module.device),
            "torch": torch.__version__,
            "sharing": "tree" if attention.window(module) != 0 else "none",
        }

    @property
    def most_logits(self) -> int:
        """At how many places logits are computed at once."""
        return max(1, LOGIT_CELLS // int(self.module.config.get_text_config().vocab_size))

    @property
    def key_tokens(self) -> int:
        """How many tokens' keys and values are held at once."""
        config = self.module.config.get_text_config()
        each = 2 * sum(map(_key_size, layer_configs(config))) * self.module.dtype.itemsize
        device = self.module.device
        on_gpu = device.type == "cuda"
        most = KEY_SHARE * torch.cuda.get_device_properties(device).total_memory if on_gpu else KEY_BYTES
        return max(1, int(most) // int(each))

    def close(self) -> None:
        """Release the module."""
        self._step = None
        del self.module

    # --- text to tokens -------------------------------------------------------------------------------------------

    def _encode_text(self, text: str, raw: bool) -> Tokens:
        text = text if raw else escape(text, self.specials)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, prompts: Sequence[Prompt]) -> list[Tokens]:
        """Token ids of prompts, each rendered by the model's template with the answer's turn opened."""
        texts = [render(self.tokenizer, p, system=self.system) for p in prompts]
        ids = self._tokenize(texts) if texts else []
        start = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if start is None else start
        # Raw text has no turn that opens it: its first token is predicted from the beginning-of-text token.
        return [
            (start, *t) if isinstance(p, str) and t[:1] != [start] else tuple(t)
            for p, t in zip(prompts, ids, strict=True)
        ]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts. What all begin with, up to a marker that no word reaches across, is looked at once."""
        def plain(some: Sequence[str]) -> list[list[int]]:
            return cast(list[list[int]], self.tokenizer(list(some), add_special_tokens=False)["input_ids"])

        # Short of where they part by a marker's length, so that the first text speaks for all.
        head = commonprefix(texts)[: -1 - max(map(len, self.specials), default=0)]
        cut = max((head.rfind(mark) for mark in self.specials), default=-1)
        if len(texts) < 3 or cut < SHARED_TEXT:
            return plain(texts)
        first, whole = plain([head[:cut], texts[0]])
        rest = plain([text[cut:] for text in texts])
        # Some tokenizers treat the beginning of a text, or what stands around a marker, in ways of their own.
        return [[*first, *own] for own in rest] if whole == [*first, *rest[0]] else plain(texts)

    def encode_answer(self, text: str, end: bool, raw: bool = False) -> Tokens:
        """Token ids of an answer; with `end`, the end of the turn follows. Markers in it are only text unless `raw`."""
        tokens = self.encode_text(text, raw)
        return (*tokens, self.end_id) if end else tokens

    def count(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt, the opening of the answer's turn included."""
        return [len(t) for t in self.encode(prompts)]

    def _fits(self, longest: int) -> None:
        if longest > self.context:
            raise EngineError(
                "a prompt is longer than the model's context window",
                expected=f"at most {self.context} tokens", found=str(longest), do="shorten it",
            )  # fmt: skip

    # --- scoring --------------------------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Sequence[str]],
        *,
        end: bool = False,
        progress: Progress | None = None,
    ) -> list[tuple[Score, ...]]:
        """Log-probability of each continuation behind its prompt; with `end`, that the turn ends there is scored too.

        Raw text longer than the context window is scored in windows of it.
        """
        rows: list[Row] = []
        owners: list[tuple[int, int]] = []  # of each row: its prompt, and its first continuation
        for n, (prompt, texts) in enumerate(zip(self.encode(prompts), continuations, strict=True)):
            raw = isinstance(prompts[n], str)
            answers = tuple(self.encode_answer(t, end, raw) for t in texts)
            if raw and any(len(prompt) + len(a) > self.context for a in answers):
                pieces = [(c, piece) for c, a in enumerate(answers) for piece in self.windows(prompt, a, self.context)]
            else:
                pieces = [(0, Row(prompt, answers))]
            rows += [piece for _, piece in pieces]
            owners += [(n, c) for c, _ in pieces]
        results = [[Score(0.0, 0)] * len(texts) for texts in continuations]
        for (n, first), scored in zip(owners, self.score_rows(rows, progress), strict=True):
            for c, values in enumerate(scored, first):  # windows of one text add up
                old = results[n][c]
                results[n][c] = Score(old.logprob + sum(values), old.tokens + len(values))
        return [tuple(row) for row in results]

    def windows(self, prompt: Tokens, text: Tokens, most: int) -> Iterator[Row]:
        """Consecutive windows of at most `most` tokens; each one's first token is predicted from the one before it."""
        self._fits(len(prompt) + 1)
        size = min(most, self.context) - len(prompt)
        for at in range(0, len(text), size):
            yield Row(prompt if at == 0 else (text[at - 1],), (text[at : at + size],))

    def score_rows(self, rows: Sequence[Row], progress: Progress | None = None) -> list[list[list[float]]]:
        """Log-probability of every token of every continuation of every row (rows → continuations → tokens)."""
        begun = time.monotonic()
        longest = max((len(r.prompt) + max(map(len, r.continuations), default=0) for r in rows), default=0)
        self._fits(longest)
        if attention.shares(self.module, longest):
            results, tokens = self._score_shared(rows, progress)
        else:
            results, tokens = _score_unshared(self.module, rows, min(self.batch_tokens, self.most_logits), progress)
        self.spent += Spent(seconds=time.monotonic() - begun, prefilled_tokens=tokens)
        return results

    def _score_shared(self, rows: Sequence[Row], progress: Progress | None) -> tuple[list[list[list[float]]], int]:
        forest = prefix.arrange(rows)
        results: list[list[list[float]]] = [[] for _ in rows]
        kept: dict[int, dict[int, attention.KeysValues]] = {}
        done = tokens = 0
        most = min(self.batch_tokens, self.most_logits)
        with using_tree(self.module), no_gradients(self.module):
            for batch in prefix.batches(forest, self.batch_tokens, most_targets=most):
                for trunk in set(kept) - set(batch.past):
                    del kept[trunk]
                plan = attention.plan(forest, batch, self.module.dtype, self.module.device, kept, keep=True)
                places = [
                    (at + before, token)
                    for unit, at in zip(batch.units, batch.unit_at, strict=True)
                    for target in unit.targets
                    for before, token in target
                ]
                values = iter(_target_logprobs(self.module, forest, batch, plan, places).tolist())
                for unit in batch.units:
                    results[unit.row] = [[next(values) for _ in target] for target in unit.targets]
                done += len(batch.units)
                tokens += batch.length
                if progress:
                    progress(done, len(rows))
        return results, tokens

    # --- generation -----------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[tuple[Generation, ...]]:
        """`sampling.n` answers per prompt; greedy at temperature 0. Sampling is repeatable by seed and prompt."""
        copies = sampling.n if sampling.temperature > 0 else 1
        rows = [Row(tokens) for tokens in self.encode(prompts) for _ in range(copies)]
        made = [g for _, g in self.generate_rows(rows, sampling, progress)]
        if copies == 1:
            return [(g,) * sampling.n for g in made]
        return [tuple(made[i : i + copies]) for i in range(0, len(made), copies)]

    def generate_rows(
        self, rows: Sequence[Row], sampling: Sampling, progress: Progress | None = None
    ) -> list[tuple[Tokens, Generation]]:
        """One answer behind each row's prompt: its very tokens, the end of turn included, and what they say."""
        begun = time.monotonic()
        longest = max((len(r.prompt) for r in rows), default=0) + sampling.max_tokens
        self._fits(longest)
        if attention.shares(self.module, longest):
            answers, prefilled = self._generate_shared(rows, sampling, progress)
        else:
            answers, prefilled = _generate_unshared(self, rows, sampling, progress)
        generated = sum(len(tokens) for tokens in answers)
        self.spent += Spent(time.monotonic() - begun, 0.0, 0, prefilled, generated)
        return [(tuple(tokens), self._finish(tokens, sampling)) for tokens in answers]

    def _finish(self, tokens: list[int], sampling: Sampling) -> Generation:
        """Text of generated tokens, ended before the end of turn or the first stop string; markers in it are whole."""
        ended = bool(tokens) and tokens[-1] in self.stop_ids
        text = self.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
        text, cut = until_stop(unescape(text, self.broken), sampling.stop)
        return Generation(text, len(tokens), "stop" if ended or cut else "length")

    def _ended(self, tokens: list[int], sampling: Sampling) -> bool:
        if tokens[-1] in self.stop_ids or len(tokens) >= sampling.max_tokens:
            return True
        # A stop string may lie across tokens, as many as its bytes at most: look at the tail only.
        longest = max((len(s.encode()) for s in sampling.stop), default=0)
        tail = self.tokenizer.decode(tokens[-longest - 1:]) if longest else ""
        return any(s in tail for s in sampling.stop)

    def _generate_shared(
        self, rows: Sequence[Row], sampling: Sampling, progress: Progress | None
    ) -> tuple[list[list[int]], int]:
        forest = prefix.arrange(rows)
        answers: list[list[int]] = [[] for _ in rows]
        done = prefilled = 0
        for group in groups(forest, sampling.max_tokens, self.key_tokens):
            with using_tree(self.module), no_gradients(self.module):
                ready = self.prefill(forest, group, sampling.max_tokens)
                self._decode(ready, rows, sampling, answers)
            prefilled += ready.tokens
            done += len(group)
            if progress:
                progress(done, len(rows))
        return answers, prefilled

    def prefill(self, forest: prefix.Forest, units: Sequence[prefix.Unit], room: int) -> Prefilled:
        """Compute prompts and keep their keys and values, with room for `room` more tokens behind each."""
        self._step = None
        sub = prefix.Forest(forest.trunks, tuple(units))
        kept: dict[int, dict[int, attention.KeysValues]] = {}
        blocks: list[dict[int, attention.KeysValues]] = []
        logits: list[Tensor] = []
        tokens = 0
        capacity = max(len(u.tokens) for u in units) + room
        for batch in prefix.batches(sub, self.batch_tokens):
            plan = attention.plan(sub, batch, self.module.dtype, self.module.device, kept, keep=True)
            plan.keep_all = {}
            last = [at + u.last for u, at in zip(batch.units, batch.unit_at, strict=True)]
            logits.append(_logits(self.module, sub, batch, plan, last))
            places = _unit_places(batch, self.module.device)
            blocks.append({n: _own_keys(kv, places, capacity) for n, kv in plan.keep_all.items()})
            tokens += batch.length
        own = {n: (torch.cat([b[n][0] for b in blocks]), torch.cat([b[n][1] for b in blocks])) for n in blocks[0]}
        return Prefilled(sub, own, kept, torch.cat(logits), tokens)

    def _decode(
        self, ready: Prefilled, rows: Sequence[Row], sampling: Sampling, answers: list[list[int]]
    ) -> None:
        """The loop over new tokens; rows that ended leave the batch."""
        device, dtype = self.module.device, self.module.dtype
        forest, units, own, kept, logits = ready.forest, ready.forest.units, ready.own, ready.kept, ready.logits
        live = [_Live(u.row, [], len(rows[u.row].prompt), u) for u in units]
        copies = copies_of(rows)
        draw = sampler(sampling, [(rows[u.row].prompt, copies[u.row], u.row) for u in units])
        while live:
            for item, token in zip(live, draw(logits, [x.row for x in live]), strict=True):
                item.tokens.append(token)
            going = [i for i, x in enumerate(live) if not self._ended(x.tokens, sampling)]
            for item in live:
                answers[item.row] = item.tokens
            if not going:
                return
            if len(going) < len(live):
                index = torch.tensor(going, device=device)
                own = {n: (k.index_select(0, index), v.index_select(0, index)) for n, (k, v) in own.items()}
                live = [live[i] for i in going]
            step = len(live[0].tokens) - 1
            at = torch.tensor([len(x.unit.tokens) + step for x in live], device=device)
            seen = torch.arange(ready.capacity, device=device) <= at[:, None]
            reads = decode_reads(forest, [x.unit for x in live])
            plan = attention.Decode(own, at, additive(seen[:, None], dtype), reads, kept)
            logits = self.advance([x.tokens[-1] for x in live], [x.length + step for x in live], plan)

    def advance(self, tokens: Sequence[int], positions: Sequence[int], plan: attention.Decode) -> Tensor:
        """Feed one token to each row of a decoding step; returns logits [rows, vocabulary]."""
        ids = torch.tensor(tokens, device=self.module.device)
        places = torch.tensor(positions, device=self.module.device)
        if self.quick and self._step is not None:
            return self._step(ids, places, plan)
        step = quick.step_of(self.module) if self.quick is not False else None
        if step is not None and self.quick:
            self._step = step
            return step(ids, places, plan)
        out = self.module(input_ids=ids[None], position_ids=places[None], use_cache=False, whet_plan=plan)
        logits = cast(Tensor, out.logits[0])
        if step is None:
            self.quick = False
            return logits
        # What a step writes it writes again alike, so that both ways can be taken from the same place.
        mine = step(ids, places, plan)
        self.quick = quick.agrees(mine, logits)
        return mine if self.quick else logits  # later calls give what this one gave

    # --- choosing -------------------------------------------------------------------------------------------------

    def choose(
        self,
        prompts: Sequence[Prompt],
        choices: Sequence[Sequence[str]],
        *,
        whole: bool = False,
        offsets: Sequence[float] = (),
        progress: Progress | None = None,
    ) -> list[tuple[float, ...]]:
        """Scores whose greatest is exact (see Session); large sets are searched best first instead of scored whole."""
        sets = [[self.encode_answer(c, whole) for c in row] for row in choices]
        if not lazy.worth(sets) or attention.window(self.module) is not None:
            return super().choose(prompts, choices, whole=whole, offsets=offsets, progress=progress)
        begun = time.monotonic()
        rows = [Row(t) for t in self.encode(prompts)]
        longest = max(len(c) for row in sets for c in row)
        self._fits(max(map(len, (r.prompt for r in rows))) + longest)
        results, tokens = lazy.choose(self, rows, sets, whole, offsets, progress)
        self.spent += Spent(seconds=time.monotonic() - begun, prefilled_tokens=tokens)
        return results

    def scores_all(self, choices: Sequence[str], whole: bool = False) -> bool:
        """Whether the set is so small (or the model's attention such) that all of it is scored."""
        searched = lazy.worth([[self.encode_answer(c, whole) for c in choices]])
        return not searched or attention.window(self.module) is not None

    def cost(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]], every: bool = False) -> int:
        """About how many tokens choosing (with `every`, scoring) would compute; what all prompts share counts once."""
        sets = [[self.encode_answer(c, False) for c in row] for row in choices]
        searched = not every and lazy.worth(sets)
        rows = [
            Row(p, () if searched else tuple(s)) for p, s in zip(self.encode(prompts), sets, strict=True)
        ]
        return prefix.arrange(rows).unique_tokens + (lazy.EXPECTED * len(rows) if searched else 0)


def give_back_memory() -> None:
    """Hand freed memory back to the system: glibc keeps what large batches needed, which adds up over many arms."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such call
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def using_tree(module: Any, *, train: bool | None = False, shared: bool = True) -> Iterator[None]:
    """Run a module with tree attention (its own unless `shared`); implementation and mode are restored afterwards.

    With `train` its mode is that of `in_mode`; None leaves the mode as it is.
    """
    before = module.config._attn_implementation
    try:
        if shared:
            module.set_attn_implementation(attention.NAME)
        with contextlib.nullcontext() if train is None else in_mode(module, train):
            yield
    finally:
        if shared:
            module.set_attn_implementation(before)


def no_gradients(module: Any) -> contextlib.AbstractContextManager[Any]:
    """Within it, nothing is kept for gradients; a module whose weights are sharded can still be trained afterwards."""
    # What shards gather under inference mode, the next training pass cannot gather into again.
    return torch.no_grad() if hasattr(module, "set_requires_gradient_sync") else torch.inference_mode()


@contextmanager
def in_mode(module: Any, train: bool) -> Iterator[None]:
    """Within it, a module trains or not; to `train` means gradients and what goes with them, not chance: nothing is
    dropped.
    """
    before = module.training
    try:
        module.train(train)
        with _steady(module) if train else contextlib.nullcontext():
            yield
    finally:
        module.train(before)


@contextmanager
def _steady(module: Any) -> Iterator[None]:
    """Within it, dropout and jitter are off, also those that layers read off an attribute or their config."""
    layers = list(module.modules())
    own = [m for m in layers if not type(m).__module__.startswith("torch.nn")]  # torch's have no chance but Dropout
    configs = {id(c): c for m in own if (c := vars(m).get("config")) is not None}.values()
    parts = [*own, *configs, *(m for m in layers if isinstance(m, torch.nn.Dropout))]
    chances = [
        (vars(part), name, value)
        for part in parts
        for name, value in vars(part).items()
        if type(value) is float and value
        and ("drop" in name or "jitter" in name or (name == "p" and isinstance(part, torch.nn.Dropout)))
    ]  # fmt: skip
    try:
        for held, name, _ in chances:
            held[name] = 0.0
        yield
    finally:
        for held, name, value in chances:
            held[name] = value


def _logits(
    module: Any, forest: prefix.Forest, batch: prefix.Batch, plan: attention.Plan, places: Sequence[int]
) -> Tensor:
    """Logits [len(places), vocabulary] at the given places of a packed batch."""
    ids, positions = attention.packed(forest, batch, module.device)
    index = torch.tensor(places, device=module.device)
    out = module(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=index, whet_plan=plan)
    return cast(Tensor, out.logits[0])


def _target_logprobs(
    module: Any,
    forest: prefix.Forest,
    batch: prefix.Batch,
    plan: attention.Plan,
    places: Sequence[tuple[int, int]],
) -> Tensor:
    """Log-probability [len(places)] of each (place before, token); places that recur are computed once."""
    if not places:
        return torch.zeros(0)
    unique = sorted({place for place, _ in places})
    rank = {place: n for n, place in enumerate(unique)}
    logits = _logits(module, forest, batch, plan, unique)
    rows = torch.tensor([rank[place] for place, _ in places], device=logits.device)
    tokens = torch.tensor([token for _, token in places], device=logits.device)
    # In slices: a whole window's logits in fp32 would take gigabytes.
    total = torch.cat([torch.logsumexp(part.float(), -1) for part in logits.split(LOGIT_ROWS)])
    return logits[rows, tokens].float() - total[rows]


def _unit_places(batch: prefix.Batch, device: torch.device) -> Tensor:
    """Where each unit's tokens stand in a packed batch, [units, longest]; behind its end, its last one again."""
    longest = max(len(u.tokens) for u in batch.units)
    places = [
        [at + min(i, len(u.tokens) - 1) for i in range(longest)]
        for u, at in zip(batch.units, batch.unit_at, strict=True)
    ]
    return torch.tensor(places, device=device)


def _own_keys(kv: attention.KeysValues, places: Tensor, capacity: int) -> attention.KeysValues:
    """Each unit's own keys and values out of a packed batch, padded to [units, groups, capacity, size].

    What a unit does not have is masked whenever it is read.
    """
    blocks = []
    for packed in kv:
        block = packed.new_zeros(len(places), packed.shape[1], capacity, packed.shape[3])
        taken = packed[0].index_select(1, places.reshape(-1)).unflatten(1, tuple(places.shape))
        block[:, :, : places.shape[1]] = taken.transpose(0, 1)
        blocks.append(block)
    return blocks[0], blocks[1]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask [rows, tokens, keys] as the additive mask [rows, 1, tokens, keys] of a decoding step."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, float("-inf"))[:, None]


def groups(forest: prefix.Forest, new: int, most: int) -> Iterator[list[prefix.Unit]]:
    """Units whose keys and values (prompt rest and new tokens) are those of at most `most` tokens together, and so are
    those of the trunks that they hang on, but for the first unit's.
    """
    group: list[prefix.Unit] = []
    longest, trunks, shared = 0, set[int](), 0
    for unit in forest.units:
        chain = {*forest.chain(unit.trunk)}
        longest = max(longest, len(unit.tokens) + new)
        more = sum(len(forest.trunks[t].tokens) for t in chain - trunks)
        # A trunk that is longer by itself is not computed anew for each of its units: only what is new counts.
        if group and (longest * (len(group) + 1) > most or (more and shared + more > most)):
            yield group
            group, longest, trunks, shared = [], len(unit.tokens) + new, set(), 0
            more = sum(len(forest.trunks[t].tokens) for t in chain)
        group.append(unit)
        trunks |= chain
        shared += more
    if group:
        yield group


def decode_reads(forest: prefix.Forest, units: Sequence[prefix.Unit]) -> tuple[attention.Reads, ...]:
    """Which rows of a step read which trunk: units stand in depth-first order, so each trunk's readers are one run."""
    spans: dict[int, tuple[int, int]] = {}
    for n, unit in enumerate(units):
        for trunk in forest.chain(unit.trunk):
            spans[trunk] = (spans.get(trunk, (n, n))[0], n + 1)
    return tuple(attention.Reads(start, stop, trunk, None) for trunk, (start, stop) in sorted(spans.items()))


# --- models whose attention cannot be shared: padded batches, transformers' own loops -------------------------------


def _score_unshared(
    module: Any, rows: Sequence[Row], most: int, progress: Progress | None
) -> tuple[list[list[list[float]]], int]:
    """Score every continuation as a row of its own, padded on the right, batched by length."""
    flat = [(n, c, (*r.prompt, *cont), len(cont)) for n, r in enumerate(rows) for c, cont in enumerate(r.continuations)]
    flat.sort(key=lambda item: (len(item[2]), item[0], item[1]))
    results: list[list[list[float]]] = [[[] for _ in r.continuations] for r in rows]
    turn = attention.turn(module)
    at = tokens = 0
    while at < len(flat):
        stop = at + 1
        while (
            stop < len(flat) and len(flat[stop][2]) * (stop + 1 - at) <= most
            and (len(flat[stop][2]) > turn) == (len(flat[at][2]) > turn)
        ):  # fmt: skip
            stop += 1
        part, width = flat[at:stop], len(flat[stop - 1][2])
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for i, (_, _, sequence, _) in enumerate(part):
            ids[i, : len(sequence)] = torch.tensor(sequence)
            mask[i, : len(sequence)] = 1
        keep = max(size for _, _, _, size in part) + width - min(len(item[2]) for item in part) + 1
        with using_tree(module, shared=False), no_gradients(module):
            out = module(
                input_ids=ids.to(module.device), attention_mask=mask.to(module.device), use_cache=False,
                logits_to_keep=min(keep, width),
            ).logits  # fmt: skip
            values = iter(_picked(out, [
                (i, p - 1 - width, sequence[p])  # places are counted from the end: that is where logits are kept
                for i, (_, _, sequence, size) in enumerate(part)
                for p in range(len(sequence) - size, len(sequence))
            ]))  # fmt: skip
        for n, c, _, size in part:
            results[n][c] = [next(values) for _ in range(size)]
        tokens += sum(len(item[2]) for item in part)
        at = stop
        if progress:
            progress(at, len(flat))
    return results, tokens


def _picked(logits: Tensor, places: Sequence[tuple[int, int, int]]) -> list[float]:
    """Log-probability of each (row, place, token), of logits [rows, places, vocabulary]; few are in fp32 at once."""
    found: list[float] = []
    for at in range(0, len(places), LOGIT_ROWS):
        rows, columns, tokens = torch.tensor(places[at : at + LOGIT_ROWS], device=logits.device).T
        some = logits[rows, columns].float()
        found += (some.gather(-1, tokens[:, None])[:, 0] - torch.logsumexp(some, -1)).tolist()
    return found


def _generate_unshared(
    session: TorchSession, rows: Sequence[Row], sampling: Sampling, progress: Progress | None
) -> tuple[list[list[int]], int]:
    """Generate row by row with the model's own cache; where there is none, all is computed anew at each step."""
    answers: list[list[int]] = []
    numbered = zip(rows, copies_of(rows), strict=True)
    draw = sampler(sampling, [(r.prompt, c, n) for n, (r, c) in enumerate(numbered)])
    turn = attention.turn(session.module)
    for n, row in enumerate(rows):
        cache, made = dict[str, Any](), list[int]()
        with using_tree(session.module, shared=False), no_gradients(session.module):
            while not made or not session._ended(made, sampling):
                if len(row.prompt) + len(made) == turn + 1:
                    cache = {}
                ids = torch.tensor([made[-1:] if cache else [*row.prompt, *made]], device=session.module.device)
                out = session.module(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)
                cache = {name: out[name] for name in CACHES if out.get(name) is not None}
                made += draw(out.logits[:, -1], [n])
        answers.append(made)
        if progress:
            progress(n + 1, len(rows))
    return answers, sum(len(r.prompt) for r in rows)
