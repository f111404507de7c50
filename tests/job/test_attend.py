"""How a child of the supervisor ended: which of several reasons is the one that is told."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from job.errors import BudgetSpent, DataInvalid, InternalError, Interrupted, JobError, RankLost, TemporaryFailure
from job.exits import ExitCode
from job.files import write_json
from job.supervision.attend import Attendant
from job.supervision.leaving import Leaving
from job.workdir import WorkDir

LOST_PEERS = (ExitCode.TEMPFAIL, "a rank of this pod is lost")


def leaving(asked: bool) -> Leaving:
    made = Leaving(120, lambda until: None, lambda: ExitCode.INTERRUPTED)
    if asked:
        made._ask()
    return made


@pytest.mark.parametrize(
    ("said", "code", "asked", "kind"),
    [
        ({"rank-0": LOST_PEERS, "rank-1": None}, 1, False, RankLost),
        ({"rank-0": LOST_PEERS, "rank-1": None}, 1, True, RankLost),
        ({"rank-0": (ExitCode.INTERRUPTED, ""), "rank-1": None}, 1, True, RankLost),
        ({"rank-0": None, "rank-1": None}, None, True, Interrupted),
        ({"rank-0": LOST_PEERS, "rank-1": None}, None, True, Interrupted),
        ({"rank-0": (ExitCode.INTERRUPTED, ""), "rank-1": (ExitCode.INTERRUPTED, "")}, 0, True, Interrupted),
        ({"rank-0": LOST_PEERS, "rank-1": (ExitCode.DATA, "row 7")}, 1, True, DataInvalid),
        ({"rank-0": LOST_PEERS, "rank-1": (ExitCode.DATA, "row 7")}, 1, False, DataInvalid),
        ({"rank-0": LOST_PEERS, "rank-1": LOST_PEERS}, 1, False, TemporaryFailure),
        ({"rank-0": (ExitCode.OK, "")}, 1, False, InternalError),
        ({"rank-0": (ExitCode.OK, "")}, 0, False, None),
    ],
    ids=[
        "a rank vanished",
        "a rank vanished, and the request to leave came meanwhile",
        "a rank vanished while the other left on request",
        "ended by us on request",
        "ended by us on request, and one noticed",
        "both left on request",
        "a real cause, and a request to leave",
        "a real cause, and who lost its peer",
        "both lost their peers",
        "a launcher that fails after its ranks ended well",
        "well",
    ],
)
def test_a_real_cause_is_told_before_a_lost_rank_and_that_before_an_interruption(  # T44
    said: Mapping[str, tuple[ExitCode, str] | None],
    code: int | None,
    asked: bool,
    kind: type[JobError] | None,
    tmp_path: Path,
) -> None:
    workdir = WorkDir(tmp_path)
    for process, outcome in said.items():
        workdir.outcome(process).parent.mkdir(exist_ok=True)
        if outcome is not None:
            write_json(workdir.outcome(process), {"exit_code": int(outcome[0]), "message": outcome[1]})

    attendant = Attendant(
        workdir, leaving(asked), 120, lambda: None, lambda: False, lambda: None, lambda: "nothing was trained yet"
    )
    if kind is None:
        attendant._settle(list(said), code)
        return
    with pytest.raises(kind) as raised:
        attendant._settle(list(said), code)
    assert type(raised.value) is kind


def test_a_budget_that_is_used_up_is_told_where_nothing_vanished_by_itself(tmp_path: Path) -> None:
    def used_up() -> None:
        raise BudgetSpent("used up")

    workdir = WorkDir(tmp_path)
    attendant = Attendant(workdir, leaving(False), 120, lambda: None, lambda: True, used_up, lambda: "")
    with pytest.raises(BudgetSpent):
        attendant._settle(["rank-0"], None)
