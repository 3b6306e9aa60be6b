"""What is written: PNGs, CSVs, and index.html, one file with everything in it that needs nothing else."""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from moepp.study.figures import compute_curve, finding_figures, paper_figures
from moepp.study.figures.findings import FEWEST_PASSAGES, RESAMPLES, Bootstrap, Finding
from moepp.study.figures.picture import Picture, lacking
from moepp.study.style import STYLE, save

PICTURES = [*paper_figures.PICTURES, compute_curve.compute, *finding_figures.PICTURES]


def write_pictures(
    bootstrap: Bootstrap, folder: Path, pictures: Sequence[Picture] = PICTURES
) -> tuple[list[tuple[Picture, str, Path]], dict[str, str]]:
    """A PNG and a CSV of each picture.

    Returns:
        pictures with their sentences and PNGs; and those not drawn, by the name of their files, and why.
    """
    drawn, missing, lacks = [], {}, lacking(bootstrap)
    with plt.rc_context(STYLE):
        for picture in pictures:
            if reasons := [lacks[need] for need in picture.needs if need in lacks]:
                missing[picture.draw.__name__] = reasons[0]
                continue
            table, sentence, figure = picture.draw(bootstrap)
            png = folder / f"{picture.draw.__name__}.png"
            write_csv(table, png.with_suffix(".csv"))
            save(figure, png)
            drawn.append((picture, sentence, png))
    return drawn, missing


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Six digits; nothing where a number is unknown."""
    table.to_csv(path, index=False, float_format="%.6g", lineterminator="\r\n")


def publish(
    folder: Path,
    bootstrap: Bootstrap,
    found: Sequence[Finding],
    missing: dict[str, str],
    pictures: Sequence[Picture] = PICTURES,
    tasks: Sequence[dict[str, str]] = (),
    **head: Any,
) -> None:
    """Write the pictures, findings.csv and index.html, and show the findings in the terminal.

    Args:
        missing: what could not be drawn, and why.
        tasks: rows of scores.
        head: the page's title, and what it is `about`.
    """
    drawn, undrawn = write_pictures(bootstrap, folder, pictures)
    missing = undrawn | missing
    write_csv(pd.DataFrame([finding.row() for finding in found]), folder / "findings.csv")
    html = page(findings=found, pictures=drawn, missing=missing, bootstrap=bootstrap, tasks=tasks, **head)
    (folder / "index.html").write_text(html, encoding="utf-8")
    summary(found, missing)
    print(folder / "index.html")


def summary(found: Sequence[Finding], missing: dict[str, str]) -> None:
    """Findings in the terminal, and what was not drawn."""
    table = Table("", "finding", "measured [95 %]", "holds here", box=None, pad_edge=False)
    for finding in found:
        table.add_row(str(finding.number), finding.claim, str(finding.estimate).replace("[", r"\["), finding.holds)
    console = Console()
    console.print(table)
    for what, why in missing.items():
        console.print(f"not drawn: {what}: {why}", markup=False)


def page(**contents: Any) -> str:
    """The page as text. Its words, and the names of what it shows, stand in page.html.jinja."""
    templates = FileSystemLoader(Path(__file__).parent)
    html = Environment(loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    html.filters["base64"] = lambda path: b64encode(path.read_bytes()).decode()
    return html.get_template("page.html.jinja").render(
        contents, FEWEST_PASSAGES=FEWEST_PASSAGES, RESAMPLES=RESAMPLES
    )
