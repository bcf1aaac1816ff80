"""Read the events of an upstream's answer, and return those of the mesh.

Whatever an upstream sends, `AnswerReader` returns deltas that obey the contract, or raises one typed error.
Server-sent events are split into JSON values elsewhere.
"""

from __future__ import annotations

from headrace.upstream.api.terms import Terms
from headrace.v1 import generation_pb2 as pb


class AnswerReader:
    """Reads one answer.

    begun          whether text, reasoning, a call of a tool or the reason of the end was read: then `accepted`
                   is due, before the deltas that `read` returned
    finished       whether the reason of the end was read. Usage may follow, so read on until the stream ends
    usage_known    whether the upstream has reported its usage
    tokens         the sum of `token_count` of all deltas
    """

    begun: bool
    finished: bool
    usage_known: bool
    tokens: int

    def __init__(self, request: pb.GenerateRequest, terms: Terms, *, key: str = "") -> None:
        """Start before the first event of the answer to *request*.

        key   the API key, which is removed from messages of the upstream
        """

    def read(self, data: object) -> list[pb.Delta]:
        """Return the deltas for one event: a parsed JSON value of the stream, without "[DONE]".

        Also accepts a whole response, from an upstream that ignores `stream`: it is read as one event, which
        may become several deltas.

        Raises UpstreamLost once the answer has begun. Before that, what `problems.problem_of_event` returns
        for an event that reports an error; NoWorkers for an event that violates OpenAI's API; InvalidSampling
        if the upstream ignores that log-probabilities were requested; InvalidRequest if a filter withheld the
        answer. After an error, the reader is of no more use.
        """
        raise NotImplementedError

    def finish(self) -> pb.Finish:
        """Return the end of the answer, without timing, once the stream has ended.

        Raises UpstreamLost if the answer has begun and is incomplete, and NoWorkers if it has not begun.
        """
        raise NotImplementedError
