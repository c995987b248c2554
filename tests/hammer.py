"""Many threads at the handlers at once, for ThreadSanitizer: first use, faults, drivers that come and go.

    python -m tests.instrumented thread -m tests.hammer --seconds 30

Threads are C++ and the driver takes no locks (tests/native), so that nothing but the library's own code
orders them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time

from tests import fuzz_border
from tests.ffi_frames import Frame
from tests.recording import RecordingDriver

DEVICES = 4


def calls(driver: RecordingDriver, seed: int, *, valid: bool = True) -> list[tuple[str, Frame]]:
    """A call of every target on every device; invalid ones too, unless `valid`."""
    rng = random.Random(seed)
    found: dict[tuple[str, int], Frame] = {}
    made = []
    while len(found) < len(fuzz_border.TARGETS) * DEVICES:
        call = fuzz_border.valid_call(rng)
        device = rng.randrange(DEVICES)
        if fuzz_border.faults(call) or (call.target, device) in found:
            continue
        found[call.target, device] = frame = call.frame(1 + device, api=driver.api)
        made.append((call.target, frame))
        if not valid:
            fuzz_border.mutate(rng, call)
            made.append((call.target, call.frame(1 + device, api=driver.api)))
    return made


def first_use(driver: RecordingDriver, made, threads: int = 16):
    """All threads make their first call of a driver that has loaded nothing.

    Raises:
        AssertionError: a call failed, or code was loaded twice.
    """
    driver.reset()
    driver.jitter(200)  # else one thread may be through before the next starts
    driver.install()
    failed, message = driver.hammer(made, threads=threads, rounds=1)
    assert not failed, message
    assert not driver.complaints
    assert driver.calls("cuInit") == 1
    assert driver.calls("cuLaunchKernelEx") == threads * len(made)
    images = driver.calls("cuLibraryLoadData")
    assert 0 < images <= len(list(driver.image_directory.glob("*.cubin"))), images


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    counts = {"first_uses": 0, "calls": 0, "failed_calls": 0, "installs": 0}
    with RecordingDriver(num_devices=DEVICES) as driver:
        start = time.monotonic()
        while time.monotonic() - start < args.seconds:
            seed = args.seed + counts["first_uses"]
            made = calls(driver, seed)
            first_use(driver, made)
            counts["first_uses"] += 1
            counts["calls"] += 16 * len(made)

            # Faults of the driver, refusals and new drivers while calls are under way.
            mixed = calls(driver, seed, valid=False)
            done = threading.Event()

            def disturb(done=done, seed=seed):
                rng = random.Random(seed)
                while not done.is_set():
                    entry = rng.choice(
                        ("cuLibraryLoadData", "cuKernelSetAttribute", "cuLaunchKernelEx")
                    )
                    driver.fail(entry, rng.choice((2, 719)), skip=rng.randrange(50))
                    driver.install()
                    driver.fail(entry, 0)
                    counts["installs"] += 1

            other = threading.Thread(target=disturb)
            other.start()
            failed, _ = driver.hammer(mixed, threads=16, rounds=3)
            done.set()
            other.join()
            counts["calls"] += 16 * 3 * len(mixed)
            counts["failed_calls"] += failed
            assert not driver.complaints
    print(json.dumps({**counts, "seconds": round(time.monotonic() - start, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
