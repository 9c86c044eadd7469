"""Help for the recipe's keys, read from the source of `recipe.py` without importing anything heavy.

The texts are the strings under each field, as in the YAML itself. Parsing the source takes about 5 ms; jsonargparse
with docstring-parser takes 0.3 s for the same, half of what `--help` may take.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from itertools import groupby

from dpmed import recipe
from dpmed.recipe_values import Key, expected, recipe_keys, shown

_WIDTH = 100


def recipe_help(keys: Sequence[str]) -> str:
    """One entry per dotted key: flag, meaning, type, default; a section opens with what it is about."""
    texts = attribute_texts()
    lines = ["keys of the recipe, each also a flag:"]
    for section, group in groupby(keys, key=lambda key: key.rpartition(".")[0]):
        lines += ["", f"{section}: {texts[section]}"] if section else [""]
        for key in group:
            lines += [f"  --{key}", *_indented(f"{texts.get(key, '')} {_kind(recipe_keys()[key])}".strip())]
    return "\n".join(lines)


def attribute_texts() -> dict[str, str]:
    """Dotted key, or section -> the string under the field, or the section's docstring."""
    classes = {node.name: node for node in ast.parse(inspect.getsource(recipe)).body if isinstance(node, ast.ClassDef)}
    found: dict[str, str] = {}
    for name, annotation, text in _fields(classes["Recipe"]):
        if annotation in classes:
            found[name] = ast.get_docstring(classes[annotation]) or ""
            found |= {f"{name}.{inner}": content for inner, _, content in _fields(classes[annotation])}
        else:
            found[name] = text
    return found


def _fields(node: ast.ClassDef) -> list[tuple[str, str, str]]:
    """Name, annotation and text of each field."""
    found: list[tuple[str, str, str]] = []
    for statement, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found.append((statement.target.id, ast.unparse(statement.annotation), _text(below)))
    return found


def _text(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def _kind(entry: Key) -> str:
    default = "required" if entry.required else f"default: {shown(entry.default)}"
    return f"({expected(entry.hint)}; {default})"


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
