"""The request to leave: heard at any time, however often, and obeyed in the grace period whatever holds us up."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

STUCK = """
    import os, signal, sys, threading, time
    from pathlib import Path
    from job.supervision.leaving import Leaving
    hurried = []
    leaving = Leaving(2.0, lambda until: hurried.append(until - time.monotonic()), lambda: told())
    def told():
        Path(sys.argv[1]).write_text(str(hurried))
        raise OSError("whatever happens here, it is left")
    with leaving.listening():
        print("up", flush=True)
        if sys.argv[2] == "stuck":
            while True:
                time.sleep(60)  # a call to a store that does not answer
        while not leaving.is_asked:
            time.sleep(0.01)
        assert leaving.seconds_since >= 0.0
        try:
            leaving.check("in a test")
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # how it ended is said: nothing changes it
        os.kill(os.getpid(), number)
    print("as it was", flush=True)
"""


def started(folder: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(STUCK), str(folder / "told"), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_is_stuck_is_left_before_the_grace_period_ends(  # T27
    number: signal.Signals, tmp_path: Path
) -> None:
    process = started(tmp_path, "stuck")
    for _ in range(3):
        process.send_signal(number)
    assert process.wait(30) == 143
    (hurried,) = json.loads((tmp_path / "told").read_text())
    assert 0 < hurried <= 2.0 - 2.0 / 3
    process.communicate()


def test_who_looks_leaves_in_good_order(tmp_path: Path) -> None:
    process = started(tmp_path, "looks")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert said == "Interrupted asked to leave in a test\nas it was\n"
    assert not (tmp_path / "told").exists()
