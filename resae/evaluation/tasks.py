"""Tasks of EleutherAI's evaluation harness (the package `lm-eval[hf]`) with all layers replaced.

The harness sees an ordinary Hugging Face model (`HFLM`), whose layers are replaced online while it
scores and writes. Its scores per document give intervals, and a difference from the unchanged model
that is paired.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from resae.evaluation.intervals import Bootstrap
from resae.evaluation.methods import Method
from resae.evaluation.rows import TaskRow
from resae.models.hooked import HookedLM
from resae.replacements.context import replacement

Scores = dict[tuple[str, str], list[float]]
"""Task and metric → score of every document, in their order."""


def task_rows(
    lm: HookedLM,
    methods: Sequence[Method],
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    documents: int | None = None,
    batch_size: int = 8,
    on_run: Callable[[int], None] | None = None,
) -> list[TaskRow]:
    """Score the unchanged model and every method in every loop on tasks of lm-eval.

    Args:
        tasks: names of tasks, of the harness or of `folder`.
        folder: YAML files of further tasks, such as ones with local data.
        documents: the first ones of each task; None: all.
        on_run: called with the number of models scored.

    Returns:
        Per task, metric with a number per document, and way of running the model one row; first
        those of the unchanged model.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError: no tokenizer, a task that there is not, or stacks of another model.
    """
    if lm.tokenizer is None:
        raise ValueError(f"tasks: model {lm.name} has no tokenizer; load it with one")
    for method in methods:
        method.stack.require_model(lm)
    manager = find_tasks(tasks, folder)
    runs = [(None, None), *((method, loop) for method in methods for loop in method.loops)]
    rows: list[TaskRow] = []
    plain: Scores = {}
    for done, (method, loop) in enumerate(runs, start=1):
        replaced = nullcontext()
        if method is not None:
            replaced = replacement(lm, method.stack, loop=loop or "open")
        with replaced:
            scores = _scores(lm, tasks, manager, documents, batch_size)
        plain = plain or scores
        for (task, metric), values in scores.items():
            bootstrap, ones = Bootstrap(len(values)), [1] * len(values)
            value = bootstrap.per_token(values, ones)
            change = None
            if method is not None:
                change = value - bootstrap.per_token(plain[task, metric], ones)
            columns: dict[str, Any] = bootstrap.columns("value", value)
            columns |= bootstrap.columns("difference", change)
            rows.append(
                TaskRow(
                    method=None if method is None else method.name,
                    loop=None if loop is None else str(loop),
                    k=None if method is None else method.k,
                    task=task,
                    metric=metric,
                    documents=len(values),
                    **columns,
                )
            )
        if on_run is not None:
            on_run(done)
    return rows


def find_tasks(tasks: Sequence[str], folder: Path | None = None) -> Any:
    """lm-eval's TaskManager, which knows these tasks.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError: a task that there is not.
    """
    try:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "tasks: lm_eval is not installed; pip install 'lm-eval[hf]'"
        ) from None
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if missing := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"tasks: lm-eval has no task {', '.join(missing)}; see `lm_eval ls tasks`")
    return manager


def _scores(
    lm: HookedLM, tasks: Sequence[str], manager: Any, documents: int | None, batch_size: int
) -> Scores:
    """Scores of the model as it is now."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    found: Any = simple_evaluate(
        model=HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=manager,
        limit=documents,
        bootstrap_iters=0,
        log_samples=True,
    )
    scores: Scores = {}
    for task, samples in found["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        for metric in samples[0]["metrics"]:
            values = [sample[metric] for sample in samples]
            if all(isinstance(value, int | float) for value in values):
                scores[task, metric] = [float(value) for value in values]
    return scores
