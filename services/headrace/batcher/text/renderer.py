"""Run a chat template in a separate process, which is started when it is needed.

`rendering` is what runs there. `templates` decides what a template receives.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.batcher.text import rendering
from headrace.template_arguments import NO_ARGUMENTS, Arguments


class TemplateRefused(Exception):
    """The template called `raise_exception`; the message is its own."""


class TemplateFailed(Exception):
    """The template does not work on these messages; the message describes the error."""


class Renderer:
    """A template in a separate process. Safe to use from several threads; renders one chat at a time."""

    def __init__(self, template: str, tokens: Mapping[str, Any]) -> None:
        self._start = {"template": template, "tokens": dict(tokens)}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Any = None

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
        arguments: Arguments = NO_ARGUMENTS,
    ) -> str:
        """Return the text of *messages*, by request with the start of an answer.

        tools       the tools that the model may call; None: it has none
        arguments   variables of the template, besides those that it always has

        Raises TemplateRefused or TemplateFailed.
        """
        with self._lock:
            response = self._call(
                {
                    "messages": messages,
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                    "arguments": dict(arguments),
                }
            )
        if "refused" in response:
            raise TemplateRefused(response["refused"])
        if "failed" in response:
            raise TemplateFailed(response["failed"])
        return str(response["text"])

    def close(self) -> None:
        """End the process; the next rendering starts a new one."""
        if self._end is not None:
            self._end()
        self._process = None

    def _call(self, frame: dict[str, Any]) -> dict[str, Any]:
        response = None
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            rendering.send(process.stdin, frame)
            response = rendering.receive(process.stdout)
        except BrokenPipeError:
            pass  # it ended before it had read the whole frame
        if response is None:
            code = process.wait()
            self.close()
            if code == -signal.SIGPROF:
                return {"failed": f"it does not finish within {rendering.CPU_SECONDS:g} s of CPU time"}
            return {"failed": f"the process that renders it ended with status {code}"}
        return response

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            process = subprocess.Popen(
                # -P: do not import from the folder of the script, whose modules may shadow Python's
                [sys.executable, "-P", str(Path(rendering.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C reaches only this process, which ends the other
            )
            self._process, self._end = process, weakref.finalize(self, _end, process)
            assert process.stdin is not None
            rendering.send(process.stdin, self._start)
        return self._process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()  # also closes the pipes
