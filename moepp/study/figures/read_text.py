"""One pass of a text through the models: everything that is measured is counted on the way."""

from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moepp.model import InputError, Transformer
from moepp.study.figures.parts_of_speech import NONE, PartsOfSpeech
from moepp.study.figures.routing_stats import RoutingCounts
from moepp.text.batches import IGNORE
from moepp.text.held_out import HeldOut, Windows

BATCH_TOKENS = 4096


def in_batches(windows: Windows, seq_len: int) -> Iterator[tuple[list[tuple[str, np.ndarray]], Tensor]]:
    """Several windows at a time; their tokens (B, S): IGNORE behind a shorter one's end, which no token sees."""
    while batch := list(islice(windows, max(1, BATCH_TOKENS // seq_len))):
        yield batch, pad_sequence([torch.from_numpy(tokens_S) for _, tokens_S in batch], True, IGNORE)


@torch.inference_mode()
def read_text(
    text: HeldOut,
    seq_len: int,
    counts: RoutingCounts,
    models: Mapping[str, Transformer],
    parts_of_speech: PartsOfSpeech | None,
) -> None:
    """Stream the text through once and count.

    Args:
        seq_len: S, of the text's windows.
        models: by name; choices are counted of the first, scores of each.

    Raises:
        InputError: less text than a sequence.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for model in models.values():
        model.to(device)
    bytes_V = np.array([len(token.encode()) for token in counts.texts_V])
    with Progress() as progress:
        task = progress.add_task("reading text", total=text.size)
        for windows, tokens_BS in in_batches(text.windows(), seq_len):
            valid_T = tokens_BS.ravel() >= 0
            inputs_BS = tokens_BS.clamp(0).to(device)
            routings = {name: model.hidden(inputs_BS)[1] for name, model in models.items()}
            for name, layers in routings.items():
                n_ranks = min(2, models[name].moe_config.n_experts)
                top_TLR = torch.stack([routing.probs.topk(n_ranks).values for routing in layers], 1)
                counts.add_scores(name, top_TLR.cpu()[valid_T].numpy())
            experts_TLK = torch.stack([routing.experts for routing in next(iter(routings.values()))], 1)
            experts_BSLK = experts_TLK.unflatten(0, tokens_BS.shape).cpu().numpy()
            for (domain, tokens_S), experts_SLK in zip(windows, experts_BSLK, strict=True):
                classes_S = parts_of_speech(tokens_S) if parts_of_speech else np.full(len(tokens_S), NONE)
                counts.add(domain, tokens_S, classes_S, experts_SLK[: len(tokens_S)])
                progress.advance(task, int(bytes_V[tokens_S].sum()))
    if (n_tokens := counts.token_n.sum()) < seq_len:
        raise InputError(
            f"{text.name} has {n_tokens} tokens, fewer than one sequence of {seq_len}: give more text"
        )
