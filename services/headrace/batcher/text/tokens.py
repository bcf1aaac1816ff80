"""Turn text into token ids and back.

The methods of a tokenizer are synchronous and may be slow: callers run `encode_*` off the event loop, unless
the request is quick.
`detokenizer` decodes streams of ids from the spelling of single tokens; `models.tokenizers` reads tokenizers
from files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from headrace import errors
from headrace.batcher.text.bytebound import ByteBound, byte_bound
from headrace.batcher.text.detokenizer import EACH_BYTE, Spelling
from headrace.batcher.text.specials import Marks, SpecialTokens, encode
from headrace.batcher.text.templates import ChatTemplate, choose_template
from headrace.batcher.tools.families import Family
from headrace.batcher.turns import Tools, Turns, changed_tool, changed_turn, texts_of
from headrace.models import ModelUnavailable
from headrace.models.tokenizers.files import read_tokenizer
from headrace.models.tokenizers.spelling import TokenSpelling
from headrace.template_arguments import NO_ARGUMENTS, Arguments, texts_in, with_texts

# Up to this length the event loop spends about as much on encoding a text as on handing it to a thread: with
# the tokenizers of the default models 0.1 ms for words, and 0.25 ms for random characters.
QUICK_BYTES = 512
THINK = ("<think>", "</think>")
AUTO = "auto"
_TOGETHER = 256  # tokens that are spelled without a pause, which takes about half a millisecond


class Tokenizer(Spelling, Protocol):
    """One model's tokens and chat template. Safe to use from several threads.

    quick_text_bytes   a text of at most this many bytes is encoded in well below a millisecond, without
                       waiting for anything, so that it is encoded on the event loop; 0: none is
    quick_chat_bytes   the same for a chat
    vocabulary_size    all ids are below this
    tool_family        the format in which the model writes calls of tools
    reasoning          the markers around what the model thinks before its answer; None: it has none
    """

    quick_text_bytes: int
    quick_chat_bytes: int
    vocabulary_size: int
    tool_family: Family
    reasoning: tuple[str, str] | None

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokenizers; compared with the fingerprint that a worker reports for its model."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Names and ids of the tokens that have no text."""
        ...

    @property
    def roles(self) -> Mapping[str, str]:
        """Names of special tokens by their purpose, such as "eos_token"."""
        ...

    @property
    def chat_template(self) -> str:
        """The chat template in Jinja; empty without one."""
        ...

    def encode_chat(
        self,
        turns: Turns,
        *,
        tools: Tools = (),
        continue_final: bool = False,
        generation_prompt: bool = True,
        arguments: Arguments = NO_ARGUMENTS,
    ) -> list[int]:
        """Return the ids of a chat. Raises InvalidRequest.

        tools               the tools that the model may call
        continue_final      the answer continues the last turn, instead of starting a new one after it
        generation_prompt   whether the start of that new turn follows the others
        arguments           variables of the chat template

        No text of turns, tools and arguments becomes a special token.
        """
        ...

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of raw text, by default with the special tokens that the model expects in front.

        The text may name other special tokens.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of *ids*, with the names of special tokens; unknown ids have no text."""
        ...


def stop_ids(tokenizer: Tokenizer, stops: Sequence[str]) -> dict[int, str]:
    """Return the ids of stop texts that name a special token, and the name of each.

    Raises InvalidSampling for a stop text that contains such a name among other text: no answer contains it.
    """
    special = tokenizer.special_tokens
    for stop in stops:
        if stop not in special and (name := next((name for name in special if name in stop), None)):
            raise errors.InvalidSampling(
                f"sampling.stop has {stop!r}, in which {name!r} is a special token of this model: it has no "
                f"text in an answer; give {name!r} alone, or its id {special[name]} in stop_token_ids",
                field="sampling.stop",
            )
    return {special[stop]: stop for stop in stops if stop in special}


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    """Return the bytes of each token's text in UTF-8, of which one character may have several tokens.

    The text of a special token is its name.
    """
    names = {id: name.encode() for name, id in tokenizer.special_tokens.items()}
    texts: list[bytes] = []
    after = None
    for id in ids:
        if not len(texts) % _TOGETHER:
            time.sleep(0)  # other threads, such as the event loop, get the interpreter's lock
        if (text := names.get(id)) is None:
            piece = tokenizer.spell(id, after)
            text = piece.encode() if isinstance(piece, str) else piece
            after = id if text else after
        texts.append(text)
    return texts


@runtime_checkable
class Bounded(Protocol):
    """An optional interface of tokenizers: proof from the bytes of a text that it has too many tokens.

    bound   the bound for all texts; None: no bound is known
    """

    @property
    def bound(self) -> ByteBound | None:
        """The bound for all texts."""
        ...

    def render_chat(
        self,
        turns: Turns,
        *,
        tools: Tools = (),
        continue_final: bool = False,
        arguments: Arguments = NO_ARGUMENTS,
    ) -> str:
        """Return the text that `encode_chat` encodes. Raises InvalidRequest."""
        ...


class ByteTokenizer:
    """One id per byte of UTF-8: the tokenizer of the echo engine, which needs no files.

    tool_format   the value of a `Family`, or "auto": Hermes
    reasoning     as of `TransformersTokenizer`; "auto": no markers
    """

    fingerprint = "bytes-1"
    bound: ByteBound | None = ByteBound(1)
    decode_errors = "replace"
    special_tokens: Mapping[str, int] = {}
    roles: Mapping[str, str] = {}
    chat_template = ""
    quick_text_bytes = quick_chat_bytes = QUICK_BYTES
    vocabulary_size = 256

    tool_family = Family.HERMES
    reasoning: tuple[str, str] | None = None

    def __init__(self, *, tool_format: str = AUTO, reasoning: str = AUTO) -> None:
        if tool_format != AUTO:
            self.tool_family = Family(tool_format)
        if reasoning == "think":
            self.reasoning = THINK

    def render_chat(
        self,
        turns: Turns,
        *,
        tools: Tools = (),
        continue_final: bool = False,
        arguments: Arguments = NO_ARGUMENTS,
    ) -> str:
        """Return the content of the last turn: an echo does not need the others."""
        return turns[-1].content

    def encode_chat(
        self,
        turns: Turns,
        *,
        tools: Tools = (),
        continue_final: bool = False,
        generation_prompt: bool = True,
        arguments: Arguments = NO_ARGUMENTS,
    ) -> list[int]:
        """See `Tokenizer`."""
        return self.encode_text(self.render_chat(turns))

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the bytes of *text*."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return bytes(id for id in ids if id < 256).decode(errors=self.decode_errors)

    def spell(self, id: int, after: int | None) -> bytes:
        """Return the byte; ids above 255 are special."""
        return bytes([id]) if id < 256 else b""


class TransformersTokenizer:
    """A tokenizer read from a model's files.

    fast       its `tokenizers.Tokenizer`, which this object takes over and changes
    template   its chat template; None without one
    roles      names of special tokens by their purpose
    reasoning  "think": the model thinks between <think> and </think>; "off": it marks no thoughts; "auto":
               the first if the template or the tokenizer has these markers
    """

    quick_text_bytes = QUICK_BYTES
    quick_chat_bytes = 0  # another process renders it

    def __init__(
        self,
        fast: Any,
        template: ChatTemplate | None,
        fingerprint: str,
        roles: Mapping[str, str] | None = None,
        *,
        reasoning: str = AUTO,
    ) -> None:
        fast.no_truncation()  # which some files enable
        fast.no_padding()
        self._fast = fast
        self.vocabulary_size = fast.get_vocab_size(with_added_tokens=True)
        self._template = template
        self._fingerprint = fingerprint
        self.roles = roles or {}
        self.chat_template = template.source if template else ""
        self.tool_family = template.family if template else Family.JSON
        self.reasoning = _reasoning(reasoning, fast, self.chat_template)
        description = json.loads(fast.to_str())
        self.bound = byte_bound(description)
        self._specials = SpecialTokens(fast, description, template.frame if template else "")
        self._spelling = TokenSpelling(fast)
        self.spell = self._spelling.spell
        self.decode_errors = "replace" if self._spelling.byte_level else EACH_BYTE

    @property
    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return self._fingerprint

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """See `Tokenizer`."""
        return self._spelling.special_tokens

    def render_chat(
        self,
        turns: Turns,
        *,
        tools: Tools = (),
        continue_final: bool = False,
        arguments: Arguments = NO_ARGUMENTS,
    ) -> str:
        """See `Bounded`. Raises InvalidRequest for turns that the template does not accept."""
        template = self._chat_template
        turns = template.completed(turns)
        marks = self._specials.marks([template.source, *texts_of(turns, tools), *texts_in(arguments)])
        return _render(template, turns, tools, marks, arguments, continue_final=continue_final)

    def encode_chat(
        self,
        turns: Turns,
        *,
        tools: Tools = (),
        continue_final: bool = False,
        generation_prompt: bool = True,
        arguments: Arguments = NO_ARGUMENTS,
    ) -> list[int]:
        """See `Tokenizer`. Raises InvalidRequest for turns that the template does not accept."""
        template, specials = self._chat_template, self._specials
        turns = template.completed(turns)
        contents = [*texts_of(turns, tools), *texts_in(arguments)]
        marks = specials.marks([template.source, *contents])
        render = partial(
            _render, template, continue_final=continue_final, generation_prompt=generation_prompt
        )
        text = render(turns, tools, marks, arguments)
        if not specials.may_occur_in(contents):
            return specials.encode(text, marks)
        for names_only in (False, True):
            mark = partial(specials.mark, marks=marks, names_only=names_only)
            rendered = render(
                [changed_turn(turn, mark) for turn in turns],
                [changed_tool(tool, mark) for tool in tools],
                marks,
                with_texts(arguments, mark),
            )
            if marks.removed_from(rendered) == text:
                break  # otherwise the template searches for one of the marked letters
        return specials.encode(rendered, marks)

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See `Tokenizer`."""
        return encode(self._fast, text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        # `decode` itself would hold the interpreter's lock.
        return str(self._fast.decode_batch([ids], skip_special_tokens=False)[0])

    @property
    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise errors.InvalidRequest(
                "this model has no chat template: send `prompt` instead of `chat`", field="chat"
            )
        return self._template


def _render(
    template: ChatTemplate,
    turns: Turns,
    tools: Tools,
    marks: Marks,
    arguments: Arguments,
    *,
    continue_final: bool,
    generation_prompt: bool = True,
) -> str:
    """Return the text of the turns up to the start of the answer."""
    if not continue_final:
        return template.render(
            turns, tools=tools, add_generation_prompt=generation_prompt, arguments=arguments
        )
    *before, last = turns
    text = template.render(
        [*before, replace(last, content=last.content + marks.end)],
        tools=tools,
        add_generation_prompt=False,
        arguments=arguments,
    )
    if marks.end not in text:
        raise errors.InvalidRequest(
            "the model's chat template changes the end of the last message, so it cannot be continued: send "
            "`prompt`, or leave out continue_final_message",
            field="chat.continue_final_message",
        )
    return text[: text.rindex(marks.end)]


def _reasoning(wanted: str, fast: Any, template: str) -> tuple[str, str] | None:
    """Return the markers of thoughts, see `TransformersTokenizer`."""
    added = {token.content for token in fast.get_added_tokens_decoder().values()}
    thinks = THINK[1] in template or added.issuperset(THINK)
    return THINK if wanted == "think" or (wanted == AUTO and thinks) else None


def load_tokenizer(
    path: Path, cache: Path, *, tool_format: str = AUTO, reasoning: str = AUTO
) -> TransformersTokenizer:
    """Return the tokenizer of the model at *path*, a folder or a .gguf file.

    cache         the folder where the tokenizer of a .gguf is stored, because its extraction takes seconds
    tool_format   the value of a `Family`, or "auto": as the chat template writes calls
    reasoning     as of `TransformersTokenizer`

    Raises ModelUnavailable for files without a usable tokenizer, in one line that names the file, and for a
    chat template that does not write tools in another format than JSON, if one is set.
    """
    read = read_tokenizer(path, cache)
    family = None if tool_format == AUTO else Family(tool_format)
    template = choose_template(read.templates, read.special_tokens, family)
    if template and family and template.family is not family:
        raise ModelUnavailable(
            f"HEADRACE_TOOL_FORMAT (or --tool-format) is {tool_format!r}, but the chat template of "
            f"{path} does not render tools and their calls: set json or auto"
        )
    roles = {role: str(name) for role, name in read.special_tokens.items() if isinstance(name, str)}
    return TransformersTokenizer(read.backend, template, read.fingerprint, roles, reasoning=reasoning)
