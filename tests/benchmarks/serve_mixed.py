"""Tokens per second of the embedded engine: the base against transformers, mixtures of adapters against the base and PEFT.

    python -m tests.benchmarks.serve_mixed [--base DIR] [--rounds 5] [--threads 2] [--arms base16 generate16 ...]

All arms run in turn in one process, round after round; ratios are medians over the rounds of ratios within a round. 16
requests (or one) with prompts of 60 tokens, 64 new tokens each, greedy, bfloat16; adapters of ranks 8 and 16 on all linear
layers, with random weights. Beside the ratios of mixtures stands the limit that bytes alone set: a decode step reads every
weight of the base, and here every adapter's too. The engine's requests are submitted at once and prefilled as they are
served; for `generate` they are one static batch. Prints a table, and the ratios as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from service.base_models import resolve_base_model
from service.inference.engine import GenerationRequest, SamplingParams
from service.inference.torch_engine import TorchEngine
from service.settings import load_settings

ROWS, PROMPT, NEW = 16, 60, 64
RANKS = (8, 16)
# name of the ratio: (arm above, arm below), in tokens per second
RATIOS = {
    "base_over_generate16": ("base16", "generate16"),
    "base_over_generate1": ("base1", "generate1"),
    "base_over_continuous16": ("base16", "continuous16"),
    "mixed4_over_base": ("mixed4", "base16"),
    "mixed8_over_base": ("mixed8", "base16"),
    "unused_over_disabled": ("unused", "base16"),
    "distinct_over_identical": ("mixed4", "identical4"),
    "mixed4_over_peft": ("mixed4", "peft4"),
}


class Arms:
    """Every arm makes ROWS (or one) answers of NEW tokens and returns their number of tokens."""

    def __init__(self, base: Path, directory: Path) -> None:
        self.base = base
        torch.manual_seed(0)
        self._engine: TorchEngine | None = None
        self._generator: Any = None
        self._peft: Any = None
        self.prompts = torch.randint(1000, 20_000, (ROWS, PROMPT)).tolist()
        self.adapters = random_adapters(base, directory, 8)

    @property
    def engine(self) -> TorchEngine:
        """Ours, with as many slots as there are requests."""
        if self._engine is None:
            self._engine = TorchEngine(
                self.base, tokenizer=NoText(), stop_ids=(), dtype=torch.bfloat16, num_slots=ROWS, max_context=512
            )
        return self._engine

    def resident(self, count: int) -> list[str]:
        """Make so many adapters resident, and no others."""
        wanted = list(self.adapters)[:count]
        for digest in set(self.engine.adapters()) - set(wanted):
            self.engine.unload_adapter(digest)
        for digest in wanted:
            self.engine.load_adapter(digest, self.adapters[digest])
        while self.engine.step():  # it arranges what is resident while it runs
            pass
        return wanted

    def answer(self, owners: Sequence[str | None]) -> Callable[[], int]:
        """One request for each of these adapters."""
        sampling = SamplingParams(max_tokens=NEW, temperature=0.0)
        requests = [
            GenerationRequest(str(row), tuple(self.prompts[row]), sampling, owner) for row, owner in enumerate(owners)
        ]

        def run() -> int:
            self.engine.generate(requests)
            return NEW * len(requests)

        return run

    def prepare(self, arm: str) -> Callable[[], int]:
        """What the clock runs over."""
        rows = 1 if arm.endswith("1") and not arm.endswith("11") else ROWS
        if arm in ("base16", "base1"):
            self.resident(0)
            return self.answer([None] * rows)
        if arm == "unused":
            self.resident(4)
            return self.answer([None] * rows)
        if arm in ("mixed4", "mixed8"):
            mine = self.resident(int(arm[-1]))
            return self.answer([mine[row % len(mine)] for row in range(rows)])
        if arm == "identical4":
            mine = self.resident(4)
            return self.answer([mine[0]] * rows)
        if arm == "peft4":
            return self.peft4
        return {"generate16": self.generate16, "generate1": self.generate1, "continuous16": self.continuous16}[arm]

    def generate16(self) -> int:
        """transformers' generate on one static batch."""
        return self._generate(self._plain(), self.prompts)

    def generate1(self) -> int:
        """The same with one row."""
        return self._generate(self._plain(), self.prompts[:1])

    def continuous16(self) -> int:
        """transformers' continuous batching."""
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
        answers = self._plain().generate_batch(inputs=self.prompts, generation_config=config, progress_bar=False)
        return sum(len(answer.generated_tokens) for answer in answers.values())

    def peft4(self) -> int:
        """PEFT's mixed batch: generate(adapter_names=...)."""
        mine = list(self.adapters)[:4]
        if self._peft is None:
            from peft import PeftModel

            self._peft = PeftModel.from_pretrained(_causal(self.base), self.adapters[mine[0]], adapter_name=mine[0])
            for digest in mine[1:]:
                self._peft.load_adapter(self.adapters[digest], adapter_name=digest)
            self._peft.to(torch.bfloat16).eval()
        return self._generate(self._peft, self.prompts, adapter_names=[mine[row % 4] for row in range(ROWS)])

    def _plain(self) -> Any:
        if self._generator is None:
            self._generator = _causal(self.base)
        return self._generator

    def _generate(self, model: Any, prompts: list[list[int]], **options: Any) -> int:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW,
                do_sample=False, pad_token_id=0, **options,
            )  # fmt: skip
        assert out.shape[1] == PROMPT + NEW
        return NEW * len(prompts)


def bytes_limit(base: Path, adapters: Sequence[Path]) -> float:
    """The part of the bytes read in a decode step that are the base's, all stored alike."""
    own = _elements(base)
    return own / (own + sum(map(_elements, adapters)))


def _elements(directory: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


class NoText:
    """In place of a tokenizer: text is not what is measured here, and the peers make none."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """As many letters as tokens."""
        return "x" * len(ids)


def _causal(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()


def random_adapters(base: Path, directory: Path, count: int, ranks: Sequence[int] = RANKS) -> dict[str, Path]:
    """PEFT adapters with random weights, of these ranks in turn."""
    from peft import LoraConfig, get_peft_model

    found = {}
    for number in range(count):
        torch.manual_seed(number)
        rank = ranks[number % len(ranks)]
        model = get_peft_model(_causal(base), LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        name = f"adapter{number}"
        model.save_pretrained(directory / name)
        found[name] = directory / name
    return found


def main() -> None:
    """Run the arms in turn and print the table and the ratios."""
    everything = sorted({arm for pair in RATIOS.values() for arm in pair})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a directory with a causal language model; the bundled SmolLM2 unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=everything, default=everything)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    base = Path(given.base or resolve_base_model("smollm2-135m-instruct", load_settings().cache, None).path)
    directory = Path(tempfile.mkdtemp())
    speeds: dict[str, list[float]] = {arm: [] for arm in given.arms}
    try:
        arms = Arms(base, directory)
        for number in range(given.rounds + 1):  # the first warms up
            for arm in given.arms:
                work = arms.prepare(arm)
                started = time.perf_counter()
                tokens = work()
                if number:
                    speeds[arm].append(tokens / (time.perf_counter() - started))
        limits = {
            f"mixed{count}_limit": round(bytes_limit(base, list(arms.adapters.values())[:count]), 3) for count in (4, 8)
        }
    finally:
        shutil.rmtree(directory)
    print(f"{'arm':>14}  tokens/s (median of {given.rounds}; least to most)")
    for arm, seen in speeds.items():
        print(f"{arm:>14}  {statistics.median(seen):8.1f}  ({min(seen):.1f} to {max(seen):.1f})")
    ratios = {
        name: round(statistics.median(a / b for a, b in zip(speeds[above], speeds[below], strict=True)), 3)
        for name, (above, below) in RATIOS.items()
        if above in speeds and below in speeds
    }
    print(json.dumps(ratios | limits))


if __name__ == "__main__":
    main()
