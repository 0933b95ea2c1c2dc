// The CPU kernels as torch operators, through torch's stable ABI: one binary for torch 2.11 and every later one.
//
// Namespace `dynfed_lightning_cpu` is private: dynfed_lightning/_ops_cpu.py allocates the outputs and calls it, ops.py checks the
// arguments. The checks below only keep a wrong call from touching memory that is not the tensor's. `isa`: 0 is the best.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/kernels.h"

namespace {

using dynfed::Kernels;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 64;                // ranges of elements begin at multiples of it
constexpr int64_t kElementsPerThread = 32768; // about 10 us of work; less is not worth waking a thread

int64_t best_isa() {
#ifdef DYNFED_X86
  static const int64_t best = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c") ||
        !__builtin_cpu_supports("bmi2"))
        return 1;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? 3 : 2;
  }();
  return best;
#else
  return 1;
#endif
}

const Kernels& kernels(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= best_isa(), "Expected `isa` to be from 0 to ", best_isa(), ", but got ", isa, ".");
#ifdef DYNFED_X86
  const int64_t level = isa == 0 ? best_isa() : isa;
  if (level == 3) return dynfed::kAvx512Kernels;
  if (level == 2) return dynfed::kAvx2Kernels;
#endif
  return dynfed::kScalarKernels;
}

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

void check_buffer(const char* name, const Tensor& t, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == dtype && t.numel() == size, "Expected `", name,
                  "` to be a contiguous CPU tensor of the right type with ", size, " elements, but got ", t.numel(), ".");
}

void check_numbers(int64_t bits, int64_t bucket) {
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "Expected `bits` to be an integer from 1 to 8, but got ", bits, ".");
  STD_TORCH_CHECK(bucket > 0 && bucket % 8 == 0, "Expected `bucket` to be a positive multiple of 8, but got ", bucket, ".");
}

template <class F>
void for_elements(int64_t n, const F& f) {
  torch::stable::parallel_for(0, ceil_div(n, kBlock), kElementsPerThread / kBlock, [&](int64_t begin, int64_t end) {
    f(begin * kBlock, std::min(end * kBlock, n));
  });
}

int64_t pack(const Tensor& codes, const Tensor& packed, int64_t bits, int64_t isa) {
  check_numbers(bits, 8);
  const int64_t n = codes.numel();
  check_buffer("codes", codes, ScalarType::Byte, n);
  check_buffer("packed", packed, ScalarType::Byte, ceil_div(n * bits, 8));
  const Kernels& k = kernels(isa);
  const auto* in = static_cast<const uint8_t*>(codes.const_data_ptr());
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  std::atomic<unsigned> seen{0};
  for_elements(n, [&](int64_t begin, int64_t end) { seen |= k.pack(in, out, int(bits), begin, end); });
  return seen;
}

void unpack(const Tensor& packed, const Tensor& codes, int64_t bits, int64_t isa) {
  check_numbers(bits, 8);
  const int64_t n = codes.numel();
  check_buffer("codes", codes, ScalarType::Byte, n);
  check_buffer("packed", packed, ScalarType::Byte, ceil_div(n * bits, 8));
  const Kernels& k = kernels(isa);
  const auto* in = static_cast<const uint8_t*>(packed.const_data_ptr());
  auto* out = static_cast<uint8_t*>(codes.mutable_data_ptr());
  for_elements(n, [&](int64_t begin, int64_t end) { k.unpack(in, out, int(bits), n, begin, end); });
}

void quantize_pack(const Tensor& x, const Tensor& packed, const Tensor& scales, int64_t bits, int64_t bucket, int64_t seed,
                   int64_t offset, bool stochastic, int64_t isa) {
  check_numbers(bits, bucket);
  const int64_t n = x.numel(), buckets = ceil_div(n, bucket);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "Expected `x` to be a tensor of float32, bfloat16 or float16.");
  check_buffer("x", x, type, n);
  check_buffer("packed", packed, ScalarType::Byte, ceil_div(n * bits, 8));
  check_buffer("scales", scales, ScalarType::Float, buckets);
  const Kernels& k = kernels(isa);
  dynfed::QuantizeArgs args;
  args.x = x.const_data_ptr();
  args.dtype = type == ScalarType::Float      ? dynfed::DType::kFloat32
               : type == ScalarType::BFloat16 ? dynfed::DType::kBFloat16
                                              : dynfed::DType::kFloat16;
  args.n = n;
  args.bits = int(bits);
  args.bucket = bucket;
  args.seed = uint64_t(seed);
  args.offset = uint64_t(offset);
  args.stochastic = stochastic;
  args.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  args.scales = static_cast<float*>(scales.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / bucket);
  torch::stable::parallel_for(0, buckets, grain, [&](int64_t begin, int64_t end) { k.quantize(args, begin, end); });
}

std::vector<dynfed::Payload> payloads(const std::vector<Tensor>& packed, const std::vector<Tensor>& scales,
                                      const std::vector<int64_t>& bits, const std::vector<double>& weights, int64_t n,
                                      int64_t bucket) {
  const size_t count = packed.size();
  STD_TORCH_CHECK(scales.size() == count && bits.size() == count && weights.size() == count,
                  "Expected `packed`, `scales`, `bits`, `weights` to be lists of one length.");
  std::vector<dynfed::Payload> result(count);
  for (size_t i = 0; i < count; ++i) {
    check_numbers(bits[i], bucket);
    check_buffer("packed", packed[i], ScalarType::Byte, ceil_div(n * bits[i], 8));
    check_buffer("scales", scales[i], ScalarType::Float, ceil_div(n, bucket));
    result[i].packed = static_cast<const uint8_t*>(packed[i].const_data_ptr());
    result[i].scales = static_cast<const float*>(scales[i].const_data_ptr());
    result[i].bits = int(bits[i]);
    result[i].weight = float(weights[i]);
  }
  return result;
}

void unpack_dequantize(const Tensor& out, const Tensor& packed, const Tensor& scales, int64_t bits, int64_t bucket, int64_t isa) {
  const int64_t n = out.numel();
  check_numbers(bits, bucket);
  check_buffer("out", out, ScalarType::Float, n);
  const auto one = payloads({packed}, {scales}, {bits}, {1.0}, n, bucket);
  const Kernels& k = kernels(isa);
  const dynfed::DequantizeArgs args{static_cast<float*>(out.mutable_data_ptr()), n, bucket, one.data(), 1};
  for_elements(n, [&](int64_t begin, int64_t end) { k.dequantize(args, begin, end); });
}

void accumulate(const Tensor& out, std::vector<Tensor> packed, std::vector<Tensor> scales, std::vector<int64_t> bits,
                int64_t bucket, std::vector<double> weights, int64_t isa) {
  const int64_t n = out.numel();
  check_numbers(1, bucket);
  check_buffer("out", out, ScalarType::Float, n);
  const auto clients = payloads(packed, scales, bits, weights, n, bucket);
  const Kernels& k = kernels(isa);
  const dynfed::DequantizeArgs args{static_cast<float*>(out.mutable_data_ptr()), n, bucket, clients.data(),
                                    int64_t(clients.size())};
  for_elements(n, [&](int64_t begin, int64_t end) { k.accumulate(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY(dynfed_lightning_cpu, m) {
  m.def("best_isa() -> int");
  m.def("pack(Tensor codes, Tensor(a!) packed, int bits, int isa) -> int");
  m.def("unpack(Tensor packed, Tensor(a!) codes, int bits, int isa) -> ()");
  m.def("quantize_pack(Tensor x, Tensor(a!) packed, Tensor(b!) scales, int bits, int bucket, int seed, int offset, "
        "bool stochastic, int isa) -> ()");
  m.def("unpack_dequantize(Tensor(a!) out, Tensor packed, Tensor scales, int bits, int bucket, int isa) -> ()");
  m.def("accumulate(Tensor(a!) out, Tensor[] packed, Tensor[] scales, int[] bits, int bucket, float[] weights, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynfed_lightning_cpu, CompositeExplicitAutograd, m) { m.impl("best_isa", TORCH_BOX(&best_isa)); }

STABLE_TORCH_LIBRARY_IMPL(dynfed_lightning_cpu, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("quantize_pack", TORCH_BOX(&quantize_pack));
  m.impl("unpack_dequantize", TORCH_BOX(&unpack_dequantize));
  m.impl("accumulate", TORCH_BOX(&accumulate));
}
