"""Our layer inside transformers models: nothing changes at first, and awake it computes what our model does."""

import copy
import gc
import importlib
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from moepp.model import (
    InputError,
    MoEConfig,
    Transformer,
    TransformerConfig,
    add_zero_computation,
    load_foreign,
    mean_load_balance_loss,
)
from moepp.model.conversion import SILENT
from moepp.model.hub import export_hub
from moepp.model.router import routers
from tests.foreign_models import MODELS, SIZES, build, transformers

hf = pytest.importorskip("moepp.hf", reason="needs transformers: pip install 'moepp[hf]'")

ROUTED = [name for name in MODELS if "llama" not in name]
FAMILIES = ["mixtral", "qwen3_moe", "olmoe"]
ADDED = {"n_zero": 2, "n_copy": 1, "n_const": 2}


def tokens(seed: int = 1, rows: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def plain(name: str = "mixtral", dtype: torch.dtype = torch.float32) -> Any:
    model = build(name).to(dtype)
    model.set_experts_implementation("eager")  # the only one of theirs that knows float64
    return model


def awake(name: str = "mixtral", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Swapped, with every part at work: added experts that are chosen, and a W_g that is not 0."""
    model = hf.swap_moe(plain(name, dtype), **ADDED | {"noise": 1.0, "balance_weight": 0.5} | options)
    hf.set_bias(model, 0.0)
    for i, router in enumerate(routers(model)):
        if router.residual is not None:
            torch.nn.init.normal_(router.residual, std=0.3, generator=torch.Generator().manual_seed(i))
    return model


def gradients(model: Any, *batches: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of one loss over all of the batches, so that the backward pass begins after the last forward."""
    model.zero_grad()
    model.train()
    torch.stack([model(batch, labels=batch).loss for batch in batches]).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize("added", [{}, ADDED, {"n_zero": 0}], ids=str)
@pytest.mark.parametrize("name", ROUTED)
@torch.no_grad()
def test_at_first_nothing_changes(name: str, added: dict[str, int]) -> None:
    theirs = plain(name)
    before, state = dict(theirs.named_parameters()), {key: t.clone() for key, t in theirs.state_dict().items()}
    expected = theirs(tokens(), output_router_logits=True)
    assert hf.swap_moe(theirs, **added) is theirs
    found = theirs(tokens(), output_router_logits=True)
    largest = expected.logits.abs().max().item()
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5 * largest)
    n_added = sum(({"n_zero": theirs.config.num_experts_per_tok - 1} | added).values())
    for mine, their in zip(found.router_logits, expected.router_logits, strict=True):
        assert mine.shape == (120, their.shape[1] + n_added)
        torch.testing.assert_close(mine[:, : their.shape[1]], their)
    after = dict(theirs.named_parameters())
    assert all(after[key] is parameter for key, parameter in before.items())
    assert all(torch.equal(theirs.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", ROUTED)
def test_gradients_are_theirs(name: str) -> None:
    expected = gradients(plain(name, torch.float64), tokens())
    found = gradients(hf.swap_moe(plain(name, torch.float64), balance_weight=0.0), tokens())
    # their routers' softmax is in float32
    assert_equal({key: found[key] for key in expected}, expected, 1e-5)
    assert not any(found[key].any() for key in found if key.endswith("added"))


@pytest.mark.parametrize("name", ROUTED)
def test_with_every_part_at_work_it_is_our_own_model(name: str, tmp_path: Path) -> None:
    theirs = awake(name, torch.float32)
    build(name).save_pretrained(tmp_path)
    ffn_per_token = theirs.model.layers[0].mlp.moe.expected_ffn_per_token
    ours: Transformer = add_zero_computation(load_foreign(tmp_path), **ADDED, ffn_per_token=ffn_per_token)
    with torch.no_grad():
        for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
            router, gate = block.moe.router, layer.mlp.gate
            router.weights[0].copy_(torch.cat([gate.weight, gate.added]))
            router.bias.zero_()
            if router.residual is not None:
                router.residual.copy_(gate.residual)
            block.moe.zero_computation.load_state_dict(layer.mlp.zero_computation.state_dict())
    expected = ours(tokens())
    theirs.train()
    output = theirs(tokens(), labels=tokens())
    largest = expected.logits.abs().max().item()
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5 * largest)
    chosen = torch.stack([routing.experts for routing in expected.routings])
    assert all((chosen == expert).any() for expert in range(expected.routings[0].logits.shape[1]))
    balance = mean_load_balance_loss(expected.routings)
    torch.testing.assert_close(hf.balance_loss(theirs), balance)
    nll = torch.nn.functional.cross_entropy(expected.logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    torch.testing.assert_close(output.loss, nll + 0.5 * balance)
    output.loss.backward()
    (nll + 0.5 * balance).backward()
    for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
        gate, router = layer.mlp.gate, block.moe.router
        pairs = {
            "rows": (torch.cat([gate.weight.grad, gate.added.grad]), router.weights[0].grad),
            "gate_up": (layer.mlp.experts.gate_up_proj.grad, block.moe.ffn.w_gate_up.grad),
            "down": (layer.mlp.experts.down_proj.grad, block.moe.ffn.w_down.grad),
            "constants": (layer.mlp.zero_computation.constants.grad, block.moe.zero_computation.constants.grad),
        }
        if router.residual is not None:
            pairs["W_g"] = gate.residual.grad, router.residual.grad
        assert_equal(
            {k: mine for k, (mine, _) in pairs.items()}, {k: their for k, (_, their) in pairs.items()}, 1e-4
        )


@pytest.mark.parametrize("batches", [1, 2], ids=["one forward", "two before the backward"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(name: str, batches: int) -> None:
    model = awake(name)
    data = [tokens(seed) for seed in range(batches)]
    expected = gradients(model, *data)
    assert sum("residual" in key for key in expected) == 2
    model.gradient_checkpointing_enable()
    assert_equal(gradients(model, *data), expected, 1e-12)
    with torch.no_grad():  # between a forward and its backward: what other passes leave must not be read
        loss = model(data[0], labels=data[0]).loss
    model.zero_grad()
    losses = [model(batch, labels=batch).loss for batch in data]
    with torch.no_grad():
        model(tokens(9), labels=tokens(9))
    torch.stack(losses).sum().backward()
    assert_equal({key: p.grad for key, p in model.named_parameters()}, expected, 1e-12)
    torch.testing.assert_close(loss, losses[0])


def test_reentrant_checkpointing_is_refused() -> None:
    model = awake().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(InputError, match="use_reentrant=True"):
        model(tokens())
    with torch.no_grad():
        model(tokens())


def test_a_forward_pass_without_a_backward_leaves_nothing_behind() -> None:
    model = awake().train()
    model.gradient_checkpointing_enable()
    model(tokens())
    graphs = [weakref.ref(routing.logits) for routing in model.model.pathway.routings]
    with torch.no_grad():
        model(tokens())
    gc.collect()
    assert not any(graph() is not None for graph in graphs)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_generation_with_and_without_a_cache(name: str) -> None:
    model = awake(name)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(tokens(rows=2, length=10), use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens(rows=2, length=10), use_cache=False, **options))
    assert cached.shape == (2, 30)


@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_router_logits_also_where_their_hooks_were_there_before(when: str) -> None:
    model = plain()
    if when == "before":
        model(tokens(), output_router_logits=True)
    hf.swap_moe(model)
    for _ in range(2):
        output = model(tokens(), output_router_logits=True, output_hidden_states=True)
        assert [logits.shape for logits in output.router_logits] == [(120, 8)] * 3
        assert len(output.hidden_states) == 4
        assert output.aux_loss.isfinite()


def test_in_training_their_balance_loss_is_off_and_router_logits_are_recorded_once() -> None:
    model = awake().train()
    model.gradient_checkpointing_enable()
    loss = model(tokens(), labels=tokens()).loss
    output = model(tokens(), labels=tokens(), output_router_logits=True)
    torch.testing.assert_close(output.loss, loss)
    output.loss.backward()
    assert len(output.router_logits) == 3
    assert len(model.model.pathway.routings) == 3  # what the backward pass computed again has left nothing
    model.eval()
    nll = model(tokens(), labels=tokens()).loss
    torch.testing.assert_close(loss, nll + 0.5 * hf.balance_loss(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_in_half_precision(dtype: torch.dtype) -> None:
    theirs = plain("qwen3_moe", dtype)
    expected = theirs(tokens()).logits.float()
    hf.swap_moe(theirs)
    found = theirs(tokens()).logits
    assert found.dtype == dtype
    assert theirs.model.pathway.routings[0].logits.dtype == torch.float32
    # where the rounding of their logits made another choice a token differs by more: the middle one tells
    assert (found.float() - expected).abs().amax(-1).median() <= 2e-2 * expected.abs().max()
    converted = hf.swap_moe(plain("qwen3_moe"), n_copy=1, n_const=1).to(dtype)
    assert {tensor.dtype for tensor in converted.state_dict().values()} == {dtype}
    converted(tokens())
    assert not any(routing.probs[:, 6:].any() for routing in converted.model.pathway.routings)


def test_under_autocast() -> None:
    model = awake(dtype=torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert model.model.pathway.routings[0].logits.dtype == torch.float32
    torch.testing.assert_close(loss, model(tokens(), labels=tokens()).loss, rtol=0.02, atol=0)


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model = awake().train()
    expected = model(tokens(), labels=tokens())
    twin = copy.deepcopy(model)
    with pytest.raises(InputError, match="no forward pass"):
        hf.balance_loss(twin)
    torch.nn.init.zeros_(model.model.layers[1].mlp.gate.residual)
    torch.testing.assert_close(twin(tokens(), labels=tokens()).loss, expected.loss)
    assert not torch.equal(hf.balance_loss(twin), mean_load_balance_loss(gather(model)))


def gather(model: Any) -> list[Any]:
    model(tokens())
    return model.model.pathway.routings


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_what_is_saved_is_read_back(name: str, tmp_path: Path) -> None:
    model = awake(name, torch.float32)
    hf.set_bias(model, -0.5)
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    hf.swap_moe(again, **ADDED)
    hf.load_added(again, tmp_path)
    torch.testing.assert_close(again(tokens()).logits, expected)
    twin = hf.swap_moe(plain(name), **ADDED, seed=1)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(tokens()).logits, expected)
    with pytest.raises(InputError, match=r"gate.added is \(5, 32\), not \(2, 32\)"):
        hf.load_added(hf.swap_moe(plain(name)), tmp_path)


def change(model: Any, what: str) -> Any:
    block = model.model.layers[1].mlp
    if what == "bias":
        block.experts.bias = torch.nn.Parameter(torch.zeros(6))
    elif what == "shared":
        block.shared_expert = torch.nn.Linear(32, 32)
    elif what == "activation":
        block.experts.act_fn = torch.nn.GELU()
    elif what == "jitter":
        block.jitter_noise = 0.1
    elif what == "sigmoid":
        block.gate.__class__ = type("Sigmoid", (type(block.gate),), {"forward": sigmoid_router})
    elif what == "wrapped":
        block.forward = block.forward
    elif what == "swapped":
        hf.swap_moe(model)
    return model


def sigmoid_router(self: Any, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits_TF = x_TD @ self.weight.T
    return logits_TF, *logits_TF.sigmoid().topk(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("llama"), "LlamaForCausalLM, layer 0: its mlp must consist of .* not of down_proj.weight"),
        (lambda: dense_between(), "layer 1: its mlp must consist of"),
        (lambda: torch.nn.Linear(2, 2), "Linear has no decoder layers"),
        (lambda: change(plain(), "bias"), "layer 1: its mlp must consist of .* experts.bias"),
        (lambda: change(plain(), "shared"), "layer 1: its mlp must consist of .* shared_expert.bias"),
        (lambda: change(plain(), "activation"), "layer 1: its mlp computes something else"),
        (lambda: change(plain(), "jitter"), "layer 1: router_jitter_noise=0.1 is not supported"),
        (lambda: change(plain(), "sigmoid"), "layer 1: its gate is not a linear router with a softmax"),
        (lambda: change(plain(), "wrapped"), "layer 1: something wraps it already"),
        (lambda: change(plain(), "swapped"), "layer 0: has our layer already"),
        (lambda: plain().to("meta"), "layer 0: it has no weights yet"),
        (lambda: exported_vanilla(), "layer 0: its gate takes more than hidden states"),
    ],
)
def test_what_cannot_be_swapped_is_refused_in_one_line_and_left_alone(make: Any, message: str) -> None:
    model = make()
    before = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=message) as error:
        hf.swap_moe(model)
    assert "\n" not in str(error.value)
    assert [type(module) for module in model.modules()] == before


def exported_vanilla() -> Any:
    config = hf.MoeppConfig(
        vocab_size=50, num_hidden_layers=2, n_zero=0, n_copy=0, n_const=0, gating_residual=False
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def dense_between() -> Any:
    config = transformers.Qwen3MoeConfig(**SIZES, num_experts=6, num_experts_per_tok=3, mlp_only_layers=[1])
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "option", [{"n_zero": -1}, {"noise": -0.1}, {"ffn_per_token": 0.0}, {"balance_weight": -1.0}], ids=str
)
def test_bad_options_leave_the_model_alone(option: dict[str, Any]) -> None:
    model = plain()
    with pytest.raises(InputError, match=next(iter(option))):
        hf.swap_moe(model, **option)
    hf.swap_moe(model)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "moepp.hf")
    with pytest.raises(ModuleNotFoundError, match=r"needs transformers: pip install 'moepp\[hf\]'"):
        importlib.import_module("moepp.hf")


def test_the_bias_rises_while_it_trains() -> None:
    model = hf.swap_moe(plain())
    biases = [router.bias for router in routers(model)]
    assert all(bias == SILENT for bias in biases)
    schedule, state = hf.BiasSchedule(steps=4, start=-2.0), transformers.TrainerState()
    found = []
    for state.global_step in range(6):
        schedule.on_step_begin(None, state, None, model=model)
        found.append([bias.item() for bias in biases])
    assert found == [[value] * 3 for value in (-2.0, -1.5, -1.0, -0.5, 0.0, 0.0)]


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_other_tasks_keep_their_loss(task: str) -> None:
    config = transformers.MixtralConfig(
        **SIZES, num_local_experts=4, num_labels=3, pad_token_id=0, classifier_dropout=0.0
    )
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config).eval()
    labels = {"labels": torch.tensor([0, 1, 2]) if task[0] == "S" else tokens() % 3}
    if task[0] == "Q":
        labels = {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 4, 5])}
    expected = model(tokens(), **labels).loss
    hf.swap_moe(model, balance_weight=0.5)
    torch.testing.assert_close(model(tokens(), **labels).loss, expected)
    loss = model.train()(tokens(), **labels).loss
    assert loss.item() == pytest.approx(expected.item() + 0.5 * hf.balance_loss(model).item(), rel=1e-5)


def test_the_bias_of_exported_models_rises_too_and_there_has_to_be_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vanilla = Transformer(TransformerConfig(50, 2, 32, 24), MoEConfig(4, 0, 0, 0, gating_residual=False))
    export_hub(add_zero_computation(vanilla), tmp_path)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    hf.BiasSchedule(steps=4, start=-2.0).on_step_begin(
        None, transformers.TrainerState(global_step=1), None, model=exported
    )
    assert [layer.mlp.gate.bias.item() for layer in exported.model.layers] == [-1.5, -1.5]
    with pytest.raises(InputError, match="no router has a bias"):
        hf.set_bias(plain(), 0.0)


def test_data_parallel_is_refused() -> None:
    """Its replicas share one model's modules, and would one pathway."""
    model = hf.swap_moe(plain(), **ADDED)
    model.model._is_replica = True  # as nn.DataParallel marks them
    with pytest.raises(InputError, match=r"nn\.DataParallel is not supported: start with torchrun"):
        model(tokens())
