"""Word lists of short replies: consent, questions about the answer, thanks and farewell, in many languages.

`dependence.py` reads them. A reply matches if it consists of these words only, so that a list may contain
words that are common in other sentences.
"""

from __future__ import annotations

import re


def words(text: str) -> frozenset[str]:
    """Return the words of *text*, which are separated by spaces."""
    return frozenset(text.split())


def phrases(text: str) -> frozenset[str]:
    """Return the phrases of *text*, which are separated by bars."""
    return frozenset(text.split("|"))


# English, by what a reply does. Each word may appear beside `FILLERS`.
CONSENT = words(
    "yes yeah yep yup yea ya sure ok okay k kk fine alright right correct absolutely definitely "
    "certainly course indeed exactly agreed please go continue proceed next more keep going carry start "
    "begin do let's lets no nope nah not neither both either first second third last mhm mm-hm uh-huh mm "
    "hm hmm affirmative"
)
COURTESY = words(
    "thanks thank thx ty tysm cheers appreciate appreciated grateful bye goodbye cya farewell goodnight "
    "great perfect awesome cool nice excellent wonderful brilliant fantastic lovely amazing superb neat "
    "sweet good ok okay k fine alright understood gotcha noted wow haha lol congrats ta helpful helped "
    "helps nevermind welcome done interesting yay hooray solved works kk okie okey thnx thanx tnx tks tyvm "
    "thankyou obliged legend ace bravo kudos stellar splendid terrific outstanding impressive sorted ciao "
    "cheerio laters phew aha ahh ooh"
)
# Beside words of courtesy or consent.
FILLERS = words(
    "so much very a an lot lots ton tons for your you the that that's thats this it it's its was is all "
    "and now i i'm have had day night evening weekend one job work well really again time help to me my "
    "got makes sense see later soon tomorrow today mind never everything then on ahead with of from "
    "there here be would i'd i'll that'd that'll it'll will by just what exactly needed wanted looking "
    "great love looks sounds up along let as where stopped left off were at oh ah hm hmm um too also "
    "pretty super quite am not need no more else nothing us we're take care talk best wishes saved thing "
    "stuff man buddy dear sir please answer explanation info information tip advice solution quick "
    "response next week"
)
FAREWELL = words(
    "thanks thank thx ty tysm cheers appreciate appreciated bye goodbye cya farewell goodnight nevermind"
)
SHORT_QUESTIONS = phrases(
    "why|how|how so|how come|why not|why is that|why that|really|what|huh|meaning|when|where|who|which|"
    "which one|and|and then|then what|then|so|so what|what then|what next|what's next|what now|what else|"
    "anything else|like what|such as|for example|for instance|says who|since when|how exactly|"
    "why exactly|are you sure|you sure|sure|is it|is that so|seriously|is that all|is that right|"
    "is that true|what do you mean|pardon|sorry|come again|or not|or|an example|example|examples|details|"
    "more details|more|eli5|tldr|tl;dr"
)
# Standalone small talk, which begins like a question about the answer.
SMALL_TALK = (
    "how are you",
    "how's it going",
    "how is it going",
    "how do you do",
    "what's up",
    "hello",
    "hi there",
    "hi ",
    "hey ",
    "good morning",
    "good evening",
    "good afternoon",
    "who are you",
    "what can you do",
    "what's your name",
    "what is your name",
    "tell me a joke",
    "tell me a fun fact",
)
NEW_TOPIC = (
    "new topic",
    "new question",
    "different question",
    "different topic",
    "another question",
    "another topic",
    "unrelated",
    "something else",
    "something different",
    "something completely different",
    "by the way",
    "btw",
    "on another note",
    "on a different note",
    "on a side note",
    "change of topic",
    "change of subject",
    "changing the subject",
    "change the subject",
    "switching gears",
    "switching topics",
    "forget that",
    "forget about that",
    "forget it",
    "never mind that",
    "moving on",
    "separate question",
    "off topic",
    "off-topic",
    "random question",
    "before i forget",
    "while i'm here",
    "not related",
    "totally different",
)

# Other languages: Mandarin, Hindi, Spanish, Arabic, French, Bengali, Portuguese, Russian, Urdu, German,
# Japanese, Indonesian. Phrases separated by |; a reply may join several.
OTHER_REPLIES = phrases(
    "是|是的|对|对的|好|好的|好吧|可以|行|嗯|请|请继续|继续|接着|接着说|下一步|然后呢|为什么|为何|怎么|"
    "怎么样|怎么办|不|不是|不对|再来|再试一次|更多|还有呢|请做|做吧|हाँ|हां|जी|जी हाँ|ठीक है|ठीक|करो|"
    "करें|कीजिए|कर दो|आगे|आगे बढ़ो|आगे बढ़ें|जारी रखो|जारी रखें|क्यों|कैसे|नहीं|फिर|फिर से|और|कृपया|अगला|"
    "दूसरा|बिल्कुल|sí|si|claro|vale|dale|sigue|siga|continúa|continua|continúe|adelante|hazlo|hágalo|"
    "por favor|por qué|porque|por que|cómo|como|no|otra vez|más|mas|siguiente|y entonces|y luego|"
    "de acuerdo|y el segundo|y la segunda|نعم|أجل|ايوه|أيوه|طبعا|طبعًا|حسنا|حسنًا|تمام|تابع|أكمل|اكمل|"
    "استمر|واصل|لماذا|ليش|كيف|لا|من فضلك|رجاء|المزيد|مرة أخرى|افعل|افعل ذلك|التالي|وبعد ذلك|oui|ouais|"
    "d'accord|bien sûr|vas-y|allez-y|allez|continue|continuez|poursuis|pourquoi|comment|non|encore|plus|"
    "suivant|s'il te plaît|s'il vous plaît|stp|svp|et ensuite|et après|et le deuxième|et la deuxième|"
    "হ্যাঁ|হা|হাঁ|জি|ঠিক আছে|করুন|করো|চালিয়ে যান|চালিয়ে যাও|কেন|কীভাবে|কিভাবে|না|আবার|আরও|আরো|দয়া করে|"
    "অনুগ্রহ করে|তারপর|এগিয়ে যান|sim|certo|pode|pode ser|prossiga|vai|faz isso|faça isso|faça|por quê|"
    "porquê|não|nao|de novo|mais|próximo|e depois|e então|e o segundo|e a segunda|да|ага|конечно|хорошо|"
    "ладно|давай|давайте|продолжай|продолжайте|дальше|далее|почему|зачем|как|нет|ещё|еще|ещё раз|"
    "пожалуйста|сделай|сделай это|а второй|а вторая|и что|и потом|ہاں|جی|جی ہاں|ٹھیک ہے|ٹھیک|کرو|کریں|"
    "کر دیں|کیوں|کیسے|نہیں|جاری رکھیں|جاری رکھو|آگے|آگے بڑھیں|پھر|پھر سے|مزید|براہ کرم|مہربانی|اور|ja|"
    "jawohl|klar|gerne|gern|okay|mach das|mach|tu das|weiter|mach weiter|bitte|weiter so|fortfahren|"
    "warum|wieso|weshalb|wie|wie denn|nein|nochmal|noch mal|noch einmal|mehr|nächste|und dann|und weiter|"
    "und das zweite|und die zweite|und der zweite|はい|ええ|うん|お願いします|おねがいします|お願い|"
    "続けて|続けてください|続き|なぜ|なんで|どうして|どうやって|いいえ|もう一度|もっと|次|次は|それで|"
    "そうしてください|やって|やってください|ya|iya|tentu|baik|silakan|lanjut|lanjutkan|teruskan|mengapa|"
    "kenapa|bagaimana|tidak|lagi|sekali lagi|tolong|lakukan|lalu|kemudian|네|예|응|계속|계속해|계속해줘|"
    "왜|왜요|아니요|evet|devam|devam et|neden|hayır|sì|perché|ja graag|ga door|waarom|tak|dalej|dlaczego"
)
OTHER_COURTESY = phrases(
    "شكرا لك|شكرا لكم|谢谢|谢谢你|谢谢您|多谢|非常感谢|感谢|再见|拜拜|明白了|知道了|懂了|太好了|很好|"
    "完美|धन्यवाद|शुक्रिया|बहुत बहुत धन्यवाद|बहुत धन्यवाद|बहुत|अलविदा|समझ गया|समझ गई|बढ़िया|बहुत अच्छा|"
    "अच्छा|नमस्ते|gracias|muchas gracias|mil gracias|muchísimas gracias|adiós|adios|hasta luego|chao|"
    "perfecto|genial|entendido|muy bien|excelente|estupendo|شكرا|شكرًا|شكرا جزيلا|شكرًا جزيلًا|شكراً|"
    "شكراً جزيلاً|جزيلا|مع السلامة|وداعا|ممتاز|رائع|فهمت|merci|merci beaucoup|merci bien|au revoir|"
    "à bientôt|salut|parfait|super|génial|compris|très bien|bonne journée|beaucoup|ধন্যবাদ|অনেক ধন্যবাদ|"
    "অনেক|বিদায়|বুঝেছি|দারুণ|খুব ভালো|obrigado|obrigada|muito obrigado|muito obrigada|muito|valeu|tchau|"
    "até logo|perfeito|ótimo|entendi|muito bem|спасибо|спасибо большое|большое спасибо|большое|благодарю|"
    "пока|до свидания|понятно|понял|поняла|отлично|супер|прекрасно|شکریہ|بہت شکریہ|بہت بہت شکریہ|بہت|"
    "خدا حافظ|سمجھ گیا|زبردست|بہت اچھا|danke|danke schön|dankeschön|danke sehr|vielen dank|vielen|"
    "besten dank|herzlichen dank|tschüss|auf wiedersehen|perfekt|toll|prima|verstanden|sehr gut|"
    "alles klar|ありがとう|ありがとうございます|ありがとうございました|どうも|さようなら|わかりました|"
    "分かりました|なるほど|素晴らしい|完璧|terima kasih|terima kasih banyak|makasih|sampai jumpa|"
    "mengerti|bagus|sempurna|selamat tinggal|감사합니다|고마워|고마워요|안녕|teşekkürler|teşekkür ederim|"
    "grazie|grazie mille|ciao|dank je|bedankt|dziękuję"
)
# The names of languages after "in", "to" or their like: "now in German".
LANGUAGES = words(
    "english german french spanish italian portuguese russian chinese mandarin japanese korean hindi "
    "arabic bengali urdu turkish dutch polish swedish norwegian danish finnish greek hebrew latin "
    "indonesian malay vietnamese thai persian farsi ukrainian czech hungarian romanian python javascript "
    "typescript java rust golang go ruby kotlin swift php perl c c++ c# sql bash haskell scala r matlab "
    "julia lua html css markdown json yaml xml csv latex anglais allemand espagnol français inglés "
    "alemán francés español inglês alemão francês englisch deutsch französisch spanisch английском "
    "немецком русском французском испанском"
)

# Words of short replies in other languages, beside those of `OTHER_REPLIES`.
OTHER_WORDS = frozenset(word for reply in OTHER_REPLIES for word in reply.split()) | words(
    "y el la los las lo un una otro otra otros así asi eso esto cuál cuáles qué entonces también ahora "
    "mejor con sin para segundo primera et le les des ça ca autre pas aussi encore maintenant alors "
    "ensuite quel quelle avec sans pour deuxième premier und der die das den dem ein eine andere anderen "
    "so genau auch noch dann jetzt auf mit ohne für zweite erste welche es nicht e o a os as um uma "
    "outro outra assim isso isto qual então também agora com sem primeiro и а это что так другой другая "
    "второй вторая тогда теперь тоже ещё с без для какой он она оно не वह यह दूसरा दूसरी अब तो क्या इसे "
    "उसे भी और फिर में هذا هذه ذلك الثاني الآن أيضا و ماذا في এটা ওটা এখন আর কি তাহলে یہ وہ دوسرا اب بھی "
    "کیا تو itu ini yang kedua juga sekarang dan apa dong saja bisa"
)
OTHER_WORDS |= (
    words(
        "en à au del al na no em по на в для im ins continuar seguir puedes puede podrías podría hacer hazlo "
        "explicar explicarlo explica explícame traducir traduce traducirlo resumir resume corrige corregir "
        "cambiar cambia mostrar muéstrame paso ejemplo ejemplos más menos corto simple favor me te lo esa "
        "ese peux tu peux-tu pouvez vous pouvez-vous pourrais-tu expliquer explique traduire traduis résumer "
        "résume corriger refais refaire montre montrer exemple étape plus moins court moi kannst könntest "
        "können du sie bitte mir erklären erkläre übersetzen übersetze zusammenfassen kürzen kürze "
        "korrigieren korrigiere zeig zeige beispiel beispiele schritt kürzer einfacher genauer mal pode "
        "poderia você traduzir traduza resuma corrigir corrija mostre exemplo passo curto можешь можете "
        "объясни объяснить объясните переведи перевести сократи исправь покажи пример подробнее короче проще "
        "мне समझाओ समझाइए बताओ बताइए अनुवाद उदाहरण आसान संक्षेप इसका मुझे دो اشرح ترجم لخص صحح مثال أكثر لي "
        "ব্যাখ্যা অনুবাদ উদাহরণ এটার وضاحت ترجمہ اس کا کی jelaskan terjemahkan ringkas perbaiki contoh lebih "
        "singkat dalam ke bahasa"
    )
    | LANGUAGES
)
# With these begin thanks in other languages.
OTHER_THANKS = (
    *(
        "gracias",
        "muchas gracias",
        "mil gracias",
        "merci",
        "danke",
        "vielen dank",
        "besten dank",
        "obrigad",
        "muito obrigad",
        "valeu",
    ),
    *(
        "спасибо",
        "благодарю",
        "谢谢",
        "多谢",
        "感谢",
        "非常感谢",
        "धन्यवाद",
        "शुक्रिया",
        "बहुत धन्यवाद",
        "شكرا",
        "شكرًا",
        "شكراً",
        "ধন্যবাদ",
    ),
    *(
        "অনেক ধন্যবাদ",
        "شکریہ",
        "بہت شکریہ",
        "ありがとう",
        "どうも",
        "terima kasih",
        "makasih",
        "감사",
        "고마워",
        "teşekkür",
        "grazie",
        "dank je",
    ),
)
# Replies with other words that refer to the last answer: "and if", "in more detail", "the second part".
OTHER_REFERS = re.compile(
    r"^[¿¡\s]*(?:y (?:si|con|en|para|el|la|los|las)|et (?:si|avec|en|pour|le|la|les)|"
    r"und (?:wenn|mit|ohne|auf|in|für|der|die|das)|e (?:se|com|em|para)|а (?:если|можно|в|для|с|как|что)|"
    r"и (?:если|как|в)|और (?:अगर|थोड़ा|में)|ولو|وماذا|وإذا|আর যদি|dan (?:kalau|jika)|kalau|اور اگر|那如果|"
    r"那么|如果|もし|では|じゃあ)(?!\w)|"
    r"\b(?:davon|damit|dazu|dabei|darin|daran|daraus|eso|ello|isso|isto|ça|cela|celui-ci|celle-ci|этого|"
    r"этот|этом|его|её|эту)\b|它|这个|那个|それ|これ|इसे|इसका|इसको|इसमें|उसे|ذلك|এটা|এটি|اسے|"
    r"\b(?:ausführlicher|detaillierter|kürzer|einfacher|genauer|schneller|"
    r"m[áa]s (?:cort|larg|simpl|sencill|detall|r[áa]pid|formal)|"
    r"plus (?:court|long|simpl|détaill|rapid|formel)|"
    r"mais (?:curt|long|simpl|detalh|rápid|formal)|подробнее|короче|проще|точнее|быстрее|другое|другой|"
    r"lebih (?:detail|singkat|sederhana|rinci|pendek))|"
    r"详细|简短|简单一点|詳しく|短く|簡単に|विस्तार|संक्षेप|সংক্ষেপ|বিস্তারিত|تفصيل|تفصیل|باختصار|"
    r"\b(?:zweite|dritte|letzte|erste)[nrsm]? (?:teil|schritt|punkt|zeile|absatz|beispiel|beweis)|"
    r"\b(?:segund|tercer|últim|primer|terceir|primeir)[oa]? "
    r"(?:paso|parte|punto|línea|párrafo|ejemplo|passo|ponto|linha)|"
    r"\b(?:deuxième|troisième|dernière?|première?) (?:étape|partie|point|ligne|paragraphe|exemple)|"
    r"\b(?:втор|трет|последн|перв)\w+ (?:шаг|част|пункт|строк|абзац|пример)"
)
# Words in ASCII, of which a text in ASCII has one if it matches.
OTHER_SIGNS = words(
    "y et und e dan kalau davon damit dazu dabei darin daran daraus eso ello isso isto cela celui-ci "
    "celle-ci detaillierter einfacher genauer schneller mas plus mais lebih zweite zweiten zweiter zweites "
    "dritte dritten dritter drittes letzte letzten letzter letztes erste ersten erster erstes segundo "
    "segunda tercer tercera primer primera primeira primeiro terceira terceiro"
)
# The same for writing without spaces, of short replies.
OTHER_CONTINUES = re.compile(
    r"^(?:那|再|还有|還有|然后|继续|把它|它|请继续|それ|これ|もっと|じゃあ|では|もう一|続け)|呢[?？]?$"
)
