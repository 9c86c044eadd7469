"""What a recipe may hold: its keys, the type of each value, flags, and the YAML dialect.

jsonargparse types single values; keys are matched here, so that each error is one line with the key, what was found,
what was expected, and the nearest key there is.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

import yaml

from dpmed.errors import InputError
from dpmed.recipe import Recipe

Values = dict[str, Any]
"""Dotted key -> value, e.g. {"training.epochs": 3.0}."""


# --- Keys -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One key of the recipe: its type, and its default, None where `required`."""

    hint: Any
    default: Any
    required: bool


@cache
def recipe_keys() -> dict[str, Key]:
    """All keys of the recipe, dotted, in the order of the dataclass."""
    found: dict[str, Key] = {}
    for field, hint in _hinted(Recipe):
        if is_dataclass(hint):
            found |= {f"{field.name}.{inner.name}": _key(inner, kind) for inner, kind in _hinted(hint)}
        else:
            found[field.name] = _key(field, hint)
    return found


def recipe_sections() -> dict[str, Any]:
    return {field.name: hint for field, hint in _hinted(Recipe) if is_dataclass(hint)}


def _hinted(kind: Any) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(kind)
    return [(field, hints[field.name]) for field in fields(kind)]


def _key(field: Field[Any], hint: Any) -> Key:
    if field.default_factory is not MISSING:
        return Key(hint, field.default_factory(), required=False)
    required = field.default is MISSING
    return Key(hint, None if required else field.default, required)


def _nearness(key: str, candidate: str) -> float:
    """How likely `candidate` is what `key` meant, about 0 to 2.3."""
    section, _, last = key.rpartition(".")
    other_section, _, other = candidate.rpartition(".")
    bonus = 0.3 if section == other_section else 0.0
    if last == other:
        return 2.0 + bonus
    if last == "".join(word[0] for word in other.split("_") if word):  # lr -> learning_rate
        return 1.5 + bonus
    ratio = difflib.SequenceMatcher(None, last, other).ratio()
    inside = min(len(last), len(other)) >= 3 and (last in other or other in last)  # num_train_epochs -> epochs
    return max(ratio + inside, difflib.SequenceMatcher(None, key, candidate).ratio()) + bonus * (ratio > 0.5)


def unknown_key(key: str, *, where: str, also: Iterable[str] = ()) -> InputError:
    """The error for a key that does not exist; it names the nearest of the recipe's keys and of `also`."""
    scores = {name: _nearness(key, name) for name in [*recipe_keys(), *also]}
    best = max(scores.values())
    nearest = [f"'{name}'" for name, score in scores.items() if score == best][:3]
    if best < 0.6:
        return InputError(f"{where}: unknown key '{key}': 'dpmed train --help' lists all keys")
    return InputError(f"{where}: unknown key '{key}': did you mean {' or '.join(nearest)}?")


# --- Values -----------------------------------------------------------------------------------------------------------

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def typed_values(values: Mapping[str, Any], *, where: str) -> Values:
    """Nested (or dotted) values as typed ones by dotted key."""
    sections, flat = recipe_sections(), {}
    for name, value in values.items():
        if name not in sections:
            nearest = difflib.get_close_matches(str(name), sections, n=1) if isinstance(value, dict) else []
            if nearest:
                raise InputError(f"{where}: unknown key '{name}': did you mean '{nearest[0]}'?")
            flat[str(name)] = value
        elif isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": content for inner, content in value.items()}
        elif value is not None:  # `lora:` with nothing below it is an empty section
            raise InputError(f"{where}: '{name}': got {shown(value)}, expected keys below it, e.g. {_example(name)}")
    for key in flat:
        if key not in recipe_keys():
            raise unknown_key(key, where=where)
    return {key: typed_value(key, value, where=f"{where}: '{key}'") for key, value in flat.items()}


def typed_value(key: str, value: Any, *, where: str) -> Any:
    """`value` as the key's type. Texts and nulls are settled before jsonargparse, which would turn "null" into null,
    "[a]" into a list, and accept null for a text."""
    entry = recipe_keys()[key]
    kinds = _alternatives(entry.hint)
    if (value is None and type(None) in kinds) or (isinstance(value, str) and str in kinds):
        return value
    if get_origin(entry.hint) is dict:
        inner = get_args(entry.hint)[1]
        if _is_mapping(value) and (inner is Any or all(map(_is_mapping, value.values()))):
            return copy.deepcopy(value)
    elif value is not None:
        # jsonargparse raises several kinds of errors; their messages take many lines and name Python types.
        with contextlib.suppress(Exception):
            return _parser(entry.hint).parse_object({"value": copy.deepcopy(value)}).value
    remedy = "set it" if entry.required else f"the default is {shown(entry.default)}"
    quote = "; put it in quotes" if str in kinds and isinstance(value, (int, float)) else ""
    raise InputError(f"{where}: got {shown(value)}, expected {expected(entry.hint)}{quote} ({remedy})")


@cache
def _parser(hint: Any) -> Any:
    import jsonargparse  # 0.15 s: `--help` does without

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_mapping(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def expected(hint: Any) -> str:
    if hint in _WORDS:
        return _WORDS[hint]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is list:
        return f"a list, each item {expected(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "keys and values, e.g. {key: value}"
    return " or ".join(map(expected, _alternatives(hint)))


def shown(value: Any) -> str:
    """A value on one line, as YAML spells it, shortened."""
    if isinstance(value, str) and not value.isprintable():
        text = json.dumps(value, ensure_ascii=False)  # YAML would fold a line break into blank lines
    else:
        text = yaml.dump(value, Dumper=RecipeDumper, default_flow_style=True, width=10_000).removesuffix("\n...\n")
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _example(section: str) -> str:
    return next(key for key in recipe_keys() if key.startswith(f"{section}."))


# --- Flags ------------------------------------------------------------------------------------------------------------


def flag_pairs(flags: Sequence[str]) -> Iterator[tuple[str, list[str], str]]:
    """Yield (key, path inside that key's mapping, text) of each flag: --training.extra.optim gives ["optim"]."""
    tokens = iter(flags)
    for token in tokens:
        name, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--"):
            raise InputError(f"unexpected argument '{token}': flags of a recipe read --section.key value")
        key, rest = flag_key(name)
        text = text if equals else next(tokens, "--")
        if not equals and text.startswith("--"):
            raise InputError(f"--{name}: needs a value, e.g. --{name} {shown(recipe_keys()[key].default)}")
        yield key, rest, text


def flag_key(name: str, *, also: Iterable[str] = ()) -> tuple[str, list[str]]:
    """The recipe key that a flag names, and the path below it where the key holds a mapping. Raises: InputError."""
    if name in recipe_keys():
        return name, []
    for key, entry in recipe_keys().items():
        if get_origin(entry.hint) is dict and name.startswith(f"{key}."):
            return key, name[len(key) + 1 :].split(".")
    raise unknown_key(name, where=f"--{name}", also=also)


def flag_value(key: str, rest: list[str], text: str) -> Any:
    kinds = _alternatives(recipe_keys()[key].hint)
    try:
        value = parse_yaml_value(text)
    except (yaml.YAMLError, ValueError):
        value = text
    if str in kinds and not rest and not (isinstance(value, list) or (value is None and type(None) in kinds)):
        value = text  # --data.unit 5 names the column "5"
    for name in reversed(rest):
        value = {name: value}
    return value


# --- YAML -------------------------------------------------------------------------------------------------------------

_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")


class _Loader(yaml.SafeLoader):
    """Safe; 5e-4 is a number (YAML 1.1 wants 5.0e-4), and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands twice", problem_mark=key.start_mark)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep=deep)


class RecipeDumper(yaml.SafeDumper):
    """Quotes texts that `_Loader` would read as numbers; writes no anchors, which the reader of a recipe must chase."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: RecipeDumper, text: str) -> yaml.ScalarNode:
    """Line breaks and control characters are escaped: unescaped, a reader folds them (U+0085 becomes a blank)."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


RecipeDumper.add_representer(str, _text_node)
for _side in (_Loader, RecipeDumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def parse_yaml_value(text: str) -> Any:
    """One YAML document by the safe loader. Raises: yaml.YAMLError, ValueError (an impossible date)."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def parse_yaml(text: str, *, where: str) -> dict[str, Any]:
    """The mapping that a YAML text holds. Raises: InputError with the line."""
    try:
        values = parse_yaml_value(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(
            f"{where}: {line}not valid YAML ({' '.join(str(problem or type(error).__name__).split())}): "
            "check indentation, colons and quotes there"
        ) from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else shown(values)
        raise InputError(f"{where}: got {found}, expected a recipe, lines of 'key: value'; see 'dpmed recipe ls'")
    return values
