"""One function per subcommand: settings from JSON, then the stage's own function.

Stages are imported only when they run, so that `--help` and the table need no torch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from entkd import config
from entkd.config.arms import merge_patch
from entkd.config.errors import problems_of
from entkd.errors import UserError
from entkd.settings import Settings

S = TypeVar("S", bound=Settings)


class DataSettings(Settings):
    """`--settings` of prepare-data: one of several kinds."""

    data: config.Data
    """The text to learn on."""


class ArmSettings(Settings):
    """`--settings` of distill: what decides the trained weights, beside seed and inputs."""

    method: config.Method
    """The arm's complete method."""
    training: config.Training
    """Length, batch and optimizer."""


def _patched(text: str, patches: Sequence[Path]) -> str:
    """Settings as JSON text with JSON Merge Patches from files on top."""
    for path in patches:
        patch = json.loads(path.read_text(encoding="utf-8"))
        try:
            text = json.dumps(merge_patch(json.loads(text), patch, str(path)))
        except ValueError as error:
            raise UserError(str(error)) from None
    return text


def _parse(text: str, model: type[S], wrap: str | None = None) -> S:
    """Settings from JSON text; ``wrap`` puts the value under this key first."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--settings: not valid JSON: {error}") from None
    try:
        return model.model_validate({wrap: value} if wrap else value)
    except ValidationError as error:
        raise UserError("\n".join(f"--settings: {problem}" for problem in problems_of(error, model))) from None


def _prepare_teacher(args: argparse.Namespace) -> None:
    from entkd.models import prepare_teacher

    prepare_teacher(_parse(args.settings, config.Teacher), args.output)


def _finetune_teacher(args: argparse.Namespace) -> None:
    from entkd.distill import finetune_teacher

    training = _parse(args.settings, config.Training)
    finetune_teacher(training, args.teacher, args.data, args.output, args.save_minutes, args.log_every)


def _prepare_data(args: argparse.Namespace) -> None:
    from entkd.data import prepare

    prepare(_parse(args.settings, DataSettings, "data").data, args.teacher, args.output, args.precision)


def _seqkd_data(args: argparse.Namespace) -> None:
    from entkd.data.seqkd import prepare_seqkd

    prepare_seqkd(args.teacher, args.data, args.output, precision=args.precision, **json.loads(args.settings))


def _signals(args: argparse.Namespace) -> None:
    from entkd.signals.write import write_signals

    settings = _parse(args.settings, config.Signals)
    needs = json.loads(args.needs)
    write_signals(settings, needs, args.teacher, args.data, args.cache, args.output, args.precision)


def _signals_verify(args: argparse.Namespace) -> int:
    from entkd.signals.verify import verify

    return verify(args.signals, args.teacher, args.data, args.sample, args.student)


def _init_student(args: argparse.Namespace) -> None:
    from entkd.models import init_student

    init_student(_parse(args.settings, config.Student), args.teacher, args.output, args.seed)


def _distill(args: argparse.Namespace) -> None:
    from entkd.distill import distill

    arm = _parse(_patched(args.settings, args.patches), ArmSettings)
    inputs = (args.student, args.data, args.signals)
    distill(
        arm.method,
        arm.training,
        args.seed,
        *inputs,
        args.output,
        args.save_minutes,
        args.log_every,
        args.trial,
        args.teacher,
    )


def _calibrate(args: argparse.Namespace) -> None:
    from entkd.distill import calibrate

    arm = _parse(args.settings, ArmSettings)
    inputs = (args.student, args.data, args.signals)
    calibrate(arm.method, arm.training, args.seed, *inputs, args.output, args.threads)


def _choose(args: argparse.Namespace) -> None:
    from entkd.tuning import choose

    choose(args.arm, json.loads(args.settings), args.files, args.output, args.table)


def _collect_tuning(args: argparse.Namespace) -> None:
    from entkd.tuning import collect_tuning

    collect_tuning(args.files, args.output)


def _score(args: argparse.Namespace) -> None:
    from entkd.score import score

    suite = _parse(args.settings, config.Suite)
    where = (args.model, args.data, args.signals, args.output, args.items)
    score(suite, *where, arm=args.arm, seed=args.seed, suite_name=args.suite, memory_gib=args.memory_gib)


def _collect_scores(args: argparse.Namespace) -> None:
    from entkd.collect import collect_scores

    collect_scores(args.files, args.output, args.items)


def _collect_runs(args: argparse.Namespace) -> None:
    from entkd.collect import collect_runs

    collect_runs(args.folders, args.output, args.curves)


def _table(args: argparse.Namespace) -> None:
    from entkd.tables import make_tables

    settings = json.loads(args.settings)
    outputs = (args.output, args.markdown, args.latex, args.effects)
    make_tables(settings, args.scores, args.items, args.runs, *outputs, tuning=args.tuning)


def _figures(args: argparse.Namespace) -> None:
    from entkd.figures import make_figures

    optional = (args.effects, args.runs, args.curves, args.entropy)
    inputs = (json.loads(args.settings), args.scores, args.table, *optional)
    make_figures(*inputs, args.output, tuning=args.tuning, threads=args.threads)


def _check(args: argparse.Namespace) -> None:
    from entkd.config.errors import ConfigError
    from entkd.config.pipelines import unserved
    from entkd.config.summary import summary

    experiment = config.load_experiment(args.experiment)
    problems = list(unserved({arm.name: arm.pipeline for arm in experiment.resolved_arms.values()}, Path("workflow")))
    if problems:
        raise ConfigError(problems, str(args.experiment))
    print(summary(experiment))


def _config_docs(args: argparse.Namespace) -> None:
    from entkd.config.docs import write_docs

    write_docs(args.output)


def _new(args: argparse.Namespace) -> None:
    from entkd.new import NEXT, new

    for path in new(args.kind, args.name):
        print(path)
    print(NEXT)


def _unlock(args: argparse.Namespace) -> None:
    from entkd.unlock import unlock

    unlock()


Stage = tuple[Callable[[argparse.Namespace], "int | None"], str, str]
"""Function, help, arguments; one that ends in `?` may be left out or have no value."""
STAGES: dict[str, Stage] = {
    "prepare-teacher": (_prepare_teacher, "import a teacher", "--settings --output"),
    "finetune-teacher": (
        _finetune_teacher,
        "fine-tune a teacher",
        "--settings --teacher --data --output --save-minutes --log-every",
    ),
    "prepare-data": (
        _prepare_data,
        "read or generate text and tokenise it",
        "--settings --precision --teacher --output",
    ),
    "seqkd-data": (
        _seqkd_data,
        "greedy teacher responses to the prompts",
        "--settings --precision --teacher --data --output",
    ),
    "signals": (
        _signals,
        "store what the teacher says about each token",
        "--settings --needs --precision --teacher --data --cache --output",
    ),
    "signals-verify": (
        _signals_verify,
        "recompute a sample of stored signals; exit status 1 where they are damaged; of sparse ones, the bias",
        "--signals --teacher --data --sample --student?",
    ),
    "init-student": (_init_student, "make the untrained student", "--settings --teacher --seed --output"),
    "distill": (
        _distill,
        "train one student",
        "--settings --patches --seed --student --data --signals? --teacher? --output --trial"
        " --save-minutes --log-every",
    ),
    "calibrate": (
        _calibrate,
        "time a few steps and write how many are a budget of seconds",
        "--settings --seed --student --data --signals? --output --threads",
    ),
    "choose": (_choose, "take the trial with the lowest dev loss", "--settings --arm --output --table files"),
    "score": (
        _score,
        "score one model on a suite",
        "--settings --model --data --signals? --arm --seed --suite --output --items --memory-gib",
    ),
    "collect-scores": (_collect_scores, "all scores in one file", "--output --items files"),
    "collect-runs": (_collect_runs, "costs and learning curves of all runs", "--output --curves folders"),
    "collect-tuning": (_collect_tuning, "the trials of all tuned arms in one file", "--output files"),
    "table": (
        _table,
        "the ablation table and the effects of the components",
        "--settings --scores --items? --runs? --tuning? --output --markdown --latex --effects",
    ),
    "figures": (
        _figures,
        "the figures, from the collected files alone",
        "--settings --scores --table --effects? --runs? --curves? --entropy? --tuning? --output --threads",
    ),
    "check": (_check, "say what an experiment consists of, or what is wrong with it", "experiment"),
    "config-docs": (_config_docs, "write schema.json and README.md of the settings", "--output"),
    "new": (_new, "write a method and its test that run, to start from", "kind name"),
    "unlock": (_unlock, "free a folder whose Snakemake was killed", ""),
}
