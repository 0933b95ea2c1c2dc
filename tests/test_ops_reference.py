"""The PyTorch reference, which every backend must equal, against slow plain Python and published numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ops_support import select, values

from dynfed_lightning import _reference, ops


def slow_philox(seed: int, counter: tuple[int, int, int, int]) -> list[int]:
    c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [high >> 32 ^ c[1] ^ k[0], high % 2**32, low >> 32 ^ c[3] ^ k[1], low % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def slow_random16(seed: int, index: int) -> int:
    group, h = divmod(index, 8)
    return slow_philox(seed, (group % 2**32, group >> 32, 0, 0))[h // 2] >> 16 * (h % 2) & 0xFFFF


def slow_quantize(
    x: list[float], bits: int, bucket: int, seed: int, offset: int, stochastic: bool
) -> tuple[list[int], list[float]]:
    """Codes and scales in numpy's float32 scalars, one element at a time."""
    f, codes, scales = np.float32, [], []
    for start in range(0, len(x), bucket):
        part = [f(v) for v in x[start : start + bucket]]
        amax = max(abs(v) for v in part)
        zero = not amax > f(1e-30)
        levels = 1 if bits == 1 else 2 ** (bits - 1) - 1
        inverse = f(0) if zero else f(65536 * levels) / amax
        steps = [int(v * inverse) for v in part]
        if bits == 1:
            codes += [int(v >= 0) for v in part]
            scales.append(0.0 if zero else float((amax / f(65536)) * (f(sum(map(abs, steps))) / f(len(part)))))
        else:
            r16 = [slow_random16(seed, offset + start + i) if stochastic else 32768 for i in range(len(part))]
            codes += [((v + r) >> 16) + 2 ** (bits - 1) for v, r in zip(steps, r16, strict=True)]
            scales.append(0.0 if zero else float(amax * (f(1) / f(levels))))
    return codes, scales


def slow_pack(codes: list[int], bits: int) -> list[int]:
    stream = sum(c << bits * i for i, c in enumerate(codes))
    return list(stream.to_bytes(math.ceil(len(codes) * bits / 8), "little"))


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [  # the known answers of Random123, philox4x32 with 10 rounds
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    seed: int, counter: tuple[int, int, int, int], expected: tuple[int, ...]
) -> None:
    words = _reference.philox4x32(seed, *(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in words) == expected
    assert tuple(slow_philox(seed, counter)) == expected


@pytest.mark.parametrize("start", [0, 5, 2**35 - 12, 2**62 - 30])
def test_random_bits_are_a_function_of_seed_and_index(start: int) -> None:
    got = _reference.random16(0xDEADBEEF12345678, start, 29, torch.device("cpu")).tolist()
    assert got == [slow_random16(0xDEADBEEF12345678, start + i) for i in range(29)]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 7, 8, 9, 31, 72])
def test_reference_equals_slow_python(n: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    select(monkeypatch, "reference")
    x = values(n, seed=n)
    for bucket, seed, offset, rounding in [
        (8, 0, 0, "stochastic"),
        (16, 2**64 - 1, 2**35 - 3, "stochastic"),
        (24, 9, 1, "nearest"),
    ]:
        packed, scales = ops.quantize_pack(x, bits, bucket, seed, offset, rounding)
        codes, expected = slow_quantize(x.tolist(), bits, bucket, seed, offset, rounding == "stochastic")
        assert ops.unpack(packed, bits, n).tolist() == codes
        assert packed.tolist() == slow_pack(codes, bits)
        assert scales.tolist() == expected
        middle, factor = (0.5, 2) if bits == 1 else (2 ** (bits - 1), 1)
        level = [np.float32((c - middle) * factor) for c in codes]
        decoded = [float(v * np.float32(expected[i // bucket])) for i, v in enumerate(level)]
        assert ops.unpack_dequantize(packed, scales, bits, bucket, n).tolist() == decoded


STEPS = {2: 1.0487, 3: 0.6024, 4: 0.3389, 5: 0.1885, 6: 0.1042, 7: 0.0567, 8: 0.0307}


def slow_eden(x: list[float], bits: int, bucket: int) -> tuple[list[int], list[float]]:
    """EDEN's codes and scales in Python integers and numpy's float32 scalars."""
    f, codes, scales = np.float32, [], []
    for start in range(0, len(x), bucket):
        part = [f(v) for v in x[start : start + bucket]]
        amax = max(abs(v) for v in part)
        zero = not amax > f(1e-30)
        units = [0 if zero else int(v * (f(2**20) / amax)) for v in part]
        energy = sum(u * u for u in units)
        if bits == 1:
            levels = [1 if v >= 0 else -1 for v in part]
            dot = sum(map(abs, units))
            codes += [int(v >= 0) for v in part]
        else:
            step = f(STEPS[bits]) * np.sqrt(f(energy) / f(len(part)))
            inverse = f(0) if zero else f(65536) / step
            half = 2 ** (bits - 1)
            levels = [min(max((int(f(u) * inverse) + 32768) >> 16, -half), half - 1) for u in units]
            dot = sum(u * q for u, q in zip(units, levels, strict=True))
            codes += [q + half for q in levels]
        scales.append(0.0 if zero else float((amax * f(2.0**-20)) * (f(energy) / f(dot))))
    return codes, scales


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 7, 9, 200])
def test_eden_rounding_equals_slow_python(n: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    select(monkeypatch, "reference")
    x = values(n, seed=n)
    x[0] = 0.0
    for bucket in (8, 64):
        packed, scales = ops.quantize_pack(x, bits, bucket, rounding="eden")
        codes, expected = slow_eden(x.tolist(), bits, bucket)
        assert ops.unpack(packed, bits, n).tolist() == codes
        assert scales.tolist() == expected


@pytest.mark.parametrize("n", [1, 2, 5, 8, 13, 40])
def test_rotation_is_the_matrix_it_should_be(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotated unit vectors are the columns of the product of the block matrices, signs by slow Philox."""
    select(monkeypatch, "reference")
    block, seed, offset = 8, 2**64 - 3, 2**35 - 8
    size = min(block, 2 ** int(math.log2(n)))
    hadamard = np.array([[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / math.sqrt(size)

    def flips(i: int, domain: int) -> int:
        group = (offset >> 3) + i // 128
        words = slow_philox(seed, (group % 2**32, group >> 32, domain, 0))
        return -1 if words[i % 128 // 32] >> i % 32 & 1 else 1

    whole = n // size * size
    first, tail = np.eye(n), np.eye(n)
    for start in range(0, whole, size):
        signs = np.diag([flips(start + i, 1) for i in range(size)])
        first[start : start + size, start : start + size] = hadamard @ signs
    if whole < n:
        tail[n - size :, n - size :] = hadamard @ np.diag([flips(i, 2) for i in range(size)])
    layout = ops.Layout([n], 8, offsets=[offset])
    columns = torch.stack([ops.rotate(e, block, seed, layout=layout) for e in torch.eye(n)], dim=1)
    assert np.abs(columns.numpy() - tail @ first).max() < 1e-6
    back = torch.stack([ops.rotate(e, block, seed, layout=layout, inverse=True) for e in torch.eye(n)], dim=1)
    assert np.abs(back.numpy() - (tail @ first).T).max() < 1e-6


def exact_float32(value: Fraction) -> float:
    """`value` rounded once to float32 (ties to even), for normal numbers."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value)))
    unit = Fraction(2) ** (exponent - 23)
    candidates = [math.floor(value / unit) * unit, math.ceil(value / unit) * unit]
    error = [abs(value - c) for c in candidates]
    if error[0] == error[1]:
        return float(next(c for c in candidates if (c / unit) % 2 == 0))
    return float(candidates[0] if error[0] < error[1] else candidates[1])


def test_reference_fma_rounds_once() -> None:
    g = torch.Generator().manual_seed(1)
    a, b, c = (
        torch.randn(400, generator=g) * torch.exp2(torch.randint(-30, 30, (400,), generator=g).float())
        for _ in range(3)
    )
    b[0], a[0], c[0] = 1 - 2.0**-23, 2.0**-24 * (1 + 2.0**-23), 1 + 2.0**-23  # float64 in between would round up here
    b[1], a[1], c[1] = 3.0, 5.0, -15.0
    got = _reference.fma(a, b, c).tolist()
    expected = [
        exact_float32(Fraction(x) * Fraction(y) + Fraction(z))
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert got == expected
    assert got[0] == 1 + 2.0**-23 != float((a[0].double() * b[0].double() + c[0].double()).float())


def test_eden_rounds_the_square_root_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's float32 square root is off by one place in a fifth of its results on a CPU; here that would move a code."""
    select(monkeypatch, "reference")
    x = torch.randn(131072, generator=torch.Generator().manual_seed(0))[88576:89088]
    packed, _ = ops.quantize_pack(x, 8, 512, rounding="eden")
    units = (x.numpy() * (np.float32(2.0**20) / x.abs().max().numpy())).astype(np.int32)
    energy = np.float32((units.astype(np.int64) ** 2).sum())
    step = np.float32(_reference.EDEN_STEPS[8]) * np.sqrt(energy / np.float32(512))
    steps = (units.astype(np.float32) * (np.float32(65536) / step)).astype(np.int32)
    assert packed.tolist() == (np.clip((steps + 32768) >> 16, -128, 127) + 128).tolist()
    assert packed[334] == 51
