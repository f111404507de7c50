"""What is said to machines: one line of JSON, whole, bounded, and never the reason for a failure."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from job.exits import ExitCode
from job.status import Status
from job.supervision.announce import TERMINATION_BYTES, leave_word


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "log"
    monkeypatch.setenv("TUNEJOB_TERMINATION_LOG", str(path))
    return path


def last_word(path: Path, message: str, code: int = 76) -> bytes:
    path.touch()
    leave_word(Status("toy-1", 3, "publish", 6, 6, 4, exit_code=code, message=message), "abc", 12.34)
    return path.read_bytes()


def test_the_last_word_is_one_line_that_says_how_it_ended(log: Path) -> None:
    line = last_word(log, 'two\nlines, "quoted", ほげ')
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "run": "toy-1",
        "attempt": 3,
        "code": 76,
        "name": "INTEGRITY",
        "phase": "publish",
        "step": 6,
        "steps": 6,
        "committed": 4,
        "manifest_sha256": "abc",
        "seconds": 12.3,
        "message": 'two\nlines, "quoted", ほげ',
    }


@pytest.mark.parametrize("letter", ["x", "あ", "\n", "\x00", '"'])
def test_a_long_message_is_cut_and_the_line_stays_json(letter: str, log: Path) -> None:
    line = last_word(log, letter * 9000)
    assert len(line) <= TERMINATION_BYTES
    assert json.loads(line)["message"].startswith(letter * 400)


@pytest.mark.parametrize("code", ExitCode)
def test_every_code_has_its_name_in_the_last_word(code: ExitCode, log: Path) -> None:
    word = json.loads(last_word(log, "", int(code)))
    assert (word["code"], word["name"]) == (int(code), code.name)


def test_where_there_is_no_such_file_none_is_made(log: Path) -> None:
    leave_word(Status("toy", 1, "own", exit_code=0), None, 1.0)
    assert not log.exists()


TALK = """
    import logging, sys, time
    from job.supervision import announce
    from job.status import Status
    announce.setup_logging()
    speaker = announce.Announcer(lambda: Status("toy", 2, "worker", committed=4))
    speaker.phase("pull")
    for step in range(1, 7):
        speaker.progress({"phase": "train", "step": step, "steps": 6, "loss": 1.5, "tokens_per_second": 10.0})
    speaker.progress({"phase": "evaluate", "what": "tuned"})
    logging.getLogger("job").info("a line for people")
    if "closed" in sys.argv:
        sys.stdout.close()
        speaker.progress({"phase": "evaluate", "what": "base"})
        print("survived", file=sys.stderr)
"""


def talk(*arguments: str, **environment: str) -> tuple[list[str], list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TALK), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_machines_get_lines_of_json_and_people_the_rest() -> None:
    told, said = talk(TUNEJOB_LOG="json")
    words = [json.loads(line) for line in told]
    assert [(word["phase"], word["step"]) for word in words] == [
        ("pull", 0),
        ("train", 1),
        ("train", 6),
        ("evaluate", 0),
    ]
    assert words[1] | {"memory": None} == {
        "run": "toy",
        "attempt": 2,
        "phase": "train",
        "step": 1,
        "steps": 6,
        "loss": 1.5,
        "tokens_per_second": 10.0,
        "committed": 4,
        "memory": None,
    }
    assert said == ["a line for people"]


def test_people_alone_get_no_json() -> None:
    told, said = talk()
    assert told == []
    assert said[0].startswith("step 1 of 6, loss 1.5000")
    assert said[-1] == "a line for people"


def test_a_closed_stdout_disturbs_nothing() -> None:
    assert talk("closed", TUNEJOB_LOG="json")[1][-1] == "survived"
