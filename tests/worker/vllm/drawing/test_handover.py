from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.runner import SamplingParams, SequenceSpec
from headrace.worker.vllm.drawing.handover import packed, unpacked

PARAMS = st.builds(
    SamplingParams,
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.integers(1, 1000),
    min_tokens=st.integers(0, 1000),
    temperature=st.floats(0, 10),
    top_k=st.integers(0, 2**32 - 1),
    presence_penalty=st.floats(-2, 2),
    ignore_eos=st.booleans(),
    logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-100, 100), max_size=3),
    stop_ids=st.frozensets(st.integers(0, 2**32 - 1), max_size=3),
    grammar=st.text(max_size=5),
)


@given(params=PARAMS, prompt=st.integers(1, 5))
def test_parameters_cross_to_another_process_unchanged(params: SamplingParams, prompt: int) -> None:
    """As JSON here: vLLM's encoding knows no other kinds of values."""
    sent: dict[str, Any] = json.loads(json.dumps(packed(SequenceSpec("key", [1] * 9, prompt, params))))

    assert unpacked(sent) == (params, prompt)


def test_sequences_that_vllm_draws_bring_nothing() -> None:
    assert unpacked(None) is None
    assert unpacked({"other": 1}) is None
