"""The fields of a record to what the row holds: a function for each format. Which fields a format has, `formats.py` says.

Every function adds a line to `problems` for each mistake, and its value counts only where there was none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from service.data.rows import Answer, Conversation, Extraction, Labelled, Preference, Tagged, Text
from service.data.turns import (
    conversation,
    decoded,
    order_problems,
    read_text,
    read_tools,
    read_turns,
    shown,
    system_turn,
)
from service.render import Message

Fields = Mapping[str, Any]  # by our names
PAIRS = (("text", None), ("sentence", None), ("sentence1", "sentence2"), ("premise", "hypothesis"))
TAGS = ("tags", "ner_tags")


def messages(fields: Fields, problems: list[str]) -> Conversation:
    """OpenAI's."""
    return conversation(fields["messages"], "messages", problems, tools=fields.get("tools"))


def sharegpt(fields: Fields, problems: list[str]) -> Conversation:
    """ShareGPT's, with a column for the system prompt if there is one."""
    system, tools = fields.get("system"), fields.get("tools")
    return conversation(fields["conversations"], "conversations", problems, system=system, tools=tools)


def prompt(fields: Fields, problems: list[str]) -> Conversation:
    """A prompt and its completion, each a text or a list of messages."""
    found = len(problems)
    turns = [*_turns(fields["prompt"], "prompt", "user", problems)]
    answer = [*_turns(fields["completion"], "completion", "assistant", problems)]
    system = system_turn(fields.get("system"), problems)
    if len(problems) == found:
        if answer[0]["role"] != "assistant":
            problems.append(f"completion begins with the role {answer[0]['role']!r}, wanted assistant.")
        problems += order_problems([*system, *turns, *answer], "prompt")
    return Conversation((*system, *turns, *answer), read_tools(fields.get("tools"), problems))


def alpaca(fields: Fields, problems: list[str]) -> Conversation:
    """An instruction, a blank line and its input, if it has one, are the user's turn."""
    instruction = read_text(fields["instruction"], "instruction", problems)
    given = read_text(fields.get("input") or "", "input", problems, may_be_empty=True)
    output = read_text(fields["output"], "output", problems)
    asked = f"{instruction}\n\n{given}" if given.strip() else instruction
    turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": output})
    return Conversation((*system_turn(fields.get("system"), problems), *turns))


def text(fields: Fields, problems: list[str]) -> Text:
    """Running text."""
    return Text(read_text(fields["text"], "text", problems))


def preference(fields: Fields, problems: list[str]) -> Preference:
    """A prompt with two answers; or two whole conversations, whose common beginning is the prompt."""
    found = len(problems)
    system = system_turn(fields.get("system"), problems)
    asked = () if fields.get("prompt") is None else _turns(fields["prompt"], "prompt", "user", problems)
    chosen = _turns(fields["chosen"], "chosen", "assistant", problems)
    rejected = _turns(fields["rejected"], "rejected", "assistant", problems)
    if len(problems) == found and chosen[0]["role"] != "assistant":
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        begun, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if asked and asked != begun[-len(asked) :]:
            problems.append("prompt is not how both chosen and rejected begin. Leave it out, or mend it.")
        asked = begun
    if len(problems) == found:
        problems += _preference_problems((*system, *asked), chosen, rejected)
    return Preference((*system, *asked), chosen, rejected)


def labelled(fields: Fields, problems: list[str]) -> Labelled:
    """A text, or a pair of them, and a class."""
    first, second = next((pair for pair in PAIRS if all(name in fields for name in pair if name)), PAIRS[0])
    pair = None if second is None else read_text(fields[second], second, problems)
    return Labelled(read_text(fields[first], first, problems), _class(fields["label"], "label", problems), pair)


def tags(fields: Fields, problems: list[str]) -> Tagged:
    """Words, and as many tags."""
    name = next(name for name in TAGS if name in fields)
    words, classes = decoded(fields["tokens"]), decoded(fields[name])
    for field, value in (("tokens", words), (name, classes)):
        if not isinstance(value, list) or not value:
            problems.append(f"{field} is {shown(value)}, wanted a list with at least one word.")
            return Tagged((), ())
    if len(words) != len(classes):
        problems.append(
            f"tokens has {len(words)} words and {name} has {len(classes)} tags, wanted a tag for each word."
        )
    return Tagged(
        tuple(read_text(word, f"tokens[{index}]", problems) for index, word in enumerate(words)),
        tuple(_class(tag, f"{name}[{index}]", problems) for index, tag in enumerate(classes)),
    )


def qa(fields: Fields, problems: list[str]) -> Extraction:
    """A context, a question, and the answers as spans of the context: SQuAD's two lists, a list of objects, or one answer."""
    context = read_text(fields["context"], "context", problems)
    question = read_text(fields["question"], "question", problems)
    found = [_span(answer, start, field, context, problems) for answer, start, field in _answers(fields, problems)]
    return Extraction(context, question, tuple(dict.fromkeys(found)))


def _turns(value: Any, field: str, role: str, problems: list[str]) -> tuple[Message, ...]:
    if isinstance(value, list):
        return read_turns(value, field, problems)
    return ({"role": role, "content": read_text(value, field, problems)},)


def _preference_problems(
    asked: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> list[str]:
    if chosen == rejected:
        return ["chosen and rejected are the same, wanted a better and a worse answer."]
    if not asked:
        return ["prompt is missing, and chosen and rejected have no common beginning."]
    if asked[-1]["role"] == "assistant":
        return ["the prompt ends with an answer, wanted the user's message before chosen and rejected."]
    return [
        f"{name} has no answer of its own, wanted one that begins and ends with the role assistant."
        for name, turns in (("chosen", chosen), ("rejected", rejected))
        if not turns or turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant"
    ]


def _class(value: Any, field: str, problems: list[str]) -> str:
    """A class is named by a text or a whole number."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        problems.append(f"{field} is {shown(value)}, wanted a class: a text or a whole number.")
        return ""
    return read_text(value, field, problems)


def _answers(fields: Fields, problems: list[str]) -> Iterator[tuple[Any, Any, str]]:
    """Each answer's text, its start or None, and its field."""
    given = decoded(fields["answers"] if "answers" in fields else fields["answer"])
    if "answers" not in fields or isinstance(given, str):
        if given not in (None, ""):
            yield given, fields.get("answer_start"), "answers" if "answers" in fields else "answer"
    elif (
        isinstance(given, dict) and isinstance(given.get("text"), list) and isinstance(given.get("answer_start"), list)
    ):
        texts, starts = given["text"], given["answer_start"]
        if len(texts) != len(starts):
            problems.append(f"answers has {len(texts)} texts and {len(starts)} answer_starts, wanted as many.")
        for index, (answer, start) in enumerate(zip(texts, starts, strict=False)):
            yield answer, start, f"answers.text[{index}]"
    elif isinstance(given, list):
        for index, answer in enumerate(given):
            if isinstance(answer, dict):
                yield answer.get("text"), answer.get("answer_start", answer.get("start")), f"answers[{index}].text"
            else:
                yield answer, None, f"answers[{index}]"
    else:
        problems.append(f"answers is {shown(given)}, wanted lists `text` and `answer_start`, or a list of answers.")


def _span(answer: Any, start: Any, field: str, context: str, problems: list[str]) -> Answer:
    found = len(problems)
    words = read_text(answer, field, problems)
    if len(problems) > found:
        return Answer("", 0)
    if start is None or start == "":
        times = context.count(words)
        if times != 1:
            problems.append(
                f"{field}, {shown(words)}, stands {times} times in the context, wanted once, or an answer_start."
            )
        return Answer(words, context.find(words))
    try:
        at = int(start)
    except (TypeError, ValueError):
        problems.append(f"the answer_start of {field} is {shown(start)}, wanted a whole number of characters.")
        return Answer(words, 0)
    if at < 0 or context[at : at + len(words)] != words:
        problems.append(
            f"{field} is {shown(words)}, and the context has {shown(context[max(at, 0) :][: len(words)])} at {at}."
        )
    return Answer(words, at)
