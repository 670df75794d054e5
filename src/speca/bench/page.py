"""Write the report as one static HTML page without external files."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping
from pathlib import Path

STYLE = """
:root{--ink:#1c1917;--soft:#78716c;--line:#e7e5e4;--ours:#fff4ef;--accent:#c2410c}
*{box-sizing:border-box}body{font:15px/1.6 ui-sans-serif,system-ui,sans-serif;max-width:70rem;margin:3rem auto 6rem;
padding:0 1.25rem;color:var(--ink);background:#fdfcfb}h1{font-size:1.9rem;letter-spacing:-.02em;margin:0 0 1rem}
h2{font-size:1.1rem;margin:2.6rem 0 .6rem;padding-top:1.2rem;border-top:1px solid var(--line)}p{max-width:52rem}
img{width:100%;margin:1.4rem 0;background:#fff;border:1px solid var(--line);border-radius:.5rem}
nav{display:flex;flex-wrap:wrap;gap:.3rem .9rem;font-size:13px;margin:1rem 0}a{color:var(--accent);text-decoration:none}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;min-width:60%}
th{font-weight:600;color:var(--soft);text-align:left;position:sticky;top:0;background:#fdfcfb}
th,td{padding:.28rem .8rem .28rem 0;border-bottom:1px solid var(--line);white-space:nowrap}td.n,th.n{text-align:right}
tr.ours td{background:var(--ours);font-weight:600}tr.oracle td{color:var(--soft);font-style:italic}
td.long{white-space:normal;min-width:20rem}code{background:#f5f5f4;padding:.05rem .3rem;border-radius:.25rem}
"""


def page(words: str, pictures: Mapping[str, Path]) -> str:
    """Convert a report from Markdown to HTML: headings, tables, paragraphs, and `pictures` (by file name) embedded."""
    body: list[str] = []
    titles = [line[3:] for line in words.splitlines() if line.startswith("## ")]
    block: list[str] = []
    for line in [*words.splitlines(), ""]:
        if line.startswith("|"):
            block.append(line)
            continue
        if block:
            body.append(_table(block))
            block = []
        if line.startswith("# "):
            links = " ".join(f'<a href="#{_anchor(title)}">{html.escape(title)}</a>' for title in titles)
            body.append(f"<h1>{html.escape(line[2:])}</h1><nav>{links}</nav>")
        elif line.startswith("#"):
            title = line.lstrip("# ")
            body.append(f'<h2 id="{_anchor(title)}">{html.escape(title)}</h2>')
        elif found := re.fullmatch(r"!\[(.*)\]\((.*)\)", line):
            data = base64.b64encode(pictures[found[2]].read_bytes()).decode()
            body.append(f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(found[1])}">')
        elif line:
            body.append(f"<p>{_inline(line)}</p>")
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f"{head}<title>speca bench</title><style>{STYLE}</style>" + "\n".join(body) + "</html>\n"


def _table(lines: list[str]) -> str:
    """Return one table as HTML; right-align the columns marked `---:` in its second line."""
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    numbers = [mark.endswith(":") for mark in cells[1]]
    rows = [_row("th", cells[0], numbers, "")]
    for row in cells[2:]:
        kind = "ours" if row[0].startswith("**") else "oracle" if row[0].startswith("_") else ""
        rows.append(_row("td", row, numbers, kind))
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _row(tag: str, cells: list[str], numbers: list[bool], kind: str) -> str:
    out = []
    for cell, number in zip(cells, numbers, strict=True):
        style = "n" if number else "long" if len(cell) > 60 else ""
        out.append(f'<{tag} class="{style}">{_inline(cell.strip("*_"))}</{tag}>')
    return f'<tr class="{kind}">{"".join(out)}</tr>'


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
