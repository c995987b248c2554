"""Differentiable operations with the signatures of JAX's own."""
