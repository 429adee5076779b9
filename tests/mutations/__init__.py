"""Break the code on purpose, one change at a time, and see which tests fail; see docs/CONTRIBUTING.md."""
