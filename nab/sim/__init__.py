"""Simulation without torch: toy language models, plays on loss matrices, bounds, regret, traces, replays."""

from nab.sim import bounds, environments
from nab.sim.markov import Markov
from nab.sim.play import draws, play
from nab.sim.regret import regret
from nab.sim.replay import replay
from nab.sim.trace import TraceWriter

__all__ = ["Markov", "TraceWriter", "bounds", "draws", "environments", "play", "regret", "replay"]
