"""Attacks with well-formed messages of any content, for every RPC: a message is filled field by field."""

from __future__ import annotations

import json
import random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from tests.hostile.attack import Attack, attack
from tests.hostile.fuzz import METHODS, SERVICES
from tests.hostile.wire import READS_ALL, Header, headers, message, peer

FORGED = {"time": "2026-01-01T00:00:00+0000", "level": "CRITICAL", "service": "router", "message": "forged"}
# Texts that do harm where they are written, compared, rendered or resolved without care.
TEXTS = (
    "",
    f"x\n{json.dumps(FORGED)}\n",
    f'"}}\r\n{json.dumps(FORGED)}',
    "\x1b[2J\x1b]0;title\x07\x1b[31mred",
    "\0",
    "\x85\u2028\u2029\u202e\ufeff",
    "\U0001f600" * 300,
    "a" * 5000,
    "%s%n%(level)s{0.__class__}",
    "{{ 7 * 7 }}{% for a in b %}",
    "../../../etc/passwd",
    "<|im_start|>system\n<|im_end|></s>",
    "'; DROP TABLE tenants; --",
    "user",
    "fuzz",
)
REALS = (0.0, -0.0, 1.0, -1.0, 1e-39, 1e38, -1e38, float("nan"), float("inf"), float("-inf"))
MOST_DEPTH = 6


def number(rng: random.Random, bits: int, *, signed: bool) -> int:
    """Return an integer of a type, mostly one that is small or at an end of the type."""
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return rng.choice((0, 1, 2, 5, 131, least, most, most - 1, rng.randrange(least, most)))


def scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    """Return a value for a field that holds no message."""
    kind = field.cpp_type
    if kind in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return rng.choice((*REALS, rng.random()))
    if kind == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == field.CPPTYPE_ENUM:
        assert field.enum_type is not None
        return rng.choice((*(value.number for value in field.enum_type.values), 99))
    if kind == field.CPPTYPE_STRING:
        return rng.randbytes(rng.randrange(50)) if field.type == field.TYPE_BYTES else rng.choice(TEXTS)
    wide = kind in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64)
    return number(rng, 64 if wide else 32, signed=kind in (field.CPPTYPE_INT32, field.CPPTYPE_INT64))


def filled(rng: random.Random, kind: Descriptor, depth: int = 0) -> Any:
    """Return a message of *kind* with about half of its fields set, to values of their types."""
    made = GetMessageClass(kind)()
    for field in kind.fields:
        if rng.random() < 0.5 or depth >= MOST_DEPTH:
            continue
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            key, value = inner.fields_by_name["key"], inner.fields_by_name["value"]
            if value.message_type is None:
                for _ in range(rng.randrange(4)):
                    getattr(made, field.name)[scalar(rng, key)] = scalar(rng, value)
        elif field.is_repeated:
            count = rng.choice((1, 1, 2, 3, 40))
            made_here = getattr(made, field.name)
            if inner is not None:
                made_here.extend(filled(rng, inner, depth + 1) for _ in range(min(count, 3)))
            else:
                made_here.extend(scalar(rng, field) for _ in range(count))
        elif inner is not None:
            getattr(made, field.name).CopyFrom(filled(rng, inner, depth + 1))
        else:
            setattr(made, field.name, scalar(rng, field))
    return made


def body(rng: random.Random, method: MethodDescriptor) -> bytes:
    """Return the messages of one call of *method*."""
    count = rng.randrange(1, 5) if method.client_streaming else 1
    return b"".join(message(filled(rng, method.input_type).SerializeToString()) for _ in range(count))


def metadata(rng: random.Random) -> list[Header]:
    """Return metadata that our services or gRPC may read, with values that nobody should send."""
    texts = ("a" * 500, json.dumps(FORGED), "Bearer " + "x" * 200, "Basic Og==", "%0a%0dforged", "..", "-1")
    names = ("authorization", "user-agent", "x-request-id", "tracestate", "baggage", "x-forwarded-for")
    return [(name, rng.choice(texts)) for name in names if rng.random() < 0.3]


@attack
async def any_contents_to_every_method(run: Attack) -> None:
    """Call every method with messages whose fields have any values of their types."""
    rng = run.rng
    methods: list[MethodDescriptor] = [method for service in SERVICES for method in service.methods]
    while not run.over:
        async with peer(run.port, source=run.source, settings=READS_ALL) as one:
            streams = []
            for method in methods:
                path = f"/{method.containing_service.full_name}/{method.name}"
                for _ in range(12):
                    fields = headers(path, *metadata(rng), timeout="1S")
                    streams.append(await one.call(fields, body(rng, method)))
            await one.answered(streams)
            run.count(one, streams)


@attack
async def nested_messages(run: Attack) -> None:
    """Call every method with messages that contain messages, 50 to 100,000 levels deep."""
    while not run.over:
        async with peer(run.port, source=run.source, settings=READS_ALL) as one:
            streams = []
            for method in METHODS * 2:
                depth = run.rng.choice((50, 99, 101, 1_000, 100_000))
                opening, closing = run.rng.choice(
                    ((b"\x0b", b"\x0c"), (b"\x7b", b"\x7c"), (b"\xfb\x7f", b""))
                )
                nested = opening * depth + closing * depth
                streams.append(await one.call(headers(method, timeout="2S"), message(nested)))
            await one.answered(streams)
            run.count(one, streams)
