"""`headrace chat` without a prompt: a conversation in the terminal, whose answers can be rated."""

from __future__ import annotations

import asyncio
import re
import sys
import uuid
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

from headrace import errors
from headrace.cli.answers import Answer, printable
from headrace.cli.chat import aside, request_for, say
from headrace.cli.complaints import advice, complain
from headrace.cli.routing import booked
from headrace.client import connect
from headrace.runtime.telemetry.setup import telemetry

if TYPE_CHECKING:
    from headrace.cli.chat import Wishes
    from headrace.client import Client

HELP = "/good or /bad rates the last answer, /new starts over; Ctrl-C stops an answer, Ctrl-D ends."


def conversation(wishes: Wishes) -> None:
    """Talk until Ctrl-D; Ctrl-C stops the answer under way and keeps what was said."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing
    _note(HELP)
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        talk = _Talk(runner, runner.run(_open(stack, wishes.target)), wishes)
        interrupted = False
        try:
            while True:
                # Whatever is being done or said: who presses Ctrl-C twice may mean the answer that has just
                # been stopped, or this very note.
                try:
                    if interrupted:
                        interrupted = False
                        _note("\n(Ctrl-D ends)")
                    talk.hear(input("> ").strip())
                except EOFError:
                    _note("")
                    return
                except KeyboardInterrupt:
                    interrupted = True
        finally:
            runner.run(stack.aclose())


async def _open(stack: AsyncExitStack, target: str) -> Client:
    await stack.enter_async_context(telemetry("client"))
    return await stack.enter_async_context(connect(target))


class _Talk:
    """What has been said, and the last answer.

    A conversation has a session of its own: the router moves it to a larger tier where a prompt asks for
    one, and not back down, where the model would have to read all of it again.
    """

    def __init__(self, runner: asyncio.Runner, client: Client, wishes: Wishes) -> None:
        self._runner = runner
        self._client = client
        self._wishes = wishes
        self._begin()

    def _begin(self) -> None:
        self._turns: list[tuple[str, str]] = []
        self._last = Answer()
        self._session = str(uuid.uuid4())

    def hear(self, said: str) -> None:
        """Do what a line asks for."""
        match said:
            case "":
                pass
            case "/new":
                self._begin()
            case "/good" | "/bad":
                self._rate(ok=said == "/good")
            case _ if re.fullmatch(r"/\w*", said):
                _note(HELP if said == "/help" else f"no command {said}; {HELP}")
            case _:
                self._ask(said)

    def _ask(self, said: str) -> None:
        """Take one turn; a question without an answer is as if it had not been said."""
        turns = [*self._turns, ("user", said)]
        answer = Answer()
        try:
            request = request_for(turns, self._wishes, session=self._session)
            self._runner.run(say(self._client, request, self._wishes, answer))
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            _note("(stopped)")
        except errors.HeadraceError as error:
            self._complain(error, answer)
        finally:
            if answer.text:
                self._turns = [*turns, ("assistant", answer.text)]
                self._last = answer

    def _rate(self, *, ok: bool) -> None:
        """Tell the router of the last answer."""
        answer = self._last
        if not answer.request_id:
            _note("there is no answer to rate yet")
            return
        try:
            said = self._runner.run(self._client.feedback(answer.request_id, ok=ok))
        except KeyboardInterrupt:
            _note("(stopped)")
        except errors.HeadraceError as error:
            self._complain(error, answer)
        else:
            _note(f"request {printable(answer.request_id)}, {booked(said)}")

    def _complain(self, error: errors.HeadraceError, answer: Answer) -> None:
        complain(advice(error, self._wishes.target))
        if answer.request_id:
            _note(f"request {printable(answer.request_id)}")


def _note(line: str) -> None:
    aside().print(line, style="dim", markup=False, soft_wrap=True)
