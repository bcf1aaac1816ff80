"""Tables for the templates: names, words, units, facts, and functions to write. All are common knowledge."""

from __future__ import annotations

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
NAMES = (
    *(
        "Amira",
        "Boris",
        "Chiara",
        "Dylan",
        "Elif",
        "Farid",
        "Greta",
        "Hugo",
        "Ines",
        "Jonas",
        "Keiko",
        "Liam",
    ),
    *(
        "Marta",
        "Nadia",
        "Oscar",
        "Priya",
        "Quentin",
        "Rosa",
        "Sven",
        "Tomas",
        "Uma",
        "Victor",
        "Wanda",
        "Yusuf",
    ),
)
TOWNS = (
    *("Aarhus", "Bilbao", "Cardiff", "Dresden", "Esbjerg", "Florence", "Ghent", "Haifa", "Izmir", "Jaipur"),
    *("Krakow", "Leeds", "Malaga", "Nantes", "Osaka", "Porto", "Quito", "Riga", "Split", "Turku"),
)
JOBS = (
    *(
        "baker",
        "carpenter",
        "dentist",
        "electrician",
        "farmer",
        "gardener",
        "joiner",
        "librarian",
        "mechanic",
    ),
    *("nurse", "optician", "painter", "plumber", "tailor", "teacher", "translator", "waiter", "welder"),
)
PRODUCTS = (
    *(
        "apples",
        "batteries",
        "candles",
        "desks",
        "erasers",
        "forks",
        "gloves",
        "hammers",
        "jackets",
        "kettles",
    ),
    *("lamps", "mugs", "nails", "oranges", "pencils", "ropes", "scarves", "towels", "umbrellas", "vases"),
)
WORDS = (
    *("planet", "garden", "window", "silver", "bottle", "castle", "dragon", "engine", "forest", "guitar"),
    *("hammer", "island", "jungle", "kitten", "ladder", "market", "needle", "orange", "pepper", "rocket"),
    *(
        "banana",
        "mississippi",
        "strawberry",
        "butterfly",
        "chocolate",
        "elephant",
        "lamp",
        "tree",
        "moon",
        "ship",
    ),
)
FILLER = (
    "The town hall was painted last summer.",
    "It rained for most of the week.",
    "The old bridge is closed on Sundays.",
    "A new bakery has opened beside the station.",
    "Nobody remembers who planted the tree in the square.",
    "The bus to the coast takes two hours.",
)
GROUPS = {
    "fruit": ("apple", "pear", "plum", "cherry", "peach", "mango"),
    "birds": ("sparrow", "eagle", "robin", "owl", "crow", "falcon"),
    "metals": ("iron", "copper", "zinc", "nickel", "silver", "tin"),
    "instruments": ("violin", "flute", "trumpet", "cello", "drum", "oboe"),
    "furniture": ("chair", "table", "wardrobe", "sofa", "bench", "cupboard"),
    "vehicles": ("truck", "bicycle", "tram", "tractor", "scooter", "ferry"),
    "planets": ("Mars", "Venus", "Saturn", "Neptune", "Jupiter", "Uranus"),
    "trees": ("oak", "birch", "maple", "pine", "willow", "beech"),
}
UNITS = (  # larger, smaller, how many of the smaller
    *(("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7)),
    *(("years", "months", 12), ("kilometres", "metres", 1000), ("metres", "centimetres", 100)),
    *(
        ("feet", "inches", 12),
        ("yards", "feet", 3),
        ("kilograms", "grams", 1000),
        ("litres", "millilitres", 1000),
    ),
    *(("pounds", "ounces", 16), ("gallons", "quarts", 4), ("quarts", "pints", 2), ("dozens", "pieces", 12)),
    *(
        ("centuries", "years", 100),
        ("decades", "years", 10),
        ("tonnes", "kilograms", 1000),
        ("dollars", "cents", 100),
    ),
    *(
        ("miles", "yards", 1760),
        ("gross", "dozens", 12),
        ("fortnights", "days", 14),
        ("stones", "pounds", 14),
    ),
)
_Facts = tuple[str, tuple[tuple[str, tuple[str, ...]], ...]]


def _pairs(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Parse "thing: answer/other spelling, thing: answer"."""

    pairs = (part.strip().split(": ") for part in text.split(","))
    return tuple((thing, tuple(answers.split("/"))) for thing, answers in pairs)


FACTS: tuple[_Facts, ...] = (
    (
        "What is the capital of {}?",
        _pairs(
            "Norway: Oslo, Finland: Helsinki, Hungary: Budapest, Kenya: Nairobi, Vietnam: Hanoi, Chile: Santiago, "
            "Morocco: Rabat, Turkey: Ankara, New Zealand: Wellington, Mongolia: Ulaanbaatar/Ulan Bator, "
            "Slovenia: Ljubljana, Ghana: Accra, Nepal: Kathmandu, Uruguay: Montevideo, Jordan: Amman, "
            "Kazakhstan: Astana, Bhutan: Thimphu, Senegal: Dakar, Estonia: Tallinn, Paraguay: Asuncion/Asunción, "
            "Burkina Faso: Ouagadougou, Iceland: Reykjavik, Cuba: Havana, Ireland: Dublin, Poland: Warsaw"
        ),
    ),
    (
        "Which currency is used in {}?",
        _pairs(
            "Japan: yen, India: rupee/rupees, Mexico: peso/pesos, Sweden: krona/kronor, Brazil: real/reais, "
            "Switzerland: franc/francs, South Africa: rand, Thailand: baht, Poland: zloty/złoty, Israel: shekel/shekels, "
            "Hungary: forint, South Korea: won, Vietnam: dong/đồng, Czechia: koruna, Peru: sol/soles, Russia: ruble/rouble"
        ),
    ),
    (
        "What is the chemical symbol of {}?",
        _pairs(
            "sodium: Na, potassium: K, helium: He, lead: Pb, tin: Sn, tungsten: W, copper: Cu, zinc: Zn, neon: Ne, "
            "calcium: Ca, mercury: Hg, chlorine: Cl, nickel: Ni, magnesium: Mg, antimony: Sb, argon: Ar, uranium: U"
        ),
    ),
    (
        "On which continent is {}?",
        _pairs(
            "Egypt: Africa, Argentina: South America, Laos: Asia, Portugal: Europe, Angola: Africa, Bolivia: South America, "
            "Pakistan: Asia, Denmark: Europe, Namibia: Africa, Guatemala: North America/Central America, Oman: Asia, "
            "Suriname: South America, Latvia: Europe, Malawi: Africa"
        ),
    ),
    (
        "Who wrote '{}'?",
        _pairs(
            "Don Quixote: Cervantes, War and Peace: Tolstoy, The Odyssey: Homer, Moby-Dick: Melville, "
            "Crime and Punishment: Dostoevsky/Dostoyevsky, Pride and Prejudice: Austen, The Divine Comedy: Dante, "
            "Faust: Goethe, Ulysses: Joyce, The Trial: Kafka, 1984: Orwell, Frankenstein: Shelley, Dracula: Stoker, "
            "Les Misérables: Hugo, The Metamorphosis: Kafka/Ovid, Brave New World: Huxley, Candide: Voltaire"
        ),
    ),
    (
        "What is a young {} called?",
        _pairs(
            "dog: puppy/pup, cat: kitten, cow: calf, horse: foal, sheep: lamb, goat: kid, bear: cub, kangaroo: joey, "
            "swan: cygnet, frog: tadpole, hare: leveret, eagle: eaglet, pig: piglet, deer: fawn, goose: gosling, owl: owlet"
        ),
    ),
    (
        "What is the past tense of the verb '{}'?",
        _pairs(
            "go: went, buy: bought, swim: swam, write: wrote, teach: taught, fly: flew, choose: chose, freeze: froze, "
            "forbid: forbade, weave: wove, seek: sought, shrink: shrank, lie: lay/lied, cling: clung, sing: sang"
        ),
    ),
    (
        "What is the plural of '{}'?",
        _pairs(
            "child: children, mouse: mice, leaf: leaves, tooth: teeth, ox: oxen, crisis: crises, foot: feet, wolf: wolves, "
            "criterion: criteria, sheep: sheep, goose: geese, city: cities, phenomenon: phenomena, knife: knives"
        ),
    ),
    (
        "What is the English word for the Spanish '{}'?",
        _pairs(
            "perro: dog, casa: house/home, agua: water, libro: book, manzana: apple, lunes: Monday, puente: bridge, "
            "cuchara: spoon, invierno: winter, rojo: red, pájaro: bird, hermana: sister, zapato: shoe, ventana: window, "
            "tijeras: scissors"
        ),
    ),
    (
        "In which country is {}?",
        _pairs(
            "the Eiffel Tower: France, Machu Picchu: Peru, the Taj Mahal: India, Mount Kilimanjaro: Tanzania, "
            "Petra: Jordan, Angkor Wat: Cambodia, the Colosseum: Italy, Stonehenge: England/United Kingdom/UK, "
            "the Alhambra: Spain, the Acropolis: Greece, Chichen Itza: Mexico, the Brandenburg Gate: Germany, "
            "Hagia Sophia: Turkey, Borobudur: Indonesia, the Great Sphinx: Egypt"
        ),
    ),
    (
        "How many {}? Answer with a number in digits.",
        _pairs(
            "sides does a hexagon have: 6, legs does a spider have: 8, strings does a violin have: 4, "
            "players of a football team are on the pitch: 11, letters are in the English alphabet: 26, "
            "bits are in a byte: 8, cards are in a standard deck without jokers: 52, chromosomes does a human cell have: 46, "
            "squares are on a chessboard: 64, keys does a full piano have: 88, planets orbit the Sun: 8, "
            "teeth does a human adult usually have: 32, minutes are in a day: 1440, faces does a dodecahedron have: 12"
        ),
    ),
)
# name, what it does, assertions
FUNCTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("square", "returns the square of its argument", ("assert square(7) == 49", "assert square(-3) == 9")),
    ("is_even", "returns True if its integer argument is even", ("assert is_even(4) is True", "assert is_even(7) is False")),
    ("maximum", "returns the largest number of a list", ("assert maximum([3, 9, 2]) == 9", "assert maximum([-5, -2]) == -2")),
    ("total", "returns the sum of a list of numbers", ("assert total([1, 2, 3]) == 6", "assert total([]) == 0")),
    ("reverse_string", "returns a string backwards", ("assert reverse_string('abc') == 'cba'", "assert reverse_string('') == ''")),
    ("factorial", "returns the factorial of a non-negative integer", ("assert factorial(5) == 120", "assert factorial(0) == 1")),
    ("is_palindrome", "tells whether a string reads the same backwards, ignoring case", ("assert is_palindrome('Level')", "assert not is_palindrome('panel')")),
    ("count_vowels", "counts the vowels of a string, upper and lower case", ("assert count_vowels('Education') == 5", "assert count_vowels('sky') == 0")),
    ("fibonacci", "returns the n-th Fibonacci number, where fibonacci(0) is 0 and fibonacci(1) is 1", ("assert fibonacci(10) == 55", "assert fibonacci(0) == 0", "assert fibonacci(1) == 1")),
    ("is_prime", "tells whether an integer is prime", ("assert is_prime(13)", "assert not is_prime(1)", "assert not is_prime(21)")),
    ("unique", "returns the elements of a list without duplicates, in the order in which they first occur", ("assert list(unique([3, 1, 3, 2, 1])) == [3, 1, 2]", "assert list(unique([])) == []")),
    ("second_largest", "returns the second largest distinct number of a list", ("assert second_largest([5, 1, 5, 4]) == 4", "assert second_largest([2, 3]) == 2")),
    ("gcd", "returns the greatest common divisor of two positive integers", ("assert gcd(12, 18) == 6", "assert gcd(7, 5) == 1")),
    ("word_lengths", "takes a sentence and returns a list of the lengths of its words", ("assert word_lengths('a big house') == [1, 3, 5]",)),
    ("flatten", "flattens a list of lists by one level", ("assert flatten([[1, 2], [3], []]) == [1, 2, 3]",)),
    ("count_words", "returns a dictionary from each word of a sentence to how often it occurs", ("assert dict(count_words('a b a')) == {'a': 2, 'b': 1}",)),
    ("celsius", "converts degrees Fahrenheit to degrees Celsius", ("assert abs(celsius(212) - 100) < 1e-6", "assert abs(celsius(32)) < 1e-6")),
    ("digit_sum", "returns the sum of the decimal digits of a non-negative integer", ("assert digit_sum(1234) == 10", "assert digit_sum(0) == 0")),
    ("is_anagram", "tells whether two lower-case words are anagrams of each other", ("assert is_anagram('listen', 'silent')", "assert not is_anagram('aab', 'abb')")),
    ("rotate", "takes a list and a number k and returns the list rotated to the right by k places", ("assert rotate([1, 2, 3, 4], 1) == [4, 1, 2, 3]", "assert rotate([1, 2, 3], 0) == [1, 2, 3]")),
    ("median", "returns the median of a list of numbers", ("assert median([3, 1, 2]) == 2", "assert median([4, 1, 3, 2]) == 2.5")),
    ("to_binary", "returns the binary digits of a non-negative integer as a string without prefix", ("assert to_binary(10) == '1010'", "assert to_binary(0) == '0'")),
    ("roman", "converts an integer from 1 to 3999 to a Roman numeral", ("assert roman(4) == 'IV'", "assert roman(1994) == 'MCMXCIV'")),
    ("balanced", "tells whether the round brackets of a string are balanced", ("assert balanced('(a(b)c)')", "assert not balanced(')(')", "assert not balanced('((')")),
    ("chunks", "takes a list and a size n and returns a list of consecutive lists of at most n elements", ("assert [list(c) for c in chunks([1, 2, 3, 4, 5], 2)] == [[1, 2], [3, 4], [5]]",)),
    ("merge_sorted", "merges two sorted lists into one sorted list", ("assert merge_sorted([1, 4], [2, 3, 5]) == [1, 2, 3, 4, 5]", "assert merge_sorted([], [1]) == [1]")),
    ("caesar", "shifts each lower-case letter of a string by k places in the alphabet, wrapping around, and leaves other characters as they are", ("assert caesar('xyz', 3) == 'abc'", "assert caesar('a b!', 1) == 'b c!'")),
    ("longest_word", "returns the longest word of a sentence, the first one if several are as long", ("assert longest_word('I like big gardens') == 'gardens'", "assert longest_word('red big') == 'red'")),
    ("transpose", "transposes a matrix given as a list of rows", ("assert [list(r) for r in transpose([[1, 2], [3, 4], [5, 6]])] == [[1, 3, 5], [2, 4, 6]]",)),
    ("run_length", "returns the run-length encoding of a string as a list of (character, count) tuples", ("assert [tuple(p) for p in run_length('aabc')] == [('a', 2), ('b', 1), ('c', 1)]",)),
    ("binary_search", "returns the index of a value in a sorted list, or -1 if it is not there", ("assert binary_search([1, 3, 5, 7], 5) == 2", "assert binary_search([1, 3], 2) == -1", "assert binary_search([], 1) == -1")),
    ("title_case", "capitalises the first letter of every word of a sentence and leaves the rest as it is", ("assert title_case('the old man') == 'The Old Man'",)),
    ("common", "returns a sorted list of the elements that two lists have in common, without duplicates", ("assert common([1, 2, 2, 3], [3, 2, 5]) == [2, 3]",)),
    ("collatz", "returns the number of steps that the Collatz sequence takes from n to 1", ("assert collatz(1) == 0", "assert collatz(6) == 8")),
    ("multiply_matrices", "multiplies two matrices given as lists of rows", ("assert [list(r) for r in multiply_matrices([[1, 2], [3, 4]], [[5, 6], [7, 8]])] == [[19, 22], [43, 50]]",)),
    ("leap_year", "tells whether a year is a leap year of the Gregorian calendar", ("assert leap_year(2000)", "assert not leap_year(1900)", "assert leap_year(2024)", "assert not leap_year(2023)")),
    ("clamp", "takes x, low and high and returns x limited to the range from low to high", ("assert clamp(5, 1, 3) == 3", "assert clamp(0, 1, 3) == 1", "assert clamp(2, 1, 3) == 2")),
    ("remove_vowels", "returns a string without its vowels, upper or lower case", ("assert remove_vowels('Open the door') == 'pn th dr'",)),
)  # fmt: skip
