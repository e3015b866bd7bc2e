"""What of a conversation is trained: the assistant's words and its end-of-turn, whatever the template does around them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from service.errors import DataError, ModelError
from service.render import Example, Message, Renderer, TrainOn, load_renderer
from tests.integration.tiny import CHATML, save_tokenizer
from tests.unit.chat_templates import (
    FORGETS_THOUGHTS,
    LLAMA3,
    MARKS_THE_LAST_QUESTION,
    MISTRAL,
    QWEN3,
    TEMPLATES,
    sentencepiece,
    with_bos,
    with_merges,
)
from tests.unit.chat_templates import renderer as renderer_in

TALK: list[Message] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "<think>hm</think>1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "<think>well</think>2"},
]


def _text(renderer: Renderer, ids: Sequence[int]) -> str:
    return str(renderer.tokenizer.decode(list(ids), skip_special_tokens=False))


def _trained(renderer: Renderer, example: Example) -> str:
    return _text(renderer, [i for i, trained in zip(example.ids, example.mask, strict=True) if trained])


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_answer_and_its_end_of_turn_are_trained_and_nothing_else(tmp_path: Path, template: str) -> None:
    renderer = with_bos(tmp_path, template)
    (example,) = renderer.examples(TALK[:3])
    assert _trained(renderer, example) == _response(TALK[2], template)
    assert example.mask == sorted(example.mask)  # the prompt first, then the answer to the end
    assert example.ids[-1] in renderer.stop_ids


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_training_and_serving_see_the_same_prompt(tmp_path: Path, template: str) -> None:
    renderer = with_bos(tmp_path, template)
    for end in (3, 5):
        prompt = renderer.prompt_ids(TALK[: end - 1])
        example = renderer.examples(TALK[:end])[-1]
        assert example.ids[: len(prompt)] == prompt and example.mask[len(prompt)]


def test_a_newline_after_the_end_of_turn_is_not_trained(tmp_path: Path) -> None:
    renderer = renderer_in(tmp_path)
    assert str(renderer.tokenizer.apply_chat_template(TALK[:3], tokenize=False)).endswith("<|im_end|>\n")
    (example,) = renderer.examples(TALK)
    after = [i for i, token in enumerate(example.ids[:-1]) if token in renderer.stop_ids]
    assert [_text(renderer, [example.ids[i + 1]]) for i in after] == ["\n"] * len(after)
    assert not any(example.mask[i + 1] for i in after)


def test_several_turns_are_one_example_that_trains_them_all(tmp_path: Path) -> None:
    renderer = renderer_in(tmp_path)
    (example,) = renderer.examples(TALK)
    assert _trained(renderer, example) == "<think>hm</think>1<|im_end|><think>well</think>2<|im_end|>"
    whole = str(renderer.tokenizer.apply_chat_template(TALK, tokenize=False))
    assert _text(renderer, example.ids) == whole.removesuffix("\n")


def test_a_template_that_drops_earlier_thoughts_gives_one_example_a_turn(tmp_path: Path) -> None:
    renderer = renderer_in(tmp_path, FORGETS_THOUGHTS)
    first, second = renderer.examples(TALK)
    assert _trained(renderer, first) == "<think>hm</think>1<|im_end|>"
    assert _trained(renderer, second) == "<think>well</think>2<|im_end|>"
    assert "hm" not in _text(renderer, second.ids)


def test_a_template_that_marks_the_last_question_gives_one_example_a_turn(tmp_path: Path) -> None:
    renderer = renderer_in(tmp_path, MARKS_THE_LAST_QUESTION)
    first, second = renderer.examples(TALK)
    assert _text(renderer, first.ids).count("(now) one?") == 1
    assert _text(renderer, second.ids).count("(now)") == 1 and "(now) two?" in _text(renderer, second.ids)


def test_there_are_as_many_bos_as_the_template_gives(tmp_path: Path) -> None:
    for name, template, wanted in (("llama", LLAMA3, 1), ("chatml", CHATML, 0)):
        renderer = with_bos(tmp_path / name, template)
        bos = renderer.tokenizer.bos_token_id
        assert renderer.prompt_ids(TALK[:2]).count(bos) == wanted
        assert renderer.examples(TALK)[0].ids.count(bos) == wanted


def test_a_template_that_never_ends_a_turn_is_refused(tmp_path: Path) -> None:
    renderer = renderer_in(tmp_path, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with pytest.raises(ModelError, match="would never stop"):
        renderer.examples(TALK[:3])


def test_a_template_whose_opening_is_no_prefix_of_the_answer_is_refused(tmp_path: Path) -> None:
    renderer = renderer_in(tmp_path, CHATML.replace("assistant\n{% endif", "assistant\n<plan>{% endif"))
    with pytest.raises(ModelError, match="renders the answer differently"):
        renderer.examples(TALK[:3])


def test_a_template_that_refuses_the_messages_is_quoted(tmp_path: Path) -> None:
    renderer = renderer_in(tmp_path, "{{ raise_exception('no system message here') }}")
    with pytest.raises(DataError, match="no system message here"):
        renderer.prompt_ids(TALK[:2])


@pytest.mark.parametrize("messages", [[], [TALK[1]]], ids=["empty", "question only"])
def test_a_conversation_without_an_answer_is_refused(tmp_path: Path, messages: list[Message]) -> None:
    with pytest.raises(DataError, match="assistant"):
        renderer_in(tmp_path).examples(messages)


def test_an_answer_without_a_question_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is nothing to answer"):
        renderer_in(tmp_path).examples([TALK[2]])


def test_a_tokenizer_without_a_template_is_refused_and_one_can_be_given(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "")
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        load_renderer(tmp_path)
    assert load_renderer(tmp_path, CHATML).prompt_ids(TALK[:2])


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_renderer(tmp_path)


def test_generation_config_names_further_end_tokens(tmp_path: Path) -> None:
    before = renderer_in(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    after = load_renderer(tmp_path)
    assert after.stop_ids == before.stop_ids | {0, 1}
    assert after.digest != before.digest


def test_a_generation_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        load_renderer(tmp_path)


def test_the_digest_follows_the_template_and_not_the_place(tmp_path: Path) -> None:
    here, there = renderer_in(tmp_path / "a"), renderer_in(tmp_path / "b")
    assert here.digest == there.digest
    other = load_renderer(tmp_path / "a", CHATML.replace("\n{% endfor", "{% endfor"))
    assert other.digest != here.digest
    here.examples(TALK)
    assert load_renderer(tmp_path / "a").digest == here.digest


def test_decoding_leaves_special_tokens_out(tmp_path: Path) -> None:
    renderer = renderer_in(tmp_path)
    assert renderer.decode(renderer.prompt_ids([TALK[1]])) == "user\none?\nassistant\n"


# A conversation as training data has them: some answers not to be learnt, line ends and spaces where tokens meet.
_TEXTS = st.text(alphabet="ab1 \n\n'é🚀Z.", max_size=12)
_ANSWERS = st.tuples(st.sampled_from(["", "", "<think>a\nb</think>"]), _TEXTS, st.sampled_from(["", "", "<|im_end|>"]))


@st.composite
def _talks(draw: st.DrawFn) -> list[Message]:
    system = draw(st.lists(st.just({"role": "system", "content": "be brief"}), max_size=1))
    talk: list[Message] = [*system]
    for question, answer, train in draw(st.lists(st.tuples(_TEXTS, _ANSWERS, st.booleans()), min_size=1, max_size=4)):
        talk += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "".join(answer), "train": train},
        ]
    talk[-1]["train"] = True
    return talk


def _by_definition(renderer: Renderer, talk: list[Message]) -> list[Example]:
    """Each trained turn: its prompt's ids as it is served, and the answer's as they follow it, else apart."""

    def ids(text: str) -> list[int]:
        return list(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])

    turns = []
    for i in (i for i, message in enumerate(talk) if message.get("train")):
        prompt = str(renderer.tokenizer.apply_chat_template(talk[:i], tokenize=False, add_generation_prompt=True))
        whole = str(renderer.tokenizer.apply_chat_template(talk[: i + 1], tokenize=False))
        whole = whole[: whole.rindex("<|im_end|>") + len("<|im_end|>")]
        before, both = ids(prompt), ids(whole)
        answer = both[len(before) :] if both[: len(before)] == before else ids(whole[len(prompt) :])
        turns.append((before, answer))
    last = [*turns[-1][0], *turns[-1][1]]
    if any(last[: len(prompt) + len(answer)] != [*prompt, *answer] for prompt, answer in turns):
        return [Example([*p, *a], [False] * len(p) + [True] * len(a)) for p, a in turns]
    trained = {i for prompt, answer in turns for i in range(len(prompt), len(prompt) + len(answer))}
    return [Example(last, [i in trained for i in range(len(last))])]


def _response(message: Message, template: str) -> str:
    content = str(message["content"])
    return {LLAMA3: content.strip(), MISTRAL: f" {content}"}.get(template, content) + "<|im_end|>"


@settings(deadline=None, max_examples=150, database=None)
@given(talk=_talks(), template=st.sampled_from(sorted(TEMPLATES.values())))
def test_the_trained_tokens_are_the_responses_whatever_the_texts(talk: list[Message], template: str) -> None:
    renderer = with_merges(template)
    trained = [_trained(renderer, example) for example in renderer.examples(talk)]
    assert "".join(trained) == "".join(_response(message, template) for message in talk if message.get("train"))


@settings(deadline=None, max_examples=150, database=None)
@given(
    talks=st.lists(_talks(), max_size=3), template=st.sampled_from(sorted(TEMPLATES.values())), kind=st.integers(0, 2)
)
def test_ids_and_masks_are_those_of_the_definition(talks: list[list[Message]], template: str, kind: int) -> None:
    renderer = with_merges(template) if kind == 2 else sentencepiece(template, legacy=bool(kind))
    wanted = [_by_definition(renderer, talk) for talk in talks]
    assert renderer.examples_batch([(talk, ()) for talk in talks]) == wanted
    assert [renderer.examples(talk) for talk in talks] == wanted


def test_of_many_turns_no_text_is_tokenised_more_than_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = renderer_in(tmp_path)
    tokenised, texts = renderer._tokenised, list[str]()

    def noted(given: Sequence[str]) -> list[list[int]]:
        texts.extend(given)
        return tokenised(given)

    monkeypatch.setattr(renderer, "_tokenised", noted)
    talk: list[Message] = []
    for number in range(20):
        talk += [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"{number}! " * 20}]
    (example,) = renderer.examples(talk)
    assert sum(map(len, texts)) <= 2 * len(_text(renderer, example.ids))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tokenizer_that_begins_every_text_with_a_space_adds_none_to_an_answer(legacy: bool) -> None:
    for template, answer in ((CHATML, "of▁the▁work<|im_end|>"), (MISTRAL, "▁of▁the▁work<|im_end|>")):
        renderer = sentencepiece(template, legacy=legacy)
        talk = [{"role": "user", "content": "the license"}, {"role": "assistant", "content": "of the work"}]
        (example,) = renderer.examples(talk)
        whole = list(renderer.tokenizer.apply_chat_template(talk, return_dict=False))
        assert whole[: len(example.ids)] == example.ids
        trained = [token for token, learnt in zip(example.ids, example.mask, strict=True) if learnt]
        assert "".join(renderer.tokenizer.convert_ids_to_tokens(trained)) == answer


def test_a_batch_has_the_error_of_a_bad_conversation_in_its_place() -> None:
    first, bad, last = with_merges(MISTRAL).examples_batch(
        [(TALK, ()), (TALK[1:2] * 2 + TALK[2:3], ()), (TALK[1:3], ())]
    )
    assert isinstance(first, list) and isinstance(last, list)
    assert isinstance(bad, DataError) and "roles must alternate" in str(bad)


@pytest.mark.parametrize(
    ("train_on", "silent", "wanted"),
    [
        ("responses", (), "<think>hm</think>1<|im_end|><think>well</think>2<|im_end|>"),
        ("responses", (2,), "<think>well</think>2<|im_end|>"),
        ("responses", (4,), "<think>hm</think>1<|im_end|>"),
        ("last", (), "<think>well</think>2<|im_end|>"),
        ("last", (2,), "<think>well</think>2<|im_end|>"),
    ],
)
def test_what_is_trained_is_what_was_asked_for(
    tmp_path: Path, train_on: TrainOn, silent: tuple[int, ...], wanted: str
) -> None:
    renderer = with_bos(tmp_path, LLAMA3)
    talk = [{**message, "train": False} if i in silent else message for i, message in enumerate(TALK)]
    (example,) = renderer.examples(talk, train_on=train_on)
    assert _trained(renderer, example) == wanted
    assert example.mask[-1]


def test_all_trains_every_token_but_the_first_and_turns_that_refuse(tmp_path: Path) -> None:
    renderer = with_bos(tmp_path, LLAMA3)
    (example,) = renderer.examples(TALK, train_on="all")
    assert example.ids == renderer.examples(TALK)[0].ids and example.ids[0] == renderer.tokenizer.bos_token_id
    assert example.mask == [False] + [True] * (len(example.ids) - 1)
    (example,) = renderer.examples([*TALK[:2], {**TALK[2], "train": False}, *TALK[3:]], train_on="all")
    silent = [token for token, trained in zip(example.ids, example.mask, strict=True) if not trained]
    assert _text(renderer, silent) == "<|bos|><think>hm</think>1<|im_end|>"
    (example,) = with_merges(FORGETS_THOUGHTS).examples(TALK, train_on="all")  # as the template gives the whole
    assert "hm" not in _trained(with_merges(FORGETS_THOUGHTS), example)
    with pytest.raises(DataError, match=r"data\.train_on: responses"):
        with_merges(FORGETS_THOUGHTS).examples([*TALK[:2], {**TALK[2], "train": False}, *TALK[3:]], train_on="all")


@pytest.mark.parametrize("train_on", ["responses", "last"])
def test_a_conversation_whose_answers_are_not_to_be_learnt_is_refused(train_on: TrainOn) -> None:
    with pytest.raises(DataError, match="train: false, so nothing would be trained"):
        with_merges(CHATML).examples([TALK[1], {**TALK[2], "train": False}], train_on=train_on)


def test_the_template_sees_tools_and_calls_and_not_our_flag() -> None:
    renderer = with_merges("{{ messages | tojson }}{{ (tools or []) | tojson }}" + QWEN3)
    call = {"type": "function", "function": {"name": "find", "arguments": {"order": 7}}}
    tool = {"type": "function", "function": {"name": "find", "parameters": {}}}
    talk = [TALK[1], {"role": "assistant", "content": "", "tool_calls": [call], "train": True}]
    text = _text(renderer, renderer.prompt_ids(talk, [tool]))
    assert '"parameters"' in text and '"tool_calls"' in text and '"train"' not in text


def test_a_call_of_a_tool_and_the_answer_after_it_are_one_example() -> None:
    renderer = with_merges(QWEN3)
    call = {"type": "function", "function": {"name": "find", "arguments": {"order": 7}}}
    tool = {"type": "function", "function": {"name": "find", "parameters": {}}}
    talk: list[Message] = [
        {"role": "user", "content": "where is it?"},
        {"role": "assistant", "content": "<think>look</think>", "tool_calls": [call]},
        {"role": "tool", "name": "find", "content": "on its way"},
        {"role": "assistant", "content": "<think>good</think>On its way."},
    ]
    (example,) = renderer.examples(talk, [tool])
    called = '<think>look</think><tool_call>\n{"name": "find", "arguments": {"order": 7}}\n</tool_call><|im_end|>'
    assert _trained(renderer, example) == f"{called}<think>good</think>On its way.<|im_end|>"
    assert '"name": "find", "parameters"' in _text(renderer, example.ids)
    later = [*talk, {"role": "user", "content": "thanks"}, {"role": "assistant", "content": "Bye"}]
    assert [_trained(renderer, e) for e in renderer.examples(later, [tool])][-1] == "Bye<|im_end|>"
    assert "look" not in _text(renderer, renderer.examples(later, [tool])[-1].ids)


def test_running_text_has_the_tokenizers_own_bos_and_an_end(tmp_path: Path) -> None:
    plain, bos = renderer_in(tmp_path / "plain"), with_bos(tmp_path / "bos", CHATML)
    assert _text(plain, plain.text("Once.").ids) == "Once.<|im_end|>"
    example = bos.text("Once.")
    assert _text(bos, example.ids) == "<|bos|>Once.<|im_end|>" and _trained(bos, example) == "Once.<|im_end|>"
    end = plain.tokenizer.eos_token_id
    ends_itself = TemplateProcessing(single="$A <|im_end|>", pair="$A $B", special_tokens=[("<|im_end|>", end)])
    plain.tokenizer.backend_tokenizer.post_processor = ends_itself
    assert _text(plain, plain.text("Once.").ids) == "Once.<|im_end|>"
    assert plain.texts([]) == []


def test_what_others_set_on_the_tokenizer_changes_no_example(tmp_path: Path) -> None:
    renderer = renderer_in(tmp_path)
    before = renderer.examples(TALK)
    renderer.tokenizer(["a", "a longer one"], padding="max_length", truncation=True, max_length=3)
    assert renderer.examples(TALK) == before


def test_a_template_that_asks_for_the_day_gets_the_same_one_every_day(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    save_tokenizer(tmp_path, dated)
    renderer = load_renderer(tmp_path)
    assert renderer.tokenizer.decode(renderer.prompt_ids(TALK[:1])).startswith("26 Jul 2024")


def test_conversations_need_no_end_of_sequence_token(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, CHATML)
    renderer = load_renderer(tmp_path)
    renderer.tokenizer.eos_token = None
    assert renderer.texts([]) == []
    with pytest.raises(ModelError, match="names no end-of-sequence token"):
        renderer.texts(["a"])
