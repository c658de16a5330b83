"""What heldout.yaml asks of a text, and how an answer is marked."""

import re
from itertools import takewhile

from datasets import Dataset

PLACES = (32, 56, 80, 104)  # words of a text before it is to be continued; the shortest has 125
SCORED_WORDS = 8


def process_docs(texts: Dataset) -> Dataset:
    """Returns the beginnings of each text as `prompt`, as they stand, and the words after them as `following`."""

    def split(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        parted = []
        for text in batch["text"]:
            ends = [word.end() for word in re.finditer(r"\S+", text)]
            parted += [(text[: ends[place - 1]], text[ends[place - 1] :].split()) for place in PLACES]
        return {
            "prompt": [prompt for prompt, _ in parted],
            "following": [" ".join(words[:SCORED_WORDS]) for _, words in parted],
        }

    return texts.map(split, batched=True, remove_columns=texts.column_names)


def process_results(doc: dict, answers: list[str]) -> dict[str, float]:
    """Returns whether the next word is right, and how many are before the first wrong one."""
    pairs = zip(answers[0].split(), doc["following"].split(), strict=False)
    right = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return {"next_word": float(right > 0), "right_words": float(right)}
