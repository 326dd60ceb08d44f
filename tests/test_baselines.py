"""Baselines: what runs when, what it answers, and BM25 against its formula."""

import math

import numpy as np
import pytest

from whet import embed as embedding
from whet.baselines import bm25, run
from whet.encoder import Encoder
from whet.task import Example

TOPICS = {"sport": "ball goal team match", "food": "bread soup rice cook salt", "sea": "whale wave ship salt tide"}


def row(prompt, completion="", **more):
    return Example(id=prompt, prompt=prompt, completion=completion, **more)


def embed(texts):
    """Counts of the topics' words: near means about the same."""
    words = sorted({w for t in TOPICS.values() for w in t.split()})
    return np.array([[t.split().count(w) for w in words] for t in texts], dtype=float)


@pytest.fixture
def topics():
    draw = np.random.default_rng(0)
    rows = [row(f"{' '.join(draw.choice(TOPICS[t].split(), 3))} {i}", t) for i, t in enumerate(
        ["sport"] * 30 + ["food"] * 20 + ["sea"] * 20)]
    return rows, [row("goal match ball", "sport"), row("rice soup bread", "food"), row("ship tide wave", "sea")]


def answers(baselines):
    return {b.name: b.answers for b in baselines}


def test_a_closed_set_gets_four_baselines(topics):
    train, asked = topics
    found = answers(run(train, asked, tuple(TOPICS), embed=embed))
    assert list(found) == ["majority", "tfidf_logistic", "embedding_logistic", "embedding_neighbour"]
    assert found.pop("majority") == ("sport",) * 3
    assert set(found.values()) == {("sport", "food", "sea")}


def test_without_embeddings_the_others_run(topics):
    assert list(answers(run(*topics, tuple(TOPICS), embed=None))) == ["majority", "tfidf_logistic"]


def test_without_train_only_what_needs_none_runs(topics):
    _, asked = topics
    assert run([], asked, tuple(TOPICS), embed=embed) == ()
    assert run([], asked, (), embed=embed) == ()
    assert run(topics[0], [], tuple(TOPICS), embed=embed) == ()


def test_one_class_has_only_a_majority(topics):
    train, asked = topics
    assert list(answers(run(train[:30], asked, tuple(TOPICS), embed=embed))) == ["majority"]


def test_train_rows_outside_the_closed_set_teach_nothing(topics):
    train, asked = topics
    assert answers(run([row("x", "other")] * 90 + train, asked, tuple(TOPICS), embed=None))["majority"][0] == "sport"


def test_two_classes_of_text_without_spaces():
    seen = {"재미있어요": "긍정", "지루했어요": "부정"}
    train = [row(text + "!" * i, label) for text, label in seen.items() for i in range(5)]
    found = answers(run(train, [row("참재미있었다"), row("너무지루했다")], ("긍정", "부정"), embed=None))
    assert found["tfidf_logistic"] == ("긍정", "부정")


def test_prompts_without_a_single_word_do_not_break_it():
    train = [row("?", "a"), row("!", "b"), row("?", "a")]
    assert answers(run(train, [row("?")], ("a", "b"), embed=None))["majority"] == ("a",)


def test_own_choices_need_no_train():
    asked = [row("goal ball", choices=("bread soup rice", "ball team")), row("salt", choices=("cook", "bread", "salt"))]
    found = answers(run([], asked, (), embed=embed))
    assert found == {"longest_choice": ("bread soup rice", "bread"), "nearest_choice": ("ball team", "salt")}
    assert list(answers(run([], asked, (), embed=None))) == ["longest_choice"]


def test_free_text_takes_the_nearest_row_s_completion():
    train = [row("goal match ball", "a game"), row("rice soup", "a meal"), row("nothing here")]
    asked = [row("soup rice salt"), row("ball goal")]
    assert answers(run(train, asked, (), embed=embed)) == {"embedding_neighbour": ("a meal", "a game")}
    assert answers(run(train, asked, (), embed=None)) == {"tfidf_neighbour": ("a meal", "a game")}


DOCUMENTS = {
    "d1": "The tower stands in Paris. It was finished in 1889. Many people visit.",
    "d2": "The bridge stands in London! It was opened in 1894.\nIt carries a road",
    "d3": "",
}


def test_a_question_on_documents_gets_the_best_sentence():
    asked = [row("When was it opened, the bridge?", "1894", evidence=(("d2", 1.0),)),
             row("In what city is the tower?", "Paris", evidence=(("d1", 1.0),))]
    found = answers(run([], asked, (), embed=None, documents=DOCUMENTS))
    assert found == {"bm25_span": ("It was opened in 1894.", "The tower stands in Paris.")}


def test_rows_that_ask_for_documents_get_a_ranking():
    asked = [row("bridge london", evidence=(("d2", 1.0),))]
    assert not run(asked, asked, (), embed=None, ranked=True)
    found = answers(run([], asked, (), embed=None, documents=DOCUMENTS, ranked=True))
    assert found == {"bm25": ("d2\nd1\nd3",)}


def test_plain_text_has_no_baseline():
    assert run([], [Example(id="1", prompt="", text="once upon a time")], (), embed=embed) == ()


def by_hand(query, documents, k1=1.2, b=0.75):
    texts = [d.lower().split() for d in documents]
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for text in texts:
        total = 0.0
        for term in query.lower().split():
            df = sum(term in t for t in texts)
            tf = text.count(term)
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + k1 * (1 - b + b * len(text) / mean))
        scores.append(total)
    return scores


def test_bm25_equals_its_formula():
    documents = ["the cat sat", "The dog and the cat and the bird", "a bird", "서울 은 수도", "x"]
    queries = ["cat", "the the cat", "bird dog unknown", "서울 수도", ""]
    assert bm25(documents, queries) == pytest.approx(np.array([by_hand(q, documents) for q in queries]))
    assert bm25(["..", ""], ["cat"]).tolist() == [[0, 0]]
    with pytest.MonkeyPatch.context() as small:  # in blocks of one query
        small.setattr("whet.baselines.CELLS", len(documents))
        assert bm25(documents, queries) == pytest.approx(np.array([by_hand(q, documents) for q in queries]))


def test_many_rows_of_many_classes_are_told_apart():
    draw = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(2000)])
    train = [row(" ".join([*draw.choice(words, 8), f"topic{i % 40}", f"t{i % 40}"]), f"c{i % 40}") for i in range(1500)]
    asked = [row(f"{words[i]} topic{i} t{i}", f"c{i}") for i in range(40)]
    found = answers(run(train, asked, tuple(f"c{i}" for i in range(40)), embed=None))
    assert np.mean([a == e.completion for a, e in zip(found["tfidf_logistic"], asked, strict=True)]) > 0.95


def test_an_encoder_is_shown_the_closed_set_alone_and_answers_in_the_order_of_the_rows(topics):
    train, asked = topics
    shown = []

    def encoder(texts, truth, wanted):
        shown.append((texts, truth))
        return tuple(f"it is {text}" for text in wanted)

    known = [e for e in train if e.completion != "sea"]
    found = answers(run(train, asked, ("sport", "food"), embed=embed, encoder=encoder))
    assert list(found)[-1] == "encoder_finetuned"
    assert found["encoder_finetuned"] == ("it is goal match ball", "it is rice soup bread", "it is ship tide wave")
    assert shown == [([e.prompt for e in known], [e.completion for e in known])]
    assert "encoder_finetuned" not in answers(run(train[:30], asked, tuple(TOPICS), embed=embed, encoder=encoder))


@pytest.mark.embedder
@pytest.mark.skipif(not embedding.available(), reason="the embedding model is not installed")
def test_a_fine_tuned_encoder_answers_each_text_whatever_its_length_and_place():
    draw = np.random.default_rng(0)

    def text(topic, size):
        return " ".join(draw.choice(TOPICS[topic].split(), size))

    truth = ["sport", "food"] * 20
    train = [text(t, draw.integers(2, 6)) for t in truth]
    asked = [(t, text(t, size)) for size in draw.permutation(np.arange(1, 36)) for t in ("sport", "food")]
    wanted = [said for _, said in asked]
    encoder = Encoder(tokens=10**9)
    found = encoder(train, truth, wanted)
    assert np.mean([a == t for a, (t, _) in zip(found, asked, strict=True)]) >= 0.9
    assert encoder(train, truth, wanted[::-1]) == found[::-1]


@pytest.mark.embedder
@pytest.mark.skipif(not embedding.available(), reason="the embedding model is not installed")
def test_an_encoder_is_not_trained_for_a_step_or_two(topics):
    train, asked = topics
    assert Encoder(tokens=500)(["goal match", "rice soup"] * 20, ["sport", "food"] * 20, ["goal"]) == ()
    found = run(train, asked, ("sport", "food"), embed=None, encoder=lambda *_: ())
    assert found and "encoder_finetuned" not in answers(found)
