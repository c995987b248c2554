"""A soak: random shapes, modes and schedules of every kernel against the oracles, for hours.

    python -m tests.soak --seconds 3600 --out soak.json

Every case runs under two schedules, which must agree to the bit; the emulator checks races, bounds
and unwritten results. The JSON holds counts by target; `--seed` and a case's number give it again
(`--only SEED:NUMBER`). Emulated: nothing here needs or measures a GPU.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import sys
import time
import traceback

import jax
import numpy as np

import jaxfp8
from jaxfp8 import _C, _ffi
from tests import custom_calls
from tests.emulator.driver import EmulatedDriver


def run_case(driver: EmulatedDriver, seed: int, number: int, targets: list[str]) -> tuple[str, int]:
    """Draws and runs one case; its target and how many kernels were launched."""
    rng = np.random.default_rng([seed, number])
    target = targets[number % len(targets)]
    driver.num_sms = int(rng.choice([2, 3, 4, 8]))
    call = custom_calls.DRAWS[target](rng)
    first = None
    before = len(driver.launches)
    for driver.seed in rng.integers(0, 2**31, 2).tolist():
        try:
            results = call.run()
            if first is None:
                first = results
                call.check(results)
        except Exception as error:
            raise AssertionError(f"{call}, schedule {driver.seed}, {driver.num_sms} SMs") from error
        for a, b in zip(first, results, strict=True):
            same = np.array_equal(a.view(np.uint8), b.view(np.uint8))
            assert same, f"{call}: another schedule, {driver.seed}, gives other bits"
    launches = driver.launches[before:]
    del driver.launches[:], driver.calls[:]
    return launches[0].kernel, len(launches)


class Tally:
    """What has been run so far; written to `out`, if there is one."""

    def __init__(self, seed: int, out: str | None):
        self.seed, self.out = seed, out
        self.start = time.monotonic()
        self.cases: collections.Counter[str] = collections.Counter()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def result(self):
        return {
            "what": "random calls of every target on the emulated platform against float64 and NumPy",
            "seed": self.seed,
            "seconds": round(self.seconds),
            "cases": sum(self.cases.values()),
            "schedules": sum(self.kernels.values()),
            "failures": self.failures,
            "cases_by_target": dict(sorted(self.cases.items())),
            "launches_by_kernel": dict(sorted(self.kernels.items())),
            "versions": {
                "jaxfp8": jaxfp8.__version__,
                "jax": jax.__version__,
                "nvcc": _C.build_info()["nvcc"],
                "python": platform.python_version(),
            },
        }

    def save(self):
        if self.out:
            with open(self.out, "w") as file:
                json.dump(self.result(), file, indent=1)
                file.write("\n")

    def __str__(self):
        return f"{sum(self.cases.values())} cases, {len(self.failures)} failures"


def run_until(tally: Tally, driver, targets, seconds: float):
    """Case after case, by turns of the targets, until the time is over."""
    saved = number = 0
    while tally.seconds < seconds:
        try:
            kernel, launches = run_case(driver, tally.seed, number, targets)
            tally.kernels[kernel] += launches
        except AssertionError as error:
            tally.failures.append(f"{tally.seed}:{number} {error}: {error.__cause__}")
            traceback.print_exc()
            del driver.launches[:], driver.calls[:], driver.errors[:]
        tally.cases[targets[number % len(targets)]] += 1
        number += 1
        if tally.seconds - saved > 60:
            saved = tally.seconds
            tally.save()
            print(f"{round(tally.seconds)} s, {tally}", flush=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default="", help="only those that contain this")
    parser.add_argument("--only", metavar="SEED:NUMBER", help="run one case again")
    parser.add_argument("--out", help="JSON, written every minute and at the end")
    args = parser.parse_args(argv)
    targets = [t for t in custom_calls.DRAWS if args.targets in t]
    tally = Tally(args.seed, args.out)
    with EmulatedDriver(_ffi.image_directory()) as driver:
        if args.only:
            seed, number = map(int, args.only.split(":"))
            print(*run_case(driver, seed, number, targets))
            return 0
        run_until(tally, driver, targets, args.seconds)
    tally.save()
    print(tally)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
