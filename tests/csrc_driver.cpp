// Runs every CPU kernel under the sanitizers: buffers of exactly the promised size, awkward sizes, all widths and dtypes, single
// vectors and tables, and every instruction set against the scalar one. Built and run by test_csrc.py; prints the number of
// cases.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../csrc/core/convert.h"
#include "../csrc/core/eden.h"
#include "../csrc/core/eigh.h"
#include "../csrc/core/pack.h"
#include "../csrc/core/philox.h"
#include "../csrc/core/quantize.h"
#include "../csrc/core/rotate.h"
#include "../csrc/cpu/kernels.h"
#include "../csrc/cpu/soft_plan.h"

using namespace dynfed;

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("line %d: %s\n", __LINE__, #condition);                 \
      std::exit(1);                                                       \
    }                                                                     \
  } while (0)

template <class T>
struct Buffer {  // exactly `n` elements on the heap, so that the address sanitizer sees one too many; aligned as torch's
  explicit Buffer(int64_t n) : n(n), data(nullptr) {
    void* memory = nullptr;
    CHECK(posix_memalign(&memory, 64, n * sizeof(T)) == 0);
    data = static_cast<T*>(memory);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  bool operator==(const Buffer& o) const { return n == o.n && std::memcmp(data, o.data, n * sizeof(T)) == 0; }
  int64_t n;
  T* data;
};

uint64_t state = 1;
uint32_t next() { return philox4x32(42, uint32_t(state++), 0, 0, 0).word[0]; }

void core() {
  const PhiloxBlock zero = philox4x32(0, 0, 0, 0, 0);
  CHECK(zero.word[0] == 0x6627e8d5u && zero.word[1] == 0xe169c58du && zero.word[2] == 0xbc57ac4cu && zero.word[3] == 0x9b00dbd8u);
  const PhiloxBlock ones = philox4x32(~0ull, ~0u, ~0u, ~0u, ~0u);
  CHECK(ones.word[0] == 0x408f276du && ones.word[3] == 0x6d5451fdu);
  CHECK(random16(zero, 0) == 0xe8d5u && random16(zero, 1) == 0x6627u && random16(zero, 8 + 7) == 0x9b00u);
  CHECK(to_float(Float16{0x3c00}) == 1.0f && to_float(Float16{0x0001}) == std::ldexp(1.0f, -24) && to_float(Float16{0xfbff}) == -65504.0f);
  CHECK(std::isinf(to_float(Float16{0x7c00})) && std::isnan(to_float(Float16{0x7e00})) && to_float(BFloat16{0xbf80}) == -1.0f);
  CHECK(pack8<3>(0x0706050403020100ull) == 076543210u && unpack8<3>(076543210u) == 0x0706050403020100ull);
  for (int bits = 2; bits <= 8; ++bits) {
    const int top = (1 << bits) - 1, half = 1 << (bits - 1);
    for (float amax : {1e-29f, 1.0f, 0.3f, 3.4028234e38f}) {
      const float inverse = bucket_inverse(magnitude(amax), bits);
      for (uint32_t r : {0u, 1u, 32768u, 65535u}) {  // the rounded inverse may cost a full-scale value 2^-16 of a level
        CHECK(code_of(amax, inverse, r, bits) >= top - (r == 0) && code_of(-amax, inverse, r, bits) >= 1 && code_of(0.0f, inverse, r, bits) == half);
      }
    }
    CHECK(bucket_scale(magnitude(1e-30f), bits) == 0.0f && std::isnan(bucket_scale(kInfinityBits, bits)));
    CHECK(level_of(uint8_t(top), bits) == half - 1 && level_of(0, bits) == -half);
    // A bucket of the largest size, full of its largest magnitude: no sum overflows, and every value is exactly the scale.
    const int64_t unit = 1 << 20, energy = unit * unit * kEdenBucket;
    const float step = eden_inverse_step(magnitude(0.3f), energy, kEdenBucket, bits, [](float v) { return std::sqrt(v); });
    const int32_t level = eden_level(int32_t(unit), step, bits);
    CHECK(level >= 1 && level < half && eden_level(-int32_t(unit), step, bits) >= -half);
    CHECK(std::abs(eden_scale(magnitude(0.3f), energy, unit * level * kEdenBucket) * float(level) - 0.3f) < 1e-6f);
    CHECK(eden_scale(magnitude(1e-30f), 0, 0) == 0.0f && std::isnan(eden_scale(kInfinityBits, 0, 0)));
  }
  CHECK(rotate_size(1, 8192) == 1 && rotate_size(1023, 8192) == 512 && rotate_size(1 << 20, 1024) == 1024);
  CHECK(rotate_factor(1) == 1.0f && rotate_factor(2) == 0.70710678f && rotate_factor(4096) == 0.015625f);
}

template <class T>
T element(int64_t i);
template <>
float element<float>(int64_t i) {
  if (i % 97 == 5) return bit_cast<float>(next() & 0x807fffffu);  // denormal
  if (i % 31 == 3) return -0.0f;
  return float(int32_t(next())) * std::ldexp(1.0f, int(next() % 20) - 40);
}
template <>
BFloat16 element<BFloat16>(int64_t i) { return {uint16_t(bit_cast<uint32_t>(element<float>(i)) >> 16)}; }
template <>
Float16 element<Float16>(int64_t i) { return {uint16_t(i % 53 == 7 ? 0x7c00 : next() & 0xbfff)}; }

int cases = 0;

// A table of `count` rows of the given kind (one row is one vector), through the kernels `k`, in ranges, the later first; all that
// it writes, in buffers of exactly the right size.
template <class T>
struct Call {
  Call(const std::vector<int64_t>& lengths, int64_t bucket, int bits) : line(0) {
    int64_t values = 0, bytes = 0, buckets = 0;
    for (int64_t n : lengths) {
      const int width = 1 + (bits + int(starts.size())) % 8;
      starts.push_back({line, values, bytes, buckets, n, width});
      line += (n + kBlock - 1) / kBlock * kBlock;
      values += n;
      bytes += (n * width + 7) / 8;
      buckets += (n + bucket - 1) / bucket;
    }
    x.reset(new Buffer<T>(values));
    for (int64_t i = 0; i < values; ++i) x->data[i] = element<T>(i);
    scales.reset(new Buffer<float>(buckets));
    packed.reset(new Buffer<uint8_t>(bytes));
    out.reset(new Buffer<float>(values));
  }
  struct Row {
    int64_t before, value, byte, scale, n;
    int bits;
  };

  template <class F>
  void in_ranges(const F& f) const {
    const int64_t cut = line / 128 * kBlock;
    f(cut, line);
    f(0, cut);
  }
  void quantize(const Kernels& k, DType dtype, int64_t bucket, Rounding rounding) {
    std::vector<QuantizeItem> items;
    for (const Row& r : starts)
      items.push_back({r.before, r.n, bucket, uint64_t(r.value + 7) / 8 * 8 + r.n % 3 * 5, r.bits, dtype, x->data + r.value,
                       packed->data + r.byte, scales->data + r.scale});
    const QuantizeArgs args{items.data(), int64_t(items.size()), 0x123456789abcdefull, rounding};
    in_ranges([&](int64_t begin, int64_t end) { k.quantize(args, begin, end); });
  }
  // Values of this call's codes with `factors` for scales; then twice more onto them, from two clients.
  void dequantize(const Kernels& k, int64_t bucket, const Buffer<float>& factors) {
    std::vector<Payload> payloads;
    for (const Row& r : starts)
      for (int c = 0; c < 2; ++c) payloads.push_back({packed->data + r.byte, factors.data + r.scale, r.bits});
    std::vector<DequantizeItem> items;
    for (const Row& r : starts) items.push_back({r.before, r.n, bucket, out->data + r.value, &payloads[2 * items.size()]});
    const float weights[2] = {0.7f, -1.3f};
    const DequantizeArgs args{items.data(), int64_t(items.size()), weights, 2, cases % 2 == 0};
    in_ranges([&](int64_t begin, int64_t end) { k.dequantize(args, begin, end); });
    in_ranges([&](int64_t begin, int64_t end) { k.accumulate(args, begin, end); });
  }
  void rotate(const Kernels& k, int64_t block, bool inverse) {
    std::vector<RotateItem> items;
    for (const Row& r : starts)
      items.push_back({r.before, r.n, rotate_size(r.n, block), uint64_t(r.value + 7) / 8, out->data + r.value});
    const RotateArgs args{items.data(), int64_t(items.size()), 42, inverse};
    in_ranges([&](int64_t begin, int64_t end) { k.rotate(args, begin, end); });
  }

  int64_t line;
  std::vector<Row> starts;
  std::unique_ptr<Buffer<T>> x;
  std::unique_ptr<Buffer<uint8_t>> packed;
  std::unique_ptr<Buffer<float>> scales, out;
};

template <class T>
void kernels(const Kernels& k, DType dtype, const std::vector<int64_t>& lengths, int64_t bucket, int bits, Rounding rounding) {
  Call<T> expected(lengths, bucket, bits), got(lengths, bucket, bits);
  if (expected.x->n) std::memcpy(got.x->data, expected.x->data, expected.x->n * sizeof(T));
  expected.quantize(kScalarKernels, dtype, bucket, rounding);
  got.quantize(k, dtype, bucket, rounding);
  CHECK(*expected.packed == *got.packed && *expected.scales == *got.scales);
  Buffer<float> factors(expected.scales->n);
  for (int64_t i = 0; i < factors.n; ++i) factors.data[i] = element<float>(i);
  expected.dequantize(kScalarKernels, bucket, factors);
  got.dequantize(k, bucket, factors);
  CHECK(*expected.out == *got.out);
  for (bool inverse : {false, true}) {
    const int64_t block = int64_t(1) << (cases % 14);
    expected.rotate(kScalarKernels, block, inverse);
    got.rotate(k, block, inverse);
    CHECK(*expected.out == *got.out);
  }
  ++cases;
}

void packing(const Kernels& k, int64_t n, int bits) {
  const int64_t split = n / 128 * kBlock, bytes = (n * bits + 7) / 8;
  Buffer<uint8_t> codes(n), codes2(n), packed(bytes), packed2(bytes);
  for (int64_t i = 0; i < n; ++i) codes.data[i] = uint8_t(next() & ((1u << bits) - 1));
  kScalarKernels.pack(codes.data, packed.data, bits, 0, n);
  CHECK((k.pack(codes.data, packed2.data, bits, split, n) | k.pack(codes.data, packed2.data, bits, 0, split)) < (1u << bits));
  CHECK(packed == packed2);
  k.unpack(packed.data, codes2.data, bits, n, cases % 2 == 0, split, n);
  k.unpack(packed.data, codes2.data, bits, n, cases % 2 == 0, 0, split);
  CHECK(codes == codes2);
  for (int64_t i = 0; i < n; ++i) codes.data[i] = uint8_t(next());  // too large: seen, and nothing else is touched
  unsigned all = 0;
  for (int64_t i = 0; i < n; ++i) all |= codes.data[i];
  CHECK((k.pack(codes.data, packed2.data, bits, split, n) | k.pack(codes.data, packed2.data, bits, 0, split)) == all);
  ++cases;
}

// Symmetric eigenproblems, Grams and combinations of rows, and norms, against plain sums; buffers begin `shift` doubles past an
// aligned address, and scratch holds rubbish.
void dense(const Kernels& k, int64_t n, int64_t batch, int64_t shift) {
  const int64_t size = n * n, columns = n == 1 ? 9001 : 2 * n + 5;  // 9001: more than a piece
  Buffer<float> x(batch * n * columns + shift), y(batch * n * columns + shift);
  Buffer<double> a(batch * size + shift), w(batch * n + shift), v(batch * size + shift);
  Buffer<double> work(std::max(eigh_work(n, k.lanes), kRowsWork));
  for (int64_t i = 0; i < work.n; ++i) work.data[i] = i % 3 == 0 ? NAN : 1e300;
  for (int64_t i = 0; i < x.n; ++i) x.data[i] = float(int32_t(next())) * 0x1p-31f;
  const double scale = double(columns), tolerance = 1e-12 * scale;
  for (int64_t b = 0; b < batch; ++b) {
    const float* const from = x.data + shift + b * n * columns;
    double* const gram = a.data + shift + b * size;
    k.gram(from, Real::kFloat32, n, columns, gram, work.data);
    double squares = 0.0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0.0;
        for (int64_t c = 0; c < columns; ++c) sum += double(from[i * columns + c]) * double(from[j * columns + c]);
        CHECK(std::abs(gram[i * n + j] - sum) <= tolerance && gram[i * n + j] == gram[j * n + i]);
        squares += i == j ? sum : 0.0;
      }
    CHECK(std::abs(k.squared_norm(from, Real::kFloat32, 0, n * columns) - squares) <= 1e-12 * squares);
    k.combine(gram, n, from, Real::kFloat32, n, columns, y.data + shift + b * n * columns, work.data);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < columns; ++c) {
        double sum = 0.0;
        for (int64_t j = 0; j < n; ++j) sum += gram[i * n + j] * double(from[j * columns + c]);
        CHECK(std::abs(y.data[shift + (b * n + i) * columns + c] - sum) <= 1e-6 * scale);
      }
  }
  for (int64_t i = 0; i < work.n; ++i) work.data[i] = i % 3 == 0 ? NAN : 1e300;
  k.symmetric_eigh({a.data + shift, w.data + shift, v.data + shift, n}, work.data, 0, batch);
  for (int64_t b = 0; b < batch; ++b) {
    const double *gram = a.data + shift + b * size, *values = w.data + shift + b * n, *vectors = v.data + shift + b * size;
    for (int64_t i = 0; i < n; ++i) {
      CHECK(i == 0 || values[i - 1] >= values[i]);
      for (int64_t r = 0; r < n; ++r) {
        double product = -values[i] * vectors[r * n + i], dot = i == r ? -1.0 : 0.0;
        for (int64_t j = 0; j < n; ++j) product += gram[r * n + j] * vectors[j * n + i], dot += vectors[j * n + i] * vectors[j * n + r];
        CHECK(std::abs(product) <= 1e-11 * scale * double(n) && std::abs(dot) <= 1e-11);
      }
    }
  }
  // In doubles, and in place.
  Buffer<double> t(size), z(n * n);
  for (int64_t i = 0; i < size; ++i) t.data[i] = (i % (n + 1) == 0) * 2.0, z.data[i] = a.data[shift + i];
  k.combine(t.data, n, z.data, Real::kFloat64, n, n, z.data, work.data);
  for (int64_t i = 0; i < size; ++i) CHECK(z.data[i] == 2.0 * a.data[shift + i]);
  ++cases;
}

// From float and back, for all dtypes.
float narrowed(float v, float) { return v; }
BFloat16 narrowed(float v, BFloat16) { return to_bfloat16(v); }
Float16 narrowed(float v, Float16) { return to_float16(v); }

// Learned centres: nearest ones and proximal steps as the scalar kernels, soft values and gradients as sums in double; buffers
// begin `shift` values past an aligned address. Then centres in no order, and no numbers: nothing but memory safety is asked.
template <class T>
void soft(const Kernels& k, DType dtype, int64_t n, int64_t m, double sharpness, int64_t shift) {
  Buffer<T> x(n + shift), grad(n + shift), out(n + shift), other(n + shift);
  Buffer<uint8_t> index(n + shift), index2(n + shift);
  Buffer<float> c(m);
  Buffer<double> sums(2 * m);
  for (int64_t j = 0; j < m; ++j) c.data[j] = (float(j) + float(next() % 1000) * 0.0009f) / float(m) - 0.5f;
  for (int64_t i = 0; i < x.n; ++i) {
    const float v = i % 29 == 3 ? NAN : i % 31 == 4 ? -INFINITY : i % 37 == 5 ? 6e4f : float(int32_t(next())) * 0x1p-31f;
    x.data[i] = narrowed(i % 23 == 6 ? c.data[next() % m] : v, T());
    grad.data[i] = narrowed(float(int32_t(next())) * 0x1p-31f, T());
  }
  SoftPlan plan;
  NearestPlan places;
  plan_soft(c.data, m, sharpness, plan);
  plan_nearest(c.data, m, 0.05, places);
  const auto in_ranges = [&](const auto& f) {  // the later first
    for (int64_t begin = (n - 1) / kSoftBlock * kSoftBlock; begin >= 0; begin -= kSoftBlock)
      f(begin, begin + kSoftBlock < n ? begin + kSoftBlock : n);
  };
  const auto layer = [&](Buffer<T>* to, Buffer<uint8_t>* numbers) {
    return SoftLayer{n, dtype, cases % 2 == 0, x.data + shift, grad.data + shift, to == nullptr ? nullptr : to->data + shift,
                     numbers == nullptr ? nullptr : numbers->data + shift, &plan, &places};
  };
  for (int64_t i = 0; i < shift; ++i) out.data[i] = other.data[i] = T(), index.data[i] = index2.data[i] = 0;
  in_ranges([&](int64_t begin, int64_t end) { k.nearest(layer(&out, &index), begin, end); });
  in_ranges([&](int64_t begin, int64_t end) { kScalarKernels.nearest(layer(&other, &index2), begin, end); });
  const auto same = [&] {
    for (int64_t i = 0; i < out.n; ++i) {
      const float a = to_float(out.data[i]), b = to_float(other.data[i]);
      if (!(a == b || (a != a && b != b))) return false;
    }
    return true;
  };
  CHECK(index == index2 && same());
  in_ranges([&](int64_t begin, int64_t end) { k.nearest(layer(nullptr, &index), begin, end); });
  in_ranges([&](int64_t begin, int64_t end) { k.prox(layer(&out, nullptr), begin, end); });
  in_ranges([&](int64_t begin, int64_t end) { kScalarKernels.prox(layer(&other, nullptr), begin, end); });
  CHECK(index == index2 && same());
  // The soft quantiser, on finite values: a NaN belongs to every sum.
  for (int64_t i = 0; i < x.n; ++i)
    if (!std::isfinite(to_float(x.data[i]))) x.data[i] = narrowed(0.25f, T());
  for (int64_t j = 0; j < 2 * m; ++j) sums.data[j] = 0.0;
  in_ranges([&](int64_t begin, int64_t end) { k.soft_quantize(layer(&out, nullptr), begin, end); });
  in_ranges([&](int64_t begin, int64_t end) { k.soft_backward(layer(&other, nullptr), begin, end, sums.data); });
  const double unit = dtype == DType::kFloat32 ? 1e-6 : dtype == DType::kFloat16 ? 1e-3 : 8e-3;
  double steepest = 0.0;
  for (int64_t j = 0; j + 1 < m; ++j) steepest += sharpness * (double(c.data[j + 1]) - double(c.data[j])) * 0.25;
  Buffer<double> exact(2 * m);
  for (int64_t j = 0; j < 2 * m; ++j) exact.data[j] = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double v = to_float(x.data[i + shift]), g = to_float(grad.data[i + shift]);
    double value = c.data[0], slope = 0.0, before = 1.0;
    for (int64_t j = 0; j + 1 < m; ++j) {
      const double gap = double(c.data[j + 1]) - double(c.data[j]), mid = 0.5 * (double(c.data[j + 1]) + double(c.data[j]));
      const double s = 1.0 / (1.0 + std::exp(-sharpness * (v - mid)));
      value += gap * s, slope += sharpness * gap * s * (1.0 - s);
      exact.data[j] += g * (before - s), exact.data[m + j] += g * s * (1.0 - s), before = s;
    }
    exact.data[m - 1] += g * before;
    CHECK(std::abs(to_float(out.data[i + shift]) - value) <= unit);
    CHECK(std::abs(to_float(other.data[i + shift]) - g * slope) <= unit * (steepest + 1.0));
  }
  for (int64_t j = 0; j < 2 * m; ++j) CHECK(std::abs(sums.data[j] - exact.data[j]) <= 1e-6 * double(n));
  for (int64_t j = 0; j < 2 * m; ++j) exact.data[j] = sums.data[j], sums.data[j] = 0.0;  // one thing alone is the same bits
  in_ranges([&](int64_t begin, int64_t end) { k.soft_backward(layer(nullptr, nullptr), begin, end, sums.data); });
  CHECK(sums == exact);
  in_ranges([&](int64_t begin, int64_t end) { k.soft_backward(layer(&out, nullptr), begin, end, nullptr); });
  CHECK(same());
  for (int64_t j = 0; j < m; ++j) c.data[j] = j % 5 == 3 ? NAN : j % 7 == 2 ? INFINITY : element<float>(j);
  plan_soft(c.data, m, sharpness, plan);
  plan_nearest(c.data, m, sharpness, places);
  in_ranges([&](int64_t begin, int64_t end) { k.soft_quantize(layer(&out, nullptr), begin, end); });
  in_ranges([&](int64_t begin, int64_t end) { k.soft_backward(layer(&out, nullptr), begin, end, sums.data); });
  in_ranges([&](int64_t begin, int64_t end) { k.prox(layer(&out, &index), begin, end); });
  ++cases;
}

// Rounding to half precision: what a value goes to is the nearest of it and its neighbours, to even.
void rounding() {
  CHECK(to_bfloat16(1.00390625f).bits == 0x3f80 && to_bfloat16(1.01171875f).bits == 0x3f82 && to_bfloat16(3.4e38f).bits == 0x7f80);
  CHECK(to_float16(65519.0f).bits == 0x7bff && to_float16(65520.0f).bits == 0x7c00 && to_float16(-INFINITY).bits == 0xfc00);
  CHECK(to_float16(0x1p-25f).bits == 0 && to_float16(0x1.8p-25f).bits == 1 && to_float16(-0x1.8p-24f).bits == 0x8002);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const BFloat16 b{uint16_t(bits)};
    const Float16 h{uint16_t(bits)};
    CHECK(std::isnan(to_float(b)) ? std::isnan(to_float(to_bfloat16(to_float(b)))) : to_bfloat16(to_float(b)).bits == bits);
    CHECK(std::isnan(to_float(h)) ? std::isnan(to_float(to_float16(to_float(h)))) : to_float16(to_float(h)).bits == bits);
  }
}

int main() {
  core();
  std::vector<const Kernels*> sets = {&kScalarKernels};
#ifdef DYNFED_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) sets.push_back(&kAvx2Kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    sets.push_back(&kAvx512Kernels);
    if (__builtin_cpu_supports("avx512vbmi")) sets.push_back(&kAvx512VbmiKernels);
  }
#endif
  std::vector<std::vector<int64_t>> tables = {{}, {5, 0, 64, 1, 700, 8, 63, 65, 0}, {1, 1, 1, 130, 1, 1, 1, 2, 3, 4, 5, 6, 7, 1, 1, 1}};
  for (int64_t n : {0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 200, 511, 512, 513, 1025, 2600}) tables.push_back({n});
  for (const Kernels* k : sets)
    for (const auto& lengths : tables)
      for (int bits = 1; bits <= 8; ++bits) {
        for (int64_t bucket : {8, 64, 72, 512, 4096}) {
          kernels<float>(*k, DType::kFloat32, lengths, bucket, bits, Rounding::kStochastic);
          kernels<float>(*k, DType::kFloat32, lengths, bucket, bits, Rounding::kEden);
          kernels<BFloat16>(*k, DType::kBFloat16, lengths, bucket, bits, Rounding::kNearest);
          kernels<Float16>(*k, DType::kFloat16, lengths, bucket, bits, Rounding::kStochastic);
          kernels<Float16>(*k, DType::kFloat16, lengths, bucket, bits, Rounding::kEden);
        }
        if (lengths.size() == 1) packing(*k, lengths[0], bits);
      }
  for (const Kernels* k : sets)
    for (int64_t n : {1, 2, 3, 16, 33, 64, 96})
      for (int64_t batch : {1, 3, 8, 9})
        if (n <= 33 || batch == 1 || batch == 9) dense(*k, n, batch, batch % 2 * 3);
  rounding();
  for (const Kernels* k : sets)
    for (int64_t n : {1, 15, 64, 65, 517, 2600, 8200})
      for (int64_t m : {1, 2, 16, 17, 33, 256}) {
        if (n > 2600 && m > 17) continue;  // each value costs m exponentials here
        soft<float>(*k, DType::kFloat32, n, m, n % 2 == 0 ? 7.0 : 300.0, m % 2 * 3);
        soft<BFloat16>(*k, DType::kBFloat16, n, m, 20.0, 1);
        soft<Float16>(*k, DType::kFloat16, n, m, 20.0, 0);
      }
  std::printf("%d cases, %d instruction sets\n", cases, int(sets.size()));
}
