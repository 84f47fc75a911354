// The value of one site from its parameters, for the heads that have a native loop.
//
// Each head reads the parameters phi (P, columns) and the given numbers (n, columns) of a site: the image y of a
// bijection, or uniform numbers u. It writes the values (n, columns), and adds log|dx/dy| (bijections) or a
// probability, which is NaN if a parameter is (distributions), to the totals (columns). Rows have N vectors. A head fits
// if it has these settings, n numbers per site and P parameters.
#pragma once

#include "kernels.h"

namespace genexact {

template <typename T, int N>
struct Columns {
  static constexpr int W = Vec<T>::size(), S = N * W;
};

// y = x exp(s) + m with s = bound tanh(raw / bound).
template <typename T, int N>
struct Affine : Columns<T, N> {
  using Given = T;
  using Columns<T, N>::W, Columns<T, N>::S;
  T bound;

  Affine(at::ArrayRef<double> settings, int64_t params, T* scratch) : bound(settings[0]) {}
  static bool fits(at::ArrayRef<double> settings, int64_t numbers, int64_t params) {
    return settings.size() == 1 && params == 2 * numbers;
  }
  static int64_t scratch_rows(int64_t params) { return 0; }

  void operator()(const T* phi, const T* y, T* x, T* totals, int64_t numbers) const {
    for (int64_t e = 0; e < numbers; e++)
      for (int i = 0; i < S; i += W) {
        const auto shift = Vec<T>::loadu(phi + e * S + i), raw = Vec<T>::loadu(phi + (numbers + e) * S + i);
        const auto log_scale = (raw / Vec<T>(bound)).tanh() * Vec<T>(bound);
        ((Vec<T>::loadu(y + e * S + i) - shift) / log_scale.exp()).store(x + e * S + i);
        (Vec<T>::loadu(totals + i) - log_scale).store(totals + i);
      }
  }
};

// The inverse of a rational-quadratic spline, see transforms/spline.py and heads/spline.py for the formulas.
template <typename T, int N>
struct Spline : Columns<T, N> {
  using Given = T;
  using V = Vec<T>;
  using Columns<T, N>::W, Columns<T, N>::S;
  int64_t bins;
  T bound;
  T* sizes;

  Spline(at::ArrayRef<double> settings, int64_t params, T* scratch)
      : bins(static_cast<int64_t>(settings[0])), bound(settings[1]), sizes(scratch) {}
  static bool fits(at::ArrayRef<double> settings, int64_t numbers, int64_t params) {
    return settings.size() == 2 && settings[0] >= 2 && params == numbers * (3 * settings[0] - 1);
  }
  static int64_t scratch_rows(int64_t params) { return params; }

  // The power of exp(2 tanh(raw / 2)); tanh(z) = 1 - 2 / (exp(2 z) + 1) is accurate enough within exp.
  static V positive(const V& raw, T power) { return (V(2 * power) - V(4 * power) / (raw.exp() + V(1))).exp(); }

  void operator()(const T* phi, const T* y, T* x, T* totals, int64_t numbers) const {
    for (int64_t e = 0; e < numbers; e++)
      for (int i = 0; i < S; i += W) invert(phi + e * (3 * bins - 1) * S + i, y + e * S + i, x + e * S + i, totals + i);
  }

  void invert(const T* phi, const T* given, T* result, T* totals) const {
    V scales[2];
    for (int row = 0; row < 2; row++) {  // widths, heights
      V total(0);
      for (int64_t k = row * bins; k < (row + 1) * bins; k++) {
        const V size = positive(V::loadu(phi + k * S), 1);
        size.store(sizes + k * W);
        total = total + size;
      }
      scales[row] = V(2 * bound) / total;
    }
    const V y = V::loadu(given), low(-bound), high(bound), zero(0), one(1);
    const auto slope = [&](int64_t k) { return k == 0 || k == bins ? zero : V::loadu(phi + (2 * bins + k - 1) * S); };
    V x_sum = V::loadu(sizes), y_sum = V::loadu(sizes + bins * W);
    V left_x = low, left_y = low, left_raw = slope(0);
    V next_x = at::vec::fmadd(scales[0], x_sum, low), next_y = at::vec::fmadd(scales[1], y_sum, low);
    V x0 = low, x1 = next_x, y0 = low, y1 = next_y, raw0 = left_raw, raw1 = slope(1);
    for (int64_t k = 1; k < bins; k++) {  // the bin from knot k to k + 1 replaces the earlier ones where y >= knot k
      left_x = next_x, left_y = next_y;
      x_sum = x_sum + V::loadu(sizes + k * W), y_sum = y_sum + V::loadu(sizes + (bins + k) * W);
      next_x = k == bins - 1 ? high : at::vec::fmadd(scales[0], x_sum, low);
      next_y = k == bins - 1 ? high : at::vec::fmadd(scales[1], y_sum, low);
      const V above = y >= left_y;
      x0 = V::blendv(x0, left_x, above), x1 = V::blendv(x1, next_x, above);
      y0 = V::blendv(y0, left_y, above), y1 = V::blendv(y1, next_y, above);
      raw0 = V::blendv(raw0, slope(k), above), raw1 = V::blendv(raw1, slope(k + 1), above);
    }
    const V d0 = positive(raw0, 2), d1 = positive(raw1, 2);
    const V height = y1 - y0, width = x1 - x0, raw = (y - y0) / height, s = height / width;
    const V r = at::vec::clamp(raw, zero, one), left = one - r;
    const V g = d0 * left - d1 * r, part = V(2) * s * r, rest = V(2) * s * left;
    const V q = at::vec::fmadd(part, rest, g * g).sqrt();
    const V z = V::blendv(one - rest / (q - g + rest), part / (q + g + part), g >= zero);
    const V outside = (raw < zero) | (raw > one);  // false for NaN
    V::blendv(at::vec::fmadd(z, width, x0), y, outside).store(result);
    const V a = at::vec::fmadd(z, s - d0, d0), c = at::vec::fmadd(z, d1 - s, s);
    const V ratio = s / at::vec::fmadd(z, a - c, c), derivative = at::vec::fmadd(z, c - a, a) * ratio * ratio;
    (V::loadu(totals) - V::blendv(derivative.log(), zero, outside)).store(totals);
  }
};

// 1 if u > 1 - p, with p = sigmoid(phi); compared in double precision as 1 - u < p.
template <typename T, int N>
struct Bernoulli : Columns<T, N> {
  using Given = double;
  using Columns<T, N>::W, Columns<T, N>::S;

  Bernoulli(at::ArrayRef<double> settings, int64_t params, T* scratch) {}
  static bool fits(at::ArrayRef<double> settings, int64_t numbers, int64_t params) { return params == numbers; }
  static int64_t scratch_rows(int64_t params) { return 0; }

  void operator()(const T* phi, const double* u, T* y, T* totals, int64_t numbers) const {
    T p[S];
    for (int64_t e = 0; e < numbers; e++) {
      for (int i = 0; i < S; i += W) sigmoid(Vec<T>::loadu(phi + e * S + i)).store(p + i);
      for (int i = 0; i < S; i++) {
        y[e * S + i] = 1 - u[e * S + i] < p[i];
        totals[i] += p[i];
      }
    }
  }
};

// The number of categories whose cumulative probability is below u.
template <typename T, int N>
struct Categorical : Columns<T, N> {
  using Given = double;
  using Columns<T, N>::W, Columns<T, N>::S;
  int64_t categories;
  T* weights;

  Categorical(at::ArrayRef<double> settings, int64_t params, T* scratch) : categories(params), weights(scratch) {}
  static bool fits(at::ArrayRef<double> settings, int64_t numbers, int64_t params) { return numbers == 1; }
  static int64_t scratch_rows(int64_t params) { return params; }

  void operator()(const T* phi, const double* u, T* y, T* totals, int64_t numbers) const {
    for (int i = 0; i < S; i += W) {
      auto largest = Vec<T>::loadu(phi + i);
      for (int64_t v = 1; v < categories; v++) largest = at::vec::maximum(largest, Vec<T>::loadu(phi + v * S + i));
      Vec<T> sum(0);
      for (int64_t v = 0; v < categories; v++) {
        const auto weight = (Vec<T>::loadu(phi + v * S + i) - largest).exp();
        weight.store(weights + v * S + i);
        sum = sum + weight;
      }
      for (int64_t v = 0; v < categories; v++)
        (Vec<T>::loadu(weights + v * S + i) / sum).store(weights + v * S + i);
    }
    double bound[S] = {}, below[S] = {};
    for (int64_t v = 0; v < categories; v++)
      for (int i = 0; i < S; i++) bound[i] += weights[v * S + i];
    for (int i = 0; i < S; i++) {  // the sum may round to less than u
      bound[i] = std::min(bound[i], u[i]);
      totals[i] += weights[i];
      y[i] = 0;
    }
    for (int64_t v = 0; v < categories; v++)
      for (int i = 0; i < S; i++) {
        below[i] += weights[v * S + i];
        y[i] += below[i] < bound[i];
      }
  }
};

}  // namespace genexact
