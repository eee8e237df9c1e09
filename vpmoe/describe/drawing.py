"""Shapes and text of an SVG file. Coordinates are pixels, y grows downwards; nothing depends on time or order."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

INK, FAINT, LINE, PAPER = "#1f2328", "#667079", "#9aa3ab", "#ffffff"
FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"


def number(value: float) -> str:
    """At most two decimals, without trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


@dataclass
class Drawing:
    """An SVG file that grows shape by shape."""

    width: float
    height: float
    elements: list[str] = field(default_factory=list)

    def _add(self, tag: str, content: str | None = None, **attributes: str | float | None) -> None:
        given = {name.strip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
        words = [f'{name}="{value if isinstance(value, str) else number(value)}"' for name, value in given.items()]
        opening = " ".join([tag, *words])
        self.elements.append(f"<{opening}/>" if content is None else f"<{opening}>{content}</{tag}>")

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        stroke: str | None = None,
        radius: float | None = None,
        opacity: float | None = None,
    ) -> None:
        """A rectangle from its upper left corner."""
        self._add(
            "rect", x=x, y=y, width=width, height=height, fill=fill, stroke=stroke, rx=radius, fill_opacity=opacity
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 11,
        fill: str = INK,
        anchor: str = "start",
        bold: bool = False,
        turned: bool = False,
    ) -> None:
        """One line of text; ``y`` is its baseline, ``anchor`` start, middle or end, ``turned`` reads upwards."""
        self._add(
            "text",
            escape(words, quote=False),
            x=x,
            y=y,
            font_size=size,
            fill=fill,
            text_anchor=None if anchor == "start" else anchor,
            font_weight="bold" if bold else None,
            transform=f"rotate(-90 {number(x)} {number(y)})" if turned else None,
        )

    def line(self, *points: tuple[float, float], colour: str = LINE, dashed: bool = False, width: float = 1.2) -> None:
        """A line through points."""
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        dashes = "3 3" if dashed else None
        self._add("polyline", points=path, fill="none", stroke=colour, stroke_width=width, stroke_dasharray=dashes)

    def arrow(self, *points: tuple[float, float], colour: str = LINE, dashed: bool = False) -> None:
        """A line with a head at its last point; the last piece is horizontal or vertical."""
        self.line(*points, colour=colour, dashed=dashed)
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        corners = [(x, y), (x - 6 * dx - 3 * dy, y - 6 * dy - 3 * dx), (x - 6 * dx + 3 * dy, y - 6 * dy + 3 * dx)]
        self._add("polygon", points=" ".join(f"{number(a)},{number(b)}" for a, b in corners), fill=colour)

    def box(self, x: float, y: float, width: float, height: float, words: str, *, fill: str = PAPER) -> None:
        """A labelled step of a flow."""
        self.rect(x, y, width, height, fill, stroke=LINE, radius=4)
        self.text(x + width / 2, y + height / 2 + 4, words, anchor="middle")

    def plus(self, x: float, y: float) -> None:
        """The addition to the residual stream, centred."""
        self._add("circle", cx=x, cy=y, r=8, fill=PAPER, stroke=LINE, stroke_width=1.2)
        self.line((x - 4, y), (x + 4, y), colour=INK)
        self.line((x, y - 4), (x, y + 4), colour=INK)

    def render(self, title: str) -> str:
        """The file's text."""
        size = f'width="{number(self.width)}" height="{number(self.height)}"'
        view = f'viewBox="0 0 {number(self.width)} {number(self.height)}"'
        opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} font-family="{FONT}" role="img">'
        return "\n".join([opening, f"<title>{escape(title)}</title>", *self.elements, "</svg>", ""])
