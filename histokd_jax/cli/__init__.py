"""The `histokd` command."""
