"""What looks like a secret or somebody's data, and what only resembles it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.data import suspicious


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("id AKIAIOSFODNN7EXAMPLE.", "AWS access key"),
        ("github_pat_" + "11ABCDEFG0" * 8, "GitHub token"),
        ("glpat-abcDEF123456ghiJKL78", "GitLab token"),
        ("sk-ant-api03-" + "aB3dE6gH9j" * 9, "Anthropic key"),
        ("key=sk-" + "aB3dE6gH9j" * 5, "OpenAI key"),
        ("hf_" + "aBcDeFgHiJ" * 4, "Hugging Face token"),
        ("AIza" + "SyA1b2C3d4E5f6G7h8I9j0KlMnOpQrStUvW", "Google key"),
        ("sk_" + "live_4eC39HqLyjWDarjtT1zdp7dc", "Stripe key"),
        ("xox" + "b-123456789012-abcdefABCDEF", "Slack token"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "private key"),
        ("-----BEGIN PRIVATE KEY-----", "private key"),
        ("https://bob:s3cr3tword@git.example.com/x", "password in a URL"),
    ],
)
def test_a_secret_is_known_by_its_shape(text: str, kind: str) -> None:
    assert list(suspicious.secrets(text)) == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "risk-based-assessment-of-the-highest-order",
        "ghp_short",
        "-----BEGIN PUBLIC KEY-----",
        "-----BEGIN CERTIFICATE-----",
        "https://user:password@host.com and http://localhost:8000/a@b",
        "eyJhbGciOiJIUzI1NiJ9 is a header alone",
        "AKIA is a prefix",
    ],
)
def test_what_only_resembles_a_secret_is_none(text: str) -> None:
    assert list(suspicious.secrets(text)) == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("jane.doe+news@mail.example.co.uk", "e-mail address"),
        ("<jane@example.org>", "e-mail address"),
        ("+1 (202) 555-0143", "phone number"),
        ("+442079460958", "phone number"),
        ("tel. 202-555-0143.", "phone number"),
        ("le 06 12 34 56 78", "phone number"),
        ("SSN 536-90-4399", "US social security number"),
        ("4111 1111 1111 1111", "card number"),
        ("card 378282246310005", "card number"),
        ("5555-5555-5555-4444", "card number"),
        ("GB82 WEST 1234 5698 7654 32", "IBAN"),
        ("FR1420041010050500013M02606", "IBAN"),
    ],
)
def test_personal_data_is_known_by_shape_and_checksum(text: str, kind: str) -> None:
    assert list(suspicious.personal(text)) == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # its checksum is wrong
        "GB82 WEST 1234 5698 7654 33",
        "9780306406157",
        "2026-11-27 04:47:38.123456",
        "1.234.567.890,12",
        "from 1000 to 2000, 3000 and 4000",
        "0.1234567890123456",
        "a@b and icon@3x.png and @app.get",
        "noreply@example.com",
        "a1b2c3d4-1234-5678-9012-123456789012",
        "7 + 1234567890123",
    ],
)
def test_what_only_resembles_personal_data_is_none(text: str) -> None:
    assert list(suspicious.personal(text)) == []


def test_broken_encodings_are_known_and_other_alphabets_are_whole() -> None:
    whole = "Привет, 你好, こんにちは, مرحبا, שלום, ไทย, Zażółć gęślą jaźń, CORAÇÃO, naïve café, 👩‍💻"
    assert list(suspicious.broken(whole)) == []
    for text in (whole, "cafÃ© “naïve”"):
        mangled = text.encode().decode("latin-1")
        assert "mojibake" in suspicious.broken(mangled)
    assert list(suspicious.broken("tab\tand\r\nline\n")) == []


@given(st.text())
def test_whatever_is_shown_is_printable_and_short(text: str) -> None:
    shown = suspicious.printable(text, 80)
    assert shown.isprintable() and len(shown) <= 80


@given(st.text())
def test_no_text_breaks_a_look_at_it(text: str) -> None:
    for look in (suspicious.secrets, suspicious.personal, suspicious.broken):
        assert all(isinstance(kind, str) for kind in look(text))
    assert suspicious.line_ends(text) in ("", "lf", "crlf", "mixed")
