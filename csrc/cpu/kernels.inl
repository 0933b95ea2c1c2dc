// The kernels, written once over an instruction set `Isa` (scalar.cpp, avx2.cpp, avx512.inl), which handles 64 elements:
//   Codes                                        64 bytes, a code each
//   load(p), store(p, Codes), merge(all, Codes)  to and from memory; bitwise or
//   stream(p, Codes), stream_values(p, Values)   past the caches to aligned memory
//   fence()                                      orders those stores before what follows
//   noise<n>(seed, group, pass, out)             n 16-bit words of Philox, counters (group, group + 1, ..; pass; 0)
//   maximum64(Maximum, x), reduce(Maximum)       the largest magnitude
//   quantize64<B, noisy>(x, inverse, noise) -> Codes   see core/quantize.h; to nearest if not noisy
//   total64(Sum, x, inverse), total(Sum)         the sum of |fixed_point|
//   energy64(Sum, x, inverse)                    the sum of their squares
//   eden64<B>(Sum, x, inverse, inverse_step) -> Codes   adds the products of units and levels, see core/eden.h
//   square_root(v)                               of a float, correctly rounded
//   pack64<B>(Codes, out), unpack64<B>(in)       may touch kReach<B> bytes, of which 8 * B count
//   Values, load_values(p), store_values(p, Values)   64 floats in registers; kSegment is how many of these fit beside the rest
//   scale64<B>(in, factor) -> Values             the levels of the codes at `in`, times the factor; may touch kReach<B> bytes
//   add64<B>(in, factor, Values)                 adds them, fused
// and what rotate.inl, dense.inl (`Lanes`) and soft.inl (`Floats`) need.
// Included inside an anonymous namespace: nothing here may be shared between instruction sets.

// From a number known at run time to a template argument B.
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

// pack64 and unpack64 move four 16-byte pieces at a distance of 2 * B bytes, or half a vector (2 bits), or a whole one.
template <int B>
constexpr int64_t kReach = B == 1 || B == 4 ? 6 * B + 16 : B == 2 ? 32 : 64;
constexpr int64_t kReachElements = 112;  // what the reach beyond 8 * B bytes is at most, in elements
// Bytes ahead of each client's codes and of `out`: of many streams, each read in pieces, the hardware foresees too little.
constexpr int64_t kAheadOfCodes = 2048, kAheadOfSums = 4096;

inline void prefetch(const uint8_t* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at);
}

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

// The packed codes of `count` <= 64 elements at `in`: there, or a copy where the buffer ends within reach.
template <int B>
inline const uint8_t* guarded(const uint8_t* in, const uint8_t* in_end, int64_t count, uint8_t (&bytes)[kBlock + 16]) {
  if (in + kReach<B> <= in_end) return in;
  memcpy(bytes, in, (count * B + 7) / 8);
  return bytes;
}

// Stores that bypass the caches want whole lines.
inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

template <class Isa, int B>
void unpack_range(const uint8_t* packed, uint8_t* codes, int64_t n, bool stream, int64_t begin, int64_t end) {
  const uint8_t* const in_end = packed + (n * B + 7) / 8;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    alignas(64) uint8_t bytes[kBlock + 16];
    const auto block = Isa::template unpack64<B>(guarded<B>(packed + i / 8 * B, in_end, count, bytes));
    if (count == kBlock && stream) {
      Isa::stream(codes + i, block);
    } else if (count == kBlock) {
      Isa::store(codes + i, block);
    } else {
      alignas(64) uint8_t padded[kBlock];
      Isa::store(padded, block);
      memcpy(codes + i, padded, count);
    }
  }
}

// Calls f(bucket, from, to) for the part of every bucket that lies in [from, to).
template <class F>
inline void for_buckets(int64_t bucket, int64_t from, int64_t to, const F& f) {
  for (int64_t k = from ? from / bucket : 0; from < to; ++k) {
    const int64_t stop = (k + 1) * bucket < to ? (k + 1) * bucket : to;
    f(k, from, stop);
    from = stop;
  }
}

// Values of elements [from, to) of an item into `out`; from is a multiple of 8.
template <class Isa, int B>
void dequantize_range(const DequantizeItem& a, bool stream, int64_t from, int64_t to) {
  const Payload& p = a.payloads[0];
  const uint8_t* const in_end = p.packed + (a.n * B + 7) / 8;
  for_buckets(a.bucket, from, to, [&](int64_t k, int64_t i, int64_t stop) {
    const float factor = p.scales[k];
    for (; i < stop; i += kBlock) {
      const int64_t count = stop - i < kBlock ? stop - i : kBlock;
      alignas(64) uint8_t bytes[kBlock + 16];
      const auto values = Isa::template scale64<B>(guarded<B>(p.packed + i / 8 * B, in_end, count, bytes), factor);
      if (count == kBlock && stream) {
        Isa::stream_values(a.out + i, values);
      } else if (count == kBlock) {
        Isa::store_values(a.out + i, values);
      } else {
        alignas(64) float padded[kBlock];
        Isa::store_values(padded, values);
        memcpy(a.out + i, padded, count * sizeof(float));
      }
    }
  });
}

// Adds kBlocks blocks of every client, whose factors are given, to `out` at element i of the item, of which `count` are wanted.
// The sums stay in registers from client to client.
template <class Isa, int kBlocks>
inline void accumulate_segment(const DequantizeItem& a, const Payload* payloads, const float* factors, int64_t clients,
                               int64_t i, int64_t count) {
  alignas(64) float padded[kBlocks * kBlock];
  float* const out = count == kBlocks * kBlock ? a.out + i : padded;
  if (out == padded) memcpy(padded, a.out + i, count * sizeof(float));
  const bool near_end = i + kBlocks * kBlock + kReachElements > a.n;
  typename Isa::Values sums[kBlocks];
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) sums[b] = Isa::load_values(out + b * kBlock);
  if (!near_end) prefetch(reinterpret_cast<const uint8_t*>(out) + kAheadOfSums, kBlocks * kBlock * sizeof(float));
  for (int64_t c = 0; c < clients; ++c) {
    const Payload& p = payloads[c];
    const float factor = factors[c];
    const uint8_t* in = p.packed + i / 8 * p.bits;
    alignas(64) uint8_t bytes[kBlocks * kBlock + 16];
    if (near_end) {
      memcpy(bytes, in, (count * p.bits + 7) / 8);
      in = bytes;
    } else {
      prefetch(in + kAheadOfCodes, kBlocks * 8 * p.bits);
    }
    DYNFED_FOR_BITS(p.bits, {
      _Pragma("GCC unroll 4") for (int b = 0; b < kBlocks; ++b) Isa::template add64<B>(in + b * 8 * B, factor, sums[b]);
    })
  }
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) Isa::store_values(out + b * kBlock, sums[b]);
  if (out == padded) memcpy(a.out + i, padded, count * sizeof(float));
}

// All clients onto elements [from, to) of an item, in one pass over `out`.
template <class Isa>
void accumulate_range(const DequantizeItem& a, const float* weights, int64_t clients, int64_t from, int64_t to) {
  constexpr int64_t kGroup = 64, kWide = Isa::kSegment * kBlock;
  for_buckets(a.bucket, from, to, [&](int64_t k, int64_t begin, int64_t stop) {
    for (int64_t c = 0; c < clients; c += kGroup) {
      const Payload* const payloads = a.payloads + c;
      const int64_t count = clients - c < kGroup ? clients - c : kGroup;
      float factors[kGroup];
      for (int64_t j = 0; j < count; ++j) factors[j] = payloads[j].scales[k] * weights[c + j];
      int64_t i = begin;
      for (; i + kWide <= stop; i += kWide) accumulate_segment<Isa, Isa::kSegment>(a, payloads, factors, count, i, kWide);
      for (; i < stop; i += kBlock)
        accumulate_segment<Isa, 1>(a, payloads, factors, count, i, stop - i < kBlock ? stop - i : kBlock);
    }
  });
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
#include "dense.inl"
#include "soft.inl"

template <class Isa>
struct Table {
  static unsigned pack(const uint8_t* codes, uint8_t* packed, int bits, int64_t begin, int64_t end) {
    unsigned seen = 0;
    DYNFED_FOR_BITS(bits, (pack_range<Isa, B>(codes, packed, begin, end, seen)))
    return seen;
  }
  static void unpack(const uint8_t* packed, uint8_t* codes, int bits, int64_t n, bool stream, int64_t begin, int64_t end) {
    DYNFED_FOR_BITS(bits, (unpack_range<Isa, B>(packed, codes, n, stream && is_aligned(codes), begin, end)))
    if (stream) Isa::fence();
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
      const bool stream = a.stream && is_aligned(item.out) && item.bucket % kBlock == 0;  // every block of it is then aligned
      DYNFED_FOR_BITS(item.payloads[0].bits, (dequantize_range<Isa, B>(item, stream, from, to)))
    });
    if (a.stream) Isa::fence();
  }
  static void accumulate(const DequantizeArgs& a, int64_t begin, int64_t end) {
    for_items(a.items, a.count, begin, end, [&](const DequantizeItem& item, int64_t from, int64_t to) {
      accumulate_range<Isa>(item, a.weights, a.clients, from, to);
    });
  }
  static void rotate(const RotateArgs& a, int64_t begin, int64_t end) {
    Flips<Isa> blocks(a.seed, kRotateBlocks), tail(a.seed, kRotateTail);
    for_items(a.items, a.count, begin, end, [&](const RotateItem& item, int64_t from, int64_t to) {
      rotate_item<Isa>(item, from, to, blocks, tail, a.inverse);
    });
  }
  static void eigh(const EighArgs& a, double* work, int64_t begin, int64_t end) {
    symmetric_eigh<typename Isa::Lanes>(a, work, begin, end);
  }
  static constexpr Kernels make() {
    using F = typename Isa::Floats;
    return {&pack, &unpack, &quantize,     &dequantize, &accumulate,       &rotate,
            &eigh, &squared_norm, &gram<typename Isa::Lanes>, &combine<typename Isa::Lanes>, Isa::Lanes::kLanes,
            &Soft<F>::forward, &Soft<F>::backward, &Soft<F>::nearest, &Soft<F>::prox};
  }
};
