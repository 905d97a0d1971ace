"""Timings side by side with public trainers: `make bench`, or `python -m benchmarks.step` and its neighbours."""

import os

from entkd.machine import keep_freed_memory

# Read when PyTorch first allocates. Huge pages, and memory that is kept, are what `entkd` itself turns on; here
# everybody gets them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
keep_freed_memory()
