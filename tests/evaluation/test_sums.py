import pytest
import torch

from resae.evaluation.sums import MOST_DOCUMENTS, Checkpoint, Sums, number_documents, per_row


def separators(rows, at):
    """`[rows, 4]` bool: the first token of every row is special, and those at (row, position)."""
    special = torch.zeros(rows, 4, dtype=torch.bool)
    special[:, 0] = True
    for row, position in at:
        special[row, position] = True
    return special


def test_rows_that_begin_in_one_document_are_one():
    """A document that ends inside a row is the document of that row, not of the next."""
    ends = [(row, 2) for row in range(1, 40, 2)]
    numbers, told = number_documents(separators(40, ends).split(7), None)
    assert told
    assert numbers.tolist() == [row // 2 for row in range(40)]


def test_too_few_documents_are_rows():
    numbers, told = number_documents([separators(20, [(3, 1)])], None)
    assert not told
    assert numbers.tolist() == list(range(20))


def test_documents_are_numbered_and_neighbours_drawn_as_one_where_there_are_many():
    numbers, _ = number_documents([separators(4, [])], [7, 7, 2, 7])
    assert numbers.tolist() == [0, 0, 1, 2]
    numbers, _ = number_documents([separators(2000, [])], range(2000))
    assert int(numbers[-1]) + 1 == len(numbers.unique()) == MOST_DOCUMENTS
    assert (numbers.diff() >= 0).all()
    assert numbers.bincount().max() - numbers.bincount().min() <= 1


def test_values_are_summed_per_row_and_document():
    sums = Sums(2)
    values = torch.arange(6.0)
    sums.add_rows(torch.tensor([1, 0]), a=per_row(values, [2, 4]), tokens=[2, 4])
    sums.add_rows(torch.tensor([1]), a=per_row(values, [6]), tokens=[6])
    assert sums["a"].tolist() == [14.0, 16.0]
    assert sums["tokens"].tolist() == [4.0, 8.0]
    assert (sums.total("a"), sums.total("absent")) == (30.0, 0.0)


def test_a_checkpoint_is_continued_only_by_the_same_evaluation(tmp_path):
    file = tmp_path / "sums.safetensors"
    sums = Sums(1)
    checkpoint = Checkpoint(file, {"part": sums}, lambda: b"one", 1e9)
    sums.add("a", torch.tensor(2.5))
    checkpoint.after_batch("passes", 1, last=False)
    assert not file.exists()
    checkpoint.after_batch("passes", 2, last=True)
    again = Sums(1)
    assert Checkpoint(file, {"part": again}, lambda: b"one", 0).done == {"passes": 2}
    assert again["a"] == 2.5
    other = Sums(1)
    found = Checkpoint(file, {"part": other}, lambda: b"other", 0)
    assert (found.done, found.is_of_another, other.columns) == ({}, True, {})
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="interrupted evaluation: .* is truncated or not safetens"):
        Checkpoint(file, {"part": other}, lambda: b"one", 0)
