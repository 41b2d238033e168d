"""The whole-board test: one module, one boot, its tests in the order that they stand in."""
