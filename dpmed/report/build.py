"""`build_report`: frontier and run folders in; one page, one table and the figures out. `build_pages` adds gates'."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpmed.errors import InputError
from dpmed.evidence import EVIDENCE
from dpmed.report import figures, tables
from dpmed.report.certificate import Certificate, statements
from dpmed.report.evidence import evidence_pages
from dpmed.report.page import inline_svg, render
from dpmed.report.points import Point, finite, lookup, non_dominated, points_from_run_folder, read_json
from dpmed.report.settings import Setting, group_settings
from dpmed.report.verdicts import STANDING_LIMITS, Verdict, decide
from dpmed.runs import write_text

_FLAT_KEYS = ("name", "setting", "method", "seed", "epsilon", "epsilon_lower_bound", "delta", "unit", "on_frontier")
_RESULTS = ("frontier.json", "run.json")


def build_pages(folders: Sequence[Path], output_dir: Path) -> dict[str, Any]:
    """`build_report`, and the page on the release gate of each folder that holds an `evidence.json`.

    A folder that holds nothing but the evidence is no part of the report.

    Returns: the path of `report`, if there is one, and those of the `evidence` pages, if there are any.
    Raises: InputError as both; then nothing is written.
    """
    pages = evidence_pages(folders, output_dir)
    kept = [f for f in folders if not (f / EVIDENCE).is_file() or any((f / name).is_file() for name in _RESULTS)]
    made: dict[str, Any] = {"report": build_report(kept, output_dir)} if kept or not pages else {}
    for path, text in pages.items():
        write_text(path, text)
    return made | ({"evidence": list(pages)} if pages else {})


def build_report(folders: Sequence[Path], output_dir: Path) -> Path:
    """Write `report.html`, `frontier.csv` and `figures/*.svg|png` from what the folders hold.

    A folder is a frontier folder (`frontier.json`, with certificates and evaluations under `runs/*`) or one run's
    folder (`run.json`). Optional keys may be missing. The page is one file under 1 MB that loads nothing.

    Args:
        folders: at least one; a folder named twice counts once.
        output_dir: made if need be; an earlier report there is replaced.

    Returns: the path of `report.html`.
    Raises: InputError if a folder is neither, cannot be read, or there is no point at all.
    """
    points, certificates, meta = _load(folders)
    if not points:
        raise InputError(f"{', '.join(str(f) for f in folders) or 'no folder'}: no finished run; train one first")
    settings = group_settings(points)
    verdict = decide(settings)
    if not any(point.get("on_frontier") for point in points):
        flags = non_dominated(points, utility=verdict.utility, leak=verdict.leak)
        points = [{**point, "on_frontier": flag} for point, flag in zip(points, flags, strict=True)]
    output_dir.mkdir(parents=True, exist_ok=True)
    _write_csv(points, output_dir / "frontier.csv")
    drawn = figures.write_figures(figures.all_charts(settings, verdict), output_dir / "figures")
    target = output_dir / "report.html"
    target.write_text(_page(settings, verdict, certificates, meta, drawn), encoding="utf-8")
    return target


def _load(folders: Sequence[Path]) -> tuple[list[Point], list[Certificate], dict[str, Any]]:
    """Points, certificates and meta of all folders; names that occur in two folders get the folder's name."""
    points: list[Point] = []
    certificates: list[Certificate] = []
    meta: dict[str, Any] = {}
    distinct = list({folder.resolve(): folder for folder in folders}.values())
    for folder in distinct:
        found, contents, its_meta = _load_one(folder)
        taken = {point.get("name") for point in points}
        if taken & {point.get("name") for point in found}:
            suffix = f" ({folder.name})"
            found = [{**p, "name": f"{p.get('name')}{suffix}", "setting": f"{p.get('setting')}{suffix}"} for p in found]
            contents = {f"{name}{suffix}": content for name, content in contents.items()}
        bounds = {p.get("name"): finite(p.get("epsilon_lower_bound")) for p in found}
        certificates += [Certificate(name, content, bounds.get(name)) for name, content in contents.items()]
        points += found
        meta = _merge_meta(meta, its_meta)
    return points, certificates, meta


def _load_one(folder: Path) -> tuple[list[Point], dict[str, dict[str, Any]], dict[str, Any]]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a frontier folder or a run folder")
    if not (folder / "frontier.json").is_file():
        point = points_from_run_folder(folder)
        certificate = {point["name"]: read_json(folder / "privacy.json")} if (folder / "privacy.json").is_file() else {}
        return [point], certificate, {"versions": read_json(folder / "run.json").get("versions") or {}}
    content = read_json(folder / "frontier.json")
    listed = content.get("points")
    if not isinstance(listed, list) or not all(isinstance(point, dict) for point in listed):
        raise InputError(f"{folder / 'frontier.json'}: has no list of points; run `dpmed frontier` again with --resume")
    runs = {run.name: run for run in sorted((folder / "runs").glob("*")) if run.is_dir()}
    points = [_completed(point, runs.get(str(point.get("name")))) for point in listed]
    certificates = {
        name: read_json(run / "privacy.json") for name, run in runs.items() if (run / "privacy.json").is_file()
    }
    meta = content.get("meta") or {}
    return points + _base_point(points, meta), certificates, meta


def _completed(point: Point, run: Path | None) -> Point:
    """The point, with what only its run's evaluation holds (curves, reasons) filled in."""
    if run is None or not (run / "evaluation.json").is_file():
        return point
    evaluation = read_json(run / "evaluation.json")
    sections = ("utility", "memorization", "reference", "not_applicable")
    return {**point, **{key: {**(evaluation.get(key) or {}), **(point.get(key) or {})} for key in sections}}


def _base_point(points: Sequence[Point], meta: dict[str, Any]) -> list[Point]:
    """A point of the base model from the meta data, if the points have none."""
    base = meta.get("base_model")
    if not isinstance(base, dict) or any(point.get("method") == "base" for point in points):
        return []
    return [{**base, "name": "base", "setting": "base", "method": "base", "epsilon": None, "cost": {}}]


def _merge_meta(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The first folder's facts, with the lists and versions of both."""
    merged = {**second, **first}
    for key in ("failed", "cannot_show"):
        both = [*(first.get(key) or []), *(second.get(key) or [])]
        merged[key] = [item for index, item in enumerate(both) if item not in both[:index]]
    merged["versions"] = {**(second.get("versions") or {}), **(first.get("versions") or {})}
    return merged


def _write_csv(points: Sequence[Point], path: Path) -> None:
    """One row a point; every measured figure as `key`, `key.low`, `key.high` and `key.n`."""
    rows = []
    for point in points:
        row = {key: point.get(key) for key in _FLAT_KEYS}
        row["seconds"] = lookup(point, "cost.seconds")
        row["peak_memory_bytes"] = lookup(point, "cost.peak_memory_bytes")
        for section in ("utility", "memorization", "reference"):
            row.update(_flat(point.get(section), section))
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _flat(tree: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: None} if tree is None else {}
    if "value" in tree:
        return {prefix: tree["value"], **{f"{prefix}.{key}": tree.get(key) for key in ("low", "high", "n")}}
    flat: dict[str, Any] = {}
    for key, branch in tree.items():
        if key != "roc":
            flat.update(_flat(branch, f"{prefix}.{key}"))
    return flat


def _page(
    settings: Sequence[Setting],
    verdict: Verdict,
    certificates: Sequence[Certificate],
    meta: dict[str, Any],
    drawn: dict[str, str],
) -> str:
    captions = figures.captions(settings, verdict)
    notes = tables.Notes()
    certified = {certificate.name for certificate in certificates}
    uncertified = [
        str(point.get("name"))
        for setting in settings
        for point in setting.points
        if finite(point.get("epsilon")) is not None and point.get("name") not in certified
    ]
    return render(
        "report.html.j2",
        meta=meta,
        facts=tables.facts(meta),
        verdict=verdict,
        limits=[*(str(limit) for limit in meta.get("cannot_show") or []), *STANDING_LIMITS],
        warnings=[warning for certificate in certificates for warning in certificate.warnings],
        tables=tables.setting_tables(settings, verdict, notes),
        notes=notes.texts,
        never_measured=tables.never_measured(settings),
        figures=[{**captions[name], "svg": inline_svg(svg, name)} for name, svg in drawn.items()],
        missing_figures=[captions[name]["title"] for name in captions if name not in drawn],
        certificates=tables.certificate_table(certificates),
        uncertified=uncertified,
        common={key: statements(certificates, key) for key in tables.COMMON_STATEMENTS},
        common_names=tables.COMMON_STATEMENTS,
        reasons=tables.reasons(settings),
        failed=[item if isinstance(item, dict) else {"name": str(item)} for item in meta.get("failed") or []],
        versions=sorted((str(k), str(v)) for k, v in (meta.get("versions") or {}).items()),
        glossary=tables.GLOSSARY,
    )
