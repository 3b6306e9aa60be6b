"""`moepp import` and `moepp export`: released folders in and out of checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from moepp.cli import main
from moepp.model import load_released
from moepp.training.checkpoint import load
from tests.conftest import assert_same, read_csv, refused

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
    before["model.layers.0.mlp.moe.gate.gate_map.weight"].zero_()  # stands there unused
    assert_same(after, before)

    capsys.readouterr()
    for arguments, message in (
        (["import", str(REFERENCE), "in/model.ckpt"], "exists already"),
        (["export", "out", "--ckpt=in/model.ckpt"], "exists already"),
        (["generate", "--ckpt=in/model.ckpt"], "has no tokenizer"),
        (["import", str(REFERENCE), "other.ckpt", "--tokenizer=nowhere.json"], "nowhere.json cannot be read"),
    ):
        assert message in refused(capsys, *arguments)


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
    assert "wide.json: must fit the model's vocab_size=64, got 65 tokens" in refused(
        capsys, "import", "mixtral", "other.ckpt", "--tokenizer=wide.json"
    )
    capsys.readouterr()
    (workdir / "mixtral/model.safetensors").unlink()
    assert "has neither" in refused(capsys, "import", "mixtral", "other.ckpt")
    assert not Path("other.ckpt").exists()


def test_anothers_model_is_imported_converted_and_trained_on(
    text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As README has it, but for sizes. Its vocabulary is larger than its tokenizer's, and no multiple of 64."""
    foreign = pytest.importorskip("tests.foreign_models")
    monkeypatch.setitem(foreign.SIZES, "vocab_size", 300)
    foreign.build("olmoe").save_pretrained("olmoe")
    alphabet = sorted(set(text_file.read_text()))
    tokenizer = Tokenizer(WordLevel({"<eos>": 0} | {letter: n for n, letter in enumerate(alphabet, 1)}, "<eos>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save("olmoe/tokenizer.json")
    Path("olmoe/tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    assert main(["import", "olmoe", "olmoe.ckpt"]) == 0
    assert main(["convert", "olmoe.ckpt", "olmoe++.ckpt", "--ffn_per_token=2"]) == 0
    options = ["--model.init_from=olmoe++.ckpt", "--model.distill.teacher=olmoe.ckpt", "--model.convert.steps=2"]
    options += [f"--data.path={text_file}", "--data.tokenizer=olmoe/tokenizer.json"]
    sizes = ["--data.seq_len=32", "--data.batch_size=4", "--trainer.max_steps=3", "--trainer.log_every_n_steps=1"]
    assert main(["fit", *options, *sizes, "--trainer.default_root_dir=run", "--trainer.accelerator=cpu"]) == 0
    first, *_, last = (row for row in read_csv(Path("run")) if row["train/loss"])
    assert abs(float(first["train/distillation"])) < 0.05  # hardly anybody goes to the new experts yet
    assert float(first["routing/ffn_per_token"]) > float(last["routing/ffn_per_token"])
    assert load("run/checkpoints/step-00000003.ckpt").model.config.vocab_size == 300
