"""A model's recommended sampling fields are the defaults if the batcher is configured to use them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from headrace.batcher.__main__ import _load, batcher
from headrace.batcher.settings import Settings
from headrace.batcher.text.generation_defaults import recommended_sampling
from headrace.batcher.text.tokens import ByteTokenizer
from headrace.client import connect
from headrace.models import ModelUnavailable
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.interface import Result, Row, SamplingParams
from tests.batcher.text.tiny_tokenizers import byte_level, saved
from tests.harness import collect, eventually, prompt, running_worker

RECOMMENDED = {"temperature": 0.5, "top_p": 0.75, "top_k": 20, "repetition_penalty": 1.25, "do_sample": True}


class Recording(EchoEngine):
    """Records the latest sampling parameters."""

    asked: SamplingParams | None = None

    def step(self, rows: Sequence[Row]) -> list[Result]:
        self.asked = rows[0].params
        return super().step(rows)


async def test_fields_that_a_request_leaves_out_have_the_recommended_values() -> None:
    engine = Recording()
    defaults = pb.Sampling(temperature=0.5, top_p=0.75, top_k=20, repetition_penalty=1.25)
    async with running_worker(engine) as worker:
        settings = Settings(port=0, tier="t", workers=f"127.0.0.1:{worker.server.port}", fake=True)
        async with (
            batcher(settings, ByteTokenizer(), "b", defaults) as running,
            connect(f"127.0.0.1:{running.server.port}") as client,
        ):
            await eventually(running.coalescer.pool.ready)
            await collect(client, prompt("x"))
            first = engine.asked
            await collect(client, prompt("x", temperature=0.0, top_k=0, stop=["y"]))
            second = engine.asked

    assert first is not None
    assert (first.temperature, first.top_p, first.top_k, first.repetition_penalty) == (0.5, 0.75, 20, 1.25)
    assert second is not None
    assert (second.temperature, second.top_p, second.top_k, second.repetition_penalty) == (0, 0.75, 0, 1.25)


@pytest.mark.parametrize(("wanted", "temperature"), [("auto", 0.5), ("none", None)])
def test_the_setting_selects_whether_they_are_read(
    tmp_path: Path, wanted: Any, temperature: float | None
) -> None:
    folder = saved(byte_level(), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(RECOMMENDED))
    settings = Settings(workers="x:1", model=str(folder), cache=str(tmp_path), generation_config=wanted)

    _, defaults = _load(settings)

    assert (defaults.temperature if defaults.HasField("temperature") else None) == temperature
    assert defaults == (pb.Sampling() if wanted == "none" else recommended_sampling(folder))


@pytest.mark.parametrize("content", [None, "{}", "[]", json.dumps({"temperature": None, "eos_token_id": 2})])
def test_a_model_that_recommends_nothing_changes_nothing(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content)

    assert recommended_sampling(tmp_path) == pb.Sampling()
    assert recommended_sampling(tmp_path / "model.gguf") == pb.Sampling()


def test_minus_one_stands_for_all_tokens(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": -1}))

    assert recommended_sampling(tmp_path) == pb.Sampling(top_k=0)


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        ({"temperature": -1}, "temperature = -1"),
        ({"top_p": 2.5}, "top_p = 2.5"),
        ({"top_k": "many"}, "top_k = 'many'"),
        ({"top_k": 1e30}, "top_k = 1e"),
        ({"repetition_penalty": [1]}, "repetition_penalty"),
        ("{", "damaged"),
    ],
)
def test_invalid_recommendations_stop_the_start_with_their_name(
    tmp_path: Path, content: Any, reported: str
) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))

    with pytest.raises(ModelUnavailable, match=reported) as caught:
        recommended_sampling(tmp_path)
    assert str(file) in str(caught.value)
