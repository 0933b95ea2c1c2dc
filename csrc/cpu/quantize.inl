// Scales, codes and their packing, bucket by bucket, over an instruction set `Isa` (see kernels.inl, which includes this).

// The random bits of consecutive elements, made up to 1024 at a time: enough independent work to hide latencies, little enough
// to stay in the nearest cache. They are kept from row to row: the next row of a table goes on where this one ends.
template <class Isa>
class Noise {
 public:
  explicit Noise(uint64_t seed) : seed_(seed) {}
  // 64 values, for the elements from global index `index` on.
  const uint16_t* at(uint64_t index) {
    if (index < begin_ || index + kBlock > end_) refill(index);
    return buffer_ + (index - begin_);
  }

 private:
  __attribute__((noinline)) void refill(uint64_t index) {
    begin_ = index & ~uint64_t(7);
    end_ = begin_ + kSize;
    Isa::template noise<kSize>(seed_, begin_ >> 3, 0, buffer_);
  }
  static constexpr int kSize = 1024;
  alignas(64) uint16_t buffer_[kSize];
  uint64_t seed_, begin_ = 1, end_ = 0;
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

// Writes the codes that `code` gives for every 64 elements of a bucket; code(from, i) returns those of the elements from i on.
template <class Isa, int B, class T, class F>
inline void pack_bucket(const T* x, int64_t count, uint8_t* packed, const uint8_t* out_end, const F& code) {
  for (int64_t i = 0; i < count; i += kBlock) {
    uint8_t* const out = packed + i / 8 * B;
    const int64_t here = count - i < kBlock ? count - i : kBlock;
    alignas(64) T tail[kBlock];
    const auto codes = code(here == kBlock ? x + i : padded(x + i, here, tail), i);
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

// A bucket with NaN or infinity is coded as zeros: they convert without undefined behaviour, and its scale says what it is.
template <class Isa, class T, int B>
inline void code_zeros(int64_t count, uint8_t* packed, const uint8_t* out_end, const uint16_t* noise) {
  alignas(64) T zeros[kBlock] = {};
  const auto codes = Isa::template quantize64<B>(static_cast<const T*>(zeros), 0.0f, noise);
  for (int64_t i = 0; i < count; i += kBlock)
    pack_bucket<Isa, B>(static_cast<const T*>(zeros), count - i < kBlock ? count - i : kBlock, packed + i / 8 * B, out_end,
                        [&](const T*, int64_t) { return codes; });
}

template <class Isa, class T, int B>
inline float eden_bucket(const T* x, int64_t count, uint32_t largest, uint8_t* packed, const uint8_t* out_end) {
  alignas(64) T tail[kBlock];
  const float inverse = eden_inverse(largest);
  typename Isa::Sum energy{}, dot{};
  for_blocks(x, count, tail, [&](const T* from) { Isa::energy64(energy, from, inverse); });
  const int64_t squares = Isa::total(energy);
  if constexpr (B == 1) {
    for_blocks(x, count, tail, [&](const T* from) { Isa::total64(dot, from, inverse); });
    pack_bucket<Isa, B>(x, count, packed, out_end,
                        [&](const T* from, int64_t) { return Isa::template quantize64<B>(from, inverse, nullptr); });
  } else {
    const float inverse_step = eden_inverse_step(largest, squares, count, B, [](float v) { return Isa::square_root(v); });
    pack_bucket<Isa, B>(x, count, packed, out_end,
                        [&](const T* from, int64_t) { return Isa::template eden64<B>(dot, from, inverse, inverse_step); });
  }
  return eden_scale(largest, squares, Isa::total(dot));
}

// The buckets of an item that begin in [from, to).
template <class Isa, class T, int B>
void quantize_item(const QuantizeItem& a, Rounding rounding, Noise<Isa>& noise, int64_t from, int64_t to) {
  const T* const all = static_cast<const T*>(a.x);
  alignas(64) T tail[kBlock];
  alignas(64) uint16_t nearest[kBlock];
  for (auto& value : nearest) value = uint16_t(kNearest);
  const int64_t first = (from + a.bucket - 1) / a.bucket, last = (to + a.bucket - 1) / a.bucket;
  const int64_t range_end = last < (a.n + a.bucket - 1) / a.bucket ? last * a.bucket : a.n;
  uint8_t* const out_end = a.packed + (range_end * B + 7) / 8;
  for (int64_t k = first; k < last; ++k) {
    const int64_t start = k * a.bucket, count = a.n - start < a.bucket ? a.n - start : a.bucket;
    const T* const x = all + start;
    uint8_t* const packed = a.packed + start / 8 * B;
    typename Isa::Maximum maximum{};
    for_blocks(x, count, tail, [&](const T* block) { Isa::maximum64(maximum, block); });
    const uint32_t largest = Isa::reduce(maximum);
    if (!is_finite_bucket(largest)) {
      a.scales[k] = quiet_nan();
      code_zeros<Isa, T, B>(count, packed, out_end, nearest);
      continue;
    }
    if (rounding == Rounding::kEden) {
      a.scales[k] = eden_bucket<Isa, T, B>(x, count, largest, packed, out_end);
      continue;
    }
    const float inverse = bucket_inverse(largest, B);
    if (B == 1) {
      typename Isa::Sum sum{};
      for_blocks(x, count, tail, [&](const T* block) { Isa::total64(sum, block, inverse); });
      a.scales[k] = one_bit_scale(largest, Isa::total(sum), count);
    } else {
      a.scales[k] = bucket_scale(largest, B);
    }
    if (B > 1 && rounding == Rounding::kStochastic) {
      const uint64_t index = a.offset + uint64_t(start);
      pack_bucket<Isa, B>(x, count, packed, out_end, [&](const T* block, int64_t i) {
        return Isa::template quantize64<B>(block, inverse, noise.at(index + uint64_t(i)));
      });
    } else {
      pack_bucket<Isa, B>(x, count, packed, out_end, [&](const T* block, int64_t) {
        return Isa::template quantize64<B>(block, inverse, nearest);
      });
    }
  }
}
