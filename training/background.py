"""A thread for small jobs that the run need not wait for, such as compressing an episode."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable

MOST = 8  # jobs that wait at once; what each holds in memory may be large
Job = Callable[[], object]


class Background:
    """Does jobs in one thread, one after the other in the order in which they came.

    What a job raises is raised in the caller's thread by the next call of anything here, so that no failure is silent,
    and no job is forgotten: `wait` does what has failed once more. After `wait`, all is done, or it has raised.
    """

    def __init__(self) -> None:
        self.pool = concurrent.futures.ThreadPoolExecutor(1, "background")
        self.jobs: collections.deque[tuple[Job, concurrent.futures.Future]] = collections.deque()
        self.given = self.done = 0
        self.following: collections.deque[tuple[int, Job]] = collections.deque()  # (jobs that must be done first, ...)

    def __call__(self, job: Job) -> None:
        """Take a job; wait for the oldest one if too many are waiting."""
        self.jobs.append((job, self.pool.submit(job)))
        self.given += 1
        if len(self.jobs) > MOST:
            concurrent.futures.wait([self.jobs[0][1]])
        self.look()

    def then(self, function: Job) -> None:
        """Call a function in the caller's thread once all the jobs so far are done: now, or in a later call."""
        self.following.append((self.given, function))
        self.look()
        self._follow()

    def look(self) -> None:
        """Take note of the jobs that are done, and call what follows them. Raises what one of them has raised."""
        while self.jobs and self.jobs[0][1].done():
            self.jobs[0][1].result()
            self._tick()

    def wait(self) -> None:
        """Wait until all jobs are done. Raises what one of them raises when it is done again after it has failed."""
        while self.jobs:
            job, future = self.jobs[0]
            if future.exception() is not None:  # which waits for it
                job()
            self._tick()

    def close(self) -> None:
        """Wait as `wait` does, and end the thread, whatever comes of it."""
        try:
            self.wait()
        finally:
            self.pool.shutdown()

    def _tick(self) -> None:
        """Count the oldest job as done."""
        self.jobs.popleft()
        self.done += 1
        self._follow()

    def _follow(self) -> None:
        """Call what follows the jobs that are done."""
        while self.following and self.following[0][0] <= self.done:
            self.following.popleft()[1]()
