"""Paths of the files that ship with the package: a tiny language model and its corpus.

Both are made by `resae.assets.build`; `PROVENANCE.md` in this folder names the sources and
their licences.
"""

from pathlib import Path

TINY_PYTHIA = Path(__file__).parent / "tiny-pythia"
CORPUS = Path(__file__).parent / "corpus"
