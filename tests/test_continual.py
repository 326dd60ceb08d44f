"""Continual learning: penalties, merging, what is carried, what is measured, and a stream in the small."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from models import make_model, make_tokenizer
from safetensors.torch import load_file

from whet import embed
from whet import model as models
from whet import update as updating
from whet.cli import main
from whet.engine import Spent
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession
from whet.errors import ArtifactError, MethodError, TaskError
from whet.feedback import Judged, paired
from whet.general import ability, tasks
from whet.memory import Known, as_task, at_hand, carried, for_task, known, made_up, remember
from whet.methods import Run, lacking, make
from whet.methods.continual import Continual, replayed_share
from whet.methods.finetune import Disputed, FineTune
from whet.methods.rag import Rag
from whet.metrics import Outcome, get
from whet.model import Transform
from whet.retention import Lost, drift, forgetting, loss, moved_by, refused, retention
from whet.retention import stream as updates
from whet.scorecard import Scorecard, evaluate
from whet.search import base_system
from whet.search.out import made_for
from whet.splits import Sealed
from whet.store import Store
from whet.suspects import Suspect
from whet.system import Decoding, System, load
from whet.task import Example, Learnable, Query, Task
from whet.task import load as load_task
from whet.train import adapters, batches, lesson
from whet.train.adapters import Adapter, adapted, add_lora
from whet.train.fit import Doubling
from whet.train.lesson import render_rows
from whet.train.loop import _step
from whet.train.losses import NextToken
from whet.train.protect import elastic, fisher, lora_layers, merged, mixed, orthogonal
from whet.train.team import Alone
from whet.update import _overdone, _refused, begin, check, own, update

HEAD = tuple(range(10, 45))
ROWS = [Row(HEAD + (5, 6), ((7, 8, 9),)), Row(HEAD + (5, 7), ((7, 4),)), Row((3, 4), ((1, 6),))]
WORDS = ["apple", "stone", "river", "cloud", "horse", "table", "light", "paper"]


# --- the matrix ------------------------------------------------------------------------------------------------------


def test_retention_of_a_matrix_made_by_hand() -> None:
    start, first, second, third = [0.5, 0.2, 0.3], [0.9, 0.3, 0.3], [0.7, 0.8, 0.5], [0.6, 0.7, 0.9]
    found = retention([start, first, second, third])
    assert found.average == pytest.approx((0.6 + 0.7 + 0.9) / 3)
    assert found.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.7)) / 2)
    assert found.backward == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert found.forward == pytest.approx(((0.3 - 0.2) + (0.5 - 0.3)) / 2)
    assert found.newest == pytest.approx((0.9 + 0.8 + 0.9) / 3)


def test_a_task_that_later_ones_help_has_its_best_later() -> None:
    found = retention([[0.0] * 3, [0.5, 0, 0], [0.8, 0.5, 0], [0.7, 0.5, 0.5]])
    assert found.forgetting == pytest.approx((0.1 + 0.0) / 2)  # from its best, after the second task
    assert found.backward == pytest.approx((0.2 + 0.0) / 2)  # against when it was learnt


@pytest.mark.parametrize("matrix", [[[0.5], [0.9]], [[0.5, 0.5], [0.9, 0.5]], [[0.5, 0.5], [0.9, 0.5], [0.9]], []])
def test_what_is_no_stream(matrix: list[list[float]]) -> None:
    with pytest.raises(TaskError, match="no stream"):
        retention(matrix)


def test_a_stream_of_updates_by_hand() -> None:
    one = ({"a": 0.9}, {"a": 0.8, "b": 0.7})
    found = updates([one])
    assert found.tasks == ("a", "b") and found.matrix == ((0.9, None), (0.8, 0.7))
    assert (found.average, found.forgetting, found.backward) == pytest.approx((0.75, 0.1, -0.1))
    # b was 0.7 on its test rows, and is 0.6 on those it is measured by from then on.
    found = updates([one, ({"a": 0.8, "b": 0.6}, {"a": 0.85, "b": 0.5, "c": 0.4})])
    assert found.matrix == ((0.9, None, None), (0.8, 0.6, None), (0.85, 0.5, 0.4))
    assert found.average == pytest.approx((0.85 + 0.5 + 0.4) / 3)
    assert found.forgetting == pytest.approx((0.05 + 0.1) / 2) and found.backward == pytest.approx(-(0.05 + 0.1) / 2)
    better = updates([({"a": 0.5}, {"a": 0.8, "b": 0.7})])  # what gains has lost nothing
    assert better.forgetting == 0 and better.backward == pytest.approx(0.3)
    lower = updates([({"a": 20.0}, {"a": 30.0, "b": 0.5})], {"a"})  # a perplexity is no share to average
    assert lower.matrix == ((20.0, None), (30.0, 0.5)) and (lower.average, lower.forgetting) == (0.5, None)
    ahead = updates([one, one, one], ahead=[None, 0.2, -0.1])  # what is taught first has nothing to be ahead of
    assert ahead.forward == pytest.approx(0.05) and found.forward is None
    alone = updates([({}, {"a": 0.5})])
    assert alone.average == 0.5 and alone.forgetting is None and alone.backward is None


def test_common_questions_have_one_right_answer_each() -> None:
    text, asked = tasks()
    assert len(text.test) == 6 and all(e.text and len(e.text.split()) > 60 for e in text.test)
    assert len({e.prompt for e in asked.test}) == len(asked.test) == 48
    assert all(len(set(e.choices)) == 4 and e.completion in e.choices for e in asked.test)


# --- penalties -------------------------------------------------------------------------------------------------------


def lora(seed: int = 0, trained: bool = True) -> Any:
    """A tiny model with an adapter; B is not zero, as after some training."""
    tuned = add_lora(make_model("llama").requires_grad_(False), Adapter("lora", 4, 8), seed)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if trained and "lora_B" in name:
                value.normal_(0, 0.1)
    return tuned


def test_fisher_is_the_mean_squared_gradient_of_each_row() -> None:
    plain = make_model("llama")
    names = {n.removesuffix(".weight") for n, p in plain.named_parameters() if "_proj" in n}
    wanted = {name: torch.zeros_like(plain.get_submodule(name).weight) for name in names}
    for row in ROWS:
        plain.zero_grad()
        ids = torch.tensor([[*row.prompt, *row.continuations[0]]])
        logs = plain(input_ids=ids).logits[0].log_softmax(-1)
        at = len(row.prompt) - 1
        sum(-logs[at + i, t] for i, t in enumerate(row.continuations[0])).backward()  # type: ignore[union-attr]
        for name in names:
            wanted[name] += plain.get_submodule(name).weight.grad ** 2 / len(ROWS)
    module = make_model("llama").requires_grad_(False)
    with adapted(module, Adapter("lora", 4, 8), 0) as tuned:
        found = fisher(tuned, ROWS)
        assert all(p.grad is None for p in tuned.parameters())
        assert not any(layer._forward_hooks for _, layer, *_ in lora_layers(tuned))
    assert {n.removeprefix("base_model.model.") for n in found} == names
    for name, value in found.items():
        close = wanted[name.removeprefix("base_model.model.")]
        assert torch.allclose(value, close, rtol=1e-3, atol=1e-5 * float(close.max())), name


def test_elastic_penalty_closed_form_and_gradients() -> None:
    tuned = lora()
    draw = torch.Generator().manual_seed(0)
    information = {n: torch.rand(b.shape[0], a.shape[1], generator=draw) for n, _, a, b, _ in lora_layers(tuned)}
    penalty = elastic(tuned, information, 3.0)
    penalty().backward()
    found = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    tuned.zero_grad()
    dense = sum((information[n] * (s * b @ a) ** 2).sum() for n, _, a, b, s in lora_layers(tuned))
    wanted = 3.0 / 2 * dense
    wanted.backward()  # type: ignore[union-attr]
    assert float(penalty().detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, value in tuned.named_parameters():
        if value.grad is not None:
            assert torch.allclose(found[name], value.grad, rtol=1e-4, atol=1e-6), name
    assert float(elastic(lora(trained=False), information, 3.0)().detach()) == 0.0  # nothing has moved yet


def saved(folder: Path, tuned: Any) -> Transform:
    tuned.save_pretrained(folder, safe_serialization=True)
    return Transform("adapter", models.hash_files([p for p in folder.iterdir() if p.is_file()]), folder)


def test_orthogonal_penalty_closed_form(tmp_path: Path) -> None:
    earlier, new = [lora(1), lora(2)], lora(3)
    transforms = [saved(tmp_path / str(n), one) for n, one in enumerate(earlier)]
    penalty = orthogonal(new, transforms, 0.5)
    wanted = sum(
        (old[2].detach() @ layer[2].T).abs().sum()
        for one in earlier
        for old, layer in zip(lora_layers(one), lora_layers(new), strict=True)
    )
    assert float(penalty().detach()) == pytest.approx(0.5 * float(wanted), rel=1e-5)
    # Rows orthogonal to the earlier ones cost nothing.
    with torch.no_grad():
        for layer in zip(*(lora_layers(one) for one in (*earlier, new)), strict=True):
            basis = torch.linalg.qr(torch.cat([layer[0][2], layer[1][2]]).T).Q
            layer[2][2].sub_(layer[2][2] @ basis @ basis.T)
    assert float(penalty().detach()) < 1e-3
    with pytest.raises(MethodError, match="nothing to be orthogonal to.*strategy=replay"):
        orthogonal(new, [], 0.5)


class Half(Alone):
    """One of two processes, whose gradients are averaged by the test."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def share(self, rows: Any) -> Any:
        return rows[self.rank :: 2]


@pytest.mark.parametrize("most", [1, 4096])
def test_a_penalty_counts_once_a_step_however_the_step_is_cut(most: int) -> None:
    def gradients(team: Alone | None, penalised: bool) -> dict[str, torch.Tensor]:
        tuned = lora()
        a = [layer[2] for layer in lora_layers(tuned)]

        def penalty() -> torch.Tensor:
            return 0.1 * torch.stack([x.square().sum() for x in a]).sum()

        _step(tuned, tuned, ROWS, NextToken(), most, team=team, penalty=penalty if penalised else None)
        return {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}

    plain, alone = gradients(None, False), gradients(None, True)
    halves = [gradients(Half(rank), True) for rank in (0, 1)]
    weights = dict(lora().named_parameters())
    for name, value in alone.items():
        wanted = plain[name] + (0.2 * weights[name].detach() if "lora_A" in name else 0)
        assert torch.allclose(value, wanted, atol=1e-5), name
        assert torch.allclose((halves[0][name] + halves[1][name]) / 2, wanted, atol=1e-5), name


# --- replay and merging ----------------------------------------------------------------------------------------------


def test_earlier_tasks_take_turns_whatever_their_sizes() -> None:
    new = [Row((1, n), ((9,),)) for n in range(6)]
    small, large = [Row((2, n), ((9,),)) for n in range(2)], [Row((3, n), ((9,),)) for n in range(20)]
    source = mixed(lambda n: new[2 * n : 2 * n + 2], [small, large], 3, 0, 1.0)
    steps = [source(n) for n in range(3)]
    assert {row.facts for step in steps for row in step} == {((1.0,),)}  # answers of one length count alike
    assert steps == [source(n) for n in range(3)]
    steps = [[replace(row, facts=()) for row in step] for step in steps]
    assert [row for step in steps for row in step[:2]] == new
    old = [row for step in steps for row in step[2:]]
    assert [row.prompt[0] for row in old] == [2, 3, 2, 3, 2, 3, 2, 3, 2]
    assert {row for row in old[:4] if row in small} == set(small)  # each once before any twice
    assert len({row for row in old if row in large}) == 4


def test_short_answers_count_as_much_as_long_ones() -> None:
    new, old = Row((5, 6), ((7, 8, 9, 10, 11, 12),)), Row((5, 13), ((14, 2),))
    step = mixed(lambda _: [new], [[old]], 1, 0, 6.0)(0)
    assert [row.facts for row in step] == [((1.0,),), ((3.0,),)]
    module, loss = make_model("llama"), NextToken()
    alone = [_step(module, module, [row], loss)[0] for row in (new, old)]
    assert loss.count(step) == 12 and loss.count([new, old]) == 8
    for most in (2048, 1):
        assert _step(module, module, step, loss, most)[0] == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_adapters_upon_one_another_start_apart(taught: Any) -> None:
    folder, system, _ = taught
    made = teach(taught, Run(Store(folder / "home")), strategy="sequential", epochs=1.0)
    starts = [load_file(t.folder / "adapter_model.safetensors") for t in made.model.transforms if t.folder]
    name = next(n for n in starts[0] if "lora_A" in n)
    first, second = (torch.nn.functional.normalize(one[name].float(), dim=-1) for one in starts)
    assert float((first * second).sum(-1).abs().mean()) < 0.5  # of one seed they would hardly differ


def test_merging_is_dense_arithmetic() -> None:
    base = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0]), "still": torch.ones(2)}
    old = {"w": torch.tensor([2.0, -1.0, 1.1, 1.0]), "still": torch.ones(2)}  # changes 1, -2, 0.1, 0
    new = {"w": torch.tensor([4.0, 2.0, 0.9, 1.0]), "still": torch.ones(2)}  # changes 3, 1, -0.1, 0
    linear = dict(merged(base, [old, new], (1.0, 0.5)))
    assert linear.keys() == {"w"}
    assert torch.allclose(linear["w"], torch.tensor([1 + 1 + 1.5, 1 - 2 + 0.5, 1 + 0.1 - 0.05, 1.0]))
    # Of each change the two largest; where signs disagree, the larger sum decides (Yadav et al. 2023).
    ties = dict(merged(base, [old, new], (1.0, 1.0), "ties", density=0.5))
    assert torch.allclose(ties["w"], torch.tensor([1 + (1 + 3) / 2, 1 - 2.0, 1.0, 1.0]))


# --- what is carried -------------------------------------------------------------------------------------------------


def write(folder: Path, instruction: str, flipped: bool, **header: object) -> Path:
    """A task whose labels follow from the word; flipped, the other way round."""
    folder.mkdir()
    body = {"name": folder.name, "instruction": instruction, "metric": "accuracy", "labels": ["red", "blue"], **header}
    (folder / "task.yaml").write_text(json.dumps(body))
    for part, numbers in (("train", range(12)), ("test", range(50, 53))):
        rows = [
            {"id": f"{part}{i}-{n}", "prompt": f"{word} {n}", "completion": ["red", "blue"][(i % 2) ^ flipped]}
            for n in numbers
            for i, word in enumerate(WORDS)
        ]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def run(tmp_path: Path, fp32: None) -> Run:
    return Run(Store(tmp_path / "home"))


def base_of(folder: str, task: Task, run: Run) -> System:
    ref = models.resolve(folder)
    return base_system(ref, task, task.split().learnable, run.session(ref), run.home)


@pytest.fixture
def stream(tmp_path: Path) -> tuple[Task, Task]:
    first = write(tmp_path / "first", "Name the colour.", False)
    return load_task(first), load_task(write(tmp_path / "second", "Say which it is not.", True, earlier=["../first"]))


def test_a_system_carries_tasks_through_its_folder(
    stream: tuple[Task, Task], run: Run, model_folder: str, tmp_path: Path
) -> None:
    first, second = stream
    system = base_of(model_folder, first, run)
    splits = first.split()
    memory = remember(system, splits.learnable, (), splits.select, keep=10, seed=0)
    held = replace(system, card={"task": "second", "memory": memory})
    held.save(tmp_path / "system")
    again = load(tmp_path / "system", run.home)
    [one] = carried(again)
    assert (one.name, one.metric, len(one.rows)) == ("first", "accuracy", 10)
    assert set(one.rows) <= set(splits.learnable.train) and set(one.held) <= set(splits.select)
    assert abs(sum(e.completion == "red" for e in one.rows) - 5) <= 1
    assert one.asked.instruction == "Name the colour." and one.asked.decoding == system.decoding
    asked = replace(again, instruction="Something else.")
    assert for_task(asked, first).instruction == "Name the colour." and for_task(asked, second) is asked
    # A folder has more rows than the card, and only its train is learnt from: but what the new task selects by.
    [two] = known(again, second.split().learnable, run.session(system.model), split="test")
    asked = {e.prompt for e in second.split().select}
    assert set(two.rows) == {e for e in splits.learnable.train if e.prompt not in asked}
    assert 10 < len(two.rows) < len(splits.learnable.train) and set(two.held) == set(first.test)
    broken = replace(again, card={"memory": [{"name": "first"}]})
    with pytest.raises(ArtifactError, match="memory cannot be read"):
        carried(broken)


def test_earlier_tasks_of_one_name_are_refused(run: Run, model_folder: str, stream: Any, tmp_path: Path) -> None:
    first, _ = stream
    write(tmp_path / "copy", "Name the shade.", False)
    shutil.copy(tmp_path / "first" / "task.yaml", tmp_path / "copy" / "task.yaml")
    both = load_task(write(tmp_path / "third", "Say it.", True, earlier=["../first", "../copy"])).split().learnable
    system = base_of(model_folder, first, run)
    with pytest.raises(TaskError, match="two earlier tasks are called first.*copy"):
        known(system, both, run.session(system.model))


def test_rows_that_new_ones_contradict_are_not_learnt_again(run: Run, model_folder: str, stream: Any) -> None:
    first, _ = stream
    system = base_of(model_folder, first, run)
    rows = (Example("a", "the capital of Brell is", "Ost", group="brell"), Example("b", "the sea of Anor is", "Dun"),
            Example("c", "which city leads Brell", "Ost", group="brell"))  # fmt: skip
    one = Known("facts", "exact_match", system, rows, rows)
    data = Learnable("facts", system.instruction, "exact_match", train=(replace(rows[0], completion="Vem"),))
    [kept] = known(replace(system, card={"memory": [one.entry()]}), data, run.session(system.model))
    assert [e.id for e in kept.rows] == [e.id for e in kept.held] == ["b"]
    # Asked in another way, the same question is another.
    elsewhere = replace(system, card={"memory": [one.entry()]}, instruction="?")
    [other] = known(elsewhere, replace(data, instruction="?", name="others"), run.session(system.model))
    assert other.rows == rows
    # A System keeps a prompt that was rewritten: by its name the task is the same.
    [mine] = known(elsewhere, replace(data, instruction="?"), run.session(system.model))
    assert [e.id for e in mine.rows] == ["b"]
    # What the new task is measured on is not learnt, and stays to measure the old one by.
    sealed = replace(data, train=(), sealed=Sealed((rows[1],)))
    [kept] = known(replace(system, card={"memory": [one.entry()]}), sealed, run.session(system.model))
    assert [e.id for e in kept.rows] == ["a", "c"] and kept.held == rows
    # Nor is what nearly repeats it, or is of its group; also where the earlier task is asked in another way.
    asked = "in the long war between Brell and Anor the city of Ost was taken by whom"
    old = (Example("n", asked, "Dun"), Example("g", "name it", "Dun", group="anor"), *rows)
    new = Sealed((Example("s", f"{asked} then", "Dun"), Example("t", "which sea", "Dun", group="anor"), rows[1]))
    card = {"memory": [replace(one, rows=old, held=rows).entry()]}
    [kept] = known(replace(system, card=card), replace(sealed, sealed=new), run.session(system.model))
    assert [e.id for e in kept.rows] == ["a", "c"] and kept.held == rows
    elsewhere = replace(elsewhere, card=card)
    other = replace(sealed, instruction="?", name="others", sealed=new)
    [kept] = known(elsewhere, other, run.session(system.model))
    assert [e.id for e in kept.rows] == ["g", "a", "c"] and kept.held == rows  # groups of another task are others
    # What is carried on of a task that was known already: half old, half new.
    many = tuple(Example(f"n{i}", f"new {i}", "Vem") for i in range(20))
    [entry] = remember(system, replace(data, train=many), [Known("facts", "exact_match", system, rows)], keep=6)
    assert len(entry["rows"]) == 6 and sum(row["id"] in "abc" for row in entry["rows"]) == 3


def test_rows_that_say_no_answer_measure_nothing(run: Run, model_folder: str, stream: Any) -> None:
    first, second = stream
    system = base_of(model_folder, first, run)
    held = tuple(Example(f"h{n}", f"what of {word}?") for n, word in enumerate(WORDS))
    data = Learnable("replies", "Reply.", "win_rate", train=(Example("t", "where is it?", "here"),))
    [entry] = remember(system, data, (), (*held, Example("a", "what now?", "wait")))
    assert entry["metric"] == "token_f1" and [row["id"] for row in entry["held"]] == ["a"]
    # A card that was written before, or a folder, may hold some: their scores could only be equal.
    card = {"memory": [Known("replies", "token_f1", system, data.train, held).entry()]}
    one, _ = known(replace(system, card=card), second.split().learnable, run.session(system.model))
    assert one.name == "replies" and one.rows == data.train and one.held == ()


def test_a_metric_that_is_code_is_not_carried(run: Run, model_folder: str, stream: Any) -> None:
    first, second = stream
    system = base_of(model_folder, first, run)
    coded = Known("first", "metrics.py:f", system, first.train, first.test, first.folder)
    memory = remember(system, replace(second.split().learnable, metric="metrics.py:g"), [coded])
    assert [entry["metric"] for entry in memory] == ["accuracy", "accuracy"]
    free = replace(coded, asked=replace(system, decoding=Decoding()))
    before = replace(system, card={"memory": [coded.entry(), free.entry()]})  # as cards were written once
    assert [one.metric for one in carried(before)] == ["accuracy", "token_f1"]


def test_held_rows_are_carried_once(run: Run, model_folder: str, stream: Any) -> None:
    first, _ = stream
    system, data = base_of(model_folder, first, run), first.split().learnable
    older = replace(first.test[0], id="older", completion="blue", answers=("blue",))
    [entry] = remember(system, data, [Known("first", "accuracy", system, (), (older, *first.test[1:]))], first.test)
    assert [row["id"] for row in entry["held"]] == [e.id for e in first.test]  # the newer answer to one question


def test_made_up_rows_answer_as_the_system_does(run: Run, model_folder: str, stream: Any) -> None:
    first, _ = stream
    system = base_of(model_folder, first, run)
    session = run.session(system.model)
    assert isinstance(session, TorchSession)
    one = Known("first", "accuracy", system)
    spare = [e.prompt for e in first.train]
    rows = made_up(one, system, session, spare, run)
    assert len({e.prompt for e in rows}) == len(rows) > 50
    assert [e.completion for e in rows] == system.answer(rows, session)
    before = session.spent
    assert rows == made_up(one, system, session, spare, run) and session.spent == before  # they are kept
    assert rows == made_up(one, system, session, spare, replace(run, store=Store(run.home / "other")))


# --- strategies ------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "epochs": 20.0, "batch": 16, "rank": 16}


def scores(system: System, tasks: tuple[Task, ...], run: Run) -> list[float]:
    session = run.session(system.model)
    metric = get("accuracy")
    return [evaluate(as_task(system, t, session), t.test, metric, session=session).score for t in tasks]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> tuple[Path, System, tuple[Task, Task]]:
    """A System that knows the first task, and where it lies; the second task reverses the answers."""
    folder = tmp_path_factory.mktemp("taught")
    first = load_task(write(folder / "first", "Name the colour.", False))
    limits = {"forgetting": 5}
    second = load_task(write(folder / "second", "Say which it is not.", True, earlier=["../first"], limits=limits))
    run = Run(Store(folder / "home"))
    system = FineTune(**SETTINGS).apply(base_of(model_folder, first, run), first.split().learnable, run)
    assert scores(system, (first,), run)[0] > 0.9
    return folder, system, (first, second)


def teach(taught: Any, run: Run, **settings: Any) -> System:
    _, system, (_, second) = taught
    start = as_task(system, second, run.session(system.model))
    return Continual(**{**SETTINGS, **settings}).apply(start, second.split().learnable, run)


def test_replay_keeps_what_plain_training_forgets(taught: Any) -> None:
    folder, system, tasks = taught
    run = Run(Store(folder / "home"))
    plain, kept = (teach(taught, run, strategy=s) for s in ("sequential", "replay"))
    [old_plain, new_plain], [old_kept, new_kept] = scores(plain, tasks, run), scores(kept, tasks, run)
    assert new_plain > 0.9 and new_kept > 0.9
    assert old_plain < 0.7 and old_kept > 0.9
    held = known(system, tasks[1].split().learnable, run.session(system.model))
    [lost] = forgetting(system, plain, held, run)
    assert lost.lost > 20 and lost.low >= 0 and not lost.ok and lost.n == len(held[0].held)
    assert "first loses" in refused([lost]) and "1 may be lost" in refused([lost])
    [less] = forgetting(system, kept, held, run, allowed=10.0)
    assert less.ok and refused([less]) == ""
    assert forgetting(system, replace(system, instruction="x"), held, run) == ()  # the same weights forget nothing


@pytest.mark.parametrize(
    "settings",
    [{"strategy": "ewc"}, {"strategy": "orthogonal"}, {"strategy": "osf"}, {"strategy": "merge"},
     {"strategy": "merge", "merging": "ties"}],
    ids=str,
)  # fmt: skip
def test_other_strategies_teach_repeatably(taught: Any, tmp_path: Path, settings: dict[str, str]) -> None:
    folder, system, tasks = taught
    short = {"epochs": 3.0, **settings}
    first = teach(taught, Run(Store(tmp_path / "one")), **short)
    run = Run(Store(tmp_path / "two"))
    second = teach(taught, run, **short)
    assert first.fingerprint == second.fingerprint != system.fingerprint
    assert run.spent.trained_tokens > 0
    apart = settings["strategy"] in ("merge", "osf")
    assert second.model.transforms[-1].kind == ("weights" if apart else "adapter")
    if settings["strategy"] == "merge":
        assert run.notes["merged"]["new"] in (0.5, 0.75, 1.0) and len(second.model.transforms) == 1
    spent = Run(run.store)
    assert teach(taught, spent, **short).fingerprint == second.fingerprint  # finished before: not repeated


def test_what_ewc_is_informed_by_is_drawn(taught: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _, system, (first, second) = taught
    rows = tuple(sorted(first.split().learnable.train, key=lambda e: e.completion))  # as many files are
    seen: list[set[tuple[int, ...]]] = []

    def looked(_: Any, rows: list[Row]) -> Any:
        seen.append({row.continuations[0] for row in rows})
        raise MethodError("enough")

    monkeypatch.setattr("whet.train.protect.fisher", looked)
    monkeypatch.setattr("whet.methods.continual.INFORMED", 12)
    start = replace(system, card={"task": "second", "memory": [Known("first", "accuracy", system, rows).entry()]})
    data = replace(second.split().learnable, earlier=())
    with pytest.raises(MethodError, match="enough"):
        Continual(strategy="ewc", **SETTINGS).apply(start, data, run)
    assert len(seen[0]) == 2


def test_osf_begins_as_it_was_and_leaves_the_greater_directions_alone() -> None:
    module = make_model("llama")
    ids, weight = torch.arange(3, 40)[None], module.model.layers[0].mlp.down_proj.weight.detach().clone()
    u, _, v = torch.linalg.svd(weight, full_matrices=False)
    half = min(weight.shape) // 2
    with adapted(module, Adapter("osf"), 0) as tuned, torch.no_grad():
        assert torch.allclose(tuned(input_ids=ids).logits, module(input_ids=ids).logits, atol=1e-4)
        same = adapters.merged(tuned, Adapter("osf"))
        assert torch.allclose(same.model.layers[0].mlp.down_proj.weight, weight, atol=1e-5)
        with torch.enable_grad():
            tuned(input_ids=ids, labels=ids).loss.backward()
        trained = [p for p in tuned.parameters() if p.requires_grad]
        assert {n.split(".")[-1] for n, p in tuned.named_parameters() if p.requires_grad} == {"U_low", "S_low", "V_low"}
        for p in trained:
            p -= 10 * p.grad
        made = adapters.merged(tuned, Adapter("osf"))
        assert torch.allclose(tuned(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-3)
    changed = made.model.layers[0].mlp.down_proj.weight - weight
    assert float((u[:, :half].T @ changed).norm()) < 1e-4 * float(changed.norm()) > 0
    assert float((changed @ v[:half].T).norm()) < 1e-4 * float(changed.norm())
    assert torch.equal(module.model.layers[0].mlp.down_proj.weight, weight)  # the given module is as it was


def card(metric: Any, scores: Sequence[float]) -> Scorecard:
    """A scorecard of rows that scored so."""
    found = tuple(Outcome(str(n), "", score, "") for n, score in enumerate(scores))
    return Scorecard(metric.aggregate(found), 0, 0, metric.name, found, 0, 0, Spent(), {})


def right(count: int, of: int = 40) -> Scorecard:
    return card(get("accuracy"), [float(n < count) for n in range(of)])


def test_a_task_scored_from_0_to_100_loses_percent(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def f(answer, reference):\n    return float(answer)\n")
    metric = get("m.py:f", tmp_path, trusted=True)
    lost = loss("t", card(metric, [70.0] * 200), card(metric, [69.65] * 200), metric, 1.0)
    assert lost.ok and lost.lost == pytest.approx(0.5)
    flawless = replace(card(metric, [0.0] * 9), metric="perplexity")  # of a metric whose best is nought
    assert loss("t", flawless, flawless, replace_lower(metric), 1.0).lost == 0


def replace_lower(metric: Any) -> Any:
    """The metric, with less being better."""
    return SimpleNamespace(**{n: getattr(metric, n) for n in dir(metric) if n[0] != "_"} | {"higher_is_better": False})


def test_what_a_task_lost_is_what_it_scored_before_less_what_it_scores_after() -> None:
    found = loss("t", right(40), right(36), get("accuracy"), 1.0)
    assert (found.before, found.after, found.n) == (1.0, 0.9, 40)
    # Of the four rows 1 to 8 are in 95 % of draws of forty, and at most 7 in 95 % on that side alone.
    assert (found.lost, found.low, found.high, found.bound) == pytest.approx((10, 2.5, 20, 17.5))
    assert found.most == pytest.approx(1 + 100 * 2.8 * math.sqrt(0.1 * 0.9 / 39)) and not found.ok
    gained = loss("t", right(36), right(40), get("accuracy"), 1.0)
    assert (gained.lost, gained.low, gained.high, gained.bound) == pytest.approx((-10, -20, -2.5, -2.5)) and gained.ok
    assert str(gained).startswith("t gains 10.0 points [2.5, 20.0] on 40 rows (90.0 to 100.0); with 95 % confidence")
    assert "it gains at least 2.5 (1 may be lost; on so many rows a bound of " in str(gained)


def test_of_a_perplexity_a_rise_is_lost_in_percent() -> None:
    metric = get("perplexity")
    before, *after = (card(metric, [math.log(value)] * 40) for value in (20, 21, 20.19, 19))
    rise, little, fall = (loss("t", before, one, metric, 1.0) for one in after)
    assert [one.lost for one in (rise, little, fall)] == pytest.approx([5, 0.95, -5])
    assert (rise.low, rise.high, rise.bound, rise.most) == pytest.approx((5, 5, 5, 1 + 5 * 3 / 40))
    assert [one.ok for one in (rise, little, fall)] == [False, True, True]
    assert str(rise).startswith("t loses 5.0 percent [5.0, 5.0] on 40 rows (20.00 to 21.00)")


def test_short_answers_may_grow_by_a_few_words() -> None:
    assert _overdone((0.0, 1.0), None) == [] and _overdone((0.4, 0.9), None) == []
    assert _overdone((0.0, 9.0), None) and _overdone((20.0, 31.0), None) and not _overdone((20.0, 29.0), None)


def test_what_judgements_overdid_is_told_in_words_and_in_nats() -> None:
    assert _overdone((20.0, 30.0), 0.5) == _overdone((4.0, 7.0), 0.0) == []  # half as long again; three words more
    assert _overdone((20.0, 30.6), 0.5) == ["answers grew from 20 to 31 words"]
    assert _overdone((4.0, 7.1), 0.5) == ["answers grew from 4 to 7 words"]
    assert _overdone((20.0, 30.0), 0.51) == ["answers drifted by 0.51 nats a token; 0.5 allowed"]
    assert len(_overdone((20.0, 31.0), 0.6)) == 2


def test_a_task_that_is_taught_must_not_fall_by_it(tmp_path: Path) -> None:
    task: Any = SimpleNamespace(name="sizes", limits=SimpleNamespace(forgetting=None))

    def why(before: int, after: int, lost: tuple[Any, ...] = ()) -> list[str]:
        return _refused((right(before), right(after)), lost, get("accuracy"), task, Run(Store(tmp_path)))

    assert why(30, 16) == ["sizes itself fell from 75.0 to 40.0"]
    assert why(30, 29) == why(16, 30) == []
    same = loss("sizes", right(30), right(16), get("accuracy"), 1.0)
    assert len(why(30, 16, (same,))) == 1 and "sizes loses" in why(30, 16, (same,))[0]  # told once


def test_general_ability_is_told_before_and_after(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (System(models.resolve(f"fake:{kind}"), decoding=Decoding(normalise=way), home=run.home)
                for kind, way in (("hash", "mean"), ("echo", "sum")))  # fmt: skip
    figures, seen = {old.model: (20.0, 30), new.model: (25.0, 20)}, set[Any]()

    def scored(system: System, rows: Sequence[Example], metric: Any, **more: Any) -> Scorecard:
        text, count = figures[system.model]
        seen.add((system.decoding.normalise, more["session"] is run.session(system.model)))
        return card(metric, [math.log(text)] * len(rows)) if metric.name == "perplexity" else right(count, len(rows))

    monkeypatch.setattr("whet.general.evaluate", scored)
    made = ability(old, new, run)
    assert made.perplexity == pytest.approx((20, 25)) and made.accuracy == (30 / 48, 20 / 48) and made.n == 48
    assert made.low < -10 / 48 < made.high < 0
    assert seen == {("sum", True)}  # both are read in one way, that of the System after
    said = "general ability: perplexity of plain text 20.0 to 25.0, 48 common questions 62.5 to 41.7"
    assert str(made) == f"{said} [{100 * made.low:+.1f}, {100 * made.high:+.1f}]"


def test_untrained_osf_changes_no_weight_in_half_precision() -> None:
    module = make_model("llama").to(torch.bfloat16)
    before = {n: p.clone() for n, p in module.named_parameters()}
    with adapted(module, Adapter("osf"), 0) as tuned:
        same = dict(adapters.merged(tuned, Adapter("osf")).named_parameters())
    assert all(torch.equal(p, same[n]) for n, p in before.items())


def test_osf_says_where_it_cannot_stand() -> None:
    module = make_model("gpt2")
    with pytest.raises(MethodError, match="osf takes linear layers apart"), adapted(module, Adapter("osf"), 0):
        pass


@pytest.mark.parametrize("rows", [2, 8])
def test_facts_of_one_group_are_merged(taught: Any, run: Run, rows: int) -> None:
    _, system, (_, second) = taught
    data = second.split().learnable
    data = replace(data, train=tuple(replace(e, group="one fact") for e in data.train[:rows]))
    start = as_task(system, second, run.session(system.model))
    Continual(**{**SETTINGS, "strategy": "merge", "epochs": 1.0}).apply(start, data, run)
    assert run.notes["merged"]["loss"] > 0 and run.notes["rows"] == rows - (rows == 8)  # one of eight is held out


def test_rows_without_an_answer_merge_nothing(taught: Any, run: Run) -> None:
    _, system, (_, second) = taught
    data = second.split().learnable
    some = tuple(replace(e, completion="", answers=()) if n >= 3 else e for n, e in enumerate(data.train))
    start, method = as_task(system, second, run.session(system.model)), {"strategy": "merge", "epochs": 1.0}
    made = Continual(**{**SETTINGS, **method}).apply(start, replace(data, train=some), run)
    assert made.fingerprint != start.fingerprint and run.notes["merged"]["loss"] > 0


def test_suspects_and_bits_count_under_every_strategy(taught: Any, tmp_path: Path, monkeypatch: Any) -> None:
    bits, first = list[int](), taught[2][1].split().learnable.train[0]
    monkeypatch.setattr(lesson, "adapted", lambda module, a, seed: bits.append(a.bits) or adapted(module, a, seed))
    monkeypatch.setattr(Continual, "suspects", lambda *_: (Suspect(first.id, first.completion, "red", 0.9),))
    plain, clean = Run(Store(tmp_path)), Run(Store(tmp_path))
    teach(taught, plain, strategy="replay", epochs=0.1)
    teach(taught, clean, strategy="replay", epochs=0.1, clean=True, bits=8)
    assert bits == [16, 8] and [s["id"] for s in clean.notes["suspects"]] == [first.id]
    assert clean.notes["rows"] < plain.notes["rows"]
    assert type(Continual(clean=True, rank=4).alone) is FineTune and Continual(rank=4).alone == FineTune(rank=4)


def test_steps_of_known_rows_do_not_tell_what_more_data_would_bring(
    taught: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whet.train.fit.twice_the_data", lambda *_: Doubling(8, 1.0, 0.5, 0.4, 0.6))
    found = {}
    for strategy in ("sequential", "replay"):
        run = Run(Store(tmp_path))
        teach(taught, run, strategy=strategy, epochs=0.1)
        found[strategy] = run.notes["twice_the_data"]
    assert found["sequential"]["twice"] == 0.5 and found["replay"] is None


def test_beside_the_search_for_suspects_replay_trains_for_the_rest_of_the_budget(
    taught: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = taught[2][1].split().learnable.train[0]
    found = Disputed([Suspect(first.id, first.completion, "red", 0.9)])
    found.tokens = 6000
    monkeypatch.setattr(Continual, "suspects", lambda *_: found)
    run = Run(Store(tmp_path), trained_tokens=12_000)
    teach(taught, run, strategy="replay", share=0.5, clean=True)
    assert 4800 < run.spent.trained_tokens <= 6600


def test_under_a_budget_every_share_is_compared_on_the_same_rows(taught: Any, tmp_path: Path, monkeypatch: Any) -> None:
    bounds: list[int | None] = []
    usual = batches.affordable

    def affordable(some: Any, wanted: Any, size: int, allowed: int | None, *rest: Any) -> Any:
        bounds.append(allowed)
        return usual(some, wanted, size, allowed, *rest)

    monkeypatch.setattr("whet.train.batches.affordable", affordable)
    for share in (0.125, 0.5):
        teach(taught, Run(Store(tmp_path), trained_tokens=2000), share=share, epochs=1.0)
    steps, held = bounds[0::2], bounds[1::2]
    assert steps == [1750, 1000] and held == [2000, 2000]


def test_packed_weights_are_not_merged(taught: Any, run: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr("whet.compress.folder.plain", lambda _: False)
    monkeypatch.setattr(FineTune, "apply", lambda *_: pytest.fail("trained before it was refused"))
    with pytest.raises(MethodError, match="merging averages whole weights"):
        teach(taught, run, strategy="merge")


def test_adapters_that_a_smaller_model_took_in_are_not_asked_for(taught: Any, run: Run, monkeypatch: Any) -> None:
    _, system, (_, second) = taught
    seen: list[Any] = []
    monkeypatch.setattr("whet.train.protect.orthogonal", lambda _, transforms, __: seen.extend(transforms))
    start, live = as_task(system, second, run.session(system.model)), run.session(system.model)
    gone, whole, [own] = Transform("adapter", "0" * 64), Transform("model", "1" * 64), system.model.transforms
    start = replace(start, model=replace(system.model, transforms=(gone, whole, own)))
    Continual(strategy="orthogonal", **SETTINGS)._protected(start, second.split().learnable, run, live, ())  # type: ignore[arg-type]
    assert seen == [whole, own]


def test_a_strong_penalty_holds_the_weights(taught: Any) -> None:
    folder, system, tasks = taught
    run = Run(Store(folder / "home"))
    free, held = (teach(taught, run, strategy="ewc", strength=s, epochs=5.0) for s in (1e-9, 1e7))
    sessions = [run.session(one.model) for one in (system, free, held)]
    rows = render_rows(system, tasks[0].test, sessions[0])[0]  # type: ignore[arg-type]
    moved = [drift(sessions[0], s, rows) for s in sessions[1:]]  # type: ignore[arg-type]
    assert moved[1] < 0.2 * moved[0]


def test_drift_is_the_divergence_of_whole_distributions() -> None:
    one, two = make_model("llama", 0), make_model("llama", 1)
    total = 0.0
    for row in ROWS:
        ids = torch.tensor([[*row.prompt, *row.continuations[0]]])
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1) for m in (one, two))
        total += float((p.exp() * (p - q)).sum())
    first, second = (TorchSession(m, make_tokenizer()) for m in (one, two))
    assert drift(first, second, ROWS) == pytest.approx(total / sum(len(r.continuations[0]) for r in ROWS), rel=1e-4)
    assert drift(first, first, ROWS) == 0.0


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"strategy": "rehearse"}, "one of replay"), ({"share": 1.0}, "less than 1"), ({"merging": "max"}, "ties"),
     ({"strategy": "ewc", "adapter": "dora"}, "ewc goes with adapter=lora"), ({"rank": 0}, "positive"),
     ({"strategy": "osf", "adapter": "full"}, "no adapter"), ({"strategy": "osf", "bits": 4}, "no bits")],
)  # fmt: skip
def test_settings_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Continual(**settings)


def test_nothing_to_keep(run: Run, model_folder: str, stream: tuple[Task, Task]) -> None:
    first, _ = stream
    with pytest.raises(MethodError, match="nothing to keep.*use finetune"):
        Continual().apply(base_of(model_folder, first, run), first.split().learnable, run)


def turned(task: Task) -> Task:
    """Newer data for a task: the same questions, the other answers."""
    def other(e: Example) -> Example:
        said = "blue" if e.completion == "red" else "red"
        return replace(e, completion=said, answers=(said,))

    return replace(task, train=tuple(map(other, task.train)), test=tuple(map(other, task.test)))


@pytest.mark.parametrize("name", ["first", "first-2026"])
def test_rows_that_are_all_contradicted_do_not_come_back(
    taught: Any, run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _, system, (first, _) = taught
    newer = replace(turned(first), name=name)
    memory = [Known("first", "accuracy", system, first.split().learnable.train).entry()]
    # Asked the same questions once more, the System would give the old answers.
    monkeypatch.setattr("whet.memory.made_up", lambda *_: pytest.fail("rows were made up of contradicted ones"))
    start = replace(system, card={"task": "first", "memory": memory})
    made = Continual(**SETTINGS).apply(start, newer.split().learnable, run)
    assert run.notes["unprotected"] == ["first"] and "earlier" not in run.notes
    assert scores(made, (newer,), run)[0] > 0.9


# --- whet update -----------------------------------------------------------------------------------------------------


@pytest.fixture
def whet(taught: Any, monkeypatch: pytest.MonkeyPatch, fp32: None, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line beside the taught System: exit code, JSON from stdout, and stderr."""
    folder, system, _ = taught
    monkeypatch.setenv("WHET_HOME", str(folder / "home"))
    replace(system, card={"task": "first"}).save(folder / "system")

    def call(*args: object) -> tuple[int, Any, str]:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, args), "--json"])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), json.loads(out) if out else None, err

    return call


def settings(**more: object) -> list[str]:
    return [f"--set={key}={value}" for key, value in {**SETTINGS, **more}.items()]


def test_update_teaches_keeps_and_says_so(taught: Any, whet: Any, tmp_path: Path) -> None:
    folder, system, _ = taught
    out = tmp_path / "both"
    code, body, _ = whet("update", folder / "system", folder / "second", *settings(), "--out", out)
    assert code == 0 and body["refused"] == "" and body["system"] == str(out)
    assert body["before"] <= 0.5 and body["after"] > 0.9
    assert body["difference"] == pytest.approx(body["after"] - body["before"]) and body["low"] > 0
    [lost] = body["earlier"]
    assert lost["task"] == "first" and lost["n"] == 24 and lost["ok"] and lost["allowed"] == 5
    assert body["drift"] > 0 and body["unmeasured"] == [] and body["recipe"].startswith("continual")
    made = load(out)
    assert made.instruction == "Say which it is not." and made.fingerprint == body["fingerprint"]
    own = made_for(out)
    assert own and own.folder == (folder / "second").resolve()
    assert {one.name for one in carried(made)} == {"first", "second"}
    table = body["stream"]
    assert table["tasks"] == ["first", "second"] and table["matrix"][0] == [lost["before"], None]
    assert table["matrix"][1] == [lost["after"], body["after"]] and body["from_base"] > 0
    everything = body["general"]  # a model of random weights knows nothing, and its training on two words costs that
    assert everything["n"] == 48 and everything["low"] <= everything["high"] and min(everything["perplexity"]) > 1
    assert everything["perplexity"][0] != everything["perplexity"][1]
    [history] = made.card["taught"][-1:]
    run, second = Run(Store(tmp_path / "home")), load_task(folder / "second")
    start = updating.begin(system, second, run)
    base = replace(start, model=replace(start.model, transforms=()))
    card = evaluate(base, second.test, get("accuracy"), session=run.session(base.model))
    assert card.score > 0 and table["forward"] == history["ahead"] == pytest.approx(body["before"] - card.score)
    assert made.card["taught"] == [{**made.card["taught"][0], "task": "second", "from": system.fingerprint}]
    said = updating.asked(SimpleNamespace(system=made), out)  # type: ignore[arg-type]
    assert said == f"whet chat {out} answers as second; for first: whet evaluate {out} TASK"
    for name in ("first", "second"):  # each is asked its own way
        code, card, _ = whet("evaluate", out, folder / name)
        assert code == 0 and card["score"] > 0.9 and card["n"] == 24


def test_update_refuses_what_forgets(taught: Any, whet: Any, tmp_path: Path) -> None:
    folder, _, _ = taught
    out = tmp_path / "gone"
    words = settings(strategy="sequential")
    code, body, err = whet("update", folder / "system", folder / "second", *words, "--out", out)
    assert code == 2 and not out.exists() and body["system"] is None
    assert "first loses" in body["refused"] and "refused: first loses" in err and "Traceback" not in err


def test_update_without_kept_rows_makes_some_up(taught: Any, whet: Any, tmp_path: Path) -> None:
    folder, _, _ = taught
    alone = write(tmp_path / "alone", "Say which it is not.", True)
    out = tmp_path / "out"
    code, body, _ = whet("update", folder / "system", alone, *settings(epochs=2.0), "--out", out)
    assert code == 0 and body["unmeasured"] == ["first"] and body["earlier"] == []
    assert body["notes"]["earlier"]["first"] > 50
    (folder / "run.json").write_text(json.dumps({"folder": str(folder / "first")}))  # as improve leaves one
    code, body, err = whet("update", folder / "system", alone, *settings(epochs=2.0), "--out", tmp_path / "kept")
    (folder / "run.json").unlink()
    assert body["unmeasured"] == [] and [one["task"] for one in body["earlier"]] == ["first"]
    assert "is an earlier task of alone" in err


def test_the_task_that_improve_made_the_system_for_is_an_earlier_one(taught: Any, tmp_path: Path) -> None:
    folder, system, (first, second) = taught
    made, alone = replace(system, card={"task": "first"}), replace(second, earlier=())
    (tmp_path / "run.json").write_text(json.dumps({"folder": str(first.folder)}))
    found, said = updating.with_made(alone, made, tmp_path / "system")
    assert found.earlier == (first.folder,) and said.startswith(f"first ({first.folder})")
    assert updating.with_made(second, made, tmp_path / "system") == (second, "")  # what task.yaml says wins
    # What that task was not to lose is not to be lost now, either; the task itself is no earlier one.
    again = shutil.copytree(first.folder, tmp_path / "again")
    older, newer = (write(tmp_path / name, "Say which it is not.", True) for name in ("older", "newer"))
    body = yaml.safe_load((again / "task.yaml").read_text()) | {"earlier": ["../older", "../newer"]}
    (again / "task.yaml").write_text(yaml.safe_dump(body))
    (tmp_path / "run.json").write_text(json.dumps({"folder": str(again)}))
    found, said = updating.with_made(replace(alone, folder=newer), made, tmp_path / "system")
    assert found.earlier == (again, older) and "so is what that kept: older" in said
    (tmp_path / "run.json").write_text(json.dumps({"folder": str(first.folder)}))
    other = replace(system, card={"task": "other"})
    for task, one in ((alone, other), (replace(first, name="new"), made)):  # of another name; of the task's own folder
        assert updating.with_made(task, one, tmp_path / "system") == (task, "")
    (tmp_path / "run.json").write_text(json.dumps({"folder": str(tmp_path / "gone")}))
    assert updating.with_made(alone, made, tmp_path / "system") == (alone, "")


@pytest.mark.skipif(not embed.available(), reason="the embedding model is not installed")
def test_documents_of_an_earlier_task_stay_with_the_system(taught: Any, tmp_path: Path) -> None:
    folder, system, (first, _) = taught
    run = Run(Store(folder / "home"))
    for name, colour in (("docs", "red"), ("others", "blue")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": name, "title": "Apple", "text": f"It is {colour}."}))
    one, other = (
        Rag(k=1).apply(system, replace(first.split().learnable, documents=tmp_path / f"{name}.jsonl"),
                       Run(run.store)).sources[0] for name in ("docs", "others")
    )  # fmt: skip
    second = load_task(write(tmp_path / "alone", "Say which it is not.", True))
    # Two tasks with documents of their own, both read alike: by their fingerprints they are one.
    assert one.fingerprint == other.fingerprint
    memory = [Known("older", "accuracy", replace(system, instruction="Which?", sources=(other,))).entry()]
    start = replace(system, sources=(one,), beside=(other,), card={"task": "first", "memory": memory})
    start.save(tmp_path / "before")
    made = update(load(tmp_path / "before", run.home), second, run, {"epochs": 0.1, "rank": 4})
    assert made.system.sources == () and run.notes["earlier"]["first"] > 0
    made.system.save(tmp_path / "after")
    again = load(tmp_path / "after", run.home)
    kept = {k.name: k.asked for k in carried(again)}
    texts = {name: asked.found([Query("apple 1")])[0][0].passage.text for name, asked in kept.items() if asked.sources}
    assert texts == {"first": "It is red.", "older": "It is blue."}
    assert for_task(again, first).found([Query("apple 1")]) == kept["first"].found([Query("apple 1")])
    assert again.fingerprint == made.system.fingerprint and len(at_hand(again)) == 2


def test_the_same_task_is_measured_against_the_system_as_given(taught: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, system, (first, _) = taught
    run = Run(Store(folder / "home"))
    given = replace(system, card={"task": "first"}, decoding=replace(system.decoding, prior=(30.0, -30.0)))
    session = run.session(system.model)
    worse = evaluate(given, first.test, get("accuracy"), session=session).score
    assert worse == 0.5 < scores(system, (first,), run)[0]  # calibrated ill, it says one label alone
    monkeypatch.setattr(Continual, "apply", lambda self, start, data, run: start)
    made = update(given, first, run)
    assert made.before.score == worse and made.after.score > 0.9 and made.refused == ""
    assert run.notes["calibration"] == "anew" and made.system.decoding.prior not in ((), given.decoding.prior)
    # What is worse than the System that the user has is refused, without kept rows, too.
    blank = replace(system, model=replace(system.model, transforms=()))
    monkeypatch.setattr(Continual, "apply", lambda *_: blank)
    made = update(replace(system, card={"task": "first"}), first, Run(run.store))
    assert "first loses" in made.refused and [one.task for one in made.lost] == ["first"]
    memory = [Known("first", "accuracy", system, first.train[:8], first.train[-16:]).entry()]
    task = replace(first, train=first.train[:40])
    made = update(replace(system, card={"task": "first", "memory": memory}), task, Run(run.store))
    assert [one.task for one in made.lost] == ["first, older rows,", "first"] and made.lost[0].n == 16


def test_an_update_may_lower_a_perplexity_and_not_raise_it(
    run: Run, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, flat = tmp_path / "texts", make_model("llama")
    folder.mkdir()
    (folder / "task.yaml").write_text("name: texts\nmetric: perplexity\n")
    (folder / "test.jsonl").write_text("\n".join(json.dumps({"text": f"the {w} by the {v}"}) for w in WORDS
                                                 for v in WORDS[:3]))  # fmt: skip
    torch.nn.init.zeros_(flat.lm_head.weight)  # 300 tokens, all alike
    for part in (flat, make_tokenizer()):
        part.save_pretrained(tmp_path / "flat")
    task, metric = load_task(folder), get("perplexity")
    even, sure = (System(models.resolve(place), home=run.home) for place in (str(tmp_path / "flat"), model_folder))

    def taught_as(before: System, after: System) -> updating.Update:
        monkeypatch.setattr(Continual, "apply", lambda self, start, *_: replace(start, model=after.model))
        return update(before, task, Run(run.store))

    rise, fall = taught_as(even, sure), taught_as(sure, even)
    worst = rise.after.score
    assert (rise.before.score, fall.after.score) == pytest.approx((300, 300), rel=1e-4) and worst > 400
    assert rise.refused == f"texts itself rose from 300.00 to {worst:.2f}" and fall.refused == ""
    assert (rise.paired.difference, fall.paired.difference) == pytest.approx((300 - worst, worst - 300), rel=1e-4)
    for made in (rise, fall):  # a perplexity is no share to average, nor to be ahead by
        assert (made.stream.tasks, made.stream.average, made.stream.forward) == (("texts",), None, None)
        assert made.system.card["scorecard"]["score"] == made.after.score
    assert updating._ahead(even, fall.before, task.test, metric, run) is None


def test_calibration_that_harms_is_left_out(taught: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, system, (first, _) = taught
    run = Run(Store(folder / "home"))
    given = replace(system, card={"task": "first"}, decoding=replace(system.decoding, prior=(0.0, 0.0)))
    monkeypatch.setattr(Continual, "apply", lambda self, start, data, run: start)
    monkeypatch.setattr("whet.methods.calibrate.batch_prior", lambda _: (30.0, -30.0))
    made = update(given, first, run)
    assert run.notes["calibration"] == "gone" and made.system.decoding.prior == () and made.after.score > 0.9


def test_newer_data_may_bring_a_label(taught: Any, run: Run) -> None:
    _, system, (first, _) = taught
    given = replace(system, card={"task": "first"})
    green = Example("g", "a leaf 1", "green", ("green",))
    newer = replace(first, labels=("green", "red"), train=(*first.train, green))
    assert begin(given, newer, run).decoding.labels == ("red", "blue", "green")
    spoken = replace(given, decoding=replace(given.decoding, words=("r", "b")))
    assert begin(spoken, newer, run).decoding.words == ("r", "b", "green")
    assert begin(given, first, run).decoding == given.decoding
    for start, task in ((given, replace(newer, labels=())), (replace(spoken, decoding=replace(
            spoken.decoding, words=("r", "green"))), newer)):  # fmt: skip
        with pytest.raises(MethodError, match="answers first out of its labels alone.*found .*green"):
            begin(start, task, run)


def test_tasks_that_say_nothing_are_told_apart_by_name(run: Run, model_folder: str, stream: Any) -> None:
    first, _ = (replace(task, instruction="", labels=()) for task in stream)
    other = replace(first, name="other")
    system = base_of(model_folder, first, run)
    assert own(system, first) and not own(system, other) and own(replace(system, card={}), stream[0]) is False
    start = begin(system, other, run)
    assert [one.name for one in carried(start)] == ["first"] and start.decoding.max_tokens > 0


def test_a_method_is_not_taught_one_task_asked_as_another(
    stream: Any, run: Run, model_folder: str, tmp_path: Path, whet: Any
) -> None:
    first, second = stream
    system = base_of(model_folder, first, run)
    for method in (FineTune(), make("dpo"), make("fewshot"), Continual()):
        with pytest.raises(MethodError, match=r"asked as first, not as second.*whet update"):
            check(method, system, second)
        check(method, system, first)
        check(method, replace(system, instruction="As rewritten."), first)  # by its name it is the same
        check(method, system, replace(first, name="renamed"))
        check(method, replace(system, card={"task": "first", "memory": [Known("second", "accuracy", system).entry()]}),
              second)  # fmt: skip
    check(make("quantize"), system, second)
    check(make("rag"), system, second)
    system.save(tmp_path / "system")
    code, _, err = whet("apply", "finetune", second.folder, "--system", tmp_path / "system", "--out", tmp_path / "o")
    assert code == 2 and "asked as first" in err and not (tmp_path / "o").exists()


def test_what_was_taught_before_is_earlier_enough(run: Run, model_folder: str, stream: Any) -> None:
    first, _ = stream
    system, data = base_of(model_folder, first, run), first.split().learnable
    assert "earlier" in lacking(Continual(), system, data)
    assert not any(lacking(Continual(strategy=s), system, data) for s in ("sequential", "orthogonal"))
    memory = remember(system, data, ())
    assert not lacking(Continual(), replace(system, card={"task": "first", "memory": memory}), data)


def test_newer_data_for_the_own_task_needs_no_kept_rows(taught: Any, whet: Any, tmp_path: Path) -> None:
    folder, _, _ = taught
    code, body, _ = whet("update", folder / "system", folder / "first", *settings(epochs=1.0), "--out", tmp_path / "o")
    assert code == 0 and body["notes"]["unprotected"] == ["first"] and "strategy=sequential" in body["recipe"]
    assert [one["task"] for one in body["earlier"]] == ["first"] and body["unmeasured"] == []


def test_each_task_is_told_in_its_metrics_scale() -> None:
    table = updates([({"a": 0.9}, {"a": 0.8, "b": 0.4})])
    made = SimpleNamespace(drift=None, general=None, controlled=None, unmeasured=(),
                           before=SimpleNamespace(metric="pearson"), stream=table,
                           metrics={"a": "accuracy", "b": "pearson"})  # fmt: skip
    *_, start, first, last = updating.told(made)  # type: ignore[arg-type]
    assert start.split() == ["start", "90.0", "–"] and first.split() == ["update", "1", "80.0", "0.40"]
    assert last.startswith("average 60.0; of the earlier tasks, 10.0 points lost")
    # A perplexity stands in no figure, nor does it change how the others are read.
    made.stream = updates([({"a": 0.9, "c": 30.0}, {"a": 0.8, "b": 0.4, "c": 20.0})], lower=["c"])
    made.metrics["c"] = "perplexity"
    assert updating.told(made)[-1] == last  # type: ignore[arg-type]
    for metric, shown in (("accuracy", "(90.0 to 80.0)"), ("pearson", "(0.90 to 0.80)")):
        assert shown in str(Lost("a", 40, 0.9, 0.8, 10.0, 5.0, 15.0, 1.0, 14.0, 9.0, False, metric))


def test_judgements_that_go_into_no_pair_are_told() -> None:
    sides = [Judged("1", "p", "good", "bad"), Judged("2", "q", "good"), Judged("3", "q", None, "bad"),
             Judged("4", "r", "good")]  # fmt: skip
    found, single = paired(sides)
    assert [r.id for r in found] == ["1", "2>3"] and [r.id for r in single] == ["4"]


def test_an_annotator_left_out_judges_nothing_and_many_thumbs_outvote_a_pair(taught: Any, tmp_path: Path) -> None:
    folder, system, (first, _) = taught
    file = tmp_path / "judged.jsonl"
    asked = [f"{word} {n}" for n in range(20, 24) for word in WORDS[::2]]
    rows = [{"prompt": p, "completion": "red", "label": True, "annotator": "kit"} for p in asked[1:]]
    rows += [{"prompt": asked[0], "chosen": "red", "rejected": "blue", "annotator": "kit"},
             {"prompt": first.test[0].prompt, "chosen": "red", "rejected": "blue", "annotator": "kit"},
             {"prompt": asked[0], "chosen": "blue", "rejected": "red", "annotator": "ann"}]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = {"weights": "ann=0", "epochs": 0.5, "rank": 4, "learning_rate": 1e-6}
    made = update(system, first, Run(Store(folder / "home")), settings, file)
    assert made.system.card["recipe"].startswith("kto") and made.notes["judgements"] + 2 >= len(asked)
    assert [name for name, _ in made.dropped] == [f"judged-{len(asked) + 1}"] and made.notes["weights"] == ["ann=0"]


def test_update_by_feedback_passes_a_gate(
    taught: Any, whet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = taught
    file = tmp_path / "judged.jsonl"
    asked = [f"{word} {n}" for n in range(20, 24) for word in WORDS[::2]]
    pairs = [{"prompt": p, "chosen": "red", "rejected": "blue"} for p in asked]
    rated = [{"prompt": f"{WORDS[0]} 24", "completion": c, "rating": n} for n, c in enumerate(("blue", "red"))]
    file.write_text("\n".join(map(json.dumps, [*pairs, *rated])))
    monkeypatch.setattr("whet.task.load", lambda *a, **more: replace(load_task(*a, **more), notes=("of the task",)))
    words = ["--feedback", file, "--set=epochs=1", "--set=batch=8", "--set=rank=4", "--set=learning_rate=1e-5"]
    out = tmp_path / "out"
    code, body, _ = whet("update", folder / "system", folder / "first", *words, "--out", out)
    assert code == 0 and body["recipe"].startswith("dpo") and body["length"] == [1.0, 1.0]
    assert [one["task"] for one in body["earlier"]] == ["first"] and body["drift"] < 0.5
    assert body["dropped"] == [] and body["unused"] == []
    told = "judged.jsonl: 2 ratings made into 1 pairs and 0 thumbs"
    assert body["notes"]["feedback"] == [told]
    with pytest.raises(SystemExit):
        main([*map(str, ("update", folder / "system", folder / "first", *words, "--out", tmp_path / "again"))])
    said = capsys.readouterr()
    assert f"feedback {told}" in said.out and "of the task" in said.err
    # Thumbs that teach the other answer: what they bring is what the gate is there for, on any machine.
    thumbs = [{"prompt": p, "completion": ("red", "blue")[n % 2], "label": n % 2 == 1} for n, p in enumerate(asked)]
    file.write_text("\n".join(map(json.dumps, thumbs)))
    words[2:] = ["--set=epochs=6", "--set=batch=8", "--set=rank=4", "--set=learning_rate=1e-2", "--set=beta=0.01"]
    code, body, err = whet("update", folder / "system", folder / "first", *words, "--out", tmp_path / "no")
    assert code == 2 and "Traceback" not in err and not (tmp_path / "no").exists()
    assert body["recipe"].startswith("kto") and body["refused"]


def test_update_reports_its_steps_to_trackers(
    taught: Any, whet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(system: System, task: Task, run: Run, *_: Any) -> None:
        raise MethodError(f"told to {run.report_to}")

    monkeypatch.setattr("whet.update.update", refuse)
    named = ("--report-to", "tensorboard", "--report-to", "mlflow", "--out", tmp_path / "out")
    _, _, err = whet("update", taught[0] / "system", taught[0] / "first", *named)
    assert "told to ('tensorboard', 'mlflow')" in err


def test_more_earlier_tasks_are_replayed_more() -> None:
    assert [replayed_share(n) for n in (1, 2, 3, 8)] == [0.25, 0.4, 0.5, 0.5]


def test_models_of_different_tokens_are_not_compared_by_token(run: Run, model_folder: str, tmp_path: Path) -> None:
    from test_distill import shrunk

    first = load_task(write(tmp_path / "first", "Name the colour.", False))
    system = base_of(model_folder, first, run)
    small, tied = shrunk(system, run.home, vocabulary=True), shrunk(system, tmp_path / "other")
    asked = first.split().learnable.train
    assert moved_by(system, small, asked, run) is None
    assert moved_by(system, tied, asked, Run(Store(tmp_path / "other"))) > 0  # type: ignore[operator]
