"""Tasks of lm-evaluation-harness by name, the paper's nine among them (paper.yaml)."""
