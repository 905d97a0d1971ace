"""Training on text that the student writes (GKD, arXiv 2306.13649; DistiLLM, arXiv 2402.03898).

Requires arms with `pipeline: onpolicy`, the untrained student, the data, the signals, and the teacher itself, because it
reads what the student writes. Outputs these arms' students.
"""

training_data["onpolicy"] = "<data>"


rule onpolicy:
    input:
        student=initial_student,
        data="<results>/data/<data>/manifest.json",
        signals=signals_for("<data>"),
        teacher="<results>/teachers/<teacher>/manifest.json",
        patches=patches_of_arm,
    output:
        run="<results>/students/{arm}/seed{seed}/run.json",
        metrics="<results>/students/{arm}/seed{seed}/metrics.jsonl",
        model="<results>/students/{arm}/seed{seed}/model/model.safetensors",
    log:
        "<logs>/distill.{arm}.seed{seed}.log",
    wildcard_constraints:
        arm=arms_of("onpolicy"),
        seed=r"\d+",
    # The longest jobs of an experiment: begun last, they would be waited for.
    priority: 2
    threads: THREADS
    resources:
        gpu=GPUS,
        mem_mb=MEMORY_MB,
    params:
        settings=arm_settings,
        student=subpath(input.student, parent=True),
        data=subpath(input.data, parent=True),
        teacher=subpath(input.teacher, parent=True),
        folder=subpath(output.run, parent=True),
        patches=patches,
    shell:
        "entkd distill --settings {params.settings:q} --patches {params.patches:q} --seed {wildcards.seed}"
        " --student {params.student:q}"
        f" --save-minutes {SAVE_MINUTES} --log-every {LOG_EVERY}"
        " --data {params.data:q} --signals {input.signals:q} --teacher {params.teacher:q}"
        " --output {params.folder:q} > {log:q} 2>&1"
