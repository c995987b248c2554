"""How XLA:CPU compiles in the tests: quickly, and where it matters as it does for a user."""

import importlib.metadata

# A test's programs are small and run once or twice: most of their time would be LLVM's. XLA's own passes stay on.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_cpu_parallel_codegen_split_count": 32}
"""XLA's own defaults, as compiler options of one program."""

if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have no such flag
    QUICK["xla_cpu_use_fusion_emitters"] = False
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True

QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
"""As XLA_FLAGS take them."""
