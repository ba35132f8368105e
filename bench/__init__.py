"""The same work through bare Envoy and through Parallama, in turns; `python -m bench --help`."""
