"""Tasks of our own for lm-eval, as YAML files: held-out bits per byte, ROUGE-L, minimal pairs."""
