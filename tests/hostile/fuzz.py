"""Attacks with malformed input: random bytes, invalid requests and invalid calls."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import Any

from google.protobuf.message import Message
from grpc_channelz.v1.channelz_pb2 import DESCRIPTOR as CHANNELZ
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from headrace.client import chat
from headrace.runtime.serving.reflection import REFLECTION_V1
from headrace.v1 import (
    admin_service_pb2,
    generation_service_pb2,
    quota_service_pb2,
    routing_service_pb2,
    worker_service_pb2,
)
from headrace.v1 import generation_pb2 as pb
from tests.hostile.attack import Attack, attack
from tests.hostile.wire import (
    DATA,
    END_STREAM,
    GENERATE,
    PREFACE,
    SETTINGS,
    Header,
    frame,
    headers,
    message,
    peer,
)

FILES = (
    generation_service_pb2.DESCRIPTOR,
    routing_service_pb2.DESCRIPTOR,
    admin_service_pb2.DESCRIPTOR,
    worker_service_pb2.DESCRIPTOR,
    quota_service_pb2.DESCRIPTOR,
    health_pb2.DESCRIPTOR,
    reflection_pb2.DESCRIPTOR,
    CHANNELZ,
)
SERVICES: list[Any] = [each for file in FILES for each in file.services_by_name.values()]
METHODS = [
    *(f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods),
    f"/{REFLECTION_V1}/ServerReflectionInfo",
]


def request(rng: random.Random) -> pb.GenerateRequest:
    """Return a valid request with most of its fields set."""
    made = chat(
        [("system", "be brief"), ("user", "what is " + "x" * rng.randrange(200))],
        max_tokens=rng.randrange(1, 8),
        temperature=rng.random(),
        top_p=0.9,
        seed=rng.getrandbits(60),
        stop=["stop", "\n\n"],
    )
    made.request_id = f"fuzz-{rng.randrange(50)}"
    made.routing.tenant = "fuzz"
    made.routing.session_id = f"s{rng.randrange(50)}"
    made.routing.priority = rng.randrange(10)
    made.stream.include_token_ids = True
    return made


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Return *data* with a few bytes changed, removed, repeated or inserted."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(out) + 1)
        what = rng.randrange(4)
        if what == 0 and at < len(out):
            out[at] = rng.randrange(256)
        elif what == 1:
            out[at:at] = rng.randbytes(rng.randrange(1, 6))
        elif what == 2:
            del out[at : at + rng.randrange(1, 6)]
        else:
            out[at:at] = out[at : at + rng.randrange(1, 20)]
    return bytes(out)


def wild(rng: random.Random, message: Message) -> Message:
    """Put extreme values into *message*: NaN, infinities, the ends of each type."""
    for field, value in message.ListFields():
        if field.is_repeated or rng.random() < 0.5:
            continue
        if field.message_type is not None:
            wild(rng, value)
        elif field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
            setattr(message, field.name, rng.choice((float("nan"), float("inf"), -1e38, 1e-39, 0.0)))
        elif field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_INT32):
            setattr(message, field.name, rng.choice((0, 1, 2**31 - 1)))
        elif field.cpp_type in (field.CPPTYPE_UINT64, field.CPPTYPE_INT64):
            setattr(message, field.name, rng.choice((0, 1, 2**63 - 1)))
        elif field.cpp_type == field.CPPTYPE_STRING:
            setattr(message, field.name, rng.choice(("", "\0", "\u202e\U0001f600" * 50, "a" * 5000)))
    return message


@attack
async def any_bytes_to_every_method(run: Attack) -> None:
    """Send random bytes, empty messages and invalid UTF-8 to the methods of all services."""
    rng = run.rng
    while not run.over:
        async with peer(run.port, source=run.source) as one:
            streams = []
            for method in METHODS:
                for _ in range(3):
                    body = rng.choice(
                        (rng.randbytes(rng.randrange(300)), b"", b"\x0a\x02\xff\xfe", b"\xff" * 40)
                    )
                    streams.append(await one.call(headers(method, timeout="2S"), message(body)))
            await one.answered(streams)
            run.count(one, streams)


@attack
async def almost_valid_requests(run: Attack) -> None:
    """Send valid requests with changed bytes, and with numbers at the ends of their types."""
    rng = run.rng
    async with peer(run.port, source=run.source) as one:
        while not run.over and not one.closed.is_set():
            streams = []
            for _ in range(50):
                made = request(rng)
                if rng.random() < 0.5:
                    data = wild(rng, made).SerializeToString()
                else:
                    data = mutated(rng, made.SerializeToString())
                method = GENERATE
                if rng.random() < 0.2:
                    method = "/headrace.v1.RoutingService/Explain"
                    data = b"\x0a" + varint(len(data)) + data
                streams.append(await one.call(headers(method, timeout="2S"), message(data)))
            await one.answered(streams)
            run.count(one, streams)


def varint(number: int) -> bytes:
    """Encode a number as protobuf does."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


@attack
async def odd_calls(run: Attack) -> None:
    """Send invalid paths, encodings, timeouts and metadata; too many messages, or none."""
    valid = message(chat("x", max_tokens=2).SerializeToString())
    paths: list[bytes] = [
        b"/\xff\xfe/x", b"\xff", b"", b"/", b"//", b"/" + b"a" * 3000, b"/headrace.v1.GenerationService/\xc3",
        b"/headrace.v1.GenerationService/Generate/", b"/headrace.v1.GenerationService/generate", b"*",
    ]  # fmt: skip
    mores: list[list[Header]] = [
        [("grpc-encoding", encoding)] for encoding in ("gzip", "deflate", "br", "\0", "identity,gzip")
    ]
    mores += [
        [("traceparent", "00-" + "f" * 300)], [("traceparent", b"\xff\xfe")], [("tracestate", "=,;" * 200)],
        [("x-bin", "!!not base64!!")], [("x-note", b"\xff\xfe")], [("grpc-status", "0")], [("X-Upper", "v")],
        [("te", "gzip")], [("grpc-trace-bin", "AAAA")], [("x-empty", "")], [("user-agent", "\x1b[31mred")],
        [("x-request-id", "a\nb")], [("authorization", b"Bearer \xff")], [("content-length", "-5")],
    ]  # fmt: skip
    bodies: list[bytes | None] = [
        b"", b"\0", valid[:3], valid[:-1], valid * 3, valid + b"\0\0", b"\x02" + valid[1:],
        b"\0\xff\xff\xff\xff" + b"x" * 50, message(b"x" * 10, compressed=True), None,
    ]  # fmt: skip
    timeouts = ("0n", "-1S", "99999999H", "1", "S", "abc", "100000000000S", "1n")
    kinds = ("application/json", "text/html", "application/grpc+json", "application/grpc-web", "\0")
    while not run.over:
        calls: list[tuple[list[Header], bytes | None]] = [
            (headers(path, timeout="2S"), valid) for path in paths
        ]
        calls += [(headers(GENERATE, *more, timeout="2S"), valid) for more in mores]
        calls += [(headers(GENERATE, timeout="1S"), body) for body in bodies]
        calls += [(headers(GENERATE, timeout=timeout), valid) for timeout in timeouts]
        for kind in kinds:
            fields = [each for each in headers(GENERATE, timeout="2S") if each[0] != "content-type"]
            calls.append(([*fields, ("content-type", kind)], valid))
        calls += [([(key, value) for key, value in headers(GENERATE) if key != left], valid)
                  for left in (":method", ":path", ":scheme", "te", "content-type")]  # fmt: skip
        run.rng.shuffle(calls)
        for fields, body in calls:  # a connection each: some of these end it
            async with peer(run.port, source=run.source) as one:
                stream = await one.call(fields, body)
                await one.answered([stream], seconds=4)
                run.count(one, [stream])


@attack
async def any_frames(run: Attack) -> None:
    """Send frames of random kinds, flags, streams and lengths, after a valid preface or none."""
    rng = run.rng
    beginnings = (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"SSH-2.0\r\n",
        PREFACE[:10], b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", b"\0" * 100,
    )  # fmt: skip
    while not run.over:
        reader, writer = await asyncio.open_connection("127.0.0.1", run.port, local_addr=(run.source, 0))
        with suppress(ConnectionError, TimeoutError):
            if rng.random() < 0.2:
                writer.write(rng.choice(beginnings) + rng.randbytes(rng.randrange(200)))
            else:
                writer.write(PREFACE + frame(SETTINGS))
                for _ in range(rng.randrange(1, 40)):
                    payload = rng.randbytes(rng.choice((0, 1, 4, 8, 60, 1000)))
                    stream = rng.choice((0, 1, 2, 3, 5, 2**31 - 1))
                    writer.write(frame(rng.randrange(12), rng.randrange(256), stream, payload))
            await asyncio.wait_for(writer.drain(), 1)
            await asyncio.wait_for(reader.read(100), 0.05)
        writer.close()
        run.outcomes["sent"] += 1


@attack
async def streams_that_stay(run: Attack) -> None:
    """Open calls of every method that never send their message, or never end."""
    async with peer(run.port, source=run.source) as one:
        streams = []
        for method in METHODS * 12:
            if one.closed.is_set():
                break
            stream = await one.call(headers(method, timeout="1S"), None)
            if run.rng.random() < 0.5:
                await one.send(frame(DATA, 0, stream, b"\0\0\0\0"))
            elif run.rng.random() < 0.5:
                await one.send(frame(DATA, END_STREAM, stream, b""))
            streams.append(stream)
        await one.answered(streams, seconds=6)
        run.count(one, streams)
