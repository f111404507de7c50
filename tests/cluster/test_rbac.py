"""What the shipped Roles let do, and what every verb says where a permission is missing."""

import pytest

from tests.cluster.kit import Kit

pytestmark = pytest.mark.cluster


def test_smoke(kit: Kit) -> None:
    said = kit.cli("list")
    print(said)
