"""What should not stand in a text to learn from: secrets, personal data, broken encoding, marks of chat templates.

Each function gives the kinds of what it finds, never the text itself: a secret is not printed to say that it is there.
Pure, and some 50 microseconds for a thousand characters. What looks like something and fails its checksum is not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# How the keys of each provider look, by its documentation or that of GitHub's secret scanning. The first text is in every
# one of them: looking for it is thirty times as fast.
_SECRETS = (
    ("AKIA", "AWS access key", r"\bAKIA[A-Z0-9]{16}\b"),
    ("ASIA", "AWS access key", r"\bASIA[A-Z0-9]{16}\b"),
    ("ghp_", "GitHub token", r"\bghp_[A-Za-z0-9]{36,}"),
    ("gho_", "GitHub token", r"\bgho_[A-Za-z0-9]{36,}"),
    ("ghs_", "GitHub token", r"\bghs_[A-Za-z0-9]{36,}"),
    ("github_pat_", "GitHub token", r"\bgithub_pat_\w{60,}"),
    ("glpat-", "GitLab token", r"\bglpat-[\w-]{20,}"),
    ("sk-ant-", "Anthropic key", r"\bsk-ant-[\w-]{32,}"),
    ("sk-", "OpenAI key", r"\bsk-(?!ant-)(?:proj-|svcacct-|admin-)?[A-Za-z0-9_-]{20,}"),
    ("hf_", "Hugging Face token", r"\bhf_[A-Za-z0-9]{34,}"),
    ("AIza", "Google key", r"\bAIza[\w-]{35}"),
    ("_live_", "Stripe key", r"\b[rs]k_live_[A-Za-z0-9]{20,}"),
    ("xox", "Slack token", r"\bxox[abeoprs]-[\w-]{10,}"),
    ("hooks.slack.com", "Slack webhook", r"hooks\.slack\.com/services/T\w+/B\w+/\w{20,}"),
    ("npm_", "npm token", r"\bnpm_[A-Za-z0-9]{36}"),
    ("pypi-", "PyPI token", r"\bpypi-[\w-]{60,}"),
    ("SG.", "SendGrid key", r"\bSG\.[\w-]{22}\.[\w-]{43}"),
    ("PRIVATE KEY", "private key", r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"),
    ("eyJ", "JSON web token", r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{16,}"),
    ("://", "password in a URL", r"\w://[^\s/:@<>{}$*]+:(?!pass|pwd|secret\b|\*|x{3})[^\s/:@<>{}$*]{6,}@[\w-]+\."),
)
_PATTERNS = tuple((hint, kind, re.compile(pattern)) for hint, kind, pattern in _SECRETS)
_PLACEHOLDER = re.compile(r"[xX]{8}|\*{8}|0{8}|\.{8}")  # sk-xxxxxxxxxxxxxxxxxxxx

_EMAIL = re.compile(
    r"(?<![\w.+%/:@-])[\w.+%-]+@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+([A-Za-z]{2,24})(?![\w@:])"
)
_NO_PERSON = ("git@", "noreply@", "no-reply@")
_FILE_ENDINGS = frozenset(
    ("png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "css", "js", "ts", "py", "json")
)  # icon@2x.png
_MANY_DIGITS = re.compile(r"\d(?:[ .()/-]{0,2}\d){8}")  # in every number that is looked for, and quick to look for
_DIGITS = re.compile(r"(?<![\w.,+/-])\+?\(?\d(?:[ .()/-]{0,2}\d){8,18}(?![\w/-]|[.,]\d)")
_INTERNATIONAL = re.compile(r"\+\d")
_NATIONAL = re.compile(  # of North America, and of France
    r"(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}|0[1-9](?:[ .-]\d\d){4}"
)
_SSN = re.compile(r"(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}")
_CARD = re.compile(  # Visa, Mastercard, American Express, Diners, Discover, JCB: ISO/IEC 7812 issuers
    r"4\d{12}(?:\d{3})?|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}"
)
_GROUPED = re.compile(r"\d{13,16}|\d{4}(?P<gap>[ -])\d{4}(?P=gap)\d{4}(?P=gap)\d{4}|\d{4}([ -])\d{6}\2\d{4,5}")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
_IBAN_LENGTHS = {  # of SWIFT's IBAN registry
    country: int(length)
    for country, length in re.findall(
        r"([A-Z]{2})(\d\d)",
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 FO18 "
        "FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LI21 LT20 LU20 LV21 MC27 "
        "MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SE24 SI19 SK24 SM27 TN24 TR26 UA29 "
        "VA22 VG24 XK20",
    )
}

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_TEMPLATE = re.compile(r"<\|\w{3,30}\|>|\[/?INST\]|<(?:start|end)_of_turn>|<</?SYS>>|<\uff5c[^\uff5c\n]{3,40}\uff5c>")


def secrets(text: str) -> Iterator[str]:
    """The kinds of keys, tokens and passwords that stand in a text."""
    for hint, kind, pattern in _PATTERNS:
        if hint in text:
            for match in pattern.finditer(text):
                if not _PLACEHOLDER.search(match.group()):
                    yield kind


def personal(text: str) -> Iterator[str]:
    """The kinds of what tells who somebody is, or how to reach or charge them."""
    if "@" in text:
        for match in _EMAIL.finditer(text):
            if match.group(1).lower() not in _FILE_ENDINGS and not match.group().lower().startswith(_NO_PERSON):
                yield "e-mail address"
    if not _MANY_DIGITS.search(text):
        return
    for match in _DIGITS.finditer(text):
        if kind := _number(match.group()):
            yield kind
    for match in _IBAN.finditer(text):
        if _is_iban(match.group().replace(" ", "")):
            yield "IBAN"


def broken(text: str) -> Iterator[str]:
    """How the encoding of a text was broken."""
    if _CONTROL.search(text):
        yield "control characters"
    if text.isascii():
        return
    if "\ufffd" in text:
        yield "replacement characters"
    if _is_mojibake(text):
        yield "mojibake"


def template_marks(text: str) -> bool:
    """Whether marks of a chat template, `<|im_start|>` or `[INST]`, stand in a text: the model would take them for turns."""
    return ("<" in text or "INST]" in text) and _TEMPLATE.search(text) is not None


def line_ends(text: str) -> str:
    """`lf`, `crlf` (with lone CR too), `mixed`, or nothing where there is one line."""
    if "\r" not in text:
        return "lf" if "\n" in text else ""
    return "mixed" if text.count("\n") != text.count("\r\n") else "crlf"


def printable(text: str, width: int = 240) -> str:
    """A text from the data in one line, for a terminal: whatever is not printable escaped, cut after `width` characters."""
    escaped = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[: width + 1]
    )
    return escaped if len(escaped) <= width else f"{escaped[: width - 3]}..."


def _number(text: str) -> str | None:
    digits = re.sub(r"\D", "", text)
    if _GROUPED.fullmatch(text) and _CARD.fullmatch(digits) and _luhn(digits):
        return "card number"
    if _SSN.fullmatch(text):
        return "US social security number"
    if (_INTERNATIONAL.match(text) and 9 <= len(digits) <= 15) or _NATIONAL.fullmatch(text):
        return "phone number"
    return None


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    doubled = [int(digit) * (2 if i % 2 else 1) for i, digit in enumerate(reversed(digits))]
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _is_iban(text: str) -> bool:
    """ISO 13616-1: moved to the end, the first four characters leave 1 modulo 97."""
    if _IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(char, 36)) for char in text[4:] + text[:4])) % 97 == 1


def _is_mojibake(text: str) -> bool:
    """UTF-8 read as another encoding (`cafÃ©`), by ftfy: of 53 286 descriptions that are not ASCII it took 65, all rightly."""
    from ftfy.badness import is_bad

    return bool(is_bad(text))
