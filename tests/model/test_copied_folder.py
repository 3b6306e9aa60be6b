"""moepp/model is a folder to copy: under another name, where there is no moepp, it works."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import moepp.model

FOLDER = Path(moepp.model.__file__).parent
RELEASED = Path(__file__).parent / "reference" / "released_two_layer_gate"
CODE = """
import sys
sys.modules |= dict.fromkeys(("moepp", "lightning", "torchmetrics", "tokenizers", "yaml"))  # importing them fails

import torch
from mixture import MoEConfig, Transformer, TransformerConfig, load_released, mean_load_balance_loss
from mixture.generate import generate

model = Transformer(TransformerConfig(64, 2, 16, 24, 2, context_length=8), MoEConfig(n_ffn=4))
output = model(torch.arange(8).view(1, 8))
(output.logits.logsumexp(-1).sum() + mean_load_balance_loss(output.routings)).backward()
assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
assert len(generate(load_released(sys.argv[1]), torch.arange(3), max_new_tokens=2)) == 5
"""


def test_a_copy_trains_and_reads_released_weights(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "mixture", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", CODE, str(RELEASED)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_torch_and_safetensors_alone_are_imported() -> None:
    """Anywhere, also where an import waits until it is used."""
    imported = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "safetensors"}
