"""What servers say in answer to a prompt, read, and the scores of a closed set out of it."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from whet.engine import Score
from whet.prompt import ASIDES, unescape

CONTEXT = 8192  # where a server does not say
LEAST = 1e-3  # probability of all choices together below which the model is saying something else
# The score of every choice of a prompt that got no answer: finite, so that what is averaged over prompts stays so.
UNANSWERED = -1e9


@dataclass(frozen=True)
class Step:
    """One token with its log-probability (None: unknown) and the likeliest tokens at its place.

    Tokens are UTF-8, for one may be a part of a character.
    """

    token: bytes
    logprob: float | None
    alternatives: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """One answer of a server."""

    text: str
    ended: bool
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Reply:
    """All answers to one request, and its usage where the server states it."""

    choices: tuple[Choice, ...]
    prompt_tokens: int | None
    completion_tokens: int | None


def _number(value: Any) -> float:
    number = float(value)
    if math.isnan(number):
        raise ValueError("not a number")
    return min(number, 0.0)


def _token(item: Any) -> bytes:
    """A token of a chat: its bytes, since its text cannot hold parts of characters."""
    stated = item.get("bytes")
    return bytes([*stated]) if stated else _utf8(item["token"])


def _utf8(text: Any) -> bytes:
    return str(text).encode("utf-8", "replace")


def _steps(logprobs: Any) -> tuple[Step, ...]:
    """Steps out of either spelling: that of chats (a list `content`) or that of completions (parallel lists)."""
    if not logprobs:
        return ()
    if logprobs.get("content") is not None:
        return tuple(
            Step(
                _token(item), _number(item["logprob"]),
                tuple((_token(top), _number(top["logprob"])) for top in item.get("top_logprobs") or ()),
            )
            for item in logprobs["content"]
        )  # fmt: skip
    tokens = logprobs.get("tokens") or []
    own = logprobs.get("token_logprobs") or [None] * len(tokens)
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    return tuple(
        Step(_utf8(t), None if p is None else _number(p), tuple((_utf8(k), _number(v)) for k, v in (top or {}).items()))
        for t, p, top in zip(tokens, own, tops, strict=True)
    )


def read_reply(body: Any) -> Reply:
    """A Reply out of parsed JSON; a KeyError, TypeError, ValueError … says that it is none."""
    choices = []
    for item in body["choices"]:
        chat = "message" in item
        told = item["message"] if chat else item
        # Some leave the content out where thought has taken all of the limit.
        text = told.get("content") if chat and "role" in told else told["content" if chat else "text"]
        if item.get("error") or item.get("finish_reason") == "error":
            raise ValueError("the provider failed")
        if isinstance(text, list):  # parts, of which some are thoughts
            text = "".join(part["text"] for part in text if part.get("type") in ("text", "output_text"))
        if text is not None and not isinstance(text, str):
            raise TypeError("text expected")
        text = (text or "").encode("utf-8", "replace").decode()  # cut within a pair, half a character is none
        said = unescape(without_thought(text), ASIDES) if chat else text
        ended = item.get("finish_reason") != "length" and bool(said or not text)  # a stop string may end a thought
        choices.append(Choice(said, ended, _steps(item.get("logprobs"))))
    if not choices:
        raise ValueError("no choices")
    usage = body.get("usage") or {}
    counts = [None if usage.get(k) is None else int(usage[k]) for k in ("prompt_tokens", "completion_tokens")]
    return Reply(tuple(choices), *counts)


def read_context(body: Any, name: str) -> int:
    """The context window that a list of models states for `name` (vLLM, OpenRouter, llama.cpp …), else 8192."""
    models = body.get("data") if isinstance(body, dict) else body
    entries = [m for m in models if isinstance(m, dict)] if isinstance(models, list) else []
    for entry in [m for m in entries if m.get("id") == name] or entries[: len(entries) == 1]:
        meta = entry.get("meta")
        for value in (
            entry.get("max_model_len"), entry.get("context_length"), meta.get("n_ctx") if isinstance(meta, dict) else 0
        ):  # fmt: skip
            if isinstance(value, int) and value > 0:
                return value
    return CONTEXT


def without_thought(text: str) -> str:
    """An answer without the `<think>` block before it; nothing where the block does not end."""
    thought, end, said = text.partition("</think>")
    if end:
        return said.lstrip()
    return "" if thought.lstrip().startswith("<think>") else text


def tokens(text: str) -> int:
    """About how many tokens a text has where the server does not say: one for 4 characters of ASCII, or 3 other bytes.

    Texts in Korean or Chinese have about a token for each character.
    """
    plain = len(text.encode("ascii", "ignore"))
    return math.ceil(plain / 4 + (len(_utf8(text)) - plain) / 3)


# --- a closed set, scored with what servers give ----------------------------------------------------------------------


def shared_beginning(continuations: Sequence[str]) -> int:
    """Bytes of the longest beginning that two of the continuations share."""
    texts = sorted({_utf8(c.strip().casefold()) for c in continuations})
    return max((len(os.path.commonprefix([a, b])) for a, b in zip(texts, texts[1:], strict=False)), default=0)


def by_beginning(steps: Sequence[Step], continuations: Sequence[str], ended: bool = True) -> list[float]:
    """Log-probability of the shortest beginning that tells each continuation from the others.

    `steps` are the tokens of a greedy answer with the likeliest tokens at each place. At a place, the probability of a
    listed token goes to the continuations that go on with it (leading space and case do not matter), in equal parts;
    if it is the token that was taken and several go on with it, the next place decides between them. A continuation
    that no listed token begins gets an equal part of the probability left outside the list, at most that of the
    least likely listed token. `ended`: the answer stopped of itself after the last step.
    """
    rest = [_utf8(c.strip().casefold()) for c in continuations]  # what each still has to say
    mass, alive, path, begun = [0.0] * len(rest), list(range(len(rest))), 1.0, False
    for place, step in enumerate(steps):
        last, chances, reached = place == len(steps) - 1, _chances(step), set[int]()
        onward, onward_text, onward_chance = list[int](), b"", 0.0
        for token, chance in chances:
            text = _folded(token) if begun else _folded(token).lstrip()
            taken = token == step.token
            hits = [i for i in alive if text and rest[i].startswith(text)]
            if taken and not text and not begun:
                hits = alive  # white space before the answer decides nothing
            elif taken and last and ended:
                hits = [i for i in hits if rest[i] == text] or hits
            reached.update(hits)
            if taken and not last and (len(hits) > 1 or not text):
                onward, onward_text, onward_chance = hits, text, onward_chance + chance
                continue
            for i in hits:
                mass[i] += path * chance / len(hits)
        _share_left(mass, [i for i in alive if i not in reached], {i: rest[i] for i in alive}, chances, path)
        for i in onward:
            rest[i] = rest[i][len(onward_text) :]
        alive, path, begun = onward, path * onward_chance, begun or bool(onward_text)
        if not alive:
            break
    if not steps:
        mass = [1 / max(1, len(rest))] * len(rest)
    return [math.log(max(m, 1e-30)) for m in mass]


def _folded(token: bytes) -> bytes:
    """A token in lower case; one that is a part of a character has none."""
    try:
        return token.decode().casefold().encode()
    except UnicodeDecodeError:
        return token


def _chances(step: Step) -> list[tuple[bytes, float]]:
    """Probabilities of the listed tokens and of the one taken, which some servers do not list."""
    listed = list(step.alternatives)
    if step.logprob is not None and all(token != step.token for token, _ in listed):
        listed.append((step.token, step.logprob))
    return [(token, math.exp(logprob)) for token, logprob in listed]


def _share_left(
    mass: list[float],
    missed: Sequence[int],
    rest: dict[int, bytes],
    chances: Sequence[tuple[bytes, float]],
    path: float,
) -> None:
    """Give continuations that no listed token goes on with their part of what is left, in place."""
    left = max(0.0, 1 - sum(chance for _, chance in chances))
    least = min((chance for _, chance in chances), default=1.0)
    # Continuations said to their end get what goes on with no other one.
    done = [i for i in missed if not rest[i]]
    others = sum(c for t, c in chances if any(r and t and r.startswith(_folded(t)) for r in rest.values()))
    for i in missed:
        part = max(0.0, 1 - others) / len(done) if i in done else min(left / len(missed), least)
        mass[i] += path * part


def decided(values: Sequence[float]) -> bool:
    """Whether log-probabilities of beginnings single one out: the greatest is no tie, and all together are likely."""
    best = sorted(values)[-2:]
    return math.fsum(map(math.exp, values)) >= LEAST and (len(best) < 2 or best[0] < best[1])


def by_text(answer: str, continuations: Sequence[str]) -> list[float]:
    """Stand-ins for log-probabilities where a server gives none: the continuation that the answer means gets -0.05.

    That is the one equal to the answer, else the one found in it as whole words (the first; of two there the longer),
    else the nearest by difflib. The others get -(1 + 9·distance), distance being 1 - difflib's ratio. Where the answer
    has nothing in common with any of them, all get UNANSWERED.
    """
    said = answer.strip().strip(".!\"'`*").casefold()
    texts = [c.strip().casefold() for c in continuations]
    distances = [1 - difflib.SequenceMatcher(None, text, said, autojunk=False).ratio() for text in texts]

    def rank(i: int) -> tuple[int, float, int]:
        found = re.search(rf"(?<!\w){re.escape(texts[i])}(?!\w)", said) if texts[i] else None
        if texts[i] == said:
            return (0, 0.0, i)
        return (1, found.start() - len(texts[i]) / (len(said) + 1), i) if found else (2, distances[i], i)

    if min(distances, default=1.0) == 1.0:
        return [UNANSWERED] * len(texts)
    best = min(range(len(texts)), key=rank)
    return [-0.05 if i == best else -(1 + 9 * distance) for i, distance in enumerate(distances)]


def echoed(steps: Sequence[Step], continuation: str, generated: int) -> Score:
    """Score of a continuation out of the echoed tokens of prompt and continuation and `generated` further ones.

    Counted from the end, so that a beginning-of-text token does not matter; a token that straddles the border counts
    as the continuation's. The first token of a text has no log-probability and is left out.
    """
    end = max(0, len(steps) - generated)
    text = _utf8(continuation)
    start = _found(steps[:end], text)
    if start is None:  # some tokenizers drop the space before a word
        start = _found(steps[:end], text.strip())
    if start is None:  # tokens that are parts of characters cannot be read back: go by length
        start, length = end, 0
        while start > 0 and length < len(text):
            start -= 1
            length += len(steps[start].token)
    values = [s.logprob for s in steps[start:end] if s.logprob is not None]
    return Score(math.fsum(values), len(values))


def _found(steps: Sequence[Step], text: bytes) -> int | None:
    """Where the shortest run of last tokens that holds a text begins; None where a little more does not hold it."""
    start, tail = len(steps), b""
    while len(tail) < len(text) or text not in tail:
        if start == 0 or len(tail) > len(text) + 32:
            return None
        start -= 1
        tail = steps[start].token + tail
    return start
