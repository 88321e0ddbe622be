"""Suites of speed, memory and rounding: made-up weights at a base's real size, or the embedded base."""
