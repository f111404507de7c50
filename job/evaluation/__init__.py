"""Base against tuned: losses, generated answers, and the check that the sealed adapter loads."""
