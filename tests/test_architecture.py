"""The shape of the package: who imports whom, no dangerous calls, a light import, files of readable length."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 450
MAX_README_LINES = 150

# Left may not import right, at the top of a file or inside a function.
FORBIDDEN = {
    "errors": {"cli", "data", "frontier", "launch", "memorization", "models", "privacy", "recipe", "release", "report"}
    | {"runs", "trainers", "utility"},
    "privacy": {"trainers", "memorization", "report", "frontier", "release", "cli", "launch"},
    "data": {"trainers", "memorization", "report", "frontier", "release", "cli", "launch", "privacy"},
    "memorization": {"trainers", "report", "frontier", "release", "cli", "launch"},
    "utility": {"trainers", "report", "frontier", "release", "cli", "launch"},
    "trainers": {"memorization", "report", "frontier", "release", "cli", "launch"},
    "report": {"trainers", "memorization", "privacy", "data", "frontier", "release", "cli", "launch", "torch"},
    "frontier": {"cli"},
    "release": {"cli", "frontier", "report"},
    "launch": {"cli", "report"},
}

UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_CALLS = {"yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "eval", "exec", "os.system"}
# The pattern does not match its own source: no name follows the slash there.
MACHINE_PATH = re.compile(r"(?<![\w.~})-])/(?:work|root|tmp|home|opt)/\w")
DISTRIBUTIONS = {
    "ahocorasick": "pyahocorasick",
    "dp_accounting": "dp-accounting",
    "huggingface_hub": "huggingface-hub",
    "sklearn": "scikit-learn",
    "triton": "torch",  # its CUDA builds bring it
    "vl_convert": "vl-convert-python",
    "yaml": "pyyaml",
}


def python_files(*folders: str) -> list[Path]:
    """Return the Python files under folders of the repository, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield line and full dotted name of all that `module` imports, at any depth; relative names are resolved.

    `from a import b` gives "a.b", because b may be a module.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def arrow_violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return one line per import in `source` that goes against the arrows; [] if none does."""
    part = module.split(".")[1] if "." in module else ""
    forbidden = FORBIDDEN.get(part, {"cli"} if part not in ("", "cli", "__main__") else set())
    found: list[str] = []
    for line, name in imported_modules(ast.parse(source), module, is_package=is_package):
        top, *rest = name.split(".")
        target = rest[0] if top == "dpmed" and rest else top
        if top == "dpmed" and rest and rest[0][0].isupper():
            found.append(f"{module}:{line} imports {name} from the root: name its module")
        if target in forbidden and (top == "dpmed" or target == top == "torch"):
            found.append(f"{module}:{line} imports {name}: {part} may not import {target}")
    return found


def loaded_with(source: str, module: str, modules: set[str], *, is_package: bool) -> set[str]:
    """Return which of `modules` load when `module` is imported: its imports outside functions and type checking."""
    tree = ast.parse(source)
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"))
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    }
    lines = {node.lineno for node in skipped}
    names = {n for line, n in imported_modules(tree, module, is_package=is_package) if line not in lines}
    return {name if name in modules else name.rpartition(".")[0] for name in names} & modules - {module}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return one circle of the import graph, its first module last again; [] if there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if found := walk(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def dotted(node: ast.expr) -> str:
    """Return "a.b.c" of a name or attribute chain, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{inner}.{node.attr}" if (inner := dotted(node.value)) else ""
    return ""


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def dangerous_calls(source: str) -> list[str]:
    """Return one entry per call or import that could run code out of a data file; [] if there is none."""
    found: list[str] = []
    tree = ast.parse(source)
    for line, name in imported_modules(tree, "module", is_package=False):
        if name.split(".")[0] in UNSAFE_MODULES:
            found.append(f"{line}: import {name}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {word.arg: word.value for word in node.keywords}
        if name in UNSAFE_CALLS:
            found.append(f"{node.lineno}: {name}()")
        if name == "torch.load" and not is_true(keywords.get("weights_only")):
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        for flag in ("trust_remote_code", "allow_pickle", "shell"):
            if flag in keywords and not (isinstance(keywords[flag], ast.Constant) and not is_true(keywords[flag])):
                found.append(f"{node.lineno}: {flag} is not False")
    return found


def published_files() -> list[Path]:
    """Return what git tracks or would add; without git, all files outside ignored folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode == 0 and listed.stdout:
        names = {ROOT / name for name in listed.stdout.decode().split("\0") if name}
        return sorted(path for path in names if path.is_file())
    ignored = {".git", ".venv", "runs", "data", "build", "dist", "__pycache__"}
    return sorted(p for p in ROOT.rglob("*") if p.is_file() and not ignored & set(p.relative_to(ROOT).parts[:-1]))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_imports_follow_the_arrows() -> None:
    files = python_files("dpmed")
    found = [
        line
        for path in files
        for line in arrow_violations(path.read_text("utf-8"), module_name(path), is_package=path.stem == "__init__")
    ]
    assert len(files) > 1
    assert found == []


def test_no_module_imports_itself_in_a_circle() -> None:
    files = {module_name(path): path for path in python_files("dpmed")}
    graph = {
        module: loaded_with(path.read_text("utf-8"), module, set(files), is_package=path.stem == "__init__")
        for module, path in files.items()
    }
    assert any(graph.values())
    assert circle(graph) == []


def test_circle_check_sees_a_planted_circle() -> None:
    sources = {"p.a": "from .b import x", "p.b": "import p.c", "p.c": "from p import a"}
    graph = {m: loaded_with(text, m, set(sources), is_package=False) for m, text in sources.items()}
    assert circle(graph) == ["p.a", "p.b", "p.c", "p.a"]
    lazy = sources | {"p.c": "def f():\n    from p import a"}
    assert circle({m: loaded_with(text, m, set(lazy), is_package=False) for m, text in lazy.items()}) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dpmed.privacy.plan", "from dpmed.trainers import base"),
        ("dpmed.privacy.plan", "def f():\n    import dpmed.memorization.scoring"),
        ("dpmed.privacy.plan", "from ..trainers.base import X"),
        ("dpmed.data.records", "from .. import privacy"),
        ("dpmed.report.build", "import torch.nn as nn"),
        ("dpmed.report.build", "from torch import Tensor"),
        ("dpmed.trainers.full", "from dpmed import MemorizationEvaluator"),
        ("dpmed.runs", "from dpmed.cli import main"),
        ("dpmed.errors", "from dpmed.recipe import Recipe"),
    ],
)
def test_arrow_check_sees_a_planted_violation(module: str, source: str) -> None:
    assert len(arrow_violations(source, module)) == 1


def test_arrow_check_lets_allowed_imports_pass() -> None:
    source = (
        "from ..data import records\nfrom .plan import PrivacyPlan\nimport torch\nfrom dpmed.errors import InputError"
    )
    assert arrow_violations(source, "dpmed.trainers.dp_lora") == []
    assert arrow_violations("from .build import build_report", "dpmed.report", is_package=True) == []


def test_no_dangerous_calls() -> None:
    found = {relative(p): calls for p in python_files("dpmed", "recipes", "benchmarks") if (calls := scan(p))}
    assert found == {}


def scan(path: Path) -> list[str]:
    return dangerous_calls(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "import pickle",
        "from dill import loads",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=flag)",
        "np.load('x', allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
        "eval('1')",
    ],
)
def test_danger_check_sees_a_planted_call(source: str) -> None:
    assert len(dangerous_calls(source)) == 1


def test_danger_check_lets_safe_calls_pass() -> None:
    source = "torch.load('x', weights_only=True)\nyaml.safe_load(t)\nmodel.eval()\nf(trust_remote_code=False)"
    assert dangerous_calls(source) == []


@pytest.mark.parametrize("module", ["dpmed", "dpmed.errors", "dpmed.report"])
def test_import_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_files_are_short() -> None:
    lines = {relative(p): len(p.read_text("utf-8").splitlines()) for p in python_files("dpmed", "recipes", "tests")}
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}


def test_readme_is_short() -> None:
    readme = ROOT / "README.md"
    assert not readme.exists() or len(readme.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_no_published_file_names_a_machine_path() -> None:
    found = []
    for path in published_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{relative(path)}:{text.count(chr(10), 0, hit.start()) + 1}" for hit in MACHINE_PATH.finditer(text)]
    assert found == []


@pytest.mark.parametrize(("text", "hit"), [("cd {}x", True), ("https://a.org{}x", False), ('"{}x"', True)])
def test_path_check_tells_paths_from_addresses(text: str, hit: bool) -> None:
    assert bool(MACHINE_PATH.search(text.format("/" + "tmp" + "/"))) is hit


def test_every_package_is_shipped() -> None:
    folders = {module_name(p.parent / "__init__.py") for p in python_files("dpmed")}
    folders |= {f"dpmed.{module_name(p.parent / '__init__.py')}" for p in python_files("recipes")}
    assert folders == set(project()["tool"]["setuptools"]["packages"])


def test_ranges_admit_the_tested_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    tested = {canonicalize_name(name): version for name, version in pins.items()}
    wanted = project()["project"]["dependencies"] + project()["project"]["optional-dependencies"]["test"]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), requirement.name


def test_every_import_is_a_declared_dependency() -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in project()["project"]["dependencies"]}
    found: dict[str, str] = {}
    for path in python_files("dpmed", "recipes"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in imported_modules(tree, module_name(path), is_package=path.stem == "__init__"):
            top = name.split(".")[0]
            known = top in sys.stdlib_module_names or top in ("dpmed", "recipes")
            if not known and canonicalize_name(DISTRIBUTIONS.get(top, top)) not in declared:
                found[top] = f"{relative(path)}:{line}"
    assert found == {}
