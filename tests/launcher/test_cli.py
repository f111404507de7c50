"""The command line: what goes to stdout, what to stderr, and which number comes back."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

import tunejob
from job.exits import ExitCode
from launcher.cli import main
from launcher.local import child_environment, missing_libraries, supervised
from tests.launcher.finished import record, run_folder

ROOT = Path(__file__).resolve().parents[2]
SPEC = "name: support\nmodel: org/base\ndata:\n  train: rows.jsonl\n"


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(SPEC, encoding="utf-8")
    return path


def test_check_says_in_one_line_which_run_it_is(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(spec)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{spec}: ok; run support-")
    assert out.endswith(", lora on org/base\n")
    assert err.startswith("device memory: not estimated: the model's config.json is not here")
    assert err.count("\n") == 1


def test_check_prints_a_spec_that_checks_as_the_same_run(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(spec), "--set", "lora.r=4", "--print"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["lora"]["r"] == 4
    (tmp_path / "printed.yaml").write_text(printed, encoding="utf-8")
    lines = []
    for words in (["check", str(spec), "--set", "lora.r=4"], ["check", str(tmp_path / "printed.yaml")]):
        assert main(words) == 0
        lines.append(capsys.readouterr().out.partition("run ")[2])
    assert lines[0] == lines[1]


def test_schema_is_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == tunejob.schema()


def test_compare_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(run_folder(tmp_path / "run", record()))
    assert main(["compare", run, run, "--lang", "ja"]) == 0
    assert capsys.readouterr().out.count("| LoRA (support-1a2b3c4d) |") == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("check absent.yaml", ExitCode.CONFIG, "absent.yaml: no such file"),
        ("check .", ExitCode.CONFIG, "a directory"),
        ("check run.yaml --set lora.rr=1", ExitCode.CONFIG, "--set: lora.rr: unknown key"),
        ("check broken.yaml", ExitCode.CONFIG, "broken.yaml:2"),
        ("train run.yaml --output s3://b/x", ExitCode.CONFIG, "s3://"),
        ("train-lora", ExitCode.CONFIG, "--train-data"),
        ("train-lora --train-data rows.jsonl --config absent.yaml", ExitCode.CONFIG, "absent.yaml: no such file"),
        ("train-qlora --train-data rows.jsonl --config flat.yaml", ExitCode.CONFIG, "flat.yaml:1: load_in_4bit"),
        ("train-lora --train-data rows.jsonl --output-dir full", ExitCode.CONFLICT, "full is there already"),
        ("train-lora --train-data rows.jsonl --output-dir run", ExitCode.CONFLICT, "--overwrite"),
        ("train-lora --train-data rows.jsonl --output-dir new --resume", ExitCode.NOINPUT, "nothing was begun"),
        ("compare absent", ExitCode.NOINPUT, "absent: no finished run"),
        ("compare s3://b/x", ExitCode.CONFIG, "s3://"),
    ],
)
def test_a_foreseen_problem_is_a_sentence_and_a_code(
    words: str,
    code: ExitCode,
    message: str,
    spec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("name: a\n  b: [\n", encoding="utf-8")
    (tmp_path / "flat.yaml").write_text("load_in_4bit: false\n", encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("", encoding="utf-8")
    run_folder(tmp_path / "run", record())
    assert main(words.split()) == code
    out, err = capfd.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    "words",
    ["", "fly", "check", "train run.yaml --out x", "train-lora --batch-size 0", "train-lora --resume --overwrite"],
)
def test_a_wrong_call_is_code_2_with_the_usage(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words.split())
    assert left.value.code == ExitCode.CALLED_WRONGLY
    assert "usage:" in capsys.readouterr().err


def test_without_torch_training_is_one_sentence_and_the_finished_run_stays(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", record())
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from launcher.cli import main\n"
        f"sys.exit(main(['train-lora', '--train-data', 'x.jsonl', '--output-dir', {str(folder)!r}, '--overwrite']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == ExitCode.CRASH
    assert ended.stderr.splitlines() == [
        "tunejob: training on this machine needs torch: install with  pip install 'tunejob[job]'  "
        "(in a checkout: make set-up)"
    ]
    assert (folder / "run" / "manifest.json").is_file()


def test_libraries_are_looked_for_without_importing_them() -> None:
    assert missing_libraries(("json", "no_such_library_of_anyone")) == ["no_such_library_of_anyone"]


def test_the_child_is_ours_even_beside_another_package_called_job(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "__init__.py").write_text("raise SystemExit('the wrong one')", encoding="utf-8")
    command = [sys.executable, "-m", "job", "--help"]
    ended = subprocess.run(command, cwd=tmp_path, env=child_environment(), capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(("is_talk", "where"), [(False, 0), (True, 1)], ids=["result", "talk"])
def test_what_a_child_prints_is_talk_where_our_own_result_is_data(
    is_talk: bool, where: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert supervised([sys.executable, "-c", "print('rows')"], child_environment(), is_talk) == 0
    assert capfd.readouterr()[where] == "rows\n"


CHILD = """
import signal, sys, time
received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: received.append(number))
print("ready", flush=True)
while not received:
    time.sleep(0.01)
time.sleep(0.3)
print(*received, flush=True)
sys.exit(143)
"""


@contextmanager
def supervising() -> Iterator["subprocess.Popen[str]"]:
    """A launcher that waits for the child above, in a process group of its own as a terminal would make it."""
    code = (
        "import sys; from launcher.local import supervised, child_environment\n"
        f"sys.exit(supervised([sys.executable, '-c', {CHILD!r}], child_environment()))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def test_sigterm_is_passed_on_and_the_child_waited_for() -> None:
    with supervising() as launcher:
        launcher.send_signal(signal.SIGTERM)
        out, _ = launcher.communicate(timeout=30)
    assert (out.split(), launcher.returncode) == ([str(int(signal.SIGTERM))], 143)


def test_ctrl_c_reaches_the_child_once_and_the_launcher_waits_on() -> None:
    with supervising() as launcher:
        os.killpg(launcher.pid, signal.SIGINT)
        out, _ = launcher.communicate(timeout=30)
    assert (out.split(), launcher.returncode) == ([str(int(signal.SIGINT))], 143)


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} main.py schema | head -c 1"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.stdout, ended.stderr) == ("{", "")
