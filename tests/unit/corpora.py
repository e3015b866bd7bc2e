"""Generated data for tests of the checkup: clean rows as varied as people's, and one row for each way to spoil one."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

_VOCABULARY = """
    the of and to in is that for it with as was on be by this are from at which or have an not they one their has had
    people water garden letter morning house market teacher river mountain winter machine window question answer reason
    history children country money power system program number problem service friend father mother office party result
    change body face others level door health person art war community name president team minute idea city story point
    walk build carry write learn follow begin return explain measure remember travel finish collect describe protect send
    open small large early young important public able long great little own old right big high different next public
    always never often perhaps really today together however therefore almost quickly behind under before after between
    bread coffee train ticket engine battery camera kitchen bridge island forest paper colour picture music season degree
"""
_WORDS = _VOCABULARY.split()
# What looks like something and is not: numbers, code, other alphabets' letters, addresses of nobody.
_HARMLESS = (
    "order R-80433",
    "ISBN 978-3-16-148410-0",
    "2026-11-27 04:47:38",
    "version 10.2.14",
    "192.168.10.254",
    "550e8400-e29b-41d4-a716-446655440000",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "serial 4539148803436468",  # no card: the checksum is wrong
    "1234567890123456",
    "at 1700000000 s",
    "icon@2x.png",
    "git@github.com:loray/loray.git",
    "@property",
    "scikit-learn and task-based-learning-of-everything",
    "sk-xxxxxxxxxxxxxxxxxxxxxxxx",
    "https://example.com/a/b?c=1&d=2#e",
    "http://user:password@host.example",
    "DE00 1234 5678 9012 3456 78",  # no IBAN: the checksum is wrong
    "10 000 000 000 grams",
    "call extension 3258",
    "3.14159265358979",
    "Müller, Ångström, Łódź, São Paulo, NÃO, CORAÇÃO",
    "«été» – „Straße“ … 20 °C ± 2 µm, €5",
    "🙂 👩‍👩‍👧",
    "<div class='x'>a < b && c > d</div>",
    "if (a || b) { return [1, 2]; }\n\tx += 1",
    "a list:\n- one\n- two",
    "null",
    "100 200 300 400 500 600",
)


def clean(number: int, seed: int) -> list[dict[str, Any]]:
    """Conversations of one to three questions, of log-normal lengths, some with what only looks wrong."""
    draw = random.Random(seed)
    return [{"messages": _turns(draw)} for _ in range(number)]


def _turns(draw: random.Random) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": "Answer in a few words."}] if draw.random() < 0.5 else []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        turns.append({"role": "user", "content": text(draw, 30)})
        turns.append({"role": "assistant", "content": text(draw, 40)})
    return turns


def text(draw: random.Random, median_words: int) -> str:
    """Words as they come, in sentences."""
    words = [draw.choice(_WORDS) for _ in range(max(6, round(median_words * draw.lognormvariate(0, 0.4))))]
    if draw.random() < 0.1:
        words.insert(draw.randrange(len(words)), draw.choice(_HARMLESS))
    return " ".join(words).capitalize() + draw.choice((".", "?", "!"))


@dataclass(frozen=True)
class Defect:
    """A line of a JSONL file with something wrong in it, and the kind of the finding that must name it."""

    name: str
    kind: str
    line: bytes


def defects(
    seed: int, *, seq_len: int, evaluation: list[dict[str, Any]], earlier: list[dict[str, Any]]
) -> list[Defect]:
    """One of each. `evaluation` and `earlier` are rows that are repeated, exactly and nearly."""
    draw = random.Random(seed)

    def asked(question: str, answer: str | None = None, **more: Any) -> bytes:
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer or text(draw, 40), **more},
        ]
        return json.dumps({"messages": turns}).encode()

    def with_text(inserted: str) -> bytes:
        return asked(f"{text(draw, 20)} {inserted} {text(draw, 20)}")

    def turns(*roles: str) -> bytes:
        return json.dumps({"messages": [{"role": role, "content": text(draw, 30)} for role in roles]}).encode()

    def changed(row: dict[str, Any]) -> dict[str, Any]:
        messages = [dict(turn) for turn in row["messages"]]
        for turn in messages:
            if turn["role"] == "user":
                turn["content"] += " Thanks."
        return {"messages": messages}

    return [
        Defect("no JSON", "unreadable", b'{"messages": [{"role": "user", "content": "cut'),
        Defect("no object", "unreadable", b'["user", "assistant"]'),
        Defect("no UTF-8", "unreadable", asked("caf\xe9 ").replace(b"caf\\u00e9", b"caf\xe9")),
        Defect("key twice", "unreadable", b'{"messages": [], "messages": []}'),
        Defect("NaN", "unreadable", asked("How much?").replace(b'"How much?"', b"NaN")),
        Defect("lone surrogate", "unreadable", asked("half of \ud83d is here")),
        Defect("missing field", "unreadable", b'{"conversation": []}'),
        Defect(
            "missing content",
            "unreadable",
            b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "Yes."}]}',
        ),
        Defect("empty answer", "unreadable", asked("Why is that?", " ")),
        Defect("a number for a text", "unreadable", asked("How many?").replace(b'"How many?"', b"7")),
        Defect("unknown role", "unreadable", turns("user", "bot")),
        Defect("no answer", "unreadable", turns("user", "assistant", "user")),
        Defect("answer first", "unreadable", turns("assistant", "user", "assistant")),
        Defect("two questions in a row", "turn_order", turns("user", "user", "assistant")),
        Defect("late system prompt", "turn_order", turns("user", "assistant", "system", "user", "assistant")),
        Defect("nothing learnt", "nothing_trained", asked("What for?", weight=0)),
        Defect("duplicate", "duplicate", json.dumps(earlier[0]).encode()),
        Defect(
            "duplicate in other case",
            "duplicate",
            json.dumps(earlier[1])
            .upper()
            .replace("MESSAGES", "messages")
            .replace("ROLE", "role")
            .replace("CONTENT", "content")
            .replace('"USER"', '"user"')
            .replace('"ASSISTANT"', '"assistant"')
            .replace('"SYSTEM"', '"system"')
            .encode(),
        ),
        Defect("near duplicate", "near_duplicate", json.dumps(changed(earlier[2])).encode()),
        Defect("question of the evaluation", "leak", json.dumps(evaluation[0]).encode()),
        Defect("nearly one", "near_leak", json.dumps(changed(evaluation[1])).encode()),
        Defect("too long", "over_long", asked(*(" ".join(draw.choices(_WORDS, k=seq_len // 10)) for _ in range(2)))),
        Defect("far too long", "row_length", asked(" ".join(draw.choice(_WORDS) for _ in range(6000)))),
        Defect("answer of a letter", "answer_length", asked(text(draw, 60), "k")),
        Defect(
            "German",
            "language",
            asked(
                "Warum ist der Himmel am Abend rot und am Tag blau, und weshalb sieht man nachts so viele Sterne?",
                "Weil die Luft das blaue Licht stärker streut als das rote, das am Abend einen längeren Weg zurücklegt.",
            ),
        ),
        Defect(
            "Russian",
            "language",
            asked(
                "Почему небо вечером красное, а днем голубое, и отчего ночью видно так много звезд?",
                "Потому что воздух рассеивает голубой свет сильнее, чем красный, который вечером проходит более длинный путь.",
            ),
        ),
        Defect("AWS key", "secret", with_text("AKIAQ3EGPIHVX7ZQ2LMN")),
        Defect("GitHub token", "secret", with_text("ghp_" + "".join(draw.choices("abcdefGHIJK0123456789", k=36)))),
        Defect("OpenAI key", "secret", with_text("sk-proj-" + "".join(draw.choices("abcdefGHIJK0123456789", k=48)))),
        Defect("private key", "secret", with_text("-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA")),
        Defect(
            "JSON web token",
            "secret",
            with_text(
                "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
            ),
        ),
        Defect("password in a URL", "secret", with_text("postgres://admin:hunter2go@db.internal.example/orders")),
        Defect("e-mail address", "personal_data", with_text("write to jane.doe@example.com")),
        Defect("phone number", "personal_data", with_text("call +49 170 1234567 tonight")),
        Defect("phone number of America", "personal_data", with_text("call (212) 555-0187 tonight")),
        Defect("card number", "personal_data", with_text("it is 4539 1488 0343 6467, pay")),
        Defect("IBAN", "personal_data", with_text("to DE89 3704 0044 0532 0130 00 please")),
        Defect("mojibake", "mojibake", with_text("le cafÃ© est fermÃ©")),
        Defect("lost characters", "replacement_characters", with_text("le caf\ufffd")),
        Defect("control characters", "control_characters", with_text("\x1b[31mred\x1b[0m")),
        Defect("a byte order mark inside", "control_characters", with_text("\ufeffid")),
        Defect("mixed line ends", "mixed_line_ends", with_text("one\r\ntwo\nthree")),
        Defect("marks of a template", "template_marks", with_text("<|im_end|>\n<|im_start|>system")),
    ]
