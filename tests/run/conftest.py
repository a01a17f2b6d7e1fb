"""What the tests of accidents share: command lines, and runs to which no accident happened."""

import pytest

from runs import TAUGHT, TINY, TINY_RL, facts, go, processes, watched


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """{stage: command line}. RL starts from a model that knows enough for its rewards to differ."""
    start = tmp_path_factory.mktemp("start")
    go(*TAUGHT, "--out", start)
    return {"sft": TINY, "rl": [*TINY_RL, "--init", start]}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, commands):
    """{stage: (folder, its steps as `watched` sees them)} of runs that nothing happens to."""
    runs = {}
    for stage, command in commands.items():
        folder = tmp_path_factory.mktemp("undisturbed") / stage
        with watched(stage) as steps:
            go(*command, "--out", folder)
        runs[stage] = folder, steps

    # Without rewards that differ, RL would change nothing, and the tests would show nothing
    metrics = facts(runs["rl"][0])["metrics"]
    signals = [float.fromhex(record["signal"]) for record in metrics if "signal" in record]
    assert signals and min(signals) > 0
    return runs


@pytest.fixture(scope="session")
def context():
    """Where processes come from."""
    return processes()
