"""The frame of a report page: style, tables, figures; one file without scripts or links."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from gimbal.report.charts import Chart, Heat, colour_of
from gimbal.report.svg import draw

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#6b6b6b;--good:#1b7f3b;--bad:#c0392b}
@media(prefers-color-scheme:dark){:root{--soft:#a0a0a0;--good:#5cc77f;--bad:#ff7b6b}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:1.5em auto;padding:0 1em}
h1{font-size:1.5em;overflow-wrap:anywhere}h2{font-size:1.2em;margin-top:2em}
h3{font-size:1em;margin:1.5em 0 .5em}
.wide{overflow-x:auto}.headline{font-size:1.15em;margin:.4em 0}
.beside{display:flex;flex-wrap:wrap;gap:0 3em}.beside>*{min-width:0;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92em}
td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:Canvas}
.good{color:var(--good)}.bad{color:var(--bad)}.soft{color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr));gap:1.2em}
.charts>*{margin:0;min-width:0;max-width:640px}
svg{width:100%;height:auto;font:12px system-ui,sans-serif}svg text{fill:currentColor}
svg text.soft{fill:var(--soft)}.grid{stroke:var(--line)}
.key{display:flex;flex-wrap:wrap;gap:.3em 1.2em;margin:.5em 0}
.key i{display:inline-block;width:.9em;height:.7em;margin-right:.4em;border-radius:2px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85em}summary{cursor:pointer}
"""


def page(title: str, sections: Sequence[str]) -> str:
    """The whole file."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{''.join(sections)}</body></html>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; a table wider than the screen scrolls by itself."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def beside(parts: Sequence[str]) -> str:
    """Parts side by side where the screen is wide enough."""
    return f'<div class="beside">{"".join(f"<section>{part}</section>" for part in parts)}</div>'


def figures(charts: Sequence[Chart]) -> str:
    """Charts side by side as far as the screen allows, under one key."""
    named = [chart for chart in charts if not isinstance(chart, Heat)]
    names = list(dict.fromkeys(n for chart in named for n in chart.series))
    key = "".join(
        f'<span><i style="background:{colour_of(named[0].names, n)}"></i>{escape(n)}</span>'
        for n in names
    )
    drawn = "".join(f"<figure>{draw(chart)}</figure>" for chart in charts)
    return f'<div class="key">{key}</div><div class="charts">{drawn}</div>'


def markdown(text: str) -> str:
    """HTML of the Markdown that our reports are written in: headings, paragraphs, tables."""
    out: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.strip().splitlines()
        level = len(lines[0]) - len(lines[0].lstrip("#"))
        if level:
            out.append(f"<h{level}>{_inline(lines[0][level:].strip())}</h{level}>")
        elif lines[0].startswith("|"):
            rows = [[_cell(c) for c in line.strip("|").split("|")] for line in lines]
            out.append(table(rows[0], rows[2:]))
        else:
            out.append(f"<p>{_inline(' '.join(lines))}</p>")
    return "".join(out)


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _cell(text: str) -> str:
    """A change is coloured when its interval leaves zero out, and its interval set smaller.

    The asterisk of a loss decides before rounded bounds do, and stays: not all see colours.
    """
    text = text.strip()
    found = re.fullmatch(r"([+-][\d.]+ %)(\*?) \[([+-][\d.]+), ([+-][\d.]+)\]", text)
    if found is None:
        return _inline(text)
    change, star, low, high = found.groups()
    style = "bad" if star else "soft" if float(low) <= 0 <= float(high) else "good"
    return f'<span class="{style}">{change}{star}</span> <small>{low} to {high}</small>'
