"""Answer /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.client import Client
from headrace.gateway.api.chat.format import ChatFormat
from headrace.gateway.api.chat.parameters import ChatParameters
from headrace.gateway.api.choices import answers
from headrace.gateway.api.hints import hints_of
from headrace.gateway.api.models import Models
from headrace.gateway.api.reading import ignored_header, read
from headrace.gateway.api.streaming import deliver
from headrace.gateway.api.tally import Tally
from headrace.gateway.http.exchange import Exchange
from headrace.gateway.pace import Pace
from headrace.v1 import generation_pb2 as pb
from headrace.validation import check_request


@dataclass(frozen=True)
class _Asked:
    """What a body asks for.

    parameters   without those that are in the other fields
    params       the names of parameters by the fields of the contract
    unused       the names of parameters that are ignored
    """

    parameters: ChatParameters
    params: Mapping[str, str]
    unused: Sequence[str]
    sampling: pb.Sampling
    chat: pb.Chat


def _asked(body: dict[str, Any], large: bool) -> _Asked:
    parameters = read(ChatParameters, body, large=large)
    params, unused = parameters.params(), parameters.unused()
    asked = _Asked(parameters, params, unused, parameters.sampling(), parameters.chat())
    parameters.release("messages", "chat_template_kwargs", "tool_choice", "tools")
    return asked


class ChatCompletions:
    """Chat completions, answered by the mesh."""

    def __init__(self, client: Client, models: Models, pace: Pace) -> None:
        self._client = client
        self._models = models
        self._pace = pace

    async def complete(self, exchange: Exchange) -> None:
        """Answer one request. Raises Problem and HeadraceError."""
        asked = await exchange.read(_asked)
        parameters, chat = asked.parameters, asked.chat
        exchange.params = asked.params
        hints = await hints_of(exchange, parameters, self._models, prefix="chatcmpl-")
        request = pb.GenerateRequest(
            request_id=hints.id,
            chat=chat,
            sampling=asked.sampling,
            routing=hints.routing,
            stream=pb.StreamOptions(include_token_ids=parameters.return_token_ids),
        )
        check_request(request)
        n = parameters.choices
        await deliver(
            exchange,
            answers(
                self._client, [request], self._pace, n=n, timeout=hints.timeout, metadata=exchange.metadata
            ),
            ChatFormat(parameters, hints.id, chat),
            Tally(choices=n, n=n),
            streams=bool(parameters.stream),
            include_usage=parameters.includes_usage,
            headers=ignored_header((*asked.unused, *hints.ignored)),
        )
