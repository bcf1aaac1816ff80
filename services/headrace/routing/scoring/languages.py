"""Words of languages other than English that point to features, and the most frequent words.

`lexicon.py` counts the words of a feature like the English ones, `framing.py` uses the courtesy, and
`prompt_features.py` doubts a text of which hardly any word is known. Words are in lower case and without
accents on Latin letters (`words.fold` removes them). In scripts other than Latin an entry stands for all
words that begin with it; in Chinese and Japanese, for all places where it occurs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from headrace.routing.scoring.words import IDEOGRAMS, fold

# feature -> words, by language: es fr pt de id (Latin), ru, ar ur, hi, bn, zh ja
FEATURES: dict[str, str] = {
    "programming": """
        funcion funciones codigo programa algoritmo lista matriz cadena ordena ordene clase implementa
        fonction fonctions programme algorithme liste tableau chaine classe implemente
        funcao funcoes codigo algoritmo ordene vetor cadeia implemente
        funktion programm programmiere algorithmus liste zeichenkette sortiert klasse implementiere quelltext
        fungsi kode algoritma daftar urutkan mengurutkan pemrograman larik
        функци код программ алгоритм список списк массив строк сортир класс реализу
        دال برنامج برمج كود خوارزم قائم مصفوف سلسل فرز فنكشن پروگرام كوڈ الگورتھم فهرست
        फ़ंक्शन फंक्शन कोड प्रोग्राम एल्गोरिद सूची स्ट्रिंग क्रमबद्ध
        ফাংশন কোড প্রোগ্রাম অ্যালগরি তালিকা স্ট্রিং সাজা
        函数 代码 程序 算法 列表 数组 字符串 排序 编程
        链表 実装 関数 コード プログラム アルゴリズム リスト 配列 文字列 ソート
    """,
    "reasoning": """
        demuestra demuestre demostrar prueba deduce razona logica acertijo supongamos conclusion
        demontre demontrez montre montrez prouve prouvez prouver deduis logique enigme supposons conclusion
        prove demonstre mostre deduza logica charada suponha conclusao
        beweise beweisen zeige zeigen begrunde folgere logik ratsel angenommen schlussfolgerung warum
        buktikan tunjukkan simpulkan logika misalkan kesimpulan jelaskan alasan mengapa
        докаж доказ покажи выведи логик загадк предполож вывод почему
        اثبت برهن استنتج منطق لغز افترض استنتاج لماذا ثابت نتيج كيوں
        सिद्ध साबित तर्क पहेली निष्कर्ष मान लीजिए क्यों
        প্রমাণ যুক্তি ধাঁধা সিদ্ধান্ত কেন
        证明 推导 推理 逻辑 谜题 假设 结论 为什么 証明 推論 論理 仮定 結論 なぜ 理由
    """,
    "analysis": """
        explica explique explicar compara compare analiza ventajas desventajas diferencia diferencias
        explique expliquez expliquer comparez compare analyse avantages inconvenients difference differences
        explique compare analise vantagens desvantagens diferenca diferencas
        erklare erklaren vergleiche analysiere vorteile nachteile unterschied unterschiede
        jelaskan bandingkan analisis kelebihan kekurangan perbedaan
        объясн сравни анализ преимуществ недостат разниц отлич
        اشرح قارن حلل مزاي عيوب فرق وضاحت موازن
        समझा व्याख्या तुलना विश्लेषण लाभ अंतर
        ব্যাখ্যা তুলনা বিশ্লেষণ সুবিধা পার্থক্য
        解释 比较 分析 优点 缺点 区别 优缺点 説明 比較 利点 欠点 違い
    """,
    "mathematics": """
        ecuacion ecuaciones integral derivada triangulo circulo angulo teorema entero enteros primo primos
        probabilidad raiz suma producto resuelve resuelva calcula calcule area volumen divisible numeros
        equation equations integrale derivee triangle cercle rayon theoreme entier entiers
        probabilite racine somme produit resous resolvez resoudre calcule calculez aire nombres
        equacao equacoes integral derivada triangulo raio teorema inteiro inteiros primos probabilidade soma
        produto resolva calcule area divisivel
        gleichung gleichungen ableitung dreieck kreis winkel satz ganze primzahl primzahlen wahrscheinlichkeit
        wurzel summe produkt berechne flache teilbar zahlen zahl
        persamaan turunan segitiga lingkaran sudut jari teorema bilangan prima peluang akar jumlah selesaikan
        hitung hitunglah luas volume habis
        уравнен интеграл производн треугольн окружн угол теорем целы просты вероятн корен сумм произведен реши
        вычисл найди площад объем делится чис
        معادل تكامل مشتق مثلث دائر زاوي نظري صحيح اولي احتمال جذر مجموع حل احسب مساح حجم عدد اعداد
        مساوات حساب نكال رقب
        समीकरण समाकलन अवकलज त्रिभुज वृत्त कोण प्रमेय पूर्णांक अभाज्य प्रायिकता मूल योग गुणनफल हल गणना
        क्षेत्रफल आयतन संख्या
        সমীকরণ সমাকলন ত্রিভুজ বৃত্ত কোণ উপপাদ্য পূর্ণসংখ্যা মৌলিক সম্ভাবনা মূল যোগফল গুণফল সমাধান গণনা
        ক্ষেত্রফল সংখ্যা
        方程 积分 导数 三角形 圆 角 定理 整数 质数 素数 概率 平方根
        之和 乘积 求解 解方程 计算 面积 体积 整除 無理数 无理数 確率 積分
        微分 計算 解け 解いて 面積 体積
    """,
    "how_many": """
        cuanto cuantos cuanta cuantas combien quantos quantas quanto quanta wieviel wieviele viele berapa
        сколько
        كم كتن كتنا कितन কত কতটি কতগুলি 多少 几个 多长 多远 几 いくつ いくら 何個 何人 何分 何時間
    """,
    "fact": """
        quien cuando donde capital presidente pais ciudad invento nacio pelicula
        qui quand capitale president ville invente film
        quem onde capital presidente pais cidade inventou nasceu filme
        wer wann wo hauptstadt prasident land stadt erfunden geboren film
        siapa kapan dimana ibukota ibu presiden negara kota penemu lahir film
        кто когда где столиц президент стран город изобре родил фильм
        من متي اين عاصم رئيس دول مدين اخترع ولد كون كب كہاں دارالحكوم
        कौन किसने कब कहाँ कहां राजधानी राष्ट्रपति देश शहर आविष्कार जन्म
        কে কবে কখন কোথায় রাজধানী রাষ্ট্রপতি দেশ শহর আবিষ্কার জন্ম
        谁 哪一年 何时 首都 总统 国家 城市 发明 出生 哪里 誰 いつ どこ 大統領 都市 生まれ
    """,
    "creative": """
        poema cuento historia ensayo carta correo cancion poeme histoire lettre chanson redaction
        poema conto historia redacao carta cancao gedicht geschichte aufsatz
        puisi cerita surat esai lagu стих рассказ историю письмо сочинен песн
        قصيد قص رسال مقال نظم كہاني خط कविता कहानी निबंध पत्र কবিতা গল্প রচনা চিঠি
        诗 故事 作文 信 邮件 歌词 詩 物語 手紙 メール 作文
    """,
    "transformation": """
        traduce traduzca traducir resume resuma resumir corrige corrija reescribe parafrasea
        traduis traduisez traduire resume resumez resumer corrige corrigez reecris
        traduza traduzir resuma resumir corrija reescreva ubersetze ubersetzen korrigiere korrigieren
        fasse zusammenfassen zusammen umschreiben terjemahkan ringkas rangkum perbaiki
        перевед перевод кратко изложи исправ перепиши перескаж
        ترجم لخص صحح تلخيص خلاص درست अनुवाद सारांश सुधार संक्षेप অনুবাদ সারাংশ সংক্ষেপ সংশোধন
        翻译 总结 概括 改写 纠正 摘要 翻訳 要約 訂正 直して 訳して
    """,
    "advice": """
        consejo consejos recomienda recomendaciones sugerencias conseil conseils recommande suggestions
        dicas conselho conselhos recomende tipps ratschlag empfehle empfehlung saran rekomendasi tips
        совет рекоменд посовет نصيح نصائح اقترح مشور सलाह सुझाव পরামর্শ 建议 推荐 アドバイス おすすめ 提案
    """,
    "relations": """
        madre padre hermano hermana menor alto alta bajo pere frere soeur agee jeune petit
        mae pai irmao irma velho velha novo alto mutter vater bruder schwester junger grosser kleiner
        altere jungste ayah kakak adik saudara tua muda tinggi pendek
        мать отец брат сестр старше младш выше ниже ام اب اخ اخت اكبر اصغر اطول اقصر بهائي بہن بڑا چھوٹا
        माँ पिता भाई बहन बड़ा बड़ी छोटा छोटी लंबा মা বাবা ভাই বোন বড় ছোট লম্বা
        母亲 父亲 哥哥 弟弟 姐姐 妹妹 年长 年轻 更高 最小 最大 母 父 兄 姉 妹 年上 年下 高い 若い
    """,
    "comparison": """
        menos doble triple mitad tercio veces moins double moitie fois mais dobro metade terco
        mehr weniger doppelt halfte drittel lebih kurang dua kali setengah sepertiga больше меньше вдвое
        половин
        اكثر اقل ضعف نصف ثلث زياد كم دگن आधा दोगुना अधिक कम तिहाई বেশি কম দ্বিগুণ অর্ধেক
        两倍 一半 三倍 三分之一 更多 更少 比 倍 半分 より
    """,
    "money": """
        euros dolares pesos cuesta precio paga gasta dollars coute prix paie depense reais custa preco paga
        euro kostet preis zahlt bezahlt rupiah harga bayar рубл цен стоит плат دولار سعر ثمن يدفع روپ قيمت
        रुपये कीमत मूल्य টাকা দাম মূল্য 元 价格 美元 花了 円 値段 価格
    """,
    "time": """
        hora horas minuto minutos dia dias semana km velocidad heure heures minutes jour jours semaine vitesse
        velocidade stunde stunden minuten tage woche geschwindigkeit menit hari minggu kecepatan
        час минут дней день недел скорост км ساع دقيق يوم اسبوع سرع كم گھنٹ منٹ رفتار
        घंटे घंटा मिनट दिन सप्ताह किमी गति ঘণ্টা মিনিট দিন সপ্তাহ কিমি গতি 小时 分钟 公里 速度 时间 時間 分間 時速
    """,
    "remainder": """
        quedan queda resto vende vendio compra compro da restent reste vend vendu achete donne sobram restam
        vendeu comprou deu ubrig verkauft kauft gibt bleiben sisa menjual membeli memberi
        остал продал купил отдал بقي باع اشتر اعط بچ बचे बेच खरीद
        दिए বাকি বিক্রি কিন দিল 剩 卖 买 给了 残 売 買 あげ
    """,
    "each": """
        cada chaque cada jede jeder jedes pro setiap masing кажд كل لكل ہر प्रत्येक हर প্রতি 每 每个 每天 それぞれ
        毎日 ごと
    """,
    "together": """
        total totales juntos suma total juntos gesamt insgesamt zusammen total semuanya всего вместе итого
        اجمال معا مجموع كل मिलाकर कुल মোট একসাথে 总共 一共 合计 全部で 合計 合わせて
    """,
    "conditions": """
        si cuando excepto pero entonces quand sauf alors entao exceto wenn ausser aber dann jika kecuali
        tetapi maka если когда кроме затем اذا عندما الا ثم اگر
        यदि अगर लेकिन তাহলে যদি কিন্তু 如果 当 除了 然后 もし
        ただし
    """,
    "conjunctions": "et und и و اور और এবং 和 と",
    "number_words": """
        tres cuatro cinco seis siete ocho nueve diez deux trois quatre cinq huit neuf dix dois quatro sete
        oito
        zwei drei vier funf sechs sieben acht neun zehn dua tiga empat lima enam tujuh delapan sembilan
        sepuluh
    """,
    "first_person": "yo mi je mon ma meu minha ich mein meine saya aku я мой мне انا ميں मैं मेरा আমি আমার 我 私",
}

# The most frequent words, which show that a language is known.
FREQUENT = """
    भी हुआ हुई हो हूँ कर करें करना मुझे आप किस कितने बताइए लिखें वर्ष इससे मदद मिली तो नहीं कुछ सभी इस उस
    كان كانت ذلك اي عام لا هناك ماذا اكتب هم نحن قد كل بعض بين بعد قبل انت لم لن لقد حيث
    কোন আমি আপনি এটা না সালে লিখুন করুন হয়েছে তারপর সব কিছু আছে ছিলেন তা সেই আমার আপনার
    isso esta este muito mais foi eram sao tem mi tu esta este son fue muy mas est sont cette cet avec par ont
    это был была было были его её мы вы бы же уже все есть мне тебе
    كہ نہيں تھا تھي ايك اس ان بھي تو ہوا كر كريں لكھيں سال ہم آپ
    el la los las un una de que y en es por con para del se su al lo como le les des du est et dans une
    sur pas ce
    il elle ne au aux qui vous je o os as um uma do da em no na nao que e com der die das und ist nicht
    ein eine zu
    den von mit auf im dem fur wie was sind des yang dan di ke dari untuk dengan ini itu adalah pada apa
    dalam tidak
    bagaimana qual quais como onde quais cual cuales como quel quelle quels comment welche welcher
    и в на что не как это с по из для то или он она они так какой какая
    في من علي ان ما هل هو هي هذا هذه الي عن كيف التي الذي مع او ايك كا كي كے ميں سے كو ہے ہيں اور يہ نے پر كيا
    का की के में है हैं से को ने और यह क्या पर एक कैसे था
    একটি এর এই কি কী থেকে করে হয় জন্য এবং যে কিভাবে তার ছিল
    的 是 了 在 有 不 吗 什么 如何 怎么 请 这 の は を に が で です ます した ください か
"""

COURTESY = """
    hola buenos buenas dias tardes noches gracias muchas favor saludos disculpe perdon agradezco agradeceria
    anticipadas antemano bonjour bonsoir salut merci beaucoup avance plait sil cordialement remercie excusez
    ola oi bom boa tarde noite obrigado obrigada agradeco desde muito hallo guten tag morgen abend danke dank
    vielen bitte voraus grusse gruss liebe freundlichen entschuldigung halo hai selamat pagi siang sore malam
    terima kasih tolong mohon banyak maaf ciao buongiorno grazie mille prego salve dzien dobry dziekuje prosze
    merhaba tesekkurler lutfen konnichiwa arigato namaste shukran salaam assalamu alaikum
    здравствуйте привет спасибо пожалуйста добрый день вечер утро заранее большое благодарю уважением
    مرحبا اهلا السلام عليكم شكرا جزيلا فضلك لك من صباح الخير مساء تحياتي وعليكم
    سلام عليكم شكريہ مہرباني براه كرم آداب السلام علیکم شکریہ
    नमस्ते नमस्कार धन्यवाद कृपया शुक्रिया सुप्रभात बहुत
    নমস্কার হ্যালো ধন্যবাদ দয়া করে অনুগ্রহ শুভ সকাল অনেক
    你好 您好 谢谢 谢谢你 谢谢您 非常感谢 请
    麻烦您 拜托 感谢 早上好 请问 こんにちは おはようございます こんばんは
    ありがとう ありがとうございます お願いします よろしくお願いします 안녕하세요 감사합니다
"""
COURTESY_OTHERS = """
    y por muy su ayuda te le lo se que un s il vous je votre aide pour d l em pela sua ajuda mit ihre
    hilfe fur im za
"""

_LONGEST = 8  # letters of the longest stem
_MOST = 1_000  # ideograms that are read


def _table() -> dict[str, tuple[str, ...]]:
    """Return the features of each word, or stem."""
    found: dict[str, tuple[str, ...]] = {}
    for name, entries in FEATURES.items():
        for entry in set(fold(entries).split()):
            key = entry if entry.isascii() else entry[:_LONGEST]
            also = ("text_work",) if name == "transformation" else ()  # no list of its own here
            found[key] = (*found.get(key, ()), name, *also)
    return found


_FEATURES_OF = _table()
# Of words in ASCII, which `lexicon.py` counts with the English ones.
IN_ASCII = {word: names for word, names in _FEATURES_OF.items() if word.isascii()}
_FREQUENT = frozenset(fold(FREQUENT).split())


def counts(words: Sequence[str], text: str) -> Counter[str]:
    """Return the number of words that point to each feature, for a *text* that is not in ASCII.

    words   of the text, folded
    """
    found: Counter[str] = Counter()
    for word in words:
        if not word.isascii() and not IDEOGRAMS.match(word):
            found.update(_FEATURES_OF.get(_stem(word), ()))
    left = _MOST
    for run in IDEOGRAMS.findall(text):
        place, run, left = 0, run[:left], left - len(run)
        while place < len(run):
            size = next((size for size in (4, 3, 2, 1) if run[place : place + size] in _FEATURES_OF), 0)
            if size:
                found.update(_FEATURES_OF[run[place : place + size]])
            place += size or 1
        if left <= 0:
            break
    return found


def _stem(word: str) -> str:
    """Return the longest known beginning of a word in another script than Latin; empty if there is none."""
    for size in range(min(len(word), _LONGEST), 1, -1):
        if word[:size] in _FEATURES_OF:
            return word[:size]
    return ""


def is_known(word: str) -> bool:
    """Return whether *word*, folded, is known in any of the languages."""
    if word in _FREQUENT or word in _FEATURES_OF:
        return True
    if word.isascii():
        return False
    return bool(_stem(word)) or not _FREQUENT.isdisjoint(word)
