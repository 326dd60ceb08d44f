"""Rows of every form (chats, Alpaca, ShareGPT, pairs) to standard fields."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from whet.errors import TaskError
from whet.rows import Row, short

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
WHOLE = re.compile(r"^(-?\d+)\.0$")
ANSWERED = ("completion", "answers", "chosen")


def as_text(value: object, where: str, field: str) -> str | None:
    """A scalar as text (booleans as JSON writes them); None for null and NaN; raises TaskError for anything else."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict, tuple, set, bytes)):
        raise TaskError(f"{where}: {field} is not text", expected="text", found=short(value))
    text = str(value)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise TaskError(
                f"{where}: {field} holds half a character",
                expected="whole Unicode characters",
                found=short(text),
                do="write the file again as UTF-8",
            ) from None
    return text


def turns(value: object, where: str, field: str) -> list[tuple[str, str]]:
    """A chat as (role, content) pairs: TRL and OpenAI messages (role, content) and ShareGPT turns (from, value).

    Calls of tools stand behind what a turn says, as JSON.
    """
    if not isinstance(value, list) or not value:
        raise TaskError(
            f"{where}: {field} is not a chat", expected="a list of turns with role and content", found=short(value)
        )
    chat = []
    for turn in value:
        if not isinstance(turn, dict):
            raise TaskError(
                f"{where}: a turn of {field} is not an object", expected="role and content", found=short(turn)
            )
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise TaskError(
                f"{where}: a turn of {field} has an unknown role",
                expected="system, user, assistant or tool",
                found=short(role),
            )
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            content = "".join(_part(part, where, field) for part in content)
        if calls := turn.get("tool_calls") or turn.get("function_call"):  # OpenAI's way to call tools
            called = json.dumps(calls, ensure_ascii=False)
            content = f"{content}\n{called}" if isinstance(content, str) and content.strip() else called
        text = as_text(content, where, f"the content of a turn of {field}")
        if text is None:
            raise TaskError(f"{where}: a turn of {field} has no content", expected="text", found="null")
        chat.append((ROLES[role.lower()], text))
    return chat


def _part(part: object, where: str, field: str) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise TaskError(f"{where}: a part of {field} is not text", expected="text parts only", found=short(part))


def standard(row: Row) -> tuple[dict[str, Any], str]:
    """A row in standard fields (prompt, completion, history, rejected, text …) and the form it came in ("" = as is).

    Scalars become str, null stays None, absent fields stay absent. Raises TaskError naming the row.
    """
    values, where = dict(row.values), row.where
    form = ""
    for field in ("chosen", "rejected"):
        values |= {field: _transcript(values[field])} if field in values else {}
    # Beside a whole chat, `prompt` says its first turn again (UltraChat); beside answers, a chat repeats them.
    if "prompt" not in values or ("messages" in values and values.keys().isdisjoint(ANSWERED)):
        values, form = _other_form(values, where)
    out: dict[str, Any] = {
        key: values[key] for key in ("answers", "choices", "evidence") if values.get(key) is not None
    }
    history = list(values["history"]) if form else []
    for field in ("prompt", "completion", "chosen", "rejected"):
        value = values.get(field)
        if isinstance(value, list):
            chat = turns(value, where, field)
            form = form or "conversational"
            if field == "prompt":
                history, value = _last_user(chat, where)
            else:
                value = _only_answer(chat, where, field)
        if field in values:
            out[field] = as_text(value, where, field)
    for field in ("id", "group", "text"):
        value = as_text(values.get(field), where, field)
        if value and field == "group":  # whole numbers with gaps between them are written as 1.0
            value = WHOLE.sub(r"\1", value)
        if value:
            out[field] = value
    if history:
        out["history"] = tuple(history)
    if "chosen" in out:
        chosen = out.pop("chosen")
        if out.get("completion") is None:  # a table has a cell for either in every row
            out["completion"] = chosen
    return out, form


def _other_form(values: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    for field, form in (("messages", "messages"), ("conversations", "ShareGPT")):
        if field in values:
            chat = turns(values[field], where, field)
            answer = chat.pop()[1] if chat[-1][0] == "assistant" else None
            history, prompt = _last_user(chat, where)
            if isinstance(values.get("system"), str) and values["system"].strip():
                history.insert(0, ("system", values["system"]))
            chatted = {**values, "prompt": prompt, "history": history}
            return ({**chatted, "completion": answer} if answer is not None else chatted), form
    if "instruction" in values and "output" in values:
        parts = [as_text(values.get(field), where, field) or "" for field in ("instruction", "input")]
        prompt = "\n\n".join(part for part in parts if part.strip())
        system = as_text(values.get("system"), where, "system") or ""
        history = [("system", system)] if system.strip() else []
        told = values.get("history")
        pairs = told if isinstance(told, list) and not any(isinstance(item, dict) for item in told) else []
        for pair in pairs:  # LLaMA-Factory's: [question, answer] each
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise TaskError(f"{where}: history cannot be read", expected="pairs of question and answer",
                                found=short(pair))  # fmt: skip
            history += [(role, as_text(said, where, "history") or "")
                        for role, said in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
        return {**values, "prompt": prompt, "completion": values["output"], "history": history}, "Alpaca"
    if isinstance(values.get("chosen"), list):  # TRL's implicit prompt: both sides begin with it
        chat = turns(values["chosen"], where, "chosen")
        history, prompt = _last_user(chat[:-1], where)
        rejected = values.get("rejected")
        last = turns(rejected, where, "rejected")[-1][1] if isinstance(rejected, list) else rejected
        found = {"prompt": prompt, "history": history, "chosen": chat[-1][1], "rejected": last}
        return {**values, **found}, "conversational"
    return values, ""


def _transcript(text: object) -> object:
    """A chat written out as in hh-rlhf (Bai et al. 2022: `Human: …`, `Assistant: …`) as turns; all else as it is."""
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return text
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    return [{"role": role, "content": said.strip()} for role, said in zip(parts[::2], parts[1::2], strict=True)]


def _last_user(chat: list[tuple[str, str]], where: str) -> tuple[list[tuple[str, str]], str]:
    """The earlier turns, and the last: the user's, or what a tool said that the user's question was handed to."""
    asked = any(role == "user" for role, _ in chat)
    if not chat or chat[-1][0] not in (("user", "tool") if asked else ("user",)):
        raise TaskError(
            f"{where}: the chat has no question to answer",
            expected="a user turn before the last answer",
            found=f"{chat[-1][0]} turn" if chat else "none",
        )
    return chat[:-1], chat[-1][1]


def _only_answer(chat: list[tuple[str, str]], where: str, field: str) -> str:
    if chat[-1][0] != "assistant":
        raise TaskError(
            f"{where}: {field} does not end with an answer", expected="an assistant turn", found=f"{chat[-1][0]} turn"
        )
    return chat[-1][1]
