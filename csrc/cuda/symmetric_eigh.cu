// Eigenvalues and eigenvectors of symmetric float64 matrices by parallel cyclic Jacobi, one thread block a matrix: hundreds of
// small matrices take as long as one, where a solver for large ones takes them in turn.
//
// A sweep rotates every pair of indices once. It consists of n - 1 rounds of n / 2 pairs without a common index: a round-robin
// tournament. Each round has two phases, with a barrier after each:
//   1. the matrix: J^T A J, in independent blocks of 2 x 2, one a thread;
//   2. the eigenvectors: V J. Meanwhile the first warp computes the rotations of the next round, which need A alone.
// What one round costs is shared memory's bandwidth and, for small matrices, the latency of the rotations: hence the overlap, and
// a rotation from two reciprocal square roots without a division. Half a warp's lanes take neighbouring pairs of columns: their
// columns are neighbours too (but where they wrap around), in rows and so in banks.
//
// The matrix is scaled by a power of two, so that its largest magnitude is between 1 and 2. A pair whose element is below 2^-62
// is not rotated, its element becomes zero; all of these together are less than 2^-55 of the norm. Rotations are in a fixed
// order: same bits every time, whatever else is in the batch.
#include "device.cuh"

namespace dynfed::cuda {
namespace {

constexpr int kHalf = kWarp / 2;
constexpr int kMostWarps = 17;  // one for rotations, 16 for the rest
constexpr int kMostSize = 128;
constexpr int kSweeps = 20;                // in practice 5 to 10
constexpr double kNegligible = 0x1p-62;    // an element, where the largest of the matrix is 1 to 2
constexpr double kTolerance = 1e-30;       // squares of off-diagonal elements, of all squares
constexpr double kLargest = 0x1.fffffffffffffp1023;  // finite number
constexpr uint64_t kInfinite = 0x7ff0000000000000, kNan = 0x7ff8000000000000;  // bit patterns

struct __align__(16) Rotation {
  double c, s;
};

struct Pair {
  int p, q;
};

// Pair k of a round: index n - 1 stays where it is, the others go round. Whether it is p or q decides whether the p (or the q) of
// 16 neighbouring pairs fall into 16 banks: with 32 rows they always do this way.
__device__ __forceinline__ Pair pair_of(int k, int round, int n) {
  const int p = round + k, q = round - k, fixed = n - 1;
  if (k == 0) return 2 * round >= n ? Pair{fixed, round} : Pair{round, fixed};
  return {p < fixed ? p : p - fixed, q >= 0 ? q : q + fixed};
}

__device__ __forceinline__ double approximate_inverse_sqrt(double x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(float(x)));
  return y;
#else
  return 1.0f / __fsqrt_rn(float(x));
#endif
}

// To an ulp or so, of a number in float32's normal range: a third-order step from a 22-bit guess.
__device__ __forceinline__ double inverse_sqrt(double x) {
  const double y = approximate_inverse_sqrt(x), error = fma(-(x * y), y, 1.0);
  return fma(y * error, fma(0.375, error, 0.5), y);
}

__device__ __forceinline__ double power_of_two(int exponent) { return bit_cast<double>(uint64_t(1023 + exponent) << 52); }

// floor(log2(x)) of a finite number, denormal ones included.
__device__ __forceinline__ int exponent_of(double x) {
  const bool tiny = x < 0x1p-1000;
  return int(bit_cast<uint64_t>(tiny ? x * 0x1p54 : x) >> 52) - 1023 - (tiny ? 54 : 0);
}

// One matrix and where its parts are.
struct Problem {
  double* a;             // n x n, in shared memory
  double* v;             // l x n in shared memory, or l x l in global memory: eigenvectors as columns
  double* diagonal;      // n: kept apart from `a`, whose diagonal means nothing
  Rotation* rotations;   // n / 2 of this round, n / 2 of the next
  double* partial;       // one of each warp
  int* order;            // n
  int l, n;              // n: l, made even. Index n - 1 of an odd l is zero and stays so
  int pitch;             // of v
};

__device__ __forceinline__ Rotation* rotations_of(const Problem& m, int round) {
  return m.rotations + (round & 1) * (m.n / 2);
}

struct Sum {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};
struct Largest {
  __device__ __forceinline__ double operator()(double a, double b) const { return a < b ? b : a; }
};

// Of one number a thread, known to all of them, in a fixed order.
template <class Op>
__device__ __forceinline__ double over_block(const Problem& m, double x, int warps, const Op& op) {
#pragma unroll
  for (int d = kHalf; d > 0; d /= 2) x = op(x, __shfl_xor_sync(kAllLanes, x, d));
  __syncthreads();  // nobody reads the numbers of the last time any more
  if (lane_id() == 0) m.partial[warp_id()] = x;
  __syncthreads();
  x = m.partial[0];
#pragma unroll 1
  for (int i = 1; i < warps; ++i) x = op(x, m.partial[i]);
  return x;
}

// f(row, column) over rows x columns, neighbouring lanes at neighbouring columns.
template <class F>
__device__ __forceinline__ void for_each(int rows, int columns, int warps, const F& f) {
  for (int row = warp_id(); row < rows; row += warps)
    for (int column = lane_id(); column < columns; column += kWarp) f(row, column);
}

// The rotations of a round, and the diagonal after them, by one warp. With d = a_qq - a_pp and b = 2 a_pq the angle of less than
// 45 degrees has cos(2 t) = |d| / sqrt(d^2 + b^2).
__device__ __forceinline__ void find_rotations(const Problem& m, int round) {
  Rotation* rotations = rotations_of(m, round);
#pragma unroll 1
  for (int k = lane_id(); k < m.n / 2; k += kWarp) {
    const Pair pair = pair_of(k, round, m.n);
    const double element = m.a[pair.p * m.n + pair.q], app = m.diagonal[pair.p], aqq = m.diagonal[pair.q];
    Rotation rotation{1.0, 0.0};
    if (fabs(element) > kNegligible) {
      const double d = aqq - app, b = 2.0 * element, r = inverse_sqrt(fma(d, d, b * b));
      const double square = fma(fabs(d) * r, 0.5, 0.5), inverse = inverse_sqrt(square), sine = element * r * inverse;
      rotation = {square * inverse, d < 0.0 ? -sine : sine};
      const double shift = rotation.s * inverse * element;  // the tangent, times the element
      m.diagonal[pair.p] = app - shift;
      m.diagonal[pair.q] = aqq + shift;
    }
    rotations[k] = rotation;
  }
}

__device__ __forceinline__ void rotate(const Rotation& r, double& x, double& y) {
  const double before = x;
  x = fma(r.c, before, -(r.s * y));
  y = fma(r.s, before, r.c * y);
}

// This thread's share of a round: column pair j, and every `stride`th pair of rows from `first` on.
struct Share {
  int j, first, stride;
};

__device__ __forceinline__ void rotate_matrix(const Problem& m, int round, const Share& share) {
  const int n = m.n;
  if (share.j >= n / 2) return;
  const Rotation* rotations = rotations_of(m, round);
  const Rotation own = rotations[share.j];
  const Pair column = pair_of(share.j, round, n);
#pragma unroll 1
  for (int i = share.first; i < n / 2; i += share.stride) {
    const Rotation other = rotations[i];
    const Pair row = pair_of(i, round, n);
    double *top = m.a + row.p * n, *bottom = m.a + row.q * n;
    double pp = top[column.p], pq = top[column.q], qp = bottom[column.p], qq = bottom[column.q];
    rotate(own, pp, pq);
    rotate(own, qp, qq);
    rotate(other, pp, qp);
    rotate(other, pq, qq);
    top[column.p] = pp;
    top[column.q] = i == share.j ? 0.0 : pq;
    bottom[column.p] = i == share.j ? 0.0 : qp;
    bottom[column.q] = qq;
  }
}

__device__ __forceinline__ void rotate_vectors(const Problem& m, int round, const Share& share) {
  const Pair column = pair_of(share.j, round, m.n);
  if (share.j >= m.n / 2 || max(column.p, column.q) >= m.l) return;  // index n - 1 of an odd l is never rotated
  const Rotation own = rotations_of(m, round)[share.j];
#pragma unroll 2
  for (int row = 2 * share.first; row < m.l; row += 2 * share.stride) {
    double* at = m.v + row * m.pitch;
    double p = at[column.p], q = at[column.q];
    rotate(own, p, q);
    at[column.p] = p, at[column.q] = q;
    if (row + 1 == m.l) break;
    at += m.pitch;
    p = at[column.p], q = at[column.q];
    rotate(own, p, q);
    at[column.p] = p, at[column.q] = q;
  }
}

__device__ __forceinline__ void sweep(const Problem& m, const Share& share) {
  if (warp_id() == 0) find_rotations(m, 0);
  __syncthreads();
#pragma unroll 1
  for (int round = 0; round < m.n - 1; ++round) {
    if (warp_id() > 0) rotate_matrix(m, round, share);
    __syncthreads();
    if (warp_id() > 0) {
      rotate_vectors(m, round, share);
    } else if (round + 2 < m.n) {
      find_rotations(m, round + 1);
    }
    __syncthreads();
  }
}

// Each index's place in descending order, as `order`, and the eigenvalues there; the lower index first among equals.
__device__ __forceinline__ void sort(const Problem& m, int warps, double low, double high, double* w) {
  for (int i = int(threadIdx.x); i < m.l; i += warps * kWarp) {
    const double own = m.diagonal[i];
    int place = 0;
    for (int k = 0; k < m.l; ++k) {
      const double other = m.diagonal[k];
      place += other > own || (other == own && k < i);
    }
    m.order[place] = i;
    w[place] = own * low * high;
  }
}

// Doubles of shared memory for matrices of n rows (n even), without their eigenvectors.
__host__ __device__ constexpr int64_t doubles_for(int64_t n) { return n * n + 3 * n + kWarp + (n / 2 + 1) / 2 * 2; }

// `apart`: the eigenvectors are rotated where they are to be written, as shared memory has no room for them.
template <bool apart>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    symmetric_eigh(const double* matrices, double* values, double* vectors, int l, int warps) {
  DYNFED_DYNAMIC_SHARED(double, memory);
  const int64_t size = int64_t(l) * l;
  const double* from = matrices + blockIdx.x * size;
  double *w = values + int64_t(blockIdx.x) * l, *v = vectors + blockIdx.x * size;
  Problem m;
  m.l = l, m.n = l + (l & 1);
  m.a = memory;
  m.rotations = reinterpret_cast<Rotation*>(m.a + m.n * m.n);
  m.diagonal = m.a + m.n * m.n + 2 * m.n;
  m.partial = m.diagonal + m.n;
  m.order = reinterpret_cast<int*>(m.partial + kWarp);
  m.v = apart ? v : memory + doubles_for(m.n);
  m.pitch = apart ? l : m.n;

  double largest = 0.0;
  for_each(l, l, warps, [&](int row, int column) {
    const double x = fabs(from[row * l + column]);
    largest = Largest()(largest, x <= kLargest ? x : bit_cast<double>(kInfinite));  // NaN counts as infinite
  });
  largest = over_block(m, largest, warps, Largest());
  if (!(largest <= kLargest)) {
    const double nan = bit_cast<double>(kNan);
    for_each(l, l, warps, [&](int row, int column) { v[row * l + column] = nan; });
    for_each(1, l, warps, [&](int, int column) { w[column] = nan; });
    return;
  }

  // In two halves, as 2^1074 is no number. The lower triangle counts, as in LAPACK by torch's default.
  const int exponent = exponent_of(largest), half = exponent / 2, rest = exponent - half;
  const double down = power_of_two(-half), further = power_of_two(-rest);
  double squares = 0.0;
  for_each(m.n, m.n, warps, [&](int row, int column) {
    const bool inside = row < l;
    if (column <= row) {
      const double x = inside ? from[row * l + column] * down * further : 0.0;
      m.a[row * m.n + column] = m.a[column * m.n + row] = x;
      if (column == row) m.diagonal[row] = x;
      squares = fma(x, column == row ? x : 2.0 * x, squares);
    }
    if (inside && column < m.pitch) m.v[row * m.pitch + column] = column == row ? 1.0 : 0.0;
  });
  const double norm = over_block(m, squares, warps, Sum());

  const int chunks = (m.n / 2 + kHalf - 1) / kHalf, place = (warp_id() - 1) * 2 + lane_id() / kHalf;
  const Share share{place % chunks * kHalf + lane_id() % kHalf, place / chunks, 2 * (warps - 1) / chunks};
#pragma unroll 1
  for (int i = 0; i < kSweeps; ++i) {
    double off = 0.0;
    for_each(m.n, m.n, warps, [&](int row, int column) {
      const double x = row == column ? 0.0 : m.a[row * m.n + column];
      off = fma(x, x, off);
    });
    off = over_block(m, off, warps, Sum());
    if (off <= kTolerance * norm) break;
    sweep(m, share);
  }

  sort(m, warps, power_of_two(half), power_of_two(rest), w);
  if (apart) for_each(l, l, warps, [&](int row, int column) { m.a[row * m.n + column] = v[row * l + column]; });
  __syncthreads();
  const double* unsorted = apart ? m.a : m.v;
  for_each(l, l, warps, [&](int row, int column) { v[row * l + column] = unsorted[row * m.n + m.order[column]]; });
}

// For matrices of n rows, n even. All but the first warp make as many half warps for each 16 pairs of columns; enough of them to
// keep shared memory busy.
int warps_for(int64_t n) { return 1 + (n <= 16 ? 4 : n <= 32 ? 8 : n <= 64 ? 16 : n <= 96 ? 12 : 16); }

// `most` is how much shared memory a kernel may ask for: always as much, as another thread may launch at the same time.
template <class Kernel>
int launch(Kernel kernel, const double* a, int64_t batch, int64_t l, double* w, double* v, int64_t bytes, int most,
           void* stream) {
  if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) return error;
  const int warps = warps_for(l + (l & 1));
  DYNFED_LAUNCH_SHARED(kernel, unsigned(batch), unsigned(warps * kWarp), size_t(bytes), stream, a, w, v, int(l), warps);
  return cudaGetLastError();
}

}  // namespace
}  // namespace dynfed::cuda

extern "C" int dynfed_cuda_symmetric_eigh(const double* a, int64_t batch, int64_t l, double* w, double* v, void* stream) {
  using namespace dynfed::cuda;
  if (batch == 0 || l == 0) return 0;
  if (l > kMostSize) return kTooLarge;
  if (batch > INT32_MAX) return cudaErrorInvalidValue;
  int device = 0, most = 0;
  if (const int error = cudaGetDevice(&device)) return error;
  if (const int error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
  const int64_t n = l + (l & 1), alone = doubles_for(n) * 8, together = alone + n * n * 8;
  if (together <= most) return launch(symmetric_eigh<false>, a, batch, l, w, v, together, most, stream);
  if (alone <= most) return launch(symmetric_eigh<true>, a, batch, l, w, v, alone, most, stream);
  return kTooLarge;
}
