"""Make requests."""

from __future__ import annotations

from collections.abc import Sequence

from headrace import errors
from headrace.v1 import generation_pb2 as pb


def chat(
    text: str | Sequence[tuple[str, str]],
    *,
    system: str = "",
    continue_final_message: bool = False,
    **sampling: object,
) -> pb.GenerateRequest:
    """Return a request for the answer to *text*, or to a conversation of (role, content) pairs.

    continue_final_message   whether the answer continues the last message, which must be the assistant's
    sampling                 fields of `headrace.v1.Sampling`, such as temperature=0, max_tokens=64,
                             stop=["\\n"]

    Raises InvalidText for text with lone surrogates, which result from decoding bytes of another encoding.
    """
    turns = [("user", text)] if isinstance(text, str) else list(text)
    if system:
        turns.insert(0, ("system", system))
    request = pb.GenerateRequest(sampling=pb.Sampling(**sampling))  # type: ignore[arg-type]
    for role, content in turns:
        try:
            request.chat.messages.add(role=role, content=content)
        except UnicodeEncodeError as error:
            raise errors.InvalidText(f"the text is not valid UTF-8 from character {error.start} on") from None
    if continue_final_message:
        request.chat.continue_final_message = True
    return request
