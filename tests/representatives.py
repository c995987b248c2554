"""Which cases of a parametrized test the default suite takes; the others carry the marker `full`."""

import collections
import zlib


def choose(cases, names, count):
    """Positions of the cases to take: every value of each argument in `names`, and `count` cases or more.

    A case is (id, {argument: value}). Each case chosen brings as many values not seen yet as it can,
    those of `names` before others; among equals the checksum of its id decides, so that a choice
    changes little when cases are added.
    """
    values = [{(n, _key(v)) for n, v in arguments.items()} for _, arguments in cases]
    needed = {v for case in values for v in case if v[0] in names}
    seen, left, chosen = set(), list(range(len(cases))), []
    while left and (needed - seen or len(chosen) < count):
        best = max(
            left,
            key=lambda i: (
                len(values[i] & needed - seen),
                len(values[i] - seen),
                zlib.crc32(cases[i][0].encode()),
            ),
        )
        seen |= values[best]
        left.remove(best)
        chosen.append(best)
    return chosen


def _key(value):
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def mark_the_rest(items):
    """Marks `full` what the marker `representatives(*names, cases=1)` of a test leaves out."""
    tests = collections.defaultdict(list)
    for item in items:
        marker = item.get_closest_marker("representatives")
        if marker and not any(item.get_closest_marker(m) for m in ("slow", "full", "gpu")):
            tests[item.nodeid.partition("[")[0]].append(item)
    for found in tests.values():
        marker = found[0].get_closest_marker("representatives")
        cases = [(item.nodeid, item.callspec.params) for item in found]
        chosen = choose(cases, marker.args, marker.kwargs.get("cases", 1))
        for i, item in enumerate(found):
            if i not in chosen:
                item.add_marker("full")
