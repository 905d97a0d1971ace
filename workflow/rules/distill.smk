"""One student per arm and seed, for all arms without a pipeline of their own.

Requires the settings `arms`, `training`, `seeds`, the untrained student, the data and, for most arms, the signals.
Outputs `students/{arm}/seed{seed}/`: the model, metrics.jsonl, and run.json last.
"""


rule distill:
    input:
        student=initial_student,
        data="<results>/data/<data>/manifest.json",
        signals=signals_for("<data>"),
        patches=patches_of_arm,
    output:
        run="<results>/students/{arm}/seed{seed}/run.json",
        metrics="<results>/students/{arm}/seed{seed}/metrics.jsonl",
        model="<results>/students/{arm}/seed{seed}/model/model.safetensors",
    log:
        "<logs>/distill.{arm}.seed{seed}.log",
    wildcard_constraints:
        arm=arms_of("distill"),
        seed=r"\d+",
    # Before scoring: at the end of an experiment the short jobs are left, and no core waits long for the last one.
    priority: 1
    threads: THREADS
    resources:
        gpu=GPUS,
        mem_mb=MEMORY_MB,
    params:
        settings=arm_settings,
        student=subpath(input.student, parent=True),
        data=subpath(input.data, parent=True),
        folder=subpath(output.run, parent=True),
        patches=patches,
    shell:
        "entkd distill --settings {params.settings:q} --patches {params.patches:q} --seed {wildcards.seed}"
        " --student {params.student:q}"
        f" --save-minutes {SAVE_MINUTES} --log-every {LOG_EVERY}"
        " --data {params.data:q} --signals {input.signals:q} --output {params.folder:q} > {log:q} 2>&1"
