"""Serve the worker's debug endpoint: its streams, their credit, and every in-flight sequence."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice

import grpc

from headrace.runtime.process_info import process_state
from headrace.runtime.serving.active_requests import ActiveRequests
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.admin_service_pb2_grpc import AdminServiceServicer
from headrace.worker.sequences import InFlightSequence
from headrace.worker.stream import BatcherStream
from headrace.worker.streams import BatcherStreams

LISTED = 100


class AdminServicer(AdminServiceServicer):
    """Answers requests about the worker's state.

    streams    returns the streams; None while the model loads
    describe   returns the model's description, as batchers receive it
    """

    def __init__(
        self,
        worker_id: str,
        incarnation: int,
        streams: Callable[[], BatcherStreams | None],
        describe: Callable[[BatcherStreams], wire.ModelDescription],
        requests: ActiveRequests,
    ) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._streams = streams
        self._describe = describe
        self._requests = requests

    async def Inspect(
        self, request: admin.InspectRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin.InspectResponse:
        """Return the current state."""
        state = admin.WorkerState(worker_id=self._worker_id, incarnation=self._incarnation)
        if (streams := self._streams()) is not None:
            now = time.monotonic()
            state.draining = streams.draining
            state.in_flight = streams.in_flight
            state.capacity = streams.capacity
            state.model.CopyFrom(self._describe(streams))
            state.load.CopyFrom(streams.load())
            state.streams.extend(_stream(stream, now) for stream in streams)
            sequences = [(one, stream) for stream in streams for one in stream.in_flight.values()]
            sequences.sort(key=lambda pair: pair[0].spec.submitted)
            for sequence, stream in islice(sequences, request.max_sequences or LISTED):
                state.sequences.append(_sequence(sequence, stream, now))
        return admin.InspectResponse(worker=state, process_state=process_state(self._requests))


def _stream(stream: BatcherStream, now: float) -> admin.StreamState:
    return admin.StreamState(
        batcher_id=stream.batcher_id,
        epoch=stream.epoch,
        credit=wire.Credit(generation=stream.generation, sequences=stream.credit),
        sequences=len(stream.in_flight),
        frames=stream.frames,
        unacknowledged=stream.frames - stream.acked if stream.window else 0,
        pending=len(stream.pending),
        committed=stream.credit_state(now).committed,
    )


def _sequence(sequence: InFlightSequence, stream: BatcherStream, now: float) -> admin.SequenceState:
    state = admin.SequenceState(
        request_id=sequence.request_id,
        attempt=sequence.attempt,
        offset=sequence.answered,
        peer=stream.batcher_id,
    )
    state.age.FromNanoseconds(max(int((now - sequence.spec.submitted) * 1e9), 0))
    return state
