"""Short requests in many wordings, which show the gate that the wording does not make the kind.

Each kind has templates: imperatives, questions, and bare phrases that ask for the same. Every template is
filled with several fillings, and the gate is fitted to the results.
"""

from __future__ import annotations

import string

_EACH = 3  # requests made from a template

_FILLINGS: dict[str, tuple[str, ...]] = {
    "x": (
        "city trees", "electric scooters", "a vegetable garden", "night shifts", "the Ottoman Empire",
        "public transport", "black tea", "a book club", "plastic packaging", "sign language",
        "winter cycling",
        "volcanoes", "school uniforms", "chess clubs", "silent films", "the tides", "rented flats", "bats",
        "hospital food", "artificial sweeteners", "village schools", "a long commute", "the gold rush",
        "video calls", "desert plants", "the immune system",
    ),
    "p": ("a tent", "trains", "oil paint", "dogs", "the Romans", "a fixed salary", "cinema", "rice", "wool"),
    "q": ("a caravan", "planes", "watercolour", "cats", "the Greeks", "a bonus", "theatre", "pasta",
        "cotton"),
    "s": (
        "The bus leaves at noon.", "We has no milk left.", "I would of called you yesterday but I forget.",
        "My aunt bought a small house near the river.", "This phone is the worst that I ever had.",
        "Can we move our meeting to next week?", "The service was quick and the staff was very friendly.",
        "He dont want to come becuase of the rain.", "Our neighbours are painting their fence blue.",
        "At this point in time we are not in a position to give you an answer.",
        "The children played in the garden until it got dark.",
    ),
    "w": ("brave", "garden", "to hurry", "cold", "silver", "lazy", "winter", "quick", "a lamp",
        "to admit", "calm"),
    "l": (
        "lemon, bread, honey", "Zoe, Adam, Mark, Beth", "chair, table, sofa, bed", "red, green, blue",
        "wolf, otter, badger", "May, April, June",
    ),
    "t": ("Italian", "Polish", "English", "Dutch", "Japanese", "German", "Turkish", "Danish"),
    "c": ("Chile", "Kenya", "Finland", "Vietnam", "Hungary", "Morocco", "Portugal", "New Zealand"),
    "b": ("Don Quixote", "Emma", "Moby Dick", "The Hobbit", "Faust", "Jane Eyre", "The Trial"),
    "m": ("Mont Blanc", "the Eiffel Tower", "Ben Nevis", "the Matterhorn", "Mount Fuji", "Big Ben"),
    "n": ("Marie Curie", "Napoleon", "Frida Kahlo", "Isaac Newton", "Nelson Mandela", "Ada Lovelace"),
    "g": ("Python", "JavaScript", "Java", "Rust", "C++", "Go", "TypeScript", "SQL", "bash", "pandas"),
    "a": (
        "split a string at commas", "read a file line by line", "find the largest value of an array",
        "merge two sorted lists", "parse a date", "sort a table by two columns",
        "check whether a word is a palindrome",
        "call an API with a timeout", "count the words of a text", "round a number to two digits",
        "join two tables",
        "walk through a binary tree",
    ),
    "k": (
        "a closure", "inheritance", "a pointer", "a memory leak", "an index", "a null reference", "a mutex",
        "garbage collection", "a decorator", "a foreign key", "an interface",
    ),
    "e": ("an index error", "a type error", "a syntax error", "a segmentation fault", "a timeout",
        "a null pointer"),
    "z": (
        "the sum of three consecutive integers is divisible by three", "the cube root of 2 is irrational",
        "every integer greater than 1 has a prime divisor", "the sum of two even numbers is even",
        "n^2 + n is even for every integer n", "the angles of a triangle add up to 180 degrees",
        "there are infinitely many odd numbers", "a number with an odd number of divisors is a square",
    ),
    "y": ("5x - 3 = 22", "x^2 = 49", "4(x + 1) = 2x + 10", "x/3 + 2 = 7", "x^2 - 5x + 6 = 0", "|x - 4| = 9"),
}  # fmt: skip

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "open": (
        "Compare {p} and {q}.", "Compare {p} with {q} and say which you prefer.", "{p} or {q}?",
        "What is the difference between {p} and {q}?", "How does one choose between {p} and {q}?",
        "Which would you choose, {p} or {q}, and why?", "Is it better to have {p} or {q}?",
        "What do {p} and {q} have in common?", "List the differences between {p} and {q}.",
        "Pros and cons of {x}?", "List the benefits of {x}.", "Give arguments for and against {x}.",
        "Argue against {x}.", "Argue that we need {x}.", "Defend {x} in a debate.", "Persuade me of {x}.",
        "Evaluate {x}.", "Assess the influence of {x}.", "Criticise {x}.", "Analyse the role of {x} today.",
        "Design a poster about {x}.", "Design a course on {x}.", "Develop a concept for {x}.",
        "Plan an evening about {x}.", "Plan a project on {x}.", "Make a plan for {x}.",
        "Organise a day about {x}.",
        "Outline a chapter on {x}.", "Sketch a lesson about {x}.", "Prepare a short lecture on {x}.",
        "Suggest activities to do with {x}.", "Propose a way to improve {x}.",
        "Brainstorm questions about {x}.",
        "Think of slogans for {x}.", "Come up with a hobby that has to do with {x}.", "Find a name for {x}.",
        "Recommend something to read about {x}.", "Advise me about {x}.", "What do you suggest for {x}?",
        "What are good ways to learn about {x}?", "Where should I begin with {x}?",
        "How do I start with {x}?",
        "How would you improve {x}?", "What could be done about {x}?", "What can go wrong with {x}?",
        "Is {x} worth it?", "Is {x} overrated?", "Should people care about {x}?", "Do we still need {x}?",
        "Does {x} have a future?", "Can {x} be harmful?", "Are there alternatives to {x}?",
        "What makes {x} interesting?", "What is special about {x}?", "What do people get wrong about {x}?",
        "What should everyone know about {x}?", "What is the story behind {x}?", "What is {x} good for?",
        "What has changed about {x}?", "In which ways does {x} matter?", "How important is {x}?",
        "What are the consequences of {x}?", "What is there to say about {x}?", "What is your view of {x}?",
        "Who benefits from {x}?", "Which problems come with {x}?", "Where does {x} come from, and why?",
        "Which questions does {x} raise?", "Which ideas could make {x} better?",
        "What would happen without {x}?",
        "What would a world without {x} look like?", "Which film would you watch about {x}?",
        "What could a lesson about {x} contain?", "How might {x} change in the next years?",
        "What does {x} mean for children?", "What is behind {x}?", "Which reasons are there for {x}?",
        "How should we think about {x}?", "How did {x} begin?", "How come people like {x}?",
        "Why do people care about {x}?", "What did {x} mean for ordinary people?",
        "What does it take to master {x}?",
        "What should a beginner know about {x}?", "Which mistakes do people make with {x}?",
        "Who should avoid {x}?",
        "When does {x} make sense?", "Where can I learn more about {x}?", "What can we learn from {x}?",
        "How is {x} made possible?", "What happens in {x}?", "What are your thoughts on {x}?",
        "What can I do about {x}?",
        "Which gifts suit someone who likes {x}?", "How could a school teach {x}?", "What helps with {x}?",
        "How would you describe {x} to a child?", "Is there anything good about {x}?",
        "Would you recommend {x}?",
        "Have {x} become more popular, and why?", "Can you tell me more about {x}?",
        "Which of my friends would enjoy {x}?",
        "Could {x} be replaced by something else?", "Were {x} a good idea?", "What is so hard about {x}?",
        "Show me how {x} works.", "Introduce me to {x}.", "Walk me through {x}.",
        "Give me an introduction to {x}.",
        "I'd like to understand {x}.", "I want to know more about {x}.", "I have a problem with {x}.",
        "I am unsure about {x} and need a second opinion.", "We are thinking about {x}. Any advice?",
        "Describe {x}.", "Explain {x}.", "Discuss {x}.", "Tell me about {x}.",
        "Summarise what is known about {x}.",
        "Write about {x}.", "Write an article about {x}.", "Write a letter about {x}.",
        "Write a scene with {x}.",
        "Tell a story about {x}.", "Make up a tale with {x} in it.", "Compose a song about {x}.",
        "Draft a memo about {x}.", "I need a text about {x}.", "Could you write something about {x}?",
        "Invent a game about {x}.", "Create a quiz about {x}.", "Help me with an essay about {x}.",
        "An email to my boss about {x}, please.", "Continue this story: It all began with {x}.",
    ),
    "chore": (
        "Translate to {t}: {s}", "Translate this into {t}: {s}", "{s} In {t}, please.",
        "What is \"{s}\" in {t}?", "How would one say \"{s}\" in {t}?", "Give me the {t} version of \"{s}\"",
        "What does \"{s}\" mean in {t}?", "In {t}: {s}", "How do people say {w} in {t}?", "{t} for {w}?",
        "Correct: {s}", "Correct the mistakes in this: {s}", "Is this sentence correct? {s}",
        "Which mistakes does this sentence have? {s}", "Check the spelling: {s}", "Any typos here? {s}",
        "Edit this: {s}", "Does this sound right? \"{s}\"", "Where is the mistake in \"{s}\"?",
        "Shorten: {s}", "Make it shorter: {s}", "Use fewer words: {s}", "How can this be shorter? {s}",
        "Rewrite politely: {s}", "Rephrase this sentence: {s}", "Say this differently: {s}",
        "Put this into the past tense: {s}", "How can I say this more politely? {s}",
        "Make this a question: {s}",
        "Which tense is this? {s}", "Summarise: {s}", "Summarize this message: {s}",
        "Summarise the following text in two points. {s}", "Give a summary of this: {s}",
        "Summarize this email in three bullet points.\n{s} {s}", "Sum up the note below in one line.\n{s}",
        "Pretend to be a ghost and greet us.", "Pretend to be a king and say hello.",
        "Be a robot and greet me.",
        "Pretend you are a duck.", "Speak like a knight.", "Imagine you are a sailor and say goodbye.",
        "What is this about, in three words? {s}",
        "What mood does this text have? {s}", "Does this sound happy or sad? {s}", "Good or bad: {s}",
        "Positive, negative or neutral: {s}", "Is this spam? {s}", "Find the verb: {s}",
        "Which word is the noun in \"{s}\"",
        "Another way to say {w}?", "A synonym of {w}, please.", "Which words mean the same as {w}?",
        "Opposite of {w}?", "Name an antonym of {w}.", "What rhymes with {w}?", "Use {w} in a sentence.",
        "How is {w} spelled?", "Define {w}.", "Give me an example sentence with {w}.",
        "Sort: {l}", "Alphabetical order, please: {l}", "Order alphabetically: {l}.",
        "Which of these words comes first in the alphabet: {l}?", "Reverse this list: {l}.",
        "Write these in capitals: {l}.", "How many words are these: {l}?", "Join with semicolons: {l}.",
        "Give me a haiku about {x}.", "A rhyme about {x}, please.", "Could I have a limerick about {x}?",
        "Tell me a joke about {x}.", "Make a pun about {x}.", "One line about {x}.",
        "Write a short poem about {x}.", "Write two lines about {x}.", "Write a rhyme about {x}.",
        "Compose a short poem about {x}.", "Write a tweet about {x}.", "A short poem about {x}, please.",
    ),
    "fact": (
        "Capital of {c}?", "Which city is the seat of {c}'s government?", "Tell me the population of {c}.",
        "How many people live in {c}?", "What is spoken in {c}?", "On which continent is {c}?",
        "What currency is used in {c}?", "Where is {c}?", "Which countries border {c}?",
        "Name the largest city of {c}.",
        "What is the highest mountain of {c}?", "What colours does the flag of {c} have?",
        "{b} was written by whom?", "The author of {b}?", "Name the writer of {b}.",
        "When was {b} published?",
        "In which year did {b} come out?", "Tell me who wrote {b}.",
        "What is the main character of {b} called?",
        "How tall is {m}?", "What is the elevation of {m}?", "Where does {m} stand?",
        "State the height of {m}.",
        "When was {n} born?", "In what year did {n} die?", "Where was {n} born?",
        "Tell me the birthday of {n}.",
        "Name the place where {n} died.", "What was the profession of {n}?", "How old did {n} get?",
        "Which nationality did {n} have?", "Was {n} ever married?",
    ),
    "code": (
        "How do I {a} in {g}?", "How can I {a} with {g}?", "How to {a} in {g}?", "{g}: {a}.",
        "Show me how to {a} in {g}.", "Write {g} code to {a}.", "What is the best way to {a} in {g}?",
        "Can you {a} in {g}?", "I need a {g} function to {a}.", "Give me a {g} snippet to {a}.",
        "What does {k} mean in {g}?", "Explain {k} in {g}.", "Why would I use {k} in {g}?",
        "When is {k} useful in {g}?",
        "Describe {k} for a {g} programmer.", "How does {k} work in {g}?", "Give an example of {k} in {g}.",
        "Why do I get {e} in {g}?", "My {g} program fails with {e}. Why?", "How do I fix {e} in {g}?",
    ),
    "mathematics": (
        "Give a proof that {z}.", "Prove: {z}.", "How can one prove that {z}?",
        "Why is it true that {z}? Prove it.",
        "Prove or disprove: {z}.", "Is it true that {z}?", "Explain why {z}.", "I need a proof that {z}.",
        "Find x if {y}.", "Solve {y} for x.", "For which x is {y}?", "Which value of x satisfies {y}?",
        "{y}. Find x.", "If {y}, then what is x?", "Solve: {y}", "Solutions of {y}?",
    ),
    "talk": (
        "Hiya", "Hi again", "Hello, nice to meet you", "hey, what's new?", "How do you do?",
        "How was your day?",
        "Good afternoon", "Are you well?", "I hope you are fine", "Greetings!", "Howdy", "Long time no see",
        "thx", "ty!", "Many thanks", "Thanks again", "You were very helpful", "That was helpful, thanks",
        "I am grateful for your help", "Perfect, that works", "Awesome", "Nice one",
        "Great, I understand now",
        "Brilliant, that is all I wanted", "No more questions", "Okay, I will do that", "Fine",
        "All right then",
        "See you soon", "Take care", "Talk to you tomorrow", "Bye bye", "I am leaving now", "Until next time",
        "What are you?", "Are you an AI?", "Who programmed you?", "Do you have a name?",
        "Do you have feelings?",
        "Where do you live?", "What do you like?", "Are you busy?", "Do you know me?", "Can we talk?",
        "I am tired today", "It is raining here", "I had a good day", "Happy new year!", "Congratulations!",
        "Sorry, my mistake", "Oops", "No problem", "You are welcome", "Hm, interesting", "Really?", "I see",
    ),
}  # fmt: skip


def wordings(kind: str) -> list[str]:
    """Return short requests of *kind* in many wordings; nothing for a kind without templates."""
    made: list[str] = []
    for place, template in enumerate(_TEMPLATES.get(kind, ())):
        fields = sorted({name for _, name, _, _ in string.Formatter().parse(template) if name})
        if not fields:
            made.append(template)
            continue
        for step in range(_EACH):
            filled = {name: _FILLINGS[name][(place * 7 + step * 3) % len(_FILLINGS[name])] for name in fields}
            text = template.format(**filled)
            made.append(text[0].upper() + text[1:])
    return made
