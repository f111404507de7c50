"""The exit contract is complete, and the errors agree with it."""

import pytest

from job.errors import ERRORS, JobError, SpecInvalid, error_for
from job.exits import CONTAINER, EXITS, ExitCode, JobReaction, pod_failure_policy

REACTIONS = {
    JobReaction.COMPLETE: {0},
    JobReaction.IGNORE: {81, 143},
    JobReaction.FAIL: {2, 64, 65, 66, 73, 76, 77, 78, 83, 86, 93, 94},
    JobReaction.COUNT: {1, 70, 74, 75, 80, 82, 85, 137},
}


def test_every_code_has_a_row_with_words_of_its_own():
    assert set(EXITS) == set(ExitCode)
    meanings = [row.meaning for row in EXITS.values()]
    assert all(meanings)
    assert len(set(meanings)) == len(meanings)


@pytest.mark.parametrize("reaction", JobReaction)
def test_the_job_reacts_as_the_contract_says(reaction):
    assert {int(code) for code, row in EXITS.items() if row.reaction is reaction} == REACTIONS[reaction]


def test_no_two_errors_share_a_code():
    ours = [kind for kind in JobError.__subclasses__() if kind.__module__ == JobError.__module__]
    assert len(ERRORS) == len(ours)


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_an_error_is_raised_again_as_what_it_was(code):
    error = error_for(int(code), "why")
    assert type(error) is ERRORS[code]
    assert (error.exit_code, str(error)) == (code, "why")


@pytest.mark.parametrize("code", [1, 3, -9, 1000])
def test_an_unknown_code_is_an_unclassified_failure(code):
    assert error_for(code, "why").exit_code is ExitCode.CRASH


def test_an_invalid_spec_leaves_with_78():
    assert SpecInvalid.exit_code == 78


def test_the_policy_of_a_job_says_the_same_as_the_contract():
    disrupted, ignored, failed = pod_failure_policy()["rules"]
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    for rule, action, reaction in ((ignored, "Ignore", JobReaction.IGNORE), (failed, "FailJob", JobReaction.FAIL)):
        assert rule["action"] == action
        codes = rule["onExitCodes"]
        assert (codes["containerName"], codes["operator"]) == (CONTAINER, "In")
        assert codes["values"] == sorted(REACTIONS[reaction])
        # The server takes 1 to 255 unique, sorted codes, and no 0 with In.
        assert 0 not in codes["values"]
