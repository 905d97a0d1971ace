"""How long a job takes to start: `python -m benchmarks.startup`.

A job by itself imports the libraries; one forked from the preloaded process has them. They take turns, after one round
to warm up, in which the preloaded process loads. Only where that process serves: on the CPU of a Linux machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from entkd import preloaded
from entkd.preloaded.server import LIBRARIES

ALONE = f"import {', '.join(LIBRARIES)}"
FORKED = """
import os, sys
from entkd.preloaded import client
sys.exit(client.run(os.environ["ENTKD_PRELOADED"], ["--version"]) != 0)  # None: not taken
"""
JOBS = {"by itself": ALONE, "forked": FORKED}


def seconds(source: str) -> float:
    """Wall time of a Python process; SystemExit if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"a job could not start:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="starts behind each median")
    parser.add_argument("--output", type=Path, default=Path("results/bench/startup.csv"))
    options = parser.parse_args(arguments)
    preloaded.start()
    first = {name: seconds(source) for name, source in JOBS.items()}
    rounds = [{name: seconds(source) for name, source in JOBS.items()} for _ in range(options.rounds)]
    rows = []
    for name in JOBS:
        times = [each[name] for each in rounds]
        ratios = [each["by itself"] / each[name] for each in rounds]
        rows.append(
            {
                "job": name,
                "rounds": options.rounds,
                "seconds": statistics.median(times),
                "seconds_low": min(times),
                "seconds_high": max(times),
                "ratio": statistics.median(ratios),
                "first_seconds": first[name],
            }
        )
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(options.output, index=False)


if __name__ == "__main__":
    main()
