"""Pipelines: seeding by example, sharing of geometry, and the checks F3-5 and M10 of the specifications."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_reference import picture
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from histokd_jax.ops.image import photometric, presets, steps, steps_colour
from histokd_jax.ops.image.augment import augment, augment_one, augment_views, step_keys

KEY = jax.random.key(11)
BATCH = np.stack([picture(24, 24, seed) for seed in range(8)])
EXAMPLES = np.array([5, 0, 91, 17, 4, 3, 2000000000, 8], np.int32)
NAMES = ("mfl_faithful", "mfl_corrected", "geometric_only", "hmkd_faithful", "stain_jitter")


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def run(key, example, images, pipeline, branch=0, shared=False):
    return augment(key, example, images, pipeline, branch=branch, shared_geometry=shared)


def many(function, n=4000):
    """function(key) for n examples."""
    return np.asarray(jax.jit(jax.vmap(lambda i: function(jax.random.fold_in(KEY, i))))(jnp.arange(n)))


def within_three_sigma(hits, probability):
    sigma = np.sqrt(probability * (1 - probability) / len(hits))
    return abs(np.mean(hits) - probability) < 3 * sigma


# --- seeding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_augmented_alike_in_every_batch(name):
    pipeline = presets.recipe(name).image
    full = np.asarray(run(KEY, EXAMPLES, BATCH, pipeline))
    order = np.array([6, 1, 3])
    part = np.asarray(run(KEY, EXAMPLES[order], BATCH[order], pipeline))
    np.testing.assert_allclose(part, full[order], atol=1e-3)
    alone = augment_one(jax.random.fold_in(KEY, EXAMPLES[3]), BATCH[3], pipeline)
    np.testing.assert_allclose(alone, full[3], atol=1e-3)


def test_the_number_of_devices_changes_nothing():
    pipeline = presets.recipe("mfl_faithful").image
    alone = np.asarray(run(KEY, EXAMPLES, BATCH, pipeline))
    for count in (2, 8):
        mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
        rows = NamedSharding(mesh, P("data"))
        found = run(KEY, jax.device_put(EXAMPLES, rows), jax.device_put(BATCH, rows), pipeline)
        np.testing.assert_allclose(found, alone, atol=1e-3)
        assert found.sharding.is_equivalent_to(rows, 4), "nothing was gathered"


def test_step_example_branch_and_place_draw_differently():
    flips = presets.recipe("mfl_faithful").image
    base = np.asarray(run(KEY, EXAMPLES, BATCH, flips))
    assert not np.allclose(run(jax.random.key(12), EXAMPLES, BATCH, flips), base)
    assert not np.allclose(run(KEY, EXAMPLES, BATCH, flips, 1), base)
    same = np.stack([BATCH[0]] * 8)
    assert len({row.tobytes() for row in np.asarray(run(KEY, EXAMPLES, same, flips))}) == 8
    keys = np.concatenate([jax.random.key_data(step_keys(KEY, flips, branch)) for branch in (0, 1)])
    assert len({k.tobytes() for k in keys}) == 2 * len(flips)


def test_the_same_call_gives_the_same_bytes():
    pipeline = presets.recipe("mfl_faithful").image
    np.testing.assert_array_equal(run(KEY, EXAMPLES, BATCH, pipeline), run(KEY, EXAMPLES, BATCH, pipeline))


def test_every_image_needs_its_number():
    with pytest.raises(ValueError, match=r"example has the shape \(7,\), images \(8, 24, 24, 3\)"):
        augment(KEY, EXAMPLES[:7], BATCH, ())


# --- geometry of several views -----------------------------------------------------------------------------------


def flips_of(images):
    """Which of the four flips a batch of 2 x 2 corner-coded images underwent."""
    corners = np.asarray(images)[:, [0, 0, 1, 1], [0, 1, 0, 1], 0]
    return corners.argmax(1)


@pytest.mark.parametrize(("name", "agree"), [("hmkd_faithful", 0.25), ("hmkd_paired_flips", 1.0)])
def test_M10_stains_agree_in_both_flips_as_often_as_specified(name, agree):
    n = 4000
    image = np.zeros((n, 2, 2, 3), np.uint8)
    image[:, 0, 0] = 255
    recipe = presets.recipe(name)
    first, second = augment_views(
        KEY, jnp.arange(n), (image, image), (recipe.image, recipe.partner), shared_geometry=recipe.shared_geometry
    )
    assert first.dtype == jnp.uint8
    same = flips_of(first) == flips_of(second)
    assert same.all() if agree == 1 else within_three_sigma(same, agree)
    for way in range(4):
        assert within_three_sigma(flips_of(first) == way, 0.25)


def test_shared_geometry_moves_views_alike_although_one_has_colour_steps():
    recipe = presets.recipe("mfl_corrected")
    plain = presets.mfl_geometry()
    alike = augment_views(KEY, EXAMPLES, (BATCH, BATCH), (plain, recipe.partner), shared_geometry=True)
    np.testing.assert_array_equal(*alike)
    colourless = tuple(s for s in recipe.image if s.geometric or isinstance(s, steps_colour.Clip))
    moved = augment_views(KEY, EXAMPLES, (BATCH, BATCH), (colourless, plain), shared_geometry=True)
    np.testing.assert_allclose(*moved, atol=1e-3)
    apart = augment_views(KEY, EXAMPLES, (BATCH, BATCH), (plain, plain))
    assert not np.allclose(*apart)


def test_colour_steps_stay_independent_when_geometry_is_shared():
    pipeline = presets.stain_jitter()
    first, second = augment_views(KEY, EXAMPLES, (BATCH, BATCH), (pipeline, pipeline), shared_geometry=True)
    assert not np.allclose(first, second)


def test_shared_geometry_of_different_steps_is_refused():
    with pytest.raises(ValueError, match="same geometric steps in all views: view 0 has .*view 1 has"):
        presets.Recipe(presets.mfl_geometry(), (), shared_geometry=True)
    with pytest.raises(ValueError, match="2 views and 1 pipelines"):
        augment_views(KEY, EXAMPLES, (BATCH, BATCH), ((),))


# --- More From Less, F3-5 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [24, 25, 224])
def test_F3_5_crop_sides_lie_between_three_quarters_and_the_whole(side):
    step = steps.RandomCrop()
    drawn = jax.jit(jax.vmap(lambda i: step.numbers(jax.random.fold_in(KEY, i), (side, side, 3))))(jnp.arange(4000))
    height, width, top, left = (np.asarray(drawn[name]) for name in ("height", "width", "top", "left"))
    for length, start in ((height, top), (width, left)):
        assert length.min() >= np.floor(0.75 * side) and length.max() <= side
        assert start.min() == 0 and (start + length).max() == side and (start + length <= side).all()
    assert abs(np.corrcoef(height, width)[0, 1]) < 0.05, "sides are drawn independently"
    # floor(U side) loses half a pixel on average.
    assert abs(height.mean() - (0.875 * side - 0.5)) < 3 * side * 0.25 / np.sqrt(12 * 4000) + 0.01


@pytest.mark.parametrize("name", ["mfl_faithful", "mfl_corrected"])
def test_F3_5_steps_are_applied_as_often_as_specified(name):
    pipeline = presets.recipe(name).image
    expected = {"HorizontalFlip": 0.5, "VerticalFlip": 0.5, "ZerosToNoise": 0.3, "Rotate": 0.4, "Solarise": 0.3}
    found = {type(s).__name__: s for s in pipeline}
    assert {n: s.probability for n, s in found.items() if s.probability < 1} == expected
    hits = many(lambda key: jnp.stack([s.chosen(k) for s, k in zip(pipeline, step_keys(key, pipeline))]))
    for step, own in zip(pipeline, hits.T):
        assert own.all() if step.probability == 1 else within_three_sigma(own, step.probability), type(step).__name__


@pytest.mark.parametrize("name", ["mfl_faithful", "mfl_corrected", "stain_jitter"])
def test_F3_5_output_stays_on_the_scale(name):
    images = np.concatenate([BATCH, np.zeros_like(BATCH[:1]), np.full_like(BATCH[:1], 255)])
    for seed in range(3):
        found = np.asarray(run(jax.random.key(seed), np.arange(10), images, presets.recipe(name).image))
        assert found.dtype == np.float32 and found.min() >= 0 and found.max() <= 255


def test_F3_5_solarise_inverts_nearly_everything_as_released_and_not_when_corrected():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)

    def inverted(step):
        threshold = many(lambda key: step.numbers(key, image.shape)["threshold"], 200)
        results = [np.asarray(photometric.solarise(image, jnp.float32(t))) for t in threshold[:20]]
        return threshold, np.array([(r == 255.0 - image).mean() for r in results])

    threshold, share = inverted(steps_colour.Solarise())
    assert threshold.min() >= 0.01 and threshold.max() < 0.6 and share.min() > 0.99
    threshold, share = inverted(steps_colour.Solarise(scale=255.0))
    assert threshold.max() > 100 and share.min() < 0.7


def test_F3_5_colour_steps_leave_grey_grey():
    colour_only = tuple(s for s in presets.mfl_faithful() if not s.geometric and s.probability == 1)
    grey = np.full((4, 24, 24, 3), np.array([1, 77, 200, 255], np.uint8)[:, None, None, None])
    found = np.asarray(run(KEY, np.arange(4), grey, colour_only))
    assert (found.max(-1) - found.min(-1)).max() < 1e-3
    assert np.abs(found - grey).max() < 0.41, "only the brightness of 0.4 levels is left"


def test_drawn_numbers_are_uniform_on_their_interval():
    cases = {
        "angle": (steps.Rotate(), 0.0, np.pi),
        "delta": (steps_colour.Brightness(), -0.4, 0.4),
        "factor": (steps_colour.Contrast(), 0.6, 1.4),
        "shift": (steps_colour.Hue(), -0.1, 0.1),
    }
    for name, (step, low, high) in cases.items():
        values = many(lambda key, step=step, name=name: step.numbers(key, (4, 4, 3))[name])
        assert low <= values.min() < values.max() < high + 1e-6
        assert abs(values.mean() - (low + high) / 2) < 3 * (high - low) / np.sqrt(12 * len(values))
    noise = np.asarray(steps_colour.ZerosToNoise().numbers(KEY, (50, 50, 3))["noise"])
    assert 0 <= noise.min() and 250 < noise.max() < 256 and len(np.unique(noise)) > 7000


def test_noise_pictures_are_uniform_and_unrelated_between_places_and_keys():
    keys = jax.random.split(KEY, 6)
    fields = np.stack([np.asarray(steps.field(key, (64, 64, 3))) for key in keys])
    assert 0 <= fields.min() and fields.max() < 1
    counts = np.histogram(fields, bins=64, range=(0, 1))[0]
    expected = fields.size / 64
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - 63) < 4 * np.sqrt(2 * 63)
    flat = fields.reshape(6, -1) - 0.5
    bound = 5 / np.sqrt(flat.shape[1])
    assert np.abs(np.corrcoef(flat) - np.eye(6)).max() < bound
    for lag in (1, 3, 192):
        assert abs((flat[0, lag:] * flat[0, :-lag]).mean() * 12) < bound


def test_the_pipeline_is_its_steps_in_order():
    pipeline = presets.recipe("mfl_faithful").image
    assert [type(s).__name__ for s in pipeline] == [
        "HorizontalFlip", "VerticalFlip", "RandomCrop", "ZerosToNoise", "Rotate", "Solarise", "Brightness", "Contrast",
        "Saturation", "Hue", "Clip",
    ]  # fmt: skip
    image, own = jnp.asarray(BATCH[0]), jax.random.fold_in(KEY, 5)
    for step, key in zip(pipeline, step_keys(own, pipeline)):
        changed = step.apply(image, **step.numbers(key, image.shape))
        image = jnp.where(step.chosen(key), changed, image.astype(changed.dtype))
    np.testing.assert_allclose(image, run(KEY, EXAMPLES, BATCH, pipeline)[0], atol=1e-3)


def test_crops_change_the_size_of_all_images():
    found = run(KEY, EXAMPLES, BATCH, presets.recipe("mfl_faithful", (17, 30)).image)
    assert found.shape == (8, 17, 30, 3)
    with pytest.raises(ValueError, match="examples would differ in size"):
        run(KEY, EXAMPLES, BATCH, (steps.RandomCrop(size=(8, 8), probability=0.5),))


def test_none_returns_the_images_themselves():
    recipe = presets.recipe("none")
    assert recipe.image == recipe.partner == () and augment(KEY, EXAMPLES, BATCH, ()) is BATCH


def test_memory_stays_within_a_few_copies_of_the_batch():
    images = jax.ShapeDtypeStruct((16, 64, 64, 3), jnp.uint8)
    lowered = run.lower(KEY, jax.ShapeDtypeStruct((16,), jnp.int32), images, presets.recipe("mfl_faithful").image)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporary < 8 * 4 * 16 * 64 * 64 * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: presets.recipe("mfl"), "unknown augmentation 'mfl'; known are none, geometric_only, mfl_faithful"),
        (lambda: steps.HorizontalFlip(probability=1.5), r"HorizontalFlip: probability is 1.5; expected .*\[0, 1\]"),
        (lambda: steps.RandomCrop(fraction=(0.0, 1.0)), "RandomCrop: fraction is"),
        (lambda: steps.RandomCrop(fraction=(0.9, 0.8)), "RandomCrop: fraction is .*low <= high"),
        (lambda: steps.Rotate(interpolation="cubic"), "interpolation is 'cubic'"),
        (lambda: steps_colour.Contrast(factor=(-1.0, 1.0)), "Contrast: factor is .*0.0 <= low"),
        (lambda: steps_colour.StainJitter(sigma=-0.1), "StainJitter: sigma is"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
