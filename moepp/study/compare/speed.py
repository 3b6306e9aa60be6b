"""How fast each variant is, relative to the reference: both in one process, in turn, on the same text.

Runs of their own, hours apart on a machine that others use, would compare the machine's moods. Here the two models
of a pair alternate, and what counts is the ratio within each round.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from moepp.model import MoELayer, Routing
from moepp.study.compare.matrix import Matrix, Run, Variant
from moepp.study.timing import TrainingStep, in_turn, quartiles
from moepp.system.machine import default_precision, keep_freed_memory, product_dtype
from moepp.text.data_module import TokenDataModule
from moepp.training.checkpoint import last_checkpoint, read_checkpoint
from moepp.training.module import LitMoE
from moepp.training.start import DistillConfig

LEAST_ROUNDS, SECONDS = 5, 3.0  # of a measurement


def measure(matrix: Matrix, runs: list[Run]) -> dict[str, dict[str, float]]:
    """By variant: one of its trained models against the reference's; that against itself shows the noise."""
    trained: dict[str, Run] = {}
    for run in runs:
        # one is enough: to see that a checkpoint is whole, all of it is read
        if run.finished and run.variant.name not in trained and last_checkpoint(run.folder):
            trained[run.variant.name] = run
    if (reference := trained.get(matrix.reference.name)) is None:
        return {}
    device = best_device(matrix.reference)
    keep_freed_memory(device)  # as `moepp fit` does
    speeds = {}
    for name, run in trained.items():
        try:
            speeds[name] = compare(run, reference, device)
        except torch.OutOfMemoryError:
            print(f"speed of {name}: not measured, two models do not fit the memory", flush=True)
    return speeds


def compare(run: Run, reference: Run, device: torch.device) -> dict[str, float]:
    """The run's training speed, and ratios of the reference's times to its own.

    Expert forward is of FFN and zero-computation experts alone, given the routing.
    """
    models = [trained_model(run, device), trained_model(reference, device)]
    steps = in_turn([model.training_step for model in models], device, LEAST_ROUNDS, SECONDS)
    experts = in_turn([model.expert_forward() for model in models], device, LEAST_ROUNDS, SECONDS)
    return {
        "speed_tokens_per_second": models[0].batch["inputs"].numel() / median(seconds for seconds, _ in steps),
        **ratio("speed_training", steps),
        **ratio("speed_expert_forward", experts),
        "speed_rounds": len(experts),
    }


def ratio(name: str, rounds: list[list[float]]) -> dict[str, float]:
    """Of the second function's time to the first's, round by round: above 1 the first is faster."""
    lower, middle, upper = quartiles([theirs / ours for ours, theirs in rounds])
    return {name: middle, f"{name}_lower_quartile": lower, f"{name}_upper_quartile": upper}


class TimedModel:
    """A variant's model and a batch, at the study's own sizes and in `precision`, as Lightning names it."""

    def __init__(self, variant: Variant, batch: dict[str, Tensor], precision: str, device: torch.device) -> None:
        kind, _, how = precision.partition("-")
        self.dtype = product_dtype(precision)
        mixed = kind in ("bf16", "16") and how != "true"  # weights in float32, products in half
        self.autocast = torch.autocast(device.type, self.dtype, enabled=mixed)
        how_to = {name: variant.options["model"][name] for name in ("compile", "checkpoint_activations")}
        lit = LitMoE(variant.transformer, variant.moe, **how_to)
        self.lit = lit.to(device, torch.float32 if mixed else self.dtype)
        self.batch = {name: value.to(device) for name, value in batch.items()}
        self.training_step = TrainingStep(self.lit, self.loss, self.autocast)

    def loss(self) -> Tensor:
        """Of a training step, with what a budget costs."""
        loss = self.lit.training_step(self.batch, 0)["loss"]
        if (budget := self.lit.model.budget) is not None:
            budget.step(budget.aim, lambda figures: figures)
            budget.spend(budget.aim)
        return loss

    def expert_forward(self) -> Callable[[], None]:
        """A function that runs the experts of every layer on what these receive from the batch, already routed."""
        received: list[tuple[MoELayer, Tensor, Routing]] = []

        def receive(moe: MoELayer, inputs: tuple[Tensor, ...], output: tuple[Tensor, Routing]) -> None:
            received.append((moe, inputs[0].flatten(0, 1).to(self.dtype), output[1]))

        layers = [module for module in self.lit.modules() if isinstance(module, MoELayer)]
        hooks = [layer.register_forward_hook(receive) for layer in layers]
        self.lit.eval()
        # not compiled: a hook that is called for each layer would make another graph of each
        with torch.no_grad(), self.autocast, torch.compiler.set_stance("force_eager"):
            self.lit.model(self.batch["inputs"])
        for hook in hooks:
            hook.remove()

        def run() -> None:
            with torch.no_grad(), self.autocast:
                for moe, x_TD, routing in received:
                    moe.experts(x_TD, routing)

        return run


def trained_model(run: Run, device: torch.device) -> TimedModel:
    """With a batch of training text (held-out batches may be padded), in the precision it was trained in."""
    data = TokenDataModule(**run.variant.options["data"])
    data.setup()
    precision = run.result["precision"]
    model = TimedModel(run.variant, next(iter(data.train_dataloader())), precision, device)
    checkpoint = last_checkpoint(run.folder)
    assert checkpoint is not None
    model.lit.load_state_dict(read_checkpoint(checkpoint)["state_dict"])
    model.lit.distill = DistillConfig(**run.options["model"]["distill"])
    model.lit.load_teacher(data.files.tokenizer_json)  # a training step goes through it as well
    return model


def step_seconds(variant: Variant) -> float:
    """Seconds of one optimizer step of an untrained model on random tokens, measured now."""
    device = best_device(variant)
    data, trainer = variant.options["data"], variant.options["trainer"]
    tokens_BS = torch.randint(variant.transformer.vocab_size, (data["batch_size"], data["seq_len"]))
    precision = str(trainer["precision"] or default_precision(device))
    model = TimedModel(variant, {"inputs": tokens_BS, "targets": tokens_BS}, precision, device)
    rounds = in_turn([model.training_step], device, least=3, seconds=0.0)
    return median(seconds for (seconds,) in rounds) * trainer["accumulate_grad_batches"]


def best_device(variant: Variant) -> torch.device:
    """Where the variant's runs train: the GPU, if there is one and it is not refused."""
    accelerator: Any = variant.options["trainer"]["accelerator"]
    use_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")
