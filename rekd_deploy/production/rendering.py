"""From settings to files: everything in ``deploy/``, each written by its format's own library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rekd_deploy.production.compose import compose_documents
from rekd_deploy.production.dashboard import dashboard
from rekd_deploy.production.kserve import kserve_manifests
from rekd_deploy.production.kubernetes import kubernetes_manifests
from rekd_deploy.production.settings import ProductionSettings
from rekd_train.files import write_text

DASHBOARD = "grafana/rekd.json"


def render(settings: ProductionSettings) -> dict[str, str]:
    """The content of each file by its path below the output folder.

    Raises:
        ConfigError: the settings name no image of Triton.
    """
    documents = {
        **_below("compose", compose_documents(settings)),
        **_below("kubernetes", kubernetes_manifests(settings)),
        **_below("kserve", kserve_manifests(settings)),
    }
    files = {path: each if isinstance(each, str) else as_yaml(each) for path, each in documents.items()}
    files[DASHBOARD] = json.dumps(dashboard(settings), indent=2) + "\n"
    return files


def write(files: dict[str, str], output: Path) -> list[Path]:
    """Write each file in turn, whole or not at all; others in the folder stay as they are.

    Returns:
        The paths, in the order of writing.
    """
    written = []
    for path, content in files.items():
        target = output / path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, content)
        written.append(target)
    return written


def as_yaml(document: Any) -> str:
    """YAML in the order of the document, without aliases; texts of several lines as blocks."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Dumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump(document, Dumper=Dumper, sort_keys=False, width=2000, allow_unicode=True)


def _below(folder: str, documents: dict[str, Any]) -> dict[str, Any]:
    return {f"{folder}/{name}": document for name, document in documents.items()}
