"""The only place where text is assembled: messages out of a System and an example, and text out of messages.

Text from data never acts as a chat turn: control markers in it are broken up before a template sees them.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

from whet.engine import Chat, Message, Prompt
from whet.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Turn markers of the common templates; a model's own special tokens are added when its tokenizer is at hand.
# Each match is a marker's first character, so that markers within or across one another are all found.
MARKERS = re.compile(
    r"(?=<\|[^<>|\s]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|<</?SYS>>|<(?:bos|eos|pad|unk)>|<｜[^<>｜\s]{1,40}｜>"
    r"|<\|[a-z_]{3,40}>|<[a-z_]{3,40}\|>|\[\|(?:system|user|assistant|tool|endofturn)\|\]"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
    r"|<seed:[a-z_]{1,20}>|<(?:SPECIAL|extra_id|reserved)_\d{1,5}>|\]~!?b[\[\]]|\[e~\[)."
)
# Control tokens to models that think or call tools: what such a model is asked may not hold them, what it said may.
ASIDES = tuple(f"<{end}{name}>" for name in ("think", "tool_call", "tool_response", "tools") for end in ("", "/"))
MARKUP = re.compile(r"<\S+>|\[\S+\]")
SLOT = "{question}"  # where the question stands in a frame
BREAK = "\u200b"  # a zero-width space: invisible to people, and no marker's spelling
# Templates that write the day would change every prompt overnight: to them it is always that of Llama's own default.
DAY = date(2024, 7, 26)
PARTS = {"%-": "%", **{f"%{part}": f"{DAY:%{part}}" for part in "aAbBdHIjmMpSyY"}}
TODAY = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('{part}', '{said}')" for part, said in PARTS.items())
    + " }}{% endmacro %}\n"
)


def escape(text: str, tokens: Iterable[str] = ()) -> str:
    """Break up every chat-control marker and every special token of `tokens` in text, so that it is only text."""
    text = MARKERS.sub(lambda first: first[0] + BREAK, text)
    for token in tokens:
        if len(token) > 1 and token in text:
            # Where a token can overlap with itself, replacing it whole would leave every second one.
            text = re.sub(f"{re.escape(token[0])}(?={re.escape(token[1:])})", token[0] + BREAK, text)
    return text


def unescape(text: str, tokens: Iterable[str] = ()) -> str:
    """Take out again what `escape` has put in, which models repeat; zero-width spaces elsewhere stay."""
    if BREAK not in text:
        return text

    def places(broken: str) -> list[int]:
        return [*accumulate(map(len, broken.split(BREAK)[:-1]))]

    put = set(places(escape(text.replace(BREAK, ""), tokens)))
    first, *rest = text.split(BREAK)
    return first + "".join(("" if at in put else BREAK) + part for at, part in zip(places(text), rest, strict=True))


def as_turns(chat: Chat, specials: Sequence[str] = (), asides: Sequence[str] = ASIDES) -> list[dict[str, str]]:
    """A chat as templates and servers take it, `specials` broken up everywhere and `asides` outside of answers."""
    return [{"role": role, "content": escape(text, specials if role == "assistant" else (*specials, *asides))}
            for role, text in chat]  # fmt: skip


def messages(
    instruction: str,
    demonstrations: Sequence[tuple[str, str]],
    prompt: str,
    history: Sequence[Message] = (),
    passages: Sequence[tuple[str, str]] = (),
    frame: str = SLOT,
    told: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> Chat:
    """The chat for one question: instruction as the system turn, demonstrations as earlier turns, then the question.

    Every question stands in the frame. Passages, as (title, text), stand numbered in the question's own turn, in front;
    `told` has those of the demonstrations' questions.
    A system turn of the row's own history follows the instruction; its other turns stand before the question.
    """
    own = [content for role, content in history if role == "system"]
    head = "\n\n".join(part for part in [instruction, *own] if part)
    chat: list[Message] = [("system", head)] if head else []
    for question, answer in demonstrations:
        chat += [("user", beside((told or {}).get(question, ()), framed(frame, question))), ("assistant", answer)]
    chat += [(role, content) for role, content in history if role != "system"]
    return (*chat, ("user", beside(passages, framed(frame, prompt))))


def with_choices(question: str, choices: Sequence[str]) -> str:
    """A question with its choices behind it, but where there are none or it says them all itself."""
    if all(re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", question) for choice in choices):
        return question
    return "\n".join([question, "", "Answer with one of these, word for word:", *(f"- {c}" for c in choices)])


def beside(passages: Sequence[tuple[str, str]], question: str) -> str:
    """A question behind its passages, as (title, text), which are numbered."""
    shown = [f"[{n}] {title}\n{text}" if title else f"[{n}] {text}" for n, (title, text) in enumerate(passages, 1)]
    return "\n\n".join([*shown, question])


def framed(frame: str, question: str) -> str:
    """A question in its frame; what the question holds is never read as a frame again."""
    before, _, after = frame.partition(SLOT)
    return before + question + after


# --- prompts as files -------------------------------------------------------------------------------------------------

# A line of its own that parts the sections, whatever spaces end it; in a text it gets one more backslash.
RULE = re.compile(r"(\\*)---\s*")


def to_text(instruction: str, frame: str = SLOT, words: Sequence[tuple[str, str]] = ()) -> str:
    """A prompt as a file for people: the instruction, `---`, the frame and, where labels have words, `---` and lines
    `label = word`. What would not survive on such a line is written as a JSON string.
    """

    def kept(text: str) -> str:
        return "\n".join("\\" + line if RULE.fullmatch(line) else line for line in text.split("\n"))

    def word(text: str) -> str:
        odd = text != text.strip() or text[:1] in ("", '"', "-", "\\") or re.search(r"[\n=]", text)
        return json.dumps(text, ensure_ascii=False) if odd else text

    lines = [f"{word(label)} = {word(said)}" for label, said in words]
    return "\n---\n".join([kept(instruction), kept(frame), *(["\n".join(lines)] if lines else [])]) + "\n"


def from_text(text: str) -> tuple[str, str, dict[str, str]]:
    """(instruction, frame, words by label) of what `to_text` or a person wrote; an instruction alone will do.

    Raises ValueError, saying what is wrong.
    """
    if "\r\n" in text and not re.search(r"(?<!\r)\n", text):
        text = text.replace("\r\n", "\n")
    parts: list[list[str]] = [[]]
    for line in text.removesuffix("\n").split("\n"):
        found = RULE.fullmatch(line)
        if found and not found[1]:
            parts.append([])
        else:
            parts[-1].append(line[1:] if found else line)
    if len(parts) > 3:
        raise ValueError(f"{len(parts)} sections; at most instruction, frame and words")
    if len(parts) == 1 and SLOT in text:
        raise ValueError(f"{SLOT}, but no line --- between instruction and frame")
    instruction, frame = ("\n".join(part) for part in [*parts, [SLOT]][:2])
    if frame.count(SLOT) != 1:
        raise ValueError(f"the frame has {SLOT} {frame.count(SLOT)} times")
    words = dict(map(_word, filter(str.strip, parts[2]))) if len(parts) == 3 else {}
    return instruction, frame, words


def _word(line: str) -> tuple[str, str]:
    found = re.fullmatch(r"""("(?:[^"\\]|\\.)*"|[^"=][^=]*?)\s*=\s*("(?:[^"\\]|\\.)*"|[^"=][^=]*?)\s*""", line)
    if not found:
        raise ValueError(f"{line[:60]!r} is not label = word")
    label, said = (json.loads(part) if part.startswith('"') else part.strip() for part in found.groups())
    return str(label), str(said)


def fold_system(chat: Chat) -> Chat:
    """The system turn put in front of the first user turn, for templates that know no system role."""
    if not chat or chat[0][0] != "system":
        return chat
    head, rest = chat[0][1], list(chat[1:])
    for i, (role, content) in enumerate(rest):
        if role == "user":
            rest[i] = ("user", f"{head}\n\n{content}")
            break
    return tuple(rest)


def said_by_users(chat: Chat) -> Chat:
    """A chat whose tools' turns are a user's: servers want to know which call each of them answers."""
    return tuple(("user" if role == "tool" else role, text) for role, text in chat)


def alternating(chat: Chat) -> Chat:
    """A chat in the order that every template knows: after the system's turn, user and assistant by turns."""
    made: list[Message] = []
    for role, text in said_by_users(chat):
        if made and made[-1][0] == role:
            made[-1] = (role, f"{made[-1][1]}\n\n{text}")
        elif role != "assistant" or (made and made[-1][0] != "system"):  # an answer to nothing is left out
            made.append((role, text))
    return tuple(made)


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's template accepts a system turn and shows its text."""
    probe = [{"role": "system", "content": "whet-probe"}, {"role": "user", "content": "x"}]
    try:
        return "whet-probe" in str(tokenizer.apply_chat_template(probe, tokenize=False))
    except Exception:  # templates raise errors of their own choosing for roles they refuse
        return False


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, system: bool = True) -> str:
    """A chat as the model's own template writes it, the answer's turn opened; raw text stays as it is.

    Templates render in transformers' sandbox, and always on the same day. Used alike for scoring, generation and
    training. Models that can think aloud answer at once: what is measured and trained is the answer. Turns in an order
    that the template refuses are put into the one that all know. Raises EngineError where it refuses them even so.
    """
    from jinja2 import TemplateError

    if isinstance(prompt, str):
        return prompt
    chat, template = prompt if system else fold_system(prompt), tokenizer.get_chat_template()

    def written(turns: Chat) -> str:
        return str(tokenizer.apply_chat_template(
            as_turns(turns, specials_of(tokenizer), asides_of(tokenizer)), tokenize=False, enable_thinking=False,
            chat_template=(TODAY if "strftime_now" in template else "") + template, add_generation_prompt=True,
        ))  # fmt: skip

    try:
        return written(chat)
    except TemplateError as error:
        if (other := alternating(chat)) not in ((), chat):
            with suppress(TemplateError):
                return written(other)
        raise EngineError(
            "the model's chat template refuses a prompt", expected="turns it knows, in an order it knows",
            found=f"{', '.join(role for role, _ in chat)}: {error}", do="change the row's turns or take another model",
        ) from error  # fmt: skip


def dated(template: str) -> str:
    """A template that writes the day by itself as `render` has it, for engines that know today's.

    The day stands in it as text: not each engine's Jinja knows the filters of a macro.
    """

    def written(call: re.Match[str]) -> str:
        said = call[2]
        for part, meant in PARTS.items():
            said = said.replace(part, meant)
        return call[1] + said + call[1]

    made = re.sub(r"""strftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""", written, template)
    return made if made.startswith(TODAY) or "strftime_now(" not in made else TODAY + made


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: the special one that the template writes behind it, else the tokenizer's end."""
    answered = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "whet-probe"}]
    try:
        written = str(tokenizer.apply_chat_template(answered, tokenize=False, enable_thinking=False))
    except Exception:  # base models have no template, and templates raise errors of their own choosing
        return cast(int, tokenizer.eos_token_id)
    behind = tokenizer(written.rpartition("whet-probe")[2], add_special_tokens=False)["input_ids"]
    specials = set(tokenizer.all_special_ids) | {n for n, t in tokenizer.added_tokens_decoder.items() if t.special}
    return next((n for n in behind if n in specials), cast(int, tokenizer.eos_token_id))


def ends_of(module: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a turn: the template's, the tokenizer's end and whatever the generation config names."""
    named = getattr(module.generation_config, "eos_token_id", None) or []
    ids = {end_of_turn(tokenizer), tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return frozenset(i for i in ids if i is not None)


def specials_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """All special tokens of a tokenizer, as they are spelt."""
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    spelt = {token.content for token in added.values() if token.special}
    return tuple(sorted(spelt | set(tokenizer.all_special_tokens)))


def asides_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """`ASIDES`, and added tokens that are markup to the template; added tokens of HTML, as Gemma has, are text."""
    template, added = str(tokenizer.chat_template), tokenizer.added_tokens_decoder.values()
    found = {t.content for t in added if not t.special and MARKUP.fullmatch(t.content) and t.content in template}
    return tuple(sorted(found.union(ASIDES)))


def recent(chat: Chat, excess: int, count: Callable[[Chat], int]) -> Chat:
    """A chat without as many of its oldest exchanges as hold `excess` tokens, where no turn alone holds that many.

    The system turn stays, and so do the last turn and the exchange before it. `count` gives a chat's tokens.
    """
    lead = int(bool(chat) and chat[0][0] == "system")
    starts = [n for n in range(lead, len(chat) - 1) if chat[n][0] == "user"]
    longest = max((text for _, text in chat[lead:]), key=len, default="")
    if len(starts) < 2 or count((("user", longest),)) > excess:
        return chat
    limit = count(chat) - excess
    first = bisect_left(starts[:-1], True, key=lambda start: count((*chat[:lead], *chat[start:])) <= limit)
    return (*chat[:lead], *chat[starts[first] :])


def shorten(chat: Chat, excess: int, count: Callable[[Chat], int]) -> Chat:
    """Cut at least `excess` tokens from the middle of the longest turns, instruction last of all, until it fits.

    `count` gives a chat's tokens. What is cut is marked with " … ", so that it shows in what was sent.
    """
    limit = count(chat) - excess
    turns = list(chat)
    while count(tuple(turns)) > limit:
        order = sorted(range(len(turns)), key=lambda i: (turns[i][0] == "system", -len(turns[i][1])))
        longest = next((i for i in order if len(turns[i][1]) > 8), None)
        if longest is None:
            break
        role, text = turns[longest]
        # Characters per token differ by language: cut by the measured share, and look again. (Measured as a user's
        # turn, the only kind that every template takes alone.)
        share = min(0.9, max(0.05, 1.05 * (count(tuple(turns)) - limit) / max(1, count((("user", text),)))))
        keep = max(4, int(len(text) * (1 - share) / 2))
        whole = 2 * keep + 3 >= len(text)
        turns[longest] = (role, text[: len(text) // 2] if whole else f"{text[:keep]} … {text[-keep:]}")
    return tuple(turns)
