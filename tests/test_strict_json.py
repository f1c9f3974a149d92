import json

import pytest

from resae import strict_json
from resae.strict_json import brief, parse, require_fields


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is given twice"),
        ("[" * 90_000 + "]" * 90_000, "nested"),
        ("[" * 101 + "]" * 101, "nested more than 100"),
        ('{"a": NaN}', "NaN is no number"),
        ("1e999", "beyond 64 bits"),
        ("9" * 5_000, "beyond 64 bits"),
        (str(2**63), "beyond 64 bits"),
        ('{"a": 1', "not valid JSON"),
    ],
)
def test_what_is_refused_is_named_in_one_short_line(text, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse(text, "stack: file")
    assert str(raised.value).startswith("stack: file")
    assert len(str(raised.value)) < 200
    assert "\n" not in str(raised.value)


def test_ordinary_json_is_read_as_by_json(tmp_path):
    content = {"a": [1, -(2**63) + 1, 0.5, None, True, "ö\n"], "b": {"a": {}}}
    assert parse(json.dumps(content), "file") == content
    (tmp_path / "j.json").write_text(json.dumps(content))
    assert strict_json.read(tmp_path / "j.json", "file") == content


def test_a_large_file_is_refused_by_its_size(tmp_path):
    with (tmp_path / "j.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would take a terabyte
    with pytest.raises(ValueError, match=r"1,099,511,627,776 bytes, expected at most 16,777,216"):
        strict_json.read(tmp_path / "j.json", "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"^file: got \[\], expected names and values"),
        ({}, "^file has no a, expected text"),
        ({"a": 1}, "a = 1, expected text"),
        ({"a": "", "b": [True]}, r"b = \[True\], expected a list, each a whole number"),
        ({"a": "", "c": "x" * 10_000}, "c = 'xxx.*xxx', expected a number or null"),
    ],
)
def test_entries_have_the_types_that_are_expected(content, message):
    expected = {"a": str, "b": ([int], None), "c": (float, None)}
    with pytest.raises(ValueError, match=message) as raised:
        require_fields(content, expected, "file")
    assert len(str(raised.value)) < 200
    assert require_fields({"a": "", "c": 1, "d": 2}, expected, "file")["c"] == 1


def test_a_brief_value_has_no_line_ends_and_is_short():
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    for value in (deep, "\ud800\n" * 1_000, {str(i): i for i in range(100)}, 10**4000):
        assert len(brief(value)) < 500
        assert "\n" not in brief(value)
        brief(value).encode()
