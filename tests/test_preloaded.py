"""Jobs forked from the preloaded process: equal to jobs that load everything themselves, and killed as these are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from entkd import __version__
from entkd.preloaded import start
from entkd.preloaded.server import _common

JOB = """
import os, signal, sys, time
from pathlib import Path
def main(arguments):
    import torch
    what = arguments[0]
    print(*arguments, os.getcwd(), os.environ.get("OWN"), torch.get_num_threads(), flush=True)
    if what == "sleep":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        Path("pid").write_text(str(os.getpid()))
        time.sleep(60)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "raise":
        raise RuntimeError("told")
    return int(arguments[1]) if what == "return" else 0
"""
"""What stands in for `entkd.cli.main`, so that only the hand-over is tested."""

SERVER = """
import sys
sys.path.insert(0, {folder!r})
import entkd.cli, job
from entkd.preloaded import server
entkd.cli.main = job.main
server.LIBRARIES = {libraries!r}
server.main()
"""
CLIENT = "import sys; from entkd.preloaded.client import run; sys.exit(run(sys.argv[1], sys.argv[2:]) or 0)"
ASKED = "import sys; from entkd.preloaded.client import run; print(run(sys.argv[1], ['return', '0']))"


SNAKEFILE = """
from entkd import preloaded
onstart:
    preloaded.start()
rule all:
    output: "out"
    params: python=sys.executable, source={source!r}
    shell: "{{params.python:q}} -c {{params.source:q}} > {{output}} 2>&1"
"""
VERSION = """
import os
from entkd.preloaded.client import run
print(run(os.environ["ENTKD_PRELOADED"], ["--version"]))
"""


class Preloaded:
    """A preloaded process whose jobs are of `JOB`."""

    def __init__(self, folder: Path, libraries: tuple[str, ...] = ("torch",)) -> None:
        self.folder, self.address = folder, folder / "own" / "socket"
        self.address.parent.mkdir()
        (folder / "job.py").write_text(JOB, encoding="utf-8")
        source = SERVER.format(folder=str(folder), libraries=libraries)
        command = [sys.executable, "-c", source, str(self.address)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=self.environment(), cwd=folder)
        while not self.address.exists():
            time.sleep(0.02)

    def environment(self, **changes: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])} | changes

    def start(self, *arguments: str, source: str = CLIENT, **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", source, str(self.address), *arguments],
            cwd=self.folder,
            env=self.environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def sleeping(self) -> tuple[subprocess.Popen[str], int]:
        """A job that sleeps, and its own process."""
        client = self.start("sleep")
        while not (self.folder / "pid").exists():
            time.sleep(0.02)
        time.sleep(0.1)
        return client, int((self.folder / "pid").read_text())

    def end(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        assert self.process.wait(30) == 0


@pytest.fixture
def preloaded(tmp_path: Path) -> Iterator[Preloaded]:
    server = Preloaded(tmp_path)
    yield server
    server.end()
    assert not server.address.parent.exists()


def is_gone(process: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_a_job_has_the_arguments_folder_threads_and_streams_of_its_command(preloaded: Preloaded) -> None:
    out, error = preloaded.start("echo", "a b", "ü", OMP_NUM_THREADS="2").communicate()
    assert (out, error) == (f"echo a b ü {preloaded.folder} None 2\n", "")


@pytest.mark.parametrize("status", [0, 2])
def test_the_exit_status_is_that_of_the_job(preloaded: Preloaded, status: int) -> None:
    assert preloaded.start("return", str(status)).wait() == status


def test_an_exception_is_told_on_the_commands_own_stream(preloaded: Preloaded) -> None:
    client = preloaded.start("raise")
    _, error = client.communicate()
    assert client.returncode == 1
    assert "RuntimeError: told" in error


def test_a_job_that_is_killed_looks_killed(preloaded: Preloaded) -> None:
    assert preloaded.start("crash").wait() == -signal.SIGSEGV


def test_signals_reach_the_job(preloaded: Preloaded) -> None:
    client, _ = preloaded.sleeping()
    client.terminate()
    assert client.wait(10) == 7


def test_a_killed_command_takes_its_job_with_it(preloaded: Preloaded) -> None:
    client, job = preloaded.sleeping()
    client.kill()
    client.wait()
    assert is_gone(job)


def test_a_killed_server_takes_its_jobs_with_it_and_the_command_fails(tmp_path: Path) -> None:
    preloaded = Preloaded(tmp_path)
    client, job = preloaded.sleeping()
    preloaded.process.kill()
    preloaded.process.wait()
    assert client.wait(10) == 1
    assert is_gone(job)


def test_jobs_go_on_when_the_workflow_is_gone_and_new_ones_run_by_themselves(tmp_path: Path) -> None:
    preloaded = Preloaded(tmp_path)
    client, _ = preloaded.sleeping()
    assert preloaded.process.stdin is not None
    preloaded.process.stdin.close()
    time.sleep(0.3)
    assert client.poll() is None
    assert preloaded.start(source=ASKED).communicate()[0] == "None\n"
    client.terminate()
    assert client.wait(10) == 7
    assert preloaded.process.wait(10) == 0


@pytest.mark.parametrize("changes", [{"OWN": "1"}, {"OMP_NUM_THREADS": ""}])
def test_a_job_of_another_environment_is_left_to_its_command(preloaded: Preloaded, changes: dict[str, str]) -> None:
    assert preloaded.start(source=ASKED, **changes).communicate()[0] == "None\n"


def test_where_there_is_a_gpu_every_job_loads_by_itself(tmp_path: Path) -> None:
    (tmp_path / "pretended.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n", encoding="utf-8")
    preloaded = Preloaded(tmp_path, ("pretended",))
    assert preloaded.start(source=ASKED).communicate()[0] == "None\n"
    preloaded.end()


def test_threads_and_what_shells_set_may_differ() -> None:
    assert _common({"OMP_NUM_THREADS": "3", "PWD": "/a", "HF_HOME": "/b"}) == {"HF_HOME": "/b"}


def test_the_command_runs_by_itself_where_nobody_listens(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from entkd.start import main; main()", "--version"]
    environment = os.environ | {"ENTKD_PRELOADED": str(tmp_path / "socket")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == f"{__version__}\n"


def test_no_process_where_the_path_of_its_socket_would_be_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv("ENTKD_PRELOADED", raising=False)
    start()
    assert "ENTKD_PRELOADED" not in os.environ
    assert not list(folder.iterdir())


def test_jobs_of_snakemake_are_taken(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text("import sys\n" + SNAKEFILE.format(source=VERSION), encoding="utf-8")
    command = [sys.executable, "-m", "snakemake", "--cores", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "out").read_text(encoding="utf-8") == f"{__version__}\n0\n"


def test_a_job_that_ends_while_its_command_is_killed_ends_no_other(tmp_path: Path) -> None:
    """Both are told of at once; whichever is seen first, the other is about a job that is not there any more."""
    (tmp_path / "own").mkdir()
    source = (
        "import sys; from pathlib import Path; from entkd.preloaded.server import Server\n"
        "Server(Path(sys.argv[1]))._pass_on(2**22 + 1)"
    )
    command = [sys.executable, "-c", source, str(tmp_path / "own/socket")]
    done = subprocess.run(command, stdin=subprocess.PIPE, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
