// The CUDA kernels as torch operators, through torch's stable ABI. Namespace `dynfed_lightning_cuda` is private:
// dynfed_lightning/_ops_cuda.py calls it, ops.py has checked the arguments. The checks below only keep a wrong call from
// touching memory that is not a tensor's. No CUDA header is needed: the kernels are behind launchers.h.
//
// The tests build this file with DYNFED_CUDA_EMULATED: the same operators on CPU tensors, over kernels that run on the CPU.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <utility>
#include <vector>

#include "../core/eden.h"
#include "../core/rotate.h"
#include "../core/table.h"
#include "launchers.h"

#ifdef DYNFED_CUDA_EMULATED
#define DYNFED_NAMESPACE dynfed_lightning_cuda_emulated
#define DYNFED_KEY CPU
#else
#define DYNFED_NAMESPACE dynfed_lightning_cuda
#define DYNFED_KEY CUDA
#endif

namespace {

using namespace dynfed::cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- where and when: the device of a tensor, and its current stream ----

void check_cuda(int error, const char* what) {
  STD_TORCH_CHECK(error == 0, "dynfed_lightning: ", what, " failed: ", dynfed_cuda_error_string(error), ".");
}

#ifdef DYNFED_CUDA_EMULATED

struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
  void* stream = nullptr;
};

#else

// torch's own function, looked up at run time: the library must also load where torch has no CUDA.
void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "dynfed_lightning: this torch does not tell its current CUDA stream.");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "dynfed_lightning: torch could not tell its current CUDA stream.");
  return stream;
}

// For the length of a call the tensor's device is the current one, for torch and for the CUDA runtime linked into this library.
struct DeviceScope {
  explicit DeviceScope(const Tensor& t) : guard(t.get_device_index()), stream(current_stream(t.get_device_index())) {
    check_cuda(dynfed_cuda_set_device(t.get_device_index()), "choosing the device");
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
};

#endif

// ---- checks ----

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Bytes of n codes; n * bits itself might overflow.
int64_t packed_size(int64_t n, int64_t bits) { return n / 8 * bits + ceil_div(n % 8 * bits, 8); }

bool on_device(const Tensor& t) {
#ifdef DYNFED_CUDA_EMULATED
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

void check_tensor(const char* name, const Tensor& t, ScalarType dtype, const Tensor& like) {
  STD_TORCH_CHECK(on_device(t) && t.get_device_index() == like.get_device_index() && t.is_contiguous() &&
                      t.scalar_type() == dtype,
                  "Expected `", name, "` to be a contiguous tensor of the right type on the device of the others.");
}

void check_size(const char* name, int64_t got, int64_t size) {
  STD_TORCH_CHECK(got == size, "Expected `", name, "` to have ", size, " elements, but got ", got, ".");
}

void check_numbers(int64_t bits, int64_t bucket) {
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "Expected `bits` to be an integer from 1 to 8, but got ", bits, ".");
  STD_TORCH_CHECK(bucket > 0 && bucket % 8 == 0 && bucket <= int64_t(1) << 31,
                  "Expected `bucket` to be a multiple of 8 from 8 to 2**31, but got ", bucket, ".");
}

void check_rounding(int64_t rounding, int64_t bucket) {
  STD_TORCH_CHECK(rounding >= kRoundNearest && rounding <= kRoundEden, "Expected `rounding` to be 0, 1 or 2, but got ",
                  rounding, ".");
  STD_TORCH_CHECK(rounding != kRoundEden || bucket <= dynfed::kEdenBucket, "Expected `bucket` to be at most ",
                  dynfed::kEdenBucket, " with EDEN's rounding, but got ", bucket, ".");
}

DType input_type(const Tensor& x, const Tensor& like) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "Expected `x` to be a tensor of float32, bfloat16 or float16.");
  check_tensor("x", x, type, like);
  return type == ScalarType::Float ? DType::kFloat32 : type == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

int64_t bytes_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

uint8_t* bytes(const Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); }
const uint8_t* const_bytes(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }
float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* const_floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }
const double* const_doubles(const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); }

// ---- tables ----

class Table {
 public:
  explicit Table(const Tensor& table) : table_(table), rows_(table.numel() / dynfed::kTableColumns) {
    STD_TORCH_CHECK(table.is_cpu() && table.is_contiguous() && table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                        table.size(1) == dynfed::kTableColumns,
                    "Expected `table` to be a contiguous CPU tensor of int64 [tensors, ", int(dynfed::kTableColumns), "].");
    data_ = static_cast<const int64_t*>(table.const_data_ptr());
    for (int64_t r = 0; r < rows_; ++r) {
      check_numbers(get(r, dynfed::kTableBits), get(r, dynfed::kTableBucket));
      STD_TORCH_CHECK(get(r, dynfed::kTableLength) >= 0 && get(r, dynfed::kTableOffset) >= 0 &&
                          get(r, dynfed::kTableOffset) % 8 == 0,
                      "Expected row ", r, " of the table to have a length of 0 or more and an offset that is a multiple of 8.");
    }
  }

  int64_t rows() const { return rows_; }
  int64_t get(int64_t row, dynfed::TableColumn column) const { return data_[row * dynfed::kTableColumns + column]; }

  // Where `size` elements of an arena of `total` begin for this row.
  int64_t place(int64_t row, dynfed::TableColumn column, int64_t size, int64_t total) const {
    const int64_t at = get(row, column);
    STD_TORCH_CHECK(at >= 0 && size <= total && at <= total - size, "Expected row ", row,
                    " of the table to lie within the tensors, but it asks for ", size, " elements from ", at, " on of ", total,
                    ".");
    return at;
  }
  int64_t packed_at(int64_t row, const Tensor& arena) const {
    return place(row, dynfed::kTablePacked, packed_size(get(row, dynfed::kTableLength), get(row, dynfed::kTableBits)),
                 arena.numel());
  }
  int64_t scales_at(int64_t row, const Tensor& arena) const {
    return place(row, dynfed::kTableScales, ceil_div(get(row, dynfed::kTableLength), get(row, dynfed::kTableBucket)),
                 arena.numel());
  }

 private:
  Tensor table_;
  int64_t rows_;
  const int64_t* data_;
};

// The tensor of a row and where the row begins in it: one flat vector for all of them, or one tensor each.
struct Member {
  const Tensor& tensor;
  int64_t start;
};

Member member(const std::vector<Tensor>& tensors, const Table& table, int64_t row) {
  const int64_t length = table.get(row, dynfed::kTableLength);
  if (tensors.size() == 1) return {tensors[0], table.place(row, dynfed::kTableStart, length, tensors[0].numel())};
  check_size("a row's tensor", tensors[row].numel(), length);
  return {tensors[row], 0};
}

void check_members(const std::vector<Tensor>& tensors, const Table& table) {
  STD_TORCH_CHECK(tensors.size() == 1 || int64_t(tensors.size()) == table.rows(),
                  "Expected one tensor, or one for each of the ", table.rows(), " rows of the table, but got ", tensors.size(),
                  ".");
}

// ---- the operators ----

void pack(const Tensor& codes, const Tensor& packed, const Tensor& seen, int64_t bits) {
  check_numbers(bits, 8);
  check_tensor("codes", codes, ScalarType::Byte, codes);
  check_tensor("packed", packed, ScalarType::Byte, codes);
  check_tensor("seen", seen, ScalarType::Int, codes);
  check_size("packed", packed.numel(), packed_size(codes.numel(), bits));
  check_size("seen", seen.numel(), 1);
  const DeviceScope scope(codes);
  check_cuda(dynfed_cuda_pack(const_bytes(codes), codes.numel(), int(bits), bytes(packed),
                              static_cast<int32_t*>(seen.mutable_data_ptr()), scope.stream),
             "pack");
}

void unpack(const Tensor& packed, const Tensor& codes, int64_t bits) {
  check_numbers(bits, 8);
  check_tensor("packed", packed, ScalarType::Byte, packed);
  check_tensor("codes", codes, ScalarType::Byte, packed);
  check_size("packed", packed.numel(), packed_size(codes.numel(), bits));
  const DeviceScope scope(packed);
  check_cuda(dynfed_cuda_unpack(const_bytes(packed), codes.numel(), int(bits), bytes(codes), scope.stream), "unpack");
}

void quantize_pack(const Tensor& x, const Tensor& packed, const Tensor& scales, int64_t bits, int64_t bucket, int64_t seed,
                   int64_t offset, int64_t rounding) {
  check_numbers(bits, bucket);
  check_rounding(rounding, bucket);
  const DType type = input_type(x, x);
  check_tensor("packed", packed, ScalarType::Byte, x);
  check_tensor("scales", scales, ScalarType::Float, x);
  check_size("packed", packed.numel(), packed_size(x.numel(), bits));
  check_size("scales", scales.numel(), ceil_div(x.numel(), bucket));
  const QuantizeRow row{x.const_data_ptr(), bytes(packed), floats(scales), x.numel(),
                        uint64_t(offset),   bucket,        type,           int32_t(bits)};
  const DeviceScope scope(x);
  check_cuda(dynfed_cuda_quantize(&row, 1, uint64_t(seed), int(rounding), scope.stream), "quantize_pack");
}

Payload payload(const Tensor& packed, const Tensor& scales, int64_t bits, int64_t bucket, double weight, const Tensor& out) {
  check_numbers(bits, bucket);
  check_tensor("packed", packed, ScalarType::Byte, out);
  check_tensor("scales", scales, ScalarType::Float, out);
  check_size("packed", packed.numel(), packed_size(out.numel(), bits));
  check_size("scales", scales.numel(), ceil_div(out.numel(), bucket));
  return {const_bytes(packed), const_floats(scales), float(weight), int32_t(bits)};
}

void unpack_dequantize(const Tensor& out, const Tensor& packed, const Tensor& scales, int64_t bits, int64_t bucket) {
  check_tensor("out", out, ScalarType::Float, out);
  const Payload one = payload(packed, scales, bits, bucket, 1.0, out);
  const OutputRow row{floats(out), out.numel(), bucket};
  const DeviceScope scope(out);
  check_cuda(dynfed_cuda_dequantize(&row, &one, 1, scope.stream), "unpack_dequantize");
}

void accumulate(const Tensor& out, std::vector<Tensor> packed, std::vector<Tensor> scales, std::vector<int64_t> bits,
                int64_t bucket, std::vector<double> weights) {
  const size_t clients = packed.size();
  STD_TORCH_CHECK(scales.size() == clients && bits.size() == clients && weights.size() == clients,
                  "Expected `packed`, `scales`, `bits`, `weights` to be lists of one length.");
  check_tensor("out", out, ScalarType::Float, out);
  check_numbers(1, bucket);
  std::vector<Payload> payloads;
  for (size_t c = 0; c < clients; ++c)
    payloads.push_back(payload(packed[c], scales[c], bits[c], bucket, weights[c], out));
  const OutputRow row{floats(out), out.numel(), bucket};
  const DeviceScope scope(out);
  check_cuda(dynfed_cuda_accumulate(&row, payloads.data(), 1, int64_t(clients), scope.stream), "accumulate");
}

void quantize_pack_table(std::vector<Tensor> x, const Tensor& table, const Tensor& packed, const Tensor& scales, int64_t seed,
                         int64_t rounding) {
  const Table rows(table);
  check_members(x, rows);
  check_tensor("packed", packed, ScalarType::Byte, packed);
  check_tensor("scales", scales, ScalarType::Float, packed);
  std::vector<QuantizeRow> list;
  for (int64_t r = 0; r < rows.rows(); ++r) {
    const int64_t bucket = rows.get(r, dynfed::kTableBucket);
    check_rounding(rounding, bucket);
    const Member m = member(x, rows, r);
    const DType type = input_type(m.tensor, packed);
    list.push_back({static_cast<const char*>(m.tensor.const_data_ptr()) + m.start * bytes_of(type),
                    bytes(packed) + rows.packed_at(r, packed), floats(scales) + rows.scales_at(r, scales),
                    rows.get(r, dynfed::kTableLength), uint64_t(rows.get(r, dynfed::kTableOffset)), bucket, type,
                    int32_t(rows.get(r, dynfed::kTableBits))});
  }
  const DeviceScope scope(packed);
  check_cuda(dynfed_cuda_quantize(list.data(), rows.rows(), uint64_t(seed), int(rounding), scope.stream),
             "quantize_pack_table");
}

Payload payload_of_row(const Table& table, int64_t row, const Tensor& packed, const Tensor& scales, double weight) {
  return {const_bytes(packed) + table.packed_at(row, packed), const_floats(scales) + table.scales_at(row, scales),
          float(weight), int32_t(table.get(row, dynfed::kTableBits))};
}

void unpack_dequantize_table(std::vector<Tensor> out, const Tensor& packed, const Tensor& scales, const Tensor& table) {
  const Table rows(table);
  check_members(out, rows);
  check_tensor("packed", packed, ScalarType::Byte, packed);
  check_tensor("scales", scales, ScalarType::Float, packed);
  std::vector<OutputRow> list;
  std::vector<Payload> payloads;
  for (int64_t r = 0; r < rows.rows(); ++r) {
    const Member m = member(out, rows, r);
    check_tensor("out", m.tensor, ScalarType::Float, packed);
    list.push_back({floats(m.tensor) + m.start, rows.get(r, dynfed::kTableLength), rows.get(r, dynfed::kTableBucket)});
    payloads.push_back(payload_of_row(rows, r, packed, scales, 1.0));
  }
  const DeviceScope scope(packed);
  check_cuda(dynfed_cuda_dequantize(list.data(), payloads.data(), rows.rows(), scope.stream), "unpack_dequantize_table");
}

void accumulate_table(const Tensor& out, std::vector<Tensor> packed, std::vector<Tensor> scales, std::vector<Tensor> tables,
                      std::vector<double> weights) {
  const size_t clients = packed.size();
  STD_TORCH_CHECK(scales.size() == clients && tables.size() == clients && weights.size() == clients,
                  "Expected `packed`, `scales`, `tables`, `weights` to be lists of one length.");
  check_tensor("out", out, ScalarType::Float, out);
  if (clients == 0) return;
  const std::vector<Table> client_rows(tables.begin(), tables.end());
  const Table& rows = client_rows[0];
  std::vector<OutputRow> list;
  std::vector<Payload> payloads;
  for (size_t c = 0; c < clients; ++c) {
    check_tensor("packed", packed[c], ScalarType::Byte, out);
    check_tensor("scales", scales[c], ScalarType::Float, out);
    check_size("a table", client_rows[c].rows(), rows.rows());
  }
  for (int64_t r = 0; r < rows.rows(); ++r) {
    const int64_t length = rows.get(r, dynfed::kTableLength), bucket = rows.get(r, dynfed::kTableBucket);
    const int64_t start = rows.place(r, dynfed::kTableStart, length, out.numel());
    list.push_back({floats(out) + start, length, bucket});
    for (size_t c = 0; c < clients; ++c) {
      const Table& own = client_rows[c];
      STD_TORCH_CHECK(own.get(r, dynfed::kTableStart) == start && own.get(r, dynfed::kTableLength) == length &&
                          own.get(r, dynfed::kTableBucket) == bucket,
                      "Expected the tables of all clients to have the same start, length and bucket in row ", r, ".");
      payloads.push_back(payload_of_row(own, r, packed[c], scales[c], weights[c]));
    }
  }
  const DeviceScope scope(out);
  check_cuda(dynfed_cuda_accumulate(list.data(), payloads.data(), rows.rows(), int64_t(clients), scope.stream),
             "accumulate_table");
}

void rotate(const Tensor& x, const Tensor& table, int64_t block, int64_t seed, bool inverse) {
  check_tensor("x", x, ScalarType::Float, x);
  STD_TORCH_CHECK(block >= 1 && block <= dynfed::kRotateBlock && (block & (block - 1)) == 0,
                  "Expected `block` to be a power of two up to ", dynfed::kRotateBlock, ", but got ", block, ".");
  const Table rows(table);
  std::vector<RotateRow> list;
  for (int64_t r = 0; r < rows.rows(); ++r) {
    const int64_t length = rows.get(r, dynfed::kTableLength);
    list.push_back({floats(x) + rows.place(r, dynfed::kTableStart, length, x.numel()), length,
                    uint64_t(rows.get(r, dynfed::kTableOffset))});
  }
  const DeviceScope scope(x);
  check_cuda(dynfed_cuda_rotate(list.data(), rows.rows(), block, uint64_t(seed), inverse, scope.stream), "rotate");
}

// False where no kernel takes matrices of this size on this device.
bool symmetric_eigh(const Tensor& a, const Tensor& w, const Tensor& v) {
  for (const auto& [name, t] : {std::pair("a", a), std::pair("w", w), std::pair("v", v)})
    check_tensor(name, t, ScalarType::Double, a);
  STD_TORCH_CHECK(a.dim() == 3 && a.size(1) == a.size(2), "Expected `a` to be a batch of square matrices.");
  check_size("w", w.numel(), a.size(0) * a.size(1));
  check_size("v", v.numel(), a.numel());
  const DeviceScope scope(a);
  const int error = dynfed_cuda_symmetric_eigh(const_doubles(a), a.size(0), a.size(1), doubles(w), doubles(v), scope.stream);
  if (error == kTooLarge) return false;
  check_cuda(error, "symmetric_eigh");
  return true;
}

void squared_norm(const Tensor& a, const Tensor& out, const Tensor& partial) {
  const ScalarType dtype = a.scalar_type();
  if (dtype == ScalarType::Double) check_tensor("a", a, dtype, a);
  const DType type = dtype == ScalarType::Double ? DType::kFloat64 : input_type(a, a);
  STD_TORCH_CHECK(a.dim() == 3, "Expected `a` to be a batch of matrices.");
  const int64_t size = a.size(1) * a.size(2);
  for (const auto& [name, t] : {std::pair("out", out), std::pair("partial", partial)})
    check_tensor(name, t, ScalarType::Double, a);
  check_size("out", out.numel(), a.size(0));
  check_size("partial", partial.numel(), a.size(0) * ceil_div(size, kNormChunk));
  const DeviceScope scope(a);
  check_cuda(dynfed_cuda_squared_norm(a.const_data_ptr(), type, a.size(0), size, doubles(partial), doubles(out), scope.stream),
             "squared_norm");
}

// ---- learned centres ----

// The layers of a list of tensors, whose centres lie one after the other: those of layer r from first[r] up to first[r + 1].
class Layers {
 public:
  Layers(const std::vector<Tensor>& x, const Tensor& first, int64_t total) : rows_(x.size()) {
    check_host("first", first, ScalarType::Long, int64_t(x.size()) + 1);
    const auto* at = static_cast<const int64_t*>(first.const_data_ptr());
    STD_TORCH_CHECK(at[0] == 0 && at[x.size()] == total && total <= INT32_MAX,
                    "Expected `first` to begin with 0 and to end with the number of centres.");
    for (size_t r = 0; r < x.size(); ++r) {
      const int64_t count = at[r + 1] - at[r];
      STD_TORCH_CHECK(count >= 1 && count <= kMostCenters && at[r] >= 0 && at[r] <= total, "Expected layer ", r, " to have 1 to ",
                      kMostCenters, " centres, but got ", count, ".");
      rows_[r] = {x[r].const_data_ptr(), nullptr, nullptr, x[r].numel(), int32_t(at[r]), int32_t(count), DType::kFloat32, 0.0};
      partials_ += ceil_div(rows_[r].n, kCenterChunk) * count;
    }
  }

  // The tensors themselves may be of any of the three types.
  void types(const std::vector<Tensor>& x, const Tensor& like) {
    for (size_t r = 0; r < x.size(); ++r) rows_[r].dtype = input_type(x[r], like);
  }

  // What goes with each layer: of the type of x.
  void outs(const char* name, const std::vector<Tensor>& x, const std::vector<Tensor>& out) {
    check_list(name, x, out);
    for (size_t r = 0; r < x.size(); ++r) rows_[r].out = out[r].mutable_data_ptr();
  }
  void others(const char* name, const std::vector<Tensor>& x, const std::vector<Tensor>& other) {
    check_list(name, x, other);
    for (size_t r = 0; r < x.size(); ++r) rows_[r].other = other[r].const_data_ptr();
  }
  void indices(const std::vector<Tensor>& x, const std::vector<Tensor>& index) {
    check_list("index", x, index, true);
    for (size_t r = 0; r < x.size(); ++r) rows_[r].other = index[r].const_data_ptr();
  }

  // A number for each layer.
  void scalars(const char* name, const Tensor& numbers) {
    check_host(name, numbers, ScalarType::Double, int64_t(rows_.size()));
    for (size_t r = 0; r < rows_.size(); ++r) rows_[r].scalar = static_cast<const double*>(numbers.const_data_ptr())[r];
  }

  const CenterRow* data() const { return rows_.data(); }
  int64_t size() const { return int64_t(rows_.size()); }
  int64_t partials() const { return partials_; }

 private:
  static void check_host(const char* name, const Tensor& t, ScalarType dtype, int64_t size) {
    STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == dtype && t.numel() == size, "Expected `", name,
                    "` to be a contiguous CPU tensor of ", size, " numbers of the right type.");
  }

  static void check_list(const char* name, const std::vector<Tensor>& x, const std::vector<Tensor>& other, bool bytes = false) {
    check_size(name, int64_t(other.size()), int64_t(x.size()));
    for (size_t r = 0; r < x.size(); ++r) {
      check_tensor(name, other[r], bytes ? ScalarType::Byte : x[r].scalar_type(), x[r]);
      check_size(name, other[r].numel(), x[r].numel());
    }
  }

  std::vector<CenterRow> rows_;
  int64_t partials_ = 0;
};

void soft_quantize(std::vector<Tensor> x, const Tensor& centers, const Tensor& first, const Tensor& sharpness,
                   std::vector<Tensor> out) {
  check_tensor("centers", centers, ScalarType::Float, centers);
  Layers layers(x, first, centers.numel());
  layers.types(x, centers);
  layers.outs("out", x, out);
  layers.scalars("sharpness", sharpness);
  const DeviceScope scope(centers);
  check_cuda(dynfed_cuda_soft_quantize(layers.data(), layers.size(), const_floats(centers), scope.stream), "soft_quantize");
}

// An empty `dx` or `dcenters` is not wanted.
void soft_quantize_backward(std::vector<Tensor> grad, std::vector<Tensor> x, const Tensor& centers, const Tensor& first,
                            const Tensor& sharpness, std::vector<Tensor> dx, const Tensor& partial, const Tensor& dcenters) {
  check_tensor("centers", centers, ScalarType::Float, centers);
  check_tensor("dcenters", dcenters, ScalarType::Float, centers);
  check_tensor("partial", partial, ScalarType::Float, centers);
  Layers layers(x, first, centers.numel());
  layers.types(x, centers);
  layers.others("grad", x, grad);
  layers.scalars("sharpness", sharpness);
  if (!dx.empty()) layers.outs("dx", x, dx);
  const bool wanted = dcenters.numel() > 0;
  if (wanted) {
    check_size("dcenters", dcenters.numel(), centers.numel());
    check_size("partial", partial.numel(), layers.partials());
  }
  const DeviceScope scope(centers);
  check_cuda(dynfed_cuda_soft_quantize_backward(layers.data(), layers.size(), const_floats(centers), floats(partial),
                                                wanted ? floats(dcenters) : nullptr, scope.stream),
             "soft_quantize_backward");
}

void nearest_center(std::vector<Tensor> x, const Tensor& centers, const Tensor& first, std::vector<Tensor> index,
                    std::vector<Tensor> value) {
  check_tensor("centers", centers, ScalarType::Float, centers);
  Layers layers(x, first, centers.numel());
  layers.types(x, centers);
  layers.indices(x, index);
  layers.outs("value", x, value);
  const DeviceScope scope(centers);
  check_cuda(dynfed_cuda_nearest_center(layers.data(), layers.size(), const_floats(centers), scope.stream), "nearest_center");
}

void prox_weights(std::vector<Tensor> y, const Tensor& centers, const Tensor& first, const Tensor& threshold,
                  std::vector<Tensor> out) {
  check_tensor("centers", centers, ScalarType::Float, centers);
  Layers layers(y, first, centers.numel());
  layers.types(y, centers);
  layers.outs("out", y, out);
  layers.scalars("threshold", threshold);
  const DeviceScope scope(centers);
  check_cuda(dynfed_cuda_prox_weights(layers.data(), layers.size(), const_floats(centers), scope.stream), "prox_weights");
}

void prox_centers(const Tensor& proposal, std::vector<Tensor> x, const Tensor& centers, const Tensor& first,
                  const Tensor& strength, const Tensor& bins, const Tensor& out) {
  for (const auto& [name, t] : {std::pair("centers", centers), std::pair("proposal", proposal), std::pair("out", out)}) {
    check_tensor(name, t, ScalarType::Float, centers);
    check_size(name, t.numel(), centers.numel());
  }
  check_tensor("bins", bins, ScalarType::Long, centers);
  check_size("bins", bins.numel(), centers.numel() * kCenterBins);
  Layers layers(x, first, centers.numel());
  layers.types(x, centers);
  layers.scalars("strength", strength);
  const DeviceScope scope(centers);
  check_cuda(dynfed_cuda_prox_centers(layers.data(), layers.size(), const_floats(proposal), const_floats(centers),
                                      centers.numel(), static_cast<uint64_t*>(bins.mutable_data_ptr()), floats(out),
                                      scope.stream),
             "prox_centers");
}

void center_sums(std::vector<Tensor> values, std::vector<Tensor> index, const Tensor& first, const Tensor& partial,
                 const Tensor& out) {
  check_tensor("out", out, ScalarType::Float, out);
  check_tensor("partial", partial, ScalarType::Float, out);
  Layers layers(values, first, out.numel());
  layers.types(values, out);
  layers.indices(values, index);
  check_size("partial", partial.numel(), layers.partials());
  const DeviceScope scope(out);
  check_cuda(dynfed_cuda_center_sums(layers.data(), layers.size(), floats(partial), floats(out), scope.stream), "center_sums");
}

}  // namespace

STABLE_TORCH_LIBRARY(DYNFED_NAMESPACE, m) {
  m.def("pack(Tensor codes, Tensor(a!) packed, Tensor(b!) seen, int bits) -> ()");
  m.def("unpack(Tensor packed, Tensor(a!) codes, int bits) -> ()");
  m.def("quantize_pack(Tensor x, Tensor(a!) packed, Tensor(b!) scales, int bits, int bucket, int seed, int offset, "
        "int rounding) -> ()");
  m.def("unpack_dequantize(Tensor(a!) out, Tensor packed, Tensor scales, int bits, int bucket) -> ()");
  m.def("accumulate(Tensor(a!) out, Tensor[] packed, Tensor[] scales, int[] bits, int bucket, float[] weights) -> ()");
  m.def("quantize_pack_table(Tensor[] x, Tensor table, Tensor(a!) packed, Tensor(b!) scales, int seed, int rounding) -> ()");
  m.def("unpack_dequantize_table(Tensor(a!)[] out, Tensor packed, Tensor scales, Tensor table) -> ()");
  m.def("accumulate_table(Tensor(a!) out, Tensor[] packed, Tensor[] scales, Tensor[] tables, float[] weights) -> ()");
  m.def("rotate(Tensor(a!) x, Tensor table, int block, int seed, bool inverse) -> ()");
  m.def("symmetric_eigh(Tensor a, Tensor(a!) w, Tensor(b!) v) -> bool");
  m.def("squared_norm(Tensor a, Tensor(a!) out, Tensor(b!) partial) -> ()");
  m.def("soft_quantize(Tensor[] x, Tensor centers, Tensor first, Tensor sharpness, Tensor(a!)[] out) -> ()");
  m.def("soft_quantize_backward(Tensor[] grad, Tensor[] x, Tensor centers, Tensor first, Tensor sharpness, Tensor(a!)[] dx, "
        "Tensor(b!) partial, Tensor(c!) dcenters) -> ()");
  m.def("nearest_center(Tensor[] x, Tensor centers, Tensor first, Tensor(a!)[] index, Tensor(b!)[] value) -> ()");
  m.def("prox_weights(Tensor[] y, Tensor centers, Tensor first, Tensor threshold, Tensor(a!)[] out) -> ()");
  m.def("prox_centers(Tensor proposal, Tensor[] x, Tensor centers, Tensor first, Tensor strength, Tensor(a!) bins, "
        "Tensor(b!) out) -> ()");
  m.def("center_sums(Tensor[] values, Tensor[] index, Tensor first, Tensor(a!) partial, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(DYNFED_NAMESPACE, DYNFED_KEY, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("quantize_pack", TORCH_BOX(&quantize_pack));
  m.impl("unpack_dequantize", TORCH_BOX(&unpack_dequantize));
  m.impl("accumulate", TORCH_BOX(&accumulate));
  m.impl("quantize_pack_table", TORCH_BOX(&quantize_pack_table));
  m.impl("unpack_dequantize_table", TORCH_BOX(&unpack_dequantize_table));
  m.impl("accumulate_table", TORCH_BOX(&accumulate_table));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("symmetric_eigh", TORCH_BOX(&symmetric_eigh));
  m.impl("squared_norm", TORCH_BOX(&squared_norm));
  m.impl("soft_quantize", TORCH_BOX(&soft_quantize));
  m.impl("soft_quantize_backward", TORCH_BOX(&soft_quantize_backward));
  m.impl("nearest_center", TORCH_BOX(&nearest_center));
  m.impl("prox_weights", TORCH_BOX(&prox_weights));
  m.impl("prox_centers", TORCH_BOX(&prox_centers));
  m.impl("center_sums", TORCH_BOX(&center_sums));
}
