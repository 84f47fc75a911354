// The reverse sweep: the gradients of a sequential evaluation, from the last site to the first.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <tuple>

#include "network.h"

namespace genexact {

// Multiplies gradients of units by the derivatives of the activation, which are given, or follow from the units.
template <typename T>
void through(T* gradient, const T* unit, int64_t columns, int64_t activation) {
  const auto apply = [&](auto&& derivative) {
    for (int64_t c = 0; c < columns; c++) gradient[c] *= derivative(unit[c]);
  };
  switch (activation) {
    case RELU: apply([](T h) { return h > 0 ? T(1) : h == h ? T(0) : h; }); break;
    case TANH: apply([](T h) { return 1 - h * h; }); break;
    case SIGMOID: apply([](T h) { return h * (1 - h); }); break;
    default: apply([](T given) { return given; });
  }
}

// One block of columns. A row of u holds the gradient of a unit, and that of its pre-activation once it is finished.
template <typename T, int N>
void reverse_block(
    const Network<T>& net, const at::Tensor& g, const at::Tensor& gain, const at::Tensor& drive, at::TensorList hidden,
    const at::Tensor& of_inputs, const std::vector<at::Tensor>& of_pre, int64_t first, int64_t columns) {
  constexpr int64_t S = N * Vec<T>::size();
  const int64_t sites = net.sites, numbers = g.size(2), params = drive.size(2);
  int64_t rows = sites * (numbers + params);
  for (const at::Tensor& level : hidden) rows += level.size(0);
  const at::Tensor memory = at::empty({rows * S}, g.options());
  T* next = memory.mutable_data_ptr<T>();
  std::fill(next, next + rows * S, T(0));
  std::vector<Level<T>> u;
  for (int64_t l = 0; l <= net.top; l++) {
    u.push_back({next, S});
    next += S * (l == 0 ? sites * numbers : l == net.top ? sites * params : hidden[l - 1].size(0));
  }
  const T* cotangent = g.const_data_ptr<T>();
  for (int64_t i = 0; i < sites * numbers; i++)
    copy(cotangent + i + first * sites * numbers, sites * numbers, columns, u[0].row(i));

  const auto pull = [&](int64_t source, int64_t unit, int64_t count, int64_t low, int64_t high) {
    for (int64_t level = 1; level <= net.top; level++)
      for (const auto& link : net.links[level])
        if (link.source == source) {
          const int64_t from = net.end(level, low), above = net.end(level, high) - from;
          product<T, N, true>(
              u[source].row(unit), S, link.weights + from * link.stride + unit, link.stride, u[level].row(from), S, count,
              above);
        }
  };
  for (int64_t start = (sites - 1) / PANEL * PANEL; start >= 0; start -= PANEL) {
    const int64_t stop = std::min(start + PANEL, sites);
    for (int64_t source = 0; source < net.top; source++) {  // contributions of all later degrees to the panel
      const int64_t unit = net.end(source, start);
      pull(source, unit, net.end(source, stop) - unit, stop, sites);
    }
    for (int64_t d = stop - 1; d >= start; d--) {
      for (int64_t p = 0; p < params; p++) {
        T* row = u[net.top].row(d * params + p);
        copy(drive.const_data_ptr<T>() + (first * sites + d) * params + p, sites * params, columns, row);
        for (int64_t j = 0; j < numbers; j++) {
          const T* of_site = u[0].row(d * numbers + j);
          const T* factor = gain.const_data_ptr<T>() + ((first * sites + d) * numbers + j) * params + p;
          for (int64_t c = 0; c < columns; c++) row[c] += factor[c * sites * numbers * params] * of_site[c];
        }
      }
      for (int64_t source = net.top - 1; source >= 0; source--) {
        const int64_t unit = net.end(source, d), count = net.end(source, d + 1) - unit;
        if (!count) continue;
        pull(source, unit, count, d, stop);
        for (int64_t i = unit; source && i < unit + count; i++) {
          const at::Tensor& level = hidden[source - 1];
          through(u[source].row(i), level.const_data_ptr<T>() + i * level.stride(0) + first, columns, net.activation);
        }
      }
    }
  }
  const auto put = [&](int64_t level, const at::Tensor& to) {
    for (int64_t i = 0; i < to.size(0); i++)
      std::copy_n(u[level].row(i), columns, to.mutable_data_ptr<T>() + i * to.size(1) + first);
  };
  put(0, of_inputs);
  for (int64_t level = 1; level <= net.top; level++) put(level, of_pre[level - 1]);
}

// Solves the transposed triangular system of Sweeps.reverse, given g (B, T, k), gain (B, T, k, P) and drive (B, T, P).
// hidden has the units of each hidden layer (units, B), or, for other activations, their derivatives.
inline std::tuple<at::Tensor, std::vector<at::Tensor>> reverse(
    const at::Tensor& g, const at::Tensor& gain, const at::Tensor& drive, at::TensorList hidden, at::TensorList weights,
    const at::Tensor& ends, bool direct, int64_t activation) {
  TORCH_CHECK(g.is_contiguous() && gain.is_contiguous() && drive.is_contiguous(), "Expected contiguous tensors");
  TORCH_CHECK(
      g.dim() == 3 && drive.dim() == 3 && gain.sizes() == at::IntArrayRef({g.size(0), g.size(1), g.size(2), drive.size(2)}) &&
          drive.size(0) == g.size(0) && drive.size(1) == g.size(1),
      "Expected g (B, T, k), gain (B, T, k, P) and drive (B, T, P)");
  const int64_t batch = g.size(0);
  const at::Tensor of_inputs = at::empty({g.size(1) * g.size(2), batch}, g.options());
  std::vector<at::Tensor> of_pre;
  for (const at::Tensor& level : hidden) of_pre.push_back(at::empty({level.size(0), batch}, g.options()));
  of_pre.push_back(at::empty({drive.size(1) * drive.size(2), batch}, g.options()));
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "reverse", [&] {
    const Network<scalar_t> net(weights, ends, direct, activation);
    TORCH_CHECK(
        net.sites == g.size(1) && net.end(net.top, net.sites) == net.sites * drive.size(2) &&
            net.end(0, net.sites) == (net.sites - 1) * g.size(2) && static_cast<int64_t>(hidden.size()) == net.top - 1,
        "Expected the sizes that ends gives");
    for (int64_t l = 1; l < net.top; l++)
      TORCH_CHECK(
          hidden[l - 1].dim() == 2 && hidden[l - 1].size(0) == net.end(l, net.sites) && hidden[l - 1].size(1) == batch &&
              hidden[l - 1].stride(1) == 1,
          "Expected hidden units (units, B) with contiguous rows");
    int64_t work = 0;
    for (const at::Tensor& weight : weights) work += weight.numel() / 2;
    for_blocks<scalar_t>(batch, work, [&](auto n, int64_t first, int64_t columns) {
      reverse_block<scalar_t, n()>(net, g, gain, drive, hidden, of_inputs, of_pre, first, columns);
    });
  });
  return {of_inputs, of_pre};
}

}  // namespace genexact
