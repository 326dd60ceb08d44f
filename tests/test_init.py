"""`whet init`: what it makes of the shapes that public data come in."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from files import refused, write

from whet.columns import NONE, Columns
from whet.convert import turns
from whet.errors import TaskError
from whet.init import Guess, init
from whet.task import Example, Task, load

REVIEWS = [(f"film number {n} was {'good' if n % 2 else 'bad'} to look at", ("neg", "pos")[n % 2]) for n in range(60)]


def make_csv(path: Path, header: str, rows) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([header.split(","), *rows])
    return write(path, text.getvalue())


def test_init_of_a_table(tmp_path):
    data = make_csv(
        tmp_path / "my reviews.csv", "when,opinion,verdict", [(n, *cells) for n, cells in enumerate(REVIEWS)]
    )
    guess = init(data, tmp_path / "task")
    assert guess.columns == Columns(("opinion",), "verdict") and guess.labels == ("neg", "pos")
    assert (guess.kind, guess.rows, guess.metric) == ("columns", 60, "accuracy")
    assert "column 'opinion' read as the prompt (text)" in guess.lines
    assert any("'verdict'" in line and "few different values" in line for line in guess.lines)
    assert "columns not used: when" in guess.lines
    loaded = load(tmp_path / "task")
    assert (loaded.name, loaded.metric, loaded.labels) == ("my-reviews", "accuracy", ("neg", "pos"))
    assert loaded.columns == loaded.split().learnable.columns == ("opinion", "verdict")
    assert (len(loaded.train), len(loaded.test)) == (48, 12)
    assert sum(example.completion == "pos" for example in loaded.test) == 6
    assert {(example.prompt, example.completion) for example in (*loaded.train, *loaded.test)} == set(REVIEWS)
    assert sorted(path.name for path in (tmp_path / "task").iterdir()) == ["task.yaml", "test.jsonl", "train.jsonl"]
    refused(lambda: init(data, tmp_path / "task"), "already holds task.yaml", "--out")
    init(data, tmp_path / "again", name="other")
    assert load(tmp_path / "again").name == "other"
    assert (tmp_path / "again" / "test.jsonl").read_text() == (tmp_path / "task" / "test.jsonl").read_text()


def test_init_by_names_and_context(tmp_path):
    rows = [{"context": f"c{n}", "question": f"why {n}?", "answer": f"because of it {n}", "id": n} for n in range(10)]
    guess = init(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))), tmp_path / "t")
    assert guess.columns == Columns(("context", "question"), "answer")
    assert guess.metric == "token_f1" and guess.labels == ()
    assert load(tmp_path / "t").columns == ()  # a prompt of two columns has no name
    assert "Context: c3\nQuestion: why 3?" in {
        example.prompt for example in (*load(tmp_path / "t").train, *load(tmp_path / "t").test)
    }


def test_init_takes_labels_that_yaml_would_change(tmp_path):
    rows = [(f"question number {n}", ("yes", "no")[n % 2]) for n in range(20)]
    assert init(make_csv(tmp_path / "a.csv", "text,label", rows), tmp_path / "t").labels == ("no", "yes")
    assert load(tmp_path / "t").labels == ("no", "yes")


def test_init_of_known_forms(tmp_path):
    chat = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a {n}"}] for n in range(10)]
    two = [[*turns, {"role": "user", "content": "more"}, {"role": "assistant", "content": "ok"}] for turns in chat]
    share = [[{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "word " * 30}] for n in range(10)]
    forms = {
        "messages": [{"messages": turns} for turns in two],
        "ShareGPT": [{"conversations": turns} for turns in share],
        "Alpaca": [{"instruction": f"q{n}", "input": "", "output": f"a{n}"} for n in range(10)],
        "prompt and completion": [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(10)],
        "text": [{"text": f"text {n}"} for n in range(10)],
        "pairs": [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(10)],
    }
    metrics = {"ShareGPT": "rouge_l", "text": "perplexity", "pairs": "win_rate"}
    for kind, rows in forms.items():
        out = tmp_path / kind
        guess = init(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))), out)
        assert (guess.kind, guess.rows) == (kind, 10)
        assert guess.metric == metrics.get(kind, "exact_match")
        assert len(load(out).test) == 2
    assert load(tmp_path / "messages").test[0].history[-1][0] == "assistant"
    assert load(tmp_path / "pairs").feedback == "feedback.jsonl" and load(tmp_path / "pairs").test[0].rejected == "b"


def test_init_of_choices(tmp_path):
    rows = [{"prompt": f"q{n}", "completion": f"a{n}", "choices": [f"a{n}", "b"]} for n in range(10)]
    guess = init(write(tmp_path / "a.json", json.dumps(rows)), tmp_path / "t")
    assert (guess.metric, guess.labels) == ("accuracy", ()) and load(tmp_path / "t").closed


def test_init_skips_rows_without_an_answer(tmp_path):
    rows = [*REVIEWS, ("no verdict here", ""), ("", "pos")]
    guess = init(make_csv(tmp_path / "a.csv", "review,sentiment", rows), tmp_path / "t")
    assert guess.rows == 60 and any(line.startswith("2 of 62 rows skipped") for line in guess.lines)


def test_init_refuses_what_it_cannot_read(tmp_path):
    out = tmp_path / "t"
    refused(lambda: init(tmp_path / "none.csv", out), "none.csv", "nothing")
    refused(lambda: init(tmp_path, out), "a folder")
    refused(
        lambda: init(make_csv(tmp_path / "a.csv", "a good film,pos", REVIEWS), out), "line 1 looks like data", "header"
    )
    refused(lambda: init(make_csv(tmp_path / "b.csv", "only", [("x",), ("y",)]), out), "b.csv", "columns only")
    refused(lambda: init(make_csv(tmp_path / "c.csv", "prompt,completion", [("a", "b")]), out), "at least 2 rows")
    refused(lambda: init(write(tmp_path / "d.csv", b"a,b\n\xff,x\n"), out), "d.csv line 2", "byte offset 4")
    assert not out.exists()


# --------------------------------------------------------------------------------------------------- public shapes


def made(folder: Path, rows: list[dict[str, Any]], **given: Any) -> tuple[Guess, Task]:
    """The task that `init` makes of rows in JSON lines."""
    folder.mkdir(exist_ok=True)
    guess = init(write(folder / "a.jsonl", "\n".join(map(json.dumps, rows))), folder / "t", **given)
    return guess, load(folder / "t")


def every(task: Task) -> list[Example]:
    return [*task.train, *task.test]


WHO = re.findall("[A-Z][a-z]+", "AdaBeaCleoDoraEveFayGusHalIdaJanKimLeaMaxNedOlePiaQuinRobSueTom")
FOUR = [[f"it is {who} {end}" for end in ("now", "then", "later", "never")] for who in WHO]


def choice(n: int, key: str, form: Any, **more: Any) -> dict[str, Any]:
    return {"question": f"What does {WHO[n]} say?", key: form(n)} | more


# name: (a row for each n, the prompt's columns, the answer's, the prompt, the answer, the metric) for n = 3
SHAPES: dict[str, tuple[Any, str, str, str, str, str]] = {
    "SQuAD": (
        lambda n: {"id": f"5733be{n}", "title": "Some_Title", "context": f"{WHO[n]} lives in the town {n}.",
                   "question": f"Who lives in town {n}?", "answers": {"text": [WHO[n], f"old {WHO[n]}"],
                   "answer_start": [0, 0]}},
        "context question", "answers", "Context: Dora lives in the town 3.\nQuestion: Who lives in town 3?", "Dora",
        "exact_match",
    ),
    "NLI": (
        lambda n: {"premise": f"{WHO[n]} eats a red apple.", "hypothesis": f"{WHO[n]} is not hungry.",
            "label": n % 3},
        "premise hypothesis", "label", "Premise: Dora eats a red apple.\nHypothesis: Dora is not hungry.", "0",
        "accuracy",
    ),
    "QQP": (
        lambda n: {"id": n, "qid1": 2 * n, "qid2": 2 * n + 1, "question1": f"How old is {WHO[n]}?",
                   "question2": f"What age has {WHO[n]}?", "is_duplicate": n % 2},
        "question1 question2", "is_duplicate", "Question1: How old is Dora?\nQuestion2: What age has Dora?", "1",
        "accuracy",
    ),
    "STS": (
        lambda n: {"sentence1": f"{WHO[n]} sings a song.", "sentence2": f"A song by {WHO[n]}.", "score": 0.25 * n},
        "sentence1 sentence2", "score", "Sentence1: Dora sings a song.\nSentence2: A song by Dora.", "0.75", "pearson",
    ),
    "HumanEval": (
        lambda n: {"task_id": f"HumanEval/{n}", "prompt": f"def say{n}():\n    \"\"\"Say {n} aloud.\"\"\"\n",
                   "canonical_solution": f"    return 'the number {n}'\n",
                   "test": f"def check(c):\n    assert c() == {n}",
                   "entry_point": f"say{n}"},
        "prompt", "canonical_solution", "def say3():\n    \"\"\"Say 3 aloud.\"\"\"\n",
        "    return 'the number 3'\n", "chrf",
    ),
    "Dolly": (
        lambda n: {"instruction": f"Say who {WHO[n]} is.", "context": "A book of names." if n == 3 else "",
                   "response": f"{WHO[n]} is one of {len(WHO)} people on this list of names, namely number {n}.",
                   "category": ("open_qa", "closed_qa")[n % 2]},
        "context instruction", "response", "Context: A book of names.\nInstruction: Say who Dora is.",
        "Dora is one of 20 people on this list of names, namely number 3.", "rouge_l",
    ),
    "Korean": (
        lambda n: {"질문": f"{WHO[n]}는 어디에 사나요?", "지문": f"{WHO[n]}는 서울 {n}동에 산다.",
            "정답": f"서울 {n}동"},
        "지문 질문", "정답", "지문: Dora는 서울 3동에 산다.\n질문: Dora는 어디에 사나요?", "서울 3동", "exact_match",
    ),
    "GSM8K": (
        lambda n: {"question": f"{WHO[n]} has {n} nuts and finds 2. How many?",
            "answer": f"She has {n}+2=<<{n}+2={n + 2}>>.\n#### {n + 2}"},
        "question", "answer", "Dora has 3 nuts and finds 2. How many?", "She has 3+2=<<3+2=5>>.\n#### 5", "number",
    ),
    "tweets": (
        lambda n: {"text": f"{WHO[n]} saw a fire today", "target": n % 2},
        "text", "target", "Dora saw a fire today", "1", "accuracy",
    ),
    "labels with names": (
        lambda n: {"text": f"{WHO[n]} saw a fire today", "label": n % 2, "label_text": ("calm news",
            "grave news")[n % 2]},
        "text", "label_text", "Dora saw a fire today", "grave news", "accuracy",
    ),
    "bitext": (
        lambda n: {"flags": "BQZ", "instruction": f"I want to cancel order {n}", "category": "ORDER",
            "intent": ("a", "b")[n % 2],
                   "response": f"We have cancelled your order {n}, and you will hear from us in a few days."},
        "instruction", "response", "I want to cancel order 3",
        "We have cancelled your order 3, and you will hear from us in a few days.", "rouge_l",
    ),
    "WikiQA": (
        lambda n: {"question": f"Who is {WHO[n]}?", "answer": f"{WHO[n]} is a good friend.", "label": n % 2},
        "question answer", "label", "Question: Who is Dora?\nAnswer: Dora is a good friend.", "1", "accuracy",
    ),
    "translation": (
        lambda n: {"translation": {"en": f"{WHO[n]} is at home", "de": f"{WHO[n]} ist zu Hause"}},
        "translation.en", "translation.de", "Dora is at home", "Dora ist zu Hause", "chrf",
    ),
    "TriviaQA": (
        lambda n: {"question": f"Who is number {n}?", "answer": {"value": WHO[n], "aliases": [WHO[n], WHO[n][:2]]}},
        "question", "answer", "Who is number 3?", "Dora", "exact_match",
    ),
    "Alpaca's text": (
        lambda n: {"instruction": f"Greet {WHO[n]} now.", "response": f"Hello, {WHO[n]}, on this day.",
                   "text": f"### Instruction: Greet {WHO[n]} now. ### Response: Hello, {WHO[n]}, on this day."},
        "instruction", "response", "Greet Dora now.", "Hello, Dora, on this day.", "token_f1",
    ),
    "MMLU": (
        lambda n: choice(n, "answer", lambda n: "ABCD"[n % 4], subject="names", **dict(zip("ABCD", FOUR[n],
            strict=True))),
        "question", "answer", "What does Dora say?", "it is Dora never", "accuracy",
    ),
    "MMLU by place": (
        lambda n: choice(n, "answer", lambda n: n % 4, subject="names", choices=FOUR[n]),
        "question", "answer", "What does Dora say?", "it is Dora never", "accuracy",
    ),
    "places from 1": (
        lambda n: choice(n, "label", lambda n: str(n % 4 + 1), **{f"answer{k + 1}": text for k,
            text in enumerate(FOUR[n])}),
        "question", "label", "What does Dora say?", "it is Dora never", "accuracy",
    ),
    "HellaSwag": (
        lambda n: {"ind": n, "activity_label": "Talking", "ctx_a": f"{WHO[n]} goes out.", "ctx_b": "she",
                   "ctx": f"{WHO[n]} goes out. she", "endings": FOUR[n], "source_id": "activitynet~v_1",
                   "label": str(n % 4)},
        "ctx", "label", "Dora goes out. she", "it is Dora never", "accuracy",
    ),
    "ARC": (
        lambda n: choice(n, "answerKey", lambda n: "1234"[n % 4] if n % 2 else "ABCD"[n % 4],
                         choices={"text": FOUR[n], "label": list("1234" if n % 2 else "ABCD")}),
        "question", "answerKey", "What does Dora say?", "it is Dora never", "accuracy",
    ),
    "OpenBookQA's own": (
        lambda n: {"question": {"stem": f"What does {WHO[n]} say?", "choices": [{"text": text, "label": label}
                   for text, label in zip(FOUR[n], "ABCD", strict=True)]}, "answerKey": "ABCD"[n % 4]},
        "question.stem", "answerKey", "What does Dora say?", "it is Dora never", "accuracy",
    ),
    "SciQ": (
        lambda n: choice(n, "correct_answer", lambda n: FOUR[n][0], **{f"distractor{k}": FOUR[n][k] for k in (1, 2,
            3)}),
        "question", "correct_answer", "What does Dora say?", "it is Dora now", "accuracy",
    ),
    "WinoGrande": (
        lambda n: {"sentence": f"{WHO[n]} met Tim, and _ smiled.", "option1": WHO[n], "option2": "Tim",
            "answer": str(n % 2 + 1)},
        "sentence", "answer", "Dora met Tim, and _ smiled.", "Tim", "accuracy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_public_shapes(tmp_path, shape, form):
    make, prompt, completion, asked, said, metric = SHAPES[shape]
    rows = [make(n) for n in range(len(WHO))]
    nested = any(isinstance(cell, dict) for cell in rows[0].values())
    if form == "csv":
        if nested:
            pytest.skip("objects are no cells")
        data = make_csv(tmp_path / "a.csv", ",".join(rows[0]), [list(row.values()) for row in rows])
    elif form == "parquet":
        import pyarrow
        from pyarrow import parquet

        data = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    else:
        data = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    guess = init(data, tmp_path / "t")
    task = load(tmp_path / "t")
    assert guess.columns is not None, guess.lines
    assert (guess.columns.prompt, guess.columns.completion) == (tuple(prompt.split()), completion), guess.lines
    assert (guess.metric, guess.rows, len(every(task))) == (metric, len(WHO), len(WHO)), guess.lines
    [example] = [example for example in every(task) if example.prompt == asked]
    assert example.completion == said
    right = [text for text in example.choices if text == said]
    assert bool(guess.columns.choices) == bool(right) == task.closed & (not task.labels)
    told = "\n".join(guess.lines)
    if guess.columns.reading:
        assert f"its answer is read as {guess.columns.reading}" in told
    for key in rows[0]:  # each column is used or named
        assert key == "id" or key in told or f"{key}." in told, (key, told)


def test_several_answers(tmp_path):
    _, task = made(tmp_path, [SHAPES["SQuAD"][0](n) for n in range(20)])
    assert ("Dora", "old Dora") in {example.answers for example in every(task)}
    asked = [
        {"question": f"Who is {n}?", "answers": {"text": ["x"] if n else [], "answer_start": []}} for n in range(9)
    ]
    (tmp_path / "v2").mkdir()
    guess, _ = made(tmp_path / "v2", asked)
    assert guess.rows == 8 and any("a.jsonl line 1 has no answer" in line for line in guess.lines)


def test_the_file_of_squad(tmp_path):
    asked = [[{"id": f"{a}-{n}", "question": f"Who is {n} in {a}?", "answers": [{"text": f"w{n}", "answer_start": 0}]}
              for n in range(5)] for a in range(4)]  # fmt: skip
    whole = {"version": "1", "data": [{"title": f"t{a}", "paragraphs": [{"context": f"Text {a} of it.", "qas": qas}]}
                                      for a, qas in enumerate(asked)]}  # fmt: skip
    guess = init(write(tmp_path / "a.json", json.dumps(whole)), tmp_path / "t")
    assert guess.rows == 20
    assert "Context: Text 1 of it.\nQuestion: Who is 2 in 1?" in {e.prompt for e in every(load(tmp_path / "t"))}


@pytest.mark.parametrize("answer", ["completion", "response"])
@pytest.mark.parametrize("thumb", [(True, False), (1, 0), ("up", "down")])
def test_thumbs(tmp_path, answer, thumb):
    rows = [{"prompt": f"Who is {who}?", answer: f"{who} is {'a friend' if n % 2 else 'gone'}",
    "label": thumb[n % 2 == 0]}
            for n, who in enumerate(WHO)]  # fmt: skip
    guess, task = made(tmp_path, rows)
    assert (guess.kind, guess.rows) == ("thumbs", 20) and task.feedback == "feedback.jsonl"
    assert all("friend" in example.completion for example in every(task)) and task.train and task.test
    assert all("friend" in j.chosen if j.chosen else "gone" in j.rejected for j in task.judged)
    assert any(j.rejected for j in task.judged)
    assert not {j.prompt for j in task.judged} & {e.prompt for e in task.test}
    assert any("'label' read as a judgement" in line and "--completion label" in line for line in guess.lines)
    (tmp_path / "again").mkdir()
    guess, task = made(tmp_path / "again", rows, completion="label")
    assert guess.kind == "columns" and len(task.labels) == 2 and "gone" in every(task)[0].prompt + every(task)[1].prompt


def test_judged_numbers_and_labels_are_written_in_one_way(tmp_path):
    rows = [{"prompt": f"What is {n} and a half?", "completion": f"{n},{5 + n % 2}", "label": n % 2 == 0}
            for n in range(40)]  # fmt: skip
    guess, task = made(tmp_path, rows)
    assert guess.metric == "number" and any("decimal points, and written so" in line for line in guess.lines)
    said = [*(e.completion for e in every(task)), *(j.chosen or j.rejected for j in task.judged)]
    assert any(j.rejected for j in task.judged) and not any("," in answer for answer in said)
    (tmp_path / "labels").mkdir()
    spelt = [{"prompt": text, "completion": (said.title(), said)[n % 5 < 4], "label": n % 3 > 0}
             for n, (text, said) in enumerate(REVIEWS)]  # fmt: skip
    _, task = made(tmp_path / "labels", spelt)
    assert task.labels == ("neg", "pos") == tuple(sorted({j.chosen or j.rejected for j in task.judged}))


@pytest.mark.parametrize("said", [{"label": False}, {"rating": 3}])
def test_no_good_answer_is_no_task(tmp_path, said):
    rows = [{"prompt": f"Who is {who}?", "completion": f"{who} is gone"} | said for who in WHO]
    with pytest.raises(TaskError, match="a.jsonl holds no answer that was judged good") as told:
        made(tmp_path, rows)
    assert f"--completion {next(iter(said))}" in str(told.value) and not (tmp_path / "t").exists()
    key, good = next(iter(said)), {"label": True, "rating": 5}
    guess, task = made(tmp_path, [*rows[:-1], rows[-1] | {key: good[key]}])
    assert len(every(task)) == 1 and ("no row is sealed" in " ".join(guess.lines)) is (not task.test)


def test_ratings(tmp_path):
    rows = [{"prompt": f"Who is {who}?", "completion": f"answer {n}", "rating": n % 5} for n, who in enumerate(WHO)]
    guess, task = made(tmp_path, rows)
    assert guess.kind == "thumbs" and len(every(task)) == 8  # 3 and 4 are above the mean
    assert {int(example.completion[7:]) % 5 for example in every(task)} == {3, 4}


def test_pairs_of_every_form(tmp_path):
    def turns(n: int, *said: str) -> list[dict[str, str]]:
        asked = [{"role": "user", "content": f"Who is {WHO[n]}?"}]
        return [*asked, *({"role": "assistant", "content": text} for text in said)]

    forms = {
        "plain": [{"prompt": f"Who is {who}?", "chosen": "yes", "rejected": "no"} for who in WHO],
        "Orca": [{"system_prompt": "Be kind.", "question": f"Who is {who}?", "chosen": "yes",
        "rejected": "no"} for who in WHO],
        "lists": [{"prompt": f"Who is {WHO[n]}?", "prompt_id": f"x{n}", "chosen": turns(n, "yes"),
        "rejected": turns(n, "no")}
                  for n in range(20)],
        "implicit": [{"chosen": turns(n, "yes"), "rejected": turns(n, "no")} for n in range(20)],
        "chats": [{"prompt": turns(n), "chosen": turns(n, "yes")[1:], "rejected": turns(n,
        "no")[1:]} for n in range(20)],
        "hh-rlhf": [{side: f"\n\nHuman: Who is {who}?\n\nAssistant: {said}" for side, said in (("chosen", "yes"),
        ("rejected", "no"))}
                    for who in WHO],
    }  # fmt: skip
    for form, rows in forms.items():
        (tmp_path / form).mkdir()
        guess, task = made(tmp_path / form, [*rows, rows[0] | {"rejected": rows[0]["chosen"]}])
        assert (guess.kind, guess.metric, guess.rows) == ("pairs", "win_rate", 20), form
        assert any("both sides" in line for line in guess.lines)
        assert any("read as the system's turn" in line for line in guess.lines) == (form == "Orca")
        assert {(j.prompt, j.chosen, j.rejected) for j in task.judged} < {
            (f"Who is {who}?", "yes", "no") for who in WHO
        }
        assert task.judged[0].history == ((("system", "Be kind."),) if form == "Orca" else ())


def test_many_labels_are_labels(tmp_path):
    rows = [{"text": f"please do thing {n} for me", "intent": f"intent_{n % 150}"} for n in range(1500)]
    guess, task = made(tmp_path, rows)
    assert guess.metric == "accuracy" and len(task.labels) == 150
    assert sorted(map(str, range(12)), key=int) == list(_labels(tmp_path, [n % 12 for n in range(120)]))
    assert not _labels(tmp_path, [n % 25 * 7 for n in range(250)])  # quantities, not classes
    assert not _labels(tmp_path, ["yes"] * 90 + [f"name {n}" for n in range(10)])  # a few common answers are no set
    assert _labels(tmp_path, ["Good", "bad ", "good", "bad", "good"] * 12) == ("bad", "good")


def _labels(folder: Path, answers: list[Any]) -> tuple[str, ...]:
    place = folder / f"labels {len(list(folder.iterdir()))}"
    place.mkdir()
    return made(place, [{"question": f"What is number {n}?", "answer": answer} for n, answer in enumerate(answers)])[
        0
    ].labels


def test_named_columns(tmp_path):
    rows = [{"instruction": f"Say {who}.", "response": f"{who} it is, then.", "category": ("a", "b")[n % 2],
    "note": "x y z"}
            for n, who in enumerate(WHO)]  # fmt: skip
    guess, task = made(tmp_path, rows, prompt=("instruction", "response"), completion="category")
    assert task.labels == ("a", "b") and every(task)[0].prompt.startswith("Instruction: Say ")
    assert "columns not used: note" in guess.lines
    refused(lambda: made(tmp_path / "t", rows, completion="categry"), "no column 'categry'", "category")


def test_names_in_the_head_of_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    head = {"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}
    table = pyarrow.Table.from_pylist([{"text": text, "label": n % 2} for n, (text, _) in enumerate(REVIEWS)])
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(head)}), tmp_path / "a.parquet")
    init(tmp_path / "a.parquet", tmp_path / "t")
    assert {(e.prompt, e.completion) for e in every(load(tmp_path / "t"))} == set(REVIEWS)


def test_several_labels_a_row(tmp_path):
    rows = [
        {"text": f"I am {who} today", "labels": [n % 3, 3] if n % 2 else [n % 3], "id": n} for n, who in enumerate(WHO)
    ]
    guess, task = made(tmp_path, rows)
    assert guess.metric == "set_f1" and {example.completion for example in every(task)} >= {"0", "1, 3"}


LABELS = [f"mood {n}" for n in range(11)] + ["love, true"]


@pytest.mark.parametrize("cells", [(0, 1), ("False", "True"), ("0.0", "1.0")])
def test_columns_of_0_and_1_are_labels_of_a_row(tmp_path, cells):
    texts = [text for text, _ in REVIEWS]
    on = [{n % 12, n % 5} if n % 7 else set() for n in range(60)]
    table = [LABELS, *([cells[m in some] for m in range(12)] for some in on)]
    data = tmp_path / "moods.csv"
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([text, *row] for text, row in zip(["tweet", *texts], table, strict=True))
    guess = init(data, tmp_path / "t")
    task = load(tmp_path / "t")
    names = [name.replace(",", "") for name in LABELS]
    assert guess.columns == Columns(("tweet",), "labels") and (guess.metric, task.labels) == ("set_f1", ())
    wanted = [", ".join(names[m] for m in sorted(some)) or "none" for some in on]
    assert {e.prompt: e.completion for e in every(task)} == dict(zip(texts, wanted, strict=True))
    assert task.instruction == f"Name all labels that fit, with commas between: {', '.join(sorted([*names, 'none']))}."
    said = next(line for line in guess.lines if "hold 0 and 1 alone" in line)
    assert all(repr(name) in said for name in LABELS) and "--completion" in said
    guess = init(data, tmp_path / "one", completion="mood 3")
    assert guess.columns == Columns(("tweet",), "mood 3") and guess.metric == "accuracy"


def test_one_column_of_0_and_1_a_row_is_its_label(tmp_path):
    rows = [{"text": text, **{f"label_{m}": int(n % 3 == m) for m in range(3)}} for n, (text, _) in enumerate(REVIEWS)]
    guess, task = made(tmp_path, rows)
    assert (guess.metric, task.labels) == ("accuracy", ("label_0", "label_1", "label_2"))


def test_flags_beside_an_answer_are_no_labels(tmp_path):
    flags = {"checked": 0, "long": 1, "edited": 0}
    rows = [{"text": text, "stars": n % 5, **flags} for n, (text, _) in enumerate(REVIEWS)]
    guess, _ = made(tmp_path, rows)
    assert guess.columns == Columns(("text",), "stars") and "columns not used: checked, edited, long" in guess.lines


def test_flags_beside_a_column_of_few_values_are_no_labels(tmp_path):
    flags = {"checked": 0, "long": 1, "edited": 0}
    rows = [{"text": text, "tone": ("formal", "casual")[n % 2], **flags} for n, (text, _) in enumerate(REVIEWS)]
    guess, _ = made(tmp_path, rows)
    assert guess.columns.completion == "tone" and "columns not used: checked, edited, long" in guess.lines


def test_numbered_labels_are_pointed_out(tmp_path):
    guess, task = made(tmp_path, [{"text": text, "label": n % 2} for n, (text, _) in enumerate(REVIEWS)])
    assert task.labels == ("0", "1") and any("write names for these numbers" in line for line in guess.lines)


def test_plain_text_without_blank_lines(tmp_path):
    lines = "".join(f"This is line {n} of a book without pauses.\n" for n in range(200))
    guess = init(write(tmp_path / "a.txt", lines), tmp_path / "t")
    task = load(tmp_path / "t")
    assert (guess.kind, task.metric) == ("text", "perplexity") and len(every(task)) > 2 and task.test
    assert sorted(lines.split("\n")) == sorted("".join(e.text or "" for e in every(task)).split("\n"))
    refused(lambda: init(write(tmp_path / "b.txt", "one line"), tmp_path / "u"), "b.txt", "at least 2 texts", "found 1")
    rows = [{"text": f"page {n}", "url": f"http://x/{n}", "timestamp": "2020"} for n in range(10)]
    (tmp_path / "wiki").mkdir()
    guess, _ = made(tmp_path / "wiki", [row | {"title": "A page"} for row in rows])
    assert guess.kind == "text" and "columns not used: timestamp, title, url" in guess.lines


def test_what_has_no_answers_or_no_header_is_refused_or_doubted(tmp_path):
    refused(
        lambda: made(tmp_path, [{"premise": f"a b {n}", "hypothesis": f"c d {n}"} for n in range(9)]), "--completion"
    )
    refused(lambda: made(tmp_path, [{"text": f"a b {n}", "tokens": ["a", "b"], "more": 1} for n in range(9)]), "tokens")
    rows = "".join(f"{text}\t{label}\n" for text, label in REVIEWS)
    refused(lambda: init(write(tmp_path / "a.tsv", rows), tmp_path / "t"), "line 1 looks like data", "header")
    pairs = "".join(f"{who} is here\t{who} ist da\n" for who in WHO)
    guess = init(write(tmp_path / "b.tsv", pairs), tmp_path / "t")
    assert any("is line 1 of b.tsv a header?" in line for line in guess.lines)


def test_chats_and_what_stands_beside_them(tmp_path):
    chat = [
        [{"role": "user", "content": f"Who is {who}?"}, {"role": "assistant", "content": "A friend."}] for who in WHO
    ]
    rows: list[dict[str, Any]] = [{"prompt": f"Who is {who}?", "prompt_id": who, "messages": turns}
                                  for who, turns in zip(WHO, chat, strict=True)]  # fmt: skip
    guess, task = made(tmp_path, [*rows, {"prompt": "x", "messages": [{"role": "wizard", "content": "y"}]}])
    assert (guess.kind, guess.rows) == ("messages", 20) and {e.completion for e in every(task)} == {"A friend."}
    assert "columns not used: prompt, prompt_id" in guess.lines
    assert any("1 of 21 rows left out" in line and "'wizard'" in line for line in guess.lines)


def test_numbers_and_labels_with_commas(tmp_path):
    prices = [f"{n + 1}.{n * 37 + 100},4{n % 10}" for n in range(len(WHO))]
    euro = [{"Text": f"a flat of {who} here", "Preis": price} for who, price in zip(WHO, prices, strict=True)]
    guess, _ = made(tmp_path, euro, completion="Preis")
    assert guess.metric == "number"
    (tmp_path / "u").mkdir()
    places = ("Washington, DC", "Portland, OR", "Portland, ME", "Seattle, WA")
    guess, task = made(tmp_path / "u", [{"text": text, "label": places[n % 4]} for n, (text, _) in enumerate(REVIEWS)])
    assert guess.metric == "accuracy" and set(task.labels) == set(places)
    assert task.instruction == f"Answer with one of: {'; '.join(sorted(places))}."


TAGS = ("bug", "login", "refund")


def test_lists_are_several_labels_a_row(tmp_path):
    rows = [{"text": text, "tags": [tag for m, tag in enumerate(TAGS) if n % 8 >> m & 1], "id": n}
            for n, (text, _) in enumerate(REVIEWS)]  # fmt: skip
    guess, task = made(tmp_path, rows, completion="tags")
    wanted = {row["text"]: ", ".join(row["tags"]) or "none" for row in rows}
    assert {e.prompt: e.completion for e in every(task)} == wanted and guess.rows == 60
    assert (guess.metric, guess.labels) == ("set_f1", ()) and task.instruction.endswith(": bug, login, none, refund.")
    assert any("'tags' holds lists" in line for line in guess.lines)
    data = make_csv(tmp_path / "b.csv", "text,tags", [(row["text"], row["tags"]) for row in rows])
    assert init(data, tmp_path / "csv", completion="tags").metric == "set_f1"
    assert {e.prompt: e.completion for e in every(load(tmp_path / "csv"))} == wanted
    (tmp_path / "one").mkdir()
    guess, task = made(tmp_path / "one", [row | {"tags": row["tags"][:1] or ["none"]} for row in rows],
                       completion="tags")  # fmt: skip
    assert (guess.metric, task.labels) == ("accuracy", ("bug", "login", "none", "refund"))


def test_lists_of_objects_are_json(tmp_path):
    rows = [{"text": text, "entities": [{"text": WHO[n % 20], "label": "PER"}, {"text": "Köln", "label": "LOC"}]}
            for n, (text, _) in enumerate(REVIEWS)]  # fmt: skip
    guess, task = made(tmp_path, rows, completion="entities")
    assert guess.metric == "set_f1" and task.instruction == "Answer with a JSON list."
    assert {e.prompt: json.loads(e.completion) for e in every(task)} == {r["text"]: r["entities"] for r in rows}
    assert every(task)[0].completion.startswith('[{"text":"') and len(every(task)[0].answers) == 1


@pytest.mark.parametrize("mark", ["|", "; ", ", ", ","])
def test_cells_of_several_labels(tmp_path, mark):
    sets = [[tag for m, tag in enumerate(TAGS) if (n % 7 + 1) >> m & 1] for n in range(60)]
    sets = [tags[::-1] if n % 2 else tags for n, tags in enumerate(sets)]
    rows = [(text, mark.join(tags)) for (text, _), tags in zip(REVIEWS, sets, strict=True)]
    guess = init(make_csv(tmp_path / "a.csv", "text,tags", rows), tmp_path / "t")
    task = load(tmp_path / "t")
    assert (guess.metric, task.labels) == ("set_f1", ()) and any("parted by" in line for line in guess.lines)
    assert [e.completion for e in sorted(every(task), key=lambda e: int(e.prompt.split()[2]))] == [
        ", ".join(tags) for tags in sets
    ]
    assert task.instruction == "Name all labels that fit, with commas between: bug, login, refund."


@pytest.mark.parametrize("answers", [
    ("Washington, DC", "Portland, OR", "Portland, ME", "Portland"), ("yes", "yes, if asked", "no", "no, never"),
    ("1,5", "2,5", "2,0", "1", "2", "5", "0"), ("a|b",), ("bug", "login", "a|b"),
])  # fmt: skip
def test_labels_with_commas_stay_whole(tmp_path, answers):
    _, task = made(tmp_path, [{"text": t, "label": answers[n % len(answers)]} for n, (t, _) in enumerate(REVIEWS)])
    assert {e.completion for e in every(task)} == set(answers) and task.metric != "set_f1"


def test_texts_with_commas_stay_texts(tmp_path):
    said = ("Yes, of course", "No", "Yes", "Well, no, not before {}", "In {}, with {}, and then home", "{}, {}")
    rows = [{"text": t, "answer": said[n % 6].format(WHO[n % 20], WHO[n % 7])} for n, (t, _) in enumerate(REVIEWS)]
    assert made(tmp_path, rows)[0].metric in ("exact_match", "token_f1")


def test_accepted_answers_that_are_labels_stay(tmp_path):
    said = (["joy", "Fear"], ["fear", "dread"], ["joy"], ["fear ", "joy", "joy"])
    rows = [{"prompt": text, "completion": said[n % 4][0], "answers": said[n % 4]}
            for n, (text, _) in enumerate(REVIEWS)]  # fmt: skip
    guess, task = made(tmp_path, rows)
    assert task.labels == ("fear", "joy") and "15 accepted answers left out: they are no label" in guess.lines
    wanted = (("joy", "fear"), ("fear",), ("joy",), ("fear", "joy"))
    assert {e.prompt: e.answers for e in every(task)} == {row["prompt"]: wanted[n % 4] for n, row in enumerate(rows)}


def test_translations(tmp_path):
    rows = [(f"{who} buys {n} books for a friend", f"{who}는 책 {n}권을 샀다") for n, who in enumerate(WHO)]
    guess = init(make_csv(tmp_path / "a.csv", "en,ko", rows), tmp_path / "t")
    assert guess.metric == "chrf" and load(tmp_path / "t").instruction == "Translate from English to Korean."
    guess = init(make_csv(tmp_path / "b.csv", "English,Korean", rows), tmp_path / "u")
    assert guess.metric == "chrf" and load(tmp_path / "u").instruction == "Translate from English to Korean."


def test_indonesian_is_no_id(tmp_path):
    rows = [(f"{who} buys {n} books for a friend", f"{who} membeli {n} buku untuk teman") for n, who in enumerate(WHO)]
    guess, task = made(tmp_path, [{"id": n, "translation": dict(zip(("en", "id"), r, strict=True))}
                                  for n, r in enumerate(rows)])  # fmt: skip
    assert guess.metric == "chrf" and task.instruction == "Translate from English to Indonesian."
    assert {(e.prompt, e.completion) for e in every(task)} == set(rows)
    guess = init(make_csv(tmp_path / "c.csv", "id,en,de", [(n, *row) for n, row in enumerate(rows)]), tmp_path / "v")
    assert guess.columns == Columns(("en",), "de")


def test_code_is_scored_with_its_signs(tmp_path):
    rows = [{"question": f"How many users of {who} are older than {n}?",
             "sql": f"SELECT COUNT(*) FROM {who} WHERE age > {n}"} for n, who in enumerate(WHO)]  # fmt: skip
    assert made(tmp_path, rows)[0].metric == "chrf"
    said = [{"problem": row["question"], "solution": f"Press the button of {who}, then wait for {n} minutes or so."}
            for n, (row, who) in enumerate(zip(rows, WHO, strict=True))]  # fmt: skip
    for place, more in (("plain", ""), ("formulas", " So \\boxed{x = 3}.")):
        (tmp_path / place).mkdir()
        guess, _ = made(tmp_path / place, [row | {"solution": row["solution"] + more} for row in said])
        assert guess.metric == "rouge_l"


def test_tests_of_code_stand_in_the_rows(tmp_path):
    rows = [SHAPES["HumanEval"][0](n) for n in range(20)]
    guess, task = made(tmp_path, rows)
    assert {e.prompt: dict(e.extra) for e in every(task)} == {
        row["prompt"]: {"test": row["test"], "entry_point": row["entry_point"]} for row in rows
    }
    assert "columns not used: task_id" in guess.lines


USERS = [{"user_id": f"u{n // 6}", "text": text, "label": label} for n, (text, label) in enumerate(REVIEWS)]


def test_a_column_of_users_becomes_the_group(tmp_path):
    guess, _ = made(tmp_path, USERS)
    assert "user_id repeats: rows of one user stand on both sides; use --group user_id" in guess.lines
    (tmp_path / "g").mkdir()
    guess, task = made(tmp_path / "g", USERS, group="user_id")
    assert not any("user_id repeats" in line or "not used" in line for line in guess.lines)
    sides = [{example.group for example in part} for part in (task.train, task.test)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {f"u{n}" for n in range(10)}
    refused(lambda: made(tmp_path / "t", USERS, group="user"), "no column 'user'", "'user_id'")
    once = [row | {"user_id": n} for n, row in enumerate(USERS)]
    assert not any("repeats:" in line for line in init_lines(tmp_path / "once", once))
    chats = [{"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": "Well."}],
              "sessionId": n // 2} for n, row in enumerate(USERS)]  # fmt: skip
    assert any(line.startswith("sessionId repeats: rows of one session") for line in init_lines(tmp_path / "c", chats))
    (tmp_path / "p").mkdir()
    _, task = made(tmp_path / "p", [row | {"context": row["user_id"] * 9} for row in USERS], group="context")
    assert every(task)[0].prompt.startswith("Context: u") and every(task)[0].group


def init_lines(folder: Path, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    folder.mkdir()
    return made(folder, rows)[0].lines


@pytest.mark.parametrize("parts", [("train", "Validation", "test"), ("train", "dev"), ("train", "test")])
def test_a_column_named_split_is_kept_to(tmp_path, parts):
    rows = [{"text": text, "mood": label, "split": parts[n // 2 % len(parts)]}
            for n, (text, label) in enumerate(REVIEWS)]  # fmt: skip
    guess, task = made(tmp_path, rows)
    assert any(line.endswith("as column 'split' says") for line in guess.lines) and guess.labels == ("neg", "pos")
    for part, loaded in zip(parts, (task.train, task.test) if len(parts) == 2 else (task.train, task.dev, task.test),
                            strict=True):  # fmt: skip
        assert {e.prompt for e in loaded} == {row["text"] for row in rows if row["split"] == part}
    assert not any(e.extra for e in every(task))
    (tmp_path / "other").mkdir()
    guess, _ = made(tmp_path / "other", [*rows, rows[0] | {"split": "later"}])
    assert not any("as column 'split' says" in line for line in guess.lines)
    pairs = [{"prompt": row["text"], "chosen": "a", "rejected": "b", "split": row["split"]} for row in rows]
    assert "columns not used: split" in init_lines(tmp_path / "pairs", pairs)


def test_rows_that_repeat_or_contradict_are_counted(tmp_path):
    rows = [{"text": text, "label": label} for text, label in REVIEWS]
    torn = [{"text": row["text"].upper(), "label": REVIEWS[n + 1][1]} for n, row in enumerate(rows[:3])]
    lines = init_lines(tmp_path / "torn", [*rows, *rows[:5], *torn])
    assert "5 rows repeat another row exactly" in lines
    assert ("3 prompts have different labels in different rows: line 1 and line 66; line 2 and line 67; "
            "line 3 and line 68") in lines
    [line] = [line for line in init_lines(tmp_path / "one", [*rows, torn[0]]) if "different labels" in line]
    assert line == "1 prompt has different labels in different rows: line 1 and line 61"
    skewed = [row | {"label": "rare" if n < 5 else "usual"} for n, row in enumerate(rows)]
    [line] = [line for line in init_lines(tmp_path / "skewed", skewed) if "macro_f1" in line]
    assert line.startswith("55 of 60 rows have the label 'usual'")
    assert any("all 60 answers are the same: 'pos'" in line for line in init_lines(
        tmp_path / "same", [row | {"label": "pos"} for row in rows]))  # fmt: skip
    lines = init_lines(tmp_path / "sound", rows)
    said = ("repeat another", "different labels", "macro_f1", "the same:")
    assert not any(word in line for line in lines for word in said)


@pytest.mark.parametrize(("columns", "asked"), [
    ("notes,summary,author", "Summarize the text."), ("article,headline", "Write a title for the text."),
    ("frage,antwort", "Answer the question."), ("pregunta,respuesta", "Answer the question."),
    ("question,réponse", "Answer the question."),
])  # fmt: skip
def test_answers_are_asked_for_by_their_column(tmp_path, columns, asked):
    cells = [(f"what of the thing number {n}?", f"it is {n} by now", "ann") for n in range(40)]
    names = columns.split(",")
    guess, task = made(tmp_path, [dict(zip(names, row, strict=False)) for row in cells])
    assert task.instruction == asked and guess.columns.completion == names[1]
    if "author" not in names and "headline" not in names:
        assert {f"column {name!r} read as the {part} (by its name)" for name, part in zip(
            names, ("prompt", "answer"), strict=True)} <= set(guess.lines)  # fmt: skip
    assert any("documents: FOLDER" in line for line in guess.lines) == (asked == "Answer the question.")
    assert "8 rows are sealed: a gain of less than about 49 points cannot be shown on so few" in guess.lines[-1]


def test_korean_rows_are_asked_in_korean(tmp_path):
    rows = [{"리뷰": f"{n}번째로 산 물건은 정말 {said}", "감정": label} for n in range(60)
            for said, label in (("좋아요", "긍정"), ("별로예요", "부정"))]  # fmt: skip
    guess, task = made(tmp_path, rows)
    assert task.instruction == "다음 중 하나로 답하세요: 긍정, 부정." and task.labels == ("긍정", "부정")
    assert not any("sealed" in line for line in guess.lines)  # 24 may show 25 points


def test_what_gives_the_answer_away_is_not_asked(tmp_path):
    rows = [{"text": f"the {n} was seen here", "label": ("good", "bad")[n % 2], name: f"this is {n % 2} because it is"}
            for n in range(30) for name in ("why",)]  # fmt: skip
    _, task = made(tmp_path / "a", rows)
    assert all(e.prompt.startswith("the ") and "because" not in e.prompt for e in every(task))
    rows = [{"justification": f"it is {n % 2} as they say", "text": f"the {n} was seen",
             "label": ("good", "bad")[n % 2], "__index_level_0__": 3 * n} for n in range(30)]  # fmt: skip
    _, task = made(tmp_path / "b", rows)
    assert task.labels == ("bad", "good") and all(e.prompt.startswith("the ") for e in every(task))
    rows = [{"q": f"what is {n} and one", "a": f"it is {n} or so", "__index_level_0__": 3 * n} for n in range(30)]
    _, task = made(tmp_path / "c", rows)
    assert all(e.completion.startswith("it is") and "or so" not in e.prompt for e in every(task))


def test_columns_named_as_labels_need_two_rows_of_each(tmp_path):
    rows = [{"text": f"number {n} of them", "label": f"a rather long name for what is of kind {n % 3}"}
            for n in range(12)]  # fmt: skip
    assert len(made(tmp_path / "a", rows)[1].labels) == 3
    assert made(tmp_path / "b", [{"text": r["text"], "answer": r["label"]} for r in rows])[1].labels == ()


def test_passages_that_are_not_squads_are_no_reason_to_fail(tmp_path):
    rows = [{"question": f"who was number {n}?", "answer": f"it was {n}", "paragraphs": part}
            for n in range(12) for part in ([{"idx": 0, "paragraph_text": f"it was {n}"}],)]  # fmt: skip
    assert len(every(made(tmp_path / "a", rows)[1])) == 12
    assert len(every(made(tmp_path / "b", [{**r, "paragraphs": ["some", "texts"]} for r in rows])[1])) == 12


def test_more_choices_than_letters(tmp_path):
    rows = [{"question": f"which is number {n}?", "choices": [f"thing {(n + i) % 40}" for i in range(30)],
             "answer": f"thing {(n + 28) % 40} "} for n in range(24)]  # fmt: skip
    guess, task = made(tmp_path / "a", rows)
    assert guess.metric == "accuracy" and all(len(e.choices) == 30 and e.completion in e.choices for e in every(task))


def test_tables_of_any_ending(tmp_path):
    body = "".join(f"{n}\tfilm {n} was fine\t{n % 2}\n" for n in range(40))
    init(write(tmp_path / "ratings.txt", f"id\tdocument\tlabel\n{body}"), tmp_path / "a")
    assert load(tmp_path / "a").labels == ("0", "1")
    lines = "\r".join(["text,label", *(f"film {n},{('good', 'bad')[n % 2]}," for n in range(40))])
    init(write(tmp_path / "mac.csv", lines), tmp_path / "b")
    assert load(tmp_path / "b").labels == ("bad", "good")


def test_labels_with_commas_and_none_at_all(tmp_path):
    said = (["food, drink", "price"], ["service"], [])
    rows = [{"text": f"review {n} of it", "labels": said[n % 3]} for n in range(30)]
    guess, task = made(tmp_path, rows)
    assert (guess.metric, guess.rows) == ("set_f1", 30), guess.lines
    assert {example.completion for example in every(task)} == {'["food, drink", "price"]', '["service"]', "[]"}
    assert 'a JSON list, out of ["food, drink", "price", "service"].' in task.instruction
    (tmp_path / "plain").mkdir()
    plain = [{**row, "labels": [label.replace(", ", " and ") for label in row["labels"]]} for row in rows]
    guess, task = made(tmp_path / "plain", plain)  # a row that no label fits is a row
    assert (guess.metric, guess.rows) == ("set_f1", 30), guess.lines
    assert {example.completion for example in every(task)} == {"food and drink, price", "service", NONE}


def test_labels_in_brackets_are_no_lists(tmp_path):
    said = ("[NEG]", "[NEG], [POS]", "[POS]")
    guess, task = made(tmp_path, [{"text": f"review {n} of it", "labels": said[n % 3]} for n in range(30)])
    assert guess.metric == "set_f1" and "[NEG], [POS]" in task.instruction, guess.lines
    (tmp_path / "one").mkdir()
    guess, task = made(tmp_path / "one", [{"text": f"review {n} of it", "labels": said[n % 2 * 2]} for n in range(30)])
    assert guess.metric == "accuracy" and task.labels == ("[NEG]", "[POS]"), guess.lines


def test_an_answer_that_is_an_object_is_json(tmp_path):
    rows = [{"input": f"order {n} of jackets", "output": {"item": "jacket", "qty": n}} for n in range(20)]
    guess, task = made(tmp_path, rows)
    assert guess.columns.completion == "output" and guess.metric != "accuracy", guess.lines
    assert '{"item": "jacket", "qty": 3}' in {example.completion for example in every(task)}


def test_a_column_is_not_prompt_and_answer(tmp_path):
    data = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": f"t{n}", "label": "ab"[n % 2]}) for n in range(9)))
    refused(lambda: init(data, tmp_path / "t", prompt=("text",), completion="text"), "'text'", "prompt and answer")


@pytest.mark.parametrize("column", ["label_id", "class_index", "Category ID", "intent_idx"])
def test_numbered_classes_are_answers(tmp_path, column):
    rows = [{"id": f"r{n}", "text": text, column: f"{n % 4}"} for n, (text, _) in enumerate(REVIEWS)]
    guess, task = made(tmp_path, rows)
    assert guess.columns == Columns(("text",), column) and task.labels == ("0", "1", "2", "3"), guess.lines


def test_topics_of_news_are_answers(tmp_path):
    rows = [{"Class Index": str(n % 4 + 1), "Title": f"a title of item {n} here", "Description": text}
            for n, (text, _) in enumerate(REVIEWS)]  # fmt: skip
    guess, _ = made(tmp_path, rows)
    assert guess.columns == Columns(("Title", "Description"), "Class Index") and guess.metric == "accuracy"


@pytest.mark.parametrize(
    ("columns", "prompt", "answer"),
    [({"url": "text", "label": "few"}, "url", "label"),
     ({"text": "text", "author": "few", "toxic": "few"}, "text", "toxic"),
     ({"question": "text", "topic_id": "few", "is_duplicate": "few"}, "question", "is_duplicate"),
     ({"utterance": "text", "category_id": "few", "kommentar": "text"}, "utterance", "kommentar")],
)  # fmt: skip
def test_numbered_classes_are_answers_where_nothing_else_is(tmp_path, columns, prompt, answer):
    rows = [{key: f"{text} {key}" if kind == "text" else f"{key[0]}{n % 3}" for key, kind in columns.items()}
            for n, (text, _) in enumerate(REVIEWS)]  # fmt: skip
    guess, _ = made(tmp_path, rows)
    assert guess.columns == Columns((prompt,), answer), guess.lines


def test_a_corpus_stays_one_whatever_is_numbered_beside_it(tmp_path):
    rows = [{"text": f"{text} " * 30, "category_id": n % 3, "author": "ab"[n % 2]}
            for n, (text, _) in enumerate(REVIEWS)]  # fmt: skip
    guess, _ = made(tmp_path, rows)
    assert guess.kind == "text" and guess.metric == "perplexity"


def test_evidence_that_is_text_is_read(tmp_path):
    rows = [{"claim": f"{text} indeed", "evidence": f"someone wrote that {text} back then", "label": "SR"[n % 2]}
            for n, (text, _) in enumerate(REVIEWS)]  # fmt: skip
    guess, task = made(tmp_path, rows)
    assert set(guess.columns.prompt) == {"claim", "Evidence"} and not any(e.evidence for e in every(task)), guess.lines
    asked = init(tmp_path / "a.jsonl", tmp_path / "asked", prompt=("claim", "evidence"))
    assert asked.columns.prompt == ("claim", "evidence")  # by the name that the file has
    (tmp_path / "ids").mkdir()
    rows = [{"question": text, "answer": f"it is {n}", "evidence": [f"d{n}"]} for n, (text, _) in enumerate(REVIEWS)]
    guess, task = made(tmp_path / "ids", rows)
    assert guess.columns.prompt == ("question",) and all(e.evidence for e in every(task))


def test_names_within_objects_come_second(tmp_path):
    rows = [{"idx": {"passage": n, "query": n}, "question": text, "final_decision": ("yes", "no", "maybe")[n % 3],
             "context": {"labels": ["BACKGROUND", "RESULTS"], "contexts": [text]}}
            for n, (text, _) in enumerate(REVIEWS)]  # fmt: skip
    guess, task = made(tmp_path, rows)
    assert guess.columns == Columns(("question",), "final_decision") and set(task.labels) == {"yes", "no", "maybe"}
    (tmp_path / "u").mkdir()
    rows = [{"question": text, "mc1_targets": {"choices": [f"right {n}", f"wrong {n}", "other"], "labels": [1, 0, 0]},
             "mc2_targets": {"choices": [f"right {n}", "other"], "labels": [1, 1]}}
            for n, (text, _) in enumerate(REVIEWS)]  # fmt: skip
    guess, task = made(tmp_path / "u", rows)
    assert guess.metric == "accuracy" and all(e.completion.startswith("right") and e.choices for e in every(task))


def test_rows_that_nobody_labelled_are_left_out(tmp_path):
    rows = [{"premise": text, "label": -1 if n % 20 == 0 else n % 3} for n, (text, _) in enumerate(REVIEWS)]
    guess, task = made(tmp_path, rows)
    assert task.labels == ("0", "1", "2") and "3 rows without a label (-1) left out" in guess.lines
    (tmp_path / "s").mkdir()
    rows = [{"text": text, "label": n % 3 - 1} for n, (text, _) in enumerate(REVIEWS)]
    assert set(made(tmp_path / "s", rows)[1].labels) == {"-1", "0", "1"}  # below, at and above nought


def test_what_gives_no_prompt_is_refused(tmp_path):
    rows = [{"concept_set_idx": n, "concepts": ["dog", "run"], "target": text} for n, (text, _) in enumerate(REVIEWS)]
    data = write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, rows)))
    refused(lambda: init(data, tmp_path / "no"), "gives no task", "--prompt COLUMN")
    init(data, tmp_path / "yes", prompt=("concepts",))
    assert {e.prompt for e in every(load(tmp_path / "yes"))} == {"dog, run"}


def test_decimal_commas_are_told_by_the_column(tmp_path):
    said = (f"{text};{n % 5},{125 + n}" for n, (text, _) in enumerate(REVIEWS))
    lines = ["sep=;", "text;score", *said]
    guess, task = made_csv(tmp_path, "\r\n".join(lines))
    assert guess.metric == "pearson" and {e.completion for e in every(task)} >= {"0.125", "4.129"}, guess.lines
    assert "commas in numbers read as decimal points, and written so" in guess.lines


def made_csv(folder: Path, text: str) -> tuple[Guess, Task]:
    guess = init(write(folder / "data.csv", text), folder / "task")
    return guess, load(folder / "task")


def test_earlier_turns_of_alpaca_and_calls_beside_text_stay(tmp_path):
    rows = [{"instruction": f"and {text}?", "output": "yes", "history": [["is it good?", "it may be"]]}
            for text, _ in REVIEWS]  # fmt: skip
    guess, task = made(tmp_path, rows)
    assert guess.kind == "Alpaca" and not any("not used" in line for line in guess.lines)
    assert {e.history for e in every(task)} == {(("user", "is it good?"), ("assistant", "it may be"))}
    call = {"role": "assistant", "content": "Let me check.", "tool_calls": [{"name": "look"}]}
    assert turns([{"role": "user", "content": "a"}, call], "row 1", "messages")[1] == (
        "assistant", 'Let me check.\n[{"name": "look"}]')  # fmt: skip


def test_a_column_that_names_labels_has_one_name_for_each(tmp_path):
    rows = [{"text": text, "label": n % 2, "source": ("web", "book")[n // 2 % 2]}
            for n, (text, _) in enumerate(REVIEWS)]  # fmt: skip
    guess, task = made(tmp_path, rows)
    assert guess.columns == Columns(("text",), "label") and task.labels == ("0", "1"), guess.lines


def test_the_place_of_a_right_option_tells_nothing(tmp_path):
    rows = [{"question": f"What does {who} say?", "correct_answer": f"{'azm'[n % 3]} {who}",
             **{f"distractor{k}": f"{'dnw'[k]} {who}" for k in range(1, 3)}, "distractor0": f"d {who}"}
            for n, who in enumerate(WHO)]  # fmt: skip
    _, task = made(tmp_path, rows)
    assert {e.choices.index(e.completion) for e in every(task)} == {0, 1, 3}
    assert all(list(e.choices) == sorted(e.choices) for e in every(task))


@pytest.mark.parametrize("said", ["({})", "{}.", "{}"])
def test_letters_of_options_are_read_as_people_write_them(tmp_path, said):
    rows = [choice(n, "answer", lambda n: said.format("abcd"[n % 4]), choices=FOUR[n]) for n in range(20)]
    guess, task = made(tmp_path, [rows[0] | {"answer": "e"}, *rows[1:]])  # one of 20 is none of them
    assert guess.columns.reading == "its letter" and guess.rows == 19, guess.lines
    assert {e.completion.split()[-1] for e in every(task) if WHO[3] in e.prompt} == {"never"}


def test_a_number_below_the_names_of_parquet_is_no_label(tmp_path):
    import pyarrow
    from pyarrow import parquet

    head = {"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}
    cells = [{"text": text, "label": n % 2 if n % 10 else -1} for n, (text, _) in enumerate(REVIEWS)]
    table = pyarrow.Table.from_pylist(cells).replace_schema_metadata({"huggingface": json.dumps(head)})
    parquet.write_table(table, tmp_path / "a.parquet")
    guess = init(tmp_path / "a.parquet", tmp_path / "t")
    assert guess.rows == 54 and any(line.startswith("6 of 60 rows skipped") for line in guess.lines)
    assert {(e.prompt, e.completion) for e in every(load(tmp_path / "t"))} < set(REVIEWS)
