// Heads whose bijections have no formula for the inverse: an increasing function f of each number, and its root.
//
// A function reads the parameters of W numbers (prepare), returns a point to start from (guess), and computes f(x) and
// its slope, or the logarithm of the slope (evaluate).
#pragma once

#include <limits>
#include <vector>

#include "heads.h"

namespace genexact {

// c + int_0^x g(t) dt, see heads/polynomial.py; settings: K, L, bound, m, and the rules (L + 2, L + 1) of Gauss.
template <typename T>
struct SumOfSquares {
  using V = Vec<T>;
  int64_t polynomials, degree;
  T bound, flattest, scale;
  std::vector<T> rules;
  T* coefficients;
  V shift{T(0)};
  mutable std::vector<V> terms;

  SumOfSquares(at::ArrayRef<double> settings, T* scratch)
      : polynomials(settings[0]), degree(settings[1]), bound(settings[2]), flattest(settings[3]),
        scale(std::sqrt((1 - settings[3]) / settings[0])), rules(settings.begin() + 4, settings.end()),
        coefficients(scratch), terms(degree + 1, V(T(0))) {}
  static bool fits(at::ArrayRef<double> s, int64_t params) {
    return s.size() > 4 && s.size() == 4 + (s[1] + 2) * (s[1] + 1) && params == 1 + s[0] * (s[1] + 1);
  }

  void prepare(const T* phi, int64_t stride) {
    shift = V::loadu(phi);
    for (int64_t i = 0; i < polynomials * (degree + 1); i++) {
      const V identity(i % (degree + 1) ? T(0) : scale);
      at::vec::fmadd(V::loadu(phi + (i + 1) * stride), V(scale), identity).store(coefficients + i * V::size());
    }
  }

  V guess(const V& y) const { return at::vec::clamp(y, V(-bound), V(bound)); }

  template <bool LOG>
  V evaluate(const V& x, V& slope) const {
    const V near = at::vec::clamp(x, V(-bound), V(bound)), u = near / V(bound);
    V mean(flattest), at_u(0);
    for (int64_t k = 0; k < polynomials; k++) {
      V power(1);
      for (int64_t j = 0; j <= degree; j++, power = power * u)
        terms[j] = V::loadu(coefficients + (k * (degree + 1) + j) * V::size()) * power;
      for (int64_t node = 0; node < degree + 2; node++) {
        V value(0);
        for (int64_t j = 0; j <= degree; j++)
          value = at::vec::fmadd(V(rules[node * (degree + 1) + j]), terms[j], value);
        (node <= degree ? mean : at_u) = at::vec::fmadd(value, value, node <= degree ? mean : at_u);
      }
    }
    const V g = at_u + V(flattest);
    slope = LOG ? g.log() : g;
    return at::vec::fmadd(x - near, g, at::vec::fmadd(near, mean, shift));
  }
};

// A Bernstein polynomial with linear tails, see heads/polynomial.py; settings: n, bound, and the n binomials of n - 1.
template <typename T>
struct Bernstein {
  using V = Vec<T>;
  int64_t degree;
  T bound;
  std::vector<T> choose;
  T *slopes, *offsets;
  V shift{T(0)};
  mutable std::vector<V> down;  // powers of 1 - u

  Bernstein(at::ArrayRef<double> settings, T* scratch)
      : degree(settings[0]), bound(settings[1]), choose(settings.begin() + 2, settings.end()), slopes(scratch),
        offsets(scratch + degree * V::size()), down(degree, V(T(1))) {}
  static bool fits(at::ArrayRef<double> s, int64_t params) {
    return s.size() > 2 && s.size() == 2 + s[0] && params == 1 + s[0];
  }

  void prepare(const T* phi, int64_t stride) {
    constexpr int64_t W = V::size();
    const V steepest(5), unit(2 * bound / degree);
    shift = V::loadu(phi);
    V total(0);
    for (int64_t k = 0; k < degree; k++) {
      const V s = ((V::loadu(phi + (k + 1) * stride) / steepest).tanh() * steepest).exp();
      s.store(slopes + k * W);
      total.store(offsets + k * W);
      total = total + (s - V(1));
    }
    for (int64_t k = 0; k < degree; k++)
      ((V::loadu(offsets + k * W) - total / V(2)) * unit).store(offsets + k * W);
  }

  V guess(const V& y) const { return at::vec::clamp(y, V(-bound), V(bound)); }

  template <bool LOG>
  V evaluate(const V& x, V& slope) const {
    constexpr int64_t W = V::size();
    const V half(0.5), range(2 * bound), one(1);
    const V share = at::vec::clamp(x, V(-bound), V(bound)) / range + half, near = (share - half) * range;
    const V left = one - share;
    for (int64_t k = 1; k < degree; k++) down[k] = down[k - 1] * left;
    V up = one, s(0), added(0);
    for (int64_t k = 0; k < degree; k++, up = up * share) {
      const V basis = V(choose[k]) * up * down[degree - 1 - k];
      s = at::vec::fmadd(V::loadu(slopes + k * W), basis, s);
      added = at::vec::fmadd(V::loadu(offsets + k * W), basis, added);
    }
    added = at::vec::fmadd((s - one) * share, V(2 * bound / degree), added);
    slope = LOG ? s.log() : s;
    return at::vec::fmadd(s, x - near, near + added) + shift;
  }
};

// logit(sum_k w_k sigmoid(a_k x + b_k)), see heads/sigmoidal.py; settings: K, bound.
template <typename T>
struct DeepSigmoid {
  using V = Vec<T>;
  int64_t units;
  T bound;
  T *a, *b, *log_a, *log_w, *up, *down;

  DeepSigmoid(at::ArrayRef<double> settings, T* scratch) : units(settings[0]), bound(settings[1]) {
    for (T** row : {&a, &b, &log_a, &log_w, &up, &down}) *row = std::exchange(scratch, scratch + units * V::size());
  }
  static bool fits(at::ArrayRef<double> s, int64_t params) { return s.size() == 2 && params == 3 * s[0]; }

  V guess(const V& y) const { return y; }

  static V log_sum(const T* terms, int64_t count) {
    V peak = V::loadu(terms), sum(0);
    for (int64_t k = 1; k < count; k++) peak = at::vec::maximum(peak, V::loadu(terms + k * V::size()));
    for (int64_t k = 0; k < count; k++) sum = sum + (V::loadu(terms + k * V::size()) - peak).exp();
    return sum.log() + peak;
  }

  void prepare(const T* phi, int64_t stride) {
    constexpr int64_t W = V::size();
    for (int64_t k = 0; k < units; k++) {
      const V log = (V::loadu(phi + k * stride) / V(bound)).tanh() * V(bound);
      log.store(log_a + k * W);
      log.exp().store(a + k * W);
      const T spread = T(2 * k + 1 - units) / units;
      (V::loadu(phi + (units + k) * stride) + V(spread)).store(b + k * W);
      V::loadu(phi + (2 * units + k) * stride).store(log_w + k * W);
    }
    const V total = log_sum(log_w, units);
    for (int64_t k = 0; k < units; k++) (V::loadu(log_w + k * W) - total).store(log_w + k * W);
  }

  template <bool LOG>
  V evaluate(const V& x, V& slope) const {
    constexpr int64_t W = V::size();
    for (int64_t k = 0; k < units; k++) {
      const V z = at::vec::fmadd(V::loadu(a + k * W), x, V::loadu(b + k * W)), w = V::loadu(log_w + k * W);
      const V rest = z.abs().neg().exp().log1p();
      (at::vec::minimum(z, V(0)) - rest + w).store(up + k * W);
      (at::vec::minimum(z.neg(), V(0)) - rest + w).store(down + k * W);
    }
    const V above = log_sum(up, units), below = log_sum(down, units);
    for (int64_t k = 0; k < units; k++)
      ((V::loadu(up + k * W) - above) + (V::loadu(down + k * W) - below) - V::loadu(log_w + k * W) +
       V::loadu(log_a + k * W))
          .store(up + k * W);
    const V log_slope = log_sum(up, units);
    slope = LOG ? log_slope : log_slope.exp();
    return above - below;
  }
};

// The root of f(x) = y by Newton steps within a bracket. A step that leaves the bracket, or is longer than half the step
// before, is replaced by one to the middle of the bracket, or outwards. Roots are accepted as in numerics/roots.py. The
// total is NaN if a root has not been found after 100 steps.
template <typename T, int N, template <typename> class F>
struct Root : Columns<T, N> {
  using Given = T;
  using V = Vec<T>;
  using Columns<T, N>::W, Columns<T, N>::S;
  mutable F<T> f;

  Root(at::ArrayRef<double> settings, int64_t params, T* scratch) : f(settings, scratch) {}
  static int64_t scratch_rows(int64_t params) { return 2 * params; }
  static bool fits(at::ArrayRef<double> settings, int64_t numbers, int64_t params) {
    return numbers == 1 && F<T>::fits(settings, params);
  }

  void operator()(const T* phi, const T* y, T* x, T* totals, int64_t numbers) const {
    for (int i = 0; i < S; i += W) {
      f.prepare(phi + i, S);
      bool found = false;
      const V root = solve(V::loadu(y + i), found);
      V log_slope(0);
      f.template evaluate<true>(root, log_slope);
      root.store(x + i);
      const V missing(found ? T(0) : std::numeric_limits<T>::quiet_NaN());
      (V::loadu(totals + i) - log_slope + missing).store(totals + i);
    }
  }

  static bool all(const V& mask) { return mask.zero_mask() == 0; }

  V solve(const V& y, bool& found) const {
    constexpr T inf = std::numeric_limits<T>::infinity(), eps = std::numeric_limits<T>::epsilon();
    const V one(1), zero(0), bound = V(4 * eps) * (one + y.abs()), small = V(std::sqrt(eps)) * (one + y.abs());
    const V yes = zero == zero;
    V x = f.guess(y), earlier = x, residual(inf), low(-inf), high(inf), length(inf), done = zero != zero, answer = y;
    for (int steps = 0; steps < 100; steps++) {
      V slope(0);
      const V value = f.template evaluate<false>(x, slope), before = residual;
      residual = value - y;
      residual = V::blendv(V::blendv(V(-inf), V(inf), x > zero), residual, residual == residual);
      const V step = residual / slope, moved = x - step, size = step.abs(), off = residual.abs();
      const V prior = before.abs(), tiny = size <= V(8 * eps) * x.abs(), fine = off < bound;
      const V passed = (residual * before <= zero) & (at::vec::maximum(off, prior) < V(4) * bound);
      const V between = passed & ((moved - x) * (moved - earlier) <= zero);
      V near = (fine & (tiny | ((prior < bound) & (size <= small)))) | passed;
      V held = V::blendv(x, moved, tiny | between);
      const V below = residual < zero;
      low = V::blendv(low, x, below), high = V::blendv(x, high, below);
      const V width = high - low;
      const V pinned = (width <= V(2 * eps) * x.abs()) & (off <= V(8) * slope * width) & (near ^ yes);
      held = V::blendv(held, moved, pinned & (moved >= low) & (moved <= high));
      const V centre = (low + high) / V(2);
      const V closed = ((centre <= low) | (centre >= high)) & (centre.abs() < V(inf));  // no number between them
      held = V::blendv(held, high, closed & ((near | pinned) ^ yes));
      near = near | pinned | closed;
      answer = V::blendv(V::blendv(answer, held, near), answer, done);
      done = done | near;
      if ((found = all(done))) return answer;
      const V outwards = x - V::blendv(one + x.abs(), (one + x.abs()).neg(), below);
      const V middle = V::blendv(outwards, centre, centre.abs() < V(inf));
      const V good = (moved > low) & (moved < high) & (size <= length / V(2));
      earlier = x;
      length = V::blendv(V(inf), size, good);
      x = V::blendv(V::blendv(middle, moved, good), answer, done);
    }
    return answer;
  }
};

template <typename T, int N>
using SumOfSquaresRoot = Root<T, N, SumOfSquares>;
template <typename T, int N>
using BernsteinRoot = Root<T, N, Bernstein>;
template <typename T, int N>
using DeepSigmoidRoot = Root<T, N, DeepSigmoid>;

}  // namespace genexact
