"""Real processes of which one dies or fails, in both ways of sharing the work."""

import os
import signal
import socket
import sys
import time

import pytest
import torch
from commands import SMALL, TRAIN, free_ports
from safetensors import safe_open

import resae.training.loop as training
from resae import ReSAE
from resae.cli import main
from resae.training import watch
from resae.training.watch import Watch

WAYS = ("data", "layers")


def one_of(rank, size, port, arguments, victim, how, folder):
    """A rank as torchrun starts it, whose `victim` dies or fails in its thirteenth step."""
    torch.set_num_threads(1)
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    errors = os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    os.dup2(errors, 1)
    step = training.train_step

    def fatal(state, *rest):
        if state.step == 12 and rank == victim:
            (folder / "died").write_text(str(time.time()))
            if how is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise how  # pyright: ignore[reportGeneralTypeIssues]
        return step(state, *rest)

    training.train_step = fatal
    if rank == victim == 0:
        watch.GRACE = 0.5  # in which it would hear of another rank's death
    sys.exit(main(arguments))


def run_ranks(processes, arguments, folder, *, size=2, victim=None, how=None):
    """Exit codes, what each rank said, and the seconds from the death to the last end."""
    folder.mkdir()
    (port,) = free_ports(1)
    ranks = [
        processes.Process(target=one_of, args=(rank, size, port, arguments, victim, how, folder))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    ended = time.time()
    for process in ranks:
        process.kill()
    died = folder / "died"
    seconds = ended - float(died.read_text()) if died.exists() else 0.0
    said = [(folder / f"{rank}.err").read_text() for rank in range(size)]
    return [process.exitcode for process in ranks], said, seconds


@pytest.fixture(scope="module")
def whole(material, processes, tmp_path_factory):
    """The arguments, and runs that nothing stopped, by the way of sharing."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    arguments += ["--checkpoint-steps", "5", "--keep-checkpoints", "9", "--log-steps", "1000"]
    # 20 steps
    arguments += ["--train-tokens", "2560", "--batch-tokens", "128", "--buffer-tokens", "1024"]
    for way in WAYS:
        out = ["--parallel", way, "--out", str(folder / way)]
        codes, said, _ = run_ranks(processes, [*arguments, *out], folder / f"{way}-said")
        assert codes == [0, 0], said
    return arguments, folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("victim", "how", "line", "code"),
    [
        pytest.param(1, None, "rank 1 of 2 died (", -signal.SIGKILL, id="second-killed"),
        pytest.param(0, None, "rank 0 of 2 died (", -signal.SIGKILL, id="first-killed"),
        pytest.param(1, OSError("no disk"), "rank 1 of 2: no disk", 2, id="second-fails"),
        pytest.param(
            0, RuntimeError("no\\nmemory"), "rank 0 of 2: RuntimeError: no", 1, id="first-fails"
        ),
    ],
)
def test_a_rank_that_dies_or_fails_ends_the_others_with_one_line(
    whole, processes, tmp_path, way, victim, how, line, code
):
    arguments, folder = whole
    arguments = [*arguments, "--parallel", way, "--out", str(tmp_path / "out")]
    codes, said, seconds = run_ranks(
        processes, arguments, tmp_path / "said", victim=victim, how=how
    )
    assert codes[victim] == code
    assert codes[1 - victim] == 1
    assert seconds < 30
    (one,) = [x for text in said for x in text.splitlines() if not is_progress(x)]
    assert one.startswith(f"resae train: {line}")
    checkpoints = sorted((tmp_path / "out" / "checkpoints").iterdir())
    assert [p.name for p in checkpoints] == [f"step_000000{n}.safetensors" for n in ("05", "10")]
    for path in checkpoints:
        with safe_open(path, framework="pt") as file:
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118
    if how is None:
        codes, said, _ = run_ranks(processes, [*arguments, "--resume"], tmp_path / "again")
        assert codes == [0, 0], said
        one, other = (ReSAE.load(f).state_dict() for f in (folder / way, tmp_path / "out"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def is_progress(line):
    of_progress = (
        "device",
        "affine maps",
        "R²",
        "sink tokens",
        "3 autoencoders",
        "step ",
        "written to",
    )
    return line.startswith(of_progress)


def test_of_three_ranks_the_dead_one_is_named_and_not_who_waited_for_it(whole, processes, tmp_path):
    arguments, _ = whole
    arguments = [*arguments, "--batch-tokens", "126", "--out", str(tmp_path / "out")]
    codes, said, seconds = run_ranks(processes, arguments, tmp_path / "said", size=3, victim=2)
    assert codes == [1, 1, -signal.SIGKILL]
    assert seconds < 30
    (one,) = [x for text in said for x in text.splitlines() if not is_progress(x)]
    assert one.startswith("resae train: rank 2 of 3 died (")


def test_an_error_of_all_ranks_is_said_once(whole, processes, tmp_path):
    arguments, folder = whole
    codes, said, _ = run_ranks(
        processes, [*arguments, "--out", str(folder / "data")], tmp_path / "said"
    )
    assert sorted(codes) in ([1, 2], [2, 2])
    (one,) = [x for text in said for x in text.splitlines() if not is_progress(x)]
    assert "exists and is not empty" in one


def test_strangers_are_not_heard():
    server, address = watch._listen()
    with server:
        for said, rank in (("guess 1", -1), ("secret 1", 1)):
            with socket.create_connection(address) as connection:
                watch._send(connection, said)
                found, admitted = watch._admit(server, "secret")
                assert found == rank
                assert (admitted is None) == (rank < 0)
                if admitted is not None:
                    admitted.close()


def test_one_process_alone_is_not_watched():
    with pytest.raises(ValueError, match="as ever"), Watch(0, 1, pytest.fail):
        raise ValueError("as ever")
