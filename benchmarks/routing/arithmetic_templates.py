"""Templates of questions about arithmetic, units and time; each returns a question with its check."""

from __future__ import annotations

import random
from datetime import date, timedelta
from fractions import Fraction

from benchmarks.routing import tables

Made = tuple[str, str, list[str]]  # prompt, kind, accepted answers
SHORT = (" Answer with the number only.", " Reply with just the number.", "")
STEPS = (
    " Work step by step and end with 'Answer: ' and the number.",
    " Show your working, then give the final answer.",
    " Think step by step.",
)


def whole_or_decimal(value: Fraction | int) -> list[str]:
    """Return the accepted answer: a whole number, or a decimal."""
    exact = Fraction(value)
    return [str(exact.numerator) if exact.denominator == 1 else f"{float(exact):g}"]


# Arithmetic without a story.


def sum_question(draw: random.Random) -> Made:
    digits = draw.choice([2, 2, 3, 3, 4, 5])
    a, b = (draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    sign, value = draw.choice([("+", a + b), ("-", a - b), ("plus", a + b), ("minus", a - b)])
    return f"What is {a} {sign} {b}?" + draw.choice(SHORT), "answer", whole_or_decimal(value)


def product_question(draw: random.Random) -> Made:
    a, b = draw.choice([(9, 9), (99, 9), (99, 12), (999, 9), (99, 99), (999, 99)])
    a, b = draw.randrange(2, a + 1), draw.randrange(3, b + 1)
    sign = draw.choice(["*", "times", "x", "multiplied by"])
    if draw.random() < 0.3:
        return f"What is {a * b} divided by {b}?" + draw.choice(SHORT), "answer", whole_or_decimal(a)
    return f"What is {a} {sign} {b}?" + draw.choice(SHORT), "answer", whole_or_decimal(a * b)


def expression_question(draw: random.Random) -> Made:
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
    return f"{ask} {text}." + draw.choice(STEPS + STEPS + SHORT), "answer", whole_or_decimal(value)


def share_question(draw: random.Random) -> Made:
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
    return asked + draw.choice(SHORT + STEPS), "answer", whole_or_decimal(value)


def statistics_question(draw: random.Random) -> Made:
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
    return (
        f"What is the {which} of {listed}?" + draw.choice(SHORT + STEPS),
        "answer",
        whole_or_decimal(every[which]),
    )


# Units and time.


def unit_question(draw: random.Random) -> Made:
    big, small, factor = draw.choice(tables.UNITS)
    count = draw.choice([2, 3, 4, 6, 7, 9, 11, 15, 24, 40])
    wording = draw.randrange(3)
    if wording == 0:
        asked, value = f"How many {small} are there in {count} {big}?", Fraction(count * factor)
    elif wording == 1:
        asked, value = f"Convert {count * factor} {small} to {big}.", Fraction(count)
    else:
        asked, value = f"Convert {count}.5 {big} to {small}.", Fraction(factor * (2 * count + 1), 2)
    return asked + draw.choice(SHORT + STEPS[:2]), "answer", whole_or_decimal(value)


def mixed_unit_question(draw: random.Random) -> Made:
    big, small, factor = draw.choice([unit for unit in tables.UNITS if unit[2] > 2])
    count, rest = draw.randrange(2, 12), draw.randrange(1, factor)
    asked = f"How many {small} are {count} {big} and {rest} {small} altogether?"
    return asked + draw.choice(SHORT + STEPS), "answer", whole_or_decimal(count * factor + rest)


def chained_unit_question(draw: random.Random) -> Made:
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
        f"How many {last} are in {count} {first}?" + draw.choice(STEPS + SHORT),
        "answer",
        whole_or_decimal(count * factor),
    )


def weekday_question(draw: random.Random) -> Made:
    today, days = draw.randrange(7), draw.choice([2, 3, 5, 7, 9, 10, 15, 20, 30, 45, 100])
    back = draw.random() < 0.4
    there = tables.WEEKDAYS[(today - days if back else today + days) % 7]
    asked = f"was it {days} days ago" if back else f"will it be in {days} days"
    close = draw.choice([" Answer with the day only.", "", " Think step by step, then name the day."])
    others = [day for place, day in enumerate(tables.WEEKDAYS) if place != today and day != there]
    asked = f"If today is {tables.WEEKDAYS[today]}, what day of the week {asked}?{close}"
    return asked, "last_named", [there, *others]


def calendar_question(draw: random.Random) -> Made:
    start = date(draw.randrange(2001, 2030), draw.randrange(1, 13), draw.randrange(1, 28))
    days = draw.choice([3, 5, 8, 12, 20, 30, 45])
    end = start + timedelta(days)
    if draw.random() < 0.5:
        asked = (
            f"How many days are there from {start:%B} {start.day} to {end:%B} {end.day} of {start.year}?"
            if end.year == start.year
            else f"How many days are there from {start:%B} {start.day}, {start.year} to {end:%B} {end.day}, {end.year}?"
        )
        return asked + draw.choice(SHORT), "answer", [str(days)]
    month = draw.randrange(12)
    which = draw.choice(["after", "before"])
    asked = f"Which month comes {draw.choice(['right ', 'just ', ''])}{which} {tables.MONTHS[month]}?"
    answer = tables.MONTHS[(month + (1 if which == "after" else -1)) % 12]
    others = [other for other in tables.MONTHS if other not in (answer, tables.MONTHS[month])]
    return asked, "last_named", [answer, *others]


def year_question(draw: random.Random) -> Made:
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
            f"How many years lie between {year} and {later}?" + draw.choice(SHORT),
            "answer",
            [str(later - year)],
        )
    return (
        f"Which century was the year {year} in? Answer with its number.",
        "answer",
        [str((year - 1) // 100 + 1)],
    )


def clock_question(draw: random.Random) -> Made:
    hour, minute = draw.randrange(1, 10), draw.choice([0, 5, 10, 15, 20, 30, 45, 50])
    later = draw.choice([25, 40, 55, 70, 95, 130])
    total = hour * 60 + minute + later
    asked = (
        f"A train leaves at {hour}:{minute:02} and travels for {later} minutes. At what time does it arrive?"
    )
    close = draw.choice([" Answer with the time only.", ""])
    return asked + close, "text", [f"{total // 60}:{total % 60:02}"]
