"""One pass of a text through the models: everything that is measured is counted on the way."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from moepp.model import InputError, Transformer
from moepp.study.figures.parts_of_speech import NONE, PartsOfSpeech
from moepp.study.figures.routing_stats import RoutingCounts, Scores
from moepp.text.held_out import HeldOut

BATCH_TOKENS = 4096


@torch.inference_mode()
def read_text(
    text: HeldOut, counts: RoutingCounts, models: Mapping[str, Transformer], parts_of_speech: PartsOfSpeech | None
) -> None:
    """Stream the text through once and count.

    Args:
        models: by name; choices are counted of the first, scores of each.

    Raises:
        InputError: less text than a sequence.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first, *_ = (model.to(device) for model in models.values())
    seq_len = first.config.context_length
    for name, model in models.items():
        counts.scores[name] = Scores(model.config.n_layers, min(2, model.moe_config.n_experts))
    bytes_V = np.array([len(token.encode()) for token in counts.texts_V])
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("reading text", total=text.size)
        for windows in batches(text.windows(), max(1, BATCH_TOKENS // seq_len)):
            domains, tokens = zip(*windows, strict=True)
            valid_BS = np.arange(seq_len) < np.array([len(tokens_S) for tokens_S in tokens])[:, None]
            tokens_BS, classes_BS = np.zeros(valid_BS.shape, np.int64), np.full(valid_BS.shape, NONE)
            tokens_BS[valid_BS] = np.concatenate(tokens)  # padding comes last, where no token can see it
            if parts_of_speech:
                classes_BS[valid_BS] = np.concatenate([parts_of_speech(tokens_S) for tokens_S in tokens])
            inputs_BS = torch.from_numpy(tokens_BS).to(device)
            routings = {name: model.hidden(inputs_BS)[1] for name, model in models.items()}
            for name, scores in counts.scores.items():
                n_ranks = scores.low.shape[1]
                top_TLR = torch.stack([routing.probs.topk(n_ranks).values for routing in routings[name]], 1)
                scores.add(top_TLR.cpu().numpy()[valid_BS.ravel()])
            experts_TLK = torch.stack([routing.experts for routing in next(iter(routings.values()))], 1)
            experts_BSLK = experts_TLK.cpu().numpy().reshape(*valid_BS.shape, *experts_TLK.shape[1:])
            counts.add(domains, tokens_BS, classes_BS, valid_BS, experts_BSLK)
            progress.advance(task, int(bytes_V[tokens_BS[valid_BS]].sum()))
    if (n_tokens := counts.token_n.sum()) < seq_len:
        raise InputError(
            f"{text.name} has {n_tokens} tokens, fewer than one sequence of {seq_len}: give more text"
        )


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
