"""Answer /tokenize, /detokenize and /tokenizer_info, in the form of vLLM's endpoints.

Without a model they use the only one of the mesh. If it has several, the request names one: in `model`, or in
the header x-headrace-tier.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from headrace.client import Client
from headrace.conversation_checks import MAX_TOOLS
from headrace.gateway.api.chat.messages import MESSAGE_PARAMS, Message, unused_of_messages
from headrace.gateway.api.chat.parameters import conversation
from headrace.gateway.api.chat.tools import Tool, params_of, set_tools, unused_of_tools
from headrace.gateway.api.models import Models
from headrace.gateway.api.parameters import Uint32
from headrace.gateway.api.reading import Parameters, Refusal, ignored_header, invalid, read
from headrace.gateway.http.exchange import Exchange
from headrace.v1 import tokenizer_service_pb2 as pb
from headrace.validation import MAX_MESSAGES, MAX_TOKENIZER_IDS


class TokenizeParameters(Parameters):
    """The parameters of /tokenize: a text or a conversation."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "chat_template": Refusal("the template of the model is used; leave it out"),
    }
    ignored: ClassVar[Collection[str]] = ("media_io_kwargs", "mm_processor_kwargs")

    model: str | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None
    ) = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None

    def unused(self, place: str = "") -> list[str]:
        """Return the names of the parameters that are ignored. Raises Problem for one that is refused."""
        names = super().unused(place)
        if self.messages is None:
            return names + ["tools"] * bool(self.tools)
        return names + unused_of_messages(self.messages) + unused_of_tools(self.tools or ())

    def request(self) -> pb.TokenizeRequest:
        """Return the request of the mesh, without a model. Raises Problem."""
        if (self.prompt is None) == (self.messages is None):
            raise invalid("prompt", "must be set, or messages, but not both")
        request = pb.TokenizeRequest(include_texts=self.return_token_strs)
        if self.prompt is not None:
            request.prompt = self.prompt
            request.add_special_tokens = self.add_special_tokens is not False
            return request
        assert self.messages is not None
        if self.add_special_tokens:
            raise invalid(
                "add_special_tokens",
                "must be false with messages: the chat template sets them",
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid(
                "add_generation_prompt",
                "must not be true together with continue_final_message",
            )
        chat = conversation(self.messages, self.chat_template_kwargs or {}, large=self.large)
        set_tools(chat, self.tools or (), None, parallel=None, large=self.large)
        request.chat.CopyFrom(chat)
        if self.continue_final_message:
            request.chat.continue_final_message = True
        request.add_generation_prompt = self.add_generation_prompt is not False
        return request


class DetokenizeParameters(Parameters):
    """The parameters of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Uint32], Field(max_length=MAX_TOKENIZER_IDS, fail_fast=True)]


class Tokenizers:
    """The tokenizers of the models, as the mesh provides them."""

    def __init__(self, client: Client, models: Models) -> None:
        self._client = client
        self._models = models

    async def tokenize(self, exchange: Exchange) -> None:
        """Answer /tokenize. Raises Problem and HeadraceError."""
        parameters, request, headers = await exchange.read(_tokenizing)
        parameters.release("messages", "chat_template_kwargs", "tools")
        request.tokenizer.CopyFrom(await self._choice(parameters.model, exchange))
        exchange.params = _NAMES
        response = await self._client.tokenize(request, metadata=exchange.metadata)
        reply: dict[str, object] = {
            "count": len(response.token_ids),
            "max_model_len": response.tokenizer.context_length,
            "tokens": list(response.token_ids),
            "token_strs": None,
        }
        if parameters.return_token_strs:
            reply["token_strs"] = [text.decode(errors="replace") for text in response.texts]
        await exchange.reply(reply, headers=headers)

    async def detokenize(self, exchange: Exchange) -> None:
        """Answer /detokenize. Raises Problem and HeadraceError."""
        parameters = read(DetokenizeParameters, await exchange.json())
        headers = ignored_header(parameters.unused())
        parameters.release()
        if not parameters.tokens:
            await exchange.reply({"prompt": ""}, headers=headers)
            return
        request = pb.DetokenizeRequest(
            token_ids=parameters.tokens, tokenizer=await self._choice(parameters.model, exchange)
        )
        exchange.params = _NAMES
        response = await self._client.detokenize(request, metadata=exchange.metadata)
        await exchange.reply({"prompt": response.text}, headers=headers)

    async def info(self, exchange: Exchange) -> None:
        """Answer /tokenizer_info. Raises Problem and HeadraceError.

        The response has the keys of a tokenizer_config.json, as far as the mesh knows them.
        """
        request = pb.GetTokenizerRequest(tokenizer=await self._choice(None, exchange))
        response = await self._client.get_tokenizer(request, metadata=exchange.metadata)
        named = response.special_tokens
        await exchange.reply(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **{name: named.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
                "chat_template": response.chat_template or None,
                "model_max_length": response.tokenizer.context_length,
            }
        )

    async def _choice(self, model: str | None, exchange: Exchange) -> pb.TokenizerChoice:
        """Return the tokenizer to use. Raises Problem for an unknown model."""
        routing = await self._models.pin(model, metadata=exchange.metadata)
        if tier := exchange.headers.get("x-headrace-tier"):
            routing.tier = tier
        await self._models.pin_one(routing, "each model has its own tokenizer", metadata=exchange.metadata)
        return pb.TokenizerChoice(tier=routing.tier, model=routing.model)


def _tokenizing(
    body: dict[str, Any], large: bool
) -> tuple[TokenizeParameters, pb.TokenizeRequest, dict[str, str]]:
    """Return the parameters of /tokenize, the request of the mesh, and headers of the response."""
    parameters = read(TokenizeParameters, body, large=large)
    headers = ignored_header(parameters.unused())
    return parameters, parameters.request(), headers


_NAMES = {
    **MESSAGE_PARAMS,
    **params_of((), None),
    "chat.messages": "messages",
    "chat.tools": "tools",
    "chat.template_arguments": "chat_template_kwargs",
    "chat.continue_final_message": "continue_final_message",
    "prompt": "prompt",
    "token_ids": "tokens",
    "tokenizer.tier": "model",
    "tokenizer.model": "model",
}
