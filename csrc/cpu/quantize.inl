// Scales, codes and their packing, bucket by bucket, over an instruction set `Isa` (see kernels.inl, which includes this).

// The random bits of consecutive elements, made 1152 at a time: enough independent work to hide latencies, little enough to
// stay in the nearest cache. They are kept from row to row: the next row of a table goes on where this one ends.
template <class Isa>
class Noise {
 public:
  explicit Noise(uint64_t seed) : seed_(seed) {}
  // Makes the bits of the 64 elements from global index `index` on available, and returns how many blocks of 64 there are from
  // there, at most `wanted`.
  int64_t prepare(uint64_t index, int64_t wanted) {
    if (index < begin_ || index + kBlock > end_) refill(index);
    const int64_t blocks = int64_t(end_ - index) / kBlock;
    return blocks < wanted ? blocks : wanted;
  }
  const uint16_t* at(uint64_t index) const { return buffer_ + (index - begin_); }

 private:
  __attribute__((noinline)) void refill(uint64_t index) {
    begin_ = index & ~uint64_t(7);
    end_ = begin_ + kSize;
    Isa::template noise<kSize>(seed_, begin_ >> 3, 0, buffer_);
  }
  static constexpr int kSize = 1152;
  alignas(64) uint16_t buffer_[kSize];
  uint64_t seed_, begin_ = 1, end_ = 0;
};

// How a bucket's blocks become codes: `prepare(i, wanted)` says how many may follow from element i on, code<B>(x, i) is one's.
template <class Isa>
struct NearestCoder {
  float inverse;
  int64_t prepare(int64_t, int64_t wanted) { return wanted; }
  template <int B, class T>
  typename Isa::Codes code(const T* x, int64_t) {
    return Isa::template quantize64<B, false>(x, inverse, nullptr);
  }
};

template <class Isa>
struct StochasticCoder {
  float inverse;
  uint64_t index;  // of the bucket's first element
  Noise<Isa>& noise;
  int64_t prepare(int64_t i, int64_t wanted) { return noise.prepare(index + uint64_t(i), wanted); }
  template <int B, class T>
  typename Isa::Codes code(const T* x, int64_t i) {
    return Isa::template quantize64<B, true>(x, inverse, noise.at(index + uint64_t(i)));
  }
};

template <class Isa>
struct EdenCoder {
  float inverse, inverse_step;
  typename Isa::Sum dot{};
  int64_t prepare(int64_t, int64_t wanted) { return wanted; }
  template <int B, class T>
  typename Isa::Codes code(const T* x, int64_t) {
    return Isa::template eden64<B>(dot, x, inverse, inverse_step);
  }
};

// `count` < 64 elements, padded with zeros.
template <class T>
inline const T* padded(const T* x, int64_t count, T (&buffer)[kBlock]) {
  memset(buffer, 0, sizeof(buffer));
  memcpy(buffer, x, count * sizeof(T));
  return buffer;
}

// Calls f with every 64 elements of a bucket, the last padded with zeros.
template <class T, class F>
inline void for_blocks(const T* x, int64_t count, T (&buffer)[kBlock], const F& f) {
  const int64_t whole = count / kBlock * kBlock;
  for (int64_t i = 0; i < whole; i += kBlock) f(x + i);
  if (whole < count) f(padded(x + whole, count - whole, buffer));
}

// Codes of `count` <= 64 elements to `out`, and nothing behind them; unused bits of the last byte are zero.
template <class Isa, int B>
__attribute__((noinline)) void pack_part(const typename Isa::Codes& codes, int64_t count, uint8_t* out) {
  alignas(64) uint8_t bytes[kBlock + 16];
  Isa::template pack64<B>(codes, bytes);
  const int64_t bits = count * B;
  if (bits & 7) bytes[bits >> 3] = uint8_t(bytes[bits >> 3] & ((1 << (bits & 7)) - 1));
  memcpy(out, bytes, (bits + 7) / 8);
}

// Input is asked for this many bytes ahead of the block that is being coded. Without it memory would lie idle while the random
// bits are made, and at every page's end, where the hardware's own prefetching stops.
constexpr int64_t kAhead = 8192;

// Writes the codes of a bucket; `tail` holds its last elements, padded, where they fill no block (as for_blocks leaves it).
template <class Isa, int B, class T, class Coder>
inline void pack_bucket(const T* x, const T* tail, int64_t count, uint8_t* packed, const uint8_t* out_end, Coder& coder) {
  int64_t i = 0, whole = count / kBlock;  // blocks; those whose reach stays within the range's bytes
  while (whole > 0 && packed + (whole - 1) * 8 * B + kReach<B> > out_end) --whole;
  while (i < whole) {
    const int64_t stop = i + coder.prepare(i * kBlock, whole - i);
    for (; i < stop; ++i) {
      prefetch(reinterpret_cast<const uint8_t*>(x + i * kBlock) + kAhead, kBlock * sizeof(T));
      Isa::template pack64<B>(coder.template code<B>(x + i * kBlock, i * kBlock), packed + i * 8 * B);
    }
  }
  for (i *= kBlock; i < count; i += kBlock) {
    const int64_t here = count - i < kBlock ? count - i : kBlock;
    coder.prepare(i, 1);
    pack_part<Isa, B>(coder.template code<B>(here == kBlock ? x + i : tail, i), here, packed + i / 8 * B);
  }
}

// A bucket with NaN or infinity is coded as zeros: they convert without undefined behaviour, and its scale says what it is.
template <class Isa, int B>
void code_zeros(int64_t count, uint8_t* packed) {
  alignas(64) const float zeros[kBlock] = {};
  const auto codes = Isa::template quantize64<B, false>(zeros, 0.0f, nullptr);
  for (int64_t i = 0; i < count; i += kBlock)
    pack_part<Isa, B>(codes, count - i < kBlock ? count - i : kBlock, packed + i / 8 * B);
}

template <class Isa, class T, int B>
float eden_bucket(const T* x, T (&tail)[kBlock], int64_t count, uint32_t largest, uint8_t* packed, const uint8_t* out_end) {
  const float inverse = eden_inverse(largest);
  typename Isa::Sum energy{};
  for_blocks(x, count, tail, [&](const T* block) { Isa::energy64(energy, block, inverse); });
  const int64_t squares = Isa::total(energy);
  if constexpr (B == 1) {
    typename Isa::Sum sum{};
    for_blocks(x, count, tail, [&](const T* block) { Isa::total64(sum, block, inverse); });
    NearestCoder<Isa> coder{inverse};
    pack_bucket<Isa, B>(x, tail, count, packed, out_end, coder);
    return eden_scale(largest, squares, Isa::total(sum));
  } else {
    const float inverse_step = eden_inverse_step(largest, squares, count, B, [](float v) { return Isa::square_root(v); });
    EdenCoder<Isa> coder{inverse, inverse_step};
    pack_bucket<Isa, B>(x, tail, count, packed, out_end, coder);
    return eden_scale(largest, squares, Isa::total(coder.dot));
  }
}

// The buckets of an item that begin in [from, to).
template <class Isa, class T, int B>
void quantize_item(const QuantizeItem& a, Rounding rounding, Noise<Isa>& noise, int64_t from, int64_t to) {
  alignas(64) T tail[kBlock];
  const int64_t range_end = to < a.n ? (to + a.bucket - 1) / a.bucket * a.bucket : a.n;
  uint8_t* const out_end = a.packed + ((range_end < a.n ? range_end : a.n) * B + 7) / 8;
  int64_t k = from ? (from + a.bucket - 1) / a.bucket : 0;
  for (int64_t start = k * a.bucket; start < to; start += a.bucket, ++k) {
    const int64_t count = a.n - start < a.bucket ? a.n - start : a.bucket;
    const T* const x = static_cast<const T*>(a.x) + start;
    uint8_t* const packed = a.packed + start / 8 * B;
    typename Isa::Maximum maximum{};
    for_blocks(x, count, tail, [&](const T* block) { Isa::maximum64(maximum, block); });
    const uint32_t largest = Isa::reduce(maximum);
    const float inverse = bucket_inverse(largest, B);
    if (!is_finite_bucket(largest)) {
      a.scales[k] = quiet_nan();
      code_zeros<Isa, B>(count, packed);
    } else if (rounding == Rounding::kEden) {
      a.scales[k] = eden_bucket<Isa, T, B>(x, tail, count, largest, packed, out_end);
    } else if (B == 1) {
      typename Isa::Sum sum{};
      for_blocks(x, count, tail, [&](const T* block) { Isa::total64(sum, block, inverse); });
      a.scales[k] = one_bit_scale(largest, Isa::total(sum), count);
      NearestCoder<Isa> coder{inverse};
      pack_bucket<Isa, B>(x, tail, count, packed, out_end, coder);
    } else if (rounding == Rounding::kNearest) {
      a.scales[k] = bucket_scale(largest, B);
      NearestCoder<Isa> coder{inverse};
      pack_bucket<Isa, B>(x, tail, count, packed, out_end, coder);
    } else {
      a.scales[k] = bucket_scale(largest, B);
      StochasticCoder<Isa> coder{inverse, a.offset + uint64_t(start), noise};
      pack_bucket<Isa, B>(x, tail, count, packed, out_end, coder);
    }
  }
}
