"""No call stops the server."""

from __future__ import annotations

import pytest

from headrace.runtime.serving import accept_loop
from tests.harness import Mesh, collect, prompt
from tests.runtime.serving.by_hand import VALID, status


@pytest.mark.parametrize(
    "path", [b"/\xff\xfe/x", b"/headrace.v1.GenerationService/\xc3", b"\xff", b"/", b"//"]
)
async def test_a_path_that_is_not_utf_8_does_not_stop_the_server(small: Mesh, path: bytes) -> None:
    assert accept_loop.GUARDED
    assert await status(small.port, path, VALID) == "UNIMPLEMENTED"

    assert (await collect(small.client, prompt("still there"))).text == "still there"
