"""What the kernels of the inner loop share: loads, products, bound, GELU, LayerNorm and their derivatives."""

import triton
import triton.language as tl

LAYER_NORM_EPS = tl.constexpr(1e-6)
_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): tanh u = 2 sigmoid(2 u) - 1
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def load_block(base, rows, columns, width):
    """`[rows, columns]` of a matrix with rows of `width`."""
    return tl.load(base + rows[:, None] * width + columns[None, :])


@triton.jit
def load_again(base, rows, columns, width):
    """`load_block`, but never one load together with an earlier one of the same place."""
    return tl.load(base + rows[:, None] * width + columns[None, :], cache_modifier=".ca")


@triton.jit
def store_block(base, rows, columns, width, values):
    """Write what `load_block` reads."""
    tl.store(base + rows[:, None] * width + columns[None, :], values)


@triton.jit
def product(a, b, precision: tl.constexpr):
    """Matrix product in float32."""
    return tl.dot(a, b, input_precision=precision)


@triton.jit
def over_units(a_t, w, precision: tl.constexpr):
    """a w, `[K, D]`, for a_t `[units, K]` and w `[units, D]`; the width is the side of many rows."""
    return tl.trans(tl.dot(tl.trans(w), a_t, input_precision=precision))


@triton.jit
def sum_of_parts(base, rows, columns, width, stride, count: tl.constexpr):
    """Sum of `count` matrices that lie `stride` numbers apart, always in the same order."""
    total = load_block(base, rows, columns, width)
    for part in tl.static_range(1, count):
        total += load_block(base + part * stride, rows, columns, width)
    return total


@triton.jit
def bound_factor(square, radius):
    """By how much weights are drawn back to their center: radius / |change| where that is below 1, else 1.

    A change that is not a number is not outside: it stays to be seen.
    """
    return tl.where(square > radius * radius, radius * tl.rsqrt(square), 1.0)


@triton.jit
def gelu(x):
    """GELU in its tanh form: x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * tl.sigmoid(_SLOPE * (x + _CUBIC * x * x * x))


@triton.jit
def gelu_first(x):
    """Derivative of `gelu`."""
    s = tl.sigmoid(_SLOPE * (x + _CUBIC * x * x * x))
    inner = _SLOPE * (1 + 3 * _CUBIC * x * x)
    return s + x * inner * s * (1 - s)


@triton.jit
def gelu_second(x):
    """Second derivative of `gelu`."""
    s = tl.sigmoid(_SLOPE * (x + _CUBIC * x * x * x))
    inner = _SLOPE * (1 + 3 * _CUBIC * x * x)
    s_first = inner * s * (1 - s)
    s_second = 6 * _SLOPE * _CUBIC * x * s * (1 - s) + inner * s_first * (1 - 2 * s)
    return 2 * s_first + x * s_second


@triton.jit
def normalized(z):
    """z over its last axis with mean 0 and deviation 1, and the inverse deviation `[rows, 1]`."""
    width: tl.constexpr = z.shape[1]
    centered = z - tl.sum(z, 1)[:, None] / width
    inverse = tl.rsqrt(tl.sum(centered * centered, 1) / width + LAYER_NORM_EPS)[:, None]
    return centered * inverse, inverse


@triton.jit
def through_normalized(d, n, inverse):
    """Gradient at z of a gradient `d` at n = normalized(z). The Jacobian is symmetric."""
    width: tl.constexpr = d.shape[1]
    mean = tl.sum(d, 1)[:, None] / width
    along = tl.sum(d * n, 1)[:, None] / width
    return inverse * (d - mean - n * along)


@triton.jit
def loss_gradient(z, target, gamma, beta):
    """G of the last layer: the gradient of 1/2 || LN(z) - target ||^2 at z. gamma and beta are `[1, D]`."""
    n, inverse = normalized(z)  # pyright: ignore[reportGeneralTypeIssues]
    return through_normalized((gamma * n + beta - target) * gamma, n, inverse)


@triton.jit
def through_loss_gradient(z, target, d_g, gamma, beta):
    """Through G = J a with a = gamma (gamma n + beta - target): dz, dtarget, dgamma and dbeta `[D]`."""
    width: tl.constexpr = z.shape[1]
    n, inverse = normalized(z)  # pyright: ignore[reportGeneralTypeIssues]
    error = gamma * n + beta - target
    a = error * gamma
    d_a = through_normalized(d_g, n, inverse)
    d_error = d_a * gamma
    a_n, g_n = tl.sum(a * n, 1)[:, None] / width, tl.sum(d_g * n, 1)[:, None] / width
    d_n = d_error * gamma - inverse * (d_g * a_n + a * g_n)
    # The inverse deviation r has the derivative -r^2 n / D, and dr = (dG . G) / r.
    whole = a - tl.sum(a, 1)[:, None] / width - n * a_n
    d_r_by_r = tl.sum(d_g * whole, 1)[:, None] / width
    d_z = through_normalized(d_n, n, inverse) - inverse * inverse * d_r_by_r * n
    return d_z, -d_error, tl.sum(d_a * error + d_error * n, 0), tl.sum(d_error, 0)
