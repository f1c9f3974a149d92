"""Docstrings, and the texts after fields that `--help` is made of, are sentences of their own."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for name in ("resae", "resae_kernels") for p in (ROOT / name).rglob("*.py"))
HEADLESS = re.compile(r"\s*(What|Of|Those|That|How|Where|Whether|When|So|Which|Who)\b")
"""First words of a clause that nobody understands without the name of what it describes."""


def texts(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and text of every string that stands alone: docstrings, and those after a field."""
    return [
        (node.lineno, node.value.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


def headless(source: str) -> list[int]:
    return [line for line, text in texts(ast.parse(source)) if HEADLESS.match(text)]


def test_a_headless_text_is_found_wherever_it_stands():
    assert headless('"""What it is."""') == [1]
    assert headless('def f():\n    """\n    Of a batch."""') == [2]
    assert headless('class C:\n    x: int\n    """Whether so."""') == [3]
    assert headless('class C:\n    """Whereabouts of a layer."""\n    y = "What"') == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_docstring_is_headless(path):
    assert headless(path.read_text()) == [], path
