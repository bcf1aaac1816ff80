"""Servers describe all their services by reflection, in both versions."""

from __future__ import annotations

import pytest
from grpc_reflection.v1alpha import reflection_pb2

from headrace.channel import open_channel
from tests.harness import Mesh


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_and_describes_every_service(mesh: Mesh, version: str) -> None:
    expected = {
        mesh.port: "headrace.v1.RoutingService",
        mesh.tiers["small"].batcher.server.port: "headrace.v1.GenerationService",
        mesh.tiers["small"].worker.server.port: "headrace.v1.WorkerService",
    }
    for port, service in expected.items():
        async with open_channel(f"127.0.0.1:{port}") as channel:
            ask = channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            listing = reflection_pb2.ServerReflectionRequest(list_services="")
            replies = [reply async for reply in ask(iter([listing]))]
            names = {entry.name for entry in replies[0].list_services_response.service}
            assert {service, "grpc.health.v1.Health", "grpc.channelz.v1.Channelz"} <= names
            questions = [
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in names
            ]
            described = [reply async for reply in ask(iter(questions))]
            assert all(reply.file_descriptor_response.file_descriptor_proto for reply in described)
