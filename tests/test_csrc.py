"""The C++ sources: under sanitizers, free of symbols that instruction sets would share, and optional to build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "csrc" / "cpu"
GXX = shutil.which("g++")

needs_gxx = pytest.mark.skipif(GXX is None, reason="needs g++")


def run(*command: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, **(env or {})}
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=full, capture_output=True, text=True, check=False)


@needs_gxx
@pytest.mark.parametrize("level", ["-O0", pytest.param("-O3", marks=pytest.mark.slow)])
def test_kernels_under_the_sanitizers(level: str, tmp_path: Path) -> None:
    """Undefined behaviour and accesses outside of buffers, in every kernel of every instruction set this CPU has."""
    flags = ["-std=c++17", level, "-ffp-contract=off", "-fsanitize=undefined,address", "-fno-sanitize-recover=all"]
    (tmp_path / "empty.cpp").write_text("int main() {}")
    if run(GXX, *flags, tmp_path / "empty.cpp", "-o", tmp_path / "empty").returncode:
        pytest.skip("this g++ has no sanitizers")
    program = tmp_path / "driver"
    sources = [ROOT / "tests" / "csrc_driver.cpp", *sorted(CPU.glob("*.cpp"))]
    built = run(GXX, *flags, *sources, "-o", program)
    assert built.returncode == 0, built.stderr
    ran = run(program)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    count = re.fullmatch(r"(\d+) cases, (\d) instruction sets\n", ran.stdout)
    assert count is not None and int(count[1]) == ((19 * 5 * 5 + 16) * 8 + 5 * 4 + 2 * 2 + (7 * 6 - 2) * 3) * int(
        count[2]
    )


@needs_gxx
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512vbmi"])
def test_an_instruction_set_shares_no_function(isa: str, tmp_path: Path) -> None:
    """Of a function that two files share (a weak symbol) the linker keeps one, perhaps with instructions this CPU lacks."""
    built = run(GXX, "-std=c++17", "-O0", "-c", CPU / f"{isa}.cpp", "-o", tmp_path / "isa.o")
    assert built.returncode == 0, built.stderr
    symbols = [line.split() for line in run("nm", "-C", "--defined-only", tmp_path / "isa.o").stdout.splitlines()]
    # Capitals are visible to other files; u, v and w are kinds of weak.
    shared = [" ".join(s[2:]) for s in symbols if s[1].isupper() or s[1] in "uvw"]
    # DW.ref.*: a pointer to the C++ runtime's handler, the same data in every file, where cleanup after an exception is needed.
    assert [s for s in shared if not re.fullmatch(r"dynfed::k\w+Kernels|DW\.ref\.__gxx_personality_v0", s)] == []


def test_no_torch_in_the_core_and_no_flags_of_this_machine() -> None:
    for path in [*(ROOT / "csrc" / "core").iterdir(), *CPU.iterdir()]:
        assert "torch" not in re.sub(r"//.*", "", path.read_text()), path
    setup = (ROOT / "setup.py").read_text()
    flags = setup[setup.index("FLAGS = [") :].split("]")[0]
    assert "-ffp-contract=off" in flags and "-march" not in flags and "fast-math" not in flags


# ---- setup.py: the extension is optional ----


def build(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run(
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path / "tmp",
        env=env,
    )


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"DYNFED_BUILD": "0"}, "DYNFED_BUILD=0"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler named 'no-such-compiler'"),
        ({"CXX": "false"}, "the build failed"),
        ({"PYTHONPATH": "TORCHLESS"}, "torch does not import"),
    ],
)
def test_what_cannot_be_built_is_left_out_and_said_in_a_line(env: dict[str, str], reason: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    env = {k: v.replace("TORCHLESS", str(tmp_path)) for k, v in {"DYNFED_BUILD": "", **env}.items()}
    done = build(tmp_path, **env)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "installing without the C++ kernels" in line]
    assert len(said) == 1 and reason in said[0]
    assert not list(tmp_path.rglob("_C*.so"))
    if env["DYNFED_BUILD"] != "0":
        fatal = build(tmp_path, **{**env, "DYNFED_BUILD": "1"})
        assert fatal.returncode != 0 and f"the C++ kernels cannot be built: {reason}" in fatal.stderr


def test_a_typo_in_the_switch_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path, DYNFED_BUILD="yes")
    assert done.returncode != 0 and "Expected `DYNFED_BUILD` to be 0 or 1, but got 'yes'." in done.stderr


@needs_gxx
@pytest.mark.slow
def test_a_fresh_build_runs(tmp_path: Path) -> None:
    done = build(tmp_path, DYNFED_BUILD="1")
    assert done.returncode == 0, done.stderr
    (library,) = (tmp_path / "lib").rglob("_C.abi3.so")
    code = f"import torch; torch.ops.load_library({str(library)!r}); print(torch.ops.dynfed_lightning_cpu.best_isa())"
    assert run(sys.executable, "-c", code).stdout.strip() in "1234"
