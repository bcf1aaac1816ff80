"""Call a mesh as the systems under test are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from benchmarks.serving.workload import Request
from headrace.client import Client
from headrace.v1 import generation_pb2 as pb


class Mesh:
    """Headrace as deployed: a gRPC client of router, batcher and worker processes."""

    def __init__(self, client: Client, pids: Sequence[int], versions: Mapping[str, str]) -> None:
        self._client = client
        self._times: Counter[int] = Counter()
        self.pids = pids
        self.versions = versions

    async def generate(self, request: Request) -> AsyncGenerator[Sequence[int], None]:
        """Stream the answer; see `systems.Running`.

        No request is sent twice for a tenant, because speculative decoding would repeat its first answer.
        """
        self._times[request.id] += 1
        asked = pb.GenerateRequest(
            prompt=request.prompt,
            sampling=pb.Sampling(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True),
            stream=pb.StreamOptions(include_token_ids=True),
            routing=pb.Routing(tenant=f"repetition {self._times[request.id]}"),
        )
        async with aclosing(self._client.generate(asked, timeout=600)) as stream:
            async for response in stream:
                yield response.delta.token_ids
