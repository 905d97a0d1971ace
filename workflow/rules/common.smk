"""Lookups shared by all rules: the experiment, and what each rule takes from it. The only file with functions.

Rules get their settings as one canonical JSON string, because Snakemake compares `params` to decide what to rerun.
"""

import re
import shlex
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

from entkd.config import Experiment, canonical_json, jobs, load_experiment
from entkd.config.errors import ConfigError, unknown_name
from entkd.machine import has_gpu, hide_gpus, memory_mib


def read_experiment() -> Experiment:
    """The experiment that `--config experiment=FILE` names, with the other `--config` keys on top."""
    if workflow.overwrite_configfiles:
        raise WorkflowError(
            "--configfile would merge an experiment into another one; use --config experiment=FILE, which replaces it"
        )
    overrides = {key: value for key, value in config.items() if key != "experiment"}
    try:
        return load_experiment(config.get("experiment", "config/config.yaml"), overrides)
    except ConfigError as error:
        raise WorkflowError(str(error))


experiment = read_experiment()
if experiment.lacking_cells:
    logger.warning(f"No effects of components: {experiment.lacking_cells}.")


pathvars:
    results=experiment.results,
    logs=f"{experiment.results}/logs",
    teacher=experiment.teacher.name,
    imported=f"{experiment.teacher.name}{'.base' if experiment.teacher.finetune else ''}",
    data=experiment.data.name,


GPUS = int(has_gpu()) if experiment.runtime.gpus == "auto" else experiment.runtime.gpus
if not GPUS:
    hide_gpus()
MEMORY_MB = int(experiment.runtime.memory_gib * 1024)
THREADS = experiment.runtime.threads
ALL_CORES = workflow.resource_settings.cores or THREADS  # none with --report and --unlock
# Written into the shell lines, not params: changing them reruns nothing.
CACHE = shlex.quote(str(experiment.runtime.cache))
SAVE_MINUTES = experiment.runtime.save_minutes
LOG_EVERY = experiment.runtime.log_every
SCORING_GIB = experiment.runtime.scoring_gib

# On this machine (a cluster has nodes) many cores must not start more jobs than fit into memory.
if workflow.nodes is None and "mem_mb" not in workflow.global_resources:
    workflow.register_resource("mem_mb", max(MEMORY_MB, memory_mib()))

pipelines = set()
# Data on which a pipeline trains that needs no more than the rules `trial` and `calibrate` have. Others can neither be
# tuned nor timed.
training_data = {"distill": "<data>"}


def arms_of(pipeline: str) -> str:
    """The wildcard constraint of a pipeline: a pattern of the names of its arms."""
    pipelines.add(pipeline)
    arms = experiment.resolved_arms.values()
    names = [re.escape(arm.name) for arm in arms if arm.pipeline == pipeline]
    return "|".join(names) or "(?!)"  # the second matches no name


def require_known_pipelines() -> None:
    """Refuse arms of a pipeline for which no rules file is included."""
    for arm in experiment.resolved_arms.values():
        if arm.pipeline not in pipelines:
            path = f"arms.{arm.name}.pipeline"
            raise WorkflowError(unknown_name(path, arm.pipeline, pipelines))


def require_timed_pipelines() -> None:
    """Refuse tuned arms, and arms with a budget of seconds, whose pipeline cannot be run for a trial."""
    for name, arm in experiment.resolved_arms.items():
        if arm.pipeline not in training_data and name in experiment.trials:
            raise WorkflowError(
                f"tune.arms: arm `{name}` has the pipeline `{arm.pipeline}`, which has no trials; leave it out"
            )
        if arm.pipeline not in training_data and measured_budget(name):
            raise WorkflowError(
                f"training.budget.seconds: arm `{name}` has the pipeline `{arm.pipeline}`, which is not timed; give "
                "tokens or tflops, or leave it out"
            )


def local_files(folder) -> list[str]:
    """Files of a local folder that the experiment names; none where it names no folder.

    Hidden files and what Python leaves behind are no part of it: they change by themselves.
    """
    files = (file for file in Path(folder).rglob("*") if file.is_file()) if folder else ()
    parts = {file: file.relative_to(folder).parts for file in files}
    return sorted(
        str(file) for file in parts if not any(part.startswith(".") or part == "__pycache__" for part in parts[file])
    )


def teacher_files(wildcards) -> list[str]:
    return local_files(experiment.teacher.path)


def student_files(wildcards) -> list[str]:
    return local_files(experiment.student.path)


def data_files(wildcards) -> list[str]:
    return [str(file) for file in getattr(experiment.data, "files", {}).values()]


def task_files(wildcards) -> list[str]:
    return local_files(experiment.suites[wildcards.suite].include_path)


def initial_student(wildcards) -> str:
    """The untrained student; its weights depend on the seed only where they are random."""
    seed = wildcards.get("seed", experiment.seeds[0]) if experiment.student.init == "scratch" else 0
    return f"<results>/students/untrained/seed{seed}/manifest.json"


def signals_for(data: str):
    """An input function: the teacher signals on `data` for arms that read them."""

    def signals(wildcards):
        arm = experiment.resolved_arms[wildcards.arm]
        return f"<results>/signals/<teacher>/{data}/manifest.json" if arm.method.needs_signals else []

    return signals


def data_of_arm(wildcards) -> str:
    """The data that a tuned or timed arm trains on."""
    data = training_data[experiment.resolved_arms[wildcards.arm].pipeline]
    return f"<results>/data/{data}/manifest.json"


def signals_of_arm(wildcards):
    """The signals that a tuned or timed arm reads."""
    return signals_for(training_data[experiment.resolved_arms[wildcards.arm].pipeline])(wildcards)


def teacher_of_trial(wildcards):
    """The teacher itself, for arms whose training has it read what the student writes."""
    on_policy = experiment.resolved_arms[wildcards.arm].method.on_policy
    return "<results>/teachers/<teacher>/manifest.json" if on_policy else []


def teacher_folder(wildcards, input) -> list[str]:
    """The folder of the input `teacher`, if there is one."""
    return [str(Path(input.teacher).parent)] if input.teacher else []


def measured_budget(arm: str) -> list[str]:
    """The number of steps that an arm's budget of seconds was measured to be, as a patch of its settings."""
    budget = experiment.training.budget
    return [f"<results>/budget/{arm}.json"] if budget is not None and budget.seconds is not None else []


def patches_of_trial(wildcards) -> list[str]:
    return measured_budget(wildcards.arm)


def patches_of_arm(wildcards) -> list[str]:
    """What is known of an arm's settings only when other jobs have run: the steps of its budget, the chosen trial."""
    chosen = [f"<results>/tuning/{wildcards.arm}.json"] if wildcards.arm in experiment.trials else []
    return [*measured_budget(wildcards.arm), *chosen]


def patches(wildcards, input) -> list[str]:
    """The input `patches` of a job, nothing where its rule has none. Snakemake compares no params that read inputs."""
    return input.get("patches", [])


def fidelity_signals(wildcards):
    fidelity = experiment.suites[wildcards.suite].fidelity
    return "<results>/signals/<teacher>/<data>/manifest.json" if fidelity else []


def scored_model(wildcards) -> str:
    """The last file of the model in a row of the table: an arm's student, or one of the two references."""
    if wildcards.arm == "teacher":
        return "<results>/teachers/<teacher>/manifest.json"
    last = "manifest.json" if wildcards.arm == "untrained" else "run.json"
    return f"<results>/students/{wildcards.arm}/seed{wildcards.seed}/{last}"


def arm_settings(wildcards) -> str:
    return canonical_json(jobs.arm_settings(experiment, experiment.resolved_arms[wildcards.arm]))


def trial_of(wildcards):
    return next(trial for trial in experiment.trials[wildcards.arm] if trial.name == wildcards.trial)


def trial_settings(wildcards) -> str:
    return canonical_json(jobs.trial_settings(trial_of(wildcards)))


def choice_settings(wildcards) -> str:
    return canonical_json(jobs.choice_settings(experiment, wildcards.arm))


def trials_of_arm(wildcards) -> list[str]:
    """Records of all trials of an arm."""
    names = [trial.name for trial in experiment.trials[wildcards.arm]]
    return [f"<results>/tuning/{wildcards.arm}/{name}/seed{experiment.tune.seed}/run.json" for name in names]


def tuned_arms() -> str:
    """The wildcard constraint of the arms that are tuned."""
    return "|".join(map(re.escape, experiment.trials)) or "(?!)"


def suite_settings(wildcards) -> str:
    return canonical_json(jobs.suite_settings(experiment.suites[wildcards.suite]))


def students() -> list[str]:
    """Folders of all trained students."""
    return [f"<results>/students/{arm}/seed{seed}" for arm in experiment.resolved_arms for seed in experiment.seeds]


def scores(ending: str) -> list[str]:
    """Score files of every student, of the teacher and of the untrained student."""
    rows = [(arm, seed) for arm in experiment.resolved_arms for seed in experiment.seeds]
    return [
        f"<results>/scores/{arm}/seed{seed}/{suite}{ending}"
        for arm, seed in [("teacher", 0), ("untrained", 0), *rows]
        for suite in experiment.suites
    ]


def is_published() -> bool:
    """Whether scores.csv came without the students and score files it was made of."""
    folder = Path(experiment.results)
    return (folder / "scores.csv").is_file() and not (folder / "scores").exists() and not (folder / "students").exists()


PUBLISHED = is_published()
if PUBLISHED:
    logger.info(f"{experiment.results}/scores.csv came without its students: only table and figures are made from it.")


def result(name: str) -> list[str]:
    """A collected file as input of the analysis; beside published scores the others may be missing."""
    return [] if PUBLISHED and not Path(experiment.results, name).is_file() else [f"<results>/{name}"]


def tuning() -> list[str]:
    """The trials of tuned arms, where there are any."""
    return result("tuning.csv") if experiment.trials else []


def entropy_histogram() -> list[str]:
    """The signals' histogram of the teacher's entropy, where an arm or the fidelity needs signals."""
    arms = [arm.method.needs_signals for arm in experiment.resolved_arms.values()]
    suites = [suite.fidelity for suite in experiment.suites.values()]
    path = f"signals/{experiment.teacher.name}/{experiment.data.name}/entropy.csv"
    return result(path) if any(arms + suites) else []


def effects() -> list[str]:
    """The effects of the components, where the factorial arms make up a design."""
    return ["<results>/effects.csv"] if jobs.analysis_settings(experiment)["primary"] else []


def figures() -> list[str]:
    """Names of the figures that the inputs at hand allow."""
    needs = {
        "forest": True,
        "tasks": True,
        "curves": result("curves.csv"),
        "effects": effects(),
        "entropy": entropy_histogram(),
        "cost": result("runs.csv"),
    }
    return [name for name, inputs in needs.items() if inputs]
