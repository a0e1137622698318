"""CoCoFNet and its student against the golden values of section 16, in double precision: outputs, losses, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import paired_setup as setup
import pytest

from histokd_jax.methods.hmkd import objective as objectives
from histokd_jax.nn.paired.spec import PairedSpec

INFERENCE = {
    "teacher": [
        [-0.158202076, -0.040769550, 0.034914122, -0.083717439],
        [-0.172624780, -0.034717172, 0.021888153, -0.060684104],
        [-0.228146192, -0.001391543, 0.045844591, -0.129736295],
        [-0.229415032, 0.004739098, 0.047666148, -0.102034962],
    ],
    "student": [
        [0.099158203, 0.167231984, 0.228216112, -0.096767390],
        [0.098923420, 0.147360414, 0.203731886, -0.078244954],
        [0.105054318, 0.153559035, 0.275368341, -0.075874269],
        [0.124352416, 0.154342214, 0.226267664, -0.065450888],
    ],
}
TRAINING = {
    "teacher": [
        [0.627401766, -0.122190021, -0.543950188, 0.720186815],
        [0.265441423, -0.100577126, -0.305422862, -0.220798015],
        [-0.101151606, -0.067311635, -0.112845933, -0.113196890],
        [-0.216849705, -0.204554487, -0.238249661, -0.539998595],
    ],
    "student": [
        [-0.143655412, -0.421196175, 0.143933387, 0.748399928],
        [0.018480698, -0.324523928, 0.264071253, -0.409841784],
        [-0.510212879, -0.590471584, 0.400036028, -0.391271955],
        [-0.362411495, -0.407948852, 0.312904954, -0.181286177],
    ],
}
# Output -> (mean, norm) in inference and in training.
DIGESTS = {
    "teacher": {
        "map_a0": ((1.8865487e-4, 9.9313144e-2), (1.5180534e-3, 6.6483053)),
        "map_a1": ((1.2797269e-4, 1.9532416e-2), (3.7049455e-3, 3.6608681)),
        "map_a2": ((1.5063698e-3, 6.0363438e-2), (1.1914831e-2, 2.1126324)),
        "map_b0": ((-2.0872899e-5, 2.1745159e-2), (1.4949545e-3, 5.2598512)),
        "map_b1": ((-1.4189572e-3, 1.8389324e-1), (-5.1618806e-3, 4.3340412)),
        "map_b2": ((6.6367097e-3, 2.1813782e-1), (-2.5449451e-2, 2.6768204)),
        "stream_a0": ((-1.3135858e-1, 190.15722), (-3.8620775e-2, 551.64563)),
        "stream_a1": ((1.8565152e-2, 103.21514), (2.2681435e-3, 379.48702)),
        "stream_a2": ((3.7243085e-2, 114.65265), (3.2542571e-2, 455.56450)),
        "f3": ((-3.2682024e-3, 38.965960), (4.6193417e-4, 22.958267)),
        "feat": ((0.19857681, 7.7811190), (0.43474824, 15.898471)),
    },
    "student": {
        "map_a0": ((9.2144992e-5, 5.2789752e-2), (1.2912320e-3, 6.4029575)),
        "map_a1": ((-7.9510920e-4, 1.0558678e-1), (5.4528115e-5, 5.3174266)),
        "map_a2": ((6.0633887e-3, 1.9862387e-1), (-2.4946657e-2, 3.5298365)),
        "stream_a0": ((7.8824888e-2, 170.36529), (2.7991872e-2, 538.66361)),
        "stream_a1": ((5.8433810e-2, 105.03621), (-3.0366012e-2, 376.14481)),
        "stream_a2": ((-3.2625931e-2, 66.969161), (2.3296300e-2, 279.91735)),
        "f3": ((3.1402552e-3, 41.083666), (-2.4485690e-4, 21.698104)),
        "feat": ((0.17914443, 7.8043181), (0.44231978, 16.176252)),
    },
}
# Batch norm -> ((mean, norm) of the running mean, the same of the running variance) after one training forward.
STATISTICS = {
    "teacher": {
        ("stream_a_0", "patch", "norm"): ((0.0243314729, 0.6764748735), (0.8968696152, 6.3972288395)),
        ("head", "hidden_norm"): ((-0.0097428567, 0.9830210046), (0.8942148992, 10.4579064343)),
    },
    "student": {
        ("stream_a_0", "patch", "norm"): ((0.0273192639, 0.6757358198), (0.9173724082, 6.5441502515)),
        ("head", "hidden_norm"): ((0.0022731429, 1.0082851438), (0.9243321632, 10.7686754564)),
    },
}
TERMS = ("ce", "kl", "at_0", "at_1", "at_2", "cos", "loss")
STAGE2 = {
    ("block_input", False): (
        1.382925823, 0.005574521, 0.672835941, 0.886750503, 1.017193903, 3.757768331, 7.723049021,
    ),
    ("block_input", True): (
        1.399427291, 0.055939395, 1.847392783, 1.584821655, 1.562132803, 3.986756808, 10.43647073,
    ),
    ("attn_output", False): (
        1.382928015, 0.005576909, 0.672835941, 0.886765713, 1.017178547, 3.757392822, 7.722677946,
    ),
    ("attn_output", True): (
        1.274140015, 0.057785701, 1.847392783, 1.585207278, 1.559873458, 3.985420757, 10.30981999,
    ),
}  # fmt: skip
GRADIENT_NORMS = {"teacher": 6829.844, "block_input": 3468.105, "attn_output": 2035.514}
CORRECTED_LOGITS = {
    False: [0.099401023, 0.167108942, 0.228445683, -0.096579285],
    True: [-0.278206686, -0.383995094, 0.206737162, 0.538676592],
}
# The values are printed with 9 digits; the specification asks for 1e-7 in inference and 1e-5 in training.
TOLERANCE = {False: dict(rtol=2e-7, atol=1e-9), True: dict(rtol=1e-5, atol=1e-8)}
BATCH = {
    "weight": np.ones(4, np.float32),
    "label": np.arange(4, dtype=np.int32),
    "has_label": np.ones(4, bool),
    "has_partner": np.ones(4, bool),
}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def test_the_noise_is_that_of_the_specification():
    first = {
        0: (-0.95137933, 0.26847109, 1.38035398, 0.52379452),
        100_000: (1.71940397, 0.00489520, -0.88600679, 0.74135807),
        900_001: (-0.68124987, -1.22250068, 0.97651911, 1.04915733),
    }
    for stream, values in first.items():
        np.testing.assert_allclose(setup.noise(stream, 4), values, atol=5e-9)


def tiles(model):
    streams = (900_001, 900_002)[: 2 if model == "teacher" else 1]
    return [setup.last(setup.tile(s, 4, 512)) for s in streams]


@functools.cache
def forward(folder, model, train, source="block_input"):
    """(outputs, new statistics) of the filled network."""
    with jax.enable_x64(True):
        spec = PairedSpec(cross_ffn_source=source)
        variables = setup.variables(setup.golden_state(folder, model), model, spec)
        network = setup.NETWORKS[model](spec)

        def run(variables, *tiles):
            return network.apply(variables, *tiles, train, mutable=["batch_stats"])

        compiled = jax.jit(run).lower(variables, *tiles(model)).compile(setup.QUICK)
        return jax.tree.map(np.asarray, compiled(variables, *tiles(model)))


def digest(value):
    return float(np.mean(value)), float(np.linalg.norm(np.asarray(value).ravel()))


@pytest.mark.parametrize(
    "model,train",
    [
        *(("teacher", False), ("student", False), ("student", True)),
        pytest.param("teacher", True, marks=pytest.mark.slow),
    ],
)
def test_golden_outputs(golden_dir, model, train):
    found, new = forward(golden_dir, model, train)
    expected = np.array((TRAINING if train else INFERENCE)[model])
    np.testing.assert_allclose(
        found["logits"], expected, rtol=TOLERANCE[train]["rtol"], atol=6e-10 if not train else 1e-6
    )
    for name, values in DIGESTS[model].items():
        mean, norm = digest(found[name])
        # Means of signed values lose digits to cancellation: a tolerance in units of the norm.
        scale = norm / np.sqrt(found[name].size)
        rtol = TOLERANCE[train]["rtol"]
        np.testing.assert_allclose(norm, values[train][1], rtol=rtol, err_msg=name)
        np.testing.assert_allclose(mean, values[train][0], rtol=rtol, atol=rtol * scale, err_msg=name)
    if train:
        _check_statistics(new["batch_stats"], STATISTICS[model])


def _check_statistics(stats, expected):
    for path, pairs in expected.items():
        leaf = functools.reduce(lambda tree, name: tree[name], path, stats)
        for name, values in zip(("mean", "var"), pairs):
            np.testing.assert_allclose(digest(leaf[name]), values, rtol=1e-5, atol=1e-8, err_msg=f"{path} {name}")


def stage2_outputs(student, teacher):
    spec = objectives.ObjectiveSpec()
    taught = {name: jnp.asarray(teacher[name]) for name in spec.teacher_outputs()}
    return objectives.named("student", student) | objectives.named("teacher", taught)


@pytest.mark.parametrize(
    "source,train",
    [pytest.param(*case, marks=[pytest.mark.slow] if case[0] == "attn_output" else []) for case in STAGE2],
)
def test_golden_losses_of_the_second_stage(golden_dir, source, train):
    student = forward(golden_dir, "student", train, source)[0]
    teacher = forward(golden_dir, "teacher", False)[0]
    loss, metrics = objectives.objective(objectives.ObjectiveSpec(), stage2_outputs(student, teacher), BATCH)
    found = [float(metrics[name][0]) for name in TERMS]
    np.testing.assert_allclose(found, STAGE2[source, train], **TOLERANCE[train])
    # L4: the plain sum of the six terms.
    np.testing.assert_allclose(float(loss), sum(found[:-1]), rtol=1e-12)
    if source == "attn_output":
        np.testing.assert_allclose(student["logits"][0], CORRECTED_LOGITS[train], rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_golden_loss_of_the_first_stage(golden_dir):
    found, _ = forward(golden_dir, "teacher", True)
    loss, _ = objectives.objective(objectives.ObjectiveSpec(), {"teacher_logits": found["logits"]}, BATCH, 0, "teacher")
    np.testing.assert_allclose(float(loss), 1.378867098, rtol=1e-5)


def gradient_norm(folder, model, source="block_input"):
    spec = PairedSpec(cross_ffn_source=source)
    variables = setup.variables(setup.golden_state(folder, model), model, spec)
    network = setup.NETWORKS[model](spec)
    teacher = None if model == "teacher" else forward(folder, "teacher", False)[0]

    def loss(params, *tiles):
        given = {**variables, "params": params}
        found, _ = network.apply(given, *tiles, True, mutable=["batch_stats"])
        if model == "teacher":
            return objectives.objective(
                objectives.ObjectiveSpec(), {"teacher_logits": found["logits"]}, BATCH, 0, model
            )[0]
        return objectives.objective(objectives.ObjectiveSpec(), stage2_outputs(found, teacher), BATCH)[0]

    compiled = jax.jit(jax.grad(loss)).lower(variables["params"], *tiles(model)).compile(setup.QUICK)
    return float(optax.tree.norm(compiled(variables["params"], *tiles(model))))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["block_input", "attn_output"])
def test_golden_gradient_norm_of_the_student(golden_dir, source):
    np.testing.assert_allclose(gradient_norm(golden_dir, "student", source), GRADIENT_NORMS[source], rtol=1e-4)


@pytest.mark.slow
def test_golden_gradient_norm_of_the_teacher(golden_dir):
    np.testing.assert_allclose(gradient_norm(golden_dir, "teacher"), GRADIENT_NORMS["teacher"], rtol=1e-4)
