"""Render chats with a model's chat template, which is tested when it is loaded.

The template runs in a separate process (`rendering`). Templates differ in what they accept: some expect the
content of a message as text, some as a list of parts, and some support no system messages. A message that a
template drops without an error would be lost silently, so each new sequence of roles is first tried with
markers for contents, and again with each new set of arguments. This module does not know tokens; `tokens`
turns the rendered text into ids.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from headrace import errors
from headrace.batcher.text import rendering
from headrace.batcher.tools.families import Family, family_of
from headrace.template_arguments import FIELD, NO_ARGUMENTS, Arguments

Turns = Sequence[tuple[str, str]]  # (role, content), oldest first

_PARTS = "parts"
_TEXT = "text"
_TRIALS: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("user", "assistant", "tool"),
)
log = logging.getLogger(__name__)

_MARKER = re.compile(r"7\d{6}3")
_MAX_REMEMBERED = 256  # sequences of roles, with arguments of up to 16 KiB
_INSTEAD = "send `prompt` instead of `chat`, or give the model another template"


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
        arguments: Arguments = NO_ARGUMENTS,
    ) -> str:
        """Return the text of *messages*, by request with the start of an answer.

        arguments   variables of the template, besides those that it always has

        Raises TemplateRefused or TemplateFailed.
        """
        with self._lock:
            response = self._call(
                {
                    "messages": messages,
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


class ChatTemplate:
    """A template, and the form in which it expects the content of each role.

    source    the template's text
    frame     the text that it wrote in trials
    problem   why it renders no chat at all; empty if it works
    family    the format in which the model writes calls of tools

    The last argument is the family; None: as the template writes calls.
    """

    def __init__(self, source: str, tokens: Mapping[str, Any], family: Family | None = None) -> None:
        self._renderer = Renderer(source, tokens)
        self._forms: dict[str, str] = {}
        self._tokens = frozenset(tokens)
        self.source = source
        self.frame = ""
        self.problem = ""
        self.family = family or family_of(source)
        for roles in _TRIALS:
            if not self.problem:
                self._choose_form(roles)
        self._dropped = lru_cache(_MAX_REMEMBERED)(self._try)

    def render(
        self, turns: Turns, *, add_generation_prompt: bool = True, arguments: Arguments = NO_ARGUMENTS
    ) -> str:
        """Return the text of *turns*, by default with the start of the answer.

        arguments   see `Renderer.render`

        Raises InvalidRequest if the template refuses the turns, fails on them, or drops one.
        """
        if self.problem:
            raise errors.InvalidRequest(
                f"the model's chat template does not work: {self.problem}; {_INSTEAD}", field="chat"
            )
        if tokens := self._tokens & arguments.keys():
            raise errors.InvalidRequest(
                f"{FIELD} sets {min(tokens)!r}, which is a special token of the model: leave it out",
                field=FIELD,
            )
        given = "these messages and template arguments" if arguments else "these messages"
        try:
            text = self._renderer.render(
                self._messages(turns), add_generation_prompt=add_generation_prompt, arguments=arguments
            )
        except TemplateRefused as error:
            raise errors.InvalidRequest(
                f"the model's chat template refuses {given}: {error}", field="chat.messages"
            ) from error
        except TemplateFailed as error:
            raise errors.InvalidRequest(
                f"the model's chat template fails on {given}: {error}; {_INSTEAD}", field="chat.messages"
            ) from error
        roles = tuple(role for role, _ in turns)
        if (place := self._dropped(roles, json.dumps(dict(arguments), sort_keys=True))) is not None:
            role = turns[place][0]
            raise errors.InvalidRequest(
                f"the model's chat template drops chat.messages[{place}], of role {role!r}: it supports no "
                "such message there; put its text into another message",
                field=f"chat.messages[{place}]",
            )
        return text

    def _choose_form(self, roles: tuple[str, ...]) -> None:
        """Determine in which form the role that is new in *roles* expects its content."""
        new = next(role for role in roles if role not in self._forms)
        problem = ""
        for form in (_TEXT, _PARTS):
            self._forms[new] = form
            try:
                text, place = self._render_markers(roles)
                if place is None:
                    self.frame += text
                    return
                problem = problem or f"it drops the message of role {roles[place]!r}"
            except (TemplateRefused, TemplateFailed) as error:
                problem = problem or str(error)
        self._forms[new] = self._forms.get("user", _TEXT)
        if roles == ("user",):
            self.problem = problem

    def _try(self, roles: tuple[str, ...], arguments: str) -> int | None:
        """Return the place of a message that is dropped; *arguments* are JSON."""
        try:
            return self._render_markers(roles, json.loads(arguments))[1]
        except (TemplateRefused, TemplateFailed):
            return None  # real messages of these roles raise the same error

    def _render_markers(
        self, roles: tuple[str, ...], arguments: Arguments = NO_ARGUMENTS
    ) -> tuple[str, int | None]:
        """Render markers as contents. Returns the text, and the place of the first message missing in it."""
        markers = [f"7{place:06d}3" for place in range(len(roles))]
        messages = self._messages(list(zip(roles, markers, strict=True)))
        text = self._renderer.render(messages, add_generation_prompt=True, arguments=arguments)
        found = set(_MARKER.findall(text))
        return text, next((place for place, marker in enumerate(markers) if marker not in found), None)

    def _messages(self, turns: Turns) -> list[dict[str, Any]]:
        return [
            {
                "role": role,
                "content": content
                if self._forms.get(role, _TEXT) == _TEXT
                else [{"type": "text", "text": content}],
            }
            for role, content in turns
        ]


def choose_template(
    templates: Mapping[str, str], tokens: Mapping[str, Any], family: Family | None = None
) -> ChatTemplate | None:
    """Return the template for chats: the one called "default", or otherwise the first that works.

    templates   by name, in the order of the model's file
    tokens      see `Renderer`
    family      see `ChatTemplate`

    A template that does not work is logged, and returned if there is no other. Returns None without
    templates.
    """
    names = ["default"] if "default" in templates else list(templates)
    chosen = None
    for name in names:
        template = ChatTemplate(templates[name], tokens, family)
        if not template.problem:
            return template
        log.warning("chat template does not work", extra={"template": name, "problem": template.problem})
        chosen = chosen or template
    return chosen
