"""tokamax as a peer of ragged products: python benchmarks/speed.py OUT --peer benchmarks/tokamax_peer.py

In bfloat16. "tokamax": the implementation and the configuration that tokamax chooses for the device. "tokamax tuned":
its Mosaic kernels with the configurations that its own table of tuned ones (for an H100) holds for large shapes, since
its table has no H200 and falls back to tiles of 64x64. On jax 0.11 this needs a tokamax newer than 0.0.12.
"""

import functools

import absl.flags
import tokamax
from tokamax._src.ops.ragged_dot import base, pallas_mosaic_gpu, pallas_mosaic_gpu_common

absl.flags.FLAGS.mark_as_parsed()  # tokamax would read the benchmark's command line as its own


def tuned():
    def product(**options):
        config = pallas_mosaic_gpu_common.Config(
            block_m=128, block_n=64, block_k=128, num_stages=4, split_k=1, **options
        )
        return functools.partial(pallas_mosaic_gpu.PallasMosaicGpuRaggedDot, config=config)

    columns = pallas_mosaic_gpu_common.MatmulDimension.N
    forward = product(persistent=True, grid_minor_dim=columns, grid_tile_width=8)
    backward = functools.partial(base.vjp, dlhs_ragged_dot=forward(), drhs_ragged_dot=product()())
    return functools.partial(tokamax.ragged_dot, implementation=[forward(vjp=backward)])


def ragged_dots():
    """Differentiable f(x, w, group_sizes), by name."""
    return {"tokamax": tokamax.ragged_dot, "tokamax tuned": tuned()}
