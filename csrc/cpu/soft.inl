// Learned centres: the soft quantiser with its gradients, nearest centres and the proximal step of the weights (soft.h says how
// they are computed), over an instruction set's `Floats`:
//   V, M, I                        kWidth floats, a mask of them, as many 32-bit integers; kVectors of V are handled at once
//   load(p), store(p, V), stream(p, V)   float, BFloat16 or Float16, to nearest even; stream: floats past the caches, aligned
//   set, add, sub, mul, fma, min, max    minimum and maximum return their second operand if there is a NaN
//   product_error(a, b, p)         a b - p, exact, if p = fl(a b)
//   reciprocal(y)                  of 1 to 2^122, to 2^-24
//   round(v), to_int(v)            to whole numbers; to_int of one that is no int32: anything
//   plus(I, I), power(I)           sums wrap around; 2^k of k + 127, which is clamped to 2^-120 .. 2^120
//   ge, le, both, full, ordered, select(M, a, b)
//   sum(V) -> double               in a fixed order
//   Finder<m>(NearestPlan)         find(V) -> I, the number of the nearest of at most m centres; center(I) -> V
//   store_index(p, I)              as bytes
// Included inside an anonymous namespace: nothing here may be shared between instruction sets.

// 2^(-a x) = mantissa * 2^-power, the power a whole number, whatever its size: the product with `a` is kept in two parts.
template <class F>
DYNFED_INLINE void split_power(const SoftPlan& p, typename F::V x, typename F::V& mantissa, typename F::I& power) {
  using V = typename F::V;
  const V high = F::set(p.high);
  x = F::min(F::set(p.limit), F::max(F::set(-p.limit), x));
  const V product = F::mul(high, x), whole = F::round(product);
  const V rest = F::fma(F::set(p.low), x, F::product_error(high, x, product));
  V f = F::add(F::sub(product, whole), rest);
  const V more = F::round(f);
  f = F::sub(f, more);
  power = F::plus(F::to_int(whole), F::to_int(more));
  // 2^-f for |f| <= 1/2, to 2e-9.
  V e = F::set(0.0001534581242594868f);
  e = F::fma(e, f, F::set(-0.0013399930903688073f));
  e = F::fma(e, f, F::set(0.009618489071726799f));
  e = F::fma(e, f, F::set(-0.05550328642129898f));
  e = F::fma(e, f, F::set(0.24022646248340607f));
  e = F::fma(e, f, F::set(-0.6931471824645996f));
  mantissa = F::fma(e, f, F::set(1.0f));
}

// Whether all values are known to be on one side of a window; false if one is NaN.
template <class F>
DYNFED_INLINE bool all_above(const typename F::V (&x)[F::kVectors], float bound) {
  auto m = F::ge(x[0], F::set(bound));
#pragma GCC unroll 4
  for (int v = 1; v < F::kVectors; ++v) m = F::both(m, F::ge(x[v], F::set(bound)));
  return F::full(m);
}
template <class F>
DYNFED_INLINE bool all_below(const typename F::V (&x)[F::kVectors], float bound) {
  auto m = F::le(x[0], F::set(bound));
#pragma GCC unroll 4
  for (int v = 1; v < F::kVectors; ++v) m = F::both(m, F::le(x[v], F::set(bound)));
  return F::full(m);
}

// The kVectors * kWidth values at x.
template <class F, class T>
DYNFED_INLINE void soft_tile(const SoftPlan& p, const T* from, T* out, bool stream) {
  using V = typename F::V;
  constexpr int N = F::kVectors;
  V x[N], mantissa[N], total[N];
  typename F::I power[N];
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    x[v] = F::load(from + v * F::kWidth);
    split_power<F>(p, x[v], mantissa[v], power[v]);
    total[v] = F::set(p.center[0]);
  }
  for (const SoftWindow* w = p.window; w != p.window + p.windows; ++w) {
    if (p.windows > 1) {
      if (all_above<F>(x, w->above)) {
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) total[v] = F::set(p.center[w->end]);
        continue;
      }
      if (all_below<F>(x, w->below)) break;
    }
    V e[N], part[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      e[v] = F::mul(mantissa[v], F::power(w->shift, power[v]));
      part[v] = F::set(0.0f);
    }
    for (int j = w->begin; j < w->end; ++j) {
      const V factor = F::set(p.factor[j]), gap = F::set(p.gap[j]);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) part[v] = F::fma(gap, F::reciprocal(F::fma(e[v], factor, F::set(1.0f))), part[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) total[v] = F::add(total[v], part[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    if (stream) {
      F::stream(out + v * F::kWidth, total[v]);
    } else {
      F::store(out + v * F::kWidth, total[v]);
    }
  }
}

// Sums over values, kWidth to each: of g s_j r_{j-1} and of g s_j r_j by step; and of g s by window, s being the last sigmoid
// before a window from which on they are 0.
template <class F>
struct SoftSums {
  alignas(64) float difference[kMostCenters * F::kWidth];
  alignas(64) float product[kMostCenters * F::kWidth];
  alignas(64) float last[kMostCenters * F::kWidth];

  void clear(const SoftPlan& p) {
    for (int i = 0; i < (p.count - 1) * F::kWidth; ++i) difference[i] = product[i] = 0.0f;
    for (int i = 0; i < (p.windows + 1) * F::kWidth; ++i) last[i] = 0.0f;
  }
  // Added to sums [2 * count], as kernels.h says.
  void flush(const SoftPlan& p, double* sums) {
    for (int j = 0; j < p.count - 1; ++j) {
      sums[j] += p.rise[j] * F::sum(F::load(difference + j * F::kWidth));
      sums[p.count + j] += double(p.factor[j]) * F::sum(F::load(product + j * F::kWidth));
    }
    for (int w = 0; w <= p.windows; ++w)
      sums[w < p.windows ? p.window[w].begin : p.count - 1] += F::sum(F::load(last + w * F::kWidth));
    clear(p);
  }
};

template <class F, bool kSlope, bool kSums, class T>
DYNFED_INLINE void soft_backward_tile(const SoftPlan& p, const T* from, const T* grad, T* out, bool stream, SoftSums<F>& sums) {
  using V = typename F::V;
  constexpr int N = F::kVectors;
  V x[N], g[N], mantissa[N], s[N], slope[N];
  typename F::I power[N];
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    x[v] = F::load(from + v * F::kWidth);
    g[v] = F::load(grad + v * F::kWidth);
    split_power<F>(p, x[v], mantissa[v], power[v]);
    s[v] = F::set(1.0f);
    slope[v] = F::set(0.0f);
  }
  int window = 0;
  for (; window < p.windows; ++window) {
    const SoftWindow& w = p.window[window];
    if (p.windows > 1) {
      if (all_above<F>(x, w.above)) continue;  // and s is 1 still
      if (all_below<F>(x, w.below)) break;
    }
    V e[N], r[N], part[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      e[v] = F::mul(mantissa[v], F::power(w.shift, power[v]));
      r[v] = F::mul(e[v], s[v]);
      part[v] = F::set(0.0f);
    }
    for (int j = w.begin; j < w.end; ++j) {
      const V factor = F::set(p.factor[j]), height = F::set(p.slope[j]);
      float *const to = sums.difference + j * F::kWidth, *const also = sums.product + j * F::kWidth;
      V difference, product;
      if (kSums) difference = F::load(to), product = F::load(also);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        s[v] = F::reciprocal(F::fma(e[v], factor, F::set(1.0f)));
        if (kSums) difference = F::fma(g[v], F::mul(s[v], r[v]), difference);
        r[v] = F::mul(e[v], s[v]);
        const V t = F::mul(s[v], r[v]);
        if (kSums) product = F::fma(g[v], t, product);
        if (kSlope) part[v] = F::fma(height, t, part[v]);
      }
      if (kSums) F::store(to, difference), F::store(also, product);
    }
    if (kSlope) {
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) slope[v] = F::add(slope[v], part[v]);
    }
  }
  if (kSums) {
    float* const to = sums.last + window * F::kWidth;
    V last = F::load(to);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) last = F::fma(g[v], s[v], last);
    F::store(to, last);
  }
  if (kSlope) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      const V dx = F::mul(g[v], slope[v]);
      if (stream) {
        F::stream(out + v * F::kWidth, dx);
      } else {
        F::store(out + v * F::kWidth, dx);
      }
    }
  }
}

template <class F, class T>
static void soft_range(const SoftLayer& a, int64_t begin, int64_t end) {
  constexpr int64_t kTile = F::kVectors * F::kWidth;
  const T* const x = static_cast<const T*>(a.x);
  T* const out = static_cast<T*>(a.out);
  const bool stream = a.stream && is_aligned(out);
  int64_t i = begin;
  for (; i + kTile <= end; i += kTile) soft_tile<F>(*a.soft, x + i, out + i, stream);
  if (i < end) {
    alignas(64) T values[kTile] = {}, results[kTile];
    memcpy(values, x + i, (end - i) * sizeof(T));
    soft_tile<F>(*a.soft, values, results, false);
    memcpy(out + i, results, (end - i) * sizeof(T));
  }
  if (stream) F::fence();
}

template <class F, bool kSlope, bool kSums, class T>
static void soft_backward_range(const SoftLayer& a, int64_t begin, int64_t end, double* sums) {
  constexpr int64_t kTile = F::kVectors * F::kWidth;
  constexpr int64_t kFlush = kSoftFlush * F::kWidth;
  static_assert(kFlush % kTile == 0, "whole tiles");
  const T *const x = static_cast<const T*>(a.x), *const grad = static_cast<const T*>(a.grad);
  T* const out = static_cast<T*>(a.out);
  const bool stream = kSlope && a.stream && is_aligned(out);
  SoftSums<F> parts;
  if (kSums) parts.clear(*a.soft);
  for (int64_t i = begin; i < end;) {
    const int64_t stop = end - i < kFlush ? end : i + kFlush;
    for (; i + kTile <= stop; i += kTile)
      soft_backward_tile<F, kSlope, kSums>(*a.soft, x + i, grad + i, kSlope ? out + i : nullptr, stream, parts);
    if (i < stop) {
      alignas(64) T values[kTile] = {}, upstream[kTile] = {}, results[kTile];
      memcpy(values, x + i, (stop - i) * sizeof(T));
      memcpy(upstream, grad + i, (stop - i) * sizeof(T));
      soft_backward_tile<F, kSlope, kSums>(*a.soft, values, upstream, results, false, parts);
      if (kSlope) memcpy(out + i, results, (stop - i) * sizeof(T));
      i = stop;
    }
    if (kSums) parts.flush(*a.soft, sums);
  }
  if (stream) F::fence();
}

// ---- nearest centres ----

template <class F, bool kProx, class T, class Finder>
DYNFED_INLINE void nearest_tile(const Finder& finder, float threshold, const T* from, T* out, uint8_t* index, bool stream) {
  using V = typename F::V;
  const V x = F::load(from), t = F::set(threshold);
  const auto number = finder.find(x);
  V q = finder.center(number);
  if (kProx) q = F::select(F::ge(x, F::add(q, t)), F::sub(x, t), F::select(F::le(x, F::sub(q, t)), F::add(x, t), q));
  q = F::select(F::ordered(x), q, x);
  if (index != nullptr) F::store_index(index, number);
  if (out == nullptr) return;
  if (stream) {
    F::stream(out, q);
  } else {
    F::store(out, q);
  }
}

template <class F, bool kProx, int kMost, class T>
static void nearest_some(const SoftLayer& a, int64_t begin, int64_t end) {
  const typename F::template Finder<kMost> finder(*a.nearest);
  const T* const x = static_cast<const T*>(a.x);
  T* const out = static_cast<T*>(a.out);
  const float threshold = a.nearest->threshold;
  const bool stream = a.stream && is_aligned(out);
  int64_t i = begin;
  for (; i + F::kWidth <= end; i += F::kWidth)
    nearest_tile<F, kProx>(finder, threshold, x + i, out ? out + i : nullptr, a.index ? a.index + i : nullptr, stream);
  if (i < end) {
    alignas(64) T values[F::kWidth] = {}, results[F::kWidth];
    uint8_t numbers[F::kWidth];
    memcpy(values, x + i, (end - i) * sizeof(T));
    nearest_tile<F, kProx>(finder, threshold, values, results, numbers, false);
    if (out) memcpy(out + i, results, (end - i) * sizeof(T));
    if (a.index) memcpy(a.index + i, numbers, end - i);
  }
  if (stream) F::fence();
}

template <class F, bool kProx, class T>
static void nearest_range(const SoftLayer& a, int64_t begin, int64_t end) {
  if (a.nearest->count <= 16) return nearest_some<F, kProx, 16, T>(a, begin, end);
  if (a.nearest->count <= 32) return nearest_some<F, kProx, 32, T>(a, begin, end);
  nearest_some<F, kProx, 256, T>(a, begin, end);
}

#define DYNFED_FOR_DTYPE(dtype, CALL)                                   \
  switch (dtype) {                                                      \
    case DType::kFloat32: { using T = float; CALL; break; }             \
    case DType::kBFloat16: { using T = BFloat16; CALL; break; }         \
    case DType::kFloat16: { using T = Float16; CALL; break; }           \
  }

template <class F>
struct Soft {
  static void forward(const SoftLayer& a, int64_t begin, int64_t end) {
    DYNFED_FOR_DTYPE(a.dtype, (soft_range<F, T>(a, begin, end)))
  }
  static void backward(const SoftLayer& a, int64_t begin, int64_t end, double* sums) {
    if (a.out != nullptr && sums != nullptr) {
      DYNFED_FOR_DTYPE(a.dtype, (soft_backward_range<F, true, true, T>(a, begin, end, sums)))
    } else if (a.out != nullptr) {
      DYNFED_FOR_DTYPE(a.dtype, (soft_backward_range<F, true, false, T>(a, begin, end, sums)))
    } else if (sums != nullptr) {
      DYNFED_FOR_DTYPE(a.dtype, (soft_backward_range<F, false, true, T>(a, begin, end, sums)))
    }
  }
  static void nearest(const SoftLayer& a, int64_t begin, int64_t end) {
    DYNFED_FOR_DTYPE(a.dtype, (nearest_range<F, false, T>(a, begin, end)))
  }
  static void prox(const SoftLayer& a, int64_t begin, int64_t end) {
    DYNFED_FOR_DTYPE(a.dtype, (nearest_range<F, true, T>(a, begin, end)))
  }
};
