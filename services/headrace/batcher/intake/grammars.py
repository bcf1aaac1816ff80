"""Check the grammars of answers before their requests are accepted, and name the field of a problem."""

from __future__ import annotations

from collections.abc import Sequence

from headrace import errors
from headrace.batcher.text.tokens import Tokenizer, token_texts
from headrace.batcher.tools.form import AnswerForm
from headrace.batcher.tools.forms import form_of
from headrace.grammars.checker import Checker, Tokens
from headrace.grammars.problems import MAX_GRAMMAR, FormProblem
from headrace.v1 import generation_pb2 as pb

_ARGUMENTS = "arguments_"  # the parts of a grammar for the arguments of tools, as `tools.calls` names them


def grammar_field(request: pb.GenerateRequest) -> str:
    """Return the field because of which the answer has a grammar; empty: it has none."""
    if (kind := request.sampling.WhichOneof("structured")) is not None:
        return f"sampling.{kind}"
    chat = request.chat
    return "chat.tools" if chat.tools and chat.tool_choice.mode != pb.TOOL_MODE_NONE else ""


class GrammarCheck:
    """Makes the forms of answers, and checks their grammars. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._checker = Checker(self._tokens)

    def start(self) -> None:
        """Start the process that checks grammars now rather than for the first one; see `Checker.start`."""
        self._checker.start()

    def close(self) -> None:
        """End that process."""
        self._checker.close()

    def form_of(self, request: pb.GenerateRequest, prompt_ids: Sequence[int]) -> AnswerForm:
        """Return the form of an answer, unchecked but for its size. Fast for requests without a grammar only.

        Raises InvalidRequest as of `tools.forms.form_of`, and for a grammar that no worker would accept.
        """
        form = form_of(request, self._tokenizer, prompt_ids)
        grammar = form.grammar
        if len(grammar) > MAX_GRAMMAR or 4 * len(grammar) > MAX_GRAMMAR < len(grammar.encode()):
            raise error_of(request, FormProblem("it becomes too large a grammar: make it smaller"))
        return form

    def known(self, request: pb.GenerateRequest, form: AnswerForm) -> bool:
        """Whether the grammar of *form* needs no check. Raises InvalidRequest if it is known not to work."""
        if not form.grammar:
            return True
        if not self._checker.is_known(form.grammar):
            return False
        self.check(request, form)
        return True

    def check(self, request: pb.GenerateRequest, form: AnswerForm) -> None:
        """Check the grammar of *form*. Blocks. Raises InvalidRequest."""
        try:
            self._checker.check(form.grammar)
        except FormProblem as problem:
            raise error_of(request, problem) from None

    def _tokens(self) -> Tokens:
        tokenizer = self._tokenizer
        return token_texts(tokenizer, range(tokenizer.vocabulary_size)), tokenizer.special_tokens


def error_of(request: pb.GenerateRequest, problem: FormProblem) -> errors.InvalidRequest:
    """Return the error for a problem in the grammar of the answer to *request*."""
    error, field = errors.InvalidRequest, grammar_field(request)
    if problem.part.startswith(_ARGUMENTS):
        field = f"chat.tools[{_tool(request.chat, int(problem.part.removeprefix(_ARGUMENTS)))}].parameters"
    elif field.startswith("sampling."):
        error = errors.InvalidSampling
    return error(problem.about(field), field=field)


def _tool(chat: pb.Chat, number: int) -> int:
    """Return the place in `chat.tools` of the tool with this number among those that may be called."""
    if name := chat.tool_choice.name:
        return next((place for place, tool in enumerate(chat.tools) if tool.name == name), 0)
    return number
