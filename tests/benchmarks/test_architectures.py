"""The table of architectures: who is served, who is refused in words, and that nothing hangs."""

from __future__ import annotations

import os
import sys
import time

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks processes")

from benchmarks.architectures import FORMATS, Outcome, apart, page, try_architecture, try_format  # noqa: E402


@pytest.mark.parametrize("name", ["llama", "gemma2", "hunyuan_v1_moe", "gpt2"])
def test_an_architecture_that_is_served_is_in_the_table_as_such(name: str) -> None:
    outcome = apart(try_architecture, name)

    assert outcome.result in ("exact", "served"), outcome
    assert outcome.detail == ("kernels" if name == "llama" else "transformers' layers")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("falcon", "its own attention code"),
        ("bloom", "its own attention code"),
        ("gptj", "its own attention code"),
        ("mpt", "its own attention code"),
        ("stablelm", "its own attention code"),
        ("mamba", "recurrent"),
        ("gpt_oss", "attention sinks"),
        ("llama4_text", "chunked_attention"),
    ],
)
def test_an_architecture_that_is_not_served_is_refused_in_words_and_with_what_to_do(
    name: str, why: str
) -> None:
    outcome = apart(try_architecture, name)

    assert outcome.result == "refused", outcome
    assert why in outcome.detail
    assert "serve it with transformers or vLLM, or " in outcome.detail


@pytest.mark.parametrize("name", ["safetensors, several files with an index", "GPTQ (gptq)"])
def test_a_format_is_tried_like_an_architecture(name: str) -> None:
    outcome = apart(try_format, name)

    assert outcome.result == ("refused" if "GPTQ" in name else "exact"), outcome


def hang(name: str) -> Outcome:
    time.sleep(600)
    raise AssertionError(name)


def crash(name: str) -> Outcome:
    os._exit(7)


def test_what_hangs_or_crashes_is_not_tried_and_ends() -> None:
    assert apart(hang, "x", 0.2) == Outcome("x", "", "not tried", "not done in 0 s")
    assert apart(crash, "x") == Outcome("x", "", "not tried", "its process ended with exit code 7")


def test_the_page_has_each_outcome_in_its_table() -> None:
    text = page(
        [
            Outcome("llama", "LlamaForCausalLM", "exact", "kernels"),
            Outcome(
                "falcon", "FalconForCausalLM", "refused", "it cannot; serve it with transformers or vLLM"
            ),
            Outcome("git", "GitForCausalLM", "not tried", "cannot be built small"),
        ],
        [Outcome("GPTQ (gptq)", "", "refused", "is quantised | already")],
    )

    assert "| `llama` | LlamaForCausalLM | exact | kernels |" in text
    assert "| `falcon` | FalconForCausalLM | it cannot |" in text
    assert "## Not tried: 1 architectures" in text
    assert r"| GPTQ (gptq) | refused | is quantised \| already |" in text
    assert len(FORMATS) >= 10
