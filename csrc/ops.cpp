// The CPU kernels as torch operators, through torch's stable ABI: one binary for torch 2.11 and every later one.
//
// Namespace `dynfed_lightning_cpu` is private: dynfed_lightning/_ops_cpu.py calls it, ops.py has checked the arguments. The
// checks below only keep a wrong call from touching memory that is not the tensor's. `isa`: 0 is the best this CPU has.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "core/eden.h"
#include "core/eigh.h"
#include "core/rotate.h"
#include "core/table.h"
#include "glue.h"

namespace {

using dynfed::best_isa;
using dynfed::ceil_div;
using dynfed::check_buffer;
using dynfed::expect_writes;
using dynfed::Input;
using dynfed::input;
using dynfed::kBlock;
using dynfed::kCacheBytes;
using dynfed::kElementsPerThread;
using dynfed::Kernels;
using dynfed::kernels;
using dynfed::output;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kItemCost = 4 * kBlock;      // what a row of a table costs beside its elements, in elements

int64_t packed_size(int64_t n, int64_t bits) { return ceil_div(n * bits, 8); }

// ---- tensors and rows as the kernels take them ----

// For a tensor that somebody else is about to fill for the first time.
void expect_writes_to(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "Expected `t` to be a contiguous CPU tensor.");
  expect_writes(t.mutable_data_ptr(), t.numel() * int64_t(t.element_size()));
}

void check_numbers(int64_t bits, int64_t bucket) {
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "Expected `bits` to be an integer from 1 to 8, but got ", bits, ".");
  STD_TORCH_CHECK(bucket > 0 && bucket % 8 == 0, "Expected `bucket` to be a positive multiple of 8, but got ", bucket, ".");
}

dynfed::Rounding checked_rounding(int64_t rounding) {
  STD_TORCH_CHECK(rounding >= 0 && rounding <= 2, "Expected `rounding` to be from 0 to 2, but got ", rounding, ".");
  return dynfed::Rounding(rounding);
}

void check_bucket(int64_t bucket, dynfed::Rounding rounding) {
  STD_TORCH_CHECK(rounding != dynfed::Rounding::kEden || bucket <= dynfed::kEdenBucket, "Expected `bucket` to be at most ",
                  dynfed::kEdenBucket, " with EDEN's rounding, but got ", bucket, ".");
}

struct Row {
  int64_t start, length, bits, bucket, offset, packed, scales;
};
static_assert(sizeof(Row) == dynfed::kTableColumns * sizeof(int64_t), "a row of a table is read as it lies in memory");

struct Rows {
  const Row* data;
  int64_t count;
  const Row* begin() const { return data; }
  const Row* end() const { return data + count; }
};

Rows rows(const Tensor& table) {
  check_buffer("table", table, ScalarType::Long);
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == dynfed::kTableColumns, "Expected `table` to have ",
                  dynfed::kTableColumns, " columns.");
  return {static_cast<const Row*>(table.const_data_ptr()), table.size(0)};
}

// The row's values lie within a tensor of n values; a comparison per number, none of which overflows.
void check_values(const Row& r, int64_t n) {
  STD_TORCH_CHECK(r.length >= 0 && r.length <= n && r.start >= 0 && r.start <= n - r.length,
                  "Expected a row of `table` to lie within ", n, " values, but it has start ", r.start, " and length ",
                  r.length, ".");
  STD_TORCH_CHECK(r.offset >= 0 && r.offset % 8 == 0, "Expected a row's `offset` to be a multiple of 8, but got ",
                  r.offset, ".");
}

// The row's payload lies within arenas of `bytes` bytes and `scales` scales; its length has been checked.
void check_payload(const Row& r, int64_t bytes, int64_t scales) {
  check_numbers(r.bits, r.bucket);
  const int64_t size = packed_size(r.length, r.bits), buckets = ceil_div(r.length, r.bucket);
  STD_TORCH_CHECK(r.packed >= 0 && size <= bytes && r.packed <= bytes - size && r.scales >= 0 && buckets <= scales &&
                      r.scales <= scales - buckets,
                  "Expected a row's payload to lie within ", bytes, " bytes and ", scales, " scales, but it has ", size,
                  " bytes from ", r.packed, " and ", buckets, " scales from ", r.scales, ".");
}

// Lays items on the line of kernels.h, one after the other.
class Line {
 public:
  int64_t add(int64_t n) {
    const int64_t before = length_;
    length_ += ceil_div(n, kBlock) * kBlock + kItemCost;
    return before;
  }
  int64_t length() const { return length_; }
  // Shares [0, length) between torch's threads.
  template <class F>
  void run(const F& f) const {
    torch::stable::parallel_for(0, length_ / kBlock, kElementsPerThread / kBlock,
                                [&](int64_t begin, int64_t end) { f(begin * kBlock, end * kBlock); });
  }

 private:
  int64_t length_ = 0;
};

// ---- one vector ----

int64_t pack(const Tensor& codes, const Tensor& packed, int64_t bits, int64_t isa) {
  check_numbers(bits, 8);
  const int64_t n = codes.numel();
  check_buffer("codes", codes, ScalarType::Byte, n);
  check_buffer("packed", packed, ScalarType::Byte, packed_size(n, bits));
  const Kernels& k = kernels(isa);
  const auto* in = static_cast<const uint8_t*>(codes.const_data_ptr());
  auto* out = output<uint8_t>(packed);
  std::atomic<unsigned> seen{0};
  Line line;
  line.add(n);
  line.run([&](int64_t begin, int64_t end) { seen |= k.pack(in, out, int(bits), begin, std::min(end, n)); });
  return seen;
}

void unpack(const Tensor& packed, const Tensor& codes, int64_t bits, int64_t isa) {
  check_numbers(bits, 8);
  const int64_t n = codes.numel();
  check_buffer("codes", codes, ScalarType::Byte, n);
  check_buffer("packed", packed, ScalarType::Byte, packed_size(n, bits));
  const Kernels& k = kernels(isa);
  const auto* in = static_cast<const uint8_t*>(packed.const_data_ptr());
  auto* out = output<uint8_t>(codes);
  Line line;
  line.add(n);
  const bool stream = n >= kCacheBytes;
  line.run([&](int64_t begin, int64_t end) { k.unpack(in, out, int(bits), n, stream, begin, std::min(end, n)); });
}

void quantize_pack(const Tensor& x, const Tensor& packed, const Tensor& scales, int64_t bits, int64_t bucket, int64_t seed,
                   int64_t offset, int64_t rounding, int64_t isa) {
  check_numbers(bits, bucket);
  const dynfed::Rounding how = checked_rounding(rounding);
  check_bucket(bucket, how);
  const Input in = input(x);
  check_buffer("packed", packed, ScalarType::Byte, packed_size(in.n, bits));
  check_buffer("scales", scales, ScalarType::Float, ceil_div(in.n, bucket));
  const Kernels& k = kernels(isa);
  Line line;
  auto* const bytes = output<uint8_t>(packed);
  auto* const factors = output<float>(scales);
  const dynfed::QuantizeItem item{line.add(in.n), in.n, bucket, uint64_t(offset), int(bits), in.dtype, in.data, bytes, factors};
  const dynfed::QuantizeArgs args{&item, 1, uint64_t(seed), how};
  line.run([&](int64_t begin, int64_t end) { k.quantize(args, begin, end); });
}

// All clients' payloads of one vector.
std::vector<dynfed::Payload> payloads(const std::vector<Tensor>& packed, const std::vector<Tensor>& scales,
                                      const std::vector<int64_t>& bits, int64_t n, int64_t bucket) {
  const size_t count = packed.size();
  STD_TORCH_CHECK(scales.size() == count && bits.size() == count, "Expected lists of one length.");
  std::vector<dynfed::Payload> result(count);
  for (size_t i = 0; i < count; ++i) {
    check_numbers(bits[i], bucket);
    check_buffer("packed", packed[i], ScalarType::Byte, packed_size(n, bits[i]));
    check_buffer("scales", scales[i], ScalarType::Float, ceil_div(n, bucket));
    result[i] = {static_cast<const uint8_t*>(packed[i].const_data_ptr()), static_cast<const float*>(scales[i].const_data_ptr()),
                 int(bits[i])};
  }
  return result;
}

void unpack_dequantize(const Tensor& packed, const Tensor& scales, const Tensor& out, int64_t bits, int64_t bucket,
                       int64_t isa) {
  const int64_t n = out.numel();
  check_buffer("out", out, ScalarType::Float, n);
  const auto one = payloads({packed}, {scales}, {bits}, n, bucket);
  const Kernels& k = kernels(isa);
  Line line;
  const dynfed::DequantizeItem item{line.add(n), n, bucket, output<float>(out), one.data()};
  const dynfed::DequantizeArgs args{&item, 1, nullptr, 1, n >= kCacheBytes / 4};
  line.run([&](int64_t begin, int64_t end) { k.dequantize(args, begin, end); });
}

std::vector<float> floats(const std::vector<double>& weights) { return {weights.begin(), weights.end()}; }

void accumulate(const Tensor& out, std::vector<Tensor> packed, std::vector<Tensor> scales, std::vector<int64_t> bits,
                int64_t bucket, std::vector<double> weights, int64_t isa) {
  const int64_t n = out.numel();
  check_numbers(1, bucket);
  check_buffer("out", out, ScalarType::Float, n);
  STD_TORCH_CHECK(weights.size() == packed.size(), "Expected lists of one length.");
  const auto clients = payloads(packed, scales, bits, n, bucket);
  const auto factors = floats(weights);
  const Kernels& k = kernels(isa);
  Line line;
  const dynfed::DequantizeItem item{line.add(n), n, bucket, static_cast<float*>(out.mutable_data_ptr()), clients.data()};
  const dynfed::DequantizeArgs args{&item, 1, factors.data(), int64_t(clients.size()), false};
  line.run([&](int64_t begin, int64_t end) { k.accumulate(args, begin, end); });
}

// ---- the rows of a table ----

// A list of one tensor is the flat vector; else there is a tensor per row, and the row's `start` means nothing.
template <class F>
void for_members(const std::vector<Tensor>& tensors, const Rows& table, const F& f) {
  if (tensors.size() == 1) {
    for (int64_t i = 0; i < table.count; ++i) f(tensors[0], table.data[i], i);
    return;
  }
  STD_TORCH_CHECK(int64_t(tensors.size()) == table.count, "Expected a tensor per row of `table`, but got ",
                  tensors.size(), " and ", table.count, " rows.");
  for (int64_t i = 0; i < table.count; ++i) {
    Row row = table.data[i];
    row.start = 0;
    STD_TORCH_CHECK(tensors[i].numel() == row.length, "Expected a tensor of ", row.length, " values, but got ",
                    tensors[i].numel(), ".");
    f(tensors[i], row, i);
  }
}

void quantize_pack_table(std::vector<Tensor> x, const Tensor& table, int64_t seed, int64_t rounding, const Tensor& packed,
                         const Tensor& scales, int64_t isa) {
  const Rows all = rows(table);
  const dynfed::Rounding how = checked_rounding(rounding);
  check_buffer("packed", packed, ScalarType::Byte);
  check_buffer("scales", scales, ScalarType::Float);
  auto* const bytes = output<uint8_t>(packed);
  auto* const factors = output<float>(scales);
  const int64_t byte_count = packed.numel(), factor_count = scales.numel();
  const Kernels& k = kernels(isa);
  std::vector<dynfed::QuantizeItem> items(all.count);
  Line line;
  Input in{};
  for_members(x, all, [&](const Tensor& tensor, const Row& r, int64_t i) {
    if (i == 0 || x.size() > 1) in = input(tensor);
    check_values(r, in.n);
    check_payload(r, byte_count, factor_count);
    check_bucket(r.bucket, how);
    items[i] = {line.add(r.length), r.length, r.bucket, uint64_t(r.offset), int(r.bits), in.dtype,
                in.data + r.start * in.item_size, bytes + r.packed, factors + r.scales};
  });
  const dynfed::QuantizeArgs args{items.data(), all.count, uint64_t(seed), how};
  line.run([&](int64_t begin, int64_t end) { k.quantize(args, begin, end); });
}

void unpack_dequantize_table(const Tensor& packed, const Tensor& scales, const Tensor& table, std::vector<Tensor> out,
                             int64_t isa) {
  const Rows all = rows(table);
  check_buffer("packed", packed, ScalarType::Byte);
  check_buffer("scales", scales, ScalarType::Float);
  const auto* const bytes = static_cast<const uint8_t*>(packed.const_data_ptr());
  const auto* const factors = static_cast<const float*>(scales.const_data_ptr());
  const int64_t byte_count = packed.numel(), factor_count = scales.numel();
  const Kernels& k = kernels(isa);
  std::vector<dynfed::Payload> sources(all.count);
  std::vector<dynfed::DequantizeItem> items(all.count);
  Line line;
  float* values = nullptr;
  int64_t n = 0;
  for_members(out, all, [&](const Tensor& tensor, const Row& r, int64_t i) {
    if (i == 0 || out.size() > 1) {
      check_buffer("out", tensor, ScalarType::Float);
      values = output<float>(tensor);
      n = tensor.numel();
    }
    check_values(r, n);
    check_payload(r, byte_count, factor_count);
    sources[i] = {bytes + r.packed, factors + r.scales, int(r.bits)};
    items[i] = {line.add(r.length), r.length, r.bucket, values + r.start, &sources[i]};
  });
  const dynfed::DequantizeArgs args{items.data(), all.count, nullptr, 1, line.length() >= kCacheBytes / 4};
  line.run([&](int64_t begin, int64_t end) { k.dequantize(args, begin, end); });
}

void accumulate_table(const Tensor& out, std::vector<Tensor> packed, std::vector<Tensor> scales, std::vector<Tensor> tables,
                      std::vector<double> weights, int64_t isa) {
  const int64_t clients = int64_t(packed.size()), n = out.numel();
  STD_TORCH_CHECK(scales.size() == packed.size() && tables.size() == packed.size() && weights.size() == packed.size(),
                  "Expected lists of one length.");
  check_buffer("out", out, ScalarType::Float, n);
  const Kernels& k = kernels(isa);
  if (clients == 0) return;
  const Rows first = rows(tables[0]);
  auto* const values = static_cast<float*>(out.mutable_data_ptr());
  std::vector<dynfed::Payload> sources(first.count * clients);
  std::vector<dynfed::DequantizeItem> items(first.count);
  Line line;
  for (int64_t i = 0; i < first.count; ++i) {
    const Row& r = first.data[i];
    check_values(r, n);
    items[i] = {line.add(r.length), r.length, r.bucket, values + r.start, &sources[i * clients]};
  }
  for (int64_t c = 0; c < clients; ++c) {
    const Rows all = rows(tables[c]);
    STD_TORCH_CHECK(all.count == first.count, "Expected tables of ", first.count, " rows, but got one of ", all.count, ".");
    check_buffer("packed", packed[c], ScalarType::Byte);
    check_buffer("scales", scales[c], ScalarType::Float);
    const auto* const bytes = static_cast<const uint8_t*>(packed[c].const_data_ptr());
    const auto* const factors = static_cast<const float*>(scales[c].const_data_ptr());
    const int64_t byte_count = packed[c].numel(), factor_count = scales[c].numel();
    for (int64_t i = 0; i < all.count; ++i) {
      const Row &r = all.data[i], &f = first.data[i];
      STD_TORCH_CHECK(r.start == f.start && r.length == f.length && r.bucket == f.bucket,
                      "Expected all tables to have the same starts, lengths and buckets, but row ", i, " differs.");
      check_payload(r, byte_count, factor_count);
      sources[i * clients + c] = {bytes + r.packed, factors + r.scales, int(r.bits)};
    }
  }
  const auto factors = floats(weights);
  const dynfed::DequantizeArgs args{items.data(), first.count, factors.data(), clients, false};
  line.run([&](int64_t begin, int64_t end) { k.accumulate(args, begin, end); });
}

void rotate(const Tensor& x, const Tensor& table, int64_t block, int64_t seed, bool inverse, int64_t isa) {
  const Rows all = rows(table);
  const int64_t n = x.numel();
  check_buffer("x", x, ScalarType::Float, n);
  STD_TORCH_CHECK(block >= 1 && block <= dynfed::kRotateBlock && (block & (block - 1)) == 0,
                  "Expected `block` to be a power of two up to ", dynfed::kRotateBlock, ", but got ", block, ".");
  auto* const values = static_cast<float*>(x.mutable_data_ptr());
  const Kernels& k = kernels(isa);
  std::vector<dynfed::RotateItem> items(all.count);
  Line line;
  for (int64_t i = 0; i < all.count; ++i) {
    const Row& r = all.data[i];
    check_values(r, n);
    items[i] = {line.add(r.length), r.length, dynfed::rotate_size(r.length, block), uint64_t(r.offset) >> 3, values + r.start};
  }
  const dynfed::RotateArgs args{items.data(), all.count, uint64_t(seed), inverse};
  line.run([&](int64_t begin, int64_t end) { k.rotate(args, begin, end); });
}

// ---- dense matrices ----

// Doubles aligned as a vector of any instruction set.
class Workspace {
 public:
  explicit Workspace(int64_t size) : memory_(new double[size + 8]) {}
  double* data() { return reinterpret_cast<double*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t(63)); }

 private:
  std::unique_ptr<double[]> memory_;
};

// All matrices, shared out.
void eigh_all(const Kernels& k, const dynfed::EighArgs& args, int64_t count) {
  // Few or large matrices are computed one by one, and so are shared one by one.
  const int64_t n = args.n, unit = count < 4 || n > dynfed::kEighLanes ? 1 : k.lanes;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (unit * n * n * 4));
  torch::stable::parallel_for(0, ceil_div(count, unit), grain, [&](int64_t begin, int64_t end) {
    Workspace work(dynfed::eigh_work(n, unit));
    k.symmetric_eigh(args, work.data(), begin * unit, std::min(end * unit, count));
  });
}

void symmetric_eigh(const Tensor& a, const Tensor& w, const Tensor& v, int64_t isa) {
  STD_TORCH_CHECK(a.dim() == 3 && a.size(1) == a.size(2), "Expected `a` to be a batch of square matrices.");
  const int64_t count = a.size(0), n = a.size(1);
  STD_TORCH_CHECK(n >= 1 && n <= dynfed::kEighMost, "Expected matrices of 1 to ", dynfed::kEighMost, " rows, but got ", n, ".");
  check_buffer("a", a, ScalarType::Double);
  check_buffer("w", w, ScalarType::Double, count * n);
  check_buffer("v", v, ScalarType::Double, count * n * n);
  eigh_all(kernels(isa), {static_cast<const double*>(a.const_data_ptr()), static_cast<double*>(w.mutable_data_ptr()),
                          static_cast<double*>(v.mutable_data_ptr()), n}, count);
}

// A batch of matrices of few long rows, [count, rows, columns].
struct LongRows {
  explicit LongRows(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 3, "Expected `x` to be a batch of matrices.");
    const bool doubles = x.scalar_type() == ScalarType::Double;
    check_buffer("x", x, doubles ? ScalarType::Double : ScalarType::Float);
    count = x.size(0), rows = x.size(1), columns = x.size(2);
    STD_TORCH_CHECK(rows >= 1 && rows <= dynfed::kEighMost, "Expected matrices of 1 to ", dynfed::kEighMost,
                    " rows, but got ", rows, ".");
    data = static_cast<const char*>(x.const_data_ptr());
    type = doubles ? dynfed::Real::kFloat64 : dynfed::Real::kFloat32;
    bytes = rows * columns * (doubles ? 8 : 4);
  }

  // f(i, work) for every matrix, shared out; each costs about rows^2 columns.
  template <class F>
  void run(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread * 8 / std::max<int64_t>(1, rows * rows * columns));
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      Workspace work(dynfed::kRowsWork);
      for (int64_t i = begin; i < end; ++i) f(i, work.data());
    });
  }

  const char* data;
  dynfed::Real type;
  int64_t count, rows, columns, bytes;
};

// The eigenvalues and eigenvectors of x x', which is in float64.
void row_spectrum(const Tensor& x, const Tensor& w, const Tensor& v, int64_t isa) {
  const LongRows all(x);
  const int64_t n = all.rows, size = n * n;
  check_buffer("w", w, ScalarType::Double, all.count * n);
  check_buffer("v", v, ScalarType::Double, all.count * size);
  const Kernels& k = kernels(isa);
  Workspace grams(all.count * size);
  all.run([&](int64_t i, double* work) {
    k.gram(all.data + i * all.bytes, all.type, n, all.columns, grams.data() + i * size, work);
  });
  eigh_all(k, {grams.data(), static_cast<double*>(w.mutable_data_ptr()), static_cast<double*>(v.mutable_data_ptr()), n}, all.count);
}

// _reference.orthonormal_rows.
void orthonormal_rows(const Tensor& x, const Tensor& q, double drop, double loose, int64_t isa) {
  const LongRows all(x);
  const int64_t n = all.rows, size = n * n;
  check_buffer("q", q, x.scalar_type(), all.count * n * all.columns);
  auto* const out = static_cast<char*>(q.mutable_data_ptr());
  const Kernels& k = kernels(isa);
  Workspace memory(all.count * (2 * size + n));
  double *const grams = memory.data(), *const vectors = grams + all.count * size, *const values = vectors + all.count * size;
  all.run([&](int64_t i, double* work) { k.gram(all.data + i * all.bytes, all.type, n, all.columns, grams + i * size, work); });
  eigh_all(k, {grams, values, vectors, n}, all.count);
  all.run([&](int64_t i, double* work) {
    double* const factors = grams + i * size;
    const double *w = values + i * n, *v = vectors + i * size;
    double least = w[0];
    for (int64_t r = 0; r < n; ++r) {
      const bool kept = w[r] > drop * w[0];
      const double scale = kept ? 1.0 / std::sqrt(w[r]) : 0.0;
      if (kept) least = w[r];
      for (int64_t c = 0; c < n; ++c) factors[r * n + c] = v[c * n + r] * scale;
    }
    char* const to = out + i * all.bytes;
    k.combine(factors, n, all.data + i * all.bytes, all.type, n, all.columns, to, work);
    if (least >= loose * w[0]) return;
    k.gram(to, all.type, n, all.columns, factors, work);
    for (int64_t j = 0; j < size; ++j) factors[j] = (j % (n + 1) == 0 ? 1.5 : 0.0) - 0.5 * factors[j];
    k.combine(factors, n, to, all.type, n, all.columns, to, work);
  });
}

// t x, with t in float64.
void combine_rows(const Tensor& t, const Tensor& x, const Tensor& out, int64_t isa) {
  const LongRows all(x);
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == all.count && t.size(1) >= 1 && t.size(2) == all.rows,
                  "Expected `t` to be a batch of matrices of ", all.rows, " columns.");
  const int64_t wanted = t.size(1);
  check_buffer("t", t, ScalarType::Double);
  check_buffer("out", out, x.scalar_type(), all.count * wanted * all.columns);
  const auto* const factors = static_cast<const double*>(t.const_data_ptr());
  auto* const to = static_cast<char*>(out.mutable_data_ptr());
  const Kernels& k = kernels(isa);
  all.run([&](int64_t i, double* work) {
    k.combine(factors + i * wanted * all.rows, wanted, all.data + i * all.bytes, all.type, all.rows, all.columns,
              to + i * (all.bytes / all.rows) * wanted, work);
  });
}

void squared_norm(const Tensor& a, const Tensor& out, int64_t isa) {
  constexpr int64_t kPiece = 1 << 15;  // values whose squares are added up in one go: part of the result
  const ScalarType type = a.scalar_type();
  const bool doubles = type == ScalarType::Double;
  STD_TORCH_CHECK(a.dim() == 3, "Expected `a` to be a batch of matrices.");
  const int64_t count = a.size(0);
  check_buffer("out", out, ScalarType::Double, count);
  if (doubles) check_buffer("a", a, type);
  const void* const data = doubles ? a.const_data_ptr() : input(a).data;
  const dynfed::Real real = doubles                          ? dynfed::Real::kFloat64
                            : type == ScalarType::Float      ? dynfed::Real::kFloat32
                            : type == ScalarType::BFloat16   ? dynfed::Real::kBFloat16
                                                             : dynfed::Real::kFloat16;
  const Kernels& k = kernels(isa);
  const int64_t n = a.size(1) * a.size(2), pieces = ceil_div(n, kPiece);
  std::vector<double> sums(count * pieces);
  torch::stable::parallel_for(0, count * pieces, kElementsPerThread * 4 / std::min(kPiece, std::max<int64_t>(n, 1)),
                              [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / pieces * n, at = i % pieces * kPiece;
      sums[i] = k.squared_norm(data, real, first + at, first + std::min(at + kPiece, n));
    }
  });
  auto* const totals = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t b = 0; b < count; ++b) {
    totals[b] = 0.0;
    for (int64_t i = 0; i < pieces; ++i) totals[b] += sums[b * pieces + i];
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(dynfed_lightning_cpu, m) {
  m.def("best_isa() -> int");
  m.def("expect_writes(Tensor(a!) t) -> ()");
  m.def("pack(Tensor codes, Tensor(a!) packed, int bits, int isa) -> int");
  m.def("unpack(Tensor packed, Tensor(a!) codes, int bits, int isa) -> ()");
  m.def("quantize_pack(Tensor x, Tensor(a!) packed, Tensor(b!) scales, int bits, int bucket, int seed, int offset, "
        "int rounding, int isa) -> ()");
  m.def("unpack_dequantize(Tensor packed, Tensor scales, Tensor(a!) out, int bits, int bucket, int isa) -> ()");
  m.def("accumulate(Tensor(a!) out, Tensor[] packed, Tensor[] scales, int[] bits, int bucket, float[] weights, int isa) -> ()");
  m.def("quantize_pack_table(Tensor[] x, Tensor table, int seed, int rounding, Tensor(a!) packed, Tensor(b!) scales, "
        "int isa) -> ()");
  m.def("unpack_dequantize_table(Tensor packed, Tensor scales, Tensor table, Tensor(a!)[] out, int isa) -> ()");
  m.def("accumulate_table(Tensor(a!) out, Tensor[] packed, Tensor[] scales, Tensor[] tables, float[] weights, int isa) -> ()");
  m.def("rotate(Tensor(a!) x, Tensor table, int block, int seed, bool inverse, int isa) -> ()");
  m.def("symmetric_eigh(Tensor a, Tensor(a!) w, Tensor(b!) v, int isa) -> ()");
  m.def("squared_norm(Tensor a, Tensor(a!) out, int isa) -> ()");
  m.def("row_spectrum(Tensor x, Tensor(a!) w, Tensor(b!) v, int isa) -> ()");
  m.def("orthonormal_rows(Tensor x, Tensor(a!) q, float drop, float loose, int isa) -> ()");
  m.def("combine_rows(Tensor t, Tensor x, Tensor(a!) out, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynfed_lightning_cpu, CompositeExplicitAutograd, m) { m.impl("best_isa", TORCH_BOX(&best_isa)); }

STABLE_TORCH_LIBRARY_IMPL(dynfed_lightning_cpu, CPU, m) {
  m.impl("expect_writes", TORCH_BOX(&expect_writes_to));
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
  m.impl("row_spectrum", TORCH_BOX(&row_spectrum));
  m.impl("orthonormal_rows", TORCH_BOX(&orthonormal_rows));
  m.impl("combine_rows", TORCH_BOX(&combine_rows));
}
