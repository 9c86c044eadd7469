"""What each command takes on the command line; `cli` says what it does. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpmed.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose help ends with the keys of the recipe where the verb takes them."""

    keys: tuple[str, ...] = ()

    def __init__(self, *, intermixed: bool = False, **settings: Any) -> None:
        self.intermixed = intermixed  # an argument that may be left out may also stand behind the flags
        super().__init__(**settings, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> Any:
        raise InputError(f"{message}: see '{self.prog} --help'")

    def format_help(self) -> str:
        if not self.keys:
            return super().format_help()
        from dpmed.recipe_help import recipe_help
        from dpmed.recipe_values import recipe_keys

        keys = [key for key in recipe_keys() if is_among(key, self.keys)]
        if "model.path" not in keys:  # the verb has shorter flags of its own for what is required
            keys = [key for key in keys if not recipe_keys()[key].required]
        return f"{super().format_help()}\n{recipe_help(keys)}\n"

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not self.intermixed:  # argparse gives up on it at the first flag
            return super().parse_known_args(args, namespace)
        self.intermixed = False  # what is called now comes back here for each half
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True

    def option_names(self) -> set[str]:
        return set(self._option_string_actions)


class ShowVersion(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from dpmed import __version__

        print(f"dpmed {__version__}")
        parser.exit()


def is_among(key: str, allowed: Sequence[str]) -> bool:
    """Whether a dotted key is in `allowed`, where a name with a dot at its end stands for a section."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in allowed)


def shared_options() -> Parser:
    """The flags of every command; they may stand before or after its name."""
    shared = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    shared.add_argument("--online", action="store_true", help="allow the Hugging Face Hub; offline without it")
    return shared


def _at_least_one(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got '{text}', expected a whole number of at least 1")
    return value


def _pairs(text: str) -> dict[str, str]:
    found = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and kind.strip() for name, _, kind in found):
        raise argparse.ArgumentTypeError("expected COLUMN=TYPE, several joined by commas")
    return {name.strip(): kind.strip() for name, _, kind in found}


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    return [_at_least_one(word) for word in _words(text)]


def _output(parser: argparse.ArgumentParser, *, resume: bool) -> None:
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help="folder to write; new or empty")
    if resume:
        parser.add_argument("--resume", action="store_true", help="go on in a folder that an earlier run left")


def add_demo(parser: argparse.ArgumentParser) -> None:
    _output(parser, resume=True)
    parser.add_argument("--preset", choices=("quick", "full"), default="quick", help="quick: minutes on 2 cores")
    _add_jobs(parser, default=2)


def _add_jobs(parser: argparse.ArgumentParser, *, default: int) -> None:
    parser.add_argument(
        "--jobs", type=_at_least_one, default=default, metavar="N", help=f"runs at the same time (default {default})"
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name of 'dpmed recipe ls'")


def add_train(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    _output(parser, resume=True)
    parser.add_argument("--run_name", metavar="NAME", help="name of the run in reports")
    parser.add_argument("--run_setting", metavar="NAME", help="what runs with other seeds have in common")
    _add_base_scores(parser)


def add_sanitize(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    _output(parser, resume=True)


def _add_base_scores(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base_scores", type=Path, metavar="F", help="folder where runs share the base model's scores")


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="model folder or adapter folder")
    parser.add_argument("--base_model", metavar="B", help="the model before fine-tuning, for reference scores")
    parser.add_argument("--train", required=True, metavar="F", help="the records it was trained on: the members")
    parser.add_argument("--heldout", required=True, metavar="F", help="records of other patients: the non-members")
    parser.add_argument("--canaries", metavar="F", help="manifest of the canaries planted in train: exposure and audit")
    parser.add_argument("--before", type=Path, metavar="D", help="evaluation of the same records before: persistence")
    _output(parser, resume=True)
    _add_base_scores(parser)


def add_frontier(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    _output(parser, resume=True)
    _add_jobs(parser, default=1)


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="D", help="run folders, or folders of a frontier")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="O", help="folder of the report")


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target_epsilon", type=float, required=True, metavar="E", help="epsilon after all steps")
    parser.add_argument("--delta", type=float, metavar="X", help="below 1 / N; default: N ** -1.1")
    counts = {"n_units": "patients in the training data", "expected_batch_units": "expected patients per step"}
    for name, text in {**counts, "n_steps": "optimizer steps"}.items():
        parser.add_argument(f"--{name}", type=_at_least_one, required=True, metavar="N", help=text)


def add_tag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="csv, jsonl, parquet, or a saved datasets folder")
    _output(parser, resume=False)
    parser.add_argument("--k", type=_at_least_one, default=2, help="a word of fewer than k patients is an identifier")
    parser.add_argument(
        "--patterns", choices=("true", "false", "presidio"), default="true", help="identifiers by their form"
    )
    parser.add_argument("--ner", metavar="DIR", help="folder of a token-classification model: names that have no form")
    parser.add_argument("--table", metavar="F", help="your table of patients: a row a patient, its values are known")
    parser.add_argument("--table_unit", metavar="COLUMN", help="its column with the patient; default: data.unit")
    parser.add_argument(
        "--table_types",
        type=_pairs,
        default={},
        metavar="COLUMN=TYPE,...",
        help="columns whose names do not say a type",
    )
    parser.add_argument("--everywhere", action="store_true", help="look for its values in other patients' records too")
    parser.add_argument("--day_first", action="store_true", help="03/04/1950 is the third of April")
    parser.add_argument("--check", metavar="F", help="labelled records: measure recall and precision of the patterns")


def add_plant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="training records: csv, jsonl, parquet, or a saved folder")
    _output(parser, resume=False)
    parser.add_argument("--n", type=_at_least_one, required=True, help="canary patients; about half will be planted")
    parser.add_argument("--designs", type=_words, metavar="D,...", help="random_tokens, identifiers, rare_bigrams")
    parser.add_argument("--repeats", type=_numbers, metavar="N,...", help="notes of a canary patient; default 1,2,4")
    parser.add_argument("--seed", type=int, help="for a repeatable experiment; default: fresh, as an audit should be")


def add_ledger(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|verify|budget")
    shared = [shared_options()]
    show = actions.add_parser("show", help="data sets, their runs, what was spent, overlaps", parents=shared)
    verify = actions.add_parser("verify", help="whether an entry was changed or is missing", parents=shared)
    budget = actions.add_parser(
        "budget", help="limit what a data set's units may be charged", parents=shared, intermixed=True
    )
    budget.add_argument("dataset", metavar="DATASET", help="an id of 'dpmed ledger show', or its beginning")
    budget.add_argument(
        "--epsilon", type=float, required=True, metavar="E", help="no unit may exceed it, over all runs"
    )
    budget.add_argument("--delta", type=float, required=True, metavar="X", help="at which epsilon is meant")
    for action in (show, verify, budget):
        action.add_argument(
            "path", type=Path, nargs="?", metavar="PATH", help="default: DPMED_LEDGER, or your data folder"
        )


def add_recipe_verb(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|cp|check")
    shared = [shared_options()]
    actions.add_parser("ls", help="list the shipped recipes", parents=shared)
    copy = actions.add_parser("cp", help="copy a shipped recipe", parents=shared)
    copy.add_argument("name", metavar="NAME", help="a name of 'dpmed recipe ls'")
    copy.add_argument("dest", type=Path, metavar="DEST", help="file or folder")
    check = actions.add_parser("check", help="check a recipe against its data and model, no training", parents=shared)
    add_recipe(check)


def add_env(parser: argparse.ArgumentParser) -> None:
    """It takes nothing of its own."""
