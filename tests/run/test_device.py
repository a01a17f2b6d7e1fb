"""The device of a run: which one it is."""

import pytest
import torch

from minatp.run.device import pick_device


@pytest.fixture
def current_device(monkeypatch):
    """A list of the devices that were made the current one, on a machine with two GPUs."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_the_device_of_a_single_process_is_the_current_one(current_device, monkeypatch):
    """Triton launches on it, wherever the tensors are."""
    pick_device("cuda:1")
    assert current_device == [torch.device("cuda:1")]

    # torchrun with one process takes --device as well
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    pick_device("cuda:1")
    assert current_device == 2 * [torch.device("cuda:1")]


def test_several_processes_choose_theirs_later(current_device, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    pick_device("cuda:1")
    assert current_device == []
