"""The data: rows of a hub dataset or of local files, or text that the teacher writes, as token ids.

Requires the setting `data` and the imported teacher, whose tokenizer counts.
Outputs `data/{data}/`, its manifest last.
"""


rule prepare_data:
    input:
        data_files,
        teacher="<results>/teachers/<imported>/manifest.json",
    output:
        manifest="<results>/data/<data>/manifest.json",
    log:
        "<logs>/prepare_data.log",
    threads: ALL_CORES
    resources:
        gpu=GPUS,
        mem_mb=MEMORY_MB,
    params:
        settings=canonical_json(jobs.data_settings(experiment)),
        precision=experiment.teacher.precision,
        teacher=subpath(input.teacher, parent=True),
        folder=subpath(output.manifest, parent=True),
    shell:
        "entkd prepare-data --settings {params.settings:q} --precision {params.precision} --teacher {params.teacher:q}"
        " --output {params.folder:q} > {log:q} 2>&1"
