"""`headrace chat` without a prompt: a conversation in the terminal, with ratings of answers."""

from __future__ import annotations

import asyncio
import re
import sys
import uuid
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

from headrace import errors
from headrace.cli.answers import Answer, printable
from headrace.cli.calls.chat import print_answer, request_for, stderr_console
from headrace.cli.calls.routing import feedback_result
from headrace.cli.complaints import advice, complain
from headrace.runtime.telemetry.setup import telemetry

if TYPE_CHECKING:
    from headrace.cli.calls.chat import ChatOptions
    from headrace.cli.calls.connection import Connection
    from headrace.client import Client

HELP = "/good or /bad rates the last answer, /new starts over; Ctrl-C cancels an answer, Ctrl-D exits."


def conversation(options: ChatOptions) -> None:
    """Converse until Ctrl-D. Ctrl-C cancels the current answer and keeps its text."""
    with suppress(ImportError):
        import readline  # noqa: F401 - adds line editing to input()
    _note(HELP)
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        conversation = _Conversation(runner, runner.run(_open(stack, options.connection)), options)
        interrupted = False
        try:
            while True:
                # Ctrl-C must not end the conversation at any point: a second one may come while the first is
                # handled.
                try:
                    if interrupted:
                        interrupted = False
                        _note("\n(Ctrl-D exits)")
                    conversation.handle(input("> ").strip())
                except EOFError:
                    _note("")
                    return
                except KeyboardInterrupt:
                    interrupted = True
        finally:
            runner.run(stack.aclose())


async def _open(stack: AsyncExitStack, connection: Connection) -> Client:
    await stack.enter_async_context(telemetry("client"))
    return await stack.enter_async_context(connection.open())


class _Conversation:
    """The turns of a conversation, and its last answer.

    A conversation has a session id: the router can move it to a larger tier, but not back to a smaller one,
    where the model would have to compute all turns again.
    """

    def __init__(self, runner: asyncio.Runner, client: Client, options: ChatOptions) -> None:
        self._runner = runner
        self._client = client
        self._options = options
        self._begin()

    def _begin(self) -> None:
        self._turns: list[tuple[str, str]] = []
        self._last = Answer()
        self._session = str(uuid.uuid4())

    def handle(self, line: str) -> None:
        """Execute a command, or send a line as the next prompt."""
        match line:
            case "":
                pass
            case "/new":
                self._begin()
            case "/good" | "/bad":
                self._rate(ok=line == "/good")
            case _ if re.fullmatch(r"/\w*", line):
                _note(HELP if line == "/help" else f"unknown command {line}; {HELP}")
            case _:
                self._ask(line)

    def _ask(self, prompt: str) -> None:
        """Send the next turn. A prompt without an answer is not kept."""
        turns = [*self._turns, ("user", prompt)]
        answer = Answer()
        try:
            request = request_for(turns, self._options, session=self._session)
            self._runner.run(print_answer(self._client, request, self._options, answer))
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            _note("(cancelled)")
        except errors.HeadraceError as error:
            self._complain(error, answer)
        finally:
            if answer.text:
                self._turns = [*turns, ("assistant", answer.text)]
                self._last = answer

    def _rate(self, *, ok: bool) -> None:
        """Send feedback on the last answer."""
        answer = self._last
        if not answer.answer_id:
            _note("no answer to rate yet" if not answer.request_id else "no router gave this answer")
            return
        try:
            response = self._runner.run(self._client.feedback(answer_id=answer.answer_id, ok=ok))
        except KeyboardInterrupt:
            _note("(cancelled)")
        except errors.HeadraceError as error:
            self._complain(error, answer)
        else:
            _note(f"answer {printable(answer.answer_id)}, {feedback_result(response)}")

    def _complain(self, error: errors.HeadraceError, answer: Answer) -> None:
        complain(advice(error, self._options.connection.target))
        if answer.request_id:
            _note(f"request {printable(answer.request_id)}")


def _note(line: str) -> None:
    stderr_console().print(line, style="dim", markup=False, soft_wrap=True)
