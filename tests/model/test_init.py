"""The table of moepp.model.init, parameter by parameter."""

import pytest

from moepp.model import MoEConfig, Transformer, TransformerConfig


@pytest.mark.parametrize("tied", [True, False])
def test_standard_deviations(tied: bool) -> None:
    config = TransformerConfig(512, 3, 64, 96, 4, tie_embeddings=tied, init_std=0.05)
    for name, parameter in Transformer(config, MoEConfig(n_ffn=4, router_depth=2)).named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
            continue
        expected = 0.05
        if name == "embedding.weight" and not tied:
            expected = 1.0
        elif name.endswith(("attention.output.weight", "ffn.w_down")):
            expected = 0.05 / (2 * 3) ** 0.5
        # the s.d. of n draws is itself off by 1 / sqrt(2n)
        assert parameter.std().item() == pytest.approx(expected, rel=4 / (2 * parameter.numel()) ** 0.5), name
        assert abs(parameter.mean().item()) < 4 * expected / parameter.numel() ** 0.5, name
