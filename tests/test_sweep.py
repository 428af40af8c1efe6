"""Sweeps: the same table on any backend, kept cell by cell."""

import json
from functools import partial

import joblib
import pytest

import nab
from nab.sim import environments, play, regret
from nab.sim.sweep import label, sweep


def measured(learner, rounds, n, seed):
    losses = environments.bernoulli(environments.gapped(rounds, n), batch=3, rng=seed)
    laws, _ = play(learner, losses)
    return {"regret": float(regret(laws, losses)[-1].max(0).mean())}


GRID = {"learner": [nab.Hedge(), nab.NormalHedge(discount=0.9)], "rounds": [5, 20], "n": [2, 3]}


def test_a_row_for_every_combination():
    table = sweep(measured, GRID)
    assert list(table.columns) == ["learner", "rounds", "n", "regret"]
    assert len(table) == 8
    assert table["learner"].unique().tolist() == [
        "Hedge(rate=None, discount=1.0)",
        "NormalHedge(discount=0.9)",
    ]
    row = table.iloc[5]
    assert (row["rounds"], row["n"]) == (5, 3)
    assert row["regret"] == measured(nab.NormalHedge(discount=0.9), 5, 3, 0)["regret"]


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


def fragile(x, seed, bad=()):
    if x in bad:
        raise RuntimeError(f"no {x}")
    return [{"square": x * x, "part": part} for part in "ab"]


def test_what_was_measured_before_a_crash_is_kept(tmp_path):
    keep = tmp_path / "cells.jsonl"
    with pytest.raises(RuntimeError, match="no 3"):
        sweep(partial(fragile, bad=[3]), {"x": [1, 2, 3, 4]}, keep=keep)
    assert len(keep.read_text().splitlines()) == 2
    keep.write_text(keep.read_text() + '{"cell": "{\\"x\\": 3')  # cut off while it was written
    rest = sweep(partial(fragile, bad=[1, 2]), {"x": [1, 2, 3, 4]}, keep=keep)
    assert rest["square"].tolist() == [1, 1, 4, 4, 9, 9, 16, 16]
    assert rest["part"].tolist() == list("abababab")
    assert sweep(partial(fragile, bad=[1, 2, 3, 4]), {"x": [4, 2]}, keep=keep)["x"].tolist() == [4, 4, 2, 2]
    assert len([json.loads(line) for line in keep.read_text().splitlines()]) == 4
    with pytest.raises(RuntimeError, match="no 1"):  # another seed is another cell
        sweep(partial(fragile, bad=[1]), {"x": [1]}, keep=keep, seed=1)


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
