// What ops.cpp calls: raw device pointers in, a cudaError out (0 is success). No torch and no CUDA types: ops.cpp needs no CUDA
// headers, and the tests build it over emulated kernels.
//
// Lists of tensors lie in host memory and travel as kernel parameters: nothing is copied to the device and nothing waits, so
// every function may be captured into a CUDA graph. Pointers need the alignment of their element only.
#pragma once
#include <cstdint>

namespace dynfed::cuda {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };  // float64 for norms only

enum Rounding : int { kRoundNearest, kRoundStochastic, kRoundEden };  // as in dynfed_lightning/_reference.py

struct QuantizeRow {
  const void* x;
  uint8_t* packed;
  float* scales;
  int64_t n;
  uint64_t offset;  // global index of x[0]
  int64_t bucket;
  DType dtype;
  int32_t bits;
};

// A piece of the output, and what every payload of it shares.
struct OutputRow {
  float* out;
  int64_t n;
  int64_t bucket;
};

struct Payload {
  const uint8_t* packed;
  const float* scales;
  float weight;
  int32_t bits;
};

struct RotateRow {
  float* x;
  int64_t n;
  uint64_t offset;  // a multiple of 8
};

// A layer with centres. Of several kernels: not all of them use every field.
struct CenterRow {
  const void* x;
  const void* other;  // the gradient that comes in, or uint8 indices
  void* out;          // of the type of x; may be null where it is not wanted
  int64_t n;
  int32_t first;  // where its centres begin in the arena
  int32_t count;  // how many it has
  DType dtype;
  double scalar;  // sharpness, threshold or strength
};

constexpr int kMostCenters = 256;       // of a layer
constexpr int64_t kCenterChunk = 2048;  // values of a layer whose sums by centre are made apart
constexpr int64_t kCenterBins = 260;    // numbers that `prox_centers` needs for each centre
constexpr int64_t kNormChunk = 2048;  // values of a matrix that are added up apart
constexpr int kTooLarge = -1;         // instead of a cudaError: there is no kernel for matrices of this size

}  // namespace dynfed::cuda

extern "C" {

// `seen` is one integer on the device: the bitwise or of all codes is or-ed into it.
int dynfed_cuda_pack(const uint8_t* codes, int64_t n, int bits, uint8_t* packed, int32_t* seen, void* stream);

int dynfed_cuda_unpack(const uint8_t* packed, int64_t n, int bits, uint8_t* codes, void* stream);

int dynfed_cuda_quantize(const dynfed::cuda::QuantizeRow* rows, int64_t count, uint64_t seed, int rounding, void* stream);

// One payload a row. Weights are not used.
int dynfed_cuda_dequantize(const dynfed::cuda::OutputRow* rows, const dynfed::cuda::Payload* payloads, int64_t count,
                           void* stream);

// payloads[row * clients + client]; clients are added in ascending order.
int dynfed_cuda_accumulate(const dynfed::cuda::OutputRow* rows, const dynfed::cuda::Payload* payloads, int64_t count,
                           int64_t clients, void* stream);

int dynfed_cuda_rotate(const dynfed::cuda::RotateRow* rows, int64_t count, int64_t block, uint64_t seed, int inverse,
                       void* stream);

// a [batch, l, l], w [batch, l] descending, v [batch, l, l] with eigenvectors as columns. kTooLarge where l is beyond 128, or the
// matrix alone beyond the device's shared memory.
int dynfed_cuda_symmetric_eigh(const double* a, int64_t batch, int64_t l, double* w, double* v, void* stream);

// a [batch, size] contiguous, out [batch]; `partial` has room for ceil(size / kNormChunk) numbers for each matrix.
int dynfed_cuda_squared_norm(const void* a, dynfed::cuda::DType dtype, int64_t batch, int64_t size, double* partial, double* out,
                             void* stream);

// out = soft quantisation of x.
int dynfed_cuda_soft_quantize(const dynfed::cuda::CenterRow* rows, int64_t count, const float* centers, void* stream);

// Of the gradient `other`: out = that of x, and dcenters (an arena like that of the centres), unless it is null. `partial` has
// room for ceil(n / kCenterChunk) * count numbers for each row.
int dynfed_cuda_soft_quantize_backward(const dynfed::cuda::CenterRow* rows, int64_t count, const float* centers, float* partial,
                                       float* dcenters, void* stream);

// out = the nearest centre's value, and the index to `other`, which is written.
int dynfed_cuda_nearest_center(const dynfed::cuda::CenterRow* rows, int64_t count, const float* centers, void* stream);

// out, which may be x, = the proximal step of x.
int dynfed_cuda_prox_weights(const dynfed::cuda::CenterRow* rows, int64_t count, const float* centers, void* stream);

// The proximal step of `proposal` with the members that `centers` have in x. `bins` has room for kCenterBins numbers for each of
// `total` centres.
int dynfed_cuda_prox_centers(const dynfed::cuda::CenterRow* rows, int64_t count, const float* proposal, const float* centers,
                             int64_t total, uint64_t* bins, float* out, void* stream);

// out = the sums of x by the index in `other`, an arena, in which an index beyond counts nowhere. `partial`
// as above.
int dynfed_cuda_center_sums(const dynfed::cuda::CenterRow* rows, int64_t count, float* partial, float* out, void* stream);

// Makes `device` the current one of this library's CUDA runtime.
int dynfed_cuda_set_device(int device);

const char* dynfed_cuda_error_string(int error);

}
