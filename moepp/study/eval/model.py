"""Our model as lm-eval asks it: log-likelihoods, rolling ones, and generation.

On an exported folder, lm-eval's own HFLM gives the same: what begins a text stands before every context. Before a
rolling text it stands once; HFLM, whose tokenizer puts it there as well, has it twice unless add_bos_token=False.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from moepp.model import InputError
from moepp.model.generate import generate
from moepp.study.figures.parts_of_speech import NONE
from moepp.study.figures.routing_stats import RoutingCounts
from moepp.training.checkpoint import Loaded

BATCH_TOKENS = 8192
MOST_NEW_TOKENS = 256  # where a task does not say, as HFLM has it


class MoEppLM(TemplateLM):
    """Answers requests, and counts the experts of the tokens that it reads for them.

    Args:
        loaded: with a tokenizer.
        counts: where tokens are counted, once for each request that needs them. Domains are (task, document).

    Attributes:
        n_requests, n_cut: by task: requests, and those that were longer than the context and lost their beginning.

    Raises:
        InputError: the tokenizer has no token that ends a text.
    """

    def __init__(self, loaded: Loaded, counts: RoutingCounts) -> None:
        super().__init__()
        assert loaded.tokenizer is not None
        if loaded.end_of_text is None:
            raise InputError(
                "the checkpoint's tokenizer has no token that ends a text; import it with one that has"
            )
        self.loaded, self.tokenizer = loaded, loaded.tokenizer
        self.end, self.counts = loaded.end_of_text, counts
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = loaded.model.to(self._device)
        self.context = loaded.model.config.context_length
        self.n_requests: Counter[str] = Counter()
        self.n_cut: Counter[str] = Counter()

    @property
    def eot_token_id(self) -> int:
        return self.end

    @property
    def prefix_token_id(self) -> int:
        """What begins a text."""
        return (self.tok_encode("") or [self.end])[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is False:
            return self.tokenizer.encode(string, add_special_tokens=False).ids
        return self.loaded.encode(string)

    def encode_pair(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        if context:
            pair = self._encode_pair(context, continuation)
        else:
            pair = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
        return np.array(pair[0], np.int32), np.array(pair[1], np.int32)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation after its context, and whether it is what the model would have chosen."""
        pairs = [(request, *self.encode_pair(*request.args)) for request in requests]
        for request, context, continuation in pairs:
            self.n_requests[request.task_name] += 1
            self.n_cut[request.task_name] += len(context) + len(continuation) > self.context + 1
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: each token after as many before it as a window has."""
        windows: list[tuple[Any, np.ndarray, np.ndarray]] = []
        n_windows = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.context, context_len=1)
            before = len(windows)
            windows += [(request, *map(np.array, make_disjoint_window(pair))) for pair in pairs]
            n_windows.append(len(windows) - before)
        self.n_requests.update(request.task_name for request in requests)
        found = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        return [sum((next(found)[0] for _ in range(n)), 0.0) for n in n_windows]

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, np.ndarray, np.ndarray]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Of (request, context, continuation). What reads the same tokens is computed once."""
        texts: list[np.ndarray] = [np.concatenate(pair)[-self.context - 1 : -1] for _, *pair in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        progress = tqdm(total=len(requests), desc="reading", disable=disable_tqdm)
        for same, hidden_SD, experts_SLK in self.read(texts):
            n_scored = min(len(hidden_SD), max(len(requests[i][2]) for i in same))
            logprobs_SV = self.model.head(hidden_SD[len(hidden_SD) - n_scored :]).float().log_softmax(-1)
            for i in same:
                request, _, continuation = requests[i]
                self.count(request, texts[i], experts_SLK)
                target = torch.from_numpy(continuation[-n_scored:]).to(self._device, torch.int64)
                logprobs = logprobs_SV[n_scored - len(target) :]
                logprob = float(logprobs.gather(1, target[:, None]).sum())
                found[i] = logprob, bool((logprobs.argmax(-1) == target).all())
            progress.update(len(same))
        progress.close()
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the task's `until`.

        One at a time, with a cache. An answer may take at most half of the model's context.
        """
        answers, wholes = [], []
        for i, request in enumerate(tqdm(requests, desc="generating", disable=disable_tqdm)):
            context, given = request.args
            options: Any = normalize_gen_kwargs(given, MOST_NEW_TOKENS)
            until = handle_stop_sequences(options["until"], eos=None)
            most_new = min(options["max_gen_toks"], self.context // 2)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            self.n_requests[request.task_name] += 1
            self.n_cut[request.task_name] += len(ids) > self.context - most_new

            def stop(new_N: Tensor, until: list[str] = until) -> bool:
                text = self.tokenizer.decode(new_N.tolist())
                return int(new_N[-1]) == self.end or any(term in text for term in until if term)

            prompt_S = torch.tensor(ids[-(self.context - most_new) :], device=self._device)
            temperature = options["temperature"] if options["do_sample"] else 0.0
            whole_S = generate(
                self.model, prompt_S, most_new, temperature, options.get("top_p", 1.0), stop=stop, seed=i
            )
            wholes.append(whole_S[:-1].cpu().numpy())  # what was read; the last token was not
            answer = self.tokenizer.decode(whole_S[len(prompt_S) :].tolist())
            answers.append(postprocess_generated_text(answer, until, None))
        for same, _, experts_SLK in self.read(wholes):
            for i in same:
                self.count(requests[i], wholes[i], experts_SLK)
        return answers

    @torch.inference_mode()
    def read(self, texts: list[np.ndarray]) -> Iterator[tuple[list[int], Tensor, np.ndarray]]:
        """Read texts (S,), equal ones once.

        In batches of like length, the longest first, so that too little memory shows at once.

        Yields:
            which texts these are, what the head receives (S, D), and the experts that tokens choose (S, L, K).
        """
        equal: dict[bytes, list[int]] = {}
        for i, tokens_S in enumerate(texts):
            equal.setdefault(tokens_S.astype(np.int32).tobytes(), []).append(i)
        left = sorted(equal.values(), key=lambda same: len(texts[same[0]]), reverse=True)
        while left:
            n = max(1, BATCH_TOKENS // max(1, len(texts[left[0][0]])))
            batch, left = left[:n], left[n:]
            # padding comes last, where no token can see it
            tokens_BS = pad_sequence([torch.from_numpy(texts[same[0]]).long() for same in batch], batch_first=True)
            hidden_BSD, routings = self.model.hidden(tokens_BS.to(self._device))
            experts_TLK = torch.stack([routing.experts for routing in routings], 1)
            experts_BSLK = experts_TLK.unflatten(0, tokens_BS.shape).cpu().numpy()
            for same, hidden_SD, experts_SLK in zip(batch, hidden_BSD, experts_BSLK, strict=True):
                S = len(texts[same[0]])
                yield same, hidden_SD[:S], experts_SLK[:S]

    def count(self, request: Any, tokens_S: np.ndarray, experts_SLK: np.ndarray) -> None:
        where = request.task_name, request.doc_id
        self.counts.add(where, tokens_S, np.full(len(tokens_S), NONE), experts_SLK)
