"""Systems: identity, life on disk, demonstrations, calibration, and how answers are read off."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import tracemalloc
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import save_model

from whet import model as models
from whet import system as systems
from whet.documents import Passage
from whet.engine import Sampling, Session, Spent
from whet.engine.fake import FakeSession
from whet.engine.replies import UNANSWERED
from whet.errors import ArtifactError, MethodError, ModelError, StoreError
from whet.methods import Run
from whet.methods.calibrate import Calibrate, batch_prior, fitted_prior
from whet.methods.fewshot import FewShot, balanced
from whet.methods.finetune import FineTune
from whet.metrics import get
from whet.model import ModelRef, Transform
from whet.prompt import messages
from whet.retrieval import Found
from whet.scorecard import evaluate
from whet.store import Store
from whet.system import Decoding, Demonstrations, System
from whet.task import Example, Learnable, Query

FAKE = ModelRef("fake:test", "fake:test")
LABELS = ("positive", "negative")
POOL = (("great film", "positive"), ("dull film", "negative"), ("안녕", "positive"))
FULL = System(
    FAKE, "Say which.", Demonstrations(POOL, 2, "nearest"),
    Decoding(LABELS, True, "sum", (-0.25, -1.5), 8, 0.5, ("\n", "###")), card={"task": "tiny", "recipe": "fewshot"},
)  # fmt: skip


@pytest.fixture
def tiny(model_folder: str, home: Path, fp32: None) -> System:
    """A System over the tiny model, with its own home."""
    ref = models.resolve(model_folder)
    return System(ref, "what is the review?", decoding=Decoding(LABELS, True), home=home)


@pytest.fixture
def tuned(tiny: System, home: Path) -> System:
    """The same with one adapter."""
    rows = tuple(Example(str(n), f"movie {n}", LABELS[n % 2]) for n in range(12))
    data = Learnable("tiny", "", "accuracy", LABELS, rows)
    return FineTune(rank=2, epochs=1, batch=4, learning_rate=1e-2).apply(tiny, data, Run(Store(home)))


# --- identity ---------------------------------------------------------------------------------------------------------


def test_a_system_is_frozen_and_hashable() -> None:
    with pytest.raises(FrozenInstanceError):
        FULL.instruction = "other"  # type: ignore[misc]
    assert len({FULL, replace(FULL), replace(FULL, instruction="x")}) == 2


def test_the_fingerprint_is_a_hash_of_the_settings() -> None:
    text = json.dumps(FULL.settings, sort_keys=True, ensure_ascii=False)
    assert FULL.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert FULL.fingerprint == replace(FULL, card={"a": 1}, home=Path("elsewhere")).fingerprint
    assert FULL.settings["model"] == {"content": "fake:test", "transforms": []}


@pytest.mark.parametrize(
    "changed",
    [
        replace(FULL, instruction="Say which!"),
        replace(FULL, model=ModelRef("fake:other", "fake:other")),
        replace(FULL, model=FAKE.add(Transform("adapter", "ab"))),
        replace(FULL, demonstrations=replace(FULL.demonstrations, k=3)),
        replace(FULL, demonstrations=replace(FULL.demonstrations, selection="fixed")),
        replace(FULL, demonstrations=replace(FULL.demonstrations, pool=POOL[::-1])),
        *(
            replace(FULL, decoding=replace(FULL.decoding, **change))
            for change in (
                {"labels": LABELS[::-1]}, {"closed": False}, {"normalise": "mean"}, {"prior": (-0.25, -1.6)},
                {"prior": ()}, {"max_tokens": 9}, {"temperature": 0.0}, {"stop": ()},
            )  # fmt: skip
        ),
    ],
)
def test_every_setting_changes_the_fingerprint(changed: System) -> None:
    assert changed.fingerprint != FULL.fingerprint
    assert changed != FULL


def test_the_fingerprint_is_of_contents_not_paths(tmp_path: Path) -> None:
    first = save_model(tmp_path / "a")
    shutil.copytree(first, tmp_path / "b" / "renamed")
    one, two = models.resolve(first), models.resolve(str(tmp_path / "b" / "renamed"))
    assert System(one).fingerprint == System(two).fingerprint
    moved = [System(one.add(Transform("adapter", "ab", folder))) for folder in (None, tmp_path)]
    assert moved[0].fingerprint == moved[1].fingerprint
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        file = tmp_path / "b" / "renamed" / name
        kept = file.read_bytes()
        file.write_bytes(kept + b" ")
        assert models.resolve(str(file.parent)).content != one.content, name
        file.write_bytes(kept)
    assert models.resolve(str(tmp_path / "b" / "renamed")).content == one.content


def test_the_order_of_transforms_counts() -> None:
    a, b = Transform("adapter", "aa"), Transform("adapter", "bb")
    assert System(FAKE.add(a).add(b)).fingerprint != System(FAKE.add(b).add(a)).fingerprint


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path, home: Path) -> None:
    card = {"task": "tiny", "recipe": "fewshot", "scorecard": {"score": 0.5, "metric": "accuracy"}}
    system = replace(FULL, card=card)
    folder = system.save(tmp_path / "made" / "system")
    loaded = systems.load(folder)
    assert loaded == system
    assert loaded.fingerprint == system.fingerprint
    assert loaded.card == card
    assert loaded.decoding == system.decoding
    assert loaded.demonstrations.pool == POOL
    assert loaded.home == home
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "fake:test" in text and "2 (nearest)" in text and "calibration: yes" in text and '"score": 0.5' in text
    assert sorted(p.name for p in folder.parent.iterdir()) == ["system"]  # nothing left beside it


@given(
    st.text(),
    st.lists(st.tuples(st.text(), st.text())).map(tuple),
    st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=2).map(tuple),
    st.lists(st.text()).map(tuple),
)
def test_any_text_and_any_numbers_survive(instruction: str, pool: Any, prior: Any, stop: Any) -> None:
    system = System(FAKE, instruction, Demonstrations(pool), Decoding(LABELS, True, prior=prior, stop=stop))
    body = json.loads(json.dumps({**system.settings}))
    again = systems.revive(body, FAKE.base, {}, {}, Path())
    assert again == system
    assert again.fingerprint == system.fingerprint


def test_saving_again_replaces(tmp_path: Path, home: Path) -> None:
    folder = FULL.save(tmp_path / "system")
    (folder / "left over").write_text("old")
    other = replace(FULL, instruction="Other.")
    other.save(folder)
    assert systems.load(folder) == other
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "prompt.txt", "system.json"]
    assert list(tmp_path.glob(".system*")) == []
    (empty := tmp_path / "empty").mkdir()
    FULL.save(empty)
    assert systems.load(empty) == FULL


def test_saving_never_destroys_something_else(tmp_path: Path) -> None:
    (busy := tmp_path / "busy").mkdir()
    (busy / "thesis.txt").write_text("years of work")
    (file := tmp_path / "file").write_text("a file")
    for place in (busy, file):
        with pytest.raises(StoreError, match="holds something else"):
            FULL.save(place)
    assert (busy / "thesis.txt").read_text() == "years of work"
    assert file.read_text() == "a file"
    with pytest.raises(StoreError, match="cannot write"):
        FULL.save(file / "system")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["busy", "file"]


def test_a_failed_save_keeps_the_old_system(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = FULL.save(tmp_path / "system")

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(systems, "_card_text", full)
    with pytest.raises(StoreError, match="No space left"):
        replace(FULL, instruction="Other.").save(folder)
    assert systems.load(folder) == FULL
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == ["system"]


def test_saving_without_the_transform_at_hand(tmp_path: Path) -> None:
    lost = replace(FULL, model=FAKE.add(Transform("adapter", "ab" * 32)))
    with pytest.raises(ArtifactError, match="not at hand"):
        lost.save(tmp_path / "system")
    assert list(tmp_path.iterdir()) == []


def edit(folder: Path, change: Any) -> None:
    file = folder / "system.json"
    body = json.loads(file.read_text(encoding="utf-8"))
    change(body)
    file.write_text(json.dumps(body), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(instruction="Say yes."),
        lambda b: b["decoding"].update(prior=[0.0, 0.0]),
        lambda b: b["demonstrations"]["pool"].pop(),
        lambda b: b["decoding"]["labels"].reverse(),
        lambda b: b.update(fingerprint="0" * 64),
        lambda b: b["model"].update(content="fake:other"),
    ],
)
def test_a_changed_system_is_refused(change: Any, tmp_path: Path) -> None:
    folder = FULL.save(tmp_path / "system")
    edit(folder, change)
    with pytest.raises(ArtifactError, match="was changed by hand"):
        systems.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.pop("decoding"),
        lambda b: b.pop("fingerprint"),
        lambda b: b.pop("base"),
        lambda b: b.pop("card"),
        lambda b: b.update(model=None),
        lambda b: b.update(demonstrations=[1]),
        lambda b: b["decoding"].update(prior=[0.0]),
        lambda b: b["decoding"].update(prior=[0.0, math.nan]),
        lambda b: b["decoding"].update(surprise=1),
        lambda b: b["model"].update(transforms=[["adapter", "../../elsewhere"]]),
        lambda b: b["model"].update(transforms=[["adapter", 5]]),
        lambda b: b["model"].update(transforms=["adapter"]),
    ],
)
def test_a_broken_system_is_one_line(change: Any, tmp_path: Path) -> None:
    folder = FULL.save(tmp_path / "system")
    edit(folder, change)
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        systems.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"text"', "null", "\0"])
def test_a_file_that_is_no_system(text: str, tmp_path: Path) -> None:
    (tmp_path / "system.json").write_text(text)
    with pytest.raises(ArtifactError, match="cannot be read"):
        systems.load(tmp_path)


def test_a_folder_that_is_no_system(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "nowhere", file):
        with pytest.raises(ArtifactError, match="is no System"):
            systems.load(place)


def scores_of(system: System) -> list[Any]:
    """Label scores on the CPU, whatever the machine has."""
    module, tokenizer = models.load(system.model, system.home, device="cpu")
    from whet.engine.torch import TorchSession

    session = TorchSession(module, tokenizer)
    return [a.scores for a in system.answers(["movie 1", "movie 2"], session)]


def test_adapters_travel_with_the_system(tuned: System, tmp_path: Path, home: Path) -> None:
    folder = tuned.save(tmp_path / "system")
    wanted = scores_of(tuned)
    shutil.rmtree(home / "artifacts")
    loaded = systems.load(folder, tmp_path / "another")
    assert loaded == tuned
    assert scores_of(loaded) == wanted
    assert wanted != scores_of(replace(tuned, model=replace(tuned.model, transforms=())))


def test_a_system_saved_over_itself(tuned: System, tmp_path: Path) -> None:
    folder = tuned.save(tmp_path / "system")
    loaded = systems.load(folder)
    replace(loaded, card={"task": "again"}).save(folder)
    again = systems.load(folder)
    assert again.card == {"task": "again"}
    assert models.check_transform(again.model.transforms[0]).is_dir()


def test_missing_or_changed_adapters(tuned: System, tmp_path: Path, home: Path) -> None:
    folder = tuned.save(tmp_path / "system")
    [place] = (folder / "transforms").iterdir()
    config = place / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"lora_alpha": 4', '"lora_alpha": 400'))
    assert config.read_text() != text
    with pytest.raises(ModelError, match="has changed since it was written"):
        models.load(systems.load(folder).model, home)
    config.write_text(text)
    (place / "extra.safetensors").write_text("x")
    with pytest.raises(ModelError, match="has changed"):
        models.load(systems.load(folder).model, home)
    shutil.rmtree(place)
    with pytest.raises(ModelError, match="not at hand"):
        models.load(systems.load(folder).model, home)


def test_an_adapter_of_another_kind_is_refused(tuned: System, tmp_path: Path, home: Path) -> None:
    place = tuned.model.transforms[0].folder
    assert place is not None
    other = tmp_path / "other"
    shutil.copytree(place, other)

    def opened() -> None:
        print_of = models.hash_files([p for p in other.iterdir() if p.is_file()])
        models.load(replace(tuned.model, transforms=(Transform("adapter", print_of, other),)), home)

    opened()
    config, weights = other / "adapter_config.json", other / "adapter_model.safetensors"
    text = config.read_text()
    for changed in ({"peft_type": "XLORA"}, {"megatron_config": {"a": 1}, "megatron_core": "other.payload"}, []):
        config.write_text(json.dumps({**json.loads(text), **changed} if changed else changed))
        with pytest.raises(ModelError, match="none that whet wrote"):
            opened()
    config.write_text(text)
    weights.rename(other / "adapter_model.bin")  # peft would unpickle it
    with pytest.raises(ModelError, match="none that whet wrote"):
        opened()


def test_a_link_out_of_a_system_is_refused(tuned: System, tmp_path: Path, home: Path) -> None:
    folder = tuned.save(tmp_path / "hub" / "snapshots" / "system")
    (tmp_path / "secret").write_text("key")
    [place] = (folder / "transforms").iterdir()
    (place / ".k").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="is a link out of the System"):
        systems.load(folder, home)
    (place / ".k").unlink()
    (tmp_path / "hub" / "blobs").mkdir()
    shutil.move(folder / "README.md", tmp_path / "hub" / "blobs" / "abc")
    (folder / "README.md").symlink_to("../../blobs/abc")  # as the Hub's cache does
    assert systems.load(folder, home).fingerprint == tuned.fingerprint
    shutil.copytree(folder, tmp_path / "hub" / "snapshots" / "rev" / "system", symlinks=True)
    within = tmp_path / "hub" / "snapshots" / "rev" / "system"  # what improve leaves, uploaded as it is
    (within / "README.md").unlink()
    (within / "README.md").symlink_to("../../../blobs/abc")
    assert systems.load(within, home).fingerprint == tuned.fingerprint


def test_a_base_that_changed_is_refused(tmp_path: Path, home: Path) -> None:
    base = save_model(tmp_path / "base")
    folder = System(models.resolve(base), home=home).save(tmp_path / "system")
    assert systems.load(folder).model.content == models.resolve(base).content
    save_model(tmp_path / "base", seed=1)
    with pytest.raises(ArtifactError, match="is not the one this System was made with"):
        systems.load(folder)
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="cannot find the model"):
        systems.load(folder)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are no folder are looked up in the Hub: never over a network here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_base_named_by_a_relative_path_is_found_from_another_folder(
    model_folder: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    shutil.copytree(model_folder, here / "my-model")
    monkeypatch.chdir(here)
    made = System(models.resolve("./my-model"), home=home)
    made.save("system")
    monkeypatch.chdir(there)
    again = systems.load(here / "system", home)
    assert again.fingerprint == made.fingerprint and again.model.base == str(here / "my-model")
    assert models.load(again.model, home)
    assert ModelRef("fake:keyword", "fake:keyword").lasting == "fake:keyword"


def test_what_goes_on_from_a_self_contained_system_is_one(home: Path, tmp_path: Path) -> None:
    """Of a GGUF file the base lies unpacked in the System's folder, whose hash is not the file's."""
    (tmp_path / "m.gguf").write_bytes(b"stands in for one")
    ref = models.resolve(str(tmp_path / "m.gguf"))
    save_model(home / "models" / ref.content)
    loaded = systems.load(System(ref, "say", home=home).save(tmp_path / "a", self_contained=True), home)
    again = systems.load(loaded.save(tmp_path / "b"), home)
    assert again.fingerprint == loaded.fingerprint and Path(again.model.base).is_relative_to(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert models.load(again.model, home)


def test_self_contained(tuned: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = save_model(tmp_path / "base")
    tuned = replace(tuned, model=replace(tuned.model, base=own))  # the same contents, in a place we may remove
    folder = tuned.save(tmp_path / "system", self_contained=True)
    wanted = scores_of(tuned)
    shutil.rmtree(own)
    shutil.rmtree(tuned.home)
    moved = shutil.move(folder, tmp_path / "moved")
    loaded = systems.load(moved, tmp_path / "another home")
    assert loaded.fingerprint == tuned.fingerprint
    assert Path(loaded.model.base).is_relative_to(moved)
    assert scores_of(loaded) == wanted
    again = systems.load(loaded.save(tmp_path / "again", self_contained=True))
    assert scores_of(again) == wanted
    with (Path(moved) / "base" / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x7f")
    with pytest.raises(ArtifactError, match="base has changed"):
        systems.load(moved)
    shutil.rmtree(Path(moved) / "base")
    with pytest.raises(ArtifactError, match="is incomplete"):
        systems.load(moved)


def test_a_base_that_came_along_is_told_from_another(home: Path, tmp_path: Path) -> None:
    own = save_model(tmp_path / "own")
    folder = System(models.resolve(own), "say", home=home).save(tmp_path / "system", self_contained=True)
    save_model(folder / "base", seed=1)
    body = json.loads((folder / "system.json").read_text())
    body["base_hash"] = models.hash_files([p for p in (folder / "base").iterdir() if p.is_file()])
    (folder / "system.json").write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match="is not the model this System was made with"):
        systems.load(folder, home)
    # Of a packed one, nothing says what it unpacks to: what is scored with it is kept apart.
    (tmp_path / "m.gguf").write_bytes(b"stands in for one")
    ref = models.resolve(str(tmp_path / "m.gguf"))
    states = []
    for seed in (0, 1):
        shutil.rmtree(home / "models", ignore_errors=True)
        save_model(home / "models" / ref.content, seed=seed)
        made = System(ref, "say", home=home)
        states.append(systems.load(made.save(tmp_path / str(seed), self_contained=True), home).state)
    assert len({*states, made.state}) == 3


def test_self_contained_needs_no_base_where_the_model_is_a_server(tmp_path: Path) -> None:
    folder = FULL.save(tmp_path / "system", self_contained=True)
    assert not (folder / "base").exists()
    assert systems.load(folder) == FULL


# --- demonstrations ---------------------------------------------------------------------------------------------------


class Stub:
    """An embedder by hand: a text's vector is looked up."""

    def __init__(self, vectors: dict[str, tuple[float, float]]) -> None:
        self.vectors = vectors

    def __call__(self, texts: Any) -> Any:
        found = np.array([self.vectors[t] for t in texts], np.float32).reshape(len(texts), 2)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


EAST, NORTH, WEST = ("east", "1"), ("north", "2"), ("west", "3")
STUB = Stub({"east": (1, 0), "north": (0, 1), "west": (-1, 0.1), "northeast": (1, 0.9), "far west": (-5, 0)})


def test_nearest_demonstrations() -> None:
    demos = Demonstrations((EAST, NORTH, WEST), 2, "nearest")
    found = demos.choose(["northeast", "far west"], STUB)  # type: ignore[arg-type]
    assert found == [(NORTH, EAST), (NORTH, WEST)]  # the nearest last
    assert replace(demos, k=1).choose(["far west"], STUB) == [(WEST,)]  # type: ignore[arg-type]
    assert replace(demos, k=9).choose(["northeast"], STUB) == [(WEST, NORTH, EAST)]  # type: ignore[arg-type]
    assert replace(demos, pool=()).choose(["northeast"], STUB) == [()]  # type: ignore[arg-type]


def test_equally_near_ones_keep_the_order_of_the_pool() -> None:
    stub = Stub({"a": (1, 0), "b": (1, 0), "c": (1, 0), "q": (1, 0)})
    demos = Demonstrations((("a", "1"), ("b", "2"), ("c", "3")), 2, "nearest")
    assert demos.choose(["q"], stub) == [(("b", "2"), ("a", "1"))]  # type: ignore[arg-type]


def test_the_nearest_of_many_are_those_of_a_full_sort() -> None:
    draw = np.random.default_rng(0)
    vectors = {f"q{n}": (float(x), float(y)) for n, (x, y) in enumerate(draw.integers(-3, 4, (300, 2)) + 0.5)}
    pool, stub = tuple((q, q) for q in [*list(vectors)[:200], "q3", "q3"]), Stub(vectors)
    near = stub(list(vectors)) @ stub([q for q, _ in pool]).T
    for blind in (False, True):
        order = [[i for i in row if not blind or pool[i][0] != f"q{n}"]
                 for n, row in enumerate(np.argsort(-near, axis=1, kind="stable"))]  # fmt: skip
        wanted = [tuple(pool[i] for i in reversed(row[:5])) for row in order]
        found = Demonstrations(pool, 5, "nearest").choose(list(vectors), stub, blind=blind)  # type: ignore[arg-type]
        assert found == wanted
    pool, asked = tuple((f"q{n % 300}", str(n)) for n in range(5000)), [f"q{n % 300}" for n in range(1000)]
    tracemalloc.start()
    Demonstrations(pool, 5, "nearest").choose(asked, stub, blind=True)  # type: ignore[arg-type]
    assert tracemalloc.get_traced_memory()[1] < 8e6  # all similarities at once would be 20 MB, their order 40 more
    tracemalloc.stop()


def test_fixed_demonstrations() -> None:
    demos = Demonstrations((EAST, NORTH), 0, "fixed")
    assert demos.choose(["east", "x"], None) == [(EAST, NORTH)] * 2


def test_blind_demonstrations_never_show_the_questions_own_answer() -> None:
    pool = (EAST, NORTH, ("east", "another"), WEST)
    near = Demonstrations(pool, 2, "nearest")
    assert near.choose(["east", "northeast"], STUB, blind=True) == [  # type: ignore[arg-type]
        (WEST, NORTH), (("east", "another"), EAST),
    ]  # fmt: skip
    assert near.choose(["east"], STUB)[0][-1] == EAST  # type: ignore[arg-type]
    assert Demonstrations(pool).choose(["east", "x"], None, blind=True) == [(NORTH, WEST), pool]


some_rows = st.lists(st.sampled_from("abcd"), min_size=1, max_size=30).map(
    lambda answers: [Example(str(n), f"q{n}", a) for n, a in enumerate(answers)]
)


@given(some_rows, st.integers(1, 35), st.integers(0, 5))
def test_balanced(rows: list[Example], k: int, seed: int) -> None:
    chosen = balanced(rows, k, seed)
    assert len(chosen) == min(k, len(rows))
    assert len({e.id for e in chosen}) == len(chosen)
    assert balanced(rows, k, seed) == chosen
    there, taken = Counter(e.completion for e in rows), Counter(e.completion for e in chosen)
    # As even as the rows allow: whoever has fewer than the most has given all it has.
    most = max(taken.values())
    assert all(taken[a] >= most - 1 or taken[a] == there[a] for a in there)


def test_balanced_is_a_matter_of_the_seed() -> None:
    rows = [Example(str(n), f"q{n}", "ab"[n % 2]) for n in range(20)]
    picks = {tuple(e.id for e in balanced(rows, 3, seed)) for seed in range(20)}
    assert len(picks) > 15
    assert len({Counter(e.completion for e in balanced(rows, 3, s))["a"] for s in range(20)}) == 2


ROWS = tuple(Example(f"r{n}", f"movie number {n}", LABELS[n % 2]) for n in range(10))
DATA = Learnable("tiny", "Say which.", "accuracy", LABELS, ROWS)


def test_few_shot(home: Path) -> None:
    run = Run(Store(home), sessions={FULL.model: FakeSession("hash")})
    got = FewShot(k=4).apply(FULL, DATA, run)
    assert Counter(a for _, a in got.demonstrations.pool) == {"positive": 2, "negative": 2}
    assert got.demonstrations.selection == "fixed"
    assert got.decoding.prior == ()  # calibration was of other prompts
    assert FULL.decoding.prior
    assert got == FewShot(k=4).apply(FULL, DATA, run)
    assert got != FewShot(k=4).apply(FULL, DATA, replace(run, seed=1))
    grouped = FewShot(k=4, order="grouped").apply(FULL, DATA, run)
    assert [a for _, a in grouped.demonstrations.pool] == ["negative"] * 2 + ["positive"] * 2
    assert sorted(grouped.demonstrations.pool) == sorted(got.demonstrations.pool)
    near = FewShot(k=3, selection="nearest").apply(FULL, DATA, run)
    assert near.demonstrations == Demonstrations(tuple((e.prompt, e.completion) for e in ROWS), 3, "nearest")
    fixed = FewShot(selection="fixed", ids=("r3", "r0")).apply(FULL, DATA, run)
    assert [q for q, _ in fixed.demonstrations.pool] == ["movie number 3", "movie number 0"]
    with pytest.raises(MethodError, match="no such demonstrations.*r99"):
        FewShot(selection="fixed", ids=("r99",)).apply(FULL, DATA, run)
    free = replace(DATA, labels=())
    assert len(FewShot(k=4).apply(FULL, free, run).demonstrations.pool) == 4


@pytest.mark.parametrize(
    "settings", [{"k": 0}, {"selection": "diverse?"}, {"order": "x"}, {"selection": "fixed"}, {"ids": ("a",)}]
)
def test_wrong_settings_of_few_shot(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        FewShot(**settings)


# --- calibration ------------------------------------------------------------------------------------------------------


def test_batch_prior_closed_form() -> None:
    # softmax of (0, 0) is (1/2, 1/2); of (log 3, 0) it is (3/4, 1/4); their mean is (5/8, 3/8).
    assert batch_prior([(0.0, 0.0), (math.log(3), 0.0)]) == pytest.approx((math.log(5 / 8), math.log(3 / 8)))
    assert batch_prior([(-1e4, -1e4 - math.log(3))]) == pytest.approx((math.log(3 / 4), math.log(1 / 4)))
    assert batch_prior([(0.0, -1e5)]) == pytest.approx((0.0, math.log(1e-12)))  # never minus infinity


def test_a_fitted_prior_finds_a_leaning_and_how_frequent_labels_are() -> None:
    draw = np.random.default_rng(0)
    right = draw.integers(0, 3, 600).tolist()
    lean = np.array([1.5, 0.0, -1.5])
    scores = draw.normal(size=(600, 3)) + 2 * np.eye(3)[right] + lean
    prior = np.array(fitted_prior(scores.tolist(), right))
    assert prior - prior[1] == pytest.approx(lean, abs=0.35)
    # Scores that say nothing leave the frequencies: the most frequent label wins, unlike under batch calibration.
    right = [0] * 75 + [1] * 25
    noise = draw.normal(size=(100, 2))
    best = (noise - np.array(fitted_prior(noise.tolist(), right))).argmax(axis=1)
    assert (best == 0).mean() > 0.95 > (noise - np.array(batch_prior(noise.tolist()))).argmax(axis=1).mean()
    flat = fitted_prior([[0.0, 0.0]] * 100, right)
    assert flat[1] - flat[0] == pytest.approx(math.log(3), abs=0.1)  # its log-odds, but for the prior on them
    assert fitted_prior([[5.0, 5.0]] * 100, right) == pytest.approx(flat)  # a shift of all scores says nothing
    alone = fitted_prior([[0.0, 0.0]] * 4, [0] * 4)  # a label that was not seen is not ruled out
    assert all(math.isfinite(v) for v in alone) and alone[1] - alone[0] < 3


@given(st.lists(st.tuples(*[st.floats(-50, 50)] * 3), min_size=1, max_size=8), st.floats(-50, 50))
def test_batch_prior_properties(rows: list[tuple[float, ...]], shift: float) -> None:
    prior = batch_prior(rows)
    assert sum(map(math.exp, prior)) == pytest.approx(1.0, abs=1e-9)
    assert batch_prior([tuple(s + shift for s in row) for row in rows]) == pytest.approx(prior, abs=1e-6)
    assert batch_prior(rows[::-1]) == pytest.approx(prior)
    turned = batch_prior([row[1:] + row[:1] for row in rows])
    assert turned == pytest.approx(prior[1:] + prior[:1])


def test_where_the_model_gave_no_answer_there_is_none() -> None:
    silent = (UNANSWERED,) * len(LABELS)
    rows = [silent, (-0.1, *(-3.0 for _ in LABELS[1:]))]
    prior = batch_prior(rows)
    assert all(map(math.isfinite, fitted_prior(rows, [0, 1])))
    for said in ((), prior):  # an unanswered prompt leans to no label
        assert System(FAKE, decoding=Decoding(LABELS, True, prior=said)).decide(silent).text == ""
    assert all(map(math.isfinite, prior))


def test_an_answer_that_was_not_given_counts_as_failed(tiny: System, session: Session) -> None:
    rows = [Example(str(n), f"movie {n}", LABELS[0]) for n in range(3)]
    mute = replace(tiny, decoding=replace(tiny.decoding, prior=(1e9, 1e9)))
    card = evaluate(mute, rows, get("accuracy"), session=session)
    assert card.failed == 3 and {o.error for o in card.outcomes} == {"no answer"}


def test_calibrate(tiny: System, home: Path) -> None:
    run = Run(Store(home))
    got = Calibrate(prompts=8).apply(tiny, DATA, run)
    session = run.session(tiny.model)
    sampled = {}
    for e in ROWS:
        [scores], _ = tiny.label_scores([e], session)
        sampled[e.id] = scores
    sample = random.Random(0).sample(ROWS, 8)
    assert got.decoding.prior == pytest.approx(batch_prior([sampled[e.id] for e in sample]), abs=1e-4)
    assert got == Calibrate(prompts=8).apply(got, DATA, run)  # an old prior leaves no trace
    # It looks at prompts only.
    swapped = replace(DATA, train=tuple(replace(e, completion=LABELS[0]) for e in ROWS))
    assert Calibrate(prompts=8).apply(tiny, swapped, run) == got
    fitted = Calibrate(kind="fitted", prompts=8).apply(tiny, DATA, run)
    right = [LABELS.index(e.completion) for e in sample]
    assert fitted.decoding.prior == pytest.approx(fitted_prior([sampled[e.id] for e in sample], right), abs=1e-2)
    # Answers are the scores minus the prior.
    [plain], [shifted] = tiny.answers([ROWS[0]], session), got.answers([ROWS[0]], session)
    assert shifted.scores == pytest.approx([s - p for s, p in zip(plain.scores, got.decoding.prior, strict=True)])
    assert shifted.text == LABELS[int(np.argmax(shifted.scores))]


def test_calibration_hides_the_prompts_that_are_shown(tiny: System, home: Path) -> None:
    run = Run(Store(home))
    pool = tuple((e.prompt, e.completion) for e in ROWS[:7])
    shown = replace(tiny, demonstrations=Demonstrations(pool))
    asked: list[str] = []
    session = run.session(tiny.model)
    score = session.score

    def watch(prompts: Any, *args: Any, **settings: Any) -> Any:
        asked.extend(chat[-1][1] for chat in prompts)
        return score(prompts, *args, **settings)

    session.score = watch  # type: ignore[method-assign]
    Calibrate().apply(shown, DATA, run)
    assert sorted(asked) == [e.prompt for e in ROWS[7:]]
    everything = replace(tiny, demonstrations=Demonstrations(tuple((e.prompt, e.completion) for e in ROWS)))
    with pytest.raises(MethodError, match="nothing to calibrate on"):
        Calibrate().apply(everything, DATA, run)
    with pytest.raises(ValueError):
        Calibrate(prompts=1)
    with pytest.raises(ValueError):
        Calibrate(kind="nonsense")


def test_calibration_shows_the_nearest_of_few_rows(tiny: System, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is hidden from itself alone: were all hidden from all, another prompt would be calibrated."""
    run, chats = Run(Store(home)), list[Any]()
    near = replace(tiny, demonstrations=Demonstrations(tuple((e.prompt, e.completion) for e in ROWS), 3, "nearest"))
    alike = lambda texts, **_: np.ones((len(texts), 2), np.float32)  # noqa: E731
    monkeypatch.setattr(System, "embedder", property(lambda _: alike))
    session = run.session(tiny.model)
    score = session.score
    session.score = lambda prompts, *args, **more: chats.extend(prompts) or score(prompts, *args, **more)  # type: ignore
    Calibrate().apply(near, DATA, run)
    assert len(chats) == len(ROWS)
    for chat in chats:
        users = [text for role, text in chat if role == "user"]
        assert len(users) == 4 and users[-1] not in users[:-1]


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def session(tiny: System) -> Session:
    return tiny.session


def chat(system: System, question: str) -> Any:
    return messages(system.instruction, (), question)


def test_what_was_said_before_is_looked_up_too(monkeypatch: pytest.MonkeyPatch, tiny: System) -> None:
    seen: list[Query] = []

    def found(_: System, questions: list[Query], k: int | None = None) -> list[list[Any]]:
        seen.extend(questions)
        return [[] for _ in questions]

    monkeypatch.setattr(System, "found", found)
    turns = (("user", "hello"), ("assistant", "yes?"), ("user", "my kettle leaks"), ("assistant", "sorry"))
    tiny.prompts([Example("1", "how long is its warranty?", history=turns), Example("2", "and a lamp?")])
    assert seen == [Query("how long is its warranty?", "my kettle leaks"), Query("and a lamp?")]


@pytest.mark.parametrize("normalise", ["mean", "sum"])
def test_answers_of_a_closed_set(tiny: System, session: Session, normalise: str) -> None:
    system = replace(tiny, decoding=replace(tiny.decoding, normalise=normalise))
    questions = ["movie 1", "was it great and funny?", "a review of the film"]
    answers = system.answers(questions, session)
    scored = session.score([chat(tiny, q) for q in questions], [LABELS] * 3, end=normalise == "sum")
    for answer, row in zip(answers, scored, strict=True):
        wanted = [s.logprob if normalise == "sum" else s.mean for s in row]
        assert answer.scores == pytest.approx(wanted, abs=1e-4)
        assert answer.text == LABELS[int(np.argmax(wanted))]
        assert not answer.truncated
    assert system.answer(questions, session) == [a.text for a in answers]
    assert system.answer(questions[0], session) == answers[0].text
    assert system.answers([], session) == []


def test_the_prior_decides(tiny: System, session: Session) -> None:
    for n, label in enumerate(LABELS):
        prior = tuple(-1e3 if i == n else 0.0 for i in range(2))
        system = replace(tiny, decoding=replace(tiny.decoding, prior=prior))
        assert system.answer(["a", "b"], session) == [label] * 2


def test_a_calibrated_system_is_read_off_the_scores_that_are_kept(
    tiny: System, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, store, asked = ("a", "movie 2", "the movie was great " * 400, "was it great?"), Store(tmp_path), list[str]()
    rows = [Example(str(n), text, LABELS[n % 2]) for n, text in enumerate(texts)]
    gaps = sorted(a - b for a, b in tiny.label_scores(rows, session)[0])
    prior = ((gaps[1] + gaps[2]) / 2, 0.0)  # two of the four rows get either label
    calibrated, answers = replace(tiny, decoding=replace(tiny.decoding, prior=prior)), System.answers

    def watched(self: System, some: Any, *more: Any) -> Any:
        asked.extend(e.id for e in some)
        return answers(self, some, *more)

    def card(system: System, some: list[Example], store: Store | None = None) -> Any:
        return evaluate(system, some, get("accuracy"), session=session, store=store)

    monkeypatch.setattr(System, "answers", watched)
    assert card(tiny, rows, store).truncated == 1 and asked == ["0", "1", "2", "3"]
    before = session.spent
    kept = card(calibrated, rows, store)
    assert session.spent == before and kept.spent == Spent()
    again = card(calibrated, rows)
    assert kept.outcomes == again.outcomes and kept.truncated == again.truncated == 1
    assert sorted(o.answer for o in kept.outcomes) == ["negative"] * 2 + ["positive"] * 2
    more = [Example("new", "a review of the film", LABELS[0]), *rows]
    asked.clear()
    found = card(calibrated, more, store)
    assert asked == ["new"] and found.outcomes == card(calibrated, more).outcomes


def test_rows_with_choices_of_their_own(tiny: System, session: Session) -> None:
    biased = replace(tiny, decoding=replace(tiny.decoding, prior=(-1e3, 0.0)))
    own = (("red", "green", "blue"), ("yes", "no"), ())
    rows = [Example(str(n), "a", choices=choices) for n, choices in enumerate(own)]
    answers = biased.answers(rows, session)
    assert [len(a.scores) for a in answers] == [3, 2, 2]
    assert all(a.text in (e.choices or LABELS) for a, e in zip(answers, rows, strict=True))
    scored = session.score([chat(tiny, "a")] * 3, [e.choices or LABELS for e in rows])
    for answer, row, prior in zip(answers, scored, [(0.0,) * 3, (0.0,) * 2, (-1e3, 0.0)], strict=True):
        assert answer.scores == pytest.approx([s.mean - p for s, p in zip(row, prior, strict=True)], abs=1e-3)
    open_labels = replace(tiny, decoding=Decoding((), True, max_tokens=4))
    assert [a.text for a in open_labels.answers(rows[:2], session)] == [a.text for a in answers[:2]]
    for system in (biased, open_labels):  # beside others each is answered as it is alone
        assert [system.answers([e], session)[0].text for e in rows] == [a.text for a in system.answers(rows, session)]


def test_perplexity_of_prompts_that_do_not_fit(tiny: System, session: Session) -> None:
    rows = [Example(str(n), text, "great film") for n, text in enumerate(("a", "the movie was great " * 400))]
    card = evaluate(tiny, rows, get("perplexity"), session=session)
    assert card.truncated == 1 and card.failed == 0
    alone = session.score(tiny.prompts(rows[:1]), [["great film"]])[0][0]
    assert card.outcomes[0].score == pytest.approx(-alone.mean) and card.outcomes[0].weight == alone.tokens


def test_a_text_whose_likelihood_is_no_number_costs_what_a_failed_row_does() -> None:
    session, rows = FakeSession("echo"), [Example("1", "", text="one two"), Example("2", "", text="a bad text")]
    session.rate = lambda _, text: -math.inf if "bad" in text else -1.5
    card = evaluate(System(FAKE), rows, get("perplexity"), session=session)
    assert [o.error for o in card.outcomes] == [None, "the log-probability is not finite"] and card.failed == 1
    assert [o.weight for o in card.outcomes] == [2, 3] and card.outcomes[0].score == 0.75
    assert card.score == pytest.approx(math.exp((1.5 + 3 * 18 * math.log(2)) / 5))
    assert math.isfinite(card.low) and math.isfinite(card.high)


def test_answers_that_are_cut_are_counted(tiny: System, session: Session, tmp_path: Path) -> None:
    rows = [Example(str(n), text, "great film") for n, text in enumerate(("a", "the movie", "was great"))]
    store = Store(tmp_path)
    for room in (2, 2):  # the second time from the store
        system = replace(tiny, decoding=Decoding((), False, max_tokens=room))
        finishes = [a.finish for a in system.answers(rows, session)]
        card = evaluate(system, rows, get("exact_match"), session=session, store=store)
        assert card.unended == finishes.count("length") > 0


def test_answers_by_generation(tiny: System, session: Session) -> None:
    for closed in (False, True):  # closed, but of a row without any set: generated, too
        system = replace(tiny, decoding=Decoding((), closed, max_tokens=7, stop=("zzz",)))
        found = system.answers(["movie 1", "a review"], session)
        wanted = session.generate([chat(tiny, q) for q in ("movie 1", "a review")], Sampling(7, stop=("zzz",)))
        assert [a.text for a in found] == [g[0].text.strip() for g in wanted]
        assert all(a.scores == () for a in found)


def test_history_and_demonstrations_are_sent(tiny: System) -> None:
    system = replace(tiny, demonstrations=Demonstrations((EAST,)))
    row = Example("1", "and now?", history=(("user", "before"), ("assistant", "said")))
    assert system.prompts([row, Example("2", "", text="raw")]) == [
        messages(tiny.instruction, [EAST], "and now?", row.history), "",
    ]  # fmt: skip


@pytest.mark.parametrize("closed", [False, True])
def test_prompts_that_do_not_fit_are_shortened_and_counted(tiny: System, session: Session, closed: bool) -> None:
    labels = ("positive " * 20, "negative")
    system = replace(tiny, decoding=Decoding(labels, True) if closed else Decoding(max_tokens=180))
    long = "start " + "the movie was great " * 200 + "end"
    short, cut, again = system.answers(["short", long, "short"], session)
    assert (short.truncated, cut.truncated, again.truncated) == (False, True, False)
    assert short == again
    room = 180
    [prompt], [was_cut] = system.fitting([Example("1", long)], session, [room])
    assert was_cut
    assert session.count([prompt])[0] + room <= session.context
    assert prompt[0] == ("system", tiny.instruction)
    text = prompt[1][1]
    assert text.startswith("start ") and text.endswith("end") and " … " in text
    assert session.count([prompt])[0] > session.context - room - 100  # no more than needed
    if closed:
        scores, who = system.label_scores([Example("1", long), Example("2", "short")], session)
        assert who == [True, False]
        assert scores == [pytest.approx(cut.scores, abs=1e-4), pytest.approx(short.scores, abs=1e-4)]


def test_long_choices_take_the_room_of_their_tokens_not_of_their_bytes(tiny: System, session: Session) -> None:
    choices = ("positive " * 12 + "x", "the movie was bad " * 5 + "x")
    taken = max(session.count(choices))
    assert taken + 30 < max(map(len, choices))  # else this tells nothing
    system = replace(tiny, decoding=Decoding((), True))

    def row(size: int) -> Example:
        return Example("1", "the movie was great " * size + "end", choices=choices)

    size = max(n for n in range(200) if session.count(system.prompts([row(n)]))[0] + taken + 3 <= session.context)
    fits, cut = system.answers([row(size), row(size + 2)], session)
    assert (fits.truncated, cut.truncated) == (False, True)
    assert system.room(row(1), session) == taken + 3
    assert system.room(Example("1", "x", choices=("yes", "no")), session) == 5
    assert replace(tiny, decoding=Decoding(max_tokens=9)).room(Example("1", "x"), session) == 9


def test_passages_that_do_not_fit_are_not_shown_from_the_last_on(tiny: System, session: Session) -> None:
    def told(*lengths: int) -> list[Found]:
        return [Found(Passage(f"d{n}", "", f"{n} " + "the movie was great " * size, "", 0), 1.0)
                for n, size in enumerate(lengths)]  # fmt: skip

    fits, many, long = told(3), told(*[25] * 6), told(200, 3)
    for decoding in (Decoding(LABELS, True), Decoding(max_tokens=20)):
        system = replace(tiny, decoding=decoding)
        answers = system.answers(["short"] * 3, session, found=[fits, many, long])
        assert [a.truncated for a in answers] == [False, True, True]
        shown = answers[1].passages
        assert answers[0].passages == tuple(fits) and 1 < len(shown) < 6 and shown == tuple(many[: len(shown)])
        assert answers[2].passages == ()  # the best one is shown in part: it does not count
    row, room = Example("1", "short"), [20]
    [prompt], _ = tiny.fitting([row], session, room, found=[many])
    assert [prompt] == tiny.prompts([row], found=[shown]) and " … " not in prompt[-1][1]
    [prompt], _ = tiny.fitting([row], session, room, found=[long])
    assert " … " in prompt[-1][1] and session.count([prompt])[0] + 20 <= session.context
    # Short facts stay beside long demonstrations: those are cut.
    shown = replace(tiny, demonstrations=Demonstrations((("the movie was great " * 90, "positive"),)))
    [answer] = shown.answers(["short"], session, found=[told(1, 1)])
    assert answer.truncated and len(answer.passages) == 2


def test_the_whole_as_a_user_would(tmp_path: Path, home: Path, fp32: None) -> None:
    import whet

    folder = save_model(tmp_path / "model", "qwen2")
    system = System(models.resolve(folder), "Say.", decoding=Decoding(LABELS, True), home=home)
    answer = system.answer("was it great?")
    assert answer in LABELS
    assert whet.load(system.save(tmp_path / "system")).answer("was it great?") == answer
    assert torch.is_grad_enabled()


def test_a_server_needs_trust(tmp_path: Path) -> None:
    name = "openai:model@http://127.0.0.1:9/v1"
    folder = replace(FULL, model=ModelRef(name, name)).save(tmp_path / "system")
    with pytest.raises(ArtifactError, match=r"--trust.*127\.0\.0\.1"):
        systems.load(folder)
    assert systems.load(folder, trust=True).model.base == name
