"""Records that take long to make, kept part by part: a killed run goes on after its last complete part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megallama.files import write_whole

SETTINGS = "settings.json"


class Parts:
    """Parts 0 … count - 1 under `folder`, of one and the same settings.

    Args:
        settings: all that the records depend on.

    Raises:
        ValueError: the folder was begun with other settings; names the first that differs.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], count: int):
        self.folder, self.count = folder, count
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        now = json.loads(json.dumps(settings))
        path = folder / SETTINGS
        if path.is_file():
            then = json.loads(path.read_text(encoding="utf-8"))
            for name in (*now, *then):
                if now.get(name) != then.get(name):
                    raise ValueError(
                        f"{folder} was begun with {name}={then.get(name)!r}, now it is {now.get(name)!r}; give what it "
                        f"was begun with, or another output folder"
                    )
        else:
            write_whole(path, json.dumps(now, indent=2) + "\n")

    def path(self, number: int) -> Path:
        return self.folder / "parts" / f"part_{number:05d}.jsonl"

    def missing(self) -> list[int]:
        return [n for n in range(self.count) if not self.path(n).is_file()]

    def write(self, number: int, records: Iterable[Mapping[str, Any]]) -> None:
        write_whole(self.path(number), "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))

    def records(self) -> Iterator[dict[str, Any]]:
        """Of all parts, which are complete, in order."""
        for number in range(self.count):
            with self.path(number).open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def join(self, name: str) -> Path:
        """All records in one file."""
        path = self.folder / name
        write_whole(path, "".join(self.path(n).read_text(encoding="utf-8") for n in range(self.count)))
        return path
