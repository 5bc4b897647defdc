"""Numbers and ratios as people read them."""

from __future__ import annotations


def ms(value: float | None) -> str:
    """Milliseconds in three digits, as seconds from ten seconds on; "" for None."""
    if value is None:
        return ""
    return f"{number(value / 1e3)} s" if value >= 1e4 else f"{number(value)} ms"


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, all those before the point, and "<0.001" below that; "" for None."""
    if value is None:
        return ""
    if value >= 10**digits - 0.5:  # from here on ``g`` writes an exponent
        return f"{value:.0f}"
    return f"{value:.{digits}g}" if value >= 0.001 or not value else "<0.001"


def counted(clients: int) -> str:
    """ "1 client", "8 clients"."""
    return f"{clients} client{'' if clients == 1 else 's'}"


def size(value: float | None) -> str:
    """Bytes in three digits, as GB or MB; "" for None."""
    if value is None:
        return ""
    return f"{number(value / 1e9)} GB" if value >= 1e9 else f"{number(value / 1e6)} MB"


def speed(subject_ms: float, other_ms: float) -> str:
    """How fast a subject is against another, in words that follow its name; never a ratio below one.

    "is 2.00 times as fast as", "takes 2.00 times as long as" or "is as fast as".
    """
    ratio = other_ms / subject_ms
    if f"{max(ratio, 1 / ratio):.2f}" == "1.00":
        return "is as fast as"
    return f"is {ratio:.2f} times as fast as" if ratio > 1 else f"takes {1 / ratio:.2f} times as long as"


def percent(value: float | None) -> str:
    """A share of the bound; "above" where it is more than the bound, which was then measured too low; "" for None."""
    if value is None:
        return ""
    return f"above ({value:.0f} %)" if round(value) > 100 else share(value / 100)


def share(part: float) -> str:
    """A part of a whole in percent; "<1 %" for less than half of one."""
    return "<1 %" if 0 < part < 0.005 else f"{100 * part:.0f} %"
