"""What a run is: every key with its type, default, unit and meaning. No torch here, so that a login node can check it.

YAML in conf/ says only what differs from these defaults and which plug-in is used. A plug-in (task, model, data,
optimizer, hooks) is a node with `_target_`; its constructor is its schema.
"""

from everstep.config.aliases import meant
from everstep.config.choices import (
    BadSample,
    Buffers,
    Busy,
    Dtype,
    Goal,
    Nonfinite,
    ParallelKind,
    Progress,
    Shape,
    Weights,
    Worker,
    require,
)
from everstep.config.groups import (
    CheckpointConfig,
    EvaluateConfig,
    ExcludeConfig,
    LoaderConfig,
    LocalTierConfig,
    LogConfig,
    NonfiniteConfig,
    OrderConfig,
    ParallelConfig,
    PrecisionConfig,
    ResumeConfig,
    ScheduleConfig,
    StopConfig,
    WandbConfig,
    first_steps_without,
)
from everstep.config.run import (
    FREE_ON_RESUME,
    OPEN_NODES,
    Node,
    RunConfig,
)

__all__ = [
    "FREE_ON_RESUME",
    "OPEN_NODES",
    "BadSample",
    "Buffers",
    "Busy",
    "CheckpointConfig",
    "Dtype",
    "EvaluateConfig",
    "ExcludeConfig",
    "Goal",
    "LoaderConfig",
    "LocalTierConfig",
    "LogConfig",
    "Node",
    "Nonfinite",
    "NonfiniteConfig",
    "OrderConfig",
    "ParallelConfig",
    "ParallelKind",
    "PrecisionConfig",
    "Progress",
    "ResumeConfig",
    "RunConfig",
    "ScheduleConfig",
    "Shape",
    "StopConfig",
    "WandbConfig",
    "Weights",
    "Worker",
    "first_steps_without",
    "meant",
    "require",
]
