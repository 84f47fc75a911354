// The sequential direction of MADE: one site (step), the loop over all sites (loop), and its gradient (reverse).
//
// Units are feature-major, (units, columns), with a column per row of the batch. The loop copies blocks of a few
// columns to memory that fits in the cache and takes each block through all sites. Sums are added in the same order
// for every number of columns and threads.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "network.h"
#include "reverse.h"
#include "roots.h"

namespace genexact {
namespace {

// What the loop reads and writes.
struct Task {
  const Tensor& given;
  at::ArrayRef<double> settings;
  int64_t params, numbers, categories;
  TensorList offsets;
  Tensor &values, &totals, &phi;
  const std::vector<Tensor>& units;
};

template <typename T, int N, typename Head>
void run(const Network<T>& net, const Task& task, int64_t first, int64_t columns) {
  using Given = typename Head::Given;
  constexpr int64_t S = Columns<T, N>::S;
  const int64_t numbers = task.numbers, params = task.params, panel = std::min(PANEL, net.sites);
  const int64_t width = task.categories ? task.categories : numbers;  // inputs per site
  // memory: levels, where outputs have one panel; values, given numbers and totals; scratch of the head
  int64_t rows = panel * params + panel * numbers + 1 + Head::scratch_rows(params);
  for (int64_t l = 0; l < net.top; l++) rows += l ? net.end(l, net.sites) : net.sites * width;
  const Tensor memory = at::empty({rows * S + 16}, task.totals.options());
  const Tensor given_memory = at::empty({panel * numbers * S}, at::CPU(c10::CppTypeToScalarType<Given>::value));
  const Given* source = task.given.const_data_ptr<Given>();
  T* next = memory.mutable_data_ptr<T>();
  const auto take = [&](int64_t count) { return std::exchange(next, next + count * S); };
  Given* given = given_memory.mutable_data_ptr<Given>();
  std::vector<Level<T>> u;
  for (int64_t l = 0; l < net.top; l++)
    u.push_back({take(l ? net.end(l, net.sites) : net.sites * width), S});
  T *outputs = take(panel * params), *values = take(panel * numbers), *totals = take(1);
  u.push_back({outputs, S});
  const Head head(task.settings, params, next);
  std::fill(totals, totals + S, T(0));
  std::fill(given, given + panel * numbers * S, Given(0));

  for (int64_t start = 0; start < net.sites; start += PANEL) {
    const int64_t stop = std::min(start + PANEL, net.sites), count = (stop - start) * numbers;
    for (int64_t r = 0; r < count; r++) {
      const Given* from = source + (start + r / numbers) * task.given.stride(1) + r % numbers * task.given.stride(2);
      copy(from + first * task.given.stride(0), task.given.stride(0), columns, given + r * S);
    }
    u[net.top].first = net.end(net.top, start);
    for (int64_t level = 1; level <= net.top; level++) {
      const Tensor& offset = task.offsets[level - 1];
      const T* from = offset.const_data_ptr<T>();
      for (int64_t unit = net.end(level, start); unit < net.end(level, stop); unit++) {
        T* row = u[level].row(unit);
        copy(from + unit * offset.stride(0) + first * offset.stride(1), offset.stride(1), columns, row);
        std::fill(row + columns, row + S, T(0));
      }
      net.template enter<N>(u, start, level);
    }
    for (int64_t d = start; d < stop; d++) {
      net.template finish<N>(u, start, d);
      T* value = values + (d - start) * numbers * S;
      head(outputs + (d - start) * params * S, given + (d - start) * numbers * S, value, totals, numbers);
      if (d == net.sites - 1) {  // no site reads the last one
        std::fill(u[0].row(d * width), u[0].row((d + 1) * width), T(0));
      } else if (!task.categories) {
        std::memcpy(u[0].row(d * numbers), value, numbers * S * sizeof(T));
      } else {
        for (int64_t v = 0; v < task.categories; v++)
          for (int64_t c = 0; c < S; c++) u[0].row(d * task.categories + v)[c] = value[c] == static_cast<T>(v);
      }
    }
    const int64_t stride = net.sites * numbers;
    if (task.values.scalar_type() == at::kLong)
      scatter(values, S, count, columns, task.values.mutable_data_ptr<int64_t>() + first * stride + start * numbers, stride);
    else
      scatter(values, S, count, columns, task.values.mutable_data_ptr<T>() + first * stride + start * numbers, stride);
    if (!task.units.empty()) {
      T* phi = task.phi.mutable_data_ptr<T>() + first * net.sites * params + start * params;
      scatter(outputs, S, (stop - start) * params, columns, phi, net.sites * params);
    }
  }
  std::memcpy(task.totals.mutable_data_ptr<T>() + first, totals, columns * sizeof(T));
  for (size_t l = 0; l < task.units.size(); l++)
    for (int64_t unit = 0; unit < task.units[l].size(0); unit++)
      std::memcpy(
          task.units[l].mutable_data_ptr<T>() + unit * task.units[l].stride(0) + first, u[l].row(unit),
          columns * sizeof(T));
}

template <typename T, template <typename, int> class Head>
void run_all(
    const Task& task, TensorList weights, const Tensor& ends, bool direct, int64_t activation) {
  const Network<T> net(weights, ends, direct, activation);
  const int64_t batch = task.given.size(0), width = task.categories ? task.categories : task.numbers;
  TORCH_CHECK((Head<T, 1>::fits(task.settings, task.numbers, task.params)), "Expected parameters that fit the head");
  TORCH_CHECK(!task.categories || task.numbers == 1, "Expected one category per site");
  for (int64_t d = 0; d < net.sites; d++)
    TORCH_CHECK(net.end(0, d + 1) == d * width, "Expected equally many inputs per site");
  for (int64_t l = 0; l < net.top; l++) {
    const Tensor& offset = task.offsets[l];
    TORCH_CHECK(weights[l].size(1) == (l ? net.end(l, net.sites) : net.sites * width), "Expected a column per unit");
    TORCH_CHECK(
        offset.dim() == 2 && offset.size(0) == net.end(l + 1, net.sites) && offset.size(1) == batch,
        "Expected offsets (units, batch)");
  }
  int64_t work = 0;  // half of all weights
  for (const Tensor& weight : weights) work += weight.numel() / 2;
  for_blocks<T>(batch, work, [&](auto n, int64_t first, int64_t columns) {
    run<T, n(), Head<T, n()>>(net, task, first, columns);
  });
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> loop(
    const Tensor& given, TensorList weights, TensorList offsets, const Tensor& ends, bool direct, int64_t activation,
    int64_t categories, std::string head, at::ArrayRef<double> settings, bool keep) {
  const int64_t batch = given.size(0), sites = ends.size(1) - 1, top = ends.size(0) - 1;
  TORCH_CHECK(sites > 0 && top > 0 && static_cast<int64_t>(weights.size()) == top + direct, "Expected a weight per level");
  TORCH_CHECK(given.dim() == 3 && given.size(1) == sites, "Expected given numbers of shape (batch, sites, numbers)");
  TORCH_CHECK(static_cast<int64_t>(offsets.size()) == top, "Expected an offset per layer");
  const auto like = weights[0].options();
  const int64_t params = weights[top - 1].size(0) / sites;
  Tensor values = at::empty({batch, sites, given.size(2)}, head == "categorical" ? like.dtype(at::kLong) : like);
  Tensor totals = at::empty({batch}, like), phi = at::empty({keep ? batch : 0, sites, params}, like);
  std::vector<Tensor> units;
  for (int64_t l = 0; keep && l < top; l++) units.push_back(at::empty({weights[l].size(1), batch}, like));
  const Task task{given, settings, params, given.size(2), categories, offsets, values, totals, phi, units};
  AT_DISPATCH_FLOATING_TYPES(weights[0].scalar_type(), "loop", [&] {
    const auto call = head == "affine" ? run_all<scalar_t, Affine>
        : head == "spline"             ? run_all<scalar_t, Spline>
        : head == "bernoulli"          ? run_all<scalar_t, Bernoulli>
        : head == "categorical"        ? run_all<scalar_t, Categorical>
        : head == "sum_of_squares"     ? run_all<scalar_t, SumOfSquaresRoot>
        : head == "bernstein"          ? run_all<scalar_t, BernsteinRoot>
        : head == "deep_sigmoid"       ? run_all<scalar_t, DeepSigmoidRoot>
                                       : nullptr;
    TORCH_CHECK(call, "Expected one of the heads of the native loop; got ", head);
    call(task, weights, ends, direct, activation);
  });
  return {values, totals, phi, units};
}

// Reads the inputs (batch, features) of degrees low ... high - 1, and returns their outputs (batch, high - low, params).
// The rows of units begin at multiples of 16 numbers, so that the last vector of a row does not reach into the next row.
Tensor step(
    const Tensor& inputs, TensorList units, TensorList weights, const Tensor& ends, bool direct, int64_t activation,
    int64_t low, int64_t high) {
  const int64_t batch = inputs.size(0), sites = ends.size(1) - 1;
  TORCH_CHECK(0 <= low && low <= high && high <= sites, "Expected degrees of sites");
  TORCH_CHECK(units.size() == static_cast<size_t>(ends.size(0)), "Expected units per level");
  for (const Tensor& level : units)
    TORCH_CHECK(
        level.dim() == 2 && level.size(1) == batch && level.stride(0) % 16 == 0 && level.stride(0) >= batch &&
            level.stride(1) == 1 &&
            (level.storage_offset() + level.size(0) * level.stride(0)) * level.element_size() <= level.storage().nbytes(),
        "Expected units with padded rows");
  const int64_t params = units.back().size(0) / sites;
  Tensor phi = at::empty({batch, high - low, params}, inputs.options());
  AT_DISPATCH_FLOATING_TYPES(inputs.scalar_type(), "step", [&] {
    const Network<scalar_t> net(weights, ends, direct, activation);
    TORCH_CHECK(
        inputs.dim() == 2 && inputs.size(1) == net.end(0, high) - net.end(0, low), "Expected the inputs of the degrees");
    for (int64_t level = 0; level <= net.top; level++)
      TORCH_CHECK(units[level].size(0) >= net.end(level, sites), "Expected all units");
    TORCH_CHECK(net.end(net.top, sites) == sites * params, "Expected the outputs of all sites");
    int64_t work = 0;
    for (int64_t level = 1; level <= net.top; level++)
      for (const auto& link : net.links[level]) {
        work += (net.end(level, high) - net.end(level, low)) * PANEL * net.end(link.source, high) / net.sites;
        for (int64_t d = low; d < high; d++)
          if (d % PANEL == 0) work += (net.end(level, d + PANEL) - net.end(level, d)) * net.end(link.source, d);
      }
    for_blocks<scalar_t>(batch, work, [&](auto n, int64_t first, int64_t columns) {
      std::vector<Level<scalar_t>> u;
      for (const Tensor& level : units) u.push_back({level.mutable_data_ptr<scalar_t>() + first, level.stride(0)});
      for (int64_t d = low; d < high; d++) {
        const int64_t start = d - d % PANEL;
        for (int64_t i = net.end(0, d); i < net.end(0, d + 1); i++) {
          const scalar_t* from = inputs.const_data_ptr<scalar_t>() + (i - net.end(0, low)) * inputs.stride(1);
          copy(from + first * inputs.stride(0), inputs.stride(0), columns, u[0].row(i));
        }
        if (d == start)
          for (int64_t level = 1; level <= net.top; level++) net.template enter<n()>(u, start, level);
        net.template finish<n()>(u, start, d);
        scalar_t* to = phi.mutable_data_ptr<scalar_t>() + (first * (high - low) + d - low) * params;
        scatter(u[net.top].row(d * params), u[net.top].stride, params, columns, to, (high - low) * params);
      }
    });
  });
  return phi;
}

}  // namespace
}  // namespace genexact

TORCH_LIBRARY(pyro_genexact, m) {
  m.def(
      "loop(Tensor given, Tensor[] weights, Tensor[] offsets, Tensor ends, bool direct, int activation, "
      "int categories, str head, float[] settings, bool keep) -> (Tensor, Tensor, Tensor, Tensor[])");
  m.def(
      "step(Tensor inputs, Tensor(a!)[] units, Tensor[] weights, Tensor ends, bool direct, int activation, int low, "
      "int high) -> Tensor");
  m.def(
      "reverse(Tensor g, Tensor gain, Tensor drive, Tensor[] hidden, Tensor[] weights, Tensor ends, bool direct, "
      "int activation) -> (Tensor, Tensor[])");
}

TORCH_LIBRARY_IMPL(pyro_genexact, CPU, m) {
  m.impl("loop", genexact::loop);
  m.impl("step", genexact::step);
  m.impl("reverse", genexact::reverse);
}
