"""A Modelfile for Ollama: instruction, demonstrations, frame and decoding around a GGUF file.

Its template is worked out from what the model's own template writes, and checked against it: for a conversation it
must write the same text, character by character.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whet.engine import Chat
from whet.errors import ArtifactError
from whet.export import UNCUT
from whet.export.gguf import adds_start
from whet.prompt import BREAK, SLOT, asides_of, escape, framed, render, specials_of, takes_system

if TYPE_CHECKING:
    from whet.system import System

# Texts that no template has, in place of what is said.
SAID = {"system": "Whet-S1", "user": "Whet-U2", "assistant": "Whet-A3"}
TALKS = (("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user"),
         ("system", "user", "assistant", "user", "assistant", "user"))  # fmt: skip
# Ollama's parser drops what Go does not print (strconv.IsPrint), BREAK among it; it keeps this mark, as invisible.
JOINER = "\u034f"
CONTEXT = 8192  # tokens at most that Ollama is to hold; by itself it may take fewer


@dataclass(frozen=True)
class Turns:
    """What stands in front of each turn, by its role and that of the turn before ("" for the first), and at the end."""

    before: dict[tuple[str, str], str]
    end: str

    def text(self, chat: Chat) -> str:
        """A conversation, the answer's turn opened."""
        last, made = "", ""
        for role, content in chat:
            made += self.before[role, last] + content
            last = role
        return made + self.end


def turns(tokenizer: Any) -> Turns | None:
    """The turns of a model's template; None where it writes more than text around what is said."""
    known = takes_system(tokenizer)
    start = tokenizer.bos_token if adds_start(tokenizer) else None

    def written(talk: Sequence[str]) -> str:
        text = render(tokenizer, tuple((role, SAID[role]) for role in talk), system=known)
        return text.removeprefix(start) if start else text  # the engine puts it there

    before: dict[tuple[str, str], str] = {}
    end = ""
    for talk in TALKS:
        rest, last = written(talk), ""
        for role in talk:
            here, found, rest = rest.partition(SAID[role])
            if not found or before.setdefault((role, last), here) != here:
                return None
            last = role
        if end and rest != end:
            return None
        end = rest
    return Turns(before, end)


def go_text(text: str) -> str:
    """Text as it stands in a Go template within a Modelfile.

    A brace in front of an action would be taken for that action's first. What Ollama would drop is an action, too.
    """
    text = re.sub(r'\{{2,}|\{(?="""|\Z)', lambda braces: f'{{{{ "{braces[0]}" }}}}', text)
    text = text.replace('"""', '{{ "\\"\\"\\"" }}')
    return "".join(one if _printed(one) else f'{{{{ "\\U{ord(one):08x}" }}}}' for one in text)


def _printed(one: str) -> bool:
    return one.isprintable() or one in "\n\t"


def printable(text: str) -> str:
    """A text as Ollama's parser leaves it, but for spaces of other widths, which become plain ones."""
    plain = (" " if unicodedata.category(one) == "Zs" else one for one in text.replace(BREAK, JOINER))
    return "".join(one for one in plain if _printed(one))


def altered(system: System) -> bool:
    """Whether instruction or demonstrations hold characters that a Modelfile does not."""
    said = (system.instruction, *(text for pair in system.demonstrations.pool for text in pair))
    return any(printable(text) != text for text in said)


def template(made: Turns, frame: str) -> str:
    """The turns as a Go template; every question stands in the frame."""
    head, _, tail = frame.partition(SLOT)
    cases = {}
    for role in ("system", "user", "assistant"):
        inner = [(last, go_text(text)) for (one, last), text in made.before.items() if one == role]
        cases[role] = inner[0][1]
        if len({text for _, text in inner}) > 1:
            cases[role] = "".join(
                f'{{{{ {"else " if n else ""}if eq $last "{last}" }}}}{text}' for n, (last, text) in enumerate(inner)
            ) + "{{ end }}"
    return (
        '{{ $last := "" }}{{ range .Messages }}'
        f'{{{{ if eq .Role "system" }}}}{cases["system"]}{{{{ .Content }}}}'
        f'{{{{ else if eq .Role "user" }}}}{cases["user"]}{go_text(head)}{{{{ .Content }}}}{go_text(tail)}'
        f'{{{{ else }}}}{cases["assistant"]}{{{{ .Content }}}}{{{{ end }}}}'
        f"{{{{ $last = .Role }}}}{{{{ end }}}}{go_text(made.end)}"
    )


def quoted(text: str) -> str:
    """A text of any number of lines for a Modelfile. Raises ArtifactError where it cannot hold it."""
    text = printable(text)
    if '"""' in text:
        raise ArtifactError(
            "a Modelfile cannot hold a text with three quotation marks in a row", expected="a prompt without",
            found=repr(text[:60]), do="change the prompt or demonstration, or whet export --to gguf",
        )  # fmt: skip
    return f'"""{text}"""'


def _asked(frame: str, question: str, broken: Sequence[str]) -> str:
    """A question without control markers, also where its frame, which the template has, begins or ends one."""
    asked = escape(question, broken)
    whole = framed(frame, asked)
    return asked if escape(whole, broken) == whole else f"{BREAK}{asked}{BREAK}"


def modelfile(system: System, tokenizer: Any, file: str, ends: Sequence[str], context: int) -> tuple[str, bool]:
    """The Modelfile of a System over a GGUF `file`, and whether it carries the template; `ends` are texts that end
    a turn, `context` the tokens that the model can hold.
    """
    made = turns(tokenizer)
    decoding, specials = system.decoding, specials_of(tokenizer)
    broken = (*specials, *asides_of(tokenizer))
    frame = escape(system.frame, broken)
    lines = [f"FROM ./{file}"]
    if made is not None:
        lines.append(f'TEMPLATE """{template(made, frame)}"""')
    if system.instruction:
        lines.append(f"SYSTEM {quoted(escape(system.instruction, broken))}")
    for question, answer in system.demonstrations.pool:
        asked = _asked(frame, question, broken) if made is not None else escape(framed(frame, question), broken)
        said = escape(decoding.said(answer), specials)
        lines += [f"MESSAGE user {quoted(asked)}", f"MESSAGE assistant {quoted(said)}"]
    settings: list[tuple[str, Any]] = [
        ("temperature", decoding.temperature), ("num_predict", decoding.max_tokens), ("num_ctx", min(context, CONTEXT)),
        # What Ollama does to probabilities by itself, undone.
        ("repeat_penalty", 1.0), *UNCUT.items(),
        *(("stop", quoted(end)) for end in (*ends, *decoding.stop)),
    ]  # fmt: skip
    return "\n".join([*lines, *(f"PARAMETER {name} {value}" for name, value in settings)]) + "\n", made is not None
