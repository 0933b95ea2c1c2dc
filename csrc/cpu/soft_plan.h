// Fills in what soft.h says, in double; for those who call the kernels.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "soft.h"

namespace dynfed {

// Centres may be anything: not ascending, or not finite, they give some result.
inline void plan_soft(const float* centers, int64_t count, double sharpness, SoftPlan& p) {
  constexpr double kSpan = 80.0;       // of b_j within a window
  constexpr double kSaturated = 30.0;  // bits
  constexpr double kMost = 536870912.0;  // of a |c|: whole numbers up to twice this fit an int32 with room to spare
  double largest = 1e-30;
  for (int64_t j = 0; j < count; ++j) largest = std::max(largest, std::abs(double(centers[j])));
  // So sharp that neighbouring floats are 32 units apart: a step all the same.
  const double a = std::min({sharpness / 0.6931471805599453, kMost / largest, 1e37});
  p.count = int32_t(count);
  p.high = float(a);
  p.low = float(a - double(p.high));
  p.limit = float(std::min(2.0 * kMost / a, 3e38));
  p.windows = 0;
  const double exact = double(p.high) + double(p.low);
  p.sharpness = exact * 0.6931471805599453;
  const auto at = [&](int64_t j) { return exact * 0.5 * (double(centers[j]) + double(centers[j + 1])); };
  p.center[count - 1] = centers[count - 1];
  int64_t end = 0;
  for (int64_t begin = 0; begin < count - 1; begin = end) {
    const double first = at(begin);
    for (end = begin + 1; end < count - 1 && end - begin < kWindowSteps && at(end) - first <= kSpan;) ++end;
    const double last = at(end - 1);
    const double whole = std::nearbyint(std::isfinite(last) ? last : 0.0);
    for (int64_t j = begin; j < end; ++j) {
      p.center[j] = centers[j];
      const double factor = std::exp2(at(j) - whole);
      p.factor[j] = float(factor);
      p.rise[j] = j == 0 ? factor : -factor * std::expm1(0.5 * p.sharpness * (double(centers[j - 1]) - double(centers[j + 1])));
      p.gap[j] = float(double(centers[j + 1]) - double(centers[j]));
      p.slope[j] = float(p.sharpness * (double(centers[j + 1]) - double(centers[j])) * factor);
    }
    const float infinity = std::numeric_limits<float>::infinity();
    p.window[p.windows++] = {int32_t(begin), int32_t(end), int32_t(whole) + 127,
                             std::nextafter(float((first - kSaturated) / exact), -infinity),
                             std::nextafter(float((last + kSaturated) / exact), infinity)};
  }
}

inline void plan_nearest(const float* centers, int64_t count, double threshold, NearestPlan& p) {
  p.count = int32_t(count);
  p.threshold = float(threshold);
  std::fill_n(p.mid, kMostCenters, std::numeric_limits<float>::quiet_NaN());
  std::fill_n(p.center, kMostCenters, 0.0f);
  std::copy_n(centers, count, p.center);
  for (int64_t j = 0; j + 1 < count; ++j) p.mid[j] = (centers[j] + centers[j + 1]) * 0.5f;
  for (int j = 0; j < 16; ++j) p.coarse[j] = p.mid[16 * j + 15];
}

}  // namespace dynfed
