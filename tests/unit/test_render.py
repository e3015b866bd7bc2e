"""What of a conversation is trained: the assistant's words and its end-of-turn, whatever the template does around them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from service.errors import DataError, ModelError
from service.render import Example, Message, Renderer, load_renderer
from tests.integration.tiny import CHATML, save_tokenizer

OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# As reasoning models do: an earlier answer's thoughts are left out.
FORGETS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}" + OPENING
)
MARKS_THE_LAST_QUESTION = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.index0 == ns.last %}(now) "
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}" + OPENING
)
TALK: list[Message] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "<think>hm</think>1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "<think>well</think>2"},
]


def _renderer(directory: Path, template: str = CHATML) -> Renderer:
    save_tokenizer(directory, template)
    return load_renderer(directory)


def _with_bos(directory: Path, template: str) -> Renderer:
    """A tokenizer that puts a BOS of its own before every text, as Llama 3's does."""
    tokenizer = save_tokenizer(directory, template)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    bos = ("<|bos|>", tokenizer.convert_tokens_to_ids("<|bos|>"))
    inner = tokenizer.backend_tokenizer
    inner.post_processor = TemplateProcessing(single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[bos])
    tokenizer.save_pretrained(directory)
    renderer = load_renderer(directory)
    assert renderer.tokenizer("a")["input_ids"][0] == bos[1]
    return renderer


def _text(renderer: Renderer, ids: Sequence[int]) -> str:
    return str(renderer.tokenizer.decode(list(ids), skip_special_tokens=False))


def _trained(renderer: Renderer, example: Example) -> str:
    return _text(renderer, [i for i, trained in zip(example.ids, example.mask, strict=True) if trained])


@pytest.mark.parametrize("template", [CHATML, LLAMA3, FORGETS_THOUGHTS, MARKS_THE_LAST_QUESTION])
def test_the_answer_and_its_end_of_turn_are_trained_and_nothing_else(tmp_path: Path, template: str) -> None:
    renderer = _with_bos(tmp_path, template)
    (example,) = renderer.examples(TALK[:3])
    assert _trained(renderer, example) == "<think>hm</think>1<|im_end|>"
    assert example.mask == sorted(example.mask)  # the prompt first, then the answer to the end
    assert example.ids[-1] in renderer.stop_ids


@pytest.mark.parametrize("template", [CHATML, LLAMA3, FORGETS_THOUGHTS, MARKS_THE_LAST_QUESTION])
def test_training_and_serving_see_the_same_prompt(tmp_path: Path, template: str) -> None:
    renderer = _with_bos(tmp_path, template)
    for end in (3, 5):
        prompt = renderer.prompt_ids(TALK[: end - 1])
        example = renderer.examples(TALK[:end])[-1]
        assert example.ids[: len(prompt)] == prompt and example.mask[len(prompt)]


def test_a_newline_after_the_end_of_turn_is_not_trained(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path)
    assert str(renderer.tokenizer.apply_chat_template(TALK[:3], tokenize=False)).endswith("<|im_end|>\n")
    (example,) = renderer.examples(TALK)
    after = [i for i, token in enumerate(example.ids[:-1]) if token in renderer.stop_ids]
    assert [_text(renderer, [example.ids[i + 1]]) for i in after] == ["\n"] * len(after)
    assert not any(example.mask[i + 1] for i in after)


def test_several_turns_are_one_example_that_trains_them_all(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path)
    (example,) = renderer.examples(TALK)
    assert _trained(renderer, example) == "<think>hm</think>1<|im_end|><think>well</think>2<|im_end|>"
    whole = str(renderer.tokenizer.apply_chat_template(TALK, tokenize=False))
    assert _text(renderer, example.ids) == whole.removesuffix("\n")


def test_a_template_that_drops_earlier_thoughts_gives_one_example_a_turn(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, FORGETS_THOUGHTS)
    first, second = renderer.examples(TALK)
    assert _trained(renderer, first) == "<think>hm</think>1<|im_end|>"
    assert _trained(renderer, second) == "<think>well</think>2<|im_end|>"
    assert "hm" not in _text(renderer, second.ids)


def test_a_template_that_marks_the_last_question_gives_one_example_a_turn(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, MARKS_THE_LAST_QUESTION)
    first, second = renderer.examples(TALK)
    assert _text(renderer, first.ids).count("(now) one?") == 1
    assert _text(renderer, second.ids).count("(now)") == 1 and "(now) two?" in _text(renderer, second.ids)


def test_there_are_as_many_bos_as_the_template_gives(tmp_path: Path) -> None:
    for name, template, wanted in (("llama", LLAMA3, 1), ("chatml", CHATML, 0)):
        renderer = _with_bos(tmp_path / name, template)
        bos = renderer.tokenizer.bos_token_id
        assert renderer.prompt_ids(TALK[:2]).count(bos) == wanted
        assert renderer.examples(TALK)[0].ids.count(bos) == wanted


def test_a_template_that_never_ends_a_turn_is_refused(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with pytest.raises(ModelError, match="would never stop"):
        renderer.examples(TALK[:3])


def test_a_template_whose_opening_is_no_prefix_of_the_answer_is_refused(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, CHATML.replace("assistant\n{% endif", "assistant\n<plan>{% endif"))
    with pytest.raises(ModelError, match="renders the answer differently"):
        renderer.examples(TALK[:3])


def test_a_template_that_refuses_the_messages_is_quoted(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, "{{ raise_exception('no system message here') }}")
    with pytest.raises(DataError, match="no system message here"):
        renderer.prompt_ids(TALK[:2])


@pytest.mark.parametrize("messages", [[], [TALK[1]]], ids=["empty", "question only"])
def test_a_conversation_without_an_answer_is_refused(tmp_path: Path, messages: list[Message]) -> None:
    with pytest.raises(DataError, match="assistant"):
        _renderer(tmp_path).examples(messages)


def test_an_answer_without_a_question_is_trained_or_refused_in_words(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path)
    try:
        (example,) = renderer.examples([TALK[2]])
    except DataError:
        return
    assert _trained(renderer, example) == "<think>hm</think>1<|im_end|>"


def test_a_tokenizer_without_a_template_is_refused_and_one_can_be_given(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "")
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        load_renderer(tmp_path)
    assert load_renderer(tmp_path, CHATML).prompt_ids(TALK[:2])


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_renderer(tmp_path)


def test_generation_config_names_further_end_tokens(tmp_path: Path) -> None:
    before = _renderer(tmp_path)
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
    here, there = _renderer(tmp_path / "a"), _renderer(tmp_path / "b")
    assert here.digest == there.digest
    given = load_renderer(tmp_path / "a", CHATML.replace("\n{% endfor", "{% endfor"))
    assert given.digest != here.digest
    here.examples(TALK)
    assert load_renderer(tmp_path / "a").digest == here.digest


def test_decoding_leaves_special_tokens_out(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path)
    assert renderer.decode(renderer.prompt_ids([TALK[1]])) == "user\none?\nassistant\n"
