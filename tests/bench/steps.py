"""A model's whole training step against other models', its memory and MFU.

T tokens in B sequences of S, D hidden size, V vocabulary, L layers, H intermediate size, K choices a token.
"""

import os
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate
from statistics import median
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from moepp.model import MoEConfig, Transformer, TransformerConfig, linear_cross_entropy, training_flops_per_token
from moepp.study.timing import TrainingStep
from moepp.system.machine import peak_flops
from moepp.training.module import LitMoE
from tests.bench import peers
from tests.bench.setting import RECIPES, VANILLA, Case, Row, Setting, measured

BATCHED = 64  # tokens at most for transformers' batched_mm
MATMUL = 2048  # rows and columns of the product that stands for a CPU's peak
DENSE = MoEConfig(n_ffn=1, n_zero=0, n_copy=0, n_const=0, top_k=1, gating_residual=False)


class ModelStep(TrainingStep):
    """A training step of a model, ours or of transformers, on tokens (B, S).

    Args:
        model: `training_step` is called on a LitMoE; of a model of transformers, hidden states and head.
        own_loss: a model of transformers computes its loss itself, as its users have it. Otherwise all models
            share moepp's chunked cross-entropy, so that the comparison is of what they differ in.
    """

    def __init__(self, at: Setting, model: nn.Module, tokens_BS: Tensor, own_loss: bool = False) -> None:
        super().__init__(model.to(at.device), self.total_loss, at.autocast())
        self.tokens_BS, self.targets_BS, self.own_loss = tokens_BS, tokens_BS.roll(-1, dims=1), own_loss

    @property
    def family(self) -> str:
        """moepp, or the `model_type` of transformers."""
        model: Any = self.model
        return "moepp" if isinstance(model, LitMoE) else model.config.model_type

    def total_loss(self) -> Tensor:
        """Cross-entropy, and for a mixture of experts β times its own balance loss."""
        model: Any = self.model
        if self.family == "moepp":
            return model.training_step({"inputs": self.tokens_BS, "targets": self.targets_BS}, 0)["loss"]
        router_logits = {"output_router_logits": True} if self.family == "mixtral" else {}
        if self.own_loss:
            return model(self.tokens_BS, labels=self.tokens_BS, **router_logits).loss
        output = model.model(self.tokens_BS, **router_logits)
        hidden_ND = output.last_hidden_state.flatten(0, 1)
        on_gpu = hidden_ND.is_cuda  # there its softmax is compiled, for models that are not compiled too
        loss = linear_cross_entropy(hidden_ND, model.lm_head.weight, self.targets_BS.flatten(), compile=on_gpu)
        if router_logits:
            from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

            balance = load_balancing_loss_func(output.router_logits, VANILLA.n_ffn, VANILLA.top_k)
            loss = loss + VANILLA.balance_weight * balance
        return loss

    @torch.no_grad()
    def logits(self) -> Tensor:
        with self.autocast:
            model: Any = self.model.model if self.family == "moepp" else self.model
            return model(self.tokens_BS).logits


class Models:
    """Models of the setting's sizes with weights from the same seed and forced routing: MoE++ to the share that τ
    implies, the others evenly over their FFN experts."""

    def __init__(self, at: Setting, batch_size: int, seq_len: int) -> None:
        self.at = at
        self.config = at.sizes.transformer
        # as wide as the K experts that a token nominally meets
        self.wide = replace(self.config, intermediate_size=VANILLA.top_k * self.config.intermediate_size)
        self.tokens_BS = torch.randint(self.config.vocab_size, (batch_size, seq_len), device=at.device)

    def of(self, precision: str) -> "Models":
        """The same in another precision, on the same tokens."""
        other = copy(self)
        other.at = replace(self.at, precision=precision)
        return other

    def moepp(self, moe: MoEConfig, compile: bool = False, loop: bool = False) -> ModelStep:
        """Ours as `moepp fit` runs it, or with its experts in the released code's loop."""
        torch.manual_seed(0)
        model = LitMoE(self.wide if moe is DENSE else self.config, moe, compile=compile)
        model.compile_loss = self.at.device.type == "cuda"  # as all that it is compared with
        for i, block in enumerate(peers.blocks(model.model)):
            peers.force(block.moe.router, peers.spread_evenly(self.tokens_BS.numel(), moe, moe.ffn_share, seed=i))
            if loop:
                block.moe = peers.ReleasedLoop(block.moe)
        return ModelStep(self.at, model, self.tokens_BS)

    def mixtral(self, back_end: str, compile: bool = False, own_loss: bool = False) -> ModelStep:
        torch.manual_seed(0)
        model: Any = peers.to_mixtral(Transformer(self.config, VANILLA), back_end)
        for i, layer in enumerate(model.model.layers):
            peers.force(layer.mlp.gate, peers.spread_evenly(self.tokens_BS.numel(), VANILLA, 1.0, seed=i))
            if compile:
                layer.compile()
        return ModelStep(self.at, model, self.tokens_BS, own_loss)

    def llama(self, compile: bool = False) -> ModelStep:
        torch.manual_seed(0)
        model: Any = peers.to_llama(Transformer(self.wide, DENSE))
        for layer in model.model.layers if compile else ():
            layer.compile()
        return ModelStep(self.at, model, self.tokens_BS)


OURS, BARE, LOOP = "MoE++, τ = 0.75", "vanilla MoE", "MoE++, released loop"
FLOAT32 = "MoE++ in float32"
OWN_LOSS, LLAMA = "Mixtral, grouped_mm, its own loss", "Llama, dense"
DATA_SHEET = "% of the data sheet's FLOP/s"


def contestants(models: Models, on_gpu: bool) -> tuple[dict[str, ModelStep], dict[str, str]]:
    """All that fit one batch, by name, and why others are left out: transformers' models, where they do not run.

    Raises:
        NotEqual: with the same weights and routing, logits differ from ours.
    """
    moe = MoEConfig(tau=0.75)
    steps = {
        OURS: models.moepp(moe, compile=on_gpu),
        BARE: models.moepp(VANILLA, compile=on_gpu),
        LOOP: models.moepp(moe, loop=True),
    }
    peers.check(f"logits of {LOOP}", steps[LOOP].logits(), steps[OURS].logits())
    if models.at.kind == "cpu_bf16":
        steps[FLOAT32] = models.of("32-true").moepp(moe)
        peers.check(f"logits of {FLOAT32}", steps[FLOAT32].logits().to(models.at.dtype), steps[OURS].logits())
    if on_gpu:
        steps[f"{OURS}, not compiled"] = models.moepp(moe)
    if find_spec("transformers") is None:
        return steps, {"Mixtral and Llama of transformers": "needs `pip install 'transformers>=5'`"}
    mixtrals: dict[str, Callable[[], ModelStep]] = {
        "Mixtral, eager": lambda: models.mixtral("eager"),
        "Mixtral, grouped_mm": lambda: models.mixtral("grouped_mm"),
        OWN_LOSS: lambda: models.mixtral("grouped_mm", own_loss=True),
    }
    llamas: dict[str, Callable[[], ModelStep]] = {LLAMA: models.llama}
    if on_gpu:
        mixtrals["Mixtral, grouped_mm, compiled"] = lambda: models.mixtral("grouped_mm", compile=True)
        llamas[f"{LLAMA}, compiled"] = lambda: models.llama(compile=True)
    left_out = {"Mixtral, deepgemm and sonicmoe": "kernels for Hopper that transformers fetches from the Hub"}
    for twins, ours in ((mixtrals, steps[BARE]), (llamas, models.moepp(DENSE))):
        expected = ours.logits()
        for name, build in twins.items():
            try:
                peer = build()
                logits = peer.logits()
            except Exception as error:  # of a version of transformers: ours are to be timed all the same
                left_out[name] = f"{type(error).__name__}: {error}"
                continue
            peers.check(f"logits of {name}", logits, expected)
            steps[name] = peer
    return steps, left_out


def step(at: Setting) -> Iterator[Row]:
    """Tokens per second of whole training steps, what they hold in memory, and FLOPs against the device's peak."""
    models = Models(at, at.sizes.batch_size, at.sizes.transformer.context_length)
    steps, left_out = contestants(models, on_gpu=at.device.type == "cuda")
    # last in the round, the most that the device can do: a CPU's peak is written down nowhere
    a = torch.randn(MATMUL, MATMUL, device=at.device, dtype=at.dtype)
    rounds = at.time([*steps.values(), lambda: a @ a])
    *columns, matmul = zip(*rounds, strict=True)
    seconds = dict(zip(steps, columns, strict=True))
    for name, times in seconds.items():
        tokens_per_s = [models.tokens_BS.numel() / s for s in times]
        yield measured(Case("step", name), "tokens/s", tokens_per_s, ours=steps[name].family == "moepp")

    typical = {name: median(times) for name, times in seconds.items()}
    mixtrals = [name for name, one in steps.items() if one.family == "mixtral" and not one.own_loss]
    llamas = [name for name, one in steps.items() if one.family == "llama"]
    rivals = {name: name for name in (BARE, LOOP, FLOAT32, OWN_LOSS) if name in steps}
    for what, ones in (("Mixtral's best back-end", mixtrals), ("a dense Llama", llamas)):
        if ones:
            rivals[what] = min(ones, key=typical.__getitem__)
    for what, rival in rivals.items():
        ratios = [theirs / ours for ours, theirs in zip(seconds[OURS], seconds[rival], strict=True)]
        case, note = Case("step", f"MoE++ against {what}"), "" if what == rival else rival
        yield measured(case, "×", ratios, note=note)
    if mixtrals:
        yield from batched_mm(at)
    for name, why in left_out.items():
        yield Row(Case("step", name), "tokens/s", note=f"left out: {why}")

    for name, one in steps.items():
        mb = peak_memory(one, at.device) / 1e6
        yield measured(Case("memory", name), "MB", [mb], note="beside weights and AdamW's state")
    for name, moe in ((OURS, MoEConfig(tau=0.75)), (BARE, VANILLA)):
        config, peak = at.sizes.transformer, peak_flops(at.device, at.precision)
        ffn_per_token = moe.expected_ffn_per_token  # as it is forced
        flops_per_token = training_flops_per_token((config, moe), config.context_length, ffn_per_token)
        flops = flops_per_token * models.tokens_BS.numel()
        peaks = [peak or 2 * MATMUL**3 / s for s in matmul]
        unit = DATA_SHEET if peak else f"% of a {MATMUL}² product's FLOP/s"
        shares = [100 * flops / s / most for s, most in zip(seconds[name], peaks, strict=True)]
        yield measured(Case("mfu", name), unit, shares)


def batched_mm(at: Setting) -> Iterator[Row]:
    """transformers' back-end for decoding gathers the weights of every assignment, and keeps them for the backward
    pass. It gets a few tokens, as many as let these fit half of the free memory, and we get the same."""
    t = at.sizes.transformer
    weights = t.n_layers * VANILLA.top_k * 3 * t.hidden_size * t.intermediate_size  # of one token
    n_bytes = weights * (4 if at.dtype == torch.float32 else 6)  # under autocast as they are and in bf16
    most = min(BATCHED, at.sizes.batch_size * t.context_length, free_memory(at.device) // 2 // n_bytes)
    case = Case("step", "Mixtral, batched_mm")
    if most < 8:
        yield Row(case, "tokens/s", note="left out: not even 8 tokens fit the memory")
        return
    seq_len = min(t.context_length, 2 ** (most.bit_length() - 1))
    models = Models(at, max(1, most // seq_len), seq_len)
    n_tokens = models.tokens_BS.numel()
    note = f"on {n_tokens:,} tokens: it gathers the weights for each of them"
    ours, peer = models.moepp(MoEConfig(tau=0.75)), models.mixtral("batched_mm")
    peers.check("logits of Mixtral, batched_mm", peer.logits(), models.moepp(VANILLA).logits())
    rounds = at.time([ours, peer])
    yield measured(case, "tokens/s", [n_tokens / s for _, s in rounds], note=note)
    ratios = [theirs / ours for ours, theirs in rounds]
    yield measured(Case("step", "MoE++ against Mixtral, batched_mm"), "×", ratios, note=note)


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """Bytes of tensors at the peak of `run` above those before it: activations and gradients of a training step,
    but not weights and optimizer state."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(n_bytes for _, n_bytes in changes))


def mfu(at: Setting) -> Iterator[Row]:
    """The paper's 0.6B as in its recipe, compiled, with its own routing: only the FFN experts that are computed
    count."""
    case = Case("mfu", "sizes/0.6b.yaml, compiled")
    peak = peak_flops(at.device, "bf16-mixed")
    if peak is None:
        yield Row(case, DATA_SHEET, note="needs a GPU whose peak is known")
        return
    recipe = yaml.safe_load((RECIPES / "sizes" / "0.6b.yaml").read_text())
    options = recipe["model"]
    transformer = TransformerConfig(**options["transformer"], vocab_size=recipe["data"]["vocab_size"])
    moe = MoEConfig(**options["moe"])
    torch.manual_seed(0)
    model = LitMoE(transformer, moe, compile=True)
    batch_size, seq_len = recipe["data"]["batch_size"], transformer.context_length
    tokens_BS = torch.randint(transformer.vocab_size, (batch_size, seq_len), device=at.device)
    one = ModelStep(at, model, tokens_BS)
    with torch.no_grad(), at.autocast():
        computed = model.training_step({"inputs": tokens_BS, "targets": tokens_BS}, 0)["ffn_assignments"]
    ffn_per_token = float(computed) / tokens_BS.numel() / transformer.n_layers
    flops = training_flops_per_token((transformer, moe), seq_len, ffn_per_token) * tokens_BS.numel()
    seconds = [s for (s,) in at.time([one])]
    note = f"{tokens_BS.numel() / median(seconds):,.0f} tokens/s, {ffn_per_token:.2f} FFN experts per token"
    yield measured(case, DATA_SHEET, [100 * flops / s / peak for s in seconds], note=note)
