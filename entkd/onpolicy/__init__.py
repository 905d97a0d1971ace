"""Training on text that the student writes (GKD, DistiLLM): when, what, and what the teacher says of it."""
