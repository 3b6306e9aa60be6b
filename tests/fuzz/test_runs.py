"""Training and generating for real, with options from the edge of what is allowed and beyond."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from moepp.cli import main
from tests.conftest import tiny
from tests.fuzz.harness import cases, works_or_one_line


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        yield Path()


@pytest.fixture(scope="module")
def trained(home: Path, text_file: Path) -> str:
    assert main(["fit", *tiny(text_file), "--trainer.max_steps=1", "--trainer.default_root_dir=trained"]) == 0
    return "trained/checkpoints/step-00000001.ckpt"


NUMBERS = st.sampled_from(["0", "1e-45", "1e-9", "0.5", "1", "1e9", "1e300", "nan", "inf", "-1", "null", "x", ""])


@cases(
    100,
    prompt=st.text(max_size=20) | st.sampled_from(["<|endoftext|>", "\ud800", "a" * 5000, "\x00"]),
    options=st.dictionaries(
        st.sampled_from(["temperature", "top_p", "max_new_tokens", "seed"]), NUMBERS | st.just("2")
    ),
)
def test_generate(home: Path, trained: str, prompt: str, options: dict[str, str]) -> None:
    words = [f"--{name}={value}" for name, value in options.items()]
    works_or_one_line("generate", f"--ckpt={trained}", f"--prompt={prompt}", *words)


FITS = st.fixed_dictionaries(
    {},
    optional={
        "data.seq_len": st.sampled_from([1, 7, 32, 33, 10**6]),
        "data.batch_size": st.sampled_from([1, 3, 5000]),
        "data.val_fraction": st.sampled_from([1e-9, 0.5, 0.999]),
        "data.seed": st.sampled_from([2**31, 2**63 - 1, 2**63]),
        "data.vocab_size": st.sampled_from([257, 300, 10**12]),
        "model.moe.n_ffn": st.sampled_from([1, 3]),
        "model.moe.top_k": st.sampled_from([1, 4]),
        "model.moe.tau": st.sampled_from([1e-30, 1e9]),
        "model.moe.capacity_factor": st.sampled_from([1e-30, 1.0, 1e9]),
        "model.moe.logits_norm_std": st.sampled_from([1e-30, 1.0]),
        "trainer.val_check_interval": st.sampled_from([0, 1, 0.5, 10**9]),
        "trainer.limit_val_batches": st.sampled_from([0, 1, 0.01]),
        "trainer.accumulate_grad_batches": st.sampled_from([1, 7]),
        "trainer.gradient_clip_val": st.sampled_from([0, 1e-30, "null"]),
        "trainer.log_every_n_steps": st.sampled_from([0, 1]),
        "trainer.precision": st.sampled_from(["bf16-mixed", "64-true", "8"]),
        "trainer.max_epochs": st.sampled_from([0, 1]),
    },
)


@cases(12, options=FITS)
def test_fit(home: Path, text_file: Path, options: dict[str, Any]) -> None:
    words = [f"--{name}={value}" for name, value in options.items()]
    if works_or_one_line("fit", *tiny(text_file), "--trainer.max_steps=2", *words):
        for metrics in Path("runs").rglob("metrics.csv"):
            assert ",nan" not in metrics.read_text()
    shutil.rmtree("runs", ignore_errors=True)
