"""Quantities and models as a person reads them."""

from cctrain.config import ModelConfig


def duration(seconds: float) -> str:
    """0.46 s, 85 s, 7.2 min, 104 min, 9.3 h, 12 days."""
    units = (("days", 86_400), ("h", 3600), ("min", 60))
    unit, length = next((one for one in units if seconds >= 2 * one[1]), ("s", 1))
    number = seconds / length
    return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def model_in_words(model: ModelConfig) -> str:
    latents = f", {model.latents} latents" if model.attention == "criss_cross" else ""
    return f"{model.attention}, {model.depth} layers, width {model.width}, {model.heads} heads{latents}"
