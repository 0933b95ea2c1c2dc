"""Builds the optional C++ kernels; everything else about the package is in pyproject.toml.

The kernels need torch and a C++ compiler at build time (``pip install --no-build-isolation``). Where they cannot be built the
package installs without them and runs on its PyTorch reference. ``DYNFED_BUILD=0`` leaves them out, ``DYNFED_BUILD=1`` makes
a failure to build them fatal.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
SOURCES = ["csrc/ops.cpp", "csrc/cpu/scalar.cpp", "csrc/cpu/avx2.cpp", "csrc/cpu/avx512.cpp", "csrc/cpu/avx512vbmi.cpp"]
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


def without_kernels(reason: str) -> dict[str, Any]:
    """Say that there will be no kernels, or stop if ``DYNFED_BUILD=1`` asks for them."""
    if os.environ.get("DYNFED_BUILD") == "1":
        sys.exit(f"dynfed_lightning: the C++ kernels cannot be built: {reason}.")
    print(f"dynfed_lightning: installing without the C++ kernels: {reason}.", file=sys.stderr)
    return {}


def kernels() -> dict[str, Any]:
    """The arguments of `setup` that build the kernels; none if they cannot be built here."""
    choice = os.environ.get("DYNFED_BUILD", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"Expected `DYNFED_BUILD` to be 0 or 1, but got {choice!r}.")
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
            try:
                super().run()
            except (Exception, SystemExit) as error:
                self.extensions: list[Any] = []  # nothing to copy into the package
                without_kernels(f"the build failed ({str(error).strip().splitlines()[0] if str(error) else error!r})")

    extension = CppExtension(
        "dynfed_lightning._C",
        SOURCES,
        extra_compile_args={"cxx": FLAGS},
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".inl")),
        py_limited_api=True,
    )
    build = OptionalBuild.with_options(use_ninja=shutil.which("ninja") is not None, no_python_abi_suffix=False)
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**kernels())
