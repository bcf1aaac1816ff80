"""The table of architectures: which are served, which are rejected with a reason, and that nothing hangs."""

from __future__ import annotations

import os
import sys
import time

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks processes")

from benchmarks.architectures import FORMATS, Outcome, isolated, page, try_architecture, try_format  # noqa: E402


@pytest.mark.parametrize("name", ["llama", "gemma2", "hunyuan_v1_moe", "gpt2"])
def test_a_supported_architecture_is_in_the_table_of_served_ones(name: str) -> None:
    outcome = isolated(try_architecture, name)

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
def test_an_architecture_that_is_not_supported_is_rejected_with_reason_and_advice(
    name: str, why: str
) -> None:
    outcome = isolated(try_architecture, name)

    assert outcome.result == "rejected", outcome
    assert why in outcome.detail
    assert "serve it with transformers or vLLM, or " in outcome.detail


@pytest.mark.parametrize("name", ["safetensors, several files with an index", "GPTQ (gptq)"])
def test_a_format_is_tested_like_an_architecture(name: str) -> None:
    outcome = isolated(try_format, name)

    assert outcome.result == ("rejected" if "GPTQ" in name else "exact"), outcome


def hang(name: str) -> Outcome:
    time.sleep(600)
    raise AssertionError(name)


def crash(name: str) -> Outcome:
    os._exit(7)


def test_an_architecture_that_hangs_or_crashes_is_reported_as_not_tested() -> None:
    assert isolated(hang, "x", 0.2) == Outcome("x", "", "not tested", "timed out after 0 s")
    assert isolated(crash, "x") == Outcome("x", "", "not tested", "its process ended with exit code 7")


def test_the_page_contains_each_outcome_in_its_table() -> None:
    text = page(
        [
            Outcome("llama", "LlamaForCausalLM", "exact", "kernels"),
            Outcome(
                "falcon", "FalconForCausalLM", "rejected", "it cannot; serve it with transformers or vLLM"
            ),
            Outcome("git", "GitForCausalLM", "not tested", "cannot be made small"),
        ],
        [Outcome("GPTQ (gptq)", "", "rejected", "is already | quantised")],
    )

    assert "| `llama` | LlamaForCausalLM | exact | kernels |" in text
    assert "| `falcon` | FalconForCausalLM | it cannot |" in text
    assert "## Not tested: 1 architectures" in text
    assert r"| GPTQ (gptq) | rejected | is already \| quantised |" in text
    assert len(FORMATS) >= 10
