"""index.html: one file with everything in it, which needs nothing from elsewhere."""

from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moepp.study.figures.findings import FEWEST_PASSAGES, RESAMPLES


def page(**contents: Any) -> str:
    """The page as text. Its words, and the names of what it shows, stand in page.html.jinja."""
    templates = FileSystemLoader(Path(__file__).parent)
    html = Environment(loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    html.filters["base64"] = lambda path: b64encode(path.read_bytes()).decode()
    return html.get_template("page.html.jinja").render(
        contents, FEWEST_PASSAGES=FEWEST_PASSAGES, RESAMPLES=RESAMPLES
    )
