// GELU with its derivatives, and LayerNorm with its gradients, row by row.
//
// Formulas are those of `moshi_ttt/inner_network.py` and `moshi_ttt/loss_gradient.py`.

#pragma once

#include <cmath>
#include <type_traits>

#include "products.h"

namespace ttt {

template <class T>
struct Float;
template <>
struct Float<float> {
    static constexpr int BITS = 23, BIAS = 127, TERMS = 7;  // of the mantissa, of the exponent, of the series
    static constexpr float LOWEST = -87, HIGHEST = 88, ROUND = 12582912.0f;  // 1.5 * 2^23
    static constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
};
template <>
struct Float<double> {
    static constexpr int BITS = 52, BIAS = 1023, TERMS = 13;
    static constexpr double LOWEST = -708, HIGHEST = 709, ROUND = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double LN2_HIGH = 6.93145751953125e-1, LN2_LOW = 1.42860682030941723212e-6;
};

// e^x to rounding, for x from LOWEST to HIGHEST: 2^n times the series of e^r, |r| <= ln(2) / 2. NaN stays NaN.
template <class T>
inline Lanes<T> exponential(Lanes<T> x) {
    using F = Float<T>;
    typedef std::make_unsigned_t<typename IntegerOf<T>::type> Unsigned;
    typedef Unsigned Bits __attribute__((vector_size(VECTOR_BYTES)));
    const Lanes<T> lowest = Lanes<T>{} + F::LOWEST, highest = Lanes<T>{} + F::HIGHEST;
    x = x < lowest ? lowest : x;
    x = x > highest ? highest : x;
    const Lanes<T> shifted = x * T(1.4426950408889634) + F::ROUND;  // whose last bits are n
    const Lanes<T> n = shifted - F::ROUND;
    const Lanes<T> r = x - n * F::LN2_HIGH - n * F::LN2_LOW;
    Lanes<T> sum = Lanes<T>{} + T(1);
#pragma GCC unroll 16
    for (int k = F::TERMS; k > 0; k--) sum = sum * (r * T(1.0 / k)) + T(1);
    return sum * (Lanes<T>)(((Bits)shifted + F::BIAS) << F::BITS);
}

// GELU at x in its tanh form, with the logistic function in place of tanh: 1 + tanh(a) = 2 s, 1 - tanh(a) = 2 c,
// neither of them the difference of two like numbers.
template <class T>
class Gelu {
   public:
    explicit Gelu(Lanes<T> x) : x(x) {
        const Lanes<T> furthest = Lanes<T>{} + FURTHEST;
        near = x > furthest ? furthest : x;
        near = near < -furthest ? -furthest : near;
        square = near * near;
        const Lanes<T> e = exponential<T>(T(-2) * near * (square * T(SCALE * CUBIC) + T(SCALE)));
        s = T(1) / (T(1) + e);
        c = e * s;
    }
    Lanes<T> value() const { return x * s; }
    Lanes<T> slope() const { return s + near * s * c * (square * T(6 * SCALE * CUBIC) + T(2 * SCALE)); }
    Lanes<T> second() const {
        const Lanes<T> first = square * T(3 * SCALE * CUBIC) + T(SCALE);
        const Lanes<T> inner = square * T(6 * SCALE * CUBIC) + T(SCALE);
        return T(4) * s * c * (inner - near * (s - c) * first * first);
    }

   private:
    static constexpr double SCALE = 0.7978845608028654, CUBIC = 0.044715;  // sqrt(2 / pi)
    static constexpr T FURTHEST = 16;  // where the derivatives are those at infinity
    Lanes<T> x, near, square, s, c;
};

// Of `count` numbers x: `work(i, lanes, gelu)` with as many lanes as there are; the last ones through a copy.
template <class T, class Work>
inline void each(long count, const T* x, Work work) {
    constexpr int LANES = LanesOf<T>::count;
    long i = 0;
    for (; i + LANES <= count; i += LANES) work(i, LANES, Gelu<T>(lanes(x + i)));
    if (i < count) {
        Lanes<T> rest = {};
        std::memcpy(&rest, x + i, (count - i) * sizeof(T));
        work(i, count - i, Gelu<T>(rest));
    }
}

template <class T>
inline void put(T* to, long count, Lanes<T> value) {
    if (count == LanesOf<T>::count)
        lanes(to) = value;
    else
        std::memcpy(to, &value, count * sizeof(T));
}

template <class T>
inline T dot(long count, const T* a, const T* b) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

template <class T>
inline T total(long count, const T* a) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < count; i++) sum += a[i];
    return sum;
}

// The mean of a row and its inverse deviation; with `normed`, what the row is when normalised.
template <class T>
inline T normalise(long width, const T* z, T* normed) {
    const T mean = total(width, z) / width;
    T square = 0;
#pragma omp simd reduction(+ : square)
    for (long i = 0; i < width; i++) square += (z[i] - mean) * (z[i] - mean);
    const T inverse = T(1) / std::sqrt(square / width + T(1e-6));
#pragma omp simd
    for (long i = 0; i < width; i++) normed[i] = (z[i] - mean) * inverse;
    return inverse;
}

// to = r (grad - mean(grad) - n mean(n grad)): the gradient at z that a gradient at n, z normalised, gives.
// `to` may be `grad`.
template <class T>
inline void through_normed(long width, const T* grad, const T* normed, T inverse, T* to) {
    const T mean = total(width, grad) / width, along = dot(width, grad, normed) / width;
#pragma omp simd
    for (long i = 0; i < width; i++) to[i] = inverse * (grad[i] - mean - normed[i] * along);
}

}  // namespace ttt
