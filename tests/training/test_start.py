"""Runs that start from a checkpoint: `moepp convert`, `--model.init_from`, the schedule and the teacher."""

from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import BPE

from moepp.cli import main
from moepp.model import flops_per_token
from moepp.model.conversion import SILENT
from moepp.model.router import routers
from moepp.training.checkpoint import load, read_checkpoint, step_path, write_checkpoint
from moepp.training.module import LitMoE
from tests.conftest import assert_same, read_csv, refused, tiny

VANILLA = "vanilla.yaml"


@pytest.fixture(scope="module")
def start(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a vanilla model of 20 steps (vanilla.ckpt) and what was converted from it (converted.ckpt)."""
    folder = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", *tiny(text_file, VANILLA), "--trainer.max_steps=20"]) == 0
        (folder / "runs/vanilla/1/checkpoints/step-00000020.ckpt").rename("vanilla.ckpt")
        assert main(["convert", "vanilla.ckpt", "converted.ckpt", "--n_zero=3"]) == 0
    return folder


def further(text: Path, *options: str) -> list[str]:
    """Options of a run of 4 steps that takes the sizes of its model from the checkpoint."""
    kept = [option for option in tiny(text) if not option.startswith(("--config", "--model.transformer"))]
    return ["fit", *kept, "--data.seq_len=32", "--trainer.max_steps=4", *options]


def test_convert_adds_what_it_is_asked_for(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(start)
    before, after = load("vanilla.ckpt"), load("converted.ckpt")
    assert (after.model.moe_config.n_zero, after.model.moe_config.n_copy) == (3, 0)
    assert [router.bias.item() for router in routers(after.model)] == [SILENT] * 2
    assert [after.meta[key] for key in ("tokenizer", "data", "data_hash")] == [
        before.meta[key] for key in ("tokenizer", "data", "data_hash")
    ]
    tokens = torch.arange(60).view(2, 30)
    torch.testing.assert_close(after.model(tokens).logits, before.model(tokens).logits, rtol=0, atol=1e-5)
    assert main(["convert", "vanilla.ckpt", "default.ckpt"]) == 0
    moe = load("default.ckpt").model.moe_config
    assert (moe.n_zero, moe.expected_ffn_per_token) == (1, pytest.approx(4 / 3))
    assert (
        main(["convert", "vanilla.ckpt", "copies.ckpt", "--n_copy=1", "--n_const=2", "--ffn_per_token=1.5"]) == 0
    )
    moe = load("copies.ckpt").model.moe_config
    assert (moe.n_zero, moe.n_copy, moe.n_const) == (0, 1, 2)
    assert moe.expected_ffn_per_token == pytest.approx(1.5)


def test_a_run_goes_on_from_the_checkpoint_and_lets_the_experts_in(
    start: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(start)
    options = ["--model.convert.start=-6", "--model.convert.steps=3", "--trainer.default_root_dir=schedule"]
    seen = []
    step = LitMoE.training_step

    def watched(self: LitMoE, batch: dict, batch_idx: int) -> dict:
        seen.append(routers(self.model)[1].bias.item())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LitMoE, "training_step", watched)
    assert main(further(text_file, "--model.init_from=converted.ckpt", *options)) == 0
    assert seen == pytest.approx([-6, -4, -2, 0])
    rows = read_csv(start / "schedule")
    last_before = float(read_csv(start / "runs/vanilla/1")[-1]["train/cross_entropy"])
    assert float(rows[0]["train/cross_entropy"]) < last_before + 0.5  # drawn weights would give 5.8
    assert "starts from converted.ckpt\n" in (start / "schedule/train.log").read_text()
    config = yaml.safe_load((start / "schedule/config.yaml").read_text())["model"]
    assert config["transformer"]["hidden_size"] == 32  # the checkpoint's, where the default is 256
    assert config["moe"]["score_bias"] is True
    assert routers(load("schedule/checkpoints/step-00000004.ckpt").model)[0].bias == 0


def test_it_resumes_without_the_checkpoint_it_started_from(
    start: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(start)
    Path("gone.ckpt").write_bytes(Path("converted.ckpt").read_bytes())
    options = ["--model.init_from=gone.ckpt", "--model.convert.steps=5", "--checkpoints.keep=5"]
    runs = [Path("runs/default/whole"), Path("runs/default/cut")]
    for folder in runs:
        run = [*options, "--trainer.max_steps=6", f"--trainer.default_root_dir={folder}"]
        assert main([*further(text_file), *run]) == 0
    Path("gone.ckpt").unlink()
    step_path(runs[1], 6).unlink()
    assert main(["fit", "--ckpt_path=last"]) == 0
    assert_same(*(load(step_path(folder, 6)).model.state_dict() for folder in reversed(runs)))


def test_before_it_begins_a_run_knows_whether_it_goes_on(
    start: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded, it is given its checkpoint only after it would have looked for the one that it started from."""
    monkeypatch.chdir(start)
    options = further(text_file, "--model.init_from=converted.ckpt", "--trainer.default_root_dir=asked")
    assert main(options) == 0
    resumed: list[bool] = []
    monkeypatch.setattr(L.Trainer, "fit", lambda self, model, **_: resumed.append(model.resumed))
    assert main([*options, "--ckpt_path=asked/checkpoints/step-00000004.ckpt"]) == 0
    assert main([*options, "--trainer.default_root_dir=anew"]) == 0
    assert resumed == [True, False]


def test_a_teacher_pulls_and_is_no_part_of_the_model(
    start: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(start)
    options = ["--model.init_from=converted.ckpt", "--model.distill.teacher=vanilla.ckpt"]
    assert main(further(text_file, *options, "--trainer.default_root_dir=taught")) == 0
    rows = read_csv(start / "taught")
    assert 0 <= float(rows[0]["train/distillation"]) < 0.05  # a silent start is the teacher itself
    for row in rows:
        loss, entropy, balance, distillation = (
            float(row[f"train/{name}"]) for name in ("loss", "cross_entropy", "balance_scaled", "distillation")
        )
        assert loss == pytest.approx(0.5 * entropy + balance + 0.5 * distillation, rel=1e-5)
    checkpoint = read_checkpoint("taught/checkpoints/step-00000004.ckpt")
    assert checkpoint["state_dict"].keys() == read_checkpoint("converted.ckpt")["state_dict"].keys()
    student, teacher = load("converted.ckpt").model, load("vanilla.ckpt").model
    own = flops_per_token(student.config, student.moe_config, 32, float(rows[0]["routing/ffn_per_token"]))
    flops = 3 * own + flops_per_token(teacher.config, teacher.moe_config, 32, 2.0)
    tflops = flops * float(rows[0]["speed/tokens_per_second"]) / 1e12
    assert float(rows[0]["speed/tflops_per_second"]) == pytest.approx(tflops, rel=1e-6)
    # with all the weight on it and no balance, a student that is the teacher has nothing to learn
    options = [
        "--model.init_from=vanilla.ckpt",
        "--model.distill.teacher=vanilla.ckpt",
        "--model.distill.weight=1",
    ]
    options += ["--model.moe.balance_weight=0", "--model.optim.weight_decay=0"]
    assert main(further(text_file, *options, "--trainer.default_root_dir=equal")) == 0
    assert all(float(row["train/gradient_norm"]) < 1e-4 for row in read_csv(start / "equal"))


def test_a_dense_model_becomes_experts(
    start: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(start)
    dense = ["--model.moe.n_ffn=1", "--model.moe.top_k=1", "--trainer.max_steps=2"]
    assert main(["fit", *tiny(text_file, VANILLA), *dense, "--trainer.default_root_dir=dense"]) == 0
    convert = ["convert", "dense/checkpoints/step-00000002.ckpt", "sparse.ckpt", "--n_ffn=4"]
    assert "ffn_per_token: needs experts to be added" in refused(capsys, *convert, "--ffn_per_token=1")
    assert not Path("sparse.ckpt").exists()
    assert main(convert) == 0
    moe = load("sparse.ckpt").model.moe_config
    assert (moe.n_ffn, moe.top_k, moe.n_zero_computation) == (4, 2, 0)
    assert main(further(text_file, "--model.init_from=sparse.ckpt", "--trainer.default_root_dir=sparse")) == 0


def test_what_is_refused(
    start: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(start)
    other = load("vanilla.ckpt")
    state = {f"model.{name}": value for name, value in other.model.state_dict().items()}
    write_checkpoint(
        "other.ckpt", {"state_dict": state, "moepp": other.meta | {"tokenizer": Tokenizer(BPE()).to_str()}}
    )
    before = set(start.iterdir())
    from_vanilla, from_converted = "--model.init_from=vanilla.ckpt", "--model.init_from=converted.ckpt"
    for arguments, message in (
        (further(text_file, "--model.init_from=nowhere.ckpt"), "fit: checkpoint: nowhere.ckpt does not exist"),
        (further(text_file, from_converted, "--model.moe.n_zero=1"), "n_zero=1 (the checkpoint's is 3)"),
        (further(text_file, "--model.init_from=other.ckpt"), "init_from: other.ckpt has another tokenizer"),
        (
            further(text_file, from_vanilla, "--model.distill.teacher=other.ckpt"),
            "other.ckpt has another",
        ),
        (further(text_file, "--model.convert.start=1"), "convert.start: must not be positive"),
        (
            further(text_file, from_vanilla, "--model.convert.steps=4"),
            "convert.steps: needs experts that",
        ),
        (further(text_file, "--model.distill.weight=2"), "distill.weight: must be between 0 and 1"),
        (["convert", "converted.ckpt", "new.ckpt"], "has 3 zero-computation experts already"),
        (["convert", "vanilla.ckpt", "converted.ckpt"], "exists already"),
        (["convert", "vanilla.ckpt", "new.ckpt", "--top_k=4"], "top_k: goes with n_ffn, of a dense model, got 4"),
        (["convert", "vanilla.ckpt", "new.ckpt", "--ffn_per_token=2"], "ffn_per_token: must be above 1 and below"),
        (["convert", "vanilla.ckpt", "new.ckpt", "--n_ffn=4"], "moe.n_ffn: must be 1"),
    ):
        assert message in refused(capsys, *arguments)
    assert set(start.iterdir()) == before
