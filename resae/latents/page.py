"""One self-contained page of latent cards: searchable, and nothing is loaded from elsewhere.

The cards are JSON in the page; its script draws those that are looked at, with every text as a text
node. A content-security policy allows that one script and style, by their hashes, and no request.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from resae.latents.cards import TokenTexts
from resae.latents.prompt import PromptLatents
from resae.latents.records import LatentCard, LatentReport, Passage, TokenEffect
from resae.report.page import content_policy, page_style
from resae.storage import write_atomically

TEMPLATE = Path(__file__).parent / "template"


class _TextTable:
    """Texts of tokens, each held once."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._known: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        if text not in self._known:
            self._known[text] = len(self.texts)
            self.texts.append(text)
        return self._known[text]


def latents_page(
    report: LatentReport, prompt: PromptLatents | None = None, texts: TokenTexts | None = None
) -> str:
    """The page as HTML.

    Args:
        prompt: a prompt to show above the cards, and `texts` of its tokens.
    """
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    style = page_style() + (TEMPLATE / "page.css").read_text()
    script = (TEMPLATE / "page.js").read_text()
    layers = [
        {"name": name, "d_sae": d_sae, "never_fired": never}
        for name, d_sae, never in zip(report.layers, report.d_sae, report.never_fired, strict=True)
    ]
    template = Environment(loader=FileSystemLoader(TEMPLATE), autoescape=True).get_template(
        "page.html.jinja"
    )
    return template.render(
        title=f"Latents of {report.stack or report.model}",
        policy=content_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        content=Markup(_content(report, prompt, texts)),
        report=report,
        data=report.settings.get("data"),
        layers=layers,
        prompt=prompt,
    )


def write_json(path: Path, report: LatentReport, prompt: PromptLatents | None = None) -> None:
    """Write `LatentReport.to_dict`, with the fields of a prompt under `prompt`, whole or not at
    all."""
    content = report.to_dict() | ({} if prompt is None else {"prompt": asdict(prompt)})
    text = json.dumps(content, allow_nan=False)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_page(
    path: Path,
    report: LatentReport,
    prompt: PromptLatents | None = None,
    texts: TokenTexts | None = None,
) -> None:
    """Write `latents_page`, whole or not at all."""
    page = latents_page(report, prompt, texts)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _content(report: LatentReport, prompt: PromptLatents | None, texts: TokenTexts | None) -> str:
    """JSON for the page's script, in which no tag can begin or end."""
    table = _TextTable()
    content: dict[str, Any] = {
        "layers": report.layers,
        "latents": [_card(card, report.layers, table) for card in report.latents],
    }
    if prompt is not None and texts is not None:
        content["prompt"] = {
            "tokens": [table(text) for text in texts.row(prompt.token_ids)],
            "strongest": prompt.strongest,
        }
    content["texts"] = table.texts
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _card(card: LatentCard, layers: Sequence[str], table: _TextTable) -> dict[str, Any]:
    return {
        "layer": card.layer,
        "latent": card.latent,
        "firings": card.firings,
        "density": card.density,
        "mean_act": card.mean_act,
        "largest_act": card.largest_act,
        "bin_width": card.bin_width,
        "histogram": card.histogram,
        "passages": [_passage(passage, table) for passage in card.passages],
        "samples": [_passage(passage, table) for passage in card.samples],
        "raised": [_effect(effect, table) for effect in card.raised],
        "lowered": [_effect(effect, table) for effect in card.lowered],
        "nearest": [
            [layers.index(other.hook_point), other.latent, other.cosine, other.transported_cosine]
            for other in card.nearest
        ],
        "ablation": card.ablation and vars(card.ablation),
    }


def _passage(passage: Passage, table: _TextTable) -> dict[str, Any]:
    return {
        "row": passage.row,
        "start": passage.start,
        "peak": passage.peak,
        "tokens": [table(token) for token in passage.tokens],
        "acts": [[i, act] for i, act in enumerate(passage.acts) if act > 0],
    }


def _effect(effect: TokenEffect, table: _TextTable) -> list[Any]:
    return [table(effect.token), effect.logit]
