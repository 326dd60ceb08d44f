"""The task folder: load, validate, split, and the checks that nothing leaks between the splits."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.convert import as_text, standard
from whet.errors import TaskError, nearest
from whet.header import CODE, RANKED, SOURCES, SPLIT_FILES, Header, locate, read_header, split_of
from whet.header import KEYS as KEYS
from whet.header import METRICS as METRICS
from whet.header import Limits as Limits
from whet.header import contents as contents
from whet.header import inside as inside
from whet.header import places as places
from whet.metrics import plain
from whet.rows import FIELDS, SUFFIXES, Broken, Row, read, short, sift, stem_of, suffix_of
from whet.splits import Sealed, cut, without

if TYPE_CHECKING:
    from whet.feedback import Judged

SELECT_MOST, SELECT_SHARE = 400, 0.2


@dataclass(frozen=True)
class Query:
    """What is looked up: the question asked now, of however many lines, and what the user said last before it."""

    now: str
    before: str = ""

    @property
    def text(self) -> str:
        """Both as one text, for what ranks texts by their words and meaning."""
        return f"{self.now}\n{self.before}" if self.before else self.now


@dataclass(frozen=True)
class Extra(Mapping[str, Any]):
    """A row's fields beyond the known ones, as its file has them (`tests`, `entry_point`); kept as canonical JSON."""

    written: str = ""

    @staticmethod
    def of(fields: Mapping[str, Any]) -> Extra:
        """These fields without those that are null."""
        there = {str(key): value for key, value in fields.items() if value is not None}
        return Extra(json.dumps(there, sort_keys=True, default=str) if there else "")

    @cached_property
    def _fields(self) -> dict[str, Any]:
        return dict(json.loads(self.written)) if self.written else {}

    def __getitem__(self, key: str) -> Any:
        return self._fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


@dataclass(frozen=True)
class Example:
    """One prompt and its reference answer(s); or, for plain text rows, one text.

    `answers` are () where none is given, and ("",) where the right answer is to say nothing.
    """

    id: str
    prompt: str
    completion: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    group: str | None = None
    evidence: tuple[tuple[str, float], ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    rejected: str | None = None
    text: str | None = None
    extra: Extra = Extra()

    @property
    def answered(self) -> bool:
        """Whether the row says what the answer is, be it nothing."""
        return bool(self.completion or self.answers)

    @property
    def query(self) -> Query:
        """What documents and facts are looked up by: the prompt, and what the user said last before it."""
        return Query(self.prompt, next((said for role, said in reversed(self.history) if role == "user"), ""))


@dataclass(frozen=True)
class Learnable:
    """What a Method receives: everything it may learn from, and neither select nor confirm.

    Sources are absolute paths, or text where they are URLs, queries or lists (one a line). `sealed` tells whether
    what a Method reads from elsewhere repeats held-out rows, without showing them. `columns` is what prompt and
    completion were called where the rows came from, or nothing. `annotators` are all whom the feedback names, also
    those whose judgements were set aside.
    """

    name: str
    instruction: str
    metric: str
    labels: tuple[str, ...] = ()
    train: tuple[Example, ...] = ()
    documents: Path | str | None = None
    knowledge: Path | str | None = None
    glossary: Path | str | None = None
    earlier: tuple[Path, ...] = ()
    limits: Limits = field(default_factory=Limits)
    folder: Path = Path()
    judged: tuple[Judged, ...] = ()
    annotators: tuple[str, ...] = ()
    trusted: bool = False
    sealed: Sealed = field(default_factory=Sealed)
    columns: tuple[str, ...] = ()

    @property
    def closed(self) -> bool:
        """Whether the answer comes from a known set: the task's labels, or every row's own choices."""
        return _closed(self.labels, self.train)

    def validation(
        self, share: float = 0.1, seed: int = 0, most: int = 200
    ) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """(fit, validation): a stratified cut of train with groups whole; the same for the same contents and seed."""
        fit, held = cut(self.train, min(most, round(share * len(self.train))), seed=seed, closed=self.closed)
        return tuple(self.train[i] for i in fit), tuple(self.train[i] for i in held)


@dataclass(frozen=True)
class Splits:
    """The three parts of a task that measurement keeps apart, and the rows dropped for leaking as (id, why).

    `judging` are the judgements set aside for the judge of a win rate: no Method learns from them.
    """

    learnable: Learnable
    select: tuple[Example, ...]
    confirm: tuple[Example, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    judging: tuple[Judged, ...] = ()


@dataclass(frozen=True)
class Task:
    """A loaded task folder. Sources are as written; `notes` say what was converted, ignored or worth a look."""

    name: str
    folder: Path
    instruction: str
    metric: str
    labels: tuple[str, ...] = ()
    train: tuple[Example, ...] = ()
    dev: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    documents: str | None = None
    knowledge: str | None = None
    glossary: str | None = None
    feedback: str | None = None
    earlier: tuple[Path, ...] = ()
    limits: Limits = field(default_factory=Limits)
    trusted: bool = False
    notes: tuple[str, ...] = ()
    judged: tuple[Judged, ...] = ()
    columns: tuple[str, ...] = ()
    max_tokens: int | None = None

    @property
    def closed(self) -> bool:
        """Whether the answer comes from a known set: the task's labels, or every row's own choices."""
        return _closed(self.labels, (*self.train, *self.dev, *self.test))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything the task says, files it points to included: of contents, never of paths."""
        code = CODE.fullmatch(self.metric)
        metric = [code[2], contents(self.folder / code[1])] if code else self.metric
        parts: list[Any] = [self.instruction, metric, self.labels, asdict(self.limits)]
        parts += [rows_hash(rows) for rows in (self.train, self.dev, self.test)]
        for source in (self.documents, self.knowledge, self.glossary, self.feedback):
            parts.append(
                [contents(place) if isinstance(place, Path) else place for place in places(self.folder, source)]
            )
        parts.append([contents(folder, deep=False) for folder in self.earlier])
        parts += [self.columns] if self.columns else []
        parts += [{"max_tokens": self.max_tokens}] if self.max_tokens else []
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def split(self, seed: int = 0, strict: bool = False) -> Splits:
        """Train, select and confirm, disjoint by prompt (nearly the same counts) and by group.

        select is dev, else min(400, 20 %) of train, stratified by answer where the set is closed; confirm is test.
        Rows of train, dev or feedback that leak are dropped and named; `strict` raises TaskError instead. A task of
        feedback alone learns from the chosen answers.
        """
        from whet.feedback import divide, pairs, without_held

        select, leaks = without(self.dev, (*self.test,))
        judged, spoilt = without_held(self.judged, (*self.test, *select))
        judging: tuple[Judged, ...] = ()
        if self.metric == "win_rate":
            judged, judging = divide(judged)
        alone = self.metric == "win_rate" and not self.train
        train, more = without(self.train or tuple(r.example for r in pairs(judged) if alone), (*self.test, *select))
        leaks += spoilt
        if leaks and strict or more and strict:
            row, why = (leaks + more)[0]
            raise TaskError(
                f"{len(leaks) + len(more)} learnable rows leak into held-out data; the first, {row}, {why}",
                expected="none",
                do="remove them, or go on without --strict to have them dropped",
            )
        if not select and train:
            # Rows that the metric cannot score are learnt from, and not selected by.
            can = [i for i, row in enumerate(train) if _scorable(row, self.metric)]
            wanted = min(SELECT_MOST, max(1, round(SELECT_SHARE * len(can))))
            _, held = cut([train[i] for i in can], wanted, seed=seed, closed=self.closed, near=True)
            select, gone = tuple(train[can[i]] for i in held), {can[i] for i in held}
            scorable = set(can)
            leaking = without(tuple(row for i, row in enumerate(train) if i not in scorable), select)[1]
            more, spoiled = more + leaking, {name for name, _ in leaking}
            train = tuple(row for i, row in enumerate(train) if i not in gone and row.id not in spoiled)
            judged, spoilt = without_held(judged, select)
            judging, theirs = without_held(judging, select)  # a judge would know the answers that it is to compare
            leaks += theirs if alone else spoilt + theirs
        learnable = Learnable(
            name=self.name,
            instruction=self.instruction,
            metric=self.metric,
            labels=self.labels,
            train=train,
            documents=locate(self.folder, self.documents),
            knowledge=locate(self.folder, self.knowledge),
            glossary=locate(self.folder, self.glossary),
            earlier=self.earlier,
            limits=self.limits,
            folder=self.folder,
            judged=judged,
            annotators=tuple(sorted({r.annotator for r in self.judged})),
            trusted=self.trusted,
            sealed=Sealed((*self.test, *select)),
            columns=self.columns,
        )
        return Splits(learnable, select, self.test, leaks + more, judging)


def _scorable(row: Example, metric: str) -> bool:
    """Whether a row says what an answer to it is scored by."""
    if metric == "perplexity":
        return bool(row.text or row.completion)
    if RANKED.fullmatch(metric):
        return bool(row.evidence)
    if metric == "win_rate" or CODE.fullmatch(metric):
        return row.text is None
    return row.text is None and row.answered


def _closed(labels: Sequence[str], rows: Sequence[Example]) -> bool:
    return bool(labels) or (bool(rows) and all(row.choices for row in rows))


# ----------------------------------------------------------------------------------------------------------- load


def load(folder: str | Path, *, trust: bool = False) -> Task:
    """Reads and checks a task folder; raises TaskError, one line naming file and line, for whatever is wrong with it.

    `trust` allows what runs code: a metric in a Python file, an SQL or SPARQL source.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TaskError(
            f"there is no task folder {folder}", expected="a folder with task.yaml",
            found="a file" if folder.exists() else "nothing",
            do="check the path, or make one from a data file: whet init DATA --out DIR",
        )  # fmt: skip
    folder = folder.resolve()
    header = read_header(folder, trust)
    notes: list[str] = []
    files = {split: _file(folder, split, header, notes) for split in SPLIT_FILES}
    metric = header.metric or _only_text(files, notes)
    judging = metric == "win_rate" and "feedback" in header.sources  # the judgements are the rows
    if files["train"] is None and files["test"] is None and not judging:
        raise TaskError(
            f"{folder.name} has neither train nor test rows",
            expected="train.jsonl, test.jsonl or both",
            found="feedback alone" if "feedback" in header.sources else "none",
            do="add one (csv, parquet, json and txt are read, too)"
            + (", or measure by metric: win_rate" if "feedback" in header.sources else ""),
        )
    splits = {split: _examples(split, file, metric, header.labels, notes) for split, file in files.items() if file}
    labels = header.labels
    if not labels and (labels := _shared([row for part in splits.values() for row in part])):
        splits = {split: tuple(replace(row, choices=()) for row in part) for split, part in splits.items()}
    notes += _unread(folder, header, files)
    judged: tuple[Judged, ...] = ()
    if "feedback" in header.sources:
        from whet import feedback

        judged, said = feedback.load(folder, header.sources["feedback"])
        notes += said
    if RANKED.fullmatch(metric) and "documents" not in header.sources:
        notes.append(f"{metric} scores a retriever, and the task names no documents")
    return Task(
        name=header.name,
        folder=folder,
        instruction=header.instruction,
        metric=metric,
        labels=labels,
        columns=header.named,
        max_tokens=header.max_tokens,
        earlier=header.earlier,
        limits=header.limits,
        trusted=trust,
        notes=tuple(notes),
        judged=judged,
        train=splits.get("train", ()),
        dev=splits.get("dev", ()),
        test=splits.get("test", ()),
        documents=header.sources.get("documents"),
        knowledge=header.sources.get("knowledge"),
        glossary=header.sources.get("glossary"),
        feedback=header.sources.get("feedback"),
    )


# ----------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class _File:
    """The rows of a split's file, and those of its lines that cannot be read."""

    path: Path
    rows: list[Row]
    broken: Broken


def _file(folder: Path, split: str, header: Header, notes: list[str]) -> _File | None:
    """The file of a split; None where there is none, TaskError where there are several."""
    files = sorted(file for file in folder.iterdir() if split_of(file.name) == split)
    if len(files) > 1:
        raise TaskError(
            f"{folder.name} has {files[0].name} and {files[1].name}", expected="one of them", do="remove the other"
        )
    if not files:
        return None
    inside(folder, files[0].name, files[0].name)
    broken: Broken = []
    rows = read(files[0], broken, notes)
    for ours, theirs in header.columns.items():
        rows = [
            replace(row, values={ours if key == theirs else key: value for key, value in row.values.items()})
            if theirs in row.values and ours not in row.values
            else row
            for row in rows
        ]
    return _File(files[0], rows, broken)


def _unread(folder: Path, header: Header, files: Mapping[str, _File | None]) -> list[str]:
    """Notes on files that look like a source or a split and are read as none."""
    named = {place.resolve() for source in header.sources.values() for place in places(folder, source)
             if isinstance(place, Path)}  # fmt: skip
    notes = []
    for file in sorted(folder.iterdir()):
        like = re.match(r"(train|dev|val|eval|test)", file.name.lower())
        if like and suffix_of(file.name) in SUFFIXES and not split_of(file.name) and file.resolve() not in named:
            split = {"val": "dev", "eval": "dev"}.get(like[1], like[1])
            there = found.path.name if (found := files[split]) else f"{split}{suffix_of(file.name)}"
            notes.append(f"{file.name} is not read: {split} rows lie in {there}")
    for key in SOURCES:
        for file in sorted(folder.glob(f"{key}.*")) if key not in header.sources else ():
            notes.append(f"{file.name} lies in the folder, but task.yaml does not name it ({key}: {file.name})")
    return notes


def _only_text(files: Mapping[str, _File | None], notes: list[str]) -> str:
    """The metric where task.yaml names none: perplexity for rows of plain text, else TaskError."""
    rows = [row for file in files.values() if file for row in file.rows]
    if rows and all("text" in row.values and "prompt" not in row.values for row in rows):
        notes.append("metric: perplexity, since the rows are plain text")
        return "perplexity"
    raise TaskError(
        "task.yaml names no metric",
        expected=f"metric: one of {', '.join(METRICS)}, recall@5, ndcg@10 or file.py:function",
    )


def _shared(rows: Sequence[Example]) -> tuple[str, ...]:
    """The labels that a task has where all its rows offer the same choices; () where they do not."""
    first = rows[0].choices if len(rows) > 1 else ()
    same = first and all(len(row.choices) == len(first) and set(row.choices) == set(first) for row in rows)
    return first if same and len(set(map(plain, first))) == len(first) else ()


def _examples(split: str, file: _File, metric: str, labels: tuple[str, ...], notes: list[str]) -> tuple[Example, ...]:
    name = file.path.name
    forms: Counter[str] = Counter()
    unused: set[str] = set()
    named = {plain(label): label for label in labels}

    def make(row: Row) -> Example:
        values, form = standard(row)
        example = _example(row, values, split, metric, named, f"{stem_of(name)}-{row.number}")
        forms[form] += 1
        unused.update(example.extra)
        return example

    made = _named_apart(name, sift(name, file.rows, make, file.broken, notes, whole=split == "test"), notes)
    notes += [f"{name}: {count} rows converted from {form}" for form, count in forms.items() if form]
    if silent := sum(row.answers == ("",) for row in made):
        notes.append(f"{name}: {silent} rows whose answer is empty: it is right to say nothing")
    if unused and not CODE.fullmatch(metric):
        notes.append(f"{name}: fields not used: {', '.join(sorted(unused))}")
    return tuple(made)


def _named_apart(name: str, rows: Sequence[Example], notes: list[str]) -> list[Example]:
    """Rows with ids that differ: what is named as an earlier row gets a number behind its name."""
    seen: set[str] = set()
    last: dict[str, int] = {}
    made, again = [], []
    for row in rows:
        own, n = row.id, last.get(row.id, 1)
        while own in seen:
            n += 1
            own = f"{row.id}~{n}"
        seen.add(own)
        last[row.id] = n
        again += [row.id] if own != row.id else []
        made.append(row if own == row.id else replace(row, id=own))
    if again:
        notes.append(f"{name}: {len(again)} ids stand more than once ({short(again[0])}); rows are told apart by ~2 …")
    return made


def _example(
    row: Row, values: dict[str, Any], split: str, metric: str, labels: Mapping[str, str], name: str
) -> Example:
    """The example of a row in standard fields; `labels` by their `plain` form. Raises TaskError for what it lacks."""
    where = row.where
    extra = Extra.of({key: value for key, value in row.values.items() if key not in FIELDS})
    if "prompt" not in values and "text" in values:
        if "label" in row.values or (split != "train" and metric != "perplexity"):
            raise _lacking(row, f"plain text where {metric} needs answers")
        return Example(values.get("id", name), "", text=values["text"], group=values.get("group"), extra=extra)
    if not (values.get("prompt") or "").strip():
        raise _lacking(row, f"the prompt is {_how(values, 'prompt')}", "prompt" not in values)
    choices = _texts(values.get("choices"), where, "choices")
    answers = _answers(values.get("answers"), where)
    completion = values.get("completion") or (answers[0] if answers else "")
    if not completion:
        open_ended = RANKED.fullmatch(metric) or CODE.fullmatch(metric) or metric in ("win_rate", "perplexity")
        # To say nothing may be right: no entity in a sentence, no answer in a passage.
        silent = values.get("completion") == "" or (values.get("answers") is not None and "completion" not in values)
        if (metric == "perplexity" and split != "train") or not (open_ended or (silent and not (labels or choices))):
            raise _lacking(row, f"the completion is {_how(values, 'completion')}", False)
        answers = () if open_ended else ("",)
    else:
        answers = tuple(dict.fromkeys((completion, *answers)))
    if labels and not choices:
        answers = tuple(dict.fromkeys(_label(answer, labels, where) for answer in answers))
    elif choices:
        answers = _among(answers, choices, where)
    evidence = _evidence(values.get("evidence"), where)
    if split != "train" and RANKED.fullmatch(metric) and not evidence:
        raise TaskError(
            f"{where}: no evidence to score {metric} by",
            expected="evidence: ids of the documents that answer",
            found=f"fields {', '.join(map(str, row.values)) or 'none'}",
        )
    return Example(
        values.get("id", name),
        values["prompt"],
        answers[0] if answers else "",
        answers,
        choices,
        values.get("group"),
        evidence,
        values.get("history", ()),
        values.get("rejected"),
        extra=extra,
    )


def _how(values: Mapping[str, Any], field: str) -> str:
    return "empty" if values.get(field) is not None else "null" if field in values else "missing"


def _lacking(row: Row, what: str, rename: bool = True) -> TaskError:
    return TaskError(
        f"{row.where}: {what}",
        expected="prompt and completion",
        found=f"fields {', '.join(map(str, row.values)) or 'none'}",
        do="name them in task.yaml (columns: {prompt: …, completion: …}), or: whet init DATA --out DIR" * rename,
    )


def _label(answer: str, labels: Mapping[str, str], where: str) -> str:
    """The label that an answer names, as metrics compare them; 1.0 is what a table's column with gaps makes of 1."""
    found = labels.get(plain(answer)) or labels.get(plain(answer).removesuffix(".0"))
    if found is None:
        raise TaskError(f"{where}: {short(answer)} is not one of the labels", do=nearest(answer, labels.values()))
    return found


def _among(answers: Sequence[str], choices: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The answers as the row's choices write them."""
    if len(choices) < 2:
        raise TaskError(f"{where}: too few choices", expected="at least two", found=short(list(choices), 120))
    alike = {plain(choice): choice for choice in choices}
    exact = len(alike) < len(choices)  # choices that differ in case or signs alone
    made = tuple(dict.fromkeys(a if exact or a in choices else alike.get(plain(a), a) for a in answers))
    if made and made[0] not in choices:
        raise TaskError(f"{where}: the completion is not one of the row's choices",
                        expected=f"one of {short(list(choices), 120)}", found=short(made[0]))  # fmt: skip
    return made


def _answers(value: object, where: str) -> tuple[str, ...]:
    if isinstance(value, dict) and "text" in value:  # SQuAD's {"text": [...], "answer_start": [...]}
        value = value["text"]
    return _texts([value] if isinstance(value, (str, int, float)) else value, where, "answers")


def _texts(value: object, where: str, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise TaskError(f"{where}: {name} is not a list", expected="a list of texts", found=short(value))
    texts = [as_text(item, where, name) for item in value]
    if any(not text for text in texts):
        raise TaskError(f"{where}: {name} holds an empty one", expected="a list of texts", found=short(value))
    return tuple(str(text) for text in texts)


def _evidence(value: object, where: str) -> tuple[tuple[str, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        value = dict.fromkeys(
            [as_text(item, where, "evidence") for item in (value if isinstance(value, list) else [value])], 1
        )
    graded: dict[str, float] = {}
    for name, grade in value.items():
        if grade is None:  # Parquet fills the ids that a row does not have with nulls
            continue
        text = as_text(name, where, "evidence")
        if not text or type(grade) not in (int, float) or not 0 <= grade <= sys.float_info.max:
            raise TaskError(
                f"{where}: evidence cannot be read", expected='["doc-id"] or {"doc-id": grade ≥ 0}', found=short(value)
            )
        graded.setdefault(text, float(grade))
    return tuple(graded.items())


def rows_hash(examples: Iterable[Example]) -> str:
    """sha256 of the contents of rows, in their order."""
    names = [name for name in Example.__dataclass_fields__ if name != "extra"]
    rows = [[*(getattr(e, name) for name in names), *([e.extra.written] if e.extra else [])] for e in examples]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
