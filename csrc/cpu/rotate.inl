// The blockwise randomised Hadamard transform of core/rotate.h over an instruction set `Isa`, which supplies
//   Vector, kLanes                       so many floats; a power of two
//   load_floats(p), store_floats(p, v), add(a, b), subtract(a, b), multiply(v, factor)
//   flip(v, bits)                        negates lane i if bit i of the bytes at `bits` is set
//   butterfly(v)                         the stages that pair lanes of one vector: half = 1, 2, .. kLanes / 2
// Stages between vectors go up to three at a time, on eight vectors in registers: a block passes through the nearest cache once
// for its first 8 * kLanes elements' stages and once for every further factor of eight.
// Included by kernels.inl.

// 12288 flips of one pass, kept from row to row: the groups of a table's small rows follow each other closely.
template <class Isa>
class Flips {
 public:
  explicit Flips(uint64_t seed, uint32_t pass) : seed_(seed), pass_(pass) {}
  // The bits of elements [i, i + size) of a pass that begins at group `first`; i and i + size lie in one byte if size < 8.
  const uint8_t* at(uint64_t first, int64_t i, int64_t size) {
    const uint64_t group = first + uint64_t(i >> 7), last = first + uint64_t((i + size - 1) >> 7);
    if (!filled_ || group < begin_ || last >= begin_ + kGroups) {
      Isa::template noise<8 * kGroups>(seed_, group, pass_, reinterpret_cast<uint16_t*>(bits_));
      begin_ = group;
      filled_ = true;
    }
    return bits_ + 16 * (group - begin_) + (i & 127) / 8;
  }

 private:
  static constexpr uint64_t kGroups = 96;
  static_assert(128 * kGroups >= uint64_t(kRotateBlock), "a block's flips fit");
  alignas(64) uint8_t bits_[16 * kGroups];
  uint64_t seed_, begin_ = 0;
  uint32_t pass_;
  bool filled_ = false;
};

// Any size, one element at a time: blocks smaller than a vector.
inline void rotate_small(float* x, int64_t size, const uint8_t* bits, int64_t shift, float factor, bool inverse) {
  const auto flip = [&](int64_t i) {
    const int64_t at = shift + i;
    return bit_cast<float>(bit_cast<uint32_t>(x[i]) ^ uint32_t(bits[at >> 3] >> (at & 7) & 1) << 31);
  };
  if (!inverse)
    for (int64_t i = 0; i < size; ++i) x[i] = flip(i);
  for (int64_t half = 1; half < size; half *= 2)
    for (int64_t j = 0; j < size; j += 2 * half)
      for (int64_t i = j; i < j + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
  for (int64_t i = 0; i < size; ++i) x[i] *= factor;
  if (inverse)
    for (int64_t i = 0; i < size; ++i) x[i] = flip(i);
}

// The stages between kVectors vectors `distance` floats apart; with kWithin those within each vector come first. Flips before
// all others if `before` is given; after the last stage (kLast) the factor, and flips if `after` is given. Bits are counted
// from `origin`.
template <class Isa, int kVectors, bool kWithin, bool kLast>
inline void rotate_vectors(float* x, int64_t distance, int64_t origin, const uint8_t* before, const uint8_t* after,
                           float factor) {
  typename Isa::Vector v[kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kVectors; ++r) {
    v[r] = Isa::load_floats(x + r * distance);
    if (kWithin) {
      if (before) v[r] = Isa::flip(v[r], before + (origin + r * distance) / 8);
      v[r] = Isa::butterfly(v[r]);
    }
  }
#pragma GCC unroll 3
  for (int half = 1; half < kVectors; half *= 2) {
#pragma GCC unroll 8
    for (int r = 0; r < kVectors; ++r) {
      if (r & half) continue;
      const auto a = v[r], b = v[r | half];
      v[r] = Isa::add(a, b);
      v[r | half] = Isa::subtract(a, b);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kVectors; ++r) {
    if (kLast) {
      v[r] = Isa::multiply(v[r], factor);
      if (after) v[r] = Isa::flip(v[r], after + (origin + r * distance) / 8);
    }
    Isa::store_floats(x + r * distance, v[r]);
  }
}

// One pass over a block: the stages half = `distance`, .. distance * kVectors / 2 (and those within vectors before them).
template <class Isa, int kVectors, bool kWithin, bool kLast>
void rotate_pass(float* x, int64_t size, int64_t distance, const uint8_t* before, const uint8_t* after, float factor) {
  for (int64_t j = 0; j < size; j += kVectors * distance)
    for (int64_t i = j; i < j + distance; i += Isa::kLanes)
      rotate_vectors<Isa, kVectors, kWithin, kLast>(x + i, distance, i, before, after, factor);
}

template <class Isa, bool kWithin, bool kLast>
void rotate_pass(int vectors, float* x, int64_t size, int64_t distance, const uint8_t* before, const uint8_t* after,
                 float factor) {
  switch (vectors) {
    case 1: return rotate_pass<Isa, 1, kWithin, kLast>(x, size, distance, before, after, factor);
    case 2: return rotate_pass<Isa, 2, kWithin, kLast>(x, size, distance, before, after, factor);
    case 4: return rotate_pass<Isa, 4, kWithin, kLast>(x, size, distance, before, after, factor);
    default: return rotate_pass<Isa, 8, kWithin, kLast>(x, size, distance, before, after, factor);
  }
}

// A block of `size` >= Isa::kLanes values; size < 8 * kLanes is one pass.
template <class Isa>
void rotate_block(float* x, int64_t size, const uint8_t* bits, float factor, bool inverse) {
  const uint8_t *const before = inverse ? nullptr : bits, *const after = inverse ? bits : nullptr;
  int64_t distance = Isa::kLanes, vectors = size / distance < 8 ? size / distance : 8;
  if (vectors * distance == size) return rotate_pass<Isa, true, true>(int(vectors), x, size, distance, before, after, factor);
  rotate_pass<Isa, true, false>(8, x, size, distance, before, after, factor);
  for (distance *= 8; 8 * distance < size; distance *= 8)
    rotate_pass<Isa, false, false>(8, x, size, distance, before, after, factor);
  rotate_pass<Isa, false, true>(int(size / distance), x, size, distance, before, after, factor);
}

template <class Isa>
void rotate_item(const RotateItem& item, int64_t from, int64_t to, Flips<Isa>& blocks, Flips<Isa>& tail, bool inverse) {
  const int64_t size = item.size, count = item.n / size;
  const float factor = rotate_factor(size);
  const auto rotate = [&](Flips<Isa>& flips, float* x, int64_t i) {
    const uint8_t* bits = flips.at(item.first, i, size);
    if (size >= Isa::kLanes && size >= 8) {
      rotate_block<Isa>(x, size, bits, factor, inverse);
    } else {
      rotate_small(x, size, bits, i & 7, factor, inverse);
    }
  };
  const auto rotate_tail = [&] {
    if (count * size < item.n) rotate(tail, item.x + item.n - size, 0);
  };
  int64_t block = (from + size - 1) / size, end = (to + size - 1) / size;
  if (end > count) end = count;
  const bool last = block < end && end == count;
  if (last && inverse) rotate_tail();
  for (; block < end; ++block) rotate(blocks, item.x + block * size, block * size);
  if (last && !inverse) rotate_tail();
}
