"""Lay out conversations by a model's chat template, which is tried when it is loaded.

The template runs in a process of its own (`rendering`). Templates differ in what they take: some want a
message's content as text, some as a list of parts, some know no system messages. What one leaves out
without an error would be lost without a word, so each new sequence of roles is tried with marks for
contents first. It does not know tokens; `tokens` turns what comes out into ids.
"""

from __future__ import annotations

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

Turns = Sequence[tuple[str, str]]  # (role, content), oldest first

_PARTS = "parts"
_TEXT = "text"
_TRIALS: tuple[tuple[str, ...], ...] = (("user",), ("system", "user"), ("user", "assistant", "user"))
log = logging.getLogger(__name__)

_MARK = re.compile(r"7\d{6}3")
_SHAPES = 256  # sequences of roles that are remembered
_INSTEAD = "send `prompt` instead of `chat`, or give the model another template"


class Refused(Exception):
    """The template raised an error of its own, in its own words."""


class Failed(Exception):
    """The template does not work on these messages; the message says how."""


class Renderer:
    """A template in a process of its own. Safe to use from several threads; one rendering at a time."""

    def __init__(self, template: str, tokens: Mapping[str, Any]) -> None:
        self._start = {"template": template, "tokens": dict(tokens)}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Any = None

    def render(self, messages: list[dict[str, Any]], *, opening: bool) -> str:
        """The text of *messages*, with the opening of an answer if asked for. Raises Refused or Failed."""
        with self._lock:
            answer = self._ask({"messages": messages, "opening": opening})
        if "refused" in answer:
            raise Refused(answer["refused"])
        if "failed" in answer:
            raise Failed(answer["failed"])
        return str(answer["text"])

    def close(self) -> None:
        """End the process; the next rendering starts another."""
        if self._end is not None:
            self._end()
        self._process = None

    def _ask(self, frame: dict[str, Any]) -> dict[str, Any]:
        answer = None
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            rendering.send(process.stdin, frame)
            answer = rendering.receive(process.stdout)
        except BrokenPipeError:
            pass  # it ended before it had read all
        if answer is None:
            code = process.wait()
            self.close()
            if code == -signal.SIGPROF:
                return {"failed": f"it does not finish within {rendering.CPU_SECONDS:g} s of CPU time"}
            return {"failed": f"the process that renders it ended with status {code}"}
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            process = subprocess.Popen(
                # -P: the folder of the script holds a queue.py, which is not Python's
                [sys.executable, "-P", str(Path(rendering.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C is for this process, which ends the other
            )
            self._process, self._end = process, weakref.finalize(self, _end, process)
            assert process.stdin is not None
            rendering.send(process.stdin, self._start)
        return self._process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()  # closes the pipes, too


class ChatTemplate:
    """A template, and the form in which it takes each role's content.

    source    the template's text
    frame     what it wrote in trials
    problem   why it lays out no conversation at all; empty if it works
    """

    def __init__(self, source: str, tokens: Mapping[str, Any]) -> None:
        self._renderer = Renderer(source, tokens)
        self._forms: dict[str, str] = {}
        self.source = source
        self.frame = ""
        self.problem = ""
        for roles in _TRIALS:
            if not self.problem:
                self._choose_form(roles)
        self._left_out = lru_cache(_SHAPES)(self._try)

    def render(self, turns: Turns, *, opening: bool = True) -> str:
        """The text of *turns*, with the opening of the answer if asked for.

        Raises InvalidRequest where the template refuses the turns, fails on them, or leaves one out.
        """
        if self.problem:
            raise errors.InvalidRequest(
                f"the model's chat template does not work: {self.problem}; {_INSTEAD}", field="chat"
            )
        try:
            text = self._renderer.render(self._messages(turns), opening=opening)
        except Refused as error:
            raise errors.InvalidRequest(
                f"the model's chat template refuses these messages: {error}", field="chat.messages"
            ) from error
        except Failed as error:
            raise errors.InvalidRequest(
                f"the model's chat template fails on these messages: {error}; {_INSTEAD}",
                field="chat.messages",
            ) from error
        if (place := self._left_out(tuple(role for role, _ in turns))) is not None:
            role = turns[place][0]
            raise errors.InvalidRequest(
                f"the model's chat template leaves out chat.messages[{place}], of role {role!r}: it takes no "
                "such message there; put its text into another one",
                field=f"chat.messages[{place}]",
            )
        return text

    def _choose_form(self, roles: tuple[str, ...]) -> None:
        """Find out how the role that is new in *roles* wants its content."""
        new = next(role for role in roles if role not in self._forms)
        problem = ""
        for form in (_TEXT, _PARTS):
            self._forms[new] = form
            try:
                text, place = self._marked(roles)
                if place is None:
                    self.frame += text
                    return
                problem = problem or f"it leaves out the message of role {roles[place]!r}"
            except (Refused, Failed) as error:
                problem = problem or str(error)
        self._forms[new] = self._forms.get("user", _TEXT)
        if roles == ("user",):
            self.problem = problem

    def _try(self, roles: tuple[str, ...]) -> int | None:
        try:
            return self._marked(roles)[1]
        except (Refused, Failed):
            return None  # it says so itself where that happens to real messages

    def _marked(self, roles: tuple[str, ...]) -> tuple[str, int | None]:
        """Try marks for contents. Returns the text, and the place of the first message that is not in it."""
        marks = [f"7{place:06d}3" for place in range(len(roles))]
        text = self._renderer.render(self._messages(list(zip(roles, marks, strict=True))), opening=True)
        found = set(_MARK.findall(text))
        return text, next((place for place, mark in enumerate(marks) if mark not in found), None)

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


def choose_template(templates: Mapping[str, str], tokens: Mapping[str, Any]) -> ChatTemplate | None:
    """The template for conversations: the one called "default", or else the first that works.

    templates   by name, in the order of the model's file
    tokens      see `Renderer`

    A template that does not work is logged, and returned if there is no other; None if there is none at all.
    """
    names = ["default"] if "default" in templates else list(templates)
    chosen = None
    for name in names:
        template = ChatTemplate(templates[name], tokens)
        if not template.problem:
            return template
        log.warning("chat template does not work", extra={"template": name, "problem": template.problem})
        chosen = chosen or template
    return chosen
