"""The command line: one function per verb. Heavy imports stand inside the functions, so that `--help` stays fast.

Results go to stdout (JSON with --json), everything else to stderr. Exit status: 0 done, 1 a fault of ours, 2 the user's
input, 3 a gate or a budget said no, 130 interrupted. No message holds text from records: of an unexpected exception
only its type and place are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpmed import cli_arguments as arguments
from dpmed import cli_show, environment
from dpmed.cli_arguments import Parser, is_among
from dpmed.errors import DpmedError, InputError, PrivacyError, fault_line
from dpmed.recipe import Recipe

Result = dict[str, Any]

# The recipe keys that a verb takes as flags; a name with a dot at its end stands for a section.
TRAIN_KEYS = ("method", "task", "model.", "data.", "lora.", "privacy.", "sani.", "unlearn.", "training.", "evaluation.")
FRONTIER_KEYS = (*TRAIN_KEYS, "frontier.")
EVALUATE_KEYS = ("task", "model.revision", "model.pooling", "data.", "evaluation.")
TAG_KEYS = ("data.",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; nothing is raised."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:  # argparse, after --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except DpmedError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; go on with --resume", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("DPMED_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        print(f"error: {fault_line(error)}", file=sys.stderr)
        return 1


def _run(given: list[str]) -> int:
    parser, verbs = _parser()
    at = next((i for i, token in enumerate(given) if not token.startswith("-")), None)
    name = given[at] if at is not None else None
    if name is not None and name not in VERBS:
        nearest = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"name one of {', '.join(VERBS)}"
        raise InputError(f"unknown command '{name}': {hint}")
    flags: list[str] = []
    if name is not None and VERBS[name].keys and not {"-h", "--help"} & set(given):
        given, flags = _split(given, own=verbs[name].option_names())
    args = parser.parse_args(given)
    if name is None:
        raise InputError(f"name a command: {', '.join(VERBS)}; see 'dpmed --help'")
    environment.prepare(online=getattr(args, "online", False))
    args.flags = flags
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print must not mix with the result
        result = VERBS[name].run(args)
    if int(os.environ.get("RANK", "0")) > 0:
        return 0  # under torchrun rank 0 tells the result
    if hasattr(args, "output_dir"):
        result = {"output_dir": str(args.output_dir), **result}
    if getattr(args, "json", False):
        print(json.dumps(_plain(result), indent=2, allow_nan=False))
    else:
        VERBS[name].show(result)
    return 0


def _split(given: Sequence[str], *, own: set[str]) -> tuple[list[str], list[str]]:
    """Tell the verb's own arguments from the recipe's flags. Raises: InputError for a flag that is neither."""
    from dpmed.recipe_values import flag_key

    rest: list[str] = []
    flags: list[str] = []
    tokens = iter(given)
    for token in tokens:
        name, equals, _ = token.partition("=")
        if not token.startswith("--") or name in own:
            rest.append(token)
            continue
        flag_key(name[2:], also=[option.removeprefix("--") for option in own])
        flags.append(token)
        if not equals and (value := next(tokens, None)) is not None:
            flags.append(value)
    return rest, flags


def _plain(value: Any) -> Any:
    """JSON's types only: paths become text, infinities and NaN null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(content) for name, content in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


# --- Verbs ------------------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> Result:
    from dpmed.demo import run_demo

    return run_demo(args.output_dir, preset=args.preset, jobs=args.jobs, resume=args.resume)


def train(args: argparse.Namespace) -> Result:
    from dpmed.recipe_io import check_recipe, load_recipe

    recipe = load_recipe(args.recipe, args.flags)
    check_recipe(recipe)
    from dpmed.pipeline import train as run_training

    return run_training(
        recipe,
        args.output_dir,
        resume=args.resume,
        name=args.run_name,
        setting=args.run_setting,
        base_scores=args.base_scores,
    )


def sanitize(args: argparse.Namespace) -> Result:
    from dpmed.recipe_io import load_recipe
    from dpmed.sanitizing import sanitize as run_sanitizing

    return run_sanitizing(load_recipe(args.recipe, args.flags), args.output_dir, resume=args.resume)


def evaluate(args: argparse.Namespace) -> Result:
    from dpmed.recipe_io import build_recipe, check_recipe

    _only(args.flags, EVALUATE_KEYS, verb="evaluate")
    data = {"train": args.train, "heldout": args.heldout, "canaries": args.canaries}
    values = {"model": {"path": args.model, "base": args.base_model}, "data": data}
    recipe = build_recipe(values, where="evaluate", flags=args.flags)
    check_recipe(recipe)
    from dpmed.pipeline import evaluate as run_evaluation

    task_given = any(flag.partition("=")[0] == "--task" for flag in args.flags)
    return run_evaluation(
        recipe,
        args.output_dir,
        resume=args.resume,
        base_scores=args.base_scores,
        task_given=task_given,
        before=args.before,
    )


def frontier(args: argparse.Namespace) -> Result:
    from dpmed.recipe_io import check_recipe, load_recipe

    recipe = load_recipe(args.recipe, args.flags)
    check_recipe(recipe, frontier=True)
    from dpmed.frontier import run_frontier

    return run_frontier(recipe, args.output_dir, jobs=args.jobs, resume=args.resume)


def report(args: argparse.Namespace) -> Result:
    from dpmed.report.build import build_pages

    return build_pages(args.folders, args.output_dir)


def calibrate(args: argparse.Namespace) -> Result:
    from dpmed.privacy.plan import PrivacyPlan

    plan = PrivacyPlan.calibrated(
        unit="unit",
        n_units=args.n_units,
        expected_batch_units=args.expected_batch_units,
        max_records_per_unit=1,
        clip_norm=1.0,
        target_epsilon=args.target_epsilon,
        delta=args.delta,
        n_steps=args.n_steps,
    )
    return plan.spent(args.n_steps)


def tag(args: argparse.Namespace) -> Result:
    from dpmed.recipe_io import build_recipe, check_recipe

    _only(args.flags, TAG_KEYS, verb="tag")
    # The recipe lends its data keys; tagging asks for no model.
    recipe = build_recipe({"model": {"path": "none"}, "data": {"train": args.data}}, where="tag", flags=args.flags)
    check_recipe(recipe)
    from dpmed.tag_check import labelled_records
    from dpmed.tagging import TagSources, tag_folder

    data = recipe.data
    sources = TagSources(
        patterns=args.patterns,
        table=args.table,
        table_unit=args.table_unit,
        table_types=args.table_types,
        everywhere=args.everywhere,
        day_first=args.day_first,
        ner=args.ner,
    )
    records, about = _records(recipe, data.train), {"data": args.data}
    check = args.check and labelled_records(args.check, text=data.text, unit=data.unit, identifiers=data.identifiers)
    return tag_folder(records, args.output_dir, sources, about=about, unit=data.unit, k=args.k, check=check)


def plant(args: argparse.Namespace) -> Result:
    from dpmed.recipe_io import build_recipe, check_recipe

    _only(args.flags, TAG_KEYS, verb="plant")
    recipe = build_recipe({"model": {"path": "none"}, "data": {"train": args.data}}, where="plant", flags=args.flags)
    check_recipe(recipe)
    from dpmed.planting import plant_folder

    return plant_folder(
        _records(recipe, recipe.data.train),
        args.output_dir,
        unit=recipe.data.unit,
        n=args.n,
        designs=args.designs,
        repeats=args.repeats,
        seed=args.seed,
    )


def ledger(args: argparse.Namespace) -> Result:
    from dpmed.privacy.ledger import PrivacyLedger, ledger_path

    path = ledger_path(None) if args.path is None else args.path.expanduser()
    if path is None:
        raise InputError("DPMED_LEDGER is 'none', so there is no ledger: name its file behind the command")
    book = PrivacyLedger(path, create=False)
    if args.action == "show":
        return {"ledger": book.path, "datasets": book.datasets()}
    if args.action == "budget":
        book.set_budget(args.dataset, epsilon=args.epsilon, delta=args.delta)
        return {"ledger": book.path, "dataset": args.dataset, "budget": {"epsilon": args.epsilon, "delta": args.delta}}
    problems = book.verify()
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise PrivacyError(
            f"{book.path}: {problems[0]}{more}: what was spent is not known; restore the ledger from a backup"
        )
    n_entries, head = book.head
    return {"ledger": book.path, "whole": True, "n_entries": n_entries, "head": head, "unprotected": book.unprotected()}


def recipe(args: argparse.Namespace) -> Result:
    from dpmed.recipe_io import load_recipe, shipped_recipes

    if args.action == "ls":
        texts = {name: item.read_text(encoding="utf-8") for name, item in shipped_recipes().items()}
        return {"recipes": {name: _first_comment(text) for name, text in texts.items()}}
    if args.action == "check":
        return _check(load_recipe(args.recipe, args.flags), args.recipe)
    shipped = shipped_recipes()
    if args.name not in shipped:
        nearest = difflib.get_close_matches(args.name, shipped, n=1, cutoff=0.3)
        hint = f"did you mean '{nearest[0]}'?" if nearest else "see 'dpmed recipe ls'"
        raise InputError(f"{args.name}: no shipped recipe of that name: {hint}")
    target = args.dest / Path(args.name).name if args.dest.is_dir() else args.dest
    if target.exists():
        raise InputError(f"{target}: already exists: name another file, or remove it")
    if not target.parent.is_dir():
        raise InputError(f"{target}: no such folder as {target.parent}: make it first")
    target.write_text(shipped[args.name].read_text(encoding="utf-8"), encoding="utf-8")
    return {"copied": args.name, "to": target}


def _check(recipe: Recipe, name: str) -> Result:
    """Check a recipe, then that its data can be read with the named columns and that its model is there."""
    from dpmed.recipe import FrontierSection
    from dpmed.recipe_io import check_recipe

    grid = recipe.frontier != FrontierSection()
    check_recipe(recipe, frontier=grid)
    model = Path(recipe.model.path).expanduser()
    known = any((model / file).is_file() for file in ("config.json", "adapter_config.json"))
    if not known and (model.exists() or recipe.model.path.count("/") > 1 or recipe.model.path[0] in "./~"):
        problem = "holds no config.json and no adapter_config.json" if model.is_dir() else "no such folder"
        raise InputError(f"model.path: {recipe.model.path}: {problem}: name a folder that save_pretrained made")
    sources = {split: getattr(recipe.data, split) for split in ("train", "validation", "heldout")}
    counts = {split: len(_records(recipe, source)) for split, source in sources.items() if source is not None}
    return {
        "recipe": name,
        "methods": recipe.frontier.methods if grid else [recipe.method],
        "records": counts,
        "model": "a folder" if known else "no folder here: a built-in name or a Hub id, looked up when training starts",
    }


def env(args: argparse.Namespace) -> Result:
    return {
        "versions": environment.versions(),
        "device": environment.device(),
        "offline": environment.offline(),
    }


def _records(recipe: Recipe, source: str) -> Any:
    from dpmed.data.records import load_records

    data = recipe.data
    columns = {
        "text": data.text,
        "label": data.label,
        "unit": data.unit,
        "record_id": data.record_id,
        "date": data.date,
    }
    return load_records(source, **columns, identifiers=data.identifiers, multi_label=data.multi_label)


def _first_comment(text: str) -> str:
    first = text.lstrip().partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def _only(flags: Sequence[str], allowed: Sequence[str], *, verb: str) -> None:
    """Refuse recipe keys that a verb would ignore."""
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--")
        if flag.startswith("--") and not is_among(name, allowed):
            raise InputError(f"--{name}: '{verb}' does not use this key: remove it, see 'dpmed {verb} --help'")


# --- The table of verbs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verb:
    """A command: its line in the help, what runs, what it takes, how its result is shown."""

    help: str
    run: Callable[[argparse.Namespace], Result]
    add: Callable[[argparse.ArgumentParser], None]
    show: Callable[[Result], None]
    keys: tuple[str, ...] = ()
    """Recipe keys that it takes as flags, as in TRAIN_KEYS."""


def _parser() -> tuple[Parser, dict[str, Parser]]:
    shared = arguments.shared_options()
    parser = Parser(
        prog="dpmed",
        description="Fine-tune medical language models with differential privacy and measure what they memorise.",
        epilog="'dpmed COMMAND --help' says more. Nothing is fetched from the network unless --online is given.",
        parents=[shared],
    )
    parser.add_argument("--version", action=arguments.ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND", title="commands")
    made: dict[str, Parser] = {}
    for name, verb in VERBS.items():
        made[name] = commands.add_parser(name, help=verb.help, description=verb.help, parents=[shared])
        made[name].keys = verb.keys
        verb.add(made[name])
    return parser, made


VERBS: dict[str, Verb] = {
    "demo": Verb(
        help="The whole job on made-up patients, offline, in minutes.",
        run=demo,
        add=arguments.add_demo,
        show=cli_show.frontier,
    ),
    "train": Verb(
        help="One training run of any method.",
        run=train,
        add=arguments.add_train,
        show=cli_show.run,
        keys=TRAIN_KEYS,
    ),
    "sanitize": Verb(
        help="Sanitise a trained checkpoint (SANI), and test whether it may be released.",
        run=sanitize,
        add=arguments.add_sanitize,
        show=cli_show.gate,
        keys=(*TRAIN_KEYS, "release."),
    ),
    "evaluate": Verb(
        help="Utility and memorisation of a model.",
        run=evaluate,
        add=arguments.add_evaluate,
        show=cli_show.run,
        keys=EVALUATE_KEYS,
    ),
    "frontier": Verb(
        help="A grid of runs, their evaluation, the frontier and the report.",
        run=frontier,
        add=arguments.add_frontier,
        show=cli_show.frontier,
        keys=FRONTIER_KEYS,
    ),
    "report": Verb(
        help="Rebuild the report, and the page of a release gate, from run folders.",
        run=report,
        add=arguments.add_report,
        show=cli_show.pairs,
    ),
    "calibrate": Verb(
        help="Noise for a target epsilon, before any training.",
        run=calibrate,
        add=arguments.add_calibrate,
        show=cli_show.plan,
    ),
    "tag": Verb(
        help="Count identifiers by type and source; shows no values.",
        run=tag,
        add=arguments.add_tag,
        show=cli_show.identifiers,
        keys=TAG_KEYS,
    ),
    "plant": Verb(
        help="Plant canary patients in training records, for exposure and the audit.",
        run=plant,
        add=arguments.add_plant,
        show=cli_show.planted,
        keys=TAG_KEYS,
    ),
    "ledger": Verb(
        help="What the units of each data set were charged, over all runs; budgets.",
        run=ledger,
        add=arguments.add_ledger,
        show=cli_show.ledger,
    ),
    "recipe": Verb(help="List, copy or check recipes.", run=recipe, add=arguments.add_recipe_verb, show=cli_show.pairs),
    "env": Verb(help="Versions, device, offline state.", run=env, add=arguments.add_env, show=cli_show.pairs),
}
