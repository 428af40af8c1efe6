"""Drafter selection for speculative decoding, learned online from full information.

A learner is three pure functions of an explicit state; a language model is one function ``score``;
a verification scheme is one function ``a(x)``; the rest is arithmetic between them.

This package needs numpy and scipy alone. Torch and transformers live behind ``nab.backends``.
"""

from nab import acceptance, learners, losses, sampling, schemes
from nab.acceptance import Chain, Greedy, MultiDraft, TopK, WithoutReplacement
from nab.decode import Round, decode, until
from nab.learners import Hedge, NormalHedge
from nab.losses import Length, Time, Token
from nab.pool import DrafterWarning, Pool
from nab.schemes import DynamicTree, Levels, StaticTree
from nab.selector import BanditSelector, Constant, Selector
from nab.wrappers import Corrected, Lazy

__version__ = "0.1.0"

__all__ = [
    "BanditSelector",
    "Chain",
    "Constant",
    "Corrected",
    "DrafterWarning",
    "DynamicTree",
    "Greedy",
    "Hedge",
    "Lazy",
    "Length",
    "Levels",
    "MultiDraft",
    "NormalHedge",
    "Pool",
    "Round",
    "Selector",
    "StaticTree",
    "Time",
    "Token",
    "TopK",
    "WithoutReplacement",
    "acceptance",
    "decode",
    "learners",
    "losses",
    "sampling",
    "schemes",
    "until",
]
