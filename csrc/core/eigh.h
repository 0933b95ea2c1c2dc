// Eigenvalues and eigenvectors of small symmetric matrices: Householder tridiagonalisation, then implicit QL with Wilkinson's
// shift (Golub and Van Loan, Matrix Computations, 4th edition, sections 8.3.1 and 8.3.5), on kLanes matrices at once.
//
// `L` supplies a vector V of kLanes doubles, one of each matrix, a mask M, and the arithmetic. Nothing here adds up across
// lanes, every sum runs in the order of its index, and a lane that has converged is left alone: a matrix's result is the same
// bits whichever matrices it is computed with, and the same with one lane. There L::Wide makes vectors of neighbouring columns
// instead, L::kWidth of them; such a loop may begin before its range, where there is nothing to lose, and end in the padding.
#pragma once
#include "macros.h"

namespace dynfed {

constexpr int kEighIterations = 60;                // for an eigenvalue; two are usual
constexpr double kEighEpsilon = 2.220446049250313e-16;
constexpr double kEighFloor = 8.7e-19;             // off-diagonals that are rounding next to a largest entry near 1
constexpr double kEighTail = 1e-44;                // squares of a column below its off-diagonal that are nothing beside 1
constexpr double kEighTiny = 1e-280;               // squares too small to divide by

// Where a row begins after the one before, in V's: whole blocks of columns, and an odd number of cache lines, as a power of two
// of them would put a column's elements all into the same few places of a cache.
DYNFED_INLINE int64_t eigh_stride(int64_t n, int64_t columns, int64_t lanes) {
  const int64_t line = lanes < 8 ? 8 / lanes : 1;
  const int64_t lines = ((n + columns - 1) / columns * columns + line - 1) / line;
  return (lines | 1) * line;
}

// Doubles of scratch that a group of any number of lanes up to `lanes` needs: two matrices and six vectors.
DYNFED_INLINE int64_t eigh_work(int64_t n, int64_t lanes) { return (2 * n + 6) * (n + 48) * lanes; }

template <class L>
struct Eigh {
  using V = typename L::V;
  using M = typename L::M;
  using Wide = typename L::Wide;
  using W = typename Wide::V;

  DYNFED_INLINE W load(const V* p) { return Wide::load(reinterpret_cast<const double*>(p)); }
  DYNFED_INLINE void store(V* p, W x) { Wide::store(reinterpret_cast<double*>(p), x); }
  DYNFED_INLINE int64_t before(int64_t i) { return i & ~int64_t(L::kWidth - 1); }

  int64_t n, stride;
  V *a, *z;                  // [n, stride] each
  V *d, *e, *beta, *p, *c, *s;  // [stride] each

  DYNFED_INLINE void init(Eigh& x, V* work, int64_t n) {
    const int64_t stride = eigh_stride(n, L::kColumns, L::kLanes);
    x.n = n;
    x.stride = stride;
    x.a = work;
    x.z = x.a + n * stride;
    x.d = x.z + n * stride;
    x.e = x.d + stride;
    x.beta = x.e + stride;
    x.p = x.beta + stride;
    x.c = x.p + stride;
    x.s = x.c + stride;
  }

  // out[i] = sum over j of v[j] * rows[j][i], for first <= i, j < n, j ascending.
  DYNFED_INLINE void combine(const V* rows, int64_t stride, const V* v, V* out, int64_t first, int64_t n) {
    const int64_t begin = before(first);
    for (int64_t i = begin; i < n; i += L::kWidth) store(out + i, Wide::set(0.0));
    int64_t j = first;
    for (; j + 4 <= n; j += 4) {
      const V *r0 = rows + j * stride, *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
      const W v0 = L::spread(v[j]), v1 = L::spread(v[j + 1]), v2 = L::spread(v[j + 2]), v3 = L::spread(v[j + 3]);
      for (int64_t i = begin; i < n; i += L::kWidth) {
        const W sum = Wide::fma(load(r1 + i), v1, Wide::fma(load(r0 + i), v0, load(out + i)));
        store(out + i, Wide::fma(load(r3 + i), v3, Wide::fma(load(r2 + i), v2, sum)));
      }
    }
    for (; j < n; ++j) {
      const V* r0 = rows + j * stride;
      const W v0 = L::spread(v[j]);
      for (int64_t i = begin; i < n; i += L::kWidth) store(out + i, Wide::fma(load(r0 + i), v0, load(out + i)));
    }
  }

  // a = Q T Q', T with diagonal d and off-diagonal e; row k of a then holds Householder's vector from column k + 1 on.
  DYNFED_INLINE void tridiagonalise(Eigh& x) {
    const int64_t n = x.n, stride = x.stride;
    for (int64_t k = 0; k + 2 < n; ++k) {
      V* v = x.a + k * stride;
      x.d[k] = v[k];
      V tail = L::set(0.0);
      for (int64_t j = k + 2; j < n; ++j) tail = L::fma(v[j], v[j], tail);
      const V head = v[k + 1], square = L::fma(head, head, tail);
      const M none = L::less(tail, L::set(kEighTail));
      const V norm = L::sqrt(square);
      const V signed_norm = L::select(L::less(head, L::set(0.0)), norm, L::set(0.0) - norm);
      const V scale = L::select(none, L::set(1.0), norm * (norm + L::abs(head)));
      const V beta = L::select(none, L::set(0.0), L::set(1.0) / scale);
      x.beta[k] = beta;
      x.e[k] = L::select(none, head, signed_norm);
      v[k + 1] = head - signed_norm;
      combine(x.a, stride, v, x.p, k + 1, n);
      V dot = L::set(0.0);
      for (int64_t i = k + 1; i < n; ++i) dot = L::fma(x.p[i], v[i], dot);
      const V half = L::set(0.5) * beta * (beta * dot);
      for (int64_t i = k + 1; i < n; ++i) x.p[i] = beta * x.p[i] - half * v[i];
      const V* w = x.p;
      for (int64_t i = k + 1; i < n; ++i) {
        V* row = x.a + i * stride;
        const W vi = L::spread(v[i]), wi = L::spread(w[i]);
        for (int64_t j = before(k + 1); j < n; j += L::kWidth)
          store(row + j, Wide::fnma(wi, load(v + j), Wide::fnma(vi, load(w + j), load(row + j))));
      }
    }
    for (int64_t k = n < 2 ? 0 : n - 2; k < n; ++k) x.d[k] = x.a[k * stride + k];
    if (n > 1) x.e[n - 2] = x.a[(n - 2) * stride + n - 1];
    x.e[n - 1] = L::set(0.0);
  }

  // z = Q, from the vectors in a; then a = Q', a row for each eigenvector to come.
  DYNFED_INLINE void form(Eigh& x) {
    const int64_t n = x.n, stride = x.stride;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) x.z[i * stride + j] = L::set(i == j ? 1.0 : 0.0);
    for (int64_t k = n - 3; k >= 0; --k) {
      const V* v = x.a + k * stride;
      combine(x.z, stride, v, x.p, k + 1, n);
      const V* u = x.p;
      for (int64_t i = k + 1; i < n; ++i) {
        V* row = x.z + i * stride;
        const W factor = L::spread(x.beta[k] * v[i]);
        for (int64_t j = before(k + 1); j < n; j += L::kWidth) store(row + j, Wide::fnma(factor, load(u + j), load(row + j)));
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) x.a[i * stride + j] = x.z[j * stride + i];
      for (int64_t j = n; j < stride; ++j) x.a[i * stride + j] = L::set(0.0);
    }
  }

  // Rotations `top` - 1 down to `first` of neighbouring rows of a, a block of columns at a time, the row in between kept in registers.
  DYNFED_INLINE void rotate(Eigh& x, int64_t first, int64_t top) {
    constexpr int kBlock = L::kColumns / L::kWidth, kWidth = L::kWidth;
    const int64_t stride = x.stride;
    for (int64_t k = 0; k < x.n; k += L::kColumns) {
      W carry[kBlock];
      V* row = x.a + top * stride + k;
#pragma GCC unroll 4
      for (int b = 0; b < kBlock; ++b) carry[b] = load(row + b * kWidth);
      for (int64_t i = top - 1; i >= first; --i) {
        const W c = L::spread(x.c[i]), s = L::spread(x.s[i]);
        V* below = row - stride;
#pragma GCC unroll 4
        for (int b = 0; b < kBlock; ++b) {
          const W value = load(below + b * kWidth);
          store(row + b * kWidth, Wide::fma(s, value, c * carry[b]));
          carry[b] = Wide::fnma(s, carry[b], c * value);
        }
        row = below;
      }
#pragma GCC unroll 4
      for (int b = 0; b < kBlock; ++b) store(row + b * kWidth, carry[b]);
    }
  }

  // Diagonalises T; the rows of a become eigenvectors, d their values, in no order.
  DYNFED_INLINE void iterate(Eigh& x, M* start) {
    const int64_t n = x.n;
    V *d = x.d, *e = x.e;
    for (int64_t l = 0; l + 1 < n; ++l) {
      for (int iteration = 0; iteration < kEighIterations; ++iteration) {
        // Of each lane the block l .. m that the first negligible off-diagonal ends: start[m] has the lanes that end there.
        M open = L::all();
        V last = d[n - 1];
        int64_t top = l;
        for (; top + 1 < n; ++top) {
          const V limit = L::fma(L::set(kEighEpsilon), L::abs(d[top]) + L::abs(d[top + 1]), L::set(kEighFloor));
          const M ends = L::both(open, L::less(L::abs(e[top]), limit));
          start[top] = ends;
          last = L::select(ends, d[top], last);
          open = L::except(open, ends);
          if (!L::any(open)) break;
        }
        if (top + 1 == n) start[top] = open;
        const M todo = L::except(L::all(), start[l]);
        if (!L::any(todo)) break;
        const V pivot = L::select(todo, e[l], L::set(1.0));
        V g = (d[l + 1] - d[l]) / (pivot + pivot);
        V r = L::sqrt(L::fma(g, g, L::set(1.0)));
        r = L::select(L::less(g, L::set(0.0)), L::set(0.0) - r, r);
        g = last - d[l] + pivot / (g + r);
        V s = L::set(1.0), c = L::set(1.0), p = L::set(0.0);
        M active = L::none();
        for (int64_t i = top - 1; i >= l; --i) {
          const M starts = L::both(todo, start[i + 1]);
          active = L::either(active, starts);
          const V f = s * e[i], b = c * e[i], square = L::fma(f, f, g * g);
          const M zero = L::less(square, L::set(kEighTiny));
          r = L::sqrt(square);
          const V inverse = L::set(1.0) / L::select(zero, L::set(1.0), r);
          const V sine = L::select(zero, L::set(0.0), f * inverse), cosine = L::select(zero, L::set(1.0), g * inverse);
          e[i + 1] = L::select(active, L::select(starts, L::set(0.0), r), e[i + 1]);
          const V rest = d[i + 1] - p;
          const V t = L::fma(d[i] - rest, sine, L::set(2.0) * cosine * b);
          const V shift = sine * t;
          d[i + 1] = L::select(active, rest + shift, d[i + 1]);
          g = L::select(active, L::fma(cosine, t, L::set(0.0) - b), g);
          s = L::select(active, sine, s);
          c = L::select(active, cosine, c);
          p = L::select(active, shift, p);
          x.s[i] = L::select(active, sine, L::set(0.0));
          x.c[i] = L::select(active, cosine, L::set(1.0));
        }
        d[l] = L::select(todo, d[l] - p, d[l]);
        e[l] = L::select(todo, g, e[l]);
        rotate(x, l, top);
      }
    }
  }
};

}  // namespace dynfed
