"""Tests of emulated boards. The fixture `emulated_board` is that of the pytest plugin, which users have too."""
