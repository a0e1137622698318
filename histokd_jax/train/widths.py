"""Programs of trainings whose folds may choose gene groups of sizes of their own, and so networks of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from data_pipelines import schema
from histokd_jax.methods import registry
from histokd_jax.train import gene_choice, run
from histokd_jax.train.experiment import Experiment, FoldData
from histokd_jax.train.programs import Programs
from histokd_jax.types import DataSpec, Method


class Widths:
    """Equal networks share one `Programs`, and so may share one compiled step.

    Args:
      experiment: any of the group.
      method: of one fold; that of all folds if none chooses gene groups.
    """

    def __init__(self, experiment: Experiment, method: Method):
        self._experiment, self._method = experiment, method
        self._by_spec: dict[DataSpec | None, Programs] = {}

    def programs(self, data: FoldData) -> Programs:
        """The steps for the networks of one fold; the same object for equal sizes of its gene groups."""
        spec = self._spec(data.selections)
        if spec not in self._by_spec:
            self._by_spec[spec] = run.make_programs(self._experiment, self._build(spec))
        return self._by_spec[spec]

    def _spec(self, selections: Mapping[str, gene_choice.Selection]) -> DataSpec | None:
        """What the fold's networks must know beside what all folds share; None if that is nothing."""
        if not gene_choice.varies_by_fold(self._experiment.cfg) or schema.GENES not in selections:
            return None
        chosen = selections[schema.GENES]
        shared = DataSpec(
            self._experiment.manifest.feat_dim, self._experiment.num_classes, task=self._experiment.task.kind
        )
        groups = gene_choice.group_sizes(chosen)
        return dataclasses.replace(shared, num_genes=len(chosen.names), gene_groups=groups)

    def _build(self, spec: DataSpec | None) -> Method:
        if spec is None:
            return self._method
        return registry.get_method(self._experiment.cfg.method)(self._experiment.cfg, spec)
