"""Count the words of a prompt that point to a feature, such as a subject or a kind of task.

Looking words up is ten times as fast as one regular expression per feature. `prompt_features.py` turns the
counts into strengths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, compress, pairwise

from headrace.routing.scoring import framing, languages

# Words that change the tone alone.
FILLERS = frozenset(
    (
        "is",
        "am",
        "are",
        "please",
        "kindly",
        "just",
        "really",
        "actually",
        "basically",
        "simply",
        "literally",
        "um",
        "uh",
        "well",
    )
)

# name -> (words, and pairs of words joined by _; number of matches at full strength). A trailing * stands for
# the usual endings.
_LEXICON: dict[str, tuple[str, int]] = {
    "programming": (
        "python javascript typescript java rust golang sql bash html css regex json yaml api docker "
        "kubernetes git linux react django pandas numpy pytorch tensorflow function* class* method* "
        "algorithm* code coding program* programme* script* implement* refactor* debug* compil* recursi* "
        "array* tuple* string* list* tree* linked_list hash* database* server* thread* async query queries "
        "unit_test exception* bug* big_o stack queue* file* app",
        4,
    ),
    "reasoning": (
        "why prove proof derive deduce infer justify therefore suppose assume logic* puzzle* riddle* "
        "contradict* valid argument* premise* conclusion* hypothes* imply implies true false step_by "
        "follows statement*",
        4,
    ),
    "analysis": (
        "explain* analyz* analys* analysis compare contrast evaluate critique discuss describe trade-off "
        "tradeoffs implication* consequence* advantage* impact* effect* relationship difference* "
        "significance how_does how_do how_can how_would pros cons",
        3,
    ),
    "design": (
        "design* plan* strategy strategies architecture system* optimiz* optimis* framework* approach* "
        "solution* develop* build* improve* requirement* model* modell* best_way goal* process*",
        4,
    ),
    "mathematics": (
        "equation* integral* derivative* matrix matrices vector* polynomial* triangle* circle* angle* "
        "radius theorem* integer* prime* probability function* graph* root* modulo divisible digit* "
        "permutation* combination* sequence* sum product perpendicular coordinate* solve simplify compute "
        "prove proof primes infinitely irrational rational countable converges diverges induction factor "
        "calculate evaluate slope ratio* variance deviation positive real area volume perimeter",
        4,
    ),
    "number_words": (
        "two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty sixty "
        "hundred thousand dozen couple",
        4,
    ),
    "parts": ("half halves third thirds quarter quarters fourth fourths fifth fifths tenth twice thrice", 3),
    "conjunctions": ("and", 6),
    "than": ("than", 3),
    "relations": (
        "mother father parent parents brother brothers sister sisters son daughter uncle aunt cousin cousins "
        "siblings older younger oldest youngest taller shorter tallest shortest heavier lighter heaviest "
        "faster slower north south east west left right behind beside facing opposite upside row first last "
        "in_front next_to sits sit stands stand lies odd_one belong related relative finish",
        3,
    ),
    "how_many": ("how_many how_much how_long how_far how_old how_tall how_fast the_total the_average", 1),
    "each": ("each every per apiece respectively", 4),
    "comparison": (
        "more_than less_than fewer older younger taller longer shorter greater as_many as_much as_old "
        "times twice thrice double* triple* half third quarter fourth",
        4,
    ),
    "percent": ("percent percentage discount* interest tax tip increase* decrease* rate profit average", 3),
    "remainder": (
        "left remain* rest gave give gives lost sold sell sells bought buy buys eat eats ate use uses used",
        4,
    ),
    "together": ("total altogether in_all combined together both sum", 3),
    "money": ("dollar* cent cents cost* price* pay pays paid spend* spent earn* bill salary money", 4),
    "time": (
        "hour* minute* second* day* week* month* year* mph mile* speed monday tuesday saturday sunday "
        "morning evening",
        5,
    ),
    "conditions": ("if when unless except until after before then instead only but however", 5),
    "negation": (
        "not never no none except neither incorrect least isnt arent dont doesnt didnt wont cant wasnt",
        2,
    ),
    "constraints": (
        "must exactly at_least at_most no_more without ensure avoid include format limit should words "
        "sentences paragraph* bullet",
        5,
    ),
    "creative": (
        "write compose story stories poem essay blog post article speech lyrics song novel script dialogue "
        "haiku email e-mail letter slogan headline creative character* paragraph* outline engaging vivid",
        3,
    ),
    "roleplay": (
        "pretend imagine act_as roleplay role-play persona embody role_of yourself in_character style_of",
        1,
    ),
    "transformation": (
        "translat* summariz* summaris* summary rephras* paraphras* rewrit* edit* correct grammar proofread "
        "shorten convert simplify tone",
        2,
    ),
    "extraction": (
        "extract* identify classify categoriz* label* sentiment json csv table entities named list_all "
        "list_the following_text following_passage following_paragraph following_data following_review "
        "return given_the output",
        3,
    ),
    "advice": (
        "should_i how_to tips advice recommend* suggest* best idea* help_me ways_to guide itinerary recipe*",
        2,
    ),
    "small_talk": (
        "hello hi hey thanks thank thx bye goodbye ok okay yes welcome sorry cool great nice haha lol cheers "
        "good_morning good_evening good_night how_are are_you your_name do_you congratulations birthday joke "
        "perfect alright wow bored later",
        2,
    ),
    "explaining": (
        "how_do how_does how_did how_can how_could how_should how_would why explain explains describe "
        "discuss difference_between differences what_are what_were what_happens tell_me overview history_of "
        "role_of effects_of causes_of benefits_of pros_and significance",
        1,
    ),
    # Work on a short text or word.
    "text_work": (
        "translat* summariz* summaris* summary short_poem short_rhyme two_lines one_line synonym* "
        "antonym* rhyme* rhymes opposite* spell* typo* mistake* grammar "
        "alphabetical alphabetically alphabet capitals lowercase uppercase haiku limerick pun joke tense "
        "sentiment shorten* shorter briefer rephras* paraphras* proofread rewrit* this_sentence this_text "
        "another_word fewer_words sentence punctuation formal politely spanish french german "
        "italian english dutch polish portuguese swedish russian chinese japanese arabic hindi turkish",
        2,
    ),
    "first_person": ("i im ive my me we our", 4),
    "you": ("you your", 3),
    "fact": (
        "who whose where when which name capital invented founded born won country film actor released "
        "first located",
        3,
    ),
    "common_sense": ("likely would might could someone people person children animal* place", 4),
    "law": (
        "court* plaintiff* defendant* statute* contract* liable jury trial law* legal crime* felony state "
        "property sued constitution* attorney",
        4,
    ),
    "medicine": (
        "patient* disease* symptom* clinical diagnosis treatment* blood drug* cell* gene* genetic protein* "
        "infection* pain therapy muscle* nerve*",
        4,
    ),
    "physics": (
        "energy force* mass velocity electron* quantum magnetic charge* wave* temperature pressure "
        "molecul* molecule* reaction* acid* atom* gas bond* circuit* voltage oxid* mol heat light",
        4,
    ),
    "economics": (
        "market* demand supply firm* price* inflation monetary gdp tax* investment* company companies "
        "cost* income audit* bank* bond* regression",
        4,
    ),
    "humanities": (
        "history war* religion* religious moral* ethic* philosoph* culture* cultural political theory "
        "government* society century king empire policy psycholog* behavior* behaviour* according_to",
        4,
    ),
    "meta_options": ("the_above of_these both neither be_determined", 1),
}
_ENDINGS = (
    "", "s", "es", "d", "ed", "ing", "ly", "al", "ic", "ical", "er", "ers", "ion", "ions", "ation", "ize",
    "izes", "ized", "ized", "izing", "ise", "ised", "ising", "e", "y", "ies", "ied", "ive", "ment", "ments",
    "is", "es", "ve", "ning", "ned", "t", "ts", "ingly", "en", "ar", "able",
)  # fmt: skip


# name -> number of words at full strength
FEATURES: dict[str, int] = {name: full for name, (_, full) in _LEXICON.items()}


def _lookup() -> dict[str, tuple[str, ...]]:
    """Return the features of each word, and of each pair joined by _."""
    table: dict[str, tuple[str, ...]] = {}
    for name, (entries, _) in _LEXICON.items():
        for entry in entries.split():
            forms = [entry[:-1] + ending for ending in _ENDINGS] if entry.endswith("*") else [entry]
            for form in forms:
                if name not in table.get(form, ()):
                    table[form] = (*table.get(form, ()), name)
    for word, names in languages.IN_ASCII.items():
        table[word] = tuple(dict.fromkeys((*table.get(word, ()), *names)))
    return table


_FEATURES_OF = _lookup()
_PERSONS = frozenset(("i", "my", "me", "we", "you", "your", "this"))
_ASIDE_FEATURES = frozenset(
    ("first_person", "you", "time", "conditions", "negation", "conjunctions", "advice", "common_sense")
)
_FIRST_OF_PAIR = frozenset(entry.partition("_")[0] for entry in _FEATURES_OF if "_" in entry)


def counts(words: Sequence[str], text: str) -> Counter[str]:
    """Return the number of words, and of pairs of neighbours, that point to each feature.

    words   of *text*, in order and folded
    """
    begins_pair = map(_FIRST_OF_PAIR.__contains__, words)
    pairs = map("_".join, compress(pairwise(words), begins_pair))
    found = Counter(chain.from_iterable(filter(None, map(_FEATURES_OF.get, chain(words, pairs)))))
    return found if text.isascii() else found + languages.counts(words, text)


def says_nothing(words: Sequence[str]) -> bool:
    """Return whether *words* point to no feature that an aside could not have."""
    return all(map(_ASIDE_FEATURES.issuperset, filter(None, map(_FEATURES_OF.get, words))))


def about_persons(words: Sequence[str]) -> bool:
    """Return whether *words* refer to the writer or the reader."""
    return not _PERSONS.isdisjoint(words)


# Whether a word, folded, is known in English: quicker than `known`.
is_common: Callable[[str], bool] = frozenset((*_FEATURES_OF, *framing.WORDS)).__contains__


def known(word: str) -> bool:
    """Return whether *word*, folded, is known in any language."""
    return word in _FEATURES_OF or framing.is_known(word) or languages.is_known(word)
