"""Constraints between settings: `optimizer.warmup_steps < training.steps`, parsed and evaluated without running code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_CHARACTERS = 500
"""Length of a constraint."""
COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, values: value in values,
    ast.NotIn: lambda value, values: value not in values,
}
ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
WORDS = {"true": True, "false": False}
"""Names that are values."""


class AbsentError(Exception):
    """A setting that the constraint names is none of the trial's."""


@dataclass(frozen=True)
class Constraint:
    """A condition on the settings of a trial."""

    text: str
    tree: ast.expr
    keys: tuple[str, ...]
    """Settings that it names."""

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """Raises ValueError where the text is no condition."""
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"a constraint has at most {MAX_CHARACTERS} characters")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            keys = tuple(dict.fromkeys(_keys(tree)))
        except (SyntaxError, RecursionError, MemoryError, ValueError):
            raise ValueError(
                f"the constraint {text[:80]!r} cannot be read: write settings, numbers, + - * / // %, comparisons, in, and, or, not, "
                "such as `optimizer.warmup_steps < training.steps`"
            ) from None
        if not keys:
            raise ValueError(f"the constraint {text[:80]!r} names no setting")
        return cls(text, tree, keys)

    def holds(self, value_of: Callable[[str], Any]) -> bool:
        """Whether settings fulfil it; `value_of` raises KeyError for one that the trial does not have, and then it holds.

        Raises ValueError where it cannot be computed.
        """
        try:
            return bool(_value(self.tree, value_of))
        except AbsentError:
            return True
        except (TypeError, ArithmeticError) as error:
            raise ValueError(f"the constraint {self.text!r} cannot be computed: {error}") from None


def _keys(node: ast.expr) -> Iterator[str]:
    """The settings in an expression. Raises ValueError for anything that is no part of a condition."""
    key = _dotted(node)
    if key is not None:
        yield from () if key in WORDS else (key,)
        return
    for below in _parts(node):
        yield from _keys(below)


def _parts(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        return [node.operand]
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return [node.left, node.right]
    if isinstance(node, ast.Compare) and all(type(op) in COMPARISONS for op in node.ops):
        return [node.left, *node.comparators]
    if isinstance(node, ast.List | ast.Tuple):
        return node.elts
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return []
    raise ValueError


def _dotted(node: ast.expr) -> str | None:
    """`a.b.c` of a name or an attribute; None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None


def _value(node: ast.expr, value_of: Callable[[str], Any]) -> Any:
    key = _dotted(node)
    if key in WORDS:
        return WORDS[key]
    if key is not None:
        try:
            value = value_of(key)
        except KeyError:
            raise AbsentError from None
        if value is None:
            raise AbsentError
        return value
    if isinstance(node, ast.BoolOp):
        parts = (_value(each, value_of) for each in node.values)
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if isinstance(node, ast.UnaryOp):
        operand = _value(node.operand, value_of)
        return not operand if isinstance(node.op, ast.Not) else -operand
    if isinstance(node, ast.BinOp):
        return _number(ARITHMETIC[type(node.op)], _value(node.left, value_of), _value(node.right, value_of))
    if isinstance(node, ast.Compare):
        values = [_value(each, value_of) for each in (node.left, *node.comparators)]
        pairs = zip(node.ops, values, values[1:], strict=False)
        return all(COMPARISONS[type(op)](one, other) for op, one, other in pairs)
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each, value_of) for each in node.elts]
    assert isinstance(node, ast.Constant)
    return node.value


def _number(operation: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        raise TypeError("only numbers can be added, multiplied or divided")
    return operation(one, other)
