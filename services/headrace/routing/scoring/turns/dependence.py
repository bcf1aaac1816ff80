"""Estimate how much the last turn of a conversation depends on the turns before it.

The estimate reads at most the first `_READ` characters of the turn, and little of what came before: whether
the last answer ended with a question, which words of the turn it has, and the words of the user's previous
turn. So it is nearly the same for a caller that sends the whole conversation and for one that sends the last
turn only. `reading.py` combines it with the score, and `references.py` and `replies.py` have the words.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice, pairwise

from headrace.routing.scoring.turns import references, replies

_READ = 400  # characters of a reply
_LONG = 60  # words from which on a reply explains itself
_THANKS = 120  # characters, beyond which a first turn asks for something
_CLAUSES = 30  # that are told apart
_WORDS = 64  # that are remembered of a turn
_TASK = 4  # words of content, from which on a request is a task of its own

_TOKEN = re.compile(r"[^\W_]+(?:[-'.][^\W_]+)*[+#]*|\?")
# A run of marks is read from its beginning only, which keeps the time linear.
_CLAUSE = re.compile(
    r"(?<![.!;:,\n，。！、؛،।])[.!;:,\n，。！、؛،।]+(?=\s|$)|[，。！、،।؛\n]|\s[-–—]\s|(?<=\?)"
)
_QUOTES = str.maketrans("’‘“”？", "''\"\"?")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a turn of the user is in its conversation.

    continues   how much it depends on earlier turns, 0 to 1
    closes      it only thanks or takes leave
    corrects    it says that the last answer is wrong
    repairs     it asks to work on something that was shown before, such as code
    content     words that carry content of its own
    words       digests of its words, at most `_WORDS`
    """

    continues: float
    closes: bool = False
    corrects: bool = False
    repairs: bool = False
    content: int = 0
    words: tuple[int, ...] = ()


def asks(answer: str) -> bool:
    """Return whether the end of an answer of the assistant is a question that a reply may answer."""
    end = answer[-300:].rstrip(" \n*_\"')")
    return end.endswith(("?", "？", "؟")) and not references.OFFERS.search(end)


def read_reply(
    text: str, *, first: bool = False, asked: bool = False, before: Collection[int] = (), answer: str = ""
) -> Reply:
    """Return what *text* is in a conversation.

    first    nothing precedes it, so it depends on nothing
    asked    the assistant's last turn ended with a question; False if it is not known
    before   digests of the words of the user's previous turn
    answer   the last one of the assistant, as far as it is known
    """
    long = len(text) > _READ
    text = text[:_READ]
    text = (text if text.isascii() else text.translate(_QUOTES)).lower().strip()
    if first and len(text) > _THANKS:
        return Reply(0.0, content=_READ, words=_digests(_TOKEN.findall(text)))
    clauses = [clause for part in _CLAUSE.split(text, _CLAUSES) if (clause := part.strip(" \"'*_()…-.!,;:"))]
    other = _in_other_languages(clauses)
    if other is not None and not long:
        return Reply(0.0 if other or first else 1.0, closes=other)
    if text and not _TOKEN.search(text):  # an emoji
        return Reply(1.0 if asked and not first else 0.0, closes=not asked)
    rest = [clause for clause in clauses if not _is_courtesy(clause, asked)]
    ends = any(map(_is_thanks, clauses)) or any(map(text.__contains__, references.FAREWELL))
    if not long and ends and not any(map(_is_more, rest)):
        return Reply(0.0, closes=True)
    if len(rest) < len(clauses) and not long and not any(map(_is_request, rest)) and _only_remarks(rest):
        return Reply(0.0, closes=True)
    words = _words(rest or clauses)
    content = [
        word
        for word in words
        if len(word) > 2
        and not (
            word in references.STOP
            or word in replies.CONSENT
            or word in references.REQUEST
            or word in references.REWORK
        )
    ]
    if first:
        return Reply(0.0, content=len(content), words=_digests(_TOKEN.findall(text)))
    evidence, corrects = _evidence(" ".join(rest or clauses), words, asked=asked, long=long)
    if len(content) >= _TASK and words[0] in references.SEQUENCE and evidence <= references.OPENERS[words[0]]:
        evidence *= 0.3  # "Now prove that every..." is the next task rather than a part of the last one
    if len(clauses) > 1 and clauses[0] in references.DENIAL and "?" not in words and not (asked or long):
        evidence, corrects = evidence + 0.6, True
    if evidence or not _is_topic(" ".join(rest or clauses), len(words)):
        evidence += _lack_of_topic(words, before, answer)
    depends = min(max((evidence - 0.25) / 0.6, 0.0), 1.0)
    if len(words) > 12:
        depends *= max(1.0 - (len(words) - 12) / _LONG, 0.3)
    repairs = not references.REPAIR.isdisjoint(words)
    return Reply(depends, False, corrects, repairs, len(content), _digests(_TOKEN.findall(text)))


def is_repeated(words: Collection[int], earlier: Collection[int]) -> bool:
    """Return whether two turns have nearly the same words, at least four."""
    if len(words) < 4 or not earlier:
        return False
    first, second = set(words), set(earlier)
    return len(first & second) >= 0.8 * len(first | second)


def _evidence(text: str, words: list[str], *, asked: bool, long: bool) -> tuple[float, bool]:
    """Return how much refers to earlier turns, about 0 to 1.5, and whether the answer is corrected."""
    count = len(words) - words.count("?")
    if _is_topic(text, count):
        return 0.0, False
    if not count:
        return 1.0, False
    corrects = count <= 40 and references.CORRECTS.search(text) is not None
    plain = [word for word in words if word != "?"]
    if (
        count <= 12
        and "?" not in words
        and not replies.CONSENT.isdisjoint(plain)
        and all(word in replies.CONSENT or word in replies.FILLERS for word in plain)
    ):
        return 1.5, corrects
    bare = " ".join(plain)
    if (
        bare in replies.SHORT_QUESTIONS
        or bare.removeprefix("but ").removeprefix("and ") in replies.SHORT_QUESTIONS
    ):
        return 1.5, corrects
    evidence = 1.0 if corrects else 0.0
    first = next((word for word in plain if word not in references.LEADING), plain[0])
    if references.OPENING.match(text):
        evidence += 0.9
    evidence += references.OPENERS.get(plain[0], 0.0)
    refers = _reference(text, count, long=long)
    evidence += refers
    evidence += _task(plain, first, refers=bool(refers), text=text)
    if references.ABOUT_IT.match(text):
        evidence += 0.8
    if count <= 12 and (references.COMPARES.search(text) or references.AS_WELL.search(text)):
        evidence += 0.75
    if count <= 4 and plain[-1] in replies.LANGUAGES and first not in references.WH | references.REQUEST:
        evidence += 0.6
    if count <= 7 and plain[0] in references.FRAGMENT and references.WH.isdisjoint(plain[1:]):
        evidence += 0.9
    if count <= 5 and references.COMPARATIVE.match(bare):
        evidence += 0.9
    if count <= 9 and "the " in text and references.PART.search(text):
        evidence += 0.75
    if _continues_in_other_language(plain, text) or (asked and _answers(words, first)):
        evidence += 0.9
    elif count <= 3 and plain[0] not in references.WH and first not in references.REQUEST:
        evidence += 0.6
    return evidence, corrects


def _answers(words: list[str], first: str) -> bool:
    """Return whether a reply may be the answer to a question, rather than a request or a question."""
    if len(words) > 8 or "?" in words or first in references.WH:
        return False
    return references.REQUEST.isdisjoint(words[:6])


def _continues_in_other_language(words: list[str], reply: str) -> bool:
    """Return whether a reply has words of other languages only that name no topic, or refers to another."""
    if len(words) <= 7 and all(word in replies.OTHER_WORDS for word in words):
        return True
    if len(words) <= 10 and (not reply.isascii() or not replies.OTHER_SIGNS.isdisjoint(words)):
        return replies.OTHER_REFERS.search(reply) is not None
    text = "".join(words)
    return not text.isascii() and len(text) <= 12 and replies.OTHER_CONTINUES.search(text) is not None


def _is_topic(text: str, count: int) -> bool:
    """Return whether a reply of *count* words says that its topic is another one, or is small talk."""
    if any(marker in text[:80] for marker in replies.NEW_TOPIC):
        return True
    if count <= 8 and references.BEFORE_REQUEST.sub("", text).startswith(replies.SMALL_TALK):
        return True
    return count <= 8 and references.NO_REFERENT.search(text) is not None


def _lack_of_topic(words: list[str], before: Collection[int], answer: str) -> float:
    """Return the weight of the fact that a reply names no topic, or one that was named before."""
    count = len(words) - words.count("?")
    if not 0 < count <= 20 or sum(word[0].isdigit() for word in words) > 1:
        return 0.0
    named = [word.removesuffix("'s") for word in words if word[0].isalpha() and len(word) > 1]
    named = [word for word in named if word not in references.GENERAL]
    new = [word for word in named if zlib.crc32(word.encode(errors="replace")) not in before]
    if new and answer:
        said = answer.lower()
        new = [word for word in new if not _is_said(word, said)]
    shared = 0.4 * (1 - len(new) / len(named)) if named else 0.0
    if not new:
        return 0.9
    return shared + (0.35 if len(new) == 1 and count <= 8 else 0.0)


def _is_said(word: str, said: str) -> bool:
    """Return whether a text, in lower case, has *word*, or one that differs in its ending."""
    stem = word[: -3 if len(word) > 7 else -1] if len(word) > 4 else word
    place = said.find(stem)
    while place > 0 and said[place - 1].isalnum():
        place = said.find(stem, place + 1)
    return place >= 0


def _task(plain: list[str], first: str, *, refers: bool, text: str) -> float:
    """Return the weight of a verb that needs an object, and has none in the text."""
    if first not in references.REWORK or len(plain) > 10 or any(mark in text for mark in "\"':"):
        return 0.0
    if refers:
        return 0.3
    if "my" in plain or "our" in plain:
        return 0.0
    named = len(
        [
            word
            for before, word in pairwise(["", *plain])
            if (len(word) > 2 or word.isdigit())
            and word not in references.STOP
            and word not in references.REWORK
            and not (word in replies.LANGUAGES and before in ("in", "to", "into"))
        ]
    )
    if first in references.MODIFY:
        return 0.7 if named <= 3 else 0.2
    return 0.7 if named == 0 or (named <= 2 and plain[0] in references.OPENERS) else 0.0


def _reference(text: str, count: int, *, long: bool) -> float:
    """Return the weight of the words that refer to something outside of the text."""
    found = [
        match
        for pattern in (references.ANAPHORS, references.THAT, references.THINGS)
        if (match := pattern.search(text)) is not None
    ]
    if not found or (
        (nothing := references.NO_REFERENT.search(text)) and nothing.start() <= found[0].start() + 12
    ):
        return 0.0
    match = min(found, key=re.Match.start)
    ahead = [
        word
        for word in _TOKEN.findall(text[: match.start()])
        if word.removesuffix("'s") not in references.STOP
        and word not in references.REQUEST
        and word not in references.REWORK
        and word not in replies.FILLERS
    ]
    # "a cat and its owner": the text has what the pronoun refers to.
    far = 1 if match.group() in ("its", "their", "his", "her") else 3
    weight = 0.9 if len(ahead) <= 1 else 0.6 if len(ahead) <= far else 0.25
    weight += 0.15 if count <= 8 else 0.0
    if long or count > 30:
        weight *= 0.6
    return weight


def _digests(words: list[str]) -> tuple[int, ...]:
    # Of the encoded text, because `hash` differs between processes.
    distinct = dict.fromkeys(words)
    distinct.pop("?", None)
    return tuple([zlib.crc32(word.encode(errors="replace")) for word in islice(distinct, _WORDS)])


def _words(clauses: list[str]) -> list[str]:
    return [word for clause in clauses for word in _TOKEN.findall(clause)]


def _is_courtesy(clause: str, asked: bool) -> bool:
    """Return whether a clause thanks, praises or takes leave. After a question, "ok" is consent."""
    words = _TOKEN.findall(clause)
    if not words or "?" in words or len(words) > 14:
        return False
    # After a question, praise is consent: "that'd be great".
    marks = replies.FAREWELL if asked else replies.COURTESY
    if all(word in replies.COURTESY or word in replies.FILLERS for word in words):
        return not marks.isdisjoint(words) or _is_leave(words)
    if (
        len(words) <= 8
        and references.NO_REMARK.isdisjoint(words)
        and " ".join(words).startswith(references.LEAVE)
    ):
        return True
    if (
        len(words) <= 7
        and words[0] in references.REMARKS
        and not replies.COURTESY.isdisjoint(words)
        and references.REQUEST.isdisjoint(words)
        and references.NO_REMARK.isdisjoint(words)
        and not asked
        and not references.CORRECTS.search(clause)
    ):
        return True
    thanks = next((place for place, word in enumerate(words) if word in references.THANKS), None)
    return (
        thanks is not None
        and references.REQUEST.isdisjoint(words[thanks + 1 :])
        and (
            thanks == 0 or all(word in replies.COURTESY or word in replies.FILLERS for word in words[:thanks])
        )
    )


def _is_thanks(clause: str) -> bool:
    """Return whether a clause thanks, in any of the languages of the lists."""
    words = _TOKEN.findall(clause)
    if "?" in words or len(words) > 10:
        return False
    return not references.THANKS_WORDS.isdisjoint(words) or clause.startswith(replies.OTHER_THANKS)


def _is_more(clause: str) -> bool:
    """Return whether a clause beside thanks asks for more."""
    words = _TOKEN.findall(clause)
    if not words or _is_leave(words):
        return False
    asks_more = _is_request(clause) or words[0] in references.FRAGMENT or words[0] in references.GOES_ON
    return (
        asks_more
        or len(words) > 10
        or not references.NO_REMARK.isdisjoint(words)
        or references.CORRECTS.search(clause) is not None
    )


def _is_leave(words: list[str]) -> bool:
    """Return whether words from the lists say that the work is done: "that's all", "see you tomorrow"."""
    text = " ".join(words)
    return any(part in text for part in references.LEAVE)


def _is_request(clause: str) -> bool:
    words = _TOKEN.findall(clause)
    return bool(words) and ("?" in words or words[0] in references.REQUEST or words[0] in references.WH)


def _only_remarks(clauses: list[str]) -> bool:
    """Return whether the clauses beside the courtesy are short remarks, such as "you saved my day"."""
    for clause in clauses:
        words = _TOKEN.findall(clause)
        if not words:
            continue
        if len(words) > 9 or words[0] not in references.REMARKS or not references.NO_REMARK.isdisjoint(words):
            return False
        if references.CORRECTS.search(clause):
            return False
    return True


def _in_other_languages(clauses: list[str]) -> bool | None:
    """Return whether clauses in other languages thank (True) or consent or ask why (False); None: neither."""
    closes = False
    for clause in clauses:
        bare = clause.rstrip("?？؟ ").lstrip("¿¡ ")
        if bare in replies.OTHER_COURTESY:
            closes = True
        elif bare in replies.OTHER_REPLIES:
            if bare.isascii() and bare in ("no", "si", "como", "ya", "vale") and len(clauses) > 1:
                return None
        elif (joined := _joined(bare)) is not None:
            closes = closes or joined
        else:
            return None
    return closes if clauses else None


def _joined(clause: str) -> bool | None:
    """Return what a clause says that consists of phrases from the lists; None for another clause."""
    words = clause.split()
    place, closes = 0, False
    if len(words) > 8 or len(words) < 2:
        return None
    while place < len(words):
        for size in (4, 3, 2, 1):
            phrase = " ".join(words[place : place + size])
            if phrase in replies.OTHER_COURTESY or phrase in replies.OTHER_REPLIES:
                closes = closes or phrase in replies.OTHER_COURTESY
                place += size
                break
        else:
            return None
    return closes
