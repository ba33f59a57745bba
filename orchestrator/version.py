"""The version of Atoll, in one place (the packaging reads it from here), and that of what its processes say."""

VERSION = "0.1.0"
# Counted up whenever processes of two versions of Atoll would misunderstand each other.
PROTOCOL_VERSION = 1
