"""Read the parts of calls of tools.

The contract is stricter than what servers send: calls follow each other, each has an id that is unique in its
conversation, and id and name come with its first part. Some servers repeat them, leave out ids or indices, or
give all calls the index 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from headrace.checks.conversations import MAX_CALL_ID, MAX_CALLS
from headrace.quoting import quoted
from headrace.upstream.api.malformed import Malformed, Unusable, list_in, object_in, text_in
from headrace.upstream.api.words import valid
from headrace.v1 import generation_pb2 as pb

MAX_ARGUMENTS = 1024 * 1024  # characters, of one call


class CallReader:
    """Reads the calls in the answer to *request*."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        chat = request.chat
        choice = chat.tool_choice
        one = choice.HasField("name") or (
            chat.HasField("parallel_tool_calls") and not chat.parallel_tool_calls
        )
        self._most = 1 if one else MAX_CALLS
        self._names: frozenset[str] = frozenset()
        if choice.HasField("name"):
            self._names = frozenset([choice.name])
        elif choice.mode != pb.TOOL_MODE_NONE:
            self._names = frozenset(tool.name for tool in chat.tools)
        # A stop text may end an answer before its call.
        self._required = not request.sampling.stop and (
            choice.HasField("name") or choice.mode == pb.TOOL_MODE_REQUIRED
        )
        self._ids = {call.id for message in chat.messages for call in message.tool_calls}
        self._made_from = f"{request.sampling.seed} {request.request_id} {len(chat.messages)}"
        self._begun = 0
        self._places: set[int] = set()  # the upstream's indices
        self._place: int | None = None  # that of the current call
        self._id = ""  # as the upstream sent it
        self._arguments: list[str] = []
        self._size = 0

    def read(self, parts: object) -> list[pb.ToolCallDelta]:
        """Return the parts of calls in an event. Raises Malformed."""
        return [part for each in list_in(parts, "calls") for part in self._read(object_in(each, "a call"))]

    def finish(self) -> list[pb.ToolCallDelta]:
        """Return the rest of the last call.

        Raises Unusable unless its arguments are a JSON object, and if a call that is required is missing.
        """
        if self._required and not self._begun:
            raise Unusable("an answer without the call of a tool that the request requires")
        return list(self._end())

    def _read(self, part: dict[str, Any]) -> Iterator[pb.ToolCallDelta]:
        function = object_in(part.get("function") or {}, "a function")
        name = valid(text_in(function.get("name"), "the name of a tool"))
        arguments = function.get("arguments")
        if isinstance(arguments, dict):  # from some servers, a whole object instead of its JSON
            arguments = json.dumps(arguments)
        arguments = valid(text_in(arguments, "arguments"))
        id = valid(text_in(part.get("id"), "the id of a call"))
        place = part.get("index")
        if place is not None and type(place) is not int:
            raise Malformed("a call with an index that is not an integer")
        if self._begins(place, id, name):
            yield from self._end()
            yield self._begin(place, id, name, arguments)
        elif not self._begun:
            raise Malformed("a call without the name of a tool")
        elif place is not None and place != self._place:
            raise Malformed("a part of a call that does not follow the parts before it")
        elif arguments:
            self._add(arguments)
            yield pb.ToolCallDelta(index=self._begun - 1, arguments=arguments)

    def _begins(self, place: int | None, id: str, name: str) -> bool:
        """Whether a part begins a call, instead of continuing the current one."""
        if not name:
            return False
        if not self._begun or (id and id != self._id):
            return True
        return not id if place is None else place != self._place

    def _begin(self, place: int | None, id: str, name: str, arguments: str) -> pb.ToolCallDelta:
        if name not in self._names:
            raise Unusable(f"a call of {quoted(name)}, which is no tool that the request lets it call")
        if self._begun >= self._most:
            raise Unusable(f"more calls than the {self._most} that the request lets it make")
        if place is not None and place in self._places and place != self._place:
            raise Malformed("a call with the index of an earlier one")
        if place is not None:
            self._places.add(place)
        self._place, self._id = place, id
        self._begun += 1
        self._arguments, self._size = [], 0
        self._add(arguments)
        index = self._begun - 1
        return pb.ToolCallDelta(index=index, id=self._unique(id, index), name=name, arguments=arguments)

    def _unique(self, id: str, index: int) -> str:
        """Return the id of a call: that of the upstream, unless it is empty, too long or taken."""
        number = 0
        while not id or len(id) > MAX_CALL_ID or id in self._ids:
            made = hashlib.blake2b(f"{self._made_from} {index} {number}".encode(), digest_size=12)
            id, number = f"call_{made.hexdigest()}", number + 1
        self._ids.add(id)
        return id

    def _add(self, arguments: str) -> None:
        self._size += len(arguments)
        if self._size > MAX_ARGUMENTS:
            raise Malformed(f"a call whose arguments have more than {MAX_ARGUMENTS} characters")
        self._arguments.append(arguments)

    def _end(self) -> Iterator[pb.ToolCallDelta]:
        """Check the current call, and complete one without arguments."""
        if not self._begun:
            return
        text = "".join(self._arguments)
        if not text or text.isspace():
            self._arguments = ["{}"]
            yield pb.ToolCallDelta(index=self._begun - 1, arguments="{}")
            return
        try:
            read = json.loads(text)
        except (ValueError, RecursionError):
            read = None
        if not isinstance(read, dict):
            raise Unusable(f"arguments of call {self._begun - 1} that are not a JSON object")
