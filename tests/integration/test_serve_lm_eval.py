"""lm-evaluation-harness against the endpoint (`local-completions`) and against transformers: the same score, row by row."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.integration.serving import Endpoint

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what the harness imports
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
NUM_ROWS = 12


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four endings to choose from, of random letters: nothing is known, so a score says which way the model leans."""
    rng = random.Random(0)
    words = [
        "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(3, 9))).strip() or "a" for _ in range(5 * NUM_ROWS)
    ]
    rows = [
        {"question": words[5 * i], "choices": words[5 * i + 1 : 5 * i + 5], "label": rng.randrange(4)}
        for i in range(NUM_ROWS)
    ]
    file = tmp_path_factory.mktemp("task") / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return {
        "task": "endings",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def _evaluated(task: dict[str, Any], model: str, arguments: str) -> tuple[dict[str, float], list[list[float]]]:
    """The scores, and every row's log-likelihoods of its endings."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], batch_size=4, bootstrap_iters=0, verbosity="ERROR"
    )
    samples = sorted(found["samples"]["endings"], key=lambda sample: sample["doc_id"])
    scores = {name: value for name, value in found["results"]["endings"].items() if name.startswith("acc")}
    return scores, [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]


def test_its_score_over_http_is_that_of_transformers(
    endpoint: Endpoint, base: Path, task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    url = f"base_url={endpoint.url}/v1/completions,model=base,tokenizer={base},tokenizer_backend=huggingface"
    over_http, seen = _evaluated(task, "local-completions", f"{url},num_concurrent=2,max_length=256")
    direct, expected = _evaluated(task, "hf", f"pretrained={base},dtype=float32,device=cpu,max_length=256")
    assert len(seen) == NUM_ROWS and len({tuple(row) for row in seen}) == NUM_ROWS
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)
    assert over_http == direct
