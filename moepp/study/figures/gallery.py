"""What `moepp figures` shows: of each picture the numbers, how it is drawn, and a sentence on what is seen."""

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moepp.study.figures import plots
from moepp.study.figures.findings import Bootstrap, Estimate
from moepp.study.figures.parts_of_speech import CLASSES
from moepp.study.figures.plots import KIND_NAMES
from moepp.study.figures.routing_stats import RoutingStats, Scores, Sums

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Picture:
    """One figure: `stem`.png, the numbers behind it in `stem`.csv, and its words on the page."""

    stem: str
    title: str
    seen: str
    rows: Rows
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Looked:
    """What was counted on one text.

    Attributes:
        scores: by checkpoint, this one first.
        texts_V: the tokens.
        passage: token ids (S,) and FFN counts (S, L) of a piece of the text.
        min_count: for a token to be shown.
    """

    stats: RoutingStats
    bootstrap: Bootstrap
    scores: dict[str, Scores]
    texts_V: list[str]
    passage: tuple[np.ndarray, np.ndarray]
    min_count: int

    @property
    def sums(self) -> Sums:
        return self.bootstrap.sums

    @property
    def domains(self) -> list[str]:
        return list(self.stats.passages.sums)

    @property
    def layers(self) -> range:
        """As people count them, from 1."""
        return range(1, self.stats.n_layers + 1)

    @property
    def top_k(self) -> int:
        return self.stats.moe.top_k


def gallery(looked: Looked) -> tuple[list[Picture], dict[str, str]]:
    """All pictures that make sense, and those that do not: title and reason."""
    wanted: list[tuple[str, Callable[[Looked], Picture], str]] = [  # title, picture, why it would say nothing
        ("expert load by domain", load, ""),
        ("FFN experts by token", tokens, no_kinds(looked) or too_rare(looked)),
        ("parts of speech", parts_of_speech, no_kinds(looked) or no_words(looked)),
        ("a passage of text", passage, no_kinds(looked)),
        ("routing scores", scores, ""),
        ("finding 1", correlation, no_kinds(looked) or one(looked.layers, "layer")),
        ("finding 2", spread, no_kinds(looked) or one(looked.domains, "domain")),
        ("finding 3", ffn_by_domain, no_kinds(looked)),
        ("finding 4", activations, no_kinds(looked)),
        ("finding 5", divergence, one(looked.domains, "domain")),
        ("pathway", pathway, no_kinds(looked) or one(looked.layers, "layer")),
    ]
    missing = {title: why for title, _, why in wanted if why}
    return [picture(looked) for _, picture, why in wanted if not why], missing


def no_kinds(looked: Looked) -> str:
    if looked.stats.moe.n_zero_computation:
        return ""
    return f"vanilla MoE has FFN experts alone, so every token uses {looked.top_k}"


def too_rare(looked: Looked) -> str:
    return "" if len(shown_tokens(looked)) else f"no token occurs {looked.min_count} times: lower --min_count"


def no_words(looked: Looked) -> str:
    return "" if looked.sums.class_n_DC.any() else "no word was tagged"


def one(things: Iterable[Any], name: str) -> str:
    return f"there is one {name} only" if len(list(things)) == 1 else ""


# ---- figure 4 ----------------------------------------------------------------------------------------------


def load(looked: Looked) -> Picture:
    per_token_DLE = looked.sums.chosen_DLE / looked.sums.n_D[:, None, None]
    chosen_LDE = np.concatenate([per_token_DLE.mean(1)[None], per_token_DLE.swapaxes(0, 1)])
    of_domains = looked.bootstrap.estimate(Sums.ffn_by_layer)
    ffn_LD = of_domains.map(lambda ffn_DL: np.roll(ffn_DL, 1, axis=-1).T)  # the mean first
    titles = ["all layers, mean", *(f"layer {layer}" for layer in looked.layers)]
    kind_of = {e: kind for kind, where in looked.stats.moe.kinds.items() for e in range(where.start, where.stop)}
    rows = [
        {
            "layers": title,
            "domain": domain,
            "expert": e,
            "kind": kind_of[e],
            "experts_per_token": chosen_LDE[panel, d, e],
            **ffn_LD[panel, d].columns("ffn_per_token"),
        }
        for panel, title in enumerate(titles)
        for d, domain in enumerate(looked.domains)
        for e in kind_of
    ]
    ffn_D, ffn_L = ffn_LD.value[0], ffn_LD.value[1:].mean(1)
    seen = (
        f"Of {looked.top_k} experts per token, {ffn_D.min():.2f} are FFN experts in "
        f"{looked.domains[ffn_D.argmin()]} and {ffn_D.max():.2f} in {looked.domains[ffn_D.argmax()]}; layers "
        f"range from {ffn_L.min():.2f} to {ffn_L.max():.2f}."
    )
    if no_kinds(looked):
        busiest_LD = chosen_LDE[1:].max(-1) / chosen_LDE[1:].mean(-1)
        seen = (
            f"The busiest FFN expert of a layer and domain has up to {busiest_LD.max():.1f} times the mean load."
        )
    return Picture(
        "load",
        "Expert load by domain (the paper's figure 4)",
        seen,
        rows,
        lambda: plots.load(chosen_LDE, ffn_LD, titles, looked.domains, looked.stats.moe),
    )


# ---- figure 5 ----------------------------------------------------------------------------------------------


def shown_tokens(looked: Looked) -> np.ndarray:
    """Ids of tokens of text that occur often enough."""
    has_text_V = np.array([bool(text) for text in looked.texts_V])
    return np.flatnonzero(has_text_V & (looked.stats.token_n >= looked.min_count))


def tokens(looked: Looked) -> Picture:
    stats, ids = looked.stats, shown_tokens(looked)
    n, L = stats.token_n[ids], stats.n_layers
    mean = stats.token_ffn[ids] / (n * L)
    variance = np.maximum(0, (stats.token_ffn_squared[ids] / L**2 - n * mean**2) / (n - 1))
    half = 1.96 * np.sqrt(variance / n)  # over the occurrences of the token
    order = np.lexsort((ids, -n, -mean))  # the most frequent first among equals
    ids, n, ffn = ids[order], n[order], Estimate(mean, mean - half, mean + half)[order]
    labels = [plots.visible(looked.texts_V[i]) for i in ids]
    rows = [
        {"rank": rank + 1, "token": label, "id": int(i), "count": int(count), **ffn[rank].columns("ffn_per_token")}
        for rank, (label, i, count) in enumerate(zip(labels, ids, n, strict=True))
    ]
    seen = (
        f"Of {len(ids):,} tokens that occur {looked.min_count} times or more, “{labels[0]}” takes most FFN "
        f"experts ({ffn.value[0]:.2f}) and “{labels[-1]}” least ({ffn.value[-1]:.2f}); half lie between "
        f"{np.quantile(ffn.value, 0.25):.2f} and {np.quantile(ffn.value, 0.75):.2f}. · is a space, ↵ a line end."
    )
    return Picture(
        "tokens",
        "FFN experts per token, by token (figure 5)",
        seen,
        rows,
        lambda: plots.tokens(labels, ffn, n),
    )


def parts_of_speech(looked: Looked) -> Picture:
    count_C = looked.sums.class_n_DC.sum(0).astype(int)
    found = np.flatnonzero(count_C)
    ffn = looked.bootstrap.estimate(Sums.ffn_by_class)[found]
    count, names = count_C[found], [CLASSES[i] for i in found]
    rows = [
        {"part_of_speech": name, "count": int(n), **ffn[i].columns("ffn_per_token")}
        for i, (name, n) in enumerate(zip(names, count, strict=True))
    ]
    order = np.argsort(-ffn.value)
    seen = "FFN experts per token fall in the order " + ", ".join(f"{names[i]} {ffn.value[i]:.2f}" for i in order)
    paper = " (in the paper verbs take most, then nouns, and word fragments least)."
    return Picture(
        "parts_of_speech",
        "FFN experts per token, by part of speech (figure 5)",
        seen + paper,
        rows,
        lambda: plots.parts_of_speech(names, ffn, count),
    )


def passage(looked: Looked) -> Picture:
    ids, ffn_SL = looked.passage
    texts = [looked.texts_V[i] for i in ids]
    rows = [
        {"position": position, "token": plots.visible(text)}
        | {f"layer_{layer}": int(n) for layer, n in zip(looked.layers, ffn_L, strict=True)}
        for position, (text, ffn_L) in enumerate(zip(texts, ffn_SL, strict=True))
    ]
    ffn_S = ffn_SL.mean(1)
    seen = (
        f"The text begins so ({looked.domains[0]}): its tokens take {ffn_S.mean():.2f} FFN experts on average, "
        f"from {ffn_S.min():.2f} to {ffn_S.max():.2f}. The darker, the more."
    )
    return Picture(
        "passage",
        "A passage, shaded by FFN experts",
        seen,
        rows,
        lambda: plots.passage(texts, ffn_S, looked.top_k),
    )


# ---- figure 6 ----------------------------------------------------------------------------------------------


def scores(looked: Looked) -> Picture:
    rows: Rows = []
    density = {}
    for name, its in looked.scores.items():
        bins = its.histogram.shape[-1]
        density[name] = its.histogram.sum(0) / (its.histogram.sum(0).sum(-1, keepdims=True) / bins)
        slices = {"all": slice(None), **{str(i + 1): slice(i, i + 1) for i in range(len(its.low))}}
        for layer, where in slices.items():
            for rank, (mean, variance, low, high) in enumerate(its.moments(where)):
                histogram = its.histogram[where, rank].sum(0)
                rows.append(
                    {"checkpoint": name, "layer": layer, "rank": rank + 1, "mean": mean, "variance": variance}
                    | {"least": low, "largest": high}
                    | {f"tokens_from_{b / bins:.2f}": int(n) for b, n in enumerate(histogram)}
                )
    ranks = ("highest", "second-highest")
    seen = ""
    for name, its in looked.scores.items():
        moments = [
            f"the {rank} score has mean {mean:.3f}, variance {variance:.4f}, range {low:.2f} to {high:.2f}"
            for rank, (mean, variance, low, high) in zip(ranks, its.moments(), strict=False)
        ]
        seen += f"{name}: {'; '.join(moments)}. "
    if len(looked.scores) > 1:
        ours, theirs = (its.moments()[:, 1] for its in looked.scores.values())
        ratios = " and ".join(f"{a / b:.2f}" for a, b in zip(ours, theirs, strict=False))
        seen += f"The variances of the first are {ratios} times those of the other."
    return Picture("scores", "Routing scores (figure 6)", seen.strip(), rows, lambda: plots.scores(density))


# ---- the five findings -------------------------------------------------------------------------------------


def correlation(looked: Looked) -> Picture:
    estimate = looked.bootstrap.estimate(Sums.correlation)
    rows = [
        {"layer": i + 1, "other_layer": j + 1, **estimate[i, j].columns("correlation")}
        for i, j in np.ndindex(estimate.value.shape)
    ]
    adjacent = [estimate.value[i, i + 1] for i in range(len(estimate.value) - 1)]
    seen = (
        "The number of FFN experts that a token takes in one layer correlates with that in the next by "
        f"{min(adjacent):.2f} to {max(adjacent):.2f}."
    )
    return Picture(
        "finding1_correlation",
        "Finding 1: FFN load of pairs of layers",
        seen,
        rows,
        lambda: plots.correlation(estimate.value),
    )


def spread(looked: Looked) -> Picture:
    variance = looked.bootstrap.above_chance(Sums.spread_by_layer)
    estimate = variance.map(lambda x: np.sqrt(np.maximum(x, 0)))
    rows = [{"layer": layer, **estimate[i].columns("sd_between_domains")} for i, layer in enumerate(looked.layers)]
    most = int(estimate.value.argmax())
    seen = (
        f"FFN experts per token differ most between domains in layer {looked.layers[most]} "
        f"(standard deviation {estimate.value[most]:.3f}), least in {looked.layers[estimate.value.argmin()]} "
        f"({estimate.value.min():.3f})."
    )
    return Picture(
        "finding2_spread",
        "Finding 2: variation of FFN load across domains, layer by layer",
        seen,
        rows,
        lambda: plots.by_layer(estimate, "s.d. between domains of\nFFN experts per token"),
    )


def ffn_by_domain(looked: Looked) -> Picture:
    estimate = looked.bootstrap.estimate(lambda sums: sums.ffn_by_layer()[..., -1])
    rows = [
        {"domain": domain, "tokens": int(looked.sums.n_D[d]), **estimate[d].columns("ffn_per_token")}
        for d, domain in enumerate(looked.domains)
    ]
    order = np.argsort(-estimate.value)
    listed = ", ".join(f"{looked.domains[d]} {estimate.value[d]:.3f}" for d in order)
    return Picture(
        "finding3_ffn_by_domain",
        "Finding 3: FFN experts per token, by domain",
        f"FFN experts per token, mean over layers: {listed}.",
        rows,
        lambda: plots.by_domain(looked.domains, estimate),
    )


def activations(looked: Looked) -> Picture:
    share_Dk = looked.bootstrap.estimate(Sums.activations)
    rows = [
        {"domain": domain, "kind": kind, **share_Dk[d, k].columns("share_of_tokens_per_expert")}
        for d, domain in enumerate(looked.domains)
        for k, kind in enumerate(KIND_NAMES)
        if not math.isnan(share_Dk.value[d, k])
    ]
    mean_k = share_Dk.value.mean(0)
    listed = ", ".join(
        f"{name} {mean_k[k]:.3f}" for k, name in enumerate(KIND_NAMES.values()) if not math.isnan(mean_k[k])
    )
    return Picture(
        "finding4_activations",
        "Finding 4: how often one expert of a kind is chosen",
        f"Share of tokens that choose one expert of the kind, mean over domains: {listed}.",
        rows,
        lambda: plots.activations(looked.domains, share_Dk, looked.stats.moe),
    )


def divergence(looked: Looked) -> Picture:
    above = looked.bootstrap.above_chance(Sums.divergence_by_layer)
    shuffled = looked.bootstrap.shuffled(Sums.divergence_by_layer)
    rows = [
        {"layer": layer, **above[i].columns("bits"), "bits_of_shuffled_domains": float(shuffled[i])}
        for i, layer in enumerate(looked.layers)
    ]
    seen = (
        f"One choice of expert tells {above.value.min():.3f} to {above.value.max():.3f} bits, depending on the "
        f"layer, of which domain a text is from; shuffled domains reach {shuffled.max():.3f} (97.5 %)."
    )
    return Picture(
        "finding5_divergence",
        "Finding 5: distance between the domains' expert distributions",
        seen,
        rows,
        lambda: plots.by_layer(above, "Jensen–Shannon divergence\n(bits)", shuffled),
    )


# ---- the pathway -------------------------------------------------------------------------------------------


def pathway(looked: Looked) -> Picture:
    chosen_LE = looked.sums.chosen_DLE.sum(0) / (looked.sums.n_D.sum() * looked.top_k)
    share_Lk = np.stack([chosen_LE[:, where].sum(1) for where in looked.stats.moe.kinds.values()], 1)
    flow_Lkk = looked.stats.flow / looked.stats.flow.sum((1, 2), keepdims=True)
    rows = [
        {
            "layer": layer + 1,
            "from": a,
            "to": b,
            "share_of_choices": flow_Lkk[layer, i, j],
            "share_if_independent": share_Lk[layer, i] * share_Lk[layer + 1, j],
        }
        for layer in range(len(flow_Lkk))
        for i, a in enumerate(KIND_NAMES)
        for j, b in enumerate(KIND_NAMES)
        if share_Lk[0, i] and share_Lk[0, j]
    ]
    ffn = [share_Lk[i, 0] for i in range(len(share_Lk))]
    stays = [flow_Lkk[i, 0, 0] / ffn[i] for i in range(len(flow_Lkk))]
    steps = "; ".join(
        f"from layer {i} to {j} {stay:.0%} of FFN choices go to FFN experts again ({ffn[i]:.0%} if it were chance)"
        for (i, j), stay in zip(pairwise(looked.layers), stays, strict=True)
    )
    return Picture(
        "pathway",
        "Pathway: the flow between expert kinds, from layer to layer",
        f"A token's choices in one layer go to its choices in the next in equal parts: {steps}.",
        rows,
        lambda: plots.pathway(share_Lk, flow_Lkk, looked.stats.moe),
    )


# ---- small things ------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: Rows) -> None:
    """Six digits; nothing where a number is unknown."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _short(value) for name, value in row.items()})


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"
