"""The model card of an exported folder: what the model is, where it comes from, what came out, how to use it."""

from contextlib import suppress
from dataclasses import asdict
from typing import Any

import yaml

from moepp.model import MoEConfig, ParameterCount
from moepp.training.checkpoint import Loaded
from moepp.training.metrics import BITS, FFN, FINAL, LOSS, PERPLEXITY, aim

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- moepp
- mixture-of-experts
- moe
---

# {name}

A language model of {millions:,.1f}M parameters, built as [MoE++](https://arxiv.org/abs/2410.07348) is: in each of
{n_layers} layers a token takes {top_k} of these experts: {experts}.

| | |
|---|---|
{table}

{figures}

## Using it

transformers 5.4 or later and torch are all it takes: the model's code lies beside its weights.

```python
{code}
```

{text}It was made for texts of up to {context:,} tokens, and goes on with a text. Nothing in its training here
has taught it to follow instructions, or what not to say.

## What it is made of

```yaml
{shape}
```
{training}
## Citing and licences

```bibtex
@inproceedings{{jin2025moepp,
  title     = {{{{MoE++}}: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts}},
  author    = {{Jin, Peng and Zhu, Bo and Yuan, Li and Yan, Shuicheng}},
  booktitle = {{International Conference on Learning Representations}},
  year      = {{2025}}
}}
```

The code in this folder is from moepp, under Apache-2.0. What the model was trained on keeps its own licences.
Whoever publishes the weights says under what licence, as `license:` at the top of this file.
"""
NO_TOKENIZER = "It comes without a tokenizer: nobody has said which is its own. "
LOAD = """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)"""
PIPELINE = """\
from transformers import pipeline
generate = pipeline("text-generation", "{name}", trust_remote_code=True)
print(generate("Once upon a time")[0]["generated_text"])"""
OPTIONS: dict[str, tuple[str, ...]] = {  # of a run's, those that the card tells
    "model": ("optim", "convert", "distill"),
    "data": ("seq_len", "batch_size", "seed"),
    "trainer": ("max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision"),
}


def model_card(name: str, loaded: Loaded, parameters: ParameterCount, result: dict[str, Any] | None) -> str:
    """README.md of the folder `name`. `result` is the run's result.json; None: these weights have no figures."""
    moe, meta = loaded.model.moe_config, loaded.meta
    kinds = {"FFN": moe.n_ffn, "constant": moe.n_const, "copy": moe.n_copy, "zero": moe.n_zero}
    experts = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
    rows = {"data": cell(meta.get("data") or "not known")}
    if result is None:
        where = "was trained elsewhere" if meta.get("data_hash") is None else "is not the last of a finished run"
        figures = f"No figures are given: this checkpoint {where}, and nothing was measured when it was exported."
    else:
        rows |= measured(result, moe)
        figures = "Loss, bits per byte and FFN experts are of all the text that was held out from training."
    training = ""
    # a checkpoint need not tell what it was trained with
    with suppress(yaml.YAMLError, AttributeError, LookupError, TypeError):
        options = yaml.safe_load(meta.get("config") or "")
        chosen = {
            part: {key: options[part][key] for key in keys if options[part].get(key) is not None}
            for part, keys in OPTIONS.items()
        }
        training = f"\n## How it was trained\n\n```yaml\n{dumped(chosen)}\n```\n"
    return CARD.format(
        name=name,
        millions=parameters.total / 1e6,
        n_layers=loaded.model.config.n_layers,
        top_k=moe.top_k,
        experts=experts,
        table="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        figures=figures,
        code=(LOAD if loaded.tokenizer is None else PIPELINE).format(name=name),
        text=NO_TOKENIZER if loaded.tokenizer is None else "",
        context=loaded.model.config.context_length,
        shape=dumped({"transformer": asdict(loaded.model.config), "moe": asdict(moe)}),
        training=training,
    )


def measured(result: dict[str, Any], moe: MoEConfig) -> dict[str, str]:
    """The rows of the table that result.json has something for; an older run may say less."""
    ffn = result[FINAL + FFN]
    domains = {name.split("/", 2)[2]: bits for name, bits in result.items() if name.startswith(f"{FINAL}{BITS}/")}
    rows = {"training tokens": f"{result['tokens']:,}"} if "tokens" in result else {}
    rows |= {
        "optimizer steps": f"{result['step']:,}",
        "loss": f"{result[FINAL + LOSS]:.4f} nats per token (perplexity {result[FINAL + PERPLEXITY]:.2f})",
        "bits per byte": f"{result[FINAL + BITS]:.4f}",
    }
    if len(domains) > 1:
        rows["… by domain"] = ", ".join(f"{cell(name)} {bits:.3f}" for name, bits in domains.items())
    return rows | {
        "FFN experts per token": f"{ffn:.3f} of {moe.top_k} ({aim(moe)})",
        "parameters": f"{result['parameters']:,}, of which a token meets {result['active_parameters']:,}",
        "trained on": f"{result['device']}, {result['precision']}",
        "made with": f"moepp {result['moepp']} ({result['commit']}), torch {result['torch']}",
    }


def cell(text: str) -> str:
    """In one cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def dumped(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True).strip()
