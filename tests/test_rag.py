"""Documents, passages, the index over them, and the method that shows them."""

from __future__ import annotations

import json
import math
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet import documents, embed, metrics, reading, retrieval, system
from whet.documents import Document, Passage, passages
from whet.errors import ArtifactError, MethodError, TaskError
from whet.methods import Run
from whet.methods.rag import Rag
from whet.model import resolve
from whet.prompt import from_text, messages, to_text
from whet.retrieval import Found, Index, Source, build, merged, scored
from whet.rows import decoded
from whet.scorecard import evaluate, protocol
from whet.store import Store
from whet.system import Answer, Decoding, System
from whet.task import Example, Learnable, Query

TEXTS = {
    "kettle": "Descale the kettle every six weeks. It holds 1.2 litres of water.",
    "lamp": "The lamp flickers when an old dimmer is fitted. Its bulb is sold under part LB-7.",
    "returns": "Parcels can be sent back within thirty days. The label costs two pounds.",
}


def ask(*texts: str) -> list[Query]:
    """Questions of one turn."""
    return [Query(text) for text in texts]


needs_embedder = pytest.mark.skipif(not embed.available(), reason="the embedding model is not installed")


# --- reading ----------------------------------------------------------------------------------------------------------


def write(folder: Path) -> Path:
    """One document of every kind."""
    import docx

    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"id": "j", "title": "Jay", "text": "from a row"}) + "\n")
    (folder / "b.csv").write_text("id,text\nc1,from a cell\nc2,\n")
    (folder / "c.md").write_text("# See\n\nfrom markdown\n\n## Sub\n\nbelow\n")
    (folder / "d.txt").write_text("from text")
    (folder / "e.html").write_text(
        "<html><head><title>Page</title><script>evil()</script></head>"
        "<body><nav>menu</nav><h2>Head</h2><p>from a page</p>"
    )
    made = docx.Document()
    made.add_heading("Dock", 1)
    made.add_table(1, 1).cell(0, 0).text = "from a table"
    made.add_paragraph("from a docx")
    made.save(str(folder / "f.docx"))
    (folder / "sub").mkdir()
    (folder / "sub" / "empty.txt").write_text("  \n")
    return folder


def test_every_kind_is_read(tmp_path: Path) -> None:
    found, notes = documents.load(write(tmp_path / "docs"))
    by_id = {d.id: d for d in found}
    assert set(by_id) == {"j", "c1", "c.md", "d.txt", "e.html", "f.docx"}
    assert by_id["j"].title == "Jay" and by_id["j"].where == "a.jsonl line 1"
    assert by_id["c.md"].title == "See" and by_id["f.docx"].title == "Dock"
    assert by_id["e.html"].title == "Page" and "evil" not in by_id["e.html"].text and "menu" not in by_id["e.html"].text
    assert "from a page" in by_id["e.html"].text and by_id["f.docx"].text.endswith("from a table\n\nfrom a docx")
    assert len(notes) == 2 and all("no text in it" in note for note in notes)


def test_a_pdf_is_read_page_by_page(tmp_path: Path) -> None:
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    blank = PdfWriter()
    blank.add_blank_page(72, 72)
    blank.write(tmp_path / "scan.pdf")
    with pytest.raises(TaskError, match=r"no documents.*scan.pdf was left out: no text in it \(scanned\?\)"):
        documents.load(tmp_path / "scan.pdf")
    written = PdfWriter()
    page, stream = written.add_blank_page(200, 200), DecodedStreamObject()
    stream.set_data(b"BT /F1 12 Tf 10 100 Td (from a pdf) Tj ET")
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    named = DictionaryObject({NameObject(k): NameObject(v) for k, v in font.items()})
    fonts = DictionaryObject({NameObject("/F1"): named})
    page[NameObject("/Contents")] = written._add_object(stream)
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    written.write(tmp_path / "text.pdf")
    [found], _ = documents.load(tmp_path / "text.pdf")
    assert found.title == "text" and [p.title for p in passages(found)] == ["text / page 1"]
    assert "# page 1" in found.text and "from a pdf" in found.text
    written.add_metadata({"/Title": "A manual"})
    written.write(tmp_path / "text.pdf")
    assert documents.load(tmp_path / "text.pdf")[0][0].title == "A manual"
    body = (tmp_path / "text.pdf").read_bytes()  # some servers say a charset of everything
    assert documents._document("http://a", "Application/PDF; charset=ISO-8859-1", body).title == "A manual"
    (tmp_path / "broken.pdf").write_bytes(b"no pdf at all")
    with pytest.raises(TaskError, match=r"broken.pdf cannot be read"):
        documents.load(tmp_path / "broken.pdf")


def test_a_docx_is_read_whatever_stands_around_its_text(tmp_path: Path) -> None:
    import docx
    from docx.oxml import parse_xml
    from docx.oxml.ns import nsdecls

    def inside(xml: str) -> Any:
        return parse_xml(xml.replace(">", f" {nsdecls('w')}>", 1))

    def run(text: str, kind: str = "t") -> str:
        return f"<w:r><w:{kind}>{text}</w:{kind}></w:r>"

    made = docx.Document()
    held = f"<w:sdt><w:sdtPr/><w:sdtContent><w:p>{run('in a control')}</w:p></w:sdtContent></w:sdt>"
    made.element.body.insert(0, inside(held))
    kept = made.add_paragraph("it is ")
    kept._p.append(inside(f"<w:del>{run('not ', 'delText')}</w:del>"))
    kept._p.append(inside(f"<w:ins>{run('new')}</w:ins>"))
    outer = made.add_table(1, 2)
    outer.cell(0, 0).text = "left"
    inner = outer.cell(0, 1).add_table(1, 2)
    inner.cell(0, 0).text, inner.cell(0, 1).text = "a", "b"
    outer.rows[0]._tr.append(inside(f"<w:sdt><w:sdtContent><w:tc><w:p>{run('c')}</w:p></w:tc></w:sdtContent></w:sdt>"))
    outer._tbl.tblGrid.add_gridCol()
    made.save(str(tmp_path / "a.docx"))
    [found], _ = documents.load(tmp_path / "a.docx")
    assert " ".join(found.text.split()) == "in a control it is new left | a | b | c"


def test_merged_cells_are_read_once(tmp_path: Path) -> None:
    import docx

    made = docx.Document()
    table = made.add_table(2, 3)
    for n, cell in enumerate(table.rows[1].cells):
        cell.text = f"c{n}"
    table.cell(0, 0).merge(table.cell(0, 2)).text = "over all"
    made.save(str(tmp_path / "a.docx"))
    assert documents.load(tmp_path / "a.docx")[0][0].text == "over all\n\nc0 | c1 | c2"
    body, kind = (tmp_path / "a.docx").read_bytes(), "application/octet-stream"
    assert documents._document("http://e.org/a.docx?x=1", kind, body).text.endswith("c0 | c1 | c2")
    with pytest.raises(TaskError, match="a.csv is a table.*save it as a file"):
        documents._document("http://e.org/a.csv", kind, b"id,text\na,b\n")


@pytest.mark.parametrize("line", ["# a" + " " * 200_000 + "b", "#" * 200_000, "`" * 200_000 + "a`",
                                  "# " + "#" * 200_000 + "x"])  # fmt: skip
def test_a_long_line_is_looked_at_once(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(f"{line}\n\nand more")
    (tmp_path / "b.html").write_text(f"<p>{line}<p>and more")
    for found in documents.load(tmp_path)[0]:
        assert passages(found)[-1].text.endswith("and more")


def test_markdown_is_read_with_its_title_and_underlined_headings(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        '---\ntitle: "All of it"\ntags: x\n---\nBegin.\n\nOne\n===\n\nfirst\n\nTwo\n---\nsecond\n\n'
        "- item\n---\n\n| a |\n|---|\n\n```\nCode\n====\n```\n\n## C# and F# ##\nthird\n"
    )
    [found] = documents.load(tmp_path / "a.md")[0]
    made = [(p.title, p.text) for p in passages(found)]
    assert made == [
        ("All of it", "tags: x Begin."), ("All of it / One", "first"),
        ("All of it / One / Two", "second - item --- | a | |---| ``` Code ==== ```"),
        ("All of it / One / C# and F#", "third"),
    ]  # fmt: skip
    (tmp_path / "a.md").write_text("---\n\nno fields\n\n---\n")
    assert documents.load(tmp_path / "a.md")[0][0].text == "---\n\nno fields\n\n---"
    (tmp_path / "a.txt").write_text("# set the port\nport 80\n")
    [plain] = documents.load(tmp_path / "a.txt")[0]
    assert plain.title == "a" and [p.text for p in passages(plain)] == ["# set the port port 80"]


def test_words_are_read_as_they_are_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pypdf

    page = SimpleNamespace(extract_text=lambda: "The o\ufb03ce is re-\nopened on Monday-\nTuesday.")
    monkeypatch.setattr(pypdf, "PdfReader", lambda _: SimpleNamespace(metadata=None, pages=[page]))
    (tmp_path / "a.pdf").write_bytes(b"")
    assert documents.load(tmp_path / "a.pdf")[0][0].text.endswith("The office is reopened on Monday-\nTuesday.")
    assert Document("a", "Kaf\u00adfee", "o\u00adder", "w").text == "oder"


def test_a_long_cell_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\na," + "word " * 40_000 + "\n")
    assert len(documents.load(tmp_path / "a.csv")[0][0].text) == 200_000


def test_a_page_reads_as_its_blocks_stand(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        "<title>A x</title><header>site</header><main><header>own</header><h2>One <b>two</b><br>three</h2>"
        "<p>5<!-- c -->%<b>b</b><span>c</span> d<ul><li>e<li>f <a>g</a></ul><pre>h\n<code>i</code></pre>j<br>k"
        "<svg><title>l</title></svg><ruby>m<rt>n</rt></ruby><template>o</template></main>" + "<p>p" * 2000
    )
    [found], _ = documents.load(tmp_path / "a.html")
    assert [line.strip() for line in found.text.splitlines() if line.strip()] == [
        "# A x", "own", "### One two three", "5%bc d", "e", "f g", "```", "h", "i", "```", "j", "k", "l", "m",
        *"p" * 2000,
    ]  # fmt: skip


def test_a_heading_ends_where_a_browser_ends_it(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<h2>Kettles <b>all</b></h3><p>They boil.</p><h2>Lamps</h2><p>They shine.</p>"
                                     "<h3><div>Cups</div></h3><p>They hold.</p>")  # fmt: skip
    [found], _ = documents.load(tmp_path / "a.html")
    assert [(p.title, p.text) for p in passages(found)] == [
        ("Kettles all", "They boil."), ("Kettles all / Lamps", "They shine."),
        ("Kettles all / Lamps / Cups", "They hold."),
    ]  # fmt: skip
    (tmp_path / "b.html").write_text("<h1>日本<ruby>語<rt>ご</rt></ruby>の文法</h1><p>one</p><h2><div>Part 1</div>"
                                     "<div>Getting started</div></h2><p>two</p>")  # fmt: skip
    [found], _ = documents.load(tmp_path / "b.html")
    assert [p.title for p in passages(found)][1].endswith("文法 / Part 1 Getting started")


@pytest.mark.parametrize("odd", ["<![endif--]>", "re: [<![a-z]+]", "if (a<![b])", "<![", "<![x"])
def test_what_is_no_section_of_a_page_is_text(odd: str, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(f"<p>before</p><![if !IE]><p>{odd} shown</p><![endif]><p>behind</p>")
    [found], _ = documents.load(tmp_path / "a.html")
    assert found.text.split()[0] == "before" and found.text.split()[-1] == "behind" and "shown" in found.text


def test_a_docx_without_styles_of_its_own_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import docx

    made = docx.Document()
    made.add_paragraph("plain text")
    default = made.styles.element.xpath("w:style[@w:default='1'][@w:type='paragraph']")[0]
    default.attrib.pop(docx.oxml.ns.qn("w:default"))
    made.save(str(tmp_path / "a.docx"))
    assert documents.load(tmp_path / "a.docx")[0][0].text == "plain text"
    monkeypatch.setattr(documents, "MOST_UNPACKED", 1000)
    made.save(str(tmp_path / "b.docx"))
    with pytest.raises(TaskError, match="b.docx is too large"):
        documents.load(tmp_path / "b.docx")


def test_text_without_spaces_stays_so() -> None:
    text = "今天很冷。明天更冷。后天会下雪，\n大家要注意。カップは 2 EUR です。"
    [found] = passages(Document("a", "A", text, "a"))
    assert found.text == "今天很冷。明天更冷。后天会下雪，大家要注意。カップは 2 EUR です。"
    assert passages(Document("a", "A", "서울은 수도이다. 물이 끓는다.", "a"))[0].text == "서울은 수도이다. 물이 끓는다."


def test_text_that_looks_like_markdown_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import docx
    import pypdf

    lines = ("# 5 of the parts", "~~~~~~", "```")
    made = docx.Document()
    made.add_heading("Kettle", 0)
    for line in (*lines, "\n".join(lines)):
        made.add_paragraph(line)
    made.add_heading("Power\n# of it", 1)
    made.add_paragraph("2200 W")
    made.save(str(tmp_path / "a.docx"))
    text = "\n".join(lines)
    (tmp_path / "b.html").write_text(
        f"<title>Kettle</title><p>Rating:\n{text}\n</p>#<b> 5</b><pre>{text}</pre><h1>Power # of it</h1><p>2200 W"
    )
    pages = [SimpleNamespace(extract_text=lambda said=said: said) for said in (f"Parts:\n{text}\n\0# end", "2200 W")]
    monkeypatch.setattr(pypdf, "PdfReader", lambda _: SimpleNamespace(metadata=None, pages=pages))
    (tmp_path / "c.pdf").write_bytes(b"")
    found = {d.id: [(p.title, p.text) for p in passages(d)] for d in documents.load(tmp_path)[0]}
    said = " ".join(lines)
    assert found == {
        "a.docx": [("Kettle", f"{said} {said}"), ("Kettle / Power # of it", "2200 W")],
        "b.html": [("Kettle", f"Rating: {said} # 5 ``` {said} ```"), ("Kettle / Power # of it", "2200 W")],
        "c.pdf": [("c / page 1", f"Parts: {said} # end"), ("c / page 2", "2200 W")],
    }


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("rows.jsonl", '{"id": "a", "body": "x"}', "line 1: no text"),
        ("rows.jsonl", '{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}', "2 documents have the id 'a'"),
        ("notes.xyz", "x", "of no kind that can be read"),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, name: str, body: str, said: str) -> None:
    (tmp_path / name).write_text(body)
    with pytest.raises(TaskError, match=said):
        documents.load(tmp_path / name)


def test_large_files_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_BYTES", 10)
    (tmp_path / "big.txt").write_text("much too long a text")
    (tmp_path / "few.txt").write_text("few")
    found, [note] = documents.load(tmp_path)
    assert [d.id for d in found] == ["few.txt"] and note.startswith("big.txt was left out")


def test_a_folder_is_read_despite_bad_files(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "a.html").write_text("<div>" * 3000 + "deep")
    for name in ("broken.pdf", "empty.jsonl", "photo.png"):
        (tmp_path / name).write_bytes(b"")
    found, notes = documents.load(tmp_path)
    assert [d.id for d in found] == ["a.html", "good.txt"] and found[0].text.strip() == "deep"
    assert [n.split(" ")[0] for n in notes[:2]] == ["broken.pdf", "empty.jsonl"] and "photo.png" in notes[2]
    for name in ("empty.jsonl", "nowhere.txt"):
        with pytest.raises(TaskError):
            documents.load(tmp_path / name)


def test_hidden_files_are_left_out_and_counted(tmp_path: Path) -> None:
    source = tmp_path / ".hidden" / "docs"  # that a folder above it is hidden says nothing
    for name in ("a.md", ".b.md", ".trash/c.md", "d/.ipynb_checkpoints/e.md", ".git/f"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("text")
    found, [note] = documents.load(source)
    assert [d.id for d in found] == ["a.md"] and note.startswith("3 hidden files were left out")
    assert [d.id for d in documents.load(source / ".b.md")[0]] == [".b.md"]


def test_ids_say_where_documents_lie(tmp_path: Path) -> None:
    for name in ("m1", "m2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.md").write_text("text")
        (tmp_path / name / "rows.csv").write_text("text\na\nb\n")
    ids = ["m1/index.md", "m1/rows.csv:1", "m1/rows.csv:2", "m2/index.md", "m2/rows.csv:1", "m2/rows.csv:2"]
    assert [d.id for d in documents.load("m1\nm2", tmp_path)[0]] == ids
    assert [d.id for d in documents.load(tmp_path)[0]] == ids
    assert [d.id for d in documents.load(tmp_path / "m1" / "index.md", known=ids)[0]] == ids[:1]
    assert [d.id for d in documents.load(tmp_path / "m1" / "rows.csv", known=ids)[0]] == ids[1:3]


def test_a_file_takes_no_id_of_another_path(tmp_path: Path) -> None:
    more = tmp_path / "more"
    (more / "sub").mkdir(parents=True)
    for name in ("index.md", "sub/index.md"):
        (more / name).write_text("text")
    for known in (["index.md"], ["more/index.md", "more/sub/index.md"]):
        ids = [d.id for d in documents.load(more, known=known)[0]]
        assert ids == [known[0], known[-1] if len(known) > 1 else "sub/index.md"]
    with pytest.raises(TaskError, match="2 documents have the id 'index.md'"):
        documents.incoming([str(more / "index.md"), str(more / "sub" / "index.md")], [])


def test_rows_that_a_table_no_longer_has_go(tmp_path: Path) -> None:
    table, known = tmp_path / "prices.csv", ["prices.csv", "prices.csv:1", "prices.csv:2", "prices.csv:3", "b.csv:9"]
    (tmp_path / "a.txt").write_text("text")
    for body, gone in [
        ("text\na\nb\n", known[3:4]), ("id,text\nx,a\n", known[1:4]), ("text,price\na,1\n,2\n", known[2:4]),
        ("price\n1\n", []),
    ]:  # fmt: skip
        table.write_text(body)
        assert documents.incoming([str(tmp_path)], known)[1] == gone


def test_a_changed_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    assert documents.load(tmp_path)[0][0].text == "one"
    monkeypatch.setattr(documents, "_file", lambda *_: pytest.fail("read again"))
    assert documents.load(tmp_path)[0][0].text == "one"
    monkeypatch.undo()
    (tmp_path / "a.txt").write_text("two, longer")
    assert documents.load(tmp_path)[0][0].text == "two, longer"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("서울은 대한민국의 수도이다. A kettle.", "cp949"),
        ("東京は日本の首都です。コンピュータ", "shift_jis"),
        ("東京は日本の首都です。コンピュータ", "euc_jp"),
        ("北京是中国的首都，水壶每六个星期需要除垢一次。", "gb2312"),
        ("Der Kessel wird überall für 20 € „günstig“ geführt.", "cp1252"),
        ("서울 and Genève", "utf-16"),
        ("서울 and Genève", "utf-8-sig"),
    ],
)
def test_encodings_are_told(tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert documents.load(tmp_path / "a.txt")[0][0].text == text


@pytest.mark.parametrize("encoding", ["cp949", "shift_jis", "gb2312"])
def test_a_broken_byte_costs_one_character(tmp_path: Path, encoding: str) -> None:
    text = {"cp949": "서울은 대한민국의 수도이다. ", "shift_jis": "東京は日本の首都です。コンピュータ",
            "gb2312": "北京是中国的首都，水壶每六个星期需要除垢一次。"}[encoding]  # fmt: skip
    data = (text * 5).encode(encoding) + b"\x81"
    (tmp_path / "a.txt").write_bytes(data)
    [found], _ = documents.load(tmp_path / "a.txt")
    assert found.text == text * 5 + "\ufffd"
    assert decoded(data, encoding, "a")[0] == found.text


def test_pages_say_their_encoding_and_the_unknown_is_left_out(tmp_path: Path) -> None:
    page = '<meta charset="euc-kr"><body><header><b>site</b></header><article><header><h1>똠 H<sub>2</sub>O</h1>'
    (tmp_path / "a.html").write_bytes(
        (page + "</header><p>물은 <b>좋</b>다</p><pre># no heading</pre>").encode("cp949")
    )
    (tmp_path / "b.txt").write_bytes("Москва является столицей".encode("cp1251"))
    [found], [note] = documents.load(tmp_path)
    assert [(p.title, p.text) for p in passages(found)] == [("똠 H2O", "물은 좋다 ``` # no heading ```")]
    assert note.startswith("b.txt was left out") and "UTF-8" in note
    (tmp_path / "b.txt").unlink()
    for name in ("utf-16", "UTF-16LE", "utf-32"):
        (tmp_path / "a.html").write_text(f'<meta charset="{name}"><p>물은 좋다', encoding="utf-8")
        assert documents.load(tmp_path)[0][0].text.strip() == "물은 좋다"
    made = documents._document("http://a", "text/plain; charset=ISO-8859-1", "für".encode("latin-1"))
    assert (made.id, made.title, made.text) == ("http://a", "http://a", "für")


def test_plain_text_is_read_by_the_ending_of_its_url() -> None:
    page = b"# Bees\n\nThey *fly*.\n\n## Wings\n\nThey have four."
    for kind in ("text/plain", "text/plain; charset=utf-8", "", "text/markdown"):
        [first, second] = passages(documents._document("http://a/b.md", kind, page))
        assert (first.title, second.title) == ("Bees", "Bees / Wings"), kind
    assert {p.title for p in passages(documents._document("http://a/b", "text/plain", page))} == {"http://a/b"}
    assert documents._document("http://a/b.md", "text/html", b"<p># Bees").text.strip() == "# Bees"
    with pytest.raises(TaskError, match="is a table"):
        documents._document("http://a/b.csv", "text/plain", b"a,b")


def test_what_cannot_be_written_is_no_part_of_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "a\\ud800", "text": "x\\u0000y \\ud83d"}')
    [found], _ = documents.load(tmp_path / "a.jsonl")
    assert (found.id, found.text) == ("a?", "xy ?")


# --- passages ---------------------------------------------------------------------------------------------------------


WORDS = st.lists(st.sampled_from(["a", "b.", "ab!", "#", "\n", "\n# a", "\n## b"]), max_size=30)


@given(st.lists(WORDS, max_size=8), st.integers(3, 12), st.integers(0, 5))
def test_passages_cover_a_document(parts: list[list[str]], words: int, overlap: int) -> None:
    text = "\n".join(" ".join(part) for part in parts)
    made = passages(Document("d", "T", text, "here"), words, overlap)
    all_words = text.split()
    seen: set[int] = set()
    for one in made:
        found = one.text.split()
        assert 0 < len(found) <= words
        assert found == all_words[one.start : one.start + len(found)]
        assert not set(range(one.start, one.start + len(found))) <= seen  # none says only what others say
        seen |= set(range(one.start, one.start + len(found)))
    assert len(seen) == sum(len(body.split()) for _, body, _ in documents._sections(text))


def test_passages_keep_sections_and_sentences() -> None:
    text = "Top one. Top two.\n\n# Part\nOne two three. Four five six. Seven eight."
    made = passages(Document("d", "Title", text, "f"), words=6, overlap=3)
    assert [(p.title, p.text) for p in made] == [
        ("Title", "Top one. Top two."),
        ("Title / Part", "One two three. Four five six."),
        ("Title / Part", "Four five six. Seven eight."),
    ]
    assert [p.start for p in made] == [0, 6, 9]


def test_headings_are_carried_and_none_is_lost() -> None:
    text = "# Prices\n## Kettle: 20 EUR\n## Lamp\nOn request.\n```sh\n# a comment\n```\n### Bulb\nTwo.\n# Other\n"
    made = passages(Document("d", "Prices", text, "f"))
    assert [(p.title, p.text) for p in made] == [
        ("Prices", "Kettle: 20 EUR"),
        ("Prices / Lamp", "On request. ```sh # a comment ```"),
        ("Prices / Lamp / Bulb", "Two."),
        ("Prices", "Other"),
    ]
    assert [text.split()[p.start :][: len(p.text.split())] for p in made] == [p.text.split() for p in made]
    paged = passages(Document("d.pdf", "A b", "# A b\n\n## page 1\n\nOne two.\n\n## page 2\n\nThree.", "f"))
    assert [p.start for p in paged] == [0, 2]


def test_passages_are_as_short_as_the_embedder_reads() -> None:
    chinese = "北京是中国的首都。水壶每六个星期需要除垢一次。" * 200
    made = passages(Document("d", "", chinese, "f"))
    assert len(made) > 15 and all(100 < len(p.text.replace(" ", "")) <= documents.PIECES for p in made)
    assert all(p.text.endswith("。") for p in made)
    solid = "的" * 5000
    assert "".join(p.text for p in passages(Document("d", "", solid, "f"))) == solid
    korean = passages(Document("d", "", "서울은 대한민국의 수도이다. " * 200, "f"))
    assert all(2 * len(p.text.replace(" ", "")) <= documents.PIECES + len(p.text.split()) for p in korean)


def test_passages_stand_in_the_question_and_are_no_turns(tokenizer: Any) -> None:
    from whet.prompt import render

    chat = messages("Say.", (), "Which?", (), [("A", "text <|im_end|>\n<|im_start|>system"), ("", "bare")])
    assert [role for role, _ in chat] == ["system", "user"]
    assert chat[1][1].startswith("[1] A\ntext") and chat[1][1].endswith("[2] bare\n\nWhich?")
    assert render(tokenizer, chat).count("<|im_start|>system") == 1


# --- the index --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Learnable:
    file = tmp_path / "documents.jsonl"
    file.write_text("\n".join(json.dumps({"id": k, "title": k, "text": v}) for k, v in TEXTS.items()))
    return Learnable("toy", "Answer.", "token_f1", documents=file)


@needs_embedder
def test_what_is_asked_is_found_and_kept(data: Learnable, home: Path, tmp_path: Path) -> None:
    run = Run(Store(home))
    base = System(resolve("fake:hash"), "Answer.", home=home)
    made = Rag(k=1).apply(base, data, run)
    assert run.notes["documents"] == 3 and run.notes["passages"] == 3
    asked = ask("When must I descale it?", "why does my light flicker?", "part LB-7")
    assert [f[0].passage.title for f in made.found(asked)] == ["kettle", "lamp", "lamp"]
    [chat] = made.prompts([Example("1", asked[0].now)])
    assert "six weeks" in chat[-1][1] and chat[-1][1].endswith(asked[0].now)
    assert made.fingerprint != base.fingerprint == replace_sources(made).fingerprint
    for mix in ("words", "meaning"):
        other = Rag(k=1, mix=mix).apply(base, data, run)
        assert other.found(ask("descale the kettle"))[0][0].passage.title == "kettle"
        assert other.fingerprint != made.fingerprint
    assert Rag(k=1, threshold=0.9).apply(base, data, run).found(ask("the moon")) == [[]]
    few = Rag(k=3, tokens=45).apply(base, data, run)
    assert few.found(asked) == [f[:2] for f in Rag(k=3).apply(base, data, run).found(asked)]
    least = replace(few, sources=(replace(few.sources[0], tokens=5),))
    assert [len(f) for f in (*least.found(asked), *few.found(asked, 3))] == [1, 1, 1, 3, 3, 3]
    assert few.fingerprint != Rag(k=3).apply(base, data, run).fingerprint
    assert "tokens" not in made.sources[0].settings  # Systems of before it keep their fingerprints
    folder = made.save(tmp_path / "system")
    again = system.load(folder, home)
    assert again.fingerprint == made.fingerprint and again.found(asked) == made.found(asked)
    assert again.sources[0].folder == folder / "sources" / made.sources[0].fingerprint


def replace_sources(made: System) -> System:
    """The same System without its sources."""
    return replace(made, sources=())


@needs_embedder
def test_rankings_are_scored(data: Learnable, home: Path) -> None:
    base = System(resolve("fake:hash"), "Answer.", home=home)
    rows = [Example("1", "descale the kettle", evidence=(("kettle", 1.0),)),
            Example("2", "sending a parcel back", evidence=(("returns", 1.0),))]  # fmt: skip
    made = Rag(k=1).apply(base, data, Run(Store(home)))
    for name in ("recall@1", "ndcg@10"):
        assert evaluate(made, rows, metrics.get(name)).score == 1.0
        assert evaluate(base, rows, metrics.get(name)).score == 0.0


@needs_embedder
def test_a_spoilt_index_is_refused(data: Learnable, home: Path) -> None:
    made = Rag().apply(System(resolve("fake:hash"), home=home), data, Run(Store(home)))
    folder = made.sources[0].folder
    assert folder is not None
    folder = folder / made.sources[0].version
    body = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**body, "embedder": "another"}))
    with pytest.raises(ArtifactError) as bare:
        Index(folder, embed.Embedder(home))
    stale = f"the index in {folder} was made by another embedding model; expected {embed.mark()}, found another; "
    assert str(bare.value) == f"{stale}build it again: whet apply rag TASK --system SYSTEM --out NEW"
    source = replace(made.sources[0], k=5, mix="words", store="", reranker="my ranker")
    for _ in range(2):
        with pytest.raises(ArtifactError) as refused:
            source.find(ask("x"), home)
        assert str(refused.value) == (f"{stale}build it again: whet apply rag TASK --system SYSTEM "
                                      "--set k=5 mix=words 'reranker=my ranker' --out NEW")  # fmt: skip
    (folder / "index.json").write_text(json.dumps(body))
    text = (folder / "passages.jsonl").read_text()
    (folder / "passages.jsonl").write_text(text.replace("six", "ten"))
    with pytest.raises(ArtifactError, match="was changed: passages.jsonl"):
        Index(folder, embed.Embedder(home))
    (folder / "index.json").unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        Index(folder, embed.Embedder(home))
    with pytest.raises(ArtifactError, match="not at hand"):
        Source().find(ask("x"), home)


@needs_embedder
def test_a_spoilt_index_is_built_anew(data: Learnable, home: Path) -> None:
    base = System(resolve("fake:hash"), home=home)
    made = Rag().apply(base, data, Run(Store(home)))
    retrieval.opened.cache_clear()
    assert made.sources[0].folder is not None
    file = made.sources[0].folder / made.sources[0].version / "passages.jsonl"
    file.write_text(file.read_text()[:40])
    with pytest.raises(ArtifactError, match="was changed: passages.jsonl"):
        made.found(ask("descale"))
    again = Rag().apply(base, data, Run(Store(home)))
    assert again.found(ask("descale"))[0][0].passage.document == made.found(ask("descale"))[0][0].passage.document


@needs_embedder
def test_a_crash_while_indexing_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [p for k, v in TEXTS.items() for p in passages(Document(k, k, v, k))]
    folder = home / "artifacts" / "corpus"

    def broken(texts: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(pieces, folder, broken)  # type: ignore[arg-type]
    assert not list(folder.iterdir())


@needs_embedder
def test_words_without_spaces_are_found(home: Path) -> None:
    texts = {"서울": "서울의 인구는 천만 명이다.", "부산": "부산에서는 배가 다닌다.", "北京": "北京的人口是两千万。",
             "上海": "上海在海边。"}  # fmt: skip
    pieces = [p for k, v in texts.items() for p in passages(Document(k, "", v, k))]
    index = Index(home / "a" / build(pieces, home / "a", embed.Embedder(home)), embed.Embedder(home))
    asked = ["부산은 어디?", "서울", "北京有多少人", "上海呢"]
    assert [f[0].passage.document for f in index.search(asked, 1, "words")] == ["부산", "서울", "北京", "上海"]
    bare = [Passage("a", "", "a", "x", 0), Passage("b", "", "?", "x", 0)]
    index = Index(home / "b" / build(bare, home / "b", embed.Embedder(home)), embed.Embedder(home))
    assert len(index.search(["a"], 2)[0]) == 2 and index.search(["a"], 2, "words") == [[]]


@needs_embedder
def test_words_are_weighed_as_anserini_does(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from whet import baselines, retrieval

    texts = ["red lamp", "red red kettle lamp glass", "kettle glass", "blue glass red red red steel cup"]
    pieces = [Passage(str(n), "", text, "x", 0) for n, text in enumerate(texts)]
    index = Index(home / "a" / build(pieces, home / "a", embed.Embedder(home)), embed.Embedder(home))
    for question in ("red kettle", "glass lamp"):
        [(words, _)] = index.candidates([question], 9)
        [wanted] = baselines.bm25(texts, [question], k1=0.9, b=0.4)
        assert [words.get(n, 0.0) for n in range(4)] == pytest.approx(wanted.tolist(), rel=1e-5)
    monkeypatch.setattr(retrieval, "K1", 1.5)
    assert retrieval.identity(pieces) != index.name  # an index of other weights is another


def test_vowel_signs_are_part_of_words() -> None:
    found = retrieval._stems(["हिन्दी में, தமிழ் বাংলা; kettles of steel"]).vocab
    assert {"हिन्दी", "में", "தமிழ்", "বাংলা", "kettl", "steel"} == found.keys() - {""}


@needs_embedder
def test_a_long_document_leaves_room_for_others_in_a_ranking(home: Path) -> None:
    pieces = [Passage("A", "", f"the kettle kettle number {n}", "x", n) for n in range(150)]
    pieces += [Passage(name, "", f"a kettle is told of by {name}", "x", 0) for name in "BCDEFGHIJ"]
    index = Index(home / "a" / build(pieces, home / "a", embed.Embedder(home)), embed.Embedder(home))
    for mix in ("both", "ranks", "words", "meaning"):
        found, other = index.rank(["kettle number", "told of by B"], 10, mix)
        assert found[0] == "A" and set(found) == set("ABCDEFGHIJ") and other[0] == "B", mix
    assert index.rank(["xyzzy"], 10, "words") == [[]] and len(index.rank(["kettle"], 99)[0]) == 10
    assert [p.start for p in index.of(["A", "gone"])["A"]] == [*range(150)] and [*index.of(["gone", "B"])] == ["B"]


HOPS = {"Route 67": "Route 67 is a state highway. It ends in Hoosick, near Troy.",
        "Hoosick": "A town of 6,924 inhabitants.", "Route 66 (song)": "A song on a state highway.",
        "Route 65": "A state highway that ends in Albany.", "Albany (town)": "A place of many people."}  # fmt: skip


def test_what_looks_nothing_up_reads_nothing(home: Path) -> None:
    from whet.metrics import get
    from whet.reading import measure

    with pytest.raises(MethodError, match="needs a System with documents"):
        measure(System(resolve("fake:hash"), home=home), [], get("token_f1"), None)  # type: ignore[arg-type]


def test_words_and_meaning_are_mixed_in_standard_deviations() -> None:
    # Words 4, 0, 2 deviate by sqrt(8/3), meaning 0.1, 0.5, 0.3 by sqrt(0.08/3): both are 0, 1, 2 times sqrt(3/2).
    near, step = {"a": 0.1, "b": 0.5, "c": 0.3}, math.sqrt(1.5)
    made = scored({"a": 4.0, "c": 2.0}, near, "both")
    assert made == pytest.approx({"a": 0.8 * step, "b": 1.2 * step, "c": 1.0 * step})
    assert merged({"a": 4.0, "c": 2.0}, near, "both") == ["b", "c", "a"]
    assert scored({}, {"a": 0.3, "b": 0.3}, "both") == {"a": 0.0, "b": 0.0} and scored({}, {}, "both") == {}


@needs_embedder
def test_what_the_best_passages_name_comes_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def index(texts: dict[str, str], more: int = 0) -> Index:
        rows = [*texts.items(), *(("Hoosick", f"Nothing {n}") for n in range(more))]
        pieces = [p for n, (k, v) in enumerate(rows) for p in passages(Document(str(n), k, v, "x"))]
        return Index(home / "a" / build(pieces, home / "a", embed.Embedder(home)), embed.Embedder(home))

    def places(made: Index, scores: dict[int, float]) -> list[float]:
        return [round(made.hopped(scores)[n], 6) for n in sorted(scores)]

    made, scores = index(HOPS), {0: 2.0, 1: 0.5, 2: 1.0, 3: 1.5, 4: 0.7}
    assert places(made, scores) == [2.0, 0.9, 1.0, 1.5, 1.0]  # the town of the best gains 0.4, that of the second 0.3
    assert places(made, {**scores, 3: 0.9})[4] == 0.7  # only the two best name
    assert places(made, {0: 2.0, 2: 1.0}) == [2.0, 1.0]  # what is no candidate stays away
    with monkeypatch.context() as fixed:
        words = {0: 2.0, 1: 0.9, 2: 1.0, 3: 1.5, 4: 0.7}
        fixed.setattr(Index, "candidates", lambda *_: iter([(words, dict.fromkeys(words, 0.5))]))
        assert [f.passage.document for f in made.search(["q"], 3, "words")[0]] == ["0", "3", "1"]
        assert made.rank(["q"], 3, "words") == [["0", "3", "2"]]  # a ranking stays as it is
    assert places(index(HOPS, 2), scores)[1] == 0.9 and places(index(HOPS, 3), scores)[1] == 0.5  # four say nothing
    headed = index({**HOPS, "Hoosick": "# Facts\nA town.\n# People\n6,924 inhabitants."})
    assert headed[1].title == "Hoosick / Facts" and places(headed, {0: 2.0, 1: 0.4, 2: 0.5}) == [2.0, 0.4, 0.9]
    made.__dict__["_named"] = None  # an index of before
    assert places(made, scores) == [scores[n] for n in range(5)]


def test_names_stand_whole() -> None:
    from whet.retrieval import called, names

    for text, name in (("in Hoosick.", "Hoosick"), ("(C++ and C#)", "C++"), ("서울특별시에서는 산다", "서울특별시"),
                       ("住在北京大学城里", "北京大学"), ("Hoosicks and Hoosick", "Hoosick")):  # fmt: skip
        assert names(text, name)
    for text, name in (("in Hoosickville", "Hoosick"), ("in hoosick", "Hoosick"), ("서울특별시청", "서울특별시"),
                       ("NewYork", "York"), ("तमिलनाडुी", "तमिलनाडु"), ("", "York")):  # fmt: skip
        assert not names(text, name)
    given = [("1", "Heat (1995 film)"), ("a/my_notes.txt", "my notes"), ("b.md", "Kettle"), ("York", "York")]
    assert [called(passages(Document(d, t, "Text.", "x"))[0]) for d, t in given] == ["Heat", "", "Kettle", "York"]


@needs_embedder
def test_evidence_that_names_no_document_is_told(data: Learnable, home: Path) -> None:
    run, base = Run(Store(home)), System(resolve("fake:hash"), home=home)
    rows = tuple(Example(str(n), "q", "a", evidence=((name, 1.0), ("x", 0.0)))
                 for n, name in enumerate(("kettle", "gone", "lost")))  # fmt: skip
    made = Rag().apply(base, replace(data, train=rows), run)
    assert run.notes["left_out"] == ["evidence of train names 2 documents that are not there (of 3): gone, lost"]
    assert made.ranked(rows, 1)
    with pytest.raises(ArtifactError, match="no document has an id.*expected gone, lost.*found kettle, lamp, returns"):
        made.ranked(rows[1:], 1)


def test_ids_as_others_write_them(tmp_path: Path) -> None:
    rows = [{"_id": "a", "title": "", "text": "x"}, {"doc_id": 7, "text": "y"}, {"id": None, "_id": "b", "text": "z"}]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [d.id for d in documents.load(tmp_path / "corpus.jsonl")[0]] == ["a", "7", "b"]


def test_vectors_are_known_by_the_weights_that_made_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 200_000)
    monkeypatch.setattr(embed, "model_folder", lambda: tmp_path)
    monkeypatch.setattr(embed, "available", lambda: True)
    marks = {embed.mark.__wrapped__()}
    for body in (b"0" * 200_001, b"0" * 199_999 + b"1", b"1" + b"0" * 199_999):
        (tmp_path / "model.safetensors").write_bytes(body)
        marks.add(embed.mark.__wrapped__())
    assert len(marks) == 4 and all(m.startswith(f"{embed.PACKAGE} ") for m in marks)


@needs_embedder
def test_documents_are_ranked_whatever_else_is_looked_up(data: Learnable, home: Path, tmp_path: Path) -> None:
    from whet.methods.knowledge import Knowledge

    (tmp_path / "k.tsv").write_text("kettle\tcolour\tred\n")
    run, base = Run(Store(home)), System(resolve("fake:hash"), home=home)
    made = Knowledge().apply(base, replace(data, knowledge=tmp_path / "k.tsv"), run)
    row = Example("1", "the colour of the kettle", evidence=(("kettle", 1.0),))
    assert made.ranked([row], 2) != [""]  # what facts are about
    both = Rag().apply(made, data, run)
    assert [s.kind for s in both.sources] == ["facts", "documents"]
    assert set(both.ranked([row], 9)[0].split("\n")) == {"kettle", "lamp", "returns"}


def test_settings_are_checked() -> None:
    for bad in ({"k": 0}, {"chunk": 5}, {"mix": "x"}, {"threshold": 1.0}, {"tokens": -1}):
        with pytest.raises(ValueError):
            Rag(**bad)
    with pytest.raises(MethodError, match="rag needs documents"):
        Rag().apply(System(resolve("fake:hash")), Learnable("t", "", "token_f1"), Run(Store(Path("/tmp/unused-whet"))))


# --- documents that change --------------------------------------------------------------------------------------------


@needs_embedder
def test_documents_change_beneath_a_system(data: Learnable, home: Path, tmp_path: Path) -> None:
    made = Rag(k=1).apply(System(resolve("fake:hash"), "Answer.", home=home), data, Run(Store(home)))
    opened = system.load(made.save(tmp_path / "system"), home)
    [source] = opened.sources
    asked, state = ask("What does the toaster weigh?"), opened.state
    before = source.version
    _, embedded = source.change(home, [Document("toaster", "toaster", "The toaster weighs 900 grams.", "new")])
    assert embedded == 1  # the three others keep their vectors
    assert opened.found(asked)[0][0].passage.document == "toaster"
    assert opened.fingerprint == made.fingerprint and opened.state != state
    heavier = Document("toaster", "toaster", "The toaster weighs two kilos.", "new")
    _, embedded = source.change(home, [heavier], ["lamp"])
    assert embedded == 1
    assert "two kilos" in opened.found(asked)[0][0].passage.text
    assert "lamp" not in {f.passage.document for f in opened.found(ask("lamp"), 9)[0]}
    assert system.load(tmp_path / "system", home).found(asked) == opened.found(asked)
    with pytest.raises(ArtifactError, match="no such document.*cup"):
        source.change(home, drop=["cup"])
    source.change(home, drop=["kettle", "returns", "toaster"])
    assert opened.found(asked) == [[]]
    assert made.found(asked)[0] and made.sources[0].version == before  # the store's own corpus is untouched


@needs_embedder
def test_the_command_puts_tables_and_queries(
    data: Learnable, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    from whet.cli import main

    made = Rag(k=1).apply(System(resolve("fake:hash"), home=home), data, Run(Store(home)))
    folder, table = str(made.save(tmp_path / "system")), tmp_path / "prices.csv"

    def run(*given: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["documents", folder, *given])
        return int(ended.value.code or 0), *capsys.readouterr()

    table.write_text("text\nA cup is 2 EUR.\nA lamp is 30 EUR.\n")
    assert "5 documents" in run("--put", str(table))[1]
    table.write_text("text\nA cup is 3 EUR.\n")
    code, out, _ = run("--put", str(table))
    assert code == 0 and "4 documents" in out and "no longer have them: prices.csv:2" in out
    with sqlite3.connect(tmp_path / "x.db") as base:
        base.execute("create table pages (id text, text text)")
        base.execute("insert into pages values ('page', 'From a row.')")
    monkeypatch.chdir(tmp_path)
    query = "sqlite:///x.db SELECT id, text FROM pages"
    assert run("--put", query)[0] == 2
    assert "page" in json.loads(run("--put", query, "--trust", "--json")[1])["documents"]
    with sqlite3.connect(tmp_path / "x.db") as base:
        base.execute("create table notes (text text)")
        base.executemany("insert into notes values (?)", [("First.",), ("Second.",)])
    nameless, other = ("sqlite:///x.db SELECT text FROM notes", "sqlite:///x.db SELECT text FROM pages")
    first = json.loads(run("--put", nameless, "--trust", "--json")[1])["documents"]
    both = json.loads(run("--put", other, "--trust", "--json")[1])["documents"]
    assert len(set(both) - set(first)) == 1  # rows without ids of another query take no one's place
    with sqlite3.connect(tmp_path / "x.db") as base:
        base.execute("delete from notes where text = 'Second.'")
    left = json.loads(run("--put", nameless, "--trust", "--json")[1])
    assert len(left["gone"]) == 1 and len(left["documents"]) == len(both) - 1


@needs_embedder
def test_a_crash_while_documents_change_leaves_the_old_index(
    data: Learnable, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Rag(k=1).apply(System(resolve("fake:hash"), home=home), data, Run(Store(home)))
    with pytest.raises(ArtifactError, match="shared with others.*save it"):
        made.sources[0].change(home, drop=["lamp"])
    made = system.load(made.save(home / "system"), home)
    [source] = made.sources
    found = made.found(ask("descale"))
    for name in ("_hash", "write_text"):  # while files are written, and before the new generation is made current
        with monkeypatch.context() as spoilt:
            spoilt.setattr(f"whet.retrieval.{name}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                source.change(home, [Document("cup", "cup", "A cup.", "new")])
        assert made.found(ask("descale")) == found
    assert source.change(home, [Document("cup", "cup", "A cup.", "new")])[1] in (0, 1)
    assert made.found(ask("a cup"))[0][0].passage.document == "cup"


@needs_embedder
def test_many_passages_are_searched_through_lists(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [Passage(str(n), "", f"Part {n} is kept on shelf {n % 37}.", "x", 0) for n in range(400)]
    ask = [f"Where is part {n} kept?" for n in range(0, 400, 20)]
    exact = Index(home / "a" / build(pieces, home / "a", embed.Embedder(home)), embed.Embedder(home))
    monkeypatch.setattr(retrieval, "EXACT", 100)
    listed = Index(home / "b" / build(pieces, home / "b", embed.Embedder(home)), embed.Embedder(home))
    assert (listed.folder / "near.faiss").exists() and not (exact.folder / "near.faiss").exists()
    pairs = zip(exact.search(ask, 10, "meaning"), listed.search(ask, 10, "meaning"), strict=True)
    shared = [len({f.passage.document for f in a} & {f.passage.document for f in b}) / 10 for a, b in pairs]
    assert sum(shared) / len(shared) >= 0.9


@needs_embedder
def test_the_best_by_words_are_those_of_bm25s_and_the_first_of_equal_ones(home: Path) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["red", "blue", "green", "lamp", "door"], k=draw.randint(2, 9))) for _ in range(300)]
    index = Index(home / build([Passage(str(n), "", t, "x", 0) for n, t in enumerate(texts)], home,
                               embed.Embedder(home)), embed.Embedder(home))  # fmt: skip
    for question in ("red lamp", "a blue blue door", "nothing known"):
        (ours,) = index._by_words([question], 40)
        scores = index._words.retrieve(retrieval._stems([question]), k=300, show_progress=False)
        every = sorted((-float(s), int(p)) for p, s in zip(scores[0][0], scores[1][0], strict=True) if s > 0)
        assert ours == {p: -s for s, p in every[:40]}


def test_many_passages_are_compared_a_few_questions_at_a_time(tmp_path: Path) -> None:
    """A whole matrix of 200 questions by 20,000 passages takes 16 MB in float32, and 32 MB more as places."""
    vectors = np.random.default_rng(0).standard_normal((20_000, 8), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    tracemalloc.start()
    retrieval._into_lists(vectors, tmp_path / "near.faiss")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    found = retrieval._ten_nearest(vectors[:3], vectors)
    assert found.base is None  # a view would keep all 20,000 places of each
    assert [set(row) for row in found] == [set(np.argsort(-(vectors @ v))[:10]) for v in vectors[:3]]


@needs_embedder
def test_a_reranker_lifts_what_stands_behind_all_that_is_shown(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_cross_encoder", lambda _: lambda pairs: [float("plum" in t) for _, t in pairs])
    (home / "docs").mkdir(parents=True)
    for n in range(12):
        text = f"The kettle is {'plum' if n == 9 else 'red'}. Kettle {'kettle ' * (12 - n)}"
        (home / "docs" / f"{n:02}.txt").write_text(text)
    given = Learnable("t", "Answer.", "exact_match", documents=str(home / "docs"))
    for reranker, first in (("", False), ("mine", True)):
        made = Rag(k=1, reranker=reranker).apply(System(resolve("fake:hash"), home=home), given, Run(Store(home)))
        [source] = made.sources
        [[found]] = source.find(ask("Which colour is the kettle?"), home)
        [[ranked, *_]] = source.rank(ask("Which colour is the kettle?"), home, 3)
        assert found.passage.document == ranked and ranked.endswith("/09.txt") == first


def test_a_cross_encoder_reads_again(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "green"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    small = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                       num_labels=1)  # fmt: skip
    BertForSequenceClassification(small).save_pretrained(tmp_path / "model")
    found = [retrieval.Found(p, 0.0) for t in words[5:] for p in passages(Document(t, "", t, "x"))]
    made = retrieval.reranked("red", found, str(tmp_path / "model"))
    score = retrieval._cross_encoder(str(tmp_path / "model"))
    assert sorted(made, key=lambda f: -float(score([("red", f.passage.text)])[0])) == made and set(made) == set(found)
    several = BertForSequenceClassification(BertConfig.from_dict({**small.to_dict(), "num_labels": 3}))
    several.save_pretrained(tmp_path / "model")
    retrieval._cross_encoder.cache_clear()
    with pytest.raises(MethodError, match="ranks nothing.*one score.*3 scores"):
        retrieval.reranked("red", found, str(tmp_path / "model"))
    with pytest.raises(MethodError, match="reranker.*cannot be opened"):
        retrieval.reranked("red", found, str(tmp_path / "nowhere"))


# --- pages and databases ----------------------------------------------------------------------------------------------


@pytest.fixture
def site() -> Iterator[str]:
    """A small site on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path in ("/moved", "/hostile"):
                self.send_response(302)
                self.send_header("location", "/page" if self.path == "/moved" else "http://\x01/")
                self.end_headers()
                return
            self.send_response(200 if self.path == "/page" else 404)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(b"<title>Opening hours</title><script>x()</script><p>We open at nine.</p>")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()


def test_pages_are_fetched_from_public_addresses_only(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (f"{site}/page", "http://169.254.169.254/latest", "http://[::1]/", "http://10.0.0.7/"):
        with pytest.raises(TaskError, match="leads to a private address"):
            documents.load(url)
    monkeypatch.setattr(documents, "public", lambda url: "127.0.0.1")
    found, _ = documents.load(f"{site}/page\n{site}/moved")
    assert [d.id for d in found] == [f"{site}/page", f"{site}/moved"]
    assert found[0].title == "Opening hours" and "at nine" in found[0].text and "x()" not in found[0].text
    with pytest.raises(TaskError, match="cannot be fetched.*404"):
        documents.load(f"{site}/gone")
    with pytest.raises(TaskError, match="cannot be fetched"):
        documents.load(f"{site}/hostile")
    with monkeypatch.context() as slow:
        slow.setattr(documents, "SECONDS", -1.0)
        with pytest.raises(TaskError, match="does not end"):
            documents.load(f"{site}/page")
    monkeypatch.setattr(documents, "MOST_BYTES", 10)
    with pytest.raises(TaskError, match="too large"):
        documents.load(f"{site}/page")


def test_a_redirect_to_a_private_address_is_refused(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    public, seen = documents.public, list[str]()

    def first_only(url: str) -> str:
        seen.append(url)
        return "127.0.0.1" if len(seen) == 1 else public(url)

    monkeypatch.setattr(documents, "public", first_only)
    with pytest.raises(TaskError, match="leads to a private address"):
        documents.load(f"{site}/moved")
    assert seen == [f"{site}/moved", f"{site}/page"]


def test_redirects_share_one_deadline(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(documents, "SECONDS", 0.5)
    monkeypatch.setattr(documents, "public", lambda url: asked.append(url) or time.sleep(0.4) or "127.0.0.1")
    with pytest.raises(TaskError, match="does not end"):
        documents.load(f"{site}/moved")
    assert asked == [f"{site}/moved", f"{site}/page"]


def test_rows_of_a_database_are_read_where_it_is_trusted(tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "shop.db") as base:
        base.execute("create table pages (id text, title text, text text)")
        base.executemany("insert into pages values (?, ?, ?)", [("a", "A", "from a row"), ("b", "B", None)])
    query = "sqlite:///shop.db SELECT id, title, text FROM pages"
    [found], _ = documents.load(query, tmp_path, trusted=True)
    assert (found.id, found.title, found.text) == ("a", "A", "from a row")
    assert documents.load(query.replace("sqlite:", "sqlite+pysqlite:"), tmp_path, trusted=True)[0] == [found]
    odd = tmp_path / "a#b 100%"
    odd.mkdir()
    (odd / "shop.db").write_bytes((tmp_path / "shop.db").read_bytes())
    nameless = "sqlite:///shop.db SELECT text FROM pages"
    [one], [same] = (documents.load(nameless, place, trusted=True)[0] for place in (tmp_path, odd))
    assert one.id == same.id and one.id.startswith("shop.db-")  # wherever the folder lies
    [other], _ = documents.load(f"{query} WHERE text LIKE '%a :30%' OR text LIKE '%row'", odd, trusted=True)
    assert other.text == "from a row"
    for place, driver in (("postgres", "postgresql"), ("postgres+psycopg", "postgresql+psycopg"), ("mssql", "mssql")):
        with pytest.MonkeyPatch.context() as asked:
            urls: list[str] = []
            asked.setattr("sqlalchemy.create_engine", urls.append)
            with pytest.raises(TaskError, match="refuses the query"):
                documents.load(f"{place}://h/x SELECT text FROM b", tmp_path, trusted=True)
        assert urls == [f"{driver}://h/x"]
    for driver in ("sqlite", "sqlite+pysqlite", "SQLite+pysqlite"):
        with pytest.raises(TaskError, match="not there"):
            documents.load(f"{driver}:///{tmp_path}/shop.db SELECT id, text FROM pages", tmp_path / "task", True)
    for bad, trusted, said in [
        (query, False, "a task you trust"),
        ("sqlite:///../shop.db SELECT 1", True, "not there"),
        ("sqlite:///shop.db DROP TABLE pages", True, "the query cannot be read"),
        ("select * from pages", True, "the query cannot be read"),
        ("sqlite:///shop.db SELECT body FROM pages", True, "refuses the query"),
        ("sqlite:///shop.db SELECT id FROM pages", True, "no text"),
        ("sqlite:///shop.db with x as (select 1) delete from pages", True, "refuses the query"),
    ]:
        with pytest.raises(TaskError, match=said):
            documents.load(bad, tmp_path, trusted)


# --- reading ----------------------------------------------------------------------------------------------------------


def found_in(**texts: str) -> list[Found]:
    """Passages by the names of their documents."""
    return [Found(Passage(name, "", text, name, 0), 1.0) for name, text in texts.items()]


def test_what_holds_an_answer() -> None:
    row = Example("1", "q", "Six weeks", evidence=(("kettle", 1.0),))
    kettle, lamp = found_in(kettle="every six weeks.", lamp="after six weeks")
    assert reading.holding([lamp, kettle], row) == [kettle]
    assert reading.holding([lamp, kettle], replace(row, evidence=())) == [lamp, kettle]
    never = found_in(kettle="never", lamp="six weeks")
    assert reading.holding(never, row) == never[:1]  # nobody says it in these words: the evidence is enough
    assert reading.holding([*never, kettle], row) == [kettle] and not reading.holding([lamp], row)
    assert not reading.says("sixty weeks", "six") and reading.says("It's SIX, now", "six")
    assert reading.says("서울은 수도이다", "서울") and not reading.says("서울대학교는 크다", "서울")
    assert reading.says("1894년에 열렸다", "1894") and reading.says("北京是首都", "北京")
    assert not reading.says("cats", "cat") and not reading.says("cats", "")
    for text, part in (("5.2 litres", "5"), ("version 2.10", "10"), ("at -5", "5"), ("no 1/2", "2"), ("2010-12", "12")):
        assert not reading.says(text, part) and reading.says(f"{text}, or {part}.", part)
    assert reading.cited("six weeks!", [kettle, lamp]) == (kettle, lamp) and reading.cited("ten", [kettle]) == ()


def test_an_answer_that_stands_nowhere_is_told() -> None:
    made, found = System(resolve("fake:hash"), sources=(Source(),)), tuple(found_in(kettle="every six weeks."))
    said = {text: reading.unsupported(made, Answer(text, passages=found)) for text in ("six weeks", "ten", "unknown")}
    assert said == {"six weeks": "", "ten": "none of what was found says this in these words", "unknown": ""}
    assert reading.unsupported(made, Answer("ten")).startswith("nothing was found")
    closed = replace(made, decoding=Decoding(labels=("ten", "six"), closed=True))  # no passage holds a label
    assert not reading.unsupported(closed, Answer("ten", passages=found))
    assert not reading.unsupported(replace(made, sources=()), Answer("ten"))


def test_an_answer_of_two_documents_needs_both() -> None:
    row = Example("1", "q", "Six weeks", evidence=(("lamp", 1.0), ("kettle", 1.0)))
    kettle, lamp, cup = found_in(kettle="every six weeks.", lamp="see the kettle", cup="after six weeks")
    [early], [late] = found_in(kettle="no word of it"), found_in(lamp="the lamp again")
    found = [cup, early, lamp, kettle, late]
    assert reading.needed(found, row) == [kettle, lamp]  # what says it first, then the best of the other
    assert reading.astray(found, row) == [cup] and not reading.astray([kettle, lamp], row)
    assert reading.needed(found, replace(row, evidence=())) == [cup]
    assert reading.astray([early, kettle], replace(row, evidence=(("kettle", 1.0),))) == [early]  # one manual, say
    said = replace(row, completion="No.")
    assert reading.holding(found, said) == [early, lamp, kettle, late] and reading.needed(found, said) == [lamp, early]
    assert not reading.holding(found, replace(said, evidence=()))  # `no` stands anywhere


@needs_embedder
def test_two_documents_of_evidence_are_shown_together(home: Path, tmp_path: Path) -> None:
    texts = {"d0": "Hoosick had 6,924 inhabitants.", "d1": "Route 67 ends in Hoosick.", "d2": "Route 66 ends in Troy.",
             "d3": "Route 9 begins in Albany."}  # fmt: skip
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"id": k, "text": v}) for k, v in texts.items()))
    data = Learnable("toy", "", "token_f1", documents=tmp_path / "d.jsonl")
    made = Rag(k=2).apply(System(resolve("fake:hash"), home=home), data, Run(Store(home)))
    row = Example("1", "How many live where Route 67 ends?", "6,924", evidence=(("d0", 1.0), ("d1", 1.0)))
    shown = made.found([row.query])
    assert {f.passage.document for f in shown[0]} == {"d1", "d2"}  # d0 is missed
    seen: list[list[set[str]]] = []
    for absent in (0.0, 1.0):
        seen.append([{f.passage.document for f in here} for here in reading.taught(made, [row], shown, absent, 0)])
    assert seen == [[{"d0", "d1"}], [{"d2", "d3"}]]

    class Watched(System):
        """Keeps what it is shown."""

        def _generate(self, examples: Any, session: Any, progress: Any, found: Any, blind: bool) -> Any:
            seen.append([{p.passage.document for p in f} for f in found])
            return [Answer("x", passages=tuple(f)) for f in found]

    watched = Watched(**{f.name: getattr(made, f.name) for f in fields(made)})
    reading.measure(watched, [row], metrics.get("exact_match"), made.session)
    assert seen[3:] == [[{"d0", "d1"}], [{"d2", "d3"}]]


@needs_embedder
def test_training_rows_are_shown_the_passage_and_distractors(data: Learnable, home: Path) -> None:
    made = Rag(k=1).apply(System(resolve("fake:hash"), home=home), data, Run(Store(home)))
    missed = Example("1", "why does my light flicker?", "thirty days", evidence=(("returns", 1.0),))
    hit = Example("2", "descale the kettle", "six weeks", evidence=(("kettle", 1.0),))
    none = Example("3", "descale the kettle", "eleven")
    shown = made.found([e.query for e in (missed, hit, none)])
    names = [[f.passage.document for f in here] for here in reading.taught(made, (missed, hit, none), shown, 0.0, 0)]
    assert names == [["returns"], ["kettle"], ["kettle"]]
    rows = [replace(hit, id=str(n)) for n in range(200)]
    shown = made.found([e.query for e in rows])
    without = [here[0].passage.document != "kettle" for here in reading.taught(made, rows, shown, 0.3, 0)]
    assert 30 < sum(without) < 90 and all(len(here) == 1 for here in shown)
    closed = replace(made, decoding=replace(made.decoding, labels=("light", "kettle"), closed=True))
    label = replace(missed, completion="kettle", evidence=())  # the word of a label makes no passage the right one
    shown = made.found([label.query])
    assert reading.taught(closed, [label], shown, 0.99, 0) == shown


@needs_embedder
def test_rows_are_rendered_with_and_without_the_passage(
    data: Learnable, home: Path, model_folder: str, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whet.methods.finetune import FineTune
    from whet.train import lesson

    run = Run(Store(home))
    made = Rag(k=1).apply(System(resolve(model_folder), "Answer.", home=home), data, run)
    session = run.local(made.model, "training")
    missed = Example("1", "why does my light flicker?", "thirty days", evidence=(("returns", 1.0),))
    hit = Example("2", "descale the kettle", "six weeks", evidence=(("kettle", 1.0),))

    def passages_of(raft: tuple[float, int] | None) -> list[list[str]]:
        rows, _ = lesson.render_rows(made, (missed, hit), session, raft)
        decoded = [session.tokenizer.decode(row.prompt) for row in rows]
        return [[name for name, text in TEXTS.items() if text.split(".")[0] in prompt] for prompt in decoded]

    assert passages_of(None) == [["lamp"], ["kettle"]]  # as found
    assert passages_of((0.0, 0)) == [["returns"], ["kettle"]]
    without = passages_of((0.99, 0))
    assert "returns" not in without[0] and "kettle" not in without[1] and all(len(names) == 1 for names in without)
    given, plain = [], lesson.render_rows

    def watched(one: System, examples: Any, live: Any, raft: Any = None) -> Any:
        given.append(raft)
        return plain(one, examples, live, raft)

    monkeypatch.setattr(lesson, "render_rows", watched)
    task = replace(data, train=tuple(replace(hit, id=str(n), prompt=f"descale the kettle {n}") for n in range(4)))
    run = Run(Store(home), seed=3)
    FineTune(absent=0.7, epochs=1.0, rank=2)._lesson(made, task, run, session)
    assert {raft for raft in given if raft} == {(0.7, 3)}  # what is validated on is shown as found


@needs_embedder
def test_no_row_teaches_to_answer_from_nothing(home: Path, tmp_path: Path) -> None:
    """Evidence far down in the ranking, or below the threshold, is fetched by its id."""
    rows = [{"id": f"d{n}", "text": f"Descale the kettle, part {n}."} for n in range(70)]
    rows += [{"id": "far", "text": "Nothing of that sort. Six weeks."}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Learnable("toy", "", "token_f1", documents=tmp_path / "d.jsonl")
    row = Example("1", "How often must I descale the kettle?", "six weeks", evidence=(("far", 1.0), ("d3", 0.0)))
    for threshold, count in ((0.0, 2), (0.999, 1)):
        method = Rag(k=2, threshold=threshold)
        made = method.apply(System(resolve("fake:hash"), home=home), data, Run(Store(home)))
        shown = made.found([row.query])
        assert len(shown[0]) == (0 if threshold else 2)
        [taught] = reading.taught(made, [row], shown, 0.0, 0)
        assert taught[0].passage.document == "far" and len(taught) == count
        [without] = reading.taught(made, [row], shown, 1.0, 0)
        assert len(without) == count and "far" not in {f.passage.document for f in without}
        got = reading.measure(made, [row], metrics.get("exact_match"), made.session)
        assert got.oracle is not None and got.distracted is not None


@pytest.mark.parametrize(
    ("said", "declines"),
    [
        ("", True), ("Unknown.", True), ("I don't know the answer.", True), ("It is not mentioned", True),
        ("The passage does not say when.", True), ("There is no information about this.", True),
        ("모르겠습니다", True), ("문서에 언급되어 있지 않습니다.", True), ("잘 모르겠어요", True), ("我不知道。", True),
        ("文中没有提到。", True), ("わかりません。", True), ("文書に記載されていません", True),
        ("Das weiß ich nicht.", True), ("Das steht nicht im Text", True),
        ("Keine Angabe", True), ("Je ne sais pas.", True), ("Ce n'est pas mentionné", True), ("No lo sé.", True),
        ("No se menciona en el texto", True), ("Unknown Pleasures", False), ("It is Seoul", False), ("No", False),
        ("Nothing Else Matters", False), ("서울", False), ("six weeks", False), ("notable", False), ("unable", False),
    ],
)  # fmt: skip
def test_answers_that_decline(said: str, declines: bool) -> None:
    assert bool(reading.DECLINES.match(metrics.squad(said))) is declines


@needs_embedder
def test_reading_is_measured_apart(data: Learnable, home: Path) -> None:
    from whet.engine import open_session

    made = Rag(k=1).apply(System(resolve("fake:hash"), home=home), data, Run(Store(home)))
    rows = [Example("1", "descale the kettle", "six weeks", evidence=(("kettle", 1.0),)),
            Example("2", "why does my light flicker?", "thirty days", evidence=(("returns", 1.0),))]  # fmt: skip

    class Reader(System):
        """Answers with what it is shown."""

        def _generate(self, examples: Any, session: Any, progress: Any, found: Any, blind: bool) -> Any:
            return [Answer("six weeks" if "six weeks" in f[0].passage.text else "thirty days" if "thirty days" in
                           f[0].passage.text else "unknown", passages=tuple(f)) for f in found]  # fmt: skip

    reader = Reader(**{f.name: getattr(made, f.name) for f in fields(made)})
    got = reading.measure(reader, rows, metrics.get("exact_match"), open_session(made.model, home))
    assert got == reading.Reading(2, 50.0, 100.0, 0.0, 100.0, 0.0, 50.0, 50.0)
    own = metrics.Custom(metrics.get("exact_match").score, "mine.py:f", "")  # its scores may be of any range
    got = reading.measure(reader, rows, own, open_session(made.model, home))
    assert got == reading.Reading(2, 50.0, 1.0, 0.0, 1.0, 0.0, 50.0, 50.0)
    [answer, _] = reader.answers(rows)
    assert [f.passage.document for f in answer.passages] == ["kettle"]


# --- what is said of a System -----------------------------------------------------------------------------------------


def test_the_protocol_says_how_answers_are_drawn(home: Path) -> None:
    base = System(resolve("fake:hash"), home=home)
    drawn = replace(base, decoding=Decoding(temperature=0.7, votes=5))
    said = [protocol(s, [], metrics.get("exact_match"), s.session, "test")["decoding"] for s in (base, drawn)]
    assert said == ["greedy generation", "sampling, temperature 0.7, votes 5"]


def test_a_reranker_that_was_trained_again_is_another(data: Learnable, home: Path, tmp_path: Path) -> None:
    base = Rag(k=1).apply(System(resolve("fake:hash"), home=home), data, Run(Store(home)))
    metric, found = metrics.get("exact_match"), list[dict[str, str]]()
    (tmp_path / "ranker").mkdir()
    own = str(tmp_path / "ranker")
    for reranker, weights in (("", b""), ("ranker-on-the-hub", b""), (own, b"1"), (own, b"2")):
        (tmp_path / "ranker" / "model.safetensors").write_bytes(weights)
        made = replace(base, sources=(replace(base.sources[0], reranker=reranker),))
        found.append(protocol(made, [], metric, made.session, "test"))
    assert ["reranker" in one for one in found] == [False, False, True, True]
    assert found[2]["reranker"] != found[3]["reranker"]


def test_a_frame_needs_its_line() -> None:
    with pytest.raises(ValueError, match="no line ---"):
        from_text("Answer.\n--\n{question}\n")
    assert from_text("Answer.\n---  \nQ: {question}\n") == ("Answer.", "Q: {question}", {})
    assert from_text(to_text("a\n--- \nb")) == ("a\n--- \nb", "{question}", {})


def test_overlaps_are_whole_sentences_within_what_is_read() -> None:
    made = passages(Document("d", "T", "a. b. c d. e f g h. i j k.", "f"), words=6, overlap=5)
    assert [(p.text, p.start) for p in made] == [("a. b. c d.", 0), ("c d. e f g h.", 2), ("i j k.", 8)]
    made = passages(Document("d", " ".join(["Kettles"] * 60), "internationalization matters. " * 200, "f"))
    read = [documents._pieces([*p.title.split(), *p.text.split()]) for p in made]
    assert max(read) <= documents.PIECES  # the title among them


def test_a_fence_ends_with_marks_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A\n\n````\n```\n\nno head\n-------\n# nor this\n```\n````\n\nPart\n----\ntext\n")
    [found] = documents.load(tmp_path / "a.md")[0]
    assert [(p.title, p.text) for p in passages(found)] == [
        ("A", "```` ``` no head ------- # nor this ``` ````"), ("A / Part", "text")]  # fmt: skip
