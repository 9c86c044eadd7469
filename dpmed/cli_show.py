"""Results for a reader at the terminal: a few lines and tables on stdout. Figures and names only, no record text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpmed.evidence import EVIDENCE_PAGE

Result = dict[str, Any]


def pairs(result: Result) -> None:
    """Names and values, nested ones indented."""
    _pairs(result, indent="")


def _pairs(values: Mapping[str, Any], indent: str) -> None:
    width = max((len(str(name)) for name in values), default=0)
    for name, value in values.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}:")
            _pairs(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{name:{width}}  {', '.join(map(str, value))}")
        else:
            print(f"{indent}{name:{width}}  {value}".rstrip())


def run(result: Result) -> None:
    """A run or an evaluation: where it is, what it cost in privacy, what was measured."""
    from dpmed.runs import read_json

    folder = Path(result["output_dir"])
    print(f"run folder: {folder}")
    if (folder / "privacy.json").is_file():
        spent = read_json(folder / "privacy.json")
        if spent.get("private") is False:
            print(f"privacy: none; {spent.get('why')}")
        else:
            print(f"privacy: epsilon {_number(spent.get('epsilon'))} at delta {_number(spent.get('delta'))} per unit")
        if (everything := (spent.get("ledger") or {}).get("epsilon_of_all_runs")) is not None:
            print(f"all runs on these units: epsilon {_number(everything)}; see 'dpmed ledger show'")
        if spent.get("n_steps_lost"):
            print(f"{spent['n_steps_lost']} of its {spent['n_steps']} charged steps were lost when the run was stopped")
    file = folder / "evaluation.json"
    evaluation = read_json(file) if file.is_file() else {}
    _table(("measured", "value", "95 % interval", "better", "base model", "held-out"), list(_figure_rows(evaluation)))
    for name, reason in (evaluation.get("not_applicable") or {}).items():
        if not name.startswith("reference."):
            print(f"{name}: {reason}")


def _figure_rows(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Each figure with its interval, which way is better, and the same of the base model and of held-out records."""
    reference = evaluation.get("reference") or {}
    base, heldout = reference.get("base_model") or {}, dict(_figures(reference.get("heldout") or {}))
    for part in ("utility", "memorization"):
        before = dict(_figures(base.get(part) or {}))
        others = heldout if part == "memorization" else {}
        for name, figure in _figures(evaluation.get(part) or {}):
            yield (
                f"{part}.{name}",
                _number(figure["value"]),
                f"{_number(figure.get('low'))} to {_number(figure.get('high'))}",
                {"better": "\u2191", "worse": "\u2193"}.get(str(figure.get("higher_is")), ""),
                *(_number(floor[name]["value"]) if name in floor else "" for floor in (before, others)),
            )


def _figures(tree: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All figures of a tree, with their dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and "value" in value:
            yield f"{at}{name}", value
        elif isinstance(value, Mapping):
            yield from _figures(value, f"{at}{name}.")


def frontier(result: Result) -> None:
    """The points of a frontier, the runs that failed, and the report."""
    rows = []
    for point in result.get("points") or []:
        useful, leaks = point.get("utility") or {}, point.get("memorization") or {}
        rows.append(
            (
                str(point.get("name")),
                "none" if point.get("epsilon") is None else _number(point["epsilon"]),
                _value(useful, "f1_micro"),
                _value(useful, "perplexity"),
                _value(leaks, "extraction_rate"),
                _value(leaks, "membership_auc"),
                "yes" if point.get("on_frontier") else "",
            )
        )
    _table(("run", "epsilon", "F1 micro", "perplexity", "extraction", "membership AUC", "on frontier"), rows)
    for failed in (result.get("meta") or {}).get("failed") or []:
        print(f"failed: {failed.get('name')}: {failed.get('reason')}")
    page = Path(result["output_dir"]) / "report.html"
    if page.is_file():
        print(f"report: {page}")


def plan(result: Result) -> None:
    """The noise for a target epsilon, and epsilon at other deltas."""
    print(f"noise multiplier: {_number(result['noise_multiplier'])}")
    print(f"sampling rate: {_number(result['sampling_rate'])}, steps: {result['n_steps']}")
    print(f"epsilon: {_number(result['epsilon'])} at delta {_number(result['delta'])}")
    rows = [(_number(point["delta"]), _number(point["epsilon"])) for point in result["epsilon_curve"]]
    _table(("delta", "epsilon (PLD)"), rows)
    _attack_bounds(result["attack_bounds"])


def _attack_bounds(bounds: Mapping[str, Any]) -> None:
    """What (epsilon, delta) means for whoever asks if a patient was in the data, at best."""
    print(f"no membership attack has an advantage (TPR - FPR) above {_number(bounds['advantage'])}")
    for fpr, tpr in bounds["tpr_at_fpr"].items():
        print(f"nor a true-positive rate above {_number(tpr)} at a false-positive rate of {fpr}")
    print(f"Gaussian DP: mu {_number(bounds['gdp_mu'])}")


def identifiers(result: Result) -> None:
    """Identifiers by source, type and number of patients; what the patterns are worth; where the records are."""
    touched = result["touched"].get("any", {"n_records": 0, "n_units": 0})
    print(f"{result['n_records']} records of {result['n_units']} units, k = {result['k']}")
    if result["unit"] is None:
        print("no patient column is named (--data.unit), so each record counts as its own patient")
    print(f"with an identifier: {touched['n_records']} records, {touched['n_units']} units")
    rows = []
    for source, kinds in result["by_patients"].items():
        for kind, strata in kinds.items():
            about = result["types"][kind]
            direct = f"direct ({about['safe_harbor'] or '?'})" if about["direct"] else "quasi"
            cells = [str(stratum["values"]) for stratum in strata.values()]
            rows.append((source, kind, direct, str(result["identifiers"][source][kind]), *cells))
    _table(("source", "type", "Safe Harbor", "spans", *(f"values, {name} patients" for name in _strata(result))), rows)
    if table := result.get("table"):
        print(
            f"patient table: {table['n_values_found']} of {table['n_values']} values found in their patient's records"
        )
        if table["ignored"]:
            print(f"columns without a type of identifier: {', '.join(table['ignored'])}")
    for source, counts in result["overlaps"].items():
        shares = [f"{n} also {other}" for other, n in counts.items() if other != "n_spans"]
        if shares:
            print(f"of {counts['n_spans']} {source} spans: {', '.join(shares)}")
    _pattern_check(result["check"], result["asq_phi"])
    unit = "--data.unit unit " if result["unit"] else ""
    print(f"tagged records: {Path(result['output_dir']) / 'records.parquet'} ({unit}--data.identifiers identifiers)")


def gate(result: Result) -> None:
    """The gate's verdicts, each with its figure and its threshold, and what was not tested."""
    print(f"verdict: {result['verdict']}")
    rows = [
        (
            row["stage"],
            row["check"],
            row["verdict"],
            _number(row["value"]),
            f"{_number(row['low'])} to {_number(row['high'])}",
            f"at most {_number(row['threshold'])}",
        )
        for row in result["tested"]
    ]
    _table(("after", "measured", "verdict", "value", "95 % interval", "threshold"), rows)
    for row in result["not_tested"]:
        print(f"not tested: {row['stage']}, {row['check']}: {row['reason']}")
    print(f"page: {Path(result['output_dir']) / EVIDENCE_PAGE}")


def planted(result: Result) -> None:
    """How many canaries were planted, what they can show, and how the records are read."""
    print(f"{result['n_records']} records of {result['n_units']} patients; {result['n_canaries']} canaries")
    print(f"notes of canaries whose coin said in: {result['n_canary_records']}")
    print(
        f"an audit can show an epsilon of at most {_number(result['audit_ceiling'])} (delta {_number(result['delta'])})"
    )
    print("more canaries, or a smaller privacy.delta, can show more")
    if result["seed"] is not None:
        print("the seed tells the coins: an audit with it is repeatable, and no secret to whoever knows it")
    columns = "--data.text text --data.unit unit --data.record_id record_id --data.identifiers identifiers"
    print(f"train on {result['records']} ({columns})")
    print(f"evaluate with --canaries {result['manifest']}; it is as private as the records")


def _strata(result: Result) -> list[str]:
    kinds = next(iter(result["by_patients"].values()), {})
    return list(next(iter(kinds.values()), {}))


def _pattern_check(check: Mapping[str, Any] | None, asq_phi: Mapping[str, Any] | None) -> None:
    """What the patterns are worth on labelled records of the user's, and what was measured on ASQ-PHI."""
    if check is not None:
        print(f"patterns on {check['n_records']} labelled records:")
        _recall_table(check)
    else:
        print("recall of the patterns was not measured on this data (--check)")
    if asq_phi is not None:
        print(
            f"patterns on ASQ-PHI: {asq_phi['n_records']} made-up queries, not your notes; expect less on real notes "
            "(docs/identifiers.md)"
        )
        _recall_table(asq_phi)


def _recall_table(figures: Mapping[str, Any]) -> None:
    rows = [
        (
            measure,
            kind,
            str(figure["n"]),
            _number(figure["value"]),
            f"{_number(figure['low'])} to {_number(figure['high'])}",
        )
        for measure in ("recall", "precision")
        for kind, figure in figures[measure].items()
        if figure is not None
    ]
    _table(("higher is better", "type", "spans", "value", "95 % interval"), rows)


def ledger(result: Result) -> None:
    """The ledger's data sets and runs, whether it is whole, or the budget that was set."""
    print(f"ledger: {result['ledger']}")
    if "whole" in result:
        print(f"whole: {result['n_entries']} entries")
        print(f"head: {result['head']}")
        for dataset in result["unprotected"]:
            print(
                f"data set {dataset}: no guarantee any more, a run without noise or with a known noise seed was charged"
            )
    elif "budget" in result:
        print(f"data set {result['dataset']}: budget {_budget(result['budget'])}")
    else:
        _datasets(result["datasets"])


def _datasets(datasets: Sequence[Mapping[str, Any]]) -> None:
    if not datasets:
        print("no data set was charged yet")
    rows = [
        (
            dataset["id"],
            dataset["unit"] or "",
            str(dataset["n_units"]),
            str(len(dataset["runs"])),
            _spent(dataset),
            _number(dataset["delta"]),
            _budget(dataset["budget"]),
            ", ".join(f"{other['dataset']}: {other['n_shared_units']} units" for other in dataset["overlaps"]),
        )
        for dataset in datasets
    ]
    _table(("data set", "unit", "units", "runs", "epsilon", "delta", "budget", "overlaps"), rows)
    rows = [
        (
            run["run_id"],
            dataset["id"],
            f"{run['n_steps']} of {run['n_planned_steps']}",
            _number(run["noise_multiplier"]),
            _number(run["sampling_rate"]),
            _spent(run),
            _number(run["delta"]),
        )
        for dataset in datasets
        for run in dataset["runs"]
    ]
    _table(("run", "data set", "steps", "noise multiplier", "sampling rate", "epsilon", "delta"), rows)
    for dataset in datasets:
        if "why" in dataset:
            print(f"data set {dataset['id']}: {dataset['why']}")


def _spent(values: Mapping[str, Any]) -> str:
    return "no bound" if values["epsilon"] is None else _number(values["epsilon"])


def _budget(budget: Mapping[str, Any] | None) -> str:
    return "" if budget is None else f"epsilon {_number(budget['epsilon'])} at delta {_number(budget['delta'])}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for name in header:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # Text: a name with brackets is not markup
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=200)  # a file has no edge to cut at
    console.print(table)


def _value(figures: Mapping[str, Any], name: str) -> str:
    figure = figures.get(name)
    return _number(figure["value"]) if isinstance(figure, Mapping) else ""


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
