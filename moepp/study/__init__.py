"""Studies of trained models: compare/ (variants against each other) and figures/ (inside one router)."""

# before rich: where rich.progress comes first, typing hands Lightning its `float | int` for `int | float`, and
# --trainer.limit_val_batches=1 would be read as 1.0, which is all of them
from moepp.system.lean import import_lightning

import_lightning()
