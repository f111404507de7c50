"""What a run has on this machine: a work directory for each attempt, and what the next attempt may find again."""

import hashlib
import secrets
import shutil
from pathlib import Path

from job.storage.store import local_path
from job.workdir import WorkDir


class Folders:
    """Of one run, below a folder that runs share."""

    def __init__(self, work: Path, uri: str) -> None:
        """Nothing is made yet.

        Args:
            uri: the run's own prefix in a store.
        """
        path = local_path(uri)
        self._work = work
        self._prefix = hashlib.sha256(str(path.resolve() if path else uri).encode()).hexdigest()[:16] + "-"
        self.attempt = WorkDir(work / f"{self._prefix}{secrets.token_hex(4)}")
        """This attempt's own; removed at its end."""
        self.inputs = work / f"{self._prefix}inputs"
        """Where inputs are brought to; the next attempt on this volume takes what is whole."""
        self.prepared = work / f"{self._prefix}prepared"
        """Where prepared rows are kept for the next attempt."""

    def sweep(self) -> None:
        """Removes what attempts that were killed left. Nobody reads it, whatever an orphan of theirs still writes."""
        for left in self._work.glob(f"{self._prefix}*"):
            if left not in (self.attempt.root, self.inputs, self.prepared):
                shutil.rmtree(left, ignore_errors=True)

    def forget(self) -> None:
        """Removes what was kept for the next attempt: there is none to come."""
        shutil.rmtree(self.inputs, ignore_errors=True)
        shutil.rmtree(self.prepared, ignore_errors=True)
