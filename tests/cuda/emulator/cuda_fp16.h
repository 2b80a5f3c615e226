// float16 as bits, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    float value;
    if (exponent == 31) {
        value = mantissa ? std::numeric_limits<float>::quiet_NaN() : INFINITY;
    } else if (exponent == 0) {
        value = std::ldexp(float(mantissa), -24);
    } else {
        value = std::ldexp(float(1024 + mantissa), exponent - 25);
    }
    return x.bits >> 15 ? -value : value;
}

inline __half __float2half_rn(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float magnitude = std::fabs(x);
    if (std::isnan(x)) return {0x7fff};
    if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    int exponent;
    std::frexp(magnitude, &exponent);  // magnitude = m 2^exponent with m in [0.5, 1)
    if (magnitude == 0.0f || exponent < -13) exponent = -13;  // subnormal: in units of the least normal numbers
    const float units = std::nearbyint(std::ldexp(magnitude, 11 - exponent));  // up to 2048, which carries over below
    return {uint16_t(sign + (exponent + 13) * 1024 + int(units))};
}
