"""One pass of a text through the models: everything that is measured is counted on the way."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from moepp.model import InputError, Transformer
from moepp.study.figures.parts_of_speech import CLASSES, NONE, PartsOfSpeech
from moepp.study.figures.picture import Measurements
from moepp.study.figures.routing_stats import RoutingCounts, Scores
from moepp.text.held_out import HeldOut

BATCH_TOKENS = 4096
PASSAGE = 200  # tokens of the text's beginning that are kept


@torch.inference_mode()
def read_text(
    models: Mapping[str, Transformer],
    text: HeldOut,
    texts_V: list[str],
    parts_of_speech: PartsOfSpeech | None,
    min_count: int,
) -> Measurements:
    """Stream the text through once.

    Args:
        models: by name; choices are counted of the first, scores of each.
        texts_V, min_count: as in Measurements.

    Raises:
        InputError: less text than a sequence.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, *_ = (model.to(device) for model in models.values())
    seq_len, moe, n_layers = model.config.context_length, model.moe_config, model.config.n_layers
    counts = RoutingCounts(moe, n_layers, len(CLASSES), model.config.vocab_size)
    scores = {name: Scores(m.config.n_layers, min(2, m.moe_config.n_experts)) for name, m in models.items()}
    bytes_V = np.array([len(token.encode()) for token in texts_V])
    passage = None
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
            routings = {name: m.hidden(torch.from_numpy(tokens_BS).to(device))[1] for name, m in models.items()}
            for name, of_model in scores.items():
                n_ranks = of_model.low.shape[1]
                top_TLR = torch.stack([routing.probs.topk(n_ranks).values for routing in routings[name]], 1)
                of_model.add(top_TLR.cpu().numpy()[valid_BS.ravel()])
            experts_TLK = torch.stack([routing.experts for routing in next(iter(routings.values()))], 1)
            experts_BSLK = experts_TLK.cpu().numpy().reshape(*valid_BS.shape, n_layers, moe.top_k)
            counts.add(domains, tokens_BS, classes_BS, valid_BS, experts_BSLK)
            if passage is None:
                ids_S = tokens[0][:PASSAGE]
                passage = ids_S, (experts_BSLK[0, : len(ids_S)] < moe.n_ffn).sum(-1)
            progress.advance(task, int(bytes_V[tokens_BS[valid_BS]].sum()))
    n_tokens = counts.token_n.sum()
    if passage is None or n_tokens < seq_len:
        raise InputError(
            f"{text.name} has {n_tokens} tokens, fewer than one sequence of {seq_len}: give more text"
        )
    return Measurements(counts, scores, passage, texts_V, min_count)


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
