"""The polynomial coefficients of csrc/cpu/vec_math.h, and the error that they leave in exact arithmetic.

Near-minimax fits: weighted least squares at Chebyshev points, reweighted until the error is level.
Needs scipy. Run: python tools/fit_vector_math.py
"""

from __future__ import annotations

import numpy as np
from scipy.special import erfcx


def fit(x: np.ndarray, basis: np.ndarray, target: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients c that make max |basis @ c - target| / scale small, and that maximum (Lawson's iteration)."""
    weight = np.ones(len(x)) / len(x)
    best, best_error = None, np.inf
    for _ in range(400):
        root = np.sqrt(weight) / scale
        c = np.linalg.lstsq(basis * root[:, None], target * root, rcond=None)[0]
        error = np.abs(basis @ c - target) / scale
        if error.max() < best_error:
            best, best_error = c, float(error.max())
        weight *= error
        weight /= weight.sum()
    return best, best_error


def chebyshev_points(low: float, high: float, count: int = 2000) -> np.ndarray:
    return low + (high - low) * (1 - np.cos(np.pi * (np.arange(count) + 0.5) / count)) / 2


def show(name: str, coefficients: np.ndarray, error: float) -> None:
    print(f"{name}: relative error {error:.2e}")
    print("   ", ", ".join(f"{np.float32(c):.9g}f" for c in coefficients))


def main() -> None:
    # e^r = 1 + r + r^2 q(r) for |r| <= ln(2) / 2
    r = chebyshev_points(-0.5 * np.log(2), 0.5 * np.log(2))
    powers = np.stack([r ** (2 + i) for i in range(5)], axis=1)
    show("exp", *fit(r, powers, np.expm1(r) - r, np.exp(r)))

    # erfcx(z) = e^(z^2) erfc(z) = t q(t), t = 1 / (1 + p z), for 0 <= z <= 10
    p = 0.4
    t = chebyshev_points(1 / (1 + 10 * p), 1.0)
    z = (1 / t - 1) / p
    powers = np.stack([t ** (1 + i) for i in range(9)], axis=1)
    show(f"erfcx, p = {p}", *fit(t, powers, erfcx(z), erfcx(z)))


if __name__ == "__main__":
    main()
