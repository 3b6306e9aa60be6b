"""metrics.csv: a row per logged step, whole at every moment, continued by a resumed run."""

import csv
import io
import math
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from moepp.system.files import replacing


class CSVLog(Logger):
    """Writes every metric to `folder`/metrics.csv at once; what is logged for the same step shares a row.

    Lightning's own CSVLogger deletes the file of the run that it continues.

    Args:
        folder: of the run.
        begun_step: what was logged after this step is forgotten: a run resumed there logs it again.
    """

    name = version = ""  # ModelCheckpoint joins both to a folder within the run's: that itself

    def __init__(self, folder: str | Path, begun_step: float = math.inf) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.rows: dict[int, dict[str, Any]] = {}  # by step
        self.columns = ["step"]
        if self.path.is_file():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                for row in reader:  # a row that a crash cut short has no step or too few values
                    if row["step"] and None not in row.values() and int(row["step"]) <= begun_step:
                        self.rows[int(row["step"])] = {name: value for name, value in row.items() if value != ""}
                self.columns = list(reader.fieldnames or self.columns)
        self.last_row_at: int | None = None  # in the file; None: unknown, the file may be another run's, cut short

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step is None:
            raise ValueError("every metric is logged at a step")
        new_columns = [name for name in metrics if name not in self.columns]
        known_step = step in self.rows
        self.rows[step] = self.rows.get(step, {"step": step}) | metrics
        last_step = step == next(reversed(self.rows))
        if self.last_row_at is None or new_columns or not last_step or not self.path.exists():
            self.columns += new_columns
            self.rewrite()
            return
        with self.path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            self.last_row_at = file.truncate(self.last_row_at if known_step else end)
            file.seek(self.last_row_at)
            file.write(self.line(self.rows[step]))

    @rank_zero_only
    def sync(self) -> None:
        """See that what was logged outlives a power cut: a checkpoint that follows counts on it."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def rewrite(self) -> None:
        """Write the whole file beside the old one, then put it in its place."""
        content = b""
        for row in [{name: name for name in self.columns}, *self.rows.values()]:
            self.last_row_at = len(content)
            content += self.line(row)
        with replacing(self.path) as file:
            file.write(content)

    def line(self, row: dict[str, Any]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="").writerow(row)
        return text.getvalue().encode()
