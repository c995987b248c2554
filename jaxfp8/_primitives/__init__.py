"""JAX primitives from named dimensions: batching, partitioning, types; no numerics."""
