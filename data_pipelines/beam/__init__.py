"""The same work as on one machine, on Apache Beam: a stage is independent items and one step at the end."""
