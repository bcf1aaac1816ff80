"""The file of callers: what it grants, and what is wrong with it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import errors
from headrace.runtime.security.callers_file import (
    DEFAULT_SCOPES,
    digest,
    entry_for,
    new_token,
    parse,
)
from headrace.runtime.security.identity import ALL_SCOPES, Identity, is_name
from headrace.runtime.security.watched_file import BadFile

HASH = "ab" * 32
names = st.text(min_size=1, max_size=256).filter(is_name)


@given(
    name=names,
    tenant=names,
    scopes=st.sets(st.sampled_from(sorted(ALL_SCOPES)), min_size=1).map(tuple),
    max_priority=st.integers(0, 9),
    quota=st.just("") | names,
    expires=st.none() | st.integers(0, 4_000_000_000),
)
def test_an_entry_is_read_as_it_was_written(expires: int | None, **grant: Any) -> None:
    token = new_token()
    when = None if expires is None else datetime.fromtimestamp(expires, UTC)
    text = entry_for(token, expires=when, **grant)
    identity = parse(text.encode()).tokens[digest(token)]

    tenant = None if grant["tenant"] == "*" else grant["tenant"]
    assert identity.expires == expires
    assert identity.identity == Identity(
        name=grant["name"],
        scopes=frozenset(grant["scopes"]),
        tenant=tenant,
        max_priority=grant["max_priority"],
        quota=grant["quota"],
    )
    assert token not in text


def test_tokens_are_long_and_never_the_same() -> None:
    made = {new_token() for _ in range(1000)}

    assert len(made) == 1000
    assert all(token.startswith("hr_") and len(token) == 46 and token.isascii() for token in made)


def test_a_token_is_valid_until_it_expires() -> None:
    token = new_token()
    entry = entry_for(token, name="a", tenant="t", expires=datetime.fromtimestamp(1000, UTC))
    file = parse(entry.encode())

    assert file.identify(token, 999.9).name == "a"
    with pytest.raises(errors.CredentialsInvalid, match="expired"):
        file.identify(token, 1000.0)


@pytest.mark.parametrize(
    "change", [lambda t: t[:-1], lambda t: t + "x", str.upper, lambda t: "", str.swapcase]
)
def test_a_token_that_differs_is_unknown(change: Any) -> None:
    token = new_token()
    file = parse(entry_for(token, name="a", tenant="t").encode())

    with pytest.raises(errors.CredentialsInvalid, match="not known"):
        file.identify(change(token), 0.0)


def test_what_an_entry_leaves_out_has_safe_defaults() -> None:
    text = f'[[tokens]]\nid = "a"\nsha256 = "{HASH.upper()}"\ntenant = "t"\n'
    (grant,) = parse(text.encode()).tokens.values()

    assert grant.identity == Identity(name="a", scopes=frozenset(DEFAULT_SCOPES), tenant="t", max_priority=5)
    assert "admin" not in DEFAULT_SCOPES


TOKEN = f'[[tokens]]\nid = "a"\nsha256 = "{HASH}"\ntenant = "t"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens", "not TOML"),
        (b"\xff", "not UTF-8"),
        ("[tokens]\nid = 1", r"write \[\[tokens\]\]"),
        ("tokens = [1]", r"write \[\[tokens\]\]"),
        ("[[users]]\n", "unknown table 'users'"),
        (TOKEN.replace("ab", "zz"), "tokens.0..sha256 must have 64"),
        (TOKEN.replace(HASH, "hr_the-token-itself"), "64 hexadecimal digits"),
        (TOKEN + TOKEN, "tokens.1..sha256 is listed twice"),
        (TOKEN.replace('tenant = "t"', ""), "tokens.0..tenant must be"),
        (TOKEN.replace('tenant = "t"', 'tenant = ""'), "tokens.0..tenant must be"),
        (TOKEN.replace('"a"', '"a\\nb"'), "tokens.0..id must be"),
        (TOKEN + "expire = 1", "unknown key 'expire'"),
        (TOKEN + 'scopes = "admin"', "scopes must be a list"),
        (TOKEN + "scopes = []", "scopes must be a list"),
        (TOKEN + 'scopes = ["root"]', "scopes must be a list"),
        (TOKEN + "scopes = [[]]", "scopes must be a list"),
        (TOKEN + 'scopes = ["admin", 1]', "scopes must be a list"),
        (TOKEN + "max_priority = 10", "max_priority must be 0 to 9"),
        (TOKEN + "max_priority = true", "max_priority must be 0 to 9"),
        (TOKEN + "expires = 2030-01-01", "time with a zone"),
        (TOKEN + "expires = 2030-01-01T00:00:00", "time with a zone"),
        (TOKEN + "expires = 1900000000", "time with a zone"),
        (TOKEN + "quota = 1", "quota must be"),
        ('[[certificates]]\ntenant = "t"', "certificates.0..name must be"),
        ('[[certificates]]\nname = "x"\ntenant = "t"\n' * 2, "certificates.1..name is listed twice"),
        (f'[[certificates]]\nname = "x"\nsha256 = "{HASH}"\ntenant = "t"\n', "unknown key 'sha256'"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_place_and_without_its_values(
    text: str | bytes, message: str
) -> None:
    with pytest.raises(BadFile, match=message) as caught:
        parse(text if isinstance(text, bytes) else text.encode())
    assert "the-token-itself" not in str(caught.value)


def test_certificates_are_listed_by_a_name_in_them() -> None:
    text = '[[certificates]]\nname = "spiffe://x/search"\ntenant = "search"\nscopes = ["generate"]\n'

    assert parse(text.encode()).certificates["spiffe://x/search"].identity == Identity(
        name="spiffe://x/search", scopes=frozenset(("generate",)), tenant="search", max_priority=5
    )
