"""The embedded engine against PEFT and transformers' generate, one request at a time, on tiny random models."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from service.domain import BaseBits
from service.errors import ConflictError, ModelError, NotFoundError, RequestError
from service.inference import grammar
from service.inference.engine import Chunk, GenerationRequest, SamplingParams
from service.inference.products import Packed
from service.inference.slot_attention import Piece
from service.inference.torch_engine import TorchEngine
from service.quantised import keep_unpacked, loading_options
from tests.integration.waiting import wait_until

CORPUS = ["the quick brown fox jumps over the lazy dog", "naïve café 東京 👩‍🚀", "to be or not to be"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = {"a": 2, "b": 4, "c": 8}
NUM_NEW = 24
DEADLINE_S = 60.0
# peft 0.21 asks transformers 5.23 for a property that has a new name there.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[..., Any]] = {"llama": LlamaConfig, "qwen2": Qwen2Config}


def _tokenizer() -> Any:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


TOKENIZER = _tokenizer()


def _save_base(directory: Path, config_class: Callable[..., Any], **options: Any) -> Path:
    torch.manual_seed(0)
    config = config_class(**(SHAPE | {"vocab_size": len(TOKENIZER)} | options))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def _save_adapter(base: Path, directory: Path, *, seed: int, rank: int, **options: Any) -> Path:
    torch.manual_seed(seed)
    settings = {"lora_alpha": 2 * rank, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=rank, **settings))
    for name, weight in tuned.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(directory)
    return directory


class Bench:
    """A base model, three strong adapters, and the reference's answers."""

    def __init__(self, directory: Path, config_class: Callable[..., Any]) -> None:
        self.base = _save_base(directory / "base", config_class)
        self.adapters = {
            digest: _save_adapter(self.base, directory / digest, seed=rank, rank=rank) for digest, rank in RANKS.items()
        }
        self.prompts = [tuple(TOKENIZER.encode(text)) for text in ("the fox", "to be or", "café", "lazy dog, lazy")]
        self.expected = {
            digest: [self.reference(prompt, digest) for prompt in self.prompts] for digest in (None, *RANKS)
        }

    def reference(self, prompt: tuple[int, ...], digest: str | None, directory: Path | None = None) -> str:
        """PEFT and generate, this request alone."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.base)
        if digest:
            model = PeftModel.from_pretrained(model, directory or self.adapters[digest])
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.eval().generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False
            )
        return str(TOKENIZER.decode(out[0, len(prompt) :]))

    def engine(self, *, load: bool = True, **options: Any) -> TorchEngine:
        """An engine on the base model, with the three adapters resident."""
        settings: dict[str, Any] = {"num_slots": 4, "max_context": 128, "max_lora_columns": 16} | options
        engine = TorchEngine(self.base, tokenizer=TOKENIZER, stop_ids=settings.pop("stop_ids", ()), **settings)
        for digest, directory in self.adapters.items() if load else ():
            engine.load_adapter(digest, directory)
        return engine

    def requests(self, *digests: str | None, sampling: SamplingParams | None = None) -> list[GenerationRequest]:
        """Every prompt with every one of these adapters."""
        sampling = sampling or SamplingParams(max_tokens=NUM_NEW, temperature=0.0)
        pairs = [(digest, number) for number in range(len(self.prompts)) for digest in digests]
        return [GenerationRequest(f"{d}-{n}", self.prompts[n], sampling, d) for d, n in pairs]


class Answer:
    """Collects the chunks of one request."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.first, self.done = threading.Event(), threading.Event()

    def __call__(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.first.set()
        if chunk.finish_reason:
            self.done.set()

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def reason(self) -> str | None:
        return self.chunks[-1].finish_reason if self.chunks else None


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("llama-only"), LlamaConfig)


def _submit(engine: TorchEngine, request: GenerationRequest) -> Answer:
    answer = Answer()
    engine.submit(request, answer)
    return answer


def _drain(engine: TorchEngine) -> None:
    for _ in range(1000):
        if not engine.step():
            return
    raise AssertionError("the engine still has work after 1000 steps")


def test_the_adapters_are_strong(family: Bench) -> None:
    for number in range(len(family.prompts)):
        assert len({family.expected[digest][number] for digest in family.expected}) == len(family.expected)


def test_a_mixed_batch_equals_peft_one_request_at_a_time(family: Bench) -> None:
    requests = family.requests(None, "a", "b", "c")
    answers = family.engine().generate(requests)
    assert answers == [family.expected[r.adapter][family.prompts.index(r.prompt_ids)] for r in requests]


def test_rows_that_join_and_leave_at_different_times_are_not_disturbed(family: Bench) -> None:
    engine, answers = family.engine(), {}
    for number, request in enumerate(family.requests("c", None, "a", "b")):
        answers[request] = _submit(engine, request)
        for _ in range(number % 5):
            engine.step()
    _drain(engine)
    for request, answer in answers.items():
        assert answer.text == family.expected[request.adapter][family.prompts.index(request.prompt_ids)]
        assert answer.reason == "length"
        assert sum(chunk.num_tokens for chunk in answer.chunks) == NUM_NEW
        assert {chunk.num_prompt_tokens for chunk in answer.chunks} == {len(request.prompt_ids)}


FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral with a window": (MistralConfig, {"sliding_window": 9}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "gemma2, soft caps and windows in turn": (
        Gemma2Config,
        {"head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 12, "tie_word_embeddings": False},
    ),
    "gemma3, other rotations in turn": (
        Gemma3TextConfig,
        {
            "head_dim": 12,
            "sliding_window": 7,
            "num_hidden_layers": 6,
            "query_pre_attn_scalar": 12,
            "tie_word_embeddings": False,
        },
    ),
    "phi3, fused projections": (Phi3Config, {}),
    "qwen2moe, experts that see some of the tokens": (
        Qwen2MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
}
TARGETS_OF: dict[Any, list[str]] = {
    Phi3Config: ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    Qwen2MoeConfig: ["q_proj", "k_proj", "v_proj", "o_proj"],
}  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
def test_other_decoder_families_decode_as_generate_does(tmp_path: Path, family: str) -> None:
    config_class, options = FAMILIES[family]
    base = _save_base(tmp_path / "base", config_class, **options)
    targets = TARGETS_OF.get(config_class, TARGETS)
    adapter = _save_adapter(base, tmp_path / "a", seed=1, rank=3, target_modules=targets)
    engine = TorchEngine(base, tokenizer=TOKENIZER, stop_ids=(), num_slots=3, max_context=128)
    engine.load_adapter("a", adapter)
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    prompts = [tuple(TOKENIZER.encode(text)) for text in ("to be or not to be, the lazy dog", "café")]
    requests = [GenerationRequest(f"{n}{d}", ids, sampling, d) for n, ids in enumerate(prompts) for d in (None, "a")]
    expected = []
    for request in requests:
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        model = PeftModel.from_pretrained(model, adapter) if request.adapter else model
        ids = torch.tensor([request.prompt_ids])
        out = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, use_cache=False
        )
        expected.append(TOKENIZER.decode(out[0, ids.shape[1] :]))
    assert engine.generate(requests) == expected
    assert expected[0] != expected[1]
    if config_class is Qwen2MoeConfig:  # whose token is whose cannot be told within an expert
        wide = _save_adapter(
            base, tmp_path / "wide", seed=1, rank=3, target_modules=[*targets, "shared_expert.up_proj"]
        )
        with pytest.raises(ModelError, match=r"shared_expert\.up_proj: the base model has no such linear layer"):
            engine.load_adapter("wide", wide)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes", "ignore:MatMul8bitLt.*:UserWarning")
def test_a_quantised_base_serves_with_exact_adapters_on_top(llama: Bench, bits: BaseBits) -> None:
    """Against PEFT on the same quantised base, one request at a time; and a row does not feel the batch in 8 bits either."""
    options = loading_options(bits, torch.float32, double_quant=True, alone=True)
    engine = llama.engine(base_bits=bits)
    requests = llama.requests(None, "a", "c")
    expected = []
    for request in requests:
        model: Any = AutoModelForCausalLM.from_pretrained(llama.base, dtype=torch.float32, **options)
        keep_unpacked(model)
        model = PeftModel.from_pretrained(model, llama.adapters[request.adapter]) if request.adapter else model
        ids = torch.tensor([request.prompt_ids])
        with torch.inference_mode():
            out = model.eval().generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False
            )
        expected.append(TOKENIZER.decode(out[0, ids.shape[1] :]))
    assert engine.generate(requests) == expected
    assert expected != [
        llama.expected[r.adapter][llama.prompts.index(r.prompt_ids)] for r in requests
    ]  # it is quantised


def test_prompts_are_read_in_pieces_beside_rows_that_decode(llama: Bench) -> None:
    """A prompt longer than a step takes: every step of the others brings them a token all the same."""
    long = tuple((7 * i) % 250 for i in range(100))
    expected = llama.reference(long, "b")
    engine = llama.engine(max_context=128)
    request = llama.requests("a")[0]
    first = _submit(engine, request)
    engine.step()
    second = _submit(engine, GenerationRequest("long", long, SamplingParams(max_tokens=NUM_NEW, temperature=0.0), "b"))
    engine.step()
    assert sum(chunk.num_tokens for chunk in first.chunks) <= 2 and second.chunks == []
    _drain(engine)
    assert first.text == llama.expected["a"][0]
    assert second.text == expected


def test_a_short_prompt_does_not_wait_for_long_ones_that_came_before(llama: Bench) -> None:
    """Three prompts of a hundred tokens, eight of them a step: the short one is through in two, and the first gets on."""
    engine = llama.engine(max_context=128)
    engine._prompt_tokens_alone = engine._prompt_tokens = 8
    params = SamplingParams(max_tokens=2, temperature=0.0)
    prompts = {str(start): tuple((7 * i + start) % 250 for i in range(100)) for start in range(3)}
    long = {name: _submit(engine, GenerationRequest(name, prompt, params, None)) for name, prompt in prompts.items()}
    for _ in range(3):
        engine.step()
    short = _submit(engine, GenerationRequest("short", (5, 6, 7, 8), params, "b"))
    for _ in range(3):
        engine.step()
    assert sum(chunk.num_tokens for chunk in short.chunks) == 2
    steps = 0
    while not long["0"].chunks:
        assert engine.step()
        steps += 1
    assert steps <= 100 / 4, "half of each step is the oldest's"
    _drain(engine)
    alone = llama.engine(max_context=128)
    for name, prompt in prompts.items():
        again = _submit(alone, GenerationRequest(name, prompt, params, None))
        _drain(alone)
        assert long[name].text == again.text


def test_a_prefix_seen_before_is_not_computed_again_and_changes_nothing(llama: Bench) -> None:
    shared = tuple((5 * i) % 250 for i in range(70))
    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0.0)
    prompts = [(*shared, *TOKENIZER.encode(text)) for text in ("the fox", "to be")]
    expected = {(d, n): llama.reference(prompts[n], d) for d in ("a", None) for n in range(2)}
    engine = llama.engine(prefix_bytes=10**7)
    cached: dict[tuple[str | None, int], list[int]] = {}
    for number, digest in ((0, "a"), (1, "a"), (0, None), (1, None), (1, None)):
        answer = _submit(engine, GenerationRequest("r", prompts[number], sampling, digest))
        _drain(engine)
        assert answer.text == expected[digest, number]
        cached.setdefault((digest, number), []).append(answer.chunks[-1].num_cached_tokens)
    # Blocks of 32 tokens; never the last token of a prompt; never from another adapter.
    assert cached == {("a", 0): [0], ("a", 1): [64], (None, 0): [0], (None, 1): [64, 64]}


def test_the_next_turn_of_a_conversation_finds_the_answer_before_it(llama: Bench) -> None:
    engine = llama.engine(prefix_bytes=10**7)
    prompt = tuple((5 * i) % 250 for i in range(30))
    first = _submit(engine, GenerationRequest("1", prompt, SamplingParams(max_tokens=50, temperature=0.0), "a"))
    _drain(engine)
    said = tuple(token for chunk in first.chunks for token in chunk.token_ids)
    turn = (*prompt, *said, 1, 2, 3)
    second = _submit(engine, GenerationRequest("2", turn, SamplingParams(max_tokens=NUM_NEW, temperature=0.0), "a"))
    _drain(engine)
    assert second.chunks[-1].num_cached_tokens == 64
    assert second.text == llama.reference(turn, "a")


def test_the_key_value_memory_keeps_to_its_budget(llama: Bench) -> None:
    slot_bytes = 2 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * 12 * 128 * 4
    engine = llama.engine(num_slots=8, kv_bytes=3 * slot_bytes + 1)
    assert engine.num_slots == 3
    answers = [_submit(engine, request) for request in llama.requests("a", "b")]
    _drain(engine)
    assert [a.text for a in answers] == [llama.expected[d][n] for n in range(4) for d in ("a", "b")]
    with pytest.raises(ModelError, match=rf"takes {slot_bytes} bytes, the budget is 1000"):
        llama.engine(kv_bytes=1000)


def test_one_busy_adapter_starves_nobody(llama: Bench) -> None:
    engine = llama.engine(num_slots=2)
    ended: list[str] = []

    def listen(name: str) -> Callable[[Chunk], None]:
        return lambda chunk: ended.append(name) if chunk.finish_reason else None

    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0.0)
    for number in range(40):
        engine.submit(GenerationRequest(f"busy{number}", llama.prompts[0], sampling, "a"), listen("a"))
    for _ in range(60):
        engine.step()
    for digest in ("b", None):
        engine.submit(GenerationRequest(f"quiet{digest}", llama.prompts[0], sampling, digest), listen(str(digest)))
    before = len(ended)
    _drain(engine)
    # Both get the next two slots that come free; the two that were running may end before them, and what joins meanwhile.
    assert max(ended.index("b"), ended.index("None")) < before + 5
    assert len(ended) == 42


@pytest.mark.parametrize("digest", [None, "b"])
def test_prompt_log_probabilities_are_the_models_own(llama: Bench, digest: str | None) -> None:
    prompt = tuple((11 * i) % 250 for i in range(90))
    model: Any = AutoModelForCausalLM.from_pretrained(llama.base)
    if digest:
        model = PeftModel.from_pretrained(model, llama.adapters[digest])
    with torch.inference_mode():
        expected = torch.log_softmax(model.eval()(torch.tensor([prompt])).logits[0].float(), -1)
    engine = llama.engine(prefix_bytes=10**7)
    running = _submit(engine, llama.requests("a")[0])
    engine.step()  # so that the prompt is read in pieces
    answers = {}
    for max_tokens in (0, 2):
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, prompt_logprobs=3, logprobs=2)
        answers[max_tokens] = _submit(engine, GenerationRequest(str(max_tokens), prompt, sampling, digest))
    _drain(engine)
    for max_tokens, answer in answers.items():
        scored = answer.chunks[0].prompt_logprobs
        assert [entry.token_id for entry in scored] == list(prompt) and scored[0].logprob is None
        for place, entry in enumerate(scored[1:], start=1):
            assert entry.logprob == pytest.approx(float(expected[place - 1, prompt[place]]), abs=2e-3)
            assert [token for token, _ in entry.top] == expected[place - 1].topk(3).indices.tolist()
        chosen = [entry for chunk in answer.chunks for entry in chunk.logprobs]
        assert len(chosen) == max_tokens and all(chunk.num_cached_tokens == 0 for chunk in answer.chunks)
        assert answer.reason == "length"
        if chosen:
            assert chosen[0].token_id == int(expected[-1].argmax())
            assert chosen[0].logprob == pytest.approx(float(expected[-1].max()), abs=2e-3)
            assert len(chosen[0].top) == 2
    assert running.text == llama.expected["a"][0]


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["lost", "broken"]}, "urgent": {"type": "boolean"}},
    "required": ["kind", "urgent"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_under_a_schema_is_json_of_that_schema_from_any_model(llama: Bench, temperature: float) -> None:
    """Random weights say anything; `stop_ids` are among the tokens that they like."""
    engine = llama.engine(stop_ids=[5, 6])
    sampling = SamplingParams(max_tokens=120, temperature=temperature, seed=1, json_schema=json.dumps(SCHEMA))
    free = [_submit(engine, request) for request in llama.requests("c")[:1]]
    asked = [_submit(engine, request) for request in llama.requests("a", None, sampling=sampling)[:4]]
    _drain(engine)
    for answer in asked:
        value = json.loads(answer.text)
        assert answer.reason == "stop"
        assert set(value) == {"kind", "urgent"}
        assert value["kind"] in ("lost", "broken") and value["urgent"] in (True, False)
    assert free[0].text == llama.engine(stop_ids=[5, 6]).generate(llama.requests("c")[:1])[0]


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ('{"type": "nonsense"}', "nonsense"),
        ('{"type": "string", "pattern": "(a+["}', "pattern|regex"),
        ('{"$ref": "http://example.com/schema"}', "cannot be followed"),
        ("[", "cannot be followed"),
        ('"' + "x" * 100_001 + '"', "at most 100000"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_at_submit(llama: Bench, schema: str, words: str) -> None:
    sampling = SamplingParams(max_tokens=9, json_schema=schema)
    with pytest.raises(RequestError, match=words):
        llama.engine().submit(GenerationRequest("r", (1, 2), sampling), Answer())


def test_stop_ids_of_a_request_and_going_on_after_the_models_own(llama: Bench) -> None:
    full = _submit(free := llama.engine(), llama.requests(None)[0])
    _drain(free)
    ids = [token for chunk in full.chunks for token in chunk.token_ids]
    engine = llama.engine(stop_ids=[ids[6]])
    until = ids.index(ids[3]) + 1
    for options, number in (({"ignore_eos": True}, NUM_NEW), ({"ignore_eos": True, "stop_ids": (ids[3],)}, until)):
        answer = _submit(
            engine, llama.requests(None, sampling=SamplingParams(max_tokens=NUM_NEW, temperature=0.0, **options))[0]
        )
        _drain(engine)
        assert sum(chunk.num_tokens for chunk in answer.chunks) == number
        assert answer.reason == ("length" if number == NUM_NEW else "stop")


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}}]
)
def test_scaling_and_patterns_are_those_of_peft(llama: Bench, tmp_path: Path, options: dict[str, Any]) -> None:
    directory = _save_adapter(llama.base, tmp_path / "x", seed=9, rank=3, **options)
    engine = llama.engine(load=False)
    engine.load_adapter("x", directory)
    expected = [llama.reference(prompt, "x", directory) for prompt in llama.prompts]
    assert engine.generate(llama.requests("x")) == expected


def test_an_adapter_that_overflows_ends_its_own_row_only(llama: Bench, tmp_path: Path) -> None:
    wild = shutil.copytree(llama.adapters["a"], tmp_path / "wild")
    tensors = load_file(wild / "adapter_model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, wild / "adapter_model.safetensors")
    engine = llama.engine()
    engine.load_adapter("wild", wild)
    good = [(r, _submit(engine, r)) for r in llama.requests("b", None)[:2]]
    engine.step()
    bad = [_submit(engine, r) for r in llama.requests("wild")]
    good += [(r, _submit(engine, r)) for r in llama.requests("c", "b", None)[3:]]
    _drain(engine)
    for answer in bad:
        assert answer.reason == "error" and "not finite" in str(answer.chunks[-1].error)
    for request, answer in good:
        assert answer.text == llama.expected[request.adapter][llama.prompts.index(request.prompt_ids)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_logits_do_not_depend_on_what_other_rows_and_adapters_hold(
    llama: Bench, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Bit for bit, over a prompt in pieces and decoding, whoever the others are: NaN and overflow included."""
    wild = tmp_path / "wild"
    shutil.copytree(llama.adapters["a"], wild)
    _edit_tensors(wild, lambda tensors: tensors.update({name: t * 1e30 for name, t in tensors.items()}))
    engine = llama.engine(dtype=dtype, max_lora_columns=32)
    engine.load_adapter("wild", wild)
    decoder, mine = engine._decoder, tuple(range(3, 11))
    cuts = [slice(0, 3), slice(3, len(mine) - 1), slice(len(mine) - 1, None)]

    def logits_of_mine(owner: str | None, seed: int) -> list[torch.Tensor]:
        """Of the third of four rows; the fourth is the wild adapter's."""
        draw, seen = random.Random(seed), []
        slots = [decoder.slots.take() for _ in range(4)]
        owners = [draw.choice([None, *llama.adapters]), draw.choice([None, *llama.adapters]), owner, "wild"]
        for cut in cuts:
            rows = [tuple(draw.randrange(len(TOKENIZER)) for _ in mine[cut]) for _ in slots]
            rows[2] = mine[cut]
            logits_NV = decoder.forward([Piece(slot, row) for slot, row in zip(slots, rows, strict=True)], owners)
            assert not logits_NV[3].isfinite().all(), "the wild row overflows, else half of this proves nothing"
            seen.append(logits_NV[2].clone())
        for slot in slots:
            decoder.release(slot)
        return seen

    expected = {owner: logits_of_mine(owner, 0) for owner in (None, *llama.adapters)}
    assert not torch.equal(expected[None][-1], expected["a"][-1])
    for owner, logits in expected.items():
        assert all(row.isfinite().all() for row in logits)
        for seed in range(1, 9):
            assert all(map(torch.equal, logits_of_mine(owner, seed), logits)), (owner, seed)


def test_a_swap_while_running_leaves_running_rows_as_they_were(llama: Bench) -> None:
    engine = llama.engine()
    engine.start()
    try:
        running = [(request, _submit(engine, request)) for request in llama.requests("a", "b", None)]
        assert running[0][1].first.wait(DEADLINE_S)
        for _ in range(3):
            engine.unload_adapter("c")
            assert engine.load_adapter("c", llama.adapters["c"]).num_columns == 8
        running += [(request, _submit(engine, request)) for request in llama.requests("c")]
        for request, answer in running:
            assert answer.done.wait(DEADLINE_S)
            assert answer.text == llama.expected[request.adapter][llama.prompts.index(request.prompt_ids)]
        engine.check()
    finally:
        engine.close()


def test_unload_refuses_while_in_use_then_frees_the_columns(llama: Bench) -> None:
    engine = llama.engine()
    answer = _submit(engine, llama.requests("c")[0])
    with pytest.raises(ConflictError, match="in use by 1 request"):
        engine.unload_adapter("c")
    engine.step()
    with pytest.raises(ConflictError, match="in use by 1 request"):
        engine.unload_adapter("c")
    _drain(engine)
    assert answer.text == llama.expected["c"][0]
    engine.unload_adapter("c")
    assert engine.free_columns == 10 and set(engine.adapters()) == {"a", "b"}
    with pytest.raises(NotFoundError, match="c is not resident"):
        engine.submit(llama.requests("c")[0], Answer())
    with pytest.raises(NotFoundError):
        engine.unload_adapter("c")


def test_a_full_bank_says_what_is_missing_and_loading_twice_is_once(llama: Bench) -> None:
    engine = llama.engine()
    assert engine.load_adapter("c", llama.adapters["c"]) == engine.adapters()["c"]
    with pytest.raises(ConflictError, match="needs 4 columns, 2 free"):
        engine.load_adapter("d", llama.adapters["b"])


def test_the_same_seed_gives_the_same_text_whatever_else_is_in_the_batch(llama: Bench) -> None:
    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=1.0, top_p=0.95, seed=3)
    request = llama.requests("b", sampling=sampling)[0]
    engine = llama.engine()
    alone = engine.generate([request])[0]
    others = llama.requests("a", None, sampling=SamplingParams(max_tokens=NUM_NEW))
    assert engine.generate([*others, request])[-1] == alone
    other_seed = SamplingParams(max_tokens=NUM_NEW, temperature=1.0, top_p=0.95, seed=4)
    assert engine.generate(llama.requests("b", sampling=other_seed)[:1]) != [alone]


def test_a_stop_string_ends_the_answer_before_it(llama: Bench) -> None:
    engine, full = llama.engine(), llama.expected["a"][1]
    stop = full[len(full) // 2 : len(full) // 2 + 3]
    answer = _submit(
        engine, llama.requests("a", sampling=SamplingParams(max_tokens=NUM_NEW, temperature=0.0, stop=(stop,)))[1]
    )
    _drain(engine)
    assert answer.reason == "stop"
    assert answer.text == full[: full.index(stop)]


def test_a_stop_token_ends_the_answer_and_is_not_sent(llama: Bench) -> None:
    ids = TOKENIZER.encode(llama.expected[None][0])
    stop_id = ids[6]
    engine = llama.engine(stop_ids=[stop_id])
    answer = _submit(engine, llama.requests(None)[0])
    _drain(engine)
    assert answer.reason == "stop"
    assert llama.expected[None][0].startswith(answer.text)
    assert sum(chunk.num_tokens for chunk in answer.chunks) <= 7


def test_a_cancelled_request_frees_its_slot_within_a_step(llama: Bench) -> None:
    engine = llama.engine(num_slots=1)
    first, second = (_submit(engine, request) for request in llama.requests("a", "b")[:2])
    engine.step()
    assert second.chunks == []
    engine.cancel("a-0")
    engine.step()
    assert first.reason == "cancelled"
    _drain(engine)
    assert second.text == llama.expected["b"][0]
    engine.cancel("a-0")


def test_a_waiting_request_can_be_cancelled_too(llama: Bench) -> None:
    engine = llama.engine(num_slots=1)
    _, second = (_submit(engine, request) for request in llama.requests("a", "b")[:2])
    engine.step()
    engine.cancel("b-0")
    engine.step()
    assert second.reason == "cancelled" and second.chunks[-1].num_tokens == 0


def test_a_failing_listener_ends_its_own_request_only(llama: Bench) -> None:
    engine = llama.engine()

    def broken(chunk: Chunk) -> None:
        raise ConnectionResetError("the client went away")

    requests = llama.requests("a", "b")
    engine.submit(requests[0], broken)
    answer = _submit(engine, requests[1])
    _drain(engine)
    assert answer.text == llama.expected["b"][0]


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(
    llama: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama.engine(num_slots=2, prefix_bytes=10**7)
    running = [_submit(engine, request) for request in llama.requests("a", "b", None)[:3]]
    engine.step()
    forward = engine._decoder.forward

    def broken(*args: Any) -> torch.Tensor:
        forward(*args)
        raise RuntimeError("no memory left, by /secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(engine._decoder, "forward", broken)
        engine.step()
    assert [answer.reason for answer in running] == ["error", "error", None]
    assert "Send it again" in str(running[0].chunks[-1].error) and "secret" not in str(running[0].chunks[-1].error)
    _drain(engine)
    assert running[2].text == llama.expected[None][0]
    assert engine.generate(llama.requests("a", "b")) == [llama.expected[d][n] for n in range(4) for d in ("a", "b")]
    assert not engine._decoder.slots.kv_LSHCD.any()


def test_an_engine_whose_every_step_fails_is_not_healthy(llama: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llama.engine()

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("the device is lost")

    def fail(times: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine._decoder, "forward", broken)
            for _ in range(times):
                with pytest.raises(ModelError, match="Send it again"):
                    engine.generate(llama.requests("a")[:1])

    fail(4)
    engine.check()
    assert engine.generate(llama.requests("a")[:1]) == [llama.expected["a"][0]]
    fail(4)
    engine.check()  # a step that is done begins the count anew
    fail(1)
    with pytest.raises(RuntimeError, match="last 5 steps have all failed"):
        engine.check()


def test_a_schema_too_costly_to_follow_ends_its_own_answer_as_an_error(
    llama: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never as a text that is cut in the middle and looks whole. The limit is lowered, so that this schema meets it."""
    monkeypatch.setattr(grammar, "_STEP_FUEL", 1000)
    engine = llama.engine(stop_ids=[5])
    schema = json.dumps({"type": "string", "pattern": "^(.*a.{60}b.*c.{40}d)$"})
    sampling = SamplingParams(max_tokens=110, temperature=1.0, seed=1, json_schema=schema)
    costly = _submit(engine, llama.requests("a", sampling=sampling)[0])
    beside = _submit(engine, llama.requests("b")[0])
    _drain(engine)
    assert costly.reason == "error" and 1 < sum(chunk.num_tokens for chunk in costly.chunks) < 110
    assert beside.text == llama.engine(stop_ids=[5]).generate(llama.requests("b")[:1])[0]


def test_a_prefix_that_cannot_be_kept_costs_nobody_anything(llama: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llama.engine(prefix_bytes=10**7)
    prompt = tuple((5 * i) % 250 for i in range(70))

    def full(*args: Any) -> torch.Tensor:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(engine._decoder.slots, "read", full)
    answer = _submit(engine, GenerationRequest("r", prompt, SamplingParams(max_tokens=NUM_NEW, temperature=0.0), "a"))
    _drain(engine)
    assert answer.text == llama.reference(prompt, "a") and answer.reason == "length"
    assert engine.stats().num_running == 0 and engine._decoder.slots.num_free == 4
    engine.unload_adapter("a")


def test_an_adapter_in_host_memory_comes_back_without_its_files(llama: Bench, tmp_path: Path) -> None:
    directory = shutil.copytree(llama.adapters["a"], tmp_path / "x")
    engine = llama.engine(load=False, host_bytes=10**7)
    engine.load_adapter("x", directory)
    engine.unload_adapter("x")
    shutil.rmtree(directory)
    engine.load_adapter("x", directory)
    assert engine.generate(llama.requests("x")) == llama.expected["a"]
    ahead = llama.engine(load=False, host_bytes=10**7)
    ahead.read_adapter("b", shutil.copytree(llama.adapters["b"], directory))
    assert ahead.adapters() == {} and ahead.free_columns == ahead.max_columns, "only read"
    shutil.rmtree(directory)
    ahead.load_adapter("b", directory)
    assert ahead.generate(llama.requests("b")) == llama.expected["b"]
    forgetful = llama.engine(load=False)
    with pytest.raises(ModelError, match="missing"):
        forgetful.load_adapter("x", directory)


def test_a_hundred_swaps_under_load_disturb_nobody(llama: Bench) -> None:
    """Requests that run through it all get what they would alone; none fails."""
    engine = llama.engine(num_slots=4, max_lora_columns=24)
    engine.start()
    stop, problems = threading.Event(), []

    def swap() -> None:
        for number in range(100):
            if stop.is_set():
                problems.append(f"only {number} swaps")
                return
            digest = f"other{number}"
            engine.load_adapter(digest, llama.adapters["bc"[number % 2]])
            engine.unload_adapter(digest)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        turns = 0
        while thread.is_alive() or turns < 2:
            turns += 1
            answers = [(r, _submit(engine, r)) for r in llama.requests("a", "b", "c", None)]
            for request, answer in answers:
                assert answer.done.wait(DEADLINE_S)
                assert answer.reason == "length"
                assert answer.text == llama.expected[request.adapter][llama.prompts.index(request.prompt_ids)]
        engine.check()
    finally:
        stop.set()
        thread.join()
        engine.close()
    assert problems == [] and engine.free_columns == 10


def test_a_request_that_cannot_be_served_is_refused_at_submit(llama: Bench) -> None:
    engine = llama.engine()
    greedy = SamplingParams(max_tokens=100, temperature=0.0)
    for prompt, words in [((1,) * 29, "prompt of 29 tokens"), ((), "empty"), ((len(TOKENIZER),), "outside 0 to")]:
        with pytest.raises(RequestError, match=words):
            engine.submit(GenerationRequest("r", prompt, greedy), Answer())
    engine.submit(GenerationRequest("r", (1,) * 28, greedy), Answer())
    with pytest.raises(ConflictError, match="in flight already"):
        engine.submit(GenerationRequest("r", (1,), greedy), Answer())
    _drain(engine)


def test_closing_ends_what_is_in_flight(llama: Bench) -> None:
    engine = llama.engine(num_slots=1)
    engine.start()
    answers = [_submit(engine, request) for request in llama.requests("a", "b", sampling=SamplingParams(max_tokens=90))]
    assert answers[0].first.wait(DEADLINE_S)
    engine.close()
    assert all(answer.done.is_set() for answer in answers)
    assert answers[-1].reason == "cancelled"
    with pytest.raises(ConflictError, match="closed"):
        _submit(engine, llama.requests("a")[0])


def test_a_change_after_a_long_idle_time_is_not_taken_for_a_stuck_engine(llama: Bench) -> None:
    engine = llama.engine(stall_after_s=5.0)
    engine._advanced_at -= 100.0
    with engine._stepping:  # so that it stays pending
        unloading = threading.Thread(target=engine.unload_adapter, args=("a",))
        unloading.start()
        while not engine._commands:
            unloading.join(0.01)
        engine.check()
    unloading.join()


def test_check_raises_when_pending_work_does_not_advance(llama: Bench) -> None:
    engine = llama.engine(stall_after_s=0.0)
    engine.check()
    _submit(engine, llama.requests(None)[0])
    with pytest.raises(RuntimeError, match="has not finished a step"):
        engine.check()
    _drain(engine)
    engine.check()


def _edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "config flags": (
        lambda d: _edit_config(d, use_dora=True, modules_to_save=["lm_head"], bias="all", init_lora_weights="pissa"),
        ["use_dora", "modules_to_save", "bias is 'all'", "init_lora_weights is 'pissa'"],
    ),
    "a key from the future": (lambda d: _edit_config(d, use_warp_drive=True), ["use_warp_drive"]),
    "another method": (lambda d: _edit_config(d, peft_type="IA3", task_type="SEQ_CLS"), ["peft_type", "task_type"]),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), ["adapter_config.json is missing"]),
    "pickled": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        ["adapter_model.bin", "only safetensors"],
    ),
    "not safetensors": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\0" * 9), ["is not safetensors"]),
    "empty": (lambda d: _edit_tensors(d, dict.clear), ["holds no tensors", "is targeted, but has no tensors"]),
    "shape and NaN": (
        lambda d: _edit_tensors(
            d,
            lambda t: t.update(
                {
                    Q_A: torch.zeros(2, 7),
                    Q_A.replace("q_proj", "k_proj"): torch.full((2, 48), float("nan")),
                    Q_A.replace("q_proj", "v_proj"): torch.full((2, 48), 1, dtype=torch.int32),
                }
            ),
        ),
        ["q_proj: A is [2, 7]", "k_proj holds NaN", "v_proj: dtypes torch.int32"],
    ),
    "strangers": (
        lambda d: _edit_tensors(
            d,
            lambda t: (
                t.pop(Q_A),
                t.update({"base_model.model.lm_head.weight": torch.zeros(2), Q_A.replace("q_", "z_"): torch.zeros(2)}),
            ),
        ),
        ["lm_head.weight is no LoRA matrix", "z_proj: the base model has no such", "q_proj has lora_B only"],
    ),
    "rank of the config": (lambda d: _edit_config(d, r=3), ["wanted [3, 48]"]),
    "overflow by scaling": (lambda d: _edit_config(d, lora_alpha=1e39), ["after scaling"]),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_adapter_is_refused_with_all_reasons_and_changes_nothing(llama: Bench, tmp_path: Path, case: str) -> None:
    damage, words = BAD[case]
    directory = shutil.copytree(llama.adapters["a"], tmp_path / "bad")
    damage(directory)
    engine = llama.engine()
    request = llama.requests("b")[0]
    answer = _submit(engine, request)
    engine.step()
    before = (engine.adapters(), engine.free_columns)
    with pytest.raises(ModelError) as caught:
        engine.load_adapter("bad", directory)
    assert [word for word in words if word not in caught.value.message] == []
    assert (engine.adapters(), engine.free_columns) == before
    _drain(engine)
    assert answer.text == llama.expected["b"][0]


def test_a_rank_beyond_the_bank_is_refused(llama: Bench) -> None:
    engine = llama.engine(load=False, max_lora_columns=4)
    with pytest.raises(ModelError, match=r"rank 8, this engine holds at most 4 columns[\s\S]*more of this kind"):
        engine.load_adapter("c", llama.adapters["c"])


@pytest.mark.parametrize(
    ("config_class", "options", "words"),
    [
        (MistralConfig, {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        (LlamaConfig, {"max_position_embeddings": 64}, "knows 64 positions"),
    ],
)
def test_a_base_model_that_would_be_wrong_is_refused(
    tmp_path: Path, config_class: Callable[..., Any], options: dict[str, Any], words: str
) -> None:
    base = _save_base(tmp_path / "base", config_class, **options)
    with pytest.raises(ModelError, match=words):
        TorchEngine(base, tokenizer=TOKENIZER, stop_ids=(), max_context=128)


@pytest.fixture
def joining(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are joined whether that is faster or not."""
    monkeypatch.setattr("service.inference.products.joining_pays", lambda *_: True)
    monkeypatch.setattr("service.inference.products.fastest", lambda *_: Packed)


def _joined(engine: TorchEngine) -> list[bool]:
    return [group.columns is not None and group.columns.joined is not None for group in engine._bank.groups]


@pytest.mark.usefixtures("joining")
def test_products_are_joined_at_once_without_a_thread_and_while_nobody_asks(llama: Bench) -> None:
    engine = llama.engine(dtype=torch.bfloat16)
    assert all(_joined(engine)), "the same calls give the same answers, to the bit"
    engine.unload_adapter("c")
    assert not any(_joined(engine))
    engine.start()
    try:
        wait_until(lambda: all(_joined(engine)), "an idle engine joins them", 60.0)
        requests = llama.requests("a", None, "b")
        assert all(engine.generate(requests))
    finally:
        engine.close()


@pytest.mark.usefixtures("joining")
def test_products_stay_apart_under_load_while_adapters_come_and_go(
    llama: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = llama.engine(dtype=torch.bfloat16)
    engine.unload_adapter("c")
    for request in llama.requests("a"):
        engine.submit(request, lambda chunk: None)
    for _ in range(3):
        engine.step()
    assert not any(_joined(engine)), "an adapter has just gone"
    monkeypatch.setattr("service.inference.torch_engine._JOIN_AFTER_S", 0.0)
    monkeypatch.setattr("service.inference.torch_engine._JOIN_S", 10.0)
    with monkeypatch.context() as patch:
        patch.setattr(Packed, "joined", _no_memory)
        engine.step()
    assert "stays apart" in caplog.text
    while engine.step():
        pass
    assert sum(_joined(engine)) == len(_joined(engine)) - 1, "all but the one for which there was no memory"


def _no_memory(*_: object) -> None:
    raise RuntimeError("no memory")
