"""The order of the layers, read from the source: who may import whom, who may build a Trainer, and no pickle anywhere."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dynfed_lightning"
NAME = "dynfed_lightning"
CORE = {"torch", "lightning", "torchmetrics", "numpy", "safetensors", NAME}

# From the bottom up. A module may reach its own layer and those before it, directly or through others; a module that is
# not named here belongs to no layer but is followed through.
LAYERS = [
    {"errors", "tensors", "seeds", "schedules", "quiet", "resources", "partition"},
    {"ops"},
    {"stages", "bits", "losses", "schema"},
    {"codec", "wire"},
    {
        "callbacks",
        "centers",
        "quantization_aware",
        "mutual",
        "local",
        "comm_hooks",
        "data",
        "models",
        "encoder",
        "module",
    },
    {"algorithm"},
    {"algorithms", "teachers", "distill", "teaching"},
    {"client", "transport", "federation", "flower"},
    {"cli", "compare", "config", "report", "plots"},
]


def sources() -> dict[str, Path]:
    """Dotted name inside the package ("" is its __init__) -> file; the kernels are ``kernels.*``."""
    found = {}
    for folder, prefix in ((PACKAGE, ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            dotted = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
            found[dotted.removesuffix("__init__").removesuffix(".")] = path
    return found


SOURCES = sources()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def walk(node: ast.AST, into_functions: bool = True) -> Iterator[ast.AST]:
    """All nodes but those that run for type checkers alone; optionally only what runs at import."""
    for child in ast.iter_child_nodes(node):
        if only_for_types(child):
            continue
        if not into_functions and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from walk(child, into_functions)


def imports(name: str, into_functions: bool = True) -> set[str]:
    """Full dotted names of everything that module `name` imports (names taken from modules included)."""
    package = SOURCES[name].parent
    found: set[str] = set()
    for node in walk(TREES[name], into_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = (
                    [NAME, *package.relative_to(PACKAGE).parts]
                    if package.is_relative_to(PACKAGE)
                    else [NAME, "kernels"]
                )
                base = ".".join([*here[: len(here) - node.level + 1], *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.add(first.value)
    return found


def internal(name: str, into_functions: bool = True) -> set[str]:
    """The package's own modules that `name` imports."""
    inside = {i.removeprefix(f"{NAME}.") for i in imports(name, into_functions) if i.startswith(f"{NAME}.")}
    return {i for i in inside if i in SOURCES} - {name}


def reached(name: str) -> set[str]:
    """The package's own modules that `name` needs in the end."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        for other in internal(todo.pop(), into_functions=False) - seen:
            seen.add(other)
            todo.append(other)
    return seen


def layer(name: str) -> int | None:
    head = name.partition(".")[0]
    return next((i for i, members in enumerate(LAYERS) if head in members), None)


def test_the_reader_sees_imports() -> None:
    """The other tests say nothing if this one is wrong."""
    assert "torch" in imports("tensors")
    assert "errors" in internal("local")
    assert "codec" not in internal("errors")
    assert "matplotlib.figure" in imports("plots")
    assert "matplotlib.figure" not in imports("plots", into_functions=False)


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if layer(n) is not None))
def test_layers_import_only_what_stands_above(name: str) -> None:
    own = layer(name)
    assert own is not None
    too_high = {other for other in reached(name) if (layer(other) or 0) > own}
    assert not too_high, f"{name} (layer {own}) reaches {sorted(too_high)}"


def test_no_import_goes_round_in_a_circle() -> None:
    circles = sorted(name for name in SOURCES if name and name in reached(name))
    assert not circles


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_one_door_to_the_kernels(name: str) -> None:
    leaf = name.rpartition(".")[2]
    if name.startswith("kernels") or leaf == "ops" or leaf.startswith(("_ops", "_reference")):
        return
    wanted = {i for i in imports(name) if i.startswith((f"{NAME}.kernels", f"{NAME}._C", "kernels", "triton"))}
    assert not wanted, f"{name} goes past ops.py: {sorted(wanted)}"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_only_flower_imports_flwr(name: str) -> None:
    if name != "flower":
        assert not {i for i in imports(name) if i.partition(".")[0] == "flwr"}


def test_who_builds_trainers() -> None:
    """Nested Trainers are the business of a few; the command builds the outer one, as a user's script would."""
    builders = set()
    for name, tree in TREES.items():
        for node in walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("Trainer", "quiet_trainer"):
                builders.add(name)
    assert builders <= {"federation", "local", "distill", "quiet", "cli"}
    assert {"local", "quiet"} <= builders


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if n.startswith("algorithms.")))
def test_a_method_imports_no_other_method_but_fedavg(name: str) -> None:
    siblings = {i for i in internal(name) if i.startswith("algorithms.")}
    assert {s for s in siblings if not s.startswith("algorithms._")} <= {
        "algorithms.fedavg"
    }  # _x: no method, but a part


@pytest.mark.parametrize(
    "name", sorted(n for n in SOURCES if n.partition(".")[0] in ("stages", "codec", "wire", "schema"))
)
def test_a_codec_knows_no_algorithm(name: str) -> None:
    known = {
        i for i in internal(name) if i.partition(".")[0] in ("algorithm", "algorithms", "federation", "client", "local")
    }
    assert not known
    assert not {i for i in imports(name) if i.partition(".")[0] == "lightning"}


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if not n.startswith("kernels")))
def test_importing_the_core_needs_no_extra(name: str) -> None:
    """Only flower.py, which nothing imports, may need more at import time."""
    if name == "flower":
        return
    tops = {i.partition(".")[0] for i in imports(name, into_functions=False)}
    extra = tops - CORE - set(sys.stdlib_module_names)
    assert not extra, f"{name} imports {sorted(extra)} at module level"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_nothing_unpickles(name: str) -> None:
    assert not {i.partition(".")[0] for i in imports(name)} & {
        "pickle",
        "cloudpickle",
        "dill",
        "joblib",
        "shelve",
        "marshal",
    }
    for node in walk(TREES[name]):
        if not isinstance(node, ast.Call):
            continue
        words = {k.arg: ast.unparse(k.value) for k in node.keywords}
        called = ast.unparse(node.func)
        if called in ("torch.load", "torch.hub.load"):
            assert words.get("weights_only") == "True", f"{name}:{node.lineno} {called}"
        assert words.get("allow_pickle") in (None, "False"), f"{name}:{node.lineno} {called}"
