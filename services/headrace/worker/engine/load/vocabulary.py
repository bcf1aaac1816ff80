"""Read the vocabulary of a model on a thread, while its weights are loaded: grammars need it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from headrace.grammars.compiling import Grammars
from headrace.grammars.vocabulary import Vocabulary, model_vocabulary, spelled_tokens
from headrace.models.tokenizers.files import read_tokenizer
from headrace.models.tokenizers.spelling import TokenSpelling
from headrace.worker.engine.load.refusals import one_line


class VocabularyReader:
    """Reads the tokenizer at *path*, a folder or a .gguf file, from now on.

    cache   the folder for parsed tokenizers
    """

    def __init__(self, path: Path, cache: Path) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="vocabulary")
        self._read = self._threads.submit(_read, path, cache)
        self._made: Future[Vocabulary] | None = None

    def make(self, *, size: int, eos_ids: Collection[int]) -> None:
        """Begin to make the vocabulary, when the model's number of logits and its ends are known."""

        def make() -> Vocabulary:
            fast, spelling, tokens = self._read.result()
            if not eos_ids:
                raise ValueError("the model names no token that ends an answer")
            return model_vocabulary(fast, spelling, tokens, size=size, eos_ids=eos_ids)

        self._made = self._threads.submit(make)

    def grammars(self, warn: Callable[[str], None]) -> Grammars | None:
        """Wait for the vocabulary, and return its grammars; None, with a warning, if it cannot be read."""
        assert self._made is not None, "`make` was called"
        self._threads.shutdown(wait=False)
        try:
            return Grammars(self._made.result())
        except Exception as error:
            warn(f"structured output and calls of tools are not available: {one_line(error)}")
            return None


def _read(path: Path, cache: Path) -> tuple[Any, TokenSpelling, list[bytes]]:
    fast = read_tokenizer(path, cache).backend
    spelling = TokenSpelling(fast)
    return fast, spelling, spelled_tokens(fast, spelling)
