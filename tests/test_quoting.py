"""Text of callers is shortened before it is used in messages and logs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.quoting import MAX_QUOTED, clipped, quoted


@given(st.text(max_size=200))
def test_a_quote_is_short_and_on_one_line(text: str) -> None:
    quote = quoted(text)

    assert len(quote) <= 10 * MAX_QUOTED + 40
    assert quote.isprintable()
    if len(text) <= MAX_QUOTED:
        assert quote == repr(text)


@given(st.text(max_size=200), st.integers(32, 300))
def test_a_clipped_text_fits_its_limit_and_keeps_both_ends(text: str, limit: int) -> None:
    short = clipped(text, limit)

    assert len(short.encode(errors="replace")) <= limit
    if len(text.encode(errors="replace")) <= limit:
        assert short == text
    else:
        start, end = short.split(" [...] ", 1)[0], short.rsplit(" [...] ", 1)[1]
        assert text.startswith(start)
        assert text.endswith(end)
