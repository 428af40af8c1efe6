"""Full-information learners: frozen dataclasses of hyperparameters with three pure functions.

``init`` makes a state, ``probs`` reads the law of the next choice from it, ``update`` makes the next state
from one loss per drafter. Arrays keep drafters on axis 0, ``(n,)`` for one query and ``(n, batch)`` for many.
"""

from nab.learners.hedge import Hedge, HedgeState
from nab.learners.normal_hedge import NormalHedge, NormalHedgeState

__all__ = ["Hedge", "HedgeState", "NormalHedge", "NormalHedgeState"]
