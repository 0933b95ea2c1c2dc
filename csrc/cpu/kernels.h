// The CPU kernels as ops.cpp sees them: one table of functions per instruction set, chosen at run time.
//
// A call is about a list of items: one vector, or the rows of a table. Laid end to end, each rounded up to whole blocks of 64
// elements and followed by a gap for what an item costs in itself, they form a line; every function works on a range of that
// line, so that threads share a call by elements and never by items. Ranges begin and end at multiples of 64. No function
// writes what another range writes, nor touches memory outside the buffers.
#pragma once
#include <cstdint>

#include "soft.h"

namespace dynfed {

constexpr int64_t kBlock = 64;

enum class Rounding { kNearest, kStochastic, kEden };

struct QuantizeItem {
  int64_t before;  // where the item begins on the line
  int64_t n;
  int64_t bucket;
  uint64_t offset;  // global index of the first element
  int bits;
  DType dtype;
  const void* x;
  uint8_t* packed;
  float* scales;
};

struct QuantizeArgs {  // a bucket belongs to the range that holds its first element
  const QuantizeItem* items;
  int64_t count;
  uint64_t seed;
  Rounding rounding;
};

struct Payload {
  const uint8_t* packed;
  const float* scales;
  int bits;
};

struct DequantizeItem {
  int64_t before;
  int64_t n;
  int64_t bucket;
  float* out;
  const Payload* payloads;  // one per client
};

struct DequantizeArgs {
  const DequantizeItem* items;
  int64_t count;
  const float* weights;  // one per client
  int64_t clients;
  bool stream;  // dequantise past the caches: `out` is larger than they are
};

struct RotateItem {
  int64_t before;
  int64_t n;
  int64_t size;    // of a block: rotate_size(n, block)
  uint64_t first;  // the number of the first element's group of eight
  float* x;
};

struct RotateArgs {  // a block belongs to the range that holds its first element; what follows the last one goes with it
  const RotateItem* items;
  int64_t count;
  uint64_t seed;
  bool inverse;
};

enum class Real { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t kEighMost = 256;  // the largest matrix
constexpr int64_t kEighLanes = 64;  // the largest that is computed together with others

constexpr int64_t kRowsWork = 1 << 15;  // doubles of scratch for products of up to kEighMost rows: a piece of all rows

struct EighArgs {
  const double* a;  // symmetric, [count, n, n]
  double* w;        // descending
  double* v;        // eigenvectors as columns
  int64_t n;        // 1 to kEighMost
};

struct Kernels {
  // Returns the bitwise or of the codes in [begin, end): too large a code shows as a high bit.
  unsigned (*pack)(const uint8_t* codes, uint8_t* packed, int bits, int64_t begin, int64_t end);
  void (*unpack)(const uint8_t* packed, uint8_t* codes, int bits, int64_t n, bool stream, int64_t begin, int64_t end);
  void (*quantize)(const QuantizeArgs& args, int64_t begin, int64_t end);
  void (*dequantize)(const DequantizeArgs& args, int64_t begin, int64_t end);  // the first payload of each item, unweighted
  void (*accumulate)(const DequantizeArgs& args, int64_t begin, int64_t end);
  void (*rotate)(const RotateArgs& args, int64_t begin, int64_t end);
  // Matrices begin to end; `work` has eigh_work(n, lanes) doubles, aligned to 64 bytes. Shared out in multiples of `lanes`.
  void (*symmetric_eigh)(const EighArgs& args, double* work, int64_t begin, int64_t end);
  double (*squared_norm)(const void* x, Real type, int64_t begin, int64_t end);  // of values begin to end
  // Of a matrix x [rows, columns] of float32 or float64, rows up to kEighMost, in float64: x x' [rows, rows], and t x
  // [count, columns] in the type of x, which may be x itself if count = rows. `work`: kRowsWork doubles, aligned to 64 bytes.
  void (*gram)(const void* x, Real type, int64_t rows, int64_t columns, double* out, double* work);
  void (*combine)(const double* t, int64_t count, const void* x, Real type, int64_t rows, int64_t columns, void* out,
                  double* work);
  int64_t lanes;
  // Learned centres, of a layer's values begin to end; begin is a multiple of kSoftBlock.
  void (*soft_quantize)(const SoftLayer& layer, int64_t begin, int64_t end);
  // For at most kSoftBlock values. Adds the sums of g (s_{j-1} - s_j) to sums [0, m), those of g s_j (1 - s_j) to sums [m, 2 m)
  // unless that is null.
  void (*soft_backward)(const SoftLayer& layer, int64_t begin, int64_t end, double* sums);
  void (*nearest)(const SoftLayer& layer, int64_t begin, int64_t end);
  void (*prox)(const SoftLayer& layer, int64_t begin, int64_t end);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__) && !defined(__clang__)  // clang has no `#pragma GCC target`
#define DYNFED_X86 1
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VbmiKernels;
#endif

}  // namespace dynfed
