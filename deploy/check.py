"""Checks deploy/kubernetes against the operator's custom resource definitions, as an API server would.

    python -m deploy.check FOLDER  # with the definitions (ray.io_rayclusters.yaml, ...) of the operator that you run

A field that the server would drop as unknown is an error here. Not checked: rules in CEL (x-kubernetes-validations),
and what the operator itself refuses later.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from jsonschema import Draft202012Validator, ValidationError, validators

MANIFESTS = Path(__file__).parent / "kubernetes"
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the definitions are megabytes


def strict(schema: dict[str, Any], *, top: bool = True) -> dict[str, Any]:
    """Returns the JSON schema that refuses what an API server would prune under a structural schema."""
    schema = dict(schema)
    if "items" in schema:
        schema["items"] = strict(schema["items"], top=False)
    if isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = strict(schema["additionalProperties"], top=False)
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        fields = {name: strict(field, top=False) for name, field in schema.get("properties", {}).items()}
        if top:  # checked by the server itself, so the definition leaves its fields out
            fields["metadata"] = {"type": "object", "required": ["name"]}
        schema |= {"properties": fields, "additionalProperties": False}
    return schema


def repeated(_validator: Any, keys: list[str], items: Any, _schema: Any) -> Iterator[ValidationError]:
    """Yields an error for each name that a list of named things has twice."""
    names = Counter(tuple(item.get(key) for key in keys) for item in items if isinstance(item, dict))
    for name, count in names.items():
        if count > 1:
            yield ValidationError(f"{', '.join(map(str, name))} is there {count} times")


Validator = validators.extend(Draft202012Validator, {"x-kubernetes-list-map-keys": repeated})


def definitions(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the strict schemas of a folder's definitions, by apiVersion and kind."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        definition = yaml.load(path.read_text(), Loader)
        if not isinstance(definition, dict) or definition.get("kind") != "CustomResourceDefinition":
            continue
        spec = definition["spec"]
        for version in spec["versions"]:
            if version["served"]:
                key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                found[key] = strict(version["schema"]["openAPIV3Schema"])
    return found


def problems(manifest: dict[str, Any], schemas: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """Returns what is wrong with a manifest, one line per problem."""
    key = (str(manifest.get("apiVersion")), str(manifest.get("kind")))
    if key not in schemas:
        return [f"no definition of {' '.join(key)} is among: {', '.join(map(' '.join, sorted(schemas))) or 'none'}"]
    errors = Validator(schemas[key]).iter_errors(manifest)
    return sorted(f"{error.json_path.removeprefix('$.')}: {error.message}" for error in errors)


def main(
    crds: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", help="Folder of the operator's custom resource definitions.", show_default=False
        ),
    ] = None,
) -> None:
    """Check the manifests of deploy/kubernetes against the operator's custom resource definitions."""
    if crds is None:
        raise SystemExit(
            "error: name the folder of the operator's custom resource definitions (make check-deploy CRDS=FOLDER): "
            "helm-chart/kuberay-operator/crds of its sources"
        )
    schemas = definitions(crds)
    failed = False
    for path in sorted(MANIFESTS.glob("*.yaml")):
        manifest = yaml.safe_load(path.read_text())
        wrong = problems(manifest, schemas)
        failed |= bool(wrong)
        print(f"{'fail' if wrong else 'ok':4}  {path.name}  {manifest.get('kind')} {manifest.get('apiVersion')}")
        for line in wrong:
            print(f"      {line}")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    typer.run(main)
