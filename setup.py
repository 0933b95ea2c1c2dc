"""Builds the optional C++ kernels; everything else about the package is in pyproject.toml.

The kernels need torch and a C++ compiler at build time (``pip install --no-build-isolation``). Where they cannot be built the
package installs without them and runs on its PyTorch reference. ``DYNFED_BUILD=0`` leaves them out, ``DYNFED_BUILD=1`` makes
a failure to build them fatal.

Their CUDA part is built where torch has CUDA and there is an ``nvcc``. ``DYNFED_CUDA=0`` leaves it out; ``DYNFED_CUDA=1`` builds
it with any torch (the library also loads without CUDA) and makes a failure fatal.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
SOURCES = [
    "csrc/ops.cpp",
    "csrc/soft.cpp",
    "csrc/cpu/scalar.cpp",
    "csrc/cpu/avx2.cpp",
    "csrc/cpu/avx512.cpp",
    "csrc/cpu/avx512vbmi.cpp",
]
# No -march: an instruction set is chosen per file and at run time, so that the wheel runs on every CPU. No contraction: the
# results are specified to the bit. The target version is the oldest torch that can load the result (2.11).
FLAGS = [
    "-O3",
    "-std=c++17",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-g0",
    "-DTORCH_TARGET_VERSION=0x020B000000000000",
]

# Each architecture's own code, and code that the driver of a newer GPU compiles. No fast mathematics, no contraction.
CUDA_GLUE = "csrc/cuda/ops.cpp"
CUDA_SOURCES = ["quantize", "dequantize", "pack", "rotate", "symmetric_eigh", "squared_norm"]
CUDA_SOURCES += ["soft_quantize", "nearest", "prox_centers"]
CUDA_FLAGS = [
    "-O3",
    "-std=c++17",
    "--fmad=false",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
]


def without_kernels(reason: str) -> dict[str, Any]:
    """Say that there will be no kernels, or stop if ``DYNFED_BUILD=1`` asks for them."""
    if os.environ.get("DYNFED_BUILD") == "1":
        sys.exit(f"dynfed_lightning: the C++ kernels cannot be built: {reason}.")
    print(f"dynfed_lightning: installing without the C++ kernels: {reason}.", file=sys.stderr)
    return {}


def without_cuda(reason: str) -> None:
    """Say that there will be no CUDA kernels, or stop if ``DYNFED_CUDA=1`` asks for them."""
    if os.environ.get("DYNFED_CUDA") == "1":
        sys.exit(f"dynfed_lightning: the CUDA kernels cannot be built: {reason}.")
    print(f"dynfed_lightning: building without the CUDA kernels: {reason}.", file=sys.stderr)


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [os.path.join(home, "bin") for home in homes if home] + [
        os.environ.get("PATH", ""),
        "/usr/local/cuda/bin",
    ]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def run(command: list[str]) -> str:
    """What a command says; a `RuntimeError` with its first complaint if it fails."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        complaints = [line for line in done.stdout.splitlines() if "error" in line.lower()] or done.stdout.splitlines()
        raise RuntimeError(f"{shlex.join(command[:1])} failed: {complaints[0] if complaints else 'it says nothing'}")
    return done.stdout


def compile_cuda(nvcc: str, folder: Path) -> list[str]:
    """Compile the CUDA sources into `folder`, those that changed; the objects, and the arguments that link the CUDA runtime."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = [p for part in ("core", "cuda") for p in (ROOT / "csrc" / part).iterdir()] + [ROOT / "setup.py"]
    newest = max(p.stat().st_mtime for p in inputs)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

    def compile_one(name: str) -> str:
        built = folder / f"{name}.o"
        if not built.exists() or built.stat().st_mtime < newest:
            source = str(ROOT / "csrc" / "cuda" / f"{name}.cu")
            run([nvcc, *CUDA_FLAGS, f"--threads={min(jobs, 3)}", "-c", source, "-o", str(built)])
        return str(built)

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, CUDA_SOURCES))
    run([nvcc, "-shared", "-cudart=static", *objects, "-o", str(folder / "trial.so")])  # fails here, not in the whole
    # nvcc knows where its runtime is, wherever it has been installed.
    said = run([nvcc, "--dryrun", "-o", "unused", objects[0]])
    libraries = next((line.split("LIBRARIES=", 1)[1] for line in said.splitlines() if "LIBRARIES=" in line), "")
    return [*objects, *shlex.split(libraries.replace('"', " ")), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def add_cuda(extension: Any, folder: Path) -> None:
    """Build the CUDA part and add it to the extension, or say why not."""
    import torch

    choice = os.environ.get("DYNFED_CUDA", "")
    if choice == "0" or (choice == "" and torch.version.cuda is None):
        return  # not asked for: nothing to say
    nvcc = find_nvcc()
    if nvcc is None:
        return without_cuda("there is no nvcc (set CUDA_HOME)")
    try:
        extension.extra_link_args += compile_cuda(nvcc, folder)
    except (OSError, RuntimeError) as error:
        return without_cuda(str(error))
    extension.sources.append(CUDA_GLUE)


def kernels() -> dict[str, Any]:
    """The arguments of `setup` that build the kernels; none if they cannot be built here."""
    choice = os.environ.get("DYNFED_BUILD", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"Expected `DYNFED_BUILD` to be 0 or 1, but got {choice!r}.")
    if os.environ.get("DYNFED_CUDA", "") not in ("", "0", "1"):
        sys.exit(f"Expected `DYNFED_CUDA` to be 0 or 1, but got {os.environ['DYNFED_CUDA']!r}.")
    if choice == "0":
        return without_kernels("DYNFED_BUILD=0")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except (ImportError, OSError) as error:
        return without_kernels(f"torch does not import ({error})")
    words = os.environ.get("CXX", "c++").split()
    compiler = next((w for w in words if os.path.basename(w) != "ccache"), "c++")
    if shutil.which(compiler) is None:
        return without_kernels(f"no C++ compiler named {compiler!r} (set CXX)")

    class OptionalBuild(BuildExtension):
        """`BuildExtension` whose failure leaves the kernels out instead of failing the installation."""

        def run(self) -> None:
            add_cuda(extension, Path(self.build_temp).absolute() / "cuda")
            self.force = self.force or CUDA_GLUE in extension.sources  # a library without CUDA is older than no source
            try:
                super().run()
            except (Exception, SystemExit) as error:
                self.extensions: list[Any] = []  # nothing to copy into the package
                without_kernels(f"the build failed ({str(error).strip().splitlines()[0] if str(error) else error!r})")

    extension = CppExtension(
        "dynfed_lightning._C",
        SOURCES,
        extra_compile_args={"cxx": FLAGS},
        depends=sorted(
            str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".inl", ".cuh", ".cu")
        ),
        py_limited_api=True,
    )
    build = OptionalBuild.with_options(use_ninja=shutil.which("ninja") is not None, no_python_abi_suffix=False)
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**kernels())
