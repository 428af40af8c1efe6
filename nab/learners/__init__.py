"""Full-information learners: frozen dataclasses of hyperparameters with three pure functions.

``init`` makes a state, ``probs`` reads the law of the next choice from it, ``update`` makes the next state
from one loss per drafter. Arrays keep drafters on axis 0, ``(n,)`` for one query and ``(n, batch)`` for many.
``flat`` and ``restored`` save a state; ``nab.learners.bandits`` has the baselines that see one loss a round.
"""

from nab.learners import bandits
from nab.learners.ada_normal_hedge import AdaNormalHedge, AdaNormalHedgeTV
from nab.learners.fixed_share import FixedShare
from nab.learners.hedge import AdaHedge, FollowTheLeader, Hedge, OptimisticHedge
from nab.learners.normal_hedge import NormalHedge, NormalHedgeBH
from nab.learners.saving import flat, restored
from nab.learners.squint import Squint
from nab.learners.wrappers import Blocks, Interleaved

__all__ = [
    "AdaHedge",
    "AdaNormalHedge",
    "AdaNormalHedgeTV",
    "Blocks",
    "FixedShare",
    "FollowTheLeader",
    "Hedge",
    "Interleaved",
    "NormalHedge",
    "NormalHedgeBH",
    "OptimisticHedge",
    "Squint",
    "bandits",
    "flat",
    "restored",
]
