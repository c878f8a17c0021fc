"""The house rules that a machine can check: floors, heavy imports, dangerous calls, sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PACKAGE = REPO / "peft_moe"

# A file imports from its own floor or a lower one. A folder stands for its files unless one is named.
FLOORS: dict[int, tuple[str, ...]] = {
    0: (
        "errors",
        "at_hand",
        "offloaded",
        "decision",
        "slots",
        "controls",
        "wide_copy",
        "routing",
        "new_folder",
    ),
    1: ("ops", "routers", "losses", "metrics"),
    2: (
        "experts.spec",
        "config",
        "card",
        "config_checks",
        "field_checks",
        "loss_checks",
        "routing_fields",
        "testing",
        "domains",
        "saved_files",
    ),
    3: (
        "caches",
        "call",
        "limits",
        "controlled",
        "four_bit",
        "base_fingerprint",
        "base_precision",
        "backend_check",
        "empty_weights",
        "taps",
        "depth",
        "probe",
        "decode_state",
        "checkpointing",
        "linear",
        "requantise",
        "mixed_batch",
        "sharing",
        "model_router",
        "deciding",
        "feed_forward",
        "block_mixing",
        "layer",
        "integrity",
        "digests",
        "rollback",
        "experts",
    ),
    4: ("model", "saving", "fitting", "editing"),
    5: ("registration", "hub", "export", "training", "evaluation", "catalogue", "mixfile", "planning"),
    6: ("cli", "commands", "console", "demo", "__init__", "__main__"),
}
MAX_FILE, MAX_FUNCTION = 300, 60
# Packages that only some files may import. Demo and bake-off take trl's SFTConfig, which trainers need; a
# plan traces its loss.
ONLY_IN = {"trl": ("training", "demo.methods", "evaluation.bakeoff.training", "planning.step")}
ONLY_IN["triton"] = tuple(
    f"ops.triton_{name}" for name in ("common", "schedule", "sparse", "stacked", "gather")
)
NOT_ON_IMPORT = ("trl", "sklearn", "datasets", "matplotlib")


def modules() -> dict[str, Path]:
    """``"routers.base"`` -> file; a package's own file goes by the package's name, the top by __init__."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__") if name != "__init__" else name] = path
    return found


MODULES = modules()


def floor_of(module: str) -> int | None:
    """The floor of the longest listed name that the module equals or lies in."""
    named = {name: floor for floor, names in FLOORS.items() for name in names}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in named:
            return named[".".join(parts[:length])]
    return None


def imports(module: str, tree: ast.AST) -> set[str]:
    """Modules that a file imports, also inside of functions; those of this package without its name."""
    is_package = MODULES.get(module, Path("x.py")).name == "__init__.py"
    here = [] if module == "__init__" else module.split(".")
    folder = here if is_package else here[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ["peft_moe", *folder[: len(folder) - node.level + 1]] if node.level else []
            source = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                inner = whole.removeprefix("peft_moe.")
                found.add(whole if source.startswith("peft_moe") and inner in MODULES else source)
    return {name.removeprefix("peft_moe.") if name != "peft_moe" else "__init__" for name in found}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def climbs(module: str, tree: ast.AST) -> list[str]:
    """Imports that lead to a higher floor."""
    top = floor_of(module)
    # A file without a floor fails in its own test.
    inner = [n for n in imports(module, tree) if n in MODULES and floor_of(n) is not None]
    return sorted(f"{module} (F{top}) imports {n} (F{floor_of(n)})" for n in inner if floor_of(n) > top)


@pytest.mark.parametrize("module", MODULES)
def test_every_file_has_a_floor(module):
    assert floor_of(module) is not None, f"give {module} a floor in tests/unit/test_layering.py"


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_its_own_or_lower_floors(module):
    assert climbs(module, parsed(MODULES[module])) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("routing", "from .config import MoLoraConfig"),
        ("routing", "from . import model"),
        ("ops.ranks", "from ..layer import MoLoraLayer"),
        ("ops.ranks", "def f():\n    from peft_moe import training"),
        ("layer", "import peft_moe.cli"),
        ("layer", "import peft_moe"),
        ("experts.spec", "from .plan import plan_experts"),
    ],
)
def test_the_check_sees_a_climb(module, line):
    assert climbs(module, ast.parse(line)) != []


@pytest.mark.parametrize(
    ("module", "line"), [("layer", "from .ops import x"), ("ops.ranks", "from . import reference")]
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
