"""The version of Atoll, in one place (the packaging reads it from here)."""

VERSION = "0.1.0"
