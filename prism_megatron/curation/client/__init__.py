"""Asks endpoints: as fast as they allow, as often as it takes, and never for what is stored."""
