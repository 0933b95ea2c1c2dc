// The kernels, written once over an instruction set `Isa` (scalar.cpp, avx2.cpp, avx512.cpp), which handles 64 elements:
//   Codes                                        64 bytes, a code each
//   noise64(seed, group, out)                    the random bits of 64 elements from element 8 * group on
//   magnitude64(x) -> uint32                     the largest of 64 magnitudes
//   quantize64<B>(x, inverse, noise) -> Codes    see core/quantize.h
//   total64(x, inverse) -> int64                 the sum of 64 |fixed_point|
//   pack64<B>(Codes, out), unpack64<B>(in)       may touch kReach<B> bytes, of which 8 * B count
//   dequantize64<B>(Codes, scale, out), accumulate64<B>(Codes, factor, out), load(p), store(p, Codes), any(Codes)
// Included inside an anonymous namespace: nothing here may be shared between instruction sets.

constexpr int kBlock = 64;

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

// The random bits of consecutive elements, made 1024 at a time: enough independent work to hide latencies, little enough to
// stay in the nearest cache.
template <class Isa>
class Noise {
 public:
  Noise(uint64_t seed, bool stochastic) : seed_(seed), stochastic_(stochastic) {
    if (!stochastic_)
      for (auto& value : buffer_) value = uint16_t(kNearest);
  }
  // 64 values, for the elements from global index `index` on.
  const uint16_t* at(uint64_t index) {
    if (!stochastic_) return buffer_;
    if (index < begin_ || index + kBlock > end_) refill(index);
    return buffer_ + (index - begin_);
  }

 private:
  __attribute__((noinline)) void refill(uint64_t index) {
    begin_ = index & ~uint64_t(7);
    end_ = begin_ + kSize;
    Isa::template noise<kSize>(seed_, begin_ >> 3, buffer_);
  }
  static constexpr int kSize = 1024;
  alignas(64) uint16_t buffer_[kSize];
  uint64_t seed_, begin_ = 1, end_ = 0;
  bool stochastic_;
};

// `count` < 64 elements, padded with zeros.
template <class T>
inline const T* padded(const T* x, int64_t count, T (&buffer)[kBlock]) {
  memset(buffer, 0, sizeof(buffer));
  memcpy(buffer, x, count * sizeof(T));
  return buffer;
}

template <class Isa, class T, int B>
void quantize_range(const QuantizeArgs& a, int64_t first_bucket, int64_t last_bucket) {
  Noise<Isa> noise(a.seed, B > 1 && a.stochastic);
  const T* const all = static_cast<const T*>(a.x);
  const int64_t range_end = last_bucket * a.bucket < a.n ? last_bucket * a.bucket : a.n;
  uint8_t* const out_end = a.packed + (range_end * B + 7) / 8;
  alignas(64) T tail[kBlock];
  for (int64_t k = first_bucket; k < last_bucket; ++k) {
    const int64_t start = k * a.bucket;
    const int64_t count = a.n - start < a.bucket ? a.n - start : a.bucket;
    const int64_t whole = count / kBlock * kBlock, rest = count - whole;
    const T* x = all + start;
    uint32_t largest = 0;
    {
      typename Isa::Maximum maximum{};
      for (int64_t i = 0; i < whole; i += kBlock) Isa::maximum64(maximum, x + i);
      if (rest) Isa::maximum64(maximum, padded(x + whole, rest, tail));
      largest = Isa::reduce(maximum);
    }
    const float inverse = bucket_inverse(largest, B);
    const bool finite = is_finite_bucket(largest);
    if (B == 1) {
      int64_t total = 0;
      if (finite) {
        for (int64_t i = 0; i < whole; i += kBlock) total += Isa::total64(x + i, inverse);
        if (rest) total += Isa::total64(padded(x + whole, rest, tail), inverse);
      }
      a.scales[k] = one_bit_scale(largest, total, count);
    } else {
      a.scales[k] = bucket_scale(largest, B);
    }
    for (int64_t i = 0; i < count; i += kBlock) {
      uint8_t* out = a.packed + (start + i) / 8 * B;
      const int64_t here = count - i < kBlock ? count - i : kBlock;
      const T* from = here == kBlock ? x + i : padded(x + i, here, tail);
      // A bucket with NaN or infinity: no code is promised, but zeros convert without undefined behaviour.
      if (!finite) from = padded(x, 0, tail);
      const auto codes = Isa::template quantize64<B>(from, inverse, noise.at(a.offset + uint64_t(start + i)));
      if (here == kBlock && out + kReach<B> <= out_end) {
        Isa::template pack64<B>(codes, out);
      } else {
        alignas(64) uint8_t bytes[kBlock + 16], clean[kBlock];
        Isa::store(clean, codes);
        memset(clean + here, 0, kBlock - here);  // unused bits of the last byte are zero
        Isa::template pack64<B>(Isa::load(clean), bytes);
        memcpy(out, bytes, (here * B + 7) / 8);
      }
    }
  }
}

// Values into `out`, or times a weight onto `out`; begin is a multiple of 8.
template <class Isa, int B, bool kAccumulate>
void dequantize_range(const DequantizeArgs& a, const Payload& p, int64_t begin, int64_t end) {
  const uint8_t* const in_end = p.packed + (a.n * B + 7) / 8;
  for (int64_t i = begin; i < end;) {
    const int64_t k = i / a.bucket;
    const int64_t stop = (k + 1) * a.bucket < end ? (k + 1) * a.bucket : end;
    const float factor = kAccumulate ? p.scales[k] * p.weight : p.scales[k];
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
  static void quantize(const QuantizeArgs& a, int64_t first, int64_t last) {
    switch (a.dtype) {
      case DType::kFloat32: DYNFED_FOR_BITS(a.bits, (quantize_range<Isa, float, B>(a, first, last))) break;
      case DType::kBFloat16: DYNFED_FOR_BITS(a.bits, (quantize_range<Isa, BFloat16, B>(a, first, last))) break;
      case DType::kFloat16: DYNFED_FOR_BITS(a.bits, (quantize_range<Isa, Float16, B>(a, first, last))) break;
    }
  }
  static void dequantize(const DequantizeArgs& a, int64_t begin, int64_t end) {
    DYNFED_FOR_BITS(a.payloads[0].bits, (dequantize_range<Isa, B, false>(a, a.payloads[0], begin, end)))
  }
  // All clients on one piece of `out` before the next: it stays in the nearest cache, so memory sees one pass.
  static void accumulate(const DequantizeArgs& a, int64_t begin, int64_t end) {
    constexpr int64_t kPiece = 2048;
    for (int64_t i = begin; i < end; i += kPiece) {
      const int64_t stop = i + kPiece < end ? i + kPiece : end;
      for (int64_t c = 0; c < a.count; ++c) {
        const Payload& p = a.payloads[c];
        DYNFED_FOR_BITS(p.bits, (dequantize_range<Isa, B, true>(a, p, i, stop)))
      }
    }
  }
  static constexpr Kernels make() { return {&pack, &unpack, &quantize, &dequantize, &accumulate}; }
};
