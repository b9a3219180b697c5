"""Jobs in a thread of their own: in order, joined before a save, and never a failure in silence."""

import threading
import time

import pytest

from replay.episodes import EpisodeWriter, episode_files, load_episode
from tests.test_replay import LAYOUT, make_episode, steps_of
from training import background
from training.background import Background


def test_jobs_are_done_in_order_and_what_follows_them_comes_in_the_callers_thread():
    jobs, noted, gate = Background(), [], threading.Event()
    jobs(gate.wait)
    jobs(lambda: noted.append(("job", threading.current_thread() is threading.main_thread())))
    jobs.then(lambda: noted.append(("then", threading.current_thread() is threading.main_thread())))
    jobs.look()
    assert noted == []  # nobody has waited
    gate.set()
    jobs.wait()
    assert noted == [("job", False), ("then", True)]
    jobs.then(lambda: noted.append("at once"))
    assert noted[2:] == ["at once"]
    jobs.close()


def test_what_a_job_raises_is_raised_by_the_next_call_and_it_is_done_again_before_a_save():
    jobs, tries, told, gate = Background(), [], [], threading.Event()

    def full():
        gate.wait()
        tries.append(threading.current_thread() is threading.main_thread())
        if len(tries) < 3:
            raise OSError("no space left on device")

    jobs(full)
    gate.set()
    while not jobs.jobs[0][1].done():
        time.sleep(0.001)
    for call in (jobs.look, lambda: jobs(lambda: None), lambda: jobs.then(lambda: told.append("written")), jobs.wait):
        with pytest.raises(OSError, match="no space"):
            call()
    assert tries == [False, True] and not told  # still not written: there is no checkpoint that names it
    jobs.wait()  # now there is room
    assert tries == [False, True, True] and told == ["written"]
    jobs.close()


def test_only_some_jobs_wait(monkeypatch):
    monkeypatch.setattr(background, "MOST", 2)
    jobs, gate = Background(), threading.Event()
    jobs(gate.wait)
    jobs(lambda: None)
    threading.Timer(0.05, gate.set).start()
    jobs(lambda: None)  # waits for the first
    assert gate.is_set()
    jobs.close()


def test_episodes_are_written_and_old_ones_deleted_in_the_order_in_which_they_came(tmp_path):
    jobs, gate = Background(), threading.Event()
    jobs(gate.wait)
    writer = EpisodeWriter(tmp_path, 1, 25, later=jobs)
    files = [writer.add(0, step) for number in range(4) for step in steps_of(make_episode(10 * number, 10))]
    names = [name for name, _ in filter(None, files)]
    assert len(names) == 4 and not episode_files(tmp_path)  # the first was to be deleted before it was written
    gate.set()
    jobs.close()
    assert [path.name for path in episode_files(tmp_path)] == names[2:]
    assert load_episode(tmp_path / names[3], LAYOUT)["reward"].tolist() == [*range(30, 40)]
