"""The fake engine: no model, answers by rule; for tests and for trying things out. Deterministic by content.

`fake:echo` says the last line of the last user turn. `fake:hash` says and scores pseudo-random things.
`fake:keyword` answers as the demonstration whose question shares most words does, so that demonstrations help it.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import time
from collections.abc import Callable, Sequence

from whet.engine import ByScores, Chat, Generation, Progress, Prompt, Sampling, Score, Session, Spent, until_stop
from whet.errors import EngineError, ModelError, nearest
from whet.model import ModelRef

CONTEXT = 1024  # words
WORDS = ("yes", "no", "red", "green", "blue", "one", "two", "three", "north", "south", "cat", "dog")


def share(*parts: object) -> float:
    """A number in (0, 1) that looks random and depends on the parts alone."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:6]) + 0.5) / 2**48


def _text(prompt: Prompt) -> str:
    """All words of a prompt."""
    return prompt if isinstance(prompt, str) else "\n".join(content for _, content in prompt)


def _question(prompt: Prompt) -> str:
    """The last user turn; of raw text, all of it."""
    if isinstance(prompt, str):
        return prompt
    return next((content for role, content in reversed(prompt) if role == "user"), "")


def _last_line(prompt: Prompt) -> str:
    return next((line.strip() for line in reversed(_question(prompt).splitlines()) if line.strip()), "")


def _demonstrations(prompt: Prompt) -> list[tuple[str, str]]:
    """Questions and answers of the turns before the last."""
    chat: Chat = () if isinstance(prompt, str) else prompt
    pairs = zip(chat, chat[1:], strict=False)
    return [(a[1], b[1].strip()) for a, b in pairs if a[0] == "user" and b[0] == "assistant"]


def _words(text: str) -> frozenset[str]:
    """Words that carry meaning: those of more than three letters, or all where there is none."""
    found = re.findall(r"\w+", text.casefold())
    return frozenset([w for w in found if len(w) > 3] or found)


def overlap(a: str, b: str) -> float:
    """Share of words that two texts have in common (Jaccard 1901), 0 to 1."""
    left, right = _words(a), _words(b)
    return len(left & right) / max(1, len(left | right))


def _trigrams(text: str) -> frozenset[str]:
    text = f" {text.casefold().strip()} "
    return frozenset(text[i : i + 3] for i in range(len(text) - 2))


# --- the kinds --------------------------------------------------------------------------------------------------------

Say = Callable[[Prompt, Sampling, int], str]  # (prompt, sampling, which of n) → answer
Rate = Callable[[Prompt, str], float]  # (prompt, continuation) → log-probability


def _say_echo(prompt: Prompt, sampling: Sampling, copy: int) -> str:
    return _last_line(prompt)


def _rate_echo(prompt: Prompt, continuation: str) -> float:
    """Words of the line are likely, others are not."""
    said = _last_line(prompt).split()
    return sum(math.log(0.9 if word in said else 0.01) for word in continuation.split())


def _say_hash(prompt: Prompt, sampling: Sampling, copy: int) -> str:
    """1 to 8 words; sampling draws others for each seed and copy."""
    drawn = (sampling.seed, copy) if sampling.temperature > 0 else ()
    size = 1 + int(8 * share(prompt, "size", *drawn))
    return " ".join(WORDS[int(len(WORDS) * share(prompt, n, *drawn))] for n in range(size))


def _rate_hash(prompt: Prompt, continuation: str) -> float:
    return max(1, len(continuation.split())) * math.log(share(prompt, continuation))


def _say_keyword(prompt: Prompt, sampling: Sampling, copy: int) -> str:
    """The answer of the nearest demonstration (sampled by nearness above temperature 0), else the longest word."""
    question, shown = _question(prompt), _demonstrations(prompt)
    if not shown:
        return max(re.findall(r"\w+", _last_line(prompt)), key=len, default="nothing")
    near = [overlap(question, q) for q, _ in shown]
    if sampling.temperature > 0:
        chance = random.Random(share(prompt, sampling.seed, copy))
        return chance.choices(shown, [(x + 0.05) ** (1 / sampling.temperature) for x in near])[0][1]
    return shown[max(range(len(shown)), key=lambda i: near[i])][1]


def _rate_keyword(prompt: Prompt, continuation: str) -> float:
    """Grows with the nearest demonstration that has this answer, and a little with the trigrams in the question."""
    question, answer = _question(prompt), continuation.strip()
    near = max((overlap(question, q) for q, a in _demonstrations(prompt) if a == answer), default=0.0)
    own = _trigrams(answer)
    seen = len(own & _trigrams(question)) / max(1, len(own))
    # The last part only breaks ties, so that without demonstrations the answer is chance rather than the first label.
    evidence = near + 0.2 * seen + 0.01 * share(prompt, continuation)
    return math.log((evidence + 0.1) / (evidence + 1.1))


KINDS: dict[str, tuple[Say, Rate]] = {
    "echo": (_say_echo, _rate_echo),
    "hash": (_say_hash, _rate_hash),
    "keyword": (_say_keyword, _rate_keyword),
}


# --- engine and session -----------------------------------------------------------------------------------------------


def open_fake(ref: ModelRef) -> Session:
    """Open `fake:KIND`. Raises ModelError on an unknown kind or on transforms: it has no weights."""
    kind = ref.base.removeprefix("fake:")
    if kind not in KINDS:
        raise ModelError(f"no fake model {kind!r}", expected=f"one of {', '.join(KINDS)}", do=nearest(kind, KINDS))
    if ref.transforms:
        raise ModelError("a fake model has no weights", expected="no transforms", found=ref.transforms[0].kind)
    return FakeSession(kind)


def _cut(text: str, sampling: Sampling) -> Generation:
    """Text after stop strings and the limit, in words."""
    text, _ = until_stop(text, sampling.stop)
    words = re.findall(r"\S+\s*", text)
    if len(words) <= sampling.max_tokens:
        return Generation(text, len(words), "stop")
    return Generation("".join(words[: sampling.max_tokens]).rstrip(), sampling.max_tokens, "length")


class FakeSession(ByScores):
    """A session without a model; a token is a word, and the context window has 1024 of them."""

    def __init__(self, kind: str) -> None:
        self.say, self.rate = KINDS[kind]
        self.context, self.spent = CONTEXT, Spent()
        self.protocol = {"engine": "fake", "dtype": "none", "kind": kind}

    def close(self) -> None:
        """Nothing is held."""

    def count(self, prompts: Sequence[Prompt]) -> list[int]:
        """Words of each prompt."""
        return [len(_text(p).split()) for p in prompts]

    def _measured(self, prompts: Sequence[Prompt]) -> int:
        """Words of all prompts. Raises EngineError where one is longer than the context window."""
        sizes = self.count(prompts)
        if max(sizes, default=0) > self.context:
            raise EngineError(
                "a prompt is longer than the model's context window",
                expected=f"at most {self.context} words", found=str(max(sizes)), do="shorten it",
            )  # fmt: skip
        return sum(sizes)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[tuple[Generation, ...]]:
        """`sampling.n` answers per prompt, all the same at temperature 0. Raises EngineError on a prompt too long."""
        begun, prefilled, generated = time.monotonic(), self._measured(prompts), 0
        results = []
        copies = sampling.n if sampling.temperature > 0 else min(1, sampling.n)
        for n, prompt in enumerate(prompts):
            made = tuple(_cut(self.say(prompt, sampling, copy), sampling) for copy in range(copies))
            generated += sum(g.tokens for g in made)
            results.append(made if sampling.temperature > 0 else made * sampling.n)
            if progress:
                progress(n + 1, len(prompts))
        self.spent += Spent(time.monotonic() - begun, prefilled_tokens=prefilled, generated_tokens=generated)
        return results

    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Sequence[str]],
        *,
        end: bool = False,
        progress: Progress | None = None,
    ) -> list[tuple[Score, ...]]:
        """Score of each continuation; with `end`, one token of probability 0.9 more. Raises EngineError as above."""
        begun, prefilled = time.monotonic(), self._measured(prompts)
        results = []
        for n, (prompt, texts) in enumerate(zip(prompts, continuations, strict=True)):
            sizes = [len(text.split()) for text in texts]
            results.append(tuple(
                Score(self.rate(prompt, text) + (math.log(0.9) if end else 0.0), size + end)
                for text, size in zip(texts, sizes, strict=True)
            ))  # fmt: skip
            prefilled += sum(sizes)
            if progress:
                progress(n + 1, len(prompts))
        self.spent += Spent(time.monotonic() - begun, prefilled_tokens=prefilled)
        return results
