"""index.html: one file with everything in it, which needs nothing from elsewhere."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from moepp.study.figures.findings import Finding

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100%; display: block; margin: .5rem 0 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ccc }
td.number { white-space: nowrap }
figure { margin: 2.5rem 0 } figcaption { color: #333 } small { color: #555 }
"""


def page(
    about: Mapping[str, str],
    findings: Sequence[Finding],
    figures: Sequence[tuple[str, str, Path]],
    missing: Mapping[str, str],
    notes: Sequence[str],
) -> str:
    """The page as text.

    Args:
        about: what was looked at, by name.
        figures: title, what is seen, and the PNG, whose CSV lies beside it.
        missing: what was not drawn, and why.
        notes: how to read the numbers.
    """
    rows = "".join(
        f"<tr><td>{finding.number}</td><td>{escape(finding.claim)}<br><small>{escape(finding.measure)}</small></td>"
        f'<td class="number">{number(finding)}</td><td class="number">{finding.threshold:g}</td>'
        f"<td><b>{finding.holds}</b></td></tr>\n"
        for finding in findings
    )
    shown = "".join(
        f'<figure><h2>{escape(title)}</h2><img src="data:image/png;base64,{_base64(png)}" alt="{escape(seen)}">'
        f"<figcaption>{escape(seen)} <small>({png.name}, {png.stem}.csv)</small></figcaption></figure>\n"
        for title, seen, png in figures
    )
    left_out = "".join(f"<li>{escape(what)}: {escape(why)}</li>\n" for what, why in missing.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>Inside the router</title>\n'
        f"<style>{STYLE}</style>\n<h1>Inside the router</h1>\n<table>\n"
        + "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in about.items())
        + "</table>\n<h2>The five findings of the paper, here</h2>\n<table>\n"
        "<tr><th></th><th>finding</th><th>measured [95 %]</th><th>holds above</th><th>holds here</th></tr>\n"
        f"{rows}</table>\n"
        + "".join(f"<p><small>{escape(note)}</small></p>\n" for note in notes)
        + (f"<h2>Not drawn</h2>\n<ul>\n{left_out}</ul>\n" if left_out else "")
        + f"{shown}</html>\n"
    )


def number(finding: Finding) -> str:
    value, low, high = (f"{x:.3g}" for x in (finding.estimate.value, finding.estimate.low, finding.estimate.high))
    return f"{value} [{low}, {high}]".replace("[nan, nan]", "(no interval)")


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
