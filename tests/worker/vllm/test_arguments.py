"""A worker's settings become vLLM's arguments of the same meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.worker.settings import Settings
from headrace.worker.vllm.arguments import arguments, environment, with_file

FOLDER = Path("/models/m")


def given(**settings: Any) -> list[str]:
    return arguments(Settings(model="m", engine="vllm", **settings), FOLDER)


def test_settings_that_are_not_set_leave_the_choice_to_vllm() -> None:
    assert given() == [
        *("--model", "/models/m", "--max-model-len", "auto", "--load-format", "safetensors"),
        "--enable-prefix-caching",
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "float16"}, ["--dtype", "float16"]),
        ({"context_length": 4096}, ["--max-model-len", "4096"]),
        ({"max_running": 64}, ["--max-num-seqs", "64"]),
        ({"step_tokens": 512}, ["--max-num-batched-tokens", "512"]),
        ({"kv_memory": 1.5}, ["--kv-cache-memory-bytes", str(3 << 29)]),
        ({"gpu_memory_share": 0.4}, ["--gpu-memory-utilization", "0.4"]),
        ({"device": "cuda:2"}, ["--device-ids", "2"]),
        ({"prefix_cache": False}, ["--no-enable-prefix-caching"]),
    ],
)
def test_a_setting_has_an_argument(settings: dict[str, Any], words: list[str]) -> None:
    found = given(**settings)

    assert " ".join(words) in " ".join(found)


def test_pickles_are_not_loaded_unless_they_are_allowed() -> None:
    assert "--load-format" not in given(allow_pickle=True)


def test_what_the_user_gives_to_vllm_comes_last() -> None:
    found = given(dtype="float16", engine_args="--dtype bfloat16 --config 'my file.yaml'")

    assert found[-4:] == ["--dtype", "bfloat16", "--config", "my file.yaml"]


@pytest.mark.parametrize("config", ["--config e.yaml", "--config=e.yaml"])
def test_the_arguments_of_a_file_come_after_those_of_settings(config: str) -> None:
    """Of two equal arguments, the later one counts."""
    found = with_file(
        given(dtype="float16", engine_args=f"{config} --enforce-eager"),
        {"e.yaml": ["--dtype", "bfloat16", "--max-model-len", "8192"]}.__getitem__,
    )

    assert found[-5:] == ["--dtype", "bfloat16", "--max-model-len", "8192", "--enforce-eager"]
    assert "--config" not in found


@pytest.mark.parametrize("name", ["--model", "--tokenizer", "--scheduling_policy", "--logprobs-mode"])
def test_a_file_does_not_set_what_the_worker_sets_itself(name: str) -> None:
    with pytest.raises(ValueError, match=f"e.yaml has {name}"):
        with_file(["--config", "e.yaml"], lambda file: [name, "other"])


@pytest.mark.parametrize("content", [None, ["--enforce-eager"]], ids=["empty", "list"])
def test_a_file_without_names_is_refused(content: Any) -> None:
    """vLLM's reader takes it for a mapping."""
    with pytest.raises(ValueError, match=r"e\.yaml has no arguments"):
        with_file(["--config", "e.yaml"], lambda file: [*content.items()])


@pytest.mark.parametrize("words", [["--config"], ["--config", "a.yaml", "--config", "b.yaml"]])
def test_there_is_one_file_at_most(words: list[str]) -> None:
    with pytest.raises(ValueError, match="--config names one file"):
        with_file(words, lambda file: [])


def test_nothing_is_sent_to_the_makers_of_vllm_unless_the_user_says_so() -> None:
    set_here = environment({}, debug=False)

    assert set_here["VLLM_NO_USAGE_STATS"] == set_here["DO_NOT_TRACK"] == set_here["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in environment({"HF_HUB_OFFLINE": "0"}, debug=False)


def test_processes_of_vllm_are_started_anew_even_if_the_user_asks_for_forks() -> None:
    """A fork would inherit the threads of gRPC and its ports."""
    assert environment({"VLLM_WORKER_MULTIPROC_METHOD": "fork"}, debug=False) == environment({}, debug=False)


def test_vllms_own_setup_of_logs_is_kept() -> None:
    assert "VLLM_LOGGING_CONFIG_PATH" in environment({}, debug=False)
    assert "VLLM_LOGGING_CONFIG_PATH" not in environment({"VLLM_CONFIGURE_LOGGING": "0"}, debug=False)
    assert environment({}, debug=True)["VLLM_LOGGING_LEVEL"] == "INFO"
