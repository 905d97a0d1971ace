"""The command `entkd`: its job is done by a process that has the libraries loaded, if the workflow started one."""

from __future__ import annotations

import os
import sys

from entkd.preloaded import VARIABLE


def main() -> int:
    """Run the command line and return its exit status."""
    address = os.environ.get(VARIABLE, "0")
    if address != "0":
        from entkd.preloaded import client

        status = client.run(address, sys.argv[1:])
        if status is not None:
            return status
    from entkd.cli import main as run

    return run()
