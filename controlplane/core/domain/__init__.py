"""The nouns that every other package uses: endpoints, requests, events, SLOs, resource names."""
