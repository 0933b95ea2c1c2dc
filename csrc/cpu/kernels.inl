// The kernels, written once over an instruction set `Isa` (scalar.cpp, avx2.cpp, avx512.cpp), which handles 64 elements:
//   Codes                                        64 bytes, a code each
//   load(p), store(p, Codes), merge(all, Codes)  to and from memory; bitwise or
//   noise<n>(seed, group, pass, out)             n 16-bit words of Philox, counters (group, group + 1, ..; pass; 0)
//   maximum64(Maximum, x), reduce(Maximum)       the largest magnitude
//   quantize64<B>(x, inverse, noise) -> Codes    see core/quantize.h
//   total64(Sum, x, inverse), total(Sum)         the sum of |fixed_point|
//   energy64(Sum, x, inverse)                    the sum of their squares
//   eden64<B>(Sum, x, inverse, inverse_step) -> Codes   adds the products of units and levels, see core/eden.h
//   square_root(v)                               of a float, correctly rounded
//   pack64<B>(Codes, out), unpack64<B>(in)       may touch kReach<B> bytes, of which 8 * B count
//   dequantize64<B, accumulate>(Codes, factor, out)
// and what rotate.inl needs.
// Included inside an anonymous namespace: nothing here may be shared between instruction sets.

// pack64 and unpack64 move four 16-byte pieces at a distance of 2 * B bytes.
template <int B>
constexpr int64_t kReach = 6 * B + 16;

template <class Isa, int B>
void pack_range(const uint8_t* codes, uint8_t* packed, int64_t begin, int64_t end, unsigned& seen) {
  uint8_t* const out_end = packed + (end * B + 7) / 8;
  typename Isa::Codes all{};
  for (int64_t i = begin; i < end; i += kBlock) {
    uint8_t* out = packed + i / 8 * B;
    if (i + kBlock <= end && out + kReach<B> <= out_end) {
      const auto block = Isa::load(codes + i);
      Isa::merge(all, block);
      Isa::template pack64<B>(block, out);
    } else {
      const int64_t count = end - i < kBlock ? end - i : kBlock;
      alignas(64) uint8_t padded[kBlock] = {};
      alignas(64) uint8_t bytes[kBlock + 16];
      memcpy(padded, codes + i, count);
      const auto block = Isa::load(padded);
      Isa::merge(all, block);
      Isa::template pack64<B>(block, bytes);
      memcpy(out, bytes, (count * B + 7) / 8);
    }
  }
  alignas(64) uint8_t merged[kBlock];
  Isa::store(merged, all);
  for (uint8_t m : merged) seen |= m;
}

// The codes of `count` <= 64 elements at `in`, of which the buffer holds bytes up to `in_end`.
template <class Isa, int B>
inline typename Isa::Codes unpack_guarded(const uint8_t* in, const uint8_t* in_end, int64_t count) {
  if (in + kReach<B> <= in_end) return Isa::template unpack64<B>(in);
  alignas(64) uint8_t bytes[kBlock + 16] = {};
  memcpy(bytes, in, (count * B + 7) / 8);
  return Isa::template unpack64<B>(bytes);
}

template <class Isa, int B>
void unpack_range(const uint8_t* packed, uint8_t* codes, int64_t n, int64_t begin, int64_t end) {
  const uint8_t* const in_end = packed + (n * B + 7) / 8;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    const auto block = unpack_guarded<Isa, B>(packed + i / 8 * B, in_end, count);
    if (count == kBlock) {
      Isa::store(codes + i, block);
    } else {
      alignas(64) uint8_t padded[kBlock];
      Isa::store(padded, block);
      memcpy(codes + i, padded, count);
    }
  }
}

// Values of one item into `out`, or times a weight onto `out`; from is a multiple of 8.
template <class Isa, int B, bool kAccumulate>
void dequantize_range(const DequantizeItem& a, const Payload& p, float weight, int64_t from, int64_t to) {
  const uint8_t* const in_end = p.packed + (a.n * B + 7) / 8;
  for (int64_t i = from; i < to;) {
    const int64_t k = i / a.bucket;
    const int64_t stop = (k + 1) * a.bucket < to ? (k + 1) * a.bucket : to;
    const float factor = kAccumulate ? p.scales[k] * weight : p.scales[k];
    for (; i < stop; i += kBlock) {
      const int64_t count = stop - i < kBlock ? stop - i : kBlock;
      const auto codes = unpack_guarded<Isa, B>(p.packed + i / 8 * B, in_end, count);
      if (count == kBlock) {
        Isa::template dequantize64<B, kAccumulate>(codes, factor, a.out + i);
      } else {
        alignas(64) float values[kBlock] = {};
        if (kAccumulate) memcpy(values, a.out + i, count * sizeof(float));
        Isa::template dequantize64<B, kAccumulate>(codes, factor, values);
        memcpy(a.out + i, values, count * sizeof(float));
      }
    }
    i = stop;
  }
}

// Calls f(item, from, to) for the part of every item that lies in [begin, end) of the line.
template <class Item, class F>
inline void for_items(const Item* items, int64_t count, int64_t begin, int64_t end, const F& f) {
  int64_t low = 0, high = count;  // the last item that begins at or before `begin` is in [low, high)
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (items[middle].before <= begin ? low : high) = middle;
  }
  for (; low < count && items[low].before < end; ++low) {
    const Item& item = items[low];
    const int64_t from = begin > item.before ? begin - item.before : 0;
    const int64_t to = end - item.before < item.n ? end - item.before : item.n;
    if (from < to) f(item, from, to);
  }
}

#include "quantize.inl"
#include "rotate.inl"

// ---- from numbers known at run time to the templates ----

#define DYNFED_FOR_BITS(bits, CALL) \
  switch (bits) {                   \
    case 1: { constexpr int B = 1; CALL; break; } \
    case 2: { constexpr int B = 2; CALL; break; } \
    case 3: { constexpr int B = 3; CALL; break; } \
    case 4: { constexpr int B = 4; CALL; break; } \
    case 5: { constexpr int B = 5; CALL; break; } \
    case 6: { constexpr int B = 6; CALL; break; } \
    case 7: { constexpr int B = 7; CALL; break; } \
    default: { constexpr int B = 8; CALL; break; } \
  }

template <class Isa>
struct Table {
  static unsigned pack(const uint8_t* codes, uint8_t* packed, int bits, int64_t begin, int64_t end) {
    unsigned seen = 0;
    DYNFED_FOR_BITS(bits, (pack_range<Isa, B>(codes, packed, begin, end, seen)))
    return seen;
  }
  static void unpack(const uint8_t* packed, uint8_t* codes, int bits, int64_t n, int64_t begin, int64_t end) {
    DYNFED_FOR_BITS(bits, (unpack_range<Isa, B>(packed, codes, n, begin, end)))
  }
  static void quantize(const QuantizeArgs& a, int64_t begin, int64_t end) {
    Noise<Isa> noise(a.seed);
    const Rounding r = a.rounding;
    for_items(a.items, a.count, begin, end, [&](const QuantizeItem& item, int64_t from, int64_t to) {
      switch (item.dtype) {
        case DType::kFloat32: DYNFED_FOR_BITS(item.bits, (quantize_item<Isa, float, B>(item, r, noise, from, to))) break;
        case DType::kBFloat16: DYNFED_FOR_BITS(item.bits, (quantize_item<Isa, BFloat16, B>(item, r, noise, from, to))) break;
        case DType::kFloat16: DYNFED_FOR_BITS(item.bits, (quantize_item<Isa, Float16, B>(item, r, noise, from, to))) break;
      }
    });
  }
  static void dequantize(const DequantizeArgs& a, int64_t begin, int64_t end) {
    for_items(a.items, a.count, begin, end, [&](const DequantizeItem& item, int64_t from, int64_t to) {
      const Payload& p = item.payloads[0];
      DYNFED_FOR_BITS(p.bits, (dequantize_range<Isa, B, false>(item, p, 1.0f, from, to)))
    });
  }
  // All clients on one piece of `out` before the next: it stays in the nearest cache, so memory sees one pass.
  static void accumulate(const DequantizeArgs& a, int64_t begin, int64_t end) {
    constexpr int64_t kPiece = 2048;
    for_items(a.items, a.count, begin, end, [&](const DequantizeItem& item, int64_t from, int64_t to) {
      for (int64_t i = from; i < to; i += kPiece) {
        const int64_t stop = i + kPiece < to ? i + kPiece : to;
        for (int64_t c = 0; c < a.clients; ++c) {
          const Payload& p = item.payloads[c];
          DYNFED_FOR_BITS(p.bits, (dequantize_range<Isa, B, true>(item, p, a.weights[c], i, stop)))
        }
      }
    });
  }
  static void rotate(const RotateArgs& a, int64_t begin, int64_t end) {
    Flips<Isa> blocks(a.seed, kRotateBlocks), tail(a.seed, kRotateTail);
    for_items(a.items, a.count, begin, end, [&](const RotateItem& item, int64_t from, int64_t to) {
      rotate_item<Isa>(item, from, to, blocks, tail, a.inverse);
    });
  }
  static constexpr Kernels make() { return {&pack, &unpack, &quantize, &dequantize, &accumulate, &rotate}; }
};
