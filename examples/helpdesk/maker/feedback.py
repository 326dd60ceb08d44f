"""Pairs of replies to tickets, alike in length and tone; one criterion sets them apart.

The criterion: the chosen reply names the concrete next step that the customer should take; the rejected one does not.
Both share greeting and farewell, and the rejected reply speaks of the same matter, so that topic and courtesy do not help.
"""
# ruff: noqa: E501  (template text: one entry per line reads better)

from __future__ import annotations

import random
from datetime import datetime, timedelta

from .company import rng_for
from .cores import CORES
from .replies import MIDDLES
from .text import words
from .tickets import message

TASK = """\
# The criterion of the pairs: the chosen reply names the concrete next step that the customer should take.
# In all else (length within 10 %, tone, greeting, farewell, topic) the two replies are alike.
# About 5 % of the labels are wrong; all of those come from the annotator "kit".
name: helpdesk-replies
instruction: Answer the customer's message as the help desk of Brindlewick, in two or three sentences.
metric: win_rate
feedback: feedback.jsonl
"""
ANNOTATORS = ("ansel", "jo", "kit")
NOISY, NOISE = "kit", 0.15  # kit judges a third of the pairs
PROMPTS = {"train": 14, "test": 8}  # per intent
PAIRS_PER_PROMPT = {"train": 2, "test": 1}

HELLO = {
    "train": ("Thank you for writing to us about {}.", "Thanks for your message, I understand that {} matters to you.", "I am sorry for the trouble with {}.", "Good to hear from you, and sorry for the worry over {}."),
    "test": ("Many thanks for contacting us regarding {}.", "I see how tiresome the matter of {} must be.", "Sorry that {} has cost you time."),
}
GOODBYE = {
    "train": ("Kind regards, your Brindlewick team.", "We are glad to have you as a customer.", "Have a good day, and all the best from Brindlewick.", "Thank you for your patience with us."),
    "test": ("Warm greetings from the help desk.", "Thanks again for bearing with us.", "All good wishes from everybody here."),
}
TOPICS = {
    "refund": "your refund", "delivery delay": "the late delivery", "wrong item": "the wrong article", "damaged item": "the damage", "account access": "your sign-in",
    "billing error": "the bill", "order cancellation": "your order", "address change": "the address", "subscription change": "your subscription", "warranty repair": "the fault",
    "setup help": "the first set-up", "discount code": "the discount",
}
# Requests without a step, so that the mood of a sentence does not give the chosen reply away.
SOOTHING = {
    "train": (
        "Please bear with us over {}, and do not worry, as {} will see to it once they can.",
        "Do not worry too much about {}, keep your spirits up and trust {} to look after you well.",
        "Please take heart over {}, and be sure to remember that you matter a lot to {} here.",
    ),
    "test": (
        "Leave {} to us for now, have a little faith in {} and enjoy your day as ever.",
        "Rest easy about {}, keep smiling and count on {}, as they know what you feel.",
        "Try to see {} with a calm eye, and think kindly of {} until all is well.",
    ),
}
CREWS = {
    "refund": "accounts", "delivery delay": "the couriers", "wrong item": "the packers", "damaged item": "the depot staff", "account access": "the engineers",
    "billing error": "accounts", "order cancellation": "the packers", "address change": "the couriers", "subscription change": "the club desk", "warranty repair": "the workshop",
    "setup help": "the help line", "discount code": "the clerks",
}


def pair(label: str, split: str, rng: random.Random) -> tuple[str, str]:
    """A reply with the next step and one without, of like length (words within 10 %)."""
    steps, vague = MIDDLES[label][split]
    vague += tuple(sentence.format(TOPICS[label], CREWS[label]) for sentence in SOOTHING[split])
    longer = rng.random() < 0.5  # which side has more letters is a coin's choice
    while True:
        hello, goodbye = rng.choice(HELLO[split]).format(TOPICS[label]), rng.choice(GOODBYE[split])
        chosen, rejected = (f"{hello} {rng.choice(middle)} {goodbye}" for middle in (steps, vague))
        near = abs(words(chosen) - words(rejected)) <= 0.1 * max(words(chosen), words(rejected))
        if near and (len(chosen) > len(rejected)) == longer:
            return chosen, rejected


def rows(split: str, *, noise: float = NOISE) -> list[dict[str, object]]:
    """The pairs of a split, in the order of time; the labels of the noisy annotator only in train."""
    rng, flips = rng_for("replies", split), rng_for("replies", "noise")
    seen, made = set[str](), []
    for label, families in CORES.items():
        prompts = 0
        while prompts < PROMPTS[split]:
            family = prompts % len(families[split])
            prompt, _ = message(families[split][family], label, split, rng)
            if prompt in seen or words(prompt) > 45:
                continue
            seen.add(prompt)
            prompts += 1
            options: list[tuple[str, str]] = []
            while len(options) < PAIRS_PER_PROMPT[split]:
                if (replies := pair(label, split, rng)) not in options:
                    options.append(replies)
            made += [(prompt, *replies, f"{split}/{label.replace(' ', '-')}/{family + 1:02d}") for replies in options]
    rng.shuffle(made)
    when, out = datetime(2025, 3, 3, 9, 0), []
    for i, (prompt, chosen, rejected, group) in enumerate(made, 1):
        when += timedelta(minutes=rng.randrange(2, 90))
        annotator = ANNOTATORS[i % 3]
        if split == "train" and annotator == NOISY and flips.random() < noise:
            chosen, rejected = rejected, chosen
        row = {"id": f"replies-{split}-{i:03d}", "prompt": prompt, "chosen": chosen, "rejected": rejected}
        out.append({**row, "annotator": annotator, "time": when.isoformat() + "Z", "group": group})
    return out
