"""Checks and masks shared by the survival metrics."""

from __future__ import annotations

import numpy as np


def checked(time: np.ndarray, event: np.ndarray, **others: np.ndarray) -> tuple[np.ndarray, ...]:
    """The arrays as float64 (event as bool), after checking them.

    Args:
      time: [n] follow-up.
      event: [n] bool or 0/1.
      **others: further arrays whose first axis is n, by name for the messages.

    Returns:
      time, event and the others.

    Raises:
      ValueError: lengths differ, or a value is not finite, or a time negative, or an event neither 0 nor 1.
    """
    time, event = np.asarray(time, np.float64), np.asarray(event)
    arrays = {"time": time, **{name: np.asarray(value, np.float64) for name, value in others.items()}}
    for name, value in arrays.items():
        if time.ndim != 1 or event.shape != time.shape or value.shape[:1] != time.shape:
            raise ValueError(f"{name} has shape {value.shape}, time {time.shape}, event {event.shape}; expected n rows")
        bad = ~np.isfinite(value).all(axis=tuple(range(1, value.ndim)))
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(
                f"{name} of patient {row} is {value[row]}, and {int(bad.sum())} of {len(bad)} are not finite; exclude "
                f"patients without follow-up or prediction first"
            )
    if (time < 0).any():
        row = int(np.argmax(time < 0))
        raise ValueError(f"time of patient {row} is {time[row]:g}; follow-up cannot be negative")
    if event.dtype != bool and not np.isin(event, (0, 1)).all():
        raise ValueError(f"event holds {event[~np.isin(event, (0, 1))][0]}; expected 0 (censored) or 1 (death)")
    return (time, event.astype(bool), *list(arrays.values())[1:])


def drawn_any(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[B] bool: does a resample with multiplicities [B, n] hold any of the `rows` ([n] bool)?"""
    return (np.asarray(weights)[:, rows] > 0).any(axis=1)


def row_blocks(n_rows: int, n_columns: int, entries: int = 1 << 21) -> list[slice]:
    """Consecutive row ranges of at most about `entries` matrix entries each."""
    step = max(1, entries // max(n_columns, 1))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
