"""The process that pid 1 runs: it owns the run, brings inputs, attends the ranks and publishes."""
