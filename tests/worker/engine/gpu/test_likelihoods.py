"""The device finds what the CPU finds, bit by bit, and adds it to steps that are replayed as graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from headrace.worker.engine.gpu import likelihoods as device_likelihoods
from headrace.worker.engine.gpu.engine import GpuEngine
from headrace.worker.engine.gpu.kernels.likelihoods import MOST, report_likelihoods
from headrace.worker.engine.interface import Fault, PromptLogprobs, Row, Token
from headrace.worker.engine.likelihoods import likelihoods
from tests.worker.engine.gpu.device import DEVICE, DTYPES
from tests.worker.engine.gpu.test_engine import Graphs, device_engine
from tests.worker.engine.rows import random_logits
from tests.worker.engine.test_torch_engine import GREEDY, Network, prompt_of

__all__ = ["device_engine"]  # a fixture

PARAMS = replace(GREEDY, logprobs=True, top_logprobs=20, prompt_logprobs=3, logit_bias={9: 100.0})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocabulary", "block"), [(13, 16), (131, 64)])
def test_the_device_finds_the_same_bits(vocabulary: int, block: int, dtype: torch.dtype) -> None:
    """With ties inside and across blocks, impossible tokens, and logits that are not numbers."""
    logits = random_logits(5, vocabulary).to(dtype)
    logits[1] = (logits[1] * 2).round()
    logits[2, 3] = float("nan")
    logits[3, 5:] = float("-inf")
    which, ids = [1, 0, 2, 3, 4, 1], [4, 0, 0, 7, 12, 9]

    report = report_likelihoods(
        logits.to(DEVICE),
        torch.tensor(which, dtype=torch.int32, device=DEVICE),
        torch.tensor(ids, dtype=torch.int32, device=DEVICE),
        MOST.value,
        block=block,
    )

    table = report.cpu().numpy()
    expected = likelihoods(logits[which], ids, MOST.value)
    finite, most = expected.finite, min(MOST.value, vocabulary)
    assert (table[:, 0] != 0).tolist() == finite.tolist() == [True, True, False, True, True, True]
    bits = table[finite, 1:]
    np.testing.assert_array_equal(bits[:, 0], expected.logprobs[finite].view(np.int32))
    np.testing.assert_array_equal(bits[:, 1 : 1 + most], expected.top_ids[finite])
    logprobs = expected.top_logprobs[finite].view(np.int32)
    np.testing.assert_array_equal(bits[:, 1 + MOST.value :][:, :most], logprobs)


@pytest.mark.parametrize(("architecture", "fused"), [("llama", True), ("gemma2", False)])
def test_a_replayed_step_reports_what_its_rows_ask_for(
    architecture: str,
    fused: bool,
    device_engine: Callable[..., GpuEngine],
    tiny_network: Network,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_likelihoods, "SCORED_TOKENS", 4)
    graphs = Graphs()
    engine = device_engine(architecture, fused=fused, graphs=graphs)
    ids = prompt_of(7)
    with torch.inference_mode():
        logits = tiny_network(architecture)(torch.tensor([ids])).logits[0]
    reference = torch.log_softmax(logits.float().cpu(), -1)
    row = Row(range(4), 0, 6, ids, 7, False, PARAMS, scored=range(1, 7))
    plain = Row(range(4, 8), 0, 2, ids, 2, True, GREEDY)

    launched = engine.launch([plain, row])
    following = engine.launch([replace(row, start=6, stop=7, sample=True, scored=range(0))])
    untouched, part = launched.wait()
    (token,) = following.wait()

    assert graphs.replayed == 2 * 2, "each step has two graphs"
    assert isinstance(untouched, Token)
    assert (untouched.top, untouched.prompt) == (None, None)
    assert isinstance(part, PromptLogprobs)
    expected = reference[:6].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    np.testing.assert_allclose(part.logprobs, expected, atol=1e-4)
    np.testing.assert_allclose([top.logprobs for top in part.top], reference[:6].topk(3).values, atol=1e-4)
    assert part.offset == 1
    assert isinstance(token, Token)
    assert token.top is not None
    assert (token.id, len(token.top.ids), token.prompt) == (9, 20, None)
    np.testing.assert_allclose(token.top.logprobs, reference[6].topk(20).values, atol=1e-4)


def test_the_own_logprob_has_the_bits_of_its_entry_and_scores_those_of_the_last_logits(
    device_engine: Callable[..., GpuEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_likelihoods, "SCORED_TOKENS", 4)
    engine = device_engine(graphs=Graphs())
    ids, params = prompt_of(3), replace(PARAMS, logit_bias={})

    (token,) = engine.step([Row(range(4), 0, 3, ids, 5, True, params)])

    assert isinstance(token, Token)
    assert token.top is not None
    assert (token.top.ids[0], token.top.logprobs[0]) == (token.id, token.logprob)
    asked = Row(range(4), 0, 3, [*ids, token.id, 7], 5, False, params, scored=range(3, 4))
    (part,) = engine.step([asked])
    assert isinstance(part, PromptLogprobs)
    assert (part.offset, part.logprobs) == (3, [token.logprob])
    assert part.top[0].logprobs == token.top.logprobs[:3]


def test_scores_that_are_not_finite_fail_their_row_alone(
    device_engine: Callable[..., GpuEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_likelihoods, "SCORED_TOKENS", 4)
    engine = device_engine()
    forward: Any = engine._forward
    forward._weights.embedding.data[99] = float("nan")
    params = replace(PARAMS, top_logprobs=0)

    results = engine.step(
        [
            Row(range(4), 0, 2, [99, 5, 6], 3, False, params, scored=range(1, 3)),
            Row(range(4, 8), 0, 2, [4, 5, 6], 3, False, params, scored=range(1, 3)),
        ]
    )

    assert isinstance(results[0], Fault)
    assert isinstance(results[1], PromptLogprobs)
