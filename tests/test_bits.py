"""Bit policies: who gets how many bits, and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from dynfed_lightning.bits import BitPolicy, FixedBits, InstructedBits, PatternBits, as_bit_policy, check_bits
from dynfed_lightning.codec import CodecContext, TensorSpec

WEIGHT = TensorSpec("conv1.weight", (8, 3, 3, 3), torch.float32)
BIAS = TensorSpec("conv1.bias", (8,), torch.float32)
CTX = CodecContext()


@pytest.mark.parametrize("bits", [1, 4, 8, None])
def test_fixed_bits_are_the_same_for_all(bits):
    assert FixedBits(bits)(WEIGHT, CTX) == bits
    assert as_bit_policy(bits)(BIAS, CTX) == bits


@pytest.mark.parametrize("bad", [0, 9, -1, 4.0, True, "4"])
def test_bits_outside_one_to_eight_are_refused(bad):
    message = f"Expected `bits` to be an integer from 1 to 8, but got {bad!r}"
    for make in (FixedBits, as_bit_policy, check_bits):
        with pytest.raises(ValueError) as error:
            make(bad)
        assert message in str(error.value)


@pytest.mark.parametrize(("sent", "bits"), [(4, 4), (4.0, 4), (3.4, 3), (3.5, 4), (4.5, 5), (8.49, 8), (0.5, 1)])
def test_instructed_bits_round_to_the_nearest(sent, bits):
    assert InstructedBits()(WEIGHT, CodecContext(scalars={"bits": sent})) == bits


@pytest.mark.parametrize("sent", [0.49, 8.5, 9, -3, math.nan, math.inf, True, "4"])
def test_instructed_bits_out_of_range_are_refused(sent):
    with pytest.raises(ValueError, match="from 1 to 8"):
        InstructedBits()(WEIGHT, CodecContext(scalars={"bits": sent}))


def test_instructed_bits_that_are_missing_are_named():
    with pytest.raises(ValueError, match=r"instruct `bits` .*but got \['lr'\]"):
        InstructedBits()(WEIGHT, CodecContext(scalars={"lr": 0.1}))
    assert InstructedBits(default=6)(WEIGHT, CTX) == 6
    assert InstructedBits("up_bits")(WEIGHT, CodecContext(scalars={"up_bits": 3, "bits": 8})) == 3


def test_pattern_bits_take_the_first_match():
    policy = PatternBits({"*.bias": None, "conv1.*": 8, "conv*": 2}, default=InstructedBits())
    ctx = CodecContext(scalars={"bits": 5})
    names = ["conv1.bias", "conv1.weight", "conv2.weight", "fc.weight"]
    assert [policy(TensorSpec(n, (4,), torch.float32), ctx) for n in names] == [None, 8, 2, 5]


def test_pattern_bits_check_their_values_at_once():
    with pytest.raises(ValueError, match="got 9"):
        PatternBits({"*": 9}, default=4)
    with pytest.raises(ValueError, match="got 0"):
        PatternBits({}, default=0)


def test_a_function_is_a_policy():
    policy = as_bit_policy(lambda spec, ctx: 8 if len(spec.shape) == 1 else 2)
    assert isinstance(policy, BitPolicy)
    assert [policy(s, CTX) for s in (WEIGHT, BIAS)] == [2, 8]


@pytest.mark.parametrize("kwargs", [{"seed": -1}, {"seed": 2**64}, {"round": -1}])
def test_a_context_checks_itself(kwargs):
    with pytest.raises(ValueError, match=f"Expected `{next(iter(kwargs))}`"):
        CodecContext(**kwargs)
