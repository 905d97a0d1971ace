"""One process that has the libraries loaded, from which the jobs of a workflow are forked.

Importing PyTorch and Transformers takes 4 to 8 s of a core, once per job: a quarter of a demo whose students train for
a minute each. A workflow starts this process (`start`), the command `entkd` hands its job over to it
(``entkd.preloaded.client``), and the process forks (``entkd.preloaded.server``). Numbers, files, logs and exit codes
are those of a job that loads everything itself, which is what happens wherever this does not fit: on GPUs, which do not
survive a fork, on other machines of a cluster, in a container, outside Linux, or with ``ENTKD_PRELOADED=0``.

The process ends with the workflow, and with it, or with its own command, every job: kill the command to kill the job.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

VARIABLE = "ENTKD_PRELOADED"
"""Environment variable with the path of the socket; 0 keeps a workflow from starting the process."""
_LONGEST_ADDRESS = 107
"""Bytes that the system has for the path of a socket."""

_processes: list[subprocess.Popen[bytes]] = []  # held, since their pipes end with these objects


def start() -> None:
    """Start the process, and tell the jobs of this one of it by the environment. It loads at the first job."""
    if sys.platform != "linux" or os.environ.get(VARIABLE) == "0":
        return
    folder = Path(tempfile.mkdtemp(prefix="entkd-"))  # readable by its owner alone
    address = folder / "socket"
    if len(os.fsencode(address)) > _LONGEST_ADDRESS:
        folder.rmdir()
        return
    # The pipe is how it learns that this process has ended, however it did. A session of its own keeps Ctrl-C away from
    # the jobs: the commands pass it on.
    _processes.append(
        subprocess.Popen(
            [sys.executable, "-m", "entkd.preloaded.server", str(address)],
            env=dict(
                os.environ
            ),  # without what libraries have set behind Python's back, which jobs are not given either
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    )
    os.environ[VARIABLE] = str(address)
