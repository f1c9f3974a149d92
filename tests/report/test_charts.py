import re
from xml.etree import ElementTree

import pytest

from resae.report.charts import (
    MARKERS,
    PALETTE,
    Axis,
    Curves,
    Dot,
    Dots,
    Point,
    Series,
    Style,
    inline,
    linear_axis,
    log_axis,
    number,
    standalone,
    steps_axis,
)
from resae.report.page import page_style
from resae.report.styles import STYLES, styles_of

BLUE, HOLLOW = Style("blue", "circle"), Style("orange", "square", "4 2", hollow=True)
SVG = "{http://www.w3.org/2000/svg}"


def luminance(color):
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def themes():
    """Colours of the page by name, on light and on dark ground."""
    light, dark = re.findall(r":root \{(.*?)\}", page_style(), re.S)[:2]
    return [dict(re.findall(r"--(\w+): (#\w{6})", theme)) for theme in (light, dark)]


def test_text_and_series_have_a_contrast_of_at_least_4_5_in_both_themes():
    for place, theme in enumerate(themes()):
        for ink in ("ink", "quiet", "link"):
            for ground in ("ground", "panel"):
                assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
        assert contrast(theme["ink"], theme["best"]) >= 4.5
        assert contrast(theme["quiet"], theme["best"]) >= 4.5
        assert contrast(theme["focus"], theme["ground"]) >= 3
        for name, colors in PALETTE.items():
            assert contrast(colors[place], theme["ground"]) >= 4.5, name


def test_methods_are_told_apart_without_colour():
    lines = [(style.marker, style.dash) for style in STYLES.values()]
    assert len({marker for marker, _ in lines}) == len({dash for _, dash in lines}) == len(lines)
    assert {marker for marker, _ in lines} <= set(MARKERS)
    others = styles_of(["resae", "first", "second", "resae"])
    assert len({style.marker for style in others.values()}) == len(others) == 3
    assert others["resae"] == STYLES["resae"]
    of_runs = styles_of(["raw (a)", "resae (a)", "raw (b)", "resae (b)"])
    assert len({style.marker for style in of_runs.values()}) == 4
    assert of_runs["resae (a)"].color == of_runs["resae (b)"].color == STYLES["resae"].color


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1.0, "1"), (0.12345, "0.123"), (-0.5, "−0.5"), (8054, "8,054"),
     (0.00012, "0.0001"), (31.96, "32"), (100.0, "100")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_ticks_are_round_and_hold_the_values():
    assert linear_axis("", [0.3, 1.83]).ticks == pytest.approx([0, 0.5, 1, 1.5, 2])
    assert linear_axis("", [-0.11, 0.77], zero=False).low == pytest.approx(-0.2)
    assert linear_axis("", [3.0]).ticks[0] == 0
    assert linear_axis("", [0.0, 0.0]).high > 0
    tight = linear_axis("", [10, 204.8], tight=True)
    assert tight.high == 204.8
    assert tight.ticks[-1] <= 204.8
    assert log_axis("", [0.01, 2]).ticks == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
    assert log_axis("", [0.2, 0.9]).ticks == pytest.approx([i / 10 for i in range(2, 10)])
    assert steps_axis("k", [8, 4, 8]).ticks == [4, 8]
    assert Axis("", 1, 100, [], log=True).share(10) == pytest.approx(0.5)
    assert Axis("", 0, 1, []).share(7) == 1


def curves():
    lines = [
        Series("a <b>", BLUE, [Point(4, 1.0, 0.8, 1.3), Point(8, 0.5, 0.4, 0.6)]),
        Series("c", HOLLOW, [Point(4, 2.0), Point(8, 1.0)]),
        Series("level", BLUE, [Point(4, 1.5)], level=True),
    ]
    return Curves("Losses", steps_axis("k, active", [4, 8]), linear_axis("nats", [2.0]), lines)


def test_a_panel_says_in_words_what_it_shows():
    svg = ElementTree.fromstring(inline(curves(), "p"))
    title, description = svg[0], svg[1]
    assert svg.get("role") == "img"
    assert svg.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert title.text == "Losses"
    assert description.text == (
        "nats against k, active. a <b>: 1.00 [0.80, 1.30] at 4, 0.50 [0.40, 0.60] at 8. "
        "c: 2.00 at 4, 1.00 at 8. level: 1.5 at every k."
    )
    texts = {text.text for text in svg.iter("text")}
    assert {"Losses", "nats", "k, active", "4", "8"} <= texts
    assert len([e for e in svg.iter("line") if "whisker" in e.get("class")]) == 2
    assert len(list(svg.iter("circle"))) == len(list(svg.iter("polygon"))) == 2


def test_lines_with_intervals_are_moved_aside_of_each_other():
    svg = ElementTree.fromstring(inline(curves(), "p"))
    left = [float(path.get("d").split()[0][1:]) for path in svg.iter("path")][:2]
    assert left[1] - left[0] == pytest.approx(3, abs=0.11)


def test_rows_of_dots_name_and_number_each_row():
    panel = Dots("Now", linear_axis("nats", [0.75]), [Dot("ReSAE", BLUE, 0.75, 0.7, 0.81)])
    svg = ElementTree.fromstring(inline(panel, "p"))
    assert svg[1].text == "nats. ReSAE: 0.75 [0.70, 0.81]."
    assert {"ReSAE", "0.75 [0.70, 0.81]"} <= {text.text for text in svg.iter("text")}


def test_a_file_of_its_own_has_its_colours_and_its_legend():
    panel = curves()
    text = standalone([panel] * 4, panel.series, columns=3)
    svg = ElementTree.fromstring(text)
    assert svg.get("width") == str(3 * 340)
    labels = [e.text for e in svg.iter(f"{SVG}text")]
    assert labels.count("Losses") == 4
    assert labels[-3:] == ["a <b>", "c", "level"]
    assert "var(" not in text
    used = {name for e in svg.iter() for name in re.findall(r"c-(\w+)", e.get("class") or "")}
    assert used == {"blue", "orange"}
    assert used <= set(re.findall(r"\.c-(\w+) \{ color: #", text))


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("ReSAE, closed loop", "2.16 [1.85, 2.49]"),
        ("identity residual, closed loop", "2.16"),
        ("a label of more characters than have room in one row", None),
    ],
)
def test_a_value_beside_a_long_label_is_shown_without_its_interval(label, value):
    dot = Dot(label, BLUE, 2.16, 1.85, 2.49)
    svg = ElementTree.fromstring(inline(Dots("", linear_axis("nats", [2.5]), [dot]), "p"))
    texts = [element.text or "" for element in svg.iter("text")]
    shown = [text for text in texts if text.startswith("2.16")]
    assert shown == ([] if value is None else [value])
