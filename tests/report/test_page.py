import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from resae.evaluation.labels import label, whole_selection
from resae.report.content import load_report
from resae.report.page import write_report
from resae.storage import save_json


def replacement_row(method, loop, mode, k, delta, layers=("blocks.1.x", "blocks.3.x")):
    return {
        "method": method,
        "loop": loop,
        "mode": mode,
        "layers": list(layers),
        "k": k,
        "active_total": 8,
        "ce_clean": 3.0,
        "ce": 3.0 + delta,
        "delta_ce": delta,
        "ce_recovered_zero": 0.9,
        "ce_recovered_mean": 0.8,
        "kl": delta,
        "tokens": 1000,
    }


def report_of(**changes):
    rows = [
        replacement_row(method, loop, mode, k, 1.0 / k if k else 0.5)
        for mode in ("online", "teacher_forced", "error_added")
        for method, loop, ks in (
            ("raw", None, (4, 8)),
            ("resae", "closed", (4, 8)),
            ("affine_only", None, (None,)),
        )
        for k in ks
    ]
    rows.append(replacement_row("raw", None, "teacher_forced", 4, 9.99, layers=("blocks.3.x",)))
    log = [
        {"step": s, "tokens": 100 * s, "layers": [{"fvu": 1 / s}, {"fvu": 1 / s}]} for s in (1, 2)
    ]
    redundancy = {
        "mean_max_cos": 0.5,
        "share_over_0_5": 0.4,
        "share_over_0_7": 0.1,
        "share_over_0_9": 0.0,
        "random_floor": 0.3,
    }
    return {
        "schema_version": 1,
        "title": "A <test> report",
        "config": {
            "model": "m",
            "data": "d",
            "layers": ["blocks.1.x", "blocks.3.x"],
            "d_sae": 64,
            "train_tokens": 1000,
        },
        "environment": {"torch": "2"},
        "replacement": rows,
        "reconstruction": [
            {
                "method": "raw",
                "loop": None,
                "k": 4,
                "layer": "blocks.1.x",
                "fvu_stream": 0.1234,
                "fvu_target": None,
                "l0": 4.0,
                "dead_fraction": 0.0,
            }
        ],
        "redundancy": [{"method": "raw", "k": 4, **redundancy}],
        "redundancy_histogram": [
            {"method": "raw", "k": 4, "edges": [0.0, 0.5, 1.0], "counts": [3, 1]}
        ],
        "affine": [{"method": "resae", "hop": "blocks.1.x → blocks.3.x", "r2": 0.87}],
        "training": [{"method": "raw", "k": 4, "log": log}],
        "samples": [{"how": "plain", "prompt": "p <b>", "text": "t & u", "replaced": 0}],
        "findings": ["ReSAE < raw"],
        **changes,
    }


class _Balance(HTMLParser):
    """Fails on tags that do not match."""

    VOID = {"meta", "br", "img"}
    OPEN_ENDED = {"p", "html", "body"}

    def __init__(self):
        super().__init__()
        self.open = []
        self.links = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID | self.OPEN_ENDED:
            self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attrs):
        del tag
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID | self.OPEN_ENDED:
            assert self.open.pop() == tag


def test_page_is_one_self_contained_document(tmp_path):
    save_json(tmp_path / "report.json", report_of())
    page = write_report(tmp_path).read_text()
    checker = _Balance()
    checker.feed(page)
    assert checker.open == []
    assert all(link.startswith("#") for link in checker.links)
    assert page.count("<svg") == 5
    ids = re.findall(r'\sid="([^"]+)"', page)
    used = set(re.findall(r'(?:url\(|xlink:href=")#([^")]+)', page))
    assert used <= set(ids)
    for name in ("delta_ce", "ce_recovered", "redundancy", "r2", "training"):
        assert (tmp_path / "figures" / f"{name}.svg").read_text().startswith("<svg")


def test_text_is_escaped_and_numbers_are_shown(tmp_path):
    save_json(tmp_path / "report.json", report_of())
    page = write_report(tmp_path).read_text()
    assert "A &lt;test&gt; report" in page
    assert "p &lt;b&gt;" in page
    assert "ReSAE &lt; raw" in page
    assert "0.1234" in page
    assert "9.99" not in page  # the row of fewer layers is not in the table of all


def test_parts_without_data_are_left_out(tmp_path):
    report = report_of(affine=[], training=[], redundancy=[], redundancy_histogram=[])
    del report["samples"], report["findings"]
    save_json(tmp_path / "report.json", report)
    page = write_report(tmp_path).read_text()
    assert page.count("<svg") == 2
    assert "Training" not in page


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


def test_without_matplotlib_the_remedy_is_named_before_anything_is_drawn(tmp_path, monkeypatch):
    save_json(tmp_path / "report.json", report_of())
    monkeypatch.setattr("resae.report.figures.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"resae\[plots\]"):
        write_report(tmp_path)


def test_drawing_twice_gives_the_same_bytes(tmp_path):
    save_json(tmp_path / "report.json", report_of())
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_labels_and_selection(tmp_path):
    assert label("resae", "closed") == "ReSAE, closed loop"
    assert label("raw", None) == "raw SAEs"
    assert label("a new one") == "a new one"
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
