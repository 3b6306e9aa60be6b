"""What Lightning says that is no news to this program's user."""

import logging
import warnings


def quiet_lightning() -> None:
    """Silence its notes on unused GPUs, few workers and where else to log."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
