"""The parameters of chat completions, and the conversation that they become."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from headrace.conversation_checks import MAX_TOOLS
from headrace.gateway.api.bounded import bounded_json
from headrace.gateway.api.chat.messages import MESSAGE_PARAMS, Message, add_message, unused_of_messages
from headrace.gateway.api.chat.tools import (
    Choice,
    Tool,
    choice_of,
    params_of,
    set_tools,
    unused_of_tools,
)
from headrace.gateway.api.parameters import CompletionParameters, Uint32
from headrace.gateway.api.reading import Refusal, invalid
from headrace.gateway.problems import Problem
from headrace.v1 import generation_pb2 as pb
from headrace.validation import MAX_MESSAGES

MAX_ARGUMENT_BYTES = 16 * 1024  # of the template arguments, as JSON
MAX_ARGUMENT_DEPTH = 16
MAX_TOP_LOGPROBS = 20

_ARGUMENTS = "chat_template_kwargs"


class ChatParameters(CompletionParameters):
    """The parameters of /v1/chat/completions."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        **CompletionParameters.refused,
        "audio": Refusal("the models of this server answer with text only; leave it out"),
        "function_call": Refusal("use tool_choice", ("none", "auto")),
        "functions": Refusal("use tools", ([],)),
        "modalities": Refusal("the models of this server answer with text only", (["text"],)),
        "moderation": Refusal("this server does not moderate; leave it out"),
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
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "verbosity",
        # vLLM's
        "mm_processor_kwargs",
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool | None = None
    max_completion_tokens: Uint32 | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    tool_choice: object = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    # vLLM's
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None

    def unused(self, place: str = "") -> list[str]:
        """Return the names of the parameters that are ignored. Raises Problem for one that is refused."""
        names = super().unused(place) + unused_of_messages(self.messages) + unused_of_tools(self.tools or ())
        if self.parallel_tool_calls is not None and not self.tools:
            names.append("parallel_tool_calls")
        return names

    def params(self) -> Mapping[str, str]:
        """Return the names of parameters by the fields of the contract, for `problem_of`. Raises Problem."""
        names = {**super().params(), **MESSAGE_PARAMS, **params_of(self.tools or (), self._choice())}
        if self.tools:
            names.setdefault("sampling.structured", "tools")  # calls have a form, too
        if self.max_completion_tokens is not None:
            names["sampling.max_tokens"] = "max_completion_tokens"
        return names

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
        chat = conversation(self.messages, arguments, large=self.large)
        tools, choice = self.tools or (), self._choice()
        set_tools(chat, tools, choice, parallel=self.parallel_tool_calls, large=self.large)
        self._set_continuation(chat)
        return chat

    def _choice(self) -> Choice | None:
        """Return whether the model calls tools; None: as by default. Raises Problem."""
        return None if self.tool_choice is None else choice_of(self.tool_choice)

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


def conversation(messages: Sequence[Message], arguments: Mapping[str, object], *, large: bool) -> pb.Chat:
    """Return the conversation of *messages*, with the variables of the chat template. Raises Problem.

    large   see `bounded_json`
    """
    chat = pb.Chat()
    for number, message in enumerate(messages):
        add_message(chat, message, f"messages[{number}]")
    if arguments:
        _set_arguments(chat, arguments, large)
    return chat


def _set_arguments(chat: pb.Chat, arguments: Mapping[str, object], large: bool) -> None:
    """Set the variables of the chat template. Raises Problem for those that the mesh cannot represent.

    Size and depth are checked before they are copied, which takes microseconds for each value.
    """
    bounded_json(arguments, _ARGUMENTS, MAX_ARGUMENT_BYTES, large=large)
    if _depth(arguments) > MAX_ARGUMENT_DEPTH:
        raise invalid(_ARGUMENTS, f"is nested deeper than {MAX_ARGUMENT_DEPTH} levels")
    try:
        chat.template_arguments.update(arguments)  # type: ignore[arg-type]
    except (OverflowError, ValueError) as error:
        raise invalid(_ARGUMENTS, f"has a value that cannot be passed on: {error}") from None


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0
