from __future__ import annotations

import itertools

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.runtime import device
from tubelet.runtime.device import Bf16Trial, bf16_trial, choose_device, fast_bf16, matrix_rate, seconds_per_call, set_threads


def test_devices_are_chosen_or_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device().type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="unknown device"):
        choose_device("abacus")
    for name in ("cuda", "mps"):
        there = torch.cuda.is_available() if name == "cuda" else torch.backends.mps.is_available()
        if not there:
            with pytest.raises(UserError, match="no " + name):
                choose_device(name)


def test_a_device_beyond_the_last_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="this machine has no cuda:2; use one up to cuda:1"):
        choose_device("cuda:2")


def test_threads_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        assert set_threads(1) == torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert set_threads() == torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "many")
        assert set_threads() >= 1
        with pytest.raises(UserError, match="threads"):
            set_threads(0)
    finally:
        torch.set_num_threads(before)


def test_the_trial_is_made_once_and_says_why() -> None:
    trial = bf16_trial("cpu")
    assert bf16_trial("cpu") is trial
    assert fast_bf16("cpu") == trial.fast
    if device.has_bf16_instructions():
        assert min(trial.matrix_fp32, trial.matrix_bf16, trial.convolution_fp32, trial.convolution_bf16) > 0.0
        assert "timed" in trial.reason
    assert not fast_bf16("mps")


def test_without_the_instructions_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_bf16_instructions", lambda: False)
    monkeypatch.setattr(device, "seconds_per_call", lambda *a: pytest.fail("timed"))
    assert bf16_trial.__wrapped__("cpu") == Bf16Trial(False, "the processor has no bf16 instructions")


def test_slow_bf16_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_bf16_instructions", lambda: True)
    for times, fast in (([2.0, 2.0, 1.0, 1.0], True), ([1.0, 2.0, 1.1, 1.0], False), ([2.0, 1.0, 1.0, 5.0], False)):
        # In every round another call is disturbed.
        left = itertools.cycle(
            [9.0 * seconds if call == lap % 4 else seconds for lap in range(6) for call, seconds in enumerate(times)]
        )
        monkeypatch.setattr(device, "seconds_per_call", lambda *a, left=left: next(left))
        assert bf16_trial.__wrapped__("cpu").fast is fast


def test_the_matrix_rate_is_plausible() -> None:
    rate = matrix_rate(torch.float32, seconds=0.05)
    assert 1e8 < rate < 1e15


def test_the_fastest_call_counts() -> None:
    calls = []
    assert seconds_per_call(lambda: calls.append(1), torch.device("cpu"), 0.0) < 0.1
    assert len(calls) == 4
