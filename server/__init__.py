"""The coordinator: it asks, aggregates, validates, releases; it never sees an image of a site."""
