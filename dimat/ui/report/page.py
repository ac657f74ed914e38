"""One self-contained HTML page: inline style, pictures as data, nothing fetched, no script.

Parts of a page are strings of finished HTML; every text from outside goes through `esc`.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from dimat.ui.text import Table, clean

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #dde2e8; --paper: #ffffff; --card: #f5f7f9;
  --best: #00694c; --warn: #8a4b00; --warn-paper: #fff4e0; --link: #0a5fb0; --shade: #0003; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ed; --soft: #9aa6b4; --line: #333c47; --paper: #14181d; --card: #1d232a;
    --best: #4fd0a5; --warn: #ffc46b; --warn-paper: #33270f; --link: #79b8ff; --shade: #fff3; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.25rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .5rem 0; } .verdict { font-weight: 600; } .soft { color: var(--soft); } a { color: var(--link); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1.2rem 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.facts b { display: block; font-size: clamp(1.05rem, 5vw, 1.3rem); font-weight: 600; overflow-wrap: anywhere; }
.facts span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; /* a shade on the side where there is more to scroll to */
  background: linear-gradient(90deg, var(--paper) 1rem, transparent 2rem) left / 2rem 100% no-repeat local,
    linear-gradient(-90deg, var(--paper) 1rem, transparent 2rem) right / 2rem 100% no-repeat local,
    linear-gradient(90deg, var(--shade), transparent) left / .9rem 100% no-repeat scroll,
    linear-gradient(-90deg, var(--shade), transparent) right / .9rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; } .left { text-align: left; }
td.left:not(:first-child) { white-space: normal; }
tr.foot td { font-weight: 600; border-bottom: none; } td.best { color: var(--best); font-weight: 700; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.pictures.wide { grid-template-columns: 1fr; }
figure { margin: 0; background: #ffffff; border: 1px solid var(--line); border-radius: .5rem; padding: .5rem;
  display: flex; align-items: center; justify-content: center; }
img { max-width: 100%; height: auto; display: block; }
pre { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
.warnings { background: var(--warn-paper); color: var(--warn); border-radius: .5rem; padding: .6rem 1rem; }
.warnings ul { margin: .3rem 0; padding-left: 1.2rem; } summary { cursor: pointer; color: var(--link); }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .6rem; color: var(--soft);
  font-size: .85rem; }
"""


def esc(text: object) -> str:
    """Return text that cannot end an element or an attribute, with control characters spelled out."""
    return html.escape(clean(str(text)), quote=True)


def document(title: str, pieces: Iterable[str]) -> str:
    """Return the whole page. The policy in its head forbids loading anything, even if a part should try."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{esc(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            *pieces,
            "</body>",
            "</html>",
            "",
        )
    )


def heading(title: str, line: str, first: Sequence[str] = ()) -> str:
    """Return the head of the page: its title, the lines to read first, and one line below."""
    lead = "".join(f'<p class="verdict">{esc(each)}</p>' for each in first)
    return f'<header><h1>{esc(title)}</h1>{lead}<p class="soft">{esc(line)}</p></header>'


def section(title: str, *pieces: str) -> str:
    """Return a section, or nothing if all its pieces are empty."""
    body = "\n".join(piece for piece in pieces if piece)
    return f"<section><h2>{esc(title)}</h2>\n{body}\n</section>" if body else ""


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return the main numbers; pairs of (label, value)."""
    return (
        '<div class="facts">' + "".join(f"<div><b>{esc(v)}</b><span>{esc(k)}</span></div>" for k, v in pairs) + "</div>"
    )


def paragraph(text: str) -> str:
    """Return one paragraph."""
    return f'<p class="soft">{esc(text)}</p>'


def code(text: str) -> str:
    """Return lines of code as they are."""
    return "<pre><code>" + "\n".join(esc(line) for line in text.splitlines()) + "</code></pre>"


def notices(lines: Sequence[str]) -> str:
    """Return warnings as a visible list, or nothing if there are none."""
    if not lines:
        return ""
    return '<div class="warnings" role="note"><ul>' + "".join(f"<li>{esc(x)}</li>" for x in lines) + "</ul></div>"


def folded(title: str, piece: str) -> str:
    """Return a part that the reader can unfold."""
    return f"<details><summary>{esc(title)}</summary>{piece}</details>"


def links(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of links to other files; pairs of (label, relative address)."""
    items = "".join(f'<li><a href="{esc(address)}">{esc(label)}</a></li>' for label, address in pairs)
    return f"<ul>{items}</ul>" if items else ""


def pictures(drawn: Iterable[tuple[str, bytes]], wide: bool = False) -> str:
    """Return PNG files as embedded pictures; pairs of (description, the file). `wide`: one per row."""
    items = "".join(
        f'<figure><img alt="{esc(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for alt, png in drawn
    )
    return f'<div class="pictures{" wide" if wide else ""}">{items}</div>' if items else ""


def table(data: Table) -> str:
    """Return a table that scrolls sideways on narrow screens, or nothing if it has no rows."""
    if not data.rows:
        return ""
    head = "".join(f'<th scope="col"{_side(data, i)}>{esc(text)}</th>' for i, text in enumerate(data.headers))
    body: list[str] = []
    for number, row in enumerate(data.rows):
        cells = "".join(f"<td{_side(data, i, (number, i) in data.best)}>{esc(text)}</td>" for i, text in enumerate(row))
        foot = ' class="foot"' if data.foot and number == len(data.rows) - 1 else ""
        body.append(f"<tr{foot}>{cells}</tr>")
    note = paragraph(data.note) if data.note else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>{note}'
    )


def _side(data: Table, column: int, best: bool = False) -> str:
    names = [name for name, on in (("left", column in data.left), ("best", best)) if on]
    return f' class="{" ".join(names)}"' if names else ""
