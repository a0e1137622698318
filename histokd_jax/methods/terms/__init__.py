"""Named composition of the loss catalogue: `terms = {"kd": 0.9, "sp": 3000, ...}` between any teacher and student.

A term is given as its weight, or as a mapping with `weight`, a schedule (`schedule`, `steps`, ..., see `schedules`),
`layers` ("STUDENT>TEACHER" views that it compares), a `connector` where widths differ, and `options` of the loss.
Networks hand over views: name -> [b, C, ...]. `connect` belongs into a method's forward pass, since connectors are
parameters; `values` and `total` into its objective, which sees the whole batch.
"""

from histokd_jax.methods.terms.evaluate import init_memory, total, values
from histokd_jax.methods.terms.schedules import SCHEDULES, Schedule
from histokd_jax.methods.terms.spec import Term, parse_terms, with_weights
from histokd_jax.methods.terms.views import Links, Views, check_views, connect, init_connectors

__all__ = [
    "SCHEDULES",
    "Links",
    "Schedule",
    "Term",
    "Views",
    "check_views",
    "connect",
    "init_connectors",
    "init_memory",
    "parse_terms",
    "total",
    "values",
    "with_weights",
]
