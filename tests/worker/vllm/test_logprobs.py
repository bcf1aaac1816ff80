from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.worker.runner import PromptLogprobs, TopTokens
from headrace.worker.vllm.logprobs import LEAST, answer_logprobs, prompt_logprobs


@dataclass
class Flat:
    """vLLM's FlatLogprobs: of each place, the token itself and then the most likely ones."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def place(self, *tokens: tuple[int, float]) -> Flat:
        self.start_indices.append(len(self.token_ids))
        self.token_ids += [id for id, _ in tokens]
        self.logprobs += [logprob for _, logprob in tokens]
        self.end_indices.append(len(self.token_ids))
        return self

    def __len__(self) -> int:
        return len(self.start_indices)


def tokens(places: Sequence[TopTokens]) -> list[list[tuple[int, float]]]:
    return [list(zip(place.ids, place.logprobs, strict=True)) for place in places]


def test_each_token_has_its_own_and_the_most_likely_ones() -> None:
    # vLLM reports as many as any sequence of the batch asks for.
    found = Flat().place((7, -2.5), (3, -0.5), (7, -2.5), (1, -4.0)).place((9, -8.0), (3, -0.1), (4, -3.0))

    own, top = answer_logprobs(found, 2, top=2)

    assert own == [-2.5, -8.0]
    assert tokens(top) == [[(3, -0.5), (7, -2.5)], [(3, -0.1), (4, -3.0)]]


def test_a_token_that_is_not_delivered_has_none() -> None:
    found = Flat().place((7, -2.5), (3, -0.5)).place((2, -0.1), (2, -0.1))

    assert answer_logprobs(found, 1, top=0) == ([-2.5], [])


def test_without_a_request_there_are_none() -> None:
    assert answer_logprobs(None, 5, top=3) == ([], [])
    assert prompt_logprobs(None, top=3) is None
    assert prompt_logprobs(Flat(), top=3) is None


def test_an_impossible_token_has_a_number_that_json_can_represent() -> None:
    assert answer_logprobs(Flat().place((7, float("-inf"))), 1, top=0) == ([LEAST], [])


def test_the_first_token_of_a_prompt_has_no_log_probability() -> None:
    found = Flat().place().place((5, -1.0), (6, -0.5)).place((8, -2.0), (8, -2.0))

    part = prompt_logprobs(found, top=1)

    assert part == PromptLogprobs(1, [-1.0, -2.0], [TopTokens([6], [-0.5]), TopTokens([8], [-2.0])])
