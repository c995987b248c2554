"""Quantized arrays and weights, the recipe that makes them, and the checks of what a caller passes."""
