"""Entry point: `snakemake --cores all`. The workflow itself is in workflow/Snakefile."""


include: "workflow/Snakefile"


# An include never sets the default target, so it is named again here.
rule default:
    default_target: True
    input:
        rules.all.input,
