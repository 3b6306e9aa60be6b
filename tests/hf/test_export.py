"""Exported folders: what transformers reads of them without moepp, and what comes back."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

from moepp.cli import main
from moepp.model import MoEConfig, Transformer, TransformerConfig, mean_load_balance_loss, weights
from moepp.model.hub import export_hub, load_hub, tensor_names, write_config
from moepp.model.router import routers
from moepp.text.tokenizer import train_tokenizer
from moepp.training.checkpoint import checkpoint_of, load, write_checkpoint
from tests.conftest import SENTENCE, assert_same, tiny

pytest.importorskip("transformers", reason="it reads what is exported: pip install 'moepp[hf]'")
hf = pytest.importorskip("moepp.hf")
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402

READER = Path(__file__).with_name("reader.py")
SIZES = TransformerConfig(320, 3, 32, 24, 4, context_length=64, init_std=0.2, tie_embeddings=False)
NO_ZERO_COMPUTATION: dict[str, Any] = {"n_zero": 0, "n_copy": 0, "n_const": 0, "gating_residual": False}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what differs from SIZES, and from MoEConfig()
    "as in the paper": ({}, {}),
    "many zero experts, grouped queries": ({"n_kv_heads": 2}, {"n_zero": 6, "top_k": 3, "balance_groups": True}),
    "copies alone, top 1, tied": ({"tie_embeddings": True}, {"top_k": 1, "n_zero": 0, "n_const": 0, "n_copy": 3}),
    "two-layer router, a budget": (
        {"qk_norm": "head", "head_size": 16},
        {"router_depth": 2, "n_copy": 0, "ffn_budget": 1.1},
    ),
    "a bias, probabilities as gates": ({}, {"score_bias": True, "renormalize": False, "gating_residual": False}),
    "as released": ({}, {"logits_norm_std": 0.7, "scale_expert_input": 2.0, "renormalize_without_zero": False}),
    "vanilla, norms of the width": ({"qk_norm": "width", "n_kv_heads": 1}, NO_ZERO_COMPUTATION),
    "dense": ({"rope_theta": 500.0}, NO_ZERO_COMPUTATION | {"n_ffn": 1, "top_k": 1}),
}


def build(name: str) -> Transformer:
    sizes, experts = MODELS[name]
    torch.manual_seed(0)
    model = Transformer(replace(SIZES, **sizes), MoEConfig(**{"n_ffn": 4, "capacity_factor": 1.1} | experts))
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:  # gains of 1 would not tell one norm from another
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for router in routers(model):
        if router.bias is not None:
            router.bias.fill_(-0.7)
        if router.choice_bias is not None:
            router.choice_bias.fill_(0.4)
    return model.eval()


def tokens() -> torch.Tensor:
    return torch.randint(SIZES.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))


def said(*arguments: str) -> str:
    """What the command writes."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(list(arguments)) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: the folder. Its checkpoint is beside it, with `.ckpt`."""
    root = tmp_path_factory.mktemp("exported")
    vocabulary = train_tokenizer([SENTENCE] * 3, SIZES.vocab_size)
    folders = {}
    for i, name in enumerate(MODELS):
        folder, model = root / f"model-{i}", build(name)
        origin = {"tokenizer_json": vocabulary.tokenizer_json, "end_of_text": vocabulary.end_of_text}
        origin |= {"data": "a sentence", "data_hash": "its hash"}
        write_checkpoint(f"{folder}.ckpt", checkpoint_of(model, **origin))
        said("export", str(folder), f"--ckpt={folder}.ckpt", "--format=hf")
        with torch.no_grad():
            save_file({"tokens": tokens(), "logits": model(tokens()).logits}, folder / "tokens.safetensors")
        folders[name] = folder
    return folders


@pytest.fixture(scope="module")
def found(exported: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What reader.py has found, where there is no moepp."""
    root = next(iter(exported.values())).parent
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(root / "cache"),
        "HF_MODULES_CACHE": str(root / "modules"),
    }
    command = [sys.executable, "-I", str(READER), *map(str, exported.values())]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    reports = json.loads(ended.stdout.splitlines()[-1])
    return {name: reports[str(folder)] for name, folder in exported.items()}


each = pytest.mark.parametrize("name", MODELS)


@each
def test_without_moepp_the_logits_are_the_same(found: dict[str, dict[str, Any]], name: str) -> None:
    report = found[name]
    assert report["class"] == "transformers_modules, MoeppForCausalLM"
    assert report["implementations"] == ["batched_mm", "sdpa"]
    assert len(report["logits"]) == 3
    for back_ends, distance in report["logits"].items():
        assert distance <= 1e-5, back_ends
        assert report[f"cache, {back_ends}"] <= 1e-5, back_ends
        assert report[f"padding, {back_ends}"] <= 1e-4, back_ends
    n_experts = build(name).moe_config.n_experts
    assert report["router logits"] == [[72, n_experts]] * 3
    assert report["hidden states"] == 4
    assert report["kept"] <= 1e-5


@each
def test_without_moepp_it_writes_the_same_text(
    found: dict[str, dict[str, Any]], exported: dict[str, Path], name: str
) -> None:
    options = ("--temperature=0", "--max_new_tokens=12", f"--ckpt={exported[name]}.ckpt")
    texts = {prompt: said("generate", f"--prompt={prompt}", *options)[:-1] for prompt in found[name]["alone"]}
    assert len(texts) == 3
    assert found[name]["alone"] == found[name]["batch"] == found[name]["generate"] == texts
    assert found[name]["ids"][0] == 0
    assert 0 not in found[name]["ids"][1:]  # in a text it is text


@each
def test_without_moepp_it_trains_and_is_saved(
    found: dict[str, dict[str, Any]], exported: dict[str, Path], name: str
) -> None:
    assert found[name]["trained"] == {"eager": True, "grouped_mm": True}
    assert all(found[name]["saved"])
    folder, model = Path(f"{exported[name]}-saved"), build(name)
    again = load_hub(folder)
    assert_same(again.state_dict(), model.state_dict())
    effective = replace(model.config, n_kv_heads=model.config.kv_heads, head_size=model.config.head_dim)
    assert (again.config, again.moe_config) == (effective, model.moe_config)
    assert (folder / "modeling_moepp.py").read_text() == (
        Path(hf.__file__).parent / "modeling_moepp.py"
    ).read_text()


@each
def test_import_reads_it_back(exported: dict[str, Path], tmp_path: Path, name: str) -> None:
    said("import", str(exported[name]), f"{tmp_path}/again.ckpt")
    before, after = load(f"{exported[name]}.ckpt"), load(tmp_path / "again.ckpt")
    assert_same(after.model.state_dict(), before.model.state_dict())
    assert (after.model.config, after.model.moe_config) == (before.model.config, before.model.moe_config)
    assert after.meta == before.meta


# one class of theirs checkpoints the layers of all models
@pytest.mark.parametrize(
    ("name", "reentrant"),
    [(name, None) for name in MODELS] + [(name, kind) for name in [*MODELS][:2] for kind in (False, True)],
)
def test_loss_and_gradients_are_ours(exported: dict[str, Path], name: str, reentrant: bool | None) -> None:
    """In training. Opened without `trust_remote_code`: importing moepp.hf has registered the classes."""
    theirs = AutoModelForCausalLM.from_pretrained(exported[name]).double().train()
    assert type(theirs) is hf.MoeppForCausalLM
    theirs.set_experts_implementation("eager")  # the only one that knows float64
    if reentrant is not None:
        theirs.gradient_checkpointing_enable({"use_reentrant": reentrant})
        theirs.enable_input_require_grads()
    ours = build(name).double()
    ours.rope_2Sd = ours.rope_2Sd.float()
    output = ours(tokens())
    balance = mean_load_balance_loss(output.routings)
    cross_entropy = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()
    )
    loss = cross_entropy + 0.01 * balance
    loss.backward()
    found = theirs(tokens(), labels=tokens())
    found.loss.backward()
    torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.aux_loss, balance, rtol=1e-5, atol=0)
    assert found.router_logits is None
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for ours_name, [parts] in tensor_names(ours.config, ours.moe_config):
        expected = ours.get_parameter(ours_name).grad
        actual = torch.cat([gradients.pop(part) for part in parts])
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-6), ours_name
    assert not gradients
    with torch.no_grad():
        loss = theirs.eval()(tokens(), labels=tokens()).loss
        torch.testing.assert_close(loss, cross_entropy, check_dtype=False)


def test_a_micro_batch_without_ffn_experts_has_gradients_of_0(exported: dict[str, Path]) -> None:
    """Of several processes one would otherwise wait for them."""
    model = hf.MoeppForCausalLM.from_pretrained(exported["as in the paper"]).train()
    block = model.model.layers[0].mlp
    x_TD = torch.randn(5, model.config.hidden_size)
    nobody_TK = torch.full((5, model.config.num_experts_per_tok), model.config.num_experts)
    block.ffn(x_TD, nobody_TK, torch.ones(nobody_TK.shape)).sum().backward()
    for weight in block.experts.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()


def test_balance_counts_neither_padding_nor_what_other_micro_batches_have(exported: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported["many zero experts, grouped queries"]).train()
    alone = model(tokens()[:1], labels=tokens()[:1])
    batch, mask = torch.nn.functional.pad(tokens()[:1], (0, 6)), torch.ones(1, 30, dtype=torch.long)
    mask[:, 24:] = 0
    labels = batch.masked_fill(mask == 0, -100)
    padded = model(batch, attention_mask=mask, labels=labels)
    torch.testing.assert_close(padded.aux_loss, alone.aux_loss)
    torch.testing.assert_close(padded.loss, alone.loss)
    half = model(batch, attention_mask=mask, labels=labels, num_items_in_batch=2 * 23)
    torch.testing.assert_close(half.loss, alone.loss / 2)
    unsaid = model(batch, attention_mask=mask, labels=labels, num_items_in_batch=None, shift_labels=None)
    torch.testing.assert_close(unsaid.loss, alone.loss)


def test_the_exported_code_knows_every_option() -> None:
    """One that it does not know it takes and leaves out. `balance_over` is of training on several devices."""
    written = write_config(SIZES, MoEConfig()).keys() - {"auto_map", "balance_over"}
    assert written <= hf.MoeppConfig().to_dict().keys()


def test_new_weights_are_drawn_as_ours() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "score_bias": True}
    config = hf.MoeppConfig(vocab_size=320, num_experts=24, tie_word_embeddings=False, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    ours = Transformer(TransformerConfig(320, 3, 128, 96, tie_embeddings=False), MoEConfig(24, score_bias=True))
    for name, [parts] in tensor_names(ours.config, ours.moe_config):
        expected, drawn = ours.get_parameter(name), torch.cat([model.get_parameter(part) for part in parts])
        assert drawn.shape == expected.shape
        off = min(0.2, 4 / drawn.numel() ** 0.5)  # the s.d. of each side's n draws is itself off by 1 / sqrt(2n)
        assert drawn.std().item() == pytest.approx(expected.std().item(), rel=off), name
    assert model.model.layers[1].mlp.gate.bias == 0


def test_large_models_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 40_000)
    model = build("as in the paper")
    export_hub(model, tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    assert_same(load_hub(tmp_path).state_dict(), model.state_dict())
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits
        torch.testing.assert_close(theirs, model(tokens()).logits, rtol=0, atol=1e-4)


def test_the_card_has_the_run_s_figures(workdir: Path, text_file: Path) -> None:
    said("fit", *tiny(text_file), "--trainer.max_steps=4")
    run = Path("runs/moepp/1")
    result = json.loads((run / "result.json").read_text())
    assert result["tokens"] == 4 * 4 * 32
    said("export", "last", "--format=hf")
    card = Path("last/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    for figure in (
        f"| data | {result['data']} |",
        "| training tokens | 512 |",
        f"| loss | {result['final/loss']:.4f} nats per token (perplexity {result['final/perplexity']:.2f}) |",
        f"| bits per byte | {result['final/bits_per_byte']:.4f} |",
        f"| FFN experts per token | {result['final/ffn_per_token']:.3f} of 2 (at balance 1.200) |",
        "lr: 0.01",
        "@inproceedings{jin2025moepp,",
    ):
        assert figure in card, figure
    said("export", "before", f"--ckpt={run}/checkpoints/step-00000002.ckpt", "--format=hf")
    card = Path("before/README.md").read_text()
    assert "| loss |" not in card
    assert "this checkpoint is not the last of a finished run" in card
    code = card.split("```python\n")[1].split("```")[0]
    assert code.splitlines()[1] == 'generate = pipeline("text-generation", "before", trust_remote_code=True)'
    exec(code, {})


def test_an_imported_model_has_no_figures(workdir: Path) -> None:
    released = Path(__file__).parents[1] / "model/reference/released_two_layer_gate"
    said("import", str(released), "model.ckpt")
    said("export", "out", "--ckpt=model.ckpt", "--format=hf")
    card = Path("out/README.md").read_text()
    assert "was trained elsewhere" in card
    assert "comes without a tokenizer" in card
    assert "| loss |" not in card
    assert "How it was trained" not in card
    assert not Path("out/tokenizer_config.json").exists()
    exec(card.split("```python\n")[1].split("```")[0], {})


@pytest.mark.parametrize("puts", ["a token", "nothing"])
def test_an_imported_tokenizer_goes_on_as_it_was(workdir: Path, puts: str) -> None:
    """Whether or not it puts a token of its own before a text, as Llama's does and Qwen's does not."""
    theirs = train_tokenizer([SENTENCE], SIZES.vocab_size - 2).tokenizer
    theirs.add_special_tokens(["<s>", "</s>"])
    start = theirs.token_to_id("<s>")
    if puts == "a token":
        theirs.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer_json, end = theirs.to_str(), theirs.token_to_id("</s>")
    content = checkpoint_of(build("dense"), tokenizer_json=tokenizer_json, end_of_text=end, data="somebody else's")
    write_checkpoint("model.ckpt", content)
    said("export", "out", "--ckpt=model.ckpt", "--format=hf")
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer("a copy").input_ids == theirs.encode("a copy").ids
    assert tokenizer("a copy</s>").input_ids[-1] == tokenizer.eos_token_id  # text that a chat template wrote
    text = pipeline("text-generation", "out")("a copy", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert (
        text
        == said("generate", "--prompt=a copy", "--temperature=0", "--max_new_tokens=12", "--ckpt=model.ckpt")[:-1]
    )
    said("import", "out", "again.ckpt")
    assert load("again.ckpt").meta["end_of_text"] == end
    assert json.loads(load("again.ckpt").meta["tokenizer"]) == json.loads(tokenizer_json)


def damage(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage(tau="gone"), "has no key 'tau'"),
        (damage(tau=-1), "moe.tau: must be positive"),
        (damage(num_hidden_layers=9), "has no tensor model.layers.3.input_layernorm.weight"),
        (damage(num_experts=5), "router.weights.0 (8, 32), config.json (9, 32)"),
        (damage(rope_parameters={"rope_type": "yarn"}), "rope_parameters={'rope_type': 'yarn'} is not supported"),
        (damage(rope_parameters=3), "config.json: "),
        (damage(moepp=3), "what it has as 'moepp' is from no export"),
        (damage(moepp={"data_hash": {}}), "what it has as 'moepp' is from no export"),
        (damage(moepp={"post_processor": 3}), "tokenizer.json cannot be read"),
        (damage(model_type="moe"), "model_type is 'moe'"),
    ],
)
def test_damaged_folders(
    exported: dict[str, Path], tmp_path: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported["a bias, probabilities as gates"]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokens.safetensors").unlink()
    change(tmp_path)
    assert main(["import", str(tmp_path), f"{tmp_path}/again.ckpt"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "again.ckpt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--format=gguf"], "'released', 'hf'"),
        (["there"], "there exists already"),
        (["out", "--ckpt=nowhere.ckpt"], "nowhere.ckpt does not exist"),
    ],
)
def test_bad_input(
    exported: dict[str, Path],
    workdir: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("there").mkdir()
    ckpt = f"--ckpt={exported['dense']}.ckpt"
    assert main(["export", ckpt, "--format=hf", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out").exists()
