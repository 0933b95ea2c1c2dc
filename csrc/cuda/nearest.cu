// The nearest centre, and the proximal step of weights towards it: QuPeD's quantiser and its first proximal map, in the bits of
// the reference. A launch for up to 70 layers.
#include "centers.cuh"

namespace dynfed::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 4) nearest_center(const __grid_constant__ CenterList list) {
  __shared__ Nearest nearest;
  const Place place = place_of(list);
  const CenterItem& item = list.item[place.row];
  nearest.fill(list.centers + item.first, item.count);
  __syncthreads();
  const int top = top_step(item.count);
  auto* indices = static_cast<uint8_t*>(const_cast<void*>(item.other)) + place.at;
  with_type(item.x, item.dtype, [&](const auto* x) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    float v[kGroup8];
    uint32_t index[kGroup8];
    load8(x + place.at, place.count, is_aligned(x, 16), v);
    nearest.of(v, top, index);
#pragma unroll
    for (int i = 0; i < kGroup8; ++i) v[i] = v[i] == v[i] ? nearest.value[index[i]] : v[i];
    T* out = static_cast<T*>(item.out);
    store8(out + place.at, place.count, is_aligned(out, 16), v);
    if (place.count >= kGroup8 && is_aligned(indices, 8)) {
      const uint64_t joined = join8<8>(index);
      __stcs(reinterpret_cast<uint2*>(indices), make_uint2(uint32_t(joined), uint32_t(joined >> 32)));
    } else {
#pragma unroll
      for (int i = 0; i < kGroup8; ++i)
        if (i < place.count) indices[i] = uint8_t(index[i]);
    }
  });
}

__global__ void __launch_bounds__(kThreads, 4) prox_weights(const __grid_constant__ CenterList list) {
  __shared__ Nearest nearest;
  const Place place = place_of(list);
  const CenterItem& item = list.item[place.row];
  nearest.fill(list.centers + item.first, item.count);
  __syncthreads();
  const int top = top_step(item.count);
  const float threshold = item.scalar;
  with_type(item.x, item.dtype, [&](const auto* y) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(y)>>;
    float v[kGroup8];
    uint32_t index[kGroup8];
    load8(y + place.at, place.count, is_aligned(y, 16), v);
    nearest.of(v, top, index);
#pragma unroll
    for (int i = 0; i < kGroup8; ++i) {
      const float q = nearest.value[index[i]];
      const float near = v[i] == v[i] ? q : v[i];
      v[i] = v[i] >= __fadd_rn(q, threshold)   ? __fsub_rn(v[i], threshold)
             : v[i] <= __fsub_rn(q, threshold) ? __fadd_rn(v[i], threshold)
                                               : near;
    }
    T* out = static_cast<T*>(item.out);
    store8(out + place.at, place.count, is_aligned(out, 16), v);
  });
}

}  // namespace
}  // namespace dynfed::cuda

extern "C" int dynfed_cuda_nearest_center(const dynfed::cuda::CenterRow* rows, int64_t count, const float* centers,
                                          void* stream) {
  using namespace dynfed::cuda;
  return for_lists(rows, count, centers, nullptr, [&](const CenterList& list) {
    DYNFED_LAUNCH(nearest_center, list.units, kThreads, stream, list);
    return int(cudaGetLastError());
  });
}

extern "C" int dynfed_cuda_prox_weights(const dynfed::cuda::CenterRow* rows, int64_t count, const float* centers, void* stream) {
  using namespace dynfed::cuda;
  return for_lists(rows, count, centers, nullptr, [&](const CenterList& list) {
    DYNFED_LAUNCH(prox_weights, list.units, kThreads, stream, list);
    return int(cudaGetLastError());
  });
}
