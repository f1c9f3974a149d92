import base64
import hashlib
import html
import json
import random
import re
from dataclasses import dataclass, fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from report_material import replacement_row, report_of

from resae.evaluation.labels import label, whole_selection
from resae.evaluation.rows import (
    AblationRow,
    DensityRow,
    GenerationRow,
    ReconstructionRow,
    ReplacementRow,
    SharedLatentsRow,
)
from resae.report.content import Report, load_report
from resae.report.figures import draw
from resae.report.page import render, write_report
from resae.report.rows import RunRow
from resae.settings import field_docstrings
from resae.storage import save_json


class _Balance(HTMLParser):
    """Fails on tags that do not match."""

    VOID = {"meta", "br", "img"}

    def __init__(self):
        super().__init__()
        self.open = []
        self.links = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attrs):
        del tag
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Text of the page of the small report."""
    folder = tmp_path_factory.mktemp("page")
    save_json(folder / "report.json", report_of())
    return write_report(folder).read_text()


def test_page_is_one_self_contained_document(page):
    checker = _Balance()
    checker.feed(page)
    assert checker.open == []
    assert all(link.startswith("#") for link in checker.links)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([^")]+)', page)
    used += " ".join(re.findall(r'aria-labelledby="([^"]+)"', page)).split()
    assert set(used) <= set(ids)
    assert page.lstrip().startswith("<!doctype html>")


def test_the_policy_allows_the_style_and_script_of_the_page_and_nothing_else(page):
    policy = html.unescape(re.search(r'Security-Policy" content="([^"]+)"', page)[1])
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert " style=" not in page  # the policy would refuse it
    assert not re.search(r"\son\w+=", page)


HOSTILE = "</style></script><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }} \" '"


def test_text_of_models_and_data_is_escaped_wherever_it_is_shown(tmp_path):
    changes = {
        "title": HOSTILE,
        "findings": [HOSTILE],
        "samples": [{"how": HOSTILE, "prompt": HOSTILE, "text": HOSTILE, "replaced": 0}],
        "environment": {HOSTILE: HOSTILE},
        "affine": [{"method": HOSTILE, "hop": HOSTILE, "r2": 0.5}],
    }
    report = report_of(**changes)
    report["config"] |= {"model": HOSTILE, "data": HOSTILE, HOSTILE: [HOSTILE]}
    for row in report["replacement"]:
        row["method"] = HOSTILE if row["method"] == "raw" else row["method"]
    save_json(tmp_path / "report.json", report)
    page = write_report(tmp_path).read_text()
    checker = _Balance()
    checker.feed(page)
    assert checker.open == []
    assert page.count("<script>") == page.count("</script>") == page.count("</style>") == 1
    assert "<img" not in page
    assert page.count("{{ 7 * 7 }}") > 15
    for figure in (tmp_path / "figures").iterdir():
        assert "<script>" not in figure.read_text()


def test_every_number_of_the_tables_is_in_the_report(page):
    """As it is shown: the numbers that tables are sorted by are those of the rows."""
    known = {str(value) for value in numbers(report_of())}
    cells = re.findall(r'<td data-value="([^"]+)">([^<]+)', page)
    shown = [(value, text) for value, text in cells if re.fullmatch(r"-?[\d.e-]+", value)]
    assert len(shown) > 100
    for value, text in shown:
        assert value in known
        assert float(text.replace("−", "-").replace(",", "")) == pytest.approx(
            float(value), abs=0.0051
        )


def numbers(content):
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return [number for part in content for number in numbers(part)]
    return [content] if isinstance(content, int | float) else []


def table(page, name):
    """Rows of cell texts of the table of this name."""
    (found,) = re.findall(f'<table id="{name}".*?</table>', page, re.S)
    rows = re.findall(r"<tr.*?</tr>", found, re.S)
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[html.unescape(re.sub(r"<.*?>", "", text)) for text in row] for row in cells]


def test_rows_of_some_layers_are_in_a_table_of_their_own(page):
    assert "9.9900" in table(page, "replaced-subsets")[1]
    for mode in ("online", "teacher_forced", "error_added"):
        assert len(table(page, f"replaced-{mode}")) == 6
        assert not any("9.9900" in row for row in table(page, f"replaced-{mode}"))


def test_the_top_has_the_losses_at_each_k_and_marks_the_best_autoencoder(page):
    assert "all 2 selected layers replaced at once (online) by codes of 8 active latents" in page
    head, raw, ours, maps = table(page, "headline")
    assert head == ["method", "k = 4", "k = 8"]
    assert raw == ["raw SAEs", "0.25 best", "0.12 best"]  # as good as each other
    assert ours == ["ReSAE", "0.25 best", "0.12 best"]
    assert maps == ["affine maps alone", "0.50", "0.50"]


@dataclass(frozen=True)
class WithInterval(ReplacementRow):
    """A replacement row of an evaluation with intervals."""

    delta_ce_low: float | None = None
    delta_ce_high: float | None = None


@dataclass(frozen=True)
class WithCosine(ReconstructionRow):
    """A reconstruction row with a measure that the page does not know."""

    cosine_mean: float = 0.5


def interval(value):
    return {"delta_ce_low": 0.8 * value, "delta_ce_high": 1.2 * value}


def test_intervals_stand_beside_their_values(tmp_path):
    save_json(tmp_path / "report.json", report_of())
    report = load_report(tmp_path / "report.json")
    rows = [WithInterval(**(vars(row) | interval(row.delta_ce))) for row in report.replacement]
    report = replace(report, replacement=rows)
    figures = draw(report)
    text = render(report, figures)
    assert "0.25 [0.20, 0.30] best" in table(text, "headline")[1]
    assert "0.25 [0.20, 0.30]" in table(text, "replaced-online")[1]
    assert "delta ce low" not in text
    assert figures["delta_ce"].to_svg().count("whisker c-") == 3 * 4
    assert "at 8" in text
    assert "0.12 [0.10, 0.15] at 8" in text  # in the description of the figure


def test_a_measure_that_the_page_does_not_know_has_a_column(tmp_path):
    save_json(tmp_path / "report.json", report_of())
    report = load_report(tmp_path / "report.json")
    rows = [WithCosine(**vars(row)) for row in report.reconstruction]
    text = render(replace(report, reconstruction=rows), {})
    head, first = table(text, "reconstruction-table")
    assert dict(zip(head, first, strict=True))["cosine mean"] == "0.5000"


def test_scores_of_tasks_are_in_a_table(tmp_path):
    plain = {"method": None, "loop": None, "k": None, "task": "t <b>", "metric": "acc"}
    plain |= {"documents": 50, "value": 0.75}
    ours = plain | {"method": "resae", "loop": "closed", "k": 4, "value": 0.5}
    ours |= {"value_low": 0.4, "value_high": 0.6, "difference": -0.25}
    save_json(tmp_path / "report.json", report_of(tasks=[plain, ours]))
    head, first, second = table(write_report(tmp_path).read_text(), "tasks-table")
    assert head[2:] == ["task", "metric", "score", "score less unchanged model", "documents"]
    assert first == ["unchanged model", "–", "t <b>", "acc", "0.7500", "–", "50"]
    assert second[:2] == [label("resae", "closed"), "4"]
    assert second[5] == "−0.2500"


@pytest.mark.parametrize(
    ("name", "cls", "heading"),
    [
        ("ablation", AblationRow, "in place of the layers"),
        ("density", DensityRow, "fire on > 1 %"),
        ("shared_latents", SharedLatentsRow, "layers per latent"),
        ("generation", GenerationRow, "agreement, tokens"),
    ],
)
def test_every_table_of_an_evaluation_has_a_section(tmp_path, name, cls, heading):
    of_type = {str: "raw", int: 4, float: 0.25, list[str]: ["a"], list[float]: [0.25, 0.5]}
    values = {column: of_type.get(hint) for column, hint in get_type_hints(cls).items()}
    save_json(tmp_path / "report.json", report_of())
    report = replace(load_report(tmp_path / "report.json"), **{name: [cls(**values)]})
    text = render(report, draw(report))
    head, first = table(text, f"{name}-table")
    assert heading in head
    assert len(head) == len(first)


def test_parts_without_data_are_left_out(tmp_path):
    report = report_of(affine=[], training=[], redundancy=[], redundancy_histogram=[])
    del report["samples"], report["findings"]
    save_json(tmp_path / "report.json", report)
    page = write_report(tmp_path).read_text()
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == {"delta_ce", "ce_recovered"}
    titles = re.findall(r"<summary><h2>(.*?)</h2>", page)
    assert titles == [
        "All selected layers replaced at once",
        "Some of the layers replaced",
        "Reconstruction from clean activations",
        "Configuration",
    ]
    assert re.findall(r'<li><a href="#.*?">(.*?)</a>', page) == titles


def test_a_single_run_has_one_row_per_way_of_replacing(tmp_path):
    """One method at one k in one mode: dots in place of lines, nothing empty."""
    rows = [replacement_row("resae", "closed", "online", 8, 0.75)]
    report = report_of(replacement=rows, **dict.fromkeys(
        ("affine", "training", "redundancy", "redundancy_histogram", "samples", "findings"), []
    ))  # fmt: skip
    save_json(tmp_path / "report.json", report)
    page = write_report(tmp_path).read_text()
    assert "rises by 0.75 nats per token with ReSAE." in page
    assert table(page, "headline") == [["method", "online"], ["ReSAE", "0.75"]]
    assert page.count('class="chart"') == 3  # headline, its section: losses and share recovered
    assert "teacher-forced: nats" not in page


def test_the_folder_may_be_named_by_a_string(tmp_path):
    save_json(tmp_path / "report.json", report_of())
    assert write_report(str(tmp_path)) == tmp_path / "report.html"


def test_a_file_of_something_else_is_named(tmp_path):
    save_json(tmp_path / "report.json", {"title": "x"})
    with pytest.raises(ValueError, match="no report of resae: it has no config, environment, repl"):
        write_report(tmp_path)


def test_a_folder_that_takes_no_files_is_found_before_anything_is_drawn(tmp_path, monkeypatch):
    save_json(tmp_path / "report.json", report_of())

    def refuse(dir):
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr("resae.storage.tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("resae.report.page.draw", None)
    with pytest.raises(OSError, match="cannot write into .*Read-only file system"):
        write_report(tmp_path)


def test_drawing_twice_gives_the_same_bytes(tmp_path):
    save_json(tmp_path / "report.json", report_of())
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_labels_and_selection(tmp_path):
    assert label("resae", "closed") == "ReSAE, closed loop"
    assert label("raw", None) == "raw SAEs"
    assert label("a new one") == "a new one"
    assert label("resae (first)", "closed") == "ReSAE (first), closed loop"
    assert label("a new one (first)") == "a new one (first)"
    save_json(tmp_path / "report.json", report_of())
    rows = load_report(tmp_path / "report.json").replacement
    assert len(whole_selection(rows)) == len(rows) - 1


def contained(old, new):
    """True if content has all entries of `old`; in objects there may be more."""
    if isinstance(old, dict):
        return all(name in new and contained(value, new[name]) for name, value in old.items())
    if isinstance(old, list):
        return len(old) == len(new) and all(map(contained, old, new))
    return old == new


def test_a_report_is_read_as_rows_and_written_without_loss(tmp_path):
    pair = {"method": "all_previous", "hop": "a → b", "r2": 0.9, "shares": {"a": 0.25, "c": 0.75}}
    written = report_of(affine=[*report_of()["affine"], pair])
    save_json(tmp_path / "report.json", written)
    report = load_report(tmp_path / "report.json")
    assert report.affine[0].shares is None
    assert report.affine[1].shares == {"a": 0.25, "c": 0.75}
    assert report.training[0].log[1].layers[0].fvu == 0.5
    assert contained(written, report.to_dict())
    save_json(tmp_path / "report.json", report.to_dict())
    assert load_report(tmp_path / "report.json") == report


@pytest.mark.parametrize("name", ["report", "methods", "learning_rates", "elsewhere_seed_1"])
def test_every_report_here_is_read_without_loss(name):
    path = Path(__file__).parents[2] / f"bench/results/demo/{name}.json"
    content = json.loads(path.read_text())
    read = load_report(path).to_dict()
    assert contained(content, read)
    assert list(content) == list(read)


def without(column):
    return [{name: v for name, v in replacement_row("raw", None, "online", 4, 1.0).items()
             if name != column}]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema_version": 2}, "has schema_version 2, expected 1; draw it with the version"),
        ({"schema_version": None}, "has schema_version None, expected 1"),
        ({"replacement": without("kl")}, r"replacement\[0\] has no kl, expected a number; write"),
        ({"replacement": []}, "replacement has no rows; write the file again"),
        ({"replacement": {}}, "replacement = {}, expected a list"),
        ({"redundancy": [{"method": 3}]}, r"redundancy\[0\]: method = 3, expected text"),
        ({"config": {"model": "m"}}, "config has no data, expected text"),
        ({"training": [{"method": "raw", "k": 4, "log": [{"step": 1, "tokens": 2}]}]},
         r"training\[0\]: log\[0\] has no layers"),
        ({"fair": [{"lr": ["x"]}]}, r"fair\[0\] has no method"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_a_report_of_another_version_is_refused_and_nothing_is_drawn(tmp_path, changes, problem):
    save_json(tmp_path / "report.json", report_of(**changes))
    with pytest.raises(ValueError, match=problem) as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_missing_or_broken_report_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="resae eval"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(report_of())[:100])
    with pytest.raises(ValueError, match="not valid JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("seed", range(4))
def test_reports_of_unusual_numbers_are_drawn(tmp_path, seed):
    """Negative, vast and equal numbers, k of 0, unknown names, empty logs and histograms."""
    chosen = random.Random(seed).choice
    values = (0.0, -0.5, 1e-9, 7e5, 0.25)
    rows = [
        replacement_row(chosen(("raw", "resae", "a (b)", "")), chosen((None, "open", "closed")),
                        chosen(("online", "a mode", "error_added")), chosen((None, 0, 1, 10**6)),
                        chosen(values), layers=chosen(([], ["blocks.1.x"], ["x", "y"])))
        for _ in range(12)
    ]  # fmt: skip
    log = [{"step": 1, "tokens": 1, "layers": [{"fvu": chosen(values)}]}]
    report = report_of(
        replacement=rows,
        affine=[{"method": "resae", "hop": "x", "r2": chosen(values)}],
        redundancy_histogram=[
            {"method": "m", "k": chosen((None, 4)), "edges": [0.0, 1.0], "counts": [chosen((0, 3))]}
        ],
        training=[{"method": "raw", "k": 4, "log": chosen(([], log))}],
    )
    save_json(tmp_path / "report.json", report)
    checker = _Balance()
    checker.feed(write_report(tmp_path).read_text())
    assert checker.open == []
    for figure in (tmp_path / "figures").iterdir():
        assert "nan" not in figure.read_text()


def test_every_column_and_table_of_a_report_is_documented():
    seen = [Report, RunRow]
    for hint in get_type_hints(Report).values():
        seen += [cls for cls in get_args(hint) if is_dataclass(cls)]
    for cls in seen:
        documented = field_docstrings(cls)
        for column in fields(cls):
            assert len(documented.get(column.name, "")) > 5, f"{cls.__name__}.{column.name}"
