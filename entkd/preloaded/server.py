"""The process that loads the libraries once and forks a job for every command that asks for one.

It computes nothing itself, since threads would not survive the fork: a job has its first tensor operation in itself.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from entkd.preloaded import VARIABLE
from entkd.preloaded.client import ACCEPTED, PASSED_ON

LIBRARIES = (
    "entkd.cli.commands",
    "entkd.data.stage",
    "entkd.distill.stage",
    "entkd.score.stage",
    "entkd.signals.write",
    "lm_eval.evaluator",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
"""What the stages import, the stages among it, and with them PyTorch."""
OF_THE_JOB = {
    *(f"{library}_NUM_THREADS" for library in ("OMP", "MKL", "OPENBLAS", "GOTO", "NUMEXPR")),
    *("VECLIB_MAXIMUM_THREADS", "TMPDIR", "TMP", "TEMP", "TEMPDIR", "PWD", "OLDPWD", "SHLVL", "_", VARIABLE),
}
"""Environment variables in which a job may differ from this process: shells and Snakemake set them for each. All others
may decide what a library does when it is loaded."""
_DIE_WITH_PARENT, _NAME = 1, 15  # PR_SET_PDEATHSIG, PR_SET_NAME


class Server:
    """Jobs that were forked, by process id, and the connections of those who wait for them."""

    def __init__(self, address: Path) -> None:
        self.environment = _common(dict(os.environ))
        self.selector = selectors.DefaultSelector()
        self.waiting: dict[int, socket.socket] = {}
        self.loaded: bool | None = None
        self.listening: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listening.bind(str(address))
        self.listening.listen(64)
        # Ended jobs wake the loop by a pipe: a signal alone could come between looking and waiting.
        self.ended, self.wake = os.pipe()
        os.set_blocking(self.ended, False)
        os.set_blocking(self.wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        self.selector.register(self.listening, selectors.EVENT_READ, "job")
        self.selector.register(self.ended, selectors.EVENT_READ, "ended")
        self.selector.register(0, selectors.EVENT_READ, "workflow")

    def serve(self) -> None:
        """Until the workflow has ended, and all jobs that somebody waits for."""
        while self.listening is not None or self.waiting:
            for key, _ in self.selector.select():
                if key.data == "job" and self.listening is not None:
                    self._take(self.listening.accept()[0])
                elif key.data == "ended":
                    os.read(self.ended, 4096)
                    self._reap()
                elif key.data == "workflow":
                    self._stop_listening()
                elif isinstance(key.data, int):
                    self._pass_on(key.data)

    def _stop_listening(self) -> None:
        if not os.read(0, 4096) and self.listening is not None:
            self.selector.unregister(0)
            self.selector.unregister(self.listening)
            self.listening.close()
            self.listening = None

    def _take(self, connection: socket.socket) -> None:
        """Fork a job, or close the connection, upon which the command runs its job itself."""
        try:
            job, streams = _receive(connection)
        except (OSError, ValueError):
            connection.close()
            return
        # Without a number of threads, a process takes what it finds to be the machine's: only it can know that.
        threads = job["environment"].get("OMP_NUM_THREADS", "")
        if _common(job["environment"]) == self.environment and threads.isdigit() and self._load():
            with contextlib.suppress(OSError):
                connection.send(ACCEPTED)
            process = os.fork()
            if process == 0:
                self._become(job, streams, connection)
            self.waiting[process] = connection
            self.selector.register(connection, selectors.EVENT_READ, process)
        else:
            connection.close()
        for stream in streams:
            os.close(stream)

    def _load(self) -> bool:
        """Import the libraries; False where a job may not be forked from them."""
        if self.loaded is None:
            self.loaded = _load()
        return self.loaded

    def _become(self, job: dict[str, Any], streams: list[int], connection: socket.socket) -> NoReturn:
        """Be the job: its streams, folder, environment and threads. Never returns."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            process = ctypes.CDLL(None)
            process.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
            process.prctl(_NAME, " ".join(["entkd", *job["arguments"][:1]]).encode())  # what `top` shows
            for other in [self.listening, connection, *self.waiting.values()]:
                if other is not None:
                    other.close()
            self.selector.close()
            os.close(self.ended)
            os.close(self.wake)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            os.chdir(job["folder"])
            os.environ.clear()
            os.environ.update(job["environment"])
            tempfile.tempdir = None  # it may have been looked up before
            status = _run(job["arguments"])
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _pass_on(self, process: int) -> None:
        """Signals of the command to its job. A command that is gone takes its job with it."""
        connection = self.waiting.get(process)
        if connection is None:  # it has ended, and was seen to in the same round
            return
        try:
            signals = connection.recv(64)
        except OSError:
            signals = b""
        if not signals:
            self.selector.unregister(connection)
        for number in signals or [signal.SIGKILL]:
            if number in PASSED_ON or number == signal.SIGKILL:
                os.kill(process, number)  # not reaped yet, so it is no other's number

    def _reap(self) -> None:
        for process in list(self.waiting):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                connection = self.waiting.pop(process)
                with contextlib.suppress(KeyError):  # its command has gone before
                    self.selector.unregister(connection)
                with connection, contextlib.suppress(OSError):
                    connection.sendall(status.to_bytes(4, "little"))


def _common(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in OF_THE_JOB}


def _load() -> bool:
    # As entkd.cli.main has it for jobs that load by themselves.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ["OMP_NUM_THREADS"] = "1"  # no threads that a fork would lose; jobs set their own number
    gc.set_threshold(100_000, 20, 20)
    for name in LIBRARIES:
        importlib.import_module(name)
    import torch

    if torch.cuda.is_available():  # a driver that was started does not survive a fork
        return False
    # What is there stays for ever: looking through it for garbage would copy its memory into every job.
    gc.collect()
    gc.freeze()
    return True


def _run(arguments: list[str]) -> int:
    import torch

    from entkd.cli import main

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.argv = ["entkd", *arguments]
    try:
        return main(arguments)
    except SystemExit as error:  # of argparse
        return int(error.code or 0)
    finally:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()  # temporary folders are removed by these


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A job and its standard streams.

    Raises
    ------
    ValueError
        If the connection ended before its job did.
    """
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    length = int.from_bytes(head, "little")
    text = bytearray()
    while len(text) < length:
        part = connection.recv(length - len(text))
        if not part:
            break
        text += part
    if len(head) < 4 or len(text) < length or len(streams) < 3:
        for stream in streams:
            os.close(stream)
        raise ValueError("an incomplete job")
    return json.loads(text), streams


def main() -> None:
    """Serve at the address of the command line, whose folder is removed at the end."""
    address = Path(sys.argv[1])
    try:
        Server(address).serve()
    finally:
        shutil.rmtree(address.parent, ignore_errors=True)


if __name__ == "__main__":
    main()
