"""An HTML page that stands alone: no script, nothing from outside, and no text in it can become markup.

What a model wrote is hostile text. It is escaped, stripped of control and direction-changing characters, and the page
forbids scripts and every outside resource in its content security policy.
"""

from __future__ import annotations

import unicodedata
from html import escape
from pathlib import Path

from prism_megatron.disk import write_atomically

_MAX_CHARACTERS = 6000
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; color: #1a1a1a;
       background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p.lead { margin: 0 0 1rem; color: #444; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem 1.4rem .2rem 0; vertical-align: top; }
th { font-weight: 600; } tr + tr { border-top: 1px solid #e3e3e3; } td.n, th.n { text-align: right; }
td, .legend { font-variant-numeric: tabular-nums; }
.tables, .charts { display: flex; flex-wrap: wrap; gap: 1rem 3rem; }
.tables { align-items: flex-start; } .charts { gap: 1rem 1.5rem; }
figure { margin: 0; width: 28rem; max-width: 100%; break-inside: avoid; }
figcaption { font-weight: 600; } figure > svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: #444; } svg .grid { stroke: #e3e3e3; }
.legend { font-size: .85rem; color: #333; } .legend span { margin-right: 1.2rem; } .none { color: #666; }
article { border-top: 1px solid #bbb; padding: .8rem 0; break-inside: avoid; }
article > div { display: flex; gap: 1.4rem; flex-wrap: wrap; }
.images { flex: 0 0 auto; max-width: 20rem; }
.images img { max-width: 100%; min-width: 9rem; display: block; margin-bottom: .4rem; border: 1px solid #ccc; }
.texts { flex: 1 1 24rem; display: grid; grid-template-columns: 1fr 1fr; gap: .2rem 1.4rem; min-width: 0;
       align-content: start; }
.texts .wide { grid-column: 1 / -1; } h3 { font-size: .85rem; margin: .4rem 0 0; color: #444; }
.scores { color: #444; font-size: .85rem; margin: 0 0 .3rem; }
pre { font: 13px/1.4 ui-monospace, "Liberation Mono", Menlo, monospace; margin: 0; white-space: pre-wrap;
      overflow-wrap: anywhere; unicode-bidi: isolate; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } a { color: inherit; } }
@media (max-width: 40rem) { .texts { grid-template-columns: 1fr; } }
"""


def write_page(path: Path, *, title: str, lead: str, body: str) -> None:
    """Write a page that stands alone around ``body``, which is HTML; ``title`` and ``lead`` are text."""
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{text_of(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{text_of(title)}</h1><p class='lead'>{text_of(lead)}</p>{body}</body></html>\n"
    )
    write_atomically(path, page)


def text_of(text: str) -> str:
    """Escaped text without control, direction-changing and unpaired surrogate characters; long text is cut."""
    kept = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "\ufffd" for c in text)
    if len(kept) > _MAX_CHARACTERS:
        kept = f"{kept[:_MAX_CHARACTERS]}… ({len(kept) - _MAX_CHARACTERS:,} more characters)"
    return escape(kept, quote=True)


def figure_of(value: float | None, form: str) -> str:
    """The number in that form, or a dash where there is none."""
    return "–" if value is None else format(value, form)
