"""The language of a text: the one place that knows py3langid (a naive Bayes model of 135 languages inside the package)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

UNDETERMINED = "und"  # ISO 639-2
MIN_CONFIDENCE = 0.5  # below it the text is too short, or too little of a language, to say
LOOKED_AT = 1000  # characters of a text: 0.1 ms, and more do not change the answer


def language_of(text: str, *, confidence: float = MIN_CONFIDENCE, letter_bytes: int = 0) -> str:
    """ISO 639-1 (`en`, `de`), ISO 639-3 where there is none, `zxx` for what is no language, or `und`.

    `und` too where the classifier is less sure than `confidence` or the text has fewer letters, in bytes of UTF-8.
    """
    head = text[:LOOKED_AT]
    if letter_bytes and len("".join(filter(str.isalpha, head)).encode()) < letter_bytes:
        return UNDETERMINED
    found, probability = _identifier().classify(head)
    return str(found) if probability >= confidence else UNDETERMINED


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=MIN_CONFIDENCE)
