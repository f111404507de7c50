"""``tunejob check``: whether a spec fits its profile, its data and the cluster, each where it was asked for."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.codes import Refused

if TYPE_CHECKING:
    from job.spec import JobSpec
    from launcher.profile import Profile

Say = Callable[[str], None]


def against_cluster(spec: "JobSpec", profile: str | None, say: Say) -> None:
    """Asks the cluster whether it would take a spec; warnings are said.

    Raises:
        Refused: everything that stands against it, a line each.
    """
    from launcher.verbs import Door

    findings = Door(profile).look(spec)
    for line in findings.warnings:
        say(line)
    if findings.refusals:
        raise Refused("\n".join(findings.refusals))


def against_profile(spec: "JobSpec", profile: str) -> None:
    """Raises SpecInvalid where spec and profile do not fit each other; nothing is asked."""
    from launcher.verbs import rendered

    rendered(spec, profile)


def look_at_data(spec: "JobSpec", profile: "Profile | None", samples: str | None = None, is_talk: bool = False) -> int:
    """Prints what training would make of model and data, read from the profile's store where one is named.

    Args:
        samples: file to write a few rows to, with what is trained of each.
        is_talk: prints it on stderr.

    Returns:
        The code of ``job.exits``; what stands against the data has been said.
    """
    from launcher.local import look
    from launcher.memory import room_of

    if profile is None:
        return look(spec, {}, samples, is_talk=is_talk)
    from launcher.remote import settings_of

    return look(spec, settings_of(profile), samples, room_of(spec, profile), is_talk)
