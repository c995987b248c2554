"""The native side: which custom-call targets this build has, and their registration."""

from __future__ import annotations


def target(name: str) -> str:
    """Versioned name of a custom-call target: docs/architecture.md lists them."""
    return f"jaxfp8_{name}_v1"


def require_cuda_kernels(operation: str) -> None:
    """Raises NotImplementedError if this build of jaxfp8 holds no CUDA kernels."""
