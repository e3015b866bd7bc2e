"""Why a row is left out before training: too short or too long, in another language, or repeating itself. Pure."""

from __future__ import annotations

from collections import Counter

from service.config import FilterBlock
from service.data.language import UNDETERMINED, language_of
from service.data.rows import Row, said, texts

NGRAM = 10  # words; of 5 to 10 that Gopher's rules look at, the longest: arXiv:2112.11446 table A1


def reason(row: Row, block: FilterBlock) -> str | None:
    """The first rule of `block` that a row breaks, in words that all rows share which break it; None: the row stays.

    A row too short to tell its language stays.
    """
    parts = [text for _, text in texts(row.content)]
    characters = sum(map(len, parts))
    if characters < block.min_chars:
        return f"fewer than {block.min_chars} characters (data.filter.min_chars)"
    if block.max_chars is not None and characters > block.max_chars:
        return f"more than {block.max_chars} characters (data.filter.max_chars)"
    if block.max_repetition < 1 and repetition(parts) > block.max_repetition:
        return f"over {block.max_repetition:.0%} in repeated {NGRAM}-grams of words (data.filter.max_repetition)"
    if block.languages and (found := language_of(said(row.content))) not in (*block.languages, UNDETERMINED):
        return f"in the language {found} (data.filter.languages)"
    return None


def repetition(parts: list[str]) -> float:
    """The share of characters, spaces left out, in words of a 10-gram that stands more than once in the same text.

    A word in several of them counts once, as in arXiv:2112.11446 section A.1.1.
    """
    repeated = total = 0
    for text in parts:
        words = text.split()
        grams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
        times = Counter(grams)
        inside = {i + j for i, gram in enumerate(grams) if times[gram] > 1 for j in range(NGRAM)}
        repeated += sum(len(words[i]) for i in inside)
        total += sum(map(len, words))
    return repeated / total if total else 0.0
