"""Families of increasing functions, for torch and NumPy alike."""

from __future__ import annotations

from math import inf


def cubic(x, a):
    return x**3 + a * x, (3 * x * x + a).log()


# each in u = x / scale, for torch and numpy alike (m), and how large the terms are that cancel in it
def sigmoids(m, u, p):
    return (p[..., :4] / (1 + m.exp(-(u[..., None] * m.exp(2 * p[..., 4:8]) + 3 * p[..., 8:])))).sum(-1) + 1e-4 * u


def polynomial(m, u, p):
    return p[..., 0] * u + p[..., 1] * u**3 + p[..., 2] * u**5 + p[..., 3] * u**9


def exponentials(m, u, p):
    return p[..., 0] * u + p[..., 1] * m.expm1(u) - p[..., 2] * m.expm1(-5 * u)


def kinks(m, u, p):
    return (p[..., :6] * (8 * p[..., 6:] > 1) * (abs(u[..., None] - 8 * p[..., 6:] + 4) + u[..., None])).sum(
        -1
    ) + 1e-3 * u


def flats(m, u, p):
    steps = m.clip(u[..., None] - 6 * p[..., :6] + 3, 0, 0.1)
    return 100 * steps.sum(-1) + m.clip(u + 8, -inf, 0) + m.clip(u - 8, 0, inf)


def cusp(m, u, p):
    return m.sign(u) * abs(u) ** (1 / 9) * p[..., 0] + 1e-3 * u


def ninth_power(m, u, p):
    return (u - 4 * p[..., 0]) ** 9 + 1e-6 * p[..., 1] * u


def steep(m, u, p):
    return m.tanh((u - 6 * p[..., 0] + 3) * 10 ** (8 * p[..., 1])) + p[..., 2] * u


FAMILIES = {
    sigmoids: (12, 2),
    polynomial: (4, 2),
    exponentials: (3, 2),
    kinks: (12, 100),
    flats: (6, 100),
    cusp: (1, 1),
    ninth_power: (2, 1),
    steep: (3, 2),
}
