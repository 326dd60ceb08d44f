"""What a model makes of the passages it is shown: citations, training that teaches to read them, and measures apart."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whet.documents import PARTICLE
from whet.engine import Session
from whet.metrics import Metric, references, score_all, squad, stands
from whet.retrieval import Found
from whet.splits import UNSPACED
from whet.task import Example

if TYPE_CHECKING:
    from whet.system import System

DEEP = 50  # passages of a question among which the one that holds the answer is looked for
PARTICLES = re.compile(f"{PARTICLE}?(?![^\\W{UNSPACED}])")  # what may stand behind a Korean word
DECLINES = re.compile(r"|unknown|no answer|not (?:known|answerable|stated|given)|unanswerable|i (?:do not|dont) know")


def says(text: str, answer: str) -> bool:
    """Whether a text holds an answer word for word, numbers whole, whatever the case, articles and punctuation.

    A Korean word may have a particle; words of scripts without spaces begin and end anywhere.
    """
    wanted = squad(answer)
    return bool(wanted) and stands(squad(text), wanted, PARTICLES)


def holding(found: Sequence[Found], example: Example) -> list[Found]:
    """The passages that hold what the example asks for: of a document of its evidence, and saying an answer.

    Where none of them says one word for word, or no evidence is named, one of the two is enough.
    """
    ids = {i for i, _ in example.evidence}
    named = [f for f in found if not ids or f.passage.document in ids]
    said = [f for f in named if any(says(f.passage.text, a) for a in references(example))]
    return said or (named if ids else [])


def cited(answer: str, shown: Sequence[Found]) -> tuple[Found, ...]:
    """The passages that an answer stands in, in the order they were shown."""
    return tuple(f for f in shown if says(f.passage.text, answer))


def citations(answer: str, shown: Sequence[Found]) -> list[dict[str, Any]]:
    """The passages that an answer was given with, as plain data: where each comes from, and whether it stands there."""
    held = cited(answer, shown)
    return [{"document": f.passage.document, "title": f.passage.title, "where": f.passage.where,
             "start": f.passage.start, "cited": f in held} for f in shown]  # fmt: skip


def taught(
    system: System, examples: Sequence[Example], shown: Sequence[Sequence[Found]], absent: float, seed: int
) -> list[list[Found]]:
    """What training rows are shown (RAFT, Zhang et al. 2024): the passage that holds the answer, among distractors.

    Where retrieval missed it, it stands in front and the last one goes; from a share `absent` of the rows it is taken
    out, and the next best stands there. Rows whose answer no passage holds keep what was found; so do those of a closed
    set that name no evidence, as a label's word says nothing about a passage.
    """
    deep = system.found([e.query for e in examples], DEEP)
    made = []
    for example, here, more in zip(examples, shown, deep, strict=True):
        if system.decoding.closed and not example.evidence:
            made.append(list(here))
            continue
        right = holding(more, example)
        if random.Random(f"{seed}/{example.id}").random() < absent:
            wrong = [f for f in more if f not in right and f not in here]
            kept = [f for f in here if f not in right]
            made.append([*kept, *wrong[: len(here) - len(kept)]])
        elif right and here and not any(f in right for f in here):
            made.append([right[0], *here[:-1]])  # of what a short window does not hold, the last goes first
        else:
            made.append(list(here))
    return made


@dataclass(frozen=True)
class Reading:
    """Scores in percent, measured apart; None where no row is of that kind.

    `recall`: rows whose answer stands in what they were shown. `found` and `missed`: the score of those rows and of
    the others. `oracle`: shown the right passage alone; `distracted`: shown as many as ever, none of them right.
    `faithful`: answers that stand in what was shown; `declined`: answers that are empty or say that it is not known.
    """

    n: int
    recall: float
    found: float | None
    missed: float | None
    oracle: float | None
    distracted: float | None
    faithful: float
    declined: float


def measure(system: System, examples: Sequence[Example], metric: Metric, session: Session) -> Reading:
    """Read the same questions with the passages found, with the right one alone, and with wrong ones only."""
    given = system.answers(examples, session)
    answers, shown = [a.text for a in given], [a.passages for a in given]
    deep = system.found([e.query for e in examples], DEEP)
    right = [holding(more, e) for e, more in zip(examples, deep, strict=True)]
    hit = [any(f in good for f in here) for here, good in zip(shown, right, strict=True)]

    def score(some: Sequence[Example], texts: Sequence[str]) -> float | None:
        return 100 * metric.aggregate(score_all(metric, texts, some)) if some else None

    def part(wanted: bool) -> float | None:
        rows = [n for n, found in enumerate(hit) if found == wanted]
        return score([examples[n] for n in rows], [answers[n] for n in rows])

    known = [n for n, good in enumerate(right) if good]
    asked = [examples[n] for n in known]
    oracle = system.answers(asked, session, found=[right[n][:1] for n in known]) if asked else []
    wrong = [[f for f in deep[n] if f not in right[n]][: max(1, len(shown[n]))] for n in known]
    distracted = system.answers(asked, session, found=wrong) if asked else []
    return Reading(
        len(examples), 100 * sum(hit) / len(hit), part(True), part(False),
        score(asked, [a.text for a in oracle]), score(asked, [a.text for a in distracted]),
        100 * sum(bool(cited(a, here)) for a, here in zip(answers, shown, strict=True)) / len(answers),
        100 * sum(bool(DECLINES.fullmatch(squad(a))) for a in answers) / len(answers),
    )  # fmt: skip
