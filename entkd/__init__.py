"""entkd: what is an LLM-distillation method really worth?

A benchmark harness for entropy-guided token-level knowledge distillation. The stages are commands
(`entkd --help`); the workflow in ``workflow/`` chains them. Importing this package imports no torch.
"""

__version__ = "0.1.0"
