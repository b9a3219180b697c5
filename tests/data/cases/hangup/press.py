"""Start a command as a terminal would, wait for its first episode, and send signals to its process group.

python press.py SIGNAL... -- command
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

signals, command = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1]


def episodes():
    return len(list(pathlib.Path("run/train_eps").glob("*.npz")))


before = episodes()
process = subprocess.Popen(["bash", "-c", command], start_new_session=True)
while episodes() == before and process.poll() is None:
    time.sleep(0.05)
for name in signals:
    if process.poll() is None:
        os.killpg(process.pid, signal.Signals["SIG" + name])
        time.sleep(1)
if signals == ["USR1"]:  # the run may go on
    end = time.monotonic() + 60
    while not pathlib.Path("run/latest.pt").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    print("saved" if pathlib.Path("run/latest.pt").exists() else "not saved")
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
sys.exit(process.wait() % 256)
