"""`moepp import` and `moepp export`: released folders in and out of checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moepp.cli import main
from moepp.model import load_released
from moepp.training.checkpoint import load

REFERENCE = Path(__file__).parents[1] / "model/reference/released_two_layer_gate"


def test_a_released_folder_there_and_back(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(REFERENCE), "in/model.ckpt"]) == 0
    loaded = load("in/model.ckpt")
    model, tokenizer = loaded.model, loaded.tokenizer
    assert tokenizer is None
    tokens = load_file(REFERENCE / "expected.safetensors")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load_released(REFERENCE)(tokens).logits)
    assert main(["export", "out", "--ckpt=in/model.ckpt"]) == 0
    before, after = load_file(REFERENCE / "model.safetensors"), load_file("out/model.safetensors")
    unused = "model.layers.0.mlp.moe.gate.gate_map.weight"
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name != unused)

    capsys.readouterr()
    for arguments, message in (
        (["import", str(REFERENCE), "in/model.ckpt"], "exists already"),
        (["export", "out", "--ckpt=in/model.ckpt"], "exists already"),
        (["generate", "--ckpt=in/model.ckpt"], "has no tokenizer"),
        (["import", str(REFERENCE), "other.ckpt", "--tokenizer=nowhere.json"], "nowhere.json does not exist"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
