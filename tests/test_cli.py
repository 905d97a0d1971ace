"""The command line: every stage is there, settings are checked, torch stays out until it is needed."""

from __future__ import annotations

import errno
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from entkd import cli
from entkd.cli import commands
from entkd.errors import UserError

ROOT = Path(__file__).parents[1]


def test_every_rule_calls_a_stage_with_arguments_it_knows() -> None:
    """The commands in the rules parse, with each placeholder as some value."""
    import re

    called = set()
    for rules in (ROOT / "workflow/rules").rglob("*.smk"):
        for block in re.findall(r"shell:\n((?:\s+f?\".*\"\n?)+)", rules.read_text()):
            text = "".join(re.findall(r'"(.*)"', block)).partition(" > ")[0]
            words = re.sub(
                r"\{(wildcards\.seed|params\.seed|THREADS|SAVE_MINUTES|LOG_EVERY|SCORING_GIB|threads)\}", "1", text
            ).split()
            stage = vars(cli.parser().parse_args(words[1:]))["stage"]
            assert words[0] == "entkd"
            called.add(stage)
    assert called == set(commands.STAGES) - {"signals-verify", "check", "config-docs", "new", "unlock"}


@pytest.mark.parametrize("stage", commands.STAGES)
def test_every_argument_is_explained(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([stage, "--help"])
    assert caught.value.code == 0
    assert stage in capsys.readouterr().out


def test_parsing_and_checking_import_no_torch() -> None:
    code = (
        "import sys; from entkd import cli; cli.main(['check']);"
        "print([m for m in ('torch', 'transformers', 'datasets', 'lm_eval', 'pandas') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert "36 students (12 arms × seeds [0, 1, 2]), 38 scorings" in run.stdout


def test_the_loss_imports_no_compiler() -> None:
    code = "import sys, entkd.fused; print('torch._inductor.compile_fx' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_bad_settings_end_with_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.dumps({"source": "synthetic", "trian": 3})
    assert (
        cli.main(["prepare-data", "--precision", "auto", "--settings", settings, "--teacher", "t", "--output", "o"])
        == 2
    )
    assert capsys.readouterr().err.startswith("error: --settings: data: unknown key `trian`; did you mean `train`?")
    assert cli.main(["init-student", "--settings", "{", "--teacher", "t", "--seed", "0", "--output", "o"]) == 2
    assert "--settings: not valid JSON" in capsys.readouterr().err


def test_missing_experiment_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "no.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: no.yaml: no such experiment file")


def test_check_knows_the_pipelines_of_the_workflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    experiment["arms"]["own"] = {"pipeline": "seqdk", "divergence": None, "ce": {}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    monkeypatch.chdir(ROOT)
    assert cli.main(["check", str(tmp_path / "x.yaml")]) == 2
    problem = "arms.own.pipeline: unknown name `seqdk`; did you mean `seqkd`? Known: distill, onpolicy, seqkd"
    assert capsys.readouterr().err.rstrip().endswith(problem)
    monkeypatch.chdir(tmp_path)  # there is no workflow to ask
    assert cli.main(["check", "x.yaml"]) == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("x"), 2), (FileNotFoundError("x"), 2), (OSError(errno.ENOSPC, "No space left on device"), 2)],
)
def test_user_mistakes_show_no_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception, status: int) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setitem(commands.STAGES, "check", (fail, "fails", "experiment"))
    assert cli.main(["check"]) == status


def test_a_reader_that_goes_away_is_no_mistake() -> None:
    command = f"{sys.executable} -m entkd.cli check | true; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (1, "")


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise PermissionError("x")

    monkeypatch.setitem(commands.STAGES, "check", (fail, "fails", "experiment"))
    with pytest.raises(PermissionError):
        cli.main(["check"])


def test_optional_inputs_may_be_left_out_or_empty() -> None:
    required = [
        "--settings",
        "{}",
        "--scores",
        "s",
        "--output",
        "o",
        "--markdown",
        "m",
        "--latex",
        "l",
        "--effects",
        "e",
    ]
    for optional in ([], ["--items", "--runs"]):
        args = cli.parser().parse_args(["table", *required[:4], *optional, *required[4:]])
        assert (args.items, args.runs) == (None, None)


def test_stage_functions_take_what_the_command_line_gives() -> None:
    from entkd.data import prepare
    from entkd.data.seqkd import prepare_seqkd
    from entkd.distill import calibrate, distill, finetune_teacher
    from entkd.models import init_student, prepare_teacher

    expected = {
        prepare_teacher: ["settings", "output"],
        prepare: ["settings", "teacher", "output"],
        prepare_seqkd: ["teacher", "data", "output", "max_response_tokens", "batch"],
        init_student: ["settings", "teacher", "output", "seed"],
        distill: [
            "method", "training", "seed", "student", "data", "signals", "output", "save_minutes", "log_every", "trial",
        ],
        calibrate: ["method", "training", "seed", "student", "data", "signals", "output", "threads"],
        finetune_teacher: ["training", "teacher", "data", "output", "save_minutes", "log_every"],
    }  # fmt: skip
    for function, names in expected.items():
        assert list(inspect.signature(function).parameters)[: len(names)] == names
