"""What is measured: the metrics' names, and bits per byte, the one figure that can be compared across tokenizers.

Metrics have the same names in metrics.csv, in every logger and in result.json. Those of a validation have a stage
in front: `val` in the course of a run, on what limit_val_batches leaves of held-out text, `final` on all of it.
"""

import math

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from moepp.model import MoEConfig
from moepp.text.token_files import TokenFiles

STEP = "step"  # optimizer steps so far: the first column of metrics.csv
CROSS_ENTROPY, TOKENS = "train/cross_entropy", "train/tokens"
FFN_PER_TOKEN = "routing/ffn_per_token"
TOKENS_PER_SECOND, MFU = "speed/tokens_per_second", "speed/mfu"
VAL, FINAL = "val/", "final/"  # stages; after them comes one of
LOSS, PERPLEXITY, BITS, FFN = "loss", "perplexity", "bits_per_byte", "ffn_per_token"  # BITS also "/<domain>"


def aim(moe: MoEConfig) -> str:
    """What FFN experts per token are held against, for people."""
    return f"{'at balance' if moe.ffn_budget is None else 'budget'} {moe.expected_ffn_per_token:.3f}"


class BitsPerByte(Metric):
    """Bits the model needs for a byte of text, overall and per domain.

    Negative log likelihood of the text's tokens divided by ln 2 and by the UTF-8 bytes they stand for. Tokens of
    no letters (the end of a text) are left out of both. Of a domain's text its tokens share the bytes by their
    letters, so that its sum is exact also where a tokenizer normalises the text or drops some of it.
    """

    full_state_update = False
    letters_per_token_V: Tensor
    bytes_per_letter_D: Tensor
    nats: Tensor
    letters: Tensor

    def __init__(self, letters_per_token_V: Tensor, bytes_per_letter_D: Tensor) -> None:
        super().__init__()
        self.register_buffer("letters_per_token_V", letters_per_token_V, persistent=False)
        self.register_buffer("bytes_per_letter_D", bytes_per_letter_D, persistent=False)
        for name in ("nats", "letters"):
            self.add_state(name, torch.zeros_like(bytes_per_letter_D), dist_reduce_fx="sum")

    def update(self, nats_BS: Tensor, targets_BS: Tensor, domain_B: Tensor) -> None:
        """`nats_BS` is the cross-entropy of each target; targets below 0 are padding."""
        letters_BS = self.letters_per_token_V[targets_BS.clamp(min=0)] * (targets_BS >= 0)
        nats_B = (nats_BS.double() * (letters_BS > 0)).sum(1)
        self.nats.index_add_(0, domain_B, nats_B)
        self.letters.index_add_(0, domain_B, letters_BS.sum(1).double())

    def compute(self) -> tuple[Tensor, Tensor]:
        """(overall (), per domain (D,)); NaN for a domain without text."""
        n_bytes = self.letters * self.bytes_per_letter_D
        return self.nats.sum() / n_bytes.sum() / math.log(2), self.nats / n_bytes / math.log(2)


class Validation:
    """The figures of a validation. They are no part of the module, whose precision (`bf16-true`) they would take.

    Args:
        files: whose held-out text it is.
        device: where the batches are.
    """

    def __init__(self, files: TokenFiles, device: torch.device) -> None:
        self.domains = files.domains
        self.loss, self.ffn_per_token = MeanMetric().to(device), MeanMetric().to(device)
        self.bits_per_byte = BitsPerByte(files.letters_per_token, files.bytes_per_letter).to(device)

    def update(self, nats_BS: Tensor, targets_BS: Tensor, domain_B: Tensor, ffn_LT: Tensor) -> None:
        """`ffn_LT` is how many FFN experts compute each token; the rest as for BitsPerByte."""
        is_target_BS = targets_BS >= 0
        n_tokens = is_target_BS.sum()
        least_one = n_tokens.clamp(min=1)  # one of several devices may have been left a batch without any target
        self.loss.update(nats_BS.sum() / least_one, n_tokens)
        self.bits_per_byte.update(nats_BS, targets_BS, domain_B)
        n_ffn = (ffn_LT * is_target_BS.flatten()).sum()
        # of two whole numbers it would be in bf16, under bf16-true
        self.ffn_per_token.update(n_ffn.float() / (len(ffn_LT) * least_one), n_tokens)

    def compute(self) -> dict[str, float]:
        """By name, over all devices. Perplexity is e to the loss."""
        loss = self.loss.compute()
        overall, by_domain = self.bits_per_byte.compute()
        figures = {LOSS: loss, PERPLEXITY: loss.exp(), FFN: self.ffn_per_token.compute(), BITS: overall.float()}
        for domain, bits in zip(self.domains, by_domain.reshape(-1), strict=True):  # torchmetrics squeezes
            if bits.isfinite():
                figures[f"{BITS}/{domain}"] = bits.float()
        return {name: float(figure) for name, figure in figures.items()}
