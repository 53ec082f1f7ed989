"""A node's cache of remote shards."""

from everstep.trainer.data.cache.shard_cache import CachedShard, ShardCache, node_cache

__all__ = ["CachedShard", "ShardCache", "node_cache"]
