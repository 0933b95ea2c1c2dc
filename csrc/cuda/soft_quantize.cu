// Soft quantisation to learned centres, its gradients, and sums by centre: a launch for up to 70 layers, and a second one that
// adds up what the thread blocks of the first have found for each centre.
//
// Between the centres j - 1 and j lies boundary j: s_j = sigmoid(P (x - middle_j)) = 1 / (1 + e_j), and h_j = s_j (1 - s_j). The
// exponential is cut off where s_j is nothing beside 1; what is not a number stays so. Results are within 1e-6 of the largest one,
// whatever P is: that takes a middle of more digits than a float32 has, and differences of neighbouring sigmoids without cancellation.
#include <algorithm>

#include "centers.cuh"

namespace dynfed::cuda {
namespace {

constexpr double kLog2e = 1.4426950408889634074;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kPairCut = 60.0f;  // two of them multiply, and their product is inverted
constexpr int kTogether = 16;      // boundaries added up before they join the total, which keeps digits; even
constexpr float kCut = 126.0f;     // the inverse is no denormal yet

// The smaller one; NaN if x is.
__device__ __forceinline__ float at_most(float x, float bound) {
#ifdef __CUDA_ARCH__
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
  return y;
#else
  return x > bound ? bound : x;
#endif
}

__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ float inverse_approximate(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

struct __align__(16) Boundary {
  float middle, rest;  // their sum is the middle, exactly
  float step;
  float rise;  // e_{j+1} / e_j - 1 if that is at most 1, else 0
};

// 2^(slope (x - middle)), slope = -P log2(e). The difference comes first, as it is exact where it is small.
__device__ __forceinline__ float exponential(float x, const Boundary& boundary, float slope, float cut) {
  return exp2_approximate(at_most((x - boundary.middle - boundary.rest) * slope, cut));
}

// -P log2(e), but no steeper than what makes a step of it: neighbouring floats as large as the centres are 32 units apart.
__device__ __forceinline__ float slope_of(const CenterItem& item, const float* centers) {
  const float largest = max(max(fabsf(__ldg(centers)), fabsf(__ldg(centers + item.count - 1))), 1e-30f);
  return max(item.scalar, max(-0x1p29f / largest, -1e37f));
}

// The boundaries of a layer, and one more without a step.
using Boundaries = Boundary[kMostCenters + 1];

__device__ __forceinline__ void fill(Boundaries& boundaries, const float* centers, int count, float slope) {
  for (int j = int(threadIdx.x); j <= kMostCenters; j += kThreads) {
    Boundary boundary{0.0f, 0.0f, 0.0f, 0.0f};
    if (j > 0 && j < count) {
      const float low = centers[j - 1], high = centers[j], sum = low + high, part = sum - low;
      boundary.middle = 0.5f * sum;
      boundary.rest = 0.5f * ((low - (sum - part)) + (high - part));
      boundary.step = high - low;
      const float to_next = j + 1 < count ? slope * (-0.5f * kLn2) * (centers[j + 1] - low) : 1.0f;
      if (to_next < kLn2) boundary.rise = expm1f(to_next);
    }
    boundaries[j] = boundary;
  }
  __syncthreads();
}

// Two boundaries share a division: a / (1 + e) + b / (1 + f) = (a (1 + f) + b (1 + e)) / ((1 + e) (1 + f)).
__global__ void __launch_bounds__(kThreads, 4) soft_quantize(const __grid_constant__ CenterList list) {
  __shared__ Boundaries boundaries;
  const Place place = place_of(list);
  const CenterItem& item = list.item[place.row];
  const float* centers = list.centers + item.first;
  const float slope = slope_of(item, centers), lowest = __ldg(centers);
  fill(boundaries, centers, item.count, slope);
  with_type(item.x, item.dtype, [&](const auto* x) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    float v[kGroup8], total[kGroup8];
    load8(x + place.at, place.count, is_aligned(x, 16), v);
#pragma unroll
    for (int i = 0; i < kGroup8; ++i) total[i] = lowest;
#pragma unroll 1
    for (int begin = 1; begin < item.count; begin += kTogether) {
      const int end = min(begin + kTogether, item.count);
      float part[kGroup8] = {};
#pragma unroll 1
      for (int j = begin; j < end; j += 2) {
        const Boundary p = boundaries[j], q = boundaries[j + 1];
#pragma unroll
        for (int i = 0; i < kGroup8; ++i) {
          const float a = 1.0f + exponential(v[i], p, slope, kPairCut);
          const float b = 1.0f + exponential(v[i], q, slope, kPairCut);
          part[i] = fmaf(fmaf(p.step, b, q.step * a), inverse_approximate(a * b), part[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kGroup8; ++i) total[i] += part[i];
    }
    T* out = static_cast<T*>(item.out);
    store8(out + place.at, place.count, is_aligned(out, 16), total);
  });
}

// Of this thread's values, at the boundary that was crossed last.
struct Crossed {
  float s[kGroup8];
  float es[kGroup8];  // e s = 1 - s, with all of its digits where s is nearly 1
  float half;         // P step / 2 sum g h
};

// dx = P sum_j step_j h_j g, and dc_j = sum g (s_j - s_{j+1} - P / 2 (step_j h_j + step_{j+1} h_{j+1})).
template <bool kInput, bool kCenters>
__global__ void __launch_bounds__(kThreads, 3) soft_quantize_backward(const __grid_constant__ CenterList list) {
  __shared__ Boundaries boundaries;
  __shared__ float sums[kCenters ? kWarps : 1][kMostCenters];
  __shared__ float steep[kInput ? kGroup8 : 1][kThreads];  // sum_j step_j h_j of each value; there are no registers left for it
  const Place place = place_of(list);
  const CenterItem& item = list.item[place.row];
  const float* centers = list.centers + item.first;
  const float slope = slope_of(item, centers), sharpness = slope * -kLn2;
  fill(boundaries, centers, item.count, slope);
  const int count = item.count;
  with_type(item.x, item.dtype, [&](const auto* x) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    const T* grad = static_cast<const T*>(item.other);
    float v[kGroup8], g[kGroup8];
    [[maybe_unused]] float part[kGroup8] = {};  // of `steep`, since it was last added to
    load8(x + place.at, place.count, is_aligned(x, 16), v);
    load8(grad + place.at, place.count, is_aligned(grad, 16), g);
    // Boundary j of value i: s, e s, and h.
    const auto cross = [&](const Boundary& boundary, int i, float& s, float& es) {
      const float e = exponential(v[i], boundary, slope, kCut);
      s = inverse_approximate(1.0f + e);
      es = e * s;
      const float h = es * s;
      if constexpr (kInput) part[i] = fmaf(boundary.step, h, part[i]);
      return h;
    };
    if constexpr (kInput) {
#pragma unroll
      for (int i = 0; i < kGroup8; ++i) steep[i][threadIdx.x] = 0.0f;
    }
    const auto add_up = [&] {
      if constexpr (kInput) {
#pragma unroll
        for (int i = 0; i < kGroup8; ++i) steep[i][threadIdx.x] += part[i], part[i] = 0.0f;
      }
    };
    if constexpr (kCenters) {
      Crossed last;
      last.half = 0.0f;
#pragma unroll
      for (int i = 0; i < kGroup8; ++i) last.s[i] = 1.0f, last.es[i] = 0.0f;
      float rise = 0.0f;
#pragma unroll 1
      for (int j = 0; j < count; j += 4) {
        float own[4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (j + k >= count) break;
          const Boundary next = boundaries[j + k + 1];
          const bool any = j + k + 1 < count;
          float sum = 0.0f, steep = 0.0f;
#pragma unroll
          for (int i = 0; i < kGroup8; ++i) {
            float s = 0.0f, es = 1.0f;
            if (any) steep = fmaf(g[i], cross(next, i, s, es), steep);
            // s_j - s_{j+1} = s_j s_{j+1} (e_{j+1} - e_j)
            const float difference = rise > 0.0f ? last.es[i] * s * rise : last.s[i] - s;
            sum = fmaf(g[i], difference, sum);
            last.s[i] = s, last.es[i] = es;
          }
          const float half = 0.5f * sharpness * next.step * steep;
          own[k] = sum - (last.half + half);
          last.half = half;
          rise = next.rise;
        }
        keep_sums(sums, j, own);
        if (j % kTogether == kTogether - 4) add_up();  // after boundary j + 4
      }
    } else {
#pragma unroll 1
      for (int j = 1; j < count; ++j) {
        const Boundary boundary = boundaries[j];
        float s, es;
#pragma unroll
        for (int i = 0; i < kGroup8; ++i) cross(boundary, i, s, es);
        if (j % kTogether == 0) add_up();
      }
    }
    if constexpr (kInput) {
#pragma unroll
      for (int i = 0; i < kGroup8; ++i) part[i] = (steep[i][threadIdx.x] + part[i]) * (sharpness * g[i]);
      T* out = static_cast<T*>(item.out);
      store8(out + place.at, place.count, is_aligned(out, 16), part);
    }
  });
  if constexpr (kCenters) write_partial(list, place, sums);
}

__global__ void __launch_bounds__(kThreads, 4) center_sums(const __grid_constant__ CenterList list) {
  __shared__ WarpSums sums;
  const Place place = place_of(list);
  const CenterItem& item = list.item[place.row];
  const uint8_t* index = static_cast<const uint8_t*>(item.other);
  float v[kGroup8];
  with_type(item.x, item.dtype, [&](const auto* x) { load8(x + place.at, place.count, is_aligned(x, 16), v); });
  uint32_t low = 0, high = 0;  // four indices each
  if (place.count >= kGroup8 && is_aligned(index, 8)) {
    const uint2 both = __ldcs(reinterpret_cast<const uint2*>(index + place.at));
    low = both.x, high = both.y;
  } else {
#pragma unroll
    for (int i = 0; i < kGroup8; ++i)
      if (i < place.count) (i < 4 ? low : high) |= uint32_t(index[place.at + i]) << 8 * (i % 4);
  }
#pragma unroll 1
  for (int j = 0; j < item.count; j += 4) {
    float own[4] = {};
#pragma unroll
    for (int i = 0; i < kGroup8; ++i) {
      const int centre = int((i < 4 ? low : high) >> 8 * (i % 4) & 0xffu) - j;
#pragma unroll
      for (int k = 0; k < 4; ++k) own[k] += centre == k ? v[i] : 0.0f;
    }
    keep_sums(sums, j, own);
  }
  write_partial(list, place, sums);
}

// A block a centre.
__global__ void __launch_bounds__(kThreads, 4) add_partials(const __grid_constant__ CenterList list, float* out) {
  __shared__ double sums[kWarps];
  const int row = row_of(list.item, list.count, blockIdx.x);
  const CenterItem& item = list.item[row];
  const uint32_t j = uint32_t(unit_within(list.item, row, blockIdx.x)), chunks = uint32_t((item.n + kChunk - 1) / kChunk);
  const float* own = list.partial + item.chunks + j * chunks;
  double sum = 0.0;
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < chunks; i += kThreads) sum += own[i];
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
  if (lane_id() == 0) sums[warp_id()] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  sum = sums[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) sum += sums[i];
  out[item.first + j] = float(sum);
}

// What the kernels take for a sharpness.
template <class Launch>
int for_slopes(const CenterRow* rows, int64_t count, const float* centers, float* partial, const Launch& launch) {
  return for_lists(rows, count, centers, partial, [&](CenterList& list) {
    for (int r = 0; r < list.count; ++r) list.item[r].scalar = -float(std::min(list.item[r].scalar * kLog2e, 1e37));
    return launch(list);
  });
}

// The sums of the list's rows, from what the kernel before it has left.
int launch_add(CenterList list, float* out, void* stream) {
  list.units = 0;
  for (int r = 0; r < list.count; ++r) list.item[r].end = list.units += uint32_t(list.item[r].count);
  DYNFED_LAUNCH(add_partials, list.units, kThreads, stream, list, out);
  return cudaGetLastError();
}

}  // namespace
}  // namespace dynfed::cuda

extern "C" int dynfed_cuda_soft_quantize(const dynfed::cuda::CenterRow* rows, int64_t count, const float* centers, void* stream) {
  using namespace dynfed::cuda;
  return for_slopes(rows, count, centers, nullptr, [&](const CenterList& list) {
    DYNFED_LAUNCH(soft_quantize, list.units, kThreads, stream, list);
    return int(cudaGetLastError());
  });
}

extern "C" int dynfed_cuda_soft_quantize_backward(const dynfed::cuda::CenterRow* rows, int64_t count, const float* centers,
                                                  float* partial, float* dcenters, void* stream) {
  using namespace dynfed::cuda;
  const bool input = std::any_of(rows, rows + count, [](const CenterRow& row) { return row.out != nullptr; });
  if (!input && dcenters == nullptr) return 0;
  const auto kernel = dcenters == nullptr ? soft_quantize_backward<true, false>
                      : input             ? soft_quantize_backward<true, true>
                                          : soft_quantize_backward<false, true>;
  return for_slopes(rows, count, centers, partial, [&](const CenterList& list) {
    DYNFED_LAUNCH(kernel, list.units, kThreads, stream, list);
    if (const int error = cudaGetLastError()) return error;
    return dcenters == nullptr ? 0 : launch_add(list, dcenters, stream);
  });
}

extern "C" int dynfed_cuda_center_sums(const dynfed::cuda::CenterRow* rows, int64_t count, float* partial, float* out,
                                       void* stream) {
  using namespace dynfed::cuda;
  return for_lists(rows, count, nullptr, partial, [&](const CenterList& list) {
    DYNFED_LAUNCH(center_sums, list.units, kThreads, stream, list);
    if (const int error = cudaGetLastError()) return error;
    return launch_add(list, out, stream);
  });
}
