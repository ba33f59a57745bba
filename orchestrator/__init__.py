"""The brain: decides membership, exchanges, leases and placement; command line and reports."""
