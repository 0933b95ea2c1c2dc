// Squared Frobenius norms in float64. A warp adds up a chunk of 2048 values of one matrix, 16 bytes a lane at a time; a block then
// adds up a matrix's chunks. Which value is added where depends on its place in the matrix alone, not on addresses, the rest of
// the batch or the GPU.
#include "device.cuh"

namespace dynfed::cuda {
namespace {

constexpr int kBytes = 16;

__device__ __forceinline__ double wide(double x) { return x; }
__device__ __forceinline__ double wide(float x) { return x; }
__device__ __forceinline__ double wide(BFloat16 x) { return to_float(x); }
__device__ __forceinline__ double wide(Float16 x) { return widen(x); }

__device__ __forceinline__ void unpack16(const uint4& v, double (&x)[2]) {
  x[0] = bit_cast<double>(v.x | uint64_t(v.y) << 32), x[1] = bit_cast<double>(v.z | uint64_t(v.w) << 32);
}

__device__ __forceinline__ void unpack16(const uint4& v, float (&x)[4]) {
  x[0] = bit_cast<float>(v.x), x[1] = bit_cast<float>(v.y), x[2] = bit_cast<float>(v.z), x[3] = bit_cast<float>(v.w);
}

template <class T>
__device__ __forceinline__ void unpack16(const uint4& v, T (&x)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = T{uint16_t(words[i / 2] >> 16 * (i % 2))};
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}

// partial[matrix * chunks + chunk]
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    square_chunks(const T* a, int64_t batch, int64_t size, int64_t chunks, double* partial) {
  constexpr int kVector = kBytes / sizeof(T), kSteps = kNormChunk / (kWarp * kVector), kAhead = kSteps < 8 ? kSteps : 8;
  const int64_t unit = warp_in_grid();
  if (unit >= batch * chunks) return;
  const int64_t matrix = unit / chunks, begin = (unit - matrix * chunks) * kNormChunk + lane_id() * kVector;
  const T* from = a + matrix * size + begin;
  const int left = int(min(size - begin, int64_t(kNormChunk)));  // from this lane's first value on; may be negative
  double sums[kVector] = {};
  // Every lane's last vector begins at the same distance from its first one.
  const bool whole = size - (begin - lane_id() * kVector) >= kNormChunk;
  if (whole && is_aligned(a, kBytes) && matrix * size % kVector == 0) {
#pragma unroll 1
    for (int k = 0; k < kSteps; k += kAhead) {
      uint4 loaded[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        loaded[i] = __ldg(reinterpret_cast<const uint4*>(from + (k + i) * (kWarp * kVector)));
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        T x[kVector];
        unpack16(loaded[i], x);
#pragma unroll
        for (int e = 0; e < kVector; ++e) sums[e] = fma(wide(x[e]), wide(x[e]), sums[e]);
      }
    }
  } else {
#pragma unroll 1
    for (int at = 0; at < left; at += kWarp * kVector) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const double x = at + e < left ? wide(from[at + e]) : 0.0;
        sums[e] = fma(x, x, sums[e]);
      }
    }
  }
#pragma unroll
  for (int d = kVector / 2; d > 0; d /= 2)
#pragma unroll
    for (int e = 0; e < d; ++e) sums[e] += sums[e + d];
  const double sum = warp_sum(sums[0]);
  if (lane_id() == 0) partial[unit] = sum;
}

__global__ void __launch_bounds__(kThreads, 4) add_chunks(const double* partial, int64_t chunks, double* out) {
  __shared__ double sums[kWarps];
  const double* own = partial + blockIdx.x * chunks;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += own[i];
  sum = warp_sum(sum);
  if (lane_id() == 0) sums[warp_id()] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  sum = sums[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) sum += sums[i];
  out[blockIdx.x] = sum;
}

template <class T>
int launch(const void* a, int64_t batch, int64_t size, double* partial, double* out, void* stream) {
  const int64_t chunks = ceil_div(size, kNormChunk), blocks = ceil_div(batch * chunks, kWarps);
  if (blocks > INT32_MAX || batch > INT32_MAX) return cudaErrorInvalidValue;
  DYNFED_LAUNCH(square_chunks<T>, unsigned(blocks), kThreads, stream, static_cast<const T*>(a), batch, size, chunks,
                chunks == 1 ? out : partial);
  if (chunks > 1) DYNFED_LAUNCH(add_chunks, unsigned(batch), kThreads, stream, partial, chunks, out);
  return cudaGetLastError();
}

}  // namespace
}  // namespace dynfed::cuda

extern "C" int dynfed_cuda_squared_norm(const void* a, dynfed::cuda::DType dtype, int64_t batch, int64_t size, double* partial,
                                        double* out, void* stream) {
  using namespace dynfed::cuda;
  if (batch == 0 || size == 0) return 0;
  switch (dtype) {
    case DType::kFloat32: return launch<float>(a, batch, size, partial, out, stream);
    case DType::kBFloat16: return launch<dynfed::BFloat16>(a, batch, size, partial, out, stream);
    case DType::kFloat16: return launch<dynfed::Float16>(a, batch, size, partial, out, stream);
    default: return launch<double>(a, batch, size, partial, out, stream);
  }
}
