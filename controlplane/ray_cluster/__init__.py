"""The Ray that ``tierplane up`` starts on this machine, and access to a plane from other processes."""
