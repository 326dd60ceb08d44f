"""SPARQL endpoints: a snapshot of what a query selects, page by page, kept for a day; never asked while answering."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from whet.errors import TaskError
from whet.extras import package, pinned, public, within
from whet.store import write_text
from whet.triples import Triple, term_triples

Row = tuple[Any, Any, Any]  # RDF terms
ALL = "SELECT ?s ?p ?o WHERE { ?s ?p ?o } ORDER BY ?s ?p ?o"
PAGE, MOST_ROWS = 10_000, 100_000
SECONDS, CONNECT = 30.0, 10.0  # that a page may take
ALTOGETHER = 600.0  # seconds that all pages may take
MOST_BYTES = 100 << 20  # of a page
FRESH = 86_400.0  # seconds for which a snapshot is taken from disk
HERE = ("localhost", "127.0.0.1", "::1")  # a server of this machine is asked only where the task names it so


def snapshot(source: str, trusted: bool, home: Path, notes: list[str]) -> list[Triple]:
    """The triples of "sparql:URL [QUERY]" or a bare URL; the query selects ?s ?p ?o, by default everything.

    Raises TaskError without trust, for private addresses, and where the endpoint fails or is too slow.
    """
    url, query = [*source.removeprefix("sparql:").split(maxsplit=1), "", ""][:2]  # a query has lines of its own
    query = query.strip() or ALL
    if not trusted:
        raise TaskError(f"the endpoint {url} is asked over the network", expected="a task you trust", found="no trust",
                        do="look at it, then add --trust")  # fmt: skip
    key = json.dumps([url, query, "rows"])  # the last line is their number
    file = home / "snapshots" / f"{hashlib.sha256(key.encode()).hexdigest()}.jsonl"
    if not file.exists() or time.time() - file.stat().st_mtime > FRESH:
        found, count = _pages(url, query)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in (*found, [count])))
    *lines, last = (json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line)
    made, rows = [(s, p, o) for s, p, o in lines], int(last[0])
    day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(file.stat().st_mtime))
    cut = f"; only the first {MOST_ROWS} rows" if rows >= MOST_ROWS else ""
    if rows > PAGE and not _ends(query, r"(?:order\s+by|limit\s+\d+)"):
        cut += "; in no fixed order, so rows may be missing: end the query with ORDER BY ?s ?p ?o"
    notes.append(f"{url}: a snapshot of {len(made)} triples of {day} UTC{cut}")
    return made


def _pages(url: str, query: str) -> tuple[list[Triple], int]:
    """All pages of a query's answer, at most MOST_ROWS rows, and their number; one with its own LIMIT is asked once.

    Rows that leave something unbound are no triples, but count.

    A server may give fewer rows than it is asked for, so that only an empty page is the end, or one that begins as the
    last did. What is short of a page is asked for up to its end, since some sort no more rows than those of a page.
    Blank nodes are told apart by page: what each answer calls them holds within it alone.
    """
    rdf = package("pyoxigraph", "knowledge")
    made: list[Triple] = []
    page: list[Row] = []
    once, at, begun = _ends(query, r"limit\s+\d+"), 0, time.monotonic()
    while at < MOST_ROWS:
        if time.monotonic() - begun > ALTOGETHER:
            raise TaskError(f"{url} does not come to an end", expected=f"all rows within {ALTOGETHER:g} s",
                            found=f"{at} rows", do="select less (sparql:URL QUERY), or load a dump")  # fmt: skip
        some = f"{query}\nLIMIT {PAGE - at % PAGE} OFFSET {at}"
        last, page = page, _rows(url, query if once else some)
        if not page or page[:1] == last[:1]:
            break
        for row in page[: MOST_ROWS - at]:
            made += term_triples(rdf, *row, f"{at}-{{}}".format)
        at += len(page)
        if once:
            break
    return made, at


def _ends(query: str, clause: str) -> bool:
    """Whether a query has a clause behind its pattern; those of queries within it say nothing of its rows."""
    return re.search(rf"\b{clause}\b", query.rpartition("}")[2], re.IGNORECASE) is not None


def _rows(url: str, query: str) -> list[Row]:
    """One page."""
    import httpx

    rdf = package("pyoxigraph", "knowledge")
    head = {"Accept": "application/sparql-results+json", "User-Agent": "whet"}
    asked: dict[str, Any] = {"url": url} if urlsplit(url).hostname in HERE else pinned(url, public(url))
    head |= asked.pop("headers", {})
    time_limit = httpx.Timeout(SECONDS, connect=CONNECT)

    def fetched(client: httpx.Client) -> bytes:
        body = bytearray()
        with client.stream("POST", **asked, data={"query": query}, headers=head, timeout=time_limit) as answer:
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise httpx.DecodingError(f"more than {MOST_BYTES >> 20} MiB")
        if answer.status_code != 200:  # a redirect, too: it could lead to a private address
            raise httpx.DecodingError(f"status {answer.status_code}")
        return bytes(body)

    try:
        rows = rdf.parse_query_results(within(SECONDS, fetched), format=rdf.QueryResultsFormat.JSON)
        return [(row["s"], row["p"], row["o"]) for row in rows]
    except (httpx.TimeoutException, TimeoutError) as error:
        raise TaskError(f"{url} does not answer", expected=f"a page within {SECONDS:g} s", found="none",
                        do="select less (sparql:URL QUERY), or load a dump") from error  # fmt: skip
    except (httpx.HTTPError, httpx.InvalidURL, SyntaxError, ValueError, KeyError, TypeError) as error:
        raise TaskError(f"{url} gave no usable answer", expected="rows of ?s ?p ?o as SPARQL JSON",
                        found="".join(c for c in str(error) if c.isprintable())[:120] or type(error).__name__,
                        do="see what it answers to the query") from error  # fmt: skip
