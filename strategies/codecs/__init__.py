"""Codecs: how values become bytes on the wire."""
