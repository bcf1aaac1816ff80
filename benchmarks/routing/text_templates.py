"""Templates of questions about facts, text, order and code; each returns a question with its check."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from itertools import pairwise

from benchmarks.routing import tables
from benchmarks.routing.arithmetic_templates import SHORT, STEPS, Made

# Facts.


def fact_question(draw: random.Random) -> Made:
    asked, pairs = draw.choice(tables.FACTS)
    thing, answers = draw.choice(pairs)
    close = draw.choice(["", "", " Answer in a few words.", " Reply with the answer only."])
    return asked.format(thing) + close, "text", list(answers)


def choice_question(draw: random.Random) -> Made:
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


def odd_one_question(draw: random.Random) -> Made:
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


def string_question(draw: random.Random) -> Made:
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
                f"How many letters does the word '{word}' have?" + draw.choice(SHORT),
                "answer",
                [str(len(word))],
            ),
            (
                f"How many times does the letter '{letter}' occur in '{word}'?" + draw.choice(SHORT),
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
                f"How many vowels are in the word '{word}'?" + draw.choice(STEPS + SHORT),
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


def sorted_words_question(draw: random.Random) -> Made:
    words = draw.sample(tables.WORDS, draw.choice([3, 3, 4, 5]))
    backwards = draw.random() < 0.3
    order = "reverse alphabetical" if backwards else "alphabetical"
    return (
        f"Sort these words in {order} order: {', '.join(words)}. Answer with the sorted list, with commas.",
        "sequence",
        sorted(words, reverse=backwards),
    )


def passage_question(draw: random.Random) -> Made:
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


def record_question(draw: random.Random) -> Made:
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


def format_question(draw: random.Random) -> Made:
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


def compare_question(draw: random.Random) -> Made:
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
            return compare_question(draw)
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


def relation_question(draw: random.Random) -> Made:
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


def sequence_question(draw: random.Random) -> Made:
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
    return ask.format(listed) + draw.choice(SHORT + STEPS[1:]), "answer", [str(values[-1])]


def code_question(draw: random.Random) -> Made:
    name, does, tests = draw.choice(tables.FUNCTIONS)
    ask = draw.choice(
        [
            "Write a Python function {name} that {does}.",
            "Implement {name} in Python: it {does}. Give only the code.",
            "Write a Python function called {name}. It {does}. No explanation, please.",
        ]
    )
    return ask.format(name=name, does=does), "python", list(tests)
