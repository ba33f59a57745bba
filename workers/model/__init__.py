"""Models: the built-in decoder, factories of the user, export and sampling."""
