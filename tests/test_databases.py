"""Corpora in PostgreSQL with pgvector and in Qdrant: real ones, started and stopped here."""

from __future__ import annotations

import contextlib
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from whet import databases, embed, system
from whet.documents import Document, passages
from whet.errors import ArtifactError, MethodError
from whet.methods import Run
from whet.methods.rag import Rag
from whet.model import resolve
from whet.store import Store
from whet.system import System
from whet.task import Learnable, Query

TEXTS = {
    "kettle": "Descale the kettle every six weeks. It holds 1.2 litres of water.",
    "lamp": "The lamp flickers when an old dimmer is fitted. Its bulb is sold under part LB-7.",
    "returns": "Parcels can be sent back within thirty days. The label costs two pounds.",
}
pytestmark = pytest.mark.skipif(not embed.available(), reason="the embedding model is not installed")


@pytest.fixture(params=["postgresql", "qdrant"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store that is empty: a PostgreSQL server of its own, or Qdrant's own store on disk."""
    if request.param == "qdrant":
        yield f"qdrant:{tmp_path}/qdrant"
        databases.opened.cache_clear()
        databases._qdrant.cache_clear()
        return
    import pgserver

    running: Any = pgserver.get_server(tmp_path / "base", cleanup_mode="delete")
    yield running.get_uri()
    databases.opened.cache_clear()
    running.cleanup()


@pytest.fixture
def data(tmp_path: Path) -> Learnable:
    import json

    file = tmp_path / "documents.jsonl"
    file.write_text("\n".join(json.dumps({"id": k, "title": k, "text": v}) for k, v in TEXTS.items()))
    return Learnable("toy", "Answer.", "token_f1", documents=file)


def test_a_database_answers_as_the_index_does(
    url: str, data: Learnable, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = System(resolve("fake:hash"), "Answer.", home=home)
    said = ["When must I descale it?", "why does my light flicker?", "part LB-7", "labels for parcels"]
    asked = [Query(text) for text in said]
    for mix in ("both", "ranks", "words", "meaning"):
        made = Rag(k=2, mix=mix, store=url).apply(base, data, Run(Store(home)))
        local = Rag(k=2, mix=mix).apply(base, data, Run(Store(home)))
        assert [f[0].passage for f in made.found(asked)] == [f[0].passage for f in local.found(asked)], mix
    made = Rag(k=1, store=url).apply(base, data, Run(Store(home)))
    folder = made.save(tmp_path / "system")
    with pytest.raises(ArtifactError, match="answers through a server.*--trust"):
        system.load(folder, home)
    again = system.load(folder, home, trust=True)
    [source] = again.sources
    before, question = again.state, [Query("What does the toaster weigh?")]
    toaster = Document("toaster", "toaster", "The toaster weighs 900 grams.", "new")
    assert source.change(home, [toaster], ["lamp"])[1] == 1
    assert again.found(question)[0][0].passage.document == "toaster" and again.state != before
    assert set(source.corpus(home).ids()) == {"kettle", "returns", "toaster"}
    assert source.change(home, [toaster])[1] == 0
    with pytest.raises(ArtifactError, match="no such document.*cup"):
        source.change(home, drop=["cup"])
    assert source.rank(question, home, 2)[0][0] == "toaster"
    of = source.corpus(home).of(["toaster", "gone"])
    assert [p.text for p in of["toaster"]] == ["The toaster weighs 900 grams."] and [*of] == ["toaster"]
    monkeypatch.setattr(databases, "mark", lambda: "another model")
    with pytest.raises(ArtifactError) as refused:
        _ = again.state
    assert str(refused.value) == (
        f"the corpus whet_{source.made[:16]} was made by another embedding model; expected another model, found "
        f"{embed.mark()}; build it again: whet apply rag TASK --system SYSTEM --set k=1 {shlex.quote(f'store={url}')} "
        "--out NEW"
    )
    with pytest.raises(ArtifactError, match="made by another embedding model"):
        again.answers(["What does the toaster weigh?"])
    monkeypatch.undo()
    base = source.corpus(home)
    base.write((), base.ids(), "")
    for ask in (lambda: again.answers(["What does the toaster weigh?"]), lambda: source.change(home, [toaster])):
        with pytest.raises(ArtifactError, match="holds no corpus .* build it again: whet apply rag"):
            ask()


def test_a_crash_leaves_nothing_twice(url: str, data: Learnable, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "BLOCK", 1)
    base = System(resolve("fake:hash"), "Answer.", home=home)

    def store() -> Any:
        return Rag(k=9, store=url).apply(base, data, Run(Store(home))).sources[0]

    with monkeypatch.context() as spoilt:
        count, whole = iter(range(9)), embed.Embedder.__call__
        spoilt.setattr(embed.Embedder, "__call__", lambda me, texts: whole(me, texts) if next(count) < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store()
    assert len(store().find([Query("descale the kettle")], home)[0]) == 3
    longer = Document("kettle", "kettle", "\n".join(f"# {n}\nStep {n}." for n in range(3)), "new")
    old = store()
    old.change(home, [longer])
    found = old.find([Query("descale\0 the kettle")], home)[0]
    assert sorted(f.passage.text for f in found if f.passage.document == "kettle") == ["Step 0.", "Step 1.", "Step 2."]


def test_a_new_system_answers_from_its_own_documents(url: str, data: Learnable, home: Path) -> None:
    def store() -> Any:
        return Rag(k=1, store=url).apply(System(resolve("fake:hash"), home=home), data, Run(Store(home))).sources[0]

    first = store()
    first.change(home, [Document("kettle", "kettle", "Descale the kettle daily.", "new")], ["lamp"])
    second, third = store(), store()
    assert second.made == third.made != first.made and second.fingerprint == first.fingerprint
    said = [s.find([Query("descale the kettle")], home)[0][0].passage.text for s in (first, second)]
    assert said == ["Descale the kettle daily.", TEXTS["kettle"]]
    assert set(second.corpus(home).ids()) == set(TEXTS) and set(first.corpus(home).ids()) == {"kettle", "returns"}


def at_once(tasks: Sequence[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def test_changes_at_once_leave_one_version(url: str, home: Path) -> None:
    if url.startswith("qdrant"):
        pytest.skip("its store on disk has one user at a time")
    stores = [databases.Postgres(url, "whet_0", embed.Embedder(home)) for _ in range(2)]
    stores[0].build([p for k, v in TEXTS.items() for p in passages(Document(k, k, v, "w"))], "a" * 64)
    for turn in range(4):
        new = [Document("kettle", "kettle", f"It holds {turn} or {n} litres.", "w") for n in range(2)]
        read, barrier = databases.Postgres.kept, threading.Barrier(2)

        def both(me: Any, names: Any, read: Any = read, barrier: Any = barrier) -> Any:
            found = read(me, names)
            with contextlib.suppress(threading.BrokenBarrierError):  # without a lock both have read before one writes
                barrier.wait(0.3)
            return found

        with pytest.MonkeyPatch.context() as slow:
            slow.setattr(databases.Postgres, "kept", both)
            at_once([partial(s.change, [d], [], 200) for s, d in zip(stores, new, strict=True)])
        assert len(stores[0].of(["kettle"])["kettle"]) == 1
    assert stores[0].version == stores[1].version != "a" * 64


def test_a_store_that_two_fill_at_once_is_filled_once(
    url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if url.startswith("qdrant"):
        pytest.skip("its store on disk has one user at a time")
    monkeypatch.setattr(databases, "BLOCK", 1)
    monkeypatch.setattr(databases, "opened", lambda url, made, home: databases.Postgres(
        url, f"whet_{made[:16]}", embed.Embedder(home)))  # fmt: skip
    pieces = [p for k, v in TEXTS.items() for p in passages(Document(k, k, v, "w"))]
    at_once(2 * [partial(databases.filled, url, "a" * 64, pieces, home)])
    base = databases.opened(url, "a" * 64, home)
    assert base.version == "a" * 64 and {k: len(v) for k, v in base.of(base.ids()).items()} == dict.fromkeys(TEXTS, 1)


def test_a_lost_connection_is_made_anew(url: str, data: Learnable, home: Path) -> None:
    if url.startswith("qdrant"):
        pytest.skip("its store on disk has no connection")
    made = Rag(k=1, store=url).apply(System(resolve("fake:hash"), home=home), data, Run(Store(home)))
    made.sources[0].corpus(home)._connection.close()
    with pytest.raises(MethodError, match="cannot be used"):
        made.found([Query("descale")])
    assert made.found([Query("descale")])[0][0].passage.document == "kettle"


def test_a_store_that_cannot_be_used_is_named(home: Path) -> None:
    made = "0" * 64
    for url, said in [
        ("redis://localhost", "is no store"),
        ("postgresql://me:secret@localhost/base", "holds a password"),
        ("postgresql://localhost:1/base", "cannot be used"),
        ("qdrant://localhost:1", "cannot be used"),
    ]:
        with pytest.raises(MethodError, match=said):
            _ = databases.opened(url, made, home).version
    with pytest.raises(ArtifactError, match="have no name"):
        databases.opened("qdrant://localhost", "x; drop table y", home)


def test_vowel_signs_are_part_of_words(home: Path) -> None:
    store = databases.Qdrant(f"qdrant:{home}", "whet_0", embed.Embedder(home))
    assert len(store._sparse("हिन्दी, தமிழ்").indices) == 2
