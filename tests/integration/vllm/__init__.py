"""Tests with real vLLM: a package, so that its plane is started once and ended before what comes after."""
