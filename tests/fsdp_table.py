"""What the FSDP step of a Llama-3-8B-wide model moves, BF16 beside FP8, on 8 and on 64 H200s that are not there.

    python -m tests.fsdp_table                       # needs the extra `compiled`; a minute a row
    python -m tests.fsdp_table --devices 64 --products mlp --form automatic --option NAME=VALUE

Compiled, not run. Bytes: received by a device in a step for each element of the layers' weights. Hidden: of the bytes
that collectives of 1 MB and more move in loops, the share with a product between start and done.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import AxisType

import jaxfp8
from tests import compiled, compiled_programs

MESHES = {"8": (8, 1), "64": (64, 8)}
"""Devices and hosts."""
FORMS = {
    "automatic": (compiled_programs.fsdp, AxisType.Auto),
    "explicit": (compiled_programs.fsdp, AxisType.Explicit),
    "shard_map": (compiled_programs.fsdp_shard_map, AxisType.Auto),
}


HIDING = {
    "xla_gpu_enable_while_loop_unrolling": "WHILE_LOOP_UNROLLING_DOUBLE_BUFFER",
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 1,
    "xla_gpu_all_gather_combine_threshold_bytes": 1,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 16,
}
"""What makes XLA's scheduler put products beside collectives: benchmarks/NOTES.md."""


def fsdp_step(products: str, form: str, devices: str, **options: Any):
    """The function and its abstract arguments; weight gradients in bfloat16."""
    build, axis_type = FORMS[form]
    mesh = compiled.mesh({"data": MESHES[devices][0]}, MESHES[devices][1], (axis_type,))
    return build(products, mesh, **options)


def recipe() -> jaxfp8.Recipe:
    return jaxfp8.Recipe(wgrad_dtype=jnp.bfloat16)


def bytes_a_parameter(program: compiled.Program, size=compiled_programs.LLAMA) -> float:
    """What a device receives in a step for each element of the layers' weights, were it all of them."""
    moved = sum(c.times * c.moved for c in program.collectives())
    devices = max(c.devices for c in program.collectives())
    return moved / (size.layers * compiled_programs.parameters_of(size)) * devices / (devices - 1)


def hidden_share(program: compiled.Program) -> float:
    """Of the bytes of large collectives in loops, those beside a product."""
    large = [c for c in program.collectives() if c.in_loop and c.moved >= 1 << 20]
    return sum(c.times * c.moved for c in large if c.products) / sum(
        c.times * c.moved for c in large
    )


def widest_gather(program: compiled.Program) -> str:
    gathered = [a for c in program.collectives() if c.kind == "all-gather" for a in c.arrays]
    large = [a for a in gathered if a.bytes >= 1 << 20]
    return max(large, key=lambda a: a.bytes / math.prod(a.dims)).dtype if large else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", nargs="*", choices=MESHES, default=list(MESHES))
    parser.add_argument("--form", nargs="*", choices=FORMS, default=["automatic"])
    parser.add_argument("--products", nargs="*", default=["bf16", "linear", "mlp"])
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--hiding", action="store_true", help="with the options of HIDING")
    parser.add_argument("--describe", action="store_true", help="every call and collective")
    arguments = parser.parse_args()
    bools = {"true": True, "false": False}
    options = (o.split("=", 1) for o in arguments.option)
    options = {k: bools.get(v, v) for k, v in options} | (HIDING if arguments.hiding else {})
    print("devices  form       products  bytes  of BF16's  widest gather  hidden  temporary MiB")
    for devices in arguments.devices:
        for form in arguments.form:
            bf16 = None
            for products in arguments.products:
                with recipe():
                    function, args = fsdp_step(products, form, devices)
                    program = compiled.compile_for(function, *args, **options)
                moved = bytes_a_parameter(program)
                bf16 = moved if products == "bf16" else bf16
                ratio = f"{moved / bf16:.2f}" if bf16 else "-"
                print(
                    f"{devices:>7}  {form:10} {products:8} {moved:6.2f} {ratio:>10} {widest_gather(program):>14}"
                    f" {hidden_share(program):7.2f} {program.temporary_bytes / 2**20:14.0f}",
                    flush=True,
                )
                if arguments.describe:
                    print(program.describe(), flush=True)


if __name__ == "__main__":
    main()
