"""Documents as passages: reading what a task names, and cutting it into pieces that say where they come from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from whet.errors import TaskError
from whet.rows import read, short

WORDS, OVERLAP = 200, 30  # of a passage at most; of the one before that the next repeats
MOST_BYTES = 50_000_000  # of one file that is no table
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$")
SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Document:
    """A text with its title; sections begin with Markdown headings. `where` names the file, or its line."""

    id: str
    title: str
    text: str
    where: str


@dataclass(frozen=True)
class Passage:
    """A piece of a document: at most 200 words of one section. `start` is its first word's number in the document."""

    document: str
    title: str
    text: str
    where: str
    start: int


def load(source: Path | str) -> tuple[list[Document], tuple[str, ...]]:
    """Documents of a file or folder, and notes on what was left out.

    Raises TaskError for a source of another kind, a file that cannot be read, or where nothing is found.
    """
    if not isinstance(source, Path):
        raise TaskError("documents of this kind cannot be read by this version", expected="a file or a folder",
                        found=source[:80], do="save them as files")  # fmt: skip
    known = (*TABLES, *READERS)
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in known) if source.is_dir() else [source]
    found: list[Document] = []
    notes: list[str] = []
    for file in files:
        kind = file.suffix.lower()
        if kind in TABLES:
            rows = list(_rows(file))
            found += [d for d in rows if d.text.strip()]
            notes += [f"{d.where} was left out: no text in it" for d in rows if not d.text.strip()]
            continue
        if kind not in READERS:
            raise TaskError(f"{file.name} is of no kind that can be read", expected=", ".join(known),
                            found=kind or "no ending", do="convert it")  # fmt: skip
        if file.stat().st_size > MOST_BYTES:
            size = file.stat().st_size / 1e6
            notes.append(f"{file.name} was left out: {size:.0f} MB, at most {MOST_BYTES / 1e6:.0f}")
            continue
        name = str(file.relative_to(source)) if source.is_dir() else file.name
        text = READERS[kind](file)
        if not text.strip():
            notes.append(f"{name} was left out: no text in it" + (" (scanned?)" if kind == ".pdf" else ""))
            continue
        first = next((m[1] for m in map(HEADING.match, text.splitlines()) if m), "")
        found.append(Document(name, first or file.stem.replace("_", " "), text, name))
    if not found:
        raise TaskError(f"no documents in {source}", expected=f"files of {', '.join(known)}", found="none",
                        do="; ".join(notes) or "add some")  # fmt: skip
    name, times = Counter(d.id for d in found).most_common(1)[0]
    if times > 1:
        raise TaskError(f"{times} documents have the id {name!r}", expected="ids that differ", do="rename them")
    return found, tuple(notes)


def _rows(file: Path) -> Iterator[Document]:
    """Rows with `text`, and where they have them `id` and `title`."""
    for number, row in enumerate(read(file), 1):
        text = row.values.get("text") or ""  # an empty cell of a table is None
        if "text" not in row.values or not isinstance(text, str):
            raise TaskError(f"{row.where}: no text", expected='{"id", "title", "text"}', found=short(dict(row.values)),
                            do="name the text column text")  # fmt: skip
        name = row.values.get("id")
        yield Document(str(number if name is None else name), str(row.values.get("title") or ""), text, row.where)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig", errors="replace")


def _html(file: Path) -> str:
    """Headings and text of a page; scripts, styles and navigation are left out."""
    page = _package("bs4").BeautifulSoup(_text(file), "html.parser")
    for part in page(["script", "style", "nav", "header", "footer", "noscript", "template"]):
        part.decompose()
    for heading in page(re.compile("^h[1-6]$")):
        heading.replace_with(f"\n\n# {' '.join(heading.get_text(' ').split())}\n\n")
    title = page.title.get_text().strip() if page.title else ""
    if page.title:
        page.title.decompose()
    return (f"# {title}\n\n" if title else "") + str(page.get_text("\n"))


def _pdf(file: Path) -> str:
    """The text of every page, each behind a heading with its number."""
    pypdf = _package("pypdf")
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(str(file)).pages]
    except Exception as error:  # a broken file raises what it likes
        raise TaskError(f"{file.name} cannot be read", expected="a PDF", found=str(error)[:120], do="save it anew"
                        ) from error  # fmt: skip
    return "\n\n".join(f"# page {n}\n\n{text}" for n, text in enumerate(pages, 1) if text.strip())


def _docx(file: Path) -> str:
    """Paragraphs and table rows; headings by their style."""
    try:
        opened = _package("docx").Document(str(file))
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"{file.name} cannot be read", expected="a DOCX", found=str(error)[:120], do="save it anew"
                        ) from error  # fmt: skip
    heads = ("Heading", "Title")
    lines = [f"# {p.text}" if p.style.name.startswith(heads) else p.text for p in opened.paragraphs if p.text.strip()]
    rows = [" | ".join(cell.text for cell in row.cells) for table in opened.tables for row in table.rows]
    return "\n\n".join([*lines, *rows])


def _package(name: str) -> Any:
    """A parser out of the `rag` extra. Raises TaskError where it is absent."""
    try:
        return import_module(name)
    except ImportError as error:
        raise TaskError(f"these documents need the package {name}", expected="it", found="none",
                        do="pip install 'whet[rag]'") from error  # fmt: skip


TABLES = (".jsonl", ".csv", ".parquet")
READERS: dict[str, Callable[[Path], str]] = {
    ".md": _text, ".txt": _text, ".html": _html, ".htm": _html, ".pdf": _pdf, ".docx": _docx
}  # fmt: skip


# --- passages ---------------------------------------------------------------------------------------------------------


def passages(document: Document, words: int = WORDS, overlap: int = OVERLAP) -> list[Passage]:
    """Cut a document into passages of at most `words` words, sentences whole where they fit, within one section.

    Each repeats the last `overlap` words or fewer, in whole sentences, of the one before it in its section.
    """
    made: list[Passage] = []
    at = 0  # words of the document before the sentence at hand
    for section, text in _sections(document.text):
        title = " / ".join(dict.fromkeys(part for part in (document.title, section) if part))
        here: list[str] = []
        start, repeated = at, 0  # of `here`: where it begins, and how many of its words the last passage has, too
        for sentence in [*_sentences(text, words), []]:
            if len(here) > repeated and (not sentence or len(here) + len(sentence) > words):
                made.append(Passage(document.id, title, " ".join(here), document.where, start))
                here = _tail(here, min(overlap, words - len(sentence)))
                start, repeated = at - len(here), len(here)
            here = here + sentence
            at += len(sentence)
    return made


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """(heading, text) of each section that has text."""
    heading, lines = "", list[str]()
    for line in [*text.splitlines(), "# "]:
        found = HEADING.match(line)
        if found or line == "# ":
            if " ".join(lines).strip():
                yield heading, "\n".join(lines)
            heading, lines = found[1] if found else "", []
        else:
            lines.append(line)


def _sentences(text: str, words: int) -> Iterator[list[str]]:
    """The words of each sentence; one that is too long is cut."""
    for sentence in SENTENCE.split(text):
        found = sentence.split()
        for at in range(0, len(found), words):
            yield found[at : at + words]


def _tail(words: list[str], most: int) -> list[str]:
    """The last sentences that are together at most so many words long."""
    for at in range(max(0, len(words) - most), len(words)):
        if at > 0 and words[at - 1][-1] in ".!?":
            return words[at:]
    return []
