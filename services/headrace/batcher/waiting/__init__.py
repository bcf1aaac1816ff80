"""Holds requests until a worker has a free slot: the queue, admission, batches, and the choice of worker."""
