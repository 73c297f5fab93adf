"""The equations once more, dense and in float64: slow, obvious, and the oracle of the fast code."""
