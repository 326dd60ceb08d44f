"""Reading a question with a graph: its entities, the way of relations it asks for, and the facts to show for it."""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from whet.documents import HANGUL, MARKS, PARTICLE, Passage
from whet.embed import Embedder
from whet.errors import ArtifactError, rebuilding
from whet.extras import package
from whet.graph import MOST_ENDS, Opened, Way, read
from whet.retrieval import Found
from whet.splits import UNSPACED
from whet.task import Query

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
Ways = dict[Way, tuple[int, ...]]  # and where each leads
Span = tuple[int, int]  # of words in a question
# A character where words have no spaces between them; a vowel sign or an accent is part of its word.
WORD = re.compile(rf"[{UNSPACED}]|(?:[^\W_{UNSPACED}][{MARKS}]*)+")
PARTICLES = re.compile(f"{PARTICLE}{{1,2}}")  # two are stacked
BEHIND = rf"(?=$|[\s.,;:?!'’{HANGUL}])"  # what may follow a name of signs
RUNNING = frozenset("!\"#%&'()*+,-./:;<=>?@[]_|~–—…·")  # signs of any text, alone the name of nothing
PRONOUNS = frozenset(WORD.findall("it its he his him she her they their them"))  # where a turn lacks the name
# Words that name no relation; everything else in a question may.
STOP = frozenset(WORD.findall("what is the of s who name did do does a an in which from for to by was were that it and "
                              "at where when whom are on how"))  # fmt: skip
# Words of any text that a name is told from by its capitals alone, where it has them: US, Will; may stays a name.
COMMON = STOP | frozenset(WORD.findall("i me my we us our you your or if so as be no not yes ok hi can may will would "
                                       "could should has have had then than there here this these those"))  # fmt: skip
BEGUN = re.compile(r"(?:^|[.!?:\n。！？])[\s\"'“‘«(\[*-]*$")  # what stands before a sentence's first word
MOST_WORDS = 20  # of a name that is looked for in a question
MENTIONS = 6  # of a question, its options among them
HOMONYMS, WALKED = 5, 20  # nodes of one name, and those of them that are looked at
TOLD, LACKED = 0.5, 0.95  # how sure names of the turn before are where the last one says a name, and where it does not
FUZZY, MEANT = 90.0, 3  # least partial ratio of a misspelt name; names taken by meaning
ALIKE, LETTERS = 65.0, 4  # least ratio of a word to one of such a name; of a word that is misspelt beside whole names
MOST_CACHED = 50_000  # vectors of words and ways that are kept between questions
BEAM = 200  # ways that the next step is tried on
SHOWN, CHAINED = 5, 3  # ends of a way that are told; nodes on the way
BACKWARDS = 0.05  # what a step against its relation costs
RATE, MARGIN, EPOCHS, MOST_LEARNT, RIVALS = 0.0075, 0.025, 4, 2000, 40  # of the perceptron; wrong ways of a question
BATCH = 64  # questions that are read at once
SAMPLED, MOST = 200, 0.95  # train rows that tell how many hops are needed; their share that is to be answered
READER = 7  # counts the ways in which questions are read: nothing learnt or answered by one is taken for another's


@dataclass(frozen=True)
class Mention:
    """Nodes that a part of a question may mean, how sure that is, and the words around it in the order of walking.

    "The sex of X's son" goes by son, then by sex: what stands behind the name, then what stands before it, backwards.
    """

    nodes: tuple[int, ...]
    sure: float
    words: tuple[str, ...]
    masked: str


@dataclass(frozen=True)
class Candidate:
    """A way from a node that a question may ask for, where it leads, and its score."""

    node: int
    way: Way
    ends: tuple[int, ...]
    score: float


def words(text: str) -> list[str]:
    """The words of a text as names are compared by: lower case, without punctuation and underscores, in NFC."""
    return WORD.findall(_plain(text))


def _spelt(text: str) -> list[str]:
    """The words of a text in their own case."""
    return WORD.findall(unicodedata.normalize("NFC", text))


def _plain(text: str) -> str:
    """A text with its signs: lower case, single spaces, in NFC."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


@lru_cache(100_000)
def _bare(word: str) -> tuple[str, ...]:
    """A word, and what it is without a Korean particle or two (에서 + 는), the longest first."""
    return (word, *(word[:at] for at in range(len(word) - 1, 0, -1) if PARTICLES.fullmatch(word, at)))


def _ordinary(name: str, own: str) -> bool:
    """Whether a name of one word is one of any question: only as it is spelt, if at all, can it be told from it."""
    return name in STOP or (name in COMMON and own != own.casefold())


class Linker:
    """Reads questions with an opened graph; deterministic. `tell` hears how many train rows were read."""

    def __init__(self, opened: Opened, embedder: Embedder, tell: Callable[[str, int, int], None] | None = None) -> None:
        self.graph, self.opened, self.embedder, self.tell = opened.graph, opened, embedder, tell
        self.learnt: Mapping[str, float] = opened.learnt
        self.names: dict[str, list[int]] = {}
        self.cased: dict[str, list[int]] = {}  # nodes called like an ordinary word, as their name is spelt: WHO, It
        self.signs: dict[str, list[int]] = {}  # nodes whose name has neither letters nor digits
        labels = [" ".join(words(names[0])) for names in self.graph.nodes]
        for node, name in enumerate(labels):  # what is called so comes before what is called so as well
            if _ordinary(name, self.graph.nodes[node][0]):
                self._put_apart(node, self.graph.nodes[node][0])
            elif name and name.count(" ") < MOST_WORDS:
                self.names.setdefault(name, []).append(node)
        for node, names in enumerate(self.graph.nodes):
            said = [(" ".join(words(n)), n) for n in names[1:]]
            for name, own in said:
                if _ordinary(name, own):
                    self._put_apart(node, own)
            for name in {name for name, own in said if not _ordinary(name, own)} - {"", labels[node]}:
                if name.count(" ") < MOST_WORDS:
                    self.names.setdefault(name, []).append(node)
            for name in {_plain(n) for n in names if not words(n)} - RUNNING - {""}:
                self.signs.setdefault(name, []).append(node)
        self.vectors: dict[str, np.ndarray[Any, Any]] = {}
        self.steps = lru_cache(10_000)(self.graph.steps)
        self.mentions = lru_cache(10_000)(self._mentions)
        self.alike = lru_cache(10_000)(self._alike)
        self.called = lru_cache(100_000)(self._called)

    # --- entities -------------------------------------------------------------------------------------------------

    def _put_apart(self, node: int, name: str) -> None:
        """Remember a name that is a word of any question, too; one without a capital cannot be told from it."""
        if (spelt := "".join(_spelt(name))) != spelt.casefold() and node not in self.cased.get(spelt, ()):
            self.cased.setdefault(spelt, []).append(node)

    def _mentions(self, query: Query) -> tuple[Mention, ...]:
        """What a question mentions, each name read by all words and, where there are several lines, by its own lines'.

        The turn before fills the places that are left. Its names are read by the words of both turns and, where the
        question itself names nothing, in the place of its pronoun.
        """
        (said, its), lines = self._linked(query.now), _lines(query.now)
        made = [m for _, m in its]
        for (first, last), m in its if len(lines) > 2 else ():
            begin = max(n for n in lines[:-1] if n <= first)
            end = min(n for n in lines[1:] if n >= max(last, begin + 1))
            made.append(self._mention(m.nodes, m.sure, said[begin:end], first - begin, last - begin))
        if query.before:
            earlier, others = self._linked(query.before)
            known, both = {m.nodes for m in made}, [*said, *earlier]
            some = [(one, m) for one, m in others if m.nodes not in known][: MENTIONS - len(its)]
            for (first, last), m in some:
                sure = (TOLD if its else LACKED) * m.sure
                made.append(self._mention(m.nodes, sure, both, len(said) + first, len(said) + last))
            at = next((n for n, word in enumerate(said) if word in PRONOUNS), len(said))
            for _, m in some if said and not its else ():
                made.append(self._mention(m.nodes, m.sure, said, at, min(at + 1, len(said))))
        return tuple(made)

    def _linked(self, question: str) -> tuple[list[str], list[tuple[Span, Mention]]]:
        """The words of a text, and the names among them: whole ones and, where a word is strange, misspelt ones.

        The longest come first, at most MENTIONS.
        """
        text = _plain(question)
        places, at = [(m[0], m.start()) for m in WORD.finditer(text)], 0
        said = [word for word, _ in places]
        apart = self._apart(question) if self.cased else {}
        whole: list[tuple[Span, Mention]] = []
        while at < len(said):
            for size in range(min(MOST_WORDS, len(said) - at), 0, -1):
                if nodes := self._named(said[at : at + size]) or (apart.get(at, []) if size == 1 else []):
                    nodes = self._verbatim(nodes, text, places[at][1])
                    whole.append(((at, at + size), self._mention(nodes, 1.0, said, at, at + size)))
                    at += size - 1
                    break
            at += 1
        near = self._misspelt(said, [one for one, _ in whole])
        if whole:
            near += [(one, m) for one, m in whole if not any(_within(one, other) for other, _ in near)]
            near.sort(key=lambda f: (f[0][0] - f[0][1], -f[1].sure))
        signs = self._signed(text, said)
        return said, [*near[: MENTIONS - len(signs)], *signs]

    def _named(self, said: Sequence[str]) -> list[int]:
        """The nodes that words name, the last one with or without Korean particles."""
        *first, last = said
        return next((found for word in _bare(last) if (found := self.names.get(" ".join([*first, word])))), [])

    def _apart(self, question: str) -> dict[int, list[int]]:
        """The nodes called like an ordinary word that a question has in their own case, by the number of that word.

        A capital says nothing where a sentence begins with it, nor in a question of nothing else.
        """
        spelt, text = _spelt(question), unicodedata.normalize("NFC", question)
        if len(spelt) > 1 and all(word.isupper() or word.isnumeric() for word in spelt):
            return {}
        made: dict[int, list[int]] = {}
        for at, found in enumerate(WORD.finditer(text)):
            name = next((one for one in _bare(found[0]) if one in self.cased), "")
            first = name == name.capitalize() and BEGUN.search(text, 0, found.start())
            if name and not first:
                made[at] = self.cased[name]
        return made

    def _verbatim(self, nodes: list[int], text: str, start: int) -> list[int]:
        """Of nodes of one name those that are spelt as the text goes on from a word, signs and all: C++, not C."""
        if len(nodes) == 1:
            return nodes

        def stands(name: str) -> int:
            first = WORD.search(name)
            begin = start - first.start() if first else -1
            return len(name) if begin >= 0 and text.startswith(name, begin) else 0

        signs = {node: max(stands(_plain(name)) for name in self.graph.nodes[node]) for node in nodes}
        most = max(signs.values())
        return [node for node in nodes if signs[node] == most]

    def _signed(self, text: str, said: list[str]) -> list[tuple[Span, Mention]]:
        """Names made of signs alone ("!!!") that stand in a text by themselves, whatever ends it; the longest first."""
        text = re.sub(r"(?<=.)[.?。？]$", "", text)
        made: dict[int, tuple[Span, Mention]] = {}
        for name in sorted((name for name in self.signs if name in text), key=lambda name: (-len(name), name)):
            if found := re.search(rf"(?<!\S){re.escape(name)}{BEHIND}", text):
                at = len(WORD.findall(text[: found.start()]))
                made.setdefault(found.start(), ((at, at), self._mention(self.signs[name], 1.0, said, at, at)))
        return [*made.values()][:MENTIONS]

    def _misspelt(self, said: list[str], whole: Sequence[Span] = ()) -> list[tuple[Span, Mention]]:
        """The names most like a part of what is said, and where.

        Beside whole names only those that hold a word of no name, are like whole words, and cut no other name.
        """
        strange = [n for n, word in enumerate(said)
                   if len(word) >= LETTERS and not any(map(str.isnumeric, word)) and word not in self.holding
                   and word not in STOP and not any(_within((n, n + 1), one) for one in whole)]  # fmt: skip
        tried = [said[n] for n in strange] if whole else [word for word in said if word not in STOP]
        if not tried:
            return []
        fuzzy, text = package("rapidfuzz", "knowledge"), " ".join(said)
        names = {name for word in tried for name in self.alike(word) if 5 <= len(name) <= len(text)}
        score, exact = fuzzy.fuzz.partial_ratio, fuzzy.fuzz.ratio
        found = fuzzy.process.extract(text, names, scorer=score, score_cutoff=FUZZY, limit=None)
        made: list[tuple[Span, Mention]] = []
        for name, ratio, _ in sorted(found, key=lambda f: (-f[1], -len(f[0]), f[0])):
            sizes = {min(max(1, name.count(" ") + more), len(said)) for more in (0, 1, 2)}
            spans = [(n, n + size) for size in sizes for n in range(len(said) - size + 1)]
            likeness, (first, last) = max((exact(name, " ".join(said[a:b])), (a, b)) for a, b in spans)
            kept = all(b <= first or last <= a or _within((a, b), (first, last)) for a, b in whole)
            if whole and not (kept and likeness >= FUZZY and any(first <= n < last for n in strange)):
                continue
            made.append(((first, last), self._mention(self.names[name], 0.009 * ratio, said, first, last)))
            if len(made) == MENTIONS:
                break
        return made

    @cached_property
    def holding(self) -> dict[str, list[str]]:
        """The names that each word stands in."""
        made: dict[str, list[str]] = {}
        for name in self.names:
            for word in set(name.split()) - STOP:
                made.setdefault(word, []).append(name)
        return made

    def _alike(self, word: str) -> list[str]:
        """The names that a word stands in, or where there is none, those of words like it."""
        if word in self.holding:
            return self.holding[word]
        fuzzy = package("rapidfuzz", "knowledge")
        like = fuzzy.process.extract(word, self.holding.keys(), scorer=fuzzy.fuzz.ratio, score_cutoff=ALIKE, limit=None)
        return [name for one, *_ in like for name in self.holding[one]]

    def _mention(self, nodes: Sequence[int], sure: float, said: list[str], first: int, last: int) -> Mention:
        order = [*said[last:], *reversed(said[:first])]
        return Mention(tuple(nodes[:WALKED]), sure, tuple(order), " ".join([*said[:first], "X", *said[last:]]))

    def _meant(self, question: str, vector: np.ndarray[Any, Any], none: bool) -> list[Mention]:
        """Nodes whose description, or where nothing else was found (`none`) whose name, is nearest in meaning."""
        import numpy as np

        most = len(self.opened.order) if none else min(len(self.graph.described), len(self.opened.order))
        near = self.opened.vectors[:most] @ vector
        said = words(question)
        return [Mention((self.opened.order[n],), float(near[n]), tuple(said), " ".join(said))
                for n in np.argsort(-near, kind="stable")[:MEANT]]  # fmt: skip

    # --- ways -----------------------------------------------------------------------------------------------------

    def candidates(self, questions: Sequence[Query], hops: int) -> list[list[Candidate]]:
        """For each question the ways from its entities that exist, best first; of one name the best nodes alone."""
        if len(self.vectors) > MOST_CACHED:
            self.vectors.clear()
        every: list[tuple[int, Mention]] = []
        self._embed([q.text for q in questions])
        for n, question in enumerate(questions):
            named, text = self.mentions(question), question.text
            every += [(n, mention) for mention in (*named, *self._meant(text, self.vectors[text], not named))]
        walked = iter(self._ways([(m, node) for _, m in every for node in m.nodes], hops))
        made: list[dict[tuple[int, Way], Candidate]] = [{} for _ in questions]
        for n, m in every:
            some = [[Candidate(node, way, ends, 2 * m.sure + self.score(m, way)) for way, ends in next(walked).items()]
                    for node in m.nodes]  # fmt: skip
            some.sort(key=lambda ways: -max((c.score for c in ways), default=0.0))
            for one in (c for ways in some[:HOMONYMS] for c in ways):
                made[n][one.node, one.way] = max(made[n].get((one.node, one.way), one), one, key=lambda c: c.score)
        return [sorted(some.values(), key=lambda c: (-c.score, len(c.way), c.node, c.way)) for some in made]

    def _ways(self, starts: Sequence[tuple[Mention, int]], hops: int) -> list[Ways]:
        """All ways from nodes that questions mention, ready to be scored."""
        said = [m for m, _ in starts]
        self._embed([m.masked for m in said], (w for m in said for w in m.words), self.graph.relations)
        made = [self._walk(mention, node, hops) for mention, node in starts]
        self._embed({self._verbal(way) for ways in made for way in ways})
        return made

    def _embed(self, *texts: Iterable[str]) -> None:
        fresh = sorted({t for some in texts for t in some} - self.vectors.keys())
        self.vectors.update(zip(fresh, self.embedder(fresh, keep=False), strict=True))

    def _walk(self, mention: Mention, node: int, hops: int) -> Ways:
        """All ways from a node and their ends; of many, the next step is tried on those that fit the words best.

        The way back over a relation leads to others of its kind (films by the same director), never to where it came
        through.
        """
        layer: Ways = {(): (node,)}
        made: Ways = {}
        for _ in range(hops):
            after: dict[Way, dict[int, None]] = {}
            for way, ends in layer.items():
                been = {node}.union(*(made[way[:n]] for n in range(1, len(way) + 1)))
                for end in ends:
                    for step, there in self.steps(end).items():
                        if way and step == ~way[-1]:
                            there = [n for n in there if n not in been]
                        after.setdefault((*way, step), {}).update(dict.fromkeys(there))
            layer = {way: tuple(ends)[:MOST_ENDS] for way, ends in after.items() if ends}
            if len(layer) > BEAM:
                best = sorted(layer, key=lambda way: (-self._fit(mention, way), way))[:BEAM]
                layer = {way: layer[way] for way in best}
            made |= layer
        return made

    def _fit(self, mention: Mention, way: Way) -> float:
        """How well words and relations fit one another: each step has a word of its own, in order; words, any step."""
        said = [w for w in mention.words if w not in STOP]
        if not said:
            return 0.0
        near = [[float(self.vectors[w] @ self.vectors[self.graph.named(s)]) for s in way] for w in said]
        best = [0.0] + [-9.0] * len(way)
        for row in near:
            best = [0.0] + [max(best[j + 1], best[j] + row[j]) for j in range(len(way))]
        loose = sum(max(row[j] for row in near) for j in range(len(way))) / len(way) - 0.3
        steps = best[-1] / len(way) if len(said) >= len(way) else loose
        return 0.5 * steps + 0.5 * sum(max(row) for row in near) / len(near) - BACKWARDS * sum(s < 0 for s in way)

    def _verbal(self, way: Way) -> str:
        return " of ".join(self.graph.named(step) for step in reversed(way))

    def score(self, mention: Mention, way: Way) -> float:
        """How likely a question asks for a way: by meaning, by its words, and by what was learnt from train."""
        learnt = sum(self.learnt.get(f, 0.0) for f in _features(mention, way)) if self.learnt else 0.0
        return float(self.vectors[mention.masked] @ self.vectors[self._verbal(way)]) + self._fit(mention, way) + learnt

    # --- learning -------------------------------------------------------------------------------------------------

    def learn(self, rows: Sequence[tuple[Query, tuple[str, ...]]], hops: int, seed: int
              ) -> tuple[dict[str, float], tuple[int, int]]:  # fmt: skip
        """Weights of words and relations by an averaged perceptron over ways (Collins 2002), from answered questions.

        A way counts as right where it leads to the accepted answers; which of them is meant is latent. Also returns of
        how many rows one does, and how many were tried.
        """
        draw = random.Random(seed)
        lessons, answered, tried = [], 0, min(len(rows), MOST_LEARNT)
        for mention, ways, right in self.answered(draw.sample(list(rows), tried), hops):
            answered += 1
            if len(right) < len(ways):
                base = {way: self.score(mention, way) for way in ways}
                near = sorted(base, key=lambda way: (way not in right, -base[way], way))[: len(right) + RIVALS]
                lessons.append((right, {way: base[way] for way in near}, {w: _features(mention, w) for w in near}))
        weights: dict[str, float] = {}
        drift: dict[str, float] = {}  # of the average from the last weights
        seen = 1
        for _ in range(EPOCHS if lessons else 0):
            draw.shuffle(lessons)
            for right, base, parts in lessons:
                total = {way: base[way] + sum(weights.get(f, 0.0) for f in parts[way]) for way in base}
                order = sorted(total, key=lambda way: (-total[way], len(way), way))
                good, bad = next(w for w in order if w in right), next(w for w in order if w not in right)
                seen += 1
                if total[bad] + MARGIN > total[good]:
                    for sign, way in ((RATE, good), (-RATE, bad)):
                        for one in parts[way]:
                            weights[one] = weights.get(one, 0.0) + sign
                            drift[one] = drift.get(one, 0.0) + sign * seen
        return {one: round(w - drift[one] / seen, 6) for one, w in sorted(weights.items())}, (answered, tried)

    def answered(self, rows: Sequence[tuple[Query, tuple[str, ...]]], hops: int
                 ) -> Iterator[tuple[Mention, Ways, set[Way]]]:  # fmt: skip
        """The longest name of each question, the ways from it, and those that lead to the answers, where there are.

        All that such a way leads to is accepted by one of its names, and it leads to all answers that the graph names.
        """
        linked = [(found[0], answers) for said, answers in rows if (found := self.mentions(said))]
        for number, part in enumerate(_parts(linked)):
            if self.tell is not None:
                self.tell(f"reading train rows, {hops} hops", number * BATCH, len(linked))
            walked = self._ways([(m, m.nodes[0]) for m, _ in part], hops)
            for (mention, answers), ways in zip(part, walked, strict=True):
                wanted = {" ".join(words(a)) for a in answers}
                known = wanted & self.names.keys()
                ends = {way: [self.called(n) for n in there] for way, there in ways.items()}
                if right := {way for way, there in ends.items()
                             if all(wanted & names for names in there) and known <= set().union(*there)}:  # fmt: skip
                    yield mention, ways, right

    def _called(self, node: int) -> frozenset[str]:
        """The names of a node as they are compared."""
        return frozenset(" ".join(words(name)) for name in self.graph.nodes[node])

    def needed(self, rows: Sequence[tuple[Query, tuple[str, ...]]], most: int, seed: int = 0) -> int:
        """The hops that answer 95 % of a sample of rows, else of those that `most` answer; 0 where none is answered.

        Longer ways are walked only where shorter ones do not suffice.
        """
        some = random.Random(seed).sample(list(rows), min(len(rows), SAMPLED))
        found: list[int] = []
        for hops in range(1, most + 1):
            found = sorted(min(map(len, right)) for *_, right in self.answered(some, hops))
            if len(found) >= MOST * len(some) > 0:
                return hops
        return found[int(MOST * (len(found) - 1))] if found else 0

    # --- facts ----------------------------------------------------------------------------------------------------

    def facts(self, questions: Sequence[Query], hops: int, k: int) -> list[list[Found]]:
        """The k facts to show for each question: what its best way leads to, the way there, then the next best."""
        made = []
        for some in (c for part in _parts(questions) for c in self.candidates(part, hops)):
            told: dict[str, Found] = {}
            for number, one in enumerate(some[:k]):
                for node, way, ends in ((one.node, one.way, one.ends), *(self._chain(one) if number == 0 else ())):
                    text = self.graph.sentence(node, way, ends, SHOWN)
                    told.setdefault(text, Found(Passage(self.graph.nodes[node][0], "", text, "", 0), one.score))
            made.append([*told.values()][:k])
        return made

    def _chain(self, one: Candidate) -> Iterator[tuple[int, Way, Sequence[int]]]:
        """Each step of a way as a way of its own."""
        here = [one.node]
        for step in one.way:
            after = {n: ends for n in here[:CHAINED] if (ends := self.steps(n).get(step))}
            yield from ((n, (step,), ends) for n, ends in after.items())
            here = [*dict.fromkeys(end for ends in after.values() for end in ends)]


def _lines(text: str) -> list[int]:
    """Where each line of words begins that has any, counted in words, and where the last one ends."""
    return [0, *accumulate(n for line in text.splitlines() if (n := len(words(line))))]


def _within(one: Span, other: Span) -> bool:
    return other[0] <= one[0] and one[1] <= other[1]


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Items by the batch: ways of many questions at once would fill the memory."""
    return (items[at : at + BATCH] for at in range(0, len(items), BATCH))


def _features(mention: Mention, way: Way) -> list[str]:
    """What can be learnt of a way and the words around the name: which word goes with which step, and where."""
    made = [f"{len(way)} of {len(mention.words) // 2}", *(f"{step}" for step in way)]
    for i, word in enumerate(mention.words):
        for j, step in enumerate(way):
            off = i * len(way) // len(mention.words) - j
            made += [f"{word} {step}", f"{word} {step} {(off > 0) - (off < 0)}"]
    return made


@dataclass(frozen=True)
class GraphSource:
    """A graph, by its identity, that a question's entities are looked up in: `k` facts at most, up to `hops` away."""

    kind: ClassVar[str] = "facts"
    brief: ClassVar[bool] = True
    store: ClassVar[str] = ""

    graph: str
    k: int = 10
    hops: int = 2
    folder: Path | None = field(default=None, compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        """All that makes the source what it is, as plain data."""
        return {"kind": self.kind, "graph": self.graph, "k": self.k, "hops": self.hops}

    @property
    def fingerprint(self) -> str:
        """sha256 of the settings, the graph's identity among them."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    @property
    def version(self) -> str:
        """The graph that answers, always the one it was made with, and how it is read."""
        return f"{READER}-{self.graph}"

    def rank(self, questions: Sequence[Query], home: Path, most: int) -> list[list[str]]:
        """What the best facts for each question are about, best first."""
        found = self.find(questions, home, 3 * most)
        return [list(dict.fromkeys(f.passage.document for f in some))[:most] for some in found]

    def find(self, questions: Sequence[Query], home: Path, k: int | None = None) -> list[list[Found]]:
        """The facts that each question is shown, best first. Raises ArtifactError where the graph is not at hand."""
        if self.folder is None or not self.folder.is_dir():
            raise ArtifactError(f"the graph {self.graph[:12]} is not at hand", expected="its folder",
                                found=str(self.folder), do="load the System from its own folder")  # fmt: skip
        with rebuilding("knowledge", {"k": self.k, "hops": self.hops}):
            return opened(self.folder, home).facts(questions, self.hops, k or self.k)


@lru_cache(maxsize=4)
def opened(folder: Path, home: Path) -> Linker:
    """The linker over the graph in a folder, opened once."""
    return Linker(read(folder), Embedder(home))
