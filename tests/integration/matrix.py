"""The feature matrix: what of the kernel's features survives a checkpoint, and what is refused with which reason.

`features/*.c` has one small program for each; `test_features.py` takes them through two cycles; the table in
docs/checkpoint.md is made of their heads. `python tests/integration/matrix.py` writes it anew.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "features"
DOCS = Path(__file__).parents[2] / "docs/checkpoint.md"
BEGIN, END = "<!-- made by tests/integration/matrix.py -->\n", "<!-- end of what it made -->\n"

_HEAD = re.compile(r"^/\* (\w+): +(.*) \*/$", re.MULTILINE)


@dataclass(frozen=True)
class Feature:
    name: str
    """Of the file and the program."""
    what: str
    refused: str
    """The reason that criproxy gives; empty if it can be checkpointed."""
    limit: str
    """What isn't as it was; empty if all is."""
    capabilities: tuple[str, ...]
    """What its container needs in addition."""

    @property
    def source(self) -> Path:
        return SOURCES / f"{self.name}.c"


def features() -> list[Feature]:
    found = []
    for source in sorted(SOURCES.glob("*.c")):
        head = dict(_HEAD.findall(source.read_text()))
        capabilities = tuple(head.pop("capability", "").split())
        found.append(
            Feature(source.stem, head.pop("feature"), head.pop("refused", ""), head.pop("limit", ""), capabilities)
        )
        assert not head, f"{source} has an unknown line {head}"
    return found


def build(feature: Feature, folder: Path) -> Path:
    """Compiles the program into the folder."""
    target = folder / feature.name
    options = ["-static", "-O2", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc", *options, "-o", target, feature.source], check=True)
    return target


def table() -> str:
    """For the docs, those that work first."""
    lines = ["| Feature | Checkpoint |", "|---|---|"]
    for feature in sorted(features(), key=lambda feature: (bool(feature.refused), feature.name)):
        outcome = f'refused: "{feature.refused}"' if feature.refused else "works"
        outcome += f"; {feature.limit}" if feature.limit else ""
        lines.append(f"| {feature.what} ([test]({_link(feature)})) | {outcome} |")
    return "\n".join(lines) + "\n"


def documented() -> str:
    """The table as it is in the docs."""
    return DOCS.read_text().partition(BEGIN)[2].partition(END)[0]


def document() -> None:
    before, begin, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(before + begin + table() + END + rest.partition(END)[2])


def _link(feature: Feature) -> str:
    return f"../tests/integration/features/{feature.name}.c"


if __name__ == "__main__":
    document()
