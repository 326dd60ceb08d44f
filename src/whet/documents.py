"""Documents as passages: reading what a task names, and cutting it into pieces that say where they come from.

Files, folders, web pages by their URLs, and rows of a database by a query.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from whet.errors import TaskError, WhetError
from whet.extras import package, pinned, public, within
from whet.header import URL, places
from whet.rows import decoded, read, short

WORDS, OVERLAP = 200, 30  # of a passage at most; of the one before that the next repeats
IDS = ("id", "_id", "doc_id", "docid")
ROW = re.compile(r"(.+):\d+")  # the id of a row that has none of its own: its table, and its number
PIECES = 240  # about so many word pieces of WORDS words at most, their title among them: the embedder reads 256
MOST_BYTES = 50_000_000  # of one file that is no table
MOST_UNPACKED = 10 * MOST_BYTES  # of one that is packed, its pictures among them
SECONDS = 60.0  # that a page may take, with all its redirects
HEADING = re.compile(r"(#{1,6})\s+(\S.*)")
CLOSED = re.compile(r"(?<=\s)#+$")  # what may end a heading, too
UNDERLINE = re.compile(r" {0,3}(={2,}|-{2,})\s*$")  # below a heading of one line
PLAIN = re.compile(r" {0,3}(?!\d+[.)]\s)[^\s#>|+*=`~-]")  # how such a heading begins
FRONT = re.compile(r"---[ \t\r]*\n([\w-]+:.*?\n)(?:---|\.\.\.)[ \t\r]*(?:\n|$)", re.DOTALL)  # fields before the text
TITLE = re.compile(r"^title:(.*)\n?", re.MULTILINE)
OWN = "\0"  # before a line of Markdown that the reader of another kind writes itself
PAGED = re.compile(r"# .*\n\n## page \d+\n")  # how the text of a PDF begins, whose headings are no words of its own
FENCE = re.compile(r" {0,3}(`{3,}(?!`|.*`)|~{3,})")
LIGATURES = str.maketrans(dict(zip("ﬀﬁﬂﬃﬄﬅﬆ", ("ff", "fi", "fl", "ffi", "ffl", "st", "st"), strict=True)))
BROKEN = re.compile(r"(?<=[^\W\d_])-\n(?=[a-zß-öø-ÿ])")  # a word at the end of a PDF's line
SOFT = "\u00ad"  # a hyphen that is only seen where a line ends
ENDS = ".!?。！？"
# Han, kana and their punctuation: no spaces stand between these.
IDEOGRAPHIC = ("\u3001-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
               "\uff5b-\uff9f\U00020000-\U0003ffff")  # fmt: skip
CUT = re.compile(f"(?<=[{IDEOGRAPHIC}]) (?=[{IDEOGRAPHIC}])")
SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])(?![」』”’）])\s*")
HANGUL = "\uac00-\ud7a3"
# Accents and the vowel signs of Indic scripts: part of the word that they stand in, though no letters.
MARKS = "".join(chr(n) for n in (*range(0x300, 0x1E00), *range(0xA800, 0xAC00))
                if unicodedata.category(chr(n))[0] == "M")  # fmt: skip
# What stands behind a Korean noun in one word with it.
PARTICLE = "(?:은|는|이|가|을|를|의|에|에서|에게|와|과|도|만|으?로|까지|부터|보다|이?나|이?란|이?라는|인|이다|입니다)"
PIECE = re.compile(rf"[A-Za-z]{{1,7}}|\d\d?|(?<=[{HANGUL}])|\S")  # Hangul counts twice


@dataclass(frozen=True)
class Document:
    """A text with its title; sections begin with Markdown headings.

    `where` names the file, or its line; `table` the file whose row it is.
    """

    id: str
    title: str
    text: str
    where: str
    table: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "title", "text", "where", "table"):  # halves of surrogates and NUL cannot always be written
            clean = getattr(self, name).replace("\0", "").replace(SOFT, "").encode("utf-8", "replace").decode()
            object.__setattr__(self, name, clean)


@dataclass(frozen=True)
class Passage:
    """A piece of a document: at most 200 words of one section.

    `start` is its first word's number in the document's text, headings counted but for those of a PDF's pages. `title`
    is the document's with the headings of the section; `name` the document's alone, empty where it has none of its own.
    """

    document: str
    title: str
    text: str
    where: str
    start: int
    name: str = field(default="", compare=False)


def load(
    source: Path | str, folder: Path = Path(), trusted: bool = False, known: Iterable[str] = ()
) -> tuple[list[Document], tuple[str, ...]]:
    """Documents of a file or folder, of URLs (one a line) or of a database's query; and notes on what was left out.

    A query runs only where the task is `trusted`; `folder` is the task's, for a database in it. Files are named by
    their path in `source`, in `folder` where it lists several; one whose path ends with an id that is `known`, and that
    with this name, has that. Raises TaskError for what cannot be read, or where nothing is found.
    """
    names = frozenset(n for k in known for n in (k, k.rpartition(":")[0]) if n)
    found: list[Document] = []
    notes: list[str] = []
    for place in [source] if isinstance(source, Path) else places(folder, source):
        if isinstance(place, str):
            found += [_page(place)] if URL.match(place) else _query(place, folder, trusted)
            continue
        file = place.absolute()
        root = folder.absolute() if isinstance(source, str) else file if file.is_dir() else file.parent
        stamps, left = _stamps(file)
        some, said = _files(file, root, names, stamps)
        found, notes = found + some, [*notes, *said, *([hidden_note(left)] if left else [])]
    if not found:
        shown = source.name if isinstance(source, Path) else short(source)
        raise TaskError(f"no documents in {shown}", expected=f"text, in {', '.join((*TABLES, *READERS))}", found="none",
                        do="; ".join(notes) or "add some")  # fmt: skip
    _told_apart(found)
    return found, tuple(notes)


def incoming(
    sources: Iterable[str], known: Collection[str], trusted: bool = False
) -> tuple[list[Document], list[str], list[str]]:
    """What `load` reads of several sources for a corpus with these ids: documents, and notes on what was left out.

    Between the two: the ids of rows that their tables, read again, no longer have. Raises TaskError as `load` does, and
    for two sources with the same document.
    """
    found: list[Document] = []
    notes: list[str] = []
    for one in sources:
        some, said = load(one if "://" in one else Path(one), trusted=trusted, known=known)
        found, notes = [*found, *some], [*notes, *said]
    _told_apart(found)
    ids, tables = {d.id for d in found}, {d.table for d in found}
    gone = [k for k in known if k not in ids and (row := ROW.fullmatch(k)) and row[1] in tables]
    return found, gone, notes


def _told_apart(found: Sequence[Document]) -> None:
    name, times = Counter(d.id for d in found).most_common(1)[0] if found else ("", 0)
    if times > 1:
        raise TaskError(f"{times} documents have the id {name!r}", expected="ids that differ", do="rename them")


def hidden(file: Path, source: Path) -> bool:
    """Whether a file in a folder is hidden, or within a hidden folder of it (.git, .trash)."""
    return any(part.startswith(".") for part in file.relative_to(source).parts)


def hidden_note(count: int) -> str:
    """What is said of hidden files that would have been read."""
    return f"{count} hidden file{'s were' if count > 1 else ' was'} left out (their name or folder begins with a dot)"


def _stamps(source: Path) -> tuple[tuple[tuple[Path, int, int], ...], int]:
    """The files of a folder, or the one file, each with when it was written and its bytes.

    Hidden ones are left out; those of them that could be read are counted.
    """
    try:
        listed = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
        aside = {p for p in listed if hidden(p, source)}
        stamps = tuple((p, p.stat().st_mtime_ns, p.stat().st_size) for p in listed if p not in aside)
        return stamps, sum(p.suffix.lower() in (*TABLES, *READERS) for p in aside)
    except OSError as error:
        raise _unread(source, error) from error


def _unread(file: Path, error: OSError) -> TaskError:
    return TaskError(f"{file.name} cannot be read", found=error.strerror or str(error),
                     do="check the path and its permissions")  # fmt: skip


@lru_cache(maxsize=8)
def _files(
    source: Path, root: Path, known: frozenset[str], stamps: Sequence[tuple[Path, int, int]]
) -> tuple[list[Document], list[str]]:
    """Documents of one file, or of all in a folder that can be read, and notes on what was left out; kept.

    Raises TaskError for a file that was named itself.
    """
    found: list[Document] = []
    notes: list[str] = []
    other: list[str] = []
    for file, _, size in stamps:
        name, parts = Path(os.path.relpath(file, root)).as_posix(), file.resolve().parts[1:]
        ends = ("/".join(parts[n:]) for n in range(len(parts)))  # the longest first
        name = next((k for k in ends if k in known and f"/{k}".endswith(f"/{name}")), name)
        if source.is_dir() and file.suffix.lower() not in (*TABLES, *READERS):
            other.append(name)
            continue
        try:
            some, said = _file(file, name, size)
        except TaskError as error:
            if not source.is_dir():
                raise
            some, said = [], [f"{name} was left out: {error}"]
        found, notes = found + some, notes + said
    if other:
        more = f" and {len(other) - 5} more" if len(other) > 5 else ""
        notes.append(f"of no kind that can be read: {', '.join(other[:5])}{more}")
    return found, notes


def _file(file: Path, name: str, size: int) -> tuple[list[Document], list[str]]:
    """The documents of a file, and notes on what was left out."""
    kind = file.suffix.lower()
    if kind in TABLES:
        rows = [replace(_row(dict(row.values), f"{name}:{n}", row.where), table=name)
                for n, row in enumerate(read(file), 1)]  # fmt: skip
        return ([d for d in rows if d.text.strip()],
                [f"{d.where} was left out: no text in it" for d in rows if not d.text.strip()])  # fmt: skip
    if kind not in READERS:
        raise TaskError(f"{file.name} is of no kind that can be read", expected=", ".join((*TABLES, *READERS)),
                        found=kind or "no ending", do="convert it")  # fmt: skip
    if size > MOST_BYTES:
        return [], [f"{name} was left out: {size / 1e6:.0f} MB, at most {MOST_BYTES / 1e6:.0f}"]
    try:
        text = READERS[kind](file)
    except OSError as error:
        raise _unread(file, error) from error
    if not text.strip():
        return [], [f"{name} was left out: no text in it" + (" (scanned?)" if kind == ".pdf" else "")]
    first = next((said for level, said, _ in _marked(text) if level), "")
    return [Document(name, first or file.stem.replace("_", " "), text, name)], []


def _row(values: dict[str, Any], own: str, where: str) -> Document:
    """A row with `text`, and where it has them `id`, also as BEIR and others call it, (else its `own`) and `title`."""
    text = values.get("text") or ""  # an empty cell of a table is None
    if "text" not in values or not isinstance(text, str):
        raise TaskError(f"{where}: no text", expected='{"id", "title", "text"}', found=short(values),
                        do="name the text column text")  # fmt: skip
    name = next((values[key] for key in IDS if values.get(key) is not None), None)
    return Document(own if name is None else str(name), str(values.get("title") or ""), text, where)


def _query(source: str, folder: Path, trusted: bool) -> Iterator[Document]:
    """Rows of a database: its SQLAlchemy URL, a space, and the query, which names columns as rows do."""
    place, _, query = source.strip().partition(" ")
    if not trusted:
        raise TaskError("documents are a database's query", expected="a task you trust", do="read it, then add --trust")
    if not re.match(r"\w+(\+\w+)?:", place) or not re.match(r"(select|with)\s", query.strip(), re.IGNORECASE):
        raise TaskError("the query cannot be read", expected="a database's URL, a space, and a SELECT",
                        found=short(source), do="write sqlite:///a.db SELECT id, title, text FROM b")  # fmt: skip
    sql = package("sqlalchemy", "rag")
    kind, _, path = place.partition(":///")
    if kind[:6].lower() == "sqlite":  # whatever its driver
        file = (folder / path).resolve()
        if folder.resolve() not in file.parents or not file.is_file():
            raise TaskError("the database is not there", found=file.name, do="copy it there",
                            expected="a file in the task's folder, or with --put in this one")  # fmt: skip
        place = sql.URL.create(kind.lower(), database=f"file:{quote(str(file))}", query={"mode": "ro", "uri": "true"})
    else:
        place = re.sub(r"^postgres(?=[:+])", "postgresql", place, flags=re.IGNORECASE)  # as its own tools call it, too
    try:
        at = sql.make_url(place)
        where = path if kind[:6].lower() == "sqlite" else f"{at.host} {at.database}"  # as written: folders move
        mark = hashlib.sha256(f"{where} {query}".encode()).hexdigest()[:8]
        table = f"{Path((at.database or kind).removeprefix('file:')).name}-{mark}"
        with sql.create_engine(place).connect() as connection:
            plain = connection.execution_options(no_parameters=True)  # a colon or a % of the query is one
            rows = [dict(row) for row in plain.exec_driver_sql(query).mappings()]
    except Exception as error:  # drivers raise their own kinds
        said = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise TaskError("the database refuses the query", expected="rows with a text column", found=said,
                        do="try the query by hand") from error  # fmt: skip
    for number, values in enumerate(rows, 1):
        made = _row(values, f"{table}:{number}", f"{short(query)} row {number}")
        if made.text.strip():
            yield replace(made, table=table)


# --- web pages --------------------------------------------------------------------------------------------------------


def _page(url: str) -> Document:
    """A web page, a PDF or a text by its URL; redirects are followed, each to public addresses only."""
    try:
        kind, body = within(SECONDS, lambda client: _fetched(url, client))
    except TimeoutError as error:
        raise TaskError(f"{url} does not end", expected=f"a page within {SECONDS:g} s", do="save it as a file"
                        ) from error  # fmt: skip
    return _document(url, kind, body)


def _fetched(url: str, client: Any) -> tuple[str, bytes]:
    """What a URL leads to: its kind, as its server says, and its bytes."""
    import httpx

    last = url
    for _ in range(6):
        try:
            with client.stream("GET", **pinned(last, public(last)), timeout=20) as answer:
                if answer.is_redirect:
                    last = urljoin(last, answer.headers.get("location", ""))
                    continue
                answer.raise_for_status()
                body = bytearray()
                for piece in answer.iter_bytes():
                    body += piece
                    if len(body) > MOST_BYTES:
                        raise TaskError(f"{url} is too large", expected=f"at most {MOST_BYTES / 1e6:.0f} MB",
                                        do="save a part")  # fmt: skip
                return answer.headers.get("content-type", ""), bytes(body)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise TaskError(f"{url} cannot be fetched", expected="a page", found=short(str(error), 120),
                            do="save it as a file, or try again") from error  # fmt: skip
    raise TaskError(f"{url} cannot be fetched", expected="at most 5 redirects", found="more", do="name the last")


def _ending(url: str, kind: str) -> str:
    """The ending of a file of a kind; where the kind says nothing, that of the URL. TaskError for a table of rows."""
    named = Path(urlsplit(url).path).suffix.lower()
    if kind in ROWS or (kind in (*VAGUE, "text/plain") and named in TABLES):
        raise TaskError(f"{url} is a table", expected="a page, a text, a PDF or a DOCX", found=kind or named,
                        do="save it as a file: each of its rows is a document")  # fmt: skip
    told = named if kind in (*VAGUE, "text/plain") and named in READERS else ""  # as raw files are sent
    return told or ENDINGS.get(kind, ".html")


def _document(url: str, kind: str, body: bytes) -> Document:
    """What was fetched, read as a file of its kind."""
    kind = kind.strip().lower()
    charset = re.search(r"charset=[\"']?([\w.:-]+)", kind)
    if charset and kind.startswith(("text/", "application/xhtml")):  # of other kinds it is said by habit
        body = decoded(body, charset[1], url)[0].encode("utf-8-sig")  # the mark says so to whoever reads the file
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"page{_ending(url, kind.partition(';')[0].strip())}"
        file.write_bytes(body)
        found, notes = _file(file, url, len(body))
    if not found:
        raise TaskError(f"{url} holds no text", expected="some", found="; ".join(notes), do="leave it out")
    title = url if found[0].title == "page" else found[0].title
    return replace(found[0], title=title)


# --- files ------------------------------------------------------------------------------------------------------------


INLINE = ("a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "del", "dfn", "em", "font", "i", "ins", "kbd", "mark",
          "q", "s", "samp", "small", "span", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr")  # fmt: skip
# What stands in a heading only because the page does not end it.
BLOCKS = ("p", "ul", "ol", "dl", "table", "pre", "section", "article", "main", "blockquote",
          *(f"h{n}" for n in range(1, 7)))  # fmt: skip
UNMARKED = re.compile(r"<!\[(?!(?:temp|cdata|ignore|include|rcdata|if|else|endif)(?![\w.-]))", re.IGNORECASE)
ASIDE = ("script", "style", "nav", "header", "footer", "noscript", "template")
WORD_XML = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
UNSAID = ("del", "moveFrom", "sdtPr", "sdtEndPr")  # in Word's XML: what was deleted or moved away, and settings
AROUND = ("ins", "moveTo", "sdt", "sdtContent", "customXml", "smartTag", "fldSimple")  # what stands around text


def _kept(text: str) -> str:
    """Markdown whose only headings and fences are on the lines that begin with OWN; text like them is moved in."""
    lines = ((line[:1] == OWN, line.replace(OWN, "")) for line in text.splitlines())
    return "\n".join(line if own or not (HEADING.match(line) or FENCE.match(line)) else f"    {line}"
                     for own, line in lines)  # fmt: skip


def _text(file: Path) -> str:
    return decoded(file.read_bytes(), "", file.name)[0]


def _plain(file: Path) -> str:
    return _kept(_text(file).replace(OWN, ""))


def _markdown(file: Path) -> str:
    """Markdown with every heading behind #: underlined ones, too, and the title among the fields before the text."""
    text = _text(file)
    if front := FRONT.match(text):
        title = TITLE.search(front[1])
        named = title[1].strip().strip("\"'").strip() if title else ""
        text = (f"# {named}\n\n" if named else "") + TITLE.sub("", front[1], 1) + "\n" + text[front.end() :]
    lines: list[str] = []
    fence, before = "", ""  # the line before the last one
    for line in text.splitlines():
        if mark := FENCE.match(line):
            fence = fence if fence and not mark[1].startswith(fence) else "" if fence else mark[1]
        last = lines[-1] if lines else ""
        if not fence and not before.strip() and PLAIN.match(last) and (under := UNDERLINE.match(line)):
            lines[-1] = f"{'#' if under[1][0] == '=' else '##'} {last.strip()}"
            continue
        before = last
        lines.append(line)
    return "\n".join(lines)


def _html(file: Path) -> str:
    """Headings and text of a page; scripts, styles, navigation and the page's own header and footer are left out."""
    soup, data = package("bs4", "rag"), file.read_bytes()
    declared = soup.dammit.EncodingDetector.find_declared_encoding(data, is_html=True) or ""
    if declared.lower().startswith(("utf-16", "utf-32")):  # it was read byte by byte, so it is not (WHATWG)
        declared = ""
    # The parser gives up on a page where these are none of the sections that it knows.
    text = UNMARKED.sub("&lt;![", decoded(data, declared, file.name)[0].replace(OWN, ""))
    try:
        page = soup.BeautifulSoup(text, "html.parser")
    except Exception as error:  # of its own kinds
        raise TaskError(f"{file.name} cannot be read", expected="HTML", found=str(error)[:120], do="save it anew"
                        ) from error  # fmt: skip
    head, kinds = page.title, (str, soup.NavigableString, soup.CData)  # and no comments
    title = " ".join(head.get_text().split()) if head else ""
    made = [f"{OWN}# {title}\n\n"] if title else []
    todo: list[Any] = [page]
    while todo:
        part = todo.pop()
        if isinstance(part, tuple):  # a heading's level, and where it began: it ends
            level, begin = part
            made[begin:] = [f"\n\n{OWN}{'#' * level} {' '.join(''.join(made[begin:]).split())}\n\n"]
        elif isinstance(part, str):
            made += [part] if type(part) in kinds else []
        elif part is head or (
            part.name in ASIDE and not (part.name == "header" and part.find_parent(["article", "main", "section"]))
        ):
            continue
        elif re.fullmatch("h[1-6]", part.name):
            said, rest = _heading(part)
            todo += [*reversed(rest), (min(6, int(part.name[1]) + 1), len(made)), *reversed(said)]
        else:
            edge = f"\n{OWN}```\n" if part.name == "pre" else "" if part.name in INLINE else "\n"
            todo += [edge, *reversed(part.contents), edge]
    return _kept("".join(made))


def _heading(part: Any) -> tuple[list[Any], list[Any]]:
    """What a heading says, and what stands in it only because the page closes it by another tag or not at all."""
    inner = list(part.contents)
    for n, child in enumerate(inner):
        block = child.name in BLOCKS or (child.name == "div" and child.find(BLOCKS))
        if block and any(one.get_text().strip() for one in inner[:n]):
            return inner[:n], inner[n:]
    return inner, []


def _pdf(file: Path) -> str:
    """The title or the file's name, and the text of every page, each behind a heading with its number."""
    pypdf = package("pypdf", "rag")
    try:
        opened = pypdf.PdfReader(str(file))
        title = str((opened.metadata and opened.metadata.title) or "").strip() or file.stem.replace("_", " ")
        pages = [page.extract_text() for page in opened.pages]
    except Exception as error:  # a broken file raises what it likes
        raise TaskError(f"{file.name} cannot be read", expected="a PDF", found=str(error)[:120], do="save it anew"
                        ) from error  # fmt: skip
    read = [BROKEN.sub("", text.replace(OWN, "").translate(LIGATURES)) for text in pages]
    told = [f"{OWN}## page {n}\n\n{text}" for n, text in enumerate(read, 1) if text.strip()]
    return _kept("\n\n".join([f"{OWN}# {' '.join(title.split())}", *told])) if told else ""


def _docx(file: Path) -> str:
    """Paragraphs and table rows as they come, tracked changes accepted; headings by their style."""
    lines: list[str] = []
    try:
        with zipfile.ZipFile(file) as packed:
            if (size := sum(one.file_size for one in packed.infolist())) > MOST_UNPACKED:
                raise TaskError(f"{file.name} is too large", expected=f"at most {MOST_UNPACKED / 1e6:.0f} MB unpacked",
                                found=f"{size / 1e6:.0f} MB", do="save a part")  # fmt: skip
        opened, xml = package("docx", "rag").Document(str(file)), package("lxml.etree", "rag")
        xml.strip_elements(opened.element.body, *(WORD_XML + tag for tag in UNSAID), with_tail=False)
        xml.strip_tags(opened.element.body, *(WORD_XML + tag for tag in AROUND))
        for block in opened.iter_inner_content():
            if hasattr(block, "rows"):
                lines += _lines(block)
            elif block.text.strip():
                style = getattr(block.style, "name", None) or ""  # a file need not say what its own style is
                head = re.match(r"Title|Heading (\d)", style)
                level = min(6, int(head[1] or 0) + 1) if head else 0
                lines.append(f"{OWN}{'#' * level} {' '.join(block.text.split())}" if level else block.text)
    except WhetError:
        raise
    except Exception as error:
        raise TaskError(f"{file.name} cannot be read", expected="a DOCX", found=str(error)[:120], do="save it anew"
                        ) from error  # fmt: skip
    return _kept("\n\n".join(lines))


def _lines(table: Any) -> list[str]:
    """The rows of a DOCX's table, merged cells once; a table within a cell stands in its row."""
    rows = [list({id(cell._tc): cell for cell in row.cells}.values()) for row in table.rows]
    return [" | ".join("\n".join("\n".join(_lines(block)) if hasattr(block, "rows") else block.text
                                 for block in cell.iter_inner_content()) for cell in cells)
            for cells in rows]  # fmt: skip


TABLES = (".jsonl", ".csv", ".parquet")
ROWS = ("text/csv", "application/csv", "application/json", "application/x-ndjson", "application/jsonl")
ENDINGS = {
    "application/pdf": ".pdf", "text/plain": ".txt", "text/markdown": ".md",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": ".docx",
}  # fmt: skip
VAGUE = ("", "application/octet-stream", "binary/octet-stream")
READERS: dict[str, Callable[[Path], str]] = {
    ".md": _markdown, ".txt": _plain, ".html": _html, ".htm": _html, ".pdf": _pdf, ".docx": _docx
}  # fmt: skip


# --- passages ---------------------------------------------------------------------------------------------------------


def passages(document: Document, words: int = WORDS, overlap: int | None = None) -> list[Passage]:
    """Cut a document into passages of at most `words` words, sentences whole where they fit, within one section.

    They are shorter where the embedder would not read so many words to the end. Each repeats the last `overlap` words
    or fewer (30, or a quarter of short ones), in whole sentences, of the one before it in its section.
    """
    overlap = min(OVERLAP, words // 4) if overlap is None else overlap
    most = min(2 * words, PIECES * max(words, WORDS) // WORDS)
    made: list[Passage] = []
    at, name = 0, _own(document)  # words of the document before the sentence at hand
    paged = PAGED.match(document.text)
    for headings, text, skipped in _sections(document.text):
        at += 0 if paged else skipped
        title = " / ".join(dict.fromkeys(part for part in (document.title, *headings) if part))
        room = most - min(most // 2, _pieces([title]))
        here: list[str] = []
        start, repeated = at, 0  # of `here`: where it begins, and how many of its words the last passage has, too
        for sentence in [*_sentences(text, words, room), []]:
            full = len(here) + len(sentence) > words or _pieces(here) + _pieces(sentence) > room
            if len(here) > repeated and (not sentence or full):
                made.append(Passage(document.id, title, _text_of(here), document.where, start, name))
                here = _tail(here, min(overlap, words - len(sentence)), min(2 * overlap, room - _pieces(sentence)))
                start, repeated = at - len(here), len(here)
            here = here + sentence
            at += len(sentence)
    return made


def _own(document: Document) -> str:
    """A document's title; empty where it is only the name of its file."""
    file, title = Path(document.id), " ".join(document.title.split())
    return "" if file.suffix.lower() in READERS and title == " ".join(file.stem.replace("_", " ").split()) else title


def _marked(text: str) -> Iterator[tuple[int, str, str]]:
    """The lines of a text, headings with their level; 0 for other lines, and for all of code between fences.

    What a heading says comes before its whole line.
    """
    fence = ""
    for line in text.splitlines():
        if mark := FENCE.match(line):
            fence = fence if fence and not mark[1].startswith(fence) else "" if fence else mark[1]
        found = None if fence else HEADING.match(line)
        said = found and (CLOSED.sub("", found[2].rstrip()).rstrip() or found[2])
        yield (len(found[1]), said, line) if found and said else (0, line, line)


def _sections(text: str) -> Iterator[tuple[list[str], str, int]]:
    """(headings, text, words of headings since the last one) of each section that has text.

    A heading with nothing below it is text itself.
    """
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    skipped = behind = 0  # `behind` what the last one says, where marks end it, too
    for level, said, line in [*_marked(text), (1, "", "")]:
        if not level:
            lines.append(line)
            continue
        if " ".join(lines).strip():
            yield [name for _, name in path], "\n".join(lines), skipped
            skipped = 0
        elif path and level <= path[-1][0]:
            yield [name for _, name in path[:-1]], path[-1][1], skipped - behind - len(path[-1][1].split())
            skipped = behind
        path, lines = [*(one for one in path if one[0] < level), (level, said)], []
        skipped += len(line.split())
        behind = len(line.split()) - 1 - len(said.split())


def _pieces(words: Sequence[str]) -> int:
    """About how many word pieces the embedder takes for words."""
    return sum(map(_pieces_of, words))


@lru_cache(maxsize=100_000)
def _pieces_of(word: str) -> int:
    return len(PIECE.findall(word))


def _sentences(text: str, words: int, room: int) -> Iterator[list[str]]:
    """The words of each sentence; one that is too long is cut, and so is a word of more than `room` pieces."""
    for sentence in SENTENCE.split(text):
        part: list[str] = []
        for word in (one for whole in sentence.split() for one in _cut(whole, room)):
            if part and (len(part) == words or _pieces(part) + _pieces_of(word) > room):
                yield part
                part = []
            part.append(word)
        if part:
            yield part


def _cut(word: str, room: int) -> list[str]:
    step = max(1, len(word) * room // max(room, _pieces_of(word)))
    return [word[at : at + step] for at in range(0, len(word), step)]


def _text_of(words: Sequence[str]) -> str:
    """Words as a text again; what Chinese and Japanese write without spaces gets none where it was cut."""
    return CUT.sub("", " ".join(words))


def _tail(words: list[str], most: int, room: int) -> list[str]:
    """The last sentences that are together at most so many words and pieces long."""
    for at in range(max(1, len(words) - most), len(words)):
        if words[at - 1][-1] in ENDS and _pieces(words[at:]) <= room:
            return words[at:]
    return []
