"""Make arithmetic word problems of two to about eight steps, in the style of primary school books.

They measure the draft check on a kind of question that it was not fitted to. The stories are our own. The
answer of each is known by construction, and all answers are whole numbers.
"""

from __future__ import annotations

import random

from benchmarks.routing import tables

_ITEMS = (
    "marbles",
    "stickers",
    "shells",
    "stamps",
    "beads",
    "cards",
    "coins",
    "buttons",
    "walnuts",
    "postcards",
)
_ASKS = ("", "", "", " Show your reasoning.", " Explain each step and give the final number.")
_Story = tuple[str, int]


def story(draw: random.Random) -> tuple[str, str, list[str]]:
    """Return a problem, the kind of its check, and its answer."""
    text, answer = draw.choice(_STORIES)(draw)
    return text + draw.choice(_ASKS), "answer", [str(answer)]


def short_story(draw: random.Random) -> tuple[str, str, list[str]]:
    """Like `story`, with two or three steps and small numbers."""
    name, other = draw.sample(tables.NAMES, 2)
    item = draw.choice(_ITEMS)
    a, b, c, d = draw.randrange(4, 15), draw.randrange(2, 8), draw.randrange(2, 6), draw.randrange(1, 4)
    text, answer = draw.choice(
        [
            (
                f"{name} has {c} bags with {a} {item} in each and gives {b} {item} to {other}. "
                f"How many {item} does {name} have left?",
                a * c - b,
            ),
            (
                f"{name} buys {b} tickets for ${a} each and a map for ${c}. How much does {name} spend in all, in dollars?",
                a * b + c,
            ),
            (
                f"{name} has {a} {item}. {other} has {b} more than {name}. How many {item} do they have together?",
                2 * a + b,
            ),
            (
                f"{a * b} {item} are shared equally among {b} children. {name}, one of them, then loses {d}. "
                f"How many {item} does {name} have now?",
                a - d,
            ),
            (
                f"{name} reads {a} pages on Monday and twice as many on Tuesday. On Wednesday it is {b} pages. "
                "How many pages are that altogether?",
                3 * a + b,
            ),
            (
                f"A pen costs ${c} and a notebook costs ${b}. {name} buys {d + 1} pens and {c} notebooks. "
                "What is the total cost in dollars?",
                c * (d + 1) + b * c,
            ),
            (
                f"{name} had {a + 20} {item}, gave {b} to {other} and then lost {c}. How many are left?",
                a + 20 - b - c,
            ),
            (
                f"{name} works {b} hours a day for {c} days and earns ${a} an hour. How many dollars does {name} earn?",
                a * b * c,
            ),
        ]
    )
    return text + draw.choice(_ASKS), "answer", [str(answer)]


def _collection(draw: random.Random) -> _Story:
    """Return a problem in which a collection changes two to eight times."""

    name, other = draw.sample(tables.NAMES, 2)
    item = draw.choice(_ITEMS)
    have = draw.randrange(2, 13) * 12
    told = [draw.choice([f"{name} starts with {have} {item}.", f"{name} has collected {have} {item}."])]
    for _ in range(draw.randrange(2, 9)):
        kinds = ["gets", "buys", "loses", "gives", "packs"]
        kinds += ["half"] if have % 2 == 0 and have > 8 else []
        kinds += ["third"] if have % 3 == 0 and have > 9 else []
        kinds += ["double"] if have < 60 else []
        match draw.choice(kinds):
            case "gets":
                count = draw.randrange(3, 40)
                have += count
                told.append(
                    draw.choice([f"{other} gives {name} {count} more.", f"Then {name} finds {count} {item}."])
                )
            case "buys" | "packs":
                packs, each = draw.randrange(2, 7), draw.randrange(3, 12)
                have += packs * each
                told.append(f"{name} buys {packs} packs with {each} {item} in each.")
            case "loses":
                count = draw.randrange(1, max(have // 3, 2))
                have -= count
                told.append(draw.choice([f"{count} of them get lost.", f"{name} sells {count} of them."]))
            case "gives":
                friends = draw.randrange(2, 5)
                each = draw.randrange(1, max(have // (3 * friends), 2))
                have -= friends * each
                told.append(f"{name} gives {each} {item} to each of {friends} friends.")
            case "half":
                have //= 2
                told.append(f"Half of what is left then goes to {other}.")
            case "third":
                have -= have // 3
                told.append(f"A third of the {item} {name} then has are given to a school.")
            case "double":
                have *= 2
                told.append(f"A generous aunt doubles what {name} has.")
        if have < 8:
            break
    return f"{' '.join(told)} How many {item} does {name} have now?", have


def _shopping(draw: random.Random) -> _Story:
    name = draw.choice(tables.NAMES)
    goods = draw.sample(tables.PRODUCTS, draw.randrange(2, 5))
    counts = [draw.randrange(2, 9) for _ in goods]
    prices = [draw.randrange(2, 15) for _ in goods]
    cost = sum(count * price for count, price in zip(counts, prices, strict=True))
    paid = (cost // 50 + 1) * 50
    bought = ", ".join(f"{c} {g} at ${p} each" for c, g, p in zip(counts, goods, prices, strict=True))
    if draw.random() < 0.4:
        voucher = draw.randrange(2, 10)
        return (
            f"{name} buys {bought}. A voucher takes ${voucher} off the bill, and {name} pays with ${paid}. "
            "How many dollars of change come back?",
            paid - cost + voucher,
        )
    return (
        f"{name} buys {bought} and pays with ${paid}. How much change does {name} get, in dollars?",
        paid - cost,
    )


def _wages(draw: random.Random) -> _Story:
    name = draw.choice(tables.NAMES)
    pay, hours, extra = draw.randrange(5, 15) * 2, draw.randrange(20, 40), draw.randrange(2, 9)
    weeks, rent = draw.choice([2, 3, 4]), draw.randrange(10, 40) * 10
    over = pay * 3 // 2
    earned = weeks * (pay * hours + over * extra)
    if rent >= earned:
        rent = earned // 2
    return (
        f"{name}, a {draw.choice(tables.JOBS)}, earns ${pay} an hour and works {hours} hours a week. Overtime is paid at "
        f"one and a half times that rate, and every week there are {extra} hours of it. After {weeks} weeks {name} pays "
        f"${rent} of rent. How many dollars are left?",
        earned - rent,
    )


def _harvest(draw: random.Random) -> _Story:
    rows, trees, each = draw.randrange(3, 9), draw.randrange(4, 12), draw.randrange(5, 30)
    per_box = draw.choice([2, 3, 4, 5, 6])
    total = rows * trees * each
    bad = total % per_box + per_box * draw.randrange(1, 4)
    price = draw.randrange(3, 12)
    return (
        f"An orchard has {rows} rows of {trees} trees, and each tree bears {each} pears. {bad} pears are rotten and thrown "
        f"away; the others are packed {per_box} to a box. Each box sells for ${price}. "
        "How much money do all boxes bring, in dollars?",
        (total - bad) // per_box * price,
    )


def _ages(draw: random.Random) -> _Story:
    a, b, c = draw.sample(tables.NAMES, 3)
    young, times, more, later = (
        draw.randrange(4, 12),
        draw.choice([2, 3]),
        draw.randrange(2, 9),
        draw.randrange(2, 10),
    )
    word = {2: "twice", 3: "three times"}[times]
    ages = [young, young * times, young * times + more]
    return (
        f"{b} is {word} as old as {a}, and {c} is {more} years older than {b}. {a} is {young}. "
        f"How old will the three of them be together in {later} years?",
        sum(ages) + 3 * later,
    )


def _trip(draw: random.Random) -> _Story:
    name = draw.choice(tables.NAMES)
    first, hours, second, more = (
        draw.randrange(4, 10) * 10,
        draw.randrange(2, 5),
        draw.randrange(3, 8) * 10,
        draw.randrange(2, 5),
    )
    total = first * hours + second * more + draw.randrange(2, 9) * 10
    return (
        f"{name} has to drive {total} km. For {hours} hours the car goes {first} km/h, and after a break it goes "
        f"{second} km/h for {more} hours. How many kilometres are still to go?",
        total - first * hours - second * more,
    )


def _classes(draw: random.Random) -> _Story:
    classes, pupils, teachers = draw.randrange(3, 8), draw.randrange(16, 30), draw.randrange(2, 5)
    seats = draw.choice([20, 24, 30, 40])
    going = classes * pupils + classes * teachers
    buses = -(-going // seats)
    return (
        f"{classes} classes of {pupils} pupils go on an outing, each with {teachers} teachers. A bus has {seats} seats. "
        "They take as few buses as possible. How many seats stay empty?",
        buses * seats - going,
    )


def _savings(draw: random.Random) -> _Story:
    name, other = draw.sample(tables.NAMES, 2)
    weekly, months, gift = draw.randrange(3, 20), draw.randrange(2, 7), draw.randrange(1, 9) * 10
    saved = weekly * 4 * months + gift
    extra = draw.randrange(10, 90)
    return (
        f"{name} saves ${weekly} every week for {months} months of 4 weeks, and gets ${gift} as a birthday present. "
        f"{other} has saved ${extra} more than {name}. How many dollars do they have together?",
        2 * saved + extra,
    )


def _discount(draw: random.Random) -> _Story:
    name, item = (
        draw.choice(tables.NAMES),
        draw.choice(["coat", "bicycle", "tent", "printer", "guitar", "stove"]),
    )
    price, off, tax, have = (
        draw.randrange(2, 30) * 100,
        draw.choice([10, 20, 25, 30, 50]),
        draw.choice([5, 8, 10, 20]),
        0,
    )
    reduced = price * (100 - off) // 100
    total = reduced * (100 + tax) // 100 if reduced * tax % 100 == 0 else reduced
    taxed = reduced * tax % 100 == 0
    have = total + draw.randrange(5, 200)
    tail = f", and {tax}% tax is added to the reduced price" if taxed else ""
    return (
        f"A {item} costs ${price}. In the sale it is {off}% cheaper{tail}. {name} has ${have}. "
        f"How many dollars does {name} have left after buying it?",
        have - total,
    )


def _pages(draw: random.Random) -> _Story:
    name = draw.choice(tables.NAMES)
    daily, days, faster = draw.randrange(8, 30), draw.randrange(3, 9), draw.randrange(4, 15)
    more = draw.randrange(2, 8)
    rest = draw.randrange(10, 90)
    pages = daily * days + (daily + faster) * more + rest
    return (
        f"A book has {pages} pages. {name} reads {daily} pages a day for {days} days, and then {faster} pages a day more than "
        f"before for another {more} days. How many pages are left?",
        rest,
    )


def _recipe(draw: random.Random) -> _Story:
    name = draw.choice(tables.NAMES)
    eggs, cakes, dozen, broken = (
        draw.randrange(2, 7),
        draw.randrange(3, 12),
        draw.randrange(4, 9),
        draw.randrange(1, 6),
    )
    left = dozen * 12 - broken - eggs * cakes
    if left < 0:
        dozen += -(left // 12)
        left = dozen * 12 - broken - eggs * cakes
    return (
        f"{name} buys {dozen} dozen eggs, but {broken} of them break on the way. Each cake takes {eggs} eggs, and {name} bakes "
        f"{cakes} cakes. How many eggs remain?",
        left,
    )


def _team(draw: random.Random) -> _Story:
    a, b, c = draw.sample(tables.NAMES, 3)
    first, fewer, times = draw.randrange(8, 40), draw.randrange(2, 7), draw.choice([2, 3])
    second = first - fewer
    word = {2: "twice", 3: "three times"}[times]
    third = times * second
    return (
        f"In a game {a} scores {first} points. {b} scores {fewer} points fewer, and {c} scores {word} as many as {b}. "
        f"The other team has {(first + second + third) // 2} points. By how many points does their team win?",
        first + second + third - (first + second + third) // 2,
    )


def _workers(draw: random.Random) -> _Story:
    machines, per_hour, hours = draw.randrange(3, 9), draw.randrange(10, 40), draw.randrange(4, 9)
    broken, later = draw.randrange(1, 3), draw.randrange(2, 6)
    made = machines * per_hour * hours + (machines - broken) * per_hour * later
    return (
        f"A workshop has {machines} machines, and each makes {per_hour} parts an hour. They all run for {hours} hours. Then "
        f"{broken} of them {'stops' if broken == 1 else 'stop'} working, and the others go on for {later} hours. "
        "How many parts have been made in all?",
        made,
    )


_STORIES = (
    *(_collection, _collection, _collection, _shopping, _wages, _harvest, _ages, _trip, _classes),
    *(_savings, _discount, _pages, _recipe, _team, _workers),
)
