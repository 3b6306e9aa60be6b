"""What lm-eval is answered, against the model asked directly, one request at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

from moepp.model.generate import generate
from moepp.study.eval import model as eval_model
from moepp.study.eval.model import MoEppLM
from moepp.study.figures.routing_stats import DocumentPassages, RoutingCounts
from moepp.training.checkpoint import load
from tests.conftest import SENTENCE, WORDS
from tests.study.eval.conftest import CONTEXT

PAIRS = [
    ("the router sends every", " token"),
    ("the router sends", " every token"),  # the same, but for where the continuation begins
    ("the router sends every", " expert to"),
    ("", "some of them do"),
    ("while others ", "copy"),
    (" ".join(WORDS * 3), " do nothing"),  # longer than the context
    (SENTENCE[:40], ""),
    ("," * (CONTEXT - 1), "."),  # a token each, and one before them: just as long as can be read
    ("," * CONTEXT, "."),
]


def asked(kind: str, arguments: list[tuple[Any, ...]], task: str = "task") -> list[Instance]:
    return [Instance(kind, {}, args, 0, metadata=(task, i, 1)) for i, args in enumerate(arguments)]  # type: ignore


def model_of(checkpoint: Path, n_documents: int) -> MoEppLM:
    loaded = load(checkpoint)
    config = loaded.model.config
    passages = DocumentPassages({"task": n_documents})
    return MoEppLM(
        loaded, RoutingCounts(loaded.model.moe_config, config.n_layers, [""] * config.vocab_size, passages)
    )


def direct(lm: MoEppLM, ids: list[int]) -> tuple[torch.Tensor, np.ndarray]:
    """Log-probabilities after each token, and how often each expert was chosen (L, E)."""
    with torch.no_grad():
        output = lm.model(torch.tensor(ids)[None])
    E = lm.model.moe_config.n_experts
    chosen = [np.bincount(routing.experts.flatten().numpy(), minlength=E) for routing in output.routings]
    return output.logits[0].log_softmax(-1), np.array(chosen)


@pytest.mark.parametrize("batch_tokens", [1, 8192])
def test_log_likelihoods_and_experts(checkpoint: Path, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_model, "BATCH_TOKENS", batch_tokens)
    lm = model_of(checkpoint, len(PAIRS))
    found = lm.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    tokenizer, counted, n = lm.tokenizer, 0, 0
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found, strict=True):
        before = tokenizer.encode(context.rstrip()).ids
        ids = [lm.end, *tokenizer.encode(context + continuation).ids]
        n_scored = len(ids) - 1 - len(before)
        read, scored = ids[:-1][-CONTEXT:], ids[len(ids) - n_scored :]
        logprobs_SV, chosen_LE = direct(lm, read)
        logprobs = logprobs_SV[len(read) - n_scored :]
        assert logprob == pytest.approx(float(logprobs[range(n_scored), scored].sum()), abs=1e-4)
        assert greedy == (logprobs.argmax(-1).tolist() == scored)
        counted, n = counted + chosen_LE, n + len(read)
    sums = lm.counts.sums(np.stack([np.sum(passages, 0) for passages in lm.counts.passages.sums.values()]))
    assert sums.n_D.tolist() == [n]
    np.testing.assert_array_equal(sums.chosen_DLE[0], counted)
    assert (lm.n_requests["task"], lm.n_cut["task"]) == (len(PAIRS), 2)


def test_what_two_requests_read_alike_is_computed_once_and_counted_twice(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = model_of(checkpoint, 3)
    shapes, hidden = [], lm.model.hidden
    monkeypatch.setattr(lm.model, "hidden", lambda tokens_BS: shapes.append(tokens_BS.shape) or hidden(tokens_BS))
    monkeypatch.setattr(eval_model, "BATCH_TOKENS", 1)
    pairs = [("some", ","), ("the router", "."), ("the router", ",")]
    lm.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    n = [1 + len(lm.tokenizer.encode(context).ids) for context, _ in pairs]
    assert shapes == [(1, n[1]), (1, n[0])]  # the longest first
    assert n[1] > n[0]
    assert [int(passage[0]) for passage in lm.counts.passages.sums["task"]] == n


def test_a_rolling_text_is_a_direct_sum(checkpoint: Path) -> None:
    lm = model_of(checkpoint, 2)
    short, long = SENTENCE[:60], " ".join(WORDS * 4)
    found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", [(short,), (long,)]), disable_tqdm=True)
    ids = lm.tokenizer.encode(short).ids
    logprobs, _ = direct(lm, [lm.end, *ids[:-1]])
    assert found[0] == pytest.approx(float(logprobs[range(len(ids)), ids].sum()), rel=1e-5)
    ids, total, at = lm.tokenizer.encode(long).ids, 0.0, 0
    while at < len(ids):  # windows side by side; the last reaches back as far as it can
        scored = ids[at : at + CONTEXT]
        read = [lm.end, *ids][: at + len(scored)][-CONTEXT:]
        total += float(direct(lm, read)[0][-len(scored) :][range(len(scored)), scored].sum())
        at += len(scored)
    assert len(ids) > 2 * CONTEXT
    assert found[1] == pytest.approx(total, rel=1e-5)
    assert lm.n_cut["task"] == 0  # nothing of it is lost


def test_answers_are_what_the_model_writes(checkpoint: Path) -> None:
    lm = model_of(checkpoint, 3)
    prompts = ["the router sends", SENTENCE[:50], " ".join(WORDS * 3)]
    until = {"until": [" t", "."], "max_gen_toks": 10}
    found = lm.generate_until(asked("generate_until", [(prompt, until) for prompt in prompts]), disable_tqdm=True)
    counted, n, early = 0, 0, 0
    for prompt, answer in zip(prompts, found, strict=True):
        ids = [lm.end, *lm.tokenizer.encode(prompt).ids][-(CONTEXT - 10) :]
        written = generate(lm.model, torch.tensor(ids), 10, temperature=0, stop=lm.end)[len(ids) :].tolist()
        whole = lm.tokenizer.decode(written)
        assert answer == whole.split(" t")[0].split(".")[0]
        texts = [lm.tokenizer.decode(written[:k]) for k in range(1, len(written) + 1)]
        stopped = next((k for k, text in enumerate(texts, 1) if " t" in text or "." in text), len(written))
        read = ids + written[: stopped - 1]
        counted, n, early = counted + direct(lm, read)[1], n + len(read), early + (stopped < 10)
    assert early
    sums = lm.counts.sums(np.sum(lm.counts.passages.sums["task"], 0)[None])
    assert sums.n_D.tolist() == [n]
    np.testing.assert_array_equal(sums.chosen_DLE[0], counted)
    assert (lm.n_requests["task"], lm.n_cut["task"]) == (3, 1)


def test_an_answer_takes_half_of_the_context_at_most(checkpoint: Path) -> None:
    lm = model_of(checkpoint, 1)
    (answer,) = lm.generate_until(asked("generate_until", [("the router", {"until": []})]), disable_tqdm=True)
    assert 0 < len(lm.tokenizer.encode(answer).ids) <= CONTEXT // 2
