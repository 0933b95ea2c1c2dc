// Small dense matrices, over an instruction set's `Lanes`: eigenvectors of several at once, norms, and products of few long rows. Included by each
// instruction set's file, after its Lanes.

template <class Vector, class Single>
struct Choice {  // as with lanes: sums fused with products, so that the result is the same
  using Wide = Vector;
  static constexpr bool kFused = true;
  static constexpr int kWidth = Vector::kLanes;
};
template <class Single>
struct Choice<void, Single> {
  using Wide = Single;
  static constexpr bool kFused = false;
  static constexpr int kWidth = 1;
};

// One matrix. `Vector` is Lanes, or void where there are no vectors.
template <class Vector>
struct OneLane {
  using V = double;
  using M = bool;
  using Wide = typename Choice<Vector, OneLane>::Wide;
  using One = OneLane;
  static constexpr int kLanes = 1;
  static constexpr int kWidth = Choice<Vector, OneLane>::kWidth, kColumns = kWidth == 1 ? 4 : 16;
  DYNFED_INLINE V set(double x) { return x; }
  DYNFED_INLINE V fma(V a, V b, V c) {
    return Choice<Vector, OneLane>::kFused ? __builtin_fma(a, b, c) : a * b + c;
  }
  DYNFED_INLINE V fnma(V a, V b, V c) { return fma(-a, b, c); }
  DYNFED_INLINE V sqrt(V a) { return __builtin_sqrt(a); }
  DYNFED_INLINE V abs(V a) { return __builtin_fabs(a); }
  DYNFED_INLINE M less(V a, V b) { return a < b; }
  DYNFED_INLINE M both(M a, M b) { return a && b; }
  DYNFED_INLINE M either(M a, M b) { return a || b; }
  DYNFED_INLINE M except(M a, M b) { return a && !b; }
  DYNFED_INLINE M all() { return true; }
  DYNFED_INLINE M none() { return false; }
  DYNFED_INLINE bool any(M a) { return a; }
  DYNFED_INLINE V select(M m, V a, V b) { return m ? a : b; }
  DYNFED_INLINE typename Wide::V spread(V a) { return Wide::set(a); }
  DYNFED_INLINE V load(const double* p) { return *p; }
  DYNFED_INLINE void store(double* p, V a) { *p = a; }
};

// The `kLanes` matrices at `a`, `count` of which exist; `work` has eigh_work(n, kLanes) doubles, aligned to 64 bytes.
template <class L>
static void eigh_group(const double* a, double* w, double* v, int64_t n, int64_t count, double* work) {
  using V = typename L::V;
  constexpr int kLanes = L::kLanes;
  typename L::M start[kEighMost];
  double factor[kLanes];
  bool finite[kLanes];
  Eigh<L> x;
  Eigh<L>::init(x, reinterpret_cast<V*>(work), n);
  // Scaled by a power of two to a largest entry in [1, 2): no square in what follows overflows, none that matters vanishes.
  for (int lane = 0; lane < kLanes; ++lane) {
    const double* from = a + (lane < count ? lane : 0) * n * n;
    uint64_t most = 0;
    for (int64_t i = 0; i < n * n; ++i) {
      const uint64_t bits = bit_cast<uint64_t>(from[i]) & ~(uint64_t(1) << 63);
      most = bits > most ? bits : most;
    }
    const int64_t exponent = int64_t(most >> 52);
    finite[lane] = exponent < 2047;
    // 2^(1023 - exponent), which is a normal number or, for the largest matrices, kept one.
    const int64_t power = exponent > 2045 ? 1 : exponent < 1 ? 2045 : 2046 - exponent;
    const double scale = finite[lane] ? bit_cast<double>(uint64_t(power) << 52) : 0.0;
    factor[lane] = bit_cast<double>(uint64_t(2046 - power) << 52);
    double* to = work + lane;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) to[(i * x.stride + j) * kLanes] = finite[lane] ? from[i * n + j] * scale : 0.0;
  }
  Eigh<L>::tridiagonalise(x);
  Eigh<L>::form(x);
  Eigh<L>::iterate(x, start);
  const double* values = reinterpret_cast<const double*>(x.d);
  const double* vectors = reinterpret_cast<const double*>(x.a);
  for (int lane = 0; lane < count; ++lane) {
    double *into = w + lane * n, *columns = v + lane * n * n;
    if (!finite[lane]) {
      for (int64_t i = 0; i < n; ++i) into[i] = __builtin_nan("");
      for (int64_t i = 0; i < n * n; ++i) columns[i] = __builtin_nan("");
      continue;
    }
    int32_t order[kEighMost];
    for (int64_t i = 0; i < n; ++i) {  // insertion: stable, and these are few
      int64_t at = i;
      const double value = values[i * kLanes + lane];
      for (; at > 0 && values[order[at - 1] * kLanes + lane] < value; --at) order[at] = order[at - 1];
      order[at] = int32_t(i);
    }
    for (int64_t i = 0; i < n; ++i) into[i] = values[order[i] * kLanes + lane] * factor[lane];
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < n; ++i) columns[r * n + i] = vectors[(order[i] * x.stride + r) * kLanes + lane];
  }
}

template <class L>
static void symmetric_eigh(const EighArgs& args, double* work, int64_t begin, int64_t end) {
  const int64_t n = args.n, size = n * n;
  int64_t i = begin;
  // A group of lanes costs about three matrices by themselves; of large ones it no longer fits the caches.
  const int64_t least = n <= kEighLanes ? 4 : INT64_MAX;
  for (; end - i >= least; i += L::kLanes) {
    const int64_t count = end - i < L::kLanes ? end - i : L::kLanes;
    eigh_group<L>(args.a + i * size, args.w + i * n, args.v + i * size, n, count, work);
  }
  for (; i < end; ++i) eigh_group<typename L::One>(args.a + i * size, args.w + i * n, args.v + i * size, n, 1, work);
}

DYNFED_INLINE double to_double(double x) { return x; }
template <class T>
DYNFED_INLINE double to_double(T x) {
  return double(to_float(x));
}

// Sixteen sums, each of every sixteenth square, then added in order: the same bits for any vector length. Squares of float32
// are exact in float64.
template <class T>
static double sum_of_squares(const T* x, int64_t n) {
  double sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      const double value = to_double(x[i + j]);
      sums[j] += value * value;
    }
  for (int j = 0; i < n; ++i, ++j) sums[j] += to_double(x[i]) * to_double(x[i]);
  double total = 0.0;
  for (int j = 0; j < 16; ++j) total += sums[j];
  return total;
}

static double squared_norm(const void* x, Real dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case Real::kFloat64: return sum_of_squares(static_cast<const double*>(x) + begin, end - begin);
    case Real::kFloat32: return sum_of_squares(static_cast<const float*>(x) + begin, end - begin);
    case Real::kBFloat16: return sum_of_squares(static_cast<const BFloat16*>(x) + begin, end - begin);
    case Real::kFloat16: return sum_of_squares(static_cast<const Float16*>(x) + begin, end - begin);
  }
  return 0.0;
}

// ---- few long rows: in float64, a piece of all rows at a time, zeros around it ----

struct Piece {
  int64_t rows, columns;  // of the piece with its zeros: multiples of 4 and of 16
};

static Piece piece_of(int64_t rows, int64_t columns) {
  const int64_t height = (rows + 3) / 4 * 4, whole = (columns + 15) / 16 * 16, most = kRowsWork / height / 16 * 16;
  return {height, whole < most ? whole : most};
}

// Columns `at` on.
template <class T>
static void widen(const T* x, int64_t rows, int64_t columns, int64_t at, Piece piece, double* out) {
  const int64_t width = columns - at < piece.columns ? columns - at : piece.columns;
  for (int64_t r = 0; r < piece.rows; ++r, out += piece.columns) {
    const int64_t count = r < rows ? width : 0;
    const T* from = x + (r < rows ? r : 0) * columns + at;
    for (int64_t c = 0; c < count; ++c) out[c] = double(from[c]);
    for (int64_t c = count; c < piece.columns; ++c) out[c] = 0.0;
  }
}

// out = x x', every product and sum in float64.
template <class L, class T>
static void gram_of(const T* x, int64_t rows, int64_t columns, double* out, double* work) {
  using V = typename L::V;
  const Piece piece = piece_of(rows, columns);
  for (int64_t i = 0; i < rows * rows; ++i) out[i] = 0.0;
  for (int64_t at = 0; at < columns; at += piece.columns) {
    widen(x, rows, columns, at, piece, work);
    for (int64_t i = 0; i < rows; i += 4)
      for (int64_t j = i; j < rows; j += 4) {
        const double *a = work + i * piece.columns, *b = work + j * piece.columns;
        V sums[4][4];
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p)
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) sums[p][q] = L::set(0.0);
        for (int64_t c = 0; c < piece.columns; c += L::kLanes) {
          V right[4];
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) right[q] = L::load(b + q * piece.columns + c);
#pragma GCC unroll 4
          for (int p = 0; p < 4; ++p) {
            const V left = L::load(a + p * piece.columns + c);
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) sums[p][q] = L::fma(left, right[q], sums[p][q]);
          }
        }
        for (int p = 0; p < 4 && i + p < rows; ++p)
          for (int q = 0; q < 4 && j + q < rows; ++q) {
            double lanes[L::kLanes], sum = 0.0;
            L::store(lanes, sums[p][q]);
            for (int k = 0; k < L::kLanes; ++k) sum += lanes[k];
            out[(i + p) * rows + j + q] += sum;
          }
      }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < i; ++j) out[i * rows + j] = out[j * rows + i];
}

// out = t x, every product and sum in float64; `out` may be x.
template <class L, class T>
static void combination(const double* t, int64_t count, const T* x, int64_t rows, int64_t columns, T* out, double* work) {
  using V = typename L::V;
  constexpr int kStep = 2 * L::kLanes;
  const Piece piece = piece_of(rows, columns);
  for (int64_t at = 0; at < columns; at += piece.columns) {
    widen(x, rows, columns, at, piece, work);
    const int64_t width = columns - at < piece.columns ? columns - at : piece.columns;
    for (int64_t i = 0; i < count; i += 4) {
      const double* factors[4];  // of rows beyond the last: the last one's again
      for (int p = 0; p < 4; ++p) factors[p] = t + (i + p < count ? i + p : count - 1) * rows;
      for (int64_t c = 0; c < width; c += kStep) {
        V sums[4][2];
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) sums[p][0] = sums[p][1] = L::set(0.0);
        const double* b = work + c;
        for (int64_t j = 0; j < rows; ++j, b += piece.columns) {
          const V first = L::load(b), second = L::load(b + L::kLanes);
#pragma GCC unroll 4
          for (int p = 0; p < 4; ++p) {
            const V factor = L::set(factors[p][j]);
            sums[p][0] = L::fma(factor, first, sums[p][0]);
            sums[p][1] = L::fma(factor, second, sums[p][1]);
          }
        }
        const int64_t here = width - c < kStep ? width - c : kStep;
        for (int p = 0; p < 4 && i + p < count; ++p) {
          double lanes[kStep];
          L::store(lanes, sums[p][0]);
          L::store(lanes + L::kLanes, sums[p][1]);
          T* to = out + (i + p) * columns + at + c;
          for (int64_t k = 0; k < here; ++k) to[k] = T(lanes[k]);
        }
      }
    }
  }
}

template <class L>
static void gram(const void* x, Real type, int64_t rows, int64_t columns, double* out, double* work) {
  if (type == Real::kFloat64) return gram_of<L>(static_cast<const double*>(x), rows, columns, out, work);
  gram_of<L>(static_cast<const float*>(x), rows, columns, out, work);
}

template <class L>
static void combine(const double* t, int64_t count, const void* x, Real type, int64_t rows, int64_t columns, void* out,
                    double* work) {
  if (type == Real::kFloat64)
    return combination<L>(t, count, static_cast<const double*>(x), rows, columns, static_cast<double*>(out), work);
  combination<L>(t, count, static_cast<const float*>(x), rows, columns, static_cast<float*>(out), work);
}
