"""Prompts come from the package, from files and from words."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cli.bench.prompts import ListedPrompts, Prompt, built_in, read_prompts
from headrace.cli.bench.synthetic import LONG, SHORT, Count, SyntheticPrompts, count
from headrace.cli.files.rows import BadRow


def user(text: str, max_tokens: int = 0, *, exact: bool = False) -> Prompt:
    return Prompt((("user", text),), max_tokens, exact)


def test_the_built_in_prompts_differ_and_their_order_depends_on_the_seed() -> None:
    first, again, other = built_in(1), built_in(1), built_in(2)

    assert len(set(first)) == 64
    assert first == again
    assert first != other
    assert set(first) == set(other)
    assert any(len(prompt.turns) > 3 for prompt in first), "there are conversations"
    assert max(len(prompt.turns[-1][1]) for prompt in first) > 900, "there are long ones"


def test_a_file_has_prompts_conversations_and_limits(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a"}\n\n'
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}], '
        '"max_tokens": 5}\n'
        '{"prompt": "c", "output_len": 7, "max_tokens": 9}\n'
    )

    assert read_prompts(str(path)) == [
        user("a"),
        Prompt((("system", "s"), ("user", "b")), 5),
        user("c", 7, exact=True),
    ]


def test_a_document_of_requests_is_a_workload(tmp_path: Path) -> None:
    path = tmp_path / "workload.json"
    path.write_text('{"meta": {}, "requests": [{"id": 0, "prompt": "a", "n_out": 3, "prompt_ids": [1]}]}')

    assert read_prompts(str(path)) == [user("a", 3, exact=True)]


def test_standard_input_is_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "a"}\n'))

    assert read_prompts("-") == [user("a")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "has no prompts"),
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.jsonl", '{"text": "a"}', "needs field 'prompt'"),
        ("a.jsonl", '{"prompt": "  "}', "row 1: the prompt is empty"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": "a", "max_tokens": 0}',
            "row 2: field 'max_tokens' must be an",
        ),
        ("a.jsonl", '{"prompt": "a", "output_len": "3"}', "field 'output_len' must be an integer"),
        ("a.jsonl", '{"prompt": "a", "n_out": true}', "field 'n_out' must be an integer"),
        ("a.json", "[]", "a list 'requests' of objects"),
        ("a.json", '{"requests": [1]}', "a list 'requests' of objects"),
        ("a.json", '{"requests": []}', "has no prompts"),
        ("a.json", "{", "not JSON"),
        ("a.json", None, "cannot be read"),
        ("a.jsonl", None, "cannot be read"),
    ],
)
def test_a_bad_file_is_explained(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)

    with pytest.raises(BadRow, match=message):
        read_prompts(str(path))


def test_listed_prompts_start_again_and_have_the_limits_of_the_run() -> None:
    listed = [user("a"), user("b", 5), user("c", 7, exact=True)]

    prompts = ListedPrompts(listed, max_tokens=20)
    assert [prompts(number) for number in range(4)] == [user("a", 20), user("b", 5), listed[2], user("a", 20)]
    assert prompts(-1) == listed[2], "what precedes the measurement uses the last ones"
    assert ListedPrompts(listed, 20, ignore_eos=True)(1) == user("b", 5, exact=True)
    assert ListedPrompts(listed, 20, output_len=3)(2) == user("c", 3, exact=True)


@given(
    template=st.integers(0, 60),
    per_word=st.floats(1, 6),
    tokens=st.integers(80, 4000),
)
def test_words_are_counted_as_the_server_does(template: int, per_word: float, tokens: int) -> None:
    """Two counts determine template and tokens per word, so that a prompt has the wanted length."""

    def server(words: int) -> int:
        return template + round(words * per_word)

    counted = count(server(SHORT), server(LONG))

    assert server(counted.words(tokens)) == pytest.approx(tokens, abs=per_word + 2, rel=0.01)


def test_nonsense_counts_give_a_prompt_anyway() -> None:
    assert count(50, 10).words(100) >= 1
    assert Count(template=500).words(100) == 1


def test_synthetic_prompts_differ_after_a_common_prefix() -> None:
    prompts = SyntheticPrompts(input_len=30, max_tokens=5, prefix_len=20, seed=1)
    texts = [prompts(number).turns[0][1].split() for number in (-1, 0, 1)]

    assert {len(text) for text in texts} == {50}
    assert texts[0][:20] == texts[1][:20] == texts[2][:20]
    assert len({tuple(text[20:]) for text in texts}) == 3
    assert prompts(1) == prompts(1)
    assert (
        prompts(1).turns[0][1].split()
        != SyntheticPrompts(30, 5, prefix_len=20, seed=2)(1).turns[0][1].split()
    )
    assert prompts(0).max_tokens == 5
    assert not prompts(0).exact


def test_synthetic_lengths_vary_by_the_ratio() -> None:
    prompts = SyntheticPrompts(input_len=100, max_tokens=1, output_len=50, range_ratio=0.5, seed=3)
    made = [prompts(number) for number in range(300)]
    inputs = {len(prompt.turns[0][1].split()) for prompt in made}
    outputs = {prompt.max_tokens for prompt in made}

    assert all(prompt.exact for prompt in made)
    assert min(inputs) in range(50, 60)
    assert max(inputs) in range(140, 151)
    assert min(outputs) in range(25, 30)
    assert max(outputs) in range(70, 76)
