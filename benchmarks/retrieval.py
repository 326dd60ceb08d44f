"""Retrieval on shared tasks: rankings against rivals, what a model makes of the passages, and a large index.

`ranking`: BM25 alone (bm25s), sentence embeddings alone, both as whet fuses them, and the hybrids of LlamaIndex and
Haystack as they come, with the same embedding model; all documents, the whole test split. `reading`: plain rag,
fine-tuning alone, and fine-tuning on passages (RAFT), paired on the same test rows. `large`: an index over many
generated passages against bm25s and FAISS run by hand on the same vectors.

    .venv/bin/python benchmarks/retrieval.py [--parts ranking,reading,large] [--task cranfield,xquad_en]
"""

from __future__ import annotations

import random
import resource
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common

PARTS = ("ranking", "reading", "large")
KINDS = ("recall", "found", "missed", "oracle", "distracted", "faithful", "declined")  # of reading, as in Reading
METRICS = ("ndcg@10", "recall@1", "recall@5")
DEPTH = 40  # passages that a rival may return, so that ten documents can be told from them


def documents_of(task: Any) -> list[Any]:
    """The documents of a task."""
    from whet.documents import load

    return load(task.split().learnable.documents)[0]


def difference(paired: Any) -> str:
    """A paired difference in points, with its interval."""
    return f"{100 * paired.difference:+.1f} [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"


# --- rankings ---------------------------------------------------------------------------------------------------------


def llama_index(texts: Sequence[Any], embedder: Any) -> Callable[[str], list[str]]:
    """LlamaIndex: its sentence splitter, vectors and BM25, fused by reciprocal ranks; returns ids of documents."""
    from llama_index.core import Document, MockEmbedding, Settings, VectorStoreIndex
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.llms import MockLLM
    from llama_index.core.node_parser import SentenceSplitter
    from llama_index.core.retrievers import QueryFusionRetriever
    from llama_index.retrievers.bm25 import BM25Retriever

    class Same(BaseEmbedding):  # type: ignore[misc]
        """The embedding model that whet uses."""

        def _get_query_embedding(self, query: str) -> list[float]:
            return embedder([query])[0].tolist()

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return self._get_query_embedding(query)

        def _get_text_embedding(self, text: str) -> list[float]:
            return embedder([text])[0].tolist()

        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return embedder(texts).tolist()

    assert MockEmbedding is not None
    Settings.embed_model, Settings.llm = Same(embed_batch_size=256), MockLLM()
    made = [Document(text=d.text, metadata={"title": d.title, "of": d.id}, excluded_embed_metadata_keys=["of"],
                     excluded_llm_metadata_keys=["of"]) for d in texts]  # fmt: skip
    nodes = SentenceSplitter().get_nodes_from_documents(made)
    depth = min(DEPTH, len(nodes))
    fusion = QueryFusionRetriever(
        [VectorStoreIndex(nodes).as_retriever(similarity_top_k=depth),
         BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=depth)],
        num_queries=1, mode="reciprocal_rerank", similarity_top_k=depth, use_async=False,
    )  # fmt: skip
    return lambda question: [n.node.metadata["of"] for n in fusion.retrieve(question)]


def haystack(texts: Sequence[Any], embedder: Any) -> Callable[[str], list[str]]:
    """Haystack: its splitter (200 words), vectors and BM25 in memory, joined by reciprocal ranks."""
    from haystack import Document
    from haystack.components.joiners import DocumentJoiner
    from haystack.components.preprocessors import DocumentSplitter
    from haystack.components.retrievers.in_memory import InMemoryBM25Retriever, InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    splitter, store = DocumentSplitter(), InMemoryDocumentStore()
    splitter.warm_up()
    whole = [Document(content="\n".join(filter(None, (d.title, d.text))), meta={"of": d.id}) for d in texts]
    pieces = splitter.run(documents=whole)["documents"]
    for piece, vector in zip(pieces, embedder([p.content for p in pieces]), strict=True):
        piece.embedding = vector.tolist()
    store.write_documents(pieces)
    words, near = InMemoryBM25Retriever(store, top_k=DEPTH), InMemoryEmbeddingRetriever(store, top_k=DEPTH)
    join = DocumentJoiner(join_mode="reciprocal_rank_fusion", top_k=DEPTH)

    def search(question: str) -> list[str]:
        found = [words.run(query=question)["documents"],
                 near.run(query_embedding=embedder([question])[0].tolist())["documents"]]  # fmt: skip
        return [d.meta["of"] for d in join.run(documents=found)["documents"]]

    return search


def ranking(options: Any, home: Path) -> dict[str, Any]:
    """Rankings of whet and its rivals; differences of whet's from each are paired over the questions."""
    from whet import stats
    from whet.documents import passages
    from whet.embed import Embedder
    from whet.metrics import get, score_all
    from whet.model import resolve
    from whet.retrieval import MIXES, Source, build
    from whet.system import System

    embedder, made, lines = Embedder(home), {}, []
    for name in options.task.split(","):
        task = common.load_task(options.tasks, name)
        texts = documents_of(task)
        rows = [e for e in task.test if e.evidence][: options.rows or None]
        pieces, begun = [p for d in texts for p in passages(d)], time.monotonic()
        version = build(pieces, home / name, embedder)
        took = {"both": time.monotonic() - begun}
        ranked: dict[str, list[str]] = {}
        for mix in reversed(MIXES):
            system = System(resolve(options.model), sources=(Source(mix=mix, made=version, folder=home / name),),
                            home=home)  # fmt: skip
            ranked[mix] = system.ranked(rows, 10)
        for rival in (llama_index, haystack) if not options.alone else ():
            begun = time.monotonic()
            search = rival(texts, embedder)
            took[rival.__name__] = time.monotonic() - begun
            ranked[rival.__name__] = ["\n".join([*dict.fromkeys(search(e.prompt))][:10]) for e in rows]
        ours = {m: score_all(get(m), ranked["both"], rows) for m in METRICS}
        for who, answers in ranked.items():
            found = {m: score_all(get(m), answers, rows) for m in METRICS}
            figures = {m: get(m).aggregate(found[m]) for m in METRICS}
            ahead = stats.compare(found["ndcg@10"], ours["ndcg@10"], get("ndcg@10"))
            made[f"{name}, {who}"] = {**figures, "whet ahead": asdict(ahead)}
            lines.append([name, who, len(rows), f"{took[who]:.0f}" if who in took else "",
                          *(f"{100 * v:.1f}" for v in figures.values()),
                          difference(ahead)])  # fmt: skip
    print(common.table(["task", "who", "questions", "seconds to build", *METRICS, "whet's nDCG@10 ahead"], lines))
    return made


# --- reading ----------------------------------------------------------------------------------------------------------


def reading(options: Any, home: Path) -> dict[str, Any]:
    """Closed book, plain rag, fine-tuning alone, and on oracle and distractors, a share without the oracle (RAFT)."""
    from whet import reading, stats, task
    from whet.methods import Run
    from whet.metrics import get
    from whet.model import resolve
    from whet.scorecard import evaluate
    from whet.search import base_system
    from whet.search.recipe import recipe
    from whet.store import Store

    made, lines = {}, []
    tuned = {"epochs": options.epochs}
    arms = {
        "closed book": recipe(),
        "rag": recipe(("rag", {"k": options.k})),
        "finetune": recipe(("finetune", tuned)),
        "RAFT, all with oracle": recipe(("rag", {"k": options.k}), ("finetune", {**tuned, "absent": 0.0})),
        "RAFT": recipe(("rag", {"k": options.k}), ("finetune", tuned)),
    }
    wanted = options.arms.split(";") if options.arms else list(arms)
    if unknown := [name for name in wanted if name not in arms]:
        common.stop(f"no arm {unknown[0]!r}: {'; '.join(arms)}")
    arms = {name: one for name, one in arms.items() if name in wanted}
    for name in options.task.split(","):
        asked = task.load(name) if "/" in name else common.load_task(options.tasks, name)
        run, ref = Run(Store(home), options.seed), resolve(options.model)
        data = asked.split(options.seed).learnable
        base = base_system(ref, asked, data, run.session(ref), home)
        rows, metric, cards = list(asked.test)[: options.rows or None], get(asked.metric), {}
        for arm, one in arms.items():
            system = one.run(base, data, run)
            session = run.session(system.model)
            card = cards[arm] = evaluate(system, rows, metric, session=session, seed=options.seed)
            apart = asdict(reading.measure(system, rows, metric, session)) if system.sources else {}
            made[f"{name}, {arm}"] = {"score": card.score, "low": card.low, "high": card.high, **apart}
            last = cards.get("RAFT")
            lines.append([name, arm, f"{100 * card.score:.1f} [{100 * card.low:.1f}, {100 * card.high:.1f}]",
                          *("" if (v := apart.get(k)) is None else f"{v:.1f}" for k in KINDS)])  # fmt: skip
            print(lines[-1], flush=True)
        for arm in cards if last else ():
            ahead = stats.compare(cards[arm].outcomes, last.outcomes, metric, options.seed)
            made[f"{name}, {arm}"]["RAFT ahead"] = asdict(ahead)
            print(f"{name}: RAFT ahead of {arm} by {difference(ahead)}")
    print(common.table(["task", "arm", "score", *KINDS], lines))
    return made


# --- large ------------------------------------------------------------------------------------------------------------


class Generated:
    """Stands in for the embedding model where a million texts would take it hours: a vector is the mean of its words'
    own random directions, so that texts that share words lie near each other, as with a real one."""

    def __init__(self, size: int = 384) -> None:
        self.size, self.words = size, dict[str, Any]()

    def __call__(self, texts: Sequence[str]) -> Any:
        """Unit vectors [n, size]."""
        import numpy as np

        made = np.empty((len(texts), self.size), np.float32)
        for n, text in enumerate(texts):
            made[n] = sum(self._word(w) for w in text.lower().split())
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    def _word(self, word: str) -> Any:
        import numpy as np

        if word not in self.words:
            self.words[word] = np.random.default_rng(zlib.crc32(word.encode())).standard_normal(self.size, np.float32)
        return self.words[word]


def large(options: Any, home: Path) -> dict[str, Any]:
    """Build and search an index over generated passages; bm25s and FAISS (the same lists) by hand beside it."""
    import bm25s
    import faiss
    import numpy as np

    from whet.documents import Passage
    from whet.embed import Embedder
    from whet.retrieval import Index, build, shown

    draw = random.Random(options.seed)
    words = [f"{a}{b}{c}" for a in ("bra", "do", "ke", "li", "mo", "nu", "pa", "ri", "so", "tu") for b in
             ("bel", "dan", "fir", "gol", "hem", "jas", "kor", "lup", "mid", "nes") for c in
             ("a", "e", "in", "or", "us", "y", "ik", "an", "el", "ot", "um", "is")]  # fmt: skip
    weights = [1 / (n + 3) for n in range(len(words))]  # as frequent as words are: Zipf
    pieces = [Passage(str(n), "", " ".join(draw.choices(words, weights, k=draw.randint(8, 16))) + f" n{n}", "made", 0)
              for n in range(options.passages)]  # fmt: skip
    asked = [" ".join(draw.sample(pieces[draw.randrange(len(pieces))].text.split()[:-1], 5)) for _ in range(300)]
    embedder: Any = Generated()
    texts = [shown(p) for p in pieces]
    vectors, begun = embedder(texts), time.monotonic()
    given = dict(zip(texts, vectors, strict=True))
    embedder(asked)

    real, counts = Embedder(home), False

    def kept(some: Sequence[str]) -> Any:
        """Vectors that were made before: building is timed without embedding, searching with that of the question."""
        if counts:
            real(some)
        return np.stack([given[t] for t in some]) if some and some[0] in given else embedder(some)

    begun = time.monotonic()
    index = Index(home / "large" / build(pieces, home / "large", kept), kept)  # type: ignore[arg-type]
    ours = time.monotonic() - begun
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before others need theirs
    begun = time.monotonic()
    ranker = bm25s.BM25(method="lucene")
    ranker.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    ranker.save(str(home / "words"))
    by_words, lists = time.monotonic() - begun, int(4 * len(texts) ** 0.5)
    sample = np.random.default_rng(0).choice(len(vectors), min(len(vectors), 50 * lists), replace=False)  # as whet does
    theirs = {}
    for name, some in (("as it comes", vectors), ("on whet's sample", vectors[sample])):
        begun = time.monotonic()
        by_hand = faiss.index_factory(384, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        by_hand.train(some)
        by_hand.add(vectors)
        faiss.write_index(by_hand, str(home / "by_hand.faiss"))
        theirs[name] = by_words + time.monotonic() - begun
        del by_hand
    exact = np.argsort(-(embedder(asked) @ vectors.T), axis=1)[:, :10]
    given.clear()
    del vectors, ranker
    recall, seconds = [], []
    index.search(["of no passage"], 10, "both")  # opened before the clock starts
    real(["of no passage"])
    counts = True
    for question in asked:  # each for the first time
        begun = time.monotonic()
        index.search([question], 10, "both")
        seconds.append(time.monotonic() - begun)
    counts = False
    for question, best in zip(asked, exact, strict=True):
        found = index.search([question], 10, "meaning")[0]
        recall.append(len({int(f.passage.document) for f in found} & set(best.tolist())) / 10)
    p95 = sorted(seconds)[int(0.95 * len(seconds))]
    disk = sum(p.stat().st_size for p in index.folder.rglob("*") if p.is_file())
    print(common.table(
        ["passages", "whet builds", *theirs, "ratios", "recall@10", "p95 of a query", "on disk", "peak, built"],
        [[len(texts), f"{ours:.0f} s", *(f"{s:.0f} s" for s in theirs.values()),
          ", ".join(f"{s / ours:.2f}" for s in theirs.values()), f"{np.mean(recall):.3f}", f"{1000 * p95:.0f} ms",
          f"{disk / 1e6:.0f} MB", f"{memory / 1e6:.0f} MB"]],
    ))  # fmt: skip
    print(f"asked: building, by hand as it comes {common.verdict(theirs['as it comes'] / ours, 1)}, "
          f"recall {common.verdict(float(np.mean(recall)), 0.95)}, "
          f"95 % of queries, embedding included, under 50 ms: {'yes' if p95 < 0.05 else 'NO'}")  # fmt: skip
    return {"passages": len(texts), "build": ours, "by_hand": theirs, "recall": float(np.mean(recall)), "p95": p95,
            "disk": disk, "peak_memory": memory}  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    options = common.parser(__doc__)
    common.add_model(options)
    options.add_argument("--parts", default="ranking", help=f"of {', '.join(PARTS)} (default: %(default)s)")
    options.add_argument("--task", default="cranfield,xquad_en", help="tasks with documents (default: %(default)s)")
    options.add_argument("--rows", type=int, default=0, help="test rows at most (default: all)")
    options.add_argument("--alone", action="store_true", help="without the rivals")
    options.add_argument("--k", type=int, default=1, help="passages shown, for reading")
    options.add_argument("--epochs", type=float, default=2.0, help="of the trainings of reading")
    options.add_argument("--arms", default="", help="of reading, separated by semicolons (default: all)")
    options.add_argument("--passages", type=int, default=1_000_000, help="of large (default: %(default)s)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--home", type=Path, help="where what is made is kept (default: a temporary folder)")
    options = options.parse_args()
    print(common.machine_line(where := common.machine(common.computing())))
    with tempfile.TemporaryDirectory() as folder:
        home = options.home or Path(folder)
        run = {"ranking": ranking, "reading": reading, "large": large}
        made = {part: run[part](options, home) for part in options.parts.split(",")}
    common.finish("retrieval", {"machine": where, **made})


if __name__ == "__main__":
    main()
