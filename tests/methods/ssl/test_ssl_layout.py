"""Branches: layouts as lists, shared and separate networks, projectors that are skipped."""

import pytest

from histokd_jax.methods.ssl.layout import LAYOUTS, Layout, make_layout

I, P = "image", "partner"


def test_the_four_layouts_of_section_2():
    found = {name: make_layout(name) for name in LAYOUTS}
    assert found == {
        "unprivileged": Layout((I, I), (0, 0), (0, 0)),
        "privileged": Layout((I, P), (0, 1), (0, 1)),
        "trident": Layout((I, I, P), (0, 0, 1), (0, 0, 1)),
        "privileged_only": Layout((P, P), (1, 1), (1, 1)),
    }
    assert found["trident"].groups() == ("encoder_0", "encoder_1", "projector_0", "projector_1")


def test_primary_branches_may_have_networks_of_their_own():
    assert make_layout("trident", share_primary=False) == Layout((I, I, P), (0, 2, 1), (0, 2, 1))
    assert make_layout("unprivileged", share_primary=False).encoders == (0, 2)
    assert make_layout("trident", own_projectors=True) == Layout((I, I, P), (0, 0, 1), (0, 2, 1))


def test_numbers_can_be_given_and_a_short_list_of_projectors_leaves_the_rest_without():
    shared = make_layout("privileged", encoders=(0, 0))
    assert shared.encoders == shared.projectors == (0, 0) and shared.input_of(0) == (I, P)
    assert make_layout("trident", projectors=(0, 0)).projectors == (0, 0, -1)
    assert make_layout("privileged", projectors=(-1,)).groups() == ("encoder_0", "encoder_1")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "siamese"}, "layout.name='siamese' is unknown"),
        ({"name": "trident", "encoders": (0, 1)}, "trident has 3 branches"),
        ({"name": "trident", "encoders": (0, -1, 1)}, "a number >= 0"),
        ({"name": "privileged", "projectors": (0, 1, 1)}, "privileged has 2 branches"),
        ({"name": "privileged", "projectors": (-2,)}, "or -1 for none"),
    ],
)
def test_lists_that_fit_no_layout_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        make_layout(**changes)
