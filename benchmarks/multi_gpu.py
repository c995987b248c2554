"""Several GPUs of one host: what moves and how fast, experts, a training step; FP8 beside BF16 on one mesh, one run.

    python benchmarks/multi_gpu.py OUT.json [--sections rates,experts,step] [--devices N] [--seconds 440] [--peer FILE]

- rates: collectives of JAX, and the exchange of `dispatch` and `combine`, in bytes that a GPU receives a second.
- experts: a mixture on N GPUs, forward and backward, against one GPU with all of the tokens. `--peer
  benchmarks/tokamax_peer.py` puts bfloat16 beside it (tokens that travel in bfloat16, tokamax's products).
- step: the model of step.py with 16384 tokens a GPU: data parallel, FSDP on automatic axes and in `shard_map`, tensor
  with sequence parallelism; against one GPU with as many tokens each.

A program's calls are queued and timed together; programs of a comparison take turns; medians. Of a communication's
time, "exposed" is what no other kernel of the GPU runs beside. What does not fit `--seconds` is left out, and said.
train_lm on meshes, with its losses: multi_gpu_train_lm.py.
"""

import argparse
import datetime
import json
import pathlib
import time

import jax

import jaxfp8

SECTIONS = ("rates", "experts", "step")


class Budget:
    """Seconds that are left of the run."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds

    def allows(self, seconds, what):
        """Whether so many more fit; says what does not."""
        if time.monotonic() + seconds <= self.end:
            return True
        print(f"LEFT OUT {what}: it may take {seconds:.0f} s", flush=True)
        return False


def sections(arguments):
    """Rows of each section as they come."""
    import multi_gpu_experts
    import multi_gpu_rates
    import multi_gpu_step

    modules = dict(zip(SECTIONS, (multi_gpu_rates, multi_gpu_experts, multi_gpu_step), strict=True))
    budget = Budget(arguments.seconds)
    return {name: modules[name].measure(arguments, budget) for name in arguments.sections}


def parse_arguments(arguments=None):
    def names(text):
        found = text.split(",")
        if unknown := [n for n in found if n not in SECTIONS]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}; allowed: {', '.join(SECTIONS)}")
        return found

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--sections", type=names, default=list(SECTIONS))
    parser.add_argument("--devices", type=int, default=None, help="default: all there are")
    parser.add_argument("--seconds", type=float, default=440)
    parser.add_argument("--peer", type=pathlib.Path, help="as speed.py takes it; its ragged_dots")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parsed = parser.parse_args(arguments)
    parsed.devices = parsed.devices or jax.device_count()
    if not 2 <= parsed.devices <= jax.device_count():
        parser.error(f"--devices is {parsed.devices}; allowed: 2 to {jax.device_count()}")
    return parsed


def main(arguments=None):
    arguments = parse_arguments(arguments)
    start = time.monotonic()
    report = {
        "device": jax.devices()[0].device_kind,
        "devices": arguments.devices,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "jaxfp8": jaxfp8.__version__,
        "sections": sections(arguments),
    }
    report["seconds"] = time.monotonic() - start
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
