"""Show what the worker is doing: its streams, its credit, and every sequence under way."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice

import grpc

from headrace.runtime.interceptors import Activity
from headrace.runtime.vitals import vitals
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.admin_service_pb2_grpc import AdminServiceServicer
from headrace.worker.stream import Flight, Session
from headrace.worker.streams import Sessions

LISTED = 100


class AdminServicer(AdminServiceServicer):
    """Answers people who want to look inside.

    sessions   the streams; None while the model loads
    describe   the model, as batchers are told of it
    """

    def __init__(
        self,
        worker_id: str,
        incarnation: int,
        sessions: Callable[[], Sessions | None],
        describe: Callable[[Sessions], wire.ModelDescription],
        activity: Activity,
    ) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._sessions = sessions
        self._describe = describe
        self._activity = activity

    async def Inspect(
        self, request: admin.InspectRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> admin.InspectResponse:
        """Everything as it is now."""
        state = admin.WorkerState(worker_id=self._worker_id, incarnation=self._incarnation)
        if (sessions := self._sessions()) is not None:
            now = time.monotonic()
            state.draining = sessions.draining
            state.live = sessions.live
            state.capacity = sessions.capacity
            state.model.CopyFrom(self._describe(sessions))
            state.load.CopyFrom(sessions.load())
            state.streams.extend(_stream(session, now) for session in sessions.streams)
            flights = [
                (flight, session) for session in sessions.streams for flight in session.flights.values()
            ]
            flights.sort(key=lambda pair: pair[0].sequence.submitted)
            for flight, session in islice(flights, request.max_sequences or LISTED):
                state.sequences.append(_sequence(flight, session, now))
        return admin.InspectResponse(worker=state, vitals=vitals(self._activity))


def _stream(session: Session, now: float) -> admin.StreamState:
    return admin.StreamState(
        batcher_id=session.batcher_id,
        epoch=session.epoch,
        credit=wire.Credit(generation=session.generation, sequences=session.credit),
        sequences=len(session.flights),
        frames=session.frames,
        unacknowledged=session.frames - session.acked if session.window else 0,
        pending=len(session.pending),
        committed=session.stands(now).committed,
    )


def _sequence(flight: Flight, session: Session, now: float) -> admin.SequenceState:
    sequence = flight.sequence
    state = admin.SequenceState(
        request_id=flight.request_id,
        attempt=flight.attempt,
        offset=sequence.answered,
        place=session.batcher_id,
    )
    state.age.FromNanoseconds(max(int((now - sequence.submitted) * 1e9), 0))
    return state
