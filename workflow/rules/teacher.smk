"""The teacher, what is stored of its outputs, and the students that are made of it before training.

Requires the settings `teacher`, `signals`, `student`, and the prepared data for fine-tuning and signals.
Outputs `teachers/{teacher}/`, `signals/{teacher}/{data}/`, `students/untrained/seed{seed}/`.
"""


rule prepare_teacher:
    input:
        teacher_files,
    output:
        manifest="<results>/teachers/<imported>/manifest.json",
        config="<results>/teachers/<imported>/model/config.json",
    log:
        "<logs>/prepare_teacher.log",
    threads: ALL_CORES
    resources:
        mem_mb=MEMORY_MB,
    params:
        settings=canonical_json(jobs.teacher_settings(experiment)),
        folder=subpath(output.manifest, parent=True),
    shell:
        "entkd prepare-teacher --settings {params.settings:q} --output {params.folder:q} > {log:q} 2>&1"


if experiment.teacher.finetune:

    rule finetune_teacher:
        input:
            teacher="<results>/teachers/<imported>/manifest.json",
            data="<results>/data/<data>/manifest.json",
        output:
            manifest="<results>/teachers/<teacher>/manifest.json",
            config="<results>/teachers/<teacher>/model/config.json",
            run="<results>/teachers/<teacher>/run.json",
        log:
            "<logs>/finetune_teacher.log",
        threads: ALL_CORES
        resources:
            gpu=GPUS,
            mem_mb=MEMORY_MB,
        params:
            settings=canonical_json(experiment.teacher.finetune),
            teacher=subpath(input.teacher, parent=True),
            data=subpath(input.data, parent=True),
            folder=subpath(output.manifest, parent=True),
        shell:
            "entkd finetune-teacher --settings {params.settings:q} --teacher {params.teacher:q}"
            f" --save-minutes {SAVE_MINUTES} --log-every {LOG_EVERY}"
            " --data {params.data:q} --output {params.folder:q} > {log:q} 2>&1"


rule teacher_signals:
    input:
        teacher="<results>/teachers/<teacher>/manifest.json",
        data="<results>/data/{data}/manifest.json",
    output:
        manifest="<results>/signals/<teacher>/{data}/manifest.json",
        entropy="<results>/signals/<teacher>/{data}/entropy.csv",
    log:
        "<logs>/teacher_signals.{data}.log",
    # Before what trains without signals: nearly all arms wait for them, and all cores are rarely free later.
    priority: 1
    threads: ALL_CORES
    resources:
        gpu=GPUS,
        mem_mb=MEMORY_MB,
    params:
        settings=canonical_json(experiment.signals),
        needs=canonical_json(jobs.signal_needs(experiment)),
        precision=experiment.teacher.precision,
        teacher=subpath(input.teacher, parent=True),
        data=subpath(input.data, parent=True),
    shell:
        "entkd signals --settings {params.settings:q} --needs {params.needs:q} --precision {params.precision}"
        f" --cache {CACHE}"
        " --teacher {params.teacher:q} --data {params.data:q}"
        " --output {output.manifest:q} > {log:q} 2>&1"


rule init_student:
    input:
        student_files,
        teacher="<results>/teachers/<teacher>/manifest.json",
    output:
        manifest="<results>/students/untrained/seed{seed}/manifest.json",
        config="<results>/students/untrained/seed{seed}/model/config.json",
    log:
        "<logs>/init_student.seed{seed}.log",
    wildcard_constraints:
        seed=r"\d+",
    threads: THREADS
    resources:
        mem_mb=MEMORY_MB,
    params:
        settings=canonical_json(experiment.student),
        teacher=subpath(input.teacher, parent=True),
        folder=subpath(output.manifest, parent=True),
    shell:
        "entkd init-student --settings {params.settings:q} --teacher {params.teacher:q}"
        " --seed {wildcards.seed} --output {params.folder:q} > {log:q} 2>&1"
