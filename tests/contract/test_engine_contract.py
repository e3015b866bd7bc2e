"""What every engine does through the protocol, against PEFT and transformers' generate in float32, one request at a time.

Runs on the embedded engine; `make test-vllm` runs the same on vLLM's CPU build, in an environment of its own. The model is
random and tiny, the adapters are so strong that each answers differently. What one engine does on top is in its own tests.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.errors import ConflictError, ModelError, NotFoundError, RequestError
from service.inference.engine import Chunk, Engine, GenerationRequest, SamplingParams
from tests.integration.tiny import save_adapter, save_base
from tests.integration.waiting import wait_until

ENGINES = ["torch", *(["vllm"] if find_spec("vllm") else [])]
RANKS = {"a": 2, "b": 4, "c": 8}
PROMPTS = ("the fox", "to be or", "lazy dog, lazy", "0123456789")
NUM_NEW, NUM_SLOTS, CONTEXT = 24, 4, 256
DEADLINE_S = 120.0
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0.0)
# peft 0.21 asks transformers 5.23 for a property that has a new name there.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Models:
    """A base, three adapters, and what PEFT and generate answer with them."""

    def __init__(self, directory: Path) -> None:
        self.base = save_base(directory / "base", num_attention_heads=2, num_key_value_heads=1)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.base)
        self.adapters = {digest: save_adapter(self.base, directory / digest, r, r) for digest, r in RANKS.items()}
        self.prompts = [tuple(self.tokenizer.encode(text)) for text in PROMPTS]
        self.answers = {(d, n): self.answer(self.prompts[n], d) for d in (None, *RANKS) for n in range(len(PROMPTS))}

    def reference(self, adapter: str | None, directory: Path | None = None) -> Any:
        """transformers' model, with PEFT's adapter on it."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        if adapter:
            model = PeftModel.from_pretrained(model, directory or self.adapters[adapter])
        return model.eval()

    @torch.inference_mode()
    def answer(self, prompt: tuple[int, ...], adapter: str | None, directory: Path | None = None) -> tuple[int, ...]:
        """The greedy tokens of this request alone."""
        ids = torch.tensor([prompt])
        out = self.reference(adapter, directory).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False
        )
        return tuple(out[0, len(prompt) :].tolist())

    @torch.inference_mode()
    def logprobs(self, ids: tuple[int, ...], adapter: str | None) -> torch.Tensor:
        """The distribution [T, V] after each token."""
        return self.reference(adapter)(torch.tensor([ids])).logits[0].float().log_softmax(-1)  # type: ignore[no-any-return]

    def text(self, ids: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


@dataclasses.dataclass
class Answer:
    """Collects the chunks of one request; cancels it, if so told, once it has begun."""

    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    first: threading.Event = dataclasses.field(default_factory=threading.Event)
    done: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __call__(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.first.set()
        if chunk.finish_reason:
            self.done.set()

    def ended(self) -> Answer:
        assert self.done.wait(DEADLINE_S)
        return self

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token for chunk in self.chunks for token in chunk.token_ids)

    @property
    def reason(self) -> str | None:
        return self.chunks[-1].finish_reason


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def make(kind: str, models: Models, **options: Any) -> Engine:
    """An engine of this kind with three places for adapters of rank 8."""
    settings = {"tokenizer": models.tokenizer, "stop_ids": [models.tokenizer.eos_token_id], "max_context": CONTEXT}
    settings |= {"num_slots": NUM_SLOTS, "max_lora_columns": 24, "prefix_bytes": 2**22} | options
    if kind == "torch":
        from service.inference.torch_engine import TorchEngine

        return TorchEngine(models.base, **settings)
    from serve.vllm_engine import VllmEngine

    return VllmEngine(models.base, max_lora_rank=8, **settings)


@pytest.fixture(scope="module", params=ENGINES)
def shared(request: pytest.FixtureRequest, models: Models) -> Iterator[Engine]:
    engine = make(request.param, models)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def engine(shared: Engine, models: Models) -> Iterator[Engine]:
    """With the three adapters resident, and idle again at the end."""
    for digest, directory in models.adapters.items():
        shared.load_adapter(digest, directory)
    yield shared
    wait_until(lambda: shared.stats().num_running + shared.stats().num_waiting == 0, "the engine is idle", DEADLINE_S)
    shared.check()


_names = (f"request-{number}" for number in range(10**6))


def ask(engine: Engine, prompt: tuple[int, ...], adapter: str | None, sampling: SamplingParams = GREEDY) -> Answer:
    answer = Answer()
    engine.submit(GenerationRequest(next(_names), prompt, sampling, adapter), answer)
    return answer


def greedy(**options: Any) -> SamplingParams:
    return dataclasses.replace(GREEDY, **options)


def test_the_adapters_of_this_file_are_strong(models: Models) -> None:
    for number in range(len(PROMPTS)):
        assert len({models.answers[digest, number] for digest in (None, *RANKS)}) == 4


def test_a_mixed_batch_equals_peft_one_request_at_a_time(engine: Engine, models: Models) -> None:
    """Four times as many requests as slots: some wait, and join those that run."""
    asked = {(d, n): ask(engine, models.prompts[n], d) for n in range(len(PROMPTS)) for d in (None, *RANKS)}
    for key, answer in asked.items():
        assert answer.ended().ids == models.answers[key]
        assert answer.text == models.text(models.answers[key])
        assert answer.reason == "length"
        assert {chunk.num_prompt_tokens for chunk in answer.chunks} == {len(models.prompts[key[1]])}
        assert [chunk.finish_reason for chunk in answer.chunks[:-1]] == [None] * (len(answer.chunks) - 1)


def test_an_answer_comes_in_pieces(engine: Engine, models: Models) -> None:
    assert len(ask(engine, models.prompts[0], "a").ended().chunks) > NUM_NEW // 2


def test_adapters_come_and_go_while_others_answer(engine: Engine, models: Models) -> None:
    """More loads than there are places, so each unload must have freed its own."""
    running: list[tuple[str | None, int, Answer]] = []
    for turn in range(6):
        running += [(d, n, ask(engine, models.prompts[n], d)) for n in range(2) for d in ("a", None)]
        engine.unload_adapter("b" if turn % 2 == 0 else "c")
        digest = f"x{turn}"
        info = engine.load_adapter(digest, models.adapters["b"])
        assert info.rank == 4 and engine.adapters()[digest] == info
        running += [("b", 3, ask(engine, models.prompts[3], digest))]
        running[-1][2].ended()
        engine.unload_adapter(digest)
        engine.load_adapter("b" if turn % 2 == 0 else "c", models.adapters["b" if turn % 2 == 0 else "c"])
    for source, number, answer in running:
        assert answer.ended().ids == models.answers[source, number]
    assert set(engine.adapters()) == set(RANKS)


def test_an_adapter_in_use_stays_and_an_absent_one_is_an_error(engine: Engine, models: Models) -> None:
    free = engine.free_columns
    answer = ask(engine, models.prompts[0], "c", greedy(max_tokens=200))
    with pytest.raises(ConflictError, match="in use by 1 request"):
        engine.unload_adapter("c")
    assert answer.ended().ids[:NUM_NEW] == models.answers["c", 0]
    engine.unload_adapter("c")
    assert engine.free_columns > free
    with pytest.raises(NotFoundError, match="c is not resident"):
        ask(engine, models.prompts[0], "c")
    with pytest.raises(NotFoundError, match="c is not resident"):
        engine.unload_adapter("c")


def test_loading_twice_is_once_and_a_full_engine_says_so(engine: Engine, models: Models, tmp_path: Path) -> None:
    assert engine.load_adapter("c", models.adapters["c"]) == engine.adapters()["c"]
    filling = 0
    while engine.free_columns >= RANKS["c"]:
        engine.load_adapter(f"full{filling}", models.adapters["c"])
        filling += 1
    with pytest.raises(ConflictError, match=r"columns, \d+ free: unload another first"):
        engine.load_adapter("d", save_adapter(models.base, tmp_path / "d", 9, 8))
    for number in range(filling):
        engine.unload_adapter(f"full{number}")
    assert set(engine.adapters()) == set(RANKS)


def test_a_prompt_seen_before_is_not_computed_again_and_changes_nothing(engine: Engine, models: Models) -> None:
    prompt = tuple((7 * i) % 90 for i in range(200))
    expected = {digest: models.answer(prompt, digest) for digest in ("a", None)}
    cached: dict[str | None, list[int]] = {"a": [], None: []}
    for digest in ("a", None, "a", None):
        answer = ask(engine, prompt, digest).ended()
        assert answer.ids == expected[digest]
        cached[digest].append(answer.chunks[-1].num_cached_tokens)
    assert all(first == 0 and 100 < second < 200 for first, second in cached.values())


@pytest.mark.parametrize("waits", [False, True])
def test_a_cancelled_request_ends_and_frees_its_place(engine: Engine, models: Models, waits: bool) -> None:
    long = greedy(max_tokens=220)
    answers = []
    for number in range(NUM_SLOTS + 1):
        answers.append(Answer())
        engine.submit(GenerationRequest(f"long{waits}{number}", models.prompts[0], long, "a"), answers[-1])
    assert answers[0].first.wait(DEADLINE_S)
    cancelled = NUM_SLOTS if waits else 0
    engine.cancel(f"long{waits}{cancelled}")
    answer = answers[cancelled].ended()
    assert answer.reason == "cancelled" and len(answer.ids) < 220
    assert answer.ids[:NUM_NEW] == models.answers["a", 0][: len(answer.ids)]
    for number in range(NUM_SLOTS + 1):
        engine.cancel(f"long{waits}{number}")
        answers[number].ended()
    engine.cancel("nobody")
    engine.unload_adapter("a")


def test_stop_ids_and_stop_strings_end_an_answer(engine: Engine, models: Models) -> None:
    expected = models.answers[None, 1]
    stop = expected[5]
    answer = ask(engine, models.prompts[1], None, greedy(stop_ids=(stop,))).ended()
    assert answer.reason == "stop" and answer.ids == expected[: expected.index(stop) + 1]
    assert answer.text == models.text(expected[: expected.index(stop)])
    text = models.text(expected)
    for size in (1, 4):
        answer = ask(engine, models.prompts[1], None, greedy(stop=(text[9 : 9 + size], "never"))).ended()
        assert answer.reason == "stop" and answer.text == text[: text.index(text[9 : 9 + size])]


def test_the_models_own_stop_token_ends_an_answer_unless_it_is_ignored(engine: Engine, models: Models) -> None:
    eos = models.tokenizer.eos_token_id
    wanted = greedy(max_tokens=3, logit_bias=((eos, 50.0), (eos, 50.0)))
    answer = ask(engine, models.prompts[0], "a", wanted).ended()
    assert (answer.reason, answer.ids, answer.text) == ("stop", (eos,), "")
    answer = ask(engine, models.prompts[0], "a", dataclasses.replace(wanted, ignore_eos=True)).ended()
    assert (answer.reason, answer.ids) == ("length", (eos,) * 3)


@pytest.mark.parametrize("kind", ENGINES)
def test_without_a_seed_two_engines_draw_different_answers(models: Models, kind: str) -> None:
    """The first answer of each. By chance they would agree in far less than one run of a million."""
    drawn = []
    for _ in range(2):
        engine = make(kind, models, max_lora_columns=0, num_slots=1)
        engine.start()
        drawn.append(ask(engine, models.prompts[0], None, SamplingParams(max_tokens=NUM_NEW)).ended().ids)
        engine.close()
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("nucleus", [{"top_p": 0.95}, {"min_p": 0.001}], ids=str)
def test_a_seed_repeats_itself_whatever_shares_the_batch(
    engine: Engine, models: Models, nucleus: dict[str, Any]
) -> None:
    def drawn(seed: int) -> SamplingParams:
        return SamplingParams(max_tokens=NUM_NEW, temperature=1.0, top_k=50, seed=seed, **nucleus)

    alone = {seed: ask(engine, models.prompts[0], "b", drawn(seed)).ended().ids for seed in (-1, 3, 4)}
    assert len(set(alone.values())) == 3
    for digest in ("a", None):
        ask(engine, models.prompts[1], digest, SamplingParams(max_tokens=NUM_NEW))
    again = {seed: ask(engine, models.prompts[0], "b", drawn(seed)) for seed in alone}
    assert {seed: answer.ended().ids for seed, answer in again.items()} == alone


def test_penalties_change_an_answer_as_they_should(engine: Engine, models: Models) -> None:
    free = ask(engine, models.prompts[0], None, greedy(max_tokens=60)).ended().ids
    for options in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 5.0}):
        ids = ask(engine, models.prompts[0], None, greedy(max_tokens=60, **options)).ended().ids
        assert len(set(ids)) > len(set(free))


@pytest.mark.parametrize("digest", [None, "b"])
def test_log_probabilities_are_the_models_own(engine: Engine, models: Models, digest: str | None) -> None:
    prompt = tuple((11 * i) % 90 for i in range(90))
    busy = ask(engine, models.prompts[0], "a", greedy(max_tokens=100))
    for max_tokens in (0, 4):
        sampling = greedy(max_tokens=max_tokens, prompt_logprobs=3, logprobs=2)
        answer = ask(engine, prompt, digest, sampling).ended()
        expected_TV = models.logprobs(prompt + answer.ids, digest)
        scored = answer.chunks[0].prompt_logprobs
        assert scored[0].logprob is None and not any(chunk.prompt_logprobs for chunk in answer.chunks[1:])
        chosen = [entry for chunk in answer.chunks for entry in chunk.logprobs]
        entries, num_top = [*scored, *chosen], [3] * len(scored) + [2] * len(chosen)
        assert tuple(entry.token_id for entry in entries) == prompt + answer.ids
        assert answer.reason == "length" and len(answer.ids) == max_tokens == len(chosen)
        for place, entry in enumerate(entries[1:], start=1):
            before_V = expected_TV[place - 1]
            assert entry.logprob == pytest.approx(float(before_V[entry.token_id]), abs=2e-3)
            assert [token for token, _ in entry.top] == before_V.topk(num_top[place]).indices.tolist()
            assert [lp for _, lp in entry.top] == pytest.approx(before_V.topk(num_top[place]).values.tolist(), abs=2e-3)
    busy.ended()


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["lost", "broken"]}, "urgent": {"type": "boolean"}},
    "required": ["kind", "urgent"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("options", [{}, {"ignore_eos": True}, {"temperature": 1.5, "seed": 1}], ids=str)
def test_an_answer_under_a_schema_is_json_of_that_schema(
    engine: Engine, models: Models, options: dict[str, Any]
) -> None:
    """The random model would write blanks for ever, which JSON allows, and vLLM's llguidance without a limit."""
    free = ask(engine, models.prompts[0], "a")
    blanks = tuple((token, -100.0) for token in models.tokenizer.encode(" \n"))
    sampling = greedy(max_tokens=200, json_schema=json.dumps(SCHEMA), logit_bias=blanks, **options)
    for digest in ("a", None):
        answer = ask(engine, models.prompts[1], digest, sampling).ended()
        value = json.loads(answer.text)
        assert answer.reason == "stop" and set(value) == {"kind", "urgent"}
        assert value["kind"] in ("lost", "broken") and value["urgent"] in (True, False)
    assert free.ended().ids == models.answers["a", 0]


def test_json_that_takes_all_its_tokens_ends_with_stop(engine: Engine, models: Models) -> None:
    blanks = tuple((token, -100.0) for token in models.tokenizer.encode(" \n"))
    whole, scores = greedy(max_tokens=200, json_schema=json.dumps(SCHEMA), logit_bias=blanks), []
    for _ in range(2):
        answer = ask(engine, models.prompts[1], "a", whole).ended()
        assert answer.reason == "stop" and answer.ids[-1] != models.tokenizer.eos_token_id
        scores.append((answer.ids, json.loads(answer.text)))
        whole = dataclasses.replace(whole, max_tokens=len(answer.ids))
    assert scores[0] == scores[1]
    short = ask(engine, models.prompts[1], "a", dataclasses.replace(whole, max_tokens=whole.max_tokens - 1)).ended()
    assert short.reason == "length"


def test_a_request_that_cannot_be_served_is_refused_at_submit(engine: Engine, models: Models) -> None:
    bad = [
        ((1,) * (CONTEXT - NUM_NEW + 1), GREEDY, f"the context holds {CONTEXT}"),
        ((), GREEDY, "empty"),
        ((len(models.tokenizer),), GREEDY, "outside 0 to"),
        ((1,), greedy(logit_bias=((10**6, 1.0),)), "logit_bias holds token ids outside"),
        ((1,), greedy(json_schema='{"type": "nonsense"}'), "nonsense"),
        ((1,), greedy(json_schema="["), "cannot be followed"),
    ]
    for prompt, sampling, words in bad:
        with pytest.raises(RequestError, match=words):
            ask(engine, prompt, None, sampling)
    answer = Answer()
    engine.submit(GenerationRequest("twice", models.prompts[0], greedy(max_tokens=100), None), answer)
    with pytest.raises(ConflictError, match="in flight already"):
        engine.submit(GenerationRequest("twice", models.prompts[0], GREEDY, None), Answer())
    answer.ended()


def _edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file(
        {name: change(name, t).contiguous() for name, t in tensors.items()}, directory / "adapter_model.safetensors"
    )


BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "config": (
        lambda d: _edit_config(d, use_dora=True, modules_to_save=["lm_head"], bias="all", use_warp_drive=True),
        ["use_dora", "modules_to_save", "bias is 'all'", "use_warp_drive"],
    ),
    "pickled": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        ["adapter_model.bin", "only safetensors"],
    ),
    "not finite": (lambda d: _edit_tensors(d, lambda _, t: t * float("nan")), ["holds NaN"]),
    "another base": (
        lambda d: _edit_tensors(d, lambda name, t: t[:, :-1] if "lora_A" in name else t),
        ["wanted [2, 64]"],
    ),
    "rank": (lambda d: _edit_config(d, r=999), ["has rank 999, this engine holds at most"]),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_adapter_is_refused_with_all_reasons_and_changes_nothing(
    engine: Engine, models: Models, tmp_path: Path, case: str
) -> None:
    damage, words = BAD[case]
    directory = shutil.copytree(models.adapters["a"], tmp_path / "bad")
    damage(directory)
    answer = ask(engine, models.prompts[0], "b")
    before = (engine.adapters(), engine.free_columns)
    for take in (engine.read_adapter, engine.load_adapter):
        with pytest.raises(ModelError) as caught:
            take("bad", directory)
        assert [word for word in words if word not in caught.value.message] == []
    assert (engine.adapters(), engine.free_columns) == before
    assert answer.ended().ids == models.answers["b", 0]


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
    ids=["rslora", "patterns", "some modules"],
)
def test_scaling_patterns_and_targets_are_those_of_peft(
    engine: Engine, models: Models, tmp_path: Path, options: dict[str, Any]
) -> None:
    directory = save_adapter(models.base, tmp_path / "x", 9, 3, **options)
    engine.unload_adapter("c")
    engine.load_adapter("x", directory)
    answers = [ask(engine, prompt, "x") for prompt in models.prompts]
    assert [a.ended().ids for a in answers] == [models.answer(p, "x", directory) for p in models.prompts]
    engine.unload_adapter("x")


@pytest.mark.parametrize("kind", ENGINES)
def test_an_adapter_that_overflows_never_makes_an_answer_wrong(models: Models, tmp_path: Path, kind: str) -> None:
    """Its own end as errors. Beside it, an answer is right; vLLM's CPU build may end it as an error too, and says so."""
    wild = shutil.copytree(models.adapters["a"], tmp_path / "wild")
    _edit_tensors(wild, lambda _, tensor: tensor * 1e25)
    engine = make(kind, models)
    engine.start()
    for name, directory in {"a": models.adapters["a"], "b": models.adapters["b"], "wild": wild}.items():
        engine.load_adapter(name, directory)
    spoilt: list[str | None] = []
    for _ in range(2):  # the second time on the memory that the first one left
        good = [(d, ask(engine, models.prompts[0], d)) for d in ("b", None)]
        bad = [ask(engine, prompt, "wild") for prompt in models.prompts]
        good += [(d, ask(engine, models.prompts[0], d)) for d in ("a", "b", None)]
        bad.append(ask(engine, models.prompts[0], "wild", greedy(max_tokens=0, prompt_logprobs=1)))
        for answer in bad:
            assert answer.ended().reason == "error" and "not finite" in str(answer.chunks[-1].error)
        for digest, answer in good:
            if answer.ended().reason == "error":
                spoilt.append(digest)
            assert answer.ids == models.answers[digest, 0][: len(answer.ids)]
    if kind == "torch":
        assert spoilt == []
        engine.check()
    else:
        with pytest.raises(RuntimeError, match="not finite in vLLM's key-value memory"):
            engine.check()
    engine.close()


@pytest.mark.skipif("vllm" not in ENGINES, reason="vLLM is not installed here: make test-vllm")
def test_vllm_refuses_what_it_would_do_otherwise_and_its_death_is_noticed(models: Models) -> None:
    engine = make("vllm", models, max_lora_columns=8, num_slots=1, stall_after_s=1.0)
    try:
        for options, words in (
            ({"temperature": 0.001}, "vLLM takes 0 .greedy., or 0.01 and more"),
            (
                {"logit_bias": ((1, 1.0),), "repetition_penalty": 1.1},
                "logit_bias and repetition_penalty .* another order",
            ),
            ({"temperature": 1.0, "min_p": 0.1, "top_p": 0.9}, "min_p and top_p together: .* another order"),
            ({"json_schema": json.dumps(SCHEMA), "logprobs": 0}, "logprobs and a JSON schema"),
            ({"logit_bias": ((1, 1.0),) * 1025}, "logit_bias has 1025 tokens: vLLM takes 1024"),
        ):
            with pytest.raises(RequestError, match=words):
                ask(engine, models.prompts[0], None, greedy(**options))
        with pytest.raises(RequestError, match=f"fills the context of {CONTEXT} tokens"):
            ask(engine, (1,) * CONTEXT, None, greedy(max_tokens=0, prompt_logprobs=1))
        answer = ask(engine, models.prompts[0], None, greedy(max_tokens=200))
        assert answer.first.wait(DEADLINE_S)
        engine.check()
        (process,) = engine.process_ids  # type: ignore[attr-defined]
        os.kill(process, signal.SIGSTOP)
        wait_until(lambda: not _is_well(engine), "a process that hangs is noticed", DEADLINE_S)
        os.kill(process, signal.SIGCONT)
        wait_until(lambda: _is_well(engine), "it goes on", DEADLINE_S)
        os.kill(process, signal.SIGKILL)
        assert answer.ended().reason == "error"
        with pytest.raises(RuntimeError, match="process has died"):
            engine.check()
        with pytest.raises(RuntimeError, match="process has died"):
            engine.load_adapter("a", models.adapters["a"])
    finally:
        engine.close()


def _is_well(engine: Engine) -> bool:
    try:
        engine.check()
    except RuntimeError as error:
        assert "has not finished a step for" in str(error)
        return False
    return True


@pytest.mark.skipif("vllm" not in ENGINES, reason="vLLM is not installed here: make test-vllm")
def test_vllm_does_not_outlive_a_replica_that_is_killed(models: Models) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from transformers import AutoTokenizer;"
        "from serve.vllm_engine import VllmEngine; base = Path(sys.argv[1]);"
        "engine = VllmEngine(base, tokenizer=AutoTokenizer.from_pretrained(base), stop_ids=(), max_context=64);"
        "print(*engine.process_ids, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(models.base)],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == -signal.SIGKILL
    pids = [int(word) for word in done.stdout.splitlines()[-1].split()]
    assert pids
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "vLLM's processes end", DEADLINE_S)


def test_what_runs_and_what_waits_is_counted(engine: Engine, models: Models) -> None:
    answers = [ask(engine, models.prompts[0], "a", greedy(max_tokens=200)) for _ in range(NUM_SLOTS + 3)]
    wait_until(lambda: engine.stats().num_running == NUM_SLOTS, "all slots are taken", DEADLINE_S)
    assert engine.stats().num_waiting == 3
    for answer in answers:
        assert answer.ended().ids[:NUM_NEW] == models.answers["a", 0]


def test_one_busy_adapter_starves_nobody(engine: Engine, models: Models) -> None:
    ended: list[str] = []
    answers = [ask(engine, models.prompts[0], "a") for _ in range(30)]
    assert answers[0].first.wait(DEADLINE_S)

    class Noted(Answer):
        def __call__(self, chunk: Chunk) -> None:
            super().__call__(chunk)
            if chunk.finish_reason:
                ended.append(f"after {sum(answer.done.is_set() for answer in answers)}")

    quiet = Noted()
    engine.submit(GenerationRequest("quiet", models.prompts[0], GREEDY, "b"), quiet)
    assert quiet.ended().ids == models.answers["b", 0]
    assert int(ended[0].removeprefix("after ")) <= 4 * NUM_SLOTS
    for answer in answers:
        answer.ended()


def test_a_prompt_seen_before_weighs_little_in_the_turns(engine: Engine, models: Models) -> None:
    """Long prompts that are not computed again have nearly as many turns as short ones; charged whole, a fifth."""
    long = tuple((7 * i) % 90 for i in range(150))
    ask(engine, long, "a").ended()
    ended: dict[str, int] = {"a": 0, "b": 0}
    seen: list[int] = []  # answers of a, when each of b ended

    class Counted(Answer):
        def __init__(self, digest: str) -> None:
            super().__init__()
            self.digest = digest

        def __call__(self, chunk: Chunk) -> None:
            if chunk.finish_reason:
                ended[self.digest] += 1
                if self.digest == "b":
                    seen.append(ended["a"])
            super().__call__(chunk)

    answers = []
    for number in range(60):
        digest, prompt = ("a", long) if number % 2 else ("b", models.prompts[0])
        answers.append(Counted(digest))
        engine.submit(GenerationRequest(f"turn{number}", prompt, GREEDY, digest), answers[-1])
    for answer in answers:
        answer.ended()
    assert seen[19] >= 9


def test_a_listener_that_fails_ends_its_own_request_only(engine: Engine, models: Models) -> None:
    def broken(chunk: Chunk) -> None:
        raise LookupError("a listener's own mistake")

    engine.submit(GenerationRequest("broken", models.prompts[0], greedy(max_tokens=200), "a"), broken)
    assert ask(engine, models.prompts[0], "b").ended().ids == models.answers["b", 0]
    wait_until(lambda: engine.stats().num_running == 0, "the request of the broken listener is gone", DEADLINE_S)


@pytest.mark.parametrize("kind", ENGINES)
def test_closing_ends_what_is_in_flight(models: Models, kind: str) -> None:
    engine = make(kind, models, num_slots=1, max_lora_columns=0, prefix_bytes=0)
    engine.start()
    answers = [ask(engine, models.prompts[0], None, greedy(max_tokens=240)) for _ in range(2)]
    assert answers[0].first.wait(DEADLINE_S)
    engine.close()
    assert [answer.ended().reason for answer in answers] == ["cancelled", "cancelled"]
    with pytest.raises(ConflictError, match="closed"):
        ask(engine, models.prompts[0], None)
    engine.cancel("x")
    engine.close()
