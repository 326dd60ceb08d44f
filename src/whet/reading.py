"""What a model makes of the passages it is shown: citations, training that teaches to read them, and measures apart."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from whet.engine import Session
from whet.errors import MethodError
from whet.metrics import Metric, in_points, references, score_all, squad, stands
from whet.retrieval import BEHIND, Found
from whet.retrieval import Source as Documents
from whet.task import Example

if TYPE_CHECKING:
    from whet.system import Answer, System

SCORES = ("found", "missed", "oracle", "distracted")  # what of a Reading is in the metric's own scale
DEEP = 50  # passages of a question among which the one that holds the answer is looked for
POLAR = ("yes", "no")  # answers whose words stand anywhere, whatever is asked
# How answers begin that only say that there is none, as `squad` writes them.
DECLINES = re.compile("|".join((
    r"(?:unknown|unanswerable|unbekannt|inconnue?|desconocid[oa]|不明|未知|모름|정답 없음)?$",
    r"(?:sorry )?(?:im|i am) (?:not sure|unsure|unable)",
    r"(?:sorry )?i (?:do not|dont|cannot|cant) (?:know|tell|say|answer)",
    r"no answer|not (?:known|answerable|stated|given|mentioned|specified)\b|(?:there )?(?:is|are) no (?:answer|info)",
    r"(?:it|this|that|answer) (?:is|was) (?:not (?:known|stated|given|mentioned|specified|clear)|unknown|unclear)",
    r"(?:text|passages?|documents?|context) (?:does not|doesnt|do not|dont) (?:say|state|mention|give|specify)",
    r"(?:\S+ ){0,4}?(?:모르겠|모릅니다|모른다|몰라|알 수 없|찾을 수 없|언급되(?:어 있)?지 않|나와 있지 않|정보가 없)",
    r"\S{0,8}?(?:不知道|不清楚|无法(?:回答|确定)|不确定|未提及|没有提[到及])",
    r"\S{0,12}?(?:[わ分]か(?:りません|らない)|知りません|(?:記載|記述|情報)(?:が|は|されてい)(?:ない|ません|ありません))",
    r"ich weiß (?:es )?nicht|(?:das )?weiß ich nicht|keine (?:antwort|angabe|ahnung)",
    r"(?:es|das) (?:ist|wird|steht) (?:im text )?nicht",
    r"(?:désolé )?je ne (?:sais|connais)|(?:aucune|pas de) (?:réponse|info)",
    r"ce nest pas (?:mentionné|indiqué|précisé|connu)",
    r"no (?:lo )?sé\b|no se (?:sabe|menciona|indica|especifica)|se desconoce|(?:no hay|sin) (?:respuesta|info)",
)))  # fmt: skip


def says(text: str, answer: str) -> bool:
    """Whether a text holds an answer word for word, numbers whole, whatever the case, articles and punctuation.

    A Korean word may have a particle; words of scripts without spaces begin and end anywhere.
    """
    wanted = squad(answer)
    return bool(wanted) and stands(squad(text), wanted, BEHIND)


def _evidence(example: Example) -> list[str]:
    """The ids of the documents that answer an example."""
    return [name for name, grade in example.evidence if grade > 0]


def _around(system: System, examples: Sequence[Example], shown: Sequence[Sequence[Found]]) -> list[list[Found]]:
    """What each example is shown, what is found further down, and the passages of its evidence wherever they rank."""
    made = [list(some) for some in shown]
    for source in system.sources:
        if not isinstance(source, Documents):
            continue
        deep = replace(source, threshold=0.0).find([e.query for e in examples], system.home, DEEP)
        named = source.corpus(system.home).of({name for e in examples for name in _evidence(e)})
        for here, more, example in zip(made, deep, examples, strict=True):
            more += [Found(p, 0.0) for name in _evidence(example) for p in named.get(name, ())]
            here += [f for f in dict.fromkeys(more) if f not in here]
    return made


def _saying(found: Sequence[Found], example: Example) -> list[Found]:
    """The passages that say an answer word for word; none says a yes or a no, whose words prove nothing."""
    answers = [a for a in references(example) if squad(a) not in POLAR]
    return [f for f in found if any(says(f.passage.text, a) for a in answers)]


def holding(found: Sequence[Found], example: Example) -> list[Found]:
    """The passages that hold what the example asks for: of a document of its evidence, and saying an answer.

    Where none of them says one word for word, or no evidence is named, one of the two is enough.
    """
    ids = _evidence(example)
    named = [f for f in found if not ids or f.passage.document in ids]
    return _saying(named, example) or (named if ids else [])


def needed(found: Sequence[Found], example: Example) -> list[Found]:
    """The passages, in this order, that an answer is read from: of each document of the evidence, the best.

    The best is the first that says an answer, else the first; those that say one come first. Without evidence, it is
    the first of all that says one.
    """
    if not (ids := _evidence(example)):
        return holding(found, example)[:1]
    of = [[f for f in found if f.passage.document == name] for name in dict.fromkeys(ids)]
    said = [_saying(some, example) for some in of]
    return [s[0] for s in said if s] + [o[0] for o, s in zip(of, said, strict=True) if o and not s]


def astray(found: Sequence[Found], example: Example) -> list[Found]:
    """The passages that an answer is not read from: of documents that are no evidence.

    Where the one document that is evidence is all there is, or no evidence is named: those that do not hold the answer.
    """
    ids, right = _evidence(example), holding(found, example)
    others = [f for f in found if f.passage.document not in ids and f not in right]
    return others if others or len(ids) > 1 else [f for f in found if f not in right]


def held(system: System, examples: Sequence[Example], ks: Sequence[int]) -> tuple[int, dict[int, int]]:
    """Of how many examples it is known which passages hold what they ask for, and of how many the first k show one.

    The System has a source of documents. Known is what its documents' best passages say, or the evidence that is named.
    """
    source = next(s for s in system.sources if isinstance(s, Documents))
    source = replace(source, k=max(ks))
    shown = source.find([e.query for e in examples], system.home)
    around = _around(replace(system, sources=(source,)), examples, shown)
    right = [holding(more, e) for e, more in zip(examples, around, strict=True)]
    hits = {k: sum(any(f in good for f in here[:k]) for here, good in zip(shown, right, strict=True)) for k in ks}
    return sum(map(bool, right)), hits


def cited(answer: str, shown: Sequence[Found]) -> tuple[Found, ...]:
    """The passages that an answer stands in, in the order they were shown."""
    return tuple(f for f in shown if says(f.passage.text, answer))


def citations(answer: str, shown: Sequence[Found]) -> list[dict[str, Any]]:
    """The passages that an answer was given with, as plain data: where each comes from, and whether it stands there."""
    held = cited(answer, shown)
    return [{"document": f.passage.document, "title": f.passage.title, "where": f.passage.where,
             "start": f.passage.start, "cited": f in held} for f in shown]  # fmt: skip


def origins(found: Sequence[dict[str, Any]]) -> list[str]:
    """Where an answer stands, for people: a line for each of its `citations`; a fact has no place in a document."""
    cited = (one for one in found if one["cited"])
    places = ((one, f" ({one['where']}, from word {one['start'] + 1})" if one["where"] else "") for one in cited)
    return [f"  from {one['title'] or one['document']}{where}" for one, where in places]


def lines(read: Reading, metric: str) -> list[str]:
    """How a System reads, for people: a figure a line."""
    points = in_points(metric)
    made = []
    for name, value in asdict(read).items():
        places = 2 if name in SCORES and not points else 1
        made.append(f"  {name:<10} {'–' if value is None else f'{value:.{places}f}'}")
    return made


def unsupported(system: System, answer: Answer) -> str:
    """That a written answer stands in nothing that was looked up, in words; empty where it does, or says no answer.

    A label is in no passage by nature.
    """
    if not system.sources or system.decoding.closed or DECLINES.match(squad(answer.text)):
        return ""
    if not answer.passages:
        return "nothing was found for this: the answer is the model's own"
    return "" if cited(answer.text, answer.passages) else "none of what was found says this in these words"


def taught(
    system: System, examples: Sequence[Example], shown: Sequence[Sequence[Found]], absent: float, seed: int
) -> list[list[Found]]:
    """What training rows are shown (RAFT, Zhang et al. 2024): the passages that hold the answer, among distractors.

    That is one of each document of the evidence. What retrieval missed of them stands in front, and the last of the
    others go; a row that is shown nothing is shown the first alone. From a share `absent` of the rows all of the
    evidence is taken out, and the next best stand there. Rows whose answer no passage holds keep what was found; so do
    those of a closed set that name no evidence, as a label's word says nothing about a passage.
    """
    made = []
    for example, here, more in zip(examples, shown, _around(system, examples, shown), strict=True):
        most = max(1, len(here))
        if system.decoding.closed and not example.evidence:
            made.append(list(here))
        elif random.Random(f"{seed}/{example.id}").random() < absent:
            made.append(astray(more, example)[:most])
        else:
            right = needed(more, example)[:most]
            kept = [f for f in here if f not in right][: most - len(right)]  # the last go first
            made.append([f for f in right if f not in here] + [f for f in here if f in right or f in kept])
    return made


@dataclass(frozen=True)
class Reading:
    """How a System reads, measured apart: shares of rows in percent, scores as the metric's are read (`in_points`).

    A score is None where no row is of that kind.

    `recall`: rows whose answer stands in what they were shown. `found` and `missed`: the score of those rows and of
    the others. `oracle`: shown the right passages alone, one of each document of the evidence, as many as ever at most;
    `distracted`: shown as many as ever, none of a document of the evidence.
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
    """Read the same questions with the passages found, with the right ones alone, and with wrong ones only.

    Raises MethodError for a System that looks nothing up.
    """
    if not system.sources:
        raise MethodError("--reading needs a System with documents", found="none", do="make one: whet apply rag")
    given = system.answers(examples, session)
    answers, shown = [a.text for a in given], [a.passages for a in given]
    deep = _around(system, examples, shown)
    right = [holding(more, e) for e, more in zip(examples, deep, strict=True)]
    hit = [any(f in good for f in here) for here, good in zip(shown, right, strict=True)]

    unit = 100 if in_points(metric.name) else 1

    def score(some: Sequence[Example], texts: Sequence[str]) -> float | None:
        return unit * metric.aggregate(score_all(metric, texts, some)) if some else None

    def part(wanted: bool) -> float | None:
        rows = [n for n, found in enumerate(hit) if found == wanted]
        return score([examples[n] for n in rows], [answers[n] for n in rows])

    known = [n for n, good in enumerate(right) if good]
    asked = [examples[n] for n in known]
    most = [max(1, len(here)) for here in shown]
    alone = [needed(deep[n], examples[n])[: most[n]] for n in known]
    oracle = system.answers(asked, session, found=alone) if asked else []
    wrong = [astray(deep[n], examples[n])[: most[n]] for n in known]
    distracted = system.answers(asked, session, found=wrong) if asked else []
    return Reading(
        len(examples), 100 * sum(hit) / len(hit), part(True), part(False),
        score(asked, [a.text for a in oracle]), score(asked, [a.text for a in distracted]),
        100 * sum(bool(cited(a, here)) for a, here in zip(answers, shown, strict=True)) / len(answers),
        100 * sum(bool(DECLINES.match(squad(a))) for a in answers) / len(answers),
    )  # fmt: skip
