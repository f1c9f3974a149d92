import pytest
import tiny
import torch

from resae.data import text_record
from resae.data.text_record import (
    RunText,
    TrainedText,
    held_out_by_all,
    in_rows_of,
    save_held_out,
)


def text_of(rows):
    text = TrainedText()
    for row in rows.tolist():
        text.add(row)
    return text


def test_text_is_known_wherever_it_was_cut_and_other_text_is_not():
    stream = torch.cat([tiny.ids(1, 40 * 31, seed=1)[0], tiny.ids(1, 31, seed=2)[0]])
    rows = torch.cat([torch.zeros(40, 1).long(), stream[: 40 * 31].view(40, 31)], 1)
    text = text_of(rows)
    assert text.overlap(rows) == (40 * 16, 40 * 16)
    assert text.overlap(rows).new is False
    shifted = torch.cat([torch.zeros(1, 1).long(), stream[7 : 7 + 47].view(1, 47)], 1)
    # Of 32 windows those 15 that cross from one row into the next were not hashed.
    assert text.overlap(shifted) == (2 + 15, 32)
    other = torch.cat([rows[:1, :1], stream[-31:].view(1, 31)], 1)
    assert text.overlap(other) == (0, 16)
    assert text.overlap(other).new is True
    assert text.overlap(rows[:, :20]).compared == 40 * 4
    assert text.overlap(rows[:, :16]) == (0, 0)
    assert text.overlap(rows[:, :16]).new is None


def test_of_much_text_a_sample_is_kept_and_compared(monkeypatch, tmp_path):
    monkeypatch.setattr(text_record, "KEPT", 512)
    rows = tiny.ids(400, 48)
    text = text_of(rows)
    known, compared = text.overlap(rows[:100])
    assert known == compared
    assert 0.5 < compared / (100 * 32 * 512 / (400 * 32)) < 2
    known, compared = text.overlap(tiny.ids(100, 48, seed=9))
    assert known == 0
    assert compared > 50
    text.save(tmp_path)
    assert TrainedText.load(tmp_path).overlap(rows[:100]) == text.overlap(rows[:100])


def test_the_text_of_several_ranks_is_that_of_all(monkeypatch, tmp_path):
    monkeypatch.setattr(text_record, "KEPT", 1000)
    rows = tiny.ids(90, 48)
    parts = [text_of(rows[:20]), text_of(rows[20:])]
    whole = text_of(rows)
    for rank, part in enumerate(parts):
        assert TrainedText.load(tmp_path) is None
        part.save(tmp_path, rank, 2)
    assert TrainedText.load(tmp_path).overlap(rows) == whole.overlap(rows)
    assert TrainedText.load(tmp_path, 0, 2).overlap(rows[:20]) == parts[0].overlap(rows[:20])
    assert TrainedText.load(tmp_path, 0, 3) is None


def test_rows_that_a_run_held_out_are_not_trained_on_though_their_text_comes_again(tmp_path):
    rows = tiny.ids(1, 48).expand(5, 48)
    text_of(rows).save(tmp_path)
    assert RunText.load(tmp_path) is None
    save_held_out(tmp_path, rows[:2], 48)
    record = RunText.load(tmp_path)
    assert record.held_out.tolist() == rows[:2].tolist()
    assert record.overlap(rows[:1]) is None
    assert record.overlap(rows[:1, :40]).new is False
    new = torch.cat([rows[:1], tiny.ids(2, 48, seed=9), rows[:1, :].roll(1, 1)])
    assert record.overlap(new) == (31, 4 * 32)


def test_rows_held_out_by_every_run_are_taken_where_there_are_some():
    a, b = tiny.ids(8, 20), tiny.ids(8, 20, seed=8)
    runs = [RunText(rows, TrainedText()) for rows in (a, a[:3], b)]
    assert held_out_by_all(runs[:2]).tolist() == a[:3].tolist()
    assert held_out_by_all(runs).tolist() == a.tolist()


@pytest.mark.parametrize("headed", [True, False])
def test_the_same_text_in_rows_of_another_length(headed):
    rows = tiny.ids(6, 13)
    rows[:, 0] = 0 if headed else rows[:, 0]
    first = int(headed)
    text = rows[:, first:].flatten()
    for length in (5, 13, 30):
        cut = in_rows_of(rows, length, headed)
        assert cut.shape == (len(text) // (length - first), length)
        assert torch.equal(cut[:, first:].flatten(), text[: cut.shape[0] * (length - first)])
        assert not headed or not cut[:, 0].any()
