"""Put the parts of an answer into the fields of its deltas."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.batcher.tools.families import Family
from headrace.batcher.tools.form import AnswerForm
from headrace.batcher.tools.ids import CallIds
from headrace.batcher.tools.parser import AnswerParser, Kind
from headrace.v1 import generation_pb2 as pb


class AnswerParts:
    """The parts of one answer.

    seed, prompt_ids   those of the request: the ids of calls follow from them
    """

    def __init__(self, form: AnswerForm, seed: int, prompt_ids: Sequence[int]) -> None:
        self._parser = AnswerParser(form)
        self._ids = CallIds(seed, prompt_ids, form.family or Family.JSON)

    @property
    def holds_text(self) -> bool:
        """Whether text is held back, which the end of the answer releases."""
        return self._parser.holds_text

    def feed(self, text: str) -> None:
        """Read text whose parts the caller has."""
        self._parser.feed(text)

    def fill(self, delta: pb.Delta, text: str, *, final: bool = False) -> None:
        """Set the fields of *delta* to what can be released with the next text.

        final   whether the answer ends with it
        """
        parts = self._parser.feed(text)
        if final:
            parts += self._parser.finish()
        for part in parts:
            match part.kind:
                case Kind.TEXT:
                    delta.text += part.source
                case Kind.REASONING:
                    delta.reasoning += part.source
                case Kind.CALL:
                    delta.tool_calls.add(index=part.call, id=self._ids.id(part.call), name=part.name)
                case Kind.ARGUMENTS:
                    # The first part of a call has its name, and the arguments that came with it.
                    calls = delta.tool_calls
                    call = calls[-1] if calls and calls[-1].index == part.call else calls.add(index=part.call)
                    call.arguments += part.source
                case Kind.MARKUP:
                    pass


def has_content(delta: pb.Delta) -> bool:
    """Whether a delta has a part of any kind."""
    return bool(delta.text or delta.reasoning or delta.tool_calls)
