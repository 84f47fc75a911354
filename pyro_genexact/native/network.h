// The units of a masked network by level, sorted by degree, and the blocks of columns that one thread takes.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace genexact {

using at::Tensor;
using at::TensorList;

constexpr int64_t PANEL = 16;  // sites between two products with the whole finished prefix
constexpr int64_t MIN_WORK = 1 << 23;  // products per thread: about 0.2 ms

template <typename T>
struct Link {
  int64_t source;  // the level that it reads
  const T* weights;
  int64_t stride;
};

// Units of a level: the row of unit i begins at data + (i - first) * stride.
template <typename T>
struct Level {
  T* data;
  int64_t stride;
  int64_t first = 0;
  T* row(int64_t unit) const { return data + (unit - first) * stride; }
};

template <typename T>
struct Network {
  int64_t sites, top;  // levels are 0 (inputs), hidden layers, and the top (outputs)
  const int64_t* ends;
  std::vector<std::vector<Link<T>>> links;  // by level
  int64_t activation;

  Network(TensorList weights, const Tensor& ends_, bool direct, int64_t activation)
      : sites(ends_.size(1) - 1), top(ends_.size(0) - 1), ends(ends_.const_data_ptr<int64_t>()), links(top + 1),
        activation(activation) {
    TORCH_CHECK(sites > 0 && top > 0 && ends_.dim() == 2 && ends_.is_contiguous(), "Expected contiguous ends");
    TORCH_CHECK(static_cast<int64_t>(weights.size()) == top + direct, "Expected a weight per level");
    for (int64_t d = 0, params = end(top, sites) / sites; d <= sites; d++)
      TORCH_CHECK(end(top, d) == d * params, "Expected equally many outputs per site");
    for (int64_t i = 0; i < static_cast<int64_t>(weights.size()); i++) {
      const int64_t level = std::min(i + 1, top), source = i == top ? 0 : i;
      TORCH_CHECK(
          weights[i].dim() == 2 && weights[i].size(0) == end(level, sites) && weights[i].size(1) >= end(source, sites),
          "Expected weights of the shapes that ends gives");
      TORCH_CHECK(weights[i].stride(1) == 1 || weights[i].size(1) < 2, "Expected weights with contiguous rows");
      links[level].push_back({source, weights[i].const_data_ptr<T>(), weights[i].stride(0)});
    }
  }

  // The number of units of a level with degree below d.
  int64_t end(int64_t level, int64_t d) const { return ends[level * (sites + 1) + std::min(d, sites)]; }

  // Adds what the units of degrees below the panel contribute to those of the panel.
  template <int N>
  void enter(const std::vector<Level<T>>& u, int64_t start, int64_t level) const {
    const int64_t low = end(level, start), rows = end(level, start + PANEL) - low;
    for (const auto& link : links[level])
      product<T, N>(
          u[level].row(low), u[level].stride, link.weights + low * link.stride, link.stride, u[link.source].data,
          u[link.source].stride, rows, end(link.source, start));
  }

  // Finishes the units of degree d, given the inputs of degree d.
  template <int N>
  void finish(const std::vector<Level<T>>& u, int64_t start, int64_t d) const {
    for (int64_t level = 1; level <= top; level++) {
      const int64_t low = end(level, d), rows = end(level, d + 1) - low;
      if (!rows) continue;
      for (const auto& link : links[level]) {
        const int64_t first = end(link.source, start), count = end(link.source, d + 1) - first;
        product<T, N>(
            u[level].row(low), u[level].stride, link.weights + low * link.stride + first, link.stride,
            u[link.source].row(first), u[link.source].stride, rows, count);
      }
      if (level < top) activate<T, N>(u[level].row(low), u[level].stride, rows, activation);
    }
  }
};

// Copies numbers with a stride to a row.
template <typename T>
void copy(const T* from, int64_t stride, int64_t columns, T* row) {
  if (stride == 0) {
    std::fill(row, row + columns, *from);
  } else if (stride == 1) {
    std::copy(from, from + columns, row);
  } else {
    for (int64_t c = 0; c < columns; c++) row[c] = from[c * stride];
  }
}

// Copies rows of N vectors to an array (columns, *).
template <typename From, typename To>
void scatter(const From* rows, int64_t width, int64_t count, int64_t columns, To* to, int64_t column_stride) {
  for (int64_t c = 0; c < columns; c++)
    for (int64_t r = 0; r < count; r++) to[c * column_stride + r] = static_cast<To>(rows[r * width + c]);
}

// Calls function(N, first, columns) for blocks of N vectors of columns, in parallel if there is enough work (in products
// per column) for several threads.
template <typename T, typename Function>
void for_blocks(int64_t columns, int64_t work, const Function& function) {
  constexpr int64_t W = Vec<T>::size();
  const int64_t vectors = (columns + W - 1) / W, enough = columns * work / MIN_WORK + 1;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), enough);
  int64_t blocks = std::max((vectors + VECTORS - 1) / VECTORS, std::min(threads, vectors));
  blocks = std::min((blocks + threads - 1) / threads * threads, vectors);  // equally many per thread
  at::parallel_for(0, blocks, (blocks + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t low = block * vectors / blocks, high = (block + 1) * vectors / blocks;
      const int64_t first = low * W, count = std::min(high * W, columns) - first;
      const auto call = [&](auto n) {
        if constexpr (n() <= VECTORS) function(n, first, count);
      };
      switch (high - low) {
        case 1: call(std::integral_constant<int, 1>{}); break;
        case 2: call(std::integral_constant<int, 2>{}); break;
        case 3: call(std::integral_constant<int, 3>{}); break;
        default: call(std::integral_constant<int, 4>{});
      }
    }
  });
}

}  // namespace genexact
