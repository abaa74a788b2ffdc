"""Generates a KubeRay RayService from a Serve config file, so that the two agree: see ``k8s/README.md``."""
