"""Loaders: the ways from the one dataset file to batches, all under the contract in `pipelines.batch`."""
