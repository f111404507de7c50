"""The ranks: model, adapter, kernels and the loop; its checkpoints, and merging what came of it."""
