"""A model of a few steps, and four tasks of the four kinds, of its own words."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="it asks the questions: pip install 'moepp[eval]'")

from lm_eval.tasks import TaskManager

from moepp.cli import main
from moepp.study.tasks import open as opening
from tests.conftest import WORDS, tiny

CONTEXT = 48
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}",
        "doc_to_choice": "ends",
        "doc_to_target": "gold",
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{start}}",
        "doc_to_target": "{{' ' + ends[gold]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{start}}",
        "doc_to_target": "{{ends[gold]}}",
        "generation_kwargs": {"until": [".", " to"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def documents(n: int = 40) -> list[dict[str, Any]]:
    rng = random.Random(0)
    made = []
    for i in range(n):
        start = rng.randrange(len(WORDS))
        words = [WORDS[(start + j) % len(WORDS)] for j in range(rng.randint(4, 12) if i else 40)]
        ends = [words[-1], *rng.sample(sorted(set(WORDS) - {words[-1]}), 3)]
        gold = rng.randrange(4)
        ends[0], ends[gold] = ends[gold], ends[0]
        made.append({"start": " ".join(words[:-1]), "ends": ends, "gold": gold, "text": " ".join(words) + "."})
    made[1]["start"] = ""  # a context of nothing
    return made


def write_documents(folder: Path) -> None:
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents())))


def write_task(folder: Path, name: str, **task: Any) -> None:
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}}}
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test"} | data | task))


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the task files, and what they ask. The first document is longer than the model's context."""
    folder = tmp_path_factory.mktemp("tasks")
    write_documents(folder)
    for name, task in TASKS.items():
        write_task(folder, name, **task)
    return folder


@pytest.fixture(scope="session")
def checkpoint(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = [*tiny(text_file), f"--model.transformer.context_length={CONTEXT}", "--trainer.max_steps=30"]
        assert main(["fit", *options, "--trainer.val_check_interval=30"]) == 0
    return folder / "runs/moepp/1/checkpoints/step-00000030.ckpt"


@pytest.fixture
def there(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, with data sets' cache in it, where no hub can be reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip, which takes a second
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all task files only ours and those of the test: lm-eval's own take ten seconds to look through."""

    def without_defaults(include_path: list[Path | str], include_defaults: bool = False) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(opening, "TaskManager", without_defaults)
