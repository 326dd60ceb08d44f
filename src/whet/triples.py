"""Knowledge as triples: reading what a task names (TSV, glossary, RDF, Wikidata's JSON, SPARQL), with names for all."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote

from whet.documents import hidden, hidden_note
from whet.errors import TaskError
from whet.extras import package
from whet.rows import decode, short
from whet.task import Learnable, places

# Ids are IRIs and blank nodes in angle brackets; anything else is a value as `text` writes it, and its own name.
Triple = tuple[str, str, str]
MOST_TRIPLES = 1_000_000
MOST_BYTES = 500_000_000  # of a JSON file, unpacked
TAB = "\t"
# How the columns of a table are called; its first line is no fact where all of it is of these.
HEADS = ({"subject", "head", "source", "entity", "s", "h", "term", "word", "abbreviation", "acronym"},
         {"relation", "predicate", "property", "relationship", "p", "r", "definition", "meaning", "description"},
         {"object", "tail", "target", "value", "o", "t", "alias", "aliases", "synonyms"})  # fmt: skip
MEANS = "means"  # the relation from a term to its description
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open}
RDF = {".nt": "N_TRIPLES", ".ttl": "TURTLE", ".nq": "N_QUADS", ".trig": "TRIG", ".rdf": "RDF_XML", ".owl": "RDF_XML"}
KINDS = (".tsv", ".csv", ".json", *RDF)
# What names things, by the last part of the relation's id: rdfs, skos, foaf and schema.org agree well enough. A "label"
# of other vocabularies is any label, such as a record label.
NAMED = {"label": "label", "prefLabel": "label", "name": "label", "altLabel": "alias", "alias": "alias",
         "alternateName": "alias", "also known as": "alias", "comment": MEANS, "description": MEANS,
         "definition": MEANS, "abstract": MEANS, "inverseOf": "inverse", "inverse of": "inverse"}  # fmt: skip
PLAIN = ("en", "")  # the languages that come first
LABELS = ("<http://www.w3.org/", "<#")
RDF_OWN = "<http://www.w3.org/1999/02/22-rdf-syntax-ns#"
FLOATS = tuple(f"http://www.w3.org/2001/XMLSchema#{kind}" for kind in ("double", "float"))
MOST_HELD = 100  # facts that are told through one blank node
LOCAL = re.compile(r"[^/#]*[/#]?$")
HUMPS = re.compile(r"(?<=[a-z])(?=[A-Z])")
TIME = re.compile(r"(-?\d{4,}(?:-\d\d){0,2})(?:T00:00:00(?:\.0+)?)?(?:Z|[+-]\d\d:\d\d)?")
DATES = ("date", "datetime", "datetimestamp", "gyear", "gyearmonth")
DAY = re.compile(r"(\d{4})-(\d\d)(?:-(\d\d))?")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
DAYS = ("{d} {month} {y}", "{month} {d} {y}", "{y}년 {m}월 {d}일", "{y}年{m}月{d}日")
DAYS_OF_MONTHS = ("{month} {y}", "{y}년 {m}월", "{y}年{m}月")
BC = re.compile(rf"(?:(?:(\d+) )?({'|'.join(MONTHS)}) )?(\d+) BC")
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
WHOLE = re.compile(r"[-+]?\d{16,}")  # of more digits than a float holds
# Wikidata's triples name a relation P31 by wdt:P31, p:P31 and others; labelled is the entity wd:P31.
PROPERTY = re.compile(r"/prop/(?:[\w-]+/)*(?=P\d+>$)")
OF_PROPERTIES = re.compile(r"(?:^<|/entity/)P\d+>$")


@dataclass(frozen=True)
class Facts:
    """Triples of ids, each once; `names` of an id are its label and then its aliases, `inverses` pair relations."""

    triples: tuple[Triple, ...]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inverses: Mapping[str, str] = field(default_factory=dict)

    def named(self, one: str, humps: bool = True) -> tuple[str, ...]:
        """The names of an id, the label first; one without a label is called by the end of its IRI.

        `humps` false is for things: a name such as YouTube is theirs as it is written, and in words besides.
        """
        number, unit, _ = one.partition("  <")
        if unit and one[:1] != "<":  # a quantity of Wikidata's
            return (f"{number} {self.named(one[len(number) + 2 :])[0]}",)
        own = self.names.get(one) or self.names.get(PROPERTY.sub("/entity/", one))
        if own or one[:1] != "<":
            return own or _written(_spoken(one)[1])
        return tuple(dict.fromkeys((_local(one, humps), _local(one))))


def text(value: str, language: str = "") -> str:
    """A value of a triple: on one line; its language, or that it only looks like an id, stands behind a first space.

    No value has that space, nor two spaces in a row, of its own.
    """
    line = " ".join(value.split())
    return f" @{language} {line}" if language or line[:1] == "<" else line


def _spoken(value: str) -> tuple[str, str]:
    """The language of a value, English as "en" whatever its kind, and what it says."""
    language, _, said = value[2:].partition(" ") if value[:2] == " @" else ("", "", value)
    return "en" if language.startswith("en-") else language, said


def _written(value: str) -> tuple[str, ...]:
    """A value, and how else people write it: a day by its month's name, or by its year alone; 1000000 with commas."""
    if found := DAY.fullmatch(value):
        year, month, day = (int(part or 0) for part in found.groups())
        if 1 <= month <= 12:
            known = {"y": year, "m": month, "d": day, "month": MONTHS[month - 1]}
            return (value, *(form.format(**known).strip() for form in (DAYS if day else DAYS_OF_MONTHS)), str(year))
    if found := BC.fullmatch(value):
        raw = f"-{int(found[3]):04d}-{MONTHS.index(found[2]) + 1 if found[2] else 0:02d}-{int(found[1] or 0):02d}"
        return tuple(dict.fromkeys((value, f"{found[3]} BC", raw.removesuffix("-00").removesuffix("-00"))))
    if found := re.match(r"-?\d{4,}(?![\d:/-])", value):
        return value, f"{int(found[0]):,}{value[found.end() :]}"
    return (value,)


def load(data: Learnable, home: Path) -> tuple[Facts, list[str]]:
    """All facts that a task has, and notes; raises TaskError naming file and line for what cannot be read."""
    from whet.sparql import snapshot

    notes: list[str] = []
    found: list[Triple] = []
    count = 0
    for source in (data.knowledge, data.glossary):
        for part in places(data.folder, source) if isinstance(source, str) else filter(None, (source,)):
            if isinstance(part, str):
                found += snapshot(part, data.trusted, home, notes)
                continue
            files = sorted(p for p in part.rglob("*") if _kind(p)[0] in KINDS) if part.is_dir() else [part]
            shown = [file for file in files if not hidden(file, part)]
            if len(shown) < len(files):
                notes.append(hidden_note(len(files) - len(shown)))
            for file in shown:
                for row in _file(file, glossary=source is data.glossary):
                    found.append(row)
                    count += _role(row[1]) == ""  # names in many languages do not count
                    if count > MOST_TRIPLES:
                        break
            if count > MOST_TRIPLES:
                raise TaskError(f"{part.name}: too many triples", expected=f"at most {MOST_TRIPLES}",
                                found="more", do="take the part that the task asks about")  # fmt: skip
    facts = gather(found, {a for e in data.train for a in (e.answers or (e.completion,)) if a})
    if not facts.triples:
        raise TaskError("no facts in the task's knowledge", expected="triples or terms", found="none", do="add some")
    return facts, notes


def gather(found: Iterable[Triple], answers: Collection[str] = ()) -> Facts:
    """Facts out of triples as they are written: labels, aliases, descriptions and inverses are told apart.

    Of what is said in several languages that one comes first whose labels are most of `answers`, then English or none,
    then the one that comes first in the file. What is said of Wikidata's properties is left out, but for their names.
    """
    rows = [(s, r, o, *_spoken(o)) for s, r, o in found]
    wanted = {answer.casefold() for answer in answers}
    hits = Counter(language for _, r, _, language, said in rows if _role(r) == "label" and said.casefold() in wanted)
    first = tuple(dict.fromkeys((max(hits, key=lambda one: (hits[one], one in PLAIN), default="en"), *PLAIN)))

    def rank(language: str) -> int:
        return first.index(language) if language in first else len(first)

    spoken: dict[tuple[str, str], str] = {}
    for s, r, o, language, _ in rows:
        if o[:1] != "<" and ((s, r) not in spoken or rank(language) < rank(spoken[s, r])):
            spoken[s, r] = language
    triples: dict[Triple, None] = {}
    labels: dict[str, list[tuple[int, str]]] = {}
    aliases: dict[str, list[str]] = {}
    inverses: dict[str, str] = {}
    for s, r, o, language, said in rows:
        role = _role(r)
        if role in ("", MEANS) and OF_PROPERTIES.search(s):
            continue
        if role == "inverse":
            inverses.update({s: o, o: s})
        elif o[:1] == "<":
            triples[s, r, o] = None
        elif role == "label":
            labels.setdefault(s, []).append((rank(language), said))
        elif role == "alias":
            aliases.setdefault(s, []).append(said)
        elif s and r and said and language in ("", spoken[s, r]):
            triples[s, MEANS if role == MEANS else r, text(said) if language else o] = None
    names: dict[str, tuple[str, ...]] = {}
    for one in {**labels, **aliases}:
        own = [said for _, said in sorted(labels.get(one, ()), key=lambda label: label[0])]
        if not any(own) and one[:1] != "<":
            own = [_spoken(one)[1]]
        names[one] = tuple(dict.fromkeys(filter(None, (*own, *aliases.get(one, ())))))
    known = Facts((), names, inverses)
    return replace(known, triples=tuple(dict.fromkeys(_through(tuple(triples), known))))


@lru_cache(10_000)
def _role(relation: str) -> str:
    """What a relation says of names; "" for one that states a fact."""
    if relation[:1] != "<":
        return NAMED.get(relation, "").replace("label", "")
    end = _local(relation, humps=False)
    return NAMED.get(end, "") if end != "label" or relation.startswith(LABELS) else ""


def _through(triples: Sequence[Triple], known: Facts) -> Iterator[Triple]:
    """Triples without nameless blank nodes: what has the size [value 5] has the "size value" 5; lists go by items."""
    held: dict[str, list[tuple[str, str]]] = {}  # of a hub the first ones: whoever points to it is told no more
    for s, r, o in triples:
        usable = _blank(s, known) and r != f"{RDF_OWN}type>" and o != f"{RDF_OWN}nil>"
        if usable and len(steps := held.setdefault(s, [])) < MOST_HELD:
            steps.append((r, o))

    def ends(r: str, o: str) -> Iterator[tuple[str, str]]:
        ahead, seen = [(r, o)], set[str]()
        while ahead:
            r, o = ahead.pop()
            if not _blank(o, known):
                yield r, o
            elif o not in seen:
                seen.add(o)
                ahead += [(r if step.startswith(RDF_OWN) else text(f"{known.named(r)[0]} {known.named(step)[0]}"), end)
                          for step, end in reversed(held.get(o, ()))]  # fmt: skip

    for s, r, o in triples:
        if not _blank(s, known):
            yield from ((s, *end) for end in islice(ends(r, o), MOST_HELD)) if _blank(o, known) else [(s, r, o)]


def _blank(one: str, known: Facts) -> bool:
    return one.startswith("<_:") and not known.names.get(one)


def _local(iri: str, humps: bool = True) -> str:
    """The readable end of an IRI: dbo:birthPlace is "birth place"; `humps` false leaves it as it is."""
    found = LOCAL.search(iri.strip("<>"))
    end = " ".join(unquote(found[0] if found else "").rstrip("/#").replace("_", " ").split()) or iri.strip("<>")
    return HUMPS.sub(" ", end).lower() if humps and HUMPS.search(end) else end


# --- files ------------------------------------------------------------------------------------------------------------


def _kind(file: Path) -> tuple[str, Callable[..., Any]]:
    """The ending of a file, that of its packing left out, and what opens it."""
    packed = PACKED.get(file.suffix.lower())
    return Path(file.stem if packed else file.name).suffix.lower(), packed or open


def _file(file: Path, glossary: bool) -> Iterator[Triple]:
    kind, unpack = _kind(file)
    if kind not in KINDS or (kind in (".tsv", ".csv") and unpack not in (open, gzip.open)):
        raise TaskError(f"{file.name} is of no kind that can be read", expected=", ".join(KINDS),
                        found=kind or "no ending", do="convert it")  # fmt: skip
    try:
        if kind in (".tsv", ".csv"):
            yield from _table(file, kind, glossary)
            return
        with unpack(file, "rb") as stream:
            yield from _wikidata(file.name, stream) if kind == ".json" else _rdf(file.name, stream, RDF[kind])
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise TaskError(f"{file.name} cannot be read", expected="a whole file", found=str(error)[:80],
                        do="fetch it again") from error  # fmt: skip


def _table(file: Path, kind: str, glossary: bool) -> Iterator[Triple]:
    """Subject, relation, object; or, where it is a `glossary` or has two columns, a term, what it means, its aliases.

    Aliases stand between semicolons. A first line of the names of columns is left out.
    """
    separator = TAB if kind == ".tsv" else ","
    for number, (where, written) in enumerate(_cells(file, separator)):
        cells = [text(cell) for cell in written]
        if number == 0:
            terms = glossary or len(cells) == 2
            expected, counts = ("term, meaning (and aliases)", (2, 3)) if terms else ("subject, relation, object", (3,))
            if all(cell.casefold() in names for cell, names in zip(cells, HEADS, strict=False)):
                continue
        if len(cells) not in counts or not all(cells[: counts[0]]):
            raise TaskError(f"{file.name} line {where}: not {expected}",
                            expected=f"cells between {'tabs' if separator == TAB else 'commas'}",
                            found=short(separator.join(written)), do="correct it")  # fmt: skip
        if not terms:
            yield cells[0], cells[1], cells[2]
            continue
        yield cells[0], MEANS, cells[1]
        yield from ((cells[0], "alias", text(one)) for one in ";".join(written[2:]).split(";") if one.strip())


def _cells(file: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The lines of a table that hold anything, each with its number."""
    if separator == TAB:  # quotes are part of what is written
        lines = enumerate(decode(file).split("\n"), 1)
        rows: Iterable[tuple[int, list[str]]] = ((number, line.split(TAB)) for number, line in lines)
    else:
        rows = _quoted(file)
    return ((number, cells) for number, cells in rows if any(cell.strip() for cell in cells))


def _quoted(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV, each with the number of its last line; TaskError names the first line of a broken one."""
    read, begun = csv.reader(io.StringIO(decode(file), newline=""), strict=True), 1
    while True:
        try:
            cells = next(read, None)
        except csv.Error as error:
            raise TaskError(f"{file.name} line {begun}: quotes that do not match", expected='cells as in "a, b",c',
                            found=str(error), do="correct it") from error  # fmt: skip
        if cells is None:
            return
        yield read.line_num, cells
        begun = read.line_num + 1


def _rdf(name: str, stream: IO[bytes], kind: str) -> Iterator[Triple]:
    rdf, numbers = package("pyoxigraph", "knowledge"), dict[str, int]()  # of blank nodes: some are called at random

    def blank(label: str) -> str:
        return f"{name}:{numbers.setdefault(label, len(numbers))}"

    # Whole dumps are of these kinds, and hold IRIs that are none; a broken line is one all the same.
    lenient = kind in ("N_TRIPLES", "N_QUADS")
    how = {"lenient": True} if lenient else {"base_iri": f"file:///{quote(name)}"}
    try:
        for quad in rdf.parse(input=stream, format=getattr(rdf.RdfFormat, kind), **how):
            if not quad.predicate.value:
                raise TaskError(f"{name} has a relation without a name", expected="subject, relation, object",
                                found=short(str(quad), 120), do="correct it")  # fmt: skip
            yield from term_triples(rdf, quad.subject, quad.predicate, quad.object, blank)
    except SyntaxError as error:
        where = f"{name} line {error.lineno}" if error.lineno else name
        raise TaskError(f"{where} is not {kind.replace('_', '-').title()}", expected="triples",
                        found=short(str(error.msg), 120), do="correct it") from error  # fmt: skip


def term_triples(rdf: Any, s: Any, p: Any, o: Any, blank: Callable[[str], str] = str) -> Iterator[Triple]:
    """A triple of RDF terms as ids and values; nothing where an answer leaves one of them unbound.

    `blank` tells blank nodes apart by their labels: what another file or answer calls the same is another one. A
    literal that is a subject or a relation is its text, whatever its language.
    """

    def term(one: Any, language: str = "") -> str:
        if isinstance(one, rdf.Literal):
            return literal(one.value, one.datatype.value, language)
        return f"<_:{blank(one.value)}>" if isinstance(one, rdf.BlankNode) else str(one)

    if s is not None and p is not None and o is not None:
        yield term(s), term(p), term(o, (getattr(o, "language", "") or "").lower())


def literal(value: str, datatype: str, language: str = "") -> str:
    """A literal as people write it: a day without its midnight, a number with the unit that its type names."""
    value = " ".join(value.split())
    if datatype in FLOATS and NUMBER.fullmatch(value) and "e" in value.lower() and math.isfinite(float(value)):
        return f"{float(value):.15g}"
    if _local(datatype, humps=False).lower() in DATES and (found := TIME.fullmatch(value)):
        return found[1]
    if datatype and not re.search("XMLSchema|rdf-syntax-ns", datatype) and NUMBER.fullmatch(value):
        number = value.removeprefix("+") if WHOLE.fullmatch(value) else f"{float(value):.15g}"
        return f"{number} {_local(datatype)}"
    return text(value, language)


def _wikidata(name: str, stream: IO[bytes]) -> Iterator[Triple]:
    """Wikidata's JSON: a dump (an array, one entity a line) or what its API answers ({"entities": {…}})."""
    body = stream.read(MOST_BYTES + 1)
    if len(body) > MOST_BYTES:
        raise TaskError(f"{name} is too large", expected=f"at most {MOST_BYTES / 1e6:.0f} MB of JSON",
                        do="keep the entities that the task is about")  # fmt: skip
    try:
        read = json.loads(body)
        listed = read if isinstance(read, list) else [*read["entities"].values()]
        for one in listed:
            me = f"<{one['id']}>"
            for key, tag in (("labels", "<#label>"), ("aliases", "<#altLabel>"), ("descriptions", "<#description>")):
                said = one.get(key) or {}  # an empty map is written as a list
                seen = set[str]()  # most languages write a name alike
                for language in sorted(said, key=lambda code: code not in ("en", "mul")):
                    for found in said[language] if isinstance(said[language], list) else [said[language]]:
                        if found["value"] not in seen:
                            yield me, tag, text(found["value"], language.replace("mul", ""))
                        seen.add(found["value"])
            for relation, claims in (one.get("claims") or {}).items():
                first = [c for c in claims if c.get("rank") == "preferred"]
                for claim in first or [c for c in claims if c.get("rank") != "deprecated"]:
                    if value := _value(claim["mainsnak"].get("datavalue")):
                        yield me, f"<{relation}>", value
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise TaskError(f"{name}{line} is not Wikidata's JSON", expected="entities with id, labels and claims",
                        found=short(str(error), 80), do="export it again") from error  # fmt: skip


def _value(found: Any) -> str:
    """The object of a Wikidata claim; "" for what nobody can read (coordinates, unknown values)."""
    if not found:
        return ""
    value, kind = found["value"], found["type"]
    if kind == "wikibase-entityid":
        return f"<{value['id']}>"
    if kind == "time":
        era, precision = " BC" if value["time"][:1] == "-" else "", value.get("precision", 11)
        year, month, day = map(int, value["time"].lstrip("+-").split("T")[0].split("-"))
        if precision < 8:  # what is vaguer than a decade cannot be told from its first or last year
            return ""
        if precision < 10 or not 1 <= month <= 12:
            return f"{f'{year // 10 * 10}s' if precision == 8 else year}{era}"
        if era:
            return f"{f'{day} ' if precision > 10 else ''}{MONTHS[month - 1]} {year}{era}"
        return f"{year:04d}-{month:02d}" + (f"-{day:02d}" if precision > 10 else "")
    if kind == "quantity":
        unit = value.get("unit", "1")
        return str(value["amount"]).lstrip("+") + ("" if unit == "1" else f"  <{_local(unit, humps=False)}>")
    if kind == "monolingualtext":
        return text(value["text"], value["language"])
    return text(str(value)) if kind == "string" else ""
