import threading

import torch

from resae.threads import PerThread


def in_a_thread(function):
    """Result of `function`, called in a thread that has ended."""
    out = []
    thread = threading.Thread(target=lambda: out.append(function()))
    thread.start()
    thread.join()
    return out[0]


def test_every_thread_has_its_own_value_and_all_are_read():
    values = PerThread(list)
    values.here.append("main")
    ready, done = threading.Barrier(3), threading.Event()

    def work(i):
        values.here.append(i)
        ready.wait()
        done.wait()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    ready.wait()
    assert sorted(map(str, (v for value in values for v in value))) == ["0", "1", "main"]
    assert values.here == ["main"]
    done.set()
    for thread in threads:
        thread.join()


def test_a_thread_that_ended_leaves_its_value_to_the_next():
    values = PerThread(list)
    for i in range(20):
        in_a_thread(lambda i=i: values.here.append(i))
    assert list(values) == [[], list(range(20))]


def test_a_graph_compiled_in_one_thread_counts_in_each_threads_own_tensor():
    torch.compiler.reset()
    values = PerThread(lambda: torch.zeros(1, dtype=torch.int64))

    def count(x):
        values.here.add_(1)
        return x + 1

    compiled = torch.compile(count, fullgraph=True, backend="eager")
    in_a_thread(lambda: compiled(torch.zeros(2)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            compiled(torch.zeros(2))
    assert [int(value) for value in values] == [0 + 2, 1]
