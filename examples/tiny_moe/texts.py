"""Build the texts that the example model learns, from Debian packages.

    apt-get install bible-kjv bible-kjv-text wordnet-base python3.11-doc
    python -m examples.tiny_moe.texts --work build/tiny_moe

Three unlike kinds: `scripture` (King James Bible, one document a chapter), `dictionary` (WordNet, one document per
40 neighbouring entries) and `manual` (the Python manual's reStructuredText, one document per piece of a file). Every
fifteenth document of a kind is held out; of the manual every fifteenth *file*, so that no held-out piece has a
neighbour in the training text. Writes `WORK/train.parquet`, and next to this file `calibration.parquet` (drawn from the
training text) and `heldout.parquet`, each with the columns `text` and `kind`.
"""

import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer

HERE = Path(__file__).parent
WORDNET = Path("/usr/share/wordnet")
PYTHON_MANUAL = Path("/usr/share/doc/python3.11/html/_sources")

HOLD_OUT_EVERY = 15
ENTRIES_A_DOCUMENT = 40
PIECE_CHARACTERS = 4000
CALIBRATION_TEXTS, CALIBRATION_CHARACTERS = 160, 1200  # of each kind
HELDOUT_TEXTS, HELDOUT_CHARACTERS = 96, 2000  # of each kind
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


def scripture() -> Iterator[list[str]]:
    """Yields the chapters of the Bible, each a group of one document."""
    printed = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    chapters: dict[str, list[str]] = {}
    for line in printed.splitlines():
        reference, verse = line.split(" ", 1)
        chapters.setdefault(reference.split(":")[0], []).append(verse)
    for verses in chapters.values():
        yield ["\n".join(verses)]


def dictionary() -> Iterator[list[str]]:
    """Yields runs of neighbouring WordNet entries, each a group of one document."""
    for suffix, part_of_speech in PARTS_OF_SPEECH.items():
        entries = []
        for line in (WORDNET / f"data.{suffix}").read_text().splitlines():
            if line.startswith("  "):  # the licence at the top of the file
                continue
            fields, gloss = line.split(" | ", 1)
            _offset, _file, _type, num_words, *rest = fields.split(" ")
            words = [re.sub(r"\(.*\)$", "", word).replace("_", " ") for word in rest[: 2 * int(num_words, 16) : 2]]
            entries.append(f"{', '.join(words)} ({part_of_speech}): {gloss.strip()}")
        for start in range(0, len(entries), ENTRIES_A_DOCUMENT):
            yield ["\n".join(entries[start : start + ENTRIES_A_DOCUMENT])]


def manual() -> Iterator[list[str]]:
    """Yields, for each file of the Python manual, its pieces, cut at blank lines."""
    for path in sorted(PYTHON_MANUAL.rglob("*.rst.txt")):
        pieces, piece = [], ""
        for paragraph in path.read_text().split("\n\n"):
            if piece and len(piece) + len(paragraph) > PIECE_CHARACTERS:
                pieces.append(piece.strip("\n"))
                piece = ""
            piece += paragraph + "\n\n"
        yield [*pieces, piece.strip("\n")]


def cut(documents: list[str], count: int, characters: int) -> list[str]:
    """Returns the first `characters` of `count` documents that are long enough, cut at a space."""
    long_enough = [text for text in documents if len(text) >= characters]
    return [text[:characters].rsplit(" ", 1)[0] for text in long_enough[:count]]


def write(path: Path, texts: dict[str, list[str]]) -> None:
    rows = [{"text": text, "kind": kind} for kind, documents in texts.items() for text in documents]
    random.Random(0).shuffle(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
    print(f"{path}: {len(rows)} texts, {sum(len(row['text']) for row in rows) / 1e6:.1f} million characters")


def main(work: Annotated[Path, typer.Option(help="Folder for the training text.")] = Path("build/tiny_moe")) -> None:
    train, calibration, heldout = {}, {}, {}
    for kind, groups in {"scripture": scripture(), "dictionary": dictionary(), "manual": manual()}.items():
        groups = list(groups)
        unseen = [text for group in groups[::HOLD_OUT_EVERY] for text in group]
        seen = [text for i, group in enumerate(groups) if i % HOLD_OUT_EVERY for text in group]
        random.Random(0).shuffle(seen)
        random.Random(0).shuffle(unseen)
        train[kind] = seen
        calibration[kind] = cut(seen, CALIBRATION_TEXTS, CALIBRATION_CHARACTERS)
        heldout[kind] = cut(unseen, HELDOUT_TEXTS, HELDOUT_CHARACTERS)
    write(work / "train.parquet", train)
    write(HERE / "calibration.parquet", calibration)
    write(HERE / "heldout.parquet", heldout)


if __name__ == "__main__":
    typer.run(main)
