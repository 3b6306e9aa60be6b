import subprocess
import sys

CODE = """
import gc, sys
from moepp.system.lean import UNUSED, import_lightning
import_lightning()
print("lightning.pytorch" in sys.modules, [name for name in UNUSED if name in sys.modules])
print(gc.isenabled(), gc.get_freeze_count() > 100_000, sum(each["collections"] for each in gc.get_stats()) < 100)
"""


def test_nothing_unused_is_imported_nor_garbage_looked_for_meanwhile() -> None:
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert ended.stdout == "True []\nTrue True True\n"
