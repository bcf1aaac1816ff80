"""Callers with credentials, and every RPC, for the tests of who may call what."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from headrace import errors, statuses
from headrace.channel import open_channel
from headrace.runtime.security.callers_file import entry_for, new_token
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import multiplex_pb2 as multiplex
from headrace.v1 import quota_service_pb2 as quotas
from headrace.v1 import routing_service_pb2 as routing
from headrace.v1 import tokenizer_service_pb2 as tokens
from headrace.v1 import worker_service_pb2 as worker
from tests.harness import PATIENCE

_GENERATION, _ROUTING = "/headrace.v1.GenerationService", "/headrace.v1.RoutingService"
_TOKENIZER = "/headrace.v1.TokenizerService"
_REFLECTION = "ServerReflection/ServerReflectionInfo"
_PROMPT = pb.GenerateRequest(prompt="hi", sampling=pb.Sampling(max_tokens=1))
_HELLO = multiplex.MultiplexRequest(hello=multiplex.MultiplexHello(caller_id="test", epoch=1))

# Every RPC of every service, with a first message. It need not be valid: permission is decided before.
RPCS: dict[str, bytes] = {
    f"{_GENERATION}/Generate": _PROMPT.SerializeToString(),
    f"{_GENERATION}/Multiplex": _HELLO.SerializeToString(),
    f"{_ROUTING}/Explain": routing.ExplainRequest(request=_PROMPT).SerializeToString(),
    f"{_ROUTING}/ListTiers": b"",
    f"{_ROUTING}/Feedback": routing.FeedbackRequest(request_id="none", ok=True).SerializeToString(),
    f"{_TOKENIZER}/Tokenize": tokens.TokenizeRequest(prompt="hi").SerializeToString(),
    f"{_TOKENIZER}/Detokenize": tokens.DetokenizeRequest(token_ids=[1]).SerializeToString(),
    f"{_TOKENIZER}/CountTokens": tokens.CountTokensRequest(prompt="hi").SerializeToString(),
    f"{_TOKENIZER}/GetTokenizer": b"",
    "/headrace.v1.QuotaService/Lease": quotas.LeaseRequest().SerializeToString(),
    "/headrace.v1.AdminService/Inspect": admin.InspectRequest().SerializeToString(),
    "/headrace.v1.WorkerService/Run": worker.RunRequest().SerializeToString(),
    "/headrace.v1.WorkerService/GetModel": b"",
    f"/grpc.reflection.v1.{_REFLECTION}": b"\x3a\x00",  # list_services: ""
    f"/grpc.reflection.v1alpha.{_REFLECTION}": b"\x3a\x00",
    "/grpc.channelz.v1.Channelz/GetServers": b"",
    "/grpc.health.v1.Health/Check": b"",
    "/grpc.health.v1.Health/Watch": b"",
}


REFUSED = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)


class Callers:
    """A file of callers, and their tokens by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens: dict[str, str] = {}
        path.write_text("")

    def add(self, name: str, **grant: Any) -> str:
        """Add a caller, and return its token."""
        self.tokens[name] = token = new_token()
        grant.setdefault("tenant", name)
        with self.path.open("a") as file:
            file.write(entry_for(token, name=name, **grant))
        return token


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata that carries a token."""
    return (("authorization", f"Bearer {token}"),)


async def verdict(
    channel: grpc.aio.Channel, method: str, message: bytes = b"", metadata: Sequence[tuple[str, str]] = ()
) -> errors.HeadraceError | None:
    """Call *method*; return the error if it is refused for lack of permission or not offered, else None.

    Whatever else happens to a call that is permitted does not matter.
    """
    # Not a stream of requests: the status of one that ends during a write is lost.
    start: Any = channel.unary_stream(method)
    call = start(message, metadata=tuple(metadata), timeout=PATIENCE)
    try:
        with suppress(grpc.aio.AioRpcError):
            if await call.read() is not grpc.aio.EOF:
                return None
        if await call.code() not in REFUSED:
            return None
        return statuses.from_rpc_error(
            grpc.aio.AioRpcError(
                await call.code(),
                await call.initial_metadata(),
                await call.trailing_metadata(),
                await call.details(),
            )
        )
    finally:
        call.cancel()


async def verdicts(port: int, metadata: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """Return for every RPC "ok", or the reason for which the plaintext server on *port* refuses it."""
    async with open_channel(f"127.0.0.1:{port}") as channel:
        found = {}
        for method, message in RPCS.items():
            error = await verdict(channel, method, message, metadata)
            found[method] = "ok" if error is None else error.reason
        return found
