"""Streamed text: whole characters only, stop strings across tokens, and the same text as decoding everything at once."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from service.inference.detokenizer import TextStream


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a byte."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    fast = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=fast)


def _pieces(tokenizer: Any, text: str, stop: tuple[str, ...] = (), prompt: str = "Say: ") -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, tokenizer.encode(prompt), stop)
    pieces = []
    for token_id in tokenizer.encode(text):
        pieces.append(stream.push(token_id))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.finish()], stream.stopped


def test_no_half_character_is_ever_sent(tokenizer: Any) -> None:
    text = "naïve 東京 👩‍🚀 end"
    pieces, _ = _pieces(tokenizer, text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_is_never_completed_comes_out_at_the_end(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, [], ())
    sent = [stream.push(token_id) for token_id in tokenizer.encode("a😀")[:-1]]
    assert "".join(sent) == "a"
    assert stream.finish() == "\ufffd"


def test_a_prompt_that_ends_within_a_character_does_not_eat_text(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, tokenizer.encode("é")[:-1], ())
    assert "".join(stream.push(token_id) for token_id in tokenizer.encode("abc")) == "abc"


@pytest.mark.parametrize("stop", ["END", "\n\n", "é!"])
def test_a_stop_string_across_tokens_ends_the_text_and_is_not_sent(tokenizer: Any, stop: str) -> None:
    pieces, stopped = _pieces(tokenizer, f"so EN far{stop} and more", (stop,))
    assert stopped
    assert "".join(pieces) == "so EN far"


def test_text_held_back_for_a_stop_string_is_sent_when_it_turns_out_otherwise(tokenizer: Any) -> None:
    pieces, stopped = _pieces(tokenizer, "aabaac aab", ("aabb",))
    assert not stopped
    assert "".join(pieces) == "aabaac aab"


def test_the_earliest_of_several_stop_strings_wins(tokenizer: Any) -> None:
    pieces, stopped = _pieces(tokenizer, "one two three", ("three", "two"))
    assert stopped
    assert "".join(pieces) == "one "
