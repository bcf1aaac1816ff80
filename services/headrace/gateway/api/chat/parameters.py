"""The parameters of chat completions, and the conversation that they become."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic_core import to_json

from headrace.gateway.api.chat.messages import Message, unused_of_messages, words_of
from headrace.gateway.api.parameters import LATER, NO_TOOLS, PARAMS, CompletionParameters, Uint32
from headrace.gateway.api.reading import Refusal, invalid
from headrace.gateway.problems import Problem
from headrace.v1 import generation_pb2 as pb
from headrace.validation import MAX_MESSAGES

MAX_ARGUMENT_BYTES = 16 * 1024  # of the template arguments, as JSON
MAX_ARGUMENT_DEPTH = 16
MAX_TOP_LOGPROBS = 20


class ChatParameters(CompletionParameters):
    """The parameters of /v1/chat/completions."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        **CompletionParameters.refused,
        "audio": Refusal("the models of this server answer with text only; leave it out"),
        "function_call": Refusal(NO_TOOLS, ("none", "auto")),
        "functions": Refusal(NO_TOOLS, ([],)),
        "modalities": Refusal("the models of this server answer with text only", (["text"],)),
        "moderation": Refusal("this server does not moderate; leave it out"),
        "response_format": Refusal(LATER, ({"type": "text"},)),
        "tool_choice": Refusal(NO_TOOLS, ("none", "auto")),
        "tools": Refusal(NO_TOOLS, ([],)),
        "web_search_options": Refusal("this server does not search the web; leave it out"),
        # vLLM's
        "add_special_tokens": Refusal("the chat template sets special tokens; leave it out", (False,)),
        "chat_template": Refusal("the template of the model is used; leave it out"),
        "documents": Refusal("put them into a message", ([],)),
        "echo": Refusal("leave it out, or use /v1/completions", (False,)),
        "prompt_logprobs": Refusal("use /v1/completions with echo and logprobs"),
    }
    ignored: ClassVar[Collection[str]] = (
        *CompletionParameters.ignored,
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "verbosity",
        # vLLM's
        "include_reasoning",
        "mm_processor_kwargs",
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool | None = None
    max_completion_tokens: Uint32 | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    # vLLM's
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    continue_final_message: bool | None = None

    def unused(self, place: str = "") -> list[str]:
        """Return the names of the parameters that are ignored. Raises Problem for one that is refused."""
        return super().unused(place) + unused_of_messages(self.messages)

    def params(self) -> Mapping[str, str]:
        """Return the names of parameters by the fields of the contract, for `problem_of`."""
        if self.max_completion_tokens is None:
            return PARAMS
        return {**PARAMS, "sampling.max_tokens": "max_completion_tokens"}

    def most_tokens(self) -> int | None:
        """Return the most tokens to generate; None: as many as the tier allows."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling(self) -> pb.Sampling:
        """Return how tokens are sampled. Raises Problem for what the mesh cannot represent."""
        sampling = super().sampling()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "is set without logprobs: set logprobs to true")
        if self.logprobs:
            sampling.top_logprobs = self.top_logprobs or 0
        return sampling

    def chat(self) -> pb.Chat:
        """Return the conversation. Raises Problem."""
        arguments = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            arguments.setdefault("reasoning_effort", self.reasoning_effort)
        chat = conversation(self.messages, arguments)
        self._set_continuation(chat)
        return chat

    def _set_continuation(self, chat: pb.Chat) -> None:
        role = self.messages[-1]["role"]
        if self.continue_final_message:
            if role != "assistant":
                raise invalid(
                    "continue_final_message",
                    f"is true, but the last message has role '{role}', not 'assistant'",
                )
            if self.add_generation_prompt:
                raise invalid(
                    "add_generation_prompt",
                    "and continue_final_message are both true: an answer either begins a new message or "
                    "continues the last one",
                )
            chat.continue_final_message = True
        elif role == "assistant":
            raise invalid(
                f"messages[{len(self.messages) - 1}].role",
                "is 'assistant' and the last one: set continue_final_message to true to continue it, or "
                "end with a message of the user",
            )
        elif self.add_generation_prompt is False:
            raise Problem(
                400,
                "add_generation_prompt is false without continue_final_message: an answer is a new message "
                "of the assistant, or continues its last one",
                code="unsupported_parameter",
                param="add_generation_prompt",
            )


def conversation(messages: Sequence[Message], arguments: Mapping[str, object]) -> pb.Chat:
    """Return the conversation of *messages*, with the variables of the chat template. Raises Problem."""
    chat = pb.Chat()
    for number, message in enumerate(messages):
        chat.messages.add(role=message["role"], content=words_of(message, f"messages[{number}]"))
    if arguments:
        _set_arguments(chat, arguments)
    return chat


def _set_arguments(chat: pb.Chat, arguments: Mapping[str, object]) -> None:
    """Set the variables of the chat template. Raises Problem for those that the mesh cannot represent.

    Size and depth are checked before they are copied, which takes microseconds for each value.
    """
    complaint = ""
    try:
        if (size := len(to_json(arguments))) > MAX_ARGUMENT_BYTES:
            complaint = f"has {size} bytes, must be at most {MAX_ARGUMENT_BYTES}"
        elif _depth(arguments) > MAX_ARGUMENT_DEPTH:
            complaint = f"is nested deeper than {MAX_ARGUMENT_DEPTH} levels"
        else:
            chat.template_arguments.update(arguments)  # type: ignore[arg-type]
    except (OverflowError, ValueError) as error:
        complaint = f"has a value that cannot be passed on: {error}"
    if complaint:
        raise invalid("chat_template_kwargs", complaint)


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0
