import json
import sys

import pytest
import tiny
import torch

from resae import HookedLM, Method, replacement
from resae.evaluation.tasks import task_rows

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
QUESTIONS = [
    ("In the beginning", [" was the word", " it rained"], 0),
    ("And it came", [" late", " to pass"], 1),
    ("The cat", [" sat", " flew", " sang"], 0),
    ("Once upon", [" a time", " the hill"], 0),
    ("He said", [" unto them", " nothing"], 0),
    ("It was", [" a dark night", " blue"], 1),
]


@pytest.fixture(scope="module")
def lm():
    return HookedLM(tiny.pythia().model, tiny.tokenizer(), "tiny-neox")


def best_choices(lm):
    """Position of the likeliest choice of every question, by whole passes."""
    best = []
    for question, choices, _ in QUESTIONS:
        scores = []
        for choice in choices:
            before, after = (lm.tokenizer(part)["input_ids"] for part in (question, choice))
            of_next = lm.logits(torch.tensor([before + after]))[0, len(before) - 1 : -1]
            of_text = of_next.log_softmax(-1).gather(-1, torch.tensor(after)[:, None])
            scores.append(float(of_text.sum()))
        best.append(scores.index(max(scores)))
    return best


@pytest.mark.filterwarnings("ignore")  # of what lm-eval imports
def test_tasks_are_scored_with_the_layers_replaced(lm, tmp_path, monkeypatch):
    """A task on local data: the share of questions whose likeliest choice is the right one."""
    pytest.importorskip("lm_eval", reason="needs lm-eval[hf]")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "test.jsonl"
    keys = ("question", "choices", "answer")
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in QUESTIONS]
    data.write_text("\n".join(lines))
    (tmp_path / "local_choice.yaml").write_text(TASK.format(path=data))
    stack = tiny.stack(lm)
    rows = task_rows(lm, [Method("resae", stack, 4)], ["local_choice"], folder=tmp_path)
    found = {(row.method, row.loop): row for row in rows if row.metric == "acc"}
    assert list(found) == [(None, None), ("resae", "open"), ("resae", "closed")]
    answers = [answer for _, _, answer in QUESTIONS]
    plain = [a == b for a, b in zip(best_choices(lm), answers, strict=True)]
    assert found[None, None].value == pytest.approx(sum(plain) / 6)
    assert found[None, None].difference is None
    for loop in ("open", "closed"):
        with replacement(lm, stack, loop=loop):
            right = [a == b for a, b in zip(best_choices(lm), answers, strict=True)]
        row = found["resae", loop]
        assert row.documents == 6
        assert row.value == pytest.approx(sum(right) / 6)
        assert row.difference == pytest.approx((sum(right) - sum(plain)) / 6)
        assert row.value_low <= row.value <= row.value_high
    with pytest.raises(ValueError, match="lm-eval has no task absent"):
        task_rows(lm, [], ["absent"], folder=tmp_path)


def test_without_the_harness_the_error_says_what_to_install(lm, monkeypatch):
    for module in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ModuleNotFoundError, match=r"lm_eval is not installed; pip install 'lm-eval"
    ):
        task_rows(lm, [], ["any"])
    with pytest.raises(ValueError, match="has no tokenizer"):
        task_rows(HookedLM(lm.model, None, "tiny"), [], ["any"])
