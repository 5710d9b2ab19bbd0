"""What Ray's endpoint for Prometheus says."""

from __future__ import annotations

import re
import urllib.request

from serve.metrics import SPECS


def scrape(
    name: str, application: str = "twotower", deployment: str = "Retrieval"
) -> dict[tuple[str, ...], float]:
    """Return the samples of a metric at Ray's endpoint, summed over replicas, by their own tags' values."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    base = name.removesuffix("_total").removesuffix("_count").removesuffix("_sum").removesuffix("_bucket")
    tags = (*SPECS[base].tags, *(["le"] if name.endswith("_bucket") else []))
    found: dict[tuple[str, ...], float] = {}
    for labels, value in re.findall(rf"^ray_{name}{{(.*)}} (\S+)$", text, re.MULTILINE):
        values = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        # Other tests may serve applications of their own beside this one.
        if (values["application"], values["deployment"]) != (application, deployment):
            continue
        key = tuple(values[tag] for tag in tags)
        found[key] = found.get(key, 0) + float(value)
    return found
