"""What tests measure by the way, printed once at the end (``tests/conftest.py``)."""

FIGURES: list[str] = []
"""Lines, in the order in which they were found."""
