"""Prints line and branch coverage of the package; exits 1 if either is below FLOOR percent."""

import json
import sys

from coverage import Coverage

FLOOR = 95

coverage = Coverage()
coverage.load()
coverage.report(show_missing=True, skip_covered=True)
coverage.json_report(outfile="build/coverage.json")
with open("build/coverage.json") as file:
    totals = json.load(file)["totals"]
lines = 100 * totals["covered_lines"] / totals["num_statements"]
branches = 100 * totals["covered_branches"] / totals["num_branches"]
print(f"coverage of jaxfp8: {lines:.1f} % of lines, {branches:.1f} % of branches; floor {FLOOR} %")
sys.exit(min(lines, branches) < FLOOR)
