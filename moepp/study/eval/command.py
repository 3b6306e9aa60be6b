"""`moepp eval`: a checkpoint and tasks of lm-evaluation-harness → scores, and the experts that each task takes."""

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jsonargparse import auto_cli
from lm_eval.evaluator import simple_evaluate
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moepp.model.config import require
from moepp.study.eval.difficulty import difficulty, score_of
from moepp.study.eval.model import MoEppLM
from moepp.study.figures import finding_figures, paper_figures
from moepp.study.figures.command import experts
from moepp.study.figures.findings import Bootstrap, findings
from moepp.study.figures.page import publish, write_csv
from moepp.study.figures.parts_of_speech import token_texts
from moepp.study.figures.picture import KIND_NAMES
from moepp.study.figures.routing_stats import DocumentPassages, RoutingCounts
from moepp.study.tasks.open import members, open_tasks
from moepp.training.arguments import OneLineParser
from moepp.training.checkpoint import load_with_tokenizer, newest_checkpoint, results_folder

BY_TASK = [
    paper_figures.load,
    finding_figures.finding2_spread,
    finding_figures.finding4_activations,
    finding_figures.finding5_divergence,
]


@dataclass(frozen=True)
class Options:
    """Evaluate with lm-evaluation-harness, and see how many FFN experts each task takes.

    Args:
        ckpt: the checkpoint; by default the newest under runs/.
        tasks: names of tasks or groups, with commas between; `paper` is the paper's nine, with its shots.
        include_path: a folder of more tasks, in lm-eval's format.
        limit: of each task only so many documents, or below 1 so large a part of them.
        num_fewshot: examples before each question, of tasks that do not say themselves that they want none.
        out: folder of the results; by default `eval` in the checkpoint's run.
    """

    ckpt: str | None = None
    tasks: str = "paper"
    include_path: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    out: str | None = None


def run(verb: str, arguments: list[str]) -> None:
    """Write results.json as lm-eval has it, tasks.csv, findings.csv, a PNG and CSV of each figure, index.html.

    Raises:
        InputError: no such checkpoint or task, or a task's data cannot be had.
    """
    options = auto_cli(Options, args=arguments, parser_class=OneLineParser, prog=f"moepp {verb}")
    require(options.limit is None or options.limit > 0, "limit", options.limit, "must be above 0")
    require((options.num_fewshot or 0) >= 0, "num_fewshot", options.num_fewshot, "must not be negative")
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    require(bool(names), "tasks", options.tasks, "must name a task")
    ckpt = Path(options.ckpt or newest_checkpoint())
    loaded, tokenizer = load_with_tokenizer(ckpt)
    opened = open_tasks(names, options.include_path)
    tasks = members(opened)

    model = loaded.model
    documents = {name: number_of_documents(task, options.limit) for name, task in tasks.items()}
    texts_V = token_texts(tokenizer, model.config.vocab_size)
    counts = RoutingCounts(model.moe_config, model.config.n_layers, texts_V, DocumentPassages(documents))
    lm = MoEppLM(loaded, counts)
    os.environ["DISABLE_MULTIPROC"] = "1"  # the pool that lm-eval would fork beside torch's threads can hang
    results = simple_evaluate(
        lm,
        tasks=list(opened.values()),
        task_manager=TaskManager(include_defaults=False),  # they are open
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        log_samples=False,
        bootstrap_iters=10_000,  # of perplexities: a tenth of lm-eval's, in one process; 1 % of a standard error
    )
    assert results is not None
    measured = Bootstrap(counts)
    results["config"] |= {"model_args": {"ckpt": str(ckpt), "tasks": options.tasks}}
    results["experts"] = experts_of(lm, measured)

    folder = Path(options.out) if options.out else results_folder(ckpt, "eval")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    (folder / "results.json").write_text(text, encoding="utf-8")
    of_tasks, scatters, too_few = difficulty(results["results"], measured)
    found = sorted([*findings(measured), *of_tasks], key=lambda finding: finding.number)
    write_csv(pd.DataFrame([numbers(name, results) for name in tasks]), folder / "tasks.csv")
    rows = [row(name, results) for name in tasks]
    about = {
        "checkpoint": f"{ckpt}: {model.config.n_layers} layers, {experts(model)}",
        "domains": "are the tasks, below too",
        "command": shlex.join(["moepp", verb, *arguments]),
    }
    notes = remarks(lm, results, list(tasks))
    table = Table(box=None, pad_edge=False, title="scores; experts per token, by kind; requests cut")
    for name in rows[0]:
        table.add_column(name, overflow="fold")  # an ellipsis would hide which task it is
    for each in rows:
        table.add_row(*map(escape, each.values()))
    Console().print(table)
    for note in notes:
        print(note)
    about |= {f"note {i}": note for i, note in enumerate(notes, 1)}
    title, pictures = "Scores and experts, task by task", [*BY_TASK, *scatters]
    publish(folder, measured, found, too_few, pictures, rows, title=title, about=about)


def number_of_documents(task: Any, limit: float | None) -> int:
    n = len(task.eval_docs)
    return min(n, get_sample_size(task, limit) or n)


def experts_of(lm: MoEppLM, measured: Bootstrap) -> dict[str, dict[str, Any]]:
    """By task: how many tokens were read, and which kinds of experts they take, of all K choices and by layer."""
    sums, kinds, K = measured.sums, list(measured.counts.kinds), measured.counts.moe.top_k
    share_DLk = sums.kind_shares()
    return {
        task: {
            "requests": lm.n_requests[task],
            "requests_cut_to_the_context": lm.n_cut[task],
            "tokens": int(sums.n_D[i]),
            "per_token": dict(zip(kinds, (K * share_DLk[i].mean(0)).tolist(), strict=True)),
            "per_token_by_layer": dict(zip(kinds, (K * share_DLk[i].T).tolist(), strict=True)),
        }
        for i, task in enumerate(measured.counts.domains)
    }


def metrics_of(results: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Of a task: each metric, with its filter where it has one, and its standard error or NaN."""
    found = {}
    for key, value in results.items():
        name, _, kind = key.partition(",")
        if not kind or name.endswith("_stderr"):
            continue
        error = results.get(f"{name}_stderr,{kind}", np.nan)
        label = name if kind == "none" else f"{name} ({kind})"
        found[label] = float(value), float(error) if isinstance(error, float) else np.nan
    return found


def numbers(task: str, results: dict[str, Any]) -> dict[str, Any]:
    """A row of tasks.csv."""
    taken = results["experts"][task]
    return {
        "task": task,
        "shots": results["n-shot"][task],
        "documents": results["n-samples"][task]["effective"],
        **{name: taken[name] for name in ("requests", "requests_cut_to_the_context", "tokens")},
        "accuracy": score_of(results["results"][task], "accuracy"),
        **{metric: value for metric, (value, _) in metrics_of(results["results"][task]).items()},
        **{f"{kind}_per_token": value for kind, value in taken["per_token"].items()},
    }


def row(task: str, results: dict[str, Any]) -> dict[str, str]:
    """The same for people. Kinds of experts are per token."""
    taken = results["experts"][task]
    scores = (
        f"{metric} {value:.4g}" + ("" if np.isnan(error) else f" ± {error:.2g}")
        for metric, (value, error) in metrics_of(results["results"][task]).items()
    )
    return {
        "task": task,
        "shots": str(results["n-shot"][task]),
        "docs": str(results["n-samples"][task]["effective"]),
        "score": "\n".join(scores),
        **{KIND_NAMES[kind]: f"{value:.2f}" for kind, value in taken["per_token"].items()},
        "cut": f"{taken['requests_cut_to_the_context']}/{taken['requests']}",
    }


def remarks(lm: MoEppLM, results: dict[str, Any], tasks: list[str]) -> list[str]:
    """What a reader of the table has to know."""
    notes = []
    accuracies = [score_of(results["results"][task], "accuracy") for task in tasks]
    counted = [value for value in accuracies if not np.isnan(value)]
    if len(counted) > 1:
        notes.append(f"mean accuracy of {len(counted)} tasks: {np.mean(counted):.4f}")
    if cut := {task: n for task, n in lm.n_cut.items() if n}:
        where = ", ".join(f"{n} of {lm.n_requests[task]} in {task}" for task, n in cut.items())
        notes.append(f"requests longer than the context of {lm.context} tokens lost their beginning: {where}")
    return notes
