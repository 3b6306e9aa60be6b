"""Loss against compute from one checkpoint: a text read again at other budgets than the model was trained with."""

from itertools import islice

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from rich.progress import track
from torch import Tensor

from moepp.model import Transformer, nll_by_token
from moepp.study.figures.findings import Bootstrap, Estimate
from moepp.study.figures.picture import PER_TOKEN, Drawn, picture, whiskers
from moepp.study.figures.read_text import in_batches
from moepp.study.style import BLUE, ORANGE
from moepp.text.held_out import HeldOut

BUDGETS = 9
MOST_TOKENS = 1 << 16  # of the text: it is read once for every budget


@torch.inference_mode()
def read_at_budgets(text: HeldOut, n_tokens: int, seq_len: int, model: Transformer) -> pd.DataFrame | None:
    """A row for each budget: `budget`; `ffn_per_token`, as measured; `loss`, the mean over the tokens of equally
    spaced windows, but for their first; `loss_difference` to the budget of the training, with its 95 % interval
    over windows, taken as independent; `trained`, whether it is that budget. None where the model has none.

    Args:
        n_tokens: of the text.
        seq_len: of its windows.
    """
    moe = model.moe_config
    if moe.ffn_budget is None or model.budget is None or model.budget.steps == 0:
        return None
    stride = -(-n_tokens // MOST_TOKENS)
    fewest, most = moe.ffn_range
    others = np.linspace(fewest, most, BUDGETS + 2)[1:-1]
    budgets = np.sort(np.append(others[~np.isclose(others, moe.ffn_budget)], moe.ffn_budget))
    rows, nats = [], []
    for budget in track(budgets, "reading text at other budgets"):
        model.set_ffn_budget(float(budget))
        windows = islice(text.windows(), 0, None, stride)
        batches = [by_window(tokens_BS, model) for _, tokens_BS in in_batches(windows, seq_len)]
        nats_W, ffn_W, n_W = torch.cat(batches, dim=1).numpy()
        rows.append({"budget": budget, "ffn_per_token": ffn_W.sum() / n_W.sum(), "loss": nats_W.sum() / n_W.sum()})
        nats.append(nats_W)
    model.set_ffn_budget(moe.ffn_budget)
    table = pd.DataFrame(rows)
    trained = table.budget == moe.ffn_budget
    above_XW = np.array(nats) - nats[int(np.argmax(trained))]
    half_X = 1.96 * above_XW.std(1, ddof=1) * np.sqrt(len(n_W)) / n_W.sum()
    mean_X = above_XW.sum(1) / n_W.sum()
    columns = Estimate(mean_X, mean_X - half_X, mean_X + half_X).columns("loss_difference")
    return table.assign(**columns, trained=trained)


def by_window(tokens_BS: Tensor, model: Transformer) -> Tensor:
    """(3, B) of the tokens after each window's first: nats, FFN experts (mean over layers), how many they are."""
    tokens_BS = tokens_BS.to(model.head.weight.device)
    inputs_BS, targets_BS = tokens_BS[:, :-1].clamp(0), tokens_BS[:, 1:]
    hidden_BSD, routings = model.hidden(inputs_BS)
    nats_N = nll_by_token(hidden_BSD.flatten(0, 1), model.head.weight, targets_BS.flatten())
    ffn_N = torch.stack([routing.computed().sum(1) for routing in routings]).double().mean(0)
    there_BS = targets_BS >= 0
    by_token = nats_N.double().view_as(there_BS), ffn_N.view_as(there_BS) * there_BS, there_BS.double()
    return torch.stack(by_token).sum(2).cpu()


@picture("Loss against compute, from one checkpoint", "budgets")
def compute(measured: Bootstrap) -> Drawn:
    table = measured.counts.at_budgets
    assert table is not None
    trained = table[table.trained].iloc[0]
    least, most = table.iloc[0], table.iloc[-1]
    sentence = (
        f"Trained at {trained.budget:.2f} FFN experts per token, where its loss is {trained.loss:.3f}. Given "
        f"{least.ffn_per_token:.2f}, the loss changes by {least.loss_difference:+.3f}; given "
        f"{most.ffn_per_token:.2f}, by {most.loss_difference:+.3f}. Intervals: 95 %, of this model, "
        "over sequences as if independent."
    )
    figure, axes = plt.subplots(figsize=(6.5, 4))
    difference = Estimate(*(table[f"loss_difference{part}"].to_numpy() for part in ("", "_low", "_high")))
    whiskers(axes, table.ffn_per_token, difference, fmt="o-", color=BLUE)
    axes.plot(trained.ffn_per_token, 0, marker="*", markersize=14, color=ORANGE, zorder=5, label="as trained")
    axes.set(xlabel=f"{PER_TOKEN}, measured", ylabel="loss minus the loss as trained\n(nats per token)")
    axes.legend()
    return table, sentence, figure
