"""Turns of a conversation as data sets write them, to turns as chat templates take them, or to what is wrong with them.

Read are OpenAI's messages (`role`, `content`, tool calls, `weight`) and ShareGPT's (`from`, `value`), which may stand in
one list. Every function adds a line to `problems` for each mistake, and goes on to find the next one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from service.data.json_rows import decode_cell
from service.data.rows import Conversation
from service.render import Message

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_SPEAKERS = {
    **_ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "weight", "train"}
_SHAREGPT_KEYS = {"from", "value", "weight", "train"}


def conversation(turns: Any, field: str, problems: list[str], *, system: Any = None, tools: Any = None) -> Conversation:
    """A whole conversation: it begins before an assistant's turn and ends with one."""
    found = len(problems)
    messages = [*system_turn(system, problems), *read_turns(turns, field, problems)]
    if len(problems) == found:
        problems += order_problems(messages, field)
    return Conversation(tuple(messages), read_tools(tools, problems))


def read_turns(turns: Any, field: str, problems: list[str]) -> tuple[Message, ...]:
    """The messages of a list, whatever their order; each as `role`, `content` and what else it has."""
    turns = decoded(turns)
    if not isinstance(turns, list) or not turns:
        problems.append(f"{field} is {shown(turns)}, wanted a list of at least one user and one assistant message.")
        return ()
    return tuple(_turn(turn, f"{field}[{index}]", problems) for index, turn in enumerate(turns))


def read_text(value: Any, field: str, problems: list[str], *, may_be_empty: bool = False) -> str:
    """The text of a field."""
    if not isinstance(value, str):
        problems.append(f"{field} is {shown(value)}, wanted text.")
    elif not may_be_empty and not value.strip():
        problems.append(f"{field} is empty.")
    elif not value.isascii() and _LONE_SURROGATE.search(value):
        problems.append(f"{field} has a lone surrogate, which is no text. Re-encode the row.")
    return str(value)


def read_tools(tools: Any, problems: list[str]) -> tuple[Mapping[str, Any], ...]:
    """The functions that the assistant may call, in OpenAI's shape; a bare function gets its wrapper. None: no tools."""
    tools = decoded(tools)
    if tools in (None, "", []):
        return ()
    if not isinstance(tools, list):
        problems.append(f"tools is {shown(tools)}, wanted a list of functions.")
        return ()
    return tuple(_tool(tool, f"tools[{index}]", problems) for index, tool in enumerate(tools))


def system_turn(system: Any, problems: list[str]) -> tuple[Message, ...]:
    """The message of a `system` column; none where it is empty."""
    if system is None or system == "":
        return ()
    return ({"role": "system", "content": read_text(system, "system", problems)},)


def order_problems(messages: list[Message], field: str) -> list[str]:
    """What the order of whole messages lacks."""
    if messages[-1]["role"] != "assistant":
        return [f"the last message has the role {messages[-1]['role']!r}, wanted assistant: the answer to learn."]
    if len(messages) == 1:
        return [f"{field} has only an answer, wanted the user's message before it."]
    if messages[0]["role"] == "assistant":
        return [f"{field}[0] is an answer, wanted the user's message before it."]
    problems = []
    calls: set[str | None] | None = None  # ids of the open calls; None: nothing was called
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            calls = {call.get("id") for call in message["tool_calls"]} if message.get("tool_calls") else None
        elif message["role"] == "tool":
            call = message.get("tool_call_id")
            if calls is None:
                problems.append(f"{field}[{index}] is a tool's answer, and no tool was called before it.")
            elif call is not None and None not in calls and call not in calls:
                problems.append(
                    f"{field}[{index}].tool_call_id is {shown(call)}, wanted one of {sorted(map(str, calls))}."
                )
    return problems


def decoded(value: Any) -> Any:
    """The list or object that a cell of a table holds as JSON text; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return decode_cell(value)
        except (ValueError, RecursionError):
            return value
    return value


def shown(value: Any) -> str:
    """A value for a message, cut to 60 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _turn(turn: Any, field: str, problems: list[str]) -> Message:
    if not isinstance(turn, dict):
        problems.append(f"{field} is {shown(turn)}, wanted an object with role and content.")
        return {}
    turn = {key: value for key, value in turn.items() if value is not None}  # tables fill what is missing with null
    if "from" in turn and "role" not in turn:
        message, known = _spoken(turn, field, problems), _SHAREGPT_KEYS
    else:
        message, known = _message(turn, field, problems), _KEYS
    if unknown := sorted(set(turn) - known):
        problems.append(f"{field} has the field(s) {unknown}, which are not trained. Remove them.")
    trained = _trained(turn, field, problems)
    if trained is not None and message.get("role") == "assistant":
        message["train"] = trained
    elif trained:
        problems.append(f"{field} has the role {shown(message.get('role'))}, and only an assistant's turn is trained.")
    return message


def _message(turn: dict[str, Any], field: str, problems: list[str]) -> Message:
    """One of OpenAI's."""
    role = turn.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        problems.append(f"{field}.role is {shown(role)}, wanted one of {', '.join(_ROLES)}.")
        role = ""
    message: Message = {"role": _ROLES.get(role, ""), "content": ""}
    calls = decoded(turn.get("tool_calls", []))
    if "content" in turn:
        may_be_empty = role == "tool" or bool(calls)
        message["content"] = read_text(
            _joined(turn["content"]), f"{field}.content", problems, may_be_empty=may_be_empty
        )
    elif not calls:
        problems.append(f"{field}.content is missing.")
    if calls:
        message["tool_calls"] = _tool_calls(calls, field, problems)
        if message["role"] not in ("assistant", ""):
            problems.append(f"{field} has the role {shown(role)}, and only an assistant calls tools.")
    for key in ("tool_call_id", "name"):
        if key in turn:
            message[key] = read_text(turn[key], f"{field}.{key}", problems)
    return message


def _spoken(turn: dict[str, Any], field: str, problems: list[str]) -> Message:
    """One of ShareGPT's."""
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        problems.append(f"{field}.from is {shown(speaker)}, wanted one of {', '.join(_SPEAKERS)}.")
        speaker = ""
    role = _SPEAKERS.get(speaker, "")
    if "value" not in turn:
        problems.append(f"{field}.value is missing.")
        return {"role": role, "content": ""}
    if speaker == "function_call":
        call = decoded(turn["value"])
        calls = [{"function": one} for one in (call if isinstance(call, list) else [call])]
        return {"role": role, "content": "", "tool_calls": _tool_calls(calls, field, problems)}
    return {"role": role, "content": read_text(turn["value"], f"{field}.value", problems, may_be_empty=role == "tool")}


def _trained(turn: dict[str, Any], field: str, problems: list[str]) -> bool | None:
    """Whether a turn is to be learnt, if it says so: `train`, or OpenAI's `weight`."""
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        problems.append(
            f"{field}.weight is {shown(weight)}, wanted 0 or 1: a turn is learnt or it is not. Repeat rows that shall count more."
        )
        return None
    if train is not None and not isinstance(train, bool):
        problems.append(f"{field}.train is {shown(train)}, wanted true or false.")
        return None
    if weight is not None and train is not None and bool(weight) != train:
        problems.append(f"{field}.weight is {shown(weight)} and train is {shown(train)}. Keep one of the two.")
    return train if train is not None else None if weight is None else bool(weight)


def _joined(content: Any) -> Any:
    """OpenAI's list of text parts as one text; anything else as it is."""
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    whole = parts and len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if whole else content


def _tool_calls(calls: Any, field: str, problems: list[str]) -> list[dict[str, Any]]:
    """Calls with their arguments as an object, as chat templates take them; OpenAI writes them as JSON text."""
    if not isinstance(calls, list):
        problems.append(f"{field}.tool_calls is {shown(calls)}, wanted a list of calls.")
        return []
    return [_tool_call(call, f"{field}.tool_calls[{index}]", problems) for index, call in enumerate(calls)]


def _tool_call(call: Any, field: str, problems: list[str]) -> dict[str, Any]:
    function = decoded(call.get("function")) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        problems.append(f"{field} is {shown(call)}, wanted an object with a function: its name and arguments.")
        return {}
    name = read_text(function.get("name"), f"{field}.function.name", problems)
    arguments = decoded(function.get("arguments", {}))
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        problems.append(f"{field}.function.arguments is {shown(arguments)}, wanted a JSON object.")
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tool(tool: Any, field: str, problems: list[str]) -> Mapping[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        problems.append(f"{field} is {shown(tool)}, wanted an object with a function: its name and parameters.")
        return {}
    read_text(function.get("name"), f"{field}.function.name", problems)
    return {"type": "function", "function": function}
