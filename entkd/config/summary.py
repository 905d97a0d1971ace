"""What an experiment consists of, in a screenful."""

from __future__ import annotations

from entkd.config import jobs
from entkd.config.experiment import Experiment


def summary(experiment: Experiment) -> str:
    """Teacher, data, student, training, arms with their components, suites, and the number of jobs."""
    teacher, data, student, training = experiment.teacher, experiment.data, experiment.student, experiment.training
    settings = jobs.analysis_settings(experiment)
    init = student.path or student.repo or (f"layers {list(student.layers)}" if student.init == "layers" else "random")
    tokens = f"{training.blocks_per_step} × {training.block} tokens"
    why = experiment.lacking_cells or "no arm has the role factorial"
    students, suites = len(settings["arms"]) * len(experiment.seeds), len(experiment.suites)
    lines = [
        f"experiment  {experiment.name} → {experiment.results}/",
        f"teacher     {teacher.name} ({teacher.repo or teacher.path or teacher.source}, {teacher.prepare})",
        f"data        {data.name} ({data.source}, {data.template} template, at most {data.max_tokens} tokens)",
        f"student     {student.init}: {init}",
        f"training    {training.length} of {tokens}, lr {training.lr:g} {training.schedule}",
        f"suites      {', '.join(f'{name} ({len(suite.tasks)} tasks)' for name, suite in experiment.suites.items())}",
        f"reference   {experiment.analysis.reference}",
        f"primary     {', '.join(settings['primary']) or f'none: {why}'}",
        f"jobs        {students} students ({len(settings['arms'])} arms × seeds {list(experiment.seeds)}), "
        f"{(students + 2) * suites} scorings{_trials(experiment)}",
        *_tuning(experiment),
        "",
    ]
    design = experiment.factorial
    if design is not None and design.sign:
        lines.insert(-2, f"design      half fraction, {design.relation}")
    header = ("arm", "role", "pipeline", "divergence", "curriculum", "temperature", "features")
    rows = [header]
    for words, arm in zip(settings["arms"], experiment.resolved_arms.values(), strict=True):
        cells = words | {"arm": arm.name, "pipeline": arm.pipeline}
        rows.append(tuple(cells[column] for column in header))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _trials(experiment: Experiment) -> str:
    trials = sum(map(len, experiment.trials.values()))
    return f", {trials} trials" if trials else ""


def _tuning(experiment: Experiment) -> list[str]:
    """What each tuned arm tries: the same number of points of the grids that count for it."""
    if experiment.tune is None:
        return []
    lines = [f"tuning      {experiment.tune.trials} trials of each tuned arm, seed {experiment.tune.seed}, by dev NLL"]
    for arm, trials in experiment.trials.items():
        lines.append(f"            {arm}: {', '.join(trials[0].point)}")
    rest = [name for name in experiment.resolved_arms if name not in experiment.trials]
    return [*lines, f"            no trials: {', '.join(rest)}"] if rest else lines
