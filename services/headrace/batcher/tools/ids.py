"""Name calls: ids that are unique in a conversation, and the same wherever the answer is resumed."""

from __future__ import annotations

import hashlib
import string
from array import array
from collections.abc import Sequence

from headrace.batcher.tools.families import Family

_LETTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
# The next turn of a conversation has a longer prompt, with another end: a bounded part of it is enough.
_TOKENS = 4096


class CallIds:
    """The ids of the calls in one answer: a function of its seed, its prompt and the place of the call."""

    def __init__(self, seed: int, prompt_ids: Sequence[int], family: Family) -> None:
        self._seed = seed
        self._prompt_ids = prompt_ids
        # The templates of Mistral's models reject other ids.
        self._prefix, self._length = ("", 9) if family is Family.MISTRAL else ("call_", 24)
        self._digest: hashlib.blake2b | None = None

    def id(self, index: int) -> str:
        """Return the id of a call."""
        if self._digest is None:
            head = f"{self._seed} {len(self._prompt_ids)} ".encode()
            self._digest = hashlib.blake2b(head + array("Q", self._prompt_ids[-_TOKENS:]).tobytes())
        digest = self._digest.copy()
        digest.update(str(index).encode())
        number, letters = int.from_bytes(digest.digest()), []
        for _ in range(self._length):
            number, letter = divmod(number, len(_LETTERS))
            letters.append(_LETTERS[letter])
        return self._prefix + "".join(letters)
