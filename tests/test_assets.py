import json
from collections import Counter

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from resae import HookedLM
from resae.assets import CORPUS, TINY_PYTHIA
from resae.data.rows import TokenRows
from resae.evaluation.metrics import cross_entropy

DOMAINS = {"bible", "wordnet", "jargon", "pysrc", "pydocs", "sqldoc", "csrc"}


def test_everything_together_stays_under_16_mb():
    files = [
        p for p in TINY_PYTHIA.parent.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    assert sum(p.stat().st_size for p in files) < 16e6


def test_the_model_opens_the_standard_way_in_half_precision():
    model = AutoModelForCausalLM.from_pretrained(TINY_PYTHIA)
    assert model.config.model_type == "gpt_neox"
    assert model.dtype == torch.float16
    tokenizer = AutoTokenizer.from_pretrained(TINY_PYTHIA)
    assert len(tokenizer) == model.config.vocab_size
    text = "def f(x):\n    return x  # naïve café"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_corpus_opens_the_standard_way_and_is_labelled():
    by_folder = load_dataset(str(CORPUS))
    files = {split: str(CORPUS / f"{split}.parquet") for split in ("train", "validation")}
    by_files = load_dataset("parquet", data_files=files)
    for split in files:
        assert by_folder[split].column_names == ["text", "domain"]
        assert by_folder[split]["text"] == by_files[split]["text"]
        assert set(Counter(by_folder[split]["domain"])) == DOMAINS
    assert not set(by_folder["train"]["text"]) & set(by_folder["validation"]["text"])


def test_the_model_beats_every_bigram_on_unseen_text_by_far():
    """Measured here, against the numbers that its training wrote down."""
    recorded = json.loads((TINY_PYTHIA / "training.json").read_text())
    lm = HookedLM.from_pretrained("embedded")
    texts = load_dataset(str(CORPUS), split="validation")["text"]
    rows = torch.stack(list(TokenRows(texts, lm.tokenizer, 128))[::8])
    batches = [cross_entropy(lm.logits(part), part) for part in rows.split(64)]
    measured = float(torch.cat(batches).mean())
    assert measured == pytest.approx(recorded["validation_ce"], abs=0.1)
    assert measured < recorded["bigram_conditional_entropy"] - 0.8
    assert recorded["validation_ce_float16_file"] == pytest.approx(
        recorded["validation_ce"], abs=1e-3
    )


def test_provenance_names_every_domain_and_licence():
    text = (TINY_PYTHIA.parent / "PROVENANCE.md").read_text()
    for word in (*DOMAINS, "WordNet 3.0", "PSF", "public domain", "SHA-256"):
        assert word in text
