"""Bad input ends in one line that names the cause and exit code 2, and nothing is overwritten or left behind."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch

from moepp.cli import main
from moepp.training.checkpoint import read_checkpoint, step_path, write_checkpoint
from tests.conftest import refused, tiny


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.moe.n_zeros=1", "--model.moe.n_zeros=1 (did you mean model.moe.n_zero?)"),
        ("--model.moe.n_ffn=many", 'Parser key "model.moe.n_ffn": must be int; got many'),
        (
            "--model.moe.gating_residual=perhaps",
            'Parser key "model.moe.gating_residual": must be bool; got perhaps',
        ),
        ("--model.moe.ffn_budget=x", 'Parser key "model.moe.ffn_budget": must be one of float, null; got x'),
        ("--data.val_part=half", "Parser key \"data.val_part\": must be 'all', 'tune', 'report'; got half"),
        ("--model.moe.n_ffn=0", "moe.n_ffn: must be at least 1, got 0"),
        ("--model.moe.top_k=13", "moe.top_k: must not exceed the 12 experts, got 13"),
        ("--model.moe.tau=0", "moe.tau: must be positive, got 0.0"),
        ("--model.moe.tau=-1", "moe.tau: must be positive, got -1.0"),
        ("--model.moe.capacity_factor=0", "moe.capacity_factor: must be positive"),
        ("--model.transformer.n_heads=3", "transformer.n_heads: must divide hidden_size=32, got 3"),
        ("--data.seq_len=64", "data.seq_len: 64 is longer than model.transformer.context_length=32"),
        ("--data.batch_size=0", "data.batch_size"),
        ("--model.optim.lr=0", "optim.lr: must be positive, got 0.0"),
        ("--config=nowhere.yaml", "nowhere.yaml"),
        ("--ckpt_path=nowhere.ckpt", "checkpoint: nowhere.ckpt does not exist"),
        ("--ckpt_path=.", "checkpoint: . is a folder: name a file, such as checkpoints/best.ckpt"),
        ("--ckpt_path=last", "runs/moepp has no checkpoint"),
        ("--data.path=nowhere.txt", "nowhere.txt"),
        ("--data.path=", "data.path is empty"),
        ("--seed_everything=-1", "seed_everything: must be at least 0 and below 2^32, got -1"),
        ("--model.moe.tau=.inf", "moe.tau: must lie between -1e9 and 1e9, got inf"),
        ("--trainer.max_steps=-1", "trainer.max_steps: say when to stop"),
        ("--trainer.accelerator=gpu", "trainer: "),
        ("--trainer.devices=0", "trainer: "),
        ("--trainer.strategy=foo", "foo"),
        ("--trainer.callbacks=EarlyStopping", 'callbacks": the following arguments are required: monitor'),
        ("--trainer.callbacks=[EarlyStopping]", "the following arguments are required: monitor"),
        ("--trainer.callbacks=nowhere.Mine", "\"trainer.callbacks\": No module named 'nowhere'"),
        ("--trainer.callbacks=yaml.Mine", "\"trainer.callbacks\": module 'yaml' has no attribute 'Mine'"),
        ("--trainer.callbacks={class_path: Timer, init_args: {verbose: 3}}", '"verbose": must be bool; got 3'),
        ("--trainer.logger=CSVLogger", '"trainer.logger": the following arguments are required: save_dir'),
        ("--data.out_root=/proc/nowhere", "/proc/nowhere"),
        ("--model.moe.balance_weight=.inf", "moe.balance_weight: must lie between -1e9 and 1e9, got inf"),
        ("--model.transformer.hidden_size=1000000", "a model of these sizes needs"),
        ("--data.vocab_size=1000000000000", "vocab_size: must lie between"),
        ("--trainer.max_step=1", "unrecognized arguments: --trainer.max_step=1 (did you mean trainer.max_steps?)"),
        ("--trainer.log_every_n_steps=0", "trainer.log_every_n_steps: must be at least 1, got 0"),
        ("--trainer.log_every_n_steps=null", "trainer.log_every_n_steps: must be at least 1, got None"),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches: must be at least 1, got 0"),
        ("--data.num_workers=1000000", "data.num_workers: must be a whole number from 0 to 1024"),
        ("--data.seed=9223372036854775808", "data.seed: must be a whole number from 0 to"),
        ("--data.path=\udcff.txt", "is not UTF-8"),
        ("--model.moe={n_zero: 1, n_zero: 2}", "n_zero stands twice"),
    ],
)
def test_options(text_file: Path, workdir: Path, capsys, option: str, message: str) -> None:
    assert message in refused(capsys, "fit", *tiny(text_file), option)


def test_recipes(text_file: Path, workdir: Path, capsys) -> None:
    for text, message in {
        "model: {moe: {taus: 1}}": "model.moe.taus",
        "model: [": "is not YAML",
        "base: nowhere.yaml": "config: File does not exist: '",
        "variants: {}": "bad.yaml: is a matrix of variants: moepp ablate --matrix bad.yaml trains them",
        "base: bad.yaml": "go round in a circle",
        f"base: ../{Path.cwd().name}/bad.yaml": "go round in a circle",
        "trainer:\ndata: {seed: 1}": "fit: trainer: holds no options but None",
        "model:": "fit: model: holds no options but None",
        "": "bad.yaml: is no recipe",
        "- 1": "bad.yaml: is no recipe",
        "model: {optim: false}": "model.optim: holds no options but False",
        "seed_everything: null": "seed_everything: must be at least 0 and below 2^32, got None",
        "model: {optim: '&a {b: *a}'}": "nested too deep, or holds itself",
        "a: &a [*a]": "bad.yaml: is not YAML: Circular reference",
        "trainer: {max_steps: 3}\ntrainer: {max_epochs: 1}": "bad.yaml: is not YAML: trainer stands twice",
        "a: 2020-13-45": "bad.yaml: is not YAML: month must be in 1..12",
        "a: !!int x": "bad.yaml: is not YAML: invalid literal",
        "[" * 5000: "bad.yaml: is not YAML: maximum recursion depth",
        'base: "\\0.yaml"': "File does not exist: '",
        "data: {seq_len: '${model.transformer.width}'}": "width",
    }.items():
        Path("bad.yaml").write_text(text)
        assert message in refused(capsys, "fit", *tiny(text_file), "--config=bad.yaml")


def test_of_a_chain_of_recipes_the_one_at_fault_is_named(text_file: Path, workdir: Path, capsys) -> None:
    Path("last.yaml").write_text("base: first.yaml\ntrainer: {max_steps: 3}")
    moe = ("model: {moe: {n_zeroo: 1}}", "model: {moe: {n_zero: two}}", "model: {moe: {n_zero: -1}}")
    for text in (*moe, "trainer:"):
        Path("first.yaml").write_text(text)
        line = refused(capsys, "fit", *tiny(text_file), "--config=last.yaml")
        assert line.endswith(f", in {Path('first.yaml').resolve()}")
    Path("first.yaml").write_text("model: {moe: {n_zero: 1}}")
    for option in ("--model.moe.n_zero=-1", "--model.moe={n_zero: -1}", "--model.moe.n_zeroo=1"):
        assert ", in " not in refused(capsys, "fit", *tiny(text_file), "--config=last.yaml", option)


def test_text(text_file: Path, workdir: Path, capsys) -> None:
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("A few words.\n\nAnd some more.")
    Path("latin1.txt").write_bytes(text_file.read_bytes()[:5000] + b"\xe9t\xe9")
    Path("folder").mkdir()
    Path("cut.txt.gz").write_bytes(gzip.compress(text_file.read_bytes())[:500])
    for name in ("empty.txt", "short.txt", "latin1.txt", "folder", "cut.txt.gz"):
        assert name in refused(capsys, "fit", *tiny(text_file), f"--data.path={name}")
        assert name in refused(capsys, "prepare", name)


def test_token_files(text_file: Path, workdir: Path, capsys) -> None:
    assert main(["prepare", str(text_file), "--vocab_size=320"]) == 0
    (whole,) = Path("data/prepared").glob("small*")

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(whole, name))

    truncated = damaged("truncated")
    (truncated / "train-00000.bin").write_bytes((whole / "train-00000.bin").read_bytes()[:-2])
    assert "train-00000.bin" in refused(capsys, "fit", *tiny(text_file), "--data.path=truncated")
    other = damaged("other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "another tokenizer" in refused(capsys, "fit", *tiny(text_file), "--data.path=other")
    larger = damaged("larger")
    meta = json.loads((larger / "meta.json").read_text()) | {"vocab_size": 400, "padded_vocab_size": 448}
    (larger / "meta.json").write_text(json.dumps(meta))
    assert "set data.vocab_size=448" in refused(capsys, "fit", *tiny(text_file), "--data.path=larger")


def test_checkpoints(text_file: Path, workdir: Path, capsys) -> None:
    assert main(["fit", *tiny(text_file), "--trainer.max_steps=2"]) == 0
    good = "runs/moepp/1/checkpoints/step-00000002.ckpt"
    message = refused(capsys, "fit", *tiny(text_file), "--model.moe.n_ffn=4", f"--ckpt_path={good}")
    assert "model.moe.n_ffn: is 4, the checkpoint's is 8; --config with the config.yaml of its run" in message
    assert "hidden_size" in refused(
        capsys, "fit", *tiny(text_file), "--model.transformer.hidden_size=64", f"--ckpt_path={good}"
    )
    Path("other.txt").write_text(text_file.read_text().upper())
    assert "another tokenizer" in refused(capsys, "fit", *tiny(Path("other.txt")), f"--ckpt_path={good}")
    Path("cut.ckpt").write_bytes(Path(good).read_bytes()[:-1000])
    torch.save({"state_dict": {}}, "foreign.ckpt")
    torch.save({"moepp": Path.home}, "code.ckpt")
    for name in ("cut.ckpt", "foreign.ckpt", "code.ckpt"):
        assert name in refused(capsys, "generate", "--ckpt", name)
        assert name in refused(capsys, "export", "out", "--ckpt", name)
        assert name in refused(capsys, "fit", *tiny(text_file), f"--ckpt_path={name}")
    assert "32" in refused(capsys, "generate", "--ckpt", good, "--max_new_tokens=40")
    assert "temperature" in refused(capsys, "generate", "--ckpt", good, "--temperature=-1")
    assert "not UTF-8" in refused(capsys, "generate", "--ckpt", good, "--prompt=\udcff")
    assert "seed" in refused(capsys, "generate", "--ckpt", good, f"--seed={2**64}")
    weights = torch.load(good, weights_only=True)
    del weights["optimizer_states"]
    torch.save(weights, "weights.ckpt")
    message = refused(capsys, "fit", *tiny(text_file), "--ckpt_path=weights.ckpt")
    assert "weights.ckpt has no optimizer_states" in message
    Path(good).write_bytes(Path("cut.ckpt").read_bytes())
    assert "are all damaged" in refused(capsys, "fit", *tiny(text_file), "--ckpt_path=last")


def test_verbs(workdir: Path, capsys) -> None:
    assert "trian: is no verb, use one of fit" in refused(capsys, "trian")
    assert "train first" in refused(capsys, "generate")
    assert "nowhere" in refused(capsys, "import", "nowhere", "out.ckpt")


def test_a_run_ended_by_time_alone(text_file: Path, workdir: Path, capsys) -> None:
    options = ["--trainer.max_steps=-1", "--trainer.max_time=00:00:01:00"]
    assert "trainer.max_steps: say when to stop" in refused(capsys, "fit", *tiny(text_file), *options)


@pytest.mark.parametrize("every", ["4", "0.5", "00:00:01:00"])
def test_a_validation_amid_a_step(text_file: Path, workdir: Path, capsys, every: str) -> None:
    options = ["--trainer.accumulate_grad_batches=3", f"--trainer.val_check_interval={every}"]
    message = f"trainer.val_check_interval: {every} can end amid a step"
    assert message in refused(capsys, "fit", *tiny(text_file), *options)


def test_a_validation_after_every_epoch_ends_a_step(text_file: Path, workdir: Path) -> None:
    options = ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=1.0"]
    epochs = ["--trainer.check_val_every_n_epoch=1", "--trainer.limit_train_batches=4", "--trainer.max_steps=4"]
    assert main(["fit", *tiny(text_file), *options, *epochs]) == 0


@pytest.mark.parametrize("spoiled", ["config", "weight"])
def test_a_checkpoint_of_wrong_content_is_not_evaluated(
    text_file: Path, workdir: Path, capsys, spoiled: str
) -> None:
    assert main(["fit", *tiny(text_file), "--trainer.max_steps=1"]) == 0
    content = read_checkpoint(step_path(Path("runs/moepp/1"), 1))
    part, key = ("moepp", "moe") if spoiled == "config" else ("state_dict", "model.norm.weight")
    del content[part][key]
    write_checkpoint(Path("bad.ckpt"), content)
    assert "bad.ckpt: cannot be evaluated" in refused(capsys, "validate", *tiny(text_file), "--ckpt_path=bad.ckpt")
