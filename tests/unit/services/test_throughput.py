from __future__ import annotations

from dflow.services.throughput import ANY_QUEUE, Throughput


def test_nothing_ended_means_no_lookahead() -> None:
    assert Throughput().lookahead(0.5, now=100.0) == {}


def test_the_rate_of_the_last_second_times_the_lookahead() -> None:
    throughput = Throughput()
    for n in range(10):
        throughput.ended({"fast": 60, "slow": 1}, now=100.0 + n * 0.1)
    ahead = throughput.lookahead(0.5, now=101.0)
    assert ahead["fast"] == 300
    assert ahead["slow"] == 5
    assert ahead[ANY_QUEUE] == 305


def test_a_few_long_tasks_that_end_together_do_not_fill_the_broker() -> None:
    throughput = Throughput()
    throughput.ended({"default": 8}, now=100.0)
    assert throughput.lookahead(0.5, now=100.0)["default"] == 8


def test_what_ended_long_ago_is_forgotten() -> None:
    throughput = Throughput()
    throughput.ended({"default": 500}, now=100.0)
    assert throughput.lookahead(0.5, now=101.1) == {}
