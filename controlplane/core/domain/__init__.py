"""The basic types of all other packages: endpoints, requests, events, SLOs, resource names."""
