import math
from itertools import pairwise

import pytest
import torch

from moepp.model import InputError, MoEConfig, TransformerConfig, count_parameters, flops_per_token
from moepp.training.metrics import FFN, BitsPerByte
from moepp.training.module import LitMoE
from moepp.training.optimizer import AdamW, OptimConfig


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [optim.lr_at(step, total_steps=15) for step in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.55)  # half-way
    assert rates[14] == pytest.approx(0.1)
    assert optim.lr_at(99, 15) == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[4:]))


def test_without_a_lowest_rate_the_cosine_ends_at_a_tenth() -> None:
    optim = OptimConfig(lr=0.5, warmup_steps=0)
    assert optim.lr_at(9, total_steps=10) == pytest.approx(0.05)


def test_only_matrices_are_decayed() -> None:
    module = LitMoE(TransformerConfig(64, 2, 16, 24, 2), MoEConfig())
    module._trainer = type("Trainer", (), {"precision": "32-true", "estimated_stepping_batches": 10})()
    optimizer = module.configure_optimizers()["optimizer"]
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    kept_whole = {names[id(parameter)].split(".")[-2:][-1] for parameter in others["params"]}
    assert kept_whole == {"constants", "weight"}
    assert all("norm" in names[id(p)] or "constants" in names[id(p)] for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)


@pytest.mark.parametrize(
    "bad", [{"lr": 0.0}, {"min_lr": 1.0}, {"warmup_steps": -1}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}]
)
def test_impossible_optimizer(bad: dict) -> None:
    with pytest.raises(InputError, match=f"optim.{next(iter(bad))}"):
        OptimConfig(**bad)


def test_bits_per_byte_by_hand() -> None:
    metric = BitsPerByte(torch.tensor([0, 1, 3]), torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))
    # domain 0: tokens of 1 and 3 bytes at 2 and 4 bits, an end of text and padding that do not count
    bits = torch.tensor([[2.0, 4.0, 9.0, 9.0], [6.0, 0.0, 0.0, 0.0]])
    targets = torch.tensor([[1, 2, 0, -100], [2, -100, -100, -100]])
    metric.update(bits * math.log(2), targets, torch.tensor([0, 2]))
    overall, by_domain = metric.compute()
    assert overall.item() == pytest.approx((2 + 4 + 6) / (1 + 3 + 3 / 2))
    assert by_domain[0].item() == pytest.approx(6 / 4)
    assert by_domain[1].isnan()
    assert by_domain[2].item() == pytest.approx(6 / (3 / 2))


def test_flops_by_hand() -> None:
    """2 per weight that a token meets, the head included, plus attention over half the sequence on average."""
    t, m = TransformerConfig(64, 2, 16, 24, 4, n_kv_heads=2), MoEConfig(n_const=0, n_zero=2, n_copy=2)
    count = count_parameters(t, m)
    weights = 64 * 16 + count.attention + count.router + 2 * 1.5 * count.one_ffn_expert
    assert flops_per_token(t, m, seq_len=10, ffn_per_token=1.5) == 2 * weights + 2 * (2 * 2 * 16 * 5)


def test_validation_weighs_tokens_not_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of nothing but padding (as one of several devices may get) changes nothing, and is no NaN."""
    torch.manual_seed(0)
    module = LitMoE(TransformerConfig(64, 1, 16, 24, 2, context_length=8), MoEConfig()).eval()
    letters = {"letters_per_token": torch.ones(64, dtype=torch.long), "bytes_per_letter": torch.ones(1).double()}
    files = type("Files", (), {"domains": ["a"]} | letters)
    data = type("Data", (), {"files": files, "seq_len": 8})
    module._trainer = type("Trainer", (), {"datamodule": data})()
    module.setup("fit")
    monkeypatch.setattr(module.model.head, "forward", lambda *_: pytest.fail("all logits at once"))
    module.on_validation_epoch_start()
    inputs, domain = torch.randint(64, (2, 8)), torch.zeros(2, dtype=torch.long)
    targets = torch.randint(64, (2, 8))
    targets[1, 3:] = -100
    module.validation_step({"inputs": inputs, "targets": targets, "domain": domain}, 0)
    module.validation_step({"inputs": inputs, "targets": torch.full((2, 8), -100), "domain": domain}, 1)
    logits = module.model.hidden(inputs)[0] @ module.model.head.weight.T
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    figures = module.validation.compute()
    assert figures["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(expected.item() / math.log(2), rel=1e-6)
    files.domains, files.bytes_per_letter = ["a", "b"], torch.tensor([1.0, 2.0]).double()
    module.on_validation_epoch_start()
    module.validation_step({"inputs": inputs, "targets": targets, "domain": torch.tensor([1, 0])}, 0)
    nats_B = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )
    figures = module.validation.compute()
    assert figures["bits_per_byte/a"] == pytest.approx(nats_B[1].sum().item() / 3 / math.log(2), rel=1e-6)
    assert figures["bits_per_byte/b"] == pytest.approx(nats_B[0].sum().item() / 16 / math.log(2), rel=1e-6)
    module.on_validation_epoch_start()
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does around a step, under bf16-true
    try:
        ffn_LT = torch.tensor([[2, 1, 1, 1, 1, 1, 1]])
        module.validation.update(torch.ones(1, 7), torch.zeros(1, 7, dtype=torch.long), domain[:1], ffn_LT)
    finally:
        torch.set_default_dtype(torch.float32)
    assert module.validation.compute()[FFN] == pytest.approx(8 / 7, rel=1e-6)


def test_the_loss_that_is_trained_holds_beta_times_the_balance_loss() -> None:
    tokens = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for beta in (0.0, 0.5):
        torch.manual_seed(0)
        module = LitMoE(TransformerConfig(64, 2, 16, 24, 2), MoEConfig(balance_weight=beta))
        outputs = module.training_step({"inputs": tokens, "targets": tokens}, 0)
        outputs["loss"].backward()
        losses.append(outputs["loss"].item())
        gradients.append(module.model.blocks[0].moe.router.weights[0].grad)
    routings = module.model.hidden(tokens)[1]
    balance = sum(routing.load_balance_loss().item() for routing in routings) / 2
    assert losses[1] - losses[0] == pytest.approx(0.5 * balance, rel=1e-4)
    assert (gradients[1] - gradients[0]).norm() > 0.01 * gradients[0].norm()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_compiled_steps_on_cuda_are_those_uncompiled_and_never_wait_for_the_device() -> None:
    """With all that `moepp fit` does in a step: a budget, clipping, and AdamW that skips what is not finite."""
    losses = {compile: cuda_losses(compile) for compile in (False, True)}
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-2, atol=0)
    assert losses[True][-1] < losses[True][0] - 0.1


def cuda_losses(compile: bool) -> torch.Tensor:
    torch.manual_seed(0)
    sizes = TransformerConfig(512, 2, 64, 128, 2, context_length=64)
    module = LitMoE(sizes, MoEConfig(ffn_budget=1.2), compile=compile).cuda()
    optimizer = AdamW(module.parameters(), lr=3e-3, fused=True)
    tokens_BS = torch.randint(sizes.vocab_size, (8, 65), device="cuda")
    batch = {"inputs": tokens_BS[:, :-1], "targets": tokens_BS[:, 1:]}
    losses, budget = [], module.model.budget
    for step in range(8):
        # from then on it is compiled, and AdamW has its state
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = module.training_step(batch, 0)["loss"]
            loss.backward()
            budget.step(1.2, lambda figures: figures)
            budget.spend(1.2)
            module.configure_gradient_clipping(optimizer, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(loss.detach())
    return torch.stack(losses).cpu()
