"""`parallama up`: Envoy, the services, Valkey and a model, as children of one process."""
