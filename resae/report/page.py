"""`report.json` → figures and one self-contained HTML page, for people who would rather look.

Reads the report.json of `resae demo` or `resae eval`. The page loads nothing: its style and script
are inside, and its content-security policy allows these two, by their hash, and nothing else. Text
of models and data is escaped by the template. Without scripts everything is there but sorting and
filtering.
"""

import base64
import hashlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from resae.evaluation.labels import base_name, label, mode_label
from resae.report.charts import CHART_STYLE, Panel, Style, inline, palette_style, sample
from resae.report.content import Report, load_report
from resae.report.figures import Figure, draw
from resae.report.headline import headline
from resae.report.sections import sections
from resae.report.tables import short_name
from resae.report.words import METHODS, MODES_IN_WORDS
from resae.storage import require_writable, write_atomically

_TEMPLATE = files("resae.report").joinpath("template")


def write_report(folder: str | Path) -> Path:
    """Draw `folder/report.json` into `folder/figures/*.svg` and `folder/report.html`; returns the
    path of the page.

    Raises:
        FileNotFoundError, ValueError: as of `load_report`.
        OSError: the folder cannot be written into.
    """
    folder = Path(folder)
    report = load_report(folder / "report.json")
    require_writable(folder)
    figures = draw(report)
    for figure in figures.values():
        target = folder / "figures" / f"{figure.name}.svg"
        write_atomically(
            target, lambda temporary, figure=figure: temporary.write_text(figure.to_svg())
        )
    page = folder / "report.html"
    text = render(report, figures)
    write_atomically(page, lambda temporary: temporary.write_text(text))
    return page


def render(report: Report, figures: dict[str, Figure]) -> str:
    """The page of a report with these figures."""
    environment = Environment(
        loader=PackageLoader("resae.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    style, script = page_style(), _TEMPLATE.joinpath("page.js").read_text()
    methods = dict.fromkeys(base_name(row.method) for row in report.replacement)
    modes = {row.mode for row in report.replacement}
    return environment.get_template("page.html").render(
        report=report,
        config=report.config,
        first=report.replacement[0],
        headline=headline(report),
        warning=_warning(report),
        sections=sections(report, figures),
        methods={name: METHODS[name] for name in methods if name in METHODS},
        modes={name: text for name, text in MODES_IN_WORDS.items() if name in modes},
        style=Markup(style),
        script=Markup(script),
        policy=content_policy(style, script),
    )


def _warning(report: Report) -> str:
    """A reason why rows of the report do not compare; empty without one."""
    measured = {(row.tokens, round(row.ce_clean, 4)) for row in report.replacement}
    if len(measured) < 2:
        return ""
    told = ", ".join(f"{ce:.4f} on {tokens:,} positions" for tokens, ce in sorted(measured))
    return (
        f"these rows are of different models or text. The unchanged models have a cross-entropy of "
        f"{told}, so differences between their methods are not those of the methods alone."
    )


def page_style() -> str:
    """The style sheet of the page."""
    return CHART_STYLE + palette_style() + _TEMPLATE.joinpath("page.css").read_text()


def content_policy(style: str, script: str) -> str:
    """Content-security policy that allows this style and this script and nothing else."""
    allowed = {"script-src": script, "style-src": style}
    parts = [f"{what} '{_digest(text)}'" for what, text in allowed.items()]
    return "; ".join(["default-src 'none'", *parts, "base-uri 'none'", "form-action 'none'"])


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _inline(panel: Panel, name: str) -> Markup:
    return Markup(inline(panel, name))


def _sample(style: Style, level: bool) -> Markup:
    return Markup(sample(style, level=level))


def _code(text: str) -> Markup:
    """Escaped text whose parts between backticks are code."""
    marked = (
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part)
        for i, part in enumerate(text.split("`"))
    )
    return Markup("").join(marked)


def _count(value: int | list[int]) -> str:
    """A number, or the different ones of a list, with commas between thousands."""
    values = [value] if isinstance(value, int) else list(dict.fromkeys(value))
    return ", ".join(f"{number:,}" for number in values)


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


FILTERS: dict[str, Callable[..., str]] = {
    "code": _code,
    "count": _count,
    "inline": _inline,
    "label": label,
    "mode": mode_label,
    "sample": _sample,
    "short": short_name,
    "upper_first": _upper_first,
}
