"""Following on a real API server: every line once over replaced pods, rotated logs and cut connections; how it ends."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from job.exits import pod_failure_policy
from launcher.cluster import open_cluster
from launcher.codes import Code, Deleted
from launcher.find import by_name
from launcher.logs import lines
from launcher.runs import Run
from launcher.stream import Line
from launcher.watch import follow
from tests.cluster.kit import Kit
from tests.cluster.kubectl import Manifest, wait_for
from tests.cluster.running import IMAGE

pytestmark = pytest.mark.cluster

PROGRAM = """
import os, signal, sys, time
count, pause, width = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
def leave(*_):
    print("leaving after", number, flush=True)
    os._exit(143)
signal.signal(signal.SIGTERM, leave)
for number in range(1, count + 1):
    print(number, "x" * width, file=(sys.stdout, sys.stderr)[number % 2], flush=True)
    time.sleep(pause)
print("done after", number, flush=True)
"""


def counting(kit: Kit, name: str, count: int, pause: float, width: int = 10) -> str:
    """Starts a Job of a run that only counts, to stdout and stderr in turn; gives its name.

    Args:
        pause: seconds between two lines.
        width: characters of a line, about.
    """
    container = {
        "name": "tunejob",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", PROGRAM, str(count), str(pause), str(width)],
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi", "ephemeral-storage": "64Mi"}}
        | {"limits": {"cpu": "1", "memory": "256Mi", "ephemeral-storage": "256Mi"}},
        "securityContext": {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    pod = {"restartPolicy": "Never", "serviceAccountName": "tunejob", "containers": [container]}
    spec = {
        "backoffLimit": 0,
        "activeDeadlineSeconds": 600,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": pod_failure_policy(),
        "template": {"spec": pod | {"terminationGracePeriodSeconds": 20}},
    }
    metadata = {"name": name, "labels": {"tunejob.dev/run": name}}
    kit.kubectl.apply(json.dumps({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}))
    return name


@dataclass
class Followed:
    """What following one run gave."""

    said: list[str] = field(default_factory=list)
    shown: list[Line] = field(default_factory=list)
    run: Run | None = None
    error: Exception | None = None

    def numbers(self, attempt: int = 1) -> list[int]:
        """The lines that an attempt counted, in the order in which they came."""
        found = (re.match(r"\d+", line.text) for line in self.shown if line.attempt == attempt)
        return [int(number[0]) for number in found if number]

    def is_whole(self, count: int, attempt: int = 1) -> bool:
        """Whether an attempt's lines are there once, those of stdout and those of stderr in their order."""
        found = self.numbers(attempt)
        streams = [[number for number in found if number % 2 == rest] for rest in (0, 1)]
        return streams == [list(range(2, count + 1, 2)), list(range(1, count + 1, 2))]

    def last(self, attempt: int = 1) -> str:
        """The last words of an attempt."""
        return next(line.text for line in reversed(self.shown) if line.attempt == attempt)


@contextmanager
def following(kit: Kit, name: str, server: str | None = None) -> Iterator[Followed]:
    """Yields what comes of following a run in another thread; the block's end waits for the run's.

    Args:
        server: another way to the API server, HOST:PORT.
    """
    found = Followed()
    config = kit.kubeconfig["submitter"] if server is None else by_way_of(kit, server)
    cluster = open_cluster(namespace=kit.namespace, kubeconfig=config)

    def work() -> None:
        try:
            found.run = follow(cluster, by_name(cluster, name), found.said.append, found.shown.append)
        except Exception as error:
            found.error = error

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield found
    finally:
        thread.join(240)
        assert not thread.is_alive(), found.said


def by_way_of(kit: Kit, server: str) -> Path:
    """A submitter's kubeconfig whose API server is at another address."""
    config = json.loads(kit.kubeconfig["submitter"].read_text(encoding="utf-8"))
    cluster = config["clusters"][0]["cluster"]
    cluster["tls-server-name"] = urlsplit(cluster["server"]).hostname
    cluster["server"] = f"https://{server}"
    path = kit.folder / f"{server.replace(':', '-')}.kubeconfig"
    path.touch(mode=0o600)
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


class Wire:
    """A way to the API server that can be cut."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.is_down = False
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Breaks every connection there is."""
        there, self._open = self._open, []
        for one in there:
            for act in (lambda one=one: one.shutdown(socket.SHUT_RDWR), one.close):
                quietly(act)

    def close(self) -> None:
        """No way any more."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.is_down:
                near.close()
                continue
            far = socket.create_connection(self._target)
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=pump, args=(source, sink), daemon=True).start()


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Carries bytes until either end is closed."""
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    quietly(lambda: sink.shutdown(socket.SHUT_RDWR))


def quietly(act: Callable[[], object]) -> None:
    """Does what may be done already."""
    try:
        act()
    except OSError:
        return


@pytest.fixture
def wire(kit: Kit) -> Iterator[Wire]:
    """A way to the API server for one test."""
    config = json.loads(kit.kubeconfig["submitter"].read_text(encoding="utf-8"))
    address = urlsplit(config["clusters"][0]["cluster"]["server"])
    wire = Wire(address.hostname or "", address.port or 443)
    yield wire
    wire.close()


def the_pod(kit: Kit, job: str) -> Manifest:
    """The newest pod of a Job."""
    return kit.kubectl.listed("pods", f"batch.kubernetes.io/job-name={job}")[-1]


def test_a_pod_deleted_meanwhile_is_followed_by_its_successor_and_no_line_is_lost_or_repeated(kit: Kit) -> None:
    job = counting(kit, "count-replaced", 150, 0.1)
    with following(kit, job) as found:
        wait_for(lambda: len(found.numbers()) > 30, "lines", lambda: str(found))
        kit.kubectl("delete", "pod", the_pod(kit, job)["metadata"]["name"], "--wait=false")
    assert found.run is not None, found
    assert found.run.state == "complete"
    count = int(found.last(1).removeprefix("leaving after "))
    assert found.is_whole(count), found
    assert found.is_whole(150, 2), found
    assert found.last(2) == "done after 150"


def cut_after(found: Followed, wire: "Wire", *counts: int) -> None:
    """Cuts the connection each time that so many lines have come."""
    for count in counts:
        wait_for(lambda count=count: len(found.numbers()) >= count or found.error, f"line {count}", lambda: str(found))
        wire.cut()


def test_a_connection_that_is_cut_again_and_again_loses_and_repeats_no_line(kit: Kit, wire: Wire) -> None:
    job = counting(kit, "count-cut", 400, 0.05)
    with following(kit, job, wire.address) as found:
        cut_after(found, wire, 1, 60, 120, 130, 140, 250, 360)
    assert found.run is not None, found
    assert found.is_whole(400), found
    assert found.last() == "done after 400"


@pytest.mark.full
def test_an_api_server_that_is_away_for_a_while_loses_no_line_and_is_said_once(kit: Kit, wire: Wire) -> None:
    job = counting(kit, "count-away", 250, 0.1)
    with following(kit, job, wire.address) as found:
        wait_for(lambda: len(found.numbers()) >= 20, "lines", lambda: str(found))
        wire.is_down = True
        wire.cut()
        wait_for(
            lambda: any("does not answer" in line for line in found.said) or found.error, "word", lambda: str(found)
        )
        wire.is_down = False
    assert found.run is not None, found
    assert found.is_whole(250), found
    assert len([line for line in found.said if "does not answer" in line]) == 1
    assert "the cluster answers again" in found.said


def test_a_log_that_is_rotated_meanwhile_is_read_on_over_a_cut_too(kit: Kit, wire: Wire) -> None:
    for turn in range(3):
        job = counting(kit, f"count-much-{turn}", 2500, 0.004, width=400)
        with following(kit, job, wire.address) as found:
            cut_after(found, wire, 900, 1800)
        assert found.run is not None, found
        if not any("missing" in line for line in found.said):
            break
        # The kubelet turned the file over just while the connection was cut: what that costs is said.
    assert found.is_whole(2500), found


def test_a_run_deleted_while_it_is_followed_ends_it_with_one_sentence(kit: Kit) -> None:
    job = counting(kit, "count-deleted", 1000, 0.1)
    with following(kit, job) as found:
        wait_for(lambda: len(found.numbers()) > 5, "lines", lambda: str(found))
        kit.kubectl("delete", "job", job, "--cascade=foreground", "--wait=false")
    assert isinstance(found.error, Deleted), found
    assert found.error.exit_code == Code.JOB_FAILED
    assert "\n" not in str(found.error)
    assert found.last().startswith("leaving after")


def test_a_wait_that_is_too_short_leaves_with_3_and_the_run_goes_on(kit: Kit) -> None:
    job = counting(kit, "count-waited", 300, 0.1)
    said = kit.cli("wait", job, "--timeout", "2")
    assert (said.code, said.err.count("\n")) == (Code.TIMED_OUT, 1), said
    assert "it goes on" in said.err
    assert kit.kubectl.get("job", job)["status"].get("active") == 1
    kit.kubectl("delete", "job", job, "--cascade=foreground")


@pytest.mark.full
def test_a_run_whose_image_is_missing_is_stuck_and_not_waited_for(kit: Kit) -> None:
    profile = kit.profile_with("no-image", image="localhost/no-such-image:0")
    run = kit.cli("submit", str(kit.spec("imageless")), "-d", profile=profile).out.strip()
    said = kit.cli("wait", run)
    assert (said.code, said.err.count("\n")) == (Code.STUCK, 1), said
    assert "localhost/no-such-image:0" in said.err
    kit.cli("cancel", run)


@pytest.fixture(scope="module")
def trained(kit: Kit) -> str:
    """The id of a complete run."""
    said = kit.cli("submit", str(kit.spec("followed")), "-d")
    assert said.code == 0, said
    run = said.out.strip()
    waited = kit.cli("wait", run, "--verify")
    assert waited.code == 0, waited
    assert "verified, manifest" in waited.err
    return run


def test_results_are_shown_verified_and_fetched(kit: Kit, trained: str) -> None:
    folder = kit.folder / "fetched"
    said = kit.cli("results", trained, "--verify", "--download", str(folder))
    assert said.code == 0, said
    assert "perplexity" in said.out
    record: dict[str, Any] = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    assert record["run"] == trained
    assert {"adapter_config.json", "adapter_model.safetensors", "run"} <= {path.name for path in folder.iterdir()}
    assert kit.cli("results", str(folder)).out.startswith(f"{trained}: finished")


def test_the_log_without_a_pod_is_that_of_the_store(kit: Kit, trained: str) -> None:
    before = kit.cli("logs", trained)
    assert '"phase": "publish"' in before.out
    kit.kubectl("delete", "pods", "-l", f"tunejob.dev/run={trained}")
    after = kit.cli("logs", trained)
    assert after.code == 0, after
    assert "committed the checkpoint of step 6" in after.out
    assert kit.cli("wait", trained).code == Code.OK


def test_a_store_that_this_machine_cannot_reach_is_one_sentence(kit: Kit, trained: str) -> None:
    dead = kit.profile_with("dead-store", store={"client_endpoint": "http://127.0.0.1:9"})
    said = kit.cli("results", trained, profile=dead)
    assert said.err.count("\n") == 1, said
    assert "store.client_endpoint" in said.err
    assert said.code not in (0, 1)


def test_the_log_of_all_attempts_is_there_afterwards_too(kit: Kit) -> None:
    job = counting(kit, "count-after", 30, 0.01)
    wait_for(lambda: kit.kubectl.get("job", job)["status"].get("succeeded"), "end")
    with kit.python() as door:
        found = list(lines(door.cluster, door.find(job)))
        assert [line.text.split()[0] for line in found] == [*map(str, range(1, 31)), "done"]
        assert [line.text for line in lines(door.cluster, door.find(job), follow=True)] == [line.text for line in found]
