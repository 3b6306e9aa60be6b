"""What somebody without moepp does with exported folders: run by test_export.py, prints what it finds as JSON.

python -I reader.py FOLDER..., each with a tokens.safetensors: tokens (B, S), logits (B, S, V).
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

sys.path[:] = [path for path in sys.path if not (Path(path) / "moepp").exists()]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
assert importlib.util.find_spec("moepp") is None

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402

PROMPTS = ["the router", "a", "others copy what they see or add"]


def load(folder: Path, experts: str = "eager", attention: str = "sdpa") -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, experts_implementation=experts, attn_implementation=attention
    )


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the largest magnitude; infinite for what is no number."""
    return torch.nan_to_num((found - expected).abs() / expected.abs().max(), nan=torch.inf).max().item()


@torch.no_grad()
def cached(model: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits of a first part, a second part, and then of one position after the other."""
    cuts = [0, 5, 9, *range(10, tokens_BS.shape[1] + 1)]
    cache, logits = None, []
    for start, end in zip(cuts, cuts[1:]):  # noqa: B905, RUF007
        output = model(tokens_BS[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def padded(model: Any, tokens_BS: torch.Tensor, logits_BSV: torch.Tensor) -> float:
    """The first row beside the second row's end, padded on the left: how far its logits are from those alone."""
    short = tokens_BS.shape[1] - 7
    batch = tokens_BS[:2].clone()
    batch[0] = torch.cat((torch.zeros(7, dtype=torch.long), tokens_BS[0, :short]))
    mask = torch.ones_like(batch)
    mask[0, :7] = 0
    logits = model(batch, attention_mask=mask).logits
    return max(distance(logits[0, 7:], logits_BSV[0, :short]), distance(logits[1], logits_BSV[1]))


def trained(model: Any, tokens_BS: torch.Tensor) -> bool:
    """Whether two steps leave gradients that are finite, and one for each parameter."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens_BS, labels=tokens_BS).loss.backward()
        optimizer.step()
    gradients = [parameter.grad for parameter in model.parameters()]
    return all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def report(folder: Path) -> dict[str, Any]:
    given = load_file(folder / "tokens.safetensors")
    tokens, logits = given["tokens"], given["logits"]
    found: dict[str, Any] = {"logits": {}}
    for experts, attention in (("eager", "eager"), ("grouped_mm", "sdpa"), ("batched_mm", "sdpa")):
        model = load(folder, experts, attention)
        with torch.no_grad():
            found["logits"][f"{experts}, {attention}"] = distance(model(tokens).logits, logits)
        found[f"cache, {experts}, {attention}"] = distance(cached(model, tokens), logits)
        found[f"padding, {experts}, {attention}"] = padded(model, tokens, logits)
    found["class"] = f"{type(model).__module__.split('.')[0]}, {type(model).__name__}"
    found["implementations"] = [model.config._experts_implementation, model.config._attn_implementation]
    output = model(tokens, output_router_logits=True, output_hidden_states=True, logits_to_keep=2)
    found["router logits"] = [list(scores.shape) for scores in output.router_logits]
    found["hidden states"] = len(output.hidden_states)
    found["kept"] = distance(output.logits, logits[:, -2:])

    saved = folder.with_name(f"{folder.name}-saved")
    model.save_pretrained(saved)
    again = load(saved)
    found["saved"] = [torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer.save_pretrained(saved)
    found["ids"] = tokenizer("copy <|endoftext|>").input_ids
    write = pipeline("text-generation", str(folder), trust_remote_code=True)
    # one by one, and all at once
    for name, size in (("alone", 1), ("batch", len(PROMPTS))):
        texts = write(PROMPTS, max_new_tokens=12, do_sample=False, batch_size=size)
        found[name] = {prompt: text["generated_text"] for prompt, [text] in zip(PROMPTS, texts, strict=True)}
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=12, do_sample=False)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    found["generate"] = dict(zip(PROMPTS, texts, strict=True))
    found["trained"] = {experts: trained(load(folder, experts), tokens) for experts in ("eager", "grouped_mm")}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({path: report(Path(path)) for path in sys.argv[1:]}))
