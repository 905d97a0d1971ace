"""Timings side by side with public trainers: `make bench`, or `python -m benchmarks.step` and its neighbours."""

import os

# Read when PyTorch first allocates. Huge pages are what `entkd` itself turns on; here everybody gets them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
