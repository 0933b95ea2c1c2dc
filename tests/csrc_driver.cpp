// Runs every CPU kernel under the sanitizers: buffers of exactly the promised size, awkward sizes, all widths and dtypes, and
// every instruction set against the scalar one. Built and run by test_csrc.py; prints the number of cases.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/core/convert.h"
#include "../csrc/core/pack.h"
#include "../csrc/core/philox.h"
#include "../csrc/core/quantize.h"
#include "../csrc/cpu/kernels.h"

using namespace dynfed;

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("line %d: %s\n", __LINE__, #condition);                 \
      std::exit(1);                                                       \
    }                                                                     \
  } while (0)

template <class T>
struct Buffer {  // exactly `n` elements on the heap, so that the address sanitizer sees one too many
  explicit Buffer(int64_t n) : n(n), data(static_cast<T*>(std::malloc(n * sizeof(T)))) {}
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
  }
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

template <class T>
void kernels(const Kernels& k, DType dtype, int64_t n, int64_t bucket, int bits, bool stochastic) {
  const Kernels& scalar = kScalarKernels;
  const int64_t buckets = (n + bucket - 1) / bucket, bytes = (n * bits + 7) / 8, split = n / 128 * 64;
  Buffer<T> x(n);
  for (int64_t i = 0; i < n; ++i) x.data[i] = element<T>(i);
  Buffer<uint8_t> packed(bytes), packed2(bytes), codes(n), codes2(n);
  Buffer<float> scales(buckets), scales2(buckets), out(n), out2(n);
  QuantizeArgs q{x.data, dtype, n, bits, bucket, 0x123456789abcdefull, uint64_t(n % 3 * 5), stochastic, packed.data, scales.data};
  scalar.quantize(q, 0, buckets);
  q.packed = packed2.data;
  q.scales = scales2.data;
  k.quantize(q, buckets / 2, buckets);  // in two ranges, the later one first: neither may write into the other
  k.quantize(q, 0, buckets / 2);
  CHECK(packed == packed2 && scales == scales2);
  scalar.unpack(packed.data, codes.data, bits, n, 0, n);
  k.unpack(packed.data, codes2.data, bits, n, split, n);
  k.unpack(packed.data, codes2.data, bits, n, 0, split);
  CHECK(codes == codes2);
  CHECK((k.pack(codes.data, packed2.data, bits, split, n) | k.pack(codes.data, packed2.data, bits, 0, split)) < (1u << bits));
  CHECK(packed == packed2);
  for (int64_t i = 0; i < buckets; ++i) scales.data[i] = element<float>(i);
  const Payload payloads[2] = {{packed.data, scales.data, bits, 0.7f}, {packed2.data, scales.data, bits, -1.3f}};
  DequantizeArgs d{out.data, n, bucket, payloads, 2};
  scalar.dequantize(d, 0, n);
  scalar.accumulate(d, 0, n);
  d.out = out2.data;
  k.dequantize(d, split, n);
  k.dequantize(d, 0, split);
  k.accumulate(d, split, n);
  k.accumulate(d, 0, split);
  CHECK(out == out2);
  ++cases;
}

int main() {
  core();
  std::vector<const Kernels*> sets = {&kScalarKernels};
#ifdef DYNFED_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) sets.push_back(&kAvx2Kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    sets.push_back(&kAvx512Kernels);
#endif
  for (const Kernels* k : sets)
    for (int64_t n : {0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 200, 511, 512, 513, 1025, 2600})
      for (int64_t bucket : {8, 64, 72, 512, 4096})
        for (int bits = 1; bits <= 8; ++bits) {
          kernels<float>(*k, DType::kFloat32, n, bucket, bits, true);
          kernels<BFloat16>(*k, DType::kBFloat16, n, bucket, bits, false);
          kernels<Float16>(*k, DType::kFloat16, n, bucket, bits, true);
        }
  std::printf("%d cases, %d instruction sets\n", cases, int(sets.size()));
}
