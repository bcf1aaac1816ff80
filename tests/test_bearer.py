"""Tokens that a client sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace import bearer
from headrace.bearer import MAX_TOKEN, BadToken, TokenFile, authorization_of, authorized, no_authorization


def test_a_token_is_read_again_when_its_file_changes(tmp_path: Path) -> None:
    path, now = tmp_path / "token", 0.0
    path.write_text("first\n")
    file = TokenFile(path, clock=lambda: now)
    assert file() == (("authorization", "Bearer first"),)

    path.write_text("second token\n")
    now += bearer.CHECK_SECONDS
    assert file() == (("authorization", "Bearer first"),), "it is not usable"
    path.write_text("third")
    assert file() == (("authorization", "Bearer first"),), "it was read just now"
    now += bearer.CHECK_SECONDS
    assert file() == (("authorization", "Bearer third"),)
    path.unlink()
    now += bearer.CHECK_SECONDS
    assert file() == (("authorization", "Bearer third"),)


@pytest.mark.parametrize("token", ["two words", "a\nb", "é", "x" * (MAX_TOKEN + 1)])
def test_what_cannot_be_sent_is_refused_without_being_shown(tmp_path: Path, token: str) -> None:
    (tmp_path / "token").write_text(token)
    for value, file in ((token, None), ("", tmp_path / "token")):
        with pytest.raises(BadToken) as caught:
            authorization_of(value, file)
        assert token not in str(caught.value)


def test_a_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadToken, match="cannot be read"):
        authorization_of("", tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(BadToken, match="must have 1 to"):
        authorization_of("", tmp_path / "empty")


def test_a_token_and_a_file_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(BadToken, match="one of them"):
        authorization_of("token", tmp_path / "token")


def test_a_call_s_own_authorization_takes_precedence() -> None:
    own, ours = (("a", "b"), ("authorization", "Bearer own")), (("authorization", "Bearer ours"),)

    assert authorized(own, ours) == own
    assert authorized((("a", "b"),), ours) == (("a", "b"), *ours)
    assert no_authorization() == ()
