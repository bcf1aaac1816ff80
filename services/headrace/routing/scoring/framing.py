"""The words of framing: greetings, courtesy, and what surrounds a question without being part of it.

A sentence is framing if it consists of these words alone and contains at least one of `_KEYS`. "I hope you
are well", "Please answer the following question carefully" and "Thanks in advance!" are; "Who are you?" and
"Answer for the court" are not.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.routing.scoring import languages
from headrace.routing.scoring.words import fold, words_of

# Words of which framing has at least one.
_KEYS = """
    hi hello hey ask asking heya hiya greetings howdy dear welcome goodbye bye cheers regards sincerely
    yours yo hope hoping wish wishes trust thanks thank thankful thx ty ta appreciate appreciated
    grateful gratitude glad obliged gratefully please kindly pls plz sorry excuse pardon apologies
    apologize apologise forgive bother bothering disturb disturbing interrupt question questions query
    answer answers answering help helping helpful assist assistance assisting guidance favor favour
    wonder wondering wondered curious stuck confused unsure busy reply response respond assistant
    chatgpt gpt ai bot claude expert carefully accurately accurate correctly attentively thoughtfully
    honestly truthfully problem task exercise prompt instruction instructions input solve sense advance
    double check careful step regarding urgent asap homework stumped lost
"""
# Other words that framing may have.
_OTHERS = """
    a an the this that these those it its there here i me my mine myself we us our ours you your one
    ones someone anyone everyone everybody all any some none something anything everything nothing am is
    are was were be been being do does did doing done have has had having can could would will should
    may might must shall let lets to of in on at for from by with about as into and or but so if then
    than when while before after because since not no yes ok okay what how who which where more most
    much many lot lots bit little few very really quite rather just only also too again now today
    tonight soon already still well fine great good best better nice lovely wonderful awesome amazing
    fantastic happy pleasant kind warm day days morning afternoon evening night week weekend time moment
    second minute minutes spare taking take takes took look looking looked looks forward hear hearing
    back read reading think thinking thought know knowing known understand find finds found get got give
    given giving gave tell telling say show send sent provide provided providing make makes making need
    needed needs want wanted like liked love try trying tried come came go going use using sure certain
    clear unclear right wrong correct possible able willing important quick quickly short brief briefly
    simple silly stupid dumb basic easy hard tough tricky difficult interesting small big following
    below above next previous last first final own attached team friend friends folks guys sir madam mr
    mrs ms mate buddy people patience support effort work working works keep up mind idea ideas clue
    message text hand deal meant means else cannot won teacher professor boss colleague class school
    exam test quiz study studying student large language model system multiple choice choices option
    options each every far care hurry rush precise exact precisely struggle struggling prepare preparing
    tomorrow yesterday opinion opinions thoughts knowledgeable friendly world harmless wise smart clever
    professional tutor mentor mistake mistakes error errors judgment gone stuff issue puzzled puzzling
    sorted gladly favour gently twice based truthful true honest polite concise detailed full complete
    thorough direct directly reasoning reason explanation explain detail details context information
    info knowledge skill skills skilled steps through out figure figuring trouble around over perhaps
    maybe possibly genuinely truly highly greatly extremely super deeply always ever never ahead
    appreciative feel free ask asking asked asks saying word words wait waiting return stay safe
"""
_KEY_WORDS = frozenset(words_of(fold(_KEYS + languages.COURTESY)))
WORDS = _KEY_WORDS | frozenset(words_of(fold(_OTHERS + languages.COURTESY_OTHERS)))


def is_known(word: str) -> bool:
    """Return whether *word* is among the words of framing, most of which are frequent in any text."""
    return word in WORDS


def is_framing(words: Sequence[str], *, keyed: bool = True) -> bool:
    """Return whether *words*, in lower case, are framing; without *keyed*, its key word may be elsewhere."""
    if not all(map(WORDS.__contains__, words)):
        return False
    return not keyed or not _KEY_WORDS.isdisjoint(words) or words[:2] == ["take", "your"]
