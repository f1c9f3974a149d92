"""Values of which every thread has its own, so that threads share an object without waiting."""

import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerThread(Generic[T]):
    """One value per thread, and an iteration over the values of all threads.

    A thread that has ended leaves its value to the next new one: there are never more values than
    there were threads at a time, and what was counted in them is kept. `torch.compile` reads
    `here` as an attribute, in every thread that of the thread.

    Args:
        make: makes a value; called in the thread that is the first to need it.
    """

    def __init__(self, make: Callable[[], T]):
        self._make = make
        self._lock = threading.RLock()
        self._values: list[tuple[threading.Thread, T]] = []
        self._mine = _Mine(self)

    @property
    def here(self) -> T:
        """The value of the calling thread."""
        return self._mine.value

    def __iter__(self) -> Iterator[T]:
        return iter([value for _, value in self._values])

    def adopt(self) -> T:
        """The value of a thread that has ended, or else a new one; from now on this thread's."""
        thread = threading.current_thread()
        with self._lock:
            ended = [i for i, (owner, _) in enumerate(self._values) if not owner.is_alive()]
            if ended:
                value = self._values[ended[0]][1]
                self._values[ended[0]] = (thread, value)
            else:
                value = self._make()
                self._values.append((thread, value))
        return value


class _Mine(threading.local):
    """Python calls `__init__` again in every thread that looks at an attribute."""

    def __init__(self, values: PerThread[Any]):
        self.value = values.adopt()
