"""Simulation without torch: toy models, plays on loss matrices, bounds, regret, costs, traces, replays."""

from nab.sim import bounds, cost, environments, exact
from nab.sim.markov import Markov, domains
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
from nab.sim.trace import Trace, TracedQuery, TraceWriter, read_trace

__all__ = [
    "Markov",
    "Trace",
    "TraceWriter",
    "TracedQuery",
    "best_sequence",
    "bounds",
    "cost",
    "domains",
    "draws",
    "environments",
    "exact",
    "lazily",
    "play",
    "play_bandit",
    "quantile",
    "read_trace",
    "regret",
    "replay",
    "stopping_time_regret",
    "switches",
    "tracking_regret",
]
