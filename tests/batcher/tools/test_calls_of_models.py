"""Grammars of calls with the tokenizers of the default models."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import llguidance.numpy
import numpy as np
import pytest

from headrace.batcher.text.detokenizer import Detokenizer, TextStream
from headrace.batcher.text.tokens import TransformersTokenizer, load_tokenizer, token_texts
from headrace.batcher.tools.families import Family
from headrace.batcher.tools.form import AnswerForm
from headrace.batcher.tools.forms import form_of
from headrace.batcher.tools.parser import AnswerParser, Kind
from headrace.grammars.compiling import Grammars
from headrace.grammars.vocabulary import Vocabulary
from tests.batcher.tools.test_calls import GET, request, written

MODELS = {"qwen2.5-coder-0.5b-instruct": Family.HERMES, "smollm2-135m-instruct": Family.JSON}


@lru_cache
def loaded(model: str) -> tuple[TransformersTokenizer, Grammars]:
    cache = Path(os.environ.get("HEADRACE_CACHE") or Path.home() / ".cache" / "headrace")
    path = cache / "models" / model / "model.gguf"
    if not path.is_file():
        pytest.skip(f"{path} does not exist: run `headrace fetch`")
    tokenizer = load_tokenizer(path, cache)
    vocabulary = Vocabulary(
        token_texts(tokenizer, range(tokenizer.vocabulary_size)),
        specials=tokenizer.special_tokens,
        eos_ids=[tokenizer.special_tokens["<|im_end|>"]],
        encode=lambda text: tokenizer.encode_text(text, add_special_tokens=False),
    )
    return tokenizer, Grammars(vocabulary)


def read(tokenizer: TransformersTokenizer, form: AnswerForm, ids: list[int]) -> list[tuple[str, str]]:
    stream, parser = TextStream(Detokenizer(tokenizer, 0), None, form.marker_texts), AnswerParser(form)
    parts = [part for id in ids for part in parser.feed(stream.feed([id]).text)]
    parts += [*parser.feed(stream.flush().text), *parser.finish()]
    calls = [[part.name, ""] for part in parts if part.kind is Kind.CALL]
    for part in parts:
        if part.kind is Kind.ARGUMENTS:
            calls[part.call][1] += part.source
    return [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize("model", MODELS)
def test_a_model_writes_calls_in_its_own_tokens_and_other_text_as_it_likes(model: str) -> None:
    tokenizer, grammars = loaded(model)
    form = form_of(request(), tokenizer, [1])
    end = "}\n</tool_call>" if form.family is Family.HERMES else "}"
    call = written(tokenizer.tool_family, False, GET) + end

    assert form.family is MODELS[model]
    for text in (call, "Good morning, {all}: \n\n```json\n[1]\n``` 火", "<tool> is no marker"):
        ids = tokenizer.encode_text(text, add_special_tokens=False)
        matcher = grammars.matcher(form.grammar)
        assert matcher.consume_tokens(ids), matcher.get_error()
        assert matcher.is_accepting()
        assert read(tokenizer, form, ids) == ([("get", GET)] if text == call else [])


@pytest.mark.parametrize("model", MODELS)
def test_a_forced_call_is_written_in_the_models_own_tokens(model: str) -> None:
    """A model that has to write a marker writes the token that its template has, not its letters."""
    tokenizer, grammars = loaded(model)
    form = form_of(request("get"), tokenizer, [1])
    end = "}\n</tool_call>" if form.family is Family.HERMES else "}"
    ids = tokenizer.encode_text(written(tokenizer.tool_family, False, GET) + end, add_special_tokens=False)
    matcher = grammars.matcher(form.grammar)
    mask = llguidance.numpy.allocate_token_bitmask(1, tokenizer.vocabulary_size)
    forced = []
    for id in [*ids, tokenizer.special_tokens["<|im_end|>"]]:
        llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        assert id in allowed
        forced.append(len(allowed) == 1)
        assert matcher.consume_token(id)

    assert forced[0]
    assert forced[-1]
    assert sum(forced) > len(forced) / 2
    if form.family is Family.HERMES:
        assert tokenizer.decode(ids[:1]) == "<tool_call>"
        assert tokenizer.decode(ids[-1:]) == "</tool_call>"
        assert forced[-2]
