// The randomised Hadamard transform, in place: a thread block transforms 8192 neighbouring values, in registers, by shuffles,
// and with one exchange through shared memory. Shorter transforms skip the last levels.
//
// Pairs are added level by level, at distance 1, 2, 4, .. 4096, as the reference does. Bit by bit, the position of a value is
//   before the exchange:  warp (3)   vector (3)  lane (5)  place in the vector (2)
//   after it:             vector (3)  warp (3)   lane (5)  place in the vector (2)
// so that either way the 32 lanes' vectors of four are 128 neighbours, which share one Philox block of signs.
#include "../core/rotate.h"
#include "device.cuh"

namespace dynfed::cuda {
namespace {

constexpr int kVector = 4;
constexpr int kVectors = 8;
constexpr int kRun = kWarp * kVector;  // 128 neighbours
constexpr int kChunk = kWarps * kVectors * kRun;
static_assert(kChunk == kRotateBlock, "a thread block holds the largest transform");

struct RotateItem {
  float* x;
  int64_t n;  // whole transforms
  uint64_t first;
  int64_t end;
  int32_t size;
  float factor;
};

struct RotateList {
  static constexpr int kCapacity = 100;
  RotateItem item[kCapacity];
  uint64_t seed;
  int64_t units;
  int32_t count;
  uint32_t pass;
  int32_t inverse;
};
static_assert(sizeof(RotateList) <= kParameterBytes, "a list is passed as parameters");

using Values = float[kVectors][kVector];

__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float sum = __fadd_rn(a, b), difference = __fsub_rn(a, b);
  a = sum, b = difference;
}

// Pairs of vectors at distance 1, 2, 4, which are `run` values apart.
__device__ __forceinline__ void vector_levels(Values& v, int run, int size) {
#pragma unroll
  for (int half = 1; half < kVectors; half *= 2) {
    if (half * run >= size) return;
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      if ((k & half) == 0) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) butterfly(v[k][i], v[k | half][i]);
      }
  }
}

__device__ __forceinline__ void levels_within_run(Values& v, int size) {
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    if (size > 1) butterfly(v[k][0], v[k][1]), butterfly(v[k][2], v[k][3]);
    if (size > 2) butterfly(v[k][0], v[k][2]), butterfly(v[k][1], v[k][3]);
  }
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    if (lanes * kVector >= size) return;
    const bool upper = (lane_id() & lanes) != 0;
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float other = __shfl_xor_sync(kAllLanes, v[k][i], lanes);
        v[k][i] = __fadd_rn(other, upper ? -v[k][i] : v[k][i]);
      }
  }
}

// Where vector k of this warp begins in the chunk.
__device__ __forceinline__ int run_of(int k, bool exchanged) {
  return exchanged ? k * kWarps + warp_id() : warp_id() * kVectors + k;
}

// Flips signs. Each lane computes one word of the eight Philox blocks that the warp needs.
__device__ __forceinline__ void flip(Values& v, const RotateItem& item, uint64_t seed, int64_t begin, uint32_t pass,
                                     bool exchanged) {
  const int lane = lane_id();
  const uint64_t block = uint64_t(begin) / kRun + uint64_t(run_of(lane / 4, exchanged));
  const PhiloxBlock flips = rotate_flips(seed, item.first, block, pass);
  const uint32_t low = lane & 1 ? flips.word[1] : flips.word[0], high = lane & 1 ? flips.word[3] : flips.word[2];
  const uint32_t word = lane & 2 ? high : low;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const uint32_t bits = __shfl_sync(kAllLanes, word, 4 * k + lane / 8) >> (lane % 8 * kVector);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[k][i] = bit_cast<float>(bit_cast<uint32_t>(v[k][i]) ^ (bits >> i << 31));
  }
}

__global__ void __launch_bounds__(kThreads, 3) rotate_chunks(const __grid_constant__ RotateList list) {
  __shared__ float4 exchange[kChunk / kVector];
  const int row = row_of(list.item, list.count, blockIdx.x);
  const RotateItem& item = list.item[row];
  const int64_t begin = unit_within(list.item, row, blockIdx.x) * kChunk;
  const int remaining = int(min(item.n - begin, int64_t(kChunk))), lane = lane_id(), size = item.size;
  float* x = item.x + begin;
  const bool aligned = is_aligned(x, 16);

  // Values beyond the row are zero: they are never paired with one of the row, which has whole transforms.
  Values v;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int at = run_of(k, false) * kRun + lane * kVector;
    if (aligned && at + kVector <= remaining) {
      const float4 a = load4(x + at);
      v[k][0] = a.x, v[k][1] = a.y, v[k][2] = a.z, v[k][3] = a.w;
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[k][i] = at + i < remaining ? x[at + i] : 0.0f;
    }
  }
  if (!list.inverse) flip(v, item, list.seed, begin, list.pass, false);
  levels_within_run(v, size);
  vector_levels(v, kRun, size);
  const bool exchanged = size > kVectors * kRun;
  if (exchanged) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      exchange[run_of(k, false) * kWarp + lane] = make_float4(v[k][0], v[k][1], v[k][2], v[k][3]);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const float4 a = exchange[run_of(k, true) * kWarp + lane];
      v[k][0] = a.x, v[k][1] = a.y, v[k][2] = a.z, v[k][3] = a.w;
    }
    vector_levels(v, kWarps * kRun, size);
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k)
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[k][i] = __fmul_rn(v[k][i], item.factor);
  if (list.inverse) flip(v, item, list.seed, begin, list.pass, exchanged);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int at = run_of(k, exchanged) * kRun + lane * kVector;
    if (aligned && at + kVector <= remaining) {
      store4(x + at, make_float4(v[k][0], v[k][1], v[k][2], v[k][3]));
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (at + i < remaining) x[at + i] = v[k][i];
    }
  }
}

int launch(const RotateList& list, void* stream) {
  if (list.units == 0) return 0;
  if (list.units > INT32_MAX) return cudaErrorInvalidValue;
  DYNFED_LAUNCH(rotate_chunks, unsigned(list.units), kThreads, stream, list);
  return cudaGetLastError();
}

// The blocks of all rows, or the last block of each row that has a rest.
int launch_pass(const RotateRow* rows, int64_t count, int64_t block, uint32_t pass, RotateList& list, void* stream) {
  list.pass = pass, list.units = 0, list.count = 0;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t n = rows[r].n, size = n == 0 ? 1 : rotate_size(n, block), whole = n / size * size;
    if (n == 0 || (pass == kRotateTail && whole == n)) continue;
    float* x = pass == kRotateTail ? rows[r].x + (n - size) : rows[r].x;
    const int64_t length = pass == kRotateTail ? size : whole;
    list.units += ceil_div(length, kChunk);
    list.item[list.count++] = {x, length, rows[r].offset >> 3, list.units, int32_t(size), rotate_factor(size)};
    if (list.count < RotateList::kCapacity) continue;
    if (const int error = launch(list, stream)) return error;
    list.units = 0, list.count = 0;
  }
  return launch(list, stream);
}

}  // namespace
}  // namespace dynfed::cuda

extern "C" int dynfed_cuda_rotate(const dynfed::cuda::RotateRow* rows, int64_t count, int64_t block, uint64_t seed, int inverse,
                                  void* stream) {
  using namespace dynfed::cuda;
  RotateList list;
  list.seed = seed, list.inverse = inverse;
  const uint32_t first = inverse ? dynfed::kRotateTail : dynfed::kRotateBlocks;
  const uint32_t second = inverse ? dynfed::kRotateBlocks : dynfed::kRotateTail;
  if (const int error = launch_pass(rows, count, block, first, list, stream)) return error;
  return launch_pass(rows, count, block, second, list, stream);
}
