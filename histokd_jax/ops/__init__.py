"""Pure array functions: no Linen, no configuration."""
