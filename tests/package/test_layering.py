"""The house rules that a machine can check: order of folders, heavy imports, dangerous calls, sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PACKAGE = REPO / "peft_moe"

# The architecture. A file imports from its own folder and from those above it in this list, never from one
# below. Imports inside functions and those for type checkers count as well.
ORDER = (
    "errors",
    "io",
    "ops",
    "routing",
    "routers",
    "experts",
    "tuner",
    "testing",
    "fitting",
    "editing",
    "training",
    "planning",
    "export",
    "mixfile",
    "evaluation",
    "cli",
    "__init__",
)
MAX_FILE, MAX_FUNCTION = 400, 60
MAX_FOLDERS, MAX_TOP_FILES = 16, 3
# Packages that only some files may import. Demo and bake-off take trl's SFTConfig, which trainers need; a
# plan traces its loss.
ONLY_IN = {
    "trl": ("training", "cli.demo.methods", "evaluation.bakeoff.training", "planning.traced_step"),
    "triton": tuple(f"ops.triton.{name}" for name in ("common", "schedule", "sparse", "stacked", "gather")),
}
NOT_ON_IMPORT = ("trl", "sklearn", "datasets", "matplotlib")


def modules() -> dict[str, Path]:
    """``"routers.base"`` -> file; a package's own file goes by the package's name, the top by __init__."""
    by_name = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        by_name[name.removesuffix(".__init__") if name != "__init__" else name] = path
    return by_name


MODULES = modules()


def place_of(module: str) -> int:
    """The place of a module's folder in the order of the folders."""
    return ORDER.index(module.split(".", maxsplit=1)[0])


def imports(module: str, tree: ast.AST) -> set[str]:
    """Modules that a file imports, also inside of functions; those of this package without its name."""
    is_package = MODULES.get(module, Path("x.py")).name == "__init__.py"
    here = [] if module == "__init__" else module.split(".")
    folder = here if is_package else here[:-1]
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ["peft_moe", *folder[: len(folder) - node.level + 1]] if node.level else []
            source = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                inner = whole.removeprefix("peft_moe.")
                imported.add(whole if source.startswith("peft_moe") and inner in MODULES else source)
    return {name.removeprefix("peft_moe.") if name != "peft_moe" else "__init__" for name in imported}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def climbs(module: str, tree: ast.AST) -> list[str]:
    """Imports that lead to a folder further down the list."""
    inner = [name for name in imports(module, tree) if name in MODULES]
    return sorted(f"{module} imports {name}" for name in inner if place_of(name) > place_of(module))


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        rest = [start]
        while rest:
            for name in graph.get(rest.pop(), set()) - seen:
                seen.add(name)
                rest.append(name)
        return seen

    reach = {module: reached(module) for module in graph}
    groups = {tuple(sorted(n for n in reach[m] if m in reach.get(n, set()))) for m in graph if m in reach[m]}
    return sorted(list(group) for group in groups)


def import_graph() -> dict[str, set[str]]:
    return {
        module: {name for name in imports(module, parsed(path)) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }


def test_the_top_is_small():
    tops = [path for path in PACKAGE.iterdir() if not path.name.startswith("__pycache__")]
    assert len([path for path in tops if path.is_dir()]) <= MAX_FOLDERS
    assert len([path for path in tops if path.suffix == ".py"]) <= MAX_TOP_FILES


def test_the_order_names_what_there_is():
    assert sorted(ORDER) == sorted({module.split(".")[0] for module in MODULES})


@pytest.mark.parametrize("module", MODULES)
def test_no_import_runs_down_the_list(module):
    assert climbs(module, parsed(MODULES[module])) == []


def test_no_circle():
    assert circles(import_graph()) == []


def test_the_check_sees_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("routing.context", "from ..tuner.config.mixture import MoLoraConfig"),
        ("routing.context", "from .. import tuner"),
        ("ops.rank_map", "from ..tuner.layers.linear import MoLoraLayer"),
        ("ops.rank_map", "def f():\n    from peft_moe import training"),
        ("ops.rank_map", "if TYPE_CHECKING:\n    from ..routing.decision import Routing"),
        ("tuner.layers.linear", "import peft_moe.cli"),
        ("tuner.layers.linear", "import peft_moe"),
        ("experts.spec", "from ..tuner.layers.expert_factors import plan_experts"),
    ],
)
def test_the_check_sees_a_climb(module, line):
    assert climbs(module, ast.parse(line)) != []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("tuner.layers.linear", "from ...ops import x"),
        ("ops.rank_map", "from .backends import reference"),
        ("cli.main", "from ..tuner import model"),
    ],
)
def test_the_check_allows_what_is_allowed(module, line):
    assert climbs(module, ast.parse(line)) == []


@pytest.mark.parametrize("package", ONLY_IN)
def test_only_these_import(package):
    users = {m for m, path in MODULES.items() for n in imports(m, parsed(path)) if n.split(".")[0] == package}
    assert [m for m in sorted(users) if not {m, m.split(".")[0]} & set(ONLY_IN[package])] == []


def test_importing_the_package_is_light():
    # What PEFT brings (scikit-learn, through older versions of transformers) is there before us.
    script = (
        "import sys, peft; theirs = set(sys.modules); import peft_moe; "
        "print([m for m in sys.argv[1:] if m in set(sys.modules) - theirs])"
    )
    command = [sys.executable, "-c", script, *NOT_ON_IMPORT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO, timeout=120)
    assert done.stdout.strip() == "[]"


def dangers(tree: ast.AST) -> list[str]:
    """Calls that run code from data, and imports that serve nothing else."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                n for n in names if n.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib")
            ]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in (
                "eval",
                "exec",
                "torch.load",
                "yaml.load",
                "yaml.unsafe_load",
                "__import__",
                "pickle.load",
            ):
                found.append(called)
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False":
                    found.append("trust_remote_code")
    return found


SCANNED = sorted(p for folder in ("peft_moe", "recipes", "benchmarks") for p in (REPO / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SCANNED, ids=lambda p: str(p.relative_to(REPO)))
def test_no_code_from_data(path):
    assert dangers(parsed(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(p)",
        "eval(s)",
        "yaml.load(s)",
        "f(trust_remote_code=True)",
    ],
)
def test_the_scan_sees_it(line):
    assert dangers(ast.parse(line)) != []


def test_the_scan_knows_what_is_harmless():
    assert dangers(ast.parse("model.eval()\nyaml.safe_load(s)\nf(trust_remote_code=False)")) == []


@pytest.mark.parametrize("module", MODULES)
def test_sizes(module):
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= MAX_FILE
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in long.items() if lines > MAX_FUNCTION} == {}
