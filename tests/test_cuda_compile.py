"""What nvcc makes of the CUDA kernels, without a GPU: registers, no spills, no stack frame, wide loads and stores, and doubles
only where they belong.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
SOURCES = ("quantize", "dequantize", "pack", "rotate", "symmetric_eigh", "squared_norm")
SOURCES += ("soft_quantize", "nearest", "prox_centers")
# Registers a thread, by kernel; a thread block has 256 threads (`symmetric_eigh` up to 544), a multiprocessor 65536 registers.
REGISTERS = {
    r"quantize_tiles<\d, [01], \d>": 64,
    r"quantize_tiles<\d, 2, \d>": 128,
    r"quantize_long<\d>": 64,
    r"dequantize_tiles<\(bool\)\d>": 48,
    r"(un)?pack_tiles<\d>": 40,
    r"rotate_chunks": 80,
    r"symmetric_eigh<\(bool\)\d>": 80,
    r"square_chunks<[\w:]+>": 64,
    r"add_chunks": 40,
    r"soft_quantize": 64,
    r"soft_quantize_backward<\w+, \w+>": 80,  # three thread blocks to a multiprocessor
    r"nearest_center|prox_weights|center_sums": 64,
    r"add_partials": 40,
    r"count_members|narrow_bounds": 64,
}
# Kernels and the accesses of 16 bytes that each must have: loads, stores.
VECTORS = {
    r"quantize_tiles<\d, \d, \d>": (8, 1),
    r"dequantize_tiles<\(bool\)0>": (0, 4),
    r"dequantize_tiles<\(bool\)1>": (4, 4),
    r"pack_tiles<\d>": (1, 1),
    r"unpack_tiles<\d>": (0, 1),
    r"rotate_chunks": (8, 8),
    r"square_chunks<[\w:]+>": (8, 0),
    # Eight values a thread: two of each for float32, one for each type of half precision.
    r"soft_quantize|nearest_center|prox_weights": (4, 4),
    r"soft_quantize_backward<true, \w+>": (8, 4),
    r"soft_quantize_backward<false, true>": (8, 0),
    r"count_members|center_sums": (4, 0),
}
NARROW = r"quantize_long<\d>|symmetric_eigh<.*>|add_chunks|add_partials|narrow_bounds"  # these need no such accesses
DOUBLES = r"symmetric_eigh<.*>|square_chunks<.*>|add_chunks|add_partials|narrow_bounds"
# One bit has no stochastic rounding; three for long buckets; eigenvectors in two places; norms of four types;
# what there is for learned centres, with gradients to values, centres and both.
KERNELS = 8 * 3 * 3 - 3 + 3 + 2 + 8 + 8 + 1 + 2 + 4 + 1 + 10

ARCHITECTURES = [pytest.param("80", marks=pytest.mark.slow), "90a"]


def tool(name: str) -> str | None:
    """A CUDA tool: on the path, in a usual place, or in triton's wheel."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    try:
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    except ImportError:
        pass
    return shutil.which(name, path=os.pathsep.join(folders))


NVCC, CUOBJDUMP, CUFILT = tool("nvcc"), tool("cuobjdump"), shutil.which("c++filt")


@dataclass
class Kernel:
    name: str  # without namespaces and parameters
    registers: int
    stack: int
    local: int
    instructions: list[str]

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, i) is not None for i in self.instructions)


def run(*command: str | None) -> str:
    done = subprocess.run([c or "" for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def plain(symbol: str) -> str:
    """``quantize_tiles<4, 1, 2>`` of a mangled name; numbers and truth values without their types' casts."""
    name = run(CUFILT, symbol).replace("(anonymous namespace)::", "")
    found = re.search(r"dynfed::cuda::(?:[\w]+::)?(\w+(?:<[^>]*>)?)\(", name)
    assert found is not None, name
    return found[1].replace("(int)", "").replace("<false>", "<(bool)0>").replace("<true>", "<(bool)1>")


@pytest.fixture(scope="session", params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """All kernels compiled for one architecture, with the flags of setup.py."""
    lacking = [name for name, path in (("nvcc", NVCC), ("cuobjdump", CUOBJDUMP), ("c++filt", CUFILT)) if path is None]
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}")
    folder, found = tmp_path_factory.mktemp(f"sm_{request.param}"), []
    for source in SOURCES:
        cubin = str(folder / f"{source}.cubin")
        target = f"-gencode=arch=compute_{request.param},code=sm_{request.param}"
        run(NVCC, "-O3", "-std=c++17", "--fmad=false", target, "-cubin", str(CUDA / f"{source}.cu"), "-o", cubin)
        usage = run(CUOBJDUMP, "-res-usage", cubin)
        resources = {m[1]: m[2] for m in re.finditer(r"Function (\S+):\s+(REG:.*)", usage)}
        for part in run(CUOBJDUMP, "-sass", cubin).split("Function : ")[1:]:
            symbol = part.split()[0]
            code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", part, re.MULTILINE)
            numbers = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", resources[symbol])}
            found.append(Kernel(plain(symbol), numbers["REG"], numbers["STACK"], numbers["LOCAL"], code))
    return found


def limit(table: dict, name: str):
    """The entry of `table` whose pattern `name` matches."""
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, name)), None)


def test_every_kernel_stays_in_its_registers(kernels: list[Kernel]) -> None:
    assert len(kernels) == KERNELS and len({k.name for k in kernels}) == KERNELS
    for k in kernels:
        bound = limit(REGISTERS, k.name)
        assert bound is not None and k.registers <= bound, (k.name, k.registers)
        assert k.stack == 0 and k.local == 0, (k.name, "stack", k.stack)
        assert k.count(r"(LDL|STL)\b") == 0, (k.name, "spills")


def test_the_kernels_read_and_write_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    checked = 0
    for k in kernels:
        wanted = limit(VECTORS, k.name)
        if wanted is None:
            assert re.fullmatch(NARROW, k.name), k.name
            continue
        loads, stores = k.count(r"LDG\.\S*128"), k.count(r"STG\.\S*128")
        assert loads >= wanted[0] and stores >= wanted[1], (k.name, loads, stores)
        checked += 1
    assert checked == KERNELS - 8


def test_double_precision_only_where_it_belongs(kernels: list[Kernel]) -> None:
    with_doubles = [k.name for k in kernels if k.count(r"(DADD|DMUL|DFMA|DSETP|F2F\.\S*64)")]
    assert len(with_doubles) == 9 and all(re.fullmatch(DOUBLES, name) for name in with_doubles)


def test_rotations_need_neither_division_nor_square_root(kernels: list[Kernel]) -> None:
    """Double precision's own begin with MUFU.RCP64H and MUFU.RSQ64H; an inverse square root here begins in single precision.
    The two numbers of a rotation go to and from shared memory at once.
    """
    for k in (k for k in kernels if k.name.startswith("symmetric_eigh")):
        assert k.count(r"MUFU\.RSQ64H|MUFU\.RCP64H") == 0
        assert k.count(r"MUFU\.RSQ\b") >= 2
        assert k.count(r"LDS\.128") >= 2 and k.count(r"STS\.128") >= 1
        assert k.count(r"LDS\.64") >= 4 and k.count(r"STS\.64") >= 4


def test_philox_multiplies_wide_and_adds_nothing(kernels: list[Kernel]) -> None:
    """Ten rounds of two products for each of a lane's four blocks; an addition to each high half was a fifth of all."""
    (hot,) = (k for k in kernels if k.name == "quantize_tiles<4, 1, 2>")
    products = hot.count(r"IMAD\.WIDE\.U32")
    assert 4 * 18 <= products <= 4 * 20 + 16
    assert hot.count(r"(VIADD|IADD3)\b") < 110


def test_sigmoids_without_a_division_each(kernels: list[Kernel]) -> None:
    """Three types of eight values: two boundaries at once share a reciprocal, gradients to the centres take four at once."""
    for name, exponentials, reciprocals in (
        ("soft_quantize", 2, 1),
        ("soft_quantize_backward<true, false>", 1, 1),
        ("soft_quantize_backward<true, true>", 4, 4),
        ("soft_quantize_backward<false, true>", 4, 4),
    ):
        (kernel,) = (k for k in kernels if k.name == name)
        # And a few where a block looks at the centres.
        assert 3 * 8 * exponentials <= kernel.count(r"MUFU\.EX2") <= 3 * 8 * exponentials + 4
        assert 3 * 8 * reciprocals <= kernel.count(r"MUFU\.RCP\b") <= 3 * 8 * reciprocals + 4


# ---- setup.py: the CUDA part ----


def build(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Build with a compiler that always fails, so that only the CUDA part gets anywhere."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path / "tmp",
    ]
    full = {**os.environ, "DYNFED_BUILD": "", "CXX": "false", **env}
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=full, capture_output=True, text=True, check=False)


def test_a_failure_of_nvcc_is_fatal_where_cuda_is_asked_for_and_said_in_a_line(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal error: no luck today'\nexit 1\n")
    nvcc.chmod(0o755)
    done = build(tmp_path, DYNFED_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "the CUDA kernels cannot be built" in line]
    assert len(said) == 1 and "no luck today" in said[0]


def test_cuda_is_left_out_where_it_is_not_wanted_and_a_typo_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path, DYNFED_CUDA="0")
    assert done.returncode == 0 and "CUDA" not in done.stderr and not (tmp_path / "tmp" / "cuda").exists()
    done = build(tmp_path, DYNFED_CUDA="yes")
    assert done.returncode != 0 and "Expected `DYNFED_CUDA` to be 0 or 1, but got 'yes'." in done.stderr
