"""A benchmark's figures as an SVG: two bars each, ours and the alternative, with lowest and highest as a line."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.lib.harness import number

LEFT, WIDTH, RIGHT, BAR, GAP = 10, 520, 330, 16, 46
OURS, OTHER, INK = "#2a78b8", "#b9bec6", "#1f2328"


def chart(title: str, figures: Sequence[Mapping[str, Any]]) -> str:
    """The chart as SVG. Bars are to scale within a figure, because each figure has its own unit."""
    parts, top = [], 40
    for figure in figures:
        parts.append(_text(LEFT, top, f"{figure['name']} ({figure['unit']})", "bold"))
        sides = [("ours", figure["ours"], OURS)]
        if figure["other"]:
            sides.append((figure["against"], figure["other"], OTHER))
        longest = max(values["high"] for _, values, _ in sides) or 1
        for label, values, colour in sides:
            top += BAR + 4
            parts.append(_bar(top - BAR + 3, WIDTH / longest, values, colour))
            parts.append(_text(LEFT + WIDTH + 8, top, f"{number(values['median'])}  {label}", "normal"))
        top += GAP - 10
    width, height = LEFT + WIDTH + RIGHT, top
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    background = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([head, background, _text(LEFT, 18, title, "bold"), *parts, "</svg>\n"])


def _bar(top: float, scale: float, values: Mapping[str, Any], colour: str) -> str:
    low, median, high = (LEFT + scale * values[name] for name in ("low", "median", "high"))
    middle = top + BAR / 2
    return (
        f'<rect x="{LEFT}" y="{top:.1f}" width="{max(1, median - LEFT):.1f}" height="{BAR}" fill="{colour}"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" y2="{middle:.1f}" stroke="{INK}"/>'
    )


def _text(left: float, base: float, text: str, weight: str) -> str:
    return f'<text x="{left}" y="{base}" font-size="12" font-weight="{weight}" fill="{INK}">{escape(text)}</text>'
