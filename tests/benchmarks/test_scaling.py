"""The scaling benchmark on the echo engine, and the shapes from which limits are computed."""

from __future__ import annotations

from types import SimpleNamespace

from benchmarks.roofline import shapes
from benchmarks.scaling import conversations, stall
from headrace.worker.engine.echo import EchoEngine


def test_all_weights_of_a_model_are_counted() -> None:
    config = SimpleNamespace(
        **{"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
        **{"intermediate_size": 1536, "num_hidden_layers": 30},
    )

    found = shapes(config)

    assert found.weights == 134_479_872, "SmolLM2-135M's 134,515,008 parameters, without its norms"
    assert found.kv_values == 30 * 2 * 3 * 64


def test_conversations_complete_and_a_short_prompt_is_answered_during_a_long_prefill() -> None:
    engine = EchoEngine()

    measured = conversations(engine, prefix_cache=False, chats=2, turns=2, system=50)
    late = stall(engine, long=1000, tries=1)

    assert 0 < measured["ttft_p50_ms"] < measured["total_s"] * 1e3
    assert late.keys() == {"alone_ms", "beside_ms", "long_ms"}
