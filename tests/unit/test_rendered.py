"""Every kind of row as tokens, and packs of them: what a row says is what is trained, and packing loses nothing of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.data.planner import micro_batches
from service.data.rendered import UNANSWERABLE, examples_of, examples_of_rows, pair_of, words_of
from service.data.rows import Answer, Content, Conversation, Extraction, Labelled, Preference, Row, Tagged, Text
from service.errors import DataError
from service.render import Example, Renderer
from service.training.objectives.sft import TokenArrays, collate
from tests.integration.tiny import CHATML
from tests.unit.chat_templates import FORGETS_THOUGHTS, with_merges

QUESTION = {"role": "user", "content": "which?"}
BETTER, WORSE = {"role": "assistant", "content": "this"}, {"role": "assistant", "content": "that"}
PREFERENCE = Preference((QUESTION,), (BETTER,), (WORSE,))
TAGGED = Tagged(("Ada", "Lovelace", "wrote"), ("B", "I", "O"))


def _texts(renderer: Renderer, example: Example) -> tuple[str, str]:
    """What stands before the trained tokens, and these."""
    trained = [token for token, learnt in zip(example.ids, example.mask, strict=True) if learnt]
    before = example.ids[: len(example.ids) - len(trained)]
    return renderer.tokenizer.decode(before), renderer.tokenizer.decode(trained)


@pytest.mark.parametrize(
    ("content", "asked", "answered"),
    [
        (Conversation((QUESTION, BETTER)), "which?", "this"),
        (PREFERENCE, "which?", "this"),
        (Labelled("fine day", "good"), "fine day", "good"),
        (Labelled("it rains", "no", pair="it is dry"), "it rains\n\nit is dry", "no"),
        (Extraction("Ada wrote it.", "Who?", (Answer("Ada", 0),)), "Ada wrote it.\n\nWho?", "Ada"),
        (Extraction("It rains.", "Who?", ()), "It rains.\n\nWho?", UNANSWERABLE),
    ],
)
def test_a_row_is_a_question_and_the_answer_that_is_trained(content: Content, asked: str, answered: str) -> None:
    renderer = with_merges(CHATML)
    (example,) = examples_of(Row(1, content), renderer)
    prompt = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert _texts(renderer, example) == (prompt, f"{answered}<|im_end|>")


def test_rows_of_all_kinds_are_rendered_in_their_order_and_errors_stand_in_their_place() -> None:
    renderer = with_merges(CHATML)
    contents: list[Content] = [
        Text("Once."),
        Conversation((QUESTION, BETTER)),
        TAGGED,
        Text("Upon."),
        Conversation((QUESTION,)),
    ]
    rows = [Row(number, content) for number, content in enumerate(contents, 1)]
    first, second, third, fourth, fifth = examples_of_rows(rows, renderer)
    assert first == [renderer.text("Once.")] and fourth == [renderer.text("Upon.")]
    assert second == renderer.examples((QUESTION, BETTER))
    assert isinstance(third, DataError) and "words with tags are no conversation" in str(third)
    assert isinstance(fifth, DataError) and "no message has the role assistant" in str(fifth)
    with pytest.raises(DataError, match="words with tags"):
        examples_of(rows[2], renderer)


def test_both_answers_of_a_preference_follow_the_same_prompt_and_only_they_are_trained() -> None:
    renderer = with_merges(FORGETS_THOUGHTS)
    before = ({"role": "user", "content": "hm"}, {"role": "assistant", "content": "<think>a</think>b"}, QUESTION)
    chosen, rejected = pair_of(Preference(before, (BETTER,), (WORSE,)), renderer)
    (better, worse) = (_texts(renderer, example) for (example,) in (chosen, rejected))
    assert better[0] == worse[0] and (better[1], worse[1]) == ("this<|im_end|>", "that<|im_end|>")


def test_a_word_is_where_its_first_sub_word_is() -> None:
    tokenizer = with_merges(CHATML).tokenizer
    words = words_of(TAGGED, tokenizer)
    pieces = np.split(np.array(words.ids), words.starts[1:])
    assert [tokenizer.decode(piece.tolist()) for piece in pieces] == list(TAGGED.tokens)
    assert len(words.ids) > len(TAGGED.tokens)
    with pytest.raises(DataError, match=r"no token for the word\(s\) 1 \(''\)"):
        words_of(Tagged(("a", "", "b"), ("O", "O", "O")), tokenizer)


@settings(deadline=None, max_examples=100, database=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    capacity=st.integers(60, 200),
    micro=st.integers(1, 4),
    world_size=st.integers(1, 3),
)
def test_packed_and_unpacked_rows_carry_the_same_tokens(
    lengths: list[int], capacity: int, micro: int, world_size: int
) -> None:
    rows: list[TokenArrays] = []
    for row, length in enumerate(lengths):  # every token is its own, and every third one is trained
        ids = np.arange(length, dtype=np.int32) + 1000 * row + 1
        rows.append((ids, (ids % 3 == 0).astype(np.uint8)))

    def carried(capacity: int | None) -> tuple[Counter[int], Counter[int]]:
        batches = micro_batches(range(len(rows)), lengths, micro=micro, capacity=capacity, world_size=world_size)
        packs = [pack for batch in batches for pack in batch]
        assert sorted(row for pack in packs for row in pack) == list(range(len(rows)))
        assert all(sum(lengths[row] for row in pack) <= (capacity or 60) for pack in packs)
        collated = [collate([[rows[row] for row in pack] for pack in batch], torch.device("cpu")) for batch in batches]
        all_ids, targets = Counter[int](), Counter[int]()
        for batch in collated:
            all_ids.update(int(token) for token in batch.ids_BT.flatten() if token)  # 0 is padding
            targets.update(int(token) for token in batch.targets_N)
        return all_ids, targets

    assert carried(capacity) == carried(None)
