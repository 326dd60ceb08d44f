"""Small template language: {one|other} is a choice, <slot> an entity; and the row writer."""

from __future__ import annotations

import json
import random
import re

CHOICE = re.compile(r"\{([^{}]*)\}")
SLOT = re.compile(r"(\b[Aa] )?<(\w+)>")


def spin(template: str, rng: random.Random) -> str:
    """Chooses one side of every {a|b}, innermost first."""
    while match := CHOICE.search(template):
        template = template[: match.start()] + rng.choice(match[1].split("|")) + template[match.end() :]
    return template


def fill(template: str, slots: dict[str, str]) -> str:
    """Puts entities into <slots>; "a <product>" becomes "an Orla kettle"."""

    def entity(match: re.Match[str]) -> str:
        value, article = slots[match[2]], match[1] or ""
        if article and value[0] in "AEIOUaeiou":
            article = article.rstrip() + "n "
        return article + value

    return SLOT.sub(entity, template)


def sentence(text: str) -> str:
    """Upper case at the start of every sentence, single spaces."""
    text = " ".join(text.split())
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def lines(rows: list[dict[str, object]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def words(text: str) -> int:
    """How many words, cut at white space."""
    return len(text.split())
