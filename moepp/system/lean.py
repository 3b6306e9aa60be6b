"""Lightning without what its metrics for pictures, speech and translation want."""

from unittest.mock import patch

from lightning_utilities.core import imports

UNUSED = ("scipy", "transformers", "matplotlib")


def import_lightning() -> None:
    """Import it. torchmetrics, which it brings, would import of UNUSED whatever is installed: 2.4 of 6.5 s.

    For that while they are hidden from the two functions that it asks.
    """
    check, available = imports.RequirementCache._check_available, imports.package_available

    def check_all_but_unused(cache: imports.RequirementCache) -> None:
        if not hasattr(cache, "available") and (cache.requirement or "").startswith(UNUSED):
            cache.available, cache.message = False, "not asked for by moepp"
        check(cache)

    with (
        patch.object(imports.RequirementCache, "_check_available", check_all_but_unused),
        patch.object(imports, "package_available", lambda name: name not in UNUSED and available(name)),
    ):
        import lightning.pytorch  # noqa: F401
