"""Training a swapped model with transformers' own Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moepp.model.router import routers
from tests.conftest import assert_same
from tests.foreign_models import SIZES, build, transformers

hf = pytest.importorskip("moepp.hf", reason="needs transformers: pip install 'moepp[hf]'")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install 'moepp[hf]'")

BETA = 0.5
ADDED = {"n_zero": 2, "n_copy": 1, "n_const": 1}


def rows() -> list[dict[str, torch.Tensor]]:
    """Of unequal numbers of labels, so that micro-batches do not count alike."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(40):
        input_ids = torch.randint(SIZES["vocab_size"], (24,), generator=generator)
        labels = input_ids.clone()
        labels[: i % 20] = -100
        data.append({"input_ids": input_ids, "labels": labels})
    return data


def swapped() -> Any:
    return hf.swap_moe(build("olmoe"), **ADDED, balance_weight=BETA)


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    arguments = {
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(output_dir=str(folder), **arguments | options),
        train_dataset=rows(),
        callbacks=[hf.BiasSchedule(steps=3, start=-2.0)],
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_five_steps(tmp_path: Path, checkpointing: bool) -> None:
    model = swapped()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = trainer(model, tmp_path, gradient_checkpointing=checkpointing)
    trained.train()
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert all(router.bias == 0 for router in routers(model))


def test_a_step_of_two_micro_batches_has_the_mean_of_their_balance_loss(tmp_path: Path) -> None:
    model = swapped()
    run = trainer(model, tmp_path, learning_rate=0.0, max_steps=1)
    batches = [batch for _, batch in zip(range(2), run.get_train_dataloader(), strict=False)]
    run.train()
    assert all(router.bias == -2 for router in routers(model))
    model.eval()
    nll = balance = n_all = 0.0
    with torch.no_grad():
        for batch in batches:
            n_labels = (batch["labels"][:, 1:] != -100).sum().item()
            nll += n_labels * model(**batch).loss.item()
            balance += n_labels * hf.balance_loss(model).item()
            n_all += n_labels
    assert run.state.log_history[0]["loss"] == pytest.approx((nll + BETA * balance) / n_all, rel=1e-5)
    assert BETA * balance / n_all > 0.1


def test_a_checkpoint_is_gone_on_with(tmp_path: Path) -> None:
    """Built from the checkpoint's folder: Trainer itself cannot read back experts, in any of these models."""
    whole = swapped()
    trainer(whole, tmp_path, save_strategy="steps", save_steps=3).train()
    folder = tmp_path / "checkpoint-3"
    model = hf.swap_moe(transformers.AutoModelForCausalLM.from_pretrained(folder), **ADDED, balance_weight=BETA)
    hf.load_added(model, folder)
    trainer(model, tmp_path / "second").train(resume_from_checkpoint=str(folder))
    assert_same(model.state_dict(), whole.state_dict())
