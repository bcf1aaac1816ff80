"""Calls for whole answers: as one reply, or as an instance of a class."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Protocol, Self, TypeVar

from headrace import errors
from headrace.client.replies import Reply, gather
from headrace.v1 import generation_pb2 as pb


class Model(Protocol):
    """A class with a JSON schema, such as a pydantic model."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        """Return the schema of its instances as JSON."""
        ...

    @classmethod
    def model_validate_json(cls, json_data: str) -> Self:
        """Return an instance from JSON."""
        ...


_UNCHANGED = frozenset(("allOf", "const", "default", "enum", "examples"))
# With one of these, an object may have more properties than it lists.
_OTHERS = frozenset(("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"))

M = TypeVar("M", bound=Model)


class WholeAnswers(ABC):
    """The calls for whole answers, as a part of `Client`."""

    @abstractmethod
    def generate(
        self,
        request: pb.GenerateRequest,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """See `Client.generate`."""

    async def ask(
        self,
        request: pb.GenerateRequest,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Reply:
        """Return the whole answer to *request*. The arguments are those of `generate`."""
        async with aclosing(self.generate(request, timeout=timeout, metadata=metadata)) as stream:
            return await gather(stream)

    async def parse(
        self,
        request: pb.GenerateRequest,
        model: type[M],
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> M:
        """Return the answer to *request* as an instance of *model*, whose JSON schema the answer must match.

        model   a pydantic model, or another class with its `model_json_schema` and `model_validate_json`

        Objects have the properties of the schema only, unless it says something about others: a model could
        add them until the answer is cut off.

        Raises AnswerCutOff if the answer ended before it was complete, the errors of `generate`, and the
        model's own, such as pydantic's ValidationError, for conditions that its JSON schema does not contain.
        """
        made = pb.GenerateRequest()
        made.CopyFrom(request)
        made.sampling.json_schema = json.dumps(_closed(model.model_json_schema()), ensure_ascii=False)
        if made.chat.tools:  # the answer may not consist of calls
            made.chat.tool_choice.mode = pb.TOOL_MODE_NONE
        reply = await self.ask(made, timeout=timeout, metadata=metadata)
        try:
            return model.model_validate_json(reply.text)
        except ValueError:
            if reply.finish.reason == pb.FINISH_REASON_STOP:
                raise
        raise errors.AnswerCutOff(
            f"the answer ended with {_name(reply.finish.reason)} after "
            f"{reply.finish.usage.completion_tokens} tokens, before its JSON was complete: "
            "increase sampling.max_tokens, or remove sampling.stop",
            field="sampling.max_tokens",
        )


def _closed(schema: Any) -> Any:
    """Return a schema whose objects have no properties beyond those that are listed.

    Parts of `allOf` stay as they are: each of them would exclude the properties of the others.
    """
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: each if key in _UNCHANGED else _closed(each) for key, each in schema.items()}
    if schema.get("type") == "object" and "properties" in schema and not _OTHERS & schema.keys():
        closed["additionalProperties"] = False
    return closed


def _name(reason: pb.FinishReason.ValueType) -> str:
    return pb.FinishReason.Name(reason) if reason in pb.FinishReason.values() else str(reason)
