"""Read an experiment file."""

from __future__ import annotations

from pathlib import Path

import yaml

from entkd.config.experiment import Experiment


def load_experiment(path: str | Path) -> Experiment:
    """The validated experiment in a YAML file."""
    return Experiment.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
