"""From a Serve config file to a KubeRay RayService, so that the two can't drift: see ``k8s/README.md``."""
