"""bench/gpu.py: results of every task, errors as rows, later calls that go on; targets."""

import subprocess
import time
from pathlib import Path

import gpu
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def session(tmp_path):
    return gpu.Session(tmp_path, dry=True)


def run_part(session, *tasks, seconds=60.0):
    gpu.run_part(session, 1, gpu.Part("part", tasks), time.monotonic() + seconds)


def statuses(session):
    return {name: entry["status"] for name, entry in session.entries().items()}


def fail(_session, _left):
    raise RuntimeError("no such\nkernel")


def test_a_failing_task_is_a_row_and_the_next_one_runs(session):
    run_part(session, gpu.Task("bad", fail), gpu.Task("good", lambda *_: [{"x": 1}]))
    assert statuses(session) == {"bad": "failed", "good": "done"}
    assert session.entries()["bad"]["error"] == "RuntimeError: no such kernel"
    assert session.entries()["good"]["rows"] == [{"x": 1}]
    assert (session.out / "gpu.md").exists()


def test_a_later_call_skips_what_is_done_and_tries_failures_last(tmp_path, session):
    ran = []

    def task(name):
        return gpu.Task(name, lambda *_: ran.append(name) or [])

    run_part(session, gpu.Task("bad", fail), task("done"))
    with session.rows_file.open("a") as file:
        file.write('{"key": {"comm')  # the call was killed here
    again = gpu.Session(tmp_path, dry=True)
    run_part(again, task("bad"), task("done"), task("new"))
    assert ran == ["done", "new", "bad"]
    again.key["device"] = "another GPU"
    run_part(again, task("done"))
    assert ran == ["done", "new", "bad", "done"]


def test_what_takes_longer_than_the_budget_is_cut_off_and_taken_up_again(session):
    def endless(_session, left):
        with gpu.time_limit(left):
            while True:
                time.sleep(0.01)

    tasks = gpu.Task("endless", endless), gpu.Task("next", lambda *_: [])
    run_part(session, *tasks, seconds=0.2)
    assert statuses(session) == {"endless": "cut off"}
    assert [task.name for task in gpu.pending(tasks, session.entries())] == ["endless", "next"]


def test_a_program_that_fails_leaves_its_last_line(session):
    program = gpu.command("loud", "-c", "print('first'); raise SystemExit('last words')")
    run_part(session, program)
    assert session.entries()["loud"]["error"] == "RuntimeError: exit status 1: last words"
    assert "first" in (session.out / "loud.log").read_text()


def row(provider, ms, graph_ms=None, percent=50.0):
    return {
        "provider": provider,
        "cache": "hot",
        "ms_p50": ms,
        "graph_ms_p50": graph_ms,
        "percent_of_roof": percent,
    }


@pytest.mark.parametrize(
    ("of", "factor", "wanted"),
    [
        ("encoder GEMM", 1.2, 1.2 * 2.0),
        ("roof", 1.2, 1.2 * 0.4),
        ("µs", 4, 0.004),
        ("absent", 1, None),
    ],
)
def test_targets_refer_to_what_was_measured_beside_them(of, factor, wanted):
    rows = [row("resae", 9.0, 0.8), row("encoder GEMM", 2.0)]
    target = gpu.Target("encode", 1, 2, 3, factor, of)
    assert target.ms(rows) == (wanted and pytest.approx(wanted))


def test_the_page_says_by_how_much_a_target_is_missed_and_what_to_try():
    def entries(ours):
        rows = [row("resae", 9.0, ours), row("encoder GEMM", 2.0, 2.0)]
        return {"encode N=8192 D=2048 M=65536 k=64 bfloat16": {"rows": rows}}

    missed, reached = (gpu.verdicts(entries(ms))[2] for ms in (3.45, 2.0))
    assert "| ≤ 1.15 × encoder GEMM | 2.3 |" in missed
    assert "| 2.3 | 3.45 | 1.50 | `resae tune`: `gemm_many_tokens_16bit`" in missed
    assert reached.endswith("| 2.3 | 2 | 0.87 | reached |")
    assert all("not measured" in line for line in gpu.verdicts({})[2:])
    assert {(t.op, t.N > 16) for t in gpu.TARGETS} <= set(gpu.NEXT)


def test_every_target_is_a_task_of_the_plan():
    names = [task.name for part in gpu.plan() for task in part.tasks]
    assert len(set(names)) == len(names)
    for target in gpu.TARGETS:
        assert gpu.Case(*target[:4], 64, "bfloat16").name in names


def test_a_dry_run_measures_every_kind_of_case(session):
    kinds = {}
    for part in gpu.plan():
        for task in part.tasks:
            kinds.setdefault(task.name.partition(" ")[0], task)
    cases = [task for task in kinds.values() if " N=" in task.name]
    run_part(session, *cases)
    assert set(statuses(session).values()) == {"done"}, session.entries()
    assert {task.name for task in cases} == set(statuses(session))
    text = (session.out / "gpu.md").read_text()
    assert "**A dry run" in text
    assert "| encode N=4 D=64 M=256 k=8 float32 | resae | hot |" in text


def test_the_shell_door_leads_to_it(tmp_path):
    done = subprocess.run(
        [ROOT / "bench" / "gpu.sh", str(tmp_path), "--part", "9", "--dry"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--part 9, expected 1 to 5" in done.stderr
