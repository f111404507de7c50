"""The commands that ask a cluster: what they print in each format, and what they show of a run in trouble."""

import inspect
import io
import json
from argparse import ArgumentParser, _SubParsersAction
from typing import Any

import pytest

import tunejob
from job.layout import MANIFEST
from job.storage.directory import DirectoryStore
from launcher import remote, show, terminal
from launcher.cli import _parser, main
from launcher.codes import Code
from launcher.permissions import PERMISSIONS
from tests.launcher.kit import CRON, Kit, rbac


def retried(kit: Kit) -> tuple[str, str]:
    """A run whose first Job failed and whose second one runs: the names of both. Each pod's log has a line."""
    first = kit.submitted(kit.spec())
    kit.fail(first)
    kit.cli("retry", first, "-d")
    (second,) = set(kit.objects.names("jobs")) - {first}
    for number, job in enumerate((first, second), 1):
        kit.objects.logs[f"{job}-x1y2z"] = f"2026-01-01T00:0{number}:00.0Z line of Job {number}\n"
    return first, second


def test_the_log_is_that_of_every_job_of_the_run_from_the_command_and_from_python(kit: Kit) -> None:
    first, second = retried(kit)
    lines = ["line of Job 1", "line of Job 2"]
    assert kit.cli("logs", "run").out.splitlines() == lines
    assert [(line.attempt, line.text) for line in tunejob.logs("run")] == list(enumerate(lines, 1))
    assert kit.cli("logs", first).out.splitlines() == lines[:1], "the older Job by its name"
    kit.fail(second)
    followed = kit.cli("logs", "-f", "run")
    assert (followed.code, followed.out.splitlines()) == (Code.JOB_FAILED, lines)
    assert [line.text for line in tunejob.logs("run", follow=True)] == lines


def test_an_earlier_log_that_cannot_be_read_keeps_nobody_from_the_later(kit: Kit) -> None:
    first, _ = retried(kit)
    away: Any = {"kind": "Status", "code": 500, "message": "dial tcp 10.0.0.5:10250: no route to host"}
    kit.objects.refuse = lambda asked, name: (500, away) if asked == "LOG pods" and name.startswith(first) else None
    said = kit.cli("logs", "run")
    assert (said.code, said.out) == (Code.OK, "line of Job 2\n")
    assert f"{first}-x1y2z: its log cannot be read, node node1 may be away" in said.err


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (500, "dial tcp 10.0.0.5:10250: connect: no route to host", "its log cannot be read, node node1 may be away"),
        (403, rbac("get", "pods/log"), "ada may not get pods/log"),
    ],
    ids=["node away", "not allowed"],
)
def test_a_status_is_shown_though_the_log_cannot_be_read(kit: Kit, code: int, message: str, words: str) -> None:
    job = kit.submitted(kit.spec())
    kit.refuse("LOG pods", code, message)
    said = kit.cli("status", job, "-o", "json")
    found = json.loads(said.out)
    assert (said.code, found["state"], words in found["log"]) == (Code.OK, "running", True), found
    assert kit.cli("why", job).code == Code.OK


@pytest.mark.parametrize(
    ("stdout", "words", "is_followed"),
    [(True, [], True), (False, [], False), (True, ["-o", "json"], False), (True, ["-o", "yaml"], False)],
    ids=["terminal", "pipe", "json", "yaml"],
)
def test_a_run_is_followed_only_where_people_read_what_is_printed(
    kit: Kit, stdout: bool, words: list[str], is_followed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(asked: str, name: str) -> None:
        if asked == "LOG pods":
            kit.objects.logs[name] = ""
            kit.fail(name.removesuffix("-x1y2z"))

    kit.objects.refuse = end
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: stdout)
    said = kit.cli("submit", kit.spec(), *words)
    assert said.code == (Code.JOB_FAILED if is_followed else Code.OK)
    assert ("attempt 1 runs on" in said.err) == is_followed
    if words[1:] == ["json"]:
        assert json.loads(said.out)["namespace"] == "bench"


VERBS = {"GET": "get", "LIST": "list", "APPLY": "patch", "PATCH": "patch", "DELETE": "delete"}


def test_whatever_the_commands_ask_of_a_cluster_is_a_permission_that_doctor_asks_for(kit: Kit) -> None:
    spec, schedule = kit.spec(), kit.spec(scheduling=CRON)
    for words in (["submit", spec, "-d"], ["submit", schedule, "-d"], ["list"], ["status", spec], ["logs", spec]):
        assert kit.cli(*words).code == Code.OK
    kit.fail(kit.objects.names("jobs")[0])
    for words in (["logs", "-f", spec], ["wait", spec], ["why", spec], ["retry", spec, "-d"], ["why", schedule]):
        kit.cli(*words)
    for words in (["cancel", spec], ["delete", spec, "--yes"], ["delete", schedule, "--yes"]):
        assert kit.cli(*words).code == Code.OK
    asked = {(VERBS[word], resource) for word, resource in map(str.split, kit.objects.asked) if word in VERBS}
    known = {(verb, need.resource) for needs in PERMISSIONS.values() for need in needs for verb in need.verbs}
    assert asked - known == {("get", "version"), ("get", "namespaces")}, "which need no Role, or one's own namespace"


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_every_command_of_a_run_prints_its_result_as_data(kit: Kit, form: str) -> None:
    kit.objects.run_seconds = 0
    spec = kit.spec()
    job = kit.submitted(spec)
    for words in (["check", spec], ["list"], ["status", job], ["why", job], ["wait", job], ["delete", job, "--yes"]):
        said = kit.cli(*words, "-o", form)
        assert said.code == Code.OK, said
        assert job[:-9] in said.out, (words, said)
        assert said.out[0] in ("{[" if form == "json" else "rs-"), said.out
    kit.objects.run_seconds = 3600
    kit.submitted(spec)
    said = kit.cli("cancel", job, "-o", form)
    assert (said.code, "cancelled" in said.out) == (Code.OK, True), said


def test_a_deactivated_workload_is_a_failed_run_and_nothing_to_verify(kit: Kit) -> None:
    job = kit.submitted(kit.spec())
    found = kit.got("jobs", job)
    labels = found["metadata"]["labels"] | {"kueue.x-k8s.io/queue-name": "gpus"}
    suspended = {"spec": found["spec"] | {"suspend": True}, "metadata": found["metadata"] | {"labels": labels}}
    kit.objects.put("jobs", found | suspended | {"status": {}})
    owner = {"uid": found["metadata"]["uid"]}
    workload = {"metadata": {"name": "w", "ownerReferences": [owner]}, "spec": {"active": False}}
    kit.objects.put("workloads", workload)
    kit.objects.put("localqueues", {"metadata": {"name": "gpus"}})
    said = kit.cli("wait", job, "--verify")
    assert (said.code, "Kueue deactivated it" in said.err) == (Code.JOB_FAILED, True), said.err


@pytest.mark.parametrize(("is_published", "code"), [(True, Code.OK), (False, Code.JOB_FAILED)])
@pytest.mark.parametrize("words", [["wait"], ["logs", "-f"]], ids=["wait", "logs"])
def test_a_run_that_is_deleted_while_it_is_watched_ends_as_the_store_says(
    kit: Kit, words: list[str], is_published: bool, code: Code, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = kit.submitted(kit.spec())
    store = DirectoryStore(kit.folder / "store")
    if is_published:
        store.write(MANIFEST, b"{}")
    monkeypatch.setattr(remote, "open_store", lambda uri, settings: store)

    def delete(asked: str, name: str) -> None:
        if asked == "GET jobs":
            kit.objects.refuse = lambda asked, name: None
            kit.objects.delete("jobs", job, {})

    kit.objects.refuse = delete
    said = kit.cli(*words, job)
    assert said.code == code, said
    assert "was deleted meanwhile" in said.err
    assert ("is published" in said.err) == is_published


def test_a_queued_run_has_no_log_yet_and_the_store_is_not_asked_for_one(kit: Kit) -> None:
    job = kit.submitted(kit.spec())
    found = kit.got("jobs", job)
    kit.objects.delete("pods", f"{job}-x1y2z", {})
    kit.objects.put("jobs", found | {"spec": found["spec"] | {"suspend": True}, "status": {}})
    said = kit.cli("logs", job)
    assert (said.code, f"{job[:-9]}: no log yet, it is queued" in said.err) == (Code.REFUSED, True), said.err


def test_what_steers_a_terminal_is_shown_to_one_and_piped_as_it_is() -> None:
    text = "red \x1b[31m\x1b]0;title\x07\ttab\r over \x9b2J \u202e"
    screen, pipe = Screen(), io.StringIO()
    assert terminal.fit(text, screen) == "red \\x1b[31m\\x1b]0;title\\x07\ttab\\r over \\x9b2J \\u202e"
    assert terminal.fit(text, pipe) == text


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def test_a_stream_that_lacks_a_character_gets_another_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    assert main(["check", "日本.yaml"]) == Code.INVALID
    assert b"\\u65e5\\u672c.yaml: no such file" in raw.getvalue()


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ({"phase": "train", "steps": 5}, "train"),
        ({"phase": "train", "step": 1, "steps": 5, "loss": "nan"}, "train 1/5"),
        ({"phase": "pull", "of": 4}, "pull"),
        ({"phase": "pull", "of": 4e6, "bytes": 1e6}, "pull  1 of 4 MB"),
        ({"phase": "train", "step": 1, "steps": 5, "loss": 1, "tokens_per_second": "many"}, "train 1/5  loss 1.0000"),
    ],
)
def test_a_line_of_progress_without_a_figure_is_shown_without_it(word: dict[str, Any], line: str) -> None:
    assert show.progress_line({"run": "r", "attempt": 1} | word) == line


FUNCTIONS = {"list": "runs", "train-lora": "train", "train-qlora": "train"}
"""Verbs that are another word in Python."""
NAMES = {"set": "overrides", "all": "everything", "lang": "language", "adapter": "run", "runs": "runs"}
"""Options that are another word in Python, besides those of ``ELSEWHERE``."""
ELSEWHERE = {
    "render": {"output": "folder"},
    "train": {"output": "output"},
    "merge": {"output": "output"},
}
"""Verbs whose -o is no format."""
OF_A_TERMINAL = {"help", "print", "detach", "yes"}
"""Options that say how it is shown or asked."""


def verbs() -> dict[str, ArgumentParser]:
    parser, _ = _parser()
    (found,) = (action for action in parser._actions if isinstance(action, _SubParsersAction))
    return dict(found.choices)


@pytest.mark.parametrize("verb", [verb for verb in verbs() if not verb.startswith("train-")])
def test_each_verb_and_each_of_its_options_is_a_documented_call_of_tunejob(verb: str) -> None:
    function = getattr(tunejob, FUNCTIONS.get(verb, verb))
    parameters = inspect.signature(function).parameters
    for action in verbs()[verb]._actions:
        name = ELSEWHERE.get(verb, {}).get(action.dest, NAMES.get(action.dest, action.dest))
        if name in OF_A_TERMINAL or (name == "output" and verb not in ELSEWHERE):
            continue
        assert name in parameters, f"tunejob.{function.__name__} has no {name} ({verb} {action.option_strings})"
        is_plain = name in ("spec", "run", "runs", "profile", "follow", "overrides")
        assert is_plain or f"{name}:" in function.__doc__ or f"``{name}``" in function.__doc__, name
    assert function.__name__ in tunejob.__all__


def test_what_the_cluster_warns_of_is_said_beside_what_it_refuses(kit: Kit) -> None:
    full = {"hard": {"pods": "1"}, "used": {"pods": "1"}}
    kit.objects.put("resourcequotas", {"metadata": {"name": "small"}, "status": full})
    said = kit.cli("check", kit.spec(), "--cluster", "-o", "json")
    assert [line for line in json.loads(said.out)["remarks"] if "small" in line], said
    kit.refuse("DRY jobs", 403, 'admission webhook "x" denied the request: no')
    said = kit.cli("check", kit.spec(), "--cluster")
    assert (said.code, "small" in said.err, "denied the request" in said.err) == (Code.REFUSED, True, True), said


def test_python_renders_to_a_folder_and_checks_against_profile_and_cluster(kit: Kit) -> None:
    rendered = tunejob.render(kit.spec(), folder=kit.folder / "deploy")
    assert (kit.folder / "deploy" / "objects" / f"{rendered.run}.yaml").is_file()
    with pytest.raises(tunejob.JobError, match="no LocalQueue absent"):
        tunejob.check(kit.spec(scheduling={"queue": "absent"}), cluster=True)
    assert tunejob.check(kit.spec(scheduling=CRON), profile="tunejob.profile.yaml").name == "run"
