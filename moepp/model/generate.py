"""Text from a model: greedy or sampled, with a key/value cache."""

from collections.abc import Callable

import torch
from torch import Tensor

from .config import require
from .errors import InputError
from .transformer import KVCache, Transformer


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # compiled blocks would be compiled anew for every length
def generate(
    model: Transformer,
    prompt_S: Tensor,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    stop: int | Callable[[Tensor], bool] | None = None,
    seed: int = 0,
) -> Tensor:
    """`prompt_S` (S,) followed by up to `max_new_tokens` more tokens.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample among the fewest tokens whose probabilities reach this sum.
        stop: the token to end early after, or what says of the new tokens (N,) that they end here.

    Raises:
        InputError: an option is out of range, or the text would not fit the model's context.
    """
    require(len(prompt_S) >= 1, "prompt", len(prompt_S), "must have at least one token")
    require(max_new_tokens >= 0, "max_new_tokens", max_new_tokens, "must not be negative")
    require(temperature >= 0, "temperature", temperature, "must not be negative")
    require(0 < top_p <= 1, "top_p", top_p, "must be above 0 and at most 1")
    require(0 <= seed < 2**63, "seed", seed, "must be between 0 and 2^63")
    vocab_size = model.config.vocab_size
    for end in (int(prompt_S.min()), int(prompt_S.max())):
        require(0 <= end < vocab_size, "prompt", end, f"must be of tokens below vocab_size={vocab_size}")
    context = model.config.context_length
    if len(prompt_S) + max_new_tokens > context:
        raise InputError(
            f"a prompt of {len(prompt_S)} tokens and max_new_tokens={max_new_tokens} do not fit the model's "
            f"context of {context}: ask for at most {max(context - len(prompt_S), 0)}"
        )
    generator = torch.Generator().manual_seed(seed)
    caches = [KVCache() for _ in model.blocks]
    training = model.training
    model.eval()
    tokens = unseen = prompt_S[None]
    try:
        for _ in range(max_new_tokens):
            logits_V = model(unseen, caches).logits[0, -1].float().cpu()  # CUDA's cumsum is not deterministic
            if not logits_V.isfinite().all():
                raise InputError(
                    "the model's output is not finite: its weights are damaged, or its training diverged"
                )
            token = sample(logits_V, temperature, top_p, generator).to(tokens.device)
            tokens = torch.cat((tokens, token.view(1, 1)), dim=1)
            unseen = token.view(1, 1)
            if stop(tokens[0, len(prompt_S) :]) if callable(stop) else int(token) == stop:
                break
    finally:
        model.train(training)
    return tokens[0]


def sample(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token (): the arg max at temperature 0, else a draw from the nucleus of probability `top_p`."""
    if temperature < 1e-30:  # in float32 the difference of two logits, divided by less, is 0 / 0
        return logits_V.argmax()
    probs_V, order_V = ((logits_V - logits_V.max()) / temperature).softmax(-1).sort(descending=True)
    before_V = probs_V.cumsum(0) - probs_V  # what the more likely tokens add up to; the first is always kept
    return order_V[torch.multinomial(probs_V.where(before_V < top_p, 0.0), 1, generator=generator)[0]]
