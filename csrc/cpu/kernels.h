// The CPU kernels as ops.cpp sees them: one table of functions per instruction set, chosen at run time.
#pragma once
#include <cstdint>

namespace dynfed {

enum class DType { kFloat32, kBFloat16, kFloat16 };

struct QuantizeArgs {
  const void* x;
  DType dtype;
  int64_t n;
  int bits;
  int64_t bucket;
  uint64_t seed;
  uint64_t offset;
  bool stochastic;
  uint8_t* packed;
  float* scales;
};

struct Payload {  // one client's
  const uint8_t* packed;
  const float* scales;
  int bits;
  float weight;
};

struct DequantizeArgs {
  float* out;
  int64_t n;
  int64_t bucket;
  const Payload* payloads;
  int64_t count;
};

// Every function works on a range, so that threads can share a call. Ranges of elements begin at multiples of 64; ranges of
// buckets may begin anywhere. No function writes outside its range, nor reads outside the buffers.
struct Kernels {
  // Returns the bitwise or of the codes in [begin, end): too large a code shows as a high bit.
  unsigned (*pack)(const uint8_t* codes, uint8_t* packed, int bits, int64_t begin, int64_t end);
  void (*unpack)(const uint8_t* packed, uint8_t* codes, int bits, int64_t n, int64_t begin, int64_t end);
  void (*quantize)(const QuantizeArgs& args, int64_t first_bucket, int64_t last_bucket);
  void (*dequantize)(const DequantizeArgs& args, int64_t begin, int64_t end);  // the first payload alone
  void (*accumulate)(const DequantizeArgs& args, int64_t begin, int64_t end);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__) && !defined(__clang__)  // clang has no `#pragma GCC target`
#define DYNFED_X86 1
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace dynfed
