// The proximal step of centres, exactly and without a sort: argmin_c 1/2 (c - mu)^2 + strength / 2 sum_i |x_i - c| over the N
// members x_i of a centre.
//
// With l(c) the number of members up to c, the slope to the right of c is at least 0 where c >= mu - strength / 2 (2 l(c) - N).
// The least float32 c^ of which that is true is found by its bits: in each of four rounds the floats that may be it fall into 256
// ranges, members are counted by range, and the first range whose last float is at or beyond c^ is kept. With b members below c^
// the minimum is c^ itself, a member, or just before it, where the slope is zero: min(c^, mu - strength / 2 (2 b - N)). Counts
// are integers, so that their order does not matter; and the result is the reference's, a median, to the bit.
#include "centers.cuh"

namespace dynfed::cuda {
namespace {

constexpr int kRanges = 256, kRounds = 4;
constexpr int kBelow = kRanges, kAll = kRanges + 1;  // counts beside those of the ranges: members below them, all members
constexpr int kCounts = kRanges + 2;
constexpr int kBounds = kCounts;  // what else is kept for a centre: keys of the first and the last float that may be c^
static_assert(kBounds + 1 < kCenterBins, "room for the counts and the bounds");
constexpr int kTogether = 32;  // centres whose members a thread block counts
constexpr int kSteps = 4;      // chunks of values that it reads

struct MemberItem {
  const void* x;
  int64_t n;
  uint32_t end;  // in thread blocks
  int32_t first;
  int32_t count;
  DType dtype;
};

struct MemberList {
  static constexpr int kCapacity = 120;
  MemberItem item[kCapacity];
  const float* centers;
  uint64_t* bins;
  uint32_t units;
  int32_t count;
  int32_t round;
};
static_assert(sizeof(MemberList) <= kParameterBytes, "a list is passed as parameters");

struct StepItem {
  double strength;
  int32_t first;
  int32_t count;
};

struct StepList {
  static constexpr int kCapacity = 240;
  StepItem item[kCapacity];
  const float* proposal;
  uint64_t* bins;
  float* out;
  int32_t count;
  int32_t round;
};
static_assert(sizeof(StepList) <= kParameterBytes, "a list is passed as parameters");

// Keys are ordered as the floats are; from -inf to inf, without NaN.
constexpr uint32_t kLeast = 0x007fffffu, kGreatest = 0xff800000u;

__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float float_of(uint32_t key) {
  return bit_cast<float>(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Keys that may be c^, cut into at most kRanges ranges of 2^shift.
struct Bounds {
  uint32_t first, last;
  int shift;
};

__device__ __forceinline__ Bounds bounds_of(const uint64_t* bins, int round) {
  Bounds bounds;
  bounds.first = round == 0 ? kLeast : uint32_t(bins[kBounds]);
  bounds.last = round == 0 ? kGreatest : uint32_t(bins[kBounds + 1]);
  bounds.shift = 8 * (kRounds - 1 - round);
  return bounds;
}

__global__ void __launch_bounds__(kThreads, 4) count_members(const __grid_constant__ MemberList list) {
  __shared__ Nearest nearest;
  __shared__ uint32_t counts[kTogether][kCounts];
  __shared__ Bounds bounds[kTogether];
  const int row = row_of(list.item, list.count, blockIdx.x);
  const MemberItem& item = list.item[row];
  const uint32_t within = uint32_t(unit_within(list.item, row, blockIdx.x));
  const uint32_t groups = (uint32_t(item.count) + kTogether - 1) / kTogether;
  const int from = int(within % groups) * kTogether, own = min(item.count - from, kTogether);
  uint64_t* bins = list.bins + int64_t(item.first + from) * kCenterBins;

  nearest.fill(list.centers + item.first, item.count);
  for (int i = int(threadIdx.x); i < own * kCounts; i += kThreads) counts[i / kCounts][i % kCounts] = 0;
  if (int(threadIdx.x) < own) bounds[threadIdx.x] = bounds_of(bins + threadIdx.x * kCenterBins, list.round);
  __syncthreads();

  const int top = top_step(item.count);
  with_type(item.x, item.dtype, [&](const auto* x) {
    const bool aligned = is_aligned(x, 16);
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const int64_t at = (int64_t(within / groups) * kSteps + step) * kChunk + int64_t(threadIdx.x) * kGroup8;
      const int count = int(min(item.n - at, int64_t(kGroup8)));
      float v[kGroup8];
      uint32_t index[kGroup8];
      load8(x + at, count, aligned, v);
      nearest.of(v, top, index);
#pragma unroll
      for (int i = 0; i < kGroup8; ++i) {
        const int j = int(index[i]) - from;
        if (i >= count || j < 0 || j >= own || v[i] != v[i]) continue;
        const Bounds range = bounds[j];
        const uint32_t key = key_of(v[i] + 0.0f);  // one zero
        if (key <= range.last) atomicAdd(&counts[j][key < range.first ? kBelow : (key - range.first) >> range.shift], 1u);
        if (list.round == 0) atomicAdd(&counts[j][kAll], 1u);
      }
    }
  });
  __syncthreads();
  for (int i = int(threadIdx.x); i < own * kCounts; i += kThreads) {
    const uint32_t number = counts[i / kCounts][i % kCounts];
    auto* total = reinterpret_cast<unsigned long long*>(bins + i / kCounts * kCenterBins + i % kCounts);
    if (number > 0) atomicAdd(total, static_cast<unsigned long long>(number));
  }
}

// Ascending; a NaN of a proposal that was none comes last.
__device__ __forceinline__ void sort(const float* values, int count, float* out) {
  for (int j = int(threadIdx.x); j < count; j += kThreads) {
    const uint32_t own = key_of(values[j]);
    int place = 0;
    for (int k = 0; k < count; ++k) {
      const uint32_t other = key_of(values[k]);
      place += other < own || (other == own && k < j);
    }
    out[place] = values[j];
  }
}

// A thread block a layer, a warp a centre: lane l has the ranges from 8 l on.
__global__ void __launch_bounds__(kThreads, 4) narrow_bounds(const __grid_constant__ StepList list) {
  __shared__ float found[kMostCenters];
  const StepItem& item = list.item[blockIdx.x];
  constexpr int kOwn = kRanges / kWarp;
#pragma unroll 1
  for (int j = warp_id(); j < item.count; j += kWarps) {
    uint64_t* bins = list.bins + int64_t(item.first + j) * kCenterBins;
    const Bounds bounds = bounds_of(bins, list.round);
    const double mu = list.proposal[item.first + j], half = 0.5 * item.strength, members = double(int64_t(bins[kAll]));
    uint64_t own[kOwn], sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += own[i] = bins[lane_id() * kOwn + i];
    uint64_t before = sum;  // members below this lane's ranges
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, before, d);
      if (lane_id() >= d) before += other;
    }
    before += bins[kBelow] - sum;
    const auto flat = [&](uint64_t below) { return mu - half * (2.0 * double(int64_t(below)) - members); };
    // How many of this lane's ranges end before c^, and the members up to there. The last range has c^ if the others have not.
    int ends = 0;
    uint64_t through = before;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint64_t key = bounds.first + (uint64_t(lane_id() * kOwn + i + 1) << bounds.shift) - 1;
      through += own[i];
      if (key < bounds.last && float_of(uint32_t(key)) < flat(through)) ++ends, before = through;
    }
    const uint32_t whole = __ballot_sync(kAllLanes, ends == kOwn);
    const int lane = __popc(whole);  // those lanes come first
    const int range = lane * kOwn + __shfl_sync(kAllLanes, ends, lane % kWarp);
    before = __shfl_sync(kAllLanes, before, lane % kWarp);
    const uint32_t first = bounds.first + (uint32_t(range) << bounds.shift);
    const uint64_t last = uint64_t(first) + (uint64_t(1) << bounds.shift) - 1;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) bins[lane_id() * kOwn + i] = 0;
    if (lane_id() > 0) continue;
    bins[kBelow] = 0;
    bins[kBounds] = first;
    bins[kBounds + 1] = last < bounds.last ? last : bounds.last;
    const double least = float_of(first), linear = flat(before);
    found[j] = float(linear < least ? linear : mu == mu ? least : mu);
  }
  if (list.round < kRounds - 1) return;
  __syncthreads();
  sort(found, item.count, list.out + item.first);
}

int count_round(const CenterRow* rows, int64_t count, MemberList& list, void* stream) {
  const auto launch = [&] {
    if (list.count == 0) return 0;
    DYNFED_LAUNCH(count_members, list.units, kThreads, stream, list);
    list.units = 0, list.count = 0;
    return int(cudaGetLastError());
  };
  list.units = 0, list.count = 0;
  for (int64_t r = 0; r < count; ++r) {
    const CenterRow& row = rows[r];
    const int64_t blocks = ceil_div(row.n, kChunk * kSteps) * ceil_div(row.count, kTogether);
    if (row.n == 0) continue;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    if (list.count == MemberList::kCapacity || list.units + blocks > INT32_MAX)
      if (const int error = launch()) return error;
    list.units += uint32_t(blocks);
    list.item[list.count++] = {row.x, row.n, list.units, row.first, row.count, row.dtype};
  }
  return launch();
}

int narrow_round(const CenterRow* rows, int64_t count, StepList& list, void* stream) {
  for (int64_t r = 0; r < count;) {
    for (list.count = 0; r < count && list.count < StepList::kCapacity; ++r)
      list.item[list.count++] = {rows[r].scalar, rows[r].first, rows[r].count};
    DYNFED_LAUNCH(narrow_bounds, unsigned(list.count), kThreads, stream, list);
    if (const int error = cudaGetLastError()) return error;
  }
  return 0;
}

}  // namespace
}  // namespace dynfed::cuda

extern "C" int dynfed_cuda_prox_centers(const dynfed::cuda::CenterRow* rows, int64_t count, const float* proposal,
                                        const float* centers, int64_t total, uint64_t* bins, float* out, void* stream) {
  using namespace dynfed::cuda;
  if (count == 0) return 0;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (const int error = cudaMemsetAsync(bins, 0, size_t(total * kCenterBins) * sizeof(uint64_t), cuda_stream)) return error;
  MemberList members;
  members.centers = centers, members.bins = bins;
  StepList steps;
  steps.proposal = proposal, steps.bins = bins, steps.out = out;
  for (int round = 0; round < kRounds; ++round) {
    members.round = steps.round = round;
    if (const int error = count_round(rows, count, members, stream)) return error;
    if (const int error = narrow_round(rows, count, steps, stream)) return error;
  }
  return 0;
}
