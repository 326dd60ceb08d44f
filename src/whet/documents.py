"""Documents as passages: reading what a task names, and cutting it into pieces that say where they come from.

Files, folders, web pages by their URLs, and rows of a database by a query.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from whet.errors import TaskError, WhetError
from whet.extras import package, public
from whet.rows import read, short

QUERY = re.compile(r"\s*(?:(?:sqlite|postgres|postgresql|mysql)(?:\+\w+)?:|select\s|with\s)", re.IGNORECASE)
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


def load(source: Path | str, folder: Path = Path(), trusted: bool = False) -> tuple[list[Document], tuple[str, ...]]:
    """Documents of a file or folder, of URLs (one a line) or of a database's query; and notes on what was left out.

    A query runs only where the task is `trusted`; `folder` is the task's, for a database in it. Raises TaskError for
    what cannot be read, or where nothing is found.
    """
    if isinstance(source, Path):
        found, notes = _files(source)
    elif QUERY.match(source):
        found, notes = list(_query(source, folder, trusted)), []
    else:
        found, notes = [], []
        for line in source.split("\n"):
            some, said = ([_page(line)], []) if line.startswith(("http://", "https://")) else _files(folder / line)
            found, notes = found + some, notes + said
    if not found:
        shown = source.name if isinstance(source, Path) else short(source)
        raise TaskError(f"no documents in {shown}", expected=f"text, in {', '.join((*TABLES, *READERS))}", found="none",
                        do="; ".join(notes) or "add some")  # fmt: skip
    name, times = Counter(d.id for d in found).most_common(1)[0]
    if times > 1:
        raise TaskError(f"{times} documents have the id {name!r}", expected="ids that differ", do="rename them")
    return found, tuple(notes)


def _files(source: Path) -> tuple[list[Document], list[str]]:
    """Documents of one file, or of all in a folder that can be read; and notes on what was left out."""
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
    return found, notes


def _rows(file: Path) -> Iterator[Document]:
    for number, row in enumerate(read(file), 1):
        yield _row(dict(row.values), number, row.where)


def _row(values: dict[str, Any], number: int, where: str) -> Document:
    """A row with `text`, and where it has them `id` and `title`."""
    text = values.get("text") or ""  # an empty cell of a table is None
    if "text" not in values or not isinstance(text, str):
        raise TaskError(f"{where}: no text", expected='{"id", "title", "text"}', found=short(values),
                        do="name the text column text")  # fmt: skip
    name = values.get("id")
    return Document(str(number if name is None else name), str(values.get("title") or ""), text, where)


def _query(source: str, folder: Path, trusted: bool) -> Iterator[Document]:
    """Rows of a database: its SQLAlchemy URL, a space, and the query, which names columns as rows do."""
    place, _, query = source.strip().partition(" ")
    if not trusted:
        raise TaskError("documents are a database's query", expected="a task you trust", do="read it, then add --trust")
    if not re.match(r"\w+(\+\w+)?:", place) or not re.match(r"(select|with)\s", query.strip(), re.IGNORECASE):
        raise TaskError("the query cannot be read", expected="a database's URL, a space, and a SELECT",
                        found=short(source), do="write sqlite:///a.db SELECT id, title, text FROM b")  # fmt: skip
    sql = package("sqlalchemy", "rag")
    if place.startswith("sqlite:///"):
        file = (folder / place.removeprefix("sqlite:///")).resolve()
        if folder.resolve() not in file.parents or not file.is_file():
            raise TaskError("the database is not there", expected="a file in the task's folder", found=file.name,
                            do="copy it there")  # fmt: skip
        place = f"sqlite:///file:{file}?mode=ro&uri=true"
    try:
        with sql.create_engine(place).connect() as connection:
            rows = [dict(row) for row in connection.execute(sql.text(query)).mappings()]
    except Exception as error:  # drivers raise their own kinds
        raise TaskError("the database refuses the query", expected="rows with a text column",
                        found=str(error).splitlines()[0][:160], do="try the query by hand") from error  # fmt: skip
    for number, values in enumerate(rows, 1):
        made = _row(values, number, f"{short(query)} row {number}")
        if made.text.strip():
            yield made


# --- web pages --------------------------------------------------------------------------------------------------------


def _page(url: str) -> Document:
    """A web page, a PDF or a text by its URL; redirects are followed, each to public addresses only."""
    import httpx

    last = url
    with httpx.Client(timeout=20, follow_redirects=False) as client:
        for _ in range(6):
            address, host = public(last), urlsplit(last)
            # The address that was checked is the one that is asked: a name could lead elsewhere the second time.
            place = httpx.URL(last).copy_with(host=address)
            extensions = {"sni_hostname": host.hostname} if host.scheme == "https" else {}
            try:
                with client.stream("GET", place, headers={"host": host.netloc.rpartition("@")[2]},
                                   extensions=extensions) as answer:  # fmt: skip
                    if answer.is_redirect:
                        last = urljoin(last, answer.headers.get("location", ""))
                        continue
                    answer.raise_for_status()
                    return _document(url, answer.headers.get("content-type", ""), _body(answer, url))
            except httpx.HTTPError as error:
                raise TaskError(f"{url} cannot be fetched", expected="a page", found=str(error)[:120],
                                do="save it as a file, or try again") from error  # fmt: skip
    raise TaskError(f"{url} cannot be fetched", expected="at most 5 redirects", found="more", do="name the last")


def _body(answer: Any, url: str) -> bytes:
    body = b""
    for piece in answer.iter_bytes():
        body += piece
        if len(body) > MOST_BYTES:
            raise TaskError(f"{url} is too large", expected=f"at most {MOST_BYTES / 1e6:.0f} MB", do="save a part")
    return body


def _document(url: str, kind: str, body: bytes) -> Document:
    """What was fetched, read as a file of its kind."""
    endings = {"application/pdf": ".pdf", "text/plain": ".txt", "text/markdown": ".md"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"page{endings.get(kind.partition(';')[0].strip(), '.html')}"
        file.write_bytes(body)
        found, notes = _files(file)
    if not found:
        raise TaskError(f"{url} holds no text", expected="some", found="; ".join(notes), do="leave it out")
    title = url if found[0].title == "page" else found[0].title
    return replace(found[0], id=url, title=title, where=url)


# --- files ------------------------------------------------------------------------------------------------------------


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig", errors="replace")


def _html(file: Path) -> str:
    """Headings and text of a page; scripts, styles and navigation are left out."""
    page = package("bs4", "rag").BeautifulSoup(_text(file), "html.parser")
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
    pypdf = package("pypdf", "rag")
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(str(file)).pages]
    except Exception as error:  # a broken file raises what it likes
        raise TaskError(f"{file.name} cannot be read", expected="a PDF", found=str(error)[:120], do="save it anew"
                        ) from error  # fmt: skip
    return "\n\n".join(f"# page {n}\n\n{text}" for n, text in enumerate(pages, 1) if text.strip())


def _docx(file: Path) -> str:
    """Paragraphs and table rows; headings by their style."""
    try:
        opened = package("docx", "rag").Document(str(file))
    except WhetError:
        raise
    except Exception as error:
        raise TaskError(f"{file.name} cannot be read", expected="a DOCX", found=str(error)[:120], do="save it anew"
                        ) from error  # fmt: skip
    heads = ("Heading", "Title")
    lines = [f"# {p.text}" if p.style.name.startswith(heads) else p.text for p in opened.paragraphs if p.text.strip()]
    rows = [" | ".join(cell.text for cell in row.cells) for table in opened.tables for row in table.rows]
    return "\n\n".join([*lines, *rows])


TABLES = (".jsonl", ".csv", ".parquet")
READERS: dict[str, Callable[[Path], str]] = {
    ".md": _text, ".txt": _text, ".html": _html, ".htm": _html, ".pdf": _pdf, ".docx": _docx
}  # fmt: skip


# --- passages ---------------------------------------------------------------------------------------------------------


def passages(document: Document, words: int = WORDS, overlap: int | None = None) -> list[Passage]:
    """Cut a document into passages of at most `words` words, sentences whole where they fit, within one section.

    Each repeats the last `overlap` words or fewer (30, or a quarter of short ones), in whole sentences, of the one
    before it in its section.
    """
    overlap = min(OVERLAP, words // 4) if overlap is None else overlap
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
