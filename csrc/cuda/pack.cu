// pack and unpack: codes of a byte each to and from a bitstream, sixteen to a lane.
#include "../core/pack.h"
#include "device.cuh"

namespace dynfed::cuda {
namespace {

constexpr int kCodes = 16;  // of a lane, side by side
constexpr int kTile = kWarp * kCodes;

__device__ __forceinline__ uint64_t join_words(uint32_t low, uint32_t high) { return low | uint64_t(high) << 32; }

template <int B>
__global__ void __launch_bounds__(kThreads, 4)
    pack_tiles(const uint8_t* codes, int64_t n, uint8_t* packed, int32_t* seen) {
  __shared__ __align__(16) uint8_t stages[kWarps][kTile * B / 8 + kStagePadding];
  const int64_t begin = warp_in_grid() * kTile;
  if (begin >= n) return;
  const int remaining = int(min(n - begin, int64_t(kTile))), inside = lane_id() * kCodes, left = remaining - inside;
  const uint8_t* from = codes + begin + inside;
  uint32_t words[4] = {};
  if (left >= kCodes && is_aligned(from, 16)) {
    const uint4 v = __ldcs(reinterpret_cast<const uint4*>(from));
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < kCodes; ++i)
      if (i < left) words[i / 4] |= uint32_t(from[i]) << 8 * (i % 4);
  }
  // A code that is too large is reported, and only its low bits are packed.
  constexpr uint32_t kAllowed = 0x01010101u * ((1u << B) - 1);
  const uint32_t all = words[0] | words[1] | words[2] | words[3];
  if ((all & ~kAllowed) != 0) atomicOr(seen, int32_t((all | all >> 8 | all >> 16 | all >> 24) & 0xff));
  uint8_t* stage = stages[warp_id()] + lane_id() * 2 * B;
  stage8<B>(stage, pack8<B>(join_words(words[0] & kAllowed, words[1] & kAllowed)));
  stage8<B>(stage + B, pack8<B>(join_words(words[2] & kAllowed, words[3] & kAllowed)));
  __syncwarp();
  copy_out(packed + uint64_t(begin) / 8 * B, stages[warp_id()], (unsigned(remaining) * B + 7) / 8);
}

template <int B>
__global__ void __launch_bounds__(kThreads, 4) unpack_tiles(const uint8_t* packed, int64_t n, uint8_t* codes) {
  constexpr int kBits = kCodes * B, kWords = (kBits + 31) / 32;
  const int64_t begin = warp_in_grid() * kTile + lane_id() * kCodes;
  if (begin >= n) return;
  const int left = int(min(n - begin, int64_t(kCodes)));
  const BitPosition position = bit_position(packed, begin * B);
  // Words of the stream that hold these codes, and then the codes from bit 0 on.
  uint32_t w[kWords + 1];
#pragma unroll
  for (int i = 0; i <= kWords; ++i) w[i] = position.shift + left * B > 32 * i ? __ldg(position.words + i) : 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) w[i] = __funnelshift_r(w[i], w[i + 1], position.shift);
  w[kWords] = 0;
  // Eight codes begin at bit 0, the other eight at bit 8 * B.
  constexpr int kWord = 8 * B / 32, kShift = 8 * B % 32;
  const uint64_t low = unpack8<B>(join_words(w[0], w[1]));
  const uint64_t high = unpack8<B>(join_words(__funnelshift_r(w[kWord], w[kWord + 1], kShift),
                                              B > 4 ? __funnelshift_r(w[kWord + 1], w[B > 4 ? kWord + 2 : 0], kShift) : 0));
  const uint32_t out[4] = {uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)};
  if (left == kCodes && is_aligned(codes + begin, 16)) {
    __stcs(reinterpret_cast<uint4*>(codes + begin), make_uint4(out[0], out[1], out[2], out[3]));
  } else {
#pragma unroll
    for (int i = 0; i < kCodes; ++i)
      if (i < left) codes[begin + i] = uint8_t(out[i / 4] >> 8 * (i % 4));
  }
}

// f<bits>()
template <template <int> class F, class... Args>
void for_bits(int bits, const Args&... args) {
  switch (bits) {
    case 1: return F<1>::run(args...);
    case 2: return F<2>::run(args...);
    case 3: return F<3>::run(args...);
    case 4: return F<4>::run(args...);
    case 5: return F<5>::run(args...);
    case 6: return F<6>::run(args...);
    case 7: return F<7>::run(args...);
    default: return F<8>::run(args...);
  }
}

template <int B>
struct Pack {
  static void run(const uint8_t* codes, int64_t n, uint8_t* packed, int32_t* seen, void* stream) {
    DYNFED_LAUNCH(pack_tiles<B>, blocks_for(ceil_div(n, kTile)), kThreads, stream, codes, n, packed, seen);
  }
};

template <int B>
struct Unpack {
  static void run(const uint8_t* packed, int64_t n, uint8_t* codes, void* stream) {
    DYNFED_LAUNCH(unpack_tiles<B>, blocks_for(ceil_div(n, kTile)), kThreads, stream, packed, n, codes);
  }
};

}  // namespace
}  // namespace dynfed::cuda

extern "C" int dynfed_cuda_pack(const uint8_t* codes, int64_t n, int bits, uint8_t* packed, int32_t* seen, void* stream) {
  if (n == 0) return 0;
  dynfed::cuda::for_bits<dynfed::cuda::Pack>(bits, codes, n, packed, seen, stream);
  return cudaGetLastError();
}

extern "C" int dynfed_cuda_unpack(const uint8_t* packed, int64_t n, int bits, uint8_t* codes, void* stream) {
  if (n == 0) return 0;
  dynfed::cuda::for_bits<dynfed::cuda::Unpack>(bits, packed, n, codes, stream);
  return cudaGetLastError();
}

extern "C" int dynfed_cuda_set_device(int device) { return cudaSetDevice(device); }

extern "C" const char* dynfed_cuda_error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }
