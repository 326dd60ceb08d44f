"""The graph: facts indexed both ways, told as sentences, and on disk with what was learnt to read questions by."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.embed import Embedder, mark
from whet.errors import ArtifactError, rebuilt
from whet.model import aside
from whet.triples import MEANS, Facts

if TYPE_CHECKING:
    import numpy as np

Step = int  # a relation's number, or ~number where it is walked backwards
Way = tuple[Step, ...]
MOST_ENDS = 100  # neighbours that one step from a node leads to: a hub's others are left out
MOST_EMBEDDED = 20_000  # names that can be found by meaning
FOREIGN = re.compile(r"[^\W\d_\u0000-\u024f\u1e00-\u1eff]")  # a letter of another script than Latin
IRREGULAR = ("made", "built", "known", "born")  # participles
ARTICLES = {"part": "", "member": "a ", "instance": "an ", "subclass": "a ", "citizen": "a "}  # others of them are one
VERBS = ("by", "in", "at", "to", "from", "with", "on", "of", "for", "as", "a", "an")


@dataclass(frozen=True, eq=False)
class Graph:
    """Facts as numbers: `nodes` hold the label and aliases of each, `edges` (subject, relation, object) sorted rows."""

    nodes: tuple[tuple[str, ...], ...]
    relations: tuple[str, ...]
    edges: np.ndarray[Any, Any]
    inverses: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: Facts) -> Graph:
        """A graph of facts; nodes and relations are numbered as they appear."""
        import numpy as np

        nodes: dict[str, int] = {}
        relations: dict[str, int] = {}
        rows = [(nodes.setdefault(s, len(nodes)), relations.setdefault(r, len(relations)),
                 nodes.setdefault(o, len(nodes))) for s, r, o in facts.triples]  # fmt: skip
        # Of two inverse relations facts may stand in one alone: the other names them backwards.
        inverses = {relations[a]: relations.setdefault(b, len(relations)) for a, b in facts.inverses.items()
                    if a in relations}  # fmt: skip
        called = (facts.named(r)[0] for r in relations)
        told = tuple(" ".join(name.replace("_", " ").split()) or name for name in called)
        edges = np.array(sorted(rows), np.int64).reshape(-1, 3)
        return cls(tuple(facts.named(n, humps=False) for n in nodes), told, edges, inverses)

    @cached_property
    def _backwards(self) -> np.ndarray[Any, Any]:
        """The edges as (object, relation, subject), sorted."""
        import numpy as np

        s, r, o = self.edges.T
        order = np.lexsort((s, r, o))
        return np.stack([o[order], r[order], s[order]], 1)

    def steps(self, node: int) -> dict[Step, list[int]]:
        """Where one step leads from a node, by relation: at most MOST_ENDS nodes each."""
        import numpy as np

        made: dict[Step, list[int]] = {}
        for back, edges in enumerate((self.edges, self._backwards)):
            first, last = np.searchsorted(edges[:, 0], [node, node + 1])
            found = np.unique(edges[first:last, 1], return_index=True, return_counts=True)
            for relation, low, count in zip(*(part.tolist() for part in found), strict=True):
                ends = edges[first + low : first + low + min(count, MOST_ENDS), 2]
                made[~relation if back else relation] = ends.tolist()
        return made

    def named(self, step: Step) -> str:
        """A step in words: backwards by the name of the inverse relation where there is one."""
        return self.relations[step if step >= 0 else self.inverses.get(~step, ~step)]

    def sentence(self, node: int, path: Way, ends: Sequence[int], most: int = MOST_ENDS) -> str:
        """What stands at the end of a path, as a sentence; a last step backwards is told forwards.

        Of more than `most` ends the others are counted, as far as they are known.
        """
        told, inner = [self.nodes[n][0] for n in ends[:most]], self.nodes[node][0]
        over = f" (and {len(ends) - most} more)" if len(ends) > most else ""
        if len(ends) == MOST_ENDS > most:  # a hub's others were left out
            over = " (and more)"
        for step in path[:-1]:
            inner = asked(inner, self.named(step), step < 0 and ~step not in self.inverses)
        if path[-1] < 0 and ~path[-1] not in self.inverses:
            return _said(told, self.relations[~path[-1]], [inner], over)
        return _said([inner], self.named(path[-1]), told, over)

    @cached_property
    def described(self) -> dict[int, str]:
        """The description of each node that has one."""
        if MEANS not in self.relations:
            return {}
        rows = self.edges[self.edges[:, 1] == self.relations.index(MEANS)]
        return {int(s): self.nodes[o][0] for s, _, o in rows[::-1]}


def _verb(relation: str) -> str:
    """A relation as a verb, "is designed by", where it ends like one; "" where it is rather a noun."""
    first, last = relation.split()[0], relation.split()[-1]
    if last not in VERBS:
        return ""
    if first.endswith(("ed", "en")) or first in IRREGULAR:
        return f"is {relation}"
    if last == "of" and len(relation.split()) > 1 and not first.endswith("s"):  # "capital of", not "consists of"
        return f"is {ARTICLES.get(first, 'the ')}{relation}"
    return relation


def _said(subjects: Sequence[str], relation: str, objects: Sequence[str], over: str = "") -> str:
    """A fact as a sentence; one side may be several, `over` says how many of it were left out."""
    left, right = over if len(subjects) > 1 else "", over if len(objects) > 1 or len(subjects) == 1 else ""
    if relation == MEANS:
        return f"{_listed(subjects)}{left}: {'; '.join(objects)}{right}"
    if any(map(FOREIGN.search, (relation, *subjects, *objects))):
        return f"{', '.join(subjects)}{left} · {relation}: {', '.join(objects)}{right}"
    verb, subject, object_ = _verb(relation), _listed(subjects) + left, _listed(objects) + right
    if verb:
        return f"{subject} {re.sub('^is ', 'are ', verb) if len(subjects) > 1 else verb} {object_}."
    return f"The {relation} of {subject} {'are' if len(objects) > 1 else 'is'} {object_}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def asked(subject: str, relation: str, backwards: bool) -> str:
    """What a step leads to, in words that can stand in a sentence: "the colour of X", "what X is designed by".

    English goes around English names alone: others stand beside their relation.
    """
    if relation == MEANS:
        return f"the term for this: {subject}" if backwards else f"what {subject} means"
    if FOREIGN.search(subject + relation):
        return f"? · {relation}: {subject}" if backwards else f"{subject} · {relation}"
    verb = _verb(relation)
    if backwards:
        return f"what {verb} {subject}" if verb else f"what has the {relation} {subject}"
    return f"what {subject} {verb}" if verb else f"the {relation} of {subject}"


def identity(graph: Graph, *more: Any) -> str:
    """What a graph is named by: its facts, whatever else it was built from, and the model that embeds names."""
    body = json.dumps([mark(), graph.nodes, graph.relations, sorted(graph.inverses.items()), more])
    return hashlib.sha256(body.encode() + graph.edges.tobytes()).hexdigest()


def build(graph: Graph, folder: Path, embedder: Embedder, hops: int = 1, learnt: Mapping[str, float] | None = None,
          answered: Sequence[int] = ()) -> None:  # fmt: skip
    """Write a graph into a new folder, aside and then renamed: also its names by meaning, and what was learnt."""
    import numpy as np

    with aside(folder) as work:
        lines = [json.dumps(names, ensure_ascii=False) for names in graph.nodes]
        (work / "nodes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        np.save(work / "edges.npy", graph.edges, allow_pickle=False)
        # Those that are described are found by their description first of all.
        order = sorted(range(len(graph.nodes)), key=lambda n: n not in graph.described)[:MOST_EMBEDDED]
        texts = [": ".join([graph.nodes[n][0], *([graph.described[n]] if n in graph.described else [])]) for n in order]
        vectors = np.asarray(embedder(texts))
        np.save(work / "names.npy", vectors, allow_pickle=False)
        body = {"relations": graph.relations, "inverses": [*graph.inverses.items()], "order": order, "hops": hops,
                "learnt": dict(learnt or {}), "answered": answered, "names": _hash(vectors)}  # fmt: skip
        body["content"] = identity(graph, order, hops, body["learnt"])
        (work / "graph.json").write_text(json.dumps(body, ensure_ascii=False), encoding="utf-8")


def _hash(vectors: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(vectors.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Opened:
    """A graph as `build` wrote it, with the vectors of the names in `order` and the learnt weights.

    `answered` says of how many train rows it leads to the answers, and how many were tried; empty without any.
    """

    graph: Graph
    order: Sequence[int]
    vectors: np.ndarray[Any, Any]
    hops: int
    learnt: Mapping[str, float]
    answered: Sequence[int] = ()


def usable(folder: Path) -> bool:
    """Whether a graph is there as `build` left it; one that was spoilt since is taken away, to be built anew."""
    if not folder.exists():
        return False
    try:
        return read(folder) is not None
    except ArtifactError:
        shutil.rmtree(folder)
        return False


def read(folder: Path) -> Opened:
    """A graph from its folder. Raises ArtifactError where it is incomplete, changed, or another model embedded it."""
    import numpy as np

    try:
        body = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
        lines = (folder / "nodes.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        edges, vectors = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("edges", "names"))
        nodes = tuple(tuple(json.loads(line)) for line in lines)
        graph = Graph(nodes, tuple(body["relations"]), edges, dict(body["inverses"]))
        content = identity(graph, body["order"], body["hops"], body["learnt"])
        same = body.get("names", "") in ("", _hash(vectors))
        if content != body["content"] or len(vectors) != len(body["order"]) or not same:
            raise ValueError("files that were changed")
        return Opened(graph, body["order"], vectors, body["hops"], body["learnt"], body.get("answered", ()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"the graph in {folder} cannot be read", expected=f"what whet wrote with {mark()}",
                            found=str(error)[:120], do=rebuilt("knowledge")
                            ) from error  # fmt: skip
