"""Answer /v1/models, and pin requests to the model that they name.

The names of models are "auto", with which the router decides, those of the tiers, and those of their models.
A tier's name takes precedence over a model's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from headrace.client import Client
from headrace.gateway.http.exchange import Exchange
from headrace.gateway.problems import Problem
from headrace.quoting import quoted
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing_pb

AUTO = "auto"
FRESH_SECONDS = 1.0  # a list of tiers is used for so long, and one call serves all that wait for it
SHOWN = 20  # names in an error message


class Models:
    """The models that the mesh serves, as its router reports them."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._tiers: tuple[routing_pb.Tier, ...] = ()
        self._names: dict[str, pb.Routing] = {}
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._created = int(time.time())

    async def pin(self, name: str | None, *, metadata: Mapping[str, str]) -> pb.Routing:
        """Return the routing of a request that names a model. Raises Problem for an unknown one.

        A name that was known before needs no call: the router rejects it if it is not served any more.
        """
        if name is None or name == AUTO:
            return pb.Routing()
        if name not in self._names:
            await self._refresh(metadata)
        if (known := self._names.get(name)) is None:
            if all(tier.model for tier in self._tiers):
                raise self._unknown(name)
            known = pb.Routing(
                model=name
            )  # perhaps that of a tier that was not reached yet: the router decides
        routing = pb.Routing()
        routing.CopyFrom(known)
        return routing

    async def pin_ids(self, routing: pb.Routing, *, metadata: Mapping[str, str]) -> None:
        """Pin the routing of a request with token ids, which are valid for one model only. Raises Problem."""
        if routing.tier or routing.model:
            return
        await self._refresh(metadata)
        models = {model for tier in self._tiers for model in _models_of(tier)}
        if len(models) > 1:
            raise self._several("token ids are valid for one model only")
        if models and all(tier.model for tier in self._tiers):
            routing.model = models.pop()  # otherwise the router knows more, or rejects them

    async def list(self, exchange: Exchange) -> None:
        """Answer /v1/models."""
        await self._refresh(exchange.metadata)
        data = [self._entry(name) for name in (AUTO, *self._names)]
        await exchange.reply({"object": "list", "data": data})

    async def show(self, exchange: Exchange) -> None:
        """Answer /v1/models/{name}."""
        name = exchange.path_params["name"]
        await self._refresh(exchange.metadata)
        if name != AUTO and name not in self._names:
            raise self._unknown(name)
        await exchange.reply(self._entry(name))

    def _entry(self, name: str) -> dict[str, object]:
        routing = self._names.get(name, pb.Routing())
        served_by = [
            tier
            for tier in self._tiers
            if routing.tier in ("", tier.name) and routing.model in ("", *_models_of(tier))
        ]
        lengths = [tier.limits.context_length for tier in served_by if tier.limits.context_length]
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "headrace",
            "max_model_len": max(lengths, default=None),
        }

    async def _refresh(self, metadata: Mapping[str, str]) -> None:
        """Read the tiers, unless they were read a moment ago. Raises a HeadraceError."""
        if time.monotonic() - self._read_at < FRESH_SECONDS:
            return
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(metadata))
            # Its error is that of all who wait; nobody may be left.
            self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        # Shielded: a caller that leaves does not cancel what others wait for.
        await asyncio.shield(self._reading)

    async def _read(self, metadata: Mapping[str, str]) -> None:
        self._tiers = tuple((await self._client.list_tiers(metadata=metadata)).tiers)
        names = {tier.name: pb.Routing(tier=tier.name) for tier in self._tiers}
        for tier in self._tiers:
            for model in _models_of(tier):
                names.setdefault(model, pb.Routing(model=model))
        names.pop(AUTO, None)
        self._names = names
        self._read_at = time.monotonic()

    def _several(self, reason: str) -> Problem:
        return Problem(
            400,
            f"{reason}, and this server has several: set model to one of {_shown(list(self._names))}",
            code="model_required",
            param="model",
        )

    def _unknown(self, name: str) -> Problem:
        return Problem(
            404,
            f"the model {quoted(name)} does not exist: use one of {_shown([AUTO, *self._names])}",
            code="model_not_found",
            param="model",
        )


def _models_of(tier: routing_pb.Tier) -> tuple[str, ...]:
    """Return the models of a tier: several, if it is another router."""
    return tuple(name for name in tier.model.split(",") if name)


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(quoted(known) for known in names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
