"""The turns to score are taken from the texts that the check of the request has decoded."""

from headrace.router.answering.prompts import turns_of
from headrace.routing.scoring.conversation import TURNS, Turn
from headrace.v1 import generation_pb2 as pb
from headrace.validation import check_request


def test_texts_that_the_check_has_read_are_not_decoded_again() -> None:
    chat = pb.Chat(messages=[pb.Message(role="user", content="a"), pb.Message(role="assistant", content="b")])
    assert turns_of(pb.GenerateRequest(chat=chat), {0: "read"}) == [
        Turn("user", "read"),
        Turn("assistant", "b"),
    ]
    assert turns_of(pb.GenerateRequest(prompt="a"), {0: "read"}) == [Turn("user", "read")]


def test_the_turns_are_the_last_ones_of_the_chat_in_order() -> None:
    messages = [
        pb.Message(role="assistant" if place % 2 else "user", content=str(place)) for place in range(99)
    ]
    request = pb.GenerateRequest(chat=pb.Chat(messages=messages))
    turns = turns_of(request, check_request(request))
    assert [turn.text for turn in turns] == [str(place) for place in range(99 - TURNS, 99)]
    assert [turn.role for turn in turns] == ["assistant" if int(turn.text) % 2 else "user" for turn in turns]


def test_a_developer_is_the_system_and_token_ids_have_no_turns() -> None:
    """The system's text is not read, and a tool's result is not the user's."""
    roles = ("developer", "user", "assistant", "tool")
    messages = [pb.Message(role=role, content=role) for role in roles]
    request = pb.GenerateRequest(chat=pb.Chat(messages=messages))
    read = [(turn.role, turn.text) for turn in turns_of(request, check_request(request))]

    assert read == [("user", "user"), ("assistant", "assistant"), ("tool", "tool")]
    ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]))
    assert turns_of(ids, check_request(ids)) == []
