"""What processes must agree on, without starting any."""

import pytest

from histokd_jax.train import distributed


def test_disagreement_names_the_fact_and_the_odd_process():
    usual = {"config train.lr": 0.1, "version of jax": "0.10.2", "same": 1}
    text = distributed.disagreement([usual, {**usual, "version of jax": "0.9"}, usual], "versions")
    assert 'version of jax ("0.9" on process 1; "0.10.2" on the other 2)' in text
    assert "train.lr" not in text and "same (" not in text


def test_a_fact_that_one_process_lacks_is_a_disagreement():
    text = distributed.disagreement([{"data set": "a"}, {}], "data")
    assert 'data set (null on process 1; "a" on the other 1)' in text


def test_alone_every_agreement_is_immediate():
    distributed.check_agreement({"anything": object}, "nothing is compared")
    distributed.barrier("nobody else")
    assert distributed.broadcast({"a": [1, 0.1]}) == {"a": [1, 0.1]} and distributed.is_main()


def test_a_coordinator_that_cannot_be_reached_is_explained(monkeypatch):
    def unreachable(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", unreachable)
    group = distributed.Group("options", "node1:1234", 2, 1)
    with pytest.raises(ValueError, match="process 1 of 2 could not join.*node1:1234.*DEADLINE.*--coordinator"):
        distributed.initialize(group)
