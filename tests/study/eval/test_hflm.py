"""lm-eval's own HFLM on the exported folder, against ours on the checkpoint."""

from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from moepp.cli import main
from moepp.study.eval.model import MoEppLM
from moepp.study.figures.routing_stats import DocumentPassages, RoutingCounts
from moepp.study.tasks.open import open_tasks
from moepp.training.checkpoint import load
from tests.study.eval.conftest import TASKS, documents


def evaluated(lm: Any, tasks: Path, names: list[str]) -> dict[str, Any]:
    opened = list(open_tasks(names, str(tasks)).values())
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(lm, tasks=opened, task_manager=manager, log_samples=True, bootstrap_iters=0)
    assert found is not None
    return found


def test_hflm_says_the_same(there: Path, checkpoint: Path, tasks: Path) -> None:
    assert main(["export", "out", f"--ckpt={checkpoint}", "--format=hf"]) == 0
    loaded = load(checkpoint)
    config = loaded.model.config
    passages = DocumentPassages(dict.fromkeys(TASKS, len(documents())))
    counts = RoutingCounts(loaded.model.moe_config, config.n_layers, [""] * config.vocab_size, passages)
    ours = evaluated(MoEppLM(loaded, counts), tasks, list(TASKS))
    hflm = {"pretrained": "out", "trust_remote_code": True, "device": "cpu", "batch_size": 8, "dtype": "float32"}
    theirs = evaluated(HFLM(**hflm), tasks, ["choice", "last_word", "written"])
    rolling = evaluated(HFLM(**hflm, add_bos_token=False), tasks, ["rolling"])
    for part in ("results", "samples"):
        theirs[part] |= rolling[part]
    for task in TASKS:
        for ours_of, theirs_of in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert ours_of["arguments"] == theirs_of["arguments"]
            for mine, other in zip(ours_of["resps"], theirs_of["resps"], strict=True):
                if task == "written":
                    assert mine == other
                elif task == "rolling":
                    assert mine[0] == pytest.approx(other[0], abs=1e-3)
                else:
                    assert mine[0][0] == pytest.approx(other[0][0], abs=1e-3)
                    assert mine[0][1] == other[0][1]
    metrics = {"choice": "acc", "last_word": "acc", "written": "exact_match"}
    for task, metric in [*metrics.items(), ("choice", "acc_norm")]:
        assert ours["results"][task][f"{metric},none"] == theirs["results"][task][f"{metric},none"]
    bits = [found["results"]["rolling"]["bits_per_byte,none"] for found in (ours, theirs)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)
