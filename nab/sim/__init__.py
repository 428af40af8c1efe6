"""Simulation without torch: toy language models, plays on loss matrices, bounds, regret, traces, replays."""

from nab.sim import bounds, environments, exact
from nab.sim.markov import Markov
from nab.sim.play import draws, lazily, play, play_bandit
from nab.sim.regret import (
    best_sequence,
    quantile,
    regret,
    stopping_time_regret,
    switches,
    tracking_regret,
)
from nab.sim.replay import replay
from nab.sim.trace import TraceWriter

__all__ = [
    "Markov",
    "TraceWriter",
    "best_sequence",
    "bounds",
    "draws",
    "environments",
    "exact",
    "lazily",
    "play",
    "play_bandit",
    "quantile",
    "regret",
    "replay",
    "stopping_time_regret",
    "switches",
    "tracking_regret",
]
