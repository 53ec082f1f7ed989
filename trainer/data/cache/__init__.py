"""A node's cache of remote shards."""

from trainer.data.cache.shard_cache import CachedShard, ShardCache

__all__ = ["CachedShard", "ShardCache"]
