"""The formats in which conversations are stored: one small file for each, which is a ``Corpus`` (``base.py``)."""
