"""The deciding part: pure functions and frozen values. No I/O, no clock, no logging, no Ray."""
