"""The picture of docs/architecture.md: the packages of the three distributions with what each imports, from the code's own imports.

python docs/pictures/packages.py            # writes docs/pictures/packages.svg
python docs/pictures/packages.py --check    # exit code 1 where the file is not what the code gives
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(__file__).with_name("packages.svg")
DISTRIBUTIONS = {
    "soflow_core": ROOT / "soflow_core",
    "soflow_pipelines": ROOT / "pipelines" / "soflow_pipelines",
    "soflow_platform": ROOT / "platform" / "soflow_platform",
}
COLOURS = {"soflow_core": "#dcebd5", "soflow_pipelines": "#d9e6f4", "soflow_platform": "#f6e7cf"}
WIDTH, BOX, TALL, MARGIN, ARCS = 760, 540, 44, 16, 330

Part = tuple[str, str]
"""Distribution and package; all of `soflow_core` is one part."""


def part_of(module: str) -> Part | None:
    """The part that a dotted name belongs to; None for other libraries and for modules beside the packages."""
    names = module.split(".")
    if names[0] == "soflow_core":
        return ("soflow_core", "soflow_core")
    if names[0] in DISTRIBUTIONS and len(names) > 1 and (DISTRIBUTIONS[names[0]] / names[1]).is_dir():
        return (names[0], names[1])
    return None


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dependencies() -> dict[Part, set[Part]]:
    """Part -> the parts that its files import."""
    needs: dict[Part, set[Part]] = {}
    for name, folder in DISTRIBUTIONS.items():
        for path in folder.rglob("*.py"):
            part = part_of(".".join((name, *path.relative_to(folder).with_suffix("").parts)))
            if part is not None:
                found = {other for module in imports_of(path) if (other := part_of(module))}
                needs.setdefault(part, set()).update(found - {part})
    return needs


def ordered(needs: Mapping[Part, set[Part]]) -> list[Part]:
    """The parts, each after all that it imports; of those that could come next, the one that comes first by name."""
    left, order = dict(needs), list[Part]()
    while left:
        ready = sorted(part for part, wanted in left.items() if not wanted & left.keys())
        if not ready:
            raise SystemExit(f"packages import each other in a circle: {sorted(left)}")
        order.append(ready[0])
        del left[ready[0]]
    return order


def direct(part: Part, needs: Mapping[Part, set[Part]]) -> set[Part]:
    """What a part imports and nothing else that it imports does."""
    reached: set[Part] = set()
    waiting = [other for near in needs[part] for other in needs[near]]
    while waiting:
        if (other := waiting.pop()) not in reached:
            reached.add(other)
            waiting.extend(needs[other])
    return needs[part] - reached


@dataclass(frozen=True)
class Placed:
    part: Part
    top: int

    @property
    def middle(self) -> int:
        return self.top + TALL // 2


def placed(order: list[Part]) -> dict[Part, Placed]:
    """Lowest part at the bottom, with a space between distributions."""
    places, top = {}, 40
    for number, part in enumerate(reversed(order)):
        if number and order[::-1][number - 1][0] != part[0]:
            top += 34
        places[part] = Placed(part, top)
        top += TALL + 10
    return places


def box(place: Placed, needs: Mapping[Part, set[Part]]) -> Iterator[str]:
    distribution, package = place.part
    own = sorted(name for other, name in needs[place.part] if other == distribution)
    below = sorted(
        other if name == other else f"{other}.{name}"
        for other, name in needs[place.part]
        if other != distribution
    )
    lines = [
        ", ".join(own),
        ", ".join(below).replace("soflow_pipelines.", "pipelines.").replace("soflow_core", "core"),
    ]
    yield f'<rect x="{MARGIN}" y="{place.top}" width="{BOX}" height="{TALL}" rx="6" fill="{COLOURS[distribution]}" stroke="#555"/>'
    yield f'<text x="{MARGIN + 12}" y="{place.middle + 6}" font-size="17">{escape(package)}</text>'
    for number, line in enumerate(line for line in lines if line):
        yield f'<text x="{MARGIN + 150}" y="{place.top + 18 + 16 * number}" font-size="11" fill="#444">{escape(line)}</text>'


def arcs(places: Mapping[Part, Placed], needs: Mapping[Part, set[Part]]) -> Iterator[str]:
    """A line from each part to what it imports directly, further out the farther it goes."""
    for part, place in places.items():
        for other in sorted(direct(part, needs)):
            end = places[other]
            x, out = MARGIN + BOX, min(ARCS, 24 + abs(end.top - place.top) // 3)
            yield (
                f'<path d="M{x} {place.middle + 6} C{x + out} {place.middle + 6} {x + out} {end.middle - 6} {x + 8} {end.middle - 6}"'
                ' fill="none" stroke="#777" marker-end="url(#arrow)"/>'
            )


def svg() -> str:
    needs = dependencies()
    places = placed(ordered(needs))
    bottom = max(place.top for place in places.values()) + TALL + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" font-family="sans-serif">',
        "<title>Packages and their imports</title>",
        '<defs><marker id="arrow" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#777"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{bottom}" fill="#fff"/>',
    ]
    seen = set[str]()
    for part, place in places.items():
        if part[0] not in seen:
            lines.append(
                f'<text x="{MARGIN}" y="{place.top - 10}" font-size="14" fill="#222">{part[0]}</text>'
            )
            seen.add(part[0])
        lines += box(place, needs)
    lines += arcs(places, needs)
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    if not parser.parse_args().check:
        OUT.write_text(svg(), encoding="utf-8")
    elif not OUT.exists() or OUT.read_text(encoding="utf-8") != svg():
        sys.exit("docs/pictures/packages.svg is out of date: run python docs/pictures/packages.py")


if __name__ == "__main__":
    main()
