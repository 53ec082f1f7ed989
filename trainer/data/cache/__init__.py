"""A node's cache of remote shards."""

from everstep.trainer.data.cache.shard_cache import CachedShard, ShardCache

__all__ = ["CachedShard", "ShardCache"]
