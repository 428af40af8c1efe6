"""Sweeps: the same table on any backend, kept cell by cell."""

import json
from functools import partial

import joblib
import numpy as np
import pytest

import nab
from nab.learners import bandits
from nab.losses import Length
from nab.sim import environments, play, play_bandit, regret
from nab.sim.sweep import label, play_row, sweep

PLAYERS = [nab.Hedge(), nab.NormalHedge(discount=0.9)]
GRID = {"player": PLAYERS, "path": [environments.gapped], "rounds": [5, 20], "n": [2, 3]}
measured = partial(play_row, batch=3)


def test_a_row_for_every_combination():
    table = sweep(measured, GRID)
    found = ["regret", "error", "switches", "evaluations"]
    assert list(table.columns) == ["player", "path", "rounds", "n", *found]
    assert len(table) == 8
    assert table["player"].unique().tolist() == [
        "Hedge(rate=None, discount=1.0)",
        "NormalHedge(discount=0.9)",
    ]
    row = table.iloc[5]
    assert (row["rounds"], row["n"]) == (5, 3)
    assert row["regret"] == measured(PLAYERS[1], environments.gapped, rounds=5, n=3, seed=0)["regret"]


def test_workers_and_backends_change_nothing():
    alone = sweep(measured, GRID, seed=3)
    assert sweep(measured, GRID, seed=3, jobs=2).equals(alone)
    with joblib.parallel_config(backend="threading"):
        assert sweep(measured, GRID, seed=3, jobs=2).equals(alone)
    assert not sweep(measured, GRID, seed=4).equals(alone)


def test_a_local_dask_cluster_changes_nothing():
    from dask.distributed import Client, LocalCluster

    alone = sweep(measured, GRID)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        assert sweep(measured, GRID, jobs=-1).equals(alone)


BAD = set()


def fragile(x, seed):
    if x in BAD:
        raise RuntimeError(f"no {x}")
    return [{"square": x * x, "part": part} for part in "ab"]


def failing(*bad, **given):
    """A sweep of ``fragile`` that fails at these x."""
    BAD.clear()
    BAD.update(bad)
    return sweep(fragile, **given)


def test_what_was_measured_before_a_crash_is_kept(tmp_path):
    keep = tmp_path / "cells.jsonl"
    with pytest.raises(RuntimeError, match="no 3"):
        failing(3, grid={"x": [1, 2, 3, 4]}, keep=keep)
    assert len(keep.read_text().splitlines()) == 2
    keep.write_text(keep.read_text() + '{"cell": "{\\"x\\": 3')  # cut off while it was written
    rest = failing(1, 2, grid={"x": [1, 2, 3, 4]}, keep=keep)
    assert rest["square"].tolist() == [1, 1, 4, 4, 9, 9, 16, 16]
    assert rest["part"].tolist() == list("abababab")
    assert failing(1, 2, 3, 4, grid={"x": [4, 2]}, keep=keep)["x"].tolist() == [4, 4, 2, 2]
    assert len([json.loads(line) for line in keep.read_text().splitlines()]) == 4
    with pytest.raises(RuntimeError, match="no 1"):  # another seed is another cell
        failing(1, grid={"x": [1]}, keep=keep, seed=1)


def scaled(x, seed, factor):
    return {"y": factor * x}


def test_another_measure_is_another_cell(tmp_path):
    keep = tmp_path / "cells.jsonl"
    assert sweep(partial(scaled, factor=2), {"x": [1]}, keep=keep)["y"].tolist() == [2]
    assert sweep(partial(scaled, factor=3), {"x": [1]}, keep=str(keep))["y"].tolist() == [3]


def test_rows_do_not_hide_their_cell():
    with pytest.raises(ValueError, match=r"rows must not have the columns \['square'\] of their cell"):
        sweep(lambda square, seed: {"square": 0}, {"square": [1]})


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"delay": -1}, "delay must be a whole number, at least 0, got -1"),
        ({"draft_len": 0}, "draft_len must be a whole number, at least 1, got 0"),
        ({"draft_len": 31}, "rounds must be a whole number, at least 31, got 30"),
        ({"period": 0}, "period must be a whole number, at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_named(numbers, message):
    with pytest.raises(ValueError, match=message):
        play_row(nab.Hedge(), environments.gapped, rounds=30, n=3, **numbers)


def test_a_damaged_file_is_named(tmp_path):
    keep = tmp_path / "cells.jsonl"
    keep.write_text('{"cell": "a", "rows": []}\nnonsense\n{"cell": "b", "rows": []}\n')
    with pytest.raises(ValueError, match=r"cells.jsonl, line 2 is no kept cell"):
        sweep(fragile, {"x": [1]}, keep=keep)


def test_cells_that_look_alike_are_refused():
    with pytest.raises(ValueError, match=r'has the cell .*"x": 1.* twice'):
        sweep(fragile, [{"x": 1}, {"x": 1}])


def test_labels():
    assert label(partial(environments.gapped, gap=0.2)) == "gapped(gap=0.2)"
    assert label(environments.comb) == "comb"
    assert label(None) is None


def test_a_row_is_what_plays_and_regrets_say():
    means = environments.gapped(30, 3, gap=0.3)
    losses = environments.bernoulli(means, batch=4, rng=7)
    path = partial(environments.gapped, gap=0.3)
    row = play_row(nab.Hedge(), path, rounds=30, n=3, delay=2, batch=4, seed=7)
    laws, _ = play(nab.Hedge(), losses, delay=2)
    found = regret(laws, losses)[-1].max(0)
    assert row["regret"] == found.mean()
    assert row["error"] == found.std(ddof=1) / 2
    moves = sum(abs(laws[t + 1, :, k] - laws[t, :, k]).sum() / 2 for t in range(29) for k in range(4)) / 4
    assert row["switches"] == pytest.approx(moves, rel=1e-12)
    length = np.stack(
        [Length(3, plug_in=True)(1 - losses[:, :, k], 1 - losses[:, :, k]) for k in range(4)], 2
    )
    row = play_row(nab.Hedge(), path, rounds=30, n=3, draft_len=3, batch=4, seed=7)
    assert row["regret"] == regret(play(nab.Hedge(), length, delay=2)[0], length)[-1].max(0).mean()
    lazy = play_row(nab.Hedge(), path, rounds=30, n=3, period=5, batch=4, seed=7)
    assert (lazy["evaluations"], lazy["switches"] < row["switches"]) == (0.2, True)


def test_bandits_are_known_by_their_update():
    row = play_row(bandits.EXP3(), environments.gapped, rounds=30, n=3, batch=4, seed=2)
    assert row["evaluations"] == 0
    losses = environments.bernoulli(environments.gapped(30, 3), batch=4, rng=2)
    arms, _ = play_bandit(bandits.EXP3(), losses, rng=(2, 1))  # draws of their own, not the losses' numbers
    assert row["regret"] == regret(arms, losses)[-1].max(0).mean()
    with pytest.raises(ValueError, match="a bandit needs draft_len 1, delay 0, period 1, got 1, 2, 1"):
        play_row(bandits.UCB1(), environments.gapped, rounds=30, n=3, delay=2)
