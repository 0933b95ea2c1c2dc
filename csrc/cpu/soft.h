// What the kernels of learned centres (soft.inl) are told of a layer; soft_plan.h fills it in. Included by kernels.h.
//
// A layer has centres c_0 < .. < c_{m-1} and between them steps j = 0 .. m-2, from c_j to c_{j+1}, each with a sigmoid
// s_j = 1 / (1 + 2^(b_j - a x)), where a = P / ln 2 and b_j = a (c_j + c_{j+1}) / 2. One power of two serves all of them: with
// E = 2^(N - a x) and the constant K_j = 2^(b_j - N), s_j = 1 / (1 + E K_j). The integer N is that of a window of neighbouring
// steps, few enough that nothing overflows where a sigmoid is neither 0 nor 1; from one window to the next E changes by a power
// of two that is exact.
//
// The gradients keep their digits where sigmoids are close to each other, to 0 or to 1: with r_j = E s_j,
//   s_j (1 - s_j) = K_j s_j r_j   and   s_{j-1} - s_j = (K_j - K_{j-1}) s_j r_{j-1},
// and the constants wait until the sums over all values are there.
#pragma once
#include <cstdint>

namespace dynfed {

enum class DType { kFloat32, kBFloat16, kFloat16 };

constexpr int kMostCenters = 256;
constexpr int kWindowSteps = 16;         // at most: sums of more steps are added up from those of windows, which keeps digits
constexpr int64_t kSoftBlock = 8192;     // values whose gradients to the centres are added up in one go: part of the result
constexpr int64_t kSoftFlush = 64;       // terms of a sum in float32, in each lane, before it goes to float64

struct SoftWindow {
  int32_t begin, end;  // steps
  int32_t shift;       // N + 127
  float below, above;  // a value below has sigmoids of 0 here, one above has 1, to 2^-30
};

struct SoftPlan {
  int32_t count;    // centres
  int32_t windows;
  double sharpness; // P
  float high, low;  // a in two parts
  float limit;      // values are taken as at most this in magnitude
  float center[kMostCenters];
  float factor[kMostCenters];  // K_j
  float gap[kMostCenters];     // c_{j+1} - c_j
  float slope[kMostCenters];   // P gap K_j
  double rise[kMostCenters];   // K_j - K_{j-1}, both of the window of j; K_{-1} = 0
  SoftWindow window[kMostCenters];
};

struct NearestPlan {
  int32_t count;
  float threshold;                     // of prox
  alignas(64) float mid[kMostCenters];     // fl(fl(c_j + c_{j+1}) / 2), then NaN, which no value reaches
  alignas(64) float coarse[16];            // every sixteenth of them
  alignas(64) float center[kMostCenters];  // then zeros
};

struct SoftLayer {
  int64_t n;
  DType dtype;  // of x, grad and out
  bool stream;  // write past the caches: what is written is larger than they are
  const void* x;
  const void* grad;  // of the backward pass: the incoming gradient
  void* out;         // values; of the backward pass: the gradient to x; null: not wanted
  uint8_t* index;    // of nearest; null: not wanted
  const SoftPlan* soft;
  const NearestPlan* nearest;
};

}  // namespace dynfed
