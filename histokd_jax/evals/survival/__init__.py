"""Survival metrics, curves and intervals in NumPy.

Arrays have one row per patient (`groups.per_patient` averages rows of a patient): `time` is the follow-up in months,
`event` True where the death was observed, and a higher `risk` means an earlier death. A metric that the data cannot
give is NaN with a reason, never a neutral-looking number.
"""
