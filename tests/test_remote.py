"""The remote engine against a real HTTP server on this machine that plays good and bad servers."""

import json
import math
import re
import socket
import threading
import time
import zlib
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from whet import improve
from whet.engine import Sampling
from whet.engine import remote as module
from whet.engine.remote import RemoteEngine, Retry, address
from whet.engine.replies import (
    UNANSWERED,
    Step,
    by_beginning,
    by_text,
    decided,
    echoed,
    read_context,
    read_reply,
    without_thought,
)
from whet.errors import EngineError, MethodError, ModelError, RemoteError
from whet.metrics import get
from whet.model import ModelRef, Transform, resolve
from whet.scorecard import evaluate
from whet.store import Store
from whet.system import Decoding, System
from whet.task import Example

QUICK = Retry(tries=3, first=0.01, longest=0.3, connect=5.0, answer=5.0)
HASTY = Retry(tries=2, first=0.01, longest=0.1, connect=0.3, answer=0.3)
USER = (("user", "a b c"),)


def words(text):
    """Tokens of the played models: words with the space before them."""
    return re.findall(r"\s*\S+", text)


class Play:
    """A server's behaviour; `seen` keeps (method, path, payload, headers, time of arrival)."""

    def __init__(self):
        self.seen, self.lock, self.running, self.most = [], threading.Lock(), 0, 0

    def answer(self, path, payload, nth):
        """Status, body (JSON, or bytes or an iterator of bytes, sent as they are) and headers."""
        if path == "/v1/models":
            return 404, {"error": "none"}, {}
        if "prompt" in payload or payload.get("logprobs"):
            return 400, {"error": {"message": "unsupported"}}, {}
        return 200, self.chat(payload), {}

    def chat(self, payload, text=None, **more):
        text = payload["messages"][-1]["content"][::-1] if text is None else text
        message = {"role": "assistant", "content": text}
        choices = [{"message": message, "finish_reason": "stop", **more}] * payload.get("n", 1)
        return {"choices": choices, "usage": {"prompt_tokens": 7, "completion_tokens": 3 * len(choices)}}

    def asked(self, path="/v1/chat/completions"):
        """Payloads that reached a path, those of the probes at opening left out."""
        return [s[2] for s in self.seen[self.opened :] if s[1] == path]


@contextmanager
def serving(play):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes: 40 ms apart otherwise

        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            payload = json.loads(body) if body else {}
            with play.lock:
                play.seen.append((self.command, self.path, payload, dict(self.headers), time.monotonic()))
                nth = len(play.seen)
                play.running += 1
                play.most = max(play.most, play.running)
            try:
                status, answer, headers = play.answer(self.path, payload, nth)
            finally:
                with play.lock:
                    play.running -= 1
            parts = [json.dumps(answer).encode()] if isinstance(answer, (dict, list, str)) else answer
            parts = [parts] if isinstance(parts, bytes) else parts
            try:
                self.send_response(status)
                length = str(len(parts[0])) if isinstance(parts, list) else "0"
                for name, value in {"content-length": length, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for part in parts:
                    self.wfile.write(part)
            except OSError:
                self.close_connection = True  # the client has given up waiting

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def session(play, retry=QUICK, concurrency=8):
    with serving(play) as url:
        opened = RemoteEngine(retry, concurrency).open(resolve(f"openai:m@{url}"), Path("unused"))
        play.opened = len(play.seen)
        yield opened
        opened.close()


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


# --- generation -------------------------------------------------------------------------------------------------------


def test_greedy_generation_request_and_cost():
    play = Play()
    with session(play) as s:
        before = s.spent
        made = s.generate([USER], Sampling(max_tokens=5, n=3))
        cost = s.spent - before
    assert [[(g.text, g.tokens, g.finish) for g in row] for row in made] == [[("c b a", 3, "stop")] * 3]
    sent = {"model": "m", "messages": [{"role": "user", "content": "a b c"}], "max_tokens": 5, "temperature": 0.0}
    assert play.asked() == [sent]
    assert (cost.prefilled_tokens, cost.generated_tokens) == (7, 3) and cost.seconds > 0
    assert s.protocol["engine"] == "remote" and s.protocol["model"] == "m" and s.protocol["url"].endswith("/v1")


def test_sampling_settings_are_sent_and_stops_cut():
    class Long(Play):
        def chat(self, payload, text=None, **more):
            return super().chat(payload, "one two three four", finish_reason="length")

    play = Long()
    with session(play) as s:
        sampling = Sampling(9, temperature=0.7, top_p=0.9, n=2, stop=(" three", "x", "y", "z", " two"), seed=11)
        made = s.generate([USER], sampling)[0]
        assert s.generate([USER], Sampling())[0][0].finish == "length"
    assert [(g.text, g.finish) for g in made] == [("one", "stop")] * 2
    sent = play.asked()[0]
    assert sent | {"stop": 0, "messages": 0} == {"model": "m", "messages": 0, "max_tokens": 9, "temperature": 0.7,
                                                 "top_p": 0.9, "n": 2, "seed": 11, "stop": 0}  # fmt: skip
    assert sent["stop"] == [" three", "x", "y", "z"]  # no more than OpenAI takes


def test_a_server_that_ignores_n_is_asked_again_with_other_seeds():
    class One(Play):
        def chat(self, payload, text=None, **more):
            return super().chat({**payload, "n": 1}, str(payload.get("seed")))

    play = One()
    with session(play) as s:
        made = s.generate([USER], Sampling(temperature=1.0, n=3, seed=4))[0]
    assert [g.text for g in made] == ["4", "5", "6"] and [p.get("n") for p in play.asked()] == [3, 2, None]


def test_raw_text_goes_to_completions_unchanged_and_usage_is_estimated():
    class Raw(Play):
        def answer(self, path, payload, nth):
            if path == "/v1/completions" and "logprobs" not in payload:
                return 200, {"choices": [{"text": " to be that", "finish_reason": "length"}]}, {}
            return super().answer(path, payload, nth)

    play = Raw()
    with session(play) as s:
        before = s.spent
        made = s.generate(["<s>what is it going"], Sampling(max_tokens=3))[0][0]
        cost = s.spent - before
    assert (made.text, made.tokens, made.finish) == (" to be that", 3, "length")  # 4 characters a token
    assert play.asked("/v1/completions")[0]["prompt"] == "<s>what is it going"
    assert (cost.prefilled_tokens, cost.generated_tokens) == (5, 3)


def test_control_markers_in_contents_are_broken_up():
    marks = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "[INST]", "</s>"]
    play = Play()
    with session(play) as s:
        s.generate([(("system", marks[0]), ("user", " ".join(marks)))], Sampling())
    sent = json.dumps(play.asked()[0], ensure_ascii=False)
    assert not [m for m in marks if m in sent] and "im_start" in sent


def test_odd_text_survives_the_way():
    odd = "\ud800 \0 🎈 \u2028"
    play = Play()
    with session(play) as s:
        assert s.generate([(("user", odd),)], Sampling())[0][0].text == odd[::-1].replace("\ud800", "?")


@pytest.mark.parametrize("message", [{"content": None}, {"role": "assistant"}])
def test_no_content_is_an_empty_answer(message):
    class Silent(Play):
        def chat(self, payload, text=None, **more):
            return {"choices": [{"message": message}], "usage": None}

    with session(Silent()) as s:
        assert s.generate([USER], Sampling())[0][0].text == ""


def test_markers_that_a_model_repeats_come_back_whole():
    class Parrot(Play):
        def chat(self, payload, text=None, **more):
            return super().chat(payload, payload["messages"][-1]["content"])

    said = "<s>, <|im_end|> and <tool_call>"
    with session(Parrot()) as s:
        asked = (("user", said),)
        assert s.generate([asked], Sampling())[0][0].text == said
        assert s.score([asked], [["<s>", said]])[0][1].logprob == -0.05


def test_order_is_kept_and_concurrency_bounded():
    class Slow(Play):
        def chat(self, payload, text=None, **more):
            said = payload["messages"][-1]["content"]
            if said.isdigit():
                time.sleep(0.06 if int(said) % 4 == 0 else 0.01)  # the first of each four comes last
            return super().chat(payload, said)

    play, seen = Slow(), []
    with session(play, concurrency=4) as s:
        prompts = [(("user", str(n)),) for n in range(20)]
        made = s.generate(prompts, Sampling(), progress=lambda done, of: seen.append((done, of)))
    assert [row[0].text for row in made] == [str(n) for n in range(20)]
    assert seen == [(n, 20) for n in range(1, 21)] and 2 <= play.most <= 4
    assert len(play.asked()) == 20 and s.spent.generated_tokens >= 60


def test_a_served_model_is_improved(tmp_path, monkeypatch):
    """From the first probe to the artifact, on a server that only generates."""
    monkeypatch.setattr("whet.search._run_baselines", lambda *_: [])

    class Guess(Play):
        def chat(self, payload, text=None, **more):
            shown = any(m["role"] == "assistant" for m in payload["messages"])
            asked = payload["messages"][-1]["content"]
            return super().chat(payload, ("positive" if "good" in asked else "negative") if shown else "positive")

    rows = [{"prompt": f"a {word} film, number {n} {zlib.crc32(str(n).encode()) % 97}", "completion": label}
            for n in range(90) for word, label in (("good", "positive"), ("bad", "negative"))]  # fmt: skip
    folder = tmp_path / "toy"
    folder.mkdir()
    for name, part in (("train", rows[:120]), ("test", rows[120:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "task.yaml").write_text("name: toy\nmetric: accuracy\nlabels: [positive, negative]\n")
    settings = {"budget": "1m", "out": tmp_path / "out", "home": tmp_path / "home"}
    with serving(Guess()) as url:
        with pytest.raises(MethodError, match="take a local --model"):
            improve(folder, model=f"openai:m@{url}", recipe="finetune", **settings)
        made = improve(folder, model=f"openai:m@{url}", **settings)  # corrected: into the same folder
    assert made.system.servers == [f"openai:m@{url}"] and "--trust" in (made.folder / "system/README.md").read_text()
    assert made.result["chosen"]["recipe"][0]["method"] == "fewshot"
    assert made.result["confirm"]["chosen"]["score"] == 1.0 > made.result["confirm"]["base"]["score"]


def test_what_was_not_answered_is_asked_again_next_time(tmp_path):
    class Busy(Play):
        tired = True

        def answer(self, path, payload, nth):
            asked = str(payload.get("messages"))
            return (400, {"error": {"message": "no"}}, {}) if self.tired and "9" in asked else super().answer(
                path, payload, nth)  # fmt: skip

    rows, play, store = [Example(str(n), f"{n}", f"{n}"[::-1]) for n in range(12)], Busy(), Store(tmp_path)
    with session(play) as s:
        system = System(resolve("openai:m@http://localhost/v1"))
        first = evaluate(system, rows, get("exact_match"), session=s, store=store)
        play.tired = False
        again = evaluate(system, rows, get("exact_match"), session=s, store=store)
        sent = len(play.seen)
        evaluate(system, rows, get("exact_match"), session=s, store=store)
    assert first.score < again.score == 1.0 and len(play.seen) == sent


def test_the_same_name_on_another_server_is_another_model(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://one/v1")
    assert resolve("openai:m") == resolve("openai:m@http://one/v1") != resolve("openai:m@http://two/v1")


def test_nothing_to_do():
    play = Play()
    with session(play) as s:
        assert s.generate([], Sampling()) == [] and s.score([], []) == [] and not play.asked()
        assert s.generate([USER], Sampling(n=0)) == [()] and not play.asked()


def test_settings_that_newer_models_refuse_are_left_out():
    class Newer(Play):
        def answer(self, path, payload, nth):
            for name, code in (("max_tokens", "unsupported_parameter"), ("temperature", "unsupported_value")):
                if name in payload:
                    return 400, {"error": {"message": "no", "param": name, "code": code}}, {}
            return super().answer(path, payload, nth)

    play = Newer()
    with session(play) as s:
        assert s.generate([USER], Sampling(max_tokens=6))[0][0].text == "c b a"
    assert s.protocol["dropped"] == "max_tokens, temperature"
    assert play.asked()[-1].keys() == {"model", "messages", "max_completion_tokens"}
    assert play.asked()[-1]["max_completion_tokens"] == 6


@pytest.mark.parametrize(
    ("text", "said"),
    [("<think>\nis it a?\n</think>\n\nb", "b"), ("so it is b</think>b", "b"), ("\n<think>\nis it", ""),
     ("<think></think>", ""), (" as <think> is", " as <think> is"), ("", "")],
)  # fmt: skip
def test_thought_is_no_part_of_an_answer(text, said):
    assert without_thought(text) == said


class Thinker(Play):
    """A chat server whose model thinks 100 tokens before it answers; `way` is how it says that it got no further."""

    def __init__(self, way, text="Positive."):
        super().__init__()
        self.way, self.text = way, text

    def answer(self, path, payload, nth):
        if path != "/v1/chat/completions" or payload.get("logprobs"):
            return super().answer(path, payload, nth)
        if payload["max_tokens"] > 100 and not (self.way == "block" and "stop" in payload):
            thought = "<think>Is it?\n\nIt is.</think>\n\n" if self.way == "block" else ""
            return 200, self.chat(payload, thought + self.text), {}
        if self.way == "refusal":
            return 400, {"error": {"message": "max_tokens or model output limit was reached", "code": None}}, {}
        text = "<think>Is it?" if self.way == "block" else ""
        return 200, self.chat(payload, text, finish_reason="stop" if "stop" in payload else "length"), {}


@pytest.mark.parametrize("way, paid", [("empty", 2), ("block", 2), ("refusal", 1)])
def test_models_that_think_get_room_for_it(way, paid):
    """Requests that got no answer are paid for; of one that was refused the server tells no cost."""
    play, cost = Thinker(way), []
    with session(play) as s:
        before = s.spent
        assert s.generate([USER], Sampling(max_tokens=5))[0][0].text == "Positive."
        cost.append(s.spent - before)
        row = s.score([USER], [["negative", "positive"]])[0]
        cost.append(s.spent - before - cost[0])
    assert [p["max_tokens"] for p in play.asked()] == [5, 4101, 24, 4120] and row[1].logprob == -0.05 > row[0].logprob
    assert [(c.prefilled_tokens, c.generated_tokens) for c in cost] == [(7 * paid, 3 * paid)] * 2


def test_what_was_answered_is_paid_for_though_a_later_request_is_refused():
    class Deep(Thinker):
        def answer(self, path, payload, nth):
            if "deep" in str(payload.get("messages")) and payload["max_tokens"] > 100:
                return 400, {"error": {"message": "too much", "code": None}}, {}
            return super().answer(path, payload, nth)

    deep = (("user", "deep"),)
    with session(Deep("empty")) as s:
        before = s.spent
        made = s.generate([USER, deep, USER], Sampling(max_tokens=5))
        cost = s.spent - before
    assert [m[0].text for m in made] == ["Positive.", "", "Positive."] and made[1][0].finish == "failed"
    assert (cost.prefilled_tokens, cost.generated_tokens) == (35, 15)  # two requests for each, and the first of deep


def test_a_stop_string_does_not_end_a_thought():
    with session(Thinker("block", "Positive.\n\nIndeed.")) as s:
        made = s.generate([USER], Sampling(max_tokens=5, stop=("\n\n",)))[0][0]
    assert (made.text, made.finish) == ("Positive.", "stop")


def test_room_for_thought_stays_within_the_context():
    class Small(Thinker):
        def answer(self, path, payload, nth):
            listed = {"data": [{"id": "m", "max_model_len": 50}]}
            return (200, listed, {}) if path == "/v1/models" else super().answer(path, payload, nth)

    play = Small("empty")
    with session(play) as s:
        made = s.generate([USER], Sampling(max_tokens=5))[0][0]
    assert (made.text, made.finish) == ("", "length")
    assert [p["max_tokens"] for p in play.asked()] == [5, 43]  # 7 are the prompt's


# --- trouble ----------------------------------------------------------------------------------------------------------


class Troubled(Play):
    """A server that has the given trouble with what comes after opening, `times` times."""

    def __init__(self, trouble, times=10**9):
        super().__init__()
        self.trouble, self.times = trouble, times

    def answer(self, path, payload, nth):
        if not hasattr(self, "opened") or self.times <= 0:
            return super().answer(path, payload, nth)
        self.times -= 1
        return self.trouble() if callable(self.trouble) else self.trouble


def gaps(play):
    at = [s[4] for s in play.seen[play.opened :]]
    return [b - a for a, b in zip(at, at[1:], strict=False)]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 524, 529])
def test_passing_trouble_is_waited_out(status):
    play = Troubled((status, {"error": "busy"}, {}), times=2)
    with session(play) as s:
        assert s.generate([USER], Sampling())[0][0].text == "c b a"
    assert len(play.asked()) == 3


@pytest.mark.parametrize("wish", ["0.2", lambda: formatdate(time.time() + 100, usegmt=True)])
def test_retry_after_is_honoured_up_to_a_limit(wish):
    value = wish() if callable(wish) else wish
    play = Troubled((429, {}, {"retry-after": value}), times=1)
    with session(play) as s:
        s.generate([USER], Sampling())
    assert (0.2 if value == "0.2" else 0.3) <= gaps(play)[0] < 30


def test_waits_grow():
    play = Troubled((500, {}, {}))
    with session(play, Retry(tries=4, first=0.05, longest=5, connect=1, answer=1)) as s, pytest.raises(RemoteError):
        s.generate([USER], Sampling())
    assert len(gaps(play)) == 3
    for n, gap in enumerate(gaps(play)):
        assert 0.5 * 0.05 * 2**n <= gap < 0.05 * 2**n + 3


def test_lasting_trouble_is_one_line():
    play = Troubled((500, b"\x1b[31mthe engine\nis on fire " + b"x" * 500, {}))
    with session(play) as s, pytest.raises(RemoteError) as caught:
        s.generate([USER] * 3, Sampling())
    line = str(caught.value)
    assert "\n" not in line and "\x1b" not in line and len(line) < 400
    assert "/v1/chat/completions" in line and "3 tries" in line and "status 500" in line and "is on fire" in line
    assert "x" * 60 in line and "x" * 120 not in line and "see the server's log" in line
    assert isinstance(caught.value, EngineError) and len(play.asked()) <= 9


@pytest.mark.parametrize(("status", "advice"), [(400, "URL"), (401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"),
                                                (404, "model's name"), (307, "URL")])  # fmt: skip
def test_refusals_are_not_asked_again(status, advice):
    play = Troubled((status, {"error": "no such thing"}, {"location": "/v1/elsewhere"}))
    with session(play) as s, pytest.raises(RemoteError, match=f"status {status}.*no such thing.*{advice}"):
        s.generate([USER], Sampling())
    assert len(play.seen) == play.opened + 1  # and redirects are not followed


@pytest.mark.parametrize(
    "body",
    [b"<html>hello</html>", b"", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, {"choices": []}, {"choices": [{}]},
     {"choices": [{"message": {}}]}, {"choices": [{"message": {"content": 3}}]}, {"choices": "abc"}, {"result": "x"},
     {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "many"}},
     b'{"choices": [{"text": "x", "logprobs": {"content": [{"token": "x", "logprob": NaN}]}}]}'],
)  # fmt: skip
def test_garbage_is_asked_again_then_refused(body):
    play = Troubled((200, body, {}))
    with session(play) as s, pytest.raises(RemoteError, match="status 200: .*OpenAI-compatible"):
        s.generate([USER], Sampling())
    assert len(play.asked()) == 3
    with session(Troubled((200, body, {}), times=1)) as s:
        assert s.generate([USER], Sampling())[0][0].text == "c b a"


@pytest.mark.parametrize("body", [
    {"choices": []}, {"error": {"message": "filtered"}}, b"<html>",
    {"choices": [{"message": {"role": "assistant", "content": ""}, "finish_reason": "error", "error": {"code": 502}}]},
])  # fmt: skip
def test_one_unusable_answer_costs_no_other(body):
    class Once(Play):
        def answer(self, path, payload, nth):
            if hasattr(self, "opened") and "spoilt" in json.dumps(payload):
                return 200, body, {}
            return super().answer(path, payload, nth)

    with session(Once()) as s:
        found = s.generate([*[(("user", f"say {n}"),) for n in range(9)], (("user", "spoilt"),)], Sampling())
        assert [bool(g[0].text) for g in found] == [True] * 9 + [False] and s.failed == 1


def test_an_answer_in_parts_is_read_without_its_thoughts():
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "yes"}]
    body = {"choices": [{"message": {"role": "assistant", "content": parts}, "finish_reason": "stop"}]}
    assert read_reply(body).choices[0].text == "yes"
    body = {"choices": [{"message": {"role": "assistant", "content": "so \ud83d"}, "finish_reason": "length"}]}
    assert read_reply(body).choices[0].text == "so ?"  # an answer that was cut within a character


def test_tokens_of_a_thought_are_no_answer():
    """Of a model that thinks apart, log-probabilities may be the thought's: what begins like it is not its answer."""
    class Apart(Play):
        def answer(self, path, payload, nth):
            if path != "/v1/chat/completions":
                return super().answer(path, payload, nth)
            if payload.get("logprobs"):
                likely = [{"token": one, "logprob": math.log(p)} for one, p in (("We", 0.9), ("Okay", 0.05))]
                steps = [{**likely[0], "top_logprobs": likely}] * payload["max_tokens"]
                message = {"role": "assistant", "content": None, "reasoning_content": "We need to say"}
                choice = {"message": message, "finish_reason": "length", "logprobs": {"content": steps}}
                return 200, {"choices": [choice]}, {}
            thinks = payload["max_tokens"] < 100
            return 200, self.chat(payload, "" if thinks else "alarm", finish_reason="length" if thinks else "stop"), {}

    with session(Apart()) as s:
        assert s.protocol["scoring"] == "logprobs"
        row = s.score([USER], [["alarm", "weather", "music"]])[0]
    assert row[0].logprob > row[1].logprob


def test_a_server_that_hangs_is_given_up():
    release = threading.Event()

    def hang():
        release.wait(5)
        return 200, {}, {}

    with session(Troubled(hang), HASTY) as s:
        begun = time.monotonic()
        with pytest.raises(RemoteError, match=r"none in 0.3 s"):
            s.generate([USER], Sampling())
        assert 0.6 <= time.monotonic() - begun < 4
        release.set()


def test_a_prompt_that_is_never_answered_in_time_leaves_the_others_their_answers():
    release, slow = threading.Event(), (("user", "slow"),)

    class Stuck(Play):
        def chat(self, payload, text=None, **more):
            if payload["messages"][-1]["content"] == "slow":
                release.wait(10)
            return super().chat(payload, text, **more)

    with session(Stuck(), HASTY) as s:
        made = s.generate([USER, slow, USER], Sampling())
        assert [g.text for [g] in made] == ["c b a", "", "c b a"]
        assert [r.logprob for r in s.score([slow, USER], [["c", "x"]] * 2)[0]] == [UNANSWERED] * 2
        with pytest.raises(RemoteError, match="none in 0.3 s"):
            s.generate([slow, USER, slow], Sampling())
        release.set()


def test_a_long_answer_has_more_time():
    class Slow(Play):
        def chat(self, payload, text=None, **more):
            if hasattr(self, "opened"):
                time.sleep(0.7)
            return super().chat(payload, text, **more)

    with session(Slow(), HASTY) as s:
        assert s.generate([USER], Sampling(max_tokens=12 * module.PACE))[0][0].text == "c b a"
        with pytest.raises(RemoteError, match="none in 0.3 s"):
            s.generate([USER], Sampling(max_tokens=12))


def test_a_server_that_trickles_is_given_up():
    def trickle():
        yield b"{"
        for _ in range(100):
            time.sleep(0.05)
            yield b" "

    with session(Troubled(lambda: (200, trickle(), {"content-length": "101"})), HASTY) as s:
        begun = time.monotonic()
        with pytest.raises(RemoteError, match="none in 0.3 s"):  # though no single wait was that long
            s.generate([USER], Sampling())
        assert time.monotonic() - begun < 4.5


def test_a_server_that_floods_or_breaks_off_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with session(Troubled((200, b" " * 2000, {}))) as s, pytest.raises(RemoteError, match="an answer of more than"):
        s.generate([USER], Sampling())
    # A body that breaks off is a broken connection.
    cut = Troubled((200, b"{", {"content-length": "5", "connection": "close"}), times=1)
    with session(cut) as s:
        assert s.generate([USER], Sampling())[0][0].text == "c b a"


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RemoteError, match=f"{port}/v1/models.*ConnectError.*start the server"):
        RemoteEngine(QUICK).open(resolve(f"openai:m@http://127.0.0.1:{port}/v1"), Path("unused"))


def test_a_failure_ends_the_other_requests():
    play = Troubled(lambda: time.sleep(0.02) or (401, {}, {}))
    with session(play, concurrency=2) as s:
        with pytest.raises(RemoteError):
            s.generate([USER] * 300, Sampling())
        assert len(play.asked()) < 150
        play.times = 0
        assert len(s.generate([USER] * 3, Sampling())) == 3  # and the session is still good


class Picky(Play):
    """A server that refuses prompts with "bad" in them."""

    status = 400

    def answer(self, path, payload, nth):
        if "bad" in json.dumps(payload):
            return self.status, {"error": {"message": "no", "code": "content_filter"}}, {}
        return super().answer(path, payload, nth)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_is_refused_leaves_the_others_their_answers(status):
    play, seen = Picky(), []
    play.status = status
    with session(play) as s:
        bad = (("user", "bad"),)
        made = s.generate([USER, bad, USER], Sampling(n=2), lambda done, of: seen.append((done, of)))
        assert [[g.text for g in row] for row in made] == [["c b a"] * 2, ["", ""], ["c b a"] * 2]
        rows = s.score([USER, bad], [["c", "x"]] * 2)
        assert [r.logprob for r in rows[1]] == [UNANSWERED] * 2 and rows[0][0].logprob == -0.05
        assert seen == [(1, 3), (2, 3), (3, 3)]
        with pytest.raises(RemoteError, match=f"status {status}.*content_filter"):
            s.generate([bad, USER, bad], Sampling())
        before = len(play.seen)
        with pytest.raises(RemoteError, match="content_filter"):
            s.generate([bad] * 300, Sampling())
        assert len(play.seen) - before < 150  # a broken set-up is noticed before all is sent


def test_what_was_refused_is_never_right():
    play = Picky()
    play.status = 400
    said = (("bad", ""), ("good", "doog"), ("ok", "ko"))
    rows = [Example(prompt, prompt, answers=(answer,)) for prompt, answer in said]
    with session(play) as s:
        card = evaluate(System(ModelRef("fake:echo", "fake:echo")), rows, get("exact_match"), session=s)
    assert [(o.score, o.error) for o in card.outcomes] == [(0.0, "no answer"), (1.0, None), (1.0, None)]


def test_a_server_that_answers_one_at_a_time_is_waited_for():
    class Queue(Play):
        turn = threading.Lock()

        def chat(self, payload, text=None, **more):
            if hasattr(self, "opened"):
                with self.turn:
                    time.sleep(0.15)
            return super().chat(payload, text, **more)

    with session(Queue(), Retry(tries=6, first=0.01, longest=0.1, connect=0.3, answer=0.5)) as s:
        made = s.generate([USER] * 12, Sampling())
        assert [g.text for [g] in made] == ["c b a"] * 12 and 1 <= s.server.gate.most < 8


def test_a_server_that_is_asked_too_often_has_time():
    play = Troubled((429, {}, {}), times=1)
    with session(play, Retry(tries=2, first=0.05, longest=5, connect=1, answer=1)) as s:
        s.generate([USER], Sampling())
    assert gaps(play)[0] >= 0.25
    play = Troubled((429, {}, {"retry-after-ms": "120"}), times=1)
    with session(play, Retry(tries=2, first=0.001, longest=5, connect=1, answer=1)) as s:
        s.generate([USER], Sampling())
    assert gaps(play)[0] >= 0.12
    play = Troubled((429, {}, {"retry-after": "0.1"}), times=1)
    with session(play, Retry(tries=2, first=0.5, longest=5, connect=1, answer=1)) as s:
        s.generate([USER], Sampling())
    assert gaps(play)[0] < 3  # what it asks for, not ten times what is usual


def test_what_waits_for_its_turn_is_not_sent_once_all_is_to_end():
    halt = threading.Event()
    gate = module.Gate(1, halt)
    with gate.through():
        halt.set()
        with pytest.raises(module._Again), gate.through():
            pass
    assert gate.inside == 0


def test_tools_of_a_history_speak_as_users(monkeypatch):
    monkeypatch.setenv("WHET_CONTEXT", "32768")
    play = Play()
    with session(play) as s:
        s.generate([(("user", "a"), ("assistant", "[call]"), ("tool", "42"), ("user", "so?"))], Sampling())
        assert s.context == 32768
    assert [t["role"] for t in play.asked()[0]["messages"]] == ["user", "assistant", "user", "user"]


def test_a_server_is_shown_the_choices_of_a_row():
    class Sun(Play):
        def chat(self, payload, text=None, **more):
            shown = "- sunlight" in payload["messages"][-1]["content"]
            return super().chat(payload, "Sunlight." if shown else "Solar energy, because it is renewable.", **more)

    choices = ("coal", "oil", "natural gas", "sunlight")
    row, own = (Example(str(n), prompt, "sunlight", choices=choices)
                for n, prompt in enumerate(("Which is renewable?", "coal, oil, natural gas or sunlight?")))  # fmt: skip
    play = Sun()
    with session(play) as s:
        system = System(ModelRef("fake:echo", "fake:echo"), decoding=Decoding((), True))
        assert system.answer(row, s) == "sunlight"
        system.answer(own, s)
        assert s.protocol["choices"] == "listed"
    first, second = (asked["messages"][-1]["content"] for asked in play.asked())
    assert first.startswith("Which is renewable?\n\nAnswer with one of these") and first.endswith("- sunlight")
    assert second == own.prompt  # it says them itself


def test_a_text_that_is_refused_is_no_likelihood():
    class PickyEcho(Echo):
        def answer(self, path, payload, nth):
            if "bad" in str(payload.get("prompt")):
                return 400, {"error": "no"}, {}
            return super().answer(path, payload, nth)

    with session(PickyEcho()) as s:
        assert [r[0].logprob for r in s.score(["", ""], [["a bad text"], ["a text"]])] == [-math.inf, -5.0]


@pytest.mark.parametrize("said", [
    {"error": {"code": "context_length_exceeded"}}, {"message": "This model's maximum context length is 4096 tokens."},
    {"error": {"type": "exceed_context_size_error"}}, {"error": "Input tokens exceed the configured limit"},
])  # fmt: skip
def test_where_a_prompt_is_too_long_the_limit_is_named(said):
    with session(Troubled((400, said, {}))) as s, pytest.raises(RemoteError, match="--max-model-len.*fewer demonst"):
        s.generate([USER], Sampling())


# --- addresses and keys -----------------------------------------------------------------------------------------------


def test_addresses(monkeypatch):
    assert address("openai:gpt-4o-mini") == ("gpt-4o-mini", "https://api.openai.com/v1")
    assert address("openai:org/m:tag@http://localhost:8000/v1/") == ("org/m:tag", "http://localhost:8000/v1")
    assert address("openai:@cf/m@https://host/v1") == ("@cf/m", "https://host/v1")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere:1/v1")
    assert address("openai:m") == ("m", "http://elsewhere:1/v1")
    assert address("openai:m@http://here/v1") == ("m", "http://here/v1")


@pytest.mark.parametrize("base", ["openai:", "openai:m@", "openai:m@localhost:8000", "openai:m@ftp://x/v1",
                                  "openai:m@http://", "openai:m@http://h/?key=1", "openai:m@http://h:x/"])  # fmt: skip
def test_addresses_that_are_none(base):
    # A URL without scheme is above all never taken for a part of the name: that would send data to OpenAI.
    with pytest.raises(ModelError, match="openai:NAME@URL"):
        address(base)


def test_passwords_in_addresses_are_refused_and_not_shown():
    with pytest.raises(ModelError, match="OPENAI_API_KEY") as caught:
        address("openai:m@http://me:secret@host/v1")
    assert "secret" not in str(caught.value)


def test_the_key_is_sent_only_where_there_is_one_and_never_shown(monkeypatch):
    play = Play()
    with session(play) as s:
        s.generate([USER], Sampling())
    assert not any("authorization" in map(str.lower, headers) for _, _, _, headers, _ in play.seen)
    monkeypatch.setenv("OPENAI_API_KEY", " sk-abc\n")
    play = Troubled((401, b"wrong key sk-abc", {}))
    with session(play) as s, pytest.raises(RemoteError) as caught:
        s.generate([USER], Sampling())
    assert all(headers["Authorization"] == "Bearer sk-abc" for _, _, _, headers, _ in play.seen)
    assert "sk-abc" not in str(caught.value) and "***" in str(caught.value)
    assert "sk-abc" not in json.dumps(play.seen[-1][2]) + json.dumps(s.protocol)
    monkeypatch.setenv("OPENAI_API_KEY", "sk\u2028x")
    with pytest.raises(ModelError, match="printable"):
        RemoteEngine(QUICK).open(ModelRef("openai:m", "openai:m"), Path("unused"))


def test_proxies_of_the_environment_never_see_plain_http(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with session(Play()) as s:
        assert s.generate([USER], Sampling())[0][0].text == "c b a"


def test_transforms_are_refused():
    with pytest.raises(ModelError, match="out of reach"):
        RemoteEngine(QUICK).open(resolve("openai:m@http://h/v1").add(Transform("adapter", "0" * 64)), Path("unused"))


# --- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "context"),
    [({"data": [{"id": "x", "max_model_len": 1}, {"id": "m", "max_model_len": 2048}]}, 2048),
     ({"data": [{"id": "m", "context_length": 99}]}, 99), ({"data": [{"id": "m", "meta": {"n_ctx": 512}}]}, 512),
     ({"data": [{"id": "file.gguf", "meta": {"n_ctx": 512}}]}, 512), ([{"id": "m", "context_length": 77}], 77),
     ({"data": [{"id": "a", "max_model_len": 1}, {"id": "b"}]}, 8192), ({"data": [{"id": "m", "meta": None}]}, 8192),
     ({}, 8192), ({"data": "x"}, 8192), ("x", 8192), ({"data": [3, {"id": "m", "max_model_len": "9"}]}, 8192)],
)  # fmt: skip
def test_context_as_stated(body, context):
    assert read_context(body, "m") == context

    class Listing(Play):
        def answer(self, path, payload, nth):
            return (200, body, {}) if path == "/v1/models" else super().answer(path, payload, nth)

    with session(Listing()) as s:
        assert s.context == context


def test_count_is_an_estimate_and_too_long_is_refused_before_sending():
    play = Play()
    with session(play) as s:
        assert s.count(["x" * 9, (("system", "x" * 8), ("user", "x")), ()]) == [3, 11, 0]
        assert s.count(["가" * 3200, (("user", "ab cd 你好"),)]) == [3200, 8]
        for call in (lambda: s.generate(["x" * 4 * 8190], Sampling(max_tokens=3)),
                     lambda: s.score(["x" * 4 * 8193], [["a", "b"]])):  # fmt: skip
            with pytest.raises(EngineError, match="at most 8192 tokens, found about 8193"):
                call()
        assert len(play.seen) == play.opened


# --- scoring ----------------------------------------------------------------------------------------------------------


class Logprobs(Play):
    """A chat server with log-probabilities, at most `limit` for each token."""

    def __init__(self, table, limit=20):
        super().__init__()
        self.table, self.limit = table, limit

    def answer(self, path, payload, nth):
        if path == "/v1/chat/completions" and payload.get("logprobs"):
            if payload["top_logprobs"] > self.limit:
                return 400, {"error": {"message": "too many"}}, {}
            rows = self.table[: payload["max_tokens"]]
            content = [
                {"token": row[0][0], "logprob": math.log(row[0][1]),
                 "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in row]}
                for row in rows
            ]  # fmt: skip
            done = "stop" if len(rows) == len(self.table) else "length"
            text = "".join(row[0][0] for row in rows)
            return 200, self.chat(payload, text, logprobs={"content": content}, finish_reason=done), {}
        return super().answer(path, payload, nth)


def chances(scores):
    return [pytest.approx(math.exp(s.logprob), abs=1e-9) for s in scores]


@pytest.mark.parametrize("limit", [20, 5])
def test_chats_are_scored_by_log_probabilities(limit):
    play = Logprobs([[("pos", 0.5), (" Positive", 0.2), ("neg", 0.15), ("The", 0.05)]], limit)
    with session(play) as s:
        assert s.protocol["scoring"] == "logprobs"
        row = s.score([USER] * 2, [["negative", "positive", "mixed"]] * 2)[1]
    assert chances(row) == [0.15, 0.7, 0.05] and [r.tokens for r in row] == [1, 1, 1]
    sent = play.asked()[0]
    assert (sent["top_logprobs"], sent["max_tokens"], sent["temperature"], sent["logprobs"]) == (limit, 2, 0.0, True)
    assert len(play.asked()) == 2  # one request for a whole closed set


def test_labels_that_begin_alike_are_told_apart_further_on():
    play = Logprobs([[("card", 0.8), ("cash", 0.1)], [(" lost", 0.7), (" arrival", 0.25)], [(" today", 0.9)]])
    with session(play) as s:
        labels = ["card arrival", "card lost", "cash", "card payment"]
        row = s.score([USER], [labels])[0]
        # Told apart at the second token; what is left there goes to the one that is not listed.
        assert chances(row) == [0.8 * 0.25, 0.8 * 0.7, 0.1, 0.8 * 0.05]
        assert sum(map(math.exp, (r.logprob for r in row))) <= 1


def step(*row, token=None):
    logs = tuple((t.encode(), math.log(p)) for t, p in row)
    taken = token.encode() if token else logs[0][0]
    return Step(taken, dict(logs)[taken], logs)


def test_scores_of_beginnings_by_hand():
    def probabilities(steps, texts, **more):
        return [pytest.approx(math.exp(v), abs=1e-9) for v in by_beginning(steps, texts, **more)]

    # A listed token that begins two continuations, but was not taken, is shared by them.
    assert probabilities([step(("no", 0.6), ("may", 0.3))], ["no", "maybe", "mayhem"]) == [0.6, 0.15, 0.15]
    # White space first: the next token decides.
    assert probabilities([step(("\n", 0.9), ("b", 0.1)), step((" a", 0.5), ("B", 0.5))], ["a", "b"]) == [0.45, 0.55]
    # A continuation that is the beginning of another: ended there, or not.
    card = step(("card", 0.8), ("x", 0.2))
    assert probabilities([card], ["card", "card lost"], ended=True) == [0.8, pytest.approx(0)]
    assert probabilities([card], ["card", "card lost"], ended=False) == [0.4, 0.4]
    going = step((".", 0.6), (" lost", 0.4))
    assert probabilities([card, going], ["card", "card lost"]) == [0.8 * 0.6, 0.8 * 0.4]
    # The unlisted share what is left, but none gets more than the least likely listed token.
    assert probabilities([step(("a", 0.5), ("q", 0.1))], ["a", "b", "c", "d", "e"]) == [0.5, 0.1, 0.1, 0.1, 0.1]
    assert probabilities([step(("a", 0.9), ("q", 0.06))], ["a", "b", "c"]) == [0.9, 0.02, 0.02]
    # A token that goes on otherwise does not count: "1" is not "10".
    assert probabilities([step(("10", 0.9), ("1", 0.05))], ["1", "2"]) == [0.05, 0.05]
    # No token at all: nothing is known.
    assert probabilities([], ["a", "b"]) == [0.5, 0.5]
    # The token taken is not listed, as with some servers.
    bare = Step(b"a", math.log(0.7), ((b"b", math.log(0.2)),))
    assert probabilities([bare], ["a", "b"]) == [0.7, 0.2]


def test_parts_of_characters_are_told_apart_by_their_bytes():
    spelt = [((b"\xeb\xb6", 0.7), (b"\xea\xb8\x8d", 0.2)), ((b"\x88", 0.6), (b"\x80\xec", 0.4))]

    class Escaping(Logprobs):
        def answer(self, path, payload, nth):
            status, reply, headers = super().answer(path, payload, nth)
            if status == 200:
                for item in reply["choices"][0]["logprobs"]["content"]:
                    for one in (item, *item["top_logprobs"]):
                        raw = one["token"].encode("latin-1")
                        one |= {"token": "".join(f"\\x{b:02x}" for b in raw), "bytes": list(raw)}
            return status, reply, headers

    table = [[(t.decode("latin-1"), p) for t, p in row] for row in spelt]
    play = Escaping([*table, [("\xeb", 0.9)]])
    with session(play) as s:
        row = s.score([USER], [["부정", "긍정", "불만"]])[0]
    assert chances(row) == [0.7 * 0.4, 0.2, 0.7 * 0.6] and play.asked()[0]["max_tokens"] == 3


def test_what_says_nothing_of_the_labels_is_answered_in_words():
    class Thinking(Logprobs):
        def answer(self, path, payload, nth):
            if path == "/v1/chat/completions" and not payload.get("logprobs"):
                return 200, self.chat(payload, "<think>It reads well.</think>Positive"), {}
            return super().answer(path, payload, nth)

    # The labels are not listed, or hardly, or alike.
    for row in ([("<think>", 0.99)], [("<think>", 0.99), ("neg", 5e-4), ("pos", 1e-4)], [("pos", 0.4), ("neg", 0.4)]):
        play = Thinking([row])
        with session(play) as s:
            assert s.protocol["scoring"] == "logprobs"
            values = [r.logprob for r in s.score([USER], [["negative", "positive"]])[0]]
        assert values[1] == -0.05 and values[0] <= -1 and len(play.asked()) == 2


def test_whether_beginnings_decide_by_hand():
    def of(*chances):
        return decided([math.log(p) for p in chances])

    assert of(0.5, 0.4) and of(1e-3) and not of(0.4, 0.1, 0.4) and not of(5e-4, 4e-4)


def test_choices_without_an_answer_have_none():
    class Silent(Play):
        def chat(self, payload, text=None, **more):
            said = payload["messages"][-1]["content"]
            return super().chat(payload, "" if said == "quiet" else said)

    with session(Silent()) as s:
        quiet, odd = (("user", "quiet"),), (("user", "??"),)
        before = s.spent
        rows = s.score([USER, quiet, odd], [["b", "x"]] * 3)
        assert [[r.logprob for r in row] for row in rows[1:]] == [[UNANSWERED] * 2] * 2  # never the first label
        assert rows[0][0].logprob == -0.05 and (s.spent - before).prefilled_tokens == 21
        with pytest.raises(RemoteError, match="does not answer.*thinks less than 4096 tokens"):
            s.score([quiet, USER, quiet], [["b", "x"]] * 3)


@pytest.mark.parametrize("ignored", [None, {"content": []}, {"content": None}, "absent"])
def test_without_log_probabilities_the_answer_is_compared(ignored):
    class Mute(Play):
        def answer(self, path, payload, nth):
            if path == "/v1/chat/completions":
                more = {} if ignored == "absent" else {"logprobs": ignored}
                return 200, self.chat(payload, "I think it is Positive.", **more), {}
            return super().answer(path, payload, nth)

    play = Mute()
    with session(play) as s:
        assert s.protocol["scoring"] == "generation" and s.protocol["scoring_raw"] == "generation"
        row = s.score([USER], [["negative", "positive", "mixed"]])[0]
    assert max(row, key=lambda r: r.logprob) is row[1] and row[1].logprob == -0.05
    assert all(-10 <= r.logprob <= -1 for r in (row[0], row[2])) and "logprobs" not in play.asked()[0]


@pytest.mark.parametrize(
    ("answer", "best"),
    [("Sport", "sport"), (" sport. ", "sport"), ("It is world news, not sport", "world news"), ("spot", "sport"),
     ("a worldly sport", "sport"), ("news of the world news", "news"), ("world new", "world news")],
)  # fmt: skip
def test_which_continuation_an_answer_means(answer, best):
    texts = ["world news", "sport", "news"]
    values = by_text(answer, texts)
    assert texts[max(range(3), key=lambda i: values[i])] == best and max(values) == -0.05
    assert sorted(values)[1] <= -1


def test_an_answer_that_has_nothing_in_common_means_none():
    assert by_text("Positive", ["긍정", "부정"]) == by_text(" . ", ["a", "b"]) == [UNANSWERED] * 2


def test_the_others_rank_by_distance():
    values = by_text("positive", ["positive", "positively", "negative", "zzz"])
    assert values == sorted(values, reverse=True) and values[3] == pytest.approx(-10)


def test_servers_that_fail_on_log_probabilities_are_asked_once_about_each():
    class Llama(Play):
        def answer(self, path, payload, nth):
            if payload.get("echo"):
                return 500, {"error": "Only no echo is supported"}, {}
            return super().answer(path, payload, nth)

    play = Llama()
    with session(play) as s:
        assert s.protocol["scoring_raw"] == "generation"
    assert [bool(p.get("echo")) for _, path, p, _, _ in play.seen if path == "/v1/completions"] == [True, False]


class Echo(Play):
    """A completions server that echoes: a token's log-probability is minus its length; `start` comes before all."""

    def __init__(self, start=(), usage=True):
        super().__init__()
        self.start, self.usage = list(start), usage

    def answer(self, path, payload, nth):
        if path != "/v1/completions" or not payload.get("echo"):
            return super().answer(path, payload, nth)
        tokens = [*self.start, *words(payload["prompt"]), " END"]
        values = [None, *(-float(len(t)) for t in tokens[1:])]
        tops = [None, *({t: v} for t, v in zip(tokens[1:], values[1:], strict=True))]
        logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}
        usage = {"usage": {"prompt_tokens": len(tokens) - 1, "completion_tokens": 1}} if self.usage else {}
        return 200, {"choices": [{"text": payload["prompt"] + " END", "logprobs": logprobs}], **usage}, {}


@pytest.mark.parametrize("start", [(), ("<s>",)])
@pytest.mark.parametrize("usage", [True, False])
def test_raw_text_is_scored_by_echo(start, usage):
    play = Echo(start, usage)
    with session(play) as s:
        assert (s.protocol["scoring"], s.protocol["scoring_raw"]) == ("generation", "echo")
        before = s.spent
        rows = s.score(["It is", ""], [[" very good", " bad", ""], ["whole text here"]])
        spent = s.spent - before
    assert [(r.logprob, r.tokens) for r in rows[0]] == [(-10, 2), (-4, 1), (0, 0)]
    # Without a beginning-of-text token nothing predicts the first token.
    assert (rows[1][0].logprob, rows[1][0].tokens) == ((-15, 3) if start else (-10, 2))
    assert sorted(p["prompt"] for p in play.asked("/v1/completions")) == [
        "It is", "It is bad", "It is very good", "whole text here"]  # fmt: skip
    assert all((p["max_tokens"], p["echo"]) == (1, True) for p in play.asked("/v1/completions"))
    if usage:
        assert spent.prefilled_tokens == 2 + 3 + 4 + 3 + 4 * len(start) and spent.generated_tokens == 4


def test_echo_by_hand():
    def of(*pairs):
        return [Step(t.encode(), p) for t, p in pairs]

    # Tokens that straddle the border count; a continuation seen earlier in the prompt does not matter.
    score = echoed(of(("a b", None), (" c a", -1.0), (" b", -2.0), ("!", -9.0)), "a b", 1)
    assert (score.logprob, score.tokens) == (-3.0, 2)
    # Tokenizers that drop the space before a word, and parts of characters that cannot be read back.
    assert echoed(of(("x", None), ("good", -2.0)), " good", 0).logprob == -2.0
    assert echoed(of(("x", None), ("\ufffd", -1.0), ("\ufffd", -4.0)), "é", 0).logprob == -4.0
    # A space that is a token of its own belongs to the continuation.
    assert echoed(of(("x", None), (" ", -1.0), ("good", -2.0)), " good", 0).logprob == -3.0


def test_raw_text_with_log_probabilities_of_generated_tokens_only():
    class Completions(Play):
        def answer(self, path, payload, nth):
            if path == "/v1/completions":
                top = {" yes": -0.1, " no": -3.0}
                logprobs = {"tokens": [" yes"], "token_logprobs": [-0.1], "top_logprobs": [top]}
                return 200, {"choices": [{"text": " yes", "logprobs": logprobs}]}, {}
            return super().answer(path, payload, nth)

    with session(Completions()) as s:
        assert s.protocol["scoring_raw"] == "logprobs"
        row = s.score(["Is it?"], [[" no", " yes"]])[0]
    assert [r.logprob for r in row] == [pytest.approx(-3.0), pytest.approx(-0.1)]


def test_models_that_forbid_log_probabilities_are_answered_in_words():
    class Reasoner(Play):
        def answer(self, path, payload, nth):
            if payload.get("logprobs"):
                return 403, {"error": {"message": "You are not allowed to request logprobs from this model"}}, {}
            return super().answer(path, payload, nth)

    with session(Reasoner()) as s:
        assert s.protocol["scoring"] == s.protocol["scoring_raw"] == "generation"
        assert s.generate([USER], Sampling())[0][0].text == "c b a"

    class Closed(Play):
        def answer(self, path, payload, nth):
            return 403, {"error": {"message": "this key may not use the model"}}, {}

    with pytest.raises(RemoteError, match="status 403.*this key.*OPENAI_API_KEY"), session(Closed()):
        pass


def test_whole_texts_are_not_scored_by_guesswork():
    with session(Play()) as s:
        for prompt in ("", USER):
            with pytest.raises(EngineError, match="several continuations"):
                s.score([prompt], [["a long text"]])
        assert len(s.score([USER, USER], [["one"], ["one", "two"]])) == 2  # a choice of one among others is none


def test_protocol_stands_from_the_opening():
    with session(Logprobs([[("a", 0.9)]])) as s:
        before = dict(s.protocol)
        s.score([USER], [["a", "b"]])
        s.generate([USER], Sampling())
    assert s.protocol == before


def test_doctor_says_how_a_server_can_be_asked():
    from whet.doctor import examine

    with serving(Play()) as url:
        found = examine((f"openai:m@{url}",))[-1]
    assert found.ok and "tokens at once; choices by comparing what is generated" in found.found
    gone = examine((f"openai:m@{url}",))[-1]  # it listens no more
    assert not gone.ok and url in gone.found
