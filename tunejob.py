"""tunejob from Python: what the command line does, as data instead of text.

    import tunejob

    results = tunejob.train("configs/quickstart.yaml")
    results["evaluation.tuned.exact_match"]

Importing this module imports nothing heavy; each call brings what it needs. What goes wrong in a foreseen way is a
``tunejob.JobError``, whose sentence says what was looked for and what to try, and whose ``exit_code`` is the command
line's.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import JobError, error_for

if TYPE_CHECKING:
    from job.spec import JobSpec
    from launcher.doctor import Check
    from launcher.render import Rendered
    from launcher.results import Results
    from launcher.runs import Run
    from launcher.stream import Line
    from launcher.submit import Submitted
    from launcher.verbs import Door
    from launcher.why import Cause

__all__ = [
    "JobError",
    "cancel",
    "check",
    "compare",
    "delete",
    "doctor",
    "logs",
    "merge",
    "render",
    "results",
    "retry",
    "runs",
    "schema",
    "status",
    "submit",
    "train",
    "wait",
    "why",
]


def check(
    spec: "str | Path | Mapping[str, Any] | JobSpec",
    overrides: Sequence[str] = (),
    profile: str | None = None,
    data: bool = False,
    samples: "str | Path | None" = None,
    cluster: bool = False,
) -> "JobSpec":
    """The spec, validated and with every default spelled out.

    Args:
        spec: a file's name, or what would stand in the file.
        overrides: changes such as ``"training.learning_rate=1e-4"``.
        profile: name or file; the spec has to fit it too.
        data: prepares the data as a run would; stderr says what becomes of it.
        samples: the same, and a few rows to this file, what is trained marked.
        cluster: asks the profile's cluster whether it would take the spec.

    Raises:
        JobError: the spec cannot be used; every problem on a line of its own.
    """
    from launcher import checking

    checked = _read(spec, overrides)
    if cluster:
        checking.against_cluster(checked, profile, lambda line: None)
    elif profile is not None:
        checking.against_profile(checked, profile)
    if data or samples:
        from launcher.profile import load

        known = load(profile) if profile is not None or cluster else None
        if code := checking.look_at_data(checked, known, str(samples) if samples else None, is_talk=True):
            raise error_for(code, f"{checked.name}: its data cannot be used (exit {code}); the lines above say why")
    return checked


def _read(spec: "str | Path | Mapping[str, Any] | JobSpec", overrides: Sequence[str]) -> "JobSpec":
    from job.spec import JobSpec, parse, read, resolved
    from job.strict_yaml import dump_document

    if isinstance(spec, JobSpec):
        spec = spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if isinstance(spec, Mapping):
        return resolved(parse(dump_document(spec), "spec", overrides))
    return resolved(read(Path(spec), overrides))


def train(
    spec: "str | Path | Mapping[str, Any] | JobSpec",
    output: "str | Path" = "file:./runs",
    overrides: Sequence[str] = (),
) -> "Results":
    """Trains, evaluates and publishes a run on this machine, and gives its results.

    A run that is finished already is not trained again; one that was interrupted goes on. Progress goes to stderr.

    Args:
        output: folder of runs; each run has a folder of its own in it.

    Raises:
        JobError: the run did not come to its end; its class says whose problem it is.
    """
    from launcher.local import under, work
    from launcher.results import load

    checked = _read(spec, overrides)
    finished = work(checked, under(str(output), checked))
    if finished.code:
        raise error_for(finished.code, str(finished))
    return load(finished.folder)


def results(
    run: "str | Path",
    profile: str | None = None,
    download: "str | Path | None" = None,
    everything: bool = False,
    verify: bool = False,
) -> "Results":
    """What a finished run left: ``results(run)["evaluation.tuned.loss"]``; None for a figure it does not have.

    Args:
        run: its folder, or with a profile the name of a run on the cluster.
        profile: name or file; left out: ``run`` is a folder, or the default profile's run.
        download: folder to fetch the adapter and what belongs to it to, every file proven; ``uri`` is then that.
        everything: fetches checkpoints and the run's records too.
        verify: proves size and SHA-256 of every published file.

    Raises:
        JobError: there is no finished run, or it is not what was published.
    """
    from dataclasses import replace

    from launcher.verbs import results_of

    found = results_of(str(run), profile)
    if verify or download:
        found.verified()
    if not download:
        return found.results
    found.download(Path(download), everything)
    return replace(found.results, uri=str(download))


def render(
    spec: "str | Path | Mapping[str, Any] | JobSpec",
    profile: str | None = None,
    overrides: Sequence[str] = (),
    folder: "str | Path | None" = None,
    rerender: bool = False,
) -> "Rendered":
    """The manifests of a spec: ``.objects``, in the order in which they are applied. Nothing is asked.

    Args:
        folder: writes them there too, for ``kubectl apply -k`` and GitOps.
        rerender: writes files of the same run again, after an upgrade.

    Raises:
        JobError: spec or profile cannot be used, or the folder.
    """
    from launcher.verbs import bundle, rendered

    checked = _read(spec, overrides)
    if folder:
        bundle(Path(folder), checked, profile, rerender)
    return rendered(checked, profile)


def submit(
    spec: "str | Path | Mapping[str, Any] | JobSpec",
    profile: str | None = None,
    overrides: Sequence[str] = (),
    replace: bool = False,
) -> "Submitted":
    """Puts a run on the cluster, or finds it there; ``.run`` is the run, ``.remarks`` what the server warned of, quota,
    and runs of the same name. Returns when its first pod stands.

    Args:
        replace: takes another active Job of the same run away first.

    Raises:
        JobError: what stands against it; ``exit_code`` as the command's.
    """
    return _door(profile).submit(_read(spec, overrides), replace)


def runs(profile: str | None = None) -> "list[Run]":
    """Every run of the profile's namespace, newest first (``tunejob list``)."""
    return _door(profile).runs()


def status(run: str, profile: str | None = None) -> dict[str, Any]:
    """A run's state, progress and attempts, as ``tunejob status -o json`` prints them.

    Args:
        run: its id, its Job's name, or the beginning of either.
    """
    return _door(profile).status(run)


def logs(run: str, profile: str | None = None, follow: bool = False, tail: int | None = None) -> "Iterator[Line]":
    """The lines of every attempt's log, oldest first; with ``follow`` until the run ends.

    Args:
        tail: only so many lines at the end of each attempt.
    """
    return _door(profile).logs(run, follow, tail)


def wait(
    run: str,
    profile: str | None = None,
    timeout: float | None = None,
    start_timeout: float | None = None,
    verify: bool = False,
) -> "Run":
    """The run once it has ended, complete or failed: ``.state`` says which.

    Args:
        timeout: seconds until it has ended.
        start_timeout: seconds until a pod of it runs.
        verify: proves every file in the store when it is complete.

    Raises:
        JobError: it cannot start, the time is over, or it was deleted.
    """
    return _door(profile).wait(run, timeout, start_timeout, verify)


def why(run: str, profile: str | None = None) -> "list[Cause]":
    """Why a run waits, failed, or is where it is; the likeliest cause first."""
    return _door(profile).why(run)


def retry(run: str, profile: str | None = None) -> "Submitted":
    """A new Job where a failed one stands; it goes on from the last checkpoint."""
    return _door(profile).retry(run)


def cancel(run: str, profile: str | None = None) -> "Run":
    """Ends a run, and returns when no pod of it is left. What it committed is kept."""
    return _door(profile).cancel(run)


def delete(run: str, profile: str | None = None, data: bool = False) -> list[str]:
    """Takes a run off the cluster, with ``data`` out of the store too, without asking; gives what is gone."""
    return _door(profile).delete(run, data)


def doctor(profile: str | None = None) -> "list[Check]":
    """Whether everything a run needs is there: permissions, server, GPUs, queue, store."""
    return _door(profile).doctor()


def _door(profile: str | None) -> "Door":
    from launcher.verbs import Door

    return Door(profile)


def compare(runs: "Sequence[str | Path]", language: str = "en") -> str:
    """A Markdown table of finished runs side by side: memory, speed, accuracy.

    Args:
        runs: the runs' folders.
        language: ``en`` or ``ja``.

    Raises:
        JobError: a run that is not there or not finished, or another language.
    """
    from job.errors import SpecInvalid
    from launcher.compare import LANGUAGES, table

    if language not in LANGUAGES:
        raise SpecInvalid(f"language {language!r}: known are {', '.join(LANGUAGES)}")
    return table([results(run) for run in runs], language)


def merge(
    run: "str | Path",
    output: "str | Path",
    base: "str | Path | None" = None,
    onto: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Makes one model of an adapter and its base, in a folder, and gives how far the two lie apart.

    Args:
        run: folder of a finished run, or of an adapter.
        output: folder that is not there yet.
        base: folder of the base model; left out: the one the adapter names.
        onto: ``16bit``, the base's own weights, or ``dequantised``, those that QLoRA saw; left out: the latter for
            QLoRA.
        dtype: ``float32``, ``bfloat16`` or ``float16``; left out: the base's.

    Returns:
        ``mean_kl`` (nats), ``max_abs_logit``, ``same_first_choice`` (a share) and ``tokens`` of the comparison.

    Raises:
        JobError: it cannot be merged; stderr has said why.
    """
    import json

    from launcher.merging import merge as merged

    if code := merged(str(run), str(output), str(base) if base else None, onto, dtype):
        raise error_for(code, f"{run}: not merged (exit {code}); the lines above say why")
    difference: dict[str, Any] = json.loads((Path(output) / "merge.json").read_text(encoding="utf-8"))["difference"]
    return difference


def schema() -> dict[str, Any]:
    """The JSON Schema of a spec, for editors and other checkers."""
    from job.spec import json_schema

    return json_schema()
