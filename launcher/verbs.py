"""The verbs that ask a cluster, each as one call: ``launcher.commands`` prints what it gives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import SpecInvalid
from launcher.codes import LauncherError, NoRun, NotFound

if TYPE_CHECKING:
    from job.spec import JobSpec
    from launcher.cluster import Cluster
    from launcher.doctor import Check
    from launcher.manage import Doomed
    from launcher.preflight import Findings
    from launcher.profile import Profile
    from launcher.render import Rendered
    from launcher.results import Results
    from launcher.runs import Attempt, Run
    from launcher.stream import Line
    from launcher.submit import Submitted
    from launcher.why import Cause

Say = Callable[[str], None]


def cluster_of(profile: "Profile") -> "Cluster":
    """The cluster that a profile names."""
    from launcher.cluster import open_cluster

    return open_cluster(profile.context, profile.namespace)


class Door:
    """A profile and its cluster, asked for when they are first needed."""

    def __init__(self, name: str | None = None, say: Say = lambda line: None) -> None:
        """
        Args:
            name: of the profile, or its file; left out: as ``launcher.profile`` looks it up.
            say: takes a line for the user.
        """
        from launcher.profile import load

        self.profile = load(name)
        self.say = say

    @cached_property
    def cluster(self) -> "Cluster":
        """The profile's cluster."""
        return cluster_of(self.profile)

    def find(self, name: str) -> "Run":
        """A run by its id, its Job's name, the beginning of either, or the file of its spec."""
        from launcher import find

        spec = _spec_of(name)
        return find.by_spec(self.cluster, spec) if spec else find.by_name(self.cluster, name)

    def submit(self, spec: "JobSpec", replace: bool = False) -> "Submitted":
        """See ``launcher.submit``."""
        from launcher.render import render
        from launcher.submit import submit

        return submit(self.cluster, spec, render(spec, self.profile), self.say, replace)

    def look(self, spec: "JobSpec") -> "Findings":
        """What the cluster would say to a spec."""
        from launcher.preflight import look
        from launcher.render import render

        return look(self.cluster, render(spec, self.profile))

    def runs(self) -> "list[Run]":
        """Every run of the namespace, newest first."""
        from launcher.runs import listed

        return listed(self.cluster)

    def status(self, name: str) -> dict[str, Any]:
        """A run's state, progress and attempts, as plain data."""
        from launcher import show
        from launcher.stream import latest_progress

        run = self.find(name)
        return show.status(run, *latest_progress(self.cluster, run))

    def logs(self, name: str, follow: bool = False, tail: int | None = None) -> "Iterator[Line]":
        """The lines of every attempt's log, oldest first."""
        from launcher import logs

        run = self.find(name)
        yield from logs.lines(self.cluster, run, follow, tail, lambda: self.store(run), self.say)

    def earlier(self, run: "Run") -> "tuple[Attempt, ...]":
        """The pods of Jobs that were made for a run before this one."""
        from launcher.logs import earlier

        return earlier(self.cluster, run)

    def wait(
        self, name: str, timeout: float | None = None, start_timeout: float | None = None, verify: bool = False
    ) -> "Run":
        """The run when it has ended; with ``verify`` a complete one's every file is proven in the store."""
        ended = self.await_end(self.find(name), timeout, start_timeout)
        if verify and ended.state == "complete":
            self.verified(ended)
        return ended

    def await_end(self, run: "Run", timeout: float | None = None, start_timeout: float | None = None) -> "Run":
        """Waits for the end of a run."""
        from launcher.watch import wait

        return wait(self.cluster, run, timeout, start_timeout, self.say)

    def verified(self, run: "Run") -> str:
        """A sentence once every file that a complete run published is proven. Raises NoResult if one is not."""
        from launcher.download import verify

        return str(verify(self.store(run), run.digest))

    def why(self, name: str) -> "list[Cause]":
        """Why a run is where it is, the likeliest cause first."""
        return self.causes(self.find(name))

    def causes(self, run: "Run") -> "list[Cause]":
        """See ``launcher.why``."""
        from launcher.causes.evidence import gather
        from launcher.why import diagnose

        return diagnose(gather(self.cluster, run), lambda: self._told(run))

    def results(self, run: "Run", store: Any) -> "Results":
        """What a run left; its state, where it has not finished."""
        from launcher.results import read

        return read(store, run)

    def store(self, run: "Run") -> Any:
        """The run's folder as this machine sees it."""
        from launcher.remote import open_run

        if not run.output:
            raise NotFound(f"{run.job}: its Job does not say where its run goes; it was not made by tunejob")
        return open_run(run.output, self.profile)

    def retry(self, name: str) -> "Submitted":
        """See ``launcher.manage``."""
        from launcher.manage import retry

        return retry(self.cluster, self.find(name), self.profile, self.say)

    def cancel(self, name: str) -> "Run":
        """See ``launcher.manage``."""
        from launcher.manage import cancel

        run = self.find(name)
        cancel(self.cluster, run)
        return run

    def doomed(self, name: str, data: bool = False) -> "Doomed":
        """What deleting a run would take away, with ``data`` out of the store too."""
        from job.spec import run_id
        from launcher.manage import doomed, remains

        root = self.profile.store.output if data else ""
        try:
            return doomed(self.cluster, self.find(name), root)
        except NoRun:
            spec = _spec_of(name)
            # A schedule has no data of its own; by the id that they share it would be a run's.
            is_of_another = bool(root and spec and spec.scheduling.cron)
            left = None if is_of_another else remains(self.cluster, run_id(spec) if spec else name, root)
            if left is None:
                raise
            return left

    def delete(self, name: str, data: bool = False) -> list[str]:
        """Takes a run off the cluster, with ``data`` out of the store too; gives what is gone."""
        return self.take_away(self.doomed(name, data))

    def take_away(self, what: "Doomed") -> list[str]:
        """Deletes what ``doomed`` found; gives what is gone."""
        from launcher.manage import delete, delete_data
        from launcher.remote import open_run

        # Asked first: a store that does not answer is to leave the Jobs, by which the run is found again.
        store = open_run(what.data, self.profile) if what.data else None
        gone = delete(self.cluster, what)
        return gone if store is None else [*gone, f"{delete_data(store)} objects below {what.data}"]

    def doctor(self) -> "list[Check]":
        """Whether everything a run needs is there."""
        from launcher.doctor import examine
        from launcher.remote import probe

        cluster: Cluster | LauncherError
        try:
            cluster = self.cluster
        except LauncherError as error:
            cluster = error
        return examine(cluster, self.profile, lambda: probe(self.profile))

    def _told(self, run: "Run") -> Any:
        from launcher.remote import told

        return told(self.store(run))


@dataclass(frozen=True)
class Found:
    """A finished run: what it left, and the store it lies in."""

    results: "Results"
    store: Any
    digest: str = ""
    """SHA-256 of its manifest as its pod said it; empty where that is not known."""

    def verified(self) -> str:
        """A sentence once size and SHA-256 of every published file are proven."""
        from launcher.download import verify

        return str(verify(self.store, self.digest))

    def download(self, folder: Path, everything: bool = False) -> list[Path]:
        """Fetches what was published, proven; see ``launcher.download``."""
        from launcher.download import fetch

        return fetch(self.store, folder, everything)


def results_of(name: str, profile: str | None = None, say: Say = lambda line: None) -> Found:
    """What a finished run left, in its folder or on the cluster.

    Args:
        name: a folder that is there, an s3:// or file: URI, or the name of a run.
    """
    from launcher.results import load

    if not _is_file(name) and (any(mark in name for mark in ("/", "\\", "file:")) or Path(name).is_dir()):
        from job.storage.store import open_store

        return Found(load(name), open_store(name))
    from launcher.runs import require_run

    door = Door(profile, say)
    run = require_run(door.find(name))
    store = door.store(run)
    return Found(door.results(run, store), store, run.digest)


def rendered(spec: "JobSpec", profile: str | None = None) -> "Rendered":
    """The manifests of a spec; nothing is asked."""
    from launcher.profile import load
    from launcher.render import render

    return render(spec, load(profile))


def bundle(folder: Path, spec: "JobSpec", profile: str | None = None, rerender: bool = False) -> "list[Path]":
    """Writes the manifests of a spec for ``kubectl apply``; gives the files that were written."""
    from launcher.bundle import write
    from launcher.profile import load

    return write(folder, spec, load(profile), rerender)


def _spec_of(name: str) -> "JobSpec | None":
    """The spec by whose file a run is named; None for a name."""
    if _is_file(name):
        from job.spec import read

        return read(Path(name))
    if not name.strip():
        raise SpecInvalid("the name of a run is empty; tunejob list shows those that are there")
    return None


def _is_file(name: str) -> bool:
    """Whether a run is named by the file of its spec."""
    return name.endswith((".yaml", ".yml"))
