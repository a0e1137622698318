"""Signs that a self-supervised representation has collapsed, read off the metrics of an epoch.

The names are a contract between the methods that report them and the tasks that watch them: `std_unit_K`,
`effective_rank_K` and `dead_dims_K` of branch K, `spread_image` and `spread_partner` of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

UNIT_STD, RANK, DEAD, SPREAD = "std_unit_", "effective_rank_", "dead_dims_", "spread_"
LEAST_STD, LEAST_RANK, MOST_DEAD = 0.1, 1.5, 0.5


def signs(means: Mapping[str, float]) -> dict[str, str]:
    """What must be said about an epoch.

    Args:
      means: metric -> mean over the epoch.

    Returns:
      Kind of the finding -> text with the evidence, of those that hold: "collapsed_K", a branch whose embeddings are
      alike, lie on a line, or vary in less than half of their dimensions; "constant_VIEW", inputs that are all alike.
    """
    found = {}
    for branch in sorted(name.removeprefix(UNIT_STD) for name in means if name.startswith(UNIT_STD)):
        evidence = _evidence(means, branch)
        if evidence:
            found[f"collapsed_{branch}"] = (
                f"THE EMBEDDING OF BRANCH {branch} HAS COLLAPSED: {'; '.join(evidence)}. Its encoder learns nothing "
                "like this: check the weights of the variance term (loss.variance), the learning rate and the input of "
                "this branch"
            )
    for view in sorted(name.removeprefix(SPREAD) for name in means if name.startswith(SPREAD)):
        if means[SPREAD + view] <= 0.0:
            found[f"constant_{view}"] = (
                f"THE VIEW '{view}' IS CONSTANT: all examples of every step of the epoch have the same values (largest "
                f"minus smallest, mean over the values of a view: {means[SPREAD + view]:.3g}). Nothing can be learnt "
                "from it: check the files of this view"
            )
    return found


def _evidence(means: Mapping[str, float], branch: str) -> list[str]:
    std, rank, dead = (means.get(name + branch) for name in (UNIT_STD, RANK, DEAD))
    found = []
    if std is not None and std < LEAST_STD:
        found.append(
            f"standard deviation of the normalised embedding {std:.3g} (1 is even, below {LEAST_STD} collapsed)"
        )
    if rank is not None and rank < LEAST_RANK:
        found.append(f"effective rank {rank:.3g} (below {LEAST_RANK}: one direction)")
    if dead is not None and dead > MOST_DEAD:
        found.append(f"{100 * dead:.0f} % of the dimensions are constant")
    return found
