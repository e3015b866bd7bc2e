"""bfloat16 on a real model: the engine's log-probabilities are as near to float32's as PEFT's own are.

Two bfloat16 computations that round in another order differ by as much as either differs from float32, so the measure is
the distance to float32, teacher-forced over prompts and answers. (PEFT's batches of 1 and of 16 run the same kernels in
the same order and are far nearer to each other than to float32: that says nothing about other kernels.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from service.base_models import resolve_base_model
from service.inference.engine import Chunk, GenerationRequest, SamplingParams
from service.inference.torch_engine import TorchEngine
from service.render import load_renderer

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
ROWS = Path(__file__).resolve().parents[2] / "jobs" / "recipes" / "data" / "tickets.eval.jsonl"
NUM_ROWS, NUM_NEW = 15, 24
RANKS = {"a": 4, "b": 8, "c": 16, "d": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_base_model("smollm2-135m-instruct", tmp_path_factory.mktemp("cache")).path


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    for name, rank in RANKS.items():
        torch.manual_seed(rank)
        model = get_peft_model(_causal(base), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
        for parameter, weight in model.named_parameters():
            if "lora_B" in parameter:
                torch.nn.init.normal_(weight, std=0.05)
        model.save_pretrained(directory / name)
    return {name: directory / name for name in RANKS}


def _causal(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


class Reference:
    """PEFT with all adapters, one row at a time."""

    def __init__(self, base: Path, adapters: dict[str, Path], dtype: torch.dtype) -> None:
        first, *others = adapters
        self.model: Any = PeftModel.from_pretrained(_causal(base, dtype), adapters[first], adapter_name=first)
        for name in others:
            self.model.load_adapter(adapters[name], adapter_name=name)
        self.model.to(dtype).eval()

    @torch.inference_mode()
    def logprobs(self, ids: list[int], adapter: str | None) -> torch.Tensor:
        """The distribution [T - 1, V] before each token but the first."""
        row = torch.tensor([ids])
        logits = self.model(input_ids=row, attention_mask=torch.ones_like(row), adapter_names=[adapter or "__base__"])
        return logits.logits[0, :-1].float().log_softmax(-1)  # type: ignore[no-any-return]


def test_a_mixed_batch_is_as_near_to_float32_as_peft_is(base: Path, adapters: dict[str, Path]) -> None:
    renderer = load_renderer(base)
    rows = [json.loads(line)["messages"][:-1] for line in ROWS.read_text().splitlines()[:NUM_ROWS]]
    owners = [[None, *RANKS][number % 5] for number in range(NUM_ROWS)]
    engine = TorchEngine(
        base, tokenizer=renderer.tokenizer, stop_ids=(), dtype=torch.bfloat16, num_slots=8, max_context=256
    )
    for name, directory in adapters.items():
        engine.load_adapter(name, directory)
    chunks: dict[int, list[Chunk]] = {number: [] for number in range(NUM_ROWS)}
    prompts = [list(renderer.prompt_ids(row)) for row in rows]
    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, logprobs=0, prompt_logprobs=0)
    for number, (prompt, owner) in enumerate(zip(prompts, owners, strict=True)):
        engine.submit(GenerationRequest(str(number), tuple(prompt), sampling, owner), chunks[number].append)
    while engine.step():
        pass
    exact, peft = (Reference(base, adapters, dtype) for dtype in (torch.float32, torch.bfloat16))
    ours_off, peft_off, ignoring_off = [], [], []
    for number, (prompt, owner) in enumerate(zip(prompts, owners, strict=True)):
        answer = [token for chunk in chunks[number] for token in chunk.token_ids]
        scored = [*chunks[number][0].prompt_logprobs[1:], *(one for c in chunks[number] for one in c.logprobs)]
        ids = prompt + answer
        places, tokens = torch.arange(len(ids) - 1), torch.tensor(ids[1:])
        true_TV = exact.logprobs(ids, owner)
        true = true_TV[places, tokens]
        ours_off.append((torch.tensor([one.logprob for one in scored]) - true).abs())
        peft_off.append((peft.logprobs(ids, owner)[places, tokens] - true).abs())
        if owner:
            ignoring_off.append((exact.logprobs(ids, None)[places, tokens] - true).abs())
        # Where the answer is not float32's likeliest token, the two were nearer to each other than rounding is.
        margins = true_TV.max(-1).values[len(prompt) - 1 :] - true[len(prompt) - 1 :]
        assert margins.max() <= 2 * float(peft_off[-1].max()) + 0.1
    ours, theirs, ignoring = (torch.cat(off) for off in (ours_off, peft_off, ignoring_off))
    assert ours.mean() <= 1.2 * theirs.mean()
    assert ours.max() <= 2.0 * theirs.max()
    assert ignoring.mean() > 5 * theirs.mean()  # a server that ignored adapters could not pass
