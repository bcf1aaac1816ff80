"""Turn the input of a request into token ids: chat, raw text, or token ids as they are.

A prompt that cannot fit the context by its bytes alone is rejected before it is tokenised. Of a text that is
many times longer than the context, only the head is tokenised. `limits` decides what fits.
"""

from __future__ import annotations

from headrace.batcher.intake.limits import RequestLimits
from headrace.batcher.text.tokens import Bounded, Tokenizer
from headrace.batcher.turns import Call, Tool, Tools, Turn, Turns
from headrace.checks.conversations import arguments_of_call, parameters_of_tool
from headrace.template_arguments import NO_ARGUMENTS, Arguments, arguments_of
from headrace.v1 import generation_pb2 as pb

# Characters per token of the context; ordinary text has 3 to 5. Of a text with more than `_LONG`, the first
# `_HEAD` are tokenised first.
_HEAD, _LONG = 6, 12
# Tokens at the end of a head that the following text may change. Tokenising is local: a word or a run of
# spaces.
_UNSETTLED = 64
_ROLES = {"developer": "system"}  # templates know other roles by their own names


class Encoder:
    """Encodes the inputs of one tier. Safe to use from several threads.

    arguments   the tier's defaults of template arguments, which those of a chat override one by one
    """

    def __init__(self, tokenizer: Tokenizer, arguments: Arguments = NO_ARGUMENTS) -> None:
        self._tokenizer = tokenizer
        self._arguments = dict(arguments)
        self._bound = tokenizer.bound if isinstance(tokenizer, Bounded) else None
        # A chat with more bytes per token of the context is rendered and judged before it is tokenised.
        self._judge_rendered_above = min(_LONG, self._bound.longest if self._bound else _LONG)

    def quick_bytes(self, request: pb.GenerateRequest) -> int:
        """Return the size up to which the request is encoded on the event loop; 0: never."""
        tokenizer = self._tokenizer
        return tokenizer.quick_chat_bytes if request.HasField("chat") else tokenizer.quick_text_bytes

    def check(self, request: pb.GenerateRequest, size: int, limits: RequestLimits) -> None:
        """Check what is known of the number of tokens before the request, of *size* bytes, is encoded.

        Raises EmptyInput, ContextTooLong, and InvalidRequest for an id beyond the vocabulary.
        """
        if request.HasField("token_ids"):
            ids = request.token_ids.ids
            limits.check_prompt(len(ids))  # before they are read
            limits.check_ids("token_ids.ids", ids)
        elif request.HasField("prompt"):
            # The bytes of a shorter prompt prove nothing, so the event loop does not scan them.
            most = self._bound.longest * (limits.context_length - 1) if self._bound is not None else size
            if size > most:
                self._check_bytes(request.prompt, limits)

    def prompt_ids(self, request: pb.GenerateRequest, size: int, limits: RequestLimits) -> list[int]:
        """Return the prompt's tokens. Raises InvalidRequest."""
        if request.HasField("token_ids"):
            return request.token_ids.ids[:]
        if request.HasField("prompt"):
            self._check_head(request.prompt, limits)
            return self.text_ids(request.prompt)
        chat = request.chat
        # A template may drop messages, so the bytes of a chat prove something only once it is rendered.
        if size > self._judge_rendered_above * limits.context_length and isinstance(self._tokenizer, Bounded):
            text = self._tokenizer.render_chat(
                _turns(chat),
                tools=_tools(chat),
                continue_final=chat.continue_final_message,
                arguments=self._arguments_of(chat),
            )
            self._check_bytes(text, limits)
            self._check_head(text, limits)
        return self.chat_ids(chat)

    def text_ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a raw text; see `Tokenizer.encode_text`."""
        if add_special_tokens:
            return self._tokenizer.encode_text(text)
        return self._tokenizer.encode_text(text, add_special_tokens=False)

    def chat_ids(self, chat: pb.Chat, *, generation_prompt: bool = True) -> list[int]:
        """Return the tokens of a conversation; see `Tokenizer.encode_chat`. Raises InvalidRequest."""
        return self._tokenizer.encode_chat(
            _turns(chat),
            tools=_tools(chat),
            continue_final=chat.continue_final_message,
            generation_prompt=generation_prompt,
            arguments=self._arguments_of(chat),
        )

    def _arguments_of(self, chat: pb.Chat) -> Arguments:
        if not chat.HasField("template_arguments"):
            return self._arguments
        return self._arguments | arguments_of(chat.template_arguments)

    def _check_head(self, text: str, limits: RequestLimits) -> None:
        """Check only the first tokens of a text that is many times longer than the context."""
        characters = _HEAD * limits.context_length
        if len(text) > _LONG * limits.context_length:
            limits.check_min_prompt(len(self._tokenizer.encode_text(text[:characters])) - _UNSETTLED)

    def _check_bytes(self, text: str, limits: RequestLimits) -> None:
        """Check the number of tokens that the bytes of a text prove."""
        if self._bound is not None:
            limits.check_min_prompt(self._bound.min_tokens(text))


def _turns(chat: pb.Chat) -> Turns:
    return [
        Turn(
            _ROLES.get(role := message.role, role),
            message.content,
            message.name,
            message.tool_call_id,
            tuple(
                Call(call.name, arguments_of_call(call, place, number), call.id)
                for number, call in enumerate(message.tool_calls)
            ),
            message.reasoning,
        )
        for place, message in enumerate(chat.messages)
    ]


def _tools(chat: pb.Chat) -> Tools:
    return [
        Tool(tool.name, tool.description, parameters_of_tool(tool, place))
        for place, tool in enumerate(chat.tools)
    ]
