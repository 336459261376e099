"""Pipelines inside other people's frameworks; each module needs a package, and names its extra."""
