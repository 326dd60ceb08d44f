"""Corpora in a database, for those who outgrow one machine: PostgreSQL with pgvector, and Qdrant.

Both answer as the index on disk does: by words and by meaning, merged the same way. Passwords are not part of a URL,
which a System carries: PostgreSQL takes PGPASSWORD or ~/.pgpass, Qdrant QDRANT_API_KEY.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from whet.documents import Document, Passage, passages
from whet.embed import DIMENSIONS, Embedder, mark
from whet.errors import ArtifactError, MethodError, rebuilt
from whet.extras import package
from whet.retrieval import WORD, Corpus, paired, shown

BLOCK = 256  # passages written, and questions asked, at once
FIELDS = ("document", "title", "text", "place", "start")


class Database(Corpus[Any]):
    """A corpus by its name in a database; `write` is a transaction, `alone` a lock, where that has such."""

    def __init__(self, name: str, embedder: Embedder) -> None:
        self.name, self.embedder = name, embedder
        self.cache: dict[Any, Passage] = {}

    def __getitem__(self, key: Any) -> Passage:
        return self.cache[key]

    @property
    def version(self) -> str:
        """Which state of the corpus answers now; empty where there is no such corpus.

        Raises ArtifactError where another model embedded it.
        """
        model, _, version = self.state.rpartition(" ")
        if version and model != mark():
            raise ArtifactError(f"the corpus {self.name} was made by another embedding model", expected=mark(),
                                found=model or "none named", do=rebuilt("rag"))  # fmt: skip
        return version

    @property
    @abstractmethod
    def state(self) -> str:
        """What `write` named the corpus last: its embedding model, a space, and the version."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While no other run changes or fills the corpus, where the database can say so."""
        yield

    @abstractmethod
    def write(self, rows: Sequence[tuple[Passage, Any]], gone: Collection[str], state: str) -> None:
        """Take out the documents `gone`, put passages with their vectors in, and name the state that results."""

    @abstractmethod
    def kept(self, documents: Collection[str]) -> list[tuple[Passage, Any]]:
        """The passages of these documents with their vectors, in their order."""

    def of(self, documents: Collection[str]) -> dict[str, list[Passage]]:
        """The passages of these documents, where they are there."""
        made: dict[str, list[Passage]] = {}
        for passage, _ in self.kept(documents):
            made.setdefault(passage.document, []).append(passage)
        return made

    def build(self, pieces: Sequence[Passage], version: str) -> None:
        """Fill a corpus that has no version yet; what a crash left in it goes first."""
        if left := self.ids():
            self.write((), left, "")
        for at in range(0, max(1, len(pieces)), BLOCK):
            some = pieces[at : at + BLOCK]
            last = at + BLOCK >= len(pieces)
            vectors = self.embedder([shown(p) for p in some])
            self.write(list(zip(some, vectors, strict=True)), (), f"{mark()} {version}" if last else "")

    def change(self, put: Iterable[Document], drop: Iterable[str], words: int) -> tuple[str, int]:
        """Put documents in and drop others, as `retrieval.change`."""
        new, gone = list(put), list(drop)
        pieces = [p for d in new for p in passages(d, words)]
        with self.alone():  # what is read here is what is replaced: of two changes at once, one comes after the other
            if unknown := sorted(set(gone) - set(self.ids())):
                raise ArtifactError("no such document", expected="ids of documents", found=", ".join(unknown[:5]),
                                    do="see `whet documents SYSTEM`")  # fmt: skip
            gone = [*dict.fromkeys([*gone, *(d.id for d in new)])]
            old = {shown(p): vector for p, vector in self.kept(gone)}
            fresh = [t for t in dict.fromkeys(shown(p) for p in pieces) if t not in old]
            old.update(zip(fresh, self.embedder(fresh), strict=True))
            said = [self.version, gone, [asdict(p) for p in pieces]]
            version = hashlib.sha256(repr(said).encode()).hexdigest()
            self.write([(p, old[shown(p)]) for p in pieces], gone, f"{mark()} {version}")
        return version, len(fresh)


@lru_cache(maxsize=4)
def opened(url: str, made: str, home: Path) -> Database:
    """The corpus that a generation's passages were put into. Raises MethodError for a URL of no kind that is known."""
    parts = urlsplit(url)
    if parts.password:
        raise MethodError("the store's URL holds a password, and every copy of the System would, too",
                          expected="none", do="set PGPASSWORD, write ~/.pgpass, or set QDRANT_API_KEY")  # fmt: skip
    kinds: dict[str, Callable[..., Database]] = {"postgresql": Postgres, "qdrant": Qdrant, "qdrants": Qdrant}
    if parts.scheme not in kinds:
        raise MethodError(f"{url!r} is no store", expected="postgresql://… or qdrant://…", do="correct it")
    if not re.fullmatch("[0-9a-f]{16,64}", made):  # it names a table
        raise ArtifactError("the System's documents have no name", expected="a hash", found=made[:40], do="restore it")
    return kinds[parts.scheme](url, f"whet_{made[:16]}", Embedder(home))


def filled(url: str, version: str, pieces: Sequence[Passage], home: Path) -> str:
    """What the corpus of these passages is opened by; it is filled where there is none.

    One that was changed since keeps its name, for Systems look into it; the passages go into one beside it.
    """
    made = version
    while True:
        base = opened(url, made, home)
        with base.alone():  # of two runs that would fill it, the second finds it filled
            if not base.version:
                base.build(pieces, version)
            if base.version == version:
                return made
        made = hashlib.sha256(made.encode()).hexdigest()


class Postgres(Database):
    """PostgreSQL: pgvector's HNSW for meaning, its own full-text ranking (English) for words."""

    def __init__(self, url: str, name: str, embedder: Embedder) -> None:
        super().__init__(name, embedder)
        self.url = url

    @cached_property
    def _connection(self) -> Any:
        try:
            made = package("psycopg", "postgres").connect(self.url, autocommit=True, connect_timeout=10)
            with made.transaction():  # one at a time: PostgreSQL checks that a table is not there before it makes it
                made.execute("select pg_advisory_xact_lock(hashtext('whet_corpora'))")
                made.execute("create extension if not exists vector")
                made.execute("create table if not exists whet_corpora (name text primary key, version text)")
                made.execute(
                    f"create table if not exists {self.name} (key bigserial primary key, document text, title text, "
                    f"text text, place text, start int, vector vector({DIMENSIONS}), words tsvector generated always "
                    "as (to_tsvector('english', title || ' ' || text)) stored)"
                )
                for kind in ("hnsw (vector vector_cosine_ops)", "gin (words)", "btree (document)"):
                    label = f"{self.name}_{kind[:2]}"
                    made.execute(f"create index if not exists {label} on {self.name} using {kind}")
            return made
        except Exception as error:  # the driver's own kinds
            raise _unreached(self.url, error) from error

    @contextmanager
    def _asked(self) -> Iterator[Any]:
        """The connection in a transaction. Raises MethodError where it fails; one that was lost is made anew then."""
        try:
            with self._connection.transaction():
                yield self._connection
        except package("psycopg", "postgres").Error as error:
            if self._connection.closed:
                del self._connection
            raise _unreached(self.url, error) from error

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._asked() as connection:
            return list(connection.execute(query, values).fetchall())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this connection holds the corpus's advisory lock."""
        self._rows("select pg_advisory_lock(hashtext(%s))", self.name)
        try:
            yield
        finally:
            if not self._connection.closed:  # a lost one holds nothing
                self._rows("select pg_advisory_unlock(hashtext(%s))", self.name)

    @property
    def state(self) -> str:
        found = self._rows("select version from whet_corpora where name = %s", self.name)
        return str(found[0][0]) if found else ""

    def ids(self) -> list[str]:
        return [str(row[0]) for row in self._rows(f"select document from {self.name} group by 1 order by min(key)")]

    def kept(self, documents: Collection[str]) -> list[tuple[Passage, Any]]:
        rows = self._rows(f"select {', '.join(FIELDS)}, vector::text from {self.name} where document = any(%s) "
                          "order by key", list(documents))  # fmt: skip
        return [(Passage(*row[:5]), [float(x) for x in row[5][1:-1].split(",")]) for row in rows]

    def write(self, rows: Sequence[tuple[Passage, Any]], gone: Collection[str], state: str) -> None:
        with self._asked() as connection, connection.cursor() as cursor:
            cursor.execute(f"delete from {self.name} where document = any(%s)", [list(gone)])
            cursor.executemany(
                f"insert into {self.name} ({', '.join(FIELDS)}, vector) values (%s, %s, %s, %s, %s, %s::vector)",
                [(p.document, p.title, p.text, p.where, p.start, _text(v)) for p, v in rows],
            )
            cursor.execute(
                "insert into whet_corpora values (%s, %s) on conflict (name) do update set version = excluded.version",
                [self.name, state],
            )

    def candidates(self, questions: Sequence[str], depth: int) -> Iterator[tuple[dict[Any, float], dict[Any, float]]]:
        """By `ts_rank_cd` of any of the question's words, and by cosine similarity."""
        own = ", ".join(FIELDS)
        for question, vector in zip(questions, self.embedder(list(questions)), strict=True):
            # Any of its words is enough, as in BM25: the lexemes of the question, joined by or.
            any_of = "(select string_agg(quote_literal(l), ' | ')::tsquery from unnest(tsvector_to_array(" \
                     "to_tsvector('english', %(q)s))) as l)"  # fmt: skip
            with self._asked() as connection:
                connection.execute("select set_config('hnsw.ef_search', %s, true)", [str(min(1000, 2 * depth))])
                near = connection.execute(
                    f"select key, 1 - (vector <=> %(v)s::vector), {own} from {self.name} "
                    "order by vector <=> %(v)s::vector limit %(n)s", {"v": _text(vector), "n": depth},
                ).fetchall()  # fmt: skip
                said = connection.execute(
                    f"select key, 1 - (vector <=> %(v)s::vector), {own}, ts_rank_cd(words, {any_of}, 1) as r "
                    f"from {self.name} where words @@ {any_of} order by r desc, key limit %(n)s",
                    {"v": _text(vector), "n": depth, "q": question.replace("\0", " ")},
                ).fetchall()  # fmt: skip
            self.cache = {row[0]: Passage(*row[2:7]) for row in (*near, *said)}
            yield ({row[0]: float(row[7]) for row in sorted(said)},
                   {row[0]: float(row[1]) for row in sorted((*near, *said), key=lambda r: r[0])})  # fmt: skip


class Qdrant(Database):
    """Qdrant: dense vectors for meaning; sparse ones of stems, weighted by its IDF, for words (as BM25 does)."""

    def __init__(self, url: str, name: str, embedder: Embedder) -> None:
        super().__init__(name, embedder)
        self.url = url

    @cached_property
    def _client(self) -> Any:
        made, models = _qdrant(self.url), self._models
        try:
            if not made.collection_exists(self.name):
                dense = models.VectorParams(size=DIMENSIONS, distance=models.Distance.COSINE)
                words = models.SparseVectorParams(modifier=models.Modifier.IDF)
                made.create_collection(self.name, {"meaning": dense}, {"words": words})
                if urlsplit(self.url).netloc:
                    made.create_payload_index(self.name, "document", "keyword")
            if not made.collection_exists("whet_corpora"):
                made.create_collection("whet_corpora", models.VectorParams(size=1, distance=models.Distance.DOT))
            return made
        except Exception as error:  # the client's own kinds
            raise _unreached(self.url, error) from error

    @contextmanager
    def _asked(self) -> Iterator[Any]:
        """The client. Raises MethodError where the server fails."""
        try:
            yield self._client
        except package("qdrant_client.http.exceptions", "qdrant").ApiException as error:
            raise _unreached(self.url, error) from error

    @cached_property
    def _models(self) -> Any:
        return package("qdrant_client.models", "qdrant")

    @property
    def state(self) -> str:
        with self._asked() as client:
            found = client.retrieve("whet_corpora", [_uuid(self.name)])
        return str(found[0].payload["version"]) if found else ""

    def _scroll(self, names: Collection[str] | None, vectors: bool) -> Iterator[Any]:
        wanted = self._of(names) if names is not None else None
        at = None
        while True:
            with self._asked() as client:
                points, at = client.scroll(self.name, wanted, limit=1000, offset=at, with_vectors=vectors)
            yield from points
            if at is None:
                return

    def _of(self, names: Collection[str]) -> Any:
        models = self._models
        return models.Filter(must=[models.FieldCondition(key="document", match=models.MatchAny(any=list(names)))])

    def ids(self) -> list[str]:
        return sorted({point.payload["document"] for point in self._scroll(None, False)})

    def kept(self, documents: Collection[str]) -> list[tuple[Passage, Any]]:
        found = self._scroll(documents, True) if documents else ()
        return sorted(((_passage(p), p.vector["meaning"]) for p in found), key=lambda f: (f[0].document, f[0].start))

    def write(self, rows: Sequence[tuple[Passage, Any]], gone: Collection[str], state: str) -> None:
        models = self._models
        old = {point.id for point in self._scroll(gone, False)} if gone else set()
        points = [
            models.PointStruct(
                id=_uuid(f"{p.document}\0{p.start}\0{p.text}"),
                vector={"meaning": [float(x) for x in v], "words": self._sparse(shown(p))},
                payload=dict(zip(FIELDS, (p.document, p.title, p.text, p.where, p.start), strict=True)),
            )
            for p, v in rows
        ]
        named = models.PointStruct(id=_uuid(self.name), vector=[1.0], payload={"version": state})
        with self._asked() as client:
            for at in range(0, len(points), BLOCK):
                client.upsert(self.name, points[at : at + BLOCK], wait=True)
            if over := sorted(
                old - {point.id for point in points}
            ):  # only now: a crash leaves too much, not too little
                client.delete(self.name, models.PointIdsList(points=over), wait=True)
            client.upsert("whet_corpora", [named], wait=True)

    def _sparse(self, text: str) -> Any:
        """Stems by their hashes, weighted as BM25 weighs how often they occur (k1 1.2, without lengths)."""
        stem = package("Stemmer", "rag").Stemmer("english")
        counts = Counter(stem.stemWords(re.findall(WORD, paired(text).lower())))
        weights: dict[int, float] = {}
        for word, times in counts.items():
            number = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest())
            weights[number] = times * 2.2 / (times + 1.2)
        return self._models.SparseVector(indices=list(weights), values=list(weights.values()))

    def candidates(self, questions: Sequence[str], depth: int) -> Iterator[tuple[dict[Any, float], dict[Any, float]]]:
        """By Qdrant's own two searches; the similarity of what words alone found is counted from its vector."""
        import numpy as np

        for question, vector in zip(questions, self.embedder(list(questions)), strict=True):
            with self._asked() as client:
                near = client.query_points(self.name, query=vector.tolist(), using="meaning", limit=depth).points
                said = client.query_points(
                    self.name, query=self._sparse(question), using="words", limit=depth, with_vectors=["meaning"]
                ).points
            self.cache = {point.id: _passage(point) for point in (*near, *said)}
            similar = {point.id: float(np.dot(point.vector["meaning"], vector)) for point in said}
            similar.update({point.id: float(point.score) for point in near})
            order = sorted(similar, key=lambda k: (self.cache[k].document, self.cache[k].start))
            words = {point.id: float(point.score) for point in said if point.score > 0}
            yield {k: words[k] for k in order if k in words}, {k: similar[k] for k in order}


@lru_cache(maxsize=4)
def _qdrant(url: str) -> Any:
    """A client for a server, or for the client's own store in a folder (qdrant:/folder), which has one at a time."""
    client, parts = package("qdrant_client", "qdrant"), urlsplit(url)
    try:
        if parts.netloc:
            scheme = "https" if parts.scheme == "qdrants" else "http"
            return client.QdrantClient(url=f"{scheme}://{parts.netloc}", api_key=os.environ.get("QDRANT_API_KEY"))
        return client.QdrantClient(path=parts.path)
    except Exception as error:
        raise _unreached(url, error) from error


def _passage(point: Any) -> Passage:
    return Passage(*(point.payload[name] for name in FIELDS))


def _uuid(text: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, text))


def _text(vector: Any) -> str:
    return "[" + ",".join(f"{float(x):.7g}" for x in vector) + "]"


def _unreached(url: str, error: Exception) -> MethodError:
    return MethodError(f"the store {url} cannot be used", expected="a server that answers",
                       found=str(error).splitlines()[0][:160] if str(error) else type(error).__name__,
                       do="start it, or leave the store out")  # fmt: skip
