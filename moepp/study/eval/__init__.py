"""`moepp eval`: tasks of lm-evaluation-harness → scores, and the experts that each task's tokens take."""
