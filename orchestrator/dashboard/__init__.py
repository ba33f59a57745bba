"""The dashboard: a small web server that shows one run, live from its controller or from its files."""
