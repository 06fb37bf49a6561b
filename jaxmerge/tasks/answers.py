"""Answers that may be handed to a judge which runs them as Python: literals, and small formulas."""

from __future__ import annotations

import ast
import re

_LONGEST = 1000  # characters
_LARGEST_EXPONENT = 99
_CHARACTERS = r"[A-Za-z0-9 .()+*/-]*"
_WORD = r"[0-9]+(\.[0-9]+)?|[A-Za-z]"  # a number without exponent, or a name of one letter
_NODES = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.Div,
    ast.Pow,
    ast.USub,
    ast.UAdd,
)


def literal(text: str) -> object:
    """The value of a Python literal: what `eval` returns for one, and nothing is ever run.

    Raises:
        ValueError: the text is no literal.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST} characters")
    try:
        return ast.literal_eval(text)
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError("no literal") from error


def is_formula(text: str) -> bool:
    """Whether SymPy can parse it without running code, and in little time.

    Formulas have numbers, names of one letter, parentheses, + - * / and powers of a name with a
    small whole exponent.
    """
    if len(text) > _LONGEST or not re.fullmatch(_CHARACTERS, text):
        return False
    if not all(re.fullmatch(_WORD, word) for word in re.findall(r"[\w.]+", text)):
        return False
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (MemoryError, RecursionError, SyntaxError, ValueError):
        return False
    powers = [
        each for each in nodes if isinstance(each, ast.BinOp) and isinstance(each.op, ast.Pow)
    ]
    return all(isinstance(each, _NODES) for each in nodes) and all(map(_is_small, powers))


def _is_small(power: ast.BinOp) -> bool:
    base, exponent = power.left, power.right
    return (
        isinstance(base, ast.Name)
        and isinstance(exponent, ast.Constant)
        and isinstance(exponent.value, int)
        and exponent.value <= _LARGEST_EXPONENT
    )
