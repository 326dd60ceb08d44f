"""Prompt engineering: variants of the prompt are derived from the task and raced; or a person writes it."""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from whet import stats, triples
from whet.engine import Sampling
from whet.errors import MethodError, StoreError, WhetError
from whet.extras import package
from whet.methods import Need, Run
from whet.metrics import squad, stands
from whet.prompt import SLOT, from_text
from whet.system import System
from whet.task import Example, Learnable

if TYPE_CHECKING:
    from whet.variants import Contest

LEAST_ROWS = 10  # that prompts are compared on
PROBED, PROBE_ROWS = 8, 64  # formats and rows of the headroom probe
DOUBT = 0.2  # its p-value from which nothing is raced; a race for nothing costs tokens, but the verdict still holds
MOST_LISTED = 30  # labels that are described or shown by an example; more would crowd the prompt
LONG_LIST = 200  # characters of instruction above which it stands where all questions share it
REASON_TOKENS = 192  # more of them where the model is to think before it answers
FRAMES = (SLOT, f"Text: {SLOT}\nLabel:", f"Question: {SLOT}\nAnswer:", f"Input: {SLOT}\nOutput:")
PLACES = ("system", "before", "after")  # where the instruction stands, as seen from the question
Reading = dict[str, Any]  # what of Decoding a variant changes


@dataclass(frozen=True)
class Prompting:
    """The best of a pool of prompts: wording, structure, added context, label words, where the instruction stands.

    Variants are derived from the task and raced on train rows: half of them on a few rows each, up to `examples`; the
    winner takes the given prompt's place only if it is ahead on as many rows again, and beyond noise on all of them.
    `calibrated` compares them as calibration would have them, for recipes that go on with it. `file` is a prompt that
    a person wrote; `proposer` a stronger model (openai:NAME@URL) that writes better ones from failures, `proposals` at
    most (GEPA, Agrawal et al. 2025). For generated answers, and refused where they are chosen among labels or choices:
    `temperature`, `votes` samples that vote, and `reason`, which adds variants that think first.
    """

    name: ClassVar[str] = "prompting"
    family: ClassVar[str] = "prompt engineering"
    needs: ClassVar[tuple[Need, ...]] = ("examples",)
    writes: ClassVar[tuple[str, ...]] = ("prompt", "decoding")
    invalidates: ClassVar[tuple[str, ...]] = ("calibration",)

    pool: int = 24
    examples: int = 128
    calibrated: bool = False
    file: str = ""
    proposer: str = ""
    proposals: int = 8
    temperature: float = 0.0
    votes: int = 1
    reason: bool = False

    def __post_init__(self) -> None:
        if min(self.pool, self.proposals) < 1 or self.examples < 8:
            raise ValueError("pool and proposals are at least 1, examples at least 8")
        if self.temperature < 0 or self.votes < 1 or (self.votes > 1 and not self.temperature):
            raise ValueError("votes is at least 1, and several need a temperature above 0")
        if self.proposer and not self.proposer.startswith("openai:"):
            raise ValueError(f"proposer is {self.proposer!r}; openai:NAME@URL")
        if self.file:  # nothing is compared
            object.__setattr__(self, "needs", ())

    @property
    def prompts(self) -> int:
        """How many prompts the model is asked, about."""
        if self.file:
            return 0
        rungs = max(1, math.ceil(math.log2(self.pool)))
        return int(self.examples * (2.5 + self.pool / 2.0**rungs * (1 + rungs / 2))) + PROBED * PROBE_ROWS

    def asks(self, rows: int) -> int:
        """How many prompts the model is asked, about, where train has so many rows."""
        raced, probed = max(0, self.prompts - PROBED * PROBE_ROWS), PROBED * min(PROBE_ROWS, rows)
        return math.ceil(raced * min(1.0, rows / self.examples)) + probed if self.prompts else 0

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying."""
        return {"pool": (12, 24), "examples": (64, 128), "calibrated": (False, True)}

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with the prompt that won, or with its own; its calibration is dropped."""
        from whet.variants import Contest, learnable, unseen

        if system.decoding.closed and data.closed and (self.reason or self.temperature):
            raise MethodError(
                "reason, temperature and votes would change nothing", expected="answers that are generated",
                found="answers that are chosen among labels or choices", do="leave these settings out",
            )  # fmt: skip
        own: Reading = {"temperature": self.temperature, "votes": self.votes} if self.temperature else {}
        start = replace(system, decoding=replace(system.decoding, prior=(), **own))
        if self.file:
            return edited(start, Path(self.file))
        rows = learnable(start, data, run.seed)
        raced = rows[: min(2 * self.examples, 4 * len(rows) // 5)]
        rest = rows[len(raced) :]  # a fifth of the rows at least
        if len(raced) < 8:
            raise MethodError(
                "too few rows to compare prompts on", expected=f"{LEAST_ROWS} train rows that are not shown",
                found=str(len(rows)), do="add rows, or write a prompt: --set file=P.txt",
            )  # fmt: skip
        half, blind = len(raced) // 2, unseen(start, raced)[1]
        pool = variants(blind, data, rest, self.pool, run.seed, self.reason, meanings(start, data, run))
        contest = Contest.of(data, raced, run.session(system.model), calibrated=self.calibrated,
                             progress=run.progress(f"racing {len(pool)} prompts"))  # fmt: skip
        best, notes = self._raced(contest, pool, half, run.seed)
        if self.proposer:
            best = self._proposed(contest, best, half, run)
        kept, pair = contest.better(blind, best, half, run.seed) if best != blind else (False, None)
        new = replace(best, demonstrations=start.demonstrations) if kept else start
        everything = range(len(raced))
        both = all(contest.scores(s) for s in (blind, best))  # a large label set is searched, not scored
        for kind, on in (("raw", False), ("calibrated", True))[: 1 + both]:
            notes[kind] = [contest.metric.aggregate(contest.outcomes(s, everything, on)) for s in (blind, best)]
        if pair and not kept:
            notes["why"] = "the best variant is not better than the given prompt beyond noise"
        run.notes["prompting"] = {
            **notes, "changed": kept, "rows": len(raced), "prompt": new.prompt_text,
            "difference": [pair.difference, pair.low, pair.high, pair.p_value] if pair else None,
        }  # fmt: skip
        return new

    def _raced(
        self, contest: Contest, pool: Sequence[System], most: int, seed: int
    ) -> tuple[System, dict[str, Any]]:
        """The winner of the pool; the given prompt, which stands first, where a probe finds no headroom."""
        rows, probed = range(min(PROBE_ROWS, most)), pool[:PROBED]
        runs = [contest.outcomes(s, rows) for s in probed]
        p_value = stats.alike(runs, contest.metric, seed) if len(probed) > 1 else 1.0
        probe = {"p_value": p_value, "scores": [contest.merit(s, rows) for s in probed], "rows": len(rows)}
        if p_value >= DOUBT:
            return pool[0], {"probe": probe, "why": "no headroom: prompts of very different form score alike"}
        best, rungs = contest.best(pool, most)
        return best, {"probe": probe, "rungs": rungs}

    def _proposed(self, contest: Contest, best: System, most: int, run: Run) -> System:
        """The best that GEPA makes of it with the proposer's reflections on failures."""
        from whet.engine import open_session
        from whet.model import resolve

        gepa = package("gepa", "prompting")
        # Of its own, not the Run's: who counts what those have spent would count it twice.
        asked = open_session(resolve(self.proposer), run.home)
        tried, failed = list[bool](), list[WhetError]()

        def reflect(prompt: str | list[dict[str, Any]]) -> str:
            turns = [("user", prompt)] if isinstance(prompt, str) else [(m["role"], m["content"]) for m in prompt]
            tried.append(True)
            try:
                return asked.generate([tuple(turns)], Sampling(1024, 1.0))[0][0].text
            except WhetError as error:  # GEPA goes on without a word
                failed.append(error)
                raise

        # Each proposal costs a few rows, and all of the second half if it does better there.
        try:
            found = gepa.optimize(
                {"instruction": best.instruction, "frame": best.frame}, list(range(most // 2)),
                list(range(most // 2, most)), adapter=_Reflected(contest, best), reflection_lm=reflect, seed=run.seed,
                max_metric_calls=(self.proposals + 1) * most // 2 + 8 * self.proposals, logger=_Quiet(),
                stop_callbacks=lambda _: len(tried) >= self.proposals,
            )  # fmt: skip
        finally:
            run.spent += asked.spent
            asked.close()
        if failed and len(failed) == len(tried):
            raise failed[0]
        if failed:
            run.notes["proposals"] = f"{len(failed)} of {len(tried)} failed: {failed[0]}"
        return _with(best, found.best_candidate) or best


def edited(system: System, file: Path) -> System:
    """The System with the prompt in a file. Raises MethodError where it cannot be read."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:  # some editors put a byte order mark first
            instruction, frame, words = from_text(text.read())
        labels = system.decoding.labels
        if words and set(words) != set(labels):
            raise ValueError(f"words for {', '.join(words)}; the labels are {', '.join(labels) or 'none'}")
        decoding = replace(system.decoding, words=tuple(words[label] for label in labels) if words else ())
    except (OSError, ValueError) as error:
        raise MethodError(
            f"no prompt in {file}", expected=f"an instruction, a line ---, a frame with {SLOT}, words for labels",
            found=getattr(error, "strerror", None) or str(error), do="see prompt.txt in a System's folder",
        ) from error  # fmt: skip
    return replace(system, instruction=instruction, frame=frame, decoding=decoding)


# --- the pool ---------------------------------------------------------------------------------------------------------


def meanings(system: System, data: Learnable, run: Run) -> dict[str, str]:
    """What the task's glossary says of the labels and of the terms that the instruction names; a note where it cannot.

    Labels come first, in their order.
    """
    if data.glossary is None:
        return {}
    try:
        facts, _ = run.facts(replace(data, knowledge=None))
    except StoreError:
        raise
    except WhetError as error:  # an endpoint that is down: other prompts are raced
        run.notes["glossary"] = f"no definitions: {error}"
        return {}
    told = {s: facts.named(o, humps=False)[0] for s, relation, o in facts.triples if relation == triples.MEANS}
    by_name = {squad(name): meaning for one, meaning in told.items() for name in facts.named(one, humps=False)}
    decoding = system.decoding
    few = decoding.closed and len(decoding.labels) <= MOST_LISTED
    spoken = dict(zip(decoding.labels, decoding.spoken, strict=True)) if few else {}
    labels = {label: by_name.get(squad(label)) or by_name.get(squad(said)) for label, said in spoken.items()}
    text, known = squad(system.instruction), {squad(one) for pair in spoken.items() for one in pair}
    names = {one: {squad(name) for name in facts.named(one, humps=False)} - {"", *known} for one in told}
    terms = {facts.named(one, humps=False)[0]: told[one] for one in told
             if any(stands(text, name) for name in names[one]) and squad(one) not in known}  # fmt: skip
    found = {label: meaning for label, meaning in labels.items() if meaning} | terms
    return dict(islice(found.items(), MOST_LISTED))


def variants(
    system: System, data: Learnable, rest: Sequence[Example], count: int, seed: int, reason: bool = False,
    known: Mapping[str, str] = MappingProxyType({}),
) -> list[System]:  # fmt: skip
    """`count` prompts at most, the given one first: then one part changed at a time, by turns, then several.

    `rest` are train rows that no variant is scored on: label words and examples of the form are taken from them.
    `known` are the `meanings` of labels and terms.
    """
    labels = system.decoding.labels if system.decoding.closed else ()
    readings = [*_readings(system, rest), *_words(labels), *_reasoned(system, reason)]
    heads = _labelled(system.instruction, labels, rest) if labels else _free(system, data, rest)
    if known:
        heads.insert(2, lambda said: _explained(system.instruction, dict(zip(labels, said, strict=False)), known))
    axes: tuple[Sequence[Any], ...] = (heads, PLACES, _frames(data.columns), readings)
    given = tuple(axis[0] for axis in axes)
    alone = [[(*given[:n], part, *given[n + 1 :]) for part in axis[1:]] for n, axis in enumerate(axes)]
    turns = [one for turn in zip_longest(*alone) for one in turn if one is not None]
    several = [one for one in product(*axes) if sum(a is not b for a, b in zip(one, given, strict=True)) > 1]
    random.Random(seed).shuffle(several)
    found = {system.fingerprint: system}
    for head, place, frame, reading in (*turns, *several):
        if len(found) >= count:
            break
        new = _assembled(system, head, place, frame, reading)
        if new is not None:
            found.setdefault(new.fingerprint, new)
    return list(found.values())


def _frames(columns: Sequence[str]) -> Sequence[str]:
    """The question as it is, by the names of its columns where the task has them, and by common ones."""
    if not columns:
        return FRAMES
    asked, told = (" ".join(name.replace("_", " ").split()) for name in columns)
    named = f"{asked[:1].upper()}{asked[1:]}: {SLOT}\n{told[:1].upper()}{told[1:]}:"
    return tuple(dict.fromkeys((FRAMES[0], named, *FRAMES[1:])))


def _assembled(
    system: System, head: Callable[[Sequence[str]], str], place: str, frame: str, reading: Reading
) -> System | None:
    """One variant; None where it makes no sense: letters that nothing explains, data that reads as a frame's slot, or
    a long text that would be read anew for each row.
    """
    labels = system.decoding.labels
    said = reading.get("words") or system.decoding.spoken
    text = head(said)
    if "after" in reading:
        text = f"{text} Think step by step, then write the answer behind \"{reading['after']}\".".strip()
    letters = said == _letters(said) != labels
    if letters and any(f"{a} ({b})" not in text for a, b in zip(said, labels, strict=True)):
        return None
    frame = system.frame if frame == SLOT else frame
    if place == "after" and len(text) > LONG_LIST:
        return None
    before, _, after = frame.partition(SLOT)
    if place == "before" and text:
        text, frame = "", f"{text}\n\n{frame}"
    elif place == "after" and text:
        text, frame = "", f"{before}{SLOT}\n\n{text}{after}"
    return _with(replace(system, decoding=replace(system.decoding, **reading)), {"instruction": text, "frame": frame})


def _with(system: System, parts: Mapping[str, str]) -> System | None:
    """The System with another instruction and frame; None where the frame is none."""
    if parts["frame"].count(SLOT) != 1:
        return None
    return replace(system, instruction=parts["instruction"], frame=parts["frame"])


def _labelled(given: str, labels: Sequence[str], rest: Sequence[Example]) -> list[Callable[[Sequence[str]], str]]:
    """Instructions for a closed set, as functions of the words that stand for the labels."""
    def named(said: Sequence[str]) -> list[str]:
        stand = tuple(said) == _letters(labels) != tuple(labels)
        return [f"{a} ({b})" if stand else a for a, b in zip(said, labels, strict=True)]

    def either(said: Sequence[str]) -> str:
        return " or ".join(filter(None, [", ".join(named(said)[:-1]), named(said)[-1]]))

    heads: list[Callable[[Sequence[str]], str]] = [
        lambda said: given,
        lambda said: f"{given} Answer with one of: {', '.join(named(said))}.".strip(),
        lambda said: f"Is it {either(said)}?",
        lambda said: f"{given}\n\nLabels:\n" + "\n".join(f"- {name}" for name in named(said)),
        lambda said: f"You are an expert annotator. {given} Answer with the label only: {either(said)}.",
        lambda said: f"Answer {either(said)}.",
    ]
    shown, telling = _shortest(labels, rest), _telling(labels, rest)
    if shown:
        heads.insert(2, lambda said: f"{given}\n\nFor example:\n" + "\n".join(
            f"{text} → {name}" for text, name in zip(shown, said, strict=True)))  # fmt: skip
    if telling:
        heads.insert(2, lambda said: f"{given}\n\nLabels, with words that often go with them:\n" + "\n".join(
            f"- {name}: {', '.join(words)}" for name, words in zip(named(said), telling, strict=True)))  # fmt: skip
    return heads


def _explained(given: str, said: Mapping[str, str], known: Mapping[str, str]) -> str:
    """The instruction with the meanings of labels, by the words that stand for them, and of its terms."""
    letters = tuple(said.values()) == _letters(list(said)) != tuple(said)
    lines = [f"- {f'{said[one]} ({one})' if letters else said[one]}{f': {known[one]}' if one in known else ''}"
             for one in said]  # fmt: skip
    terms = [f"- {one}: {meaning}" for one, meaning in known.items() if one not in said]
    labelled = bool({*said} & {*known})
    parts = [given, *(["Labels, with what they mean:\n" + "\n".join(lines)] if labelled else []),
             *(["Terms:\n" + "\n".join(terms)] if terms else [])]  # fmt: skip
    return "\n\n".join(filter(None, parts))


def _letters(labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(map(chr, range(65, 65 + len(labels))))


def _words(labels: Sequence[str]) -> list[Reading]:
    """What else may be said for each label: itself written out, capitalised, in lower case, or a letter."""
    plain = tuple(" ".join(re.sub(r"[_-]+", " ", label).split()) for label in labels)
    ways = [plain, tuple(w[:1].upper() + w[1:] for w in plain), tuple(w.casefold() for w in plain)]
    if len(labels) <= 26:
        ways.append(_letters(labels))
    usable = [w for w in dict.fromkeys(ways) if w != tuple(labels) and len(set(w)) == len(labels) and all(w)]
    return [{"words": w} for w in usable]


def _shortest(labels: Sequence[str], rest: Sequence[Example]) -> list[str]:
    """One of the shorter prompts of each label, to show the form; empty where they lack, are long or the same."""
    by_label = {label: sorted((e.prompt for e in rest if e.completion == label), key=len) for label in labels}
    found = [texts[len(texts) // 4] for texts in by_label.values() if texts]
    apart = len(set(found)) == len(labels)  # one question before all labels would tell nothing
    return found if apart and len(labels) <= MOST_LISTED and max(map(len, found)) <= LONG_LIST else []


def _telling(labels: Sequence[str], rest: Sequence[Example], most: int = 5) -> list[list[str]]:
    """Words that tell each label from the others: of the greatest p(word | label) · log(p(word | label) / p(word))."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rest:
        seen[row.completion].update(set(re.findall(r"[^\W\d_]{3,}", row.prompt.casefold())))
    total, sizes = sum(seen.values(), Counter[str]()), Counter(row.completion for row in rest)
    if len(labels) > MOST_LISTED or min((sizes[label] for label in labels), default=0) < 8:
        return []

    def telling(label: str, word: str) -> float:
        share = seen[label][word] / sizes[label]
        return share * math.log(share * len(rest) / total[word])

    return [
        sorted(seen[label], key=lambda w, label=label: (-telling(label, w), w))[:most]  # type: ignore[misc]
        for label in labels
    ]


def _free(system: System, data: Learnable, rest: Sequence[Example]) -> list[Callable[[Sequence[str]], str]]:
    """Instructions for free text (or rows with their own choices), from what train's answers look like."""
    answers = [e.completion for e in rest]
    words = sorted(len(a.split()) for a in answers)
    middle = words[len(words) // 2] if words else 1
    long = f"Answer in about {middle} words." if middle > 8 else "Answer with a few words only."
    more = ["Answer only with the answer, without explanation.", "Be brief." if middle <= 8 else "Be complete.", long]
    some = rest[:16]
    seen = [str(p[-1]) for p in system.prompts(some) if not isinstance(p, str)] if some else []
    if sum(a.casefold() in s.casefold() for a, s in zip(answers, seen, strict=False)) > len(seen) / 2:
        more.insert(0, "Answer with a few words, copied from the text.")
    forms = [a for a in dict.fromkeys(answers) if len(a) <= 60 and "\n" not in a][:3]
    if forms and not data.closed:
        more.insert(1, f"Answers look like these: {'; '.join(forms)}.")
    given = system.instruction
    texts = [given, *(f"{given} {one}".strip() for one in more), *more[:2], f"You are an expert. {given}"]
    return [lambda said, text=text: text for text in texts]  # type: ignore[misc]


def _readings(system: System, rest: Sequence[Example]) -> list[Reading]:
    """As it is, and how else an answer may be read off: per token or as a whole; what is generated, as one line."""
    if system.decoding.closed:
        return [{}, {"normalise": "mean" if system.decoding.normalise == "sum" else "sum"}]
    single = bool(rest) and not any("\n" in e.completion.strip() for e in rest)
    return [{}, {"stop": ("\n",)}] if single else [{}]


def _reasoned(system: System, reason: bool) -> list[Reading]:
    """Thinking before the answer, where it is generated."""
    if not reason or system.decoding.closed:
        return []
    return [{"after": "Answer:", "max_tokens": system.decoding.max_tokens + REASON_TOKENS}]


# --- proposals --------------------------------------------------------------------------------------------------------


LOWEST = -1e9  # a metric may score below 0


class _Quiet:
    """GEPA's log goes nowhere: what came of it stands in the notes."""

    def log(self, message: str) -> None:
        pass


@dataclass
class _Reflected:
    """What GEPA asks of a task: scores of a candidate on rows (by number), and records of what went wrong."""

    contest: Contest
    system: System
    propose_new_texts: None = None  # GEPA's own way of asking

    def evaluate(self, batch: list[int], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        """Scores, higher is better; a frame without its slot scores less than any other."""
        made = _with(self.system, candidate)
        found = [] if made is None else self.contest.outcomes(made, batch)
        sign = 1 if self.contest.metric.higher_is_better else -1
        answers = [o.answer for o in found] or [f"the frame must hold {SLOT} once"] * len(batch)
        scores = [sign * o.score for o in found] or [LOWEST] * len(batch)
        traces = list(zip(batch, answers, scores, strict=True)) if capture_traces else None
        return package("gepa", "prompting").EvaluationBatch(outputs=answers, scores=scores, trajectories=traces)

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """Question, what was answered, and what was wanted, for each row."""
        rows = self.contest.rows
        records = [
            {"Inputs": rows[i].prompt, "Generated Outputs": answer,
             "Feedback": f"score {score:g}; the answer is: {rows[i].completion}"}
            for i, answer, score in eval_batch.trajectories
        ]  # fmt: skip
        note = {"Feedback": f"This text is the frame of a question: it must hold {SLOT} exactly once."}
        return {part: [note, *records] if part == "frame" else records for part in components_to_update}
