"""A session over a GGUF file in llama.cpp: what is exported, asked by the engine that will serve it.

Text becomes tokens by llama.cpp's own tokenizer; the template is the file's. Needs llama-cpp-python (extra `llamacpp`).
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from whet.engine import ByScores, Generation, Progress, Prompt, Sampling, Score, Spent, until_stop
from whet.errors import ArtifactError, EngineError
from whet.prompt import end_of_turn, escape, render, specials_of, takes_system

Tokens = tuple[int, ...]
AT_ONCE, EACH = 32, 64  # continuations that are computed beside each other; tokens that there is room for in each
BATCH = 512  # tokens at a time


@cache
def _silent() -> Any:
    """Where its log goes instead of stderr; kept for good, because C goes on calling it."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaSession(ByScores):
    """llama.cpp over one file; `tokenizer` is the model's own, which only renders chats and names special tokens.

    Raises ArtifactError where llama.cpp cannot load the file, or its template is not the tokenizer's.
    """

    def __init__(self, file: Path, tokenizer: Any, context: int = 4096, threads: int = 1) -> None:
        import llama_cpp as cpp

        self.cpp: Any = cpp
        self.tokenizer, self.spent = tokenizer, Spent()
        cpp.llama_log_set(_silent(), ctypes.c_void_p(0))
        cpp.llama_backend_init()
        self.model = cpp.llama_model_load_from_file(str(file).encode(), cpp.llama_model_default_params())
        if not self.model:
            raise ArtifactError(f"llama.cpp cannot load {file.name}", expected="a GGUF it knows", do="update llama.cpp")
        self.vocab = cpp.llama_model_get_vocab(self.model)
        self.size: int = cpp.llama_vocab_n_tokens(self.vocab)
        self.context = min(context, cpp.llama_model_n_ctx_train(self.model))
        told = cpp.llama_context_default_params()
        told.n_ctx, told.n_batch, told.n_ubatch = self.context + AT_ONCE * EACH, BATCH, BATCH
        told.n_seq_max, told.kv_unified, told.n_threads, told.n_threads_batch = AT_ONCE + 1, True, threads, threads
        self.ctx = cpp.llama_init_from_model(self.model, told)
        if not self.ctx:
            cpp.llama_model_free(self.model)
            raise ArtifactError(f"llama.cpp has no memory for {self.context:,} tokens of {file.name}",
                                do="free some, or leave the check out: --no-check")  # fmt: skip
        self.memory = cpp.llama_get_memory(self.ctx)
        # A thread of its own: llama.cpp sets up a processor's tile registers once a thread, and torch resets them.
        self.thread = ThreadPoolExecutor(1)
        self.batch = cpp.llama_batch_init(BATCH, 0, 1)
        self.held: Tokens = ()  # the tokens that sequence 0 holds
        self.last = np.zeros(0, np.float32)  # logits behind them
        template = cpp.llama_model_chat_template(self.model, None)
        if (template or b"").decode() != tokenizer.get_chat_template():
            raise ArtifactError(f"{file.name} has another chat template", expected="the model's", do="export it again")
        self.system, self.specials = takes_system(tokenizer), specials_of(tokenizer)
        self.protocol = {"engine": "llama.cpp", "llama_cpp_python": cpp.__version__, "threads": str(threads)}

    def close(self) -> None:
        """Free what C holds."""
        self.thread.shutdown()
        self.cpp.llama_batch_free(self.batch)
        self.cpp.llama_free(self.ctx)
        self.cpp.llama_model_free(self.model)

    # --- text to tokens ---------------------------------------------------------------------------------------------

    def tokens(self, text: str) -> Tokens:
        """Token ids of a text; special tokens in it count, none is put in front."""
        raw = text.encode()
        room = (self.cpp.llama_token * (len(raw) + 8))()
        n = self.cpp.llama_tokenize(self.vocab, raw, len(raw), room, len(room), False, True)
        return tuple(room[:n])

    def encode(self, prompts: Sequence[Prompt]) -> list[Tokens]:
        """Token ids of prompts, as `TorchSession.encode` makes them."""
        start = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if start is None else start
        made = [(p, self.tokens(render(self.tokenizer, p, system=self.system))) for p in prompts]
        return [(start, *t) if isinstance(p, str) and t[:1] != (start,) else t for p, t in made]

    def count(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt."""
        return [len(t) for t in self.encode(prompts)]

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say, special ones left out."""
        ids = (self.cpp.llama_token * len(tokens))(*tokens)
        room = ctypes.create_string_buffer(64 * len(tokens) + 8)
        n = self.cpp.llama_detokenize(self.vocab, ids, len(tokens), room, len(room), False, False)
        return room.raw[: max(0, n)].decode(errors="replace")

    # --- computing --------------------------------------------------------------------------------------------------

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[np.ndarray[Any, Any]]:
        """Compute (token, position, sequence, whether its logits are wanted); returns those logits in order."""
        made = []
        for at in range(0, len(rows), BATCH):
            part, batch = rows[at : at + BATCH], self.batch
            for n, (token, position, sequence, wanted) in enumerate(part):
                batch.token[n], batch.pos[n], batch.logits[n] = token, position, wanted
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
            batch.n_tokens = len(part)
            if self.thread.submit(self.cpp.llama_decode, self.ctx, batch).result() != 0:
                raise EngineError("llama.cpp cannot compute a batch", expected="room for it", do="shorten the prompts")
            wanted_at = [n for n, row in enumerate(part) if row[3]]
            made += [np.ctypeslib.as_array(self.cpp.llama_get_logits_ith(self.ctx, n), (self.size,)).copy()
                     for n in wanted_at]  # fmt: skip
        self.spent += Spent(prefilled_tokens=len(rows))
        return made

    def _hold(self, prompt: Tokens) -> None:
        """Let sequence 0 hold a prompt; what it has in common with the last one is kept."""
        if len(prompt) > self.context:
            raise EngineError("a prompt is longer than the context window", expected=f"at most {self.context} tokens",
                              found=str(len(prompt)), do="shorten it")  # fmt: skip
        if prompt == self.held:
            return
        same = 0
        while same < min(len(prompt) - 1, len(self.held)) and prompt[same] == self.held[same]:
            same += 1
        self.held = ()
        if not self.cpp.llama_memory_seq_rm(self.memory, 0, same, -1):  # some models cannot forget a part
            self.cpp.llama_memory_clear(self.memory, True)
            same = 0
        rows = [(t, n, 0, n == len(prompt) - 1) for n, t in enumerate(prompt)][same:]
        (self.last,) = self._decode(rows)
        self.held = prompt

    def follow(self, prompt: Tokens, answers: Sequence[Tokens]) -> Iterator[np.ndarray[Any, Any]]:
        """For each answer, the logits in front of each of its tokens [tokens, vocabulary]."""
        self._hold(prompt)
        most = max(1, min(AT_ONCE, AT_ONCE * EACH // max([1, *map(len, answers)])))
        for at in range(0, len(answers), most):
            part = answers[at : at + most]
            rows = []
            for n, answer in enumerate(part, 1):
                self.cpp.llama_memory_seq_cp(self.memory, 0, n, -1, -1)
                rows += [(t, len(prompt) + i, n, True) for i, t in enumerate(answer[:-1])]
            made = iter(self._decode(rows))
            for n in range(1, len(part) + 1):
                self.cpp.llama_memory_seq_rm(self.memory, n, -1, -1)
            for answer in part:
                yield np.stack([self.last, *(next(made) for _ in answer[:-1])])

    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Sequence[str]],
        *,
        end: bool = False,
        progress: Progress | None = None,
    ) -> list[tuple[Score, ...]]:
        """Log-probability of each continuation behind its prompt; with `end`, of the turn ending there too."""
        from scipy.special import log_softmax

        begun, made = time.monotonic(), []
        stop = (end_of_turn(self.tokenizer),) if end else ()
        for n, (prompt, texts) in enumerate(zip(self.encode(prompts), continuations, strict=True)):
            raw = isinstance(prompts[n], str)
            answers = [(*self.tokens(t if raw else escape(t, self.specials)), *stop) for t in texts]
            made.append(tuple(
                Score(float(log_softmax(z.astype(np.float64), axis=-1)[np.arange(len(a)), a].sum()), len(a))
                for a, z in zip(answers, self.follow(prompt, answers), strict=True)
            ))  # fmt: skip
            if progress:
                progress(n + 1, len(prompts))
        self.spent += Spent(seconds=time.monotonic() - begun)
        return made

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[tuple[Generation, ...]]:
        """Answers, drawn as `TorchSession` draws them."""
        begun, made = time.monotonic(), list[tuple[Generation, ...]]()
        before = Counter[Tokens]()  # answers to the same prompt: no two of them are drawn alike
        for n, prompt in enumerate(self.encode(prompts)):
            drawn = list[Generation]()
            for _ in range(sampling.n if sampling.temperature > 0 else 1):
                answer = self._answer(prompt, sampling, before[prompt])
                before[prompt] += 1
                over = bool(answer) and self._ends(answer[-1])
                said, cut = until_stop(self.text(answer[:-1] if over else answer), sampling.stop)
                drawn.append(Generation(said, len(answer), "stop" if over or cut else "length"))
                self.spent += Spent(generated_tokens=len(answer))
            made.append(tuple(drawn) * (sampling.n // len(drawn)))
            if progress:
                progress(n + 1, len(prompts))
        self.spent += Spent(seconds=time.monotonic() - begun)
        return made

    def _ends(self, token: int) -> bool:
        return bool(self.cpp.llama_vocab_is_eog(self.vocab, token))

    def _answer(self, prompt: Tokens, sampling: Sampling, copy: int) -> Tokens:
        """The likeliest tokens behind a prompt, or drawn ones, one by one, the end of turn included."""
        import torch

        from whet.engine.sampling import sampler

        self._hold(prompt)
        pick = sampler(sampling, [(prompt, copy, 0)])
        answer: list[int] = []
        while len(answer) < sampling.max_tokens:
            answer += pick(torch.from_numpy(self.last)[None], [0])
            if self._ends(answer[-1]) or any(s in self.text(answer) for s in sampling.stop):
                break
            at = len(self.held)
            (self.last,) = self._decode([(answer[-1], at, 0, True)])
            self.held = (*self.held, answer[-1])
        return tuple(answer)
