"""`moepp eval` and `moepp figures --data.path=TASK`, from the command line."""

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from moepp.cli import main
from moepp.training.checkpoint import read_checkpoint
from tests.conftest import refused, tiny
from tests.study.eval.conftest import TASKS, write_documents, write_task

FOUR = ",".join(TASKS)
SHOTS = {  # the paper's
    **dict.fromkeys(("sciq", "piqa", "winogrande", "arc_easy", "logiqa", "lambada_openai"), 0),
    **{"hellaswag": 10, "boolq": 32, "nq_open": 32},
}


def test_four_tasks(there: Path, checkpoint: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--ckpt={checkpoint}", f"--include_path={tasks}"]
    assert main(["eval", *options, f"--tasks={FOUR}"]) == 0
    out = checkpoint.parents[1] / "eval"
    results = json.loads((out / "results.json").read_text())
    assert list(results["results"]) == list(TASKS)
    assert {"configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "date"} < results.keys()
    assert results["config"]["model_args"]["ckpt"] == str(checkpoint)
    table = pd.read_csv(out / "tasks.csv").set_index("task")
    assert table["requests"].to_dict() == {"choice": 160, "last_word": 40, "written": 40, "rolling": 40}
    # the first document is longer than the context, and only a rolling text loses nothing by that
    cut = {"choice": 4, "last_word": 1, "written": 1, "rolling": 0}
    for task, experts in results["experts"].items():
        assert sum(experts["per_token"].values()) == pytest.approx(2)
        by_layer = experts["per_token_by_layer"]
        assert np.mean(by_layer["ffn"]) == pytest.approx(experts["per_token"]["ffn"])
        assert experts["requests_cut_to_the_context"] == cut[task]
    assert table.loc["choice", "acc"] == pytest.approx(results["results"]["choice"]["acc,none"])
    load = pd.read_csv(out / "load.csv")
    means = load[(load["layers"] == "all layers, mean") & (load["expert"] == 0)].set_index("domain")
    for task in TASKS:
        ffn = results["experts"][task]["per_token"]["ffn"]
        assert means.loc[task, "ffn_per_token"] == pytest.approx(ffn, rel=1e-4)
        assert means.loc[task, "ffn_per_token_low"] < ffn < means.loc[task, "ffn_per_token_high"]
    printed = " ".join(capsys.readouterr().out.split())
    lost = "requests longer than the context of 48 tokens lost their beginning: 4 of 160 in choice, 1 of 40 in"
    assert lost in printed
    assert "mean accuracy of 3 tasks" in printed
    assert "not drawn: finding4_accuracy: 3 tasks have accuracy, and a correlation over tasks needs 4" in printed
    page = (out / "index.html").read_text()
    assert "<td>4</td><td>… more so in easier tasks (accuracy)" in page
    assert lost in page
    assert {path.stem for path in out.glob("*.png")} == {
        *("load", "finding2_spread", "finding4_activations", "finding5_divergence")
    }


def test_the_papers_nine(there: Path, few: None, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents(there)
    for name in SHOTS:
        write_task(there, name, **TASKS["written" if name == "nq_open" else "choice"])
    options = [f"--ckpt={checkpoint}", "--include_path=.", "--limit=9", "--out=nine"]
    assert main(["eval", "--tasks=sciq,paper,boolq", *options]) == 0  # each once
    printed = capsys.readouterr().out.split()
    assert SHOTS.keys() <= set(printed)  # whole, in a terminal of 80 columns
    table = pd.read_csv("nine/tasks.csv").set_index("task")
    assert table["shots"].to_dict() == SHOTS
    assert set(table["documents"]) == {9}
    assert table["requests_cut_to_the_context"]["boolq"] == 36  # all of them
    assert table["accuracy"].notna().all()
    assert Path("nine/finding4_accuracy.png").exists()
    found = pd.read_csv("nine/findings.csv")
    half = found[found["claim"].str.contains("easier tasks")].iloc[0]
    assert -1 <= half["measured_low"] <= half["measured"] <= half["measured_high"] <= 1


def test_limit_and_shots(there: Path, checkpoint: Path, tasks: Path) -> None:
    options = [f"--ckpt={checkpoint}", f"--include_path={tasks}", "--tasks=choice", "--out=out"]
    read = []
    for more in (["--limit=0.25"], ["--limit=10", "--num_fewshot=2"]):
        assert main(["eval", *options, *more]) == 0
        read.append(pd.read_csv("out/tasks.csv").iloc[0])
    assert [row["documents"] for row in read] == [10, 10]
    assert [row["shots"] for row in read] == [0, 2]
    assert read[1]["tokens"] > read[0]["tokens"]


def test_vanilla_takes_ffn_experts_alone(there: Path, tasks: Path, text_file: Path) -> None:
    options = [*tiny(text_file, "vanilla.yaml"), "--trainer.max_steps=1", "--trainer.val_check_interval=1"]
    assert main(["fit", *options]) == 0
    assert main(["eval", "--tasks=last_word", f"--include_path={tasks}"]) == 0  # of the newest checkpoint
    assert pd.read_csv("runs/vanilla/1/eval/tasks.csv").loc[0, "ffn_per_token"] == 2
    assert pd.read_csv("runs/vanilla/1/eval/findings.csv")["number"].tolist() == [5]


def test_figures_of_a_task(there: Path, checkpoint: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # parts of speech need a lexicon from there
    options = [f"--ckpt={checkpoint}", f"--include_path={tasks}", "--data.path=rolling", "--out=figures"]
    assert main(["figures", *options]) == 0
    assert {"passage", "tokens", "load"} <= {path.stem for path in Path("figures").glob("*.png")}
    assert set(pd.read_csv("figures/load.csv")["domain"]) == {"rolling"}
    assert "rolling: " in Path("figures/index.html").read_text()


def test_without_a_network_a_task_of_the_hub_ends_in_one_line(
    there: Path, few: None, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # the command has to find out
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    write_task(there, "sciq", **TASKS["choice"], dataset_path="allenai/sciq", dataset_kwargs={})
    start = time.monotonic()
    for name in ("sciq", "paper"):
        line = refused(capsys, "eval", f"--ckpt={checkpoint}", f"--tasks={name}", "--include_path=.")
        assert line.startswith(f"moepp eval: tasks: {name}: Couldn't reach 'allenai/sciq' on the Hub")
        assert "without a network" in line
    assert time.monotonic() - start < 10  # no retries
    line = refused(capsys, "eval", f"--ckpt={checkpoint}", "--tasks=logiqa")
    assert "tasks: logiqa: Unable to find 'https://raw.github" in line
    assert "without a network" in line


def test_bad_input(
    there: Path, few: None, checkpoint: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = read_checkpoint(checkpoint)
    mute = whole["moepp"] | {"tokenizer": None}
    torch.save(whole | {"moepp": mute}, "mute.ckpt")
    torch.save(whole | {"moepp": whole["moepp"] | {"end_of_text": None}}, "endless.ckpt")
    bad = there / "bad"
    bad.mkdir()
    choice = TASKS["choice"]
    write_task(bad, "lost", **choice)  # bad/documents.jsonl is not there
    data = {"data_files": {"test": str(tasks / "documents.jsonl")}}
    write_task(bad, "template", **choice | {"doc_to_text": "{{nothing}}", "dataset_kwargs": data})
    write_task(bad, "kind", **choice | {"output_type": "oracle", "dataset_kwargs": data})
    write_task(bad, "split", **choice | {"test_split": "dev", "dataset_kwargs": data})
    write_task(bad, "metric", **choice | {"metric_list": [{"metric": "charm"}], "dataset_kwargs": data})
    for name in ("one", "other"):
        (bad / f"{name}.yaml").write_text(json.dumps({"group": name, "task": ["sound"]}))
    write_task(bad, "sound", **choice | {"dataset_kwargs": data})
    (bad / "broken.yaml").write_text("task: broken\nmetric_list: [")
    own = [f"--ckpt={checkpoint}", f"--include_path={tasks}"]
    ill = [f"--ckpt={checkpoint}", "--include_path=bad"]
    for options, message in (
        (["--tasks=choice"], "runs/* has no checkpoint"),
        (["--ckpt=nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--ckpt=mute.ckpt"], "mute.ckpt: has no tokenizer"),
        (["--ckpt=endless.ckpt", own[1], "--tasks=choice"], "no token that ends a text"),
        ([*own, "--tasks=choize"], "tasks: 'choize' is no task of lm-eval (did you mean choice?)"),
        ([*own, "--tasks=choice,,nonsense"], "tasks: 'nonsense' is no task of lm-eval"),
        ([*own, "--tasks=,"], "tasks"),
        ([*own, "--tasks=choice", "--limit=0"], "limit: must be above 0"),
        ([*own, "--tasks=choice", "--limit=-1"], "limit: must be above 0"),
        ([*own, "--tasks=choice", "--limit=.nan"], "limit: must be above 0"),
        ([*own, "--tasks=choice", "--num_fewshot=-1"], "num_fewshot: must not be negative"),
        ([*own, "--tassk=choice"], "did you mean tasks?"),
        ([own[0], "--include_path=nowhere"], "include_path: nowhere is no folder"),
        ([*ill, "--tasks=lost"], "tasks: lost: Unable to find"),
        ([*ill, "--tasks=template"], "tasks: template: UndefinedError: 'nothing' is undefined"),
        ([*ill, "--tasks=kind"], "tasks: kind: "),
        ([*ill, "--tasks=split"], "tasks: split: "),
        ([*ill, "--tasks=one,other"], "tasks: other has sound, as another group has"),
        ([*ill, "--tasks=metric"], "tasks: metric: "),
        ([*ill, "--tasks=broken"], "tasks: 'broken' is no task of lm-eval"),
    ):
        assert message in refused(capsys, "eval", *options), options
    line = refused(capsys, "figures", f"--ckpt={checkpoint}", "--data.path=choize", own[1])
    assert "choize does not exist, and as a task: tasks: 'choize' is no task" in line
