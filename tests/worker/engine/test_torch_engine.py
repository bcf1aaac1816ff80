from __future__ import annotations

import queue
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.worker.engine.interface import Fault, Row, SamplingParams, Token
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.engine.torch_engine import TorchEngine
from headrace.worker.runner import FinishReason, SequenceSpec, StepReport
from tests.harness import transformers_tokenizer
from tests.worker.engine.conftest import ARCHITECTURES, EOS, VOCABULARY

GREEDY = SamplingParams(seed=0, max_tokens=64, temperature=0, ignore_eos=True)
WARM = SamplingParams(seed=11, max_tokens=64, temperature=1.0, top_p=0.9, ignore_eos=True)

Network = Callable[[str], Any]
Engine = Callable[..., TorchEngine]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{seed} {length}").choices(range(3, VOCABULARY), k=length)


def generated(network: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Return the greedy answer of transformers' own `generate`, which does not stop at the end of turn."""
    ids = network.generate(
        torch.tensor([list(prompt)]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return ids[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def blocks_of(engine: TorchEngine, which: int) -> Sequence[int]:
    """Return a block table for a whole context, one of max_running, in descending order over the memory."""
    last, step = engine.model.kv_blocks - 1, engine.model.max_running
    return range(last - which, -1, -step)


def embedding_of(engine: TorchEngine) -> Any:
    """Return its network's token embeddings, to be poisoned."""
    forward: Any = engine._forward
    return forward._network.get_input_embeddings()


def answer(
    engine: TorchEngine,
    prompt: Sequence[int],
    count: int,
    *,
    params: SamplingParams = GREEDY,
    resume: Sequence[int] = (),
    which: int = 0,
) -> list[int]:
    """Answer one prompt alone, prefilled in one piece, until the answer has *count* ids."""
    ids = [*prompt, *resume]
    start = 0
    while len(ids) < len(prompt) + count:
        (token,) = engine.step(
            [Row(blocks_of(engine, which), start, len(ids), ids, len(prompt), True, params)]
        )
        assert isinstance(token, Token)
        start = len(ids)
        ids.append(token.id)
    return ids[len(prompt) :]


def answer_together(
    engine: TorchEngine,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    params: Sequence[SamplingParams],
    seed: int = 0,
) -> list[list[int]]:
    """Answer all prompts in random ragged steps: random rows, chunks and blocks."""
    dice = random.Random(seed)
    numbers = dice.sample(range(engine.model.kv_blocks), engine.model.kv_blocks)
    tables = [numbers[i :: len(prompts)] for i in range(len(prompts))]
    ids = [list(prompt) for prompt in prompts]
    computed = [0] * len(prompts)
    while True:
        running = [i for i, own in enumerate(ids) if len(own) < len(prompts[i]) + count]
        if not running:
            break
        rows, members = [], dice.sample(running, dice.randint(1, len(running)))
        for i in members:
            stop = min(len(ids[i]), computed[i] + dice.choice((1, 2, 5, 31, 32, 33, 100)))
            done = stop == len(ids[i])
            rows.append(Row(tables[i], computed[i], stop, ids[i], len(prompts[i]), done, params[i]))
            computed[i] = stop
        for i, row, token in zip(members, rows, engine.step(rows), strict=True):
            assert isinstance(token, Token) == row.sample
            if isinstance(token, Token):
                ids[i].append(token.id)
    return [own[len(prompt) :] for own, prompt in zip(ids, prompts, strict=True)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_schedules_give_the_answers_of_generate(
    architecture: str, tiny_engine: Engine, tiny_network: Network
) -> None:
    """Chunks, blocks and other rows change nothing, with windows, soft caps and groups too."""
    engine, network = tiny_engine(architecture), tiny_network(architecture)
    prompts = [prompt_of(length) for length in (1, 7, 40, 90, 130)]
    expected = [generated(network, prompt, 10) for prompt in prompts]

    for seed in range(3):
        assert answer_together(engine, prompts, 10, params=[GREEDY] * 5, seed=seed) == expected


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "phi3"])
def test_logits_are_those_of_a_plain_forward_pass_far_into_a_long_prompt(
    architecture: str, tiny_engine: Engine, tiny_network: Network
) -> None:
    """Beyond 512 keys attention works in blocks, and a window masks whole blocks."""
    engine, network = tiny_engine(architecture), tiny_network(architecture)
    ids = prompt_of(701)
    with torch.inference_mode():
        expected = network(torch.tensor([ids])).logits[0]

    seen = {}
    for start, stop in ((0, 1), (1, 300), (300, 301), (301, 520), (520, 700), (700, 701)):
        row = Row(blocks_of(engine, 3), start, stop, ids, 701, True, GREEDY)
        seen[stop] = engine.compute([row]).logits[0].clone()

    for stop, logits in seen.items():
        torch.testing.assert_close(logits, expected[stop - 1], rtol=1e-3, atol=1e-3)


def test_a_sampled_row_does_not_depend_on_other_rows(tiny_engine: Engine) -> None:
    engine = tiny_engine()
    if not engine.model.exact:
        pytest.skip("this machine's kernels are not exact")
    prompts = [prompt_of(length) for length in (3, 60, 125, 500)]
    params = [WARM, GREEDY, WARM, WARM]
    alone = [answer(engine, prompt, 12, params=own) for prompt, own in zip(prompts, params, strict=True)]

    for seed in range(4):
        assert answer_together(engine, prompts, 12, params=params, seed=seed) == alone


@pytest.mark.parametrize("params", [GREEDY, WARM])
def test_an_answer_resumed_from_any_point_ends_the_same(params: SamplingParams, tiny_engine: Engine) -> None:
    engine = tiny_engine("qwen2")
    if not engine.model.exact:
        pytest.skip("this machine's kernels are not exact")
    prompt = prompt_of(120)
    whole = answer(engine, prompt, 16, params=params)

    for count in (1, 8, 9, 15):
        assert answer(engine, prompt, 16, params=params, resume=whole[:count], which=5) == whole


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("shared", [1, 3])
def test_a_sequence_continues_from_blocks_that_another_has_written(
    architecture: str, shared: int, tiny_engine: Engine, tiny_network: Network
) -> None:
    """A common prefix is computed once: the second prompt starts after the blocks of the first."""
    engine, network = tiny_engine(architecture), tiny_network(architecture)
    held = shared * engine.model.block_tokens
    one, two = prompt_of(held + 30), prompt_of(held + 9)
    two[:held] = one[:held]
    ours, others = blocks_of(engine, 0), blocks_of(engine, 1)
    theirs = [*ours[:shared], *others[shared:]]
    engine.step([Row(ours, 0, len(one), one, len(one), True, GREEDY)])

    ids, start = list(two), held
    for _ in range(5):
        rows = [Row(theirs, start, len(ids), ids, len(two), True, GREEDY)]
        if start == held:  # the owner continues in the same step
            rows.append(Row(ours, len(one), len(one) + 1, [*one, 5], len(one), True, GREEDY))
        token = engine.step(rows)[0]
        assert isinstance(token, Token)
        start = len(ids)
        ids.append(token.id)

    assert ids[len(two) :] == generated(network, two, 5)


def test_only_the_row_whose_logits_are_not_finite_ends(tiny_engine: Engine, tiny_network: Network) -> None:
    engine, network = tiny_engine("gemma3"), tiny_network("gemma3")
    poison = 99
    embedding_of(engine).weight.data[poison] = float("nan")
    good, bad = prompt_of(20), [5, poison, 6]
    good = [3 if token == poison else token for token in good]

    results = engine.step(
        [
            Row(blocks_of(engine, 0), 0, 20, good, 20, True, GREEDY),
            Row(blocks_of(engine, 1), 0, 3, bad, 3, True, GREEDY),
        ]
    )

    assert isinstance(results[1], Fault)
    assert isinstance(results[0], Token)
    assert results[0].id == generated(network, good, 1)[0]


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("gpt_neox", "float32"), ("gemma3", "float32"), ("gpt_neox", "float16"), ("mistral", "float16")],
)
def test_blocks_of_a_faulty_sequence_can_be_reused(
    architecture: str, dtype: str, tiny_engine: Engine
) -> None:
    """Blocks are not cleared: a NaN left in them must not reach the next sequence."""
    engine, fresh = (tiny_engine(architecture, dtype=dtype) for _ in range(2))
    poison = 99
    for each in (engine, fresh):
        embedding_of(each).weight.data[poison] = float("nan")
    (fault,) = engine.step([Row(blocks_of(engine, 0), 0, 90, [poison] * 90, 90, True, GREEDY)])
    assert isinstance(fault, Fault)
    prompt = [3 if token == poison else token for token in prompt_of(39)]

    assert answer(engine, prompt, 4) == answer(fresh, prompt, 4)


def test_a_step_in_which_no_row_samples_returns_no_tokens(tiny_engine: Engine) -> None:
    engine = tiny_engine()
    rows = [
        Row(blocks_of(engine, 0), 0, 4, prompt_of(9), 9, False, GREEDY),
        Row(blocks_of(engine, 2), 0, 1, prompt_of(5), 5, False, GREEDY),
    ]

    assert engine.step(rows) == [None, None]


def test_a_launched_step_is_computed_when_it_is_awaited(tiny_engine: Engine) -> None:
    engine = tiny_engine()
    row = Row(blocks_of(engine, 0), 0, 3, [4, 5, 6], 3, True, GREEDY)
    broken = engine.launch([replace(row, blocks=[])])

    assert engine.launch([row]).wait() == engine.step([row])
    with pytest.raises(ValueError, match="could not broadcast"):
        broken.wait()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_loop_gives_random_arrivals_the_answers_of_generate(
    architecture: str, tiny_engine: Engine, tiny_network: Network
) -> None:
    """Also with more requests than rows, small steps and cancellations."""
    engine, network = tiny_engine(architecture, max_running=4), tiny_network(architecture)
    dice = random.Random(5)
    prompts = {key: prompt_of(dice.randint(1, 150), seed=key) for key in range(12)}
    lengths = {key: dice.randint(1, 12) for key in prompts}
    endings: queue.Queue[tuple[int, FinishReason]] = queue.Queue()
    answers: dict[int, list[int]] = {key: [] for key in prompts}

    def on_report(report: StepReport[int]) -> None:
        for update in report.updates:
            answers[update.key] += update.token_ids
            if update.finish is not None:
                endings.put((update.key, update.finish))

    loop: EngineLoop[int] = EngineLoop(engine, step_tokens=48)
    loop.start(on_report)
    for key, prompt in prompts.items():
        params = SamplingParams(seed=key, max_tokens=lengths[key], temperature=0, ignore_eos=True)
        loop.submit(SequenceSpec(key, prompt, len(prompt), params))
        if key % 5 == 4:
            loop.cancel(key)
    ended = dict(endings.get(timeout=120) for _ in prompts)
    loop.stop()

    for key, prompt in prompts.items():
        expected = generated(network, prompt, lengths[key])
        if ended[key] is FinishReason.LENGTH:
            assert answers[key] == expected
        else:
            assert ended[key] is FinishReason.CANCELLED
            assert answers[key] == expected[: len(answers[key])]
    assert {FinishReason.LENGTH} == {ended[key] for key in prompts if key % 5 != 4}


def test_the_model_ends_its_turn_with_its_end_token(tiny_engine: Engine) -> None:
    engine = tiny_engine()
    assert engine.model.eos_ids == {EOS}
    eager_to_end = SamplingParams(seed=1, max_tokens=9, temperature=0, logit_bias={EOS: 1000.0})

    (token,) = engine.step([Row(blocks_of(engine, 0), 0, 3, [4, 5, 6], 3, True, eager_to_end)])

    assert token == Token(EOS)


@pytest.mark.model
def test_a_default_model_knows_the_capital_of_france_and_ends_its_turn(
    default_model: Path, headrace_cache: Path
) -> None:
    from headrace.worker.engine.load.loading import load_engine

    engine: Any = load_engine(
        default_model, name="m", cache=headrace_cache, tokenizer_fingerprint="t", max_running=2
    )
    tokenizer = transformers_tokenizer(default_model, headrace_cache)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)

    answered: list[int] = []
    for _ in range(32):
        params = SamplingParams(seed=1, max_tokens=32, temperature=0)
        token = answer(engine, ids, len(answered) + 1, params=params, resume=answered)[-1]
        if token in engine.model.eos_ids:
            break
        answered.append(token)

    assert tokenizer.decode(answered).strip() == "The capital of France is Paris."
    assert token == tokenizer.convert_tokens_to_ids("<|im_end|>")
