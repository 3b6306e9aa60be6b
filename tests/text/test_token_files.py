"""The folder of token files: what it says, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moepp.model.errors import InputError
from moepp.text.token_files import TokenFiles, data_hash
from tests.text.conftest import one_line


def test_describe(prepared: tuple[list[tuple[str, str]], TokenFiles]) -> None:
    written, files = prepared
    table = files.describe()
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["a", "b", "single", "all"]
    assert columns[1] == ["40", "60", "1", "101"]
    size = sum(len(text.encode()) for _, text in written)
    total = len(files.train) + len(files.val) - 2
    assert columns[4][-1] == f"{total:,}"
    assert columns[6][-1] == f"{size / total:.2f}"


def cut(folder: Path) -> None:
    with (folder / "train-00000.bin").open("r+b") as file:
        file.truncate(100)


def other_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|end_of_text|>"))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (cut, ["train-00000.bin is 100 bytes, not", "delete the folder"]),
        (other_tokenizer, ["another tokenizer than tokenizer.json"]),
        (lambda f: (f / "val.bin").unlink(), ["cannot be read as token files", "val.bin"]),
        (lambda f: (f / "meta.json").write_text("{"), ["cannot be read as token files"]),
        (lambda f: (f / "meta.json").write_text("[]"), ["cannot be read as token files"]),
        (lambda f: (f / "meta.json").write_text('{"format": 99}'), ["has format 99, not 1"]),
        (lambda f: (f / "meta.json").unlink(), ["cannot be read as token files", "meta.json"]),
    ],
)
def test_damaged_folder(
    tmp_path: Path,
    prepared: tuple[list[tuple[str, str]], TokenFiles],
    damage: Callable[[Path], None],
    parts: list[str],
) -> None:
    folder = shutil.copytree(prepared[1].path, tmp_path / "copy")
    TokenFiles.open(folder)
    damage(folder)
    with pytest.raises(InputError) as error:
        TokenFiles.open(folder)
    one_line(error, *parts, str(folder))


def test_a_folder_of_before_is_read_as_ever(
    tmp_path: Path, prepared: tuple[list[tuple[str, str]], TokenFiles]
) -> None:
    """Its training text is one file of another name."""
    folder = shutil.copytree(prepared[1].path, tmp_path / "before")
    (folder / "train-00000.bin").rename(folder / "train.bin")
    meta = (folder / "meta.json").read_text().replace("train-00000.bin", "train.bin")
    (folder / "meta.json").write_text(meta)
    before = TokenFiles.open(folder)
    assert before.train[:].tolist() == prepared[1].train[:].tolist()
    assert data_hash(before.meta) == prepared[1].meta["data_hash"]  # its checkpoints go on
