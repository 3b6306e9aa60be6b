"""Studies of trained models: compare/ (variants against each other) and figures/ (inside one router)."""
