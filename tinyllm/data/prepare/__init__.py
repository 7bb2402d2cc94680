"""Preparation of any amount of text: cut the input into units, tokenize them in parallel, write token shards.

    inputs -cut-> units of about `shard_size` -workers-> train-N, val-N and a sidecar each -> manifest.json

Which unit is which follows from the inputs and settings alone, so the result does not depend on the number of workers,
and after a kill only the units without a sidecar are left to do. `DIR/.prepare` holds what that needs: the plan,
the sidecars, and lines of streamed inputs that wait for a worker. Of these the plan stays when all is done.
"""

from tinyllm.data.prepare.run import Prepared, prepare

__all__ = ["Prepared", "prepare"]
