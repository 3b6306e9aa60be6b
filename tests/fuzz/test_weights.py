"""Checkpoints and released folders of any content: refused in one line, or models whose numbers are finite."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moepp.cli import main
from moepp.model import Transformer, load_released
from moepp.model.generate import generate
from moepp.training.checkpoint import load, read_checkpoint
from tests.conftest import tiny
from tests.fuzz.harness import (
    EDIT,
    JUNK,
    POSITION,
    Edit,
    TreeEdit,
    cases,
    digests,
    refused,
    tree_edit,
    works_or_one_line,
)

REFERENCE = Path(__file__).parents[1] / "model/reference/released_linear_gate"


def smallest(text: Path) -> list[str]:
    """Options of a run of one step, whose checkpoint is small enough to be copied hundreds of times."""
    sizes = {"n_layers": 1, "hidden_size": 16, "intermediate_size": 8, "context_length": 16}
    options = [f"--model.transformer.{name}={size}" for name, size in sizes.items()]
    return [*tiny(text), *options, "--model.moe.n_ffn=2", "--trainer.max_steps=1", "--trainer.limit_val_batches=1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Iterator[Path]:
    """The current directory, with whole.ckpt of a training run, and a released folder to spoil."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", *smallest(text_file), "--trainer.default_root_dir=run"]) == 0
        Path("run/checkpoints/step-00000001.ckpt").rename("whole.ckpt")
        shutil.rmtree("run")
        Path("released").mkdir()
        yield folder


def speaks(model: Transformer) -> None:
    """What it writes is in its vocabulary; numbers that are not finite are refused on the way."""
    written = generate(model, torch.tensor([0, 1]), max_new_tokens=2)
    assert 0 <= written.min() <= written.max() < model.config.vocab_size


# ---- checkpoints -------------------------------------------------------------------------------------------


def use(path: str) -> None:
    before = digests()
    refused(lambda: speaks(load(path).model))
    assert digests() == before


@cases(125, edits=st.lists(EDIT, min_size=1, max_size=3))
def test_checkpoint_bytes(home: Path, edits: list[Edit]) -> None:
    data = Path("whole.ckpt").read_bytes()
    for edit in edits:
        data = edit(data)
    Path("any.ckpt").write_bytes(data)
    use("any.ckpt")


TENSORS = st.sampled_from(
    [
        torch.zeros(0),
        torch.zeros(3),
        torch.zeros(2, 2, dtype=torch.int64),
        torch.full((320, 16), float("nan")),
        torch.full((320, 16), 3e38),
        torch.zeros(320, 16, dtype=torch.complex64),
        torch.zeros(320, 16).to_sparse(),
        torch.zeros(320, 16, device="meta"),
    ]
)


@cases(
    125,
    edits=st.lists(tree_edit(JUNK | TENSORS), min_size=1, max_size=2),
    part=st.sampled_from(["", "moepp", "state_dict"]),
)
def test_checkpoint_content(home: Path, edits: list[TreeEdit], part: str) -> None:
    checkpoint = read_checkpoint("whole.ckpt")
    for edit in edits:
        if part and isinstance(checkpoint.get(part), dict) and checkpoint[part]:
            checkpoint[part] = edit(dict(checkpoint[part]))
        else:
            checkpoint = edit(
                {key: checkpoint[key] for key in checkpoint if key in ("moepp", "state_dict")} or {"": 0}
            )
    torch.save(checkpoint, "any.ckpt")
    use("any.ckpt")


@cases(
    30,
    edit=tree_edit(JUNK | TENSORS),
    verb=st.sampled_from(["generate", "export out", "export out --format=hf", "fit"]),
)
def test_checkpoint_on_the_command_line(home: Path, text_file: Path, edit: TreeEdit, verb: str) -> None:
    checkpoint = read_checkpoint("whole.ckpt")
    torch.save(edit({key: checkpoint[key] for key in ("moepp", "state_dict")}), "any.ckpt")
    words = [*verb.split(), "--ckpt=any.ckpt"]
    if verb == "generate":
        words.append("--max_new_tokens=2")
    if verb == "fit":
        words = ["fit", *smallest(text_file), "--ckpt_path=any.ckpt"]
    works_or_one_line(*words)
    shutil.rmtree("out", ignore_errors=True)


@cases(
    20, edit=tree_edit(JUNK | TENSORS), part=st.sampled_from([None, "optimizer_states", "lr_schedulers", "loops"])
)
def test_resume(home: Path, text_file: Path, edit: TreeEdit, part: str | None) -> None:
    """A checkpoint to go on from, of any content."""
    checkpoint = dict(read_checkpoint("whole.ckpt"))
    if part is None:
        checkpoint = edit(checkpoint)
    else:
        checkpoint[part] = edit(checkpoint[part])
    torch.save(checkpoint, "any.ckpt")
    works_or_one_line("fit", *smallest(text_file), "--ckpt_path=any.ckpt", "--trainer.max_steps=2")
    shutil.rmtree("runs", ignore_errors=True)


class Harm:
    """Unpickled, it makes a directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def zipped(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


PICKLES = [pickle.dumps(Harm()), pickle.dumps({"moepp": {}, "state_dict": {}}), pickle.dumps([1, 2]), b"\x80\x02."]
FOREIGN = st.one_of(
    st.sampled_from(PICKLES),
    st.dictionaries(
        st.sampled_from(
            ["archive/data.pkl", "archive/version", "archive/data/0", "archive/byteorder", "../x", "a"]
        ),
        st.sampled_from(PICKLES) | st.binary(max_size=9),
        max_size=4,
    ).map(zipped),
    (JUNK | TENSORS).map(saved),
    st.fixed_dictionaries({"moepp": JUNK, "state_dict": JUNK}).map(saved),
    st.just(Harm()).map(saved),
)


@cases(75, content=FOREIGN)
def test_foreign_files(home: Path, content: bytes) -> None:
    Path("any.ckpt").write_bytes(content)
    use("any.ckpt")
    Path("released/pytorch_model.bin").write_bytes(content)
    shutil.copy(REFERENCE / "config.json", "released")
    refused(lambda: load_released("released"))
    Path("released/pytorch_model.bin").unlink()
    assert not Path("harm").exists()


@cases(60, edit=tree_edit(), file=st.sampled_from(["config.json", "config.json", "tokenizer.json"]))
def test_exported_folders(home: Path, edit: TreeEdit, file: str) -> None:
    if not Path("exported").exists():
        assert main(["export", "exported", "--ckpt=whole.ckpt", "--format=hf"]) == 0
    whole = Path("exported", file).read_text()
    Path("exported", file).write_text(json.dumps(edit(json.loads(whole))))
    works_or_one_line("import", "exported", "any.ckpt")
    Path("exported", file).write_text(whole)
    Path("any.ckpt").unlink(missing_ok=True)


# ---- released folders --------------------------------------------------------------------------------------


def released(config: bytes, weights: bytes) -> None:
    Path("released/config.json").write_bytes(config)
    Path("released/model.safetensors").write_bytes(weights)
    before = digests()
    refused(lambda: speaks(load_released("released")))
    assert digests() == before
    Path("released/model.safetensors").unlink()


CONFIG, WEIGHTS = (REFERENCE / "config.json").read_bytes(), (REFERENCE / "model.safetensors").read_bytes()


@cases(125, edit=tree_edit())
def test_released_config(home: Path, edit: TreeEdit) -> None:
    released(json.dumps(edit(json.loads(CONFIG))).encode(), WEIGHTS)


@cases(50, edit=EDIT)
def test_released_config_bytes(home: Path, edit: Edit) -> None:
    released(edit(CONFIG), WEIGHTS)


@cases(75, edit=EDIT)
def test_released_weights_bytes(home: Path, edit: Edit) -> None:
    released(CONFIG, edit(WEIGHTS))


CHANGES = {
    "nan": lambda value: value / 0,
    "huge": lambda value: value * 1e38,
    "half": lambda value: value.half(),
    "int": lambda value: value.long(),
    "turned": lambda value: value.movedim(0, -1).contiguous(),
    "cut": lambda value: value[1:].contiguous(),
    "flat": lambda value: value.flatten(),
    "number": lambda value: value.flatten()[0],
    "none": lambda value: value[:0],
}


@cases(75, change=st.sampled_from(list(CHANGES)), at=POSITION)
def test_released_tensors(home: Path, change: str, at: float) -> None:
    tensors = load_file(REFERENCE / "model.safetensors")
    name = sorted(tensors)[int(at * len(tensors))]
    tensors[name] = CHANGES[change](tensors[name])
    save_file(tensors, "changed.safetensors")
    released(CONFIG, Path("changed.safetensors").read_bytes())


@cases(75, edit=tree_edit(JUNK | TENSORS))
def test_released_pickles(home: Path, edit: TreeEdit) -> None:
    Path("released/config.json").write_bytes(CONFIG)
    torch.save(edit(load_file(REFERENCE / "model.safetensors")), "released/pytorch_model.bin")
    refused(lambda: speaks(load_released("released")))
    Path("released/pytorch_model.bin").unlink()


@cases(12, edit=tree_edit())
def test_import(home: Path, edit: TreeEdit) -> None:
    Path("released/config.json").write_text(json.dumps(edit(json.loads(CONFIG))))
    Path("released/model.safetensors").write_bytes(WEIGHTS)
    works_or_one_line("import", "released", "imported.ckpt")
    Path("imported.ckpt").unlink(missing_ok=True)
    Path("released/model.safetensors").unlink()
