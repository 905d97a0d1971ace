"""The experiment as data. Imports no torch: Snakemake parses it on login nodes."""

from entkd.config.arms import Arm, ResolvedArm
from entkd.config.budget import Budget
from entkd.config.components import Curriculum, Difficulty, Features, Temperature
from entkd.config.experiment import Experiment, Runtime, canonical_json
from entkd.config.load import load_experiment
from entkd.config.method import DIVERGENCE_NAMES, CrossEntropy, Method
from entkd.config.scoring import Analysis, ReportedSuite, ReportedTask, Suite, Task
from entkd.config.signals import SignalFeatures, Signals, SparseSignals
from entkd.config.stages import (
    Data,
    HubData,
    JsonData,
    Student,
    SyntheticData,
    Teacher,
    Training,
)
from entkd.config.tune import Tune

__all__ = [
    "DIVERGENCE_NAMES",
    "Analysis",
    "Arm",
    "Budget",
    "CrossEntropy",
    "Curriculum",
    "Data",
    "Difficulty",
    "Experiment",
    "Features",
    "HubData",
    "JsonData",
    "Method",
    "ReportedSuite",
    "ReportedTask",
    "ResolvedArm",
    "Runtime",
    "SignalFeatures",
    "Signals",
    "SparseSignals",
    "Student",
    "Suite",
    "SyntheticData",
    "Task",
    "Teacher",
    "Temperature",
    "Training",
    "Tune",
    "canonical_json",
    "load_experiment",
]
