"""Lightning without what its metrics for pictures, speech and translation want."""

import gc
from functools import cache
from unittest.mock import patch

from lightning_utilities.core import imports

UNUSED = ("scipy", "transformers", "matplotlib")


@cache
def import_lightning() -> None:
    """Import it. torchmetrics, which it brings, would import of UNUSED whatever is installed: 2.4 of 6.5 s.

    For that while they are hidden from the two functions that it asks, and no garbage is looked for among what is
    imported, all of which stays: a fifth of what is left.
    """
    check, available = imports.RequirementCache._check_available, imports.package_available

    def check_all_but_unused(requirement: imports.RequirementCache) -> None:
        if not hasattr(requirement, "available") and (requirement.requirement or "").startswith(UNUSED):
            requirement.available, requirement.message = False, "not asked for by moepp"
        check(requirement)

    gc.disable()
    with (
        patch.object(imports.RequirementCache, "_check_available", check_all_but_unused),
        patch.object(imports, "package_available", lambda name: name not in UNUSED and available(name)),
    ):
        import lightning.pytorch  # noqa: F401
    gc.freeze()  # nor later
    gc.enable()
