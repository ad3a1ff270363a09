"""Quantities as a person reads them."""


def duration(seconds: float) -> str:
    """0.46 s, 85 s, 7.2 min, 104 min, 9.3 h, 12 days."""
    units = (("days", 86_400), ("h", 3600), ("min", 60))
    unit, length = next((one for one in units if seconds >= 2 * one[1]), ("s", 1))
    number = seconds / length
    return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"
