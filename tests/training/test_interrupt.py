import os
import signal

import pytest

from metricface.training.interrupt import StopRequest


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_the_first_signal_asks_and_the_second_one_insists(number: signal.Signals) -> None:
    said: list[str] = []
    with StopRequest(said.append) as stopped:
        assert not stopped()
        os.kill(os.getpid(), number)
        assert stopped()
        assert "press Ctrl-C again" in said[0]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_a_signal_before_anybody_asked_stops_at_once_as_there_is_nothing_to_save() -> None:
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_from_before_are_back_afterwards() -> None:
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest():
        pass
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before
