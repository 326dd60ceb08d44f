"""The bundled help-desk task: it is what its generator makes, and what its README says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

HELPDESK = Path(__file__).resolve().parents[1] / "examples" / "helpdesk"
sys.path.insert(0, str(HELPDESK))

from maker import company, feedback, knowledge, tickets  # noqa: E402

TASKS = ("tickets", "answers", "catalogue", "replies", "last-year")
Row = dict[str, object]


def rows(name: str) -> list[Row]:
    """The rows of a file, by its path inside the folder."""
    return [json.loads(line) for line in (HELPDESK / name).read_text(encoding="utf-8").splitlines()]


def splits(task: str) -> tuple[list[Row], list[Row]]:
    """What is learned from and what is tested on."""
    return rows(f"{task}/{'feedback' if task == 'replies' else 'train'}.jsonl"), rows(f"{task}/test.jsonl")


def settings(task: str) -> dict[str, object]:
    """The task.yaml."""
    return yaml.safe_load((HELPDESK / task / "task.yaml").read_text(encoding="utf-8"))


def triples() -> list[tuple[str, ...]]:
    """The graph as it lies on disk."""
    return [tuple(line.split("\t")) for line in (HELPDESK / "catalogue/knowledge.tsv").read_text().splitlines()]


def test_generator_makes_what_is_on_disk() -> None:
    done = subprocess.run([sys.executable, HELPDESK / "make.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_check_finds_a_changed_file(tmp_path: Path) -> None:
    (tmp_path / "make.py").write_bytes((HELPDESK / "make.py").read_bytes())
    (tmp_path / "maker").symlink_to(HELPDESK / "maker")
    subprocess.run([sys.executable, tmp_path / "make.py"], check=True)
    with (tmp_path / "tickets/test.jsonl").open("a") as file:
        file.write("\n")
    done = subprocess.run([sys.executable, tmp_path / "make.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 1 and "tickets/test.jsonl" in done.stderr


@pytest.mark.parametrize(
    ("task", "train", "test"),
    [
        ("tickets", 1300, 450),
        ("answers", 200, 120),
        ("catalogue", 200, 120),
        ("replies", 320, 80),
        ("last-year", 600, 300),
    ],
)
def test_counts(task: str, train: int, test: int) -> None:
    learned, tested = splits(task)
    assert len(learned) >= train and len(tested) >= test
    assert len({row["id"] for row in learned + tested}) == len(learned) + len(tested)


def test_counts_of_sources() -> None:
    lengths = [len(str(document["text"]).split()) for document in rows("answers/documents.jsonl")]
    assert len(lengths) >= 60 and min(lengths) >= 80 and max(lengths) <= 250
    assert len(set(triples())) == len(triples()) >= 400 and all(len(triple) == 3 for triple in triples())
    terms = [line.split("\t") for line in (HELPDESK / "catalogue/glossary.tsv").read_text().splitlines()]
    assert len({term for term, _ in terms}) == len(terms) >= 40
    assert sum(file.stat().st_size for kind in ("jsonl", "tsv") for file in HELPDESK.glob(f"*/*.{kind}")) < 1.5e6


@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_shared_between_train_and_test(task: str) -> None:
    train, test = splits(task)
    for field in ("prompt", "group"):
        assert not {row[field] for row in train} & {row[field] for row in test}
    if task != "replies":
        assert len({row["prompt"] for row in train + test}) == len(train) + len(test)


@pytest.mark.parametrize("task", ("tickets", "last-year", "replies"))
def test_entities_are_held_out(task: str) -> None:
    for text, other in zip(splits(task), ("test", "train"), strict=True):
        held = [
            *company.products(other),
            *company.PLACES[other],
            *company.PROMOS[other],
            *company.COURIERS[other],
            *company.PLANS[other],
        ]
        joined = "\n".join(str(row["prompt"]).lower() for row in text)
        assert [name for name in held if name.lower() in joined] == []


@pytest.mark.parametrize("task", ("tickets", "last-year"))
def test_labels_are_the_closed_set(task: str) -> None:
    train, test = splits(task)
    labels = settings(task)["labels"]
    for part in (train, test):
        counts = [sum(row["completion"] == label for row in part) for label in labels]
        assert sum(counts) == len(part) and max(counts) == min(counts) > 0


def test_tickets_have_many_families_and_a_natural_length() -> None:
    train, test = splits("tickets")
    for part, least in ((train, 12), (test, 5)):
        for label in tickets.LABELS:
            assert len({row["group"] for row in part if row["completion"] == label}) >= least
    assert all(8 <= len(str(row["prompt"]).split()) <= 45 for row in train + test)


def test_answers_stand_in_their_evidence() -> None:
    texts = {document["id"]: str(document["text"]) for document in rows("answers/documents.jsonl")}
    train, test = splits("answers")
    for row in train + test:
        assert row["answers"] == [row["completion"]]
        assert all(str(row["completion"]) in texts[number] for number in row["evidence"]) and row["evidence"]


def test_triples_answer_the_catalogue_questions() -> None:
    graph = triples()
    glossary = dict(line.split("\t") for line in (HELPDESK / "catalogue/glossary.tsv").read_text().splitlines())
    for split, on_disk in zip(("train", "test"), splits("catalogue"), strict=True):
        paths = {prompt: (entity, path) for prompt, entity, path in knowledge.paths()[split]}
        assert {len(path) for _, path in paths.values()} == {1, 2}
        for row in on_disk:
            if row["prompt"] in paths:
                entity, path = paths[row["prompt"]]
                assert entity in row["prompt"] and row["answers"] == knowledge.walk(graph, entity, path)
            else:
                term, answer = row["group"], str(row["completion"])
                assert answer == term or (term in row["prompt"] and answer in glossary[term])
            assert row["completion"] in row["answers"]


def test_pairs_are_alike_in_length_and_form() -> None:
    train, test = splits("replies")
    for row in train + test:
        chosen, rejected = (str(row[side]).split() for side in ("chosen", "rejected"))
        assert chosen != rejected and abs(len(chosen) - len(rejected)) <= 0.1 * max(len(chosen), len(rejected))
        assert chosen[:4] == rejected[:4] and chosen[-3:] == rejected[-3:]
    assert len({row["prompt"] for row in train}) >= 150 and len({row["prompt"] for row in test}) >= 80
    for part in (train, test):
        longer = sum(len(str(row["chosen"])) > len(str(row["rejected"])) for row in part) / len(part)
        assert 0.35 < longer < 0.65, "length must not give the chosen side away"


def test_one_annotator_is_noisy_and_only_in_train() -> None:
    clean = {row["id"]: row for row in feedback.rows("train", noise=0)}
    train, test = splits("replies")
    wrong = [row for row in train if row["chosen"] != clean[row["id"]]["chosen"]]
    assert 0.03 <= len(wrong) / len(train) <= 0.07 and {row["annotator"] for row in wrong} == {feedback.NOISY}
    assert {row["annotator"] for row in train} == set(feedback.ANNOTATORS)
    assert test == feedback.rows("test", noise=0)
    steps = {step for intent in feedback.MIDDLES.values() for named, _ in intent.values() for step in named}
    for row in [*clean.values(), *test]:
        assert any(step in row["chosen"] for step in steps) and not any(step in row["rejected"] for step in steps)


def test_tfidf_stays_under_85_percent() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, test = splits("tickets")
    for ngrams in ((1, 1), (1, 2)):
        model = make_pipeline(TfidfVectorizer(ngram_range=ngrams), LogisticRegression(max_iter=1000))
        model.fit([row["prompt"] for row in train], [row["completion"] for row in train])
        score = model.score([row["prompt"] for row in test], [row["completion"] for row in test])
        print(f"TF-IDF {ngrams} and logistic regression: {score:.1%} of {len(test)}")
        assert 0.5 < score < 0.85


@pytest.mark.parametrize("task", TASKS)
def test_task_names_only_files_that_exist(task: str) -> None:
    said = settings(task)
    assert said["metric"] and said["instruction"]
    for key in ("documents", "knowledge", "glossary", "feedback"):
        assert key not in said or (HELPDESK / task / str(said[key])).is_file()
    assert all((HELPDESK / task / earlier / "task.yaml").is_file() for earlier in said.get("earlier", []))
