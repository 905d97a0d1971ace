"""The options that subcommands have, and the parser made of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entkd import __version__
from entkd.cli.commands import STAGES


def _folder(text: str) -> Path:
    """A run's folder, given as such or by its run.json."""
    path = Path(text)
    return path.parent if path.name == "run.json" else path


HELP: dict[str, tuple[type | Callable[[str], Any], str]] = {
    "--settings": (str, "settings as JSON; the keys are in config/README.md"),
    "--needs": (str, "what is stored, as JSON: features (null, or points, tokens, threshold) and splits"),
    "--precision": (str, "of the teacher's forward passes: auto, bf16 or fp32"),
    "--teacher": (Path, "folder of the prepared teacher"),
    "--student": (Path, "folder of the untrained student"),
    "--model": (Path, "folder of the model to score"),
    "--data": (Path, "folder of the prepared data"),
    "--signals": (Path, "manifest of the teacher signals; nothing where the job reads none"),
    "--cache": (Path, "folder under which the signal stores lie"),
    "--seed": (int, "random seed"),
    "--arm": (str, "arm that the rows belong to"),
    "--suite": (str, "suite that the rows belong to"),
    "--scores": (Path, "scores.csv"),
    "--table": (Path, "ablation_table.csv; of `choose`, the CSV of the trials that is written"),
    "--runs": (Path, "runs.csv: costs of the runs"),
    "--curves": (Path, "curves.csv: losses and evaluations over the steps"),
    "--entropy": (Path, "entropy.csv of the teacher signals"),
    "--tuning": (Path, "tuning.csv: the trials of tuned arms"),
    "--effects": (Path, "effects.csv: effects of the components"),
    "--items": (Path, "items.parquet: scores per benchmark item"),
    "--markdown": (Path, "the table for people, as Markdown"),
    "--latex": (Path, "the table for papers, as LaTeX"),
    "--output": (Path, "what is written"),
}
DEFAULTS: dict[str, tuple[Any, str]] = {
    "--sample": (16, "number of documents to recompute"),
    "--save-minutes": (5.0, "minutes between two resume checkpoints"),
    "--threads": (1, "CPU threads to use"),
    "--log-every": (10, "steps between two looks at the loss on the device"),
    "--memory-gib": (2.0, "memory from which the batch size follows"),
}
"""Options with a value of their own when they are left out."""
PATCHES = "files of JSON Merge Patches on the settings: the choice of tuning, the steps of a budget in seconds"
TRIAL = "leave the weights out, and record a loss that is no number instead of failing"


def parser() -> argparse.ArgumentParser:
    """The complete command line."""
    main_parser = argparse.ArgumentParser(prog="entkd", description="Distil, score and compare language models.")
    main_parser.add_argument("--version", action="version", version=__version__)
    stages = main_parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, (function, text, arguments) in STAGES.items():
        stage = stages.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        stage.set_defaults(function=function)
        for argument in arguments.split():
            option = argument.rstrip("?")
            if option == "files":
                stage.add_argument("files", nargs="+", type=Path, help="the files to read")
            elif option == "--patches":
                stage.add_argument(option, nargs="*", type=Path, default=[], help=PATCHES)
            elif option == "--trial":
                stage.add_argument(option, action="store_true", help=TRIAL)
            elif option == "folders":
                stage.add_argument("folders", nargs="+", type=_folder, help="folders of runs, or their run.json")
            elif option == "kind":
                stage.add_argument("kind", choices=["method"], help="what an arm names as its `approach`")
            elif option == "name":
                stage.add_argument("name", help="its name in the settings: lower-case letters, digits and _")
            elif option == "experiment":
                stage.add_argument("experiment", nargs="?", default="config/config.yaml", help="file (%(default)s)")
            elif option in DEFAULTS:
                value, text = DEFAULTS[option]
                stage.add_argument(option, type=type(value), default=value, help=f"{text} (default %(default)s)")
            elif argument.endswith("?"):
                stage.add_argument(option, nargs="?", type=HELP[option][0], help=HELP[option][1])
            else:
                stage.add_argument(option, required=True, type=HELP[option][0], help=HELP[option][1])
    return main_parser
