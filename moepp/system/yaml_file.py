"""Reading YAML that a person wrote."""

import json
from pathlib import Path
from typing import Any

import yaml

from moepp.model.errors import InputError


def read_yaml(path: Path) -> Any:
    """What the file holds.

    Raises:
        InputError: it is not YAML, or holds itself (`a: &a [*a]`); names the file.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        json.dumps(content, default=str, skipkeys=True)  # finds circles, which others would follow without end
        return content
    except OSError:
        raise
    except Exception as error:  # YAMLError, and what int(), date() and the stack have to say to a wrong value
        raise InputError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
