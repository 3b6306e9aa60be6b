"""Has the router collapsed? Where it lasts, it is said, with what to try."""

from torch import Tensor

from moepp.model import MoEConfig

PATIENCE = 5  # looks in a row; by chance alone a kind with few tokens is without any now and then
NEARLY_ALL = 0.9  # of the tokens


def watch(
    looks: dict[str, int], tokens_per_expert_LE: Tensor, n_tokens: float, moe: MoEConfig
) -> tuple[dict[str, int], list[str]]:
    """Look at how often each expert was chosen, whenever metrics are logged.

    Args:
        looks: how many in a row saw each symptom.
        tokens_per_expert_LE: assignments in each layer since the last look.
        n_tokens: tokens since the last look.
        moe: the layers' configuration.

    Returns:
        `looks` for the next time, and what there is to warn of now, a line each.
    """
    seen = symptoms(tokens_per_expert_LE, n_tokens, moe)
    looks = {what: looks.get(what, 0) + 1 for what in seen}
    return looks, [
        f"the router seems to have collapsed: {line}, {PATIENCE} logs in a row; try a larger "
        "model.moe.balance_weight, a lower model.optim.lr or more model.optim.warmup_steps"
        for what, line in seen.items()
        if looks[what] == PATIENCE
    ]


def symptoms(tokens_per_expert_LE: Tensor, n_tokens: float, moe: MoEConfig) -> dict[str, str]:
    """Signs of a collapse: an expert kind without tokens, one expert with nearly all."""
    seen = {}
    for kind, where in moe.kinds.items():
        if kind == "ffn" and moe.ffn_budget is not None and moe.budget_over == "model":
            continue  # a layer may well leave all of a small budget to others
        empty_L = tokens_per_expert_LE[:, where].sum(1) == 0
        if where.start < where.stop and empty_L.any():
            a = "an" if kind == "ffn" else "a"
            seen[kind] = f"no token takes {a} {kind} expert in layer {int(empty_L.int().argmax()) + 1}"
    busiest = tokens_per_expert_LE.max() / n_tokens
    if busiest >= NEARLY_ALL and moe.top_k < moe.n_experts:
        layer, expert = divmod(int(tokens_per_expert_LE.argmax()), moe.n_experts)
        seen["expert"] = f"expert {expert} of layer {layer + 1} takes {float(busiest):.0%} of the tokens"
    return seen
