import copy

import pytest
import torch

from moepp.model import InputError, MoEConfig, Transformer, TransformerConfig
from moepp.model.generate import generate, sample


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(64, 2, 16, 24, 4, context_length=40), MoEConfig(n_ffn=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


@torch.no_grad()
def test_greedy_is_the_same_as_without_a_cache(model: Transformer) -> None:
    prompt = torch.tensor([3, 1, 4, 1, 5])
    text = generate(model, prompt, 35, temperature=0)
    tokens = prompt
    for _ in range(35):
        tokens = torch.cat((tokens, model.eval()(tokens[None]).logits[0, -1:].argmax(-1)))
    assert text.tolist() == tokens.tolist()
    assert len(set(text[5:].tolist())) > 5


def test_sampling_follows_the_seed_and_keeps_the_mode(model: Transformer) -> None:
    prompt = torch.tensor([1])
    model.train()
    texts = [generate(model, prompt, 20, temperature=1.0, seed=seed).tolist() for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert model.training


def test_stops_after_the_stop_token(model: Transformer) -> None:
    greedy = generate(model, torch.tensor([3]), 20, temperature=0).tolist()
    first = greedy.index(greedy[6])
    assert generate(model, torch.tensor([3]), 20, temperature=0, stop=greedy[6]).tolist() == greedy[: first + 1]


def test_top_p_draws_from_the_nucleus_alone() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(top_p: float) -> set[int]:
        return {int(sample(logits, 1.0, top_p, generator)) for _ in range(300)}

    assert drawn(0.4) == {0}
    assert drawn(0.79) == {0, 1}
    assert drawn(0.81) == {0, 1, 2}
    assert drawn(1.0) == {0, 1, 2, 3}


def test_a_temperature_that_float32_rounds_to_0_is_0() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert sample(logits, 1e-46, 0.95, torch.Generator()) == 1


def test_output_that_is_not_finite_is_no_text(model: Transformer) -> None:
    damaged = copy.deepcopy(model)
    torch.nn.init.constant_(damaged.norm.weight, float("nan"))
    for temperature in (0.0, 0.8):
        with pytest.raises(InputError, match="the model's output is not finite"):
            generate(damaged, torch.tensor([3, 1]), 1, temperature)


def test_prompt_of_another_vocabulary(model: Transformer) -> None:
    for token in (999_999, -1):
        with pytest.raises(InputError, match=f"prompt: must be of tokens below vocab_size=.*, got {token}"):
            generate(model, torch.tensor([3, token]), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 36}, "ask for at most 35"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 1, "temperature": -0.1}, "temperature"),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p"),
    ],
)
def test_bad_options(model: Transformer, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(model, torch.tensor([3, 1, 4, 1, 5]), **options)
