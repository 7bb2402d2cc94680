"""From a config to weights."""
