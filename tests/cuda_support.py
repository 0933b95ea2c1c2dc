"""What the tests of the emulated CUDA kernels share: the library itself, and buffers with something forbidden around them."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
GXX = shutil.which("g++")
GUARD = 0xA5  # what bytes around an output hold


@cache  # operators can be registered only once
def load_emulated() -> None:
    """The operators over emulated kernels; misaligned accesses and bad shifts end the process with a message."""
    torch_root = Path(torch.__file__).parent
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-DDYNFED_CUDA_EMULATED"]
    flags += ["-fsanitize=alignment,bounds,shift", "-fno-sanitize-recover=all", "-Wno-unknown-pragmas"]
    flags += ["-DTORCH_TARGET_VERSION=0x020B000000000000", f"-I{ROOT / 'tests' / 'cuda_shim'}"]
    links = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.c*")):
            if source.suffix in (".cu", ".cpp"):
                objects.append(f"{folder}/{source.stem}.o")
                run(GXX, *flags, f"-I{torch_root / 'include'}", "-x", "c++", "-c", str(source), "-o", objects[-1])
        run(GXX, "-shared", "-fsanitize=alignment,bounds,shift", *objects, "-o", f"{folder}/emulated.so", *links)
        torch.ops.load_library(f"{folder}/emulated.so")


def run(*command: str | None) -> None:
    done = subprocess.run([c or "" for c in command], capture_output=True, text=True, check=False)
    if "cannot find -l" in done.stderr and "san" in done.stderr:
        pytest.skip("this g++ has no sanitizers")
    assert done.returncode == 0, done.stderr


def misaligned(t: Tensor, by: int) -> Tensor:
    """A copy of `t` that begins `by` elements after an aligned address."""
    return torch.cat((t.new_zeros(by), t))[by:]


class Guarded:
    """Room for `n` elements that begins `by` elements after an aligned address, between guards that must stay as they are."""

    def __init__(self, n: int, dtype: torch.dtype, by: int = 0) -> None:
        self.size = torch.empty((), dtype=dtype).element_size()
        self.before, self.after = (64 + by) * self.size, (64 + by + n) * self.size
        self.memory = torch.full((self.after + 64 * self.size,), GUARD, dtype=torch.uint8)
        self.room = self.memory[self.before : self.after].view(dtype)

    def intact(self) -> bool:
        return bool((self.memory[: self.before] == GUARD).all() and (self.memory[self.after :] == GUARD).all())


class Fenced:
    """Copies of tensors that begin or end exactly at a page that must not be touched: a stray read ends the process."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []
        self.protect = ctypes.CDLL(None, use_errno=True).mprotect
        self.protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def __call__(self, t: Tensor, at_end: bool) -> Tensor:
        page = mmap.PAGESIZE
        size = t.numel() * t.element_size()
        inner = max(-(-size // page), 1) * page
        memory = mmap.mmap(-1, inner + 2 * page)
        self.maps.append(memory)  # never unmapped while a tensor looks at it
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for fence in (base, base + page + inner):
            assert self.protect(fence, page, 0) == 0
        begin = page + (inner - size if at_end else 0)
        copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=begin)
        return copy.copy_(t)
