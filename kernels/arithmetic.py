"""What several kernels share, on the device: randomness, groups of eight codes, windows into a stream of codes.

The layouts follow from two facts. A Philox block serves eight elements, and eight codes make `bits` whole bytes: kernels that
write codes work on groups of eight, each held by one thread as two halves of four values (16-byte loads of float32; that the
halves of a line are read by two instructions costs nothing, as the second finds it in the cache). Kernels that write values
work on groups of four, so that the 16-byte stores of a warp leave no gaps between them.
"""

import triton
import triton.language as tl

INFINITY_BITS = tl.constexpr(0x7F800000)  # the bit pattern of +inf; a larger magnitude is inf or NaN
TINY_BITS = tl.constexpr(
    0x0DA24260
)  # the bit pattern of float32(1e-30): a bucket that nowhere exceeds it counts as zero
# The two words that hold a tile's last codes end at most 8 bytes behind it; so many codes of any width are 8 bytes or more.
AHEAD = tl.constexpr(64)
NAN_BITS = tl.constexpr(0x7FC00000)  # the quiet NaN that marks a bucket with inf or NaN


@triton.jit
def philox(seed_low, seed_high, block, pass_number: tl.constexpr):
    """Philox4x32-10 of the counter (low and high word of `block`, `pass_number`, 0): four uint32 tensors of the shape of `block`.

    Spelled out because `tl.philox` takes a single seed, whose type (and so the compiled kernel) would change with its value.
    """
    k0 = seed_low.to(tl.uint32, bitcast=True)
    k1 = seed_high.to(tl.uint32, bitcast=True)
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + pass_number
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = a.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def join64(low, high):
    """The int64 of two int32 halves, as `dynfed_lightning.kernels.launch.halves` makes them."""
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def magnitude(x):
    """A float32's bits without the sign: ordered as its absolute value."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def fixed_point(x, inverse):
    """``x * inverse`` truncated to int32."""
    return (x * inverse).to(tl.int32)


@triton.jit
def pack_half(codes, BITS: tl.constexpr):
    """Four codes, int32 [.., 4], as `4 * BITS` bits: uint32 [.., 1]."""
    j = tl.arange(0, 4)[None, None, :]
    return tl.sum(codes.to(tl.uint32) << (BITS * j).to(tl.uint32), axis=2, keep_dims=True)


@triton.jit
def store_groups(packed, group, keep, low, high, count, whole, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Write groups of eight codes at `packed` + `group` * BITS, and not a byte more.

    Args:
        packed: uint8 pointer, the first byte of this tile's stream.
        group: int32 [.., 1], each group's place in the tile.
        keep: bool [.., 1], groups that exist (a tile may be padded).
        low, high: uint32 [.., 1], the two halves of each group.
        count: int32, codes of this tile; the unused bits of the last byte are written as zeros.
        whole: whether `count` fills the tile.
        WORDS: `packed` is aligned to the word of BITS bytes that a group makes (of 1, 2, 4 or 8 bytes).
    """
    word = (high.to(tl.uint64) << (4 * BITS)) | low.to(tl.uint64)
    if whole:
        if WORDS and BITS == 1:
            tl.store(packed + group, word.to(tl.uint8), mask=keep)
        elif WORDS and BITS == 2:
            tl.store(packed.to(tl.pointer_type(tl.uint16)) + group, word.to(tl.uint16), mask=keep)
        elif WORDS and BITS == 4:
            tl.store(packed.to(tl.pointer_type(tl.uint32)) + group, word.to(tl.uint32), mask=keep)
        elif WORDS and BITS == 8:
            tl.store(packed.to(tl.pointer_type(tl.uint64)) + group, word, mask=keep)
        else:
            for t in tl.static_range(BITS):
                tl.store(packed + (group * BITS + t), (word >> (8 * t)).to(tl.uint8), mask=keep)
    else:
        for t in tl.static_range(BITS):
            at = group * BITS + t
            used = tl.minimum(tl.maximum(count * BITS - 8 * at, 0), 8)  # bits of this byte that belong to codes
            byte = (word >> (8 * t)).to(tl.int32) & ((1 << used) - 1)
            tl.store(packed + at, byte.to(tl.uint8), mask=keep & (used > 0))


@triton.jit
def four_codes(
    packed, byte, left, bits, BITS: tl.constexpr, TABLE: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr
):
    """The codes of a tile, uint32 [TILE / 4, 4], from the stream that begins at byte `byte` of `packed`.

    Args:
        packed: uint8 pointer.
        byte: int64, where the tile begins; a multiple of 4 unless TABLE.
        left: int64, codes from here to the end of the stream; nothing beyond is read, and codes beyond are not defined.
        bits: int32, the width where BITS is 0.
        BITS: the width if known at compile time, else 0.
        WORDS: `packed` is aligned to 4 bytes and at least `AHEAD` codes come after the tile: read words instead of bytes.
    """
    if BITS != 0:
        bits = BITS
    bit = tl.arange(0, TILE // 4) * (4 * bits)
    if WORDS:
        if TABLE:
            bit += ((byte & 3) * 8).to(tl.int32)
            byte = byte & -4
        words = (packed + byte).to(tl.pointer_type(tl.uint32)) + (bit >> 5)
        shift = (bit & 31).to(tl.uint32)
        window = tl.load(words) >> shift
        if TABLE or (BITS != 1 and BITS != 2 and BITS != 4 and BITS != 8):  # then codes may straddle two words
            window |= (tl.load(words + 1) << 1) << (31 - shift)
    else:
        # Four codes, and the up to 4 bits of their first byte before them, are at most 32 bits.
        end = ((tl.minimum(left, TILE) * bits + 7) >> 3).to(tl.int32)
        window = tl.zeros([TILE // 4], tl.uint32)
        for t in tl.static_range(4):
            at = (bit >> 3) + t
            window |= tl.load(packed + byte + at, mask=at < end, other=0).to(tl.uint32) << (8 * t)
        window = window >> (bit & 7).to(tl.uint32)
    j = tl.arange(0, 4)[None, :]
    return (window[:, None] >> (j * bits).to(tl.uint32)) & ((1 << bits) - 1)


@triton.jit
def levels_of(codes, bits):
    """The levels that codes stand for, float32: ``code - 2**(bits-1)``, or -1 and +1 (``2 * code - 1``) for one bit.

    An integer below 2**23, put into the mantissa of the float 2**23, adds itself to that float, exactly: cheaper than a
    conversion, which runs at half the rate.
    """
    magic = (codes << (1 >> (bits - 1))) | 0x4B000000
    return magic.to(tl.float32, bitcast=True) - tl.cast(8388608 + (1 << (bits - 1)), tl.float32)


@triton.jit
def bucket_of(h, within, quarter):
    """The buckets of groups of four values, counted from the tile's first: `within` and `quarter` (a bucket) in groups as well.

    32-bit and unsigned: a 64-bit division costs some 70 instructions, a signed one corrections.
    """
    return ((h + within).to(tl.uint32) // tl.cast(quarter, tl.uint32)).to(tl.int32)
