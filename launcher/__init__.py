"""What runs on a laptop or in CI: checks specs, starts runs and reads their results."""
