// e^x and the normal distribution on Vecs. The coefficients are those of tools/fit_vector_math.py.
#pragma once

namespace cocoop_fast {
namespace {

// e^x within 2 units in the last place; 0 below -87.33, infinity above 88.37, NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln(2) / 2, and e^x = 2^n e^r with e^r = 1 + r + r^2 q(r).
inline Vec exp(Vec x) {
    const Vec low = broadcast(-87.33f), high = broadcast(88.8f);
    const Vec bounded = x < low ? low : (x > high ? high : x);  // NaN stays NaN
    const Vec shift = broadcast(12582912.0f);                   // 1.5 * 2^23: adding it rounds to an integer
    const Vec shifted = bounded * 1.44269504f + shift;
    const Vec n = shifted - shift;
    const Vec r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: n times the first is exact
    Vec q = broadcast(0.00138146128f);
    q = q * r + 0.00836871006f;
    q = q * r + 0.041668389f;
    q = q * r + 0.166665211f;
    q = q * r + 0.49999994f;
    const Vec e = (q * r) * r + r + 1.0f;
    const IntVec power = (bits(shifted) - bits(shift) + 127) << 23;
    return x < low ? Vec{} : e * from_bits(power);
}

// sigma(x) = 1 / (1 + e^-x)
inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

struct Normal {
    Vec cdf;      // Phi(x) = erfc(-x / sqrt 2) / 2
    Vec density;  // phi(x) = e^(-x^2 / 2) / sqrt(2 pi)
};

// With z = |x| / sqrt 2: Phi(-|x|) = e^(-z^2) erfcx(z) / 2, where erfcx(z) is t times a polynomial in t = 1 / (1 + 0.4 z).
// Both tails are accurate in relative terms, but for the rounding of z^2.
inline Vec absolute(Vec x) { return from_bits(bits(x) & 0x7fffffff); }

inline Normal normal(Vec x) {
    const Vec z = absolute(x) * 0.70710678f;
    const Vec t = 1.0f / (1.0f + 0.4f * z);
    Vec p = broadcast(0.0412530191f);
    p = p * t - 0.140319139f;
    p = p * t + 0.083987087f;
    p = p * t + 0.0879645646f;
    p = p * t + 0.0797563419f;
    p = p * t + 0.193393275f;
    p = p * t + 0.201887578f;
    p = p * t + 0.226443112f;
    p = p * t + 0.225634232f;
    const Vec gauss = exp(x * x * -0.5f);
    const Vec tail = 0.5f * gauss * (p * t);
    return {x < 0.0f ? tail : 1.0f - tail, gauss * 0.39894228f};
}

}  // namespace
}  // namespace cocoop_fast
