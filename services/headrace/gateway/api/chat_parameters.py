"""The parameters of chat completions, and the conversation that they become."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic_core import to_json

from headrace.gateway.api.parameters import LATER, NO_TOOLS, CompletionParameters
from headrace.gateway.api.reading import Parameters, Refusal
from headrace.gateway.problems import Problem
from headrace.quoting import quoted
from headrace.v1 import generation_pb2 as pb
from headrace.validation import MAX_MESSAGES

MAX_PARTS = 4096  # of a message
MAX_ARGUMENT_BYTES = 16 * 1024  # of the template arguments, as JSON
MAX_ARGUMENT_DEPTH = 16

_TEXT_ONLY = "the models of this server read text only: send parts of type text"
_PARTS = {
    "image_url": _TEXT_ONLY,
    "input_audio": _TEXT_ONLY,
    "file": _TEXT_ONLY,
    "video_url": _TEXT_ONLY,
    "audio_url": _TEXT_ONLY,
}


class Part(Parameters):
    """A part of the content of a message."""

    type: str
    text: str | None = None
    refusal: str | None = None

    def words(self, place: str) -> str:
        """Return the text. Raises Problem for a part without text."""
        if self.type not in ("text", "refusal"):
            advice = _PARTS.get(self.type, "send parts of type text")
            raise Problem(
                400,
                f"{place}.type {quoted(self.type)} is not supported: {advice}",
                code="unsupported_content",
                param=f"{place}.type",
            )
        text = self.text if self.type == "text" else self.refusal
        if text is None:
            raise Problem(
                400,
                f"{place}.{self.type} is missing: set the text of the part",
                code="missing_required_parameter",
                param=f"{place}.{self.type}",
            )
        return text


class Message(Parameters):
    """One message of a conversation."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "audio": Refusal(_TEXT_ONLY),
        "function_call": Refusal(NO_TOOLS),
        "tool_calls": Refusal(NO_TOOLS, ([],)),
    }
    ignored: ClassVar[Collection[str]] = ("name", "tool_call_id")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    refusal: str | None = None

    def words(self, place: str) -> str:
        """Return the text. Raises Problem for a part without text.

        Parts are joined by line breaks, as in vLLM. What the assistant refused with is what it said.
        """
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            return self.refusal or ""
        return "\n".join(part.words(f"{place}.content[{number}]") for number, part in enumerate(self.content))

    def unused(self, place: str = "") -> list[str]:
        """Return the names of the parameters that are ignored. Raises Problem for one that is refused."""
        names = super().unused(place)
        if isinstance(self.content, list):
            for number, part in enumerate(self.content):
                names += part.unused(f"{place}content[{number}].")
        return names


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

    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    top_logprobs: int | None = None
    # vLLM's
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    continue_final_message: bool | None = None

    def unused(self, place: str = "") -> list[str]:
        """Return the names of the parameters that are ignored. Raises Problem for one that is refused."""
        names = super().unused(place)
        for number, message in enumerate(self.messages):
            names += (
                # One name for all messages: a header has no room for thousands.
                "messages[]." + name.split(".", 1)[1]
                for name in message.unused(f"messages[{number}].")
            )
        return names

    def names(self) -> Mapping[str, str]:
        """Return the names of parameters that have another name than the mesh's field, by the latter."""
        return {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}

    def most_tokens(self) -> int | None:
        """Return the most tokens to generate; None: as many as the tier allows."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling(self) -> pb.Sampling:
        """Return how tokens are sampled. Raises Problem for what the mesh cannot represent."""
        sampling = super().sampling()
        if self.top_logprobs is not None and not self.logprobs:
            raise Problem(
                400,
                "top_logprobs is set without logprobs: set logprobs to true",
                code="invalid_value",
                param="top_logprobs",
            )
        if self.logprobs:
            most = self.top_logprobs or 0
            if not 0 <= most <= 20:
                raise Problem(
                    400,
                    f"top_logprobs is {quoted(str(most))}, must be 0 to 20",
                    code="invalid_value",
                    param="top_logprobs",
                )
            sampling.top_logprobs = most
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
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise Problem(
                    400,
                    "add_generation_prompt and continue_final_message are both true: an answer either begins "
                    "a new message or continues the last one",
                    code="invalid_value",
                    param="add_generation_prompt",
                )
            chat.continue_final_message = True
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
        chat.messages.add(role=message.role, content=message.words(f"messages[{number}]"))
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
        raise Problem(
            400,
            f"chat_template_kwargs {complaint}",
            code="invalid_value",
            param="chat_template_kwargs",
        )


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0
