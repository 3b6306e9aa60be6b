"""What routers decide, counted in one pass: memory does not grow with the text.

Windows of S tokens, L layers, E experts of k kinds, K choices a token, D domains, C parts of speech, V tokens of
the vocabulary. A token's FFN count is how many FFN experts are among its K choices. Counts are whole numbers, so
that sums do not depend on their order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import entr

from moepp.model import MoEConfig
from moepp.study.figures.parts_of_speech import CLASSES

PASSAGE = 200  # tokens of the text's beginning that are kept
MOST_PASSAGES = 128  # of a domain
MIN_COUNT = 20  # tokens that occur less often are left out of the figure by token
SCORE_BINS = 1000


class Passages:
    """Sums over passages, consecutive stretches of text of equal length: what intervals are drawn from.

    A passage is as many windows as keep every domain at MOST_PASSAGES or fewer: where one has more, neighbours are
    added up, and passages are twice as long from then on.
    """

    def __init__(self) -> None:
        self.windows = 1  # in a passage
        self.seen: dict[str, int] = {}  # windows of each domain
        self.sums: dict[str, list[np.ndarray]] = {}  # of each domain's passages

    def __str__(self) -> str:
        return f"passages of {self.windows} sequence{'s' * (self.windows > 1)}"

    def add(self, domain: str, sums_X: np.ndarray) -> None:
        """Count the domain's next window."""
        seen, passages = self.seen.get(domain, 0), self.sums.setdefault(domain, [])
        if seen % self.windows == 0:
            passages.append(np.zeros_like(sums_X))
        passages[-1] += sums_X
        self.seen[domain] = seen + 1
        if len(passages) > MOST_PASSAGES:
            self.windows *= 2
            for name, passages in self.sums.items():
                self.sums[name] = [np.sum(passages[i : i + 2], axis=0) for i in range(0, len(passages), 2)]


class DocumentPassages(Passages):
    """The same of documents whose number is known, and which come in any order and in any number of windows.

    A passage is a document, or as many neighbours as keep every domain at MOST_PASSAGES or fewer.

    Args:
        documents: how many each domain has. A window's domain is (domain, number of the document).
    """

    def __init__(self, documents: dict[str, int]) -> None:
        super().__init__()
        self.documents = documents

    def __str__(self) -> str:
        return f"documents ({MOST_PASSAGES} groups of neighbours where there are more)"

    def add(self, domain: tuple[str, int], sums_X: np.ndarray) -> None:  # type: ignore[override]
        if not self.sums:
            sizes = {name: min(n, MOST_PASSAGES) for name, n in self.documents.items()}
            self.sums = {name: [np.zeros_like(sums_X) for _ in range(size)] for name, size in sizes.items()}
        name, document = domain
        self.sums[name][document * len(self.sums[name]) // self.documents[name]] += sums_X


class RoutingCounts:
    """All that is counted of a model on one text.

    Args:
        texts_V: the text of each token.
        passages: what keeps the sums over passages.

    Attributes:
        kinds: where the experts of each kind stand, of the kinds that the model has, FFN experts first.
        passages: of flat vectors, which `sums` reads.
        token_n, token_ffn, token_ffn_squared: (V,) occurrences, and sums of the FFN count over layers.
        flow_Lkk: from kinds of experts in all layers but the last to kinds in the next, K² for every token: its K
            choices go to the K of the next layer in equal parts.
        passage: token ids (S,) and FFN counts (S, L) of the text's beginning.
        scores_LRX: by model, this one first: tokens whose highest and second-highest routing probability
            (figure 6) are in each of X bins of equal width from 0 to 1. R is 2, or 1 with one expert.
        at_budgets: loss against compute (compute_curve.py), of a model with a budget.
    """

    def __init__(
        self, moe: MoEConfig, n_layers: int, texts_V: list[str], passages: Passages | None = None
    ) -> None:
        self.moe, self.n_layers, self.texts_V = moe, n_layers, texts_V
        self.kinds = {kind: where for kind, where in moe.kinds.items() if where.stop > where.start}
        self.passages = passages or Passages()
        self.passage: tuple[np.ndarray, ...] = ()
        self.token_n, self.token_ffn, self.token_ffn_squared = np.zeros((3, len(texts_V)), np.int64)
        self.flow_Lkk = np.zeros((n_layers - 1, len(self.kinds), len(self.kinds)), np.int64)
        self.scores_LRX: dict[str, np.ndarray] = {}
        self.at_budgets: pd.DataFrame | None = None

    @property
    def domains(self) -> list[str]:
        return list(self.passages.sums)

    @property
    def layers(self) -> range:
        """As people count them, from 1."""
        return range(1, self.n_layers + 1)

    @property
    def frequent_tokens(self) -> np.ndarray:
        """Ids of tokens of text that occur often enough."""
        has_text_V = np.array([bool(text) for text in self.texts_V])
        return np.flatnonzero(has_text_V & (self.token_n >= MIN_COUNT))

    def add(self, domain: Any, tokens_S: np.ndarray, classes_S: np.ndarray, experts_SLK: np.ndarray) -> None:
        """Count the domain's next window. A class below 0 is none."""
        chosen_SLE = (experts_SLK[..., None] == np.arange(self.moe.n_experts)).sum(-2)
        kinds_SLk = by_kind(self.kinds, chosen_SLE)
        self.flow_Lkk += np.einsum("sli,slj->lij", kinds_SLk[:, :-1], kinds_SLk[:, 1:])

        ffn_SL = kinds_SLk[..., 0]
        if not self.passage:
            self.passage = tokens_S[:PASSAGE], ffn_SL[:PASSAGE]
        ffn_S = ffn_SL.sum(-1)
        np.add.at(self.token_n, tokens_S, 1)
        np.add.at(self.token_ffn, tokens_S, ffn_S)
        np.add.at(self.token_ffn_squared, tokens_S, ffn_S**2)

        in_class_SC = classes_S[:, None] == np.arange(len(CLASSES))
        sums = len(tokens_S), chosen_SLE.sum(0), ffn_SL.T @ ffn_SL, in_class_SC.sum(0), ffn_S @ in_class_SC
        self.passages.add(domain, np.concatenate([np.ravel(part) for part in sums]))

    def add_scores(self, model: str, scores_TLR: np.ndarray) -> None:
        """Count the highest and second-highest routing probabilities of any tokens."""
        _, L, R = scores_TLR.shape
        scores_LRX = self.scores_LRX.setdefault(model, np.zeros((L, R, SCORE_BINS), np.int64))
        bins_TLR = np.minimum(scores_TLR * np.float64(SCORE_BINS), SCORE_BINS - 1).astype(np.int64)
        np.add.at(scores_LRX, (np.arange(L)[:, None], np.arange(R), bins_TLR), 1)

    def sums(self, flat_DX: np.ndarray) -> "Sums":
        """Sums over passages, (…, D, X), by their names."""
        L, E, C, before = self.n_layers, self.moe.n_experts, len(CLASSES), flat_DX.shape[:-1]
        n, chosen, products, class_n, class_ffn = np.split(flat_DX, np.cumsum([1, L * E, L * L, C]), axis=-1)
        chosen_DLE, products_DLL = chosen.reshape(*before, L, E), products.reshape(*before, L, L)
        return Sums(self.kinds, n[..., 0], chosen_DLE, products_DLL, class_n, class_ffn)


def by_kind(kinds: dict[str, slice], array_E: np.ndarray, reduce: Callable[..., Any] = np.sum) -> np.ndarray:
    """Sums over the experts of each kind, or what `reduce` makes of them: (…, E) → (…, k)."""
    return np.stack([reduce(array_E[..., where], axis=-1) for where in kinds.values()], -1)


@dataclass(frozen=True)
class Sums:
    """Sums over tokens, by domain, and the statistics on them. In all shapes, resamples may stand before D.

    Where there is nothing to take a mean or a variance of, a statistic is NaN, and numpy warns.

    Attributes:
        kinds: where the experts of each kind stand.
        n_D: tokens.
        chosen_DLE: tokens that chose the expert.
        products_DLL: FFN count in one layer times that in another.
        class_n_DC: tokens of the class.
        class_ffn_DC: FFN count of the class, over all layers.
    """

    kinds: dict[str, slice]
    n_D: np.ndarray
    chosen_DLE: np.ndarray
    products_DLL: np.ndarray
    class_n_DC: np.ndarray
    class_ffn_DC: np.ndarray

    @cached_property
    def ffn_DL(self) -> np.ndarray:
        """FFN experts per token."""
        return self.chosen_DLE[..., self.kinds["ffn"]].sum(-1) / self.n_D[..., None]

    def ffn_by_panel(self) -> np.ndarray:
        """(D, 1 + L) FFN experts per token, the mean over layers first."""
        return np.concatenate([self.ffn_DL.mean(-1, keepdims=True), self.ffn_DL], -1)

    def ffn_by_class(self) -> np.ndarray:
        """(C,) FFN experts per token, mean over layers and all domains; NaN for a class that does not occur."""
        return self.class_ffn_DC.sum(-2) / (self.class_n_DC.sum(-2) * self.chosen_DLE.shape[-2])

    def kind_shares(self) -> np.ndarray:
        """(D, L, k) share of choices that go to experts of the kind."""
        return by_kind(self.kinds, self.chosen_DLE / self.chosen_DLE.sum(-1, keepdims=True))

    def activations(self) -> np.ndarray:
        """(D, k) share of tokens that choose an expert of the kind, mean over its experts and layers."""
        return by_kind(self.kinds, self.chosen_DLE.mean(-2) / self.n_D[..., None], np.mean)

    def zero_excess(self) -> np.ndarray:
        """() The same of zero experts, less that of the most active other kind; NaN without zero experts."""
        share_E = self.chosen_DLE.sum(-3).mean(-2) / self.n_D.sum(-1)[..., None]
        share = dict(zip(self.kinds, np.moveaxis(by_kind(self.kinds, share_E, np.mean), -1, 0), strict=True))
        return share.pop("zero", np.nan) - np.max(list(share.values()), axis=0)

    def correlation(self) -> np.ndarray:
        """(L, L) correlation between tokens of the FFN counts in two layers; NaN where one is constant."""
        n = self.n_D.sum(-1)[..., None, None]
        mean_L1 = self.chosen_DLE[..., self.kinds["ffn"]].sum((-1, -3))[..., None] / n
        covariance_LL = self.products_DLL.sum(-3) / n - mean_L1 * mean_L1.swapaxes(-1, -2)
        variance_L = np.diagonal(covariance_LL, axis1=-2, axis2=-1)
        sd_L = np.sqrt(np.where(variance_L > 1e-9, variance_L, np.nan))
        return covariance_LL / (sd_L[..., None] * sd_L[..., None, :])

    def adjacent_correlation(self) -> np.ndarray:
        """() Its mean over pairs of adjacent layers."""
        return np.diagonal(self.correlation(), 1, -2, -1).mean(-1)

    def adjacent_correlation_of_domains(self) -> np.ndarray:
        """() The same of FFN experts per token, between domains instead of tokens; NaN below three domains."""
        z_DL = self.ffn_DL - self.ffn_DL.mean(-2, keepdims=True)
        z_DL = z_DL / np.sqrt((z_DL**2).sum(-2, keepdims=True))
        return np.where(self.n_D.shape[-1] < 3, np.nan, (z_DL[..., 1:] * z_DL[..., :-1]).sum(-2).mean(-1))

    def adjacent_excess(self) -> np.ndarray:
        """() adjacent_correlation, less its mean over pairs of layers further apart."""
        i, j = np.triu_indices(self.chosen_DLE.shape[-2], 2)
        return self.adjacent_correlation() - self.correlation()[..., i, j].mean(-1)

    def spread_by_layer(self) -> np.ndarray:
        """(L,) variance between domains of FFN experts per token; NaN of one domain."""
        return self.ffn_DL.var(-2, ddof=1)

    def outer_excess(self) -> np.ndarray:
        """() spread_by_layer of the first or the last layer, whichever has less, less that of those between."""
        spread_L = self.spread_by_layer()
        return spread_L[..., [0, -1]].min(-1) - spread_L[..., 1:-1].mean(-1)

    def spread(self) -> np.ndarray:
        """() Variance between domains of FFN experts per token, mean over layers."""
        return self.ffn_DL.mean(-1).var(-1, ddof=1)

    def divergence_by_layer(self) -> np.ndarray:
        """(L,) Jensen–Shannon divergence of the domains' expert distributions, in bits, domains weighing the same.

        It is what one choice of expert tells of the domain: 0 where all are alike; NaN of one domain.
        """
        p_DLE = self.chosen_DLE / self.chosen_DLE.sum(-1, keepdims=True)
        nats_L = entr(p_DLE.mean(-3)).sum(-1) - entr(p_DLE).sum(-1).mean(-2)
        return np.where(self.n_D.shape[-1] < 2, np.nan, nats_L / np.log(2))

    def divergence(self) -> np.ndarray:
        """() Its mean over layers."""
        return self.divergence_by_layer().mean(-1)


def moments(tokens_X: np.ndarray) -> dict[str, float]:
    """Of scores that were counted in bins, to the width of a bin."""
    score_X = (np.arange(SCORE_BINS) + 0.5) / SCORE_BINS
    mean = np.average(score_X, weights=tokens_X)
    variance = np.average((score_X - mean) ** 2, weights=tokens_X)
    found = score_X[tokens_X > 0]
    return {"mean": mean, "variance": variance, "least": found[0], "largest": found[-1]}
