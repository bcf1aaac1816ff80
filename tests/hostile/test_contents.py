"""Messages, tokens and files of any content are accepted, or refused with the error that is meant for it."""

from __future__ import annotations

import json
import random
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from google.protobuf.message import DecodeError
from jwt.utils import base64url_decode

from headrace import errors
from headrace.bearer import AUTHORIZATION
from headrace.models.tokenizers.gguf import read_metadata
from headrace.runtime.security.caller_guard import Accepted, CallerGuard
from headrace.runtime.security.callers_file import parse
from headrace.runtime.security.guard import Peer
from headrace.runtime.security.jwks import KeySource
from headrace.runtime.security.watched_file import BadFile
from headrace.runtime.security.web_tokens import WebTokens, WebTokenVerifier
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from headrace.validation import check_feedback, check_request
from headrace.worker.engine.load.model_files import inspect
from headrace.worker.engine.load.refusals import LoadingError
from tests.hostile.conftest import SEED
from tests.hostile.contents import filled
from tests.hostile.fuzz import mutated, request
from tests.issuer import AUDIENCE, ISSUER, SigningKey, jwks
from tests.security import Callers

MESSAGES = 3_000
TOKENS = 3_000
FILES = 600
CALLER = Peer("ipv4:127.0.0.1:9")


@pytest.mark.parametrize("changed", ["filled", "mutated"])
def test_a_request_of_any_content_is_valid_or_an_invalid_request(changed: str) -> None:
    rng, seen, texts = random.Random(f"{SEED} {changed}"), Counter[str](), []
    for _ in range(MESSAGES):
        made = request(rng)
        if changed == "mutated":
            try:
                made.ParseFromString(mutated(rng, made.SerializeToString()))
            except DecodeError:
                seen["no message"] += 1
                continue
        else:
            made.MergeFrom(filled(rng, pb.GenerateRequest.DESCRIPTOR))
        try:
            check_request(made)
            seen["valid"] += 1
        except errors.InvalidRequest as error:
            seen[error.reason] += 1
            texts.append(error.message)

    assert len(seen) >= 3, seen
    # What they quote of the caller is short and cannot begin a line.
    assert all(len(text) < 1_000 and text.isprintable() for text in texts)


def test_feedback_of_any_content_is_valid_or_an_invalid_request() -> None:
    rng, seen, texts = random.Random(f"{SEED} feedback"), Counter[str](), []
    for _ in range(MESSAGES):
        made = routing.FeedbackRequest()
        made.MergeFrom(filled(rng, routing.FeedbackRequest.DESCRIPTOR))
        try:
            check_feedback(made)
            seen["valid"] += 1
        except errors.InvalidRequest as error:
            seen[error.reason] += 1
            texts.append(error.message)

    assert len(seen) >= 2, seen
    assert all(text.isprintable() for text in texts)


def header_of(rng: random.Random, right: str) -> list[tuple[str, str | bytes]]:
    """Return metadata that resembles the right `authorization: Bearer` and is not it."""
    scheme = rng.choice(("Bearer ", "bearer ", "Basic ", "Bearer", "", "Bearer  Bearer ", "\t"))
    kind = rng.randrange(6)
    if kind == 0:
        token = "".join(rng.choices(string.printable, k=rng.randrange(300)))
    elif kind == 1:
        token = right[: rng.randrange(len(right))]
    elif kind == 2:
        token = right + rng.choice(("=", ".", "x", "\0", "\n", "é"))
    elif kind == 3:
        at = rng.randrange(len(right))
        token = right[:at] + chr(ord(right[at]) ^ 1) + right[at + 1 :]
    elif kind == 4:
        return [(AUTHORIZATION, f"Bearer {right}"), (AUTHORIZATION, f"Bearer {right}")]
    else:
        return [(AUTHORIZATION, scheme.encode() + rng.randbytes(40))]
    return [(AUTHORIZATION, scheme + token)]


async def test_what_resembles_a_token_is_refused(tmp_path: Path) -> None:
    callers = Callers(tmp_path / "callers.toml")
    right = callers.add("search")
    listed = parse(callers.path.read_bytes())
    guard = CallerGuard("router", Accepted(callers=lambda: listed))
    rng = random.Random(f"{SEED} tokens")
    method = "/headrace.v1.GenerationService/Generate"
    assert (await guard.identify(method, [(AUTHORIZATION, f"Bearer {right}")], CALLER)).tenant == "search"

    for _ in range(TOKENS):
        sent = header_of(rng, right)
        with pytest.raises(errors.CredentialsInvalid) as refused:
            await guard.identify(method, sent, CALLER)
        assert right not in refused.value.message


async def test_what_resembles_a_jwt_is_refused(tmp_path: Path) -> None:
    key = SigningKey("k1")
    (path := tmp_path / "jwks.json").write_bytes(jwks(key))
    source = KeySource(str(path))
    source.load()
    verifier = WebTokenVerifier(WebTokens(ISSUER, AUDIENCE), source)
    right = key.token()
    rng = random.Random(f"{SEED} jwt")
    assert (await verifier.identify(right)).tenant == "search"

    for _ in range(TOKENS // 3):
        token = mutated(rng, right.encode()).decode("latin-1")
        if _content(token) == _content(right):
            continue  # the same bytes in another spelling of base64
        with pytest.raises(errors.CredentialsInvalid):
            await verifier.identify(token)


def _content(token: str) -> list[bytes] | None:
    """Return the bytes of a JWT's parts; None if they are not base64."""
    try:
        return [base64url_decode(part) for part in token.encode("latin-1").split(b".")]
    except ValueError:
        return None


def test_a_damaged_file_of_callers_is_a_bad_file(tmp_path: Path) -> None:
    callers = Callers(tmp_path / "callers.toml")
    for number in range(3):
        callers.add(f"caller-{number}", scopes=["generate"], quota="gold")
    data, rng, seen = callers.path.read_bytes(), random.Random(f"{SEED} callers"), Counter[str]()
    for _ in range(FILES):
        try:
            parse(mutated(rng, data))
            seen["usable"] += 1
        except BadFile:
            seen["bad"] += 1

    assert seen["bad"] > FILES / 10


def safetensors(**tensors: int) -> bytes:
    """Return a file of safetensors with float32 vectors of these lengths."""
    header, end = dict[str, Any](__metadata__={"format": "pt"}), 0
    for name, length in tensors.items():
        entry = {"dtype": "F32", "shape": [length], "data_offsets": [end, end + 4 * length]}
        header[name], end = entry, end + 4 * length
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


@pytest.mark.parametrize("damaged", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_damaged_file_of_a_model_is_a_loading_error(damaged: str, tmp_path: Path) -> None:
    """Before any library reads it."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    weights = "part.safetensors" if damaged.endswith("index.json") else "model.safetensors"
    (tmp_path / weights).write_bytes(safetensors(a=6, b=1))
    if weights == "part.safetensors":
        index = {"weight_map": {"a": weights, "b": weights}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    inspect(tmp_path)
    path = tmp_path / damaged
    data, rng, seen = path.read_bytes(), random.Random(f"{SEED} {damaged}"), Counter[str]()
    for _ in range(FILES):
        path.write_bytes(mutated(rng, data))
        try:
            inspect(tmp_path)
            seen["read"] += 1
        except LoadingError:
            seen["refused"] += 1

    assert seen["refused"] > FILES / 10


def test_a_damaged_gguf_file_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "<|end|>"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    data, rng, seen = path.read_bytes(), random.Random(f"{SEED} gguf"), Counter[str]()
    for _ in range(FILES):
        path.write_bytes(mutated(rng, data))
        try:
            read_metadata(path)
            seen["read"] += 1
        except ValueError:
            seen["refused"] += 1

    assert seen["refused"] > FILES / 10
