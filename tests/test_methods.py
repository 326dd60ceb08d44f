"""The contract that every registered Method keeps, on a tiny model: a new one is tested by being registered."""

from __future__ import annotations

import copy
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from whet import model as models
from whet.errors import MethodError
from whet.feedback import Judged
from whet.methods import Method, Run, lacking, make, names, table
from whet.search.recipe import Recipe
from whet.store import Store
from whet.system import Decoding, System, load
from whet.task import Example, Learnable

WORDS = {"positive": ["great", "funny", "good", "fine"], "negative": ["bad", "poor", "dull", "slow"]}
LABELS = tuple(WORDS)
# What keeps a tiny training short; a Method takes of these what it knows.
SHORT: dict[str, Any] = {"rank": 4, "epochs": 1.0, "batch": 8, "learning_rate": 5e-3, "k": 2, "prompts": 8,
                         "samples": 2, "examples": 8, "pool": 6}  # fmt: skip
NAMES = names()
CUTS = ("prune", "share", "quantize")  # need the weights, but train nothing
TRAINS = [name for name, kind in table().items() if "weights" in kind.needs and name not in CUTS]


def rows(count: int, word: str = "movie") -> tuple[Example, ...]:
    made = []
    for n in range(count):
        label = LABELS[n % 2]
        made.append(Example(f"{word}{n}", f"{word} {n} was {WORDS[label][n % 4]}", label, (label,)))
    return tuple(made)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / "task.yaml").write_text(json.dumps({"name": "before", "metric": "accuracy", "labels": ["one", "two"],
                                                  "instruction": "Count."}))  # fmt: skip
    lines = [json.dumps({"prompt": f"count {n}", "completion": ["one", "two"][n % 2]}) for n in range(40)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def data(earlier: Path, tmp_path: Path) -> Learnable:
    """A task with everything that a Method may need."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text(json.dumps({"id": "d", "text": "the movie was great"}) + "\n")
    knowledge = tmp_path / "knowledge.tsv"
    knowledge.write_text("movie 1\tmade by\tAnn\nmovie 2\tmade by\tBob\n")
    judged = tuple(
        Judged(f"j{n}", f"movie {n} was {WORDS[LABELS[n % 2]][n % 4]}", LABELS[n % 2], LABELS[1 - n % 2],
               annotator=("ann", "bob")[n % 3 == 0]) for n in range(24)
    )  # fmt: skip
    return Learnable("tiny", "what is the review?", "accuracy", LABELS, rows(32), earlier=(earlier,), judged=judged,
                     documents=documents, knowledge=knowledge)  # fmt: skip


@pytest.fixture
def system(model_folder: str, tmp_path: Path, fp32: None) -> System:
    decoding = Decoding(LABELS, True, prior=(0.1, 0.2), max_tokens=6)
    return System(models.resolve(model_folder), "what is the review?", decoding=decoding, home=tmp_path / "home")


def short(name: str, **settings: Any) -> Method:
    known = {f.name for f in fields(table()[name])}
    return make(name, {k: v for k, v in {**SHORT, **settings}.items() if k in known})


def apply(method: Method, system: System, data: Learnable, home: Path, **settings: Any) -> tuple[System, Run]:
    run = Run(Store(home), **settings)
    made = Recipe((method,)).run(replace(system, home=home), data, run)
    return made, run


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_a_new_system_and_changes_nothing_else(
    name: str, system: System, data: Learnable, tmp_path: Path
) -> None:
    before, rows_before = system.fingerprint, copy.deepcopy(data)
    made, run = apply(short(name), system, data, tmp_path / "a")
    assert (system.fingerprint, data) == (before, rows_before)
    kind = table()[name]
    assert bool(made.fingerprint != before) == bool(kind.writes)
    # Only what it says that it writes or invalidates has changed.
    if "model" not in kind.writes:
        assert made.model == system.model
    if "sources" not in kind.writes or kind.family == "compression":
        assert made.sources == system.sources
    else:
        assert made.sources
    if "demonstrations" not in kind.writes:
        assert made.demonstrations == system.demonstrations
    if "calibration" in kind.invalidates:
        assert made.decoding.prior == ()
    if "prompt" not in kind.writes:
        assert (made.instruction, made.frame) == (system.instruction, system.frame)
    if name in TRAINS:
        assert run.spent.trained_tokens > 0
        assert run.notes["trainings"]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_repeatable_by_seed(name: str, system: System, data: Learnable, tmp_path: Path) -> None:
    one, two = (apply(short(name), system, data, tmp_path / place, seed=5)[0] for place in ("a", "b"))
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_makes_goes_to_disk_and_back(name: str, system: System, data: Learnable, tmp_path: Path) -> None:
    made, run = apply(short(name), system, data, tmp_path / "a")
    made.save(tmp_path / "system")
    again = load(tmp_path / "system", home=tmp_path / "elsewhere")
    assert again.fingerprint == made.fingerprint
    asked = rows(6, "show")
    assert again.answer(asked) == made.answer(asked, run.session(made.model))


@pytest.mark.parametrize("name", TRAINS)
def test_a_training_is_bounded_and_not_repeated(
    name: str, system: System, data: Learnable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, free = apply(short(name, epochs=6.0), system, data, tmp_path / "free")
    if name not in ("reward", "rl"):  # a judge is no arm of a race, and rl trains one first
        _, bound = apply(short(name, epochs=6.0), system, data, tmp_path / "bound", trained_tokens=600)
        assert bound.spent.trained_tokens < min(1200, free.spent.trained_tokens)
    monkeypatch.setattr("whet.train.lesson.train", lambda *a, **k: pytest.fail("trained again"))
    _, again = apply(short(name, epochs=6.0), system, data, tmp_path / "free")
    assert again.spent == free.spent


@pytest.mark.parametrize("name", NAMES)
def test_settings_worth_trying_can_be_made(name: str) -> None:
    for key, values in make(name).space().items():
        for value in values:
            assert getattr(make(name, {key: value}), key) == value
    with pytest.raises(MethodError, match="has no setting"):
        make(name, {"no_such_setting": 1})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_lacking_is_said(name: str, system: System) -> None:
    bare = Learnable("bare", "", "accuracy")
    kind = table()[name]
    assert kind.family and kind.__doc__
    if set(kind.needs) - {"weights"}:
        assert lacking(kind, system, bare)
    if "weights" in kind.needs:
        remote = replace(system, model=models.ModelRef("fake:hash", "fake:hash"))
        assert "weights" in lacking(kind, remote, bare)
