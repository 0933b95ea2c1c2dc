// quantize_pack of a list of tensors: one pass over the input wherever a bucket fits into the registers of a warp.
#include "quantize.cuh"

namespace dynfed::cuda {
namespace {

constexpr int kGroup = 8;                    // values of a thread that lie side by side
constexpr int kStepValues = kWarp * kGroup;  // values of a warp in one step
constexpr int kTileSteps = 4;                // of a warp at once; a bucket that needs more is read twice, by a thread block

// The codes of one bucket, Steps groups of them in each of `span` neighbouring lanes, and its scale. `index`: the global index
// of this lane's first value; `count`: how many values the bucket has, the others being zero.
template <int B, int R, int Steps>
__device__ __forceinline__ float encode(float (&v)[Steps][kGroup], int span, int count, uint64_t seed, uint64_t index,
                                        uint64_t (&joined)[Steps]) {
  float top = 0.0f;
#pragma unroll
  for (int j = 0; j < Steps; ++j)
#pragma unroll
    for (int i = 0; i < kGroup; ++i) top = larger_magnitude(top, v[j][i]);
  const uint32_t largest = span_max(bit_cast<uint32_t>(top), span);

  uint32_t code[kGroup];
  if constexpr (R == kRoundEden) {
    const float inverse = eden_inverse(largest);
    int32_t units[Steps][kGroup];
    int64_t energy = 0, dot = 0;
#pragma unroll
    for (int j = 0; j < Steps; ++j)
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        units[j][i] = to_units(v[j][i], inverse);
        energy += int64_t(units[j][i]) * units[j][i];
      }
    energy = span_sum(energy, span);
    const float inverse_step = B == 1 ? 0.0f : eden_inverse_step(largest, energy, count, B, SquareRoot());
#pragma unroll
    for (int j = 0; j < Steps; ++j) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if constexpr (B == 1) {
          dot += abs(units[j][i]);
          code[i] = one_bit(v[j][i], largest);
        } else {
          const int32_t level = eden_level(units[j][i], inverse_step, B);
          dot += int64_t(units[j][i]) * level;
          code[i] = uint32_t(level + (1 << (B - 1)));
        }
      }
      joined[j] = join8<B>(code);
    }
    return eden_scale(largest, energy, span_sum(dot, span));
  } else {
    const float inverse = bucket_inverse(largest, B);
    uint32_t total = 0;  // at most 1024 times 65536
#pragma unroll
    for (int j = 0; j < Steps; ++j) {
      [[maybe_unused]] PhiloxBlock block;
      if constexpr (R == kRoundStochastic) block = element_block(seed, (index + j * kStepValues) / kGroup);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int32_t units = to_units(v[j][i], inverse);
        if constexpr (B == 1) {
          total += uint32_t(abs(units));
          code[i] = one_bit(v[j][i], largest);
        } else {
          const int32_t r16 = R == kRoundStochastic ? noise(block, i) : int32_t(kNearest);
          code[i] = uint32_t(((units + r16) >> 16) + (1 << (B - 1)));
        }
      }
      joined[j] = join8<B>(code);
    }
    return B == 1 ? one_bit_scale(largest, span_sum(total, span), count) : bucket_scale(largest, B);
  }
}

// A warp quantises a tile: kTileSteps / Steps rounds of as many buckets as there are spans of lanes in a warp. A bucket takes
// Steps steps of its span; only with one step may the span be less than the warp.
template <int B, int R, int Steps>
__global__ void __launch_bounds__(kThreads, R == kRoundEden ? 2 : 4)
    quantize_tiles(const __grid_constant__ QuantizeList list) {
  constexpr int kRounds = kTileSteps / Steps;
  __shared__ __align__(16) uint8_t stages[kWarps][kTileSteps * kWarp * B + kStagePadding];
  const int64_t unit = warp_in_grid();
  if (unit >= list.units) return;
  const int row = row_of(list.item, list.count, unit);
  const QuantizeItem& item = list.item[row];
  const int bucket = int(item.bucket), lane = lane_id(), span_log2 = Steps == 1 ? item.span_log2 : 5;
  const int span = 1 << span_log2, round_buckets = kWarp >> span_log2, owned = lane >> span_log2;
  const int inside = (lane & (span - 1)) * kGroup, round_values = round_buckets * bucket, tile = kRounds * round_values;
  const int64_t within = unit_within(list.item, row, unit), begin = within * tile;
  const int remaining = int(min(item.n - begin, int64_t(tile)));
  const int first = owned * bucket + inside;  // this lane's first value, within the tile

  float v[kRounds][Steps][kGroup];
  // How many values are left where group j of round k begins; none, or too many, is as none or all.
  const auto left = [&](int k, int j) {
    return inside + j * kStepValues < bucket ? remaining - (first + k * round_values + j * kStepValues) : 0;
  };
  bool whole = remaining == tile && bucket == span * kGroup * Steps;  // every group of every lane has its eight values
  with_type(item.x, item.dtype, [&](const auto* x) {
    x += begin + first;
    const bool aligned = is_aligned(x, 16);
    if (aligned && whole) {
#pragma unroll
      for (int k = 0; k < kRounds; ++k)
#pragma unroll
        for (int j = 0; j < Steps; ++j) load8_vector(x + k * round_values + j * kStepValues, v[k][j]);
    } else {
#pragma unroll
      for (int k = 0; k < kRounds; ++k)
#pragma unroll
        for (int j = 0; j < Steps; ++j) load8(x + k * round_values + j * kStepValues, left(k, j), aligned, v[k][j]);
    }
  });

  uint8_t* stage = stages[warp_id()];
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const int at = first + k * round_values, count = min(remaining - (at - inside), bucket);
    uint64_t joined[Steps];
    const float scale = encode<B, R, Steps>(v[k], span, count, list.seed, item.offset + uint64_t(begin + at), joined);
    if (inside == 0 && count > 0) item.scales[(within * kRounds + k) * round_buckets + owned] = scale;
#pragma unroll
    for (int j = 0; j < Steps; ++j) {
      if (!whole) {
        if (left(k, j) <= 0) continue;
        if (left(k, j) < kGroup) joined[j] &= (uint64_t(1) << left(k, j) * B) - 1;  // unused bits are zero
      }
      stage8<B>(stage + unsigned(at + j * kStepValues) / kGroup * B, joined[j]);
    }
  }
  __syncwarp();
  copy_out(item.packed + uint64_t(begin) / kGroup * B, stage, (unsigned(remaining) * B + 7) / 8);
}

// ---- long buckets, and random numbers that begin within a Philox block: a thread block a bucket ----

template <class T, class Join>
__device__ T block_reduce(T x, const Join& join) {
  __shared__ T partial[kWarps];
  for (int d = kWarp / 2; d > 0; d /= 2) x = join(x, __shfl_xor_sync(kAllLanes, x, d));
  if (lane_id() == 0) partial[warp_id()] = x;
  __syncthreads();
  x = partial[0];
  for (int i = 1; i < kWarps; ++i) x = join(x, partial[i]);
  __syncthreads();
  return x;
}

// f(position of a group of eight in the bucket, how many of its values there are, the values), for the groups of this thread.
template <class F>
__device__ __forceinline__ void for_groups(const QuantizeItem& item, int64_t begin, int64_t length, const F& f) {
  with_type(item.x, item.dtype, [&](const auto* x) {
    const bool aligned = is_aligned(x + begin, 16);
    for (int64_t at = int64_t(threadIdx.x) * kGroup; at < length; at += kThreads * kGroup) {
      const int count = int(min(length - at, int64_t(kGroup)));
      float v[kGroup];
      load8(x + begin + at, count, aligned, v);
      f(at, count, v);
    }
  });
}

template <int R>
__device__ void quantize_bucket(const QuantizeItem& item, uint64_t seed, int64_t index) {
  const int64_t begin = index * item.bucket, length = min(item.n - begin, item.bucket);
  const int bits = item.bits;
  float top = 0.0f;
  for_groups(item, begin, length, [&](int64_t, int, const float(&v)[kGroup]) {
    for (int i = 0; i < kGroup; ++i) top = larger_magnitude(top, v[i]);
  });
  const auto larger = [](uint32_t a, uint32_t b) { return max(a, b); };
  const auto sum = [](int64_t a, int64_t b) { return a + b; };
  const uint32_t largest = block_reduce(bit_cast<uint32_t>(top), larger);

  [[maybe_unused]] int64_t energy = 0;
  [[maybe_unused]] float inverse_step = 0.0f;
  const float inverse = R == kRoundEden ? eden_inverse(largest) : bucket_inverse(largest, bits);
  if constexpr (R == kRoundEden) {
    for_groups(item, begin, length, [&](int64_t, int, const float(&v)[kGroup]) {
      for (int i = 0; i < kGroup; ++i) {
        const int64_t units = to_units(v[i], inverse);
        energy += units * units;
      }
    });
    energy = block_reduce(energy, sum);
    if (bits > 1) inverse_step = eden_inverse_step(largest, energy, length, bits, SquareRoot());
  }

  int64_t dot = 0;  // one bit: the sum of magnitudes
  for_groups(item, begin, length, [&](int64_t at, int count, const float(&v)[kGroup]) {
    [[maybe_unused]] PhiloxBlock block;
    if constexpr (R == kRoundStochastic) block = unaligned_block(seed, item.offset + uint64_t(begin + at));
    uint64_t joined = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int32_t units = to_units(v[i], inverse);
      uint32_t code;
      if (bits == 1) {
        dot += abs(units);
        code = one_bit(v[i], largest);
      } else if constexpr (R == kRoundEden) {
        const int32_t level = eden_level(units, inverse_step, bits);
        dot += int64_t(units) * level;
        code = uint32_t(level + (1 << (bits - 1)));
      } else {
        const int32_t r16 = R == kRoundStochastic ? noise(block, i) : int32_t(kNearest);
        code = uint32_t(((units + r16) >> 16) + (1 << (bits - 1)));
      }
      if (i < count) joined |= uint64_t(code) << i * bits;
    }
    uint8_t* to = item.packed + (begin + at) / kGroup * bits;
    for (int i = 0; i < (count * bits + 7) / 8; ++i) to[i] = uint8_t(joined >> 8 * i);
  });
  if (R == kRoundEden || bits == 1) dot = block_reduce(dot, sum);
  if (threadIdx.x != 0) return;
  item.scales[index] = R == kRoundEden ? eden_scale(largest, energy, dot)
                       : bits == 1     ? one_bit_scale(largest, dot, length)
                                       : bucket_scale(largest, bits);
}

template <int R>
__global__ void __launch_bounds__(kThreads, 4) quantize_long(const __grid_constant__ QuantizeList list) {
  for (int64_t unit = blockIdx.x; unit < list.units; unit += gridDim.x) {
    const int row = row_of(list.item, list.count, unit);
    quantize_bucket<R>(list.item[row], list.seed, unit_within(list.item, row, unit));
  }
}

// ---- launches ----

using Kernel = void (*)(const QuantizeList);

template <int R, int Steps>
Kernel tiles_kernel(int bits) {
  // One bit has no randomness.
  constexpr int kOneBit = R == kRoundEden ? kRoundEden : kRoundNearest;
  constexpr Kernel kernels[8] = {quantize_tiles<1, kOneBit, Steps>, quantize_tiles<2, R, Steps>, quantize_tiles<3, R, Steps>,
                                 quantize_tiles<4, R, Steps>,       quantize_tiles<5, R, Steps>, quantize_tiles<6, R, Steps>,
                                 quantize_tiles<7, R, Steps>,       quantize_tiles<8, R, Steps>};
  return kernels[bits - 1];
}

// How a row is quantised. Rows with the same plan share launches.
struct Plan {
  int steps;  // 0: a thread block a bucket
  int bits;

  Plan(const QuantizeRow& row, int rounding) : steps(0), bits(row.bits) {
    const bool whole_blocks = rounding != kRoundStochastic || bits == 1 || row.offset % kGroup == 0;
    if (whole_blocks && row.bucket <= kTileSteps * kStepValues) {
      steps = row.bucket <= kStepValues ? 1 : row.bucket <= 2 * kStepValues ? 2 : kTileSteps;
    }
  }
  int number() const { return (steps == 0 ? 0 : steps == 1 ? 1 : steps == 2 ? 2 : 3) * 8 + bits - 1; }

  template <int R>
  Kernel kernel() const {
    if (steps == 0) return quantize_long<R>;
    return steps == 1 ? tiles_kernel<R, 1>(bits) : steps == 2 ? tiles_kernel<R, 2>(bits) : tiles_kernel<R, kTileSteps>(bits);
  }
};

int launch(const QuantizeList& list, const Plan& plan, int rounding, void* stream) {
  if (list.count == 0) return 0;
  const Kernel kernel = rounding == kRoundEden         ? plan.kernel<kRoundEden>()
                        : rounding == kRoundStochastic ? plan.kernel<kRoundStochastic>()
                                                       : plan.kernel<kRoundNearest>();
  const unsigned blocks = plan.steps == 0 ? unsigned(list.units < (1 << 24) ? list.units : 1 << 24) : blocks_for(list.units);
  DYNFED_LAUNCH(kernel, blocks, kThreads, stream, list);
  return cudaGetLastError();
}

void append(QuantizeList& list, const QuantizeRow& row, const Plan& plan) {
  int span_log2 = 5;
  while (span_log2 > 0 && (kGroup << (span_log2 - 1)) >= row.bucket) --span_log2;
  const int64_t buckets = ceil_div(row.n, row.bucket);
  list.units += plan.steps == 0 ? buckets : ceil_div(buckets, (kWarp >> span_log2) * (kTileSteps / plan.steps));
  list.item[list.count++] = {row.x,      row.packed, row.scales, row.n,          row.offset,
                             list.units, row.bucket, row.dtype,  int16_t(row.bits), int16_t(span_log2)};
}

}  // namespace
}  // namespace dynfed::cuda

extern "C" int dynfed_cuda_quantize(const dynfed::cuda::QuantizeRow* rows, int64_t count, uint64_t seed, int rounding,
                                    void* stream) {
  using namespace dynfed::cuda;
  uint32_t plans = 0;  // the numbers of those that occur
  for (int64_t r = 0; r < count; ++r) plans |= uint32_t(rows[r].n > 0) << Plan(rows[r], rounding).number();
  for (int64_t first = 0; first < count; ++first) {
    const Plan plan(rows[first], rounding);
    if (rows[first].n == 0 || !(plans >> plan.number() & 1)) continue;
    plans &= ~(1u << plan.number());
    QuantizeList list;
    list.seed = seed, list.units = 0, list.count = 0;
    for (int64_t r = first; r < count; ++r) {
      if (rows[r].n == 0 || Plan(rows[r], rounding).number() != plan.number()) continue;
      append(list, rows[r], plan);
      if (list.count < QuantizeList::kCapacity) continue;
      if (const int error = launch(list, plan, rounding, stream)) return error;
      list.units = 0, list.count = 0;
    }
    if (const int error = launch(list, plan, rounding, stream)) return error;
  }
  return 0;
}
