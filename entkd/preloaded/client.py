"""The command's side: hand over a job, pass signals on, end as the job ends. Imports nothing that takes time."""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ACCEPTED = b"+"


def run(address: str, arguments: Sequence[str]) -> int | None:
    """Have a command run by the preloaded process.

    Parameters
    ----------
    address
        Path of its socket.
    arguments
        The command line after `entkd`.

    Returns
    -------
    The exit status; None where the process is not there or does not take the job, so that the caller must run it.
    """
    if sys.stderr.isatty():  # bars of progress were decided against when the libraries were loaded
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with connection:
        try:
            connection.connect(address)
            _send(connection, {"arguments": list(arguments), "folder": os.getcwd(), "environment": dict(os.environ)})
            accepted = connection.recv(1) == ACCEPTED
        except OSError:
            return None
        if not accepted:
            return None

        def pass_on(number: int, _: Any) -> None:
            with contextlib.suppress(OSError):
                connection.send(bytes([number]))

        for number in PASSED_ON:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, pass_on)
        status = _receive(connection, 4)
    if len(status) < 4:
        print("error: the process that jobs are forked from has ended, and this job with it", file=sys.stderr)
        return 1
    code = os.waitstatus_to_exitcode(int.from_bytes(status, "little"))
    if code < 0:  # killed, e.g. for want of memory: whoever waits for this process should see the same
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


def _send(connection: socket.socket, job: dict[str, Any]) -> None:
    """The job, its length before it, with this process's standard streams."""
    text = json.dumps(job).encode()
    streams = array.array("i", [0, 1, 2])
    connection.sendmsg([len(text).to_bytes(4, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    connection.sendall(text)


def _receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            break
        data += part
    return data
