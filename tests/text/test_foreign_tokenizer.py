"""Token files for the tokenizer of another model."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moepp.cli import main
from moepp.model.errors import InputError
from moepp.study.figures.parts_of_speech import token_texts
from moepp.text.held_out import TextOptions, open_held_out
from moepp.text.token_files import TokenFiles
from moepp.text.tokenizer import Vocabulary, end_of_text
from moepp.training.checkpoint import read_checkpoint, step_path, write_checkpoint
from tests.conftest import refused, tiny
from tests.text.conftest import make, one_line, write_text

SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    """As of Llama 3 or Qwen, with what must not be obeyed: something before a text, and a length."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on a mat"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=5000)
    return tokenizer


def metaspace(more: int = 0) -> Tokenizer:
    """As of Llama 2 or Mixtral: a space belongs to the word after it, and the first word gets one, too."""
    words = ["▁the", "▁cat", "▁sat", "▁on", "▁a", "▁mat", "▁and", *(f"▁{n}" for n in range(more))]
    pieces = [(word, -2.0) for word in words] + [
        ("▁", -4.0),
        *((letter, -5.0) for letter in "abcdefghijkls.-0123"),
    ]
    tokenizer = Tokenizer(models.Unigram([*((name, 0.0) for name in SPECIAL), *pieces], 0, byte_fallback=False))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **config: object) -> str:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "tokenizer.json")


KINDS = {"byte-level": byte_level, "metaspace": metaspace, "large": lambda: metaspace(more=70_000)}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_text_and_its_end(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind]()
    written = write_text(tmp_path / "text", {"a": 20, "b": 30})  # with <|endoftext|> and what no word is for in it
    files = TokenFiles.open(make(tmp_path, vocab_size=None, tokenizer=save(tokenizer, tmp_path / "model")))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    expected = {(name, *tokenizer.encode(text, add_special_tokens=False).ids) for name, text in written}
    val = [files.val[begin:end] for begin, end in files.val_ranges]
    found = []
    for names, ids in ((files.domains, val[0]), (files.domains[1:], val[1]), (files.domains, files.train[1:])):
        assert ids[-1] == 2  # </s>
        for document in np.split(ids[:-1], np.flatnonzero(ids[:-1] == 2) + 1):
            tokens = tuple(int(i) for i in document if i != 2)
            found.append(next((name, *tokens) for name in names if (name, *tokens) in expected))
    assert set(found) == expected
    assert len(found) == len(written)
    assert files.meta["vocab_size"] == tokenizer.get_vocab_size()
    assert files.train.dtype == (np.uint32 if kind == "large" else np.uint16)
    # bytes are the text's, also where a tokenizer cannot say them
    sizes = [sum(len(text.encode()) for domain, text in written if domain == name) for name in files.domains]
    domains = files.meta["domains"].values()
    assert [domain["train"]["bytes"] + domain["val"]["bytes"] for domain in domains] == sizes
    for ids, bytes_per_letter, domain in zip(val, files.bytes_per_letter.tolist(), domains, strict=True):
        letters = sum(0 if i == 2 else len(tokenizer.id_to_token(i)) for i in ids.tolist())
        assert files.letters_per_token[ids.astype(int)].sum() == letters
        assert letters * bytes_per_letter == pytest.approx(domain["val"]["bytes"])
    assert (files.bytes_per_letter == 1).all() == (kind == "byte-level")


@pytest.mark.parametrize(
    ("config", "end"),
    [
        ({}, "</s>"),  # it has a known name
        ({"tokenizer_config.json": {"eos_token": "▁mat"}}, "▁mat"),
        ({"tokenizer_config.json": {"eos_token": {"content": "▁mat", "special": True}}}, "▁mat"),
        ({"tokenizer_config.json": {"eos_token": "▁mat"}, "config.json": {"eos_token_id": 4}}, "▁mat"),
        ({"config.json": {"eos_token_id": 4}}, "▁cat"),
        ({"config.json": {"eos_token_id": [4, 5]}}, "▁cat"),
        ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": 10**6}}, "</s>"),
        ({"tokenizer_config.json": {"eos_token": "<|of another|>"}, "config.json": {"eos_token_id": -1}}, "</s>"),
        ({"tokenizer_config.json": ["eos_token"], "config.json": {"eos_token_id": []}}, "</s>"),
    ],
)
def test_the_end_of_a_text_is_found(tmp_path: Path, config: dict[str, object], end: str) -> None:
    path = Path(save(metaspace(), tmp_path))
    for name, content in config.items():
        (tmp_path / name).write_text(json.dumps(content))
    vocabulary = Vocabulary.read(path)
    assert vocabulary.tokenizer.id_to_token(vocabulary.end_of_text) == end


def test_of_several_known_ends_the_base_models_is_taken() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|im_end|>", "<|eot_id|>", "<|endoftext|>"])
    assert end_of_text(tokenizer) == tokenizer.token_to_id("<|endoftext|>")
    assert end_of_text(Tokenizer(models.BPE())) is None


def test_the_folder_depends_on_what_the_tokenizer_holds(tmp_path: Path) -> None:
    write_text(tmp_path / "text", {"a": 9})
    first, same, other, end = (
        make(tmp_path, vocab_size=size, tokenizer=save(tokenizer, tmp_path / name, **config))
        for size, tokenizer, name, config in (
            (None, metaspace(), "one", {}),
            (512, metaspace(), "two", {}),  # elsewhere, for a model whose vocabulary was padded
            (None, metaspace(more=1), "three", {}),
            (None, metaspace(), "four", {"eos_token": "<s>"}),
        )
    )
    assert first == same
    assert len({first, other, end, make(tmp_path)}) == 4


def test_bad_tokenizers(tmp_path: Path) -> None:
    write_text(tmp_path / "text", {"a": 9})
    (tmp_path / "text.bin").write_bytes(b"\xff")
    (tmp_path / "config.json").write_text("{}")
    endless = metaspace().to_str().replace("</s>", "<end>")
    words = Tokenizer(models.WordLevel({"</s>": 0, "the": 1}))  # no token for a word that it does not know
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for path, size, message in (
        (str(tmp_path / "nowhere.json"), None, "nowhere.json cannot be read"),
        (str(tmp_path), None, "cannot be read"),
        (str(tmp_path / "text.bin"), None, "text.bin cannot be read"),
        (str(tmp_path / "config.json"), None, "config.json cannot be read"),
        (save(Tokenizer.from_str(endless), tmp_path / "endless"), None, "say what ends a text, as eos_token"),
        (save(Tokenizer(models.BPE()), tmp_path / "empty"), None, "say what ends a text, as eos_token"),
        (save(metaspace(more=400), tmp_path / "large"), 320, "vocab_size: must be a whole number from 4"),
        (save(words, tmp_path / "words"), None, "tokenizer: cannot encode the text (WordLevel error"),
    ):
        with pytest.raises(InputError) as error:
            make(tmp_path, vocab_size=size, tokenizer=path)
        one_line(error, message)
    assert not [path for path in (tmp_path / "prepared").iterdir() if path.is_dir()]


def test_a_model_is_trained_on_them(text_file: Path, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = save(metaspace(), workdir / "model", eos_token="<s>")  # a name that is not known
    assert main(["prepare", str(text_file), f"--tokenizer={tokenizer}"]) == 0
    fit = ["fit", *tiny(text_file), f"--data.tokenizer={tokenizer}", "--trainer.max_steps=2"]
    assert main(fit) == 0
    (folder,) = Path("data/prepared").glob("small-*")  # the same
    files, checkpoint = TokenFiles.open(folder), step_path(Path("runs/moepp/1"), 2)
    assert (files.end_of_text, files.train[:1], files.val[-1]) == (1, 1, 1)
    content = read_checkpoint(checkpoint)
    assert content["moepp"]["end_of_text"] == 1
    assert main(["generate", f"--ckpt={checkpoint}", "--prompt=the cat", "--max_new_tokens=4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("the cat")

    Path("other.txt").write_text("the cat sat")
    text = open_held_out(TextOptions("other.txt"), content["moepp"], files.tokenizer, 32)
    ((_, tokens),) = text.windows()
    assert tokens[0] == 1
    texts_V = token_texts(files.tokenizer, 320)
    assert "".join(texts_V[i] for i in tokens) == " the cat sat"

    large = save(metaspace(more=400), workdir / "large")
    assert "vocab_size: must be a whole number from 4" in refused(capsys, *fit, f"--data.tokenizer={large}")


def test_what_a_prompt_begins_with(text_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was trained here, what ended its texts; else what the tokenizer puts there, if it does."""
    said = []
    monkeypatch.setattr(
        "moepp.model.generate.generate",
        lambda model, ids, *_, stop, **__: said.append((ids.tolist(), stop)) or ids,
    )
    tokenizer = metaspace()
    assert (
        main(["fit", *tiny(text_file), f"--data.tokenizer={save(tokenizer, workdir)}", "--trainer.max_steps=1"])
        == 0
    )
    content, said[:] = read_checkpoint(step_path(Path("runs/moepp/1"), 1)), []
    the_cat = tokenizer.encode("the cat").ids
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    begins = {"tokenizer": tokenizer.to_str()}
    elsewhere, earlier = content["moepp"] | {"data_hash": None}, dict(content["moepp"])
    del earlier["end_of_text"]  # of before it was kept
    for meta, before in (
        (content["moepp"] | begins, [2]),
        (earlier | begins, [2]),
        (elsewhere | begins, [1]),
        (elsewhere, []),
    ):
        write_checkpoint("any.ckpt", content | {"moepp": meta})
        assert main(["generate", "--ckpt=any.ckpt", "--prompt=the cat"]) == 0
        assert said.pop() == ([*before, *the_cat], 2)
    assert main(["generate", "--ckpt=any.ckpt"]) == 0
    assert said.pop() == ([2], 2)
