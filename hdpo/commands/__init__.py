"""The commands that are not Lightning's: ``plan``, ``report``, ``sweep``, ``export``."""
