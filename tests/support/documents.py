"""What the documents show to be typed: commands, Python and files, with the comment that stands before each block.

A fenced block may follow one comment: `<!-- needs: a cluster -->` where the tests cannot have what it needs (its commands are
parsed, not run), `<!-- takes: minutes -->` where it runs among the slow tests, `<!-- file: NAME -->` where it is the content of
that file, `<!-- lines: NAME -->` where it has lines to add to one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "infra" / "README.md",
    ROOT / "benchmarks" / "README.md",
]
SWEEPS = [*sorted((ROOT / "sweeps").glob("*.yaml")), *sorted((ROOT / "docs").rglob("*.yaml"))]
BLOCK = re.compile(r"(?:^<!-- (\w+): (.+?) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or the commands in the head of a sweep file."""

    page: Path
    language: str
    text: str
    mark: str = ""
    """`needs`, `takes`, `file` or `lines`."""
    value: str = ""

    @property
    def name(self) -> str:
        first = self.text.strip().splitlines()[0]
        return f"{self.page.relative_to(ROOT)}: {first[:50]}"

    @property
    def needs(self) -> str | None:
        """What a machine must have for it; None where every machine has it."""
        return self.value if self.mark == "needs" else None

    @property
    def commands(self) -> list[Command]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [Command(self, words) for line in lines if (words := shlex.split(line, comments=True))]


@dataclass(frozen=True)
class Command:
    """One command line of a block."""

    block: Block
    words: list[str]
    """With what stands before the program, such as VARIABLE=value."""

    @property
    def line(self) -> str:
        return shlex.join(self.words)

    @property
    def name(self) -> str:
        return f"{self.block.page.relative_to(ROOT)}: {self.line[:70]}"

    @property
    def arguments(self) -> list[str]:
        """The program and its arguments."""
        return [word for word in self.words if not ASSIGNMENT.fullmatch(word)] or self.words


def blocks_of_page(page: Path) -> Iterator[Block]:
    for mark, value, language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        yield Block(page, language, text, mark, value)


def blocks_of_sweep(sweep: Path) -> Iterator[Block]:
    """The commands in the comment that a sweep file begins with: what is indented there."""
    head = re.match(r"(?:#.*\n)+", sweep.read_text(encoding="utf-8"))
    paragraphs = re.findall(r"(?:^#     .*\n)+", head[0] if head else "", re.MULTILINE)
    for paragraph in paragraphs:
        text = re.sub(r"^#     ", "", paragraph, flags=re.MULTILINE)
        needs = "a cluster" if "HEAD:" in text else ""
        yield Block(sweep, "sh", text, "needs" if needs else "", needs)


BLOCKS = [
    *(block for page in PAGES if page.exists() for block in blocks_of_page(page)),
    *(block for sweep in SWEEPS for block in blocks_of_sweep(sweep)),
]
COMMANDS = [command for block in BLOCKS if block.language == "sh" for command in block.commands]
