"""What a tuning has measured, a line each, so that the same command goes on where it was stopped."""

import json
from pathlib import Path
from typing import Any

from calibration_jobs.resume import Fingerprint, check_same_job
from sere_dist.files import written_whole


class Measurements:
    """The file `<artifact>.tuning.jsonl`: which tuning it belongs to, and below that [key, value] by the line.

    It stays when the tuning is done: another budget is then answered without measuring anything twice.
    """

    def __init__(self, artifact: Path, fingerprint: Fingerprint, restart: bool):
        """Opens the file, or makes it. With `restart` the measurements of whichever tuning are thrown away.

        A file without measurements is made anew: its tuning may have stopped because the model did not fit.

        Raises:
            ValueError: the file holds the measurements of another tuning; the message says what differs.
        """
        self.path = artifact.resolve().with_name(f"{artifact.name}.tuning.jsonl")
        self.values: dict[str, Any] = {}
        lines = [] if restart or not self.path.exists() else self.path.read_text().splitlines()
        whole = [line for place, line in enumerate(lines) if self._is_whole(line, place, len(lines))]
        if len(whole) < 2:
            whole = []
        else:
            check_same_job(
                self.path,
                kept=json.loads(whole[0]),
                own=fingerprint,
                what="measurements of another tuning",
                instead="give the options that those were made with",
            )
            self.values = dict(map(json.loads, whole[1:]))
        with written_whole(self.path) as file:
            file.write_text("".join(f"{line}\n" for line in whole or [json.dumps(fingerprint)]))

    def add(self, key: str, value: Any) -> None:
        """Writes a value, and keeps what JSON makes of it."""
        line = json.dumps([key, value])
        with self.path.open("a") as file:
            file.write(f"{line}\n")
        self.values[key] = json.loads(line)[1]

    def _is_whole(self, line: str, place: int, lines: int) -> bool:
        """Says whether a line can be read; the last one may have been cut short when a job was killed."""
        try:
            json.loads(line)
        except ValueError as error:
            if place < lines - 1:
                raise ValueError(f"{self.path}, line {place + 1}: {error}; delete the line, or the file") from error
            return False
        return True
