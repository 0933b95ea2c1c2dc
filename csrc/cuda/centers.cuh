// Layers with learned centres: the rows of the kernels that soft-quantise, find the nearest centre and take proximal steps. A
// thread block handles a chunk of one layer, eight neighbouring values a thread.
#pragma once
#include <type_traits>

#include "device.cuh"

namespace dynfed::cuda {

constexpr int kGroup8 = 8;
constexpr int kChunk = kThreads * kGroup8;
static_assert(kChunk == kCenterChunk, "the caller makes room for a partial sum of each chunk");

struct CenterItem {
  const void* x;
  const void* other;  // what comes in beside x
  void* out;
  int64_t n;
  uint32_t end;    // in chunks; of `add_partials`, in centres
  int32_t first;   // of this layer's centres in the arenas
  int32_t count;   // centres
  DType dtype;     // of x, and of all values that come in or go out beside it
  float scalar;    // what a layer has one of
  uint32_t chunks; // of the rows before this one in the list, times their centres: where partial sums begin
};

struct CenterList {
  static constexpr int kCapacity = 70;
  CenterItem item[kCapacity];
  const float* centers;
  float* partial;  // [centre][chunk] of each row
  uint32_t units;
  int32_t count;
};
static_assert(sizeof(CenterList) <= kParameterBytes, "a list is passed as parameters");

// This thread block's chunk of a row, and this thread's eight values of it.
struct Place {
  int row;
  uint32_t chunk;
  int64_t at;  // this thread's first value
  int count;   // of its values that exist: may be negative
};

__device__ __forceinline__ Place place_of(const CenterList& list) {
  Place place;
  place.row = row_of(list.item, list.count, blockIdx.x);
  place.chunk = uint32_t(unit_within(list.item, place.row, blockIdx.x));
  place.at = int64_t(place.chunk) * kChunk + int64_t(threadIdx.x) * kGroup8;
  place.count = int(min(list.item[place.row].n - place.at, int64_t(kGroup8)));
  return place;
}

// The middle between two neighbouring centres: from there on values belong to the upper one.
__device__ __forceinline__ float middle(float low, float high) { return __fmul_rn(__fadd_rn(low, high), 0.5f); }

// The centres of a layer, in shared memory.
struct Nearest {
  float value[kMostCenters];
  float middle[kMostCenters];  // [j]: from where on values belong to centre j; NaN where there is no such centre, and for 0

  // By all threads of the block; a barrier must follow.
  __device__ __forceinline__ void fill(const float* centers, int count) {
    for (int j = int(threadIdx.x); j < kMostCenters; j += kThreads) {
      const bool inside = j > 0 && j < count;
      value[j] = j < count ? centers[j] : 0.0f;
      middle[j] = inside ? dynfed::cuda::middle(centers[j - 1], centers[j]) : bit_cast<float>(0x7fc00000u);
    }
  }

  // For each x the number of middles that it has reached, by bisection; NaN has reached none. `top` is top_step(count).
  __device__ __forceinline__ void of(const float (&x)[kGroup8], int top, uint32_t (&index)[kGroup8]) const {
#pragma unroll
    for (int i = 0; i < kGroup8; ++i) index[i] = 0;
#pragma unroll 1
    for (uint32_t step = uint32_t(top); step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kGroup8; ++i) index[i] += x[i] >= middle[index[i] + step] ? step : 0;
    }
  }
};

// The largest power of two below `count`; 0 for one centre.
__device__ __forceinline__ int top_step(int count) {
  int top = 1;
  while (top < count) top *= 2;
  return top / 2;
}

// Appends rows to lists and launches the full ones: launch(list) returns a cudaError. Rows without values are left out.
template <class Launch>
int for_lists(const CenterRow* rows, int64_t count, const float* centers, float* partial, const Launch& launch) {
  CenterList list;
  list.centers = centers, list.partial = partial, list.units = 0, list.count = 0;
  uint32_t partials = 0;
  const auto flush = [&] {
    if (list.count == 0) return 0;
    const int error = launch(list);
    list.partial += partials;
    list.units = 0, list.count = 0, partials = 0;
    return error;
  };
  for (int64_t r = 0; r < count; ++r) {
    const CenterRow& row = rows[r];
    const int64_t chunks = ceil_div(row.n, kChunk);
    if (row.n == 0) continue;
    if (chunks > INT32_MAX || chunks * row.count > INT32_MAX) return cudaErrorInvalidValue;
    if (list.count == CenterList::kCapacity || list.units + chunks > INT32_MAX || partials + chunks * row.count > INT32_MAX)
      if (const int error = flush()) return error;
    list.units += uint32_t(chunks);
    list.item[list.count++] = {row.x,   row.other,        row.out, row.n,     list.units, row.first,
                               row.count, row.dtype, float(row.scalar), partials};
    partials += uint32_t(chunks * row.count);
  }
  return flush();
}

// ---- sums by centre: each block's to `partial`, then those of all blocks in a fixed order ----

// The sums over a warp of four numbers of each lane: lane l has that of number l / 8.
__device__ __forceinline__ float warp_sums4(const float (&x)[4]) {
  const bool upper = (lane_id() & 16) != 0, odd = (lane_id() & 8) != 0;
  const float a = (upper ? x[2] : x[0]) + __shfl_xor_sync(kAllLanes, upper ? x[0] : x[2], 16);
  const float b = (upper ? x[3] : x[1]) + __shfl_xor_sync(kAllLanes, upper ? x[1] : x[3], 16);
  float sum = (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 8);
#pragma unroll
  for (int d = 4; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
  return sum;
}

using WarpSums = float[kWarps][kMostCenters];

// The four sums of centres j, .. j + 3, from each lane's own.
__device__ __forceinline__ void keep_sums(WarpSums& sums, int j, const float (&own)[4]) {
  const float sum = warp_sums4(own);
  if (lane_id() % 8 == 0) sums[warp_id()][j + lane_id() / 8] = sum;
}

// After the warps' sums of all centres: this block's.
__device__ __forceinline__ void write_partial(const CenterList& list, const Place& place, const WarpSums& sums) {
  __syncthreads();
  const CenterItem& item = list.item[place.row];
  const uint32_t chunks = place.row == 0 ? item.end : item.end - list.item[place.row - 1].end;
  for (int j = int(threadIdx.x); j < item.count; j += kThreads) {
    static_assert(kWarps == 8, "in pairs: fewer additions one after the other");
    const float sum = ((sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j])) + ((sums[4][j] + sums[5][j]) + (sums[6][j] + sums[7][j]));
    list.partial[item.chunks + uint32_t(j) * chunks + place.chunk] = sum;
  }
}

}  // namespace dynfed::cuda
