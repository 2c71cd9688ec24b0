"""Losses as pure functions on tensors: no collectives, no config objects, global denominators passed in."""
