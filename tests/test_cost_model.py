"""The cost model: stages of a worked example, and measured rows beside it."""

import json

import pytest

from resae.cli import main
from resae_kernels.profiling import Case
from resae_kernels.profiling.cost_model import (
    EDGE_US,
    MACHINES,
    floor_us,
    model_table,
    read_rows,
    stages,
)
from resae_kernels.profiling.specs import OPS

WIDE = Case("encode", 8192, 2048, 65536, 64, "bfloat16")


def test_stages_of_a_worked_example():
    parts = {part.name: part.us for part in stages(WIDE, MACHINES["h200"])}
    assert parts["GEMM"] - EDGE_US == pytest.approx(2 * 8192 * 2048 * 65536 / 790e12 * 1e6)
    assert parts["group maxima"] - EDGE_US == pytest.approx(8192 * 65536 * 2 / 4.3e12 * 1e6)
    assert parts["selection"] - EDGE_US == pytest.approx(63)  # rows of the busiest multiprocessor
    one = {p.name: p.us for p in stages(Case("encode", 1, 2048, 65536, 64), MACHINES["h200"])}
    assert one["scores and group maxima"] - EDGE_US == pytest.approx(2**29 / (0.92 * 4.3e12) * 1e6)


TOKENS = {
    "encode": (1, 16, 8192),
    "threshold": (1, 16, 8192),
    "forward": (1, 16, 8192),
    "step": (1, 16),
}
TOKENS |= {op: (8192,) for op in ("decode", "chain", "train", "train+adam")}


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("op", TOKENS)
def test_an_op_takes_no_less_than_what_it_must_move_and_compute(op, name):
    for N in TOKENS[op]:
        case = Case(op, N, 2048, 65536, 64, "bfloat16")
        total = sum(part.us for part in stages(case, MACHINES[name]))
        assert total >= 0.9 * floor_us(case, MACHINES[name])


def measured(op, ms, graph_ms, cache="hot", provider="resae"):
    return {
        **{"op": op, "N": 8192, "D": 2048, "M": 65536, "k": 64, "L": 1, "dtype": "bfloat16"},
        **{"provider": provider, "cache": cache, "ms_p50": ms, "graph_ms_p50": graph_ms},
    }


def test_measured_rows_stand_beside_the_model(tmp_path):
    rows = [
        measured("encode", 9.0, 9.0, "cold"),
        measured("encode", 9.0, 9.0, provider="encoder GEMM"),
        measured("encode", 7.0, 6.4),
    ]
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps({"rows": rows}) + "\n" + json.dumps({"rows": [{"setting": "x"}]}))
    total = sum(part.us for part in stages(WIDE, MACHINES["h200"]))
    text = model_table([WIDE], "h200", read_rows(lines))
    assert text.startswith("MODEL of one h200, not a measurement")
    assert text.endswith(f"| 6400.0 | {6400 / total:.2f} |")
    names = list(rows[0])
    table = tmp_path / "ops.csv"
    table.write_text(
        ",".join(names)
        + "\n"
        + ",".join("" if rows[2][n] == 6.4 else str(rows[2][n]) for n in names)
    )
    assert "| 7000.0 |" in model_table([WIDE], "h200", read_rows(table))


def test_a_file_without_rows_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"rows\.jsonl holds no measured rows"):
        read_rows(path)


def test_command_prints_every_op(capsys):
    assert main(["profile", "--model", "h100", "--dtype", "bfloat16", "--layers", "4"]) == 0
    printed = capsys.readouterr().out
    assert "MODEL of one h100, not a measurement" in printed
    assert all(f"\n| {op} N=" in printed for op in OPS)
    assert main(["profile"]) == 2
    assert "profile needs OP" in capsys.readouterr().err
