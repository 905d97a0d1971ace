"""Scores of every student, the teacher and the untrained student on each suite, and all of them in one file.

Requires the setting `suites`, the models, the data (test split) and, for fidelity, the signals.
Outputs `scores/{arm}/seed{seed}/{suite}.csv` and `.items.parquet`, scores.csv, items.parquet, runs.csv, curves.csv.
"""


rule score:
    input:
        task_files,
        model=scored_model,
        data="<results>/data/<data>/manifest.json",
        signals=fidelity_signals,
    output:
        scores="<results>/scores/{arm}/seed{seed}/{suite}.csv",
        per_item="<results>/scores/{arm}/seed{seed}/{suite}.items.parquet",
    log:
        "<logs>/score.{arm}.seed{seed}.{suite}.log",
    wildcard_constraints:
        arm="[^/]+",
        seed=r"\d+",
        suite="[^/]+",
    threads: THREADS
    resources:
        gpu=GPUS,
        mem_mb=MEMORY_MB,
    params:
        settings=suite_settings,
        model=subpath(input.model, parent=True),
        data=subpath(input.data, parent=True),
    shell:
        "entkd score --settings {params.settings:q} --model {params.model:q} --data {params.data:q}"
        " --signals {input.signals:q} --arm {wildcards.arm} --seed {wildcards.seed} --suite {wildcards.suite}"
        f" --memory-gib {SCORING_GIB}"
        " --output {output.scores:q} --items {output.per_item:q} > {log:q} 2>&1"


if not PUBLISHED:

    rule collect_scores:
        input:
            scores=scores(".csv"),
            per_item=scores(".items.parquet"),
        output:
            scores="<results>/scores.csv",
            per_item="<results>/items.parquet",
        log:
            "<logs>/collect_scores.log",
        resources:
            mem_mb=MEMORY_MB,
        shell:
            "entkd collect-scores --output {output.scores:q} --items {output.per_item:q} {input.scores:q}"
            " > {log:q} 2>&1"

    rule collect_runs:
        input:
            runs=expand("{student}/run.json", student=students()),
            metrics=expand("{student}/metrics.jsonl", student=students()),
        output:
            runs="<results>/runs.csv",
            curves="<results>/curves.csv",
        log:
            "<logs>/collect_runs.log",
        resources:
            mem_mb=MEMORY_MB,
        shell:
            "entkd collect-runs --output {output.runs:q} --curves {output.curves:q} {input.runs:q}" " > {log:q} 2>&1"
