"""Small SVG charts with real text: curves over one number, and rows of dots with intervals.

A panel is `WIDTH` wide and is shown at about that size, one below the other on a narrow screen, so
that its text stays readable. Colours are classes (`PALETTE`), so that a page can change them in
dark mode. A series differs from the others by its marker and its dashes, too, and is told apart in
greyscale.

    Curves, Dots   a panel each
    inline         a panel → SVG for a page
    standalone     panels and their legend → one SVG file
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.etree.ElementTree import Element, tostring

WIDTH, HEIGHT = 340, 264
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 42, 44
HEAD, ROW, LINE = 24, 38, 18
LETTER = 6.4
"""Mean width of a character at 12 pixels, for the layout of legends."""

PALETTE = {
    # name: on light ground, on dark ground
    "blue": ("#0b62a4", "#6cb4f5"),
    "orange": ("#c44e00", "#ff9a5c"),
    "amber": ("#8a6100", "#e3b341"),
    "green": ("#00755a", "#3fcf9f"),
    "pink": ("#a83b7c", "#f08cc8"),
    "grey": ("#5f6368", "#a8adb5"),
    "sky": ("#1a76a6", "#8fd3f4"),
    "black": ("#1b1b1b", "#e8e8e8"),
    "purple": ("#6f2c91", "#c79bf2"),
    "olive": ("#6b6b00", "#cfcf5a"),
    "brown": ("#8b4513", "#d9a679"),
    "indigo": ("#3949ab", "#a3acff"),
}
"""Colours of series, each with a contrast of at least 4.5 to its ground."""


def _ring(corners: int, *radii: float) -> tuple[tuple[float, float], ...]:
    """Corners at equal angles, the first above the centre, at these radii in turn."""
    radii = radii or (1.1,)
    turns = [(2 * math.pi * i / corners, radii[i % len(radii)]) for i in range(corners)]
    return tuple((r * math.sin(turn), -r * math.cos(turn)) for turn, r in turns)


MARKERS: dict[str, Sequence[tuple[float, float]]] = {
    # corners in units of the radius; a circle has none
    "circle": (),
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    "up": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    "down": ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
    "right": ((1.2, 0), (-0.9, 1.15), (-0.9, -1.15)),
    "left": ((-1.2, 0), (0.9, 1.15), (0.9, -1.15)),
    "star": _ring(10, 1.4, 0.6),
    "pentagon": _ring(5),
    "hexagon": _ring(6),
    "cross": (
        *((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)),
        *((0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
    ),
    "hourglass": ((-1.1, -1.1), (1.1, -1.1), (-1.1, 1.1), (1.1, 1.1)),
}


class Style(NamedTuple):
    """Appearance of a series."""

    color: str
    """Name in `PALETTE`."""
    marker: str
    """Name in `MARKERS`."""
    dash: str = ""
    """Lengths of dashes and gaps in pixels; empty: a solid line."""
    hollow: bool = False
    """Marker in outline only."""


class Point(NamedTuple):
    """A value, and its interval where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Series(NamedTuple):
    """Points of one line, by rising x; or a level that holds at every x."""

    label: str
    style: Style
    points: Sequence[Point]
    level: bool = False
    """One point, drawn as a line across the panel."""
    marked: Sequence[int] | None = None
    """Numbers of the points with a marker; None: all."""


class Dot(NamedTuple):
    """One row of `Dots`."""

    label: str
    style: Style
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Axis:
    """Numbers along one side of a panel."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def share(self, value: float) -> float:
        """Position of a value, 0 to 1; outside of the axis, its end."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(v, 1e-12)) for v in (value, low, high))
        return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def linear_axis(
    label: str, values: Sequence[float], *, zero: bool = True, tight: bool = False
) -> Axis:
    """An axis with ticks at round numbers around the values; from zero on if `zero`, up to the
    largest value if `tight`."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return (
        Axis(label, ticks[0], high, ticks[:-1])
        if tight
        else Axis(label, ticks[0], ticks[-1], ticks)
    )


def log_axis(label: str, values: Sequence[float]) -> Axis:
    """A logarithmic axis around positive values, with ticks at 1, 2 and 5 times powers of ten,
    or at more of their multiples where these are few."""
    values = [value for value in values if value > 0] or [1.0]
    low, high = min(values) / 1.1, max(values) * 1.1
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places = [(d, m) for d in decades for m in range(1, 10) if low <= m * 10.0**d <= high]
    few = [(d, m) for d, m in places if m in (1, 2, 5)]
    ticks = [m * 10.0**d for d, m in (few if len(few) > 2 else places)]
    return Axis(label, low, high, ticks, log=True)


def steps_axis(label: str, values: Sequence[float]) -> Axis:
    """A logarithmic axis with a tick at each of a few values, for example at each k."""
    ticks = sorted(set(values))
    return Axis(label, ticks[0] / 1.25, ticks[-1] * 1.25, ticks, log=True)


def _round_step(step: float) -> float:
    """The next of 1, 2 and 5 times powers of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


@dataclass(frozen=True)
class Curves:
    """A panel of lines."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]

    @property
    def height(self) -> int:
        return HEIGHT

    def description(self) -> str:
        """The lines in words."""
        return f"{self.y.label} against {self.x.label}. " + " ".join(
            f"{series.label}: {self._in_words(series)}." for series in self.series
        )

    def _in_words(self, series: Series) -> str:
        first, *_, last = (series.points[0], *series.points)
        if series.level:
            return f"{number(first.y)} at every {self.x.label.split(',')[0]}"
        if series.marked is not None:
            return f"from {number(first.y)} to {number(last.y)}"
        return ", ".join(
            f"{number_between(p.y, p.low, p.high)} at {number(p.x)}" for p in series.points
        )

    def shapes(self) -> list[Element]:
        lines = [shape for i, one in enumerate(self.series) for shape in self._line(one, i)]
        return [*self._frame(), *lines]

    def _at(self, x: float, y: float) -> tuple[float, float]:
        right = LEFT + (WIDTH - LEFT - RIGHT) * self.x.share(x)
        return right, TOP + (HEIGHT - TOP - BOTTOM) * (1 - self.y.share(y))

    def _frame(self) -> list[Element]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        shapes: list[Element] = []
        for tick in _apart(self.y.ticks, lambda v: self._at(self.x.low, v)[1], LINE - 2):
            y = self._at(self.x.low, tick)[1]
            shapes.append(_line("grid", (LEFT, y), (right, y)))
            shapes.append(_text(number(tick), LEFT - 6, y + 4, "end"))
        for tick in _apart(self.x.ticks, lambda v: self._at(v, self.y.low)[0], 3.5 * LETTER):
            x = self._at(tick, self.y.low)[0]
            shapes.append(_line("axis", (x, bottom), (x, bottom + 4)))
            shapes.append(_text(number(tick), x, bottom + LINE, "middle"))
        shapes.append(_line("axis", (LEFT, bottom), (right, bottom)))
        shapes.append(_text(self.x.label, (LEFT + right) / 2, HEIGHT - 6, "middle"))
        shapes.append(_text(self.y.label, 2, TOP - 10, "start", kind="unit"))
        return shapes

    def _line(self, series: Series, place: int) -> list[Element]:
        """One line with its markers and intervals, `place` lines after the first."""
        if series.level:
            y = series.points[0].y
            return [_path([self._at(x, y) for x in (self.x.low, self.x.high)], series.style)]
        aside = self._aside(place)
        places = [(self._at(p.x, p.y)[0] + aside, self._at(p.x, p.y)[1]) for p in series.points]
        color = series.style.color
        whiskers = [
            _line("whisker", (x, self._at(p.x, low)[1]), (x, self._at(p.x, high)[1]), color)
            for p, (x, _) in zip(series.points, places, strict=True)
            if (low := p.low) is not None and (high := p.high) is not None
        ]
        marked = range(len(places)) if series.marked is None else series.marked
        tips = [f"{series.label}: {number_between(p.y, p.low, p.high)}" for p in series.points]
        markers = [_marker(series.style, *places[i], tips[i]) for i in marked]
        return [_path(places, series.style), *whiskers, *markers]

    def _aside(self, place: int) -> float:
        """Pixels that a line is moved by, so that intervals do not hide each other."""
        with_intervals = any(p.low is not None for one in self.series for p in one.points)
        return 3.0 * (place - (len(self.series) - 1) / 2) if with_intervals else 0.0


@dataclass(frozen=True)
class Dots:
    """A panel of rows with one value each; its label stands above each row."""

    title: str
    x: Axis
    dots: Sequence[Dot]

    @property
    def height(self) -> int:
        return HEAD + ROW * len(self.dots) + BOTTOM

    def description(self) -> str:
        """The rows in words."""
        return f"{self.x.label}. " + " ".join(
            f"{d.label}: {number_between(d.value, d.low, d.high)}." for d in self.dots
        )

    def shapes(self) -> list[Element]:
        bottom = self.height - BOTTOM
        shapes: list[Element] = []
        for tick in _apart(self.x.ticks, self._at, 4 * LETTER):
            shapes.append(_line("grid", (self._at(tick), HEAD), (self._at(tick), bottom)))
            shapes.append(_text(number(tick), self._at(tick), bottom + LINE, "middle"))
        shapes.append(_text(self.x.label, WIDTH / 2, self.height - 6, "middle"))
        for i, dot in enumerate(self.dots):
            shapes += self._row(dot, HEAD + ROW * i)
        return shapes

    def _at(self, value: float) -> float:
        return 14 + (WIDTH - 2 * 14) * self.x.share(value)

    def _row(self, dot: Dot, top: float) -> list[Element]:
        """Label and value in one line, and below it the dot; the value's interval only where there
        is room."""
        x, y = self._at(dot.value), top + ROW - 11
        shapes = [_text(dot.label, 14, top + 14, "start")]
        if self.x.low <= 0:
            shapes.append(_line("stem", (self._at(0.0), y), (x, y), dot.style.color))
        if dot.low is not None and dot.high is not None:
            ends = (self._at(dot.low), y), (self._at(dot.high), y)
            shapes.append(_line("whisker", *ends, dot.style.color))
        value = number_between(dot.value, dot.low, dot.high)
        shapes.append(_marker(dot.style, x, y, f"{dot.label}: {value}"))
        shown = next(
            (text for text in (value, number(dot.value, padded=True)) if _fits(dot, text)), ""
        )
        if shown:
            shapes.append(_text(shown, WIDTH - 14, top + 14, "end", kind="value"))
        return shapes


def _fits(dot: Dot, value: str) -> bool:
    """True if a value has room in one line with the label of its dot."""
    return LETTER * (len(dot.label) + len(value) + 2) < WIDTH - 28


Panel = Curves | Dots


def number(value: float, *, padded: bool = False) -> str:
    """A number with three digits that count, and a real minus sign; without zeros at its end unless
    `padded`."""
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 4)}f}" if abs(value) < 1000 else f"{value:,.0f}"
    if "." in text and not padded:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−")


def number_between(value: float, low: float | None, high: float | None) -> str:
    """A number with its interval, where it has one."""
    if low is None or high is None:
        return number(value, padded=True)
    digits = decimals(low, high)
    texts = [f"{end:.{digits}f}".replace("-", "−") for end in (value, low, high)]
    return "{} [{}, {}]".format(*texts)


def decimals(low: float, high: float) -> int:
    """Decimals that tell something of a number with this interval: at least two."""
    half = abs(high - low) / 2
    return min(4, max(2, -math.floor(math.log10(half)))) if half else 4


def inline(panel: Panel, name: str) -> str:
    """A panel as SVG inside of a page; `name` begins the ids of its title and description."""
    title = _element("title", panel.title, id=f"{name}-title")
    description = _element("desc", panel.description(), id=f"{name}-desc")
    svg = _element(
        "svg",
        title,
        description,
        *_titled(panel),
        class_="chart",
        viewBox=f"0 0 {WIDTH} {panel.height}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )
    return tostring(svg, encoding="unicode")


def sample(style: Style, *, level: bool = False) -> str:
    """The line and marker of a series, for a legend inside of a page."""
    svg = _element(
        "svg",
        *_sample(style, level, 0, 8),
        class_="sample",
        viewBox="0 0 34 16",
        aria_hidden="true",
    )
    return tostring(svg, encoding="unicode")


def standalone(panels: Sequence[Panel], legend: Sequence[Series], columns: int = 3) -> str:
    """Panels side by side and their legend as one SVG file, on white."""
    columns = max(1, min(columns, len(panels)))
    width, top = columns * WIDTH, 0
    shapes = [_element("style", STANDALONE_STYLE)]
    shapes.append(_element("rect", class_="ground", width="100%", height="100%"))
    for row in range(0, len(panels), columns):
        beside = panels[row : row + columns]
        for column, panel in enumerate(beside):
            moved = f"translate({column * WIDTH} {top})"
            shapes.append(_element("g", *_titled(panel), transform=moved))
        top += max(panel.height for panel in beside) + 8
    left = 8.0
    for series in legend:
        needed = 44 + LETTER * len(series.label)
        if left > 8 and left + needed > width:
            left, top = 8.0, top + LINE + 2
        shapes += _sample(series.style, series.level, left, top + 8)
        shapes.append(_text(series.label, left + 40, top + 12, "start"))
        left += needed + 10
    height = top + (LINE + 6 if legend else 0)
    svg = _element(
        "svg",
        *shapes,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
    )
    return tostring(svg, encoding="unicode") + "\n"


def palette_style() -> str:
    """Style rules of the colours, for light and for dark ground."""
    light, dark = (
        " ".join(f".c-{name} {{ color: {ground[i]} }}" for name, ground in PALETTE.items())
        for i in range(2)
    )
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}\n"


CHART_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
.title { font-weight: 600; font-size: 13px } .value { font-weight: 600 }
.grid, .axis, .whisker, .stem, .series { fill: none; stroke: currentColor }
.grid { stroke-opacity: .16 } .axis { stroke-opacity: .7 }
.whisker { stroke-width: 1.5 } .stem { stroke-opacity: .45; stroke-width: 2 }
.series { stroke-width: 2; stroke-linejoin: round } .marker { fill: currentColor }
.marker, .hollow { stroke: currentColor; stroke-width: 1.5 }
"""
STANDALONE_STYLE = (
    CHART_STYLE
    + "svg { color: #1b1b1b } text { fill: #1b1b1b } .ground, .hollow { fill: #fff }\n"
    + " ".join(f".c-{name} {{ color: {light} }}" for name, (light, _) in PALETTE.items())
)


def _titled(panel: Panel) -> list[Element]:
    return [_text(panel.title, 2, 14, "start", kind="title"), *panel.shapes()]


def _apart(ticks: Sequence[float], place: Callable[[float], float], distance: float) -> list[float]:
    """Ticks whose labels do not touch, the first one among them."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or abs(place(tick) - place(kept[-1])) >= distance:
            kept.append(tick)
    return kept


def _sample(style: Style, level: bool, left: float, y: float) -> list[Element]:
    line = _path([(left + 1, y), (left + 33, y)], style)
    return [line] if level else [line, _marker(style, left + 17, y)]


def _element(tag: str, *content: Element | str, **attributes: object) -> Element:
    """An element; `_` in names of attributes stands for `-`, at their end for nothing."""
    named = {name.rstrip("_").replace("_", "-"): str(v) for name, v in attributes.items()}
    element = Element(tag, named)
    for part in content:
        if isinstance(part, str):
            element.text = part
        else:
            element.append(part)
    return element


def _text(text: str, x: float, y: float, anchor: str, kind: str = "label") -> Element:
    return _element("text", text, class_=kind, x=_px(x), y=_px(y), text_anchor=anchor)


def _line(
    kind: str, start: tuple[float, float], end: tuple[float, float], color: str | None = None
) -> Element:
    kind = kind if color is None else f"{kind} c-{color}"
    (x1, y1), (x2, y2) = start, end
    return _element("line", class_=kind, x1=_px(x1), y1=_px(y1), x2=_px(x2), y2=_px(y2))


def _path(points: Sequence[tuple[float, float]], style: Style) -> Element:
    path = "M" + " L".join(f"{_px(x)} {_px(y)}" for x, y in points)
    dashes = {"stroke_dasharray": style.dash} if style.dash else {}
    return _element("path", class_=f"series c-{style.color}", d=path, **dashes)


def _marker(style: Style, x: float, y: float, tip: str = "") -> Element:
    """A marker; `tip` is shown when the pointer is over it."""
    content = [_element("title", tip)] if tip else []
    kind = f"{'hollow' if style.hollow else 'marker'} c-{style.color}"
    corners = MARKERS[style.marker]
    if not corners:
        return _element("circle", *content, class_=kind, cx=_px(x), cy=_px(y), r=4)
    path = " ".join(f"{_px(x + 4 * dx)},{_px(y + 4 * dy)}" for dx, dy in corners)
    return _element("polygon", *content, class_=kind, points=path)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
