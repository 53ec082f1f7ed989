"""Optimizers that come with Everstep, for `optimizer._target_`."""

from typing import TYPE_CHECKING

from everstep.lazy_names import lazy

if TYPE_CHECKING:
    from everstep.trainer.optimizers.alternating import Alternating
    from everstep.trainer.optimizers.muon_adamw import MuonAdamW

__all__ = ["Alternating", "MuonAdamW"]
__getattr__ = lazy(
    __name__,
    {
        "Alternating": "everstep.trainer.optimizers.alternating",
        "MuonAdamW": "everstep.trainer.optimizers.muon_adamw",
    },
)


def __dir__() -> list[str]:
    return __all__
