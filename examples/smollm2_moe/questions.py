"""Questions for SmolLM2, and the files of its answers: what the recipe learns from, and what it never sees.

Each kind of question is a template that topics fill. Of the topics every fourth is held out, and so are whole kinds.
"""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

# `chats.py` writes them.
CALIBRATION, HELDOUT = (Path(__file__).with_name(name) for name in ("calibration.parquet", "heldout.parquet"))


def topics(text: str) -> list[str]:
    return text.strip().replace("\n", "").split("|")


COUNTRIES = topics("""
France|Germany|Italy|Spain|Portugal|Greece|Poland|Sweden|Norway|Denmark|Finland|Ireland|Austria|
Hungary|Japan|China|India|Thailand|Vietnam|Indonesia|Turkey|Egypt|Kenya|Nigeria|Morocco|Ethiopia|
Ghana|Canada|Mexico|Brazil|Argentina|Chile|Peru|Colombia|Cuba|Australia|Belgium|Switzerland|Ukraine|
Romania|Bulgaria|Iceland|Nepal|Mongolia|Pakistan|Iran|Iraq|Israel|Jordan|Tunisia|Algeria|Senegal|
Uganda|Zambia
""")
THINGS = topics("""
the moon|a river|the heart|gravity|a volcano|bread|the ocean|a bicycle|honey bees|the Roman Empire|
music|electricity|a library|rain|photosynthesis|a computer|the desert|chess|an old lighthouse|coffee|
trains|dinosaurs|the brain|a garden|snow|democracy|mountains|whales|money|a clock|the internet|
football|cheese|friendship|forests|stars|glass|vaccines|a ship|sleep|mathematics|the wind|paper|
spiders|salt|horses|a bridge|autumn|robots|tea|maps|the immune system|a castle|butterflies|
steam engines|sharks|poetry|fire|earthquakes|rice|dreams|satellites|wolves|a market|winter|
the printing press|apples|evolution|a telescope|penguins|jazz|soil|airplanes|cats|history|
a desert island|kindness|batteries|oil paint|rivers of ice|owls|recycling|the stock market|a violin|
bacteria|summer|cities|oxygen|dogs
""")
JOBS = topics("""
teacher|nurse|farmer|pilot|baker|programmer|carpenter|doctor|gardener|lawyer|painter|engineer|
librarian|cook|mechanic|journalist|firefighter|photographer|plumber|scientist|tailor|sailor|accountant|
musician
""")
TASKS = topics("""
boil an egg|learn to swim|write a cover letter|plant tomatoes|fix a flat tire|save money|sleep better|
start running|make pancakes|clean a window|study for an exam|train a puppy|paint a wall|plan a trip|
give a speech|remember names|take good photos|bake bread|reduce stress|organize a desk|read more books|
build a birdhouse|grow herbs indoors|prepare for an interview
""")
CODE = topics("""
adds two numbers|reverses a string|checks whether a number is prime|computes the factorial of a number|
counts the words in a text|finds the largest number in a list|sorts a list of names|
converts Celsius to Fahrenheit|removes duplicates from a list|computes the average of a list|
checks whether a word is a palindrome|reads a file and prints its lines|sums the even numbers in a list|
merges two dictionaries|counts the vowels in a string|returns the n-th Fibonacci number
""")

KINDS = {
    "capital": ("What is the capital of {}?", COUNTRIES),
    "country": ("Tell me about {} in two sentences.", COUNTRIES),
    "language": ("Which languages do people speak in {}?", COUNTRIES),
    "travel": ("Plan a weekend in {} for a family of four.", COUNTRIES),
    "explain": ("Explain {} to a child of ten.", THINGS),
    "facts": ("List five facts about {}.", THINGS),
    "poem": ("Write a short poem about {}.", THINGS),
    "story": ("Write a short story about {}.", THINGS),
    "essay": ("Write an essay about {}.", THINGS),
    "why": ("What makes {} important?", THINGS),
    "object": ("Describe {} as a JSON object with the keys name, kind and uses.", THINGS),
    "title": ("Suggest three titles for a book about {}.", THINGS),
    "job": ("What does a {} do all day?", JOBS),
    "person": ("Return a JSON object that describes a {} with a name, an age and a city.", JOBS),
    "letter": ("Write a short email to a {} to ask for an appointment.", JOBS),
    "steps": ("How do I {}? Answer in numbered steps.", TASKS),
    "advice": ("I want to {}. What should I know first?", TASKS),
    "function": ("Write a Python function that {}.", CODE),
    "test": ("Write a Python function that {}, and explain how it works.", CODE),
}
HELD_OUT_KINDS = {
    "opposites": ("What is the difference between {} and a stone?", THINGS),
    "dialogue": ("Write a dialogue between a {} and a customer.", JOBS),
    "neighbours": ("Which countries border {}?", COUNTRIES),
    "mistakes": ("What are common mistakes when people {}?", TASKS),
}
HELD_OUT_EVERY = 4
SUMS = 60


def is_held_out(number: int) -> bool:
    return number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def filled(kinds: dict[str, tuple[str, list[str]]]) -> Iterator[tuple[bool, str, str]]:
    """Yields whether the topic is held out, the kind and the question."""
    for kind, (template, topics) in kinds.items():
        for number, topic in enumerate(topics):
            yield is_held_out(number), kind, template.format(topic)
    draw = random.Random(0)
    for number in range(SUMS):
        first, second, sign = draw.randint(2, 60), draw.randint(2, 40), draw.choice(["plus", "minus", "times"])
        yield is_held_out(number), "sum", f"What is {first} {sign} {second}?"


def learned() -> list[tuple[str, str]]:
    """Returns the kind and the text of each question that the recipe learns from."""
    return [(kind, question) for held_out, kind, question in filled(KINDS) if not held_out]


def held_out() -> list[tuple[str, str]]:
    """Returns the kind and the text of each question that the recipe never sees."""
    other_topics = ((kind, question) for held_out, kind, question in filled(KINDS) if held_out)
    other_kinds = ((kind, question) for held_out, kind, question in filled(HELD_OUT_KINDS) if held_out)
    return list(itertools.chain(other_topics, other_kinds))
