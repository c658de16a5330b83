"""Checks deploy/kubernetes against Kubernetes' own schemas and operators' custom resource definitions, as an API server
would.

    python -m deploy.check FOLDER  # with the definitions (ray.io_rayclusters.yaml, ...) of the operators that you run

A field that the server would drop as unknown is an error here. Not checked: rules in CEL (x-kubernetes-validations),
and what an operator itself refuses later.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from jsonschema import Draft202012Validator, ValidationError, validators

MANIFESTS = Path(__file__).parent / "kubernetes"
BUILT_IN = ("v1", "apps/v1", "networking.k8s.io/v1", "policy/v1")  # what kubernetes-validate has the schemas of
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


def manifests() -> dict[str, list[dict[str, Any]]]:
    """Returns the objects of every manifest, by the name of its file."""
    paths = sorted(path for path in MANIFESTS.glob("*.yaml") if path.name != "kustomization.yaml")
    return {path.name: list(yaml.safe_load_all(path.read_text())) for path in paths}


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
    if key[0] in BUILT_IN:
        return problems_of_built_in(manifest)
    if key not in schemas:
        return [f"no definition of {' '.join(key)} is among: {', '.join(map(' '.join, sorted(schemas))) or 'none'}"]
    errors = Validator(schemas[key]).iter_errors(manifest)
    return sorted(f"{error.json_path.removeprefix('$.')}: {error.message}" for error in errors)


def problems_of_built_in(manifest: dict[str, Any]) -> list[str]:
    """Returns the same for an object that every Kubernetes has."""
    try:
        import kubernetes_validate  # of 100 MB, so not among the development dependencies
    except ModuleNotFoundError:
        return ["not checked: `make check-deploy` installs kubernetes-validate"]
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def main(
    crds: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", help="Folder of the operators' custom resource definitions.", show_default=False
        ),
    ] = None,
) -> None:
    """Check the manifests of deploy/kubernetes against Kubernetes' schemas and these definitions."""
    if crds is None:
        raise SystemExit(
            "error: name the folder of the operators' custom resource definitions (make check-deploy CRDS=FOLDER): "
            "helm-chart/kuberay-operator/crds of KubeRay's sources, and those of Prometheus' operator"
        )
    schemas = definitions(crds)
    failed = False
    for name, objects in manifests().items():
        for manifest in objects:
            wrong = problems(manifest, schemas)
            failed |= bool(wrong)
            print(f"{'fail' if wrong else 'ok':4}  {name}  {manifest.get('kind')} {manifest.get('apiVersion')}")
            for line in wrong:
                print(f"      {line}")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    typer.run(main)
