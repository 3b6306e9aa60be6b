"""`moepp import` and `moepp export`: released folders in and out of checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

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
        (["import", str(REFERENCE), "other.ckpt", "--tokenizer=nowhere.json"], "nowhere.json cannot be read"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_folder_of_others_becomes_a_checkpoint(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="writes the folder: pip install 'moepp[hf]'")
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        num_local_experts=4,
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained("mixtral")
    assert main(["import", "mixtral", "in/model.ckpt"]) == 0
    tokens = torch.arange(30).view(1, 30)
    with torch.no_grad():
        torch.testing.assert_close(load("in/model.ckpt").model(tokens).logits, theirs(tokens).logits)
    assert main(["convert", "in/model.ckpt", "in/converted.ckpt", "--n_zero=2"]) == 0
    Tokenizer(WordLevel({"a": 0, "b": 64})).save("wide.json")
    assert main(["import", "mixtral", "other.ckpt", "--tokenizer=wide.json"]) == 2
    assert "wide.json: must fit the model's vocab_size=64, got 65 tokens" in capsys.readouterr().err
    capsys.readouterr()
    (workdir / "mixtral/model.safetensors").unlink()
    assert main(["import", "mixtral", "other.ckpt"]) == 2
    assert "has neither" in capsys.readouterr().err
    assert not Path("other.ckpt").exists()
