"""Make prompts of a given length from random words, all with the same first words if wanted.

A client has no tokenizer. The words are common ones, which are one token each in most vocabularies. How many
tokens the server counts for them and for its chat template is measured by two requests before the run.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from headrace.cli.bench.prompts import Prompt

SHORT, LONG = 8, 136  # words of the two prompts that are counted

_WORDS = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend father power hour game line end member law car city community
name president team minute idea body information back parent face others level office door health
person art war history party result change morning reason research girl guy moment air teacher force
education foot boy age policy music market sense nation plan college interest death experience
effect use class control field development role effort rate heart drug show leader light voice wife
police mind return report decision son view town road form value action model season society tax
director position player record paper space ground event official matter center couple site project
activity star table need court oil situation cost industry figure street image phone data picture
practice piece land product doctor wall news test movie north love support technology
""".split()  # noqa: SIM905 - a list would take a line for each word


@dataclass(frozen=True)
class Count:
    """How many tokens a server counts for a prompt of words: *template* + *per_word* x words."""

    template: float = 0.0
    per_word: float = 1.0

    def words(self, tokens: int) -> int:
        """Return the number of words of a prompt of about *tokens*, at least one."""
        return max(round((tokens - self.template) / self.per_word), 1)


def count(short: int, long: int) -> Count:
    """Return how a server counts that reported *short* and *long* tokens for `SHORT` and `LONG` words."""
    per_word = max((long - short) / (LONG - SHORT), 0.01)
    return Count(max(short - SHORT * per_word, 0.0), per_word)


def text_of(words: int, rng: random.Random) -> str:
    """Return random words."""
    return " ".join(rng.choices(_WORDS, k=words))


@dataclass(frozen=True)
class SyntheticPrompts:
    """Prompts of random words: the same `prefix_len` tokens first, then `input_len` of their own.

    input_len, prefix_len   in tokens as the server counts them, chat template included
    range_ratio             lengths of input and answer vary evenly by this share of them, 0 to below 1
    max_tokens              of the answers, if output_len is None
    output_len              exact number of tokens of the answers
    """

    input_len: int
    max_tokens: int
    output_len: int | None = None
    ignore_eos: bool = False
    prefix_len: int = 0
    range_ratio: float = 0.0
    seed: int = 0
    counted: Count = Count()

    def __call__(self, number: int) -> Prompt:
        """Return the prompt of a request, which depends on seed and number only."""
        rng = random.Random(f"{self.seed}:{number}")
        words = self.counted.words(self._varied(self.input_len, rng) + self.prefix_len)
        own = max(words - self._prefix_words, 1)
        text = f"{self._prefix} {text_of(own, rng)}".strip()
        if self.output_len is None:
            return Prompt((("user", text),), self.max_tokens, self.ignore_eos)
        return Prompt((("user", text),), self._varied(self.output_len, rng), exact=True)

    @cached_property
    def _prefix_words(self) -> int:
        return round(self.prefix_len / self.counted.per_word)

    @cached_property
    def _prefix(self) -> str:
        return text_of(self._prefix_words, random.Random(f"{self.seed}:prefix"))

    def _varied(self, length: int, rng: random.Random) -> int:
        low, high = length * (1 - self.range_ratio), length * (1 + self.range_ratio)
        return max(rng.randint(round(low), round(high)), 1)
