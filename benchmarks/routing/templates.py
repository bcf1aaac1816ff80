"""Make questions with checkable answers from templates, to fit and measure the draft check.

The check is fitted to eleven families of graded difficulty. The families of `HELD_OUT`, arithmetic stories of
several steps, only measure it. Everything is drawn from a seed. Questions that resemble one of
`questions.jsonl`, which the live evaluation uses, are left out.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from datetime import date, timedelta
from fractions import Fraction
from itertools import pairwise

from benchmarks.routing import tables
from benchmarks.routing.questions import Question, load
from benchmarks.routing.stories import short_story, story

HELD_OUT = ("word_problems", "short_word_problems")  # evaluation only
_Made = tuple[str, str, list[str]]  # prompt, kind, accepted answers
_SHORT = (" Answer with the number only.", " Reply with just the number.", "")
_STEPS = (
    " Work step by step and end with 'Answer: ' and the number.",
    " Show your working, then give the final answer.",
    " Think step by step.",
)


def questions(per_family: int = 70, word_problems: int = 120, seed: int = 1) -> list[Question]:
    """Return questions, shuffled, so that any prefix is a fair sample; the same for the same arguments."""
    live = [(_words(question.prompt), question.answers) for question in load()]
    made: list[Question] = []
    for family, makers in _FAMILIES.items():
        draw = random.Random(f"{seed} {family}")
        wanted = word_problems if family in HELD_OUT else per_family
        prompts: set[str] = set()
        for turn in range(50 * wanted):
            prompt, kind, answers = makers[turn % len(makers)](draw)
            if prompt in prompts or _resembles(prompt, answers, live):
                continue
            prompts.add(prompt)
            made.append(Question(f"{family}-{len(prompts):03}", family, prompt, kind, tuple(answers)))
            if len(prompts) == wanted:
                break
    random.Random(seed).shuffle(made)
    return made


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def _resembles(prompt: str, answers: list[str], live: list[tuple[frozenset[str], tuple[str, ...]]]) -> bool:
    words = _words(prompt)
    return any(
        set(answers) & set(others) and len(words & asked) >= 0.6 * len(words | asked)
        for asked, others in live
    )


def _number(value: Fraction | int) -> list[str]:
    exact = Fraction(value)
    return [str(exact.numerator) if exact.denominator == 1 else f"{float(exact):g}"]


# Arithmetic without a story.


def _sum(draw: random.Random) -> _Made:
    digits = draw.choice([2, 2, 3, 3, 4, 5])
    a, b = (draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    sign, value = draw.choice([("+", a + b), ("-", a - b), ("plus", a + b), ("minus", a - b)])
    return f"What is {a} {sign} {b}?" + draw.choice(_SHORT), "answer", _number(value)


def _product(draw: random.Random) -> _Made:
    a, b = draw.choice([(9, 9), (99, 9), (99, 12), (999, 9), (99, 99), (999, 99)])
    a, b = draw.randrange(2, a + 1), draw.randrange(3, b + 1)
    sign = draw.choice(["*", "times", "x", "multiplied by"])
    if draw.random() < 0.3:
        return f"What is {a * b} divided by {b}?" + draw.choice(_SHORT), "answer", _number(a)
    return f"What is {a} {sign} {b}?" + draw.choice(_SHORT), "answer", _number(a * b)


def _expression(draw: random.Random) -> _Made:
    a, b, c, d = (draw.randrange(2, 30) for _ in range(4))
    text, value = draw.choice(
        [
            (f"{a} + {b} * {c}", a + b * c),
            (f"({a} + {b}) * {c}", (a + b) * c),
            (f"{a} * {b} - {c}", a * b - c),
            (f"({a} + {b}) * {c} - {d}", (a + b) * c - d),
            (f"{a} * {b} + {c} * {d}", a * b + c * d),
            (f"({a * c} / {c} + {b}) * {d}", (a + b) * d),
            (f"{a}^2 - {b} + {c}", a * a - b + c),
            (f"{a} + {b} + {c} + {d} + {a + 7}", a + b + c + d + a + 7),
        ]
    )
    ask = draw.choice(["Calculate", "Compute", "What is the value of", "Evaluate"])
    return f"{ask} {text}." + draw.choice(_STEPS + _STEPS + _SHORT), "answer", _number(value)


def _share(draw: random.Random) -> _Made:
    percent, whole = draw.choice([5, 10, 12, 15, 20, 25, 30, 40, 60, 75, 80]), draw.randrange(2, 40) * 20
    kind = draw.randrange(3)
    if kind == 0:
        asked, value = f"What is {percent}% of {whole}?", Fraction(percent * whole, 100)
    elif kind == 1:
        bottom = draw.choice([3, 4, 5, 8])
        top = draw.randrange(1, bottom)
        whole = bottom * draw.randrange(3, 40)
        asked, value = f"What is {top}/{bottom} of {whole}?", Fraction(top * whole, bottom)
    else:
        asked, value = f"Increase {whole} by {percent}%.", Fraction(whole * (100 + percent), 100)
    return asked + draw.choice(_SHORT + _STEPS), "answer", _number(value)


def _statistics(draw: random.Random) -> _Made:
    values = [draw.randrange(2, 60) for _ in range(draw.choice([3, 4, 5, 6]))]
    listed = ", ".join(map(str, values))
    which = draw.choice(["sum", "largest number", "smallest number", "average", "range"])
    if which == "average":
        values[-1] += -sum(values) % len(values)
        listed = ", ".join(map(str, values))
    every: dict[str, Fraction | int] = {
        "sum": sum(values),
        "largest number": max(values),
        "smallest number": min(values),
        "average": Fraction(sum(values), len(values)),
        "range": max(values) - min(values),
    }
    return f"What is the {which} of {listed}?" + draw.choice(_SHORT + _STEPS), "answer", _number(every[which])


# Units and time.


def _unit(draw: random.Random) -> _Made:
    big, small, factor = draw.choice(tables.UNITS)
    count = draw.choice([2, 3, 4, 6, 7, 9, 11, 15, 24, 40])
    wording = draw.randrange(3)
    if wording == 0:
        asked, value = f"How many {small} are there in {count} {big}?", Fraction(count * factor)
    elif wording == 1:
        asked, value = f"Convert {count * factor} {small} to {big}.", Fraction(count)
    else:
        asked, value = f"Convert {count}.5 {big} to {small}.", Fraction(factor * (2 * count + 1), 2)
    return asked + draw.choice(_SHORT + _STEPS[:2]), "answer", _number(value)


def _mixed_unit(draw: random.Random) -> _Made:
    big, small, factor = draw.choice([unit for unit in tables.UNITS if unit[2] > 2])
    count, rest = draw.randrange(2, 12), draw.randrange(1, factor)
    asked = f"How many {small} are {count} {big} and {rest} {small} altogether?"
    return asked + draw.choice(_SHORT + _STEPS), "answer", _number(count * factor + rest)


def _chained_unit(draw: random.Random) -> _Made:
    first, last, factor = draw.choice(
        [
            ("days", "minutes", 1440),
            ("weeks", "hours", 168),
            ("hours", "seconds", 3600),
            ("kilometres", "centimetres", 100_000),
            ("yards", "inches", 36),
            ("gallons", "cups", 16),
            ("decades", "months", 120),
            ("tonnes", "grams", 1_000_000),
        ]
    )
    count = draw.randrange(2, 9)
    return (
        f"How many {last} are in {count} {first}?" + draw.choice(_STEPS + _SHORT),
        "answer",
        _number(count * factor),
    )


def _weekday(draw: random.Random) -> _Made:
    today, days = draw.randrange(7), draw.choice([2, 3, 5, 7, 9, 10, 15, 20, 30, 45, 100])
    back = draw.random() < 0.4
    there = tables.WEEKDAYS[(today - days if back else today + days) % 7]
    asked = f"was it {days} days ago" if back else f"will it be in {days} days"
    close = draw.choice([" Answer with the day only.", "", " Think step by step, then name the day."])
    others = [day for place, day in enumerate(tables.WEEKDAYS) if place != today and day != there]
    asked = f"If today is {tables.WEEKDAYS[today]}, what day of the week {asked}?{close}"
    return asked, "last_named", [there, *others]


def _calendar(draw: random.Random) -> _Made:
    start = date(draw.randrange(2001, 2030), draw.randrange(1, 13), draw.randrange(1, 28))
    days = draw.choice([3, 5, 8, 12, 20, 30, 45])
    end = start + timedelta(days)
    if draw.random() < 0.5:
        asked = (
            f"How many days are there from {start:%B} {start.day} to {end:%B} {end.day} of {start.year}?"
            if end.year == start.year
            else f"How many days are there from {start:%B} {start.day}, {start.year} to {end:%B} {end.day}, {end.year}?"
        )
        return asked + draw.choice(_SHORT), "answer", [str(days)]
    month = draw.randrange(12)
    which = draw.choice(["after", "before"])
    asked = f"Which month comes {draw.choice(['right ', 'just ', ''])}{which} {tables.MONTHS[month]}?"
    answer = tables.MONTHS[(month + (1 if which == "after" else -1)) % 12]
    others = [other for other in tables.MONTHS if other not in (answer, tables.MONTHS[month])]
    return asked, "last_named", [answer, *others]


def _year(draw: random.Random) -> _Made:
    year = draw.randrange(1850, 2100)
    kind = draw.randrange(3)
    if kind == 0:
        leap = (year % 4 == 0 and year % 100 != 0) or year % 400 == 0
        return (
            f"Was or is {year} a leap year? Answer yes or no.",
            "named",
            ["yes", "no"] if leap else ["no", "yes"],
        )
    later = year + draw.randrange(7, 120)
    if kind == 1:
        return (
            f"How many years lie between {year} and {later}?" + draw.choice(_SHORT),
            "answer",
            [str(later - year)],
        )
    return (
        f"Which century was the year {year} in? Answer with its number.",
        "answer",
        [str((year - 1) // 100 + 1)],
    )


def _clock(draw: random.Random) -> _Made:
    hour, minute = draw.randrange(1, 10), draw.choice([0, 5, 10, 15, 20, 30, 45, 50])
    later = draw.choice([25, 40, 55, 70, 95, 130])
    total = hour * 60 + minute + later
    asked = (
        f"A train leaves at {hour}:{minute:02} and travels for {later} minutes. At what time does it arrive?"
    )
    close = draw.choice([" Answer with the time only.", ""])
    return asked + close, "text", [f"{total // 60}:{total % 60:02}"]


# Facts.


def _fact(draw: random.Random) -> _Made:
    asked, pairs = draw.choice(tables.FACTS)
    thing, answers = draw.choice(pairs)
    close = draw.choice(["", "", " Answer in a few words.", " Reply with the answer only."])
    return asked.format(thing) + close, "text", list(answers)


def _choice(draw: random.Random) -> _Made:
    asked, pairs = draw.choice(tables.FACTS)
    thing, answers = draw.choice(pairs)
    others = sorted({answer[0] for _, answer in pairs} - set(answers))
    options = [answers[0], *draw.sample(others, min(3, len(others)))]
    draw.shuffle(options)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False))
    close = draw.choice(
        [
            "Answer with the letter only.",
            "Answer with one letter.",
            "Which one is right?",
            "Explain briefly, then give the letter.",
        ]
    )
    return f"{asked.format(thing)}\n{listed}\n{close}", "choice", ["ABCD"[options.index(answers[0])]]


def _odd_one(draw: random.Random) -> _Made:
    group, other = draw.sample(sorted(tables.GROUPS), 2)
    options = [*draw.sample(tables.GROUPS[group], 3), draw.choice(tables.GROUPS[other])]
    odd = options[-1]
    draw.shuffle(options)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
    return (
        f"Which of these does not belong with the others?\n{listed}\n"
        + draw.choice(["Answer with the letter only.", "Say why, and give its letter."]),
        "choice",
        ["ABCD"[options.index(odd)]],
    )


# Text.


def _string(draw: random.Random) -> _Made:
    word = draw.choice(tables.WORDS)
    place = draw.randrange(1, min(5, len(word)) + 1)
    letter = draw.choice(word)
    first, second = draw.sample(tables.WORDS, 2)
    return draw.choice(
        [
            (f"Write the word '{word}' backwards. Answer with that only.", "exact", [word[::-1]]),
            (f"Write the word '{word}' in capital letters.", "exact", [word.upper()]),
            (
                f"What is letter number {place} of the word '{word}'? Answer with the letter only.",
                "exact",
                [word[place - 1]],
            ),
            (
                f"How many letters does the word '{word}' have?" + draw.choice(_SHORT),
                "answer",
                [str(len(word))],
            ),
            (
                f"How many times does the letter '{letter}' occur in '{word}'?" + draw.choice(_SHORT),
                "answer",
                [str(word.count(letter))],
            ),
            (
                f"Join the words '{first}' and '{second}' into one, without a space. Answer with that only.",
                "exact",
                [first + second],
            ),
            (f"What are the first three letters of '{word}'? Answer with them only.", "exact", [word[:3]]),
            (f"What is the last letter of '{word}'?", "exact", [word[-1]]),
            (
                f"How many vowels are in the word '{word}'?" + draw.choice(_STEPS + _SHORT),
                "answer",
                [str(sum(c in "aeiou" for c in word))],
            ),
            (
                f"Remove every letter '{letter}' from '{word}'. Answer with the result only.",
                "exact",
                [word.replace(letter, "") or "nothing"],
            ),
        ]
    )


def _sorted_words(draw: random.Random) -> _Made:
    words = draw.sample(tables.WORDS, draw.choice([3, 3, 4, 5]))
    backwards = draw.random() < 0.3
    order = "reverse alphabetical" if backwards else "alphabetical"
    return (
        f"Sort these words in {order} order: {', '.join(words)}. Answer with the sorted list, with commas.",
        "sequence",
        sorted(words, reverse=backwards),
    )


def _passage(draw: random.Random) -> _Made:
    people = draw.sample(tables.NAMES, 4)
    towns = draw.sample(tables.TOWNS, 4)
    jobs = draw.sample(tables.JOBS, 4)
    years = draw.sample(range(1950, 2010), 4)
    count = draw.choice([1, 2, 3, 4])
    sentences = []
    for person, town, job, year in list(zip(people, towns, jobs, years, strict=True))[:count]:
        sentences.append(
            draw.choice(
                [
                    f"{person} was born in {year} in {town} and works as a {job}.",
                    f"Born in {town} in {year}, {person} became a {job} after school.",
                    f"In {town} lives {person}, a {job} who was born in {year}.",
                ]
            )
        )
    filler = draw.sample(tables.FILLER, draw.choice([1, 2, 3]))
    for sentence in filler:
        sentences.insert(draw.randrange(len(sentences) + 1), sentence)
    one = draw.randrange(count)
    asked, answer = draw.choice(
        [
            (f"When was {people[one]} born?", str(years[one])),
            (f"What is the job of {people[one]}?", jobs[one]),
            (f"Which town does the text connect with {people[one]}?", towns[one]),
            (f"Who is the {jobs[one]}?", people[one]),
            (f"Who was born in {years[one]}?", people[one]),
        ]
    )
    close = draw.choice(["", " Answer with that only.", " Answer in one short sentence."])
    layout = draw.choice(
        ["{text}\n\n{asked}", "Read the text and answer.\n\nText: {text}\n\nQuestion: {asked}"]
    )
    return (
        layout.format(text=" ".join(sentences), asked=asked + close),
        "named",
        [
            answer,
            *(
                other
                for group in (people, towns, jobs, list(map(str, years)))
                if answer in group
                for other in group
                if other != answer
            ),
        ],
    )


def _record(draw: random.Random) -> _Made:
    products = draw.sample(tables.PRODUCTS, draw.choice([3, 4, 6]))
    prices, stock = draw.sample(range(2, 99), len(products)), draw.sample(range(1, 60), len(products))
    table = "\n".join(f"{p} | {c} | {s}" for p, c, s in zip(products, prices, stock, strict=True))
    one = draw.randrange(len(products))
    asked, kind, answers = draw.choice(
        [
            (f"What does the {products[one]} cost?", "answer", [str(prices[one])]),
            (f"How many pieces of the {products[one]} are in stock?", "answer", [str(stock[one])]),
            ("Which product is the cheapest?", "named", [products[prices.index(min(prices))], *products]),
            (
                "Which product is the most expensive?",
                "named",
                [products[prices.index(max(prices))], *products],
            ),
            (f"Which product costs {prices[one]}?", "named", [products[one], *products]),
        ]
    )
    if kind == "named":
        answers = [answers[0], *(name for name in products if name != answers[0])]
    return f"product | price | stock\n{table}\n\n{asked}", kind, answers


def _format(draw: random.Random) -> _Made:
    name, town, age = draw.choice(tables.NAMES), draw.choice(tables.TOWNS), draw.randrange(18, 80)
    word, count = draw.choice(tables.WORDS), draw.randrange(2, 8)
    items = draw.sample(tables.PRODUCTS, draw.choice([2, 3, 4]))
    listed = ", ".join(items)
    return draw.choice(
        [
            (
                f"Give a JSON object with the keys name, age and town for {name}, who is {age} and lives in {town}. "
                "Output only the JSON.",
                "json",
                [json.dumps({"name": name, "age": age, "town": town})],
            ),
            (f"Output a JSON list of these strings: {listed}. Nothing else.", "json", [json.dumps(items)]),
            (
                f"Write the word '{word}' exactly {count} times, with spaces between.",
                "exactly",
                [" ".join([word] * count)],
            ),
            (
                f"Repeat this exactly, and say nothing else: {name} sells {items[0]} in {town}.",
                "exactly",
                [f"{name} sells {items[0]} in {town}."],
            ),
            (f"Write these as a numbered list, one per line: {listed}.", "sequence", items),
            (
                f"List the numbers from {count} to {count + 5}, with commas.",
                "exactly",
                [", ".join(map(str, range(count, count + 6)))],
            ),
            (f"List these in the opposite order, with commas: {listed}.", "sequence", items[::-1]),
            (
                f"Fill in the template 'NAME (AGE)' for {name}, who is {age}. Output only the result.",
                "exactly",
                [f"{name} ({age})"],
            ),
            (
                f"Write one line of CSV with the fields {name}, {age}, {town} in this order. No header.",
                "exactly",
                [f"{name},{age},{town}", f"{name}, {age}, {town}"],
            ),
            (
                f"Count down from {count + 3} to 1, with commas.",
                "exactly",
                [", ".join(map(str, range(count + 3, 0, -1)))],
            ),
        ]
    )


# Order and pattern.


def _compare(draw: random.Random) -> _Made:
    kind = draw.randrange(4)
    if kind == 0:
        whole = draw.randrange(1, 30)
        a, b = f"{whole}.{draw.randrange(2, 10)}", f"{whole}.{draw.randrange(10, 90)}"
        if float(a) == float(b):
            b = f"{whole}.{int(b.split('.')[1]) + 1}"
        more = draw.choice(["larger", "smaller"])
        best = (max if more == "larger" else min)((a, b), key=float)
        first, second = draw.sample([a, b], 2)
        return f"Which number is {more}: {first} or {second}?", "named", [best, a if best == b else b]
    if kind == 1:
        values = draw.sample(range(-50, 999), draw.choice([3, 4, 6]))
        listed = ", ".join(map(str, values))
        which = draw.choice(["largest", "smallest"])
        return (
            f"Which of these numbers is the {which}: {listed}? Answer with the number only.",
            "answer",
            [str((max if which == "largest" else min)(values))],
        )
    if kind == 2:
        bottoms = draw.sample([2, 3, 4, 5, 6, 7, 8, 9], 2)
        fractions = [Fraction(draw.randrange(1, bottom), bottom) for bottom in bottoms]
        if fractions[0] == fractions[1]:
            return _compare(draw)
        a, b = (f"{f.numerator}/{f.denominator}" for f in fractions)
        best = a if fractions[0] > fractions[1] else b
        return (
            f"Which fraction is greater, {a} or {b}?" + draw.choice(["", " Think step by step."]),
            "named",
            [best, a if best == b else b],
        )
    values = draw.sample(range(1, 200), draw.choice([3, 4, 5]))
    order = draw.choice(["ascending", "descending"])
    return (
        f"Put these numbers in {order} order: {', '.join(map(str, values))}. Answer with the list only.",
        "sequence",
        [str(value) for value in sorted(values, reverse=order == "descending")],
    )


def _relation(draw: random.Random) -> _Made:
    names = draw.sample(tables.NAMES, draw.choice([2, 3, 3, 4]))
    more, less, most, least = draw.choice(
        [
            ("taller", "shorter", "tallest", "shortest"),
            ("older", "younger", "oldest", "youngest"),
            ("faster", "slower", "fastest", "slowest"),
            ("heavier", "lighter", "heaviest", "lightest"),
        ]
    )
    facts = []
    for upper, lower in pairwise(names):
        facts.append(
            f"{upper} is {more} than {lower}." if draw.random() < 0.6 else f"{lower} is {less} than {upper}."
        )
    draw.shuffle(facts)
    which = draw.random() < 0.5
    answer = names[0] if which else names[-1]
    close = draw.choice([" Answer with the name only.", "", " Think step by step and end with the name."])
    return (
        f"{' '.join(facts)} Who is the {most if which else least}?{close}",
        "named",
        [answer, *(name for name in names if name != answer)],
    )


def _sequence(draw: random.Random) -> _Made:
    start, step = draw.randrange(1, 20), draw.randrange(2, 12)
    kind = draw.randrange(5)
    if kind == 0:
        values = [start + step * place for place in range(6)]
    elif kind == 1:
        values = [90 + start - step * place for place in range(6)]
    elif kind == 2:
        values = [start % 5 + 1]
        for _ in range(5):
            values.append(values[-1] * (2 + step % 2))
    elif kind == 3:
        values = [(start % 6 + place) ** 2 for place in range(6)]
    else:
        values = [start % 5, step % 6 + 1]
        for _ in range(4):
            values.append(values[-1] + values[-2])
    listed = ", ".join(map(str, values[:-1]))
    ask = draw.choice(
        [
            "What number comes next: {}?",
            "Continue the sequence with one number: {}",
            "{}. What is the next number?",
        ]
    )
    return ask.format(listed) + draw.choice(_SHORT + _STEPS[1:]), "answer", [str(values[-1])]


def _code(draw: random.Random) -> _Made:
    name, does, tests = draw.choice(tables.FUNCTIONS)
    ask = draw.choice(
        [
            "Write a Python function {name} that {does}.",
            "Implement {name} in Python: it {does}. Give only the code.",
            "Write a Python function called {name}. It {does}. No explanation, please.",
        ]
    )
    return ask.format(name=name, does=does), "python", list(tests)


_FAMILIES: dict[str, list[Callable[[random.Random], _Made]]] = {
    "arithmetic": [_sum, _product, _expression, _expression, _share, _statistics],
    "units": [_unit, _unit, _mixed_unit, _chained_unit],
    "dates": [_weekday, _calendar, _year, _clock],
    "facts": [_fact],
    "choices": [_choice, _choice, _odd_one],
    "strings": [_string, _string, _string, _sorted_words],
    "extraction": [_passage, _passage, _record],
    "formats": [_format],
    "comparisons": [_compare, _relation],
    "sequences": [_sequence],
    "code": [_code],
    "word_problems": [story],
    "short_word_problems": [short_story],
}
