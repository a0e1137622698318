"""Named experiments. Each module has `get_config(arg: str) -> ml_collections.ConfigDict`; strings and numbers only."""
