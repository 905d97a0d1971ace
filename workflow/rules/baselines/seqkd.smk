"""SeqKD (Kim & Rush 2016): the teacher's greedy responses to the training prompts replace the training responses.

Requires arms with `pipeline: seqkd`, the teacher and the data. Outputs `data/{data}.seqkd/` and these arms' students.
"""

training_data["seqkd"] = "<data>.seqkd"


rule seqkd_data:
    input:
        teacher="<results>/teachers/<teacher>/manifest.json",
        data="<results>/data/<data>/manifest.json",
    output:
        manifest="<results>/data/<data>.seqkd/manifest.json",
    log:
        "<logs>/seqkd_data.log",
    threads: THREADS  # beside the training of the other arms
    resources:
        gpu=GPUS,
        mem_mb=MEMORY_MB,
    params:
        settings=canonical_json(jobs.seqkd_settings(experiment)),
        precision=experiment.teacher.precision,
        teacher=subpath(input.teacher, parent=True),
        data=subpath(input.data, parent=True),
        folder=subpath(output.manifest, parent=True),
    shell:
        "entkd seqkd-data --settings {params.settings:q} --precision {params.precision} --teacher {params.teacher:q}"
        " --data {params.data:q} --output {params.folder:q} > {log:q} 2>&1"


use rule distill as seqkd with:
    input:
        student=initial_student,
        data="<results>/data/<data>.seqkd/manifest.json",
        signals=signals_for("<data>.seqkd"),
        patches=patches_of_arm,
    wildcard_constraints:
        arm=arms_of("seqkd"),
        seed=r"\d+",
