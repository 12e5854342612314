"""Points of a search space: by a grid, by independent draws, or by a Sobol sequence; conditions and constraints between settings.

A point maps the paths of settings to their values. The same settings and seed give the same points, and more of them begin with the
same ones.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from soflow_platform.config.constraints import Constraint
from soflow_platform.config.dimensions import Dimension, in_order
from soflow_platform.config.search import SearchConfig
from soflow_platform.errors import UserError

DRAWS = 100
"""Draws for each point before a space whose constraints hardly any point fulfils is given up."""


class PointSettings:
    """The settings of a trial: those of a point, and of the file where the point has none."""

    def __init__(self, file: Mapping[str, Any], point: Mapping[str, Any]) -> None:
        self._file, self._point = file, point

    def __call__(self, key: str) -> Any:
        """The value of a setting by its path. Raises KeyError where the trial has no such setting."""
        sections = [at for at in self._point if key == at or key.startswith(f"{at}.")]
        if not sections:
            return _below(self._file, key)
        nearest = max(sections, key=len)
        value = self._point[nearest]
        return value if nearest == key else _below(value, key[len(nearest) + 1 :])

    def fulfil(self, when: Mapping[str, Any] | None) -> bool:
        """Whether each setting has the value, or one of the values, that `when` gives it."""
        for key, wanted in (when or {}).items():
            try:
                value = self(key)
            except KeyError:
                return False
            if value not in (wanted if isinstance(wanted, list) else [wanted]):
                return False
        return True


def _below(value: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(key)
        value = value[part]
    return value


class SearchSpace:
    """The dimensions and constraints of a sweep, over the settings of its file."""

    def __init__(self, search: SearchConfig, file: Mapping[str, Any]) -> None:
        """`file`: every setting of the file as nested dictionaries."""
        self.search, self.file = search, file
        self.dimensions = search.dimensions()
        self.order = in_order(self.dimensions)
        self.constraints = [Constraint.parse(text) for text in search.constraints]
        self._named: set[str] = set()

    def allows(self, point: Mapping[str, Any]) -> bool:
        """Whether a point fulfils the constraints. Raises UserError where one cannot be computed."""
        value_of = PointSettings(self.file, point)
        for constraint in self.constraints:
            self._note_settings(constraint, value_of)
            try:
                if not constraint.holds(value_of):
                    return False
            except ValueError as error:
                raise UserError(f"search.constraints: {error}.") from None
        return True

    def _note_settings(self, constraint: Constraint, value_of: PointSettings) -> None:
        for key in constraint.keys:
            if key not in self._named:
                try:
                    value_of(key)
                except KeyError:
                    continue
                self._named.add(key)

    def active(self, key: str, point: Mapping[str, Any]) -> bool:
        """Whether a setting varies in a trial that has the settings of `point`."""
        return PointSettings(self.file, point).fulfil(self.dimensions[key].when)

    def points(self, seed: int) -> list[dict[str, Any]]:
        """The points that need no results: all but those that `tpe` draws after its first ones.

        Raises UserError where the constraints leave too few.
        """
        if self.search.algorithm == "grid":
            points = list(self._combined({}))
        else:
            draws = self._random(seed) if self.search.algorithm == "random" else self._sobol(seed)
            points = self._first_allowed(draws, (self.search.trials or 0) - self.search.drawn)
        unknown = [key for each in self.constraints for key in each.keys if key not in self._named]
        if unknown:
            raise UserError(f"search.constraints: no trial has the setting `{unknown[0]}`.")
        if not points:
            raise UserError("search.constraints leave no point of search.space: widen one of them.")
        return points

    def _first_allowed(self, draws: Iterable[dict[str, Any]], wanted: int) -> list[dict[str, Any]]:
        """The first draws that break no constraint, each with every value of the grid beside it."""
        points, used = [], 0
        for place, drawn in enumerate(draws):
            combined = list(self._combined(drawn))
            used += bool(combined)
            points += combined
            if used == wanted:
                return points
            if place > DRAWS * wanted:
                break
        raise UserError(
            f"search.constraints leave {used} of {place + 1:,} drawn points, and search.trials asks for {wanted}: widen search.space."
        )

    def _combined(self, drawn: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """A draw with every combination of the grid, as far as conditions and constraints allow."""
        points: list[dict[str, Any]] = [{}]
        for key in self.order:
            values = self.dimensions[key].grid or [drawn.get(key)]
            points = [
                point | ({key: value} if active else {})
                for point in points
                for active in [self.active(key, point)]
                for value in (values if active else [None])
            ]
        for point in points:
            # In the order of the file, in which sections that a point replaces stand before settings within them.
            ordered = {key: point[key] for key in self.dimensions if key in point}
            if self.allows(ordered):
                yield ordered

    def _drawn_keys(self) -> list[str]:
        return [key for key, dimension in self.dimensions.items() if dimension.grid is None]

    def _random(self, seed: int) -> Iterator[dict[str, Any]]:
        generator = random.Random(f"search-{seed}")
        while True:
            yield {key: _draw(self.dimensions[key], generator) for key in self._drawn_keys()}

    def _sobol(self, seed: int) -> Iterator[dict[str, Any]]:
        keys = self._drawn_keys()
        if not keys:
            yield from itertools.repeat({})
        from scipy.stats import qmc

        sequence = qmc.Sobol(len(keys), scramble=True, seed=seed % 2**32)
        count = 0
        while count < 2**20:
            # In blocks of powers of 2, in which the sequence is balanced.
            block = max(count, 64)
            for row in sequence.random(block):
                yield {
                    key: self.dimensions[key].at(float(value)) for key, value in zip(keys, row, strict=True)
                }
            count += block


def _draw(dimension: Dimension, generator: random.Random) -> Any:
    if dimension.choice is not None:
        return generator.choice(dimension.choice)
    if dimension.uniform is not None:
        return generator.uniform(*dimension.uniform)
    if dimension.log_uniform is not None:
        low, high = dimension.log_uniform
        return math.exp(generator.uniform(math.log(low), math.log(high)))
    return dimension.at(generator.random())
