"""Names, and amounts with a unit, as people read them."""

from __future__ import annotations

METHOD_TITLES = {
    "zeroshot": "zero-shot CLIP",
    "coop": "CoOp",
    "cocoop": "CoCoOp",
    "meta-nets": "M Meta-Nets",
    "linear-probe": "linear probe",
}  # in the order of the paper's tables


def readable_seconds(seconds: float) -> str:
    """Three digits and a unit."""
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
    return f"{1e3 * seconds:.3g} ms"


def readable_time(seconds: float) -> str:
    """Milliseconds to days."""
    if seconds < 100:
        return readable_seconds(seconds)
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def readable_bytes(count: float) -> str:
    """Three digits and a decimal unit."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count < 1e3 * unit else f"{count / unit:,.0f} {name}"
    return f"{count / 1e3:.3g} kB"


def readable_flops(count: float) -> str:
    """Three digits and the unit's letter."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e6:.3g} M"
