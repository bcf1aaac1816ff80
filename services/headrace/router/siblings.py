"""Pass messages between the processes of one router: what all must know, and questions that others answer.

A connection is served by one process, a caller's next connection perhaps by another one. So all processes
learn the last score and tier of a conversation, feedback is passed to the process that gave the answer, and
the bill is that of all processes. Messages are datagrams on socket pairs that exist before the processes do.
They are lost while a process restarts or if its inbox is full; nothing waits longer than `ASK_SECONDS` for an
answer.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from typing import Any, Self

from headrace import errors
from headrace.router.state.conversations import Conversations
from headrace.routing.scoring.conversation import Earlier

log = logging.getLogger(__name__)

ASK_SECONDS = 0.5
RESEND_SECONDS = 0.01  # after which a question is sent again to a sibling whose inbox was full
_MAX_BYTES = 64 * 1024  # of a datagram
_PER_WAKE = 64  # datagrams that are read before other tasks continue

Tell = Callable[..., None]
Answer = Callable[..., Awaitable[Any]]
Inboxes = tuple[tuple[socket.socket, socket.socket], ...]


class Siblings:
    """The other processes of this router, as one of them sees them; none for a router of one process.

    number    of this process, from 0
    inboxes   of all processes: where each receives, and where the others send
    """

    def __init__(self, number: int = 0, inboxes: Inboxes = ()) -> None:
        self.number = number
        self._inbox = inboxes[number][0] if inboxes else None
        self._outboxes = {place: send for place, (_, send) in enumerate(inboxes) if place != number}
        self._told: dict[str, Tell] = {}
        self._asked: dict[str, Answer] = {}
        self._questions: dict[int, _Question] = {}
        self._ids = itertools.count()

    def on_tell(self, topic: str, receive: Tell) -> None:
        """Call *receive* with the values that siblings send about *topic*."""
        self._told[topic] = receive

    def on_ask(self, topic: str, answer: Answer) -> None:
        """Answer questions about *topic* with the result of *answer*: a value, None, or a HeadraceError."""
        self._asked[topic] = answer

    def tell(self, topic: str, *values: object) -> None:
        """Send *values* to all siblings, without waiting."""
        for place in self._outboxes:
            self._send(place, ("tell", topic, values))

    async def ask(self, topic: str, *values: object) -> Any:
        """Return the first answer of a sibling that is not None; None if there is none in time.

        Raises the HeadraceError with which a sibling answers.
        """
        answers = await self._ask(topic, values, enough=1)
        return answers[0] if answers else None

    async def ask_all(self, topic: str, *values: object) -> list[Any]:
        """Return the answers of all siblings that answer in time and not with None."""
        return await self._ask(topic, values, enough=len(self._outboxes))

    async def ask_one(self, number: int, topic: str, *values: object) -> Any:
        """Return the answer of the sibling with that number; None if there is none in time.

        Raises the HeadraceError with which it answers.
        """
        answers = await self._ask(topic, values, enough=1, of=(number,))
        return answers[0] if answers else None

    async def _ask(
        self, topic: str, values: tuple[object, ...], *, enough: int, of: Collection[int] | None = None
    ) -> list[Any]:
        """Wait for *enough* answers that are not None, at most until all have answered, or those *of*."""
        number = next(self._ids)
        question = self._questions[number] = _Question(enough)
        try:
            message = ("ask", topic, values, self.number, number)
            places = list(self._outboxes if of is None else of)
            question.missing = len(places)
            if full := [place for place in places if not self._send(place, message)]:
                await asyncio.sleep(RESEND_SECONDS)
                question.missing -= sum(not self._send(place, message) for place in full)
            if question.missing:
                with suppress(TimeoutError):
                    async with asyncio.timeout(ASK_SECONDS):
                        await question.settled.wait()
        finally:
            del self._questions[number]
        if (failure := question.failure) is not None:
            raise failure
        return question.answers

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[Self, None]:
        """Receive messages while the block runs."""
        if self._inbox is None:
            yield self
            return
        loop, inbox = asyncio.get_running_loop(), self._inbox
        async with asyncio.TaskGroup() as answering:
            loop.add_reader(inbox.fileno(), self._receive, inbox, answering)
            try:
                yield self
            finally:
                loop.remove_reader(inbox.fileno())

    def _send(self, place: int, message: tuple[object, ...]) -> bool:
        """Send a message to a process; return whether its inbox had space."""
        with suppress(OSError):
            self._outboxes[place].send(pickle.dumps(message))
            return True
        return False

    def _receive(self, inbox: socket.socket, answering: asyncio.TaskGroup) -> None:
        with suppress(BlockingIOError):
            for _ in range(_PER_WAKE):
                # Only the processes of this router have the other end, so unpickling is safe.
                kind, *content = pickle.loads(inbox.recv(_MAX_BYTES))
                if kind == "tell":
                    topic, values = content
                    self._told[topic](*values)
                elif kind == "ask":
                    answering.create_task(self._answer(*content))
                else:
                    number, answer = content
                    if number in self._questions:  # else it came too late
                        self._questions[number].add(answer)

    async def _answer(self, topic: str, values: tuple[object, ...], asker: int, number: int) -> None:
        answer: object = None
        try:
            answer = await self._asked[topic](*values)
        except errors.HeadraceError as error:
            answer = error
        except Exception:
            log.exception("question of a sibling failed", extra={"topic": topic})
        self._send(asker, ("answer", number, answer))


class _Question:
    """A question to several siblings, and what they have answered.

    missing   number of siblings that have not answered
    """

    def __init__(self, enough: int) -> None:
        self.answers: list[Any] = []
        self.failure: errors.HeadraceError | None = None
        self.missing = 0
        self.settled = asyncio.Event()
        self._enough = enough

    def add(self, answer: object) -> None:
        self.missing -= 1
        if isinstance(answer, errors.HeadraceError):
            self.failure = answer
        elif answer is not None:
            self.answers.append(answer)
        if self.failure is not None or not self.missing or len(self.answers) >= self._enough:
            self.settled.set()


class SharedConversations(Conversations):
    """Conversations that the siblings know as well."""

    def __init__(self, siblings: Siblings, *, idle_seconds: float) -> None:
        super().__init__(idle_seconds=idle_seconds)
        self._siblings = siblings
        siblings.on_tell("conversation", super().record)

    def record(self, tenant: str, session: str, earlier: Earlier, now: float) -> None:
        """Record it here and in the siblings."""
        super().record(tenant, session, earlier, now)
        if session:
            self._siblings.tell("conversation", tenant, session, earlier, now)


def inboxes(count: int) -> Inboxes:
    """Return the inboxes of *count* processes, to be made before these are forked."""
    pairs = tuple(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(count))
    for pair in pairs:
        for end in pair:
            end.setblocking(False)
    return pairs
