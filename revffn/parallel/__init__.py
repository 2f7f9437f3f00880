"""Several GPUs, on PyTorch's own distributed engine: one process each, as torchrun and accelerate launch start them.

    launch.py     what the launcher says, and what is refused
    peers.py      which process is gone, when the others cannot go on
    processes.py  the group of processes: rank, work that one of them does for all, sums, output
    shard.py      parameters as shards: FSDP2, experts left where they are (ep), DistributedDataParallel
    states.py     checkpoints of shards, for another number of processes too
"""
