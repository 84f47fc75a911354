// Products of a few rows of weights with columns of units, and elementwise functions, in vector registers.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

namespace genexact {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// The sums of ROWS x VECTORS vectors stay in registers during a product.
constexpr int ROWS = 6;
#ifdef CPU_CAPABILITY_AVX512
constexpr int VECTORS = 4;
#else
constexpr int VECTORS = 2;
#endif

// Adds w x to y for R rows of w (R, k) and N vectors of columns of x (k, columns); w is stored as (k, R) if TRANSPOSED.
template <typename T, int R, int N, bool TRANSPOSED>
inline void tile(T* y, int64_t y_stride, const T* w, int64_t w_stride, const T* x, int64_t x_stride, int64_t k) {
  constexpr int W = Vec<T>::size();
  Vec<T> sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sums[r][n] = Vec<T>::loadu(y + r * y_stride + n * W);
  for (int64_t i = 0; i < k; i++) {
    Vec<T> units[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) units[n] = Vec<T>::loadu(x + i * x_stride + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec<T> weight(TRANSPOSED ? w[i * w_stride + r] : w[r * w_stride + i]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sums[r][n] = at::vec::fmadd(weight, units[n], sums[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sums[r][n].store(y + r * y_stride + n * W);
}

// Adds w x to y for any number of rows.
template <typename T, int N, bool TRANSPOSED = false>
void product(
    T* y, int64_t y_stride, const T* w, int64_t w_stride, const T* x, int64_t x_stride, int64_t rows, int64_t k) {
  if (k <= 0) return;
  for (int64_t tiles = (rows + ROWS - 1) / ROWS; tiles > 0; tiles--) {
    const int64_t r = (rows + tiles - 1) / tiles;  // tiles of equal heights
    switch (r) {
      case 1: tile<T, 1, N, TRANSPOSED>(y, y_stride, w, w_stride, x, x_stride, k); break;
      case 2: tile<T, 2, N, TRANSPOSED>(y, y_stride, w, w_stride, x, x_stride, k); break;
      case 3: tile<T, 3, N, TRANSPOSED>(y, y_stride, w, w_stride, x, x_stride, k); break;
      case 4: tile<T, 4, N, TRANSPOSED>(y, y_stride, w, w_stride, x, x_stride, k); break;
      case 5: tile<T, 5, N, TRANSPOSED>(y, y_stride, w, w_stride, x, x_stride, k); break;
      default: tile<T, 6, N, TRANSPOSED>(y, y_stride, w, w_stride, x, x_stride, k);
    }
    y += r * y_stride, w += r * (TRANSPOSED ? 1 : w_stride), rows -= r;
  }
}

template <typename V>
inline V sigmoid(const V& z) {
  return V(1) / (V(1) + z.neg().exp());
}

enum Activation : int64_t { RELU, TANH, SIGMOID, SILU };

template <typename T, int N>
void activate(T* z, int64_t stride, int64_t rows, int64_t activation) {
  constexpr int W = Vec<T>::size();
  const auto apply = [&](auto&& function) {
    for (int64_t r = 0; r < rows; r++)
      for (int n = 0; n < N; n++) {
        T* at = z + r * stride + n * W;
        function(Vec<T>::loadu(at)).store(at);
      }
  };
  switch (activation) {
    case RELU: apply([](Vec<T> v) { return at::vec::maximum(v, Vec<T>(0)); }); break;
    case TANH: apply([](Vec<T> v) { return v.tanh(); }); break;
    case SIGMOID: apply([](Vec<T> v) { return sigmoid(v); }); break;
    default: apply([](Vec<T> v) { return v / (Vec<T>(1) + v.neg().exp()); });
  }
}

}  // namespace genexact
