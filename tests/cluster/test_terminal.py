"""`tunejob submit` on a terminal: it follows; Ctrl-C detaches and says how to come back; coming back sees the end."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from launcher.codes import Code
from tests.cluster.kit import Kit
from tests.cluster.kubectl import SECONDS

pytestmark = pytest.mark.cluster


class Terminal:
    """A command on a terminal of its own, and what it has shown."""

    def __init__(self, kit: Kit, *words: str) -> None:
        self._master, slave = pty.openpty()
        self.shown = ""
        program = "import sys; from launcher.cli import main; sys.exit(main())"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, *words],
            cwd=kit.folder,
            env=kit.environment(),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)

    def read(self, until: str) -> None:
        """Reads until a text has been shown; fails with what was if the command ends before."""
        deadline = time.monotonic() + SECONDS
        while until not in self.shown:
            assert time.monotonic() < deadline, self.shown
            assert self._more(), f"no {until!r} in {self.shown}"

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.killpg(self._process.pid, signal.SIGINT)

    def end(self) -> int:
        """The exit code, once it has ended; what it showed until then is read."""
        while self._more():
            pass
        code = self._process.wait(SECONDS)
        os.close(self._master)
        assert "Traceback" not in self.shown, self.shown
        return code

    def _more(self) -> bool:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other side is closed
            return False
        self.shown += data.decode("utf-8", errors="replace").replace("\r\n", "\n")
        return bool(data)


def test_a_run_is_followed_left_with_ctrl_c_and_found_again_to_its_end(kit: Kit) -> None:
    spec = kit.spec("watched", training={"max_steps": 500, "batch_size": 4, "max_length": 64, "logging_steps": 1})
    first = Terminal(kit, "submit", str(spec))
    first.read("attempt 1 runs on")  # the run has a while to go, however slow this machine is
    first.interrupt()
    assert first.end() == Code.DETACHED
    assert "tunejob logs -f watched-" in first.shown
    again = Terminal(kit, "logs", "-f", str(spec))
    code = again.end()
    assert code == Code.OK, again.shown
    assert "train " in again.shown, again.shown
    assert "verify" in again.shown, again.shown
    assert again.shown.count("attempt 1 runs on") == 1
    assert "pending" not in again.shown
    assert "complete; tunejob results watched-" in again.shown
    assert kit.cli("wait", str(spec)).code == Code.OK
    results = kit.cli("results", str(spec), "--verify", "--download", "adapter")
    assert results.code == Code.OK, results
    assert "finished" in results.out
    assert (kit.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert kit.cli("delete", str(spec), "--yes", "--data").code == Code.OK
    run = next(word for word in results.out.split() if word.startswith("watched-")).rstrip(":")
    assert not kit.bucket.etags(f"runs/{run}/")
