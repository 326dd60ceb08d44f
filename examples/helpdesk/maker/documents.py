"""Documents and questions answerable only from them. Whole kinds of product, and whole policies, are held out for test."""
# ruff: noqa: E501  (template text: one entry per line reads better)

from __future__ import annotations

from .company import KINDS, TEST_KINDS, rng_for
from .manuals import ENDINGS, MANUALS
from .policies import POLICIES
from .text import fill

TASK = """\
name: helpdesk-answers
instruction: Answer the question about Brindlewick in a few words.
metric: token_f1
documents: documents.jsonl
"""
Row = dict[str, object]


def manual(product: str, kind: str, version: int) -> tuple[str, list[tuple[str, str]]]:
    """The guide of one product, and its questions with answers."""
    rng = rng_for("manual", product)
    opening, facts = MANUALS[kind]
    chosen = [(sentence, values[version], question) for sentence, values, question in facts]
    rng.shuffle(chosen)
    body = [sentence.replace("[]", value) for sentence, value, _ in chosen]
    text = fill(" ".join([opening, *body, *rng.sample(ENDINGS, 2)]), {"product": product})
    return text, [(fill(question, {"product": product}), value) for _, value, question in chosen]


def build() -> tuple[list[Row], dict[str, list[Row]]]:
    """All documents, and the questions by split."""
    documents: list[Row] = []
    questions: dict[str, list[Row]] = {"train": [], "test": []}

    def add(title: str, text: str, asked: list[tuple[str, str]], split: str) -> None:
        number = f"doc-{len(documents) + 1:02d}"
        documents.append({"id": number, "title": title, "text": text})
        for prompt, answer in asked:
            name = f"answers-{split}-{len(questions[split]) + 1:03d}"
            row = {"id": name, "prompt": prompt, "completion": answer, "answers": [answer]}
            questions[split].append({**row, "evidence": [number], "group": number})

    for kind, names in KINDS.items():
        for version, name in enumerate(names):
            product = f"{name} {kind}"
            add(f"{product}: guide", *manual(product, kind, version), "test" if kind in TEST_KINDS else "train")
    for split, policies in POLICIES.items():
        for title, text, asked in policies:
            add(title, text, list(asked), split)
    rng = rng_for("answers")
    for rows in questions.values():
        rng.shuffle(rows)
    return documents, questions
