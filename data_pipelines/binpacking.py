"""Grouping items of known size: equal groups of fixed cardinality, and first-fit packing into bins."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

WINDOW = 256
# Perturbs the packing order of training epochs, so that bags of one window do not meet in the same steps every epoch.
ORDER_JITTER = 0.25


def balanced_groups(sizes: np.ndarray, per_group: int, rng: np.random.Generator) -> np.ndarray:
    """Groups of exactly `per_group` items with nearly equal totals: longest processing time with a cardinality limit.

    Items go by decreasing size to the group with the smallest total that still has room. A giant item therefore ends
    in a group with the smallest ones.

    Args:
      sizes: [g * per_group] int.
      per_group: items of a group.
      rng: shuffles the groups and the items of each group; composition itself is deterministic.

    Returns:
      [g, per_group] int64 indices into `sizes`.

    Raises:
      ValueError: if the items cannot be divided into groups of that cardinality.
    """
    if len(sizes) == 0 or len(sizes) % per_group:
        raise ValueError(f"{len(sizes)} items cannot be divided into groups of {per_group}")
    totals = np.asarray(sizes).tolist()
    members: list[list[int]] = [[] for _ in range(len(totals) // per_group)]
    heap = [(0, group) for group in range(len(members))]
    for item in np.argsort(-np.asarray(sizes, np.int64), kind="stable").tolist():
        total, group = heapq.heappop(heap)
        members[group].append(item)
        if len(members[group]) < per_group:
            heapq.heappush(heap, (total + totals[item], group))
    return rng.permuted(rng.permutation(np.array(members, np.int64)), axis=1)


def first_fit_groups(
    sizes: np.ndarray, capacity: int, max_items: int | None = None, *, rng: np.random.Generator | None = None
) -> list[np.ndarray]:
    """First-fit-decreasing packing in windows of 256 items; bins stay open across windows.

    Args:
      sizes: [n] int, each <= capacity.
      capacity: largest total of a bin.
      max_items: largest number of items of a bin, None for no limit.
      rng: if given, the order within a window is perturbed, and bins and their items are shuffled.

    Returns:
      One int64 index array per bin; every item is in exactly one bin.

    Raises:
      ValueError: if an item is larger than a bin, or a bin may hold no item.
    """
    sizes = np.asarray(sizes, np.int64)
    check_items(sizes, capacity, max_items)
    limit = len(sizes) if max_items is None else max_items
    free = np.full(len(sizes), capacity, np.int64)
    bins: list[list[int]] = []
    for low in range(0, len(sizes), WINDOW):
        for item in _packing_order(sizes[low : low + WINDOW], rng) + low:
            # Slots beyond len(bins) are untouched bins, so the search always succeeds and may open a new one.
            target = int(np.argmax(free[: len(bins) + 1] >= sizes[item]))
            if target == len(bins):
                bins.append([])
            bins[target].append(int(item))
            free[target] = free[target] - sizes[item] if len(bins[target]) < limit else -1
    groups = [np.array(members, np.int64) for members in bins]
    return groups if rng is None else _shuffled(groups, rng)


def check_items(sizes: np.ndarray, capacity: int, max_items: int | None) -> None:
    """Refuses items that no bin can hold.

    Args:
      sizes: [n] int.
      capacity: largest total of a bin.
      max_items: largest number of items of a bin, None for no limit.

    Raises:
      ValueError: if an item is larger than a bin, or a bin may hold no item.
    """
    if max_items is not None and max_items < 1:
        raise ValueError(f"num_slots is {max_items}; a step must have at least one slot")
    if sizes.max() > capacity:
        item = int(np.argmax(sizes))
        raise ValueError(f"slide {item} has {sizes[item]} patches but a step holds {capacity}: raise the capacity")


def split_to(groups: Sequence[np.ndarray], num_groups: int) -> list[np.ndarray]:
    """Splits the groups with most items until there are `num_groups`.

    Args:
      groups: index arrays.
      num_groups: wanted number, at least len(groups) and at most the number of items.

    Returns:
      `num_groups` index arrays with the same items.

    Raises:
      ValueError: if only groups of one item are left to split.
    """
    groups = list(groups)
    while len(groups) < num_groups:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        group = groups[largest]
        if len(group) < 2:
            raise ValueError(f"cannot make {num_groups} non-empty groups from {len(groups)} single items")
        groups[largest] = group[::2]
        groups.append(group[1::2])
    return groups


def _packing_order(sizes: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    key = sizes.astype(np.float64)
    if rng is not None:
        key *= np.exp(rng.uniform(-ORDER_JITTER, ORDER_JITTER, len(sizes)))
    return np.argsort(-key, kind="stable")


def _shuffled(groups: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.permutation(groups[i]) for i in rng.permutation(len(groups))]
