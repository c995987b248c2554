"""tokamax as a peer of ragged products: python benchmarks/speed.py OUT --peer benchmarks/tokamax_peer.py

In bfloat16, with the implementation that tokamax chooses for the device.
"""

import absl.flags
import tokamax

absl.flags.FLAGS.mark_as_parsed()  # tokamax would read the benchmark's command line as its own


def ragged_dots():
    """Differentiable f(x, w, group_sizes), by name."""
    return {"tokamax": tokamax.ragged_dot}
