"""Prompt lookup finds an earlier occurrence of the last tokens, and continues it."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.engine.plan.lookup import LEAST_MATCH, MOST_MATCH, Lookup, draft

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=60)


@given(ids=IDS, cuts=st.lists(st.integers(1, 60), max_size=5))
def test_the_longest_of_the_latest_matches_is_found_however_the_ids_arrive(
    ids: list[int], cuts: list[int]
) -> None:
    lookup = Lookup()
    for count in sorted(cut for cut in cuts if cut < len(ids)):
        lookup.find(ids[:count])
    match = lookup.find(ids)

    def matching(place: int) -> int:
        """Return how many tokens before a place are those at the end."""
        pairs = zip(reversed(ids[:place]), reversed(ids), strict=False)
        return min(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)), MOST_MATCH)

    places = [place for place in range(LEAST_MATCH, len(ids)) if matching(place) >= LEAST_MATCH]
    if not places:
        assert match is None
        return
    latest = places[-4:]
    longest = max(map(matching, latest))
    assert match == (max(place for place in latest if matching(place) == longest), longest)


@given(ids=IDS, tokens=st.integers(0, 40), data=st.data())
def test_a_draft_continues_as_the_ids_did_and_repeats_them_at_their_end(
    ids: list[int], tokens: int, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(ids) - 1))

    expected = list(ids)
    for i in range(tokens):
        expected.append(expected[place + i])
    assert draft(ids, place, tokens) == expected[len(ids) :]
