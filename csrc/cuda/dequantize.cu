// unpack_dequantize, and accumulate: all clients in one pass over the output. A warp owns 512 values of it, in four vectors of
// four to a lane, so that every access to the output is coalesced; for each client it fetches the words that hold its codes.
#include "device.cuh"

namespace dynfed::cuda {
namespace {

constexpr int kVector = 4;  // values of a lane that lie side by side
constexpr int kVectors = 4;
constexpr int kVectorStride = kWarp * kVector;
constexpr int kTile = kVectors * kVectorStride;

struct OutputItem {
  float* out;
  int64_t n;
  int64_t bucket;
  int64_t end;
  int32_t bucket_log2;  // -1 if the bucket is no power of two
};

struct OutputList {
  static constexpr int kRows = 32, kPayloads = 114;
  OutputItem item[kRows];
  Payload payload[kPayloads];  // item by item
  int64_t units;
  int32_t count;
  int32_t clients;
};
static_assert(sizeof(OutputList) <= kParameterBytes, "a list is passed as parameters");

// The level of code K of four, from the low 4 * B bits of `w`. The bits of a code, under the exponent that makes its lowest one
// worth 1, are a float32: one logical operation and one exact subtraction, and no conversion.
template <int B, int K>
__device__ __forceinline__ float level(uint32_t w) {
  if constexpr (B == 1) {
    return bit_cast<float>(0xbf800000u ^ (w << (31 - K) & 0x80000000u));
  } else if constexpr ((K + 1) * B > 23) {
    return level<B, K - 2>(w >> 2 * B);
  } else {
    constexpr uint32_t kMask = ((1u << B) - 1) << K * B, kExponent = 0x4b000000u - (uint32_t(K * B) << 23);
    constexpr float kZero = float(1 << (23 - K * B)) + float(1 << (B - 1));
    return __fsub_rn(bit_cast<float>((w & kMask) | kExponent), kZero);
  }
}

template <bool Add>
__device__ __forceinline__ float apply(float level, float factor, float value) {
  return Add ? __fmaf_rn(factor, level, value) : __fmul_rn(level, factor);
}

// One client's share of a full tile. `codes` is where its codes begin.
template <int B, bool Add>
__device__ __forceinline__ void apply_tile(const uint8_t* codes, const float (&factor)[kVectors],
                                           float (&value)[kVectors][kVector]) {
  const BitPosition position = bit_position(codes, lane_id() * kVector * B);
  uint32_t w[kVectors];
  if ((B & (B - 1)) == 0 && is_aligned(codes, 4)) {  // then no lane's codes lie in two words
#pragma unroll
    for (int j = 0; j < kVectors; ++j) w[j] = __ldg(position.words + j * kVectorStride * B / 32) >> position.shift;
  } else {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) w[j] = window(position.words + j * kVectorStride * B / 32, position.shift, kVector * B);
  }
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    value[j][0] = apply<Add>(level<B, 0>(w[j]), factor[j], value[j][0]);
    value[j][1] = apply<Add>(level<B, 1>(w[j]), factor[j], value[j][1]);
    value[j][2] = apply<Add>(level<B, 2>(w[j]), factor[j], value[j][2]);
    value[j][3] = apply<Add>(level<B, 3>(w[j]), factor[j], value[j][3]);
  }
}

template <bool Add>
__device__ __forceinline__ void apply_tile(int bits, const uint8_t* codes, const float (&factor)[kVectors],
                                           float (&value)[kVectors][kVector]) {
  switch (bits) {  // the same in all lanes
    case 1: return apply_tile<1, Add>(codes, factor, value);
    case 2: return apply_tile<2, Add>(codes, factor, value);
    case 3: return apply_tile<3, Add>(codes, factor, value);
    case 4: return apply_tile<4, Add>(codes, factor, value);
    case 5: return apply_tile<5, Add>(codes, factor, value);
    case 6: return apply_tile<6, Add>(codes, factor, value);
    case 7: return apply_tile<7, Add>(codes, factor, value);
    default: return apply_tile<8, Add>(codes, factor, value);
  }
}

// The bucket, counted from the one that a tile begins in, of a value `at` places from where that bucket begins.
__device__ __forceinline__ uint32_t nth_bucket(const OutputItem& item, uint32_t at) {
  return item.bucket_log2 >= 0 ? at >> item.bucket_log2 : at / uint32_t(item.bucket);
}

// The end of a row, a value at a time: no byte that is not the row's is read.
template <bool Add>
__device__ __forceinline__ void end_of_row(const OutputItem& item, const Payload* payloads, int clients, int64_t begin,
                                           int64_t first, uint32_t inside) {
  for (int64_t i = begin + lane_id(); i < item.n; i += kWarp) {
    const int64_t bucket = first + nth_bucket(item, inside + uint32_t(i - begin));
    float value = Add ? item.out[i] : 0.0f;
#pragma unroll 1
    for (int client = 0; client < clients; ++client) {
      const Payload& p = payloads[client];
      const int64_t bit = i * p.bits;
      const uint8_t* at = p.packed + (bit >> 3);
      const int shift = int(bit & 7);
      const uint32_t word = at[0] | (shift + p.bits > 8 ? uint32_t(at[1]) << 8 : 0);
      const int code = int(word >> shift & ((1u << p.bits) - 1));
      const float scale = __ldg(p.scales + bucket);
      value = apply<Add>(float(p.bits == 1 ? 2 * code - 1 : code - (1 << (p.bits - 1))),
                         Add ? __fmul_rn(scale, p.weight) : scale, value);
    }
    item.out[i] = value;
  }
}

template <bool Add>
__global__ void __launch_bounds__(kThreads, 5) dequantize_tiles(const __grid_constant__ OutputList list) {
  const int64_t unit = warp_in_grid();
  if (unit >= list.units) return;
  const int row = row_of(list.item, list.count, unit);
  const OutputItem& item = list.item[row];
  const Payload* payload = list.payload + row * list.clients;
  const int64_t begin = unit_within(list.item, row, unit) * kTile, bucket = item.bucket;
  const int64_t first = item.bucket_log2 >= 0 ? begin >> item.bucket_log2 : begin / bucket;
  const uint32_t inside = uint32_t(begin - first * bucket);
  if (item.n - begin < kTile) {
    end_of_row<Add>(item, payload, list.clients, begin, first, inside);
    return;
  }

  // A vector lies in one bucket, as buckets are multiples of eight.
  const bool one_bucket = inside + int64_t(kTile) <= bucket;
  uint32_t nth[kVectors] = {};
  if (!one_bucket) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) nth[j] = nth_bucket(item, inside + lane_id() * kVector + j * kVectorStride);
  }
  float* out = item.out + begin + lane_id() * kVector;
  const bool aligned = is_aligned(out, 16);
  float value[kVectors][kVector] = {};
  if constexpr (Add) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const float* from = out + j * kVectorStride;
      const float4 v = aligned ? load4(from) : make_float4(from[0], from[1], from[2], from[3]);
      value[j][0] = v.x, value[j][1] = v.y, value[j][2] = v.z, value[j][3] = v.w;
    }
  }
#pragma unroll 1
  for (int client = 0; client < list.clients; ++client, ++payload) {
    const float* scales = payload->scales + first;
    const auto factor_of = [&](uint32_t i) { return Add ? __fmul_rn(__ldg(scales + i), payload->weight) : __ldg(scales + i); };
    float factor[kVectors];
    factor[0] = factor_of(nth[0]);
#pragma unroll
    for (int j = 1; j < kVectors; ++j) factor[j] = factor[0];
    if (!one_bucket) {
#pragma unroll
      for (int j = 1; j < kVectors; ++j) factor[j] = factor_of(nth[j]);
    }
    apply_tile<Add>(payload->bits, payload->packed + uint64_t(begin) / 8 * payload->bits, factor, value);
  }
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    float* to = out + j * kVectorStride;
    if (aligned) {
      store4(to, make_float4(value[j][0], value[j][1], value[j][2], value[j][3]));
    } else {
      to[0] = value[j][0], to[1] = value[j][1], to[2] = value[j][2], to[3] = value[j][3];
    }
  }
}

int log2_of(int64_t bucket) {
  int log2 = 0;
  while (int64_t(1) << log2 < bucket) ++log2;
  return int64_t(1) << log2 == bucket ? log2 : -1;
}

template <bool Add>
int launch(const OutputList& list, void* stream) {
  if (list.units == 0) return 0;
  DYNFED_LAUNCH(dequantize_tiles<Add>, blocks_for(list.units), kThreads, stream, list);
  return cudaGetLastError();
}

// Clients `first_client` to `last_client` of every row; `stride` is the number of all clients.
template <bool Add>
int launch_rows(const OutputRow* rows, const Payload* payloads, int64_t count, int64_t stride, int64_t first_client,
                int64_t last_client, void* stream) {
  OutputList list;
  list.clients = int32_t(last_client - first_client);
  list.units = 0, list.count = 0;
  for (int64_t r = 0; r < count; ++r) {
    if (rows[r].n == 0) continue;
    for (int64_t c = first_client; c < last_client; ++c)
      list.payload[list.count * list.clients + (c - first_client)] = payloads[r * stride + c];
    list.units += ceil_div(rows[r].n, kTile);
    list.item[list.count++] = {rows[r].out, rows[r].n, rows[r].bucket, list.units, log2_of(rows[r].bucket)};
    if (list.count < OutputList::kRows && (list.count + 1) * list.clients <= OutputList::kPayloads) continue;
    if (const int error = launch<Add>(list, stream)) return error;
    list.units = 0, list.count = 0;
  }
  return launch<Add>(list, stream);
}

}  // namespace
}  // namespace dynfed::cuda

extern "C" int dynfed_cuda_dequantize(const dynfed::cuda::OutputRow* rows, const dynfed::cuda::Payload* payloads, int64_t count,
                                      void* stream) {
  return dynfed::cuda::launch_rows<false>(rows, payloads, count, 1, 0, 1, stream);
}

extern "C" int dynfed_cuda_accumulate(const dynfed::cuda::OutputRow* rows, const dynfed::cuda::Payload* payloads, int64_t count,
                                      int64_t clients, void* stream) {
  using namespace dynfed::cuda;
  // More clients than fit into one launch are added by several, one after the other.
  for (int64_t first = 0; first < clients; first += OutputList::kPayloads) {
    const int64_t last = clients - first < OutputList::kPayloads ? clients : first + OutputList::kPayloads;
    if (const int error = launch_rows<true>(rows, payloads, count, clients, first, last, stream)) return error;
  }
  return 0;
}
