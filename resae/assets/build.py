"""Make everything under this folder: the corpus, the tokenizer and the tiny language model.

    python -m resae.assets.build corpus --packages DIR     # corpus/*.parquet, half a minute
    python -m resae.assets.build tokenizer                 # tiny-pythia/tokenizer*.json, seconds
    python -m resae.assets.build model --state DIR         # tiny-pythia/*, about an hour, one core
    python -m resae.assets.build all --packages DIR --state DIR
    python -m resae.assets.build export --state DIR --out OTHER   # the last checkpoint, any time

`--packages` names a folder with the Debian bookworm packages in `PACKAGES`; a missing or different
file stops the build with the command that fetches the right one. Unpacking needs `dpkg-deb`, and
`gzip` for the text of the Bible. `--state` names the folder of the training checkpoint, from which
an interrupted `model` goes on where it stood. `--out` defaults to this folder. Every random choice
follows from `SEED`: with the library versions in `PROVENANCE.md` the corpus and the tokenizer come
out byte for byte the same, and the model does as far as the two machines round sums alike.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import subprocess
import tarfile
import tempfile
import textwrap
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

SEED = 20240
DOMAIN_CHARACTERS = 2_400_000
PIECE_CHARACTERS = 4_000
HOLD_OUT_EVERY = 12

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 128

BATCH_ROWS = 16
STEPS = 9000
WARMUP_STEPS = 100
MUON_LR = 0.02
ADAMW_LR = 1e-2
WEIGHT_DECAY = 0.05
CLIP_NORM = 1.0
LOG_EVERY = 50
EVALUATE_EVERY = 400
CHECKPOINT_EVERY = 300
QUICK_EVALUATION_ROWS = 240
BIGRAM_PRIOR = 50.0

PACKAGES = {
    "bible-kjv-text_4.38_all.deb": (
        "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a"
    ),
    "dict-jargon_4.4.7-3.1_all.deb": (
        "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1"
    ),
    "libpython3.11-minimal_3.11.2-6+deb12u9_amd64.deb": (
        "69f41cfa3f4ba17284e538f843069d7529c53c207d2ae17a5b02785944870e33"
    ),
    "libpython3.11-stdlib_3.11.2-6+deb12u9_amd64.deb": (
        "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53"
    ),
    "python3.11-doc_3.11.2-6+deb12u9_all.deb": (
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be"
    ),
    "sqlite3-doc_3.40.1-2+deb12u2_all.deb": (
        "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2"
    ),
    "wordnet-base_1%3a3.0-37_all.deb": (
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"
    ),
    "sqlite3_3.40.1.orig.tar.xz": (
        "aaa776260ab4dc976db34aa7891819484c8676b5b2783123ebc6301e2ca5d655"
    ),
}

BIBLE_BOOKS = """\
Genesis, Exodus, Leviticus, Numbers, Deuteronomy, Joshua, Judges, Ruth, 1 Samuel, 2 Samuel, 1 Kings,
2 Kings, 1 Chronicles, 2 Chronicles, Ezra, Nehemiah, Esther, Job, Psalms, Proverbs, Ecclesiastes,
Song of Solomon, Isaiah, Jeremiah, Lamentations, Ezekiel, Daniel, Hosea, Joel, Amos, Obadiah, Jonah,
Micah, Nahum, Habakkuk, Zephaniah, Haggai, Zechariah, Malachi, Matthew, Mark, Luke, John, Acts,
Romans, 1 Corinthians, 2 Corinthians, Galatians, Ephesians, Philippians, Colossians,
1 Thessalonians, 2 Thessalonians, 1 Timothy, 2 Timothy, Titus, Philemon, Hebrews, James, 1 Peter,
2 Peter, 1 John, 2 John, 3 John, Jude, Revelation"""
HTML_BLOCKS = frozenset(
    ("p", "h1", "h2", "h3", "h4", "h5", "li", "ul", "ol", "dl", "dt", "dd", "tr", "table")
    + ("blockquote", "div", "pre", "br", "title")
)

TYPOGRAPHY = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2022": "*",
        "\u00b7": "*",
        "\u00d7": "x",
        "\u2190": "<-",
        "\u2192": "->",
        "\u2264": "<=",
        "\u2265": ">=",
        "\u00a9": "(C)",
    }
)

OWN_NOTICE = re.compile(
    r"copyright\s+(?:\(c\)|\d{4}|by)|\(c\)\s+copyright|\(c\)\s+\d{4}|:copyright:|__copyright__"
    r"|copyright\s+\w+\s+enterprises|all rights reserved|permission (?:to use|is hereby)"
    r"|SPDX-|licensed under|MIT license|apache license|GNU general public",
    re.IGNORECASE,
)
PSF_NOTICE = re.compile(r"python software foundation|licensed to (?:the )?PSF", re.IGNORECASE)


# ---------------------------------------------------------------------------------------- corpus


def check_packages(packages: Path) -> None:
    """Stop with the command that fetches it when a package is missing or not the one recorded."""
    for name, expected in PACKAGES.items():
        path = packages / name
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == expected:
            continue
        package, version = name.replace("%3a", ":").split("_")[:2]
        fetch = f"apt-get download '{package}={version}'"
        if ".orig." in name:
            fetch = "apt-get source --download-only sqlite3   (with bookworm's deb-src line)"
        problem = "is not the file recorded here" if path.exists() else "is missing"
        raise SystemExit(f"{path} {problem}; fetch it with:\n  {fetch}\nexpected sha256 {expected}")


def unpack(packages: Path, into: Path) -> None:
    """Unpack every package over the same root, the SQLite sources beside it."""
    for name in PACKAGES:
        if name.endswith(".deb"):
            subprocess.run(["dpkg-deb", "-x", packages / name, into], check=True)
        else:
            with tarfile.open(packages / name) as archive:
                archive.extractall(into, filter="data")


def clean(text: str) -> str:
    """ASCII, no tabs, no trailing blanks, at most one empty line in a row."""
    text = unicodedata.normalize("NFKD", text.translate(TYPOGRAPHY))
    text = text.encode("ascii", "ignore").decode().replace("\r\n", "\n").expandtabs(4)
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", "", text)
    text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def carries_own_licence(text: str) -> bool:
    """True if a source file names a holder or a licence that is not the PSF's."""
    named = [line for line in text.splitlines() if OWN_NOTICE.search(line)]
    return any(not PSF_NOTICE.search(line) for line in named)


def shuffled_files(root: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files under `root` that match, in an order that depends on their names and `SEED`.

    Links are left out: those of a package may lead to files of the machine that builds.
    """
    matching = {path for pattern in patterns for path in root.glob(pattern)}
    files = sorted(path for path in matching if not path.is_symlink())
    random.Random(SEED).shuffle(files)
    return files


def bible(root: Path) -> Iterator[str]:
    """Chapters of the King James Version.

    The file is a table of windows, each one LZW-compressed as by compress(1) but without its
    three-byte header, which `gzip` needs to read it. A line is `Ge1:1 In the beginning ...`.
    """
    data = (root / "usr/lib/bible.data").read_bytes()
    windows = int.from_bytes(data[0x58:0x5C], "big")
    table = np.frombuffer(data, dtype=">u4", count=windows, offset=0x5C).tolist()
    text = b"".join(
        subprocess.run(
            ["gzip", "-dc"],
            input=b"\x1f\x9d\x90" + data[start:end],
            capture_output=True,
            check=True,
        ).stdout
        for start, end in zip(table, [*table[1:], len(data)], strict=True)
    ).decode("latin-1")
    chapters: dict[tuple[str, str], list[str]] = defaultdict(list)
    for book, chapter, verse in re.findall(r"^(\d?[A-Za-z]+)(\d+):(\d+ .*)$", text, re.MULTILINE):
        chapters[book, chapter].append(verse)
    titles = re.split(r",\s", BIBLE_BOOKS)
    names = dict(zip(dict.fromkeys(book for book, _ in chapters), titles, strict=True))
    documents = [
        f"{names[book]} {chapter}\n" + "\n".join(verses)
        for (book, chapter), verses in chapters.items()
    ]
    random.Random(SEED).shuffle(documents)
    yield from documents


def wordnet(root: Path) -> Iterator[str]:
    """Glosses as `word (part of speech): gloss`, shuffled, twenty to a document."""
    glosses = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (root / f"usr/share/wordnet/data.{part}").read_text("latin-1").splitlines():
            if not line.startswith(" "):
                synset, gloss = line.split(" | ", 1)
                word = re.sub(r"\(\w+\)$", "", synset.split()[4]).replace("_", " ")
                glosses.append(f"{word} ({part}): {gloss.strip().rstrip(';')}")
    random.Random(SEED).shuffle(glosses)
    for start in range(0, len(glosses), 20):
        yield "\n".join(glosses[start : start + 20])


def jargon(root: Path) -> Iterator[str]:
    """Entries of the Jargon File, by the offsets of the dict index, its header entries left out."""
    folder = root / "usr/share/dictd"
    text = subprocess.run(
        ["gzip", "-dc"],
        input=(folder / "jargon.dict.dz").read_bytes(),
        capture_output=True,
        check=True,
    ).stdout
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(digits: str) -> int:
        value = 0
        for digit in digits:
            value = value * 64 + alphabet.index(digit)
        return value

    spans = set()
    for line in (folder / "jargon.index").read_text().splitlines():
        word, offset, length = line.split("\t")
        if not word.startswith(("00-database", "00database")):
            spans.add((number(offset), number(length)))
    entries = [text[offset : offset + length].decode() for offset, length in sorted(spans)]
    random.Random(SEED).shuffle(entries)
    for entry in entries:
        yield textwrap.dedent(re.sub(r"^    ", "", entry, flags=re.MULTILINE))


def pysrc(root: Path) -> Iterator[str]:
    """Modules of the Python standard library that carry no notice but the PSF's.

    Tables (encodings, generated data) are left out: they are not prose of a programmer.
    """
    library = root / "usr/lib/python3.11"
    for path in shuffled_files(library, ("**/*.py",)):
        text = path.read_text("utf-8", "replace")
        table = path.relative_to(library).parts[0] in {"encodings", "pydoc_data"}
        packaged = path.name.startswith(("_sysconfigdata", "_distutils_system_mod"))
        if not (table or packaged or carries_own_licence(text)):
            yield text


def pydocs(root: Path) -> Iterator[str]:
    """Sources of the Python documentation, without the changelog and the pages of licences."""
    sources = root / "usr/share/doc/python3.11/html/_sources"
    left_out = {"changelog.rst.txt", "license.rst.txt", "copyright.rst.txt", "contents.rst.txt"}
    for path in shuffled_files(sources, ("**/*.rst.txt",)):
        text = path.read_text("utf-8")
        if path.name not in left_out and not carries_own_licence(text):
            yield text


class _PageText(HTMLParser):
    """The readable text of one page of the SQLite documentation."""

    SILENT = frozenset(("script", "style", "svg"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._silent = 0
        self._navigation = 0
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SILENT:
            self._silent += 1
        elif tag == "div" and (self._navigation or ("class", "nosearch") in attrs):
            self._navigation += 1
        elif tag == "pre":
            self._preformatted += 1
        if tag in HTML_BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SILENT:
            self._silent = max(0, self._silent - 1)
        elif tag == "div" and self._navigation:
            self._navigation -= 1
        elif tag == "pre":
            self._preformatted = max(0, self._preformatted - 1)
        if tag in HTML_BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not (self._silent or self._navigation):
            self.parts.append(data if self._preformatted else re.sub(r"\s+", " ", data))


def sqldoc(root: Path) -> Iterator[str]:
    """Pages of the SQLite documentation, without indexes, agreements and the one-page reference."""
    pages = root / "usr/share/doc/sqlite3"
    left_out = re.compile(
        r"^(doc_|keyword_index|requirements|sitemap|syntaxdiagrams|capi3ref|consortium|copyright"
        r"|prosupport|support|pressrelease|codeof|news|oldnews|index|famous|books|crew)"
    )
    for path in shuffled_files(pages, ("*.html", "c3ref/*.html", "session/*.html")):
        if not left_out.match(path.name):
            page = _PageText()
            page.feed(path.read_text("utf-8", "replace"))
            text = re.sub(r"\n *(?=\n|\S)", "\n", "".join(page.parts))
            yield text.split("This page last modified")[0]


def csrc(root: Path) -> Iterator[str]:
    """C sources of SQLite that say that the author disclaims copyright, and nothing else."""
    sources = root / "sqlite3-3.40.1"
    for path in shuffled_files(sources, ("src/*.[chy]", "ext/*/*.[ch]")):
        text = path.read_text("utf-8", "replace")
        if "disclaims copyright" in text[:1000] and not carries_own_licence(text):
            yield text


DOMAINS: dict[str, Callable[[Path], Iterator[str]]] = {
    "bible": bible,
    "wordnet": wordnet,
    "jargon": jargon,
    "pysrc": pysrc,
    "pydocs": pydocs,
    "sqldoc": sqldoc,
    "csrc": csrc,
}


def cut(text: str) -> Iterator[str]:
    """Pieces of at most `PIECE_CHARACTERS`, cut between lines where the lines allow it."""
    piece = ""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), PIECE_CHARACTERS):
            part = line[start : start + PIECE_CHARACTERS]
            if len(piece) + len(part) > PIECE_CHARACTERS:
                yield piece
                piece = ""
            piece += part
    if piece.strip():
        yield piece


def build_corpus(packages: Path, out: Path) -> None:
    """Write `corpus/train.parquet` and `corpus/validation.parquet`, columns text and domain."""
    check_packages(packages)
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    with tempfile.TemporaryDirectory() as folder:
        unpack(packages, Path(folder))
        for domain, documents in DOMAINS.items():
            pieces, characters, taken = [], 0, 0
            for document in map(clean, documents(Path(folder))):
                if characters >= DOMAIN_CHARACTERS:
                    break
                document = document[: DOMAIN_CHARACTERS - characters]
                characters += len(document)
                taken += 1
                pieces += cut(document)
            for index, piece in enumerate(pieces):
                held_out = index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
                split = splits["validation" if held_out else "train"]
                split.append({"text": piece, "domain": domain})
            print(
                f"{domain:8} {taken:5} documents {len(pieces):5} pieces {characters / 1e6:.3f} MB"
            )
    (out / "corpus").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        random.Random(SEED).shuffle(rows)
        target = out / "corpus" / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), target, compression="zstd", compression_level=19)
        print(f"{target}: {len(rows)} rows, {target.stat().st_size / 1e6:.2f} MB")


def read_corpus(out: Path, split: str) -> list[dict[str, str]]:
    """The rows of one split."""
    return pq.read_table(out / "corpus" / f"{split}.parquet").to_pylist()


# ------------------------------------------------------------------------------------- tokenizer


def build_tokenizer(out: Path) -> None:
    """Train the byte-level BPE on the training split and save it as a transformers tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] for row in read_corpus(out, "train")), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out / "tiny-pythia")
    print(f"{out / 'tiny-pythia'}: tokenizer of {len(fast)} tokens")


# ----------------------------------------------------------------------------------------- model


def pack(out: Path, split: str, domain: str | None = None) -> torch.Tensor:
    """Rows of 128 token ids: id 0, then 127 tokens of the stream of pieces, id 0 between pieces."""
    tokenizer = Tokenizer.from_file(str(out / "tiny-pythia" / "tokenizer.json"))
    texts = [row["text"] for row in read_corpus(out, split) if domain in (None, row["domain"])]
    stream = [token for piece in tokenizer.encode_batch(texts) for token in (*piece.ids, 0)]
    rows = torch.tensor(stream[: len(stream) // (CONTEXT - 1) * (CONTEXT - 1)])
    return nn.functional.pad(rows.view(-1, CONTEXT - 1), (1, 0), value=0)


def new_model() -> GPTNeoXForCausalLM:
    """A freshly initialised model of the Pythia architecture, 2.1 M parameters."""
    torch.manual_seed(SEED)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def optimizers(model: GPTNeoXForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head, biases and norms."""
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        inside = ".layers." in name and parameter.ndim == 2
        (hidden if inside else rest).append(parameter)
    return [
        torch.optim.Muon(
            hidden, lr=MUON_LR, momentum=0.95, nesterov=True, weight_decay=WEIGHT_DECAY
        ),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, steps: int) -> float:
    """A linear warm-up, then a linear decay that ends just above zero at the last step."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup), 1.0)


def cross_entropy(model: GPTNeoXForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean nats per token over the 127 predicted positions of every row."""
    logits = model(rows, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: GPTNeoXForCausalLM, rows: torch.Tensor) -> float:
    """Cross-entropy over all rows, the model in evaluation mode."""
    model.eval()
    total = sum(cross_entropy(model, part).item() * len(part) for part in rows.split(64))
    model.train()
    return total / len(rows)


def batch_at(rows: torch.Tensor, step: int) -> torch.Tensor:
    """The batch of a step: each epoch a new seeded order, so that a resumed run sees the same."""
    per_epoch = len(rows) // BATCH_ROWS
    epoch, index = divmod(step, per_epoch)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED + epoch))
    return rows[order[index * BATCH_ROWS : (index + 1) * BATCH_ROWS]]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a neighbour, then rename it, so that no half-written file is ever seen."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def save_checkpoint(
    path: Path,
    step: int,
    model: GPTNeoXForCausalLM,
    optims: list[torch.optim.Optimizer],
    log: list[dict[str, float]],
) -> None:
    """Write all that a resumed run needs."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optim.state_dict() for optim in optims],
        "log": log,
    }
    write_atomically(path, lambda partial: torch.save(state, partial))


def train(out: Path, state: Path, steps: int) -> tuple[GPTNeoXForCausalLM, list[dict[str, float]]]:
    """Train for `steps` steps, going on from the checkpoint in `state` if there is one."""
    torch.set_num_threads(1)
    state.mkdir(parents=True, exist_ok=True)
    rows = pack(out, "train")
    quick = pack(out, "validation")
    quick = quick[:: max(1, len(quick) // QUICK_EVALUATION_ROWS)]
    model = new_model().train()
    optims = optimizers(model)
    base = [[group["lr"] for group in optim.param_groups] for optim in optims]
    log: list[dict[str, float]] = []
    first = 0
    checkpoint = state / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optim, values in zip(optims, saved["optimizers"], strict=True):
            optim.load_state_dict(values)
        first, log = saved["step"], saved["log"]
    print(
        f"{len(rows)} rows of {CONTEXT}, {len(rows) // BATCH_ROWS} steps per epoch; "
        f"steps {first} to {steps}",
        flush=True,
    )
    started, window = time.monotonic(), []
    for step in range(first, steps):
        for optim, lrs in zip(optims, base, strict=True):
            for group, lr in zip(optim.param_groups, lrs, strict=True):
                group["lr"] = lr * learning_rate_factor(step, steps)
        loss = cross_entropy(model, batch_at(rows, step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        window.append(loss.item())
        done = step + 1
        if done % LOG_EVERY == 0 or done == steps:
            rate = (done - first) / (time.monotonic() - started)
            entry = {"step": done, "train_ce": round(sum(window) / len(window), 4)}
            if done % EVALUATE_EVERY == 0 or done == steps:
                entry["validation_subset_ce"] = round(evaluate(model, quick), 4)
            log.append(entry)
            window = []
            print(
                f"{json.dumps(entry)}  {rate * BATCH_ROWS * CONTEXT:.0f} tokens/s, "
                f"{(steps - done) / rate / 60:.1f} min left",
                flush=True,
            )
        if done % CHECKPOINT_EVERY == 0 or done == steps:
            save_checkpoint(checkpoint, done, model, optims, log)
    return model, log


def ngram_numbers(train_rows: torch.Tensor, held_out: torch.Tensor) -> dict[str, float]:
    """Entropies from token counts alone, in nats per token, over the positions the model predicts.

    The entropies are those of the empirical distributions of the training rows; the held-out bigram
    adds `BIGRAM_PRIOR` pseudo-counts in the proportions of the add-one smoothed unigram.
    """
    pairs = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    ones = torch.ones(train_rows[:, 1:].numel(), dtype=torch.float64)
    pairs.index_put_(
        (train_rows[:, :-1].flatten(), train_rows[:, 1:].flatten()), ones, accumulate=True
    )
    unigram = pairs.sum(0) / pairs.sum()
    joint = pairs / pairs.sum()
    contexts = pairs.sum(1, keepdim=True)
    smooth_unigram = (pairs.sum(0) + 1) / (pairs.sum() + VOCABULARY)
    smooth = (pairs + BIGRAM_PRIOR * smooth_unigram) / (contexts + BIGRAM_PRIOR)
    held_out_bigram = -smooth[held_out[:, :-1], held_out[:, 1:]].log().mean()
    held_out_unigram = -smooth_unigram[held_out[:, 1:]].log().mean()
    entropy = -torch.special.xlogy(unigram, unigram).sum()
    pair_entropy = -torch.special.xlogy(joint, joint).sum()
    first = (contexts / contexts.sum()).flatten()
    context_entropy = -torch.special.xlogy(first, first).sum()
    return {
        "unigram_entropy": round(entropy.item(), 4),
        "bigram_conditional_entropy": round((pair_entropy - context_entropy).item(), 4),
        "held_out_unigram_ce": round(held_out_unigram.item(), 4),
        "held_out_bigram_ce": round(held_out_bigram.item(), 4),
    }


def export(model: GPTNeoXForCausalLM, folder: Path) -> None:
    """Save the weights in half precision, with their configuration."""
    half = GPTNeoXForCausalLM(model.config).half()
    half.load_state_dict(model.state_dict())
    half.config.dtype = torch.float16
    half.generation_config.pad_token_id = 0
    half.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def build_model(out: Path, state: Path, steps: int) -> None:
    """Train, export, load the exported files back, and write down what was measured."""
    model, log = train(out, state, steps)
    folder = out / "tiny-pythia"
    export(model, folder)
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    (folder / "training_log.jsonl").write_text(lines)
    train_rows, held_out = pack(out, "train"), pack(out, "validation")
    loaded = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32)
    numbers = {
        "unit": "nats per token, all 127 positions after the first of each row",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "tokens_per_step": BATCH_ROWS * CONTEXT,
        "epochs": round(steps / (len(train_rows) // BATCH_ROWS), 3),
        "train_rows": len(train_rows),
        "validation_rows": len(held_out),
        "validation_ce": round(evaluate(model, held_out), 4),
        "validation_ce_float16_file": round(evaluate(loaded, held_out), 4),
        "validation_ce_float16_file_per_domain": {
            domain: round(evaluate(loaded, pack(out, "validation", domain)), 4)
            for domain in DOMAINS
        },
        "train_ce_last_2000_rows": round(evaluate(loaded, train_rows[-2000:]), 4),
        "vocabulary_uniform": round(math.log(VOCABULARY), 4),
        **ngram_numbers(train_rows, held_out),
    }
    (folder / "training.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(json.dumps(numbers, indent=2), flush=True)


def export_checkpoint(out: Path, state: Path) -> None:
    """Save the last checkpoint in `out/tiny-pythia` with the tokenizer; for use before the end."""
    saved = torch.load(state / "checkpoint.pt", weights_only=True)
    model = new_model()
    model.load_state_dict(saved["model"])
    folder = out / "tiny-pythia"
    export(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(__file__).parent / "tiny-pythia" / name).read_bytes())
    print(f"{folder}: the model after {saved['step']} steps")


def main() -> None:
    """Run one part of the build, or all of them in order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["corpus", "tokenizer", "model", "all", "export"])
    parser.add_argument("--packages", type=Path, help="folder of the Debian packages")
    parser.add_argument("--state", type=Path, help="folder of the training checkpoint")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=STEPS)
    chosen = parser.parse_args()
    if chosen.part in ("corpus", "all"):
        if chosen.packages is None:
            parser.error("--packages is needed for the corpus")
        build_corpus(chosen.packages, chosen.out)
    if chosen.part in ("tokenizer", "all"):
        build_tokenizer(chosen.out)
    if chosen.part in ("model", "all", "export") and chosen.state is None:
        parser.error("--state is needed for the model")
    if chosen.part in ("model", "all"):
        build_model(chosen.out, chosen.state, chosen.steps)
    if chosen.part == "export":
        export_checkpoint(chosen.out, chosen.state)


if __name__ == "__main__":
    main()
