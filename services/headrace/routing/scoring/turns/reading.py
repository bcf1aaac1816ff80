"""Score the last turn of a conversation in the light of the turns that it refers to.

Earlier turns of the user are read backwards until one stands for itself. From there on, each turn's log-odds
are mixed with what it inherits, by how much it depends on it (`dependence.py`), so that the influence of
a turn decays. What the conversation adds to the score of the last turn alone is shown as features whose names
begin with "turn:".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.routing.scoring.conversation import Carried, Earlier, Turn, window
from headrace.routing.scoring.score import Score, sigmoid
from headrace.routing.scoring.turns import pasted
from headrace.routing.scoring.turns.dependence import Reply, asks, is_repeated, read_reply
from headrace.routing.success.estimate import Estimate

_KEPT = 0.97  # of what a turn inherits that depends on nothing else
_STANDS = 0.15  # dependence up to which a turn stands for itself
_RAISE = 0.5  # log-odds of a correction or an error at a score near 0; half of it at a score of 0.5
_ERRORS = 2  # of tools that raise one turn
_DOCUMENT = 0.15  # log-odds of a long document beside the question
# A turn with content of its own keeps more of its own score if that is higher by these log-odds.
_HIGHER = (0.5, 1.3)
_CONTENT = 3  # words

ScoreText = Callable[[str], Score]


@dataclass(frozen=True, slots=True)
class _Link:
    """A turn of the user in its conversation.

    errors_before, errors_after   of tools since the user's previous turn, and after this one
    repeated                      it is the same question as the user's previous one
    words                         of it; if it has no content of its own, of the last turn that has
    code                          that was shown to the user, or that failed; empty: none
    """

    text: str
    reply: Reply
    errors_before: int
    errors_after: int
    repeated: bool
    words: tuple[int, ...]
    code: str


@dataclass(slots=True)
class _State:
    """What a turn passes on: log-odds, and the estimates of tiers."""

    log_odds: float
    estimates: Mapping[str, Estimate]


def score_turns(score: ScoreText, turns: Sequence[Turn], earlier: Earlier | None = None) -> Score:
    """Return the score of the last turn of the user. See `Scorer.score_turns`.

    score   scores a text alone
    """
    turns = _in_roles(window(reversed(turns)))
    links = _links(turns, earlier)
    if not links:
        return score(turns[-1].text)
    last = links[-1]
    own, document = _own(score, last.text)
    shares: list[tuple[str, float, float]] = []
    if document:
        shares.append(("turn:document", min(document / 4_000, 1.0), _DOCUMENT * document / 4_000))
    state = _State(_log_odds(own) + sum(share[2] for share in shares), own.estimates)
    if last.reply.closes:
        return _explained(own, shares, 0.0, None)
    inherited = _inherited(score, links, earlier)
    if inherited is not None:
        mixed = _mixed(state, inherited, last.reply)
        shares.append(("turn:inherited", last.reply.continues, mixed.log_odds - state.log_odds))
        state = mixed
    for name, strength, log_odds in _signals(score, last, state.log_odds, follows=inherited is not None):
        shares.append((name, strength, log_odds))
        state.log_odds += log_odds
    carried = Carried(sigmoid(state.log_odds), last.words, state.estimates)
    continues = last.reply.continues if inherited is not None else 0.0
    return _explained(own, shares, continues, carried)


def _in_roles(turns: list[Turn]) -> list[Turn]:
    """Return *turns* with pasted conversations taken apart, and results of tools in the role of tools."""
    if len(turns) == 1 and (found := pasted.turns_in(turns[0].text)):
        turns = window(reversed(found))
    roles = [
        Turn("tool", turn.text) if _is_user(turn) and pasted.TOOL_RESULT.match(turn.text) else turn
        for turn in turns
    ]
    return roles if any(map(_is_user, roles)) else turns


def _links(turns: Sequence[Turn], earlier: Earlier | None) -> list[_Link]:
    """Return the turns of the user that the last one continues, and it, without closing ones."""
    links: list[_Link] = []
    alone: dict[int, Reply] = {}
    places = [place for place, turn in enumerate(turns) if _is_user(turn)]
    while places:
        place = places.pop()
        previous = places[-1] if places else -1
        answers = turns[previous + 1 : place]
        # An agent calls tools after the user's turn until it has an answer.
        after = turns[place + 1 :] if not links else []
        before = _words_before(turns, places, alone, earlier)
        first = previous < 0 and earlier is None
        reply = read_reply(
            turns[place].text,
            first=first,
            asked=_was_asked(turns, place),
            before=before,
            answer=_answer(turns, place),
        )
        if reply.closes and links:
            continue
        links.append(
            _Link(
                turns[place].text,
                reply,
                errors_before=sum(map(_has_failed, answers)),
                errors_after=sum(map(_has_failed, after)),
                repeated=is_repeated(reply.words, before),
                words=reply.words if reply.content else tuple(before),
                code=next(
                    filter(None, (pasted.code_in(turn.text) for turn in reversed([*answers, *after]))), ""
                ),
            )
        )
        if reply.continues <= _STANDS:
            break
    return links[::-1]


def _words_before(
    turns: Sequence[Turn], places: Sequence[int], alone: dict[int, Reply], earlier: Earlier | None
) -> tuple[int, ...]:
    """Return the words of the last turn at *places*, of the user, that has content of its own.

    alone   turns that were read without those before them, by place; more are added
    """
    for place in reversed(places):
        if place not in alone:
            alone[place] = read_reply(turns[place].text, first=True, asked=_was_asked(turns, place))
        reply = alone[place]
        if not reply.closes and reply.content:
            return reply.words
    return () if earlier is None else earlier.words


def _was_asked(turns: Sequence[Turn], place: int) -> bool:
    """Return whether the turn at *place* follows a question of the assistant."""
    return place > 0 and turns[place - 1].role == "assistant" and asks(turns[place - 1].text)


def _answer(turns: Sequence[Turn], place: int) -> str:
    """Return the text of the assistant before the turn at *place*; empty if there is none."""
    return turns[place - 1].text if place > 0 and turns[place - 1].role == "assistant" else ""


def _inherited(score: ScoreText, links: Sequence[_Link], earlier: Earlier | None) -> _State | None:
    """Return what the last of *links* inherits; None if it stands for itself."""
    if links[-1].reply.continues <= _STANDS:
        return None
    if links[0].reply.continues > _STANDS and earlier is not None:
        # The text does not show where the conversation began.
        return _State(_logit(earlier.score), earlier.estimates)
    if len(links) == 1:
        return None
    state: _State | None = None
    read: dict[str, tuple[Score, int]] = {}  # the same reply, such as "go on", is scored once
    for link in links[:-1]:
        if link.text not in read:
            read[link.text] = _own(score, link.text)
        own, document = read[link.text]
        alone = _State(_log_odds(own) + (_DOCUMENT * document / 4_000 if document else 0.0), own.estimates)
        follows = state is not None
        state = alone if state is None else _mixed(alone, state, link.reply)
        state.log_odds += sum(share[2] for share in _signals(score, link, state.log_odds, follows=follows))
    return state


def _mixed(own: _State, inherited: _State, reply: Reply) -> _State:
    """Return what a turn has that continues another."""
    weight = _KEPT * reply.continues
    if own.log_odds > inherited.log_odds and reply.content >= _CONTENT:
        low, high = _HIGHER
        above = (own.log_odds - inherited.log_odds - low) / (high - low)
        weight *= 1 - 0.8 * min(max(above, 0.0), 1.0)
    estimates = {
        tier: Estimate(
            sigmoid(_between(_logit(mine.good), _logit(theirs.good), weight)),
            mine.tokens
            if theirs.tokens is None or mine.tokens is None
            else _between(mine.tokens, theirs.tokens, weight),
        )
        for tier, mine in own.estimates.items()
        if (theirs := inherited.estimates.get(tier, mine))
    }
    return _State(_between(own.log_odds, inherited.log_odds, weight), estimates or own.estimates)


def _signals(
    score: ScoreText, link: _Link, log_odds: float, *, follows: bool
) -> list[tuple[str, float, float]]:
    """Return what the conversation adds to a turn of *log_odds*: name, strength and log-odds of each."""
    found: list[tuple[str, float, float]] = []

    def raised(name: str, strength: float) -> None:
        now = log_odds + sum(share[2] for share in found)
        found.append((name, strength, _RAISE * strength * (1 - sigmoid(now))))

    if link.code and follows and link.reply.repairs:
        by_code = _log_odds(score(f"{link.text}\n```\n{link.code}\n```"))
        if by_code > log_odds:
            found.append(("turn:code", link.reply.continues, link.reply.continues * (by_code - log_odds)))
    if link.reply.corrects and follows:
        raised("turn:correction", 1.0)
    if link.repeated:
        raised("turn:repeated", 1.0)
    if errors := min((link.errors_before if follows else 0) + link.errors_after, _ERRORS):
        raised("turn:tool_error", errors / _ERRORS)
    return found


def _own(score: ScoreText, text: str) -> tuple[Score, int]:
    """Return the score of a turn alone, and the characters of a document that it is about."""
    question = pasted.question_in(text)
    return score(question.text), question.document


def _explained(
    own: Score, shares: Sequence[tuple[str, float, float]], continues: float, carried: Carried | None
) -> Score:
    """Return the score of a turn with what its conversation adds."""
    estimates = own.estimates if carried is None else carried.estimates
    if not shares:
        # `dataclasses.replace` takes four times as long.
        return Score(own.value, own.bias, own.names, own.values, own.log_odds, continues, estimates, carried)
    log_odds = (*own.log_odds, *(share[2] for share in shares))
    return replace(
        own,
        value=sigmoid(own.bias + sum(log_odds)),
        names=(*own.names, *(share[0] for share in shares)),
        values=(*own.values, *(share[1] for share in shares)),
        log_odds=log_odds,
        continues=continues,
        carried=carried,
        estimates=estimates,
    )


def _is_user(turn: Turn) -> bool:
    return turn.role not in ("system", "assistant", "tool")


def _has_failed(turn: Turn) -> bool:
    """Return whether a turn shows that a tool failed. Answers about code name errors that nothing raised."""
    if turn.role == "tool":
        return pasted.has_error(turn.text)
    return "Traceback (most recent call last)" in turn.text


def _log_odds(score: Score) -> float:
    return score.bias + sum(score.log_odds)


def _logit(probability: float) -> float:
    probability = min(max(probability, 1e-6), 1 - 1e-6)
    return math.log(probability / (1 - probability))


def _between(own: float, other: float, weight: float) -> float:
    return own + weight * (other - own)
