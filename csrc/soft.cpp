// The kernels of learned centres as torch operators; as ops.cpp, in the same private namespace. A call is about the layers of a
// model: lists of tensors, and the centres of all layers in one tensor, those of layer l from first[l] to first[l + 1].
#include "cpu/soft_plan.h"

#include <memory>
#include <mutex>
#include <vector>

#include "core/convert.h"
#include "glue.h"

namespace {

using dynfed::ceil_div;
using dynfed::check_buffer;
using dynfed::DType;
using dynfed::Input;
using dynfed::Kernels;
using dynfed::kMostCenters;
using dynfed::kSoftBlock;
using dynfed::NearestPlan;
using dynfed::SoftLayer;
using dynfed::SoftPlan;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_length(const char* name, size_t count, size_t wanted) {
  STD_TORCH_CHECK(count == wanted, "Expected `", name, "` to have ", wanted, " entries, but got ", count, ".");
}

// Where the centres of each layer are.
struct Centers {
  Centers(const Tensor& centers, const Tensor& first) : count(first.numel() - 1) {
    check_buffer("centers", centers, ScalarType::Float);
    data = static_cast<const float*>(centers.const_data_ptr());
    read_bounds(first, centers.numel());
  }
  Centers(const Tensor& first, int64_t total) : count(first.numel() - 1), data(nullptr) { read_bounds(first, total); }

  int64_t size(int64_t layer) const { return bounds[layer + 1] - bounds[layer]; }
  const float* of(int64_t layer) const { return data + bounds[layer]; }

  int64_t count;
  const float* data;
  const int64_t* bounds;

 private:
  void read_bounds(const Tensor& first, int64_t total) {
    check_buffer("first", first, ScalarType::Long);
    STD_TORCH_CHECK(count >= 0, "Expected `first` to have an entry.");
    bounds = static_cast<const int64_t*>(first.const_data_ptr());
    STD_TORCH_CHECK(bounds[0] == 0 && bounds[count] == total, "Expected `first` to go from 0 to ", total, ".");
    for (int64_t l = 0; l < count; ++l)
      STD_TORCH_CHECK(bounds[l] < bounds[l + 1] && bounds[l + 1] - bounds[l] <= kMostCenters,
                      "Expected every layer to have 1 to ", kMostCenters, " centres.");
  }
};

const double* numbers(const char* name, const Tensor& t, int64_t count) {
  check_buffer(name, t, ScalarType::Double, count);
  return static_cast<const double*>(t.const_data_ptr());
}

// Layers cut into blocks, which are shared out; the last of a layer may be short.
class Layers {
 public:
  explicit Layers(const std::vector<Tensor>& x) : layers(x.size()), first_block(x.size() + 1) {
    for (size_t l = 0; l < x.size(); ++l) {
      const Input in = dynfed::input(x[l]);
      layers[l] = {in.n, in.dtype, false, in.data, nullptr, nullptr, nullptr, nullptr, nullptr};
      first_block[l + 1] = first_block[l] + ceil_div(in.n, kSoftBlock);
      bytes += in.n * in.item_size;
    }
  }

  // A tensor of the shape and dtype of the layer's values.
  void* matching(const char* name, const Tensor& t, const Tensor& x) const {
    check_buffer(name, t, x.scalar_type(), x.numel());
    return t.mutable_data_ptr();
  }
  void set_out(const char* name, const std::vector<Tensor>& out, const std::vector<Tensor>& x) {
    check_length(name, out.size(), layers.size());
    for (size_t l = 0; l < layers.size(); ++l) {
      SoftLayer& layer = layers[l];
      layer.out = matching(name, out[l], x[l]);
      if (layer.out == layer.x) continue;  // its lines are in the caches
      layer.stream = bytes >= dynfed::kCacheBytes;
      dynfed::expect_writes(layer.out, x[l].numel() * int64_t(x[l].element_size()));
    }
  }

  // f(l, block of the layer, begin, end) for every block; a thread takes at least `grain` of them.
  template <class F>
  void for_blocks(int64_t grain, const F& f) const {
    torch::stable::parallel_for(0, first_block.back(), grain, [&](int64_t begin, int64_t end) {
      size_t l = size_t(std::upper_bound(first_block.begin(), first_block.end(), begin) - first_block.begin()) - 1;
      for (int64_t b = begin; b < end; ++b) {
        while (b >= first_block[l + 1]) ++l;
        const int64_t from = (b - first_block[l]) * kSoftBlock;
        f(l, b - first_block[l], from, std::min(from + kSoftBlock, layers[l].n));
      }
    });
  }

  std::vector<SoftLayer> layers;
  std::vector<int64_t> first_block;
  int64_t bytes = 0;
};

// Left as it comes, in both: a plan is long, and filled in as far as it is read.
std::unique_ptr<SoftPlan[]> soft_plans(const Centers& centers, const double* sharpness, Layers& all) {
  std::unique_ptr<SoftPlan[]> plans(new SoftPlan[centers.count]);
  for (int64_t l = 0; l < centers.count; ++l) {
    dynfed::plan_soft(centers.of(l), centers.size(l), sharpness[l], plans[l]);
    all.layers[l].soft = &plans[l];
  }
  return plans;
}

std::unique_ptr<NearestPlan[]> nearest_plans(const Centers& centers, const double* thresholds, Layers& all) {
  std::unique_ptr<NearestPlan[]> plans(new NearestPlan[centers.count]);
  for (int64_t l = 0; l < centers.count; ++l) {
    dynfed::plan_nearest(centers.of(l), centers.size(l), thresholds == nullptr ? 0.0 : thresholds[l], plans[l]);
    all.layers[l].nearest = &plans[l];
  }
  return plans;
}

// Blocks that make about 10 us of work: a block of a layer with two centres takes 2, one with 256 takes 100.
int64_t soft_grain(const Centers& centers) {
  const int64_t mean = centers.bounds[centers.count] / std::max<int64_t>(centers.count, 1);
  return std::max<int64_t>(1, 48 / (mean + 8));
}
constexpr int64_t kNearestGrain = dynfed::kElementsPerThread / kSoftBlock;

// ---- the operators ----

void soft_quantize(std::vector<Tensor> x, const Tensor& centers, const Tensor& first, const Tensor& sharpness,
                   std::vector<Tensor> out, int64_t isa) {
  const Centers all(centers, first);
  check_length("x", x.size(), size_t(all.count));
  Layers work(x);
  work.set_out("out", out, x);
  const auto plans = soft_plans(all, numbers("sharpness", sharpness, all.count), work);
  const Kernels& k = dynfed::kernels(isa);
  work.for_blocks(soft_grain(all), [&](size_t l, int64_t, int64_t from, int64_t to) { k.soft_quantize(work.layers[l], from, to); });
}

void soft_quantize_backward(std::vector<Tensor> grad, std::vector<Tensor> x, const Tensor& centers, const Tensor& first,
                            const Tensor& sharpness, std::vector<Tensor> dx, const Tensor& dcenters, int64_t isa) {
  const Centers all(centers, first);
  check_length("x", x.size(), size_t(all.count));
  check_length("grad", grad.size(), x.size());
  Layers work(x);
  for (size_t l = 0; l < x.size(); ++l) work.layers[l].grad = work.matching("grad", grad[l], x[l]);
  if (!dx.empty()) work.set_out("dx", dx, x);
  const bool wanted = dcenters.numel() != 0;
  if (wanted) check_buffer("dcenters", dcenters, ScalarType::Float, centers.numel());
  const auto plans = soft_plans(all, numbers("sharpness", sharpness, all.count), work);
  const Kernels& k = dynfed::kernels(isa);
  // A block's sums by themselves, 2 m of them, to be added up in order.
  std::vector<int64_t> start(all.count + 1);
  for (int64_t l = 0; l < all.count; ++l)
    start[l + 1] = start[l] + (work.first_block[l + 1] - work.first_block[l]) * 2 * all.size(l);
  std::vector<double> sums(wanted ? start[all.count] : 0);
  work.for_blocks(soft_grain(all), [&](size_t l, int64_t block, int64_t from, int64_t to) {
    k.soft_backward(work.layers[l], from, to, wanted ? &sums[start[l] + block * 2 * all.size(int64_t(l))] : nullptr);
  });
  if (!wanted) return;
  auto* const result = static_cast<float*>(dcenters.mutable_data_ptr());
  for (int64_t l = 0; l < all.count; ++l) {
    const int64_t m = all.size(l);
    double total[2 * kMostCenters] = {};
    for (int64_t i = start[l]; i < start[l + 1]; i += 2 * m)
      for (int64_t j = 0; j < 2 * m; ++j) total[j] += sums[i + j];
    const float* const c = all.of(l);
    double before = 0.0;  // P/2 (c_j - c_{j-1}) sum g s (1 - s), of the step before centre j
    for (int64_t j = 0; j < m; ++j) {
      const double after = j + 1 < m ? 0.5 * plans[l].sharpness * (double(c[j + 1]) - double(c[j])) * total[m + j] : 0.0;
      result[all.bounds[l] + j] = float(total[j] - before - after);
      before = after;
    }
  }
}

void nearest_center(std::vector<Tensor> x, const Tensor& centers, const Tensor& first, std::vector<Tensor> index,
                    std::vector<Tensor> value, int64_t isa) {
  const Centers all(centers, first);
  check_length("x", x.size(), size_t(all.count));
  check_length("index", index.size(), x.size());
  Layers work(x);
  work.set_out("value", value, x);
  for (size_t l = 0; l < x.size(); ++l) {
    check_buffer("index", index[l], ScalarType::Byte, x[l].numel());
    work.layers[l].index = dynfed::output<uint8_t>(index[l]);
  }
  const auto plans = nearest_plans(all, nullptr, work);
  const Kernels& k = dynfed::kernels(isa);
  work.for_blocks(kNearestGrain, [&](size_t l, int64_t, int64_t from, int64_t to) { k.nearest(work.layers[l], from, to); });
}

void prox_weights(std::vector<Tensor> y, const Tensor& centers, const Tensor& first, const Tensor& threshold,
                  std::vector<Tensor> out, int64_t isa) {
  const Centers all(centers, first);
  check_length("y", y.size(), size_t(all.count));
  Layers work(y);
  work.set_out("out", out, y);
  const auto plans = nearest_plans(all, numbers("threshold", threshold, all.count), work);
  const Kernels& k = dynfed::kernels(isa);
  work.for_blocks(kNearestGrain, [&](size_t l, int64_t, int64_t from, int64_t to) { k.prox(work.layers[l], from, to); });
}

// ---- the proximal step of the centres ----

#define DYNFED_FOR_VALUES(layer, CALL)                                                                               \
  switch ((layer).dtype) {                                                                                           \
    case DType::kFloat32: { const auto* const values = static_cast<const float*>((layer).x); CALL; break; }          \
    case DType::kBFloat16: { const auto* const values = static_cast<const dynfed::BFloat16*>((layer).x); CALL; break; } \
    case DType::kFloat16: { const auto* const values = static_cast<const dynfed::Float16*>((layer).x); CALL; break; } \
  }

// A centre's members: how many, how many of them below `low`, and those from `low` to `high`.
struct Members {
  int64_t count = 0, below = 0;
  float low = 0.0f, high = 0.0f;
  std::vector<float> inside;
};

// argmin_c (c - mu)^2 / 2 + k/2 sum |x_i - c|. Its slope c - mu + k/2 (2 l - n), l members being below c, rises with c: with the
// members inside in order, the first at which it is no longer negative is not below the minimiser, and the one before is.
double minimiser(double mu, double k, Members& members) {
  const double n = double(members.count);
  std::vector<float>& x = members.inside;
  const auto free = [&](int64_t i) { return mu - k / 2 * (2.0 * double(members.below + i) - n); };  // i of those inside below c
  const auto reached = [&](int64_t i) { return double(x[i]) >= free(i + 1); };
  int64_t low = 0, high = int64_t(x.size());
  while (high - low > 32) {
    const int64_t middle = (low + high) / 2;
    std::nth_element(x.begin() + low, x.begin() + middle, x.begin() + high);
    if (reached(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  std::sort(x.begin() + low, x.begin() + high);
  while (low < high && !reached(low)) ++low;
  if (low == int64_t(x.size())) return free(low);
  // x[low] is in its place: sorted, or the least of those behind, as nth_element has left it.
  return std::min(free(low), double(x[low]));
}

template <class T>
int64_t count_nan(const T* x, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float v = dynfed::to_float(x[i]);
    count += v != v;
  }
  return count;
}

// Sorts out the values of one centre each of a block.
template <class T>
void collect(const T* x, const uint8_t* index, int64_t n, std::vector<Members>& members, std::mutex& mutex) {
  int64_t below[kMostCenters] = {}, found = 0;
  float low[kMostCenters], high[kMostCenters];
  for (size_t j = 0; j < members.size(); ++j) low[j] = members[j].low, high[j] = members[j].high;
  uint16_t place[kSoftBlock];
  for (int64_t i = 0; i < n; ++i) {
    const float v = dynfed::to_float(x[i]);
    const uint8_t j = index[i];
    below[j] += v < low[j];
    place[found] = uint16_t(i);
    found += int64_t(v >= low[j]) & int64_t(v <= high[j]);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  for (size_t j = 0; j < members.size(); ++j) members[j].below += below[j];
  for (int64_t i = 0; i < found; ++i) members[index[place[i]]].inside.push_back(dynfed::to_float(x[place[i]]));
}

void prox_centers(const Tensor& proposal, std::vector<Tensor> x, const Tensor& centers, const Tensor& first,
                  const Tensor& strength, const Tensor& out, int64_t isa) {
  const Centers all(centers, first);
  check_length("x", x.size(), size_t(all.count));
  check_buffer("proposal", proposal, ScalarType::Float, centers.numel());
  check_buffer("out", out, ScalarType::Float, centers.numel());
  const double* const k = numbers("strength", strength, all.count);
  const auto* const mu = static_cast<const float*>(proposal.const_data_ptr());
  auto* const result = static_cast<float*>(out.mutable_data_ptr());
  Layers work(x);
  const auto plans = nearest_plans(all, nullptr, work);
  const Kernels& kernels = dynfed::kernels(isa);
  const auto number = [&](size_t l, int64_t from, int64_t to, uint8_t* index) {
    SoftLayer layer = work.layers[l];
    layer.index = index - from;
    kernels.nearest(layer, from, to);
  };
  std::vector<std::vector<Members>> members(all.count);
  for (int64_t l = 0; l < all.count; ++l) members[l].resize(all.size(l));
  std::mutex mutex;
  // First how many members there are, then which of them matter. The order in which threads come is of no consequence.
  work.for_blocks(kNearestGrain, [&](size_t l, int64_t, int64_t from, int64_t to) {
    uint8_t index[kSoftBlock];
    number(l, from, to, index);
    int32_t count[4][kMostCenters] = {};  // of four neighbours each its own: they are often the same
    const int64_t n = to - from;
    for (int64_t i = 0; i < n; ++i) ++count[i & 3][index[i]];
    int64_t nans = 0;
    DYNFED_FOR_VALUES(work.layers[l], (nans = count_nan(values + from, n)))
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t j = 0; j < members[l].size(); ++j)
      members[l][j].count += int64_t(count[0][j]) + count[1][j] + count[2][j] + count[3][j] - (j == 0 ? nans : 0);
  });
  const float infinity = std::numeric_limits<float>::infinity();
  for (int64_t l = 0; l < all.count; ++l)
    for (int64_t j = 0; j < all.size(l); ++j) {
      Members& m = members[l][j];
      const double reach = k[l] / 2 * double(m.count), at = double(mu[all.bounds[l] + j]);
      m.low = std::nextafter(float(at - reach), -infinity);
      m.high = std::nextafter(float(at + reach), infinity);
      m.inside.reserve(m.count);  // no memory until it is written
    }
  work.for_blocks(kNearestGrain, [&](size_t l, int64_t, int64_t from, int64_t to) {
    uint8_t index[kSoftBlock];
    number(l, from, to, index);
    DYNFED_FOR_VALUES(work.layers[l], (collect(values + from, index, to - from, members[l], mutex)))
  });
  for (int64_t l = 0; l < all.count; ++l) {
    float *const begin = result + all.bounds[l], *const end = result + all.bounds[l + 1];
    for (int64_t j = 0; j < all.size(l); ++j)
      begin[j] = float(minimiser(double(mu[all.bounds[l] + j]), k[l], members[l][j]));
    std::sort(begin, end, [](float a, float b) { return a < b || (a == a && b != b); });  // NaN last, as torch sorts
  }
}

// ---- sums by index ----

template <class T>
int sums_of(const T* x, const uint8_t* index, int64_t n, int64_t m, double* out) {
  double sums[4][kMostCenters] = {};  // as `count` above; part of the result
  uint8_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    sums[i & 3][index[i]] += double(dynfed::to_float(x[i]));
    largest = std::max(largest, index[i]);
  }
  for (int64_t j = 0; j < m; ++j) out[j] = (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]);
  return largest;
}

int64_t center_sums(std::vector<Tensor> values, std::vector<Tensor> index, const Tensor& first, const Tensor& out) {
  check_buffer("out", out, ScalarType::Float);
  const Centers all(first, out.numel());
  check_length("values", values.size(), size_t(all.count));
  check_length("index", index.size(), values.size());
  Layers work(values);
  for (size_t l = 0; l < values.size(); ++l) {
    check_buffer("index", index[l], ScalarType::Byte, values[l].numel());
    work.layers[l].index = const_cast<uint8_t*>(static_cast<const uint8_t*>(index[l].const_data_ptr()));
  }
  std::vector<int64_t> start(all.count + 1);
  for (int64_t l = 0; l < all.count; ++l)
    start[l + 1] = start[l] + (work.first_block[l + 1] - work.first_block[l]) * all.size(l);
  std::vector<double> sums(start[all.count]);
  std::atomic<int64_t> worst{-1};
  work.for_blocks(kNearestGrain, [&](size_t l, int64_t block, int64_t from, int64_t to) {
    const int64_t m = all.size(int64_t(l));
    int64_t largest = 0;
    DYNFED_FOR_VALUES(work.layers[l], (largest = sums_of(values + from, work.layers[l].index + from, to - from, m,
                                                         &sums[start[l] + block * m])))
    if (largest < m) return;
    int64_t seen = worst.load();
    while (seen < largest && !worst.compare_exchange_weak(seen, largest)) {
    }
  });
  auto* const result = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t l = 0; l < all.count; ++l) {
    const int64_t m = all.size(l);
    double total[kMostCenters] = {};
    for (int64_t i = start[l]; i < start[l + 1]; i += m)
      for (int64_t j = 0; j < m; ++j) total[j] += sums[i + j];
    for (int64_t j = 0; j < m; ++j) result[all.bounds[l] + j] = float(total[j]);
  }
  return worst;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dynfed_lightning_cpu, m) {
  m.def("soft_quantize(Tensor[] x, Tensor centers, Tensor first, Tensor sharpness, Tensor(a!)[] out, int isa) -> ()");
  m.def("soft_quantize_backward(Tensor[] grad, Tensor[] x, Tensor centers, Tensor first, Tensor sharpness, "
        "Tensor(a!)[] dx, Tensor(b!) dcenters, int isa) -> ()");
  m.def("nearest_center(Tensor[] x, Tensor centers, Tensor first, Tensor(a!)[] index, Tensor(b!)[] value, int isa) -> ()");
  m.def("prox_weights(Tensor[] y, Tensor centers, Tensor first, Tensor threshold, Tensor(a!)[] out, int isa) -> ()");
  m.def("prox_centers(Tensor proposal, Tensor[] x, Tensor centers, Tensor first, Tensor strength, Tensor(a!) out, "
        "int isa) -> ()");
  m.def("center_sums(Tensor[] values, Tensor[] index, Tensor first, Tensor(a!) out) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(dynfed_lightning_cpu, CPU, m) {
  m.impl("soft_quantize", TORCH_BOX(&soft_quantize));
  m.impl("soft_quantize_backward", TORCH_BOX(&soft_quantize_backward));
  m.impl("nearest_center", TORCH_BOX(&nearest_center));
  m.impl("prox_weights", TORCH_BOX(&prox_weights));
  m.impl("prox_centers", TORCH_BOX(&prox_centers));
  m.impl("center_sums", TORCH_BOX(&center_sums));
}
