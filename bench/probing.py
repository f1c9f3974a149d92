"""Sparse probing and TPP of one layer by SAEBench's own code and by ours, on the same texts.

    python -m bench.probing RUN --layer 1 --out FILE    # needs sae-bench, see tests/peers

SAEBench runs with its own pooling, selection of latents, probes and scores. Of ours it gets the
activations of the language model, which it would load by TransformerLens, and the documents of each
task: it draws the other classes anew for every probe, so that two of its own runs differ.

For TPP our formula gets the probes that SAEBench trained. SAEBench also ablates latents at padding
and special tokens, which it has set to 0 and which then have codes of their own: the two are equal
on documents that fill the context.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from resae import HookedLM, Method, ReSAE
from resae.data.labelled import Documents, LabelledTexts, load_labelled
from resae.evaluation import perturbation
from resae.evaluation.linear_probes import Probe
from resae.evaluation.pooling import CodeSource, PooledDocuments, pool_documents
from resae.evaluation.probing import Task, one_against_rest, sparse_probing
from resae.evaluation.scores import ScoredDocuments, units_of
from resae.stack.affine import AffinePredictor

DATA = "local"
KS = (1, 2, 5)


class Material(NamedTuple):
    """One autoencoder of activations at one hook point, and labelled documents."""

    lm: HookedLM
    stack: ReSAE
    texts: LabelledTexts
    tasks: list[Task]
    context_tokens: int

    @classmethod
    def of(cls, lm: HookedLM, stack: ReSAE, texts: LabelledTexts, context_tokens: int):
        """`stack` has one layer."""
        return cls(lm, stack, texts, one_against_rest(texts), context_tokens)

    def pooled(self) -> tuple[CodeSource, PooledDocuments]:
        texts = [*self.texts.train.texts, *self.texts.test.texts]
        # As SAEBench tokenizes: BOS only where the tokenizer adds it.
        ids = self.lm.tokenizer(texts, truncation=True, max_length=self.context_tokens)["input_ids"]
        source = CodeSource(Method("raw", self.stack, self.stack.sae(0).config.k), None)
        return source, pool_documents(self.lm, [source], ids)

    @property
    def scored(self) -> ScoredDocuments:
        first = len(self.texts.train.labels)
        return ScoredDocuments(self.texts.test.labels, first=first, resamples=200)


def ours(material: Material) -> dict[str, dict[str, float]]:
    """Accuracy per metric and class, by SAEBench's names where it has the same metric."""
    source, pooled = material.pooled()
    units = units_of([source], pooled, material.stack.hook_points)
    found = {}
    for score in sparse_probing(units, material.tasks, material.scored, ks=KS):
        name = "llm" if score.method == "channels" else "sae"
        size = f"top_{score.size}_test_accuracy" if score.size else "all_held_out_accuracy"
        found[f"{name}_{size}"] = score.classes
    return found


def sae_bench(material: Material) -> dict[str, dict[str, float]]:
    """The same by SAEBench, which has no `llm_all_held_out_accuracy` but `llm_test_accuracy` and
    `sae_test_accuracy`, of the epoch with the best accuracy on the test documents."""
    from sae_bench.evals.sparse_probing import main
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    config = SparseProbingEvalConfig(**_common(material), k_values=list(KS))
    with _in_place(material), tempfile.TemporaryDirectory() as folder:
        _, classes = main.run_eval_single_sae(
            config, _autoencoder(material), _model(material), "cpu", folder, save_activations=False
        )
    return classes[f"{DATA}_results"]


def tpp(
    material: Material, sizes: tuple[int, ...]
) -> tuple[dict[int, float], dict[int, float], dict[int, float]]:
    """TPP for each number of latents: ours, ours with SAEBench's probes, and SAEBench's."""
    from sae_bench.evals.scr_and_tpp import main
    from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
    from sae_bench.evals.sparse_probing import probe_training

    trained: list[Any] = []
    train = probe_training.train_probe_on_activations

    def record(*arguments: Any, **options: Any) -> Any:
        trained.append(train(*arguments, **options))
        return trained[-1]

    options = {"perform_scr": False, "n_values": list(sizes)}
    config = ScrAndTppEvalConfig(**_common(material), **options)
    with (
        _in_place(material),
        mock.patch.object(probe_training, "train_probe_on_activations", record),
        mock.patch.dict(main.COLUMN2_VALS_LOOKUP, {DATA: None}),
        tempfile.TemporaryDirectory() as folder,
    ):
        results, _ = main.run_eval_single_sae(
            config, _autoencoder(material), _model(material), "cpu", folder, save_activations=False
        )
    torch.set_grad_enabled(True)  # SAEBench leaves it off
    theirs = {n: results[f"tpp_threshold_{n}_total_metric"] for n in sizes}
    probes = [
        Probe(net.weight.detach()[0].double(), net.bias.detach()[0].double())
        for net in (trained[0][0][task.name].net for task in material.tasks)
    ]
    source, pooled = material.pooled()

    def scores() -> dict[int, float]:
        found = perturbation.probe_perturbation(
            perturbation.ablated_latents([source], pooled, material.stack.hook_points),
            pooled.channels,
            material.tasks,
            material.scored,
            sizes=sizes,
        )
        return {s.size: float(s.quantity[0]) for s in found if s.size is not None}

    with mock.patch.object(perturbation, "fit_probe", side_effect=probes):
        with_theirs = scores()
    return scores(), with_theirs, theirs


def _common(material: Material) -> dict[str, Any]:
    return {
        "dataset_names": [DATA],
        "model_name": material.lm.name,
        "context_length": material.context_tokens,
        "llm_batch_size": 8,
        "llm_dtype": "float32",
        "sae_batch_size": 25,
    }


@contextmanager
def _in_place(material: Material) -> Iterator[None]:
    """While inside, SAEBench's texts and the documents of its tasks are those of `material`."""
    from sae_bench.evals.sparse_probing import probe_training
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    texts, tokenizer = material.texts, material.lm.tokenizer
    classes = texts.classes
    by_class = [_by_class(part, classes) for part in (texts.train, texts.test)]
    offsets = (0, len(texts.train.labels))
    # Numbers of the documents in the order in which SAEBench has them: class by class.
    orders = [
        {offset + i: place for place, i in enumerate(i for c in classes for i in part[c])}
        for offset, part in zip(offsets, by_class, strict=True)
    ]
    data = tuple(
        {c: [part.texts[i] for i in members[c]] for c in classes}
        for part, members in zip((texts.train, texts.test), by_class, strict=True)
    )

    def prepare(acts: dict[str, torch.Tensor], name: str, perform_scr: bool = False) -> Any:
        assert not perform_scr
        task = next(task for task in material.tasks if task.name == name)
        everything = torch.cat([acts[c] for c in classes])
        in_train = len(everything) == len(texts.train.labels)
        numbers = task.train if in_train else task.test
        positive = task.train_positive if in_train else task.test_positive
        places = [orders[not in_train][i] for i in numbers.tolist()]
        return everything[places], positive.int()

    assert len(texts.train.labels) != len(texts.test.labels)
    padding = tokenizer.pad_token
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    try:
        with (
            mock.patch.object(probe_training, "prepare_probe_data", prepare),
            # Without its type check, which holds the sizes of one function against another's.
            mock.patch.object(
                probe_training,
                "train_sklearn_probe",
                probe_training.train_sklearn_probe.__wrapped__,
            ),
            mock.patch.object(dataset_utils, "get_multi_label_train_test_data", return_value=data),
            mock.patch.dict(dataset_info.chosen_classes_per_dataset, {DATA: classes}),
        ):
            yield
    finally:
        tokenizer.pad_token = padding


def _by_class(documents: Documents, classes: list[str]) -> dict[str, list[int]]:
    return {c: [i for i, label in enumerate(documents.labels) if label == c] for c in classes}


def _model(material: Material) -> Any:
    """The language model, as far as SAEBench calls it."""
    from transformer_lens import HookedTransformer

    base: Any = HookedTransformer

    class Model(base):  # its functions check the type
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.tokenizer = material.lm.tokenizer

        def run_with_hooks(self, tokens: Any, *, fwd_hooks: Any, **_: Any) -> None:
            for name, hook in fwd_hooks:
                point = material.lm.hook_point(name)
                hook(material.lm.capture(tokens, [point])[point], hook=None)

    return Model()


def _autoencoder(material: Material) -> Any:
    from sae_bench.custom_saes.topk_sae import TopKSAE

    sae, lm = material.stack.sae(0), material.lm
    name = material.stack.hook_points[0]
    sizes = (sae.config.d_in, sae.config.d_sae, sae.config.k)
    layer = lm.hook_point(name).layer
    theirs = TopKSAE(*sizes, lm.name, layer, torch.device("cpu"), torch.float32, hook_name=name)
    weights: Any = sae
    theirs.W_enc.data = weights.encoder.weight.detach().T.contiguous()
    theirs.b_enc.data = weights.encoder.bias.detach()
    theirs.W_dec.data = sae.W_dec.detach()
    theirs.b_dec.data = sae.b_dec.detach()
    return theirs


def one_layer(stack: ReSAE, layer: int) -> ReSAE:
    """One autoencoder of activations of a stack, as a stack of its own."""
    return ReSAE([stack.hook_points[layer]], AffinePredictor("none"), [stack.sae(layer)])


def filling(lm: HookedLM, texts: LabelledTexts, context_tokens: int) -> LabelledTexts:
    """The documents of at least this many tokens, none of them special."""

    def part(documents: Documents) -> Documents:
        ids = lm.tokenizer(documents.texts, truncation=True, max_length=context_tokens)["input_ids"]
        special = set(lm.special_ids)
        return documents.take(
            [i for i, row in enumerate(ids) if len(row) == context_tokens and not special & {*row}]
        )

    return LabelledTexts(texts.name, part(texts.train), part(texts.test))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="run directory of raw autoencoders")
    parser.add_argument("--layer", type=int, default=1, help="position among its layers")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--context-tokens", type=int, default=128)
    parser.add_argument("--train-documents", type=int, default=150)
    parser.add_argument("--test-documents", type=int, default=50)
    parser.add_argument("--out", type=Path, help="Markdown file of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lm = HookedLM.from_pretrained(arguments.model)
    stack = one_layer(ReSAE.load(arguments.run), arguments.layer)
    sizes = {"train_documents": arguments.train_documents}
    texts = load_labelled(**sizes, test_documents=arguments.test_documents)
    material = Material.of(lm, stack, texts, arguments.context_tokens)
    theirs, own = sae_bench(material), ours(material)
    lines = ["| metric | SAEBench | ours | largest difference of a class |", "|---|---|---|---|"]
    for metric in sorted({*theirs, *own}):
        cells = [_mean(found.get(metric)) for found in (theirs, own)]
        apart = "–"
        if metric in theirs and metric in own:
            largest = max(abs(own[metric][c] - value) for c, value in theirs[metric].items())
            apart = f"{largest:.4f}"
        lines.append(f"| {metric} | {cells[0]} | {cells[1]} | {apart} |")
    full = filling(lm, texts, arguments.context_tokens)
    values = tpp(Material.of(lm, stack, full, arguments.context_tokens), (2, 5, 10, 20, 50))
    lines += [
        "",
        "| latents ablated | TPP, SAEBench | our formula, its probes | ours |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {n} | {values[2][n]:.4f} | {values[1][n]:.4f} | {values[0][n]:.4f} |" for n in values[0]
    ]
    counts = (len(texts.train.labels), len(texts.test.labels))
    lines.append(f"\nDocuments: {counts[0]} to fit on, {counts[1]} to score.")
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


def _mean(classes: dict[str, float] | None) -> str:
    return f"{sum(classes.values()) / len(classes):.4f}" if classes else "–"


if __name__ == "__main__":
    main()
