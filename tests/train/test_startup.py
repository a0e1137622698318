"""Before and during the first epoch: memory report, one trace, no transfer that nobody asked for."""

import jax
import jax.numpy as jnp
import pytest

from histokd_jax.train import memory, programs, run


def test_memory_is_reported_before_the_first_step_and_the_step_is_traced_once(
    tiny_config, tmp_path, capsys, monkeypatch
):
    seen, made = [], []
    train = programs.Programs.train

    def watching(self, *args):
        made.append(self)
        result = train(self, *args)
        if not seen:
            seen.append(capsys.readouterr().out)
        return result

    monkeypatch.setattr(programs.Programs, "train", watching)
    run.train(tiny_config(train__max_epochs=1), tmp_path)
    assert "stage online: one step needs " in seen[0] and "MiB per device" in seen[0]
    assert len(made) > 1 and made[0].traces == 1


def test_a_step_that_cannot_fit_is_refused_with_what_to_change():
    need = memory.StepMemory(2**30, 2**30, 0)
    assert "2,048 MiB of 4,096 MiB" in memory.report("stage online", need, 2**32, "H200")
    with pytest.raises(ValueError, match=r"2,048 MiB of 1,024 MiB.*train\.b.*mesh\.fsdp"):
        memory.report("stage online", need, 2**30, "H200")
    assert memory.capacity(jax.devices()[0]) > 2**20


def test_an_implicit_transfer_inside_the_step_loop_is_caught(tiny_config, tmp_path, monkeypatch):
    """The guard is real: a step that mixes in a Python number fails, although it would run without the guard."""
    train = programs.Programs.train

    def careless(self, *args):
        state, loss = train(self, *args)
        return state, jnp.add(loss, 1.5)

    monkeypatch.setattr(programs.Programs, "train", careless)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run.train(tiny_config(), tmp_path / "guarded")
    monkeypatch.setattr(jax, "transfer_guard", lambda level: __import__("contextlib").nullcontext())
    run.train(tiny_config(train__max_epochs=1), tmp_path / "unguarded")
