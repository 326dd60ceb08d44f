"""The remote engine: prompts run on any server that speaks OpenAI's HTTP API (OpenAI, vLLM, llama.cpp, Ollama …).

Data goes to the URL that the model's name states and nowhere else: redirects are refused, and plain HTTP passes no
proxy.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx

from whet.engine import ByScores, Generation, Progress, Prompt, Sampling, Score, Session, Spent, until_stop
from whet.engine.replies import (
    CONTEXT,
    UNANSWERED,
    Choice,
    Reply,
    by_beginning,
    by_text,
    decided,
    echoed,
    read_context,
    read_reply,
    shared_beginning,
    tokens,
)
from whet.errors import EngineError, ModelError, RemoteError
from whet.model import ModelRef
from whet.prompt import as_turns, said_by_users

T = TypeVar("T")
Item = TypeVar("Item")

HOME = "https://api.openai.com/v1"
# The last four are those of servers in between (Cloudflare), and of models with too much to do.
RETRIED = frozenset({408, 429, 500, 502, 503, 504, 520, 522, 524, 529})
# What may be said of a single prompt, for what it holds or for its length.
PARTICULAR = frozenset({400, 413, 422})
# What a server says to a request it has no support for: llama.cpp answers 500, others 4xx.
UNSUPPORTED = frozenset({400, 404, 405, 422, 500, 501})
OPTIONAL = ("max_tokens", "temperature", "top_p", "seed", "stop", "n")  # what newer models may refuse to be told
MOST_BYTES = 64 * 2**20
THOUGHT = 4096  # tokens that a model may think before it answers, where the limit of its answer does not let it
PROBE = "one two three four five"
IN_A_ROW = 8  # answers after which one more is asked for at a time, where it had become fewer
BUSY = 10  # times the first wait where a server says that it is asked too often, and not how long to wait
PACE = 512  # tokens that `Retry.answer` is for: where more are asked for, the time grows in proportion
GARBAGE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)
CHECK = "check that this is the URL of an OpenAI-compatible server; it often ends with /v1"


@dataclass(frozen=True)
class Retry:
    """How long to wait for a server and how often to ask it; all times in seconds.

    Waits between tries double from `first` up to `longest`; a Retry-After header is honoured up to `longest`. `answer`
    is the time for up to PACE tokens.
    """

    tries: int = 5
    first: float = 0.5
    longest: float = 60.0
    connect: float = 10.0
    answer: float = 120.0


class Refusal(RemoteError):
    """A status other than 200, kept with its body so that a caller may look into it."""

    def __init__(self, status: int, body: bytes, problem: str, *, expected: str, found: str, do: str) -> None:
        super().__init__(problem, expected=expected, found=found, do=do)
        self.status, self.body = status, body


class Late(RemoteError):
    """A request that no try got an answer to in time."""


class Garbled(RemoteError):
    """A request that no try got a usable answer to, though the server answered."""


class Unanswered(RemoteError):
    """A choice that got an empty answer."""

    def __init__(self) -> None:
        super().__init__(
            "the model does not answer", expected="a choice", found="an empty answer",
            do=f"take a model that thinks less than {THOUGHT} tokens, or serve it with thinking switched off",
        )  # fmt: skip


class _Again(Exception):
    """One try that failed in a way that another may mend; `wait` is the server's own wish in seconds."""

    def __init__(
        self, found: str, do: str, wait: float = 0.0, status: int = 0, body: bytes = b"", late: bool = False,
        garbled: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(found)
        self.found, self.do, self.wait, self.status, self.body, self.late = found, do, wait, status, body, late
        self.garbled = garbled


# --- the connection ---------------------------------------------------------------------------------------------------


def address(base: str) -> tuple[str, str]:
    """Name and URL out of `openai:NAME[@URL]`; without URL, OPENAI_BASE_URL, else OpenAI's own.

    Raises ModelError on a missing name or a URL that cannot be one.
    """
    rest = base.removeprefix("openai:")
    cut = rest.find("@", 1)  # a name may begin with @
    name = rest if cut < 0 else rest[:cut]
    url = (rest[cut + 1 :] if cut > 0 else os.environ.get("OPENAI_BASE_URL") or HOME).strip()
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        parsed = httpx.URL("")
    if not name or parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise ModelError(
            "cannot tell which server to ask",
            expected="openai:NAME@URL with a URL such as http://localhost:8000/v1",
            found=f"name {name!r}, URL {url.rpartition('@')[2]!r}", do="write the name so, or set OPENAI_BASE_URL",
        )  # fmt: skip
    if parsed.userinfo:
        raise ModelError(
            "a server's URL must not hold a user or password: it is stored with results",
            expected="a plain URL", found=f"one for {parsed.host}", do="set OPENAI_API_KEY instead",
        )  # fmt: skip
    return name, url.rstrip("/")


def _wait_wished(answer: httpx.Response) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; 0 where there is none."""
    value = answer.headers.get("retry-after", "")
    if (exact := answer.headers.get("retry-after-ms", "")).isdigit():  # OpenAI's and Azure's
        return int(exact) / 1000
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


_ADVICE = {
    401: "set OPENAI_API_KEY to a key of this server",
    403: "set OPENAI_API_KEY to a key that may use this model",
    404: "check the model's name, and the URL: it often ends with /v1",
    429: "wait, or ask the server's owner for a higher limit",
}
TOO_LONG = re.compile(rb"context.(length|size|window)|tokens exceed")


class Gate:
    """Lets as many requests through at once as a server seems to bear; usable from many threads."""

    def __init__(self, widest: int, halt: threading.Event) -> None:
        self.widest = self.most = widest
        self.inside, self.answered, self.halt, self.free = 0, 0, halt, threading.Condition()

    @contextmanager
    def through(self) -> Iterator[None]:
        """Within it, the request is one of those; waits until there is room, or all is to end."""
        with self.free:
            while self.inside >= self.most and not self.halt.is_set():
                self.free.wait(0.2)
            if self.halt.is_set():
                raise _Again("all was to end", "")
            self.inside += 1
        try:
            yield
        finally:
            with self.free:
                self.inside -= 1
                self.free.notify_all()

    def narrow(self) -> None:
        """Half as many from now on, at least one: the server may answer one after the other."""
        with self.free:
            self.most, self.answered = max(1, self.most // 2), 0

    def widen(self) -> None:
        """One more after some answers in a row: it may have been a single prompt that took so long."""
        with self.free:
            self.answered += 1
            if self.answered == IN_A_ROW:
                self.most, self.answered = min(self.widest, self.most + 1), 0


class Server:
    """One server and the way to it; usable from many threads. `halt` ends the waits between tries."""

    def __init__(self, url: str, key: str = "", retry: Retry | None = None, concurrency: int = 8) -> None:
        if not (key.isascii() and key.isprintable()):
            raise ModelError("OPENAI_API_KEY cannot be a key", expected="printable ASCII", found="others", do="mend it")
        self.url, self.retry, self.halt, self._key = url, retry or Retry(), threading.Event(), key
        self.gate = Gate(concurrency, self.halt)
        tls = httpx.URL(url).scheme == "https"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.client = httpx.Client(
            headers=headers,
            limits=httpx.Limits(max_connections=concurrency),
            follow_redirects=False,
            trust_env=tls,  # a proxy of the environment sees TLS only, never prompts
            # Plain HTTP needs no certificates, and loading them takes longer than many an answer.
            verify=True if tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        )

    def ask(self, path: str, payload: Any, read: Callable[[Any], T], *, retried: Iterable[int] = RETRIED) -> T:
        """What `read` makes of the answer to a POST of JSON (GET where payload is None).

        Tries again on `retried` statuses, broken connections, time-outs and answers that `read` refuses. Raises
        Refusal on another status, RemoteError when all tries are used up, Late where all were too slow.
        """
        # ASCII JSON, so that even lone surrogates can be sent.
        content = None if payload is None else json.dumps(payload).encode()
        jitter, tries, count = random.Random(f"{path} {content!r}"), self.retry.tries, 0
        problem, late = f"{self.url}{path} gave no usable answer", True
        asked = payload or {}
        many = asked.get("max_tokens") or asked.get("max_completion_tokens") or 0
        limit = self.retry.answer * max(1.0, many / PACE)
        while True:
            count += 1
            try:
                with self.gate.through():
                    found = self._once(path, content, read, frozenset(retried), limit)
                self.gate.widen()
                return found
            except _Again as failed:
                late = late and failed.late
                if failed.late:
                    self.gate.narrow()
                first = self.retry.first * (BUSY if failed.status == 429 and not failed.wait else 1)
                wait = max(first * 2 ** (count - 1) * (0.5 + jitter.random() / 2), failed.wait)
                if count >= tries or self.halt.wait(min(wait, self.retry.longest)):
                    said = {"expected": f"one within {tries} tries", "found": failed.found, "do": failed.do}
                    if failed.status:
                        raise Refusal(failed.status, failed.body, problem, **said) from failed
                    raise (Late if late else Garbled if failed.garbled else RemoteError)(problem, **said) from failed

    def _once(
        self, path: str, content: bytes | None, read: Callable[[Any], T], retried: frozenset[int], limit: float
    ) -> T:
        """One try; raises _Again where another may help, Refusal where none will."""
        try:
            answer, body = self._exchange(path, content, limit)
        except httpx.TimeoutException as error:
            advice, late = "wait, or see whether the server is overloaded", not isinstance(error, httpx.ConnectTimeout)
            raise _Again(f"none in {limit:g} s", advice, late=late) from error
        except httpx.RequestError as error:
            found = f"{type(error).__name__}: {self._show(str(error).encode())}"
            raise _Again(found, "start the server, or check the URL") from error
        status, found = answer.status_code, f"status {answer.status_code}: {self._show(body)}"
        if status == 200:
            try:
                return read(json.loads(body))
            except GARBAGE as error:
                raise _Again(found, CHECK, garbled=True) from error
        advice = _ADVICE.get(status, "see the server's log" if status >= 500 else CHECK)
        if TOO_LONG.search(body):
            advice = ("raise the server's limit (vLLM: --max-model-len, llama.cpp: -c, Ollama: OLLAMA_CONTEXT_LENGTH), "
                      "or show fewer demonstrations or passages")  # fmt: skip
        if status in retried:
            raise _Again(found, advice, _wait_wished(answer), status, body)
        raise Refusal(
            status, body, f"{self.url}{path} refused a request", expected="status 200", found=found, do=advice
        )

    def _exchange(self, path: str, content: bytes | None, limit: float) -> tuple[httpx.Response, bytes]:
        """Response and body; one that trickles beyond the limit or is far too long counts as a failed one."""
        deadline, body = time.monotonic() + self.retry.connect + limit, bytearray()
        method, waits = "GET" if content is None else "POST", httpx.Timeout(limit, connect=self.retry.connect)
        with self.client.stream(method, self.url + path, content=content, timeout=waits) as answer:
            for chunk in answer.iter_bytes():
                body += chunk
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer does not end")
                if len(body) > MOST_BYTES:
                    raise httpx.DecodingError(f"an answer of more than {MOST_BYTES >> 20} MiB")
        return answer, bytes(body)

    def _show(self, body: bytes) -> str:
        """The first 120 characters of a body, without what could steer a terminal, and without the key."""
        text = body[:4096].decode("utf-8", "replace")
        text = text.replace(self._key, "***") if self._key else text
        return "".join(c if c.isprintable() else " " for c in text)[:120].strip() or "nothing"


# --- engine and session -----------------------------------------------------------------------------------------------


class RemoteEngine:
    """Opens `openai:NAME[@URL]`; the key is read from OPENAI_API_KEY."""

    def __init__(self, retry: Retry | None = None, concurrency: int = 8) -> None:
        self.retry, self.concurrency = retry or Retry(), concurrency

    def open(self, ref: ModelRef, home: Path) -> Session:
        """Open a session and learn what the server can do, with up to six requests of a few words.

        Raises ModelError on a name that states no server or a model with transforms, RemoteError when none answers.
        """
        if ref.transforms:
            raise ModelError(
                f"{ref.base} is on a server: its weights are out of reach",
                expected="no transforms", found=ref.transforms[0].kind, do="take a local model to change its weights",
            )  # fmt: skip
        name, url = address(ref.base)
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        server = Server(url, key, self.retry, self.concurrency)
        try:
            return RemoteSession(server, name, self.concurrency)
        except BaseException:
            server.client.close()
            raise


class RemoteSession(ByScores):
    """A session with a model on a server, for one calling thread.

    `protocol["scoring"]` says how closed sets behind chats are scored, `protocol["scoring_raw"]` the same behind raw
    text; decided once, when the session opens, by asking the server about a fixed sentence: "echo" (log-probabilities
    of every token of the continuation), "logprobs" (of its first tokens, see `by_beginning`) or "generation" (none:
    the answer is generated and compared, see `by_text`). The latter two give a Score of 1 token, so that its mean is
    its log-probability. `protocol["dropped"]` names the settings that the model refuses to be told.
    """

    def __init__(self, server: Server, name: str, concurrency: int = 8) -> None:
        self.server, self.name, self.concurrency = server, name, concurrency
        self.spent = Spent()
        self.failed = 0  # prompts that were refused, late or not answered
        self._dropped: frozenset[str] = frozenset()
        self._alternatives = 20
        # Likelihoods of choices that a prompt does not show are had of local models alone.
        self.protocol = {"engine": "remote", "dtype": "as served", "model": name, "url": server.url,
                         "choices": "listed"}  # fmt: skip
        self.context = self._stated_context()
        begun = time.monotonic()
        self.protocol |= {"scoring": self._probe_chat(), "scoring_raw": self._probe_raw()}
        self.spent += Spent(seconds=time.monotonic() - begun)

    def close(self) -> None:
        """Close the connections."""
        self.server.halt.set()
        self.server.client.close()

    def _stated_context(self) -> int:
        if (told := os.environ.get("WHET_CONTEXT", "")).isdigit() and int(told):  # of a server that does not say
            return int(told)
        try:
            return self.server.ask("/models", None, lambda body: read_context(body, self.name))
        except Refusal:  # many servers have no such list, and some keys may not read it
            return CONTEXT

    def _probe_chat(self) -> str:
        """Whether chats come with log-probabilities, 20 or 5 for each token."""
        chat = (("user", f"Say: {PROBE}"),)
        for many in (20, 5, 0):
            wish = {"logprobs": True, "top_logprobs": many} if many else {}
            reply = self._probe(chat, wish)
            if many and reply and any(s.alternatives for s in reply.choices[0].steps):
                self._alternatives = many
                return "logprobs"
        return "generation"

    def _probe_raw(self) -> str:
        """Whether raw text is echoed with log-probabilities, or only what is generated has them."""
        reply = self._probe(PROBE, {"echo": True, "logprobs": 1})
        if reply and PROBE in reply.choices[0].text:
            steps = reply.choices[0].steps
            if len(steps) > 2 and all(s.logprob is not None for s in steps[1:]):
                return "echo"
        reply = self._probe(PROBE, {"logprobs": 5})
        return "logprobs" if reply and any(s.alternatives for s in reply.choices[0].steps) else "generation"

    def _probe(self, prompt: Prompt, wish: dict[str, Any]) -> Reply | None:
        """The reply to a request that a server may not support; None where it does not."""
        try:
            # 500 is not asked again: that is how some servers say that they do not support something.
            settings, bill = {"max_tokens": 1, "temperature": 0.0, **wish}, list[Spent]()
            reply = self._request(prompt, settings, bill, RETRIED - {500})
        except Refusal as error:
            # OpenAI says 403 of models that think; a key that may not use the model fails without the wish, too.
            if error.status in UNSUPPORTED or (error.status == 403 and "logprobs" in wish):
                return None
            raise
        self.spent = sum(bill, self.spent)
        return reply

    # --- requests -----------------------------------------------------------------------------------------------------

    def count(self, prompts: Sequence[Prompt]) -> list[int]:
        """An estimate by `tokens`, for the server's tokenizer is not at hand, and 4 more for each message."""
        return [tokens(p) if isinstance(p, str) else sum(tokens(text) + 4 for _, text in p) for p in prompts]

    def _fits(self, longest: int) -> None:
        if longest > self.context:
            raise EngineError(
                "a prompt is longer than the model's context window",
                expected=f"at most {self.context} tokens", found=f"about {longest}", do="shorten it",
            )  # fmt: skip

    def _request(
        self, prompt: Prompt, settings: dict[str, Any], bill: list[Spent], retried: Iterable[int] = RETRIED
    ) -> Reply:
        """One request; its cost goes onto the bill, which stands whatever becomes of requests after it.

        Control markers in a chat's contents are broken up; raw text is sent as it is.

        A setting that the model refuses by name is left out (`max_tokens` is renamed), from then on, and noted.
        """
        if isinstance(prompt, str):
            path, payload = "/completions", {"model": self.name, "prompt": prompt, **settings}
        else:
            turns = as_turns(said_by_users(prompt))
            path, payload = "/chat/completions", {"model": self.name, "messages": turns, **settings}
        while True:
            sent = {k: v for k, v in payload.items() if k not in self._dropped}
            if "max_tokens" in self._dropped:
                sent["max_completion_tokens"] = payload["max_tokens"]
            try:
                reply = self.server.ask(path, sent, read_reply, retried=retried)
                break
            except Refusal as error:
                refused = _refused_setting(error)
                if refused not in sent:
                    raise
                self._dropped |= {refused}
                self.protocol["dropped"] = ", ".join(sorted(self._dropped))
        said = sum(tokens(c.text) for c in reply.choices)
        asked = tokens(prompt if isinstance(prompt, str) else " ".join(text for _, text in prompt))
        bill.append(Spent(
            prefilled_tokens=asked if reply.prompt_tokens is None else reply.prompt_tokens,
            generated_tokens=said if reply.completion_tokens is None else reply.completion_tokens,
        ))  # fmt: skip
        return reply

    def _answered(self, prompt: Prompt, settings: dict[str, Any], bill: list[Spent]) -> Reply:
        """One request, asked again with room for thought where the limit was reached before an answer began."""
        try:
            reply = self._request(prompt, settings, bill)
        except Refusal as error:
            if b"output limit was reached" not in error.body:  # OpenAI's other way to say so
                raise
            reply = Reply((Choice("", False),), None, None)
        limit = settings["max_tokens"]
        room = min(limit + THOUGHT, self.context - (reply.prompt_tokens or self.count([prompt])[0]))
        if room <= limit or all(c.text or c.ended for c in reply.choices):
            return reply
        # A stop string must not end the thought; answers are cut at theirs by the caller.
        wish = {k: v for k, v in settings.items() if k != "stop"}
        return self._request(prompt, wish | {"max_tokens": room}, bill)

    def _map(
        self,
        work: Callable[[Item, list[Spent]], T],
        items: Sequence[Item],
        unanswered: Callable[[Item], T],
        progress: Progress | None,
    ) -> list[T]:
        """Results of work on each item, in order, `concurrency` at a time; the first failure ends all and is raised.

        What a server refuses of single prompts, is too slow for or answers by nothing usable, or a model does not
        answer, is `unanswered` instead, unless that happens to more of them than not: then it is no matter of prompts.
        """
        begun, results, failed = time.monotonic(), dict[int, T](), list[Refusal | Unanswered | Late | Garbled]()
        self.server.halt.clear()
        pool, bills = ThreadPoolExecutor(self.concurrency), [list[Spent]() for _ in items]
        try:
            places = {pool.submit(work, item, bills[n]): n for n, item in enumerate(items)}
            for future in as_completed(places):
                place = places[future]
                try:
                    results[place] = future.result()
                except (Refusal, Unanswered, Late, Garbled) as error:
                    if isinstance(error, Refusal) and error.status not in PARTICULAR:
                        raise
                    failed.append(error)
                    results[place] = unanswered(items[place])
                telling = len(failed) > self.concurrency or len(results) == len(items)
                if telling and 2 * len(failed) > len(results):
                    raise failed[0]
                if progress:
                    progress(len(results), len(items))
        except BaseException:
            self.server.halt.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self.failed += len(failed)
            self.spent += sum((cost for bill in bills for cost in bill), Spent(seconds=time.monotonic() - begun))
        return [results[n] for n in range(len(items))]

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[tuple[Generation, ...]]:
        """`sampling.n` answers per prompt; at temperature 0 one is asked for and repeated.

        What a model thinks before it answers is no part of the answer. A prompt that the server refuses, or is too slow
        for, has empty answers. Raises EngineError for a prompt that (by estimate) leaves no room for the answer,
        RemoteError on failure, also where most prompts have no answer.
        """
        self._fits(max(self.count(prompts), default=0) + sampling.max_tokens)
        none = (Generation("", 0, "failed"),) * sampling.n
        return self._map(lambda prompt, bill: self._answers(prompt, sampling, bill), prompts, lambda _: none, progress)

    def _answers(self, prompt: Prompt, sampling: Sampling, bill: list[Spent]) -> tuple[Generation, ...]:
        wanted = sampling.n if sampling.temperature > 0 else min(1, sampling.n)
        made = list[Generation]()
        settings: dict[str, Any] = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
        # Only what differs from the servers' own defaults is sent: some refuse what they do not know.
        settings |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
        settings |= {"stop": list(sampling.stop[:4])} if sampling.stop else {}  # OpenAI takes 4; all are cut at below
        while len(made) < wanted:  # servers may give fewer than n
            more = {"n": wanted - len(made)} if wanted - len(made) > 1 else {}
            more |= {"seed": sampling.seed + len(made)} if sampling.temperature > 0 else {}
            before = len(bill)
            reply = self._answered(prompt, settings | more, bill)
            each = sum(cost.generated_tokens for cost in bill[before:]) // len(reply.choices)
            made += [_finish(c, sampling.stop, each) for c in reply.choices[: wanted - len(made)]]
        return tuple(made) if sampling.temperature > 0 else tuple(made * sampling.n)

    # --- scoring ------------------------------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Sequence[str]],
        *,
        end: bool = False,
        progress: Progress | None = None,
    ) -> list[tuple[Score, ...]]:
        """Log-probability of each continuation behind its prompt, as `protocol["scoring"]` says; `end` is ignored.

        Where the first tokens do not decide between several, the answer is generated and compared. Where it has nothing
        in common with any, or the server refuses the prompt, each has the score UNANSWERED (a single continuation,
        which is no choice, -inf). Raises RemoteError where most prompts are refused or get an empty answer, EngineError
        for a prompt (by estimate) longer than the context window, and for single continuations where the server gives
        no log-probabilities of whole texts: only choices between several can be scored there.
        """
        ways = [self.protocol["scoring_raw" if isinstance(p, str) else "scoring"] for p in prompts]
        alone = bool(ways) and all(len(c) == 1 for c in continuations)
        if alone and any(way != "echo" for way in ways):
            raise EngineError(
                f"{self.server.url} gives no log-probabilities of whole texts",
                expected="several continuations to choose between", found="one", do="score this with a local model",
            )  # fmt: skip
        lengths = [n + max(map(tokens, texts), default=0) if way == "echo" else n
                   for n, texts, way in zip(self.count(prompts), continuations, ways, strict=True)]  # fmt: skip
        self._fits(max(lengths, default=0))
        jobs = list(zip(prompts, continuations, ways, strict=True))
        none = Score(-math.inf if alone else UNANSWERED, 1)
        return self._map(lambda job, bill: self._scores(*job, bill), jobs, lambda job: (none,) * len(job[1]), progress)

    def _scores(self, prompt: Prompt, texts: Sequence[str], way: str, bill: list[Spent]) -> tuple[Score, ...]:
        if way == "echo" and isinstance(prompt, str):
            return self._echo(prompt, texts, bill)
        if way == "logprobs":
            chat = {"logprobs": True, "top_logprobs": self._alternatives}
            many = {"logprobs": 5} if isinstance(prompt, str) else chat
            # A token may be a single byte, but hardly all are: half is plenty to tell the continuations apart.
            limit = min(32, shared_beginning(texts) // 2 + 2)
            reply = self._request(prompt, {"max_tokens": limit, "temperature": 0.0, **many}, bill)
            first = reply.choices[0]
            # Without a text the tokens are those of a thought.
            values = by_beginning(first.steps, texts, first.ended) if first.text.strip() else []
            if values and decided(values):
                return tuple(Score(v, 1) for v in values)
        limit = max(24, 4 * max(map(tokens, texts), default=0) // 3 + 16)
        reply = self._answered(prompt, {"max_tokens": limit, "temperature": 0.0}, bill)
        if not reply.choices[0].text.strip():
            raise Unanswered()
        values = by_text(reply.choices[0].text, texts)
        return tuple(Score(v, 1) for v in values)

    def _echo(self, prompt: str, texts: Sequence[str], bill: list[Spent]) -> tuple[Score, ...]:
        """Scores out of the echo of prompt and continuation; one token is generated, as some servers need that."""
        scores = []
        for text in texts:
            wish = {"max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
            reply = self._request(prompt + text, wish, bill)
            made = 1 if reply.completion_tokens is None else reply.completion_tokens
            scores.append(echoed(reply.choices[0].steps, text, made))
        return tuple(scores)


def _finish(choice: Choice, stop: Sequence[str], tokens: int) -> Generation:
    """A choice as a Generation, cut before the first stop string, should the server have left it in."""
    text, cut = until_stop(choice.text, stop)
    return Generation(text, tokens, "stop" if cut or choice.ended else "length")


def _refused_setting(error: Refusal) -> str:
    """The optional setting that a refusal names (OpenAI's newer models refuse max_tokens and temperature), or ""."""
    try:
        said = json.loads(error.body)["error"]
        named = said["param"] if said["code"] in ("unsupported_parameter", "unsupported_value") else ""
    except (ValueError, KeyError, TypeError):
        return ""
    return named if error.status in (400, 422) and named in OPTIONAL else ""
