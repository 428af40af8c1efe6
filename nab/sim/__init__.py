"""Simulation without torch: exact toy language models, regret, traces, replays."""

from nab.sim.markov import Markov
from nab.sim.regret import regret
from nab.sim.replay import replay
from nab.sim.trace import TraceWriter

__all__ = ["Markov", "TraceWriter", "regret", "replay"]
