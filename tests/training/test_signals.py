"""A signal is answered by a clean stop; a second one ends the process."""

import os
import signal

import pytest
import torch

from minilora.training import signals
from minilora.training.signals import StopSignal

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_requests_a_stop(number: int, capsys: pytest.CaptureFixture):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.agree(1, CPU)
        assert not stop.agreed
        os.kill(os.getpid(), number)
        assert not stop.agreed, "until all processes know"
        stop.agree(2, CPU)
        assert stop.agreed and stop.number == number
    assert f"signal {int(number)}: stopping" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_second_signal_within_seconds_is_the_same():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGTERM


def test_second_signal_later_ends_the_process(monkeypatch: pytest.MonkeyPatch):
    """The signal gets its default effect back, and is sent again."""
    sent = []
    monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", 0)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    with StopSignal() as stop:
        stop.request(signal.SIGTERM, None)
        stop.request(signal.SIGTERM, None)
        assert sent == [(os.getpid(), signal.SIGTERM)]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
