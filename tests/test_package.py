"""What an installation holds, as pyproject.toml declares it, and that every part of it imports."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import dynfed_lightning

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"dynfed_lightning": ROOT / "dynfed_lightning", "dynfed_lightning.kernels": ROOT / "kernels"}


def python_packages() -> set[str]:
    found = set()
    for name, folder in FOLDERS.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(folder).parts]))
    return found


def modules() -> list[str]:
    found = []
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found.append(".".join([name, *(p for p in parts if p != "__init__")]))
    return sorted(found)


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", r, maxsplit=1)[0].lower().replace("_", "-") for r in requirements}


@pytest.mark.parametrize("module", modules())
def test_every_module_imports(module: str) -> None:
    if module.endswith(".flower"):
        pytest.importorskip("flwr")
    if module.startswith("dynfed_lightning.kernels."):
        pytest.importorskip("triton")
    assert (
        importlib.import_module(module).__doc__ or not Path(importlib.import_module(module).__file__ or "").read_text()
    )


def test_importing_the_package_is_quiet_and_pulls_in_no_extra() -> None:
    code = (
        "import sys, dynfed_lightning\n"
        "extras = {'matplotlib', 'jsonargparse', 'datasets', 'sklearn', 'PIL', 'rich', 'flwr', 'flwr_datasets', 'triton'}\n"
        "print(sorted(extras & set(sys.modules) - {'rich'}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_all_packages_are_listed_and_only_they() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == python_packages()


def test_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab.]\w+)?", dynfed_lightning.__version__)
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dynfed_lightning.__version__"}


def test_the_core_depends_on_six_things() -> None:
    assert names(PROJECT["project"]["dependencies"]) == {
        "torch", "lightning", "torchmetrics", "numpy", "safetensors", "triton",
    }  # fmt: skip
    assert "torch" not in names(PROJECT["build-system"]["requires"])


def test_constraints_name_one_version_of_every_direct_dependency() -> None:
    lines = [
        x for x in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if x and not x.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][\w.]*", x) for x in lines)
    direct = names(PROJECT["project"]["dependencies"])
    for extra in PROJECT["project"]["optional-dependencies"].values():
        direct |= names(extra)
    # Each build of torch names the triton it needs; flwr has its own, wider set of pins.
    assert names(lines) == direct - {"triton", "flwr"}
    assert "torch==2.13.0" in lines


@pytest.mark.slow
def test_source_archive_and_wheel_hold_what_they_should(tmp_path: Path) -> None:
    code = "from setuptools import build_meta as b; import sys; to = sys.argv[1]; b.build_sdist(to); b.build_wheel(to)"
    copy = tmp_path / "checkout"
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for file in files:
        if (ROOT / file).is_file():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).write_bytes((ROOT / file).read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        members = {m.partition("/")[2] for m in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "kernels/__init__.py", "dynfed_lightning/py.typed"} <= members
    assert {f for f in files if f.startswith("csrc/")} <= members
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    tops = {n.partition("/")[0] for n in wheel.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"dynfed_lightning"}
    wanted = {m.replace(".", "/") for m in modules()}
    held = {n.removesuffix(".py").removesuffix("/__init__") for n in wheel.namelist() if n.endswith(".py")}
    assert held == wanted
