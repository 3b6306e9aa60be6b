"""Models of others against transformers itself, on tiny random models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moepp.model import InputError, KVCache, Transformer, load_foreign
from tests.foreign_models import MODELS, SIZES, build, transformers


def their_choices(theirs: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """(T, K) of each layer, sorted."""
    top_k = theirs.config.num_experts_per_tok
    return [
        logits.topk(top_k).indices.sort(-1).values
        for logits in theirs(tokens, output_router_logits=True).router_logits
    ]


def our_choices(ours: Transformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    return [routing.experts.sort(-1).values for routing in ours(tokens).routings]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (3, 40), generator=torch.Generator().manual_seed(1))


# how files are put together is the same for all families, how experts are stacked in them is not
@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in MODELS for form in ("one tensor per expert", "stacked")]
    + [("mixtral", "sharded"), ("mixtral", "stacked .bin")],
)
@torch.no_grad()
def test_logits_and_choices_are_those_of_transformers(
    name: str, form: str, tmp_path: Path, tokens: torch.Tensor
) -> None:
    theirs = build(name)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "1GB")
    if form.startswith("stacked"):  # as they are in memory
        (tmp_path / "model.safetensors").unlink()
        state = {key: value.clone() for key, value in theirs.state_dict().items()}
        if form.endswith(".bin"):
            torch.save(state, tmp_path / "pytorch_model.bin")
        else:
            save_file(state, tmp_path / "model.safetensors")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or form != "sharded"
    ours, expected = load_foreign(tmp_path), theirs(tokens).logits
    torch.testing.assert_close(ours(tokens).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    if "llama" not in name:
        for mine, their in zip(our_choices(ours, tokens), their_choices(theirs, tokens), strict=True):
            assert torch.equal(mine, their)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "llama"])
@pytest.mark.parametrize(
    "said",
    [
        {},
        {"rope_theta": 77.0},
        {"rope_theta": 77.0, "rope_scaling": {"rope_type": "default", "rope_theta": 55.0}},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_base_of_rope_is_theirs_however_it_is_said(
    name: str, said: dict[str, Any], tmp_path: Path, tokens: torch.Tensor
) -> None:
    build(name).save_pretrained(tmp_path)
    change(tmp_path, rope_parameters=None, **said)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
    logits = load_foreign(tmp_path)(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_cached_logits_are_those_of_transformers(name: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    theirs = build(name)
    theirs.save_pretrained(tmp_path)
    ours = load_foreign(tmp_path)
    caches = [KVCache() for _ in ours.blocks]
    logits = [ours(tokens[:, :30], caches).logits]
    logits += [ours(tokens[:, i : i + 1], caches).logits for i in range(30, 40)]
    expected = theirs(tokens).logits
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", [name for name in MODELS if "llama" not in name])
@torch.no_grad()
def test_in_bf16(name: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    """Their routers compute logits in bf16 and ours in float32: near ties flip."""
    theirs = build(name).bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = load_foreign(tmp_path).bfloat16()
    mine, expected = ours(tokens).logits.float(), theirs(tokens).logits.float()
    agree = torch.stack(
        [
            (a[:, :, None] == b[:, None]).any(-1).float().mean()
            for a, b in zip(our_choices(ours, tokens), their_choices(theirs, tokens), strict=True)
        ]
    )
    assert agree.mean() >= 0.99
    # a token whose choice flipped differs by more than rounding: the middle one tells
    error = (mine - expected).abs().amax(-1).median() / expected.abs().max()
    assert error <= 2e-2


def change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def drop_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def spoil(folder: Path, value: torch.Tensor | None) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        name = "model.layers.1.mlp.experts.2.up_proj.weight"
        if name in tensors:
            tensors.pop(name) if value is None else tensors.update({name: value})
            save_file(tensors, shard)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: change(f, model_type="deepseek_v3"),
            "model_type is 'deepseek_v3'; what can be read is mixtral",
        ),
        (lambda f: change(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_scaling=.*yarn"),
        (lambda f: change(f, rope_parameters=5), "config.json: 'int' object"),
        (lambda f: change(f, rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling=.*linear"),
        (lambda f: change(f, use_sliding_window=True, sliding_window=16), "sliding_window=16 is not supported"),
        (
            lambda f: change(f, model_type="mixtral", use_sliding_window=False, sliding_window=16),
            "sliding_window=16 is not supported",
        ),
        (lambda f: change(f, attention_bias=True), "attention_bias=True is not supported"),
        (lambda f: change(f, decoder_sparse_step=2), "decoder_sparse_step=2 is not supported"),
        (lambda f: change(f, mlp_only_layers=[0]), r"mlp_only_layers=\[0\] is not supported"),
        (lambda f: change(f, hidden_act="gelu"), "hidden_act=gelu is not supported"),
        (lambda f: change(f, model_type="olmoe", clip_qkv=8.0), "clip_qkv=8.0 is not supported"),
        (lambda f: change(f, num_local_experts="6"), "moe.n_ffn: must be a whole number"),
        (lambda f: change(f, num_local_experts=7), r"makes blocks.0.moe.router.weights.0 \(6, 32\)"),
        (lambda f: change(f, vocab_size=97), "makes embedding.weight"),
        (drop_shard, "the shard model-00002-of-.* is missing"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "is it damaged"),
        (lambda f: spoil(f, None), "has no tensor model.layers.1.mlp.experts.2.up_proj.weight"),
        (lambda f: spoil(f, torch.ones(3, 32)), "do not make one blocks.1.moe.ffn.w_gate_up"),
        (lambda f: spoil(f, torch.full((16, 32), float("nan"))), "values that are not finite"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    build("qwen3_moe").save_pretrained(tmp_path, max_shard_size="20KB")
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_foreign(tmp_path)
    assert "\n" not in str(error.value)
