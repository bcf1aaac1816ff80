"""Word lists and patterns that find what a turn of a conversation refers to, and what it does.

All are for lower-case English. `dependence.py` combines what they find.
"""

from __future__ import annotations

import re

from headrace.routing.scoring.turns.replies import phrases, words

WH = words(
    "what when where who whom whose which why how is are was were do does did can could will would "
    "should has have had am may might shall"
)
REQUEST = words(
    "write make give show tell list explain describe find compute calculate prove solve derive create "
    "build implement design add remove change replace use try fix repair check test run convert "
    "translate summarize summarise rewrite rephrase shorten simplify extend expand elaborate compare "
    "plan name draft continue do let's lets let now but also and then next instead another again please "
    "one can could would what how why need want i'd redo repeat help generate put start stop go extract "
    "classify evaluate determine factor estimate integrate differentiate define state given suppose "
    "consider assume if hi hello hey like code program count return get set develop outline recommend "
    "suggest discuss analyze analyse"
)
# What may stand before a request.
BEFORE_REQUEST = re.compile(r"^(?:(?:ok|okay|now|so|and|then|great|well|alright|good)\W+){1,3}")
# Words before the next task, or the next part of the last one.
SEQUENCE = words("now then next so ok okay great well alright right nice")
# Verbs that modify something, by default the last answer.
MODIFY = words(
    "rewrite rephrase reword redo retry shorten simplify elaborate expand clarify continue repeat add "
    "remove change replace include fix repair check double-check recheck verify extend refactor optimize "
    "optimise improve correct revise adjust update generalize generalise reformat adapt modify drop swap "
    "skip undo debug reduce rename move delete insert append wrap shuffle highlight bold underline trim "
    "handle support try rerun clean tidy"
)
# Verbs whose object is the last answer if the text names none.
REWORK = MODIFY | words(
    "translate summarize summarise convert explain show write compare describe give run test make put "
    "turn format paraphrase proofread polish port merge split combine apply finish complete use sort "
    "reverse prove solve increase"
)
REPAIR = words(
    "fix repair debug pass run rerun test refactor optimize optimise correct implement solve error "
    "errors crash crashes fails failing broken bug bugs work works compile compiles patch resolve deploy "
    "retry again"
)
OPENERS = {
    **dict.fromkeys(("and", "but", "or", "also", "instead", "another", "again", "otherwise", "same"), 0.75),
    **dict.fromkeys(("now", "then", "next"), 0.6),
    **dict.fromkeys(
        ("so", "no", "nope", "wait", "actually", "hmm", "because", "plus", "still", "maybe", "perhaps"), 0.35
    ),
    **dict.fromkeys(
        ("ok", "okay", "yes", "yeah", "sure", "great", "right", "nice", "hm", "well", "alright"), 0.35
    ),
}
OPENING = re.compile(
    r"\W*(?:(?:ok|okay|now|so|and|but|then|great|hm+)\W+)*(?:what about|how about|what if|"
    r"what would|what happens if|one more|"
    r"same (?:thing|for|with|question)|do the same|try again|next one|last one|go (?:on|ahead|back|"
    r"with)|more (?:about|on|of|details?)|"
    r"as (?:an?|bullet)|let's (?:do|go|take|try|use)|in (?:one|two|three|a few|fewer|your) |"
    r"not (?:the|that|this)|are you sure|"
    r"is there another|any other|is that|is this|does (?:that|this|it)|can you (?:also|do)|"
    r"i (?:don't|do not|didn't) (?:get|understand|follow)|"
    r"i'm (?:lost|confused)|(?:give|show) me (?:an?|another|some|more) (?:other )?(?:examples?|"
    r"details?|hints?)|how (?:so|come)|what do you mean|why (?:not|is|does|do|did|are|was) (?:it|"
    r"that|this|you|they|we)|"
    r"(?:try|redo|run|use|do) (?:it|that|this)|how (?:do|did) you (?:get|know|come)|tell me more|"
    r"let me (?:see|have)|"
    r"explain (?:like|as if|to me like|further|more|again)|(?:can|could) you be more|show your|"
    r"are there (?:any )?\w+\W*$|"
    r"(?:in|with|using) (?:simple|simpler|plain|other|layman's|more|less|fewer)\b)\b"
)
ANAPHORS = re.compile(
    r"\b(?:it|its|it's|itself|they|them|their|(?:these|those)(?! \w+ (?:which|that|who|whose)\b)|he|"
    r"him|his|she|her|above|previous|earlier|former|latter|"
    r"(?:the |that |this |your |another |first |second |third |last |next |each |other |"
    r"which )(?:one|ones)|ones|"
    r"the \w+ one|(?:the )?(?:first|second|third|fourth|fifth|last|next|other|final) (?:step|part|point|one|"
    r"paragraph|case|option|example|"
    r"sentence|line|line|term|test|question|half|method|way|two|three|item|section|answer|person|"
    r"column|row|chapter|stanza|verse)s?|"
    r"(?:step|option|point|part|line|item|case|version|number|section) (?:\d+|one|two|three|four|"
    r"five|six|[a-d])|the (?:second|first|third|last|other)(?=\s*(?:\?|$))|"
    r"your (?!name|favou?rite|opinion|job|age|day|hobb|model|developer|self)\w+|"
    r"you (?:said|wrote|suggested|mentioned|used|gave|listed|forgot|missed|misread|ignored|got|made|"
    r"just|meant|stopped|left|divide|divided)|"
    r"of these|of those|of them|to this|of this|about this|about that|like that|like this|this way|"
    r"that way|(?:the|do|this) same(?! (?:\w+ )?(?:as|type|size|length|number|time|kind)))\b"
    r"|\b(?:then|instead)(?=\s*\??$)"
)
# "this" and "that" as pronouns; not "that" before or in a clause ("prove that", "a function that takes").
THAT = re.compile(
    r"\b(?:this|that)(?=\s*(?:\?|$|again\b|more\b|one\b|part\b|step\b|and\b|or\b|but\b|a little\b|"
    r"a bit\b|better\b|"
    r"faster\b|shorter\b|in\b|into\b|to\b|with\b|without\b|for me\b|as\b|out\b|up\b|please\b|now\b|"
    r"also\b|too\b|"
    r"answer\b|result\b|line\b|error\b|example\b|case\b|code\b|function\b|last\b|first\b))"
    r"|(?:^|\b(?:does|do|did|would|will|can|could|should|is|was|if|why|how|when|and|but|so|what|"
    r"because|think|sure|what's) )"
    r"(?:this|that)\b|^(?:this|that)(?:'s)?\b"
)
THINGS = re.compile(
    r"\bthe (?:answer|code|function|table|list|example|proof|result|solution|steps?|errors?|essay|"
    r"email|poem|story|text|"
    r"paragraphs?|sentences?|formula|equation|algorithm|method|input|output|complexity|same|others?|"
    r"rest|tests?|library|"
    r"argument|conclusion|title|tone|ending|beginning|intro|introduction|plan|query|script|class|"
    r"loop|edge cases?|"
    r"difference|derivation|bound|constant|assumption|case|middle|details?|minimum|maximum|opposite|"
    r"reverse|numbers?)"
    r"(?=\s*(?:\?|$|(?:again|more|is|are|was|does|do|into|as|using|shorter|longer|faster|work|works|"
    r"hold|holds|a bit|a little|"
    r"so|please|change|look|look|too|also|and|or|step by step)\b))"
)
# "it" without a referent, and pronouns that the text itself resolves.
NO_REFERENT = re.compile(
    r"\b(?:(?:time|date|day|year|month|weather) (?:is|was) it|(?:is|was) it (?:true|possible|ok|"
    r"okay|safe|normal|raining|usually|better to|"
    r"going to (?:rain|snow|be)|necessary|legal|warm|cold|worth|healthy|bad|good|rude|a )|it(?:'s|"
    r" is) (?:noon|midnight|"
    r"raining|\d)|take it easy|"
    r"how long does it take|same time|it'?s (?:going|up))\b"
)
FRAGMENT = words(
    "in with without for as using from on by at to into per like than via only just under over within"
)
COMPARATIVE = re.compile(
    r"^(?:(?:a bit|a little|much|even|way|make it|but) )?(?:more|less|fewer|\w{3,}er|better|worse|"
    r"too \w+|not \w+)(?: \w+)?(?: please)?$"
)
CORRECTS = re.compile(
    r"\b(?:(?:that|this|it|which|answer|result|code)(?:'s| is| was| looks| seems)? (?:\w+ )?(?:not |"
    r"in)?(?:wrong|incorrect|correct\b(?<=not correct)|"
    r"false|mistaken|off by)|(?:isn't|is not|not|doesn't look|does not look|isn't quite|not quite|"
    r"wasn't) (?:right|correct|true|what i|working|it\b)|wrong|"
    r"(?:you|you've|you have) (?:made (?:a|an|another|some) (?:\w+ )?(?:mistake|error)|forgot|"
    r"missed|misread|misunderst\w+|ignored|overlooked|skipped|got (?:it|that) wrong)|"
    r"made an? (?:mistake|error)|(?:doesn't|does not|didn't|did not|won't|still not|not) (?:work|"
    r"compile|run|pass|match|help)|"
    r"still (?:the same|fails?|failing|wrong|broken|crash\w*|get|getting|doesn't|not|does)|"
    r"try (?:it )?again|same (?:error|problem|mistake)|"
    r"(?:i get|getting|gives me|throws|it gives) (?:an? |the same |something )?(?:\w+ )?(?:error|"
    r"exception|different)|fails? (?:the|on|for|with|again)|"
    r"should (?:be|have been) .{1,30}(?:,|\bnot\b|instead)|is off by|check your (?:numbers|math|"
    r"work|result|calculation)|"
    r"(?:don't|do not) think (?:that|this|it)(?:'s| is)? (?:\w+ )?(?:right|correct|true)|"
    r"not the (?:\w+ ){1,2}i (?:expected|wanted|asked|meant|need)|not what i (?:asked|wanted|meant|"
    r"need)|i (?:asked|said|meant|wanted) .{0,40}\bnot\b|"
    r"error in (?:the|your)|(?:it|that|this|you) fail(?:s|ed))\b"
)
OFFERS = re.compile(
    r"(?:anything else|something else|further questions|other questions|more questions|how (?:can|"
    r"may) i (?:help|assist)|"
    r"what can i (?:do|help)|can i help|help you with|need (?:any )?(?:more|further) help)[^?]*\?\s*$",
    re.IGNORECASE,
)
STOP = words(
    "the a an of to in on for and or is are was were be do does did can could will would should what "
    "which who how why when where it this that these those i you me my your we please with from by at as "
    "not"
)

# The reply ends with a part of what was answered: "walk me through the inductive step".
PART = re.compile(
    r"\bthe (?:\w+ ){0,2}(?:step|deduction|inference|argument|claim|lemma|proof|inequality|equation|identity|"
    r"formula|expression|term|factor|coefficient|exponent|sign|bound|integral|derivative|induction|case|assumption|"
    r"condition|hypothesis|conclusion|complexity|runtime|loop|index|pointer|variable|parameter|"
    r"function|method|query|join|cache|lock|thread|test|exception|error|paragraph|sentence|opening|intro|ending|title|tone|"
    r"table|column|row|budget|timeline|phase|milestone|section|item|answer|result|constant|discriminant|"
    r"determinant|root|substitution|recursion|iteration|import|output|input|stanza|verse|scene|ingredient|part|option|idea|word|example|"
    r"reason|point|letter|detail|version|approach|plan|strategy|design)"
    r"(?:e?s)?(?: then| again| now| please)?\W*$"
)
# "What are the downsides?" asks about the last answer, "what is the time?" does not.
ABOUT_IT = re.compile(
    r"(?:are there (?:any )?\w+|(?:any|how many) (?:\w+ )?\w+)\W*$|"
    r"(?:(?:and|but|so|ok) )?(?:what (?:is|are|was|were)|what's|show me|list|give me|who (?:is|was)|"
    r"where (?:is|are|was)|how (?:big|long|much|"
    r"expensive) (?:is|are)) the (?!weather|time|date|news|day|year|moon|sun|world|meaning|"
    r"capital)\w+(?: then| again)?\W*$"
)
THANKS = ("thanks", "thank", "thx", "thnx", "thanx", "tnx", "cheers", "appreciate", "tysm", "tyvm", "obliged")
# Parts of clauses that say that the work is done.
LEAVE = (
    *("that's all", "that is all", "thats all", "that's it", "see you", "makes sense", "take care"),
    *("that's what i", "just what i", "exactly what i", "what i needed", "all i need", "got it", "good job"),
    *(
        "well done",
        "nothing else",
        "no more questions",
        "no further questions",
        "all good",
        "all set",
        "it works",
    ),
    *(
        "i'll take it from here",
        "have a good",
        "have a nice",
        "have a great",
        "i'll try that",
        "you're the best",
        "that helps",
        "that worked",
        "no thanks",
    ),
)
THANKS_WORDS = frozenset(THANKS)
FAREWELL = (
    *("have a good", "have a nice", "have a great", "have a lovely", "see you", "see ya", "take care", "cya"),
    *("catch you", "catch ya", "talk soon", "talk later", "good night", "goodnight", "bye", "ciao"),
)
# Beside more text, these clauses deny that the last answer is right.
DENIAL = phrases("no|nope|nah|no no|hm no|hmm no|not really|not quite|not exactly|no way")
# With these words, a clause beside thanks consents.
GOES_ON = words("yes yeah yep yup sure please go continue proceed next more")
# With these words begin remarks beside thanks, such as "you saved my day".
REMARKS = words(
    "you you're you've that that's this it it's i i'm i'll i've have see talk we just no all now really "
    "for my so until till ok okay yes oh ah everything hope exactly very much works"
)
# With these words, a remark is none.
NO_REMARK = words("but not still wrong need want also can could please add")
# Words before the verb of a request.
LEADING = words("please can could you would now then next also and but ok okay so just")

# Words that name no topic of their own: a question with these only is about something that was said before.
GENERAL = words(
    "show showing shown explain explaining tell say said mean meant mind test testing use used using "
    "write written make made do did done doing go going goes went keep turn put take taking give given "
    "get getting got add adding remove change changed fix check try run redo work works working look "
    "looks see know think want need like liked let help start stop end finish continue apply applied "
    "handle include cover happen happens happened break breaks fail fails failed skip choose pick prefer "
    "suggest recommend compare improve back carry follow walk spell lay expand elaborate clarify confirm "
    "verify justify prove support assume hold holds matter matters depend cause causes affect affects "
    "differ compute calculate derive solve simplify reduce increase double halve replace swap sort print "
    "return rename refactor rewrite rephrase reword shorten summarize translate convert format list "
    "outline draft polish come comes came stay stays become becomes care agree disagree believe expect "
    "wonder wondering confuse confuses confused lost stuck sense step steps part parts point points "
    "example examples case cases way ways method methods approach approaches reason reasons reasoning "
    "answer answers result results solution solutions version versions line lines word words sentence "
    "sentences paragraph section page detail details idea ideas option options choice choices plan plans "
    "thing things bit bits lot lots kind kinds type types number numbers value values term terms formula "
    "equation table checklist bullet bullets summary title code function tests comment comments error "
    "errors output input inputs half rest other others side beginning middle top bottom first second "
    "third fourth last next previous final general specific total time times cost costs difference proof "
    "claim argument assumption assumptions condition base edge problem problems issue issues question "
    "questions request tone style level long short longer shorter quick quicker simple simpler easy "
    "easier hard harder better best worse worst good bad great right wrong correct sure certain same "
    "different similar new old big bigger small smaller large larger more less fewer many much few "
    "little strict stricter formal clear clearer fast faster slow slower full whole entire complete "
    "brief concise detailed negative positive zero empty possible useful helpful interesting important "
    "exact exactly actual actually really just only even still again also too very quite rather maybe "
    "perhaps instead otherwise anyway then now later before after once twice always never sometimes "
    "often here there somewhere nothing something anything everything someone anyone everyone one ones "
    "two three four five all any some each every both either neither another such own and or but if "
    "because so than as about into over under between without within through during against behind up "
    "down out off on in at by for from to of with the a an this that these those it its they them their "
    "he him his she her we us our you your yours i me my mine myself yourself be is are was were been am "
    "being have has had having can could will would shall should may might must not no yes ok okay "
    "please thanks hm hmm um well i'd i'll i'm i've you'd you'll you're you've it's that's what's "
    "there's let's don't doesn't didn't isn't aren't wasn't can't couldn't won't wouldn't shouldn't what "
    "when where who whom whose which why how further additional extra else rid"
)

# "Would a loop be shorter?" compares with what was said; "is a cat faster than a dog?" does not.
COMPARES = re.compile(
    r"^(?!.*\b(?:than|or)\b).*\b(?:easier|better|worse|shorter|longer|faster|slower|simpler|cheaper|"
    r"cleaner|safer|larger|smaller|"
    r"bigger|quicker|clearer|stronger|harder|nicer|tighter|stricter|funnier)\b"
)
AS_WELL = re.compile(r"\b(?:as well|too|here|anymore|any more|either)\W*$")
