"""A cohort shared by the devices of two processes: each loads and gathers its own rows only."""

import pathlib
import socket
import subprocess
import sys

import numpy as np
import tiny

from data_pipelines import schema
from histokd_jax.methods import registry
from histokd_jax.train import experiment, feed, resident, sharding

ROOT = pathlib.Path(__file__).parents[2]
ROW_FIELDS = (schema.PATCHES, schema.SEGMENT_IDS, schema.POSITIONS)
WORKER = """
import sys
import jax
process, port, data, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process, initialization_timeout=60)
import numpy as np
import test_resident_processes as test
np.savez(out, **test.gathered(data, local=True))
"""


def gathered(data, local=False):
    """Two training steps and one evaluation step on four devices: "step/field" -> rows (of this process)."""
    cfg = experiment.resolve_width(tiny.config.load(tiny.CONFIG, tiny.overrides(data, mesh__data=4)))
    exp = experiment.load_experiment(cfg)
    fold = experiment.fold_data(exp, 0, registry.get_method("mkd")(cfg, exp.data_spec(("genes",))))
    plan = resident.ResidentPlan(sharding.make_mesh(4), [fold.train, *fold.evaluation.values()])
    feeder, out = feed.ResidentFeeder(plan, threads=1), {}
    for part, steps in (("train", feeder.train(fold.train)), ("test", feeder.evaluate(fold.evaluation["test"]))):
        for number, fed in zip(range(2 if part == "train" else 1), steps):
            out[f"{part}{number}/patches_here"] = np.array(fed.patches)
            for name, value in fed.batch.items():
                shards = sorted(value.addressable_shards, key=lambda s: s.device.id)
                rows = [np.array(s.data) for s in (shards if name in ROW_FIELDS else shards[:1])]
                out[f"{part}{number}/{name}"] = np.concatenate(rows)
                assert not local or len(shards) == 2
    return out


def test_two_processes_gather_what_one_gathers(cohort_dir, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "train")]
    code = f"import sys; sys.path[:0] = {folders!r}\n{WORKER}"
    files = [tmp_path / f"{process}.npz" for process in range(2)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(process), str(port), str(cohort_dir), str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process, file in enumerate(files)
    ]
    try:
        texts = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(texts)
    first, second = (dict(np.load(file)) for file in files)
    whole = gathered(cohort_dir)
    assert whole.keys() == first.keys() == second.keys() and len(whole) == 3 * 9
    for key, value in whole.items():
        name = key.split("/")[1]
        if name in ROW_FIELDS:
            assert len(value) == 4
            np.testing.assert_array_equal(np.concatenate([first[key], second[key]]), value, err_msg=key)
        elif name == "patches_here":
            assert first[key] + second[key] == value
        else:
            np.testing.assert_array_equal(first[key], value)
            np.testing.assert_array_equal(second[key], value)
