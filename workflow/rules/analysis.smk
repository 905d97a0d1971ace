"""From the collected scores to claims: the ablation table, the effects, the figures. Needs no torch.

Requires scores.csv, items.parquet, runs.csv, curves.csv; published scores without their students need only the first.
Outputs ablation_table.{csv,md,tex}, effects.csv, `figures/*.{pdf,svg,png}`.
"""


rule ablation_table:
    input:
        scores=result("scores.csv"),
        per_item=result("items.parquet"),
        runs=result("runs.csv"),
        tuning=tuning(),
    output:
        csv=report(
            "<results>/ablation_table.csv",
            caption="../report/ablation_table.rst",
            category="Table",
        ),
        markdown="<results>/ablation_table.md",
        latex="<results>/ablation_table.tex",
        effects=report(
            "<results>/effects.csv",
            caption="../report/effects.rst",
            category="Table",
        ),
    log:
        "<logs>/ablation_table.log",
    resources:
        mem_mb=MEMORY_MB,
    params:
        settings=canonical_json(jobs.analysis_settings(experiment)),
    shell:
        "entkd table --settings {params.settings:q} --scores {input.scores:q} --items {input.per_item:q}"
        " --runs {input.runs:q} --tuning {input.tuning:q} --output {output.csv:q} --markdown {output.markdown:q} --latex {output.latex:q}"
        " --effects {output.effects:q} > {log:q} 2>&1"


rule figures:
    input:
        scores=result("scores.csv"),
        table="<results>/ablation_table.csv",
        effects=effects(),
        runs=result("runs.csv"),
        curves=result("curves.csv"),
        entropy=entropy_histogram(),
        tuning=tuning(),
    output:
        report(
            expand("<results>/figures/{name}.svg", name=figures()),
            caption="../report/figures.rst",
            category="Figures",
        ),
        expand("<results>/figures/{name}.{format}", name=figures(), format=["pdf", "png"]),
    log:
        "<logs>/figures.log",
    threads: ALL_CORES
    resources:
        mem_mb=MEMORY_MB,
    params:
        settings=canonical_json(jobs.figure_settings(experiment)),
        folder=subpath(output[0], parent=True),
    shell:
        "entkd figures --settings {params.settings:q} --scores {input.scores:q} --table {input.table:q}"
        " --effects {input.effects:q} --runs {input.runs:q} --curves {input.curves:q} --entropy {input.entropy:q}"
        " --tuning {input.tuning:q} --output {params.folder:q} --threads {threads} > {log:q} 2>&1"
