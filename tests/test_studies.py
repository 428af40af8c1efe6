"""Studies: each runs small, its table says what theory says, its picture can be drawn."""

import json

import pandas as pd
import pytest
from click.testing import CliRunner

from nab.cli import main
from nab.sim import bounds, environments, studies

SMALL = {"growth": 0.01, "throughput": 0.001, "time": 0.01}


@pytest.fixture(scope="module", params=studies.NAMES)
def measured(request):
    module = studies.load(request.param)
    return request.param, module, module.measure(scale=SMALL.get(request.param, 0.03))


def test_a_study_has_a_table_a_summary_and_a_picture(measured, tmp_path):
    name, module, table = measured
    assert len(table)
    assert len(studies.headline(name)) <= 110
    assert 0 < len(module.summary(table)) <= 100
    module.figure(table).savefig(tmp_path / "picture.png")


def test_the_same_seed_gives_the_same_table(measured):
    name, module, table = measured
    if name != "throughput":
        pd.testing.assert_frame_equal(module.measure(scale=SMALL.get(name, 0.03)), table)


def test_late_and_blockwise_regrets_are_below_their_bounds():
    table = studies.load("lazy").measure(scale=0.03)
    rows = table[table["panel"] == "late"]
    assert len(rows) == 18
    assert (rows["regret"] <= rows["bound"]).all()


def test_hedge_grows_below_its_bound_under_half_mass():
    table = studies.load("growth").measure(scale=0.01)
    rows = table[(table["policy"] == "Hedge") & (table["adversary"] == "half mass")]
    limit = [bounds.hedge_anytime(n, rounds) for n, rounds in zip(rows["n"], rows["rounds"], strict=True)]
    assert (rows["regret"] <= limit).all()


def test_the_leader_loses_every_round_where_sequences_are_made_against_it():
    table = studies.load("leader").measure(scale=0.03)
    last = table[table["rounds"] == 2000].set_index(["environment", "policy"])["regret"]
    best_single = environments.leader_killer(2000).sum(0).min()
    assert last["leader_killer", "FollowTheLeader"] == 0.25 + 1999 - best_single
    assert last["leader_killer", "AdaHedge"] <= bounds.ada_hedge(2, 2000)


def test_lazy_players_learn_late():
    lazy = studies.load("lazy")
    rows = [lazy.lazy("NormalHedge", period, 3, 0)["regret"] for period in (1, 64)]
    assert rows[0] < rows[1]


def test_the_mode_of_fixed_share_is_its_likeliest_drafter():
    """On queries of one domain the mode loses less than a draw: the others have weight for no reason."""
    table = studies.load("switching").measure(scale=0.03)
    still = table[table["switches"] == 0].groupby("policy")["loss"].mean()
    assert still["FixedShare .03, argmax"] < still["FixedShare .03"]


def test_the_worst_adversary_is_the_worst():
    growth = studies.load("growth")
    table = growth.measure(scale=0.01)
    where = ["policy", "rounds", "n"]
    worst = growth.worst(table).groupby(where)["regret"].mean()
    every = table.groupby([*where, "adversary"])["regret"].mean().groupby(where).max()
    pd.testing.assert_series_equal(worst, every)


def test_simulate_makes_its_folder_and_checks_its_numbers(tmp_path):
    run = CliRunner().invoke(main, ["simulate", "cost", "--out", str(tmp_path / "new" / "folder")])
    assert run.exit_code == 0, run.output
    for scale in ("nan", "inf", "1e9"):
        run = CliRunner().invoke(main, ["simulate", "leader", "--scale", scale, "--out", str(tmp_path)])
        assert run.exit_code == 1
        assert "scale must lie in (0, 1000], got" in run.output


def test_simulate_writes_table_picture_and_summary(tmp_path):
    run = CliRunner().invoke(
        main, ["simulate", "leader", "--scale", "0.03", "--out", str(tmp_path), "--jobs", "1"]
    )
    assert run.exit_code == 0, run.output
    assert {path.name for path in tmp_path.iterdir()} == {"leader.csv", "leader.json", "leader.png"}
    about = json.loads((tmp_path / "leader.json").read_text())
    assert about["scale"] == 0.03
    assert len(about["summary"]) == 5
    assert len(pd.read_csv(tmp_path / "leader.csv")) == 3 * 5 * 100


def test_simulate_writes_parquet(tmp_path):
    run = CliRunner().invoke(main, ["simulate", "cost", "--table", "parquet", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert len(pd.read_parquet(tmp_path / "cost.parquet")) > 100


def test_simulate_lists_what_there_is():
    run = CliRunner().invoke(main, ["simulate"])
    assert run.exit_code == 0
    for name in studies.NAMES:
        assert f"{name}: " in run.output


def test_an_unknown_study_is_named():
    run = CliRunner().invoke(main, ["simulate", "gravity"])
    assert run.exit_code == 1
    assert "unknown study 'gravity': choose from" in run.output
