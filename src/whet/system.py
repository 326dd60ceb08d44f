"""A System: everything that turns a prompt into an answer. Frozen; holds references and settings, never tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from whet import __version__
from whet.engine import Generation, Progress, Prompt, Sampling, Session, open_session
from whet.engine.replies import UNANSWERED
from whet.errors import ArtifactError
from whet.metrics import plain
from whet.model import EMBEDDED, ModelRef, Transform, hash_files, local_folder, resolve
from whet.prompt import SLOT, beside, framed, messages, recent, shorten, to_text, with_choices
from whet.retrieval import BATCH, Found
from whet.retrieval import Source as Documents
from whet.sources import Source, revive_source
from whet.task import Example, Query

if TYPE_CHECKING:
    from whet.embed import Embedder

Pair = tuple[str, str]  # (question, answer)
Shown = Sequence[Sequence[Found]]  # the passages that each question is shown
BYTES = 48  # up to so many of a choice leave room for as many tokens, which it never takes; beyond, tokens are counted


@dataclass(frozen=True)
class Demonstrations:
    """Worked examples shown before the question.

    `fixed`: all of `pool`, in order. `nearest`: the `k` of the pool whose questions lie nearest (cosine of sentence
    embeddings), the nearest last.
    """

    pool: tuple[Pair, ...] = ()
    k: int = 0
    selection: str = "fixed"

    def choose(
        self, questions: Sequence[str], embedder: Embedder | None, *, blind: bool = False
    ) -> list[tuple[Pair, ...]]:
        """The demonstrations for each question, in the order they are shown; with `blind`, never the question's own."""
        hidden = list(questions) if blind else [None] * len(questions)
        if self.selection == "fixed" or not self.pool or embedder is None:
            return [tuple(pair for pair in self.pool if pair[0] != own) for own in hidden]
        pool, asked = embedder([q for q, _ in self.pool]), embedder(list(questions))
        copies, made = Counter(q for q, _ in self.pool), list[tuple[Pair, ...]]()
        for at in range(0, len(asked), BATCH):
            for near, own in zip(asked[at : at + BATCH] @ pool.T, hidden[at : at + BATCH], strict=True):
                # Its own copies are as many more to look at.
                best = _greatest_of(near, self.k + (copies[own] if own is not None else 0))
                shown = [self.pool[i] for i in best if self.pool[i][0] != own]
                made.append(tuple(reversed(shown[: self.k])))
        return made


@dataclass(frozen=True)
class Decoding:
    """How an answer is read off: scoring over a closed set, or generation.

    `labels` is the task's closed set (a row's own choices take its place). `normalise` is "mean" (log-probability per
    token, so that long labels are not punished) or "sum" (of the whole answer, its end included). `prior` holds the
    log-prior of each label that calibration subtracts, scaled like the scores. `words` are what the model is to say in
    place of each label. Of a generated text the answer is what stands behind the last `after`; of `votes` samples it is
    the most frequent (self-consistency, Wang et al. 2023).
    """

    labels: tuple[str, ...] = ()
    closed: bool = False
    normalise: str = "mean"
    prior: tuple[float, ...] = ()
    max_tokens: int = 64
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    after: str = ""
    votes: int = 1

    def __post_init__(self) -> None:
        if self.words and (len(self.words) != len(self.labels) or len(set(self.words)) < len(self.words)):
            raise ValueError(f"{len(self.words)} words for {len(self.labels)} labels; one of its own for each")
        if self.votes < 1 or (self.votes > 1 and self.temperature <= 0):
            raise ValueError("votes is at least 1, and several need a temperature above 0")

    @property
    def settings(self) -> dict[str, Any]:
        """As plain data. What came later is left out at its default, so that older Systems keep their names."""
        later = {f.name: f.default for f in fields(self) if f.name in ("words", "after", "votes")}
        return {k: v for k, v in asdict(self).items() if k not in later or v != later[k]}

    @property
    def spoken(self) -> tuple[str, ...]:
        """What is scored for each label: its word, or itself."""
        return self.words or self.labels

    def said(self, answer: str) -> str:
        """What the model is to say for an answer: a label's word, else the answer itself."""
        return self.words[self.labels.index(answer)] if self.words and answer in self.labels else answer

    def read(self, text: str) -> str:
        """The answer that a generated text gives: behind the last `after`, and the label of a word."""
        text = (text.rpartition(self.after)[2] if self.after else text).strip()
        meant = {plain(word): label for word, label in zip(self.words, self.labels, strict=False)}
        return meant.get(plain(text), text)


@dataclass(frozen=True)
class Answer:
    """One answer; `scores` are the (calibrated) scores of the closed set, `truncated` says the prompt was shortened.

    `passages` are those it was shown whole; which of them it stands in, `reading.cited` says. `finish` is "stop",
    "length" (cut off at the limit), "unmarked": what it is to stand behind (`Decoding.after`) was not said, or "failed"
    where the model gave no answer.
    """

    text: str
    scores: tuple[float, ...] = ()
    truncated: bool = False
    passages: tuple[Found, ...] = ()
    finish: Literal["stop", "length", "unmarked", "failed"] = "stop"


def _greatest_of(values: Any, count: int) -> Any:
    """The places of the `count` greatest values, the greatest first; equal ones in order."""
    import numpy as np

    least = np.partition(values, -count)[-count] if count < len(values) else -np.inf
    some = np.flatnonzero(values >= least)
    return some[np.argsort(-values[some], kind="stable")][:count]


def _pairs(found: Sequence[Found]) -> tuple[Pair, ...]:
    """(title, text) of passages."""
    return tuple((f.passage.title, f.passage.text) for f in found)


def _voted(texts: Sequence[str]) -> str:
    """The most frequent text, however it is cased and spaced; the first of equals."""
    most = Counter(map(plain, texts)).most_common(1)[0][0]
    return next(text for text in texts if plain(text) == most)


def _read(made: Sequence[Generation], decoding: Decoding) -> Answer:
    """The answer that samples give, and how the first that gives it ended."""
    if all(one.finish == "failed" for one in made):
        return Answer("", finish="failed")
    texts = [decoding.read(one.text) for one in made]
    first = made[texts.index(voted := _voted(texts))]
    return Answer(voted, finish=first.finish if decoding.after in first.text else "unmarked")


def _longest(choices: Sequence[str], session: Session) -> int:
    """Tokens that the longest choice and its turn's end take at most: as many as its bytes, where these are few.

    Where they are more they are counted; one more, as a text may be cut otherwise behind a prompt than alone.
    """
    most = max(len(c.encode()) for c in choices)
    return (most if most <= BYTES else max(session.count(choices)) + 1) + 2


def _greatest(choices: Sequence[str], scores: tuple[float, ...], truncated: bool) -> Answer:
    """The choice with the greatest score, the first of equals; none where the model gave no answer."""
    best = max(range(len(choices)), key=lambda i: (scores[i], -i))
    return Answer(choices[best] if scores[best] > UNANSWERED / 2 else "", scores, truncated)


@dataclass(frozen=True)
class System:
    """Model, prompt, demonstrations, sources and decoding. Its fingerprint, of contents, is its identity.

    `frame` is how a question is written, those of demonstrations too: `{question}` stands in it once. `beside` are the
    sources of other tasks that the card holds (`memory`): they lie with the System, and it does not look into them.
    """

    model: ModelRef
    instruction: str = ""
    demonstrations: Demonstrations = field(default_factory=Demonstrations)
    decoding: Decoding = field(default_factory=Decoding)
    sources: tuple[Source, ...] = ()
    card: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)
    home: Path = field(default=Path(".whet"), compare=False, repr=False)
    frame: str = SLOT
    beside: tuple[Source, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.frame.count(SLOT) != 1:
            raise ValueError(f"a frame has {SLOT} once, not {self.frame.count(SLOT)} times")

    @property
    def settings(self) -> dict[str, Any]:
        """All that makes the System what it is, as plain data; the model by content."""
        return {
            "model": self.model.identity,
            "instruction": self.instruction,
            "demonstrations": asdict(self.demonstrations),
            "decoding": self.decoding.settings,
            # Left out where there are none, so that Systems written before there were sources keep their names.
            **({"sources": [s.settings for s in self.sources]} if self.sources else {}),
            **({"frame": self.frame} if self.frame != SLOT else {}),
        }

    @property
    def fingerprint(self) -> str:
        """sha256 of the settings; equal for equal Systems wherever they lie, whatever documents they look into."""
        body = self.settings | ({"sources": [s.fingerprint for s in self.sources]} if self.sources else {})
        return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    @property
    def state(self) -> str:
        """The fingerprint with the versions of what it looks into: what a score or a training depends on.

        So it does on a base that came along unpacked, whose hash stands nowhere else.
        """
        carried = [self.model.unpacked] if self.model.carried else []
        return "/".join([self.fingerprint, *(s.version for s in self.sources), *carried])

    @property
    def split_seeds(self) -> dict[str, int]:
        """The seeds that tasks were split by into train and select when the System learnt them, by task."""
        told = self.card.get("splits")
        return {k: v for k, v in told.items() if isinstance(v, int)} if isinstance(told, dict) else {}

    def split_by(self, task: str, seed: int) -> System:
        """The System whose card says by which seed the task that it learnt was split."""
        return replace(self, card={**self.card, "splits": {**self.split_seeds, task: seed}})

    @property
    def learnt(self) -> dict[str, Any]:
        """What the card says of facts that were taught, for a card that takes its place."""
        return {"facts": self.card["facts"]} if "facts" in self.card else {}

    @property
    def uncalibrated(self) -> System:
        """The same System before calibration: both read their answers off the same scores."""
        return replace(self, decoding=replace(self.decoding, prior=()))

    @property
    def servers(self) -> list[str]:
        """Where prompts go that leave this machine: the model's server, else those of its sources."""
        if self.model.base.startswith("openai:"):
            return [self.model.base]
        return [s.store for s in (*self.sources, *self.beside) if s.store]

    @cached_property
    def session(self) -> Session:
        """The System's own session, opened when first needed and kept."""
        return open_session(self.model, self.home)

    @cached_property
    def embedder(self) -> Embedder | None:
        """The sentence embedder, where demonstrations are chosen by nearness."""
        if self.demonstrations.selection != "nearest":
            return None
        from whet.embed import Embedder

        return Embedder(self.home)

    def prompts(
        self, examples: Sequence[Example], *, blind: bool = False, found: Shown | None = None, listed: bool = False
    ) -> list[Prompt]:
        """What the model is sent for each example; with `blind`, none is shown its own answer as a demonstration.

        `found` are the passages to show; without, they are looked up. With `listed`, a row's own choices stand behind
        its question. Plain text rows are raw text, outside any template.
        """
        shown = self.demonstrations.choose([e.prompt for e in examples], self.embedder, blind=blind)
        read = self.found([e.query for e in examples]) if found is None else found
        said, told = self.decoding.said, dict[str, tuple[Pair, ...]]()
        if brief := [s for s in self.sources if s.brief]:
            asked = sorted({q for demos in shown for q, _ in demos})
            told = dict(zip(asked, map(_pairs, self.found([Query(q) for q in asked], sources=brief)), strict=True))
        return [
            "" if e.text is not None else
            messages(self.instruction, [(q, said(a)) for q, a in demos], self._question(e, listed), e.history,
                     _pairs(here), self.frame, told)
            for e, demos, here in zip(examples, shown, read, strict=True)
        ]  # fmt: skip

    def _question(self, example: Example, listed: bool) -> str:
        return with_choices(example.prompt, example.choices) if listed and self.decoding.closed else example.prompt

    def found(
        self, questions: Sequence[Query], k: int | None = None, sources: Sequence[Source] | None = None
    ) -> list[list[Found]]:
        """The passages that each question is shown, out of all or these sources, best first; `k` of each, if given."""
        made: list[list[Found]] = [[] for _ in questions]
        for source in self.sources if sources is None else sources:
            made = [[*m, *some] for m, some in zip(made, source.find(questions, self.home, k), strict=True)]
        return made

    def ranked(self, examples: Sequence[Example], most: int) -> list[str]:
        """The ids of the documents found for each example, best first, one a line; empty without a source.

        Documents are ranked where the System has any, else what its facts are about. Raises ArtifactError where none of
        the documents that evidence names is there.
        """
        source = next(iter(sorted(self.sources, key=lambda s: s.kind != "documents")), None)
        if source is None:
            return [""] * len(examples)
        named = dict.fromkeys(name for e in examples for name, grade in e.evidence if grade > 0)
        if named and isinstance(source, Documents) and not (corpus := source.corpus(self.home)).of(named):
            raise ArtifactError("no document has an id that evidence names", expected=", ".join([*named][:3]),
                                found=", ".join(corpus.ids()[:3]), do="give documents the same ids")  # fmt: skip
        return ["\n".join(ids) for ids in source.rank([e.query for e in examples], self.home, most)]

    def room(self, example: Example, session: Session) -> int:
        """Tokens of the context window that an answer to this example may take, the turn's end included."""
        if self._kind(example) == "free":
            return self.decoding.max_tokens
        return _longest(example.choices or self.decoding.spoken, session)

    def fitting(
        self, examples: Sequence[Example], session: Session, room: Sequence[int], *, blind: bool = False,
        found: Shown | None = None,
    ) -> tuple[list[Prompt], list[bool]]:  # fmt: skip
        """Prompts that leave `room` tokens of the context window each, and which of them had to be shortened."""
        prompts, _, cut = self._fitted(examples, session, room, blind, found)
        return prompts, cut

    def _fitted(
        self, examples: Sequence[Example], session: Session, room: Sequence[int], blind: bool, found: Shown | None
    ) -> tuple[list[Prompt], list[tuple[Found, ...]], list[bool]]:
        """What `fitting` gives, and between the two the passages that stand whole in each prompt.

        Where the window is too short and the question's turn the longest, its last passages go first; then the oldest
        exchanges of a long conversation; only then texts are cut, the best passage's, too.
        """
        read = self.found([e.query for e in examples]) if found is None else found
        listed = session.protocol.get("choices") == "listed"
        prompts = self.prompts(examples, blind=blind, found=read, listed=listed)
        kept, cut = [tuple(some) for some in read], [False] * len(prompts)

        def count(chat: Prompt) -> int:
            return session.count([chat])[0]

        for n, size in enumerate(session.count(prompts)):
            chat, most = prompts[n], session.context - room[n]
            if size <= most or isinstance(chat, str):
                continue
            longest = max((len(text) for role, text in chat[:-1] if role != "system"), default=0)
            while size > most and len(kept[n]) > 1 and len(chat[-1][1]) > longest:
                kept[n] = kept[n][:-1]
                asked = framed(self.frame, self._question(examples[n], listed))
                chat = (*chat[:-1], ("user", beside(_pairs(kept[n]), asked)))
                size = count(chat)
            chat = recent(chat, size - most, count)
            prompts[n] = chat = shorten(chat, max(0, count(chat) - most), count)
            kept[n] = tuple(f for f in kept[n] if f.passage.text in chat[-1][1])
            cut[n] = True
        return prompts, kept, cut

    def answer(self, prompt: str | Example | Sequence[str | Example], session: Session | None = None) -> Any:
        """Answer one prompt (its text is returned) or several (a list of texts)."""
        if isinstance(prompt, (str, Example)):
            return self.answers([prompt], session)[0].text
        return [a.text for a in self.answers(prompt, session)]

    def answers(
        self, prompts: Iterable[str | Example], session: Session | None = None, progress: Progress | None = None,
        found: Shown | None = None, *, blind: bool = False,
    ) -> list[Answer]:  # fmt: skip
        """Answer prompts with scores: over the closed set where there is one, else by generation.

        `found` are the passages that each is shown; without, they are looked up. `blind` as in `prompts`.
        """
        examples = [Example(str(n), p) if isinstance(p, str) else p for n, p in enumerate(prompts)]
        session = session or self.session
        found = self.found([e.query for e in examples]) if found is None else found
        # Each row is answered in its own way, so that none is answered otherwise beside others than alone.
        kinds = [self._kind(e) for e in examples]
        made: dict[int, Answer] = {}
        for kind in dict.fromkeys(kinds):
            mine = [n for n, k in enumerate(kinds) if k == kind]
            answer = self._generate if kind == "free" else self._choose
            told = _later(progress, len(made), len(examples)) if progress else None
            made |= zip(mine, answer([examples[n] for n in mine], session, told, [found[n] for n in mine], blind),
                        strict=True)  # fmt: skip
        return [made[n] for n in range(len(examples))]

    def _kind(self, example: Example) -> str:
        """How a row is answered: out of its own choices, out of the labels, or freely."""
        if not self.decoding.closed or not (example.choices or self.decoding.labels):
            return "free"
        return "choices" if example.choices else "labels"

    def label_scores(
        self, examples: Sequence[Example], session: Session, progress: Progress | None = None, *, blind: bool = False
    ) -> tuple[list[tuple[float, ...]], list[bool]]:
        """Uncalibrated scores of each example's closed set (its own choices or the labels), and who was shortened."""
        sets, prompts, _, cut = self._closed(examples, session, blind=blind)
        whole = self.decoding.normalise == "sum"
        scored = session.score(prompts, sets, end=whole, progress=progress)
        return [tuple(s.logprob if whole else s.mean for s in row) for row in scored], cut

    def _closed(
        self, examples: Sequence[Example], session: Session, found: Shown | None = None, blind: bool = False
    ) -> tuple[list[tuple[str, ...]], list[Prompt], list[tuple[Found, ...]], list[bool]]:
        """Each example's closed set as it is said, and what `_fitted` gives with room for the longest of it."""
        sets = [e.choices or self.decoding.spoken for e in examples]
        room = {choices: _longest(choices, session) for choices in dict.fromkeys(sets)}
        return sets, *self._fitted(examples, session, [room[choices] for choices in sets], blind, found)

    def _choose(
        self, examples: Sequence[Example], session: Session, progress: Progress | None, found: Shown, blind: bool
    ) -> list[Answer]:
        sets, prompts, kept, cut = self._closed(examples, session, found, blind)
        # A row's own choices have no prior: calibration is of the task's labels.
        offsets = self.decoding.prior if not any(e.choices for e in examples) else ()
        named = [e.choices or self.decoding.labels for e in examples]
        whole = self.decoding.normalise == "sum"
        rows = session.choose(prompts, sets, whole=whole, offsets=offsets, progress=progress)
        return [replace(_greatest(c, row, short), passages=shown)
                for c, row, short, shown in zip(named, rows, cut, kept, strict=True)]  # fmt: skip

    def decide(self, scores: Sequence[float], truncated: bool = False) -> Answer:
        """The answer that uncalibrated scores of the labels lead to."""
        prior = self.decoding.prior or (0.0,) * len(scores)
        calibrated = tuple(s - p for s, p in zip(scores, prior, strict=True))
        return _greatest(self.decoding.labels, calibrated, truncated)

    def _generate(
        self, examples: Sequence[Example], session: Session, progress: Progress | None, found: Shown, blind: bool
    ) -> list[Answer]:
        decoding = self.decoding
        prompts, kept, cut = self._fitted(examples, session, [decoding.max_tokens] * len(examples), blind, found)
        sampling = Sampling(decoding.max_tokens, decoding.temperature, n=decoding.votes, stop=decoding.stop)
        # What is written by the greatest probability is the same behind the same prompt.
        asked = list(prompts) if decoding.temperature else list(dict.fromkeys(prompts))
        times = len(prompts) / max(1, len(asked))
        tell: Progress | None = progress and (lambda done, _: progress(round(done * times), len(prompts)))
        made = session.generate(asked, sampling, tell)
        if len(asked) < len(prompts):
            said = dict(zip(asked, made, strict=True))
            made = [said[prompt] for prompt in prompts]
        return [replace(_read(one, decoding), truncated=short, passages=shown)
                for one, short, shown in zip(made, cut, kept, strict=True)]  # fmt: skip

    @property
    def prompt_text(self) -> str:
        """The prompt as a file for people, which `prompting` takes back (`file`)."""
        words = zip(self.decoding.labels, self.decoding.words, strict=False)
        return to_text(self.instruction, self.frame, tuple(words))

    # --- on disk --------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, self_contained: bool = False) -> Path:
        """Write the System as a folder, aside and then renamed; with `self_contained` the base goes with it.

        Raises StoreError where the folder holds something else or cannot be written.
        """
        from whet.store import anew

        target = Path(folder)
        with anew(target, "system.json") as work:
            self._write(work, self_contained)
        return target

    def _write(self, work: Path, self_contained: bool) -> None:
        self_contained = (self_contained or self.model.carried) and not self.model.remote and self.model.whole is None
        body = {
            "whet": __version__,
            "fingerprint": self.fingerprint,
            "base": self.model.lasting,
            "self_contained": self_contained,
            **self.settings,
            "card": self.card,
        }
        for transform in self.model.standing:
            if transform.folder is None:
                raise ArtifactError(f"the {transform.kind} {transform.fingerprint[:12]} is not at hand")
            shutil.copytree(transform.folder, work / "transforms" / transform.fingerprint)
        own = [shelf(s.settings) for s in self.sources]
        placed = [(s, work / "sources" / s.fingerprint) for s in self.sources]
        placed += [(s, work / "earlier" / name) for s in self.beside if (name := shelf(s.settings)) not in own]
        for source, place in placed:
            if source.store:
                continue
            if source.folder is None or not source.folder.is_dir():
                raise ArtifactError(f"the index {source.fingerprint[:12]} is not at hand")
            shutil.copytree(source.folder, place, ignore=shutil.ignore_patterns(".*"))  # what a kill left aside
        if self_contained:
            shutil.copytree(local_folder(self.model, self.home), work / "base")
            body["base_hash"] = hash_files([p for p in (work / "base").iterdir() if p.is_file()])
        (work / "README.md").write_text(_card_text(self), encoding="utf-8")
        with (work / "prompt.txt").open("w", encoding="utf-8", newline="") as file:
            file.write(self.prompt_text)
        (work / "system.json").write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _card_text(system: System) -> str:
    """The model card: what the System is and what it scored, as Markdown."""
    card, demos, decoding = system.card, system.demonstrations, system.decoding
    shown = "none" if not demos.pool else f"{demos.k or len(demos.pool)} ({demos.selection})"
    sources = [f"{s.k} {s.settings.get('kind', 'passages')} of `{s.fingerprint[:16]}`" for s in system.sources]
    lines = [
        f"# A System for {card.get('task', 'a task')}", "",
        f"- base: `{system.model.lasting}` (`{system.model.content[:16]}`)",
        f"- transforms: {', '.join(f'{t.kind} `{t.fingerprint[:16]}`' for t in system.model.standing) or 'none'}",
        f"- demonstrations: {shown}",
        f"- sources: {', '.join(sources) or 'none'}",
        f"- calibration: {'yes' if decoding.prior else 'no'}",
        f"- recipe: {card.get('recipe', 'the base as it is')}", "",
    ]  # fmt: skip
    if card.get("scorecard"):
        lines += ["## Scorecard", "", "```json", json.dumps(card["scorecard"], indent=1, ensure_ascii=False), "```", ""]
    trusted = ", each with `--trust` (`trust=True`): prompts go to a server" if system.servers else ""
    lines += [f"Answer with `whet chat`, `whet evaluate`, or `whet.load(folder).answer(prompt)`{trusted}.", ""]
    return "\n".join(lines)


def shelf(settings: Mapping[str, Any]) -> str:
    """What a source of an earlier task is filed under: two of one fingerprint may hold different documents."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _beside(body: dict[str, Any], folder: Path) -> tuple[Source, ...]:
    """The sources of the tasks that a card holds, but for the System's own; each lies in `folder`, by its shelf."""
    told = {shelf(s): s for one in body["card"].get("memory", ()) for s in one["asked"].get("sources", ())}
    for own in body.get("sources", ()):
        told.pop(shelf(own), None)
    made = {name: revive_source(settings, {}) for name, settings in told.items()}
    return tuple(revive_source(told[name], {s.fingerprint: folder / name}) for name, s in made.items())


def _later(progress: Progress, before: int, whole: int) -> Progress:
    """Progress of a part, as that of the whole."""
    return lambda done, _: progress(before + done, whole)


def _finite(values: Sequence[Any], size: int) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in values)
    if len(numbers) not in (0, size) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{len(numbers)} priors for {size} labels")
    return numbers


def revive(
    settings: dict[str, Any], base: str, folders: dict[str, Path], card: dict[str, Any], home: Path
) -> System:
    """A System from its settings as plain data; `folders` says where each transform lies.

    Raises KeyError, TypeError or ValueError where the settings are not those of a System.
    """
    transforms = tuple(Transform(kind, f, folders[f]) for kind, f in settings["model"]["transforms"])
    demos, decoding = settings["demonstrations"], settings["decoding"]
    labels = tuple(decoding["labels"])
    return System(
        ModelRef(base, settings["model"]["content"], transforms),
        settings["instruction"],
        Demonstrations(tuple((q, a) for q, a in demos["pool"]), demos["k"], demos["selection"]),
        replace(
            Decoding(**{**decoding, "labels": labels, "stop": tuple(decoding["stop"]), "prior": (),
                        "words": tuple(decoding.get("words", ()))}),  # fmt: skip
            prior=_finite(decoding["prior"], len(labels)),
        ),
        tuple(revive_source(one, folders) for one in settings.get("sources", ())),
        card,
        home,
        settings.get("frame", SLOT),
    )


def load(folder: str | Path, home: Path | None = None, *, trust: bool = False) -> System:
    """Read a System from its folder; its transforms' hashes are checked when the model is opened.

    A System may come from a stranger: one that answers through a server would send prompts and OPENAI_API_KEY there,
    and needs `trust`. Raises ArtifactError where the folder is no System, is incomplete or has been changed.
    """
    from whet.store import home_folder

    path = Path(folder)
    file = path / "system.json"
    if not file.exists():
        inner = path / "system"  # what improve leaves is a run, with the System in it
        do = f"take {inner}" if (inner / "system.json").exists() else "name it"
        raise ArtifactError(f"{path} is no System", expected="a folder with system.json", found="none", do=do)
    _check_links(path)
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        named = {"transforms": [f for _, f in body["model"]["transforms"]],
                 "sources": [revive_source(s, {}).fingerprint for s in body.get("sources", ())]}  # fmt: skip
        if not all(isinstance(f, str) and f.isalnum() for prints in named.values() for f in prints):
            raise ValueError("a transform or source is named by its hash")
        folders = {f: path / kind / f for kind, prints in named.items() for f in prints}
        base = str(path / "base") if "base_hash" in body else body["base"]
        system, written = revive(body, base, folders, body["card"], home or home_folder()), str(body["fingerprint"])
        system = replace(system, beside=_beside(body, path / "earlier"))
    except (KeyError, TypeError, ValueError, AttributeError, OSError, OverflowError, RecursionError) as error:
        raise ArtifactError(
            f"{file} cannot be read", expected="a System that whet wrote", found=str(error)[:160], do="write it again"
        ) from error
    if system.fingerprint != written:
        raise ArtifactError(
            f"{file} was changed by hand",
            expected=f"fingerprint {written[:12]}", found=system.fingerprint[:12],
            do="restore it, or build the System anew",
        )  # fmt: skip
    if system.servers and not trust:
        raise ArtifactError(
            f"{path} answers through a server", expected="--trust (in Python: trust=True)", found=system.servers[0],
            do="give it if that server may have your prompts and your key",
        )  # fmt: skip
    _check_base(system, body)
    return system


def _check_links(folder: Path) -> None:
    """Raise ArtifactError where a link leads out of a System: what it names would be copied on with the System.

    The links of the Hub's cache, which lead to the files it keeps beside its snapshots, are all right.
    """
    root = folder.resolve()
    roots = [root, *(p.parent.parent / "blobs" for p in (root, *root.parents) if p.parent.name == "snapshots")]
    for entry in folder.rglob("*"):
        if entry.is_symlink() and not any(entry.resolve().is_relative_to(one) for one in roots):
            raise ArtifactError(f"{entry} is a link out of the System", expected="files inside it",
                                found=os.readlink(entry), do="put the file itself there, if it is meant")  # fmt: skip


def _check_base(system: System, body: dict[str, Any]) -> None:
    """Raise ArtifactError where the base is not the one the System was measured with."""
    base = Path(system.model.base)
    if "base_hash" in body and not base.is_dir():
        raise ArtifactError(
            f"the System in {base.parent} is incomplete", expected="its base", found="none", do="copy all of it"
        )
    if "base_hash" not in body and not system.model.remote and system.model.whole is None:
        found = resolve(system.model.base).content
        if found != system.model.content:
            raise ArtifactError(
                f"the model {system.model.base!r} is not the one this System was made with",
                expected=system.model.content[:12], found=found[:12], do="install the same version of it",
            )  # fmt: skip
    if "base_hash" in body:
        found = hash_files([p for p in base.iterdir() if p.is_file()])
        if found != body["base_hash"]:
            raise ArtifactError(
                f"{base} has changed", expected=body["base_hash"][:12], found=found[:12], do="restore it"
            )
        # Of what was packed, content is the hash of the package; so it is where one goes on from another such System.
        named = Path(str(body["base"]))
        packed = body["base"] in EMBEDDED or named.suffix == ".gguf" or (named.is_absolute() and named.name == "base")
        if not packed and (found := resolve(str(base)).content) != system.model.content:
            raise ArtifactError(
                f"{base} is not the model this System was made with", expected=system.model.content[:12],
                found=found[:12], do="restore it",
            )  # fmt: skip
