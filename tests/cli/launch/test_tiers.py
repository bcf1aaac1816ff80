"""What `--tier` accepts: a model of our engine, one on vLLM, or one of another service."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.cli.launch import tiers
from headrace.cli.launch.tiers import BadSpec, TierSpec, parse_tier, parse_tiers, require_one_provider


def test_a_tier_is_a_name_and_a_model() -> None:
    assert parse_tier("small=org/model") == TierSpec("small", "org/model")
    assert parse_tier(" x-1 = /a=b/m.gguf ") == TierSpec("x-1", "/a=b/m.gguf")
    assert parse_tier("small", fake=True) == TierSpec("small", "")


def test_a_tier_on_vllm_has_its_prefix() -> None:
    assert parse_tier("m=vllm:Qwen/Qwen3-1.7B") == TierSpec("m", "Qwen/Qwen3-1.7B", "vllm")
    assert parse_tier("m=vllm:", fake=True).engine == "vllm"


@pytest.mark.parametrize(
    ("text", "model", "url"),
    [
        ("l=gpt-5@https://api.openai.com/v1", "gpt-5", "https://api.openai.com/v1"),
        ("l=llama3:8b@http://127.0.0.1:11434/v1/", "llama3:8b", "http://127.0.0.1:11434/v1"),
        ("l=org/m@http://[::1]:8000/v1", "org/m", "http://[::1]:8000/v1"),
        ("l=m@http://a/v1, http://b/v1/", "m", "http://a/v1,http://b/v1"),
        ("l=user@m@https://a/v1", "user@m", "https://a/v1"),
    ],
)
def test_a_tier_at_a_url_is_an_upstream(text: str, model: str, url: str) -> None:
    tier = parse_tier(text)

    assert tier == TierSpec("l", model, "upstream", url)
    assert not tier.computes
    assert parse_tier(text, fake=True) == tier, "it needs no engine that --fake could replace"


@pytest.mark.parametrize("text", ["", "small", "=model", "Big=model", "a b=model", "a,b=model", "-a=model"])
def test_an_invalid_tier_is_answered_with_the_valid_form(text: str) -> None:
    with pytest.raises(BadSpec, match="--tier"):
        parse_tier(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a=", "has no model; write NAME=MODEL, .* NAME=vllm:MODEL .* NAME=MODEL@URL"),
        ("a=vllm:", "has no model"),
        ("a=@https://api.example/v1", "write a=MODEL@URL"),
        ("a=vllm:m@http://b/v1", "on vLLM or at a URL"),
        ("a=gpt-5@api.openai.com/v1", "begins with http:// or https://"),
        ("a=m@127.0.0.1:8000", "begins with http:// or https://"),
        ("a=m@http://", "is not a URL such as"),
        ("a=m@http://host:port/v1", "is not a URL such as"),
        ("a=m@http://b/v1,c/v1", "'c/v1' is not a URL such as"),
        ("a=m@https://b/v1?key=1", "is not a base URL"),
    ],
)
def test_what_is_wrong_with_a_tier_is_named(text: str, said: str) -> None:
    with pytest.raises(BadSpec, match=said):
        parse_tier(text)


def test_a_key_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(BadSpec, match="HEADRACE_API_KEY_FILE") as refused:
        parse_tier("a=m@https://user:sk-secret@b/v1")

    assert "sk-secret" not in str(refused.value)


def test_a_file_with_an_at_sign_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine@home").mkdir()

    assert parse_tier("a=mine@home") == TierSpec("a", "mine@home")


def test_the_default_tiers_and_duplicate_names() -> None:
    assert parse_tiers([]) == tiers.DEFAULT_TIERS
    with pytest.raises(BadSpec, match="a more than once"):
        parse_tiers(["a=x", "b=y", "a=z"])


def test_one_key_is_not_sent_to_two_providers() -> None:
    own = parse_tiers(["a=m@http://a/v1,http://a/v2", "b=vllm:m", "c=m"])
    two = parse_tiers(["a=m@http://a/v1", "b=m@http://b/v1"])

    require_one_provider(own, {"HEADRACE_API_KEY_FILE": "key"})
    require_one_provider(two, {})
    with pytest.raises(BadSpec, match=r"sent to a and b; .*headrace\.upstream"):
        require_one_provider(two, {"HEADRACE_API_KEY_FILE": "key"})


def test_engine_and_model_are_described() -> None:
    described = {text: parse_tier(f"a={text}").described() for text in ("m", "vllm:m", "m@http://b/v1")}

    assert described == {"m": "m", "vllm:m": "m on vLLM", "m@http://b/v1": "m at http://b/v1"}
    assert parse_tier("a=vllm:m").described(fake=True) == "echo"
