"""Studies of trained models: compare/ (variants against each other), figures/ (inside one router), eval/ (scores
by lm-eval, and the experts that its tasks take)."""
