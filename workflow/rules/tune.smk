"""Tuning on the dev split, and budgets in seconds: what is known of an arm's settings only when other jobs have run.

Requires the setting `tune`, or `training.budget.seconds`, and what the arm itself trains on; never the test split.
Outputs `tuning/{arm}/{trial}/seed{seed}/` without weights, the choice `tuning/{arm}.json`, all trials in tuning.csv;
`budget/{arm}.json`. Both are JSON Merge Patches on the arm's settings, which its training takes as inputs.
"""


# One core more or less beside it would change what is timed, so it runs alone.
rule calibrate:
    input:
        student=initial_student,
        data=data_of_arm,
        signals=signals_of_arm,
    output:
        patch="<results>/budget/{arm}.json",
    log:
        "<logs>/calibrate.{arm}.log",
    threads: ALL_CORES
    resources:
        gpu=GPUS,
        mem_mb=MEMORY_MB,
    params:
        settings=arm_settings,
        seed=experiment.seeds[0],
        student=subpath(input.student, parent=True),
        data=subpath(input.data, parent=True),
    shell:
        "entkd calibrate --settings {params.settings:q} --seed {params.seed} --student {params.student:q}"
        f" --threads {THREADS}"
        " --data {params.data:q} --signals {input.signals:q} --output {output.patch:q} > {log:q} 2>&1"


rule trial:
    input:
        student=initial_student,
        data=data_of_arm,
        signals=signals_of_arm,
        teacher=teacher_of_trial,
        patches=patches_of_trial,
    output:
        run="<results>/tuning/{arm}/{trial}/seed{seed}/run.json",
        metrics="<results>/tuning/{arm}/{trial}/seed{seed}/metrics.jsonl",
    log:
        "<logs>/trial.{arm}.{trial}.seed{seed}.log",
    wildcard_constraints:
        arm=tuned_arms(),
        trial="[0-9a-f]+",
        seed=r"\d+",
    # Before other training: every arm waits for its own.
    priority: 2
    threads: THREADS
    resources:
        gpu=GPUS,
        mem_mb=MEMORY_MB,
    params:
        settings=trial_settings,
        student=subpath(input.student, parent=True),
        data=subpath(input.data, parent=True),
        teacher=teacher_folder,
        folder=subpath(output.run, parent=True),
    shell:
        "entkd distill --trial --settings {params.settings:q} --patches {input.patches:q} --seed {wildcards.seed}"
        " --student {params.student:q}"
        f" --save-minutes {SAVE_MINUTES} --log-every {LOG_EVERY}"
        " --data {params.data:q} --signals {input.signals:q} --teacher {params.teacher:q}"
        " --output {params.folder:q} > {log:q} 2>&1"


rule choose:
    input:
        runs=trials_of_arm,
    output:
        patch="<results>/tuning/{arm}.json",
        table="<results>/tuning/{arm}.csv",
    log:
        "<logs>/choose.{arm}.log",
    wildcard_constraints:
        arm=tuned_arms(),
    resources:
        mem_mb=MEMORY_MB,
    params:
        settings=choice_settings,
    shell:
        "entkd choose --settings {params.settings:q} --arm {wildcards.arm} --output {output.patch:q}"
        " --table {output.table:q} {input.runs:q} > {log:q} 2>&1"


if not PUBLISHED:

    rule collect_tuning:
        input:
            expand("<results>/tuning/{arm}.csv", arm=experiment.trials),
        output:
            "<results>/tuning.csv",
        log:
            "<logs>/collect_tuning.log",
        resources:
            mem_mb=MEMORY_MB,
        shell:
            "entkd collect-tuning --output {output:q} {input:q} > {log:q} 2>&1"
