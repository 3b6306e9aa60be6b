"""The released checkpoint format: reference vectors from the released code, and there and back."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moepp.model import (
    InputError,
    MoEConfig,
    Transformer,
    TransformerConfig,
    export_hub,
    export_released,
    load_hub,
    load_released,
)
from tests.conftest import assert_same

REFERENCE = Path(__file__).parent / "reference"
FOLDERS = ["released_linear_gate", "released_two_layer_gate", "released_no_input_scale"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_and_router_logits(folder: str) -> None:
    """Float32 on a CPU, within 1e-4 of the largest magnitude in each tensor."""
    expected = load_file(REFERENCE / folder / "expected.safetensors")
    with torch.no_grad():
        output = load_released(REFERENCE / folder)(expected.pop("input_ids"))
    actual = {"logits": output.logits} | {f"router_logits.{i}": r.logits for i, r in enumerate(output.routings)}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


@pytest.mark.parametrize("folder", FOLDERS)
def test_export_writes_the_same_tensors(folder: str, tmp_path: Path) -> None:
    export_released(load_released(REFERENCE / folder), tmp_path)
    before, after = (
        load_file(REFERENCE / folder / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    before["model.layers.0.mlp.moe.gate.gate_map.weight"].zero_()  # stands there unused
    assert_same(after, before)
    old, new = (json.loads((path / "config.json").read_text()) for path in (REFERENCE / folder, tmp_path))
    assert {key: old[key] for key in new if key in old} == {key: new[key] for key in new if key in old}


@pytest.mark.parametrize("gating_residual", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_own_model_survives_export(tmp_path: Path, gating_residual: bool, tie: bool) -> None:
    config = TransformerConfig(64, 2, 16, 24, 2, context_length=8, tie_embeddings=tie)
    model = Transformer(config, MoEConfig(n_ffn=4, gating_residual=gating_residual)).eval()
    export_released(model, tmp_path)
    tokens = torch.arange(8).view(1, 8)
    torch.testing.assert_close(load_released(tmp_path)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (MoEConfig(n_const=1), "moe.n_const: the released format holds exactly 2, got 1"),
        (MoEConfig(top_k=1), "moe.top_k: the released format holds exactly 2, got 1"),
    ],
)
def test_what_the_format_cannot_hold(tmp_path: Path, moe: MoEConfig, message: str) -> None:
    model = Transformer(TransformerConfig(64, 1, 16, 24, 2), moe)
    with pytest.raises(InputError, match=message):
        export_released(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_parameter_that_the_formats_do_not_know(tmp_path: Path) -> None:
    """As of an expert of one's own: it would be lost in silence, or be left as it was drawn."""
    model = Transformer(TransformerConfig(64, 1, 16, 24, 2), MoEConfig())
    model.blocks[0].moe.register_parameter("scales", torch.nn.Parameter(torch.ones(2)))
    for export in (export_released, export_hub):
        with pytest.raises(InputError, match=r"blocks\.0\.moe\.scales: this format has no tensor for it"):
            export(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["released", "hub"])
def test_a_parameter_that_the_formats_do_not_read(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, load = {"released": (export_released, load_released), "hub": (export_hub, load_hub)}[module]
    export(Transformer(TransformerConfig(64, 1, 16, 24, 2), MoEConfig()), tmp_path)
    names = sys.modules[f"moepp.model.{module}"].tensor_names
    fewer = lambda *sizes: [pair for pair in names(*sizes) if "mix" not in pair[0]]  # noqa: E731
    monkeypatch.setattr(f"moepp.model.{module}.tensor_names", fewer)
    with pytest.raises(InputError, match=r"zero_computation\.mix: this format has no tensor for it"):
        load(tmp_path)


def test_bin_shards(tmp_path: Path) -> None:
    tensors = load_file(REFERENCE / FOLDERS[0] / "model.safetensors")
    names = sorted(tensors)
    for i, half in enumerate((names[::2], names[1::2])):
        torch.save({name: tensors[name] for name in half}, tmp_path / f"pytorch_model-{i}.bin")
    shutil.copy(REFERENCE / FOLDERS[0] / "config.json", tmp_path)
    assert_same(load_released(tmp_path).state_dict(), load_released(REFERENCE / FOLDERS[0]).state_dict())


def test_bin_files_cannot_run_code(tmp_path: Path) -> None:
    shutil.copy(REFERENCE / FOLDERS[0] / "config.json", tmp_path)
    torch.save({"x": Path.home}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin: cannot be read"):
        load_released(tmp_path)


def test_bin_files_hold_tensors(tmp_path: Path) -> None:
    shutil.copy(REFERENCE / FOLDERS[0] / "config.json", tmp_path)
    tensors = load_file(REFERENCE / FOLDERS[0] / "model.safetensors")
    torch.save(tensors | {"model.norm.weight": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model.norm.weight and its like do not make one norm.weight"):
        load_released(tmp_path)


def damage_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def damage_tensor(folder: Path, value: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.moe.experts.experts.2.down_proj.weight"] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: damage_config(f, model_type="mixtral"), "model_type is 'mixtral'"),
        (lambda f: damage_config(f, vocab_size=None), "has no key 'vocab_size'"),
        (lambda f: damage_config(f, vocab_size=64), "makes embedding.weight"),
        (lambda f: damage_config(f, num_hidden_layers=9), "has no tensor"),
        (lambda f: (f / "model.safetensors").unlink(), "has neither"),
        (lambda f: (f / "model.safetensors").write_bytes(b"garbage"), "cannot be read"),
        (lambda f: save_file({"x": torch.ones(1)}, f / "model.safetensors"), "has no tensor"),
        (lambda f: damage_config(f, num_hidden_layers=1.5), "transformer.n_layers: must be a whole number"),
        (lambda f: damage_config(f, intermediate_size=10**30), "transformer.intermediate_size: must lie between"),
        (lambda f: damage_config(f, max_position_embeddings=10**9), "a model of these sizes needs"),
        (lambda f: damage_config(f, rms_norm_eps="1e-5"), "transformer.norm_eps: must be a number"),
        (lambda f: (f / "config.json").write_text("[" * 10**5), "is not JSON"),
        (lambda f: damage_tensor(f, torch.ones(3, 4)), "down_proj.weight and its like do not make one"),
        (lambda f: damage_tensor(f, torch.tensor(1.0)), "down_proj.weight and its like do not make one"),
        (lambda f: damage_tensor(f, torch.full((32, 48), float("nan"))), "values that are not finite"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage, message: str) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(REFERENCE / FOLDERS[0] / name, tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_released(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options", [{"renormalize_without_zero": False}, {"logits_norm_std": 0.5}, {"scale_expert_input": 2.0}]
)
def test_variants_survive_export(tmp_path: Path, options: dict) -> None:
    moe = MoEConfig(n_ffn=4, **options)
    model = Transformer(TransformerConfig(64, 2, 16, 24, 2, context_length=8), moe).eval()
    export_released(model, tmp_path)
    again = load_released(tmp_path)
    names = ("renormalize_without_zero", "logits_norm_std", "scale_expert_input")
    assert [getattr(again.moe_config, name) for name in names] == [getattr(moe, name) for name in names]
    tokens = torch.arange(8).view(1, 8)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
