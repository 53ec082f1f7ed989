"""Config of a run: every key with its type, default, unit and meaning. Torch-free, for login nodes.

YAML in conf/ holds only differences from these defaults and the choice of plug-ins. A plug-in (task, model, data,
optimizer, hooks) is a node with `_target_`; its constructor is its schema.
"""

from everstep.config.checkpoint import CheckpointConfig, LocalTierConfig, ResumeConfig
from everstep.config.choices import (
    Access,
    BadSample,
    Buffers,
    Busy,
    Dtype,
    Goal,
    Nonfinite,
    OnHookError,
    ParallelKind,
    Progress,
    Shape,
    Weights,
    Worker,
    require,
)
from everstep.config.data_loading import ExcludeConfig, LoaderConfig, OrderConfig, PolicyConfig, first_steps_without
from everstep.config.debug import DebugConfig
from everstep.config.groups import (
    EvaluateConfig,
    NonfiniteConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
    StopConfig,
)
from everstep.config.log import LogConfig, WandbConfig
from everstep.config.other_trainers_keys import meant
from everstep.config.run import (
    FREE_ON_RESUME,
    OPEN_KEYS,
    OPEN_NODES,
    Node,
    RunConfig,
)
from everstep.config.run_length import UNRESOLVED, steps_of

__all__ = [
    "FREE_ON_RESUME",
    "OPEN_KEYS",
    "OPEN_NODES",
    "UNRESOLVED",
    "Access",
    "BadSample",
    "Buffers",
    "Busy",
    "CheckpointConfig",
    "DebugConfig",
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
    "OnHookError",
    "OrderConfig",
    "ParallelConfig",
    "ParallelKind",
    "PolicyConfig",
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
    "steps_of",
]
