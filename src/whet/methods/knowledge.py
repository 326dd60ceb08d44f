"""Knowledge injection: facts of the task's graph and glossary, looked up for each question or taught to the model."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from whet.errors import MethodError
from whet.graph import VERBS, Graph, Way, asked, build, identity, read, usable
from whet.methods import Need, Run
from whet.prompt import escape, specials_of
from whet.system import System
from whet.task import Example, Learnable

MODES = ("lookup", "train")
FRAMES = ("{}?", "Tell me {}.", "Please name {}.", "I would like to know {}.", "Do you know {}?", "Look up {}.",
          "Say {} and nothing else.", "Give me {}.", "Question: {}?", "Could you say {}?", "Complete: {} is",
          "Answer in a word or two: {}?", "Somebody asks for {}.", "Remind me of {}.", "I forgot {}.",
          "What do the records give for {}?")  # fmt: skip
DIRECT = ("{}?", "Question: {}?", "Answer in a word or two: {}?")  # whose phrase is the question itself
HELD = 4  # of these are never trained on, so that unseen phrasings can be measured
FEW, MOST_ANSWERS = 3, 20  # subjects that share an object, where a question is asked backwards; answers of a fact
MOST_FACTS = 20_000
PROBED = 24  # facts that are asked for in seen and in unseen phrasings once they were taught
REPLAYED = 0.25  # of each step's rows are what the model said before
HOPS, MOST_HOPS = 2, 3  # where train does not tell, and at most


@dataclass(frozen=True)
class Asked:
    """A fact to be asked for: what leads to it in words, and all accepted answers; `told` states it."""

    phrase: str
    answers: tuple[str, ...]
    told: str

    @property
    def key(self) -> str:
        """What a System's card remembers a taught fact by."""
        return hashlib.sha256(json.dumps([self.phrase, self.answers]).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Knowledge:
    """Facts of the task's knowledge and glossary: `mode` lookup (in front of each question) or train (in the weights).

    lookup finds a question's entities and the ways of up to `hops` relations that it asks for (0: as many as train's
    answers need, 2 without) and shows at most `k` facts; what the best way leads to comes first. train makes
    `phrasings` questions of each fact, both ways round, adds it as a statement, mixes in the task's own rows, and is
    then `finetune` with `rank`, `learning_rate`, `epochs` and `batch`. Taught again, a System learns the facts that are
    new or changed, and as many old ones.
    """

    name: ClassVar[str] = "knowledge"
    family: ClassVar[str] = "knowledge injection"
    needs: ClassVar[tuple[Need, ...]] = ("knowledge",)
    writes: ClassVar[tuple[str, ...]] = ("sources",)
    invalidates: ClassVar[tuple[str, ...]] = ("calibration",)

    mode: str = "lookup"
    hops: int = 0
    k: int = 10
    phrasings: int = 8
    rank: int = 16
    learning_rate: float = 1e-3
    epochs: float = 3.0
    batch: int = 32

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; one of {', '.join(MODES)}")
        if not 0 <= self.hops <= MOST_HOPS or self.k < 1 or not 1 <= self.phrasings <= len(FRAMES) - HELD:
            raise ValueError(f"hops is 0 to {MOST_HOPS}, k at least 1, phrasings 1 to {len(FRAMES) - HELD}")
        if self.mode == "train":  # what the class says is of looking up, which servers can do, too
            object.__setattr__(self, "needs", ("knowledge", "weights"))
            object.__setattr__(self, "writes", ("model", "decoding"))

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying."""
        if self.mode == "train":
            return {"phrasings": (8, 12), "learning_rate": (3e-4, 1e-3), "epochs": (3.0, 6.0)}
        return {"k": (1, 3, 10), "hops": (0, 1, 2)}

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with the graph as one more source, or with its facts in the weights."""
        facts, notes = run.facts(data)
        graph = Graph.of(facts)
        run.notes.update(facts=len(facts.triples))
        run.leave_out(*notes)
        return self._taught(graph, system, data, run) if self.mode == "train" else self._shown(graph, system, data, run)

    def _shown(self, graph: Graph, system: System, data: Learnable, run: Run) -> System:
        from whet.embed import Embedder
        from whet.linking import READER, GraphSource, Linker, opened

        rows = [(e.query, e.answers or (e.completion,)) for e in data.train if e.completion and not e.choices]
        said = [(q.now, q.before, answers) for q, answers in rows]
        name = identity(graph, said, self.hops, run.seed, READER)
        folder, plain = run.store.artifact(name), run.store.artifact(identity(graph))
        if not usable(folder):
            if run.tell is not None:
                run.tell(f"indexing {len(graph.edges)} facts", 0, 1)
            embedder = Embedder(run.home)
            if not usable(plain):
                build(graph, plain, embedder)
            linker = Linker(read(plain), embedder, run.tell)
            hops = self.hops or linker.needed(rows, MOST_HOPS, run.seed) or HOPS
            build(graph, folder, embedder, hops, *linker.learn(rows, hops, run.seed))
        made = opened(folder, run.home).opened
        others = tuple(s for s in system.sources if not isinstance(s, GraphSource))
        run.notes.update(hops=made.hops)
        if rows:
            run.notes["train"] = "{} of {} rows are answered by the graph".format(*made.answered)
        source = GraphSource(name, self.k, made.hops, folder)
        return replace(system.uncalibrated, sources=(*others, source))

    def _taught(self, graph: Graph, system: System, data: Learnable, run: Run) -> System:
        from whet.memory import Known, made_up
        from whet.methods.continual import Continual

        session = run.local(system.model, "training")
        every, draw = facts_of(graph), random.Random(run.seed)
        before = set(system.card.get("facts", ()))
        fresh = [one for one in every if one.key not in before]
        if before and not fresh:
            raise MethodError("nothing new to teach", expected="facts that the System was not taught", found="none")
        again = [one for one in every if one.key in before]
        chosen = [*fresh, *draw.sample(again, min(len(again), len(fresh)))]
        chosen = draw.sample(chosen, min(len(chosen), MOST_FACTS))
        seen, held = frames()
        rows = [row for one in chosen for row in _rows(one, self.shown(one, run.seed), session.tokenizer)]
        known = [replace(e, group=None) for e in data.train if e.completion and not e.text]
        run.notes.update(taught=len(chosen), new=len(fresh), seen=list(seen), held=list(held))
        # What the model says of its own accord is replayed, so that it does not answer everything with a fact.
        own = Known("what it knew", "token_f1", system)
        own = replace(own, rows=made_up(own, system, session, (), run))
        start = replace(system, card={**system.card, "memory": [*system.card.get("memory", ()), own.entry()]})
        plain = Continual(rank=self.rank, learning_rate=self.learning_rate, epochs=self.epochs, batch=self.batch,
                          share=REPLAYED)  # fmt: skip
        made = plain.apply(start, replace(data, train=(*rows, *known)), run)
        card = {**system.card, "facts": sorted({one.key for one in every} & (before | {one.key for one in chosen}))}
        if run.fidelity == 1:
            self._compare(graph, chosen, system, made, data, run)
        return replace(made, card=card)

    def shown(self, one: Asked, seed: int) -> list[str]:
        """The phrasings in which a fact is trained on."""
        return random.Random(f"{seed}/{one.key}").sample(frames()[0], self.phrasings)

    def _compare(
        self, graph: Graph, chosen: Sequence[Asked], before: System, taught: System, data: Learnable, run: Run
    ) -> None:
        """Note how the taught model and the one before, which looks them up, answer the same questions about facts.

        Each in a phrasing that it was trained on in and in one held out, in percent of the answers that contain an
        accepted one, and milliseconds an answer; and what the teaching did to all else. Looked up is one fact, which
        small models read best. What cannot be looked up here, for want of a package, is left out: the training is done.
        """
        from whet import embed
        from whet.general import ability
        from whet.metrics import get
        from whet.scorecard import evaluate

        quiet, metric, draw = replace(run, notes={}), get("contains"), random.Random(run.seed)
        systems = {"taught": taught}
        if embed.available():
            systems["looked up"] = replace(self, mode="lookup", k=1)._shown(graph, before, data, quiet)
        some = draw.sample(chosen, min(PROBED, len(chosen)))
        found: dict[str, dict[str, float]] = {name: {} for name in systems}
        for kind in ("seen", "unseen"):
            shown = [self.shown(one, run.seed) if kind == "seen" else frames()[1] for one in some]
            rows = [Example(f"{kind}-{n}", put(draw.choice(shown[n]), one.phrase), one.answers[0], one.answers)
                    for n, one in enumerate(some)]  # fmt: skip
            for name, system in systems.items():
                card = evaluate(system, rows, metric, session=run.session(system.model), split=f"{kind} phrasings",
                                seed=run.seed, store=run.store, progress=run.progress("asking for facts"))  # fmt: skip
                found[name] |= {kind: 100 * card.score, "ms": 1000 * card.seconds / card.n}
        general = ability(before, taught, run)
        run.notes.update(phrasings={**found, "n": len(some)}, general=str(general))


def _rows(one: Asked, shown: Sequence[str], tokenizer: Any) -> list[Example]:
    """A fact as rows: questions whose answers take turns where there are several, and a statement.

    The statement is plain text outside any turn, so that what could act as a turn in it is broken up here.
    """
    made = [Example(f"{one.key}-{n}", put(frame, one.phrase), one.answers[n % len(one.answers)], one.answers)
            for n, frame in enumerate(shown)]  # fmt: skip
    return [*made, Example(f"{one.key}-told", "", text=escape(one.told, specials_of(tokenizer)))]


def frames() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The phrasings that are trained on, and those held out: by every seed the same, so that no update learns them."""
    held = set(random.Random(0).sample(FRAMES, HELD))
    return tuple(f for f in FRAMES if f not in held), tuple(f for f in FRAMES if f in held)


def put(frame: str, phrase: str) -> str:
    """A phrase in a frame: "the colour of X" is asked "What is the colour of X?", by a verb "X is made by what?"."""
    if frame == "{}?" and phrase.startswith("the "):
        phrase = f"what is {phrase}"
    elif frame in DIRECT and phrase.startswith("what "):
        if phrase.endswith(" means"):
            phrase = f"what does {phrase[5:-6]} mean"
        elif phrase.split()[-1] in VERBS:  # what the verb leads to stands in its place
            phrase = f"{phrase[5:]} what"
    text = frame.format(phrase)
    return text[0].upper() + text[1:]


def facts_of(graph: Graph) -> list[Asked]:
    """Everything a graph can be asked for in one step, forwards, and backwards where few subjects share an object.

    What is asked for in the same words, of things of one name, is one question with the answers of all. Answers stand
    by their names, so that a fact is known again however its file is ordered.
    """
    groups: dict[tuple[int, Way], list[int]] = {}
    for s, r, o in graph.edges.tolist():
        groups.setdefault((s, (r,)), []).append(o)
        groups.setdefault((o, (~r,)), []).append(s)
    made: dict[str, tuple[set[str], set[str]]] = {}
    for (node, way), found in groups.items():
        [step] = way
        if step < 0 and len(found) > FEW:
            continue
        phrase = asked(graph.nodes[node][0], graph.named(step), step < 0 and ~step not in graph.inverses)
        ends = sorted(found, key=lambda n: (graph.nodes[n][0], n))
        answers, lines = made.setdefault(phrase, (set(), set()))
        answers.update(graph.nodes[n][0] for n in ends)
        lines.add(graph.sentence(node, way, ends, MOST_ANSWERS))
    return [Asked(phrase, tuple(sorted(answers)[:MOST_ANSWERS]), "\n".join(sorted(lines)[:MOST_ANSWERS]))
            for phrase, (answers, lines) in made.items()]  # fmt: skip
