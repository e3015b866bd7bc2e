"""Chat templates and tokenizers as families of models have them, small enough to read; for tests of the renderer."""

from __future__ import annotations

import functools
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from service.render import Renderer, load_renderer
from tests.integration.tiny import CHATML, save_tokenizer

ROOT = Path(__file__).resolve().parents[2]

OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# With a BOS of its own, two line ends after a role, and stripped contents.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# Nothing opens an answer, a space stands before it, the system's message is the first user's, and other orders are refused.
MISTRAL = (
    "{{ bos_token }}{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ (system if loop.first else '') + m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# As reasoning models do: an earlier answer's thoughts are left out.
FORGETS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}" + OPENING
)
# Thoughts are kept since the last question, through calls of tools and their results.
QWEN3 = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{{ m.content if loop.index0 > ns.last else m.content.split('</think>')[-1] }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    + OPENING
)
MARKS_THE_LAST_QUESTION = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.index0 == ns.last %}(now) "
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}" + OPENING
)
# A role's line end and an answer's first one are a single token in many vocabularies: no answer may begin inside a token.
LINE_ENDS = CHATML.replace("}}\n{{ m['content'] }}", "}}\n\n{{ m['content'] }}").replace("assistant\n", "assistant\n\n")
UNKNOWN = "<unk>"
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "forgets": FORGETS_THOUGHTS,
    "qwen3": QWEN3,
    "marks": MARKS_THE_LAST_QUESTION,
    "line ends": LINE_ENDS,
}


def renderer(directory: Path, template: str = CHATML) -> Renderer:
    """One token a character."""
    save_tokenizer(directory, template)
    return load_renderer(directory)


def with_bos(directory: Path, template: str) -> Renderer:
    """A tokenizer that puts a BOS of its own before every text, as Llama 3's does."""
    tokenizer = save_tokenizer(directory, template)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    bos = ("<|bos|>", tokenizer.convert_tokens_to_ids("<|bos|>"))
    inner = tokenizer.backend_tokenizer
    inner.post_processor = TemplateProcessing(single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[bos])
    tokenizer.save_pretrained(directory)
    loaded = load_renderer(directory)
    assert loaded.tokenizer("a")["input_ids"][0] == bos[1]
    return loaded


@functools.cache
def with_merges(template: str) -> Renderer:
    """Byte-level BPE learnt from our licence, cut into words as GPT-2 does: tokens reach across line ends and spaces."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    every_byte = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=every_byte)
    inner.train_from_iterator([_sample()], trainer)
    return _finished(inner, template)


@functools.cache
def sentencepiece(template: str, *, legacy: bool) -> Renderer:
    """As tokenizers made of SentencePiece models are: a space before every text; `legacy`: after special tokens too."""
    inner = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
    if legacy:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        spaces = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        inner.decoder = decoders.Sequence(spaces)
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        inner.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    lines = [f"{line}\n" for line in _sample().splitlines()]
    inner.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=[UNKNOWN]))
    return _finished(inner, template)


def _sample() -> str:
    return (ROOT / "LICENSE").read_text(encoding="utf-8") + "\n\n\n".join(["words", "of", "a", "text"] * 9)


def _finished(inner: Tokenizer, template: str) -> Renderer:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    named = {"eos_token": "<|im_end|>", "bos_token": "<|bos|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer.add_special_tokens(named)
    tokenizer.chat_template = template
    return Renderer(tokenizer, frozenset({tokenizer.eos_token_id}))
