"""FSDP2 shards modules of `moshi` that this module adapts."""


class Shardable:
    """The first base class of modules that can be sharded.

    `fully_shard` gives a module another class, and Python allows that among classes that descend
    from a plain one. The modules of `moshi` descend from an abstract one first.
    """
